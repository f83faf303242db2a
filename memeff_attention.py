"""Memory-efficient attention: exact softmax attention that never stores all scores.

    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 4096, 8, 64))  # each [B,T,H,K]
    out = jax.jit(attention)(q, k, v)  # [B,T,H,V], for any length
    out = attention(q, k, v, causal=True, window=256)  # its own key and the 255 before it
    out = attention(q, k, v, mask=mask, bias=bias)  # of shapes that broadcast to [B,H,T,T]

    # A sequence that is sharded over the devices of mesh axis "seq":
    mesh = jax.make_mesh((8,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))
    ring = functools.partial(ring_attention, seq_axis="seq", causal=True)
    cut = jax.P(None, "seq")
    out = jax.jit(jax.shard_map(ring, mesh=mesh, in_specs=cut, out_specs=cut))(q, k, v)

Paper     Rabe & Staats 2021, "Self-attention Does Not Need O(n^2) Memory", arXiv:2112.05682 v3.
          The ring: Liu, Zaharia & Abbeel 2023, "Ring Attention with Blockwise Transformers for
          Near-Infinite Context", arXiv:2310.01889.
Here      The running softmax (Sec. 2) in its stable form (Sec. 3); the paper's own code (Fig. 1)
          and experiment (Tables 2 and 3). Beyond the paper: mask, bias, causal, window, segments,
          grouped heads, a backward pass that recomputes one tile at a time, ring attention, the
          forward pass as a Pallas kernel.
Not here  Dropout and soft caps of the scores; a window that is not causal; a traced query_offset;
          empty arrays; forward-mode derivatives; in the ring: mask, bias, segments, window.
          Elsewhere: zigzag order and a cache for decoding in examples/long_context.py, a language
          model of bytes in examples/byte_lm.py, cuDNN's kernel in jax.nn.dot_product_attention.
Differs   From the official code: chunks need not divide the lengths (the official code counts some
          keys twice if a chunk does not divide them, and crashes if one does not divide the
          queries); one running maximum instead of one for each chunk, merged at the end; the output
          has q's dtype. A query that sees nothing outputs zeros and has no gradient.
          Sec. 2 speaks of O(log n) memory, outputs not counted; with the outputs it is O(n).
Claims    C1 exact for every length, chunk, mask and bias
          C2 at 16,384 tokens 59 times less memory for inference, 32 times for the gradient
          C3 memory grows linearly with the length
          C4 stable for scores of any size
          C5 the ring gives the same numbers, and each device needs less memory as they get more
          C6 parts of the keys merge in any split and order
          C7 with a causal mask the FLOPs approach half
Checked   google-research/google-research @ 30adf0e, memory_efficient_attention, in float32. Largest
          errors, relative to the largest value: 2.0e-6 (outputs) and 8.6e-6 (gradients) where
          scores differ much between chunks, elsewhere 4.8e-7 and 1.8e-6. The claims are tests in
          tests/test_memeff_attention.py.
Run       python memeff_attention.py
          25 s on two CPU cores: at n = 16,384 attention needs 98 times less memory than its
          definition, its gradient 113 times (229 and 168 times with JAX 0.12); below 59 and 32
          times, which the abstract states, it fails
Axes      B batch  T queries  S keys  G heads of keys  R = H / G heads of queries for each of them
          H heads of queries  K size of a query or key  V size of a value
          t queries and s keys of a tile.  T|1: length T, or 1 if it broadcasts.
          Inside shard_map B, T and S are sizes on one device.
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
from jax.sharding import AxisType


def require(ok, message):  # same in every file
    """Raises ValueError(message) unless ok."""
    if not ok:
        raise ValueError(message)


# ==== Definition ==================================================================================

LEAST = -1e30  # scores below count as not seen; finite, since -inf minus -inf is NaN


class Plan(NamedTuple):
    """The static options of a call."""

    scale: float  # this and the next three: see attention
    causal: bool
    window: int | None
    query_offset: int
    forward_tile: tuple[int, int]  # (t, s), see tile_shapes
    backward_tile: tuple[int, int]
    kernel: bool  # run the forward pass in the Pallas kernel


class Arrays(NamedTuple):
    """The arrays of a call, heads first, or their gradients. Axes of length 1 broadcast."""

    q: jax.Array  # [B,G,R,T,K]
    k: jax.Array  # [B,G,1,S,K]
    v: jax.Array  # [B,G,1,S,V]
    bias: jax.Array | None = None  # [B|1,G|1,R|1,T|1,S|1]
    mask: jax.Array | None = None  # [B|1,G|1,R|1,T|1,S|1]
    q_segments: jax.Array | None = None  # [B|1,1,1,T|1,1]
    kv_segments: jax.Array | None = None  # [B|1,1,1,1,S|1]


class Softmax(NamedTuple):
    """The state of a softmax over some of the keys: m*, s* and v* of Sec. 3."""

    highest: jax.Array  # [B,G,R,T,1], the highest score
    total: jax.Array  # [B,G,R,T,1], the sum of exp(score - highest)
    out: jax.Array  # [B,G,R,T,V], the sum of exp(score - highest) v; after `divide` the output


def one_if_zero(total):
    """total, with 1 in place of 0: queries that see nothing are divided by 1."""
    return jnp.where(total > 0, total, 1)


def attention_by_definition(q, k, v, *, return_lse=False, **options):
    """The definition: softmax(scale q k^T + bias) v over the keys that a query sees (Sec. 1).

    Same arguments and results as attention, except q_chunk, kv_chunk and implementation. It stores
    all B H T S scores.
    """
    plan, x = prepare(q, k, v, **options)
    T = x.q.shape[-2]
    S = x.k.shape[-2]
    k = at_least_float32(x.k)
    v = at_least_float32(x.v)

    scores = (plan.scale * at_least_float32(x.q)) @ k.mT  # [B,G,R,T,S]
    if x.bias is not None:
        scores = scores + x.bias.astype(scores.dtype)
    rows = jnp.arange(T).reshape(1, 1, 1, T, 1)
    keys = jnp.arange(S).reshape(1, 1, 1, 1, S)
    see = visible(plan, rows, keys, x.mask, x.q_segments, x.kv_segments)
    scores = jnp.where(see, scores, -jnp.inf)

    highest = jnp.maximum(scores.max(-1, keepdims=True), LEAST)  # finite where nothing is seen
    highest = lax.stop_gradient(highest)  # it cancels in out and in highest + log(total)
    terms = jnp.exp(scores - highest)
    total = terms.sum(-1, keepdims=True)
    weights = terms / one_if_zero(total)
    results = Softmax(highest, total, weights @ v)
    return heads_last(results, x.q.dtype, return_lse)


def visible(plan: Plan, rows, keys, mask=None, q_segments=None, kv_segments=None):
    """Whether queries see keys. Indices rows and keys that broadcast to [...,t,s] -> bool."""
    position = rows + plan.query_offset
    see = jnp.ones(jnp.broadcast_shapes(rows.shape, keys.shape), bool)
    if plan.causal:
        see = see & (keys <= position)
    if plan.window:
        see = see & (keys > position - plan.window)
    if mask is not None:
        see = see & mask
    if q_segments is not None:
        see = see & (q_segments == kv_segments)
    return see


def wide(x):  # same in every file
    """The dtype in which to compute with x: float32, or x's own if that is wider."""
    return jax.dtypes.canonicalize_dtype(np.promote_types(x.dtype, np.float32))


