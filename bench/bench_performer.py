"""performer.py beside the official formulas, performer-pytorch, and exact attention.

What      Times: forward pass and forward plus gradient, with and without a causal mask, features
          included. The length from which FAVOR+ is faster than memeff_attention.py. Figures that
          do not vary between runs: temporary bytes, FLOPs.
How       As bench_vit.py, whose measures it imports: one process, rounds interleaved in random
          order, medians. All contenders take the same projection, and their outputs are compared
          first, on queries and keys of norm about 1, where the official constants change little.
Run       make bench FILE=performer
          python bench/bench_performer.py --pairs 5
          About 8 minutes on two CPU cores. Replaces its section in bench/RESULTS.md.
          performer-pytorch joins if `pip install performer-pytorch` has been run.
"""

import argparse
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from bench_vit import (
    ROOT,
    cost_row,
    flops,
    interleave,
    machine,
    speed_row,
    temporary_bytes,
    write_section,
)
from jax import lax

from memeff_attention import attention
from performer import favor_attention, orthogonal_projection

# Copied into RESULTS.md by every run.
NOTES = """
Official: the official formulas in plain JAX, written from what their code does. With a causal mask
it goes token by token, and its gradient recovers earlier states by subtraction.

### What the causal form costs, and what limits it

Milliseconds of one day, seven interleaved rounds. Our causal form takes 114, our form without a
mask 83; in either, 29 go into the features of q and k (the projection 21, exp the rest). The
official formulas take 206, of which 92 for features, because they store all features at once. Three
times their speed would be 69 ms. Even our form without a mask is slower than that: most of its time
goes into the products of features and values in `summarize` and `read`, which are only 65 columns
wide. The mask adds 31 ms, for the product of features inside a chunk and for its decay, in
`causal_scan`. What chunks save is memory: 69 MB with gradient, 421 MB in the official form.

### Softmax weights taken over (Sec. 4.3)

`python examples/byte_lm.py --take-over n`: the held-out text of Moby Dick, bits per byte.

| | softmax, 240 steps | the same weights under FAVOR+ | after n steps more |
| --- | --- | --- | --- |
| n = 120 | 2.713 | 3.075 | 2.907 |
| n = 240 | 2.713 | 3.075 | 2.875 |
| n = 120, learning rate 3e-3, not 1e-2 | 2.713 | 3.075 | 2.891 |
| n = 120, learning rate 1e-3 | 2.713 | 3.075 | 2.903 |

FAVOR+ from scratch: 2.913 after 240 steps. Softmax: 2.471 after 480. So 120 more steps recover
46 % of what the change lost, and reach what 240 steps from scratch reach. The rest is not recovered
here, with 256 features for heads of 64.

### ListOps

`python examples/listops.py`: trees of 11 to 99 tokens, 800 steps of 32 trees, width 64, two blocks.
Softmax attention: 44.7 % of 2,000 test trees right, 72 ms a step. FAVOR+: 39.9 %, 134 ms a step.
The commonest value: 15.1 %. At the published lengths, 500 to 2,000 tokens, with 4 trees a step, it
is the other way round: 425 ms with softmax attention, 290 ms with FAVOR+. The published training,
5,000 steps of 32 such trees through six blocks of width 512, was not run.
"""

LENGTH = 4096
HEADS = 8
SIZE = 64
FEATURES = 256
CROSSOVER = (256, 512, 1024, 2048, 4096, 8192)

# ==== The official formulas =======================================================================


def official_features(x, projection, is_query):
    """The official positive features, with 1e-6 added after exp. [B,H,T,K] -> [B,H,T,M]."""
    x = x * x.shape[-1] ** -0.25
    projected = x @ projection.T
    half = jnp.square(x).sum(-1, keepdims=True) / 2
    axes = -1 if is_query else (-1, -2)
    highest = projected.max(axes, keepdims=True)
    return (jnp.exp(projected - half - highest) + 1e-6) * len(projection) ** -0.5


@jax.custom_vjp
def prefix_products(q, k, v):
    """q_t sum_{s<=t} k_s v_s^T, token by token. q, k [T,...,M], v [T,...,V] -> [T,...,V]."""
    return prefix_forward(q, k, v)[0]


def prefix_forward(q, k, v):
    def step(state, token):
        q, k, v = token
        state = state + jnp.einsum("...m,...v->...mv", k, v)
        return state, jnp.einsum("...m,...mv->...v", q, state)

    empty = jnp.zeros((*k.shape[1:], v.shape[-1]))
    state, out = lax.scan(step, empty, (q, k, v))
    return out, (q, k, v, state)


