"""memeff_attention.py beside plain attention, the paper's form, torch if it is there, and itself.

What      Times: forward pass and forward plus gradient, in float32. What products of matrices allow
          on this machine. Figures that no noise touches: temporary bytes, FLOPs. On a GPU instead
          of the times: milliseconds and share of the matrix peak of the kernel, the tiles and
          cuDNN, in bfloat16; that part has not yet been run.
How       One process; each round runs every contender once, in random order; medians over the
          rounds after two that warm up. Outputs and gradients are compared first.
Run       make bench FILE=memeff_attention
          python bench/bench_memeff_attention.py --pairs 9
          About 5 minutes on two CPU cores. Replaces its section in bench/RESULTS.md.
Before    To race an earlier version in the same rounds:
          git show COMMIT:memeff_attention.py > ../earlier.py
          python bench/bench_memeff_attention.py --before ../earlier.py
"""

import argparse
import functools
import importlib.util
import itertools
import math
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from bench_vit import (
    ROOT,
    flops,
    interleave,
    machine,
    product_of,
    show,
    speed_row,
    temporary_bytes,
    write_section,
)
from jax import lax

from memeff_attention import (
    attention,
    attention_by_definition,
    attention_checkpointed,
    gradient_of,
)

# Copied into RESULTS.md by every run.
TRIED = """
### What was tried

Two CPU cores, n = 4,096, 8 heads of 64, float32, JAX 0.10.2. These were measured while
memeff_attention.py was first written. Tiles are queries x keys.

| forward pass | ms |
| --- | --- |
| plain jnp | 795 |
| running softmax, one head per loop body, tiles of 2,048 x 512 or 4,096 x 256 | 222 to 225 |
| the same, 1,024 x 512 | 240 |
| the same, 1,024 x 1,024 | 234 |
| all 8 heads in one loop body | 252 to 411 |
| scores transposed | 249 |
| exp2 instead of exp | 226 |
| whole rows of 128 or 512 queries, no running softmax | 307 to 325 |
| arrays with three outer axes of length 1: XLA does not divide them between cores | 240 |
| the same with none, in the same race | 231 |

A later day, with its own floor: what the same loop takes if it holds nothing but the two products.

| forward pass | ms |
| --- | --- |
| as it is, tiles of 2,048 x 512 | 231 (least 220) |
| heads taken by index in the loop, none transposed: 9 MB, not 34 | 227 (least 211) |
| that, and no running maximum, which is wrong for large scores | 206 to 242 (least 203) |
| nothing but the products, 2,048 x 512 | 182 (least 177) |
| nothing but the products, 4,096 x 256 | 176 (least 170) |
| torch | 218 (least 211) |

| forward plus gradient | ms |
| --- | --- |
| weights [t,s], with products that sum the left side's first axis | 1,061 |
| gradients of k and v accumulated transposed, tiles of 2,048 x 512 | 728 |
| whole tiles transposed, 512 x 2,048 | 708 |
| whole tiles transposed, 512 x 4,096 | 664 |
| the later day: 512 x 4,096 | 738 (least 724) |
| 512 x 2,048, as it is now | 719 (least 707) |
| 256 x 4,096 | 719 (least 700) |
| 1,024 x 1,024 | 736 (least 719) |

A product of [2048,64] and [64,512] called by itself reached 159 GFLOP/s, its counterpart with v
166, one of [2048,2048] 183 to 208. So the products alone are 79 % of the best forward pass, and 1.4
times torch's speed, about 155 ms, would be faster than they are.

When the file was rewritten for its readers, head and tile became one loop, and the backward pass
uses the forward pass's scores to the bit (milliseconds of one day, interleaved):

| forward plus gradient | ms | earlier | MB |
| --- | --- | --- | --- |
| a head as [1,1,1,t,K] instead of [t,K] | 1,238 | 894 | 52.7 |
| as [t,K], the gradient of q added as [t,K] | 1,058 | 894 | 48.0 |
| the same, added as [K,t] | 889 | 886 | 48.0 |
| with a bias, added before the scores are transposed | 1,606 | 1,364 | 48.0 |
| the same, added after | 1,208 | 1,204 | 48.0 |
| causal, tiles of 1,024 x 512 and 512 x 1,024 | 611 | 626 | 45.4 |
| causal, tiles of 512 x 512 | 603 | 612 | 44.0 |

Causal with tiles of 512 x 512 instead of 1,024 x 512: with n = 1,024 forward 1.24 and with gradient
1.20 times as fast, with n = 2,048 1.07 and 1.07, with n = 4,096 0.97 and 0.99.
"""