def at_least_float32(x):  # same in every file
    """x cast to the dtype wide(x)."""
    return x.astype(wide(x))


# ==== The paper's own code ========================================================================


def attention_checkpointed(q, k, v, *, q_chunk=1024, kv_chunk=4096):
    """The algorithm as the paper prints it (Fig. 1), extended to batches and to any length.

    Each chunk of keys gives its highest score, its sum of terms and its sum of terms times values;
    these are kept for all chunks of keys and merged at the end. jax.checkpoint recomputes the
    scores for the gradient. q [B,T,H,K], k [B,S,H,K], v [B,S,H,V] -> [B,T,H,V].
    """
    B, T, H, K = q.shape
    S = v.shape[1]
    V = v.shape[3]
    t = min(q_chunk, T)
    s = min(kv_chunk, S)

    def chunks_of(x, size):
        """x [B,n,H,K] in float32, padded with zeros and cut -> [ceil(n/size),B,size,H,K]."""
        x = jnp.pad(at_least_float32(x), ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)))
        x = x.reshape(B, -1, size, H, x.shape[3])
        return jnp.moveaxis(x, 1, 0)

    chunks = chunks_of(k, s), chunks_of(v, s), jnp.arange(0, S, s)

    @functools.partial(
        jax.checkpoint, prevent_cse=False
    )  # prevent_cse costs time, and loops do without
    def summarize_chunk(q, chunk):
        k, v, first_key = chunk
        scores = jnp.einsum("bthk,bshk->bhts", q * K**-0.5, k)
        is_key = first_key + jnp.arange(s) < S  # the rest is padding
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

    q [B,T,H,K], k [B,S,G,K], v [B,S,G,V] -> [B,T,H,V] in q's dtype. H is a multiple of G: each
    group of H / G consecutive heads of q shares a head of k and v. Without a key to see: zeros.
    Beyond inputs and output it needs O(B H (T + S) (K + V)) memory, and one tile of scores.

    bias, mask      float and bool (True: attend), of shapes that broadcast to [B,H,T,S]
    causal          query i sees the keys 0 ... i
    query_offset    with causal: query i sees the keys 0 ... i + query_offset
    window          with causal: only the last `window` of these keys
    q_segments      int [B,T], and kv_segments int [B,S]: queries see the keys of their own segment
    scale           1 / sqrt(K) by default
    q_chunk         queries of a tile, by default as in tile_shapes; smaller tiles need less memory
    kv_chunk        keys of a tile, likewise
    implementation  "xla", which computes in float32 at least; or "pallas", which runs the forward
                    pass in one kernel with tiles of its own, without bias, mask, segments and
                    shard_map's check_vma, and rounds weights to the dtype of v
    return_lse      also log(sum(exp(scores))), [B,H,T]; -inf for a query that sees nothing

    Call it under jit; everything but the arrays must be static. A score below -1e30 counts as not
    seen. On a GPU float32 is multiplied as TF32 unless JAX is told otherwise. Under jit, arrays
    that are sharded over Auto axes of a mesh are gathered onto every device; to avoid that, call it
    inside jax.shard_map, with sharded batch or heads, or use ring_attention. In float64 on a CPU
    use axis B, not jax.vmap: under vmap XLA computes a wrong lse (JAX 0.10.2, 0.12.0.1).

    Raises ValueError for arguments that do not go together, NotImplementedError for what "pallas"
    does not support.
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
    """Attention over two disjoint sets of keys, from the attention over each (Sec. 2).

    Two pairs (out [B,T,H,V], lse [B,H,T]), as return_lse gives them -> such a pair.
    """
    lses = [jnp.maximum(lse, LEAST) for _, lse in (first, second)]  # finite, for the gradient
    lse = jnp.logaddexp(*lses)
    shares = [jnp.exp(part - lse).swapaxes(1, 2)[..., None] for part in lses]  # 2 x [B,T,H,1]
    out = at_least_float32(first[0]) * shares[0] + at_least_float32(second[0]) * shares[1]
    nothing = (first[1] == -jnp.inf) & (second[1] == -jnp.inf)
    return out.astype(first[0].dtype), jnp.where(nothing, -jnp.inf, lse)


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
    """Checks the arguments of attention, and returns them as a Plan and Arrays."""
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    check_qkv(q, k, v)
    check_masking(causal, window, query_offset, q_chunk, kv_chunk)
    B, T, H, K = q.shape
    S, G = k.shape[1:3]
    groups = (G, H // G)
    require(
        (q_segments is None) == (kv_segments is None),
        "q_segments and kv_segments must be given together",
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
    tiles = tile_shapes(x, causal, window, q_chunk, kv_chunk)
    plan = Plan(float(scale), causal, window, query_offset, *tiles, kernel=False)
    return plan, same_axes(x)  # inside shard_map all vary over the same axes, the bias too


def check_qkv(q, k, v):
    """Raises ValueError unless q [B,T,H,K], k [B,S,G,K] and v [B,S,G,V] go together."""
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    require(q.ndim == k.ndim == v.ndim == 4, f"{shapes} are not all [batch,length,heads,size]")
    require(
        k.shape[:3] == v.shape[:3] and k.shape[0] == q.shape[0] and k.shape[3] == q.shape[3],
        f"{shapes} are not [B,T,H,K], [B,S,G,K], [B,S,G,V]",
    )
    require(q.size and v.size, f"{shapes}: none may be empty")
    H = q.shape[2]
    G = k.shape[2]
    require(H % G == 0, f"{H} heads of q are not a multiple of {G} heads of k and v")
    require(
        q.dtype == k.dtype == v.dtype and jnp.issubdtype(q.dtype, jnp.floating),
        f"q is {q.dtype}, k {k.dtype}, v {v.dtype}, not all of the same floating type",
    )
    for name, x in (("q", q), ("k", k), ("v", v)):
        mesh = jax.typeof(x).sharding.mesh
        require(
            AxisType.Explicit not in mesh.axis_types,
            f"{name} is on a mesh with Explicit axes {mesh.axis_names}: give the mesh axes of type "
            "Auto, or call attention inside jax.shard_map",
        )


def check_masking(causal, window, query_offset, q_chunk, kv_chunk):
    """Raises ValueError unless the numbers are whole, in the range of int32, and go together."""
    for name, n in (("window", window), ("q_chunk", q_chunk), ("kv_chunk", kv_chunk)):
        require(
            n is None or (isinstance(n, int | np.integer) and 1 <= n <= 2**30),
            f"{name}={n} is not a whole number from 1 to {2**30}",
        )
    require(
        isinstance(query_offset, int | np.integer) and abs(query_offset) <= 2**30,
        f"query_offset={query_offset} is not a whole number from {-(2**30)} to {2**30}",
    )
    require(causal or window is None, f"window={window} needs causal=True")
    require(causal or query_offset == 0, f"query_offset={query_offset} needs causal=True")


def broadcastable(name, x, kind, full):
    """x with as many axes as the shape `full`, leading ones of length 1.

    Raises ValueError unless x has this kind of dtype and a shape that broadcasts to `full`.
    """
    if x is None:
        return None
    x = jnp.asarray(x)
    require(
        x.ndim <= len(full)
        and all(n in (1, m) for n, m in zip(x.shape[::-1], full[::-1]))
        and jnp.issubdtype(x.dtype, kind),
        f"{name} is {x.dtype} {x.shape}, not {kind.__name__} that broadcasts to {full}",
    )
    return x.reshape((1,) * (len(full) - x.ndim) + x.shape)


def split_heads(x, groups):
    """Splits the axis of heads. x [B|1,H|1,...] -> [B|1,G|1,R|1,...]."""
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
    lse = results.highest + jnp.log(one_if_zero(results.total))
    lse = jnp.where(results.total > 0, lse, -jnp.inf)
    return out, lse.reshape(B, G * R, T)


# ==== The running softmax over tiles ==============================================================

# tile_table lists the tiles in which some query sees some key, scan_tiles folds a function over
# them, and a Tile cuts its part out of an array.

FEW = 2**16  # below this many scores for each head all heads in one tile are faster on a CPU, too
HEADS_TIMES_TILE = 2**17  # limit of (queries or keys of a tile) times (its heads)


def tile_shapes(x: Arrays, causal, window, q_chunk=None, kv_chunk=None):
    """(t, s), the queries and keys of a tile, in the forward and in the backward pass.

    q_chunk and kv_chunk where they are given, else
    - what is fastest on two CPU cores: 2,048 x 512 forward and 512 x 2,048 backward, and 512 x 512
      with a causal mask;
    - about the window at most, since the scores it hides are computed for nothing;
    - fewer if a tile has many heads;
    - in tiles of about equal size: 2,049 queries are two tiles of 1,088, not 2,048 and 1.
    """
    longer = 512 if causal else 2048
    limit = HEADS_TIMES_TILE // math.prod(heads_at_once(x))
    limit = max(limit, 64)
    if window:
        limit = min(limit, max(window, 128))

    def size(length, given, longest):
        if given:
            return min(given, length)
        tiles = pl.cdiv(length, min(longest, limit))
        return min(64 * pl.cdiv(length, 64 * tiles), length)

    T = x.q.shape[-2]
    S = x.k.shape[-2]
    forward_tile = size(T, q_chunk, longer), size(S, kv_chunk, 512)
    backward_tile = size(T, q_chunk, 512), size(S, kv_chunk, longer)
    return forward_tile, backward_tile


def heads_at_once(x: Arrays):
    """How many heads a tile has, on the axes B, G and R: one or all.

    One on a CPU with at least FEW scores for each head: up to 1.8 times as fast.
    """
    few = x.q.shape[-2] * x.k.shape[-2] < FEW
    if few or jax.default_backend() != "cpu":
        return x.q.shape[:3]
    return 1, 1, 1


def tile_table(plan: Plan, T, S, t, s, has_mask):
    """The tiles of T x S in which some query sees some key, as far as causal and window tell.

    Two int arrays [n,4]: the tiles in which every query sees every key, and those that need a mask
    (with has_mask all). The columns are row and key, where a tile starts, and first_row and
    first_key, where its own part starts. They differ for a last tile that is moved back to fit:
    what it shares with the tile before is hidden there.
    """
    i, j = np.meshgrid(np.arange(pl.cdiv(T, t)), np.arange(pl.cdiv(S, s)), indexing="ij")
    first_row = i.ravel() * t
    first_key = j.ravel() * s
    row = np.minimum(first_row, T - t)
    key = np.minimum(first_key, S - s)
    last_key = key + s - 1
    low = first_row + plan.query_offset  # position of the first query that counts
    high = row + t - 1 + plan.query_offset  # and of the last

    any_seen = np.full(len(row), True)
    all_seen = (row == first_row) & (key == first_key) & (not has_mask)
    if plan.causal:
        any_seen &= first_key <= high
        all_seen &= last_key <= low
    if plan.window:
        any_seen &= last_key > low - plan.window
        all_seen &= key > high - plan.window
    table = np.stack([row, key, first_row, first_key], axis=1).astype(np.int32)
    return table[any_seen & all_seen], table[any_seen & ~all_seen]


class Tile(NamedTuple):
    """The place of a tile. Its methods cut its part out of an array, where axes may broadcast."""

    block: tuple[int, int, int]  # how many heads it has, on the axes B, G and R
    t: int
    s: int
    masked: bool  # whether some of its scores are hidden
    head: tuple  # where it starts on the axes B, G and R
    row: jax.Array  # its first query
    key: jax.Array  # its first key
    first_row: jax.Array  # the first query that counts; those before belong to another tile
    first_key: jax.Array  # the same of the keys

    def queries(self, x):
        """x [B|1,G|1,R|1,T|1,n] -> [...,t,n]."""
        return part_of(x, (*self.head, self.row, 0), (*self.block, self.t, x.shape[-1]))

    def keys(self, x):
        """x [B|1,G|1,R|1,S|1,n] -> [...,s,n]."""
        return part_of(x, (*self.head, self.key, 0), (*self.block, self.s, x.shape[-1]))

    def rectangle(self, x):
        """x [B|1,G|1,R|1,T|1,S|1] -> [...,t|1,s|1]."""
        return part_of(x, (*self.head, self.row, self.key), (*self.block, self.t, self.s))


def part_of(x, start, shape):
    """The part of x [B|1,G|1,R|1,n,m] that begins at start; an axis of length 1 is kept.

    Of a single head the three leading axes are dropped: the gradient is then 1.2 times as fast.
    """
    lengths = [min(n, most) for n, most in zip(shape, x.shape)]
    part = lax.dynamic_slice(x, int32(start), lengths)  # clamps start to 0 on axes of length 1
    if shape[:3] == (1, 1, 1):
        part = part.reshape(part.shape[3:])
    return part


def replace_at(x, part, start):
    """x [B,G,R,n,m] with the part that begins at start replaced."""
    part = jnp.expand_dims(part, range(x.ndim - part.ndim))
    return lax.dynamic_update_slice(x, part, int32(start))


def add_at(x, part, start):
    """x [B|1,G|1,R|1,n,m] with a part added at start, summed over the axes that x broadcasts."""
    part = jnp.expand_dims(part, range(x.ndim - part.ndim))
    shared = [axis for axis, n in enumerate(x.shape) if n == 1]
    part = part.sum(shared, keepdims=True)
    old = lax.dynamic_slice(x, int32(start), part.shape)
    return lax.dynamic_update_slice(x, old + part, int32(start))


def int32(numbers):
    """Indices of one dtype, which dynamic_slice needs: a plain 0 is int64 in 64-bit mode."""
    return [jnp.asarray(n, jnp.int32) for n in numbers]


def scan_tiles(plan: Plan, t, s, add_tile, carry, x: Arrays):
    """Folds add_tile(carry, tile) -> carry over all tiles, head by head; returns the last carry."""
    block = heads_at_once(x)
    counts = [n // size for n, size in zip(x.q.shape[:3], block)]
    # Index of each block's first head: the block's number, for it has one head or is the only one.
    heads = np.indices(counts).reshape(3, -1).T.astype(np.int32)  # [number of blocks,3]

    def scan_table(carry, table, masked):
        def one_head(carry, head):
            def one_tile(carry, place):
                tile = Tile(block, t, s, masked, tuple(head), *place)
                return add_tile(carry, tile), None

            return lax.scan(one_tile, carry, table)

        carry, _ = lax.scan(one_head, carry, heads)
        return carry

    carry, _ = same_axes((carry, x.q))  # inside shard_map a carry must vary as the data do
    has_mask = x.mask is not None or x.q_segments is not None
    all_seen, some_hidden = tile_table(plan, x.q.shape[-2], x.k.shape[-2], t, s, has_mask)
    if len(all_seen):
        carry = scan_table(carry, all_seen, masked=False)
    if len(some_hidden):
        carry = scan_table(carry, some_hidden, masked=True)
    return carry


def same_axes(tree):  # same in every file
    """Inside shard_map: marks all arrays as varying over each mesh axis that any varies over."""
    axes = frozenset().union(*(jax.typeof(x).mat.varying for x in jax.tree.leaves(tree)))

    def vary(x):
        missing = tuple(axes - jax.typeof(x).mat.varying)
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree)


def tile_scores(plan: Plan, x: Arrays, tile: Tile, flipped=False):
    """The scores of a tile, scale q k^T + bias, and -inf for hidden keys: [...,t,s].

    flipped: the same matrix product, transposed to [...,s,t], so that every bit is the same.
    """
    q = at_least_float32(tile.queries(x.q))
    k = at_least_float32(tile.keys(x.k))
    scores = (plan.scale * q) @ k.mT
    bias = None
    if x.bias is not None:
        bias = tile.rectangle(x.bias).astype(scores.dtype)
    see = tile_mask(plan, x, tile)
    if flipped:
        if min(tile.t, tile.s) < 64:
            # Else XLA on a CPU computes k q^T instead, which rounds differently in narrow tiles.
            scores = lax.optimization_barrier(scores)
        # bias and see may be None, which tree.map skips.
        scores, bias, see = jax.tree.map(jnp.matrix_transpose, (scores, bias, see))

    if bias is not None:
        scores = scores + bias
    if see is not None:
        scores = jnp.where(see, scores, -jnp.inf)
    return scores


def tile_mask(plan: Plan, x: Arrays, tile: Tile):
    """Whether a query sees a key, bool [...,t,s]; None if every query sees every key."""
    if not tile.masked:
        return None
    shape = (tile.t, tile.s)
    if tile.block != (1, 1, 1):
        shape = (1, 1, 1, *shape)
    rows = tile.row + lax.broadcasted_iota(jnp.int32, shape, len(shape) - 2)
    keys = tile.key + lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
    mask = None
    q_segments = None
    kv_segments = None
    if x.mask is not None:
        mask = tile.rectangle(x.mask)
    if x.q_segments is not None:
        q_segments = tile.queries(x.q_segments)
        kv_segments = tile.rectangle(x.kv_segments)  # [...,1,s]
    see = visible(plan, rows, keys, mask, q_segments, kv_segments)
    return see & (rows >= tile.first_row) & (keys >= tile.first_key)


def softmax_of_nothing(x: Arrays) -> Softmax:
    """The state before any key has been seen."""
    shape = x.q.shape[:-1]
    dtype = wide(x.q)
    return Softmax(
        jnp.full((*shape, 1), LEAST, dtype),
        jnp.zeros((*shape, 1), dtype),
        jnp.zeros((*shape, x.v.shape[-1]), dtype),
    )


def running_softmax(plan: Plan, softmax: Softmax, x: Arrays) -> Softmax:
    """Adds the keys of x to the state of the softmax of its queries, tile by tile.

    Eq. 1 in the stable form of Sec. 3. For a key with score s_i and value v_i that is

        m = max(m*, s_i)
        s* <- s* exp(m* - m) + exp(s_i - m),  v* <- v* exp(m* - m) + v_i exp(s_i - m),  m* <- m
    """

    def add_tile(softmax, tile):
        scores = tile_scores(plan, x, tile)  # [...,t,s]
        v = at_least_float32(tile.keys(x.v))
        old = Softmax(*(tile.queries(part) for part in softmax))

        highest = jnp.maximum(old.highest, scores.max(-1, keepdims=True))
        terms = jnp.exp(scores - highest)
        shrink = jnp.exp(old.highest - highest)  # the sums so far were relative to the old maximum
        total = old.total * shrink + terms.sum(-1, keepdims=True)
        out = old.out * shrink + terms @ v

        start = (*tile.head, tile.row, 0)
        new = Softmax(highest, total, out)
        return jax.tree.map(lambda whole, part: replace_at(whole, part, start), softmax, new)

    t, s = plan.forward_tile
    return scan_tiles(plan, t, s, add_tile, softmax, x)


def divide(softmax: Softmax) -> Softmax:
    """v* / s*, the last step of Eq. 1; zeros for a query that sees nothing."""
    return softmax._replace(out=softmax.out / one_if_zero(softmax.total))


# ==== The gradient of attention ===================================================================


class Rows(NamedTuple):
    """What the gradient needs of each query, besides q."""

    highest: jax.Array  # [B,G,R,T,1], as in Softmax
    total: jax.Array  # [B,G,R,T,1], as in Softmax, and 1 for a query that sees nothing
    dout: jax.Array  # [B,G,R,T,V], gradient of the output
    delta: jax.Array  # [B,G,R,T,1], see accumulate_gradients


def rows_of(results: Softmax, cotangents: Softmax) -> Rows:
    """The Rows of what attend returned, and of its cotangents.

    The cotangent of highest is ignored, since any other maximum gives the same results.
    """
    total = one_if_zero(results.total)
    delta = (results.out * cotangents.out).sum(-1, keepdims=True) / total - cotangents.total
    return Rows(results.highest, total, cotangents.out, delta)


def accumulate_gradients(plan: Plan, grads: Arrays, x: Arrays, rows: Rows) -> Arrays:
    """Adds the gradients of q, k, v and bias to grads, recomputing one tile of scores at a time.

    With out = sum_j terms_j v_j / total and total = sum_j terms_j, the gradient of score j is

        terms_j (v_j.dout / total - delta),  delta = out.dout / total - (gradient of total).

    The scores are those of running_softmax, to the bit (not those of the kernel), and their terms
    come from its maximum and sum; computed from a rounded log-sum-exp, errors were 4 to 20 times as
    large for 8 keys.
    """
    # If XLA on a CPU sees that q is constant, dk is wrong (JAX 0.10.2, 0.12.0.1): hide it.
    x = x._replace(q=lax.optimization_barrier(x.q))

    def add_tile(grads, tile):
        q = at_least_float32(tile.queries(x.q))  # [...,t,K]
        k = at_least_float32(tile.keys(x.k))  # [...,s,K]
        v = at_least_float32(tile.keys(x.v))  # [...,s,V]
        dout = tile.queries(rows.dout) / tile.queries(rows.total)  # [...,t,V]

        # Keys by queries, since the products for dk and dv sum over the queries: a CPU multiplies
        # fastest if the axis that is summed is the left operand's last.
        scores = tile_scores(plan, x, tile, flipped=True)  # [...,s,t]
        terms = jnp.exp(scores - tile.queries(rows.highest).mT)
        dscores = terms * (v @ dout.mT - tile.queries(rows.delta).mT)

        dq = plan.scale * (k.mT @ dscores)  # [...,K,t]
        dk = plan.scale * (dscores @ q)
        dv = terms @ dout
        key_start = (*tile.head, tile.key, 0)
        dbias = None
        if x.bias is not None:
            dbias = add_at(grads.bias, dscores.mT, (*tile.head, tile.row, tile.key))
        return Arrays(
            add_at(grads.q, dq, (*tile.head, 0, tile.row)),
            add_at(grads.k, dk, key_start),
            add_at(grads.v, dv, key_start),
            dbias,
        )

    t, s = plan.backward_tile
    grads = grads._replace(q=grads.q.mT)  # [B,G,R,K,T]
    grads = scan_tiles(plan, t, s, add_tile, grads, x)
    return grads._replace(q=grads.q.mT)


def no_gradients(x: Arrays) -> Arrays:
    """Zeros for the gradients of q, k, v and bias, in float32 at least."""
    return jax.tree.map(lambda x: jnp.zeros_like(x, wide(x)), Arrays(x.q, x.k, x.v, x.bias))


def in_dtypes_of(x: Arrays, grads: Arrays) -> Arrays:
    """The gradients in the dtypes of q, k, v and bias; the other arrays have none."""
    return jax.tree.map(lambda g, x: g.astype(x.dtype), grads, Arrays(x.q, x.k, x.v, x.bias))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan: Plan, x: Arrays) -> Softmax:
    """The softmax over all keys, divided. The gradient holds one tile of scores at a time."""
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


attend.defvjp(attend_forward, attend_backward)


# ==== Ring attention: the sequence sharded over devices ===========================================


class Ring(NamedTuple):
    """The static options of a call of ring_attention."""

    plan: Plan
    axis: str  # of the mesh


def ring_attention(
    q, k, v, seq_axis, *, causal=False, scale=None, q_chunk=None, kv_chunk=None, return_lse=False
):
    """Inside shard_map: attention over a sequence that is sharded over the mesh axis seq_axis.

    The blocks of this device, q [B,T,H,K], k [B,S,G,K] and v [B,S,G,V] -> [B,T,H,V]. Keys and
    values go once round the ring of n devices, while each device works on the block that it holds:
    at any time it has two blocks of keys and values, one of which is in transit. The forward pass
    has 2n ppermutes, the backward pass 4n, since the gradients of keys and values travel with them.
    After n moves all keys are back with their owners.

    The devices hold the sequence in its order. With a causal mask device 0 is then busy in one of n
    steps, the last device in all; the zigzag order of examples/long_context.py halves the time.

    Raises ValueError as attention does, and for a causal mask if T and S differ.
    """
    plan, x = prepare(q, k, v, causal=causal, scale=scale, q_chunk=q_chunk, kv_chunk=kv_chunk)
    T = q.shape[1]
    S = k.shape[1]
    require(not causal or T == S, f"causal=True with {T} queries and {S} keys on a device")
    results = ring(Ring(plan, seq_axis), x)
    return heads_last(results, x.q.dtype, return_lse)


def send(axis, tree):
    """Sends arrays to the next device of the ring, and returns those of the device before."""
    n = lax.axis_size(axis)
    pairs = [(i, (i + 1) % n) for i in range(n)]
    return lax.ppermute(tree, axis, pairs)  # each array moves one device on


def visit(fixed: Ring, distance, add, carry):
    """Calls add(plan, carry) for the keys of the device `distance` places back in the ring.

    With a causal mask only a device's own keys need the mask: all keys of earlier devices are seen,
    and none of later ones, which the ring reaches past its first device.
    """
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
    """attend over the keys of all devices: the running softmax is carried from block to block."""

    def step(carry, distance):
        softmax, k, v = carry
        following = send(fixed.axis, (k, v))  # on its way while this block is worked on

        def add(plan, softmax):
            return running_softmax(plan, softmax, x._replace(k=k, v=v))

        softmax = visit(fixed, distance, add, softmax)
        return (softmax, *following), None

    softmax, _ = same_axes((softmax_of_nothing(x), x.q))
    n = lax.axis_size(fixed.axis)
    (softmax, _, _), _ = lax.scan(step, (softmax, x.k, x.v), jnp.arange(n))
    return divide(softmax)


def ring_forward(fixed: Ring, x: Arrays):
    results = ring(fixed, x)
    return results, (x, results)


def ring_backward(fixed: Ring, saved, cotangents: Softmax):
    """The gradients of keys and values travel with them."""
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

TILE = 64  # queries and keys of the kernel's tiles


def check_kernel(x: Arrays):
    """Raises NotImplementedError for what the kernel does not support."""
    given = [name for name, array in zip(x._fields[3:], x[3:]) if array is not None]
    if jax.config.jax_enable_x64:
        given.append("x64")
    if jax.typeof(x.q).mat.varying:
        given.append("shard_map with check_vma=True")
    if given:
        raise NotImplementedError(
            f"implementation='pallas' does not support {', '.join(given)}: use 'xla'"
        )


def flash(plan: Plan, x: Arrays) -> Softmax:
    """divide(running_softmax(...)) as one kernel; compiled for GPU and TPU, but run on neither yet.

    Each program has TILE queries of one head and runs along all its keys, as running_softmax does.
    """
    # Imported here: JAX 0.12 announces that it will drop Triton, which all the rest does without.
    from jax.experimental.pallas import triton as plgpu

    B, G, R, T, _ = x.q.shape
    S, V = x.v.shape[-2:]
    q = pad_tiles(x.q.reshape(B, G * R, T, -1))
    k = pad_tiles(x.k[:, :, 0])
    v = pad_tiles(x.v[:, :, 0])

    # What program (b, h, i) gets: tile i of the queries of head h, and all keys of its head, h / R.
    def queries(size):
        return pl.BlockSpec((None, None, TILE, size), lambda b, h, i: (b, h, i, 0))

    def all_keys(x):
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, h, i: (b, lax.div(h, R), 0, 0))

    sizes = (1, 1, v.shape[-1])  # of highest, total and out
    make_call = functools.partial(
        pl.pallas_call,
        functools.partial(flash_kernel, plan=plan, S=S),
        grid=(B, G * R, q.shape[2] // TILE),
        in_specs=[queries(q.shape[-1]), all_keys(k), all_keys(v)],
        out_specs=[queries(size) for size in sizes],
        out_shape=[jax.ShapeDtypeStruct((*q.shape[:3], size), jnp.float32) for size in sizes],
    )
    triton = make_call(compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2))
    # The platform is chosen at lowering, so that a CPU can export the kernel for a GPU.
    results = lax.platform_dependent(
        q, k, v, cpu=make_call(interpret=True), cuda=triton, default=make_call()
    )
    highest, total, out = (a[:, :, :T].reshape(B, G, R, T, -1) for a in results)
    return Softmax(highest, total, out[..., :V])


