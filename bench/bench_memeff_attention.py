"""memeff_attention.py beside plain attention in jax.numpy, the paper's form, and torch if it can be imported.

What      Times: forward pass, and with gradient, in float32; what products of matrices allow on this machine.
          Figures that no noise touches: temporary bytes, FLOPs. On a GPU instead of the times: milliseconds
          and share of the matrix peak of the three implementations, in bfloat16.
How       One process; each round runs every contender once, in random order; medians over the rounds after
          two that warm up. Outputs and gradients are compared before anything is timed.
Run       make bench FILE=memeff_attention   or   python bench/bench_memeff_attention.py --pairs 9
          About 5 minutes on two CPU cores. Replaces the section of memeff_attention.py in RESULTS.md.
"""

import argparse
import collections
import datetime
import functools
import itertools
import math
import os
import pathlib
import platform
import random
import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for `import memeff_attention`, started from any folder
from memeff_attention import attention, attention_checkpointed, attention_reference  # noqa: E402

# Copied into RESULTS.md by every run.
TRIED = """
### What was tried

Two CPU cores, n = 4,096, 8 heads of 64, float32, JAX 0.10.2. These were measured while memeff_attention.py
was written. Tiles are queries x keys.

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
| heads taken by index in the loop, none transposed: 9 MB instead of 34, 30 lines more | 227 (least 211) |
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

A product of [2048,64] and [64,512] called by itself reached 159 GFLOP/s, its counterpart with v 166, one of
[2048,2048] 183 to 208. So the products alone are 79 % of the best forward pass, and 1.4 times torch's speed,
about 155 ms, would be faster than they are. Other runs of this script on the first day gave 3.6 times the
speed of plain jnp and 0.95 to 1.02 times torch's for the first line, 1.12 and 1.55 times torch's with
gradient.
"""

# ==== Contenders ============================================================================================

# n: queries and keys; goals: by name of a peer, how many times its speed is wanted, None for no goal
Case = collections.namedtuple("Case", "n heads causal gradient goals")
CASES = (
    Case(4096, 8, False, False, {"plain jnp": 4, "the paper's form": None, "torch": 1.4}),
    Case(16384, 1, False, False, {"plain jnp": 4, "the paper's form": None, "torch": 1.4}),
    Case(4096, 8, False, True, {"plain jnp": None, "the paper's form": None, "torch": 1.1}),
    Case(16384, 1, False, True, {"the paper's form": None, "torch": 1.1}),
    Case(4096, 8, True, False, {"torch": None}),
    Case(4096, 8, True, True, {"torch": None}),
)
SMALL = {"q_chunk": 256, "kv_chunk": 256}  # chunks near the square root of 16,384, where bytes are fewest


def plain(q, k, v):
    """Attention as one writes it in jax.numpy. [B,T,H,K], [B,S,H,K], [B,S,H,V] -> [B,T,H,V]."""
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[-1])
    return jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(scores), v)


def compiled(function, gradient):
    """Jitted (q, k, v, dout) -> (out,), or (out, dq, dk, dv); dout is an input: no compiler can fold it."""

    def both(q, k, v, dout):
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(dout)

    return jax.jit(both if gradient else lambda q, k, v, dout: (function(q, k, v),))


def make_torch(case: Case, arrays):
    """A function that runs PyTorch's attention once on contiguous [B,H,T,K], eager: () -> tensors."""
    import torch

    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=case.causal)
    q, k, v, dout = (torch.tensor(np.asarray(x)).transpose(1, 2).contiguous() for x in arrays)

    def both():
        out = attend(q, k, v)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)

    for x in (q, k, v):
        x.requires_grad_(case.gradient)
    return both if case.gradient else torch.no_grad()(lambda: (attend(q, k, v),))


def contenders(case: Case) -> dict:
    """{name: () -> (out,) or (out, dq, dk, dv)}: ours and the peers of a case. Batch 1, heads of 64."""
    arrays = np.random.default_rng(0).standard_normal((4, 1, case.n, case.heads, 64), np.float32)
    arrays[3] = 1  # the gradient is that of the sum
    arrays = [jnp.asarray(x) for x in arrays]
    known = {"plain jnp": plain, "the paper's form": attention_checkpointed}
    functions = {"ours": functools.partial(attention, causal=case.causal)}
    functions |= {name: known[name] for name in case.goals if name in known}
    calls = {name: functools.partial(compiled(f, case.gradient), *arrays) for name, f in functions.items()}
    return calls | ({"torch": make_torch(case, arrays)} if sys.modules.get("torch") else {})