# ==== Contenders ==================================================================================


class Case(NamedTuple):
    n: int  # queries and keys
    heads: int
    causal: bool
    gradient: bool
    goals: dict  # peer -> how many times its speed is wanted, None for no goal


CASES = (
    Case(4096, 8, False, False, {"plain jnp": 4, "the paper's form": None, "torch": 1.4}),
    Case(16384, 1, False, False, {"plain jnp": 4, "the paper's form": None, "torch": 1.4}),
    Case(4096, 8, False, True, {"plain jnp": None, "the paper's form": None, "torch": 1.1}),
    Case(16384, 1, False, True, {"the paper's form": None, "torch": 1.1}),
    Case(1024, 8, True, False, {"torch": None}),
    Case(1024, 8, True, True, {"torch": None}),
    Case(4096, 8, True, False, {"torch": None}),
    Case(4096, 8, True, True, {"torch": None}),
)
SMALL = {"q_chunk": 256, "kv_chunk": 256}  # near the square root of 16,384: the fewest bytes


def plain(q, k, v):
    """Attention as one writes it in jax.numpy. [B,T,H,K], [B,S,H,K], [B,S,H,V] -> [B,T,H,V]."""
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[-1])
    return jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(scores), v)


def compiled(function, gradient):
    """Jitted (q, k, v, dout) -> (out,), or (out, dq, dk, dv). An input dout cannot be folded."""

    def forward(q, k, v, dout):
        return (function(q, k, v),)

    def both(q, k, v, dout):
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(dout)

    return jax.jit(both if gradient else forward)


def make_torch(torch, case: Case, arrays):
    """Runs PyTorch's attention once on contiguous [B,H,T,K], eager: () -> tensors."""
    tensors = [torch.tensor(np.asarray(x)).transpose(1, 2).contiguous() for x in arrays]
    *qkv, dout = tensors

    def forward():
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(*qkv, is_causal=case.causal)

    def both():
        out = forward()
        return out.detach(), *torch.autograd.grad(out, qkv, dout)

    if case.gradient:
        for x in qkv:
            x.requires_grad_()
        return both
    return torch.no_grad()(lambda: (forward(),))


def contenders(case: Case, torch, earlier) -> dict:
    """Name -> () -> (out,) or (out, dq, dk, dv). Batch 1, heads of 64."""
    arrays = np.random.default_rng(0).standard_normal((4, 1, case.n, case.heads, 64), np.float32)
    arrays[3] = 1  # the gradient is that of the sum
    arrays = [jnp.asarray(x) for x in arrays]
    functions = {"ours": functools.partial(attention, causal=case.causal)}
    known = {"plain jnp": plain, "the paper's form": attention_checkpointed}
    functions |= {name: known[name] for name in case.goals if name in known}
    if earlier:
        functions["earlier"] = functools.partial(earlier.attention, causal=case.causal)
    calls = {}
    for name, function in functions.items():
        calls[name] = functools.partial(compiled(function, case.gradient), *arrays)
    if torch:
        calls["torch"] = make_torch(torch, case, arrays)
    return calls


def check_equal(functions: dict):
    """All contenders give the same outputs and gradients, up to 1e-5 of the largest."""
    want = functions["ours"]()
    for name, function in functions.items():
        for ours, peer in zip(want, function()):
            peer = np.asarray(peer)
            if name == "torch":
                peer = peer.swapaxes(1, 2)
            assert np.abs(peer - ours).max() < 1e-5 * np.abs(ours).max(), name


