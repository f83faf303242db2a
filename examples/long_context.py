"""Attention over long sequences: a ring with even work, a cache that grows, a million tokens.

    order = zigzag_order(tokens.shape[1], mesh.shape["seq"])
    tokens, positions = tokens[:, order], positions[order]  # once, at the model's input
    out = zigzag_attention(q, k, v, "seq")  # causal; inside shard_map, anywhere in the model

    cache = init_cache(batch, length, kv_heads, head_size)
    cache, out = jax.jit(decode_step)(cache, q, k, v)  # one token of each row

What      zigzag_attention is memeff_attention.ring_attention for causal masks, in half the time: in
          order, the last device works at every step and the first at one. init_cache, decode_step:
          token by token, rows of any length.
Paper     The ring: Liu, Zaharia & Abbeel 2023, arXiv:2310.01889.
Run       python examples/long_context.py --devices 8 --length 16384
          24 s on two CPU cores: bytes per device, ppermutes, error against one device
          python examples/long_context.py --alone 1048576
          self-attention over a million tokens on one device
Axes      B batch  T queries  S keys  H heads  G heads of keys, R = H / G  K head size  V value size
          n devices.  Inside shard_map T and S are sizes per device.
"""

import argparse
import contextlib
import functools
import math
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for the imports below, from any folder
import memeff_attention as memeff  # noqa: E402
from memeff_attention import Arrays, Ring, require, run_program  # noqa: E402

# ==== Zigzag ring attention =======================================================================


def zigzag_order(length, devices):
    """Permutation int [length] of a sequence: which tokens device 0, 1, ... n - 1 get.

    The sequence is cut into 2n pieces, and device r gets pieces r and 2n - 1 - r, an early and a
    late one. x[:, np.argsort(order)] is the way back. Raises ValueError unless 2n divides length.
    """
    require(
        length >= 1 and devices >= 1 and length % (2 * devices) == 0,
        f"length {length} is not a positive multiple of 2 x {devices} devices",
    )
    pieces = np.arange(length).reshape(2 * devices, -1)
    early = pieces[:devices]
    late = pieces[devices:][::-1]
    return np.stack([early, late], axis=1).ravel()