def check_equal(functions: dict):
    """All contenders give the same outputs and gradients, up to 1e-5 of the largest."""
    want = functions["ours"]()
    for name, function in functions.items():
        for ours, peer in zip(want, function()):
            peer = np.asarray(peer).swapaxes(1, 2) if name == "torch" else np.asarray(peer)
            assert np.abs(peer - ours).max() < 1e-5 * np.abs(ours).max(), name


# ==== Measures ==============================================================================================


def flops(jaxpr) -> int:
    """Of the matrix products and convolutions of a jaxpr, loops with their trip counts."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * inner * eqn.outvars[0].aval.size
        if eqn.primitive.name == "conv_general_dilated":
            kernel, out_channels = eqn.invars[1].aval, eqn.params["dimension_numbers"].rhs_spec[0]
            total += 2 * kernel.size // kernel.shape[out_channels] * eqn.outvars[0].aval.size
        for value in jax.tree.leaves(tuple(eqn.params.values())):
            value = getattr(value, "jaxpr", value)
            total += flops(value) * eqn.params.get("length", 1) if hasattr(value, "eqns") else 0
    return total


def flops_of(n, heads, causal, gradient) -> int:
    """Of attention with default chunks, alone or with its gradient."""
    x = jax.ShapeDtypeStruct((1, n, heads, 64), jnp.float32)
    function = compiled(functools.partial(attention, causal=causal), gradient)
    return flops(jax.make_jaxpr(function)(x, x, x, x).jaxpr)


def temporary_bytes(function, gradient) -> int:
    """Temporary bytes of attention on [1,16384,1,64] in bfloat16, or of the gradient of its sum."""
    x = jax.ShapeDtypeStruct((1, 16384, 1, 64), jnp.bfloat16)
    grads = jax.grad(lambda *qkv: function(*qkv).astype(jnp.float32).sum(), (0, 1, 2))
    lowered = jax.jit(grads if gradient else function).lower(x, x, x)
    return lowered.compile().memory_analysis().temp_size_in_bytes


def interleave(functions: dict, pairs: int) -> dict:
    """Seconds of each function in so many rounds, in random order, after two rounds that warm up."""
    seconds, order = {name: [] for name in functions}, random.Random(0)
    for _ in range(2 + pairs):
        for name in order.sample(list(functions), len(functions)):
            start = time.perf_counter()
            jax.block_until_ready(functions[name]())
            seconds[name].append(time.perf_counter() - start)
    return {name: times[2:] for name, times in seconds.items()}


def product_of(dtype, side):
    """A function that multiplies two matrices [side,side] in XLA."""
    matrix, multiply = jnp.ones((side, side), dtype), jax.jit(jnp.matmul)
    return lambda: multiply(matrix, matrix)


def products_of(rows, inner, columns, number):
    """A function that multiplies [rows,inner] by so many [inner,columns], one after the other, in XLA."""
    left, right, start = map(jnp.ones, ((rows, inner), (number, inner, columns), (rows, columns)))
    multiply = jax.jit(lambda x, y, start: lax.scan(lambda last, part: (x @ part, None), start, y)[0])
    return lambda: multiply(left, right, start)


# ==== Report ================================================================================================


def machine() -> str:
    """Processor, cores, memory, versions and date."""
    info = pathlib.Path("/proc/cpuinfo")
    name = re.search("model name.*: (.*)", info.read_text() if info.exists() else "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"{name[1] if name else platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB"
    versions = f"Python {platform.python_version()}, jax {jax.__version__}"
    return f"{machine}, JAX on {jax.devices()[0].device_kind}, {versions}, {datetime.date.today()}"


def row(name, ours, peer, unit, goal=None, speed=False) -> str:
    """A line of the table from lists [pairs]. speed: the ratio is peer / ours, more is better."""
    divide = lambda a, b: b / a if speed else a / b
    ours, peer, pairs = np.median(ours), np.median(peer), [divide(a, b) for a, b in zip(ours, peer)]
    ratio, span = divide(ours, peer), f" ({min(pairs):.2f} to {max(pairs):.2f})" if len(pairs) > 1 else ""
    met = "met" if goal and (ratio >= goal if speed else ratio <= goal) else "not met"
    goal = f"{'at least' if speed else 'at most'} {goal}: {met}" if goal else ""
    show = lambda x: f"{x / unit:,.0f}" if x / unit >= 1000 else f"{x / unit:.4g}"
    return f"| {name} | {show(ours)} | {show(peer)} | {ratio:.3f}{span} | {goal} |"


def describe(n, heads, causal, gradient) -> str:
    """The words for a case."""
    what = "forward plus gradient" if gradient else "forward"
    return f"{what}{', causal' * causal}, n = {n:,}, {heads} head{'s' * (heads > 1)}"


def beside_peers(pairs) -> list[str]:
    """The table of times on a CPU, a line for each peer of each case."""
    lines = ["| ms | memeff_attention.py | peer | ratio | goal |", "| --- | --- | --- | --- | --- |"]
    for case in CASES:
        if len(functions := contenders(case)) > 1:
            check_equal(functions)
            times = interleave(functions, pairs)
            for peer, goal in case.goals.items():
                name = f"{describe(*case[:4])}: {peer}"
                lines += [row(name, times["ours"], times[peer], 1e-3, goal, True)] if peer in times else []
    return lines


def beside_products(pairs) -> list[str]:
    """What products of matrices reach on a CPU, 17.2 GFLOP each time, and what time that leaves attention."""
    functions = {"XLA, [2048,2048] x [2048,2048]": product_of(jnp.float32, 2048)}
    functions["XLA, 128 of a tile with k, [2048,64] x [64,512]"] = products_of(2048, 64, 512, 128)
    functions["XLA, 128 of a tile with v, [2048,512] x [512,64]"] = products_of(2048, 512, 64, 128)
    if torch := sys.modules.get("torch"):
        matrix = torch.ones(2048, 2048)
        functions["torch, [2048,2048] x [2048,2048]"] = lambda: matrix @ matrix
    seconds = {name: float(np.median(times)) for name, times in interleave(functions, pairs).items()}
    done, fastest = 2 * 2048**3, min(seconds.values())
    tile = np.mean([s for name, s in seconds.items() if "tile" in name])
    forward, both = (flops_of(4096, 8, False, gradient) for gradient in (False, True))
    limit = lambda needed, s: f"{needed / done * s * 1e3:,.0f} ms"
    return [
        "What bare products of matrices reach here, 17.2 GFLOP each time:",
        "",
        "| | ms | GFLOP/s |",
        "| --- | --- | --- |",
        *(f"| {name} | {s * 1e3:.1f} | {done / s / 1e9:.0f} |" for name, s in seconds.items()),
        "",
        f"Attention with n = 4,096, 8 heads has {forward / 1e9:.1f} GFLOP, with gradient {both / 1e9:.1f}.",
        f"At the fastest of these speeds they take {limit(forward, fastest)}, with gradient",
        f"{limit(both, fastest)}; at that of the two products of a tile {limit(forward, tile)}, with",
        f"gradient {limit(both, tile)}.",
    ]


def exact() -> list[str]:
    """The tables that repeat exactly: temporary bytes beside the definition's, FLOPs of causal attention."""
    chunks = " x ".join(map(str, SMALL.values()))
    forms = (
        ("default chunks", attention, (59, 32)),
        (f"chunks of {chunks}", functools.partial(attention, **SMALL), (120, 80)),
        ("the paper's form (Fig. 1)", attention_checkpointed, (None, None)),
    )
    lines = ["| temporary MB | this | definition | times less | goal |", "| --- | --- | --- | --- | --- |"]
    for gradient, what in enumerate(("inference", "gradient")):
        definition = [temporary_bytes(attention_reference, gradient)]
        for name, function, goals in forms:
            size = [temporary_bytes(function, gradient)]
            lines.append(row(f"{what}, {name}", size, definition, 1e6, goals[gradient], True))
    lines += ["", "| FLOPs, 1e9 | causal | full | ratio | |", "| --- | --- | --- | --- | --- |"]
    for (n, heads), gradient in itertools.product(((4096, 8), (16384, 1)), (False, True)):
        both = ([flops_of(n, heads, causal, gradient)] for causal in (True, False))
        lines.append(row(describe(n, heads, False, gradient), *both, 1e9))
    return lines