def import_torch():
    """PyTorch on all cores, or None."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(os.cpu_count())
    return torch


def import_file(path):
    """A Python file as a module."""
    spec = importlib.util.spec_from_file_location("earlier", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ==== Report ======================================================================================


def describe(case: Case) -> str:
    what = "forward plus gradient" if case.gradient else "forward"
    causal = ", causal" if case.causal else ""
    heads = "1 head" if case.heads == 1 else f"{case.heads} heads"
    return f"{what}{causal}, n = {case.n:,}, {heads}"


def beside_peers(pairs, torch, earlier) -> list[str]:
    """The table of times on a CPU, a line for each peer of each case."""
    lines = [
        "| ms | memeff_attention.py | peer | ratio | goal |",
        "| --- | --- | --- | --- | --- |",
    ]
    for case in CASES:
        functions = contenders(case, torch, earlier)
        check_equal(functions)
        times = interleave(functions, pairs)
        for peer in times:
            if peer != "ours":
                name = f"{describe(case)}: {peer}"
                goal = case.goals.get(peer)
                lines.append(speed_row(name, times["ours"], times[peer], goal))
    return lines


def products_of(rows, inner, columns, number):
    """Multiplies [rows,inner] by so many [inner,columns], one after the other, in XLA."""
    left = jnp.ones((rows, inner))
    right = jnp.ones((number, inner, columns))
    start = jnp.ones((rows, columns))

    @jax.jit
    def multiply(left, right, start):
        last, _ = lax.scan(lambda _, part: (left @ part, None), start, right)
        return last

    return lambda: multiply(left, right, start)


def flops_of(case: Case) -> int:
    """Of attention with default chunks."""
    x = jax.ShapeDtypeStruct((1, case.n, case.heads, 64), jnp.float32)
    function = compiled(functools.partial(attention, causal=case.causal), case.gradient)
    return flops(jax.make_jaxpr(function)(x, x, x, x).jaxpr)


def beside_products(pairs) -> list[str]:
    """What products of matrices reach on a CPU, 17.2 GFLOP each time, and what that leaves."""
    functions = {
        "[2048,2048] x [2048,2048]": product_of(jnp.float32, 2048),
        "128 of a tile with k, [2048,64] x [64,512]": products_of(2048, 64, 512, 128),
        "128 of a tile with v, [2048,512] x [512,64]": products_of(2048, 512, 64, 128),
    }
    seconds = {name: np.median(times) for name, times in interleave(functions, pairs).items()}
    done = 2 * 2048**3
    fastest = done / min(seconds.values())
    lines = ["| products in XLA | ms | GFLOP/s |", "| --- | --- | --- |"]
    for name, s in seconds.items():
        lines.append(f"| {name} | {s * 1e3:.1f} | {done / s / 1e9:.0f} |")
    lines.append("")
    for case in (CASES[0], CASES[2]):
        needed = flops_of(case)
        name = describe(case).capitalize()
        least = 1e3 * needed / fastest
        lines.append(f"{name}: {needed / 1e9:.1f} GFLOP, {least:,.0f} ms at the fastest speed.")
    return lines


def exact() -> list[str]:
    """What repeats exactly: temporary bytes beside the definition's, FLOPs of causal attention."""
    x = jax.ShapeDtypeStruct((1, 16384, 1, 64), jnp.bfloat16)
    forms = {
        "default chunks": attention,
        "chunks of 256 x 256": functools.partial(attention, **SMALL),
        "the paper's form (Fig. 1)": attention_checkpointed,
    }
    lines = ["| temporary MB | here | definition | times less |", "| --- | --- | --- | --- |"]
    for task, wrap in (("inference", lambda function: function), ("gradient", gradient_of)):
        definition = temporary_bytes(jax.jit(wrap(attention_by_definition)).lower(x, x, x))
        for name, function in forms.items():
            size = temporary_bytes(jax.jit(wrap(function)).lower(x, x, x))
            cells = f"{show(size / 1e6)} | {show(definition / 1e6)} | {definition / size:.1f}"
            lines.append(f"| {task}, {name} | {cells} |")
    lines += ["", "| FLOPs, 1e9 | causal | full | ratio |", "| --- | --- | --- | --- |"]
    for (n, heads), gradient in itertools.product(((4096, 8), (16384, 1)), (False, True)):
        full = Case(n, heads, False, gradient, {})
        some = flops_of(full._replace(causal=True))
        every = flops_of(full)
        cells = f"{show(some / 1e9)} | {show(every / 1e9)} | {some / every:.3f}"
        lines.append(f"| {describe(full)} | {cells} |")
    return lines