def pad_tiles(x):
    """x [B,H,n,K] with zeros up to whole tiles, and K up to a power of two, as Triton requires."""
    size = max(16, pl.next_power_of_2(x.shape[3]))
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % TILE), (0, size - x.shape[3])))


def seen_tiles(plan: Plan, row, tiles):
    """The range, first and end, of the tiles of keys that queries row ... row + TILE - 1 see."""
    if not plan.causal:
        return 0, tiles
    first_key = 0
    if plan.window:
        first_key = jnp.maximum(row + plan.query_offset + 1 - plan.window, 0)
    end_key = row + TILE + plan.query_offset
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
        see = visible(plan, rows, keys)
        see = see & (keys < S)  # keys from S on are padding
        scores = jnp.where(see, scores, -jnp.inf)

        new_highest = jnp.maximum(highest, scores.max(1, keepdims=True))
        terms = jnp.exp(scores - new_highest)
        shrink = jnp.exp(highest - new_highest)
        total = total * shrink + terms.sum(1, keepdims=True)
        values = jnp.dot(terms.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return new_highest, total, out * shrink + values

    carry = (
        jnp.full((TILE, 1), LEAST, jnp.float32),
        jnp.zeros((TILE, 1), jnp.float32),
        jnp.zeros(out_ref.shape, jnp.float32),
    )
    first, end = seen_tiles(plan, row, k_ref.shape[0] // TILE)
    highest, total, out = lax.fori_loop(first, end, add_tile, carry)
    highest_ref[...] = highest
    total_ref[...] = total
    out_ref[...] = out / one_if_zero(total)


# ==== Demo: the paper's experiment (Tables 2 and 3) ===============================================

HEAD = 64  # one head, as in the paper, with inputs in bfloat16
MOST_MEMORY = 3e9  # bytes; what needs more is compiled but not run
EXPECTED = (98, 113)  # times less memory at n = 2^14, inference and gradient
FLOOR = (59, 32)  # what the abstract states; the rounded figures of its tables give 58.8, 31.2

PAPER = {  # Tables 2 and 3: n -> MB on a TPUv3 (definition, the paper's algorithm)
    2**8: {"inference": (0.27, 0.27), "gradient": (0.532, 0.532)},
    2**10: {"inference": (4, 4), "gradient": (8, 8)},
    2**12: {"inference": (64, 16), "gradient": (128, 41)},
    2**14: {"inference": (1000, 17), "gradient": (2000, 64)},
    2**16: {"inference": (math.nan, 21), "gradient": (math.nan, 257)},
}


class Cost(NamedTuple):  # same in every file
    """What a function costs."""

    memory: int  # bytes besides inputs and results
    seconds: float  # the least of five runs; NaN if it was not run


def cost(function, *inputs) -> Cost:  # same in every file
    """What function(*inputs) costs. It is compiled; if it needs too much memory, it is not run."""
    compiled = jax.jit(function).lower(*inputs).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    if memory > MOST_MEMORY:
        return Cost(memory, math.nan)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*inputs))
        times.append(time.perf_counter() - start)
    return Cost(memory, min(times))