def on_cpu(pairs) -> list[str]:
    """Times and what limits them."""
    try:
        import torch

        torch.set_num_threads(os.cpu_count())
        peer = f"torch is {torch.__version__}, scaled_dot_product_attention on contiguous [B,H,T,K], eager."
    except ImportError as error:
        peer = f"torch was absent: {error}."
    return [
        f"Times in float32, batch 1, heads of 64. Medians of {pairs} interleaved rounds; in brackets the",
        "range of the ratio over the rounds. Ratio: peer / memeff_attention.py, above 1 that file is faster.",
        peer,
        "",
        *beside_peers(pairs),
        "",
        *beside_products(pairs),
    ]


def gpu_rows(T, K, causal, gradient, pairs, peak) -> list[str]:
    """Lines of the table of a GPU for one case: B = 8, H = 16, bfloat16, each implementation."""
    (B, H), functions, lines = (8, 16), {}, []
    arrays = [*jax.random.normal(jax.random.key(0), (4, B, T, H, K), jnp.bfloat16)]
    needed = 4 * B * H * T * T * K * (0.5 if causal else 1) * (3.5 if gradient else 1)
    name = f"{describe(T, H, causal, gradient)} of {K}"
    for implementation in ("pallas", "xla", "cudnn"):
        function = functools.partial(attention, causal=causal, implementation=implementation)
        call = functools.partial(compiled(function, gradient), *arrays)
        try:
            functions[implementation] = (jax.block_until_ready(call()), call)[1]
        except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
            reason = str(error).partition("\n")[0]
            lines.append(f"| {name} | {implementation} | did not run: {reason} | | | |")
    seconds = {each: float(np.median(times)) for each, times in interleave(functions, pairs).items()}
    for each, s in seconds.items():
        ratio, goal = seconds.get("cudnn", math.nan) / s, ""  # not a number: there is no cuDNN
        if each == "pallas" and ratio > 0:
            goal = f"at least 0.8: {'met' if ratio >= 0.8 else 'not met'}"
        lines.append(f"| {name} | {each} | {s * 1e3:.2f} | {needed / s / peak:.0%} | {ratio:.2f} | {goal} |")
    return lines