def on_cpu(pairs, earlier) -> list[str]:
    torch = import_torch()
    peer = "torch was absent."
    if torch:
        peer = f"torch is {torch.__version__}, scaled_dot_product_attention on [B,H,T,K], eager."
    return [
        f"Times in float32, batch 1, heads of 64. Medians of {pairs} interleaved rounds; in",
        "brackets the range of the ratio over the rounds. Ratio: peer / memeff_attention.py, above",
        f"1 that file is faster. {peer}",
        "",
        *beside_peers(pairs, torch, earlier),
        "",
        *beside_products(pairs),
    ]


def gpu_rows(case: Case, size, pairs, peak) -> list[str]:
    """Lines of the table of a GPU for one case: batch 8, bfloat16, each implementation."""
    B = 8
    shape = (4, B, case.n, case.heads, size)
    arrays = [*jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)]
    needed = 4 * B * case.heads * case.n**2 * size
    if case.causal:
        needed /= 2
    if case.gradient:
        needed *= 3.5
    implementations = {
        "pallas": functools.partial(attention, causal=case.causal, implementation="pallas"),
        "xla": functools.partial(attention, causal=case.causal),
        "cudnn": functools.partial(
            jax.nn.dot_product_attention, is_causal=case.causal, implementation="cudnn"
        ),
    }
    name = f"{describe(case)} of {size}"
    lines = []
    functions = {}
    for each, function in implementations.items():
        call = functools.partial(compiled(function, case.gradient), *arrays)
        try:
            jax.block_until_ready(call())
            functions[each] = call
        except (NotImplementedError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            lines.append(f"| {name} | {each} | did not run: {reason} | | |")
    seconds = {each: np.median(times) for each, times in interleave(functions, pairs).items()}
    for each, s in seconds.items():
        ratio = seconds.get("cudnn", math.nan) / s
        lines.append(f"| {name} | {each} | {s * 1e3:.2f} | {needed / s / peak:.0%} | {ratio:.2f} |")
    return lines


def on_gpu(pairs) -> list[str]:
    """The kernel and the tiles in bfloat16, beside cuDNN and the matrix peak. Not yet run."""
    (times,) = interleave({"product": product_of(jnp.bfloat16, 8192)}, pairs).values()
    peak = 2 * 8192**3 / float(np.median(times))
    lines = [
        f"Bfloat16, batch 8. Medians of {pairs} interleaved rounds. Peak: a product of [8192,8192]",
        f"reaches {peak / 1e12:.0f} TFLOP/s. Counted: 4 B H T T K FLOPs, half if causal, times 3.5",
        "with gradient.",
        "",
        "| | implementation | ms | of peak | cudnn's time / its time |",
        "| --- | --- | --- | --- | --- |",
    ]
    for n, size, causal, gradient in itertools.product(
        (1024, 4096, 16384), (64, 128), (False, True), (False, True)
    ):
        lines += gpu_rows(Case(n, 16, causal, gradient, {}), size, pairs, peak)
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=9, help="rounds that count")
    parser.add_argument("--before", metavar="FILE", help="an earlier version, to race")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    jax.config.update("jax_enable_compilation_cache", False)
    command = f"python bench/bench_memeff_attention.py --pairs {args.pairs}"
    earlier = None
    if args.before:
        command += f" --before {os.path.basename(args.before)}"
        earlier = import_file(args.before)
    if jax.default_backend() == "gpu":
        times = on_gpu(args.pairs)
    else:
        times = on_cpu(args.pairs, earlier)
    lines = [
        f"`{command}` on {machine()}; load {load:.1f} at the start.",
        "",
        *times,
        "",
        "Temporary bytes of attention on [1,16384,1,64] in bfloat16; FLOPs with default chunks:",
        "",
        *exact(),
        "",
        TRIED.strip(),
    ]
    path = ROOT / "bench/RESULTS.md"
    write_section(path, "memeff_attention.py", lines)
    print("\n".join([*lines, "", f"wrote {path}"]))


if __name__ == "__main__":
    main()