def zigzag_attention(q, k, v, seq_axis, *, scale=None, q_chunk=None, kv_chunk=None):
    """Causal attention over a sequence in zigzag_order, inside shard_map.

    q [B,T,H,K], k [B,T,G,K] and v [B,T,G,V] of this device -> [B,T,H,V]. 2n ppermutes forward and
    4n backward, as in ring_attention. Raises ValueError as attention does, and for an odd T.
    """
    T = q.shape[1]
    S = k.shape[1]
    require(T == S, f"{T} queries and {S} keys on a device")
    require(T % 2 == 0, f"{T} tokens on a device are not an even number")
    options = {"causal": True, "scale": scale, "q_chunk": q_chunk, "kv_chunk": kv_chunk}
    # Tiles must fit into half of a block.
    plan, _ = memeff.prepare(q[:, : T // 2], k[:, : T // 2], v[:, : T // 2], **options)
    _, x = memeff.prepare(q, k, v, **options)
    results = zigzag(Ring(plan, seq_axis), x)
    return memeff.heads_last(results, x.q.dtype, return_lse=False)


def visit(fixed: Ring, distance, add, carry, T):
    """add(plan, rows, keys, carry) for what is seen of the block from `distance` devices back.

    Under a causal mask all queries see the early half of the keys of an earlier device. Of those of
    a later device the late half of the queries sees all. So the devices have the same work.
    """
    everything = slice(0, T)
    all_keys = fixed.plan._replace(causal=False)

    def own(carry):
        return add(fixed.plan, everything, everything, carry)

    def earlier(carry):
        return add(all_keys, everything, slice(0, T // 2), carry)

    def later(carry):
        return add(all_keys, slice(T // 2, T), everything, carry)

    device = lax.axis_index(fixed.axis)
    case = jnp.where(distance == 0, 0, jnp.where(distance <= device, 1, 2))
    return lax.switch(case, [own, earlier, later], carry)


def cut(tree, part):
    """Rows `part` of arrays [...,n,size]."""
    return jax.tree.map(lambda x: x[..., part, :], tree)


def paste(tree, new, part):
    """The arrays with those rows replaced."""
    return jax.tree.map(lambda x, rows: x.at[..., part, :].set(rows), tree, new)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def zigzag(fixed: Ring, x: Arrays):
    """memeff.ring with another `visit`."""
    T = x.q.shape[-2]

    def step(carry, distance):
        softmax, k, v = carry
        following = memeff.send(fixed.axis, (k, v))  # on its way while this block is worked on

        def add(plan, rows, keys, softmax):
            block = Arrays(cut(x.q, rows), *cut((k, v), keys))
            new = memeff.running_softmax(plan, cut(softmax, rows), block)
            return paste(softmax, new, rows)

        return (visit(fixed, distance, add, softmax, T), *following), None

    softmax, _ = memeff.same_axes((memeff.softmax_of_nothing(x), x.q))
    n = lax.axis_size(fixed.axis)
    (softmax, _, _), _ = lax.scan(step, (softmax, x.k, x.v), jnp.arange(n))
    return memeff.divide(softmax)


def zigzag_forward(fixed: Ring, x: Arrays):
    results = zigzag(fixed, x)
    return results, (x, results)


def zigzag_backward(fixed: Ring, saved, cotangents):
    """The gradients of keys and values travel with them, and come home with the last of n moves."""
    x, results = saved
    T = x.q.shape[-2]
    of_queries = memeff.rows_of(results, cotangents)

    def step(carry, distance):
        grads, k, v = carry
        following = memeff.send(fixed.axis, (k, v))  # on its way while this block is worked on

        def add(plan, rows, keys, grads):
            block = Arrays(cut(x.q, rows), *cut((k, v), keys))
            old = Arrays(cut(grads.q, rows), *cut((grads.k, grads.v), keys))
            new = memeff.accumulate_gradients(plan, old, block, cut(of_queries, rows))
            dk, dv = paste((grads.k, grads.v), (new.k, new.v), keys)
            return Arrays(paste(grads.q, new.q, rows), dk, dv)

        grads = visit(fixed, distance, add, grads, T)
        dk, dv = memeff.send(fixed.axis, (grads.k, grads.v))
        return (grads._replace(k=dk, v=dv), *following), None

    grads, _ = memeff.same_axes((memeff.no_gradients(x), x.q))
    n = lax.axis_size(fixed.axis)
    (grads, _, _), _ = lax.scan(step, (grads, x.k, x.v), jnp.arange(n))
    return (memeff.in_dtypes_of(x, grads),)


zigzag.defvjp(zigzag_forward, zigzag_backward)


# ==== Cache =======================================================================================


def init_cache(batch, length, kv_heads, head_size, value_size=None, dtype=jnp.float32) -> dict:
    """An empty cache: k [B,S,G,K], v [B,S,G,V], the length int [B] of each row, overflow bool [B].

    value_size is head_size by default. Raises ValueError for a size below 1.
    """
    if value_size is None:
        value_size = head_size
    sizes = {
        "batch": batch,
        "length": length,
        "kv_heads": kv_heads,
        "head_size": head_size,
        "value_size": value_size,
    }
    for name, size in sizes.items():
        require(size >= 1, f"{name}={size} is not at least 1")
    return {
        "k": jnp.zeros((batch, length, kv_heads, head_size), dtype),
        "v": jnp.zeros((batch, length, kv_heads, value_size), dtype),
        "length": jnp.zeros(batch, jnp.int32),
        "overflow": jnp.zeros(batch, bool),
    }


def decode_step(cache, q, k, v, *, scale=None, window=None):
    """One token of each row: its key and value are kept, and its query sees all that are there.

    With window=w it sees the last w, its own among them. q [B,1,H,K], k [B,1,G,K], v [B,1,G,V] ->
    (cache, out [B,1,H,V]). A full row is refused by a ValueError where its length is known. Under
    jit it stays as it is, its query sees what is there, and its overflow turns True. Raises
    ValueError for shapes or dtypes that are not the cache's.
    """
    B, S, G, K = cache["k"].shape
    dtype = cache["k"].dtype
    V = cache["v"].shape[3]
    for name, x, wanted in (
        ("q", q, (B, 1, q.shape[2], K)),
        ("k", k, (B, 1, G, K)),
        ("v", v, (B, 1, G, V)),
    ):
        require(
            x.shape == wanted and x.dtype == dtype,
            f"{name} is {x.dtype} {x.shape}, but the cache takes {dtype} {wanted}",
        )
    require(window is None or window >= 1, f"window={window} is not at least 1")
    full = cache["length"] >= S
    if not isinstance(full, jax.core.Tracer):
        rows = np.flatnonzero(full).tolist()
        require(not rows, f"rows {rows} of the cache are full, at {S} tokens")

    def append(kept, new):
        rows = jnp.arange(B)
        return kept.at[rows, cache["length"]].set(new[:, 0], mode="drop")  # a full row: nowhere

    cache = {
        "k": append(cache["k"], k),
        "v": append(cache["v"], v),
        "length": jnp.minimum(cache["length"] + 1, S),
        "overflow": cache["overflow"] | full,
    }
    keys = jnp.arange(S)[None, :]
    length = cache["length"][:, None]
    see = keys < length  # [B,S]
    if window is not None:
        see = see & (keys >= length - window)
    mask = see[:, None, None, :]
    out = memeff.attention(q, cache["k"], cache["v"], mask=mask, scale=scale)
    return cache, out


# ==== Program =====================================================================================


def ppermutes(jaxpr) -> int:
    """How often a ppermute runs, loops with their trip counts."""
    total = 0
    for eqn in jaxpr.eqns:
        total += eqn.primitive.name == "ppermute"
        for value in jax.tree.leaves(tuple(eqn.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += ppermutes(inner) * eqn.params.get("length", 1)
    return total


def squares_and_gradients(function):
    """The sum of squares of function(q, k, v), and its gradients."""

    def loss(q, k, v):
        return jnp.square(function(q, k, v)).sum()

    return jax.value_and_grad(loss, (0, 1, 2))


def on_mesh(mesh, local, order):
    """A local function of blocks as one of whole arrays [B,T,H,K], cut in this order."""
    blocks = jax.shard_map(local, mesh=mesh, in_specs=P(None, "seq"), out_specs=P(None, "seq"))

    def run(q, k, v):
        out = blocks(q[:, order], k[:, order], v[:, order])
        return out[:, np.argsort(order)]

    return run


def compare(mesh, qkv):
    """Prints both rings beside one device: bytes, collectives, error, time. Returns the error."""
    n = mesh.shape["seq"]
    length = qkv[0].shape[1]
    alone = functools.partial(memeff.attention, causal=True)
    alone = jax.jit(squares_and_gradients(alone)).lower(*qkv).compile()
    wanted = jax.tree.leaves(alone(*qkv))
    memory = alone.memory_analysis().temp_size_in_bytes
    print(f"one device: {memory / 1e6:,.1f} MB beside arguments and results")

    rings = {
        "in order": (
            functools.partial(memeff.ring_attention, seq_axis="seq", causal=True),
            np.arange(length),
        ),
        "zigzag": (
            functools.partial(zigzag_attention, seq_axis="seq"),
            zigzag_order(length, n),
        ),
    }
    placed = jax.device_put(qkv, NamedSharding(mesh, P(None, "seq")))
    worst = 0.0
    for name, (local, order) in rings.items():
        function = squares_and_gradients(on_mesh(mesh, local, order))
        compiled = jax.jit(function).lower(*placed).compile()
        got = jax.tree.leaves(compiled(*placed))
        start = time.time()
        jax.block_until_ready(compiled(*placed))
        seconds = time.time() - start
        # numpy: on a CPU, jnp's max of many numbers hides a NaN (JAX 0.10.2, 0.12.0.1)
        errors = [np.abs(np.asarray(a) - b).max() / np.abs(b).max() for a, b in zip(got, wanted)]
        memory = compiled.memory_analysis().temp_size_in_bytes
        moves = ppermutes(jax.make_jaxpr(function)(*placed).jaxpr)
        print(
            f"{n} devices, {name}: {memory / 1e6:,.1f} MB on each, {moves} ppermutes, "
            f"error {np.max(errors):.1e}, {seconds:.2f} s"
        )
        worst = np.maximum(worst, np.max(errors))
    return worst


def decode(qkv):
    """Prints the error of a cache that is filled token by token; returns it."""
    q, k, v = qkv
    B, length, _, K = q.shape
    wanted = memeff.attention(q, k, v, causal=True)
    cache = init_cache(B, length, k.shape[2], K)
    step = jax.jit(decode_step)
    worst = 0.0
    for i in range(length):
        token = slice(i, i + 1)
        cache, out = step(cache, q[:, token], k[:, token], v[:, token])
        error = np.abs(out - wanted[:, token]).max() / np.abs(wanted).max()
        worst = np.maximum(worst, error)
    print(f"cache: {length} tokens one by one, error {worst:.1e} against all at once")
    return worst


def run_alone(length, rows=8192):
    """Self-attention over `length` tokens on one device, `rows` queries at a time.

    One query of each round is computed in float64 as well. Returns the largest error.
    """
    rows = min(rows, length)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, length, 1, 64))
    compiled = jax.jit(memeff.attention).lower(q[:, :rows], k, v).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    print(f"{length:,} tokens, {memory / 1e6:,.0f} MB beside arguments and results")
    keys = np.float64(k[0, :, 0])
    values = np.float64(v[0, :, 0])
    worst = 0.0
    start = time.time()
    for first in range(0, length, rows):
        first = min(first, length - rows)
        out = compiled(q[:, first : first + rows], k, v)
        scores = keys @ np.float64(q[0, first, 0]) / 8
        weights = np.exp(scores - scores.max())
        wanted = weights @ values / weights.sum()
        worst = np.maximum(worst, np.abs(wanted - np.float64(out[0, 0, 0])).max())
        done = first + rows
        left = (time.time() - start) * (length / done - 1)
        print(f"{done:,} of {length:,} queries, {left:,.0f} s left, error {worst:.1e}", flush=True)
    return worst


def run_on_devices(length, devices):
    zigzag_order(length, devices)  # checks both
    with contextlib.suppress(RuntimeError):  # JAX is in use already; its devices are counted below
        jax.config.update("jax_num_cpu_devices", devices)
    count = jax.device_count()
    require(devices <= count, f"--devices {devices}: there are {count}")
    mesh = jax.make_mesh((devices,), ("seq",), axis_types=(AxisType.Auto,))
    qkv = tuple(jax.random.normal(jax.random.key(0), (3, 1, length, 1, 64)))
    short = [x[:, :256] for x in qkv]
    return np.maximum(compare(mesh, qkv), decode(short))


def main(argv=None) -> int:
    """Returns the exit status: 1 if an error is above 1e-5, 2 for bad input, told in one line."""
    parser = argparse.ArgumentParser(description="Attention over long sequences.")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--length", type=int, default=16384, help="tokens, over all devices")
    parser.add_argument("--alone", type=int, help="only so many tokens on one device")
    args = parser.parse_args(argv)
    try:
        if args.alone is None:
            error = run_on_devices(args.length, args.devices)
        else:
            require(args.alone >= 1, f"--alone {args.alone} is not at least 1")
            error = run_alone(args.alone)
    except ValueError as problem:
        print(f"long_context.py: {problem}", file=sys.stderr)
        return 2
    return int(math.isnan(error) or error > 1e-5)


if __name__ == "__main__":
    run_program(main)
