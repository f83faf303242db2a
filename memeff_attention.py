"""Memory-efficient attention: exact softmax attention without a matrix of queries times keys.

    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 4096, 8, 64))  # each [B,T,H,K]
    out = jax.jit(attention)(q, k, v)  # [B,T,H,V], for any length
    out = attention(q, k, v, causal=True, window=256)  # the last 256 keys before each query
    out = attention(q, k, v, mask=mask, bias=bias)  # differentiable in q, k, v and bias

    # A sequence that is cut over the devices of mesh axis "seq":
    ring = functools.partial(ring_attention, axis_name="seq", causal=True)
    specs = {"in_specs": P(None, "seq"), "out_specs": P(None, "seq")}
    out = jax.jit(jax.shard_map(ring, mesh=mesh, **specs))(q, k, v)

Paper     Rabe & Staats 2021, "Self-attention Does Not Need O(n^2) Memory", arXiv:2112.05682 v3.
          The ring: Liu, Zaharia & Abbeel 2023, "Ring Attention with Blockwise Transformers for
          Near-Infinite Context", arXiv:2310.01889.
Here      The running softmax (Sec. 2) in its stable form (Sec. 3); the paper's own code (Fig. 1)
          and experiment (Tables 2 and 3). Beyond the paper: mask, bias, causal, window, segments,
          heads that share keys, a backward pass that recomputes one tile at a time, the sequence
          cut over devices, the forward pass as a Pallas kernel.
Not here  Dropout and soft caps of the scores; a window that is not causal; a traced query_offset;
          empty arrays; forward-mode derivatives; in the ring: mask, bias, segments, window. Zigzag
          order, a cache for decoding: examples/long_context.py. A language model of bytes:
          examples/byte_lm.py. For cuDNN's kernel call jax.nn.dot_product_attention.
Differs   From the official code: chunks need not divide the lengths (there, a chunk that does not
          divide the keys counts some of them twice, and one that does not divide the queries
          crashes); one running maximum, not one for each chunk; the output has q's dtype. A query
          that sees nothing gets zeros, and no gradient.
Claims    C1 exact for every length, chunk, mask and bias
          C2 at 16,384 tokens 59 times less memory for inference, 32 times for the gradient
          C3 memory grows linearly with the length
          C4 stable for scores of any size
          C5 the ring gives the same numbers, and more devices need less memory each
          C6 parts of the keys merge in any split and order
          C7 causal: half the FLOPs for long sequences
Checked   google-research/google-research @ 30adf0e, memory_efficient_attention: outputs and
          gradients in float32; the largest error is 2.0e-6 and 8.6e-6 of the largest value, where
          scores differ much between chunks, elsewhere 4.8e-7 and 1.8e-6.
Run       python memeff_attention.py
          25 s on two CPU cores: at n = 16,384 attention needs 98 times less memory than by its
          definition, and its gradient 113 times; below 59 and 32, which the abstract states, it
          exits with status 1
Axes      B batch  T queries  S keys  G heads of keys  R = H / G heads of queries for each of them
          H heads of queries  K size of a query and a key  V size of a value
          t queries and s keys of a tile.  Inside shard_map B, T and S are sizes per device.
"""

import argparse
import functools
import math
import os
import pathlib
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import AxisType


def require(ok, message):  # same in every file
    """Raises ValueError(message) unless ok."""
    if not ok:
        raise ValueError(message)


# ==== Definition ==================================================================================

LEAST = -1e30  # below every score, but finite: the difference of two infinities is not a number


class Plan(NamedTuple):
    """What is fixed when a call is compiled; attention explains the fields."""

    scale: float
    causal: bool
    window: int | None
    query_offset: int
    forward_tile: tuple[int, int]  # (t, s)
    backward_tile: tuple[int, int]
    kernel: bool  # the forward pass by the Pallas kernel


class Arrays(NamedTuple):
    """The arrays of a call, heads first. Where an axis has length 1, all share what is there."""

    q: jax.Array  # [B,G,R,T,K]
    k: jax.Array  # [B,G,1,S,K]
    v: jax.Array  # [B,G,1,S,V]
    bias: jax.Array | None = None  # [B|1,G|1,R|1,T|1,S|1]
    mask: jax.Array | None = None  # [B|1,G|1,R|1,T|1,S|1]
    q_segments: jax.Array | None = None  # [B,1,1,T,1]
    kv_segments: jax.Array | None = None  # [B,1,1,1,S]


def attention_by_definition(q, k, v, *, return_lse=False, **options):
    """The definition: softmax(scale q k^T + bias) v over the keys that a query sees (Sec. 1).

    Arguments and results as of attention, without q_chunk, kv_chunk and implementation. It holds
    the scores of all queries and keys, B H T S numbers.
    """
    plan, x = prepare(q, k, v, **options)
    T, S = x.q.shape[-2], x.k.shape[-2]
    k = at_least_float32(x.k)
    v = at_least_float32(x.v)

    scores = plan.scale * at_least_float32(x.q) @ k.mT  # [B,G,R,T,S]
    if x.bias is not None:
        scores = scores + x.bias.astype(scores.dtype)
    rows = jnp.arange(T).reshape(1, 1, 1, T, 1)
    keys = jnp.arange(S).reshape(1, 1, 1, 1, S)
    see = visible(plan, rows, keys, x.mask, x.q_segments, x.kv_segments)
    scores = jnp.where(see, scores, -jnp.inf)

    highest = scores.max(-1, keepdims=True)
    highest = lax.stop_gradient(jnp.maximum(highest, LEAST))  # it cancels out below
    terms = jnp.exp(scores - highest)
    total = terms.sum(-1, keepdims=True)
    weights = terms / nonzero(total)  # a query that sees nothing gets zeros
    results = Softmax(highest, total, weights @ v)
    return heads_last(results, x.q.dtype, return_lse)


