"""Attention over a sequence that is cut over devices, and over one that grows: ring, zigzag, cache.

What      ring_attention: each device holds a block of the sequence; keys and values go round the ring while
          it works on the block it has. zigzag_order: which tokens to give to which device, so that all have
          the same work under a causal mask. init_cache, decode_step: token by token, rows of any length.
Paper     Ring: Liu, Zaharia, Abbeel 2023, "Ring Attention with Blockwise Transformers for Near-Infinite
          Context", arXiv:2310.01889. It merges what memeff_attention.py computes (Rabe & Staats 2021).
Needs     memeff_attention.py. Without accelerators the devices are simulated on the CPU.
Run       python examples/long_context.py --devices 8 --length 16384
          23 s on two CPU cores: bytes per device, ppermutes, error against one device
Axes      B batch  T queries  S keys  H heads  G heads of keys, R = H / G  K head size  V value size
          n devices.  Inside shard_map T and S are sizes per device.
"""

import argparse
import collections
import contextlib
import functools
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import memeff_attention as memeff  # noqa: E402, found by the line above from whichever folder this is started

require = memeff.require

# ==== Ring attention ========================================================================================
Ring = collections.namedtuple("Ring", "plan axis zigzag")  # what is static; plan as in memeff_attention.py


def zigzag_order(length, devices):
    """Permutation int [length] of a sequence: device r of n gets pieces r and 2n-1-r of 2n, one early and one
    late. ValueError unless the length is a multiple of 2n."""
    fits = min(length, devices) >= 1 and length % (2 * devices) == 0
    require(fits, f"length {length} is not a positive multiple of 2 x {devices} devices")
    pieces = np.arange(length).reshape(2 * devices, -1)
    return np.stack([pieces[:devices], pieces[: devices - 1 : -1]], axis=1).ravel()


def heads_first(plan, q, k, v):
    """q [B,T,H,K], k [B,S,G,K], v [B,S,G,V] -> [B,G,R,T,K], [B,G,1,S,K], [B,G,1,S,V]."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return q.reshape(len(q), *plan.groups, *q.shape[2:]), k[:, :, None], v[:, :, None]


def merge(first, second):
    """memeff.merge of 2 x (out [B,G,R,T,V], lse [B,G,R,T,1])."""
    flat = lambda out, lse: (out.reshape(-1, *out.shape[-2:])[:, :, None], lse.reshape(-1, 1, lse.shape[-2]))
    results = memeff.merge(flat(*first), flat(*second))
    return tuple(x.reshape(y.shape) for x, y in zip(results, first))


def send(ring: Ring, tree):
    """The arrays [...] of the previous device; this device's go to the next."""
    n = lax.axis_size(ring.axis)
    return lax.ppermute(tree, ring.axis, [(i, (i + 1) % n) for i in range(n)])  # a block moves one device on