def gradient_of(function):
    """The gradients of the sum of function(q, k, v) in q, k and v."""

    def total(q, k, v):
        return function(q, k, v).astype(jnp.float32).sum()

    return jax.grad(total, (0, 1, 2))


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
        qkv = jax.random.normal(jax.random.key(0), (3, 1, n, 1, HEAD), jnp.bfloat16)
        plain = cost(definition, *qkv)
        here = cost(ours, *qkv)
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


def show(pair):
    """Two numbers as text."""
    return f"{pair[0]:.0f} and {pair[1]:.0f}"


def check_out(path):  # same in every file
    """Raises ValueError unless a figure can be written to path."""
    path = pathlib.Path(path)
    require(path.suffix in (".png", ".pdf", ".svg"), f"--out {path} is not a .png, .pdf or .svg")
    require(not path.is_dir(), f"--out {path} is a folder")
    require(os.access(path.parent, os.W_OK), f"--out {path}: its folder cannot be written to")


def main(argv=None) -> int:
    """Returns the exit status: 1 below FLOOR, 2 for bad input."""
    parser = argparse.ArgumentParser(
        description="Measures the memory and time of attention against n."
    )
    parser.add_argument(
        "--longest", type=int, default=14, help="up to n = 2 to this power, even, 8 to 20"
    )
    parser.add_argument("--out", default="memeff_attention.png", help="where to draw the figure")
    args = parser.parse_args(argv)
    try:
        require(
            args.longest in range(8, 21, 2),
            f"--longest {args.longest} is not an even number from 8 to 20",
        )
        check_out(args.out)
    except ValueError as error:
        print(f"memeff_attention.py: {error}", file=sys.stderr)
        return 2

    lengths = [2**i for i in range(8, args.longest + 1, 2)]
    results = {task: measure(task, lengths) for task in ("inference", "gradient")}
    got = [plain[-1].memory / here[-1].memory for plain, here in results.values()]
    defaults = args.longest == 14
    if defaults:
        expected = f"expected {show(EXPECTED)}, at least {show(FLOOR)}"
    else:
        expected = "expected unknown, at least unknown"
    name = f"times less memory at n = {lengths[-1]:,}, inference and gradient"
    print(f"result: {name}: got {show(got)}, {expected}")
    try:
        draw(args.out, lengths, results)
        print(f"wrote {args.out}")
    except Exception as error:  # matplotlib is missing, or it cannot draw here
        print(f"no figure: {type(error).__name__}: {error}")
    enough = all(times >= floor for times, floor in zip(got, FLOOR))
    return int(defaults and not enough)


def run_program(main):  # same in every file
    """Exits with the status that main returns; after Ctrl-C or `| head` without a traceback."""
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # otherwise Python fails to flush
        status = 141
    sys.exit(status)


if __name__ == "__main__":
    run_program(main)