def on_gpu(pairs) -> list[str]:
    """Each implementation in bfloat16, beside cuDNN and the matrix peak. NOT YET RUN on a GPU."""
    (times,) = interleave({"product": product_of(jnp.bfloat16, 8192)}, pairs).values()
    peak = 2 * 8192**3 / float(np.median(times))
    cases = itertools.product((1024, 4096, 16384), (64, 128), (False, True), (False, True))
    return [
        f"Bfloat16, batch 8. Medians of {pairs} interleaved rounds. Peak: a product of [8192,8192], here",
        f"{peak / 1e12:.0f} TFLOP/s. Counted: 4 B H T T K FLOPs, half if causal, times 3.5 with gradient.",
        "",
        "| | implementation | ms | of peak | cudnn's time / its time | goal |",
        "| --- | --- | --- | --- | --- | --- |",
        *(line for case in cases for line in gpu_rows(*case, pairs, peak)),
    ]


def main():
    add = (parser := argparse.ArgumentParser(description=__doc__.partition("\n")[0])).add_argument
    add("--pairs", type=int, default=9, help="rounds that count")
    args, load = parser.parse_args(), os.getloadavg()[0]
    jax.config.update("jax_enable_compilation_cache", False)
    flags = f"--pairs {args.pairs}"
    lines = [
        f"`python bench/bench_memeff_attention.py {flags}` on {machine()}; load {load:.1f} at the start.",
        "",
        *(on_gpu if jax.default_backend() == "gpu" else on_cpu)(args.pairs),
        "",
        "Temporary bytes of attention on [1,16384,1,64] in bfloat16, and FLOPs with default chunks:",
        "",
        *exact(),
        "",
        TRIED.strip(),
    ]
    path = ROOT / "bench/RESULTS.md"
    head, *sections = (path.read_text() if path.exists() else "# Results").strip().split("\n\n## ")
    sections = [section for section in sections if not section.startswith("memeff_attention.py\n")]
    sections = sorted([*sections, "\n".join(["memeff_attention.py", "", *lines])])
    path.write_text("\n\n## ".join([head, *sections]) + "\n")
    print("\n".join([*lines, "", f"wrote {path}"]))


if __name__ == "__main__":
    main()