def visit(ring: Ring, add, total, distance, T, S):
    """total after add(total, first query, end of keys) for what this device's queries see of the keys from
    `distance` devices back: under a causal mask all, none or, with zigzag, half. Only distance 0 is cut
    diagonally."""
    if not ring.plan.causal:
        return add(total, 0, S)
    earlier, later = (lambda total: add(total, 0, S)), (lambda total: total)
    if ring.zigzag:  # all see the early piece of an earlier device; the late piece sees all of a later one
        earlier, later = (lambda total: add(total, 0, S // 2)), (lambda total: add(total, T // 2, S))
    return lax.cond(distance <= lax.axis_index(ring.axis), earlier, later, total)


def widen(x, before, length, value=0):
    """x [...,n,V] with `before` rows of value before it and as many behind it as make `length`."""
    pad = [(0, 0)] * (x.ndim - 2) + [(before, length - before - x.shape[-2]), (0, 0)]
    return jnp.pad(x, pad, constant_values=value)


def ring_forward(ring: Ring, q, k, v):
    """q [B,G,R,T,K], k [B,G,1,S,K], v [B,G,1,S,V] on each device -> out [B,G,R,T,V], lse [B,G,R,T,1]."""
    T, S = q.shape[-2], k.shape[-2]

    def part(plan, q, k, v):
        function = lambda x: memeff.forward_tiles(plan, x["q"], x["k"], x["v"], *[None] * 5)
        return memeff.over_heads(plan, function, {"q": q, "k": k, "v": v})

    def step(state, distance):
        (k, v), total = state
        following = send(ring, (k, v))  # on its way while this block is worked on

        def add(total, first, end):
            plan = ring.plan._replace(causal=False)
            out, lse = part(plan, q[..., first:, :], k[..., :end, :], v[..., :end, :])
            return merge(total, (widen(out, first, T), widen(lse, first, T, -jnp.inf)))

        return (following, visit(ring, add, total, distance, T, S)), None

    start = send(ring, (k, v)), part(ring.plan, q, k, v)
    (_, total), _ = lax.scan(step, start, jnp.arange(1, lax.axis_size(ring.axis)))
    return total


def ring_backward(ring: Ring, saved, cotangents):
    """Gradients of q, k and v. Those of k and v travel with them and come home with the last of n moves."""
    q, k, v, *results = saved
    T, S = q.shape[-2], k.shape[-2]
    rows = [memeff.at_least_float32(x) for x in (q, *results, *cotangents)]

    def part(plan, first, k, v):
        def function(x):
            inputs = (x["q"], x["k"], x["v"], *[None] * 5)
            return memeff.backward_tiles(plan, (inputs, x["out"], x["lse"]), (x["dout"], x["dlse"]))[:3]

        arrays = dict(zip(("q", "out", "lse", "dout", "dlse"), (x[..., first:, :] for x in rows)))
        arrays |= {"k": memeff.at_least_float32(k), "v": memeff.at_least_float32(v)}
        dq, dk, dv = memeff.over_heads(plan, function, arrays)
        dk, dv = (widen(x.sum(2, keepdims=True), 0, S) for x in (dk, dv))  # over the heads that share a key
        return widen(dq, first, T), dk, dv

    def step(state, distance):
        (k, v), dq, dkv = state
        following = send(ring, (k, v))  # on its way while this block is worked on

        def add(total, first, end):
            more = part(ring.plan._replace(causal=False), first, k[..., :end, :], v[..., :end, :])
            return jax.tree.map(jnp.add, total, more)

        dq, *dkv = visit(ring, add, (dq, *dkv), distance, T, S)
        return (following, dq, send(ring, tuple(dkv))), None

    dq, *dkv = part(ring.plan, 0, k, v)
    start = send(ring, (k, v)), dq, send(ring, tuple(dkv))
    (_, dq, (dk, dv)), _ = lax.scan(step, start, jnp.arange(1, lax.axis_size(ring.axis)))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


around = jax.custom_vjp(ring_forward, nondiff_argnums=(0,))
around.defvjp(lambda ring, *qkv: (results := around(ring, *qkv), (*qkv, *results)), ring_backward)


def ring_attention(
    q, k, v, axis_name, *, causal=False, zigzag=False, scale=None, q_chunk=None, kv_chunk=None,
    return_lse=False,
):  # fmt: skip
    """memeff_attention.attention inside shard_map, the sequence cut over mesh axis `axis_name`: q [B,T,H,K],
    k [B,S,G,K], v [B,S,G,V] of this device -> [B,T,H,V], with return_lse also [B,H,T]. On n devices a pass
    moves each array n times: 2n ppermutes forward (keys, values), 4n backward (their gradients too).

    zigzag=True needs causal=True and a sequence that was permuted, once, at the model's input:
        order = zigzag_order(tokens.shape[1], mesh.shape["seq"])
        tokens, targets, positions = tokens[:, order], targets[:, order], positions[order]
    Then all devices work alike, in about half the time: without it the last works at every step, the first at
    one. A mean over tokens needs no way back; else it is x[:, np.argsort(order)].
    ValueError as in attention, and if a causal mask meets T other than S, or zigzag an odd T."""
    scale = np.shape(q)[-1] ** -0.5 if scale is None else scale
    plan = memeff.Plan(scale, causal, None, 0, None, None, None, return_lse)
    memeff.check(plan, memeff.Arrays(q, k, v, *[None] * 5), q_chunk, kv_chunk)
    (T, H), (S, G) = q.shape[1:3], k.shape[1:3]
    require(not causal or T == S, f"causal=True needs as many keys as queries on a device, not {S} and {T}")
    require(not zigzag or causal, "zigzag=True needs causal=True")
    require(not zigzag or T % 2 == 0, f"zigzag=True needs an even number of tokens on a device, not {T}")
    half = (q[:, : T // 2], k[:, : S // 2]) if zigzag else (q, k)  # the smallest block that tiles must fit
    chunks = memeff.chunk_sizes(*half, plan, q_chunk, kv_chunk)
    plan = plan._replace(groups=(G, H // G), chunks=chunks)
    arrays = heads_first(plan, *memeff.same_axes((q, k, v)))
    out, lse = around(Ring(plan, axis_name, zigzag), *arrays)
    out = out.reshape(len(q), H, T, -1).swapaxes(1, 2).astype(q.dtype)
    return (out, lse.reshape(len(q), H, T)) if return_lse else out


# ==== Cache =================================================================================================


def init_cache(batch, length, kv_heads, head_size, value_size=None, dtype=jnp.float32) -> dict:
    """An empty cache: k [B,S,G,K], v [B,S,G,V], the length int [B] of each row, overflow boolean [B]."""
    for name, n in (("batch", batch), ("length", length), ("kv_heads", kv_heads), ("head_size", head_size)):
        require(n >= 1, f"{name}={n} is not at least 1")
    zeros = lambda size: jnp.zeros((batch, length, kv_heads, size), dtype)
    rows = {"length": jnp.zeros(batch, jnp.int32), "overflow": jnp.zeros(batch, bool)}
    return {"k": zeros(head_size), "v": zeros(value_size or head_size), **rows}


def decode_step(cache, q, k, v, *, scale=None, window=None):
    """One token for each row: its key and value go behind those of the row, and its query sees them all, or
    the last `window`. q [B,1,H,K], k [B,1,G,K], v [B,1,G,V] -> (cache, out [B,1,H,V]).
    A full row: ValueError where the lengths are known; under jit the row stays as it is, its query sees what
    is there, and its overflow turns True. ValueError for shapes that are not the cache's."""
    B, S, _, K = cache["k"].shape
    wanted = {name: (B, 1, *cache[name].shape[2:]) for name in ("k", "v")} | {"q": (B, 1, np.shape(q)[2], K)}
    for name, x in (("q", q), ("k", k), ("v", v)):
        fits = x.shape == wanted[name] and x.dtype == cache["k"].dtype
        given = f"{name} is {x.dtype} {x.shape}"
        require(fits, f"{given}, but the cache takes {cache['k'].dtype} {wanted[name]}")
    require(window is None or window >= 1, f"window={window} is not at least 1")
    length = cache["length"]
    full = length >= S
    if not isinstance(length, jax.core.Tracer):
        require(not full.any(), f"rows {np.flatnonzero(full).tolist()} of the cache are full, at {S} tokens")
    put = lambda old, new: old.at[jnp.arange(len(old)), length].set(new[:, 0], mode="drop")  # S: nowhere
    cache = {"k": put(cache["k"], k), "v": put(cache["v"], v), "overflow": cache["overflow"] | full}
    cache["length"] = jnp.minimum(length + 1, S)
    keys, length = jnp.arange(S), cache["length"]
    see = keys < length[:, None]
    see = see & (keys >= length[:, None] - window) if window else see
    out = memeff.attention(q, cache["k"], cache["v"], mask=see[:, None, None], scale=scale)
    return cache, out


# ==== Demo ==================================================================================================


def collectives(jaxpr, name) -> int:
    """How often a collective runs in a jaxpr, loops with their trip counts."""
    total = 0
    for eqn in jaxpr.eqns:
        total += eqn.primitive.name == name
        for value in jax.tree.leaves(tuple(eqn.params.values())):
            value = getattr(value, "jaxpr", value)
            total += collectives(value, name) * eqn.params.get("length", 1) if hasattr(value, "eqns") else 0
    return total


def on_ring(mesh, zigzag):
    """Causal ring attention of whole arrays [B,T,H,K] on a mesh with axis "seq", in their usual order."""
    local = functools.partial(ring_attention, axis_name="seq", causal=True, zigzag=zigzag)
    cut = jax.shard_map(local, mesh=mesh, in_specs=P(None, "seq"), out_specs=P(None, "seq"))

    def run(q, k, v):
        order = zigzag_order(q.shape[1], mesh.shape["seq"]) if zigzag else np.arange(q.shape[1])
        return cut(*(x[:, order] for x in (q, k, v)))[:, np.argsort(order)]

    return cut, run


def compare(mesh, qkv):
    """Prints ring attention beside attention on one device: bytes, collectives, error, seconds."""
    loss = lambda function: lambda *qkv: jnp.square(function(*qkv)).sum()
    value_and_grad = lambda function: jax.value_and_grad(loss(function), (0, 1, 2))
    one = jax.jit(value_and_grad(functools.partial(memeff.attention, causal=True)))
    wanted, plain = jax.tree.leaves(one(*qkv)), one.lower(*qkv).compile().memory_analysis().temp_size_in_bytes
    print(f"one device: {plain / 1e6:,.1f} MB of temporaries for value and gradient")
    placed, worst = jax.device_put(qkv, NamedSharding(mesh, P(None, "seq"))), 0.0
    for zigzag in (False, True):
        cut, run = on_ring(mesh, zigzag)
        got = jax.tree.leaves(jax.jit(value_and_grad(run))(*qkv))
        # numpy: on a CPU, jnp's max of many numbers is -inf if one of them is NaN (JAX 0.10.2, 0.12.0.1)
        error = np.max([np.abs(a - b).max() / np.abs(b).max() for a, b in zip(got, wanted)])
        step, worst = jax.jit(value_and_grad(cut)).lower(*placed).compile(), np.maximum(worst, error)
        started = time.time()
        jax.block_until_ready(step(*placed))
        size, seconds = step.memory_analysis().temp_size_in_bytes, time.time() - started
        count = collectives(jax.make_jaxpr(value_and_grad(cut))(*placed).jaxpr, "ppermute")
        name = f"{mesh.shape['seq']} devices, {'zigzag' if zigzag else 'in order'}"
        print(f"{name}: {size / 1e6:,.1f} MB on each, {count} ppermutes, error {error:.1e}, {seconds:.2f} s")
    return worst


def decode(qkv, length):
    """Prints the error of a cache, filled token by token, against causal attention."""
    q, k, v = (x[:, :length] for x in qkv)
    cache, step, worst = init_cache(len(q), length, k.shape[2], k.shape[3]), jax.jit(decode_step), 0.0
    wanted = memeff.attention(q, k, v, causal=True)
    for i in range(length):
        cache, out = step(cache, *(x[:, i : i + 1] for x in (q, k, v)))
        worst = np.maximum(worst, np.abs(out[:, 0] - wanted[:, i]).max() / np.abs(wanted).max())
    print(f"cache: {length} tokens one by one, error {worst:.1e} against all at once")
    return worst


def main(argv=None) -> int:
    """Exit status 1 if an error is above 1e-5, 2 for bad input, told in one line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--length", type=int, default=16384, help="tokens, over all devices")
    parser.add_argument("--data", default=str(ROOT / "data/moby_dick.txt.gz"), help="a text, plain or .gz")
    args = parser.parse_args(argv)
    try:
        zigzag_order(args.length, args.devices)
        text = np.resize(np.concatenate(memeff.load_text(args.data)), args.length)
        with contextlib.suppress(RuntimeError):  # too late, devices are in use: they are counted below
            jax.config.update("jax_num_cpu_devices", args.devices)
        fits = args.devices <= jax.device_count()
        require(fits, f"--devices {args.devices} are more than {jax.device_count()}")
    except ValueError as error:
        print(f"long_context.py: {error}", file=sys.stderr)
        return 2
    tables = jax.random.normal(jax.random.key(0), (3, 256, 2, 64))
    qkv = tuple(memeff.rotary(table[text][None]) for table in tables)  # [1,T,2,64]
    mesh = jax.make_mesh((args.devices,), ("seq",), axis_types=(AxisType.Auto,))
    worst = np.maximum(compare(mesh, qkv), decode(qkv, min(args.length, 64)))
    return int(not worst < 1e-5)


if __name__ == "__main__":
    sys.exit(main())