def prefix_backward(saved, grad):
    """From the last token to the first; earlier states come from the last by subtraction."""
    *qkv, state = saved

    def step(carry, token):
        state, state_grad = carry
        q, k, v, g = token
        q_grad = jnp.einsum("...v,...mv->...m", g, state)
        state_grad = state_grad + jnp.einsum("...m,...v->...mv", q, g)
        k_grad = jnp.einsum("...v,...mv->...m", v, state_grad)
        v_grad = jnp.einsum("...m,...mv->...v", k, state_grad)
        state = state - jnp.einsum("...m,...v->...mv", k, v)
        return (state, state_grad), (q_grad, k_grad, v_grad)

    carry = state, jnp.zeros_like(state)
    _, grads = lax.scan(step, carry, (*qkv, grad), reverse=True)
    return grads


prefix_products.defvjp(prefix_forward, prefix_backward)


def official_attention(q, k, v, projection, causal):
    """Positive features and the official quotient. [B,T,H,K] -> [B,T,H,V]."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    q = official_features(q, projection, is_query=True)
    k = official_features(k, projection, is_query=False)
    if causal:
        q, k, v = (jnp.moveaxis(x, 2, 0) for x in (q, k, v))  # [T,B,H,.]
        numerator = prefix_products(q, k, v)
        denominator = prefix_products(q, k, jnp.ones((*k.shape[:-1], 1)))
        numerator, denominator = (jnp.moveaxis(x, 0, 2) for x in (numerator, denominator))
    else:
        numerator = q @ (k.mT @ v)
        denominator = q @ k.sum(2)[..., None]
    small = jnp.abs(denominator) <= 1e-6
    out = numerator / (denominator + 2e-6 * small)
    return out.swapaxes(1, 2)


# ==== Contenders ==================================================================================


def compiled(function, gradient):
    """Jitted (q, k, v, dout) -> (out,), or (out, dq, dk, dv)."""

    def forward(q, k, v, dout):
        return (function(q, k, v),)

    def both(q, k, v, dout):
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(dout)

    return jax.jit(both if gradient else forward)


def make_torch(causal, gradient, arrays, projection):
    """performer-pytorch's attention on [B,H,T,K], eager: () -> tensors. None if it is missing."""
    try:
        import torch
        from performer_pytorch import FastAttention
    except ImportError:
        return None
    torch.set_num_threads(os.cpu_count())
    peer = FastAttention(SIZE, FEATURES, causal=causal)
    peer.projection_matrix.copy_(torch.tensor(np.asarray(projection)))
    tensors = [torch.tensor(np.asarray(x)).transpose(1, 2).contiguous() for x in arrays]
    *qkv, dout = tensors

    def both():
        out = peer(*qkv)
        return out.detach(), *torch.autograd.grad(out, qkv, dout)

    if gradient:
        for x in qkv:
            x.requires_grad_()
        return both

    def forward():
        with torch.no_grad():
            return (peer(*qkv),)

    return forward


def make_arrays(n, heads):
    """q, k, v and a cotangent, [1,n,heads,SIZE]; |q| and |k| about 1."""
    rng = np.random.default_rng(0)
    arrays = rng.standard_normal((4, 1, n, heads, SIZE), np.float32)
    arrays[:2] *= SIZE**-0.5
    return [jnp.asarray(x) for x in arrays]


def contenders(causal, gradient) -> dict:
    """Name -> () -> (out,) or (out, dq, dk, dv)."""
    arrays = make_arrays(LENGTH, HEADS)
    projection = orthogonal_projection(jax.random.key(0), FEATURES, SIZE)
    functions = {
        "ours": functools.partial(favor_attention, projection=projection, causal=causal),
        "official": functools.partial(official_attention, projection=projection, causal=causal),
    }
    calls = {}
    for name, function in functions.items():
        calls[name] = functools.partial(compiled(function, gradient), *arrays)
    if causal:
        plain = functools.partial(favor_attention, projection=projection)
        calls["not causal"] = functools.partial(compiled(plain, gradient), *arrays)
    torch_call = make_torch(causal, gradient, arrays, projection)
    if torch_call:
        calls["performer-pytorch"] = torch_call
    return calls