def visible(plan: Plan, rows, keys, mask=None, q_segments=None, kv_segments=None):
    """Whether a query sees a key. Their indices: rows [...,t,1], keys [...,1,s] -> [...,t,s]."""
    rows = rows + plan.query_offset
    see = jnp.ones(jnp.broadcast_shapes(rows.shape, keys.shape), bool)
    if plan.causal:
        see = see & (keys <= rows)
    if plan.window:
        see = see & (keys > rows - plan.window)
    if mask is not None:
        see = see & mask
    if q_segments is not None:
        see = see & (q_segments == kv_segments)
    return see


def wide(x):  # same in every file
    """The dtype in which to compute with x: float32, or x's own if that is wider."""
    return jax.dtypes.canonicalize_dtype(np.promote_types(x.dtype, np.float32))


def at_least_float32(x):  # same in every file
    """x in the dtype `wide`."""
    return x.astype(wide(x))


# ==== The paper's own code ========================================================================


def attention_checkpointed(q, k, v, *, q_chunk=1024, kv_chunk=4096):
    """The algorithm as the paper prints it (Fig. 1), for batches and any length.

    Each chunk of keys gives its highest score, its sum of terms and its sum of terms times values;
    these are kept for all chunks of keys and merged last. jax.checkpoint recomputes the scores for
    the gradient. q [B,T,H,K], k [B,S,H,K], v [B,S,H,V] -> [B,T,H,V].
    """
    B, T, H, K = q.shape
    S, V = v.shape[1], v.shape[3]
    t = min(q_chunk, T)
    s = min(kv_chunk, S)

    def chunks_of(x, size):
        """x [B,n,H,K] in float32, padded with zeros and cut -> [n/size,B,size,H,K]."""
        x = jnp.pad(at_least_float32(x), ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)))
        x = x.reshape(B, -1, size, H, x.shape[3])
        return jnp.moveaxis(x, 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def summarize_chunk(q, chunk):
        k, v, first = chunk
        scores = jnp.einsum("bthk,bshk->bhts", q * K**-0.5, k)
        is_key = first + jnp.arange(s) < S  # the rest is padding
        scores = jnp.where(is_key[None, None, None, :], scores, LEAST)
        highest = lax.stop_gradient(scores.max(-1, keepdims=True))  # [B,H,t,1]
        terms = jnp.exp(scores - highest)
        total = terms.sum(-1, keepdims=True)
        out = jnp.einsum("bhts,bshv->bhtv", terms, v)
        return highest, total, out

    def attend_chunk(q):
        highest, total, out = lax.map(
            functools.partial(summarize_chunk, q), chunks
        )  # [S/s,B,H,t,.]
        weight = jnp.exp(highest - highest.max(0, keepdims=True))
        return (out * weight).sum(0) / (total * weight).sum(0)  # [B,H,t,V]

    chunks = chunks_of(k, s), chunks_of(v, s), jnp.arange(0, S, s)
    out = lax.map(attend_chunk, chunks_of(q, t))  # [T/t,B,H,t,V]
    out = out.transpose(1, 0, 3, 2, 4).reshape(B, -1, H, V)
    return out[:, :T].astype(q.dtype)  # without the padding


# ==== Attention: arguments and results ============================================================


def attention(
    q,
    k,
    v,
    *,
    bias=None,
    mask=None,
    causal=False,
    window=None,
    query_offset=0,
    q_segments=None,
    kv_segments=None,
    scale=None,
    q_chunk=None,
    kv_chunk=None,
    implementation="xla",
    return_lse=False,
):
    """softmax(scale q k^T + bias) v over the keys that a query sees.

    q [B,T,H,K], k [B,S,G,K], v [B,S,G,V] -> [B,T,H,V] in q's dtype, computed in float32 at least.
    H is a multiple of G: neighbouring heads of q share a head of k and v. A query that sees nothing
    gets zeros. The memory beside inputs and output is O(B H (T + S)).

    bias, mask      float and bool (True: attend), up to four axes that broadcast to [B,H,T,S]
    causal          query i sees the keys 0 ... i + query_offset; with window=w the last w of them
    q_segments      int [B,T], with kv_segments int [B,S]: a query sees the keys of its own segment
    scale           1 / sqrt(K) by default
    q_chunk         queries of a tile, t; kv_chunk is s. See tile_shapes for the defaults. Smaller
                    ones need less memory
    implementation  "xla", or "pallas": the forward pass as one kernel, which takes no bias, mask or
                    segments, and gives the same gradients
    return_lse      also log(sum(exp(scores))) in nats, [B,H,T]; -inf for a query that sees nothing

    All but the arrays is fixed when a call is compiled; call it under jit. A score below -1e30
    counts as not seen. On a GPU float32 is multiplied as TF32 unless JAX is told otherwise. Arrays
    that a mesh with Auto axes cuts are gathered on each device: to keep them cut use jax.shard_map,
    with the batch or the heads cut, or ring_attention. In float64 on a CPU prefer the axis B to
    jax.vmap: XLA then errs in lse (JAX 0.10.2, 0.12.0.1).

    Raises ValueError for what does not go together, NotImplementedError for what "pallas" lacks.
    """
    plan, x = prepare(
        q,
        k,
        v,
        bias=bias,
        mask=mask,
        causal=causal,
        window=window,
        query_offset=query_offset,
        q_segments=q_segments,
        kv_segments=kv_segments,
        scale=scale,
        q_chunk=q_chunk,
        kv_chunk=kv_chunk,
    )
    require(
        implementation in ("xla", "pallas"),
        f"implementation={implementation!r} is neither 'xla' nor 'pallas'",
    )
    if implementation == "pallas":
        check_kernel(x)
        plan = plan._replace(kernel=True)
    return heads_last(attend(plan, x), x.q.dtype, return_lse)


def merge(first, second):
    """Attention over two sets of keys, from the attention over each (Sec. 2).

    Two pairs (out [B,T,H,V], lse [B,H,T]), as return_lse gives them -> such a pair.
    """
    lse = jnp.logaddexp(first[1], second[1])
    out = 0
    for part, part_lse in (first, second):
        share = jnp.exp(part_lse - jnp.where(lse > -jnp.inf, lse, 0))  # [B,H,T]
        out = out + at_least_float32(part) * share.mT[..., None]
    return out.astype(first[0].dtype), lse


def prepare(
    q,
    k,
    v,
    *,
    bias=None,
    mask=None,
    causal=False,
    window=None,
    query_offset=0,
    q_segments=None,
    kv_segments=None,
    scale=None,
    q_chunk=None,
    kv_chunk=None,
):
    """The arguments of attention, checked, as a Plan and Arrays."""
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    check_qkv(q, k, v)
    check_integers(
        causal, {"window": window, "q_chunk": q_chunk, "kv_chunk": kv_chunk}, query_offset
    )
    B, T, H, K = q.shape
    S, G = k.shape[1:3]
    groups = (G, H // G)
    require(
        (q_segments is None) == (kv_segments is None), "q_segments and kv_segments need each other"
    )
    x = Arrays(
        q.swapaxes(1, 2).reshape(B, *groups, T, K),
        k.swapaxes(1, 2)[:, :, None],
        v.swapaxes(1, 2)[:, :, None],
        split_heads(broadcastable("bias", bias, jnp.floating, (B, H, T, S)), groups),
        split_heads(broadcastable("mask", mask, jnp.bool_, (B, H, T, S)), groups),
        broadcastable("q_segments", q_segments, jnp.integer, (B, T)),
        broadcastable("kv_segments", kv_segments, jnp.integer, (B, S)),
    )
    if q_segments is not None:
        x = x._replace(
            q_segments=x.q_segments[:, None, None, :, None],
            kv_segments=x.kv_segments[:, None, None, None, :],
        )
    if scale is None:
        scale = K**-0.5
    plan = Plan(float(scale), causal, window, query_offset, (), (), kernel=False)
    forward_tile, backward_tile = tile_shapes(plan, x, q_chunk, kv_chunk)
    return plan._replace(forward_tile=forward_tile, backward_tile=backward_tile), same_axes(x)


def check_qkv(q, k, v):
    """ValueError unless q [B,T,H,K], k [B,S,G,K] and v [B,S,G,V] go together."""
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    require(q.ndim == k.ndim == v.ndim == 4, f"{shapes} are not all [batch,length,heads,size]")
    require(
        k.shape[:3] == v.shape[:3] and k.shape[0] == q.shape[0] and k.shape[3] == q.shape[3],
        f"{shapes} are not [B,T,H,K], [B,S,G,K], [B,S,G,V]",
    )
    require(q.size and k.size and v.size, f"{shapes}: none may be empty")
    H = q.shape[2]
    G = k.shape[2]
    require(H % G == 0, f"{H} heads of q are not a multiple of {G} heads of k and v")
    require(
        q.dtype == k.dtype == v.dtype and jnp.issubdtype(q.dtype, jnp.floating),
        f"q is {q.dtype}, k {k.dtype}, v {v.dtype}, not all of one floating type",
    )
    for name, x in (("q", q), ("k", k), ("v", v)):
        mesh = jax.typeof(x).sharding.mesh
        require(
            AxisType.Explicit not in mesh.axis_types,
            f"{name} is on a mesh with Explicit axes {mesh.axis_names}: give the mesh axes of type "
            "Auto, or call attention inside jax.shard_map",
        )


def check_integers(causal, positive, query_offset):
    """ValueError for a number that is not whole or out of range: sums of two must fit in int32."""
    for name, n in positive.items():
        require(
            n is None or (isinstance(n, int | np.integer) and 1 <= n <= 2**30),
            f"{name}={n} is not a whole number from 1 to {2**30}",
        )
    require(
        isinstance(query_offset, int | np.integer) and abs(query_offset) <= 2**30,
        f"query_offset={query_offset} is not a whole number from {-(2**30)} to {2**30}",
    )
    require(causal or positive["window"] is None, f"window={positive['window']} needs causal=True")


def broadcastable(name, x, kind, full):
    """x with as many axes as `full` has. ValueError unless its shape broadcasts to that."""
    if x is None:
        return None
    shape = np.shape(x)
    dtype = jnp.result_type(x)
    require(
        len(shape) <= len(full)
        and all(n in (1, m) for n, m in zip(shape[::-1], full[::-1]))
        and jnp.issubdtype(dtype, kind),
        f"{name} is {dtype} {shape}, not {kind.__name__} that broadcasts to {full}",
    )
    return jnp.asarray(x).reshape((1,) * (len(full) - len(shape)) + shape)


def split_heads(x, groups):
    """x [B|1,H|1,...] -> [B|1,G|1,R|1,...]."""
    if x is None:
        return None
    if x.shape[1] == 1:
        return x[:, :, None]
    return x.reshape(x.shape[0], *groups, *x.shape[2:])


def heads_last(results, dtype, return_lse):
    """What attention returns: out [B,T,H,V] of this dtype, and lse [B,H,T] if it is asked for."""
    B, G, R, T, V = results.out.shape
    out = results.out.reshape(B, G * R, T, V).swapaxes(1, 2).astype(dtype)
    if not return_lse:
        return out
    lse = results.highest + jnp.log(nonzero(results.total))
    lse = jnp.where(results.total > 0, lse, -jnp.inf)
    return out, lse.reshape(B, G * R, T)


# ==== The running softmax over tiles ==============================================================

FEW = 2**16  # scores of a head: with fewer, a CPU is faster if it works on all heads at once too


def tile_shapes(plan: Plan, x: Arrays, q_chunk=None, kv_chunk=None):
    """Queries and keys of a tile, (t, s), in the forward and in the backward pass.

    q_chunk and kv_chunk if they are given. Otherwise what was fastest on two CPU cores, 2,048 x 512
    and 512 x 2,048, with a causal mask 512 x 512; about the window, if that is smaller, since what
    it hides is computed in vain; less where many heads are worked on at once; and evened out, so
    that 2,049 queries are two tiles of 1,088.
    """
    long = 512 if plan.causal else 2048
    limit = min(plan.window or 2**17, 2**17 // math.prod(heads_at_once(x)))

    def size(length, given, most):
        if given:
            return min(given, length)
        most = min(most, max(limit, 128 if plan.window else 64))
        tiles = -(-length // most)
        return min(64 * -(-length // (64 * tiles)), length)

    T = x.q.shape[-2]
    S = x.k.shape[-2]
    forward_tile = size(T, q_chunk, long), size(S, kv_chunk, 512)
    backward_tile = size(T, q_chunk, 512), size(S, kv_chunk, long)
    return forward_tile, backward_tile


def heads_at_once(x: Arrays):
    """The block of heads in a tile: one head on a CPU, up to 1.8 times as fast; elsewhere all."""
    few = x.q.shape[-2] * x.k.shape[-2] < FEW
    if few or jax.default_backend() != "cpu":
        return x.q.shape[:3]  # (B, G, R)
    return 1, 1, 1


def tile_table(plan: Plan, T, S, t, s, masked):
    """The tiles of T x S in which some query sees some key, and no others.

    Two int arrays [n,4]: tiles in which all queries see all keys, and those that need a mask. The
    columns: first query, first key, and the first of each that count. The last tile of a row or
    column is moved back to fit, and what it shares with its neighbour does not count.
    """
    i, j = (index.ravel() for index in np.indices((-(-T // t), -(-S // s))))
    first_row = i * t
    first_key = j * s
    row = np.minimum(first_row, T - t)
    key = np.minimum(first_key, S - s)
    low = first_row + plan.query_offset  # the first query that counts, and the last
    high = row + t - 1 + plan.query_offset
    last_key = key + s - 1

    some = np.full(len(i), True)
    every = (row == first_row) & (key == first_key) & (not masked)
    if plan.causal:
        some &= first_key <= high
        every &= last_key <= low
    if plan.window:
        some &= last_key > low - plan.window
        every &= key > high - plan.window
    table = np.stack([row, key, first_row, first_key], axis=1).astype(np.int32)
    return table[some & every], table[some & ~every]


class Tile(NamedTuple):
    """Where a tile is, and its parts of an array."""

    block: tuple[int, int, int]  # heads in it
    t: int
    s: int
    masked: bool
    head: jax.Array  # its first head, int [3]
    row: jax.Array  # its first query
    key: jax.Array  # its first key
    first_row: jax.Array  # queries and keys before these belong to the tile before
    first_key: jax.Array

    def queries(self, x):
        """x [B|1,G|1,R|1,T|1,n] -> [...,t,n]."""
        return part_of(x, (*self.head, self.row, 0), (*self.block, self.t, x.shape[-1]))

    def keys(self, x):
        """x [B|1,G|1,R|1,S|1,n] -> [...,s,n]."""
        return part_of(x, (*self.head, self.key, 0), (*self.block, self.s, x.shape[-1]))

    def square(self, x):
        """x [B|1,G|1,R|1,T|1,S|1] -> [...,t,s]."""
        return part_of(x, (*self.head, self.row, self.key), (*self.block, self.t, self.s))


def part_of(x, start, shape):
    """The part of x [B|1,G|1,R|1,.,.] that begins at start; an axis of length 1 is taken as it is.

    One head is [.,.]: with three axes of length 1 before them the gradient takes 1.2 times as long.
    """
    lengths = [min(n, most) for n, most in zip(shape, x.shape)]
    part = lax.dynamic_slice(x, int32(start), lengths)  # moves the start back where x has length 1
    if shape[:3] == (1, 1, 1):
        part = part.reshape(part.shape[3:])
    return part


def replace_at(x, part, start):
    """x [B,G,R,.,.] with a part replaced, the inverse of part_of."""
    part = jnp.expand_dims(part, range(x.ndim - part.ndim))
    return lax.dynamic_update_slice(x, part, int32(start))


def add_at(x, part, start):
    """x [B|1,G|1,R|1,.,.] with a part added, which is first summed over the axes that x shares."""
    part = jnp.expand_dims(part, range(x.ndim - part.ndim))
    shared = [axis for axis, n in enumerate(x.shape) if n == 1]
    part = part.sum(shared, keepdims=True)
    old = lax.dynamic_slice(x, int32(start), part.shape)
    return lax.dynamic_update_slice(x, old + part, int32(start))


def int32(numbers):
    """Indices of one type, as dynamic_slice wants them: a plain 0 is int64 in 64-bit mode."""
    return [jnp.asarray(n, jnp.int32) for n in numbers]


def scan_tiles(plan: Plan, t, s, add_tile, carry, x: Arrays):
    """carry after add_tile(carry, tile) for each tile in which some query sees some key."""
    masked = x.mask is not None or x.q_segments is not None
    every, some = tile_table(plan, x.q.shape[-2], x.k.shape[-2], t, s, masked)
    block = heads_at_once(x)
    counts = [n // size for n, size in zip(x.q.shape[:3], block)]
    heads = np.indices(counts).reshape(3, -1).T.astype(np.int32)  # [heads,3]

    def scan_table(carry, table, masked):
        def scan_head(carry, head):
            def step(carry, place):
                return add_tile(carry, Tile(block, t, s, masked, tuple(head), *place)), None

            return lax.scan(step, carry, table)

        carry, _ = lax.scan(scan_head, carry, heads)
        return carry

    carry, _ = same_axes((carry, x.q))
    if len(every):
        carry = scan_table(carry, every, masked=False)
    if len(some):
        carry = scan_table(carry, some, masked=True)
    return carry


def same_axes(tree):  # same in every file
    """Inside shard_map: arrays made to vary over every mesh axis that any of them varies over."""
    axes = frozenset().union(*(jax.typeof(x).mat.varying for x in jax.tree.leaves(tree)))

    def vary(x):
        missing = tuple(axes - jax.typeof(x).mat.varying)
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree)


def tile_scores(plan: Plan, x: Arrays, tile: Tile, flipped=False):
    """scale q k^T + bias, and -inf where a query does not see a key. -> [...,t,s].

    flipped: the same numbers as [...,s,t]. The product is the same one, so they agree to the bit.
    """
    q = at_least_float32(tile.queries(x.q))
    k = at_least_float32(tile.keys(x.k))
    scores = (plan.scale * q) @ k.mT
    bias = None
    if x.bias is not None:
        bias = tile.square(x.bias).astype(scores.dtype)
    see = tile_mask(plan, x, tile)
    if flipped:
        if min(tile.t, tile.s) < 64:
            # Else XLA on a CPU turns it into k q^T, which in narrow tiles is rounded otherwise.
            scores = lax.optimization_barrier(scores)
        scores, bias, see = jax.tree.map(jnp.matrix_transpose, (scores, bias, see))

    if bias is not None:
        scores = scores + bias
    if see is not None:
        scores = jnp.where(see, scores, -jnp.inf)
    return scores


def tile_mask(plan: Plan, x: Arrays, tile: Tile):
    """Whether a query sees a key, bool [...,t,s]; None if all see all."""
    if not tile.masked:
        return None
    shape = (tile.t, tile.s)
    if tile.block != (1, 1, 1):
        shape = (1, 1, 1, *shape)
    rows = tile.row + lax.broadcasted_iota(jnp.int32, shape, len(shape) - 2)
    keys = tile.key + lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
    mask, q_segments, kv_segments = None, None, None
    if x.mask is not None:
        mask = tile.square(x.mask)
    if x.q_segments is not None:
        q_segments = tile.queries(x.q_segments)
        kv_segments = tile.square(x.kv_segments)
    see = visible(plan, rows, keys, mask, q_segments, kv_segments)
    return see & (rows >= tile.first_row) & (keys >= tile.first_key)


class Softmax(NamedTuple):
    """A softmax on its way along the keys: m*, s* and v* of Sec. 3."""

    highest: jax.Array  # [B,G,R,T,1], score seen so far
    total: jax.Array  # [B,G,R,T,1], sum of exp(score - highest)
    out: jax.Array  # [B,G,R,T,V], sum of exp(score - highest) times the value


def softmax_of_nothing(x: Arrays) -> Softmax:
    """Before any key was seen."""
    shape = x.q.shape[:-1]
    dtype = wide(x.q)
    return Softmax(
        jnp.full((*shape, 1), LEAST, dtype),
        jnp.zeros((*shape, 1), dtype),
        jnp.zeros((*shape, x.v.shape[-1]), dtype),
    )


def running_softmax(plan: Plan, carry: Softmax, x: Arrays) -> Softmax:
    """Eq. 1 in the stable form of Sec. 3: shows the keys of x to its queries, tile by tile."""

    def add_tile(carry, tile):
        scores = tile_scores(plan, x, tile)  # [...,t,s]
        v = at_least_float32(tile.keys(x.v))
        old = Softmax(*(tile.queries(part) for part in carry))

        highest = jnp.maximum(old.highest, scores.max(-1, keepdims=True))
        highest = lax.stop_gradient(highest)
        terms = jnp.exp(scores - highest)
        shrink = jnp.exp(old.highest - highest)  # the sums so far were relative to the old maximum
        total = old.total * shrink + terms.sum(-1, keepdims=True)
        out = old.out * shrink + terms @ v

        start = (*tile.head, tile.row, 0)
        new = Softmax(highest, total, out)
        return jax.tree.map(lambda x, part: replace_at(x, part, start), carry, new)

    t, s = plan.forward_tile
    return scan_tiles(plan, t, s, add_tile, carry, x)


def divide(carry: Softmax) -> Softmax:
    """v* / s*, the last step of Eq. 1; zeros for a query that sees nothing."""
    return carry._replace(out=carry.out / nonzero(carry.total))


def nonzero(total):
    """total, and 1 where it is 0."""
    return jnp.where(total > 0, total, 1)


# ==== Its gradient ================================================================================


class Rows(NamedTuple):
    """What the gradient needs of each query, beside q."""

    highest: jax.Array  # [B,G,R,T,1], as in Softmax
    total: jax.Array  # [B,G,R,T,1], as in Softmax, and 1 for a query that sees nothing
    dout: jax.Array  # [B,G,R,T,V], gradient of the output
    delta: jax.Array  # [B,G,R,T,1], see accumulate_gradients


def rows_of(results: Softmax, cotangents: Softmax) -> Rows:
    """The Rows of what attend returned and of its cotangents; highest cancels out, and has none."""
    dout = lax.optimization_barrier(cotangents.out)  # see accumulate_gradients
    total = nonzero(results.total)
    mean = (results.out * dout).sum(-1, keepdims=True)
    return Rows(results.highest, total, dout, mean / total - cotangents.total)


def accumulate_gradients(plan: Plan, grads: Arrays, x: Arrays, rows: Rows) -> Arrays:
    """grads plus the gradients of q, k, v and bias, from one tile of recomputed scores at a time.

    With out = sum_j terms_j v_j / total and total = sum_j terms_j, the gradient of score j is

        terms_j (v_j.dout / total - delta),  delta = out.dout / total - (gradient of total).

    The scores are those of the forward pass, to the bit, and their terms come from its maximum and
    sum. From a rounded log-sum-exp instead, errors were 4 to 20 times as large for 8 keys.
    """
    # XLA on a CPU errs in (x @ ones).sum() if it sees that the ones are constant: hide it.
    x = x._replace(q=lax.optimization_barrier(x.q))

    def add_tile(grads, tile):
        q = at_least_float32(tile.queries(x.q))  # [...,t,K]
        k = at_least_float32(tile.keys(x.k))  # [...,s,K]
        v = at_least_float32(tile.keys(x.v))  # [...,s,V]
        dout = tile.queries(rows.dout) / tile.queries(rows.total)  # [...,t,V]

        # Keys by queries: a CPU multiplies fastest where the last axis of the left side is summed.
        scores = tile_scores(plan, x, tile, flipped=True)  # [...,s,t]
        terms = jnp.exp(scores - tile.queries(rows.highest).mT)
        dscores = terms * (v @ dout.mT - tile.queries(rows.delta).mT)

        dq = plan.scale * (k.mT @ dscores)  # [...,K,t]
        dk = plan.scale * (dscores @ q)
        dv = terms @ dout
        keys = (*tile.head, tile.key, 0)
        dbias = None
        if x.bias is not None:
            dbias = add_at(grads.bias, dscores.mT, (*tile.head, tile.row, tile.key))
        return Arrays(
            add_at(grads.q, dq, (*tile.head, 0, tile.row)),
            add_at(grads.k, dk, keys),
            add_at(grads.v, dv, keys),
            dbias,
        )

    t, s = plan.backward_tile
    grads = grads._replace(q=grads.q.mT)  # [B,G,R,K,T]
    grads = scan_tiles(plan, t, s, add_tile, grads, x)
    return grads._replace(q=grads.q.mT)


def no_gradients(x: Arrays) -> Arrays:
    """Zeros for the gradients of q, k, v and bias, in float32 at least."""
    return jax.tree.map(lambda x: jnp.zeros_like(x, wide(x)), Arrays(x.q, x.k, x.v, x.bias))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan: Plan, x: Arrays) -> Softmax:
    """The softmax over all keys, divided. Its gradient holds one tile of scores at a time."""
    if plan.kernel:
        return flash(plan, x)
    return divide(running_softmax(plan, softmax_of_nothing(x), x))


def attend_forward(plan: Plan, x: Arrays):
    results = attend(plan, x)
    return results, (x, results)


def attend_backward(plan: Plan, saved, cotangents: Softmax):
    x, results = saved
    grads = accumulate_gradients(plan, no_gradients(x), x, rows_of(results, cotangents))
    return (in_dtypes_of(x, grads),)


def in_dtypes_of(x: Arrays, grads: Arrays) -> Arrays:
    """The gradients in the dtypes of what they are gradients of; the other arrays have none."""
    return jax.tree.map(lambda g, x: g.astype(x.dtype), grads, Arrays(x.q, x.k, x.v, x.bias))


attend.defvjp(attend_forward, attend_backward)


# ==== Ring attention: the sequence cut over devices ===============================================


class Ring(NamedTuple):
    """What is fixed when a call is compiled."""

    plan: Plan
    axis: str  # of the mesh


def ring_attention(
    q, k, v, axis_name, *, causal=False, scale=None, q_chunk=None, kv_chunk=None, return_lse=False
):
    """attention, inside shard_map, over a sequence that is cut over the mesh axis axis_name.

    q [B,T,H,K], k [B,S,G,K] and v [B,S,G,V] of this device -> its [B,T,H,V]. Keys and values go
    once round the ring of n devices, while each works on the block that it has; so no device
    holds more than two blocks. Forward 2n ppermutes; backward 4n, since the gradients of the
    keys travel with them.

    The devices hold the sequence in order. With a causal mask device 0 then works at one of n steps
    and the last one at all of them; examples/long_context.py has an order that halves the time.

    Raises ValueError as attention does, and where a causal mask meets T other than S.
    """
    plan, x = prepare(q, k, v, causal=causal, scale=scale, q_chunk=q_chunk, kv_chunk=kv_chunk)
    T = q.shape[1]
    S = k.shape[1]
    require(not causal or T == S, f"causal=True with {T} queries and {S} keys on a device")
    results = ring(Ring(plan, axis_name), x)
    return heads_last(results, x.q.dtype, return_lse)


def send(axis, tree):
    """Each device's arrays to the next device; returns those of the device before."""
    n = lax.axis_size(axis)
    ring = [(i, (i + 1) % n) for i in range(n)]
    return lax.ppermute(tree, axis, ring)  # one block moves one device on


def visit(fixed: Ring, distance, add, carry):
    """add(plan, carry) for the block of keys from `distance` devices back, as far as it is seen."""
    all_keys = fixed.plan._replace(causal=False)
    if not fixed.plan.causal:
        return add(all_keys, carry)

    def own(carry):
        return add(fixed.plan, carry)

    def earlier(carry):
        return add(all_keys, carry)

    def later(carry):
        return carry

    device = lax.axis_index(fixed.axis)
    case = jnp.where(distance == 0, 0, jnp.where(distance <= device, 1, 2))
    return lax.switch(case, [own, earlier, later], carry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring(fixed: Ring, x: Arrays) -> Softmax:
    """attend over the keys of all devices: the running softmax goes on from block to block."""

    def step(carry, distance):
        softmax, k, v = carry
        following = send(fixed.axis, (k, v))  # on its way while this block is worked on

        def add(plan, softmax):
            return running_softmax(plan, softmax, x._replace(k=k, v=v))

        return (visit(fixed, distance, add, softmax), *following), None

    softmax, _ = same_axes((softmax_of_nothing(x), x.q))
    n = lax.axis_size(fixed.axis)
    (softmax, _, _), _ = lax.scan(step, (softmax, x.k, x.v), jnp.arange(n))
    return divide(softmax)


def ring_forward(fixed: Ring, x: Arrays):
    results = ring(fixed, x)
    return results, (x, results)


def ring_backward(fixed: Ring, saved, cotangents: Softmax):
    """The gradients of keys and values travel with them, and come home with the last of n moves."""
    x, results = saved
    rows = rows_of(results, cotangents)

    def step(carry, distance):
        grads, k, v = carry
        following = send(fixed.axis, (k, v))  # on its way while this block is worked on

        def add(plan, grads):
            return accumulate_gradients(plan, grads, x._replace(k=k, v=v), rows)

        grads = visit(fixed, distance, add, grads)
        dk, dv = send(fixed.axis, (grads.k, grads.v))
        return (grads._replace(k=dk, v=dv), *following), None

    grads, _ = same_axes((no_gradients(x), x.q))
    n = lax.axis_size(fixed.axis)
    (grads, _, _), _ = lax.scan(step, (grads, x.k, x.v), jnp.arange(n))
    return (in_dtypes_of(x, grads),)


ring.defvjp(ring_forward, ring_backward)


# ==== Kernel: the forward pass, with tiles that never leave the chip ==============================

TILE = 64  # queries, and keys, of the kernel's tiles


def check_kernel(x: Arrays):
    """NotImplementedError for what the kernel lacks."""
    lacks = [name for name, array in zip(x._fields[3:], x[3:]) if array is not None]
    if jax.config.jax_enable_x64:
        lacks.append("x64")
    if lacks:
        raise NotImplementedError(f"implementation='pallas' takes no {', '.join(lacks)}: use 'xla'")


def flash(plan: Plan, x: Arrays) -> Softmax:
    """divide(running_softmax(...)) as one kernel. Compiled for GPU and TPU, and run by neither yet.

    Each program has TILE queries of one head and runs along the keys, as running_softmax does.
    """
    B, G, R, T, _ = x.q.shape
    S, V = x.v.shape[-2:]
    q = pad_tiles(x.q.reshape(B, G * R, T, -1))
    k = pad_tiles(x.k[:, :, 0])
    v = pad_tiles(x.v[:, :, 0])

    def queries(size):
        return pl.BlockSpec((None, None, TILE, size), lambda b, h, i: (b, h, i, 0))

    def all_keys(x):
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, h, i: (b, lax.div(h, R), 0, 0))

    sizes = (1, 1, v.shape[-1])  # of highest, total and out
    call = functools.partial(
        pl.pallas_call,
        functools.partial(flash_kernel, plan=plan, S=S),
        grid=(B, G * R, q.shape[2] // TILE),
        in_specs=[queries(q.shape[-1]), all_keys(k), all_keys(v)],
        out_specs=[queries(size) for size in sizes],
        out_shape=[jax.ShapeDtypeStruct((*q.shape[:3], size), jnp.float32) for size in sizes],
    )
    triton = call(compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2))
    # Chosen when it is lowered, so that what is exported for a GPU is not the interpreter.
    results = lax.platform_dependent(q, k, v, cpu=call(interpret=True), cuda=triton, default=call())
    highest, total, out = (a[:, :, :T].reshape(B, G, R, T, -1) for a in results)
    return Softmax(highest, total, out[..., :V])


def pad_tiles(x):
    """x [B,H,n,K] with zeros up to whole tiles, and K up to a power of two, as Triton asks."""
    size = max(16, pl.next_power_of_2(x.shape[3]))
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % TILE), (0, size - x.shape[3])))


def seen_tiles(plan: Plan, row, tiles):
    """The range of tiles of keys that the queries row ... row + TILE - 1 see."""
    if not plan.causal:
        return 0, tiles
    first_key = 0
    if plan.window:
        first_key = jnp.maximum(row + plan.query_offset + 1 - plan.window, 0)
    end_key = jnp.maximum(row + TILE + plan.query_offset, 0)
    first = lax.div(first_key, TILE)
    end = lax.div(end_key + TILE - 1, TILE)
    return jnp.minimum(first, tiles), jnp.minimum(end, tiles)


def flash_kernel(q_ref, k_ref, v_ref, highest_ref, total_ref, out_ref, *, plan, S):
    """One tile of queries: q [t,K], k [S,K], v [S,V] -> highest [t,1], total [t,1], out [t,V]."""
    row = pl.program_id(2) * TILE
    q = q_ref[...]

    def add_tile(j, carry):
        highest, total, out = carry
        here = pl.ds(j * TILE, TILE)
        k = k_ref[here, :]
        v = v_ref[here, :]
        scores = plan.scale * jnp.dot(q, k.T, preferred_element_type=jnp.float32)  # [t,s]
        rows = row + lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        keys = j * TILE + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        see = visible(plan, rows, keys) & (keys < S)  # the rest is padding
        scores = jnp.where(see, scores, -jnp.inf)

        new = jnp.maximum(highest, scores.max(1, keepdims=True))
        terms = jnp.exp(scores - new)
        shrink = jnp.exp(highest - new)
        total = total * shrink + terms.sum(1, keepdims=True)
        values = jnp.dot(terms.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return new, total, out * shrink + values

    carry = (
        jnp.full((TILE, 1), LEAST, jnp.float32),
        jnp.zeros((TILE, 1), jnp.float32),
        jnp.zeros(out_ref.shape, jnp.float32),
    )
    first, end = seen_tiles(plan, row, k_ref.shape[0] // TILE)
    highest, total, out = lax.fori_loop(first, end, add_tile, carry)
    highest_ref[...] = highest
    total_ref[...] = total
    out_ref[...] = out / nonzero(total)


# ==== Demo: the paper's experiment (Tables 2 and 3) ===============================================

HEAD_SIZE = 64  # one head, as in the paper, with inputs in bfloat16
MOST_MEMORY = 3e9  # bytes; what needs more is compiled, and not run
EXPECTED = (98, 113)  # times less memory at n = 2^14, inference and gradient
FLOOR = (59, 32)  # of the paper's abstract

PAPER = {  # n -> MB on a TPUv3: definition and the paper's, inference (Table 2) and gradient (3)
    2**8: {"inference": (0.27, 0.27), "gradient": (0.532, 0.532)},
    2**10: {"inference": (4, 4), "gradient": (8, 8)},
    2**12: {"inference": (64, 16), "gradient": (128, 41)},
    2**14: {"inference": (1000, 17), "gradient": (2000, 64)},
    2**16: {"inference": (math.nan, 21), "gradient": (math.nan, 257)},
}


class Cost(NamedTuple):
    """What a function of q, k and v costs."""

    memory: int  # bytes beside inputs and results
    seconds: float  # the least of three runs; NaN if it was not run


def gradient_of(function):
    """The gradients of the sum of function(q, k, v) in q, k and v."""

    def total(q, k, v):
        return function(q, k, v).astype(jnp.float32).sum()

    return jax.grad(total, (0, 1, 2))


def cost(function, n) -> Cost:
    """The cost for q, k and v [1,n,1,HEAD_SIZE] in bfloat16."""
    qkv = jax.random.normal(jax.random.key(0), (3, 1, n, 1, HEAD_SIZE), jnp.bfloat16)
    compiled = jax.jit(function).lower(*qkv).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    if memory > MOST_MEMORY:
        return Cost(memory, math.nan)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*qkv))
        times.append(time.perf_counter() - start)
    return Cost(memory, min(times))


def measure(task, lengths):
    """Prints the paper's table for a task; returns the costs of the definition and of attention.

    task: "inference" or "gradient". Two lists of Cost.
    """
    ours = attention
    definition = attention_by_definition
    if task == "gradient":
        ours = gradient_of(attention)
        definition = gradient_of(attention_by_definition)
    print(f"{task}: memory in MB, and seconds")
    print(f"{'n':>8}{'definition':>12}{'here':>8}{'times less':>12}{'(paper)':>9}", end="")
    print(f"{'definition':>14}{'here':>10}")
    costs = []
    for n in lengths:
        plain = cost(definition, n)
        here = cost(ours, n)
        costs.append((plain, here))
        paper = math.nan
        if n in PAPER:
            paper = PAPER[n][task][0] / PAPER[n][task][1]
        print(f"{n:8,}{plain.memory / 1e6:12,.1f}{here.memory / 1e6:8,.1f}", end="")
        print(f"{plain.memory / here.memory:12.1f}{paper:9.1f}", end="")
        print(f"{plain.seconds:14.4f}{here.seconds:10.4f}", flush=True)
    faster = [n for n, (plain, here) in zip(lengths, costs) if here.seconds < plain.seconds]
    print(f"faster than the definition at n = {faster}\n")
    return tuple(zip(*costs))


def draw(path, lengths, results):
    """Memory and time against n; results: task -> (costs of the definition, of attention)."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for color, (task, (plain, here)) in zip(("C0", "C1"), results.items()):
        for style, name, costs in (("--", "definition", plain), ("-", "here", here)):
            label = f"{task}, {name}"
            memory = [cost.memory / 1e6 for cost in costs]
            left.plot(lengths, memory, color + style, marker=".", label=label)
            seconds = [cost.seconds for cost in costs]
            right.plot(lengths, seconds, color + style, marker=".", label=label)
        paper = {n: PAPER[n][task][1] for n in lengths if n in PAPER}
        left.plot(*zip(*paper.items()), color + "x", label=f"{task}, the paper's, on a TPU")
    for axes, quantity in ((left, "memory beside inputs and results, MB"), (right, "seconds")):
        axes.set(xlabel="n (one head of 64, bfloat16)", ylabel=quantity, yscale="log")
        axes.set_xscale("log", base=2)
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def check_out(path):  # same in every file
    """Raises ValueError unless a figure can be written to path."""
    path = pathlib.Path(path)
    require(path.suffix in (".png", ".pdf", ".svg"), f"--out {path} is not a .png, .pdf or .svg")
    require(not path.is_dir(), f"--out {path} is a folder")
    require(os.access(path.parent, os.W_OK), f"--out {path}: its folder cannot be written to")


def main(argv=None) -> int:
    """Returns the exit status: 1 if less memory is saved than the paper says, 2 for bad input."""
    parser = argparse.ArgumentParser(description="The memory and time of attention against n.")
    parser.add_argument(
        "--longest", type=int, default=14, help="up to n = 2 to this power, 8 to 20"
    )
    parser.add_argument("--out", default="memeff_attention.png", help="where to draw the figure")
    args = parser.parse_args(argv)
    try:
        require(8 <= args.longest <= 20, f"--longest {args.longest} is not from 8 to 20")
        check_out(args.out)
    except ValueError as error:
        print(f"memeff_attention.py: {error}", file=sys.stderr)
        return 2

    lengths = [2**i for i in range(8, args.longest + 1, 2)]
    results = {task: measure(task, lengths) for task in ("inference", "gradient")}
    got = [plain[-1].memory / here[-1].memory for plain, here in results.values()]
    expected = "expected unknown, at least unknown"
    if args.longest == 14:
        expected = f"expected {show(EXPECTED)}, at least {show(FLOOR)}"
    name = f"times less memory at n = {lengths[-1]:,}, inference and gradient"
    print(f"result: {name}: got {show(got)}, {expected}")

    try:
        draw(args.out, lengths, results)
        print(f"wrote {args.out}")
    except Exception as error:  # matplotlib is missing, or it cannot draw here
        print(f"no figure: {type(error).__name__}: {error}")
    enough = all(times >= floor for times, floor in zip(got, FLOOR))
    return int(args.longest == 14 and not enough)


def show(pair):
    """Two numbers as text."""
    return f"{pair[0]:.0f} and {pair[1]:.0f}"


def run_program(main):  # same in every file
    """Exits with the status that main returns; after Ctrl-C or `| head` without a traceback."""
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails to flush
        status = 141
    sys.exit(status)


if __name__ == "__main__":
    run_program(main)