def check_equal(functions: dict):
    """Peers give the same outputs and gradients up to 1 %, which their constants do not reach."""
    want = [np.asarray(array) for array in functions["ours"]()]
    for name, function in functions.items():
        if name == "not causal":
            continue
        for i, (got, expected) in enumerate(zip(function(), want, strict=True)):
            got = np.asarray(got)
            if name == "performer-pytorch":
                got = got.swapaxes(1, 2)
            error = np.abs(got - expected).max() / np.abs(expected).max()
            assert error < 0.01, f"{name} differs by {error:.1e} of the largest in array {i}"


# ==== Report ======================================================================================

CASES = ((False, False), (False, True), (True, False), (True, True))  # causal, gradient


def describe(causal, gradient) -> str:
    form = "causal" if causal else "not causal"
    return f"{form}, with gradient" if gradient else form


def beside_peers(pairs) -> list[str]:
    """The table of times, a line for each peer, and for causal beside not causal."""
    lines = ["| ms | performer.py | peer | ratio | goal |", "| --- | --- | --- | --- | --- |"]
    for causal, gradient in CASES:
        functions = contenders(causal, gradient)
        check_equal(functions)
        times = interleave(functions, pairs)
        ours = times["ours"]
        case = describe(causal, gradient)
        for peer in ("official", "performer-pytorch"):
            if peer in times:
                goal = 3 if causal and peer == "official" else None
                lines.append(speed_row(f"{case}: {peer}", ours, times[peer], goal))
        if causal:
            lines.append(cost_row(f"{case}: not causal", ours, times["not causal"], 1e-3, 2))
    return lines


def crossover(pairs) -> list[str]:
    """The table of FAVOR+ and exact attention at growing lengths."""
    lines = ["| ms | FAVOR+ | exact | exact / FAVOR+ | |", "| --- | --- | --- | --- | --- |"]
    projection = orthogonal_projection(jax.random.key(0), FEATURES, SIZE)
    for causal, gradient in CASES:
        favor = functools.partial(favor_attention, projection=projection, causal=causal)
        exact = functools.partial(attention, causal=causal)
        for n in CROSSOVER:
            arrays = make_arrays(n, HEADS)
            functions = {}
            for name, function in {"favor": favor, "exact": exact}.items():
                functions[name] = functools.partial(compiled(function, gradient), *arrays)
            times = interleave(functions, pairs)
            name = f"{describe(causal, gradient)}, n = {n:,}"
            lines.append(speed_row(name, times["favor"], times["exact"]))
    return lines


def repeatable_figures() -> list[str]:
    """Temporary bytes and FLOPs of ours and of the official formulas."""
    lines = ["| | temporary MB | GFLOP |", "| --- | --- | --- |"]
    arrays = make_arrays(LENGTH, HEADS)
    projection = orthogonal_projection(jax.random.key(0), FEATURES, SIZE)
    for causal, gradient in CASES:
        for name, function in {"ours": favor_attention, "official": official_attention}.items():
            call = functools.partial(function, projection=projection, causal=causal)
            call = compiled(call, gradient)
            megabytes = temporary_bytes(call.lower(*arrays)) / 1e6
            count = flops(jax.make_jaxpr(call)(*arrays).jaxpr) / 1e9
            case = describe(causal, gradient)
            lines.append(f"| {case}: {name} | {megabytes:.1f} | {count:.1f} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=5, help="rounds that count")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    jax.config.update("jax_enable_compilation_cache", False)
    lines = [
        f"`python bench/bench_performer.py --pairs {args.pairs}` on {machine()}; "
        f"load {load:.1f} at the start.",
        "",
        f"Float32, n = {LENGTH:,}, {HEADS} heads of {SIZE}, {FEATURES} positive features; times",
        f"include them. Medians of {args.pairs} interleaved rounds, with their range. Ratio:",
        "peer / ours, above 1 ours is faster; beside our own form that is not causal the other way",
        "round: causal / not causal.",
        "",
        *beside_peers(args.pairs),
        "",
        f"FAVOR+ and memeff_attention.py, {HEADS} heads of {SIZE}:",
        "",
        *crossover(args.pairs),
        "",
        *repeatable_figures(),
        "",
        NOTES.strip(),
    ]
    path = ROOT / "bench/RESULTS.md"
    write_section(path, "performer.py", lines)
    print("\n".join([*lines, "", f"wrote {path}"]))


if __name__ == "__main__":
    main()
