"""FAVOR+: attention in linear time and memory, by random features of the softmax kernel.

    W = orthogonal_projection(jax.random.key(0), features=256, dim=64)  # [M,K]; drawn once
    out = favor_attention(q, k, v, W)  # q [B,T,H,64], k, v [B,S,H,64] -> [B,T,H,64]
    out = favor_attention(q, k, v, W, causal=True)

    state = init_state(batch, heads, features=256, value_size=64)  # decoding, O(1) per token
    state, out = decode_step(state, q, k, v, W)  # q, k, v [B,1,H,64]

    # Inside shard_map, over a sequence that is sharded over the mesh axis "seq":
    out = favor_attention(q, k, v, W, causal=True, seq_axis="seq")

Paper     Choromanski et al. 2020, "Rethinking Attention with Performers", arXiv:2009.14794.
Here      Algorithm 1 (FAVOR+), without and with a causal mask (App. B.1); positive and hyperbolic
          features (Eq. 7), trigonometric ones (Sec. 2.3), any function of a projection (Eq. 5);
          orthogonal and independent projections (Sec. 2.4). Beyond the paper: a sequence that is
          sharded over devices.
Not here  The Performer as a model (examples/byte_lm.py and examples/listops.py take their attention
          from this file); redrawing during training (pass another projection); a GPU kernel.
Differs   From the official code:
          Orthogonal blocks are uniformly distributed. Official blocks are not, since the signs of
          the QR decomposition are not fixed, and their estimate is biased: its mean is 0.81 to 0.91
          times exp(q.k) at K = 8. official=True repeats those draws.
          Each key has its own log scale, and the sums are rescaled whenever a larger one comes. The
          official code subtracts the maximum over all keys, future ones too, and adds 1e-6 after
          exp: with a causal mask a large last key changed outputs before it by up to 2.3.
          The quotient is exact. The official one adds 2e-6 to denominators below 1e-6, which at a
          length of 4,096 alters 67 % of the causal rows. Here only a denominator below 1e-30 is
          special: it gives zeros.
Claims    C1 the features are unbiased (Lemma 1)
          C2 where exp(q.k) is small, positive features have a far smaller error than trigonometric
             ones; their mean squared errors are those of Lemma 2
          C3 orthogonal projections have a smaller error than independent ones (Theorem 2)
          C4 the error falls as 1 / sqrt(M)
          C5 FLOPs and memory grow linearly with the length
          C6 causal attention is the masked quadratic form, and no output depends on the future
          C7 decoding token by token gives the same numbers
          C8 finite in bfloat16 at queries and keys of norm 30, value and gradient
          C9 a sequence sharded over devices gives the same numbers, by traffic of a fixed size
Checked   google-research/google-research @ 0c1bbe5, performer/fast_attention/jax: features,
          attention, gradients and projections in float32 on a CPU differ by at most 2.5e-6 of the
          largest value. The claims are tests in tests/test_performer.py.
Run       python performer.py
          68 s on two CPU cores. With 256 features at |q| = |k| = 2 the error of attention is 0.16
          of its size, and at a length of 4,096 it is 9 times as fast as softmax attention; with an
          error above 0.25, or less than 2 times as fast, it fails
Axes      B batch  T queries  S keys  H heads  K size of a query and a key  V size of a value
          M rows of the projection, and features; hyperbolic and trigonometric features are 2M
          C = V + 1, a value and an appended 1  t tokens of a chunk. Inside shard_map B, T, S and
          H are sizes on one device.
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


def require(ok, message):  # same in every file
    """Raises ValueError(message) unless ok."""
    if not ok:
        raise ValueError(message)


# ==== Definition: what is approximated ============================================================


def softmax_attention(q, k, v, *, causal=False):
    """Attention by its definition (Eq. 1, with causal=True Eq. 2), in O(T S) time and memory.

    q [B,T,H,K], k [B,S,H,K], v [B,S,H,V] -> [B,T,H,V].
    """
    scores = jnp.einsum("bthk,bshk->bhts", q, k) * q.shape[3] ** -0.5
    if causal:
        T, S = scores.shape[2:]
        seen = jnp.arange(S)[None, :] <= jnp.arange(T)[:, None]
        scores = jnp.where(seen[None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)  # D^-1 A
    return jnp.einsum("bhts,bshv->bthv", weights, v)


# ==== Random projections (Sec. 2.4) ===============================================================


def gaussian_projection(key, features, dim):
    """Independent normal rows w_1 ... w_M. [M,K]."""
    check_sizes(features, dim)
    return jax.random.normal(key, (features, dim))


def orthogonal_projection(key, features, dim, *, scaling=0, official=False):
    """Rows that are orthogonal to the others of their block of K rows. [M,K].

    With scaling=0 they have the lengths of normal vectors, so that each row by itself is normal;
    with scaling=1 all have the length sqrt(K). official=True repeats the draws of the official
    code, whose blocks are not uniform. Raises ValueError for any other scaling, and for sizes below
    1.
    """
    check_sizes(features, dim)
    require(scaling in (0, 1), f"scaling={scaling} is neither 0 nor 1")
    block_keys = []
    chain = key
    for _ in range(math.ceil(features / dim)):
        chain, block_key = jax.random.split(chain)
        block_keys.append(block_key)
    make_blocks = jax.vmap(functools.partial(orthogonal_block, dim=dim, official=official))
    blocks = make_blocks(jnp.stack(block_keys))  # [M/K,K,K], the last one cut off below
    directions = blocks.reshape(-1, dim)[:features]
    if scaling == 1:
        return directions * math.sqrt(dim)
    length_key = key  # as in the official code, which uses the first key twice
    if not official:
        length_key = jax.random.fold_in(chain, 0)
    vectors = jax.random.normal(length_key, (features, dim))
    lengths = jnp.linalg.norm(vectors, axis=1, keepdims=True)
    return directions * lengths


def orthogonal_block(key, dim, official):
    """A random orthogonal matrix [K,K]."""
    q, r = jnp.linalg.qr(jax.random.normal(key, (dim, dim)))
    if not official:
        # QR is unique only up to signs of columns. With R's diagonal positive Q is uniform.
        q = q * jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0)
    return q.T


def check_sizes(features, dim):
    """Raises ValueError for sizes below 1."""
    require(features >= 1, f"features={features} is not at least 1")
    require(dim >= 1, f"dim={dim} is not at least 1")


# ==== Features ====================================================================================
# First those of the softmax kernel, where the mean of phi(x).phi(y) is SM(x, y) = exp(x.y).


class Features(NamedTuple):
    """phi(x) = exp(log_scale) * values: phi itself may be too large or small for float32.

    log_scale is under stop_gradient. No gradient is lost: the same number is subtracted within the
    values, so that it cancels in phi.
    """

    values: jax.Array  # [...,T,M]
    log_scale: jax.Array  # [...,T,1]


def project(x, projection):
    """w.x for each row w of the projection. [...,K] -> [...,M]."""
    # By default a GPU or TPU multiplies float32 with fewer digits, and exp magnifies the error.
    return jnp.matmul(x, projection.T, precision="highest")


def positive_features(x, projection) -> Features:
    """exp(w.x - |x|^2 / 2), the features of FAVOR+ (Lemma 1, Eq. 7). [...,K] -> [...,M]."""
    exponents = project(x, projection) - half_square(x)
    return exponential(exponents)


def hyperbolic_features(x, projection) -> Features:
    """exp(w.x - |x|^2 / 2) and exp(-w.x - |x|^2 / 2), Eq. 7. [...,K] -> [...,2M]."""
    projected = project(x, projection)
    exponents = jnp.concatenate([projected, -projected], axis=-1) - half_square(x)
    return exponential(exponents)


def trigonometric_features(x, projection) -> Features:
    """cos(w.x) exp(|x|^2 / 2) and the same with sin (Sec. 2.3). [...,K] -> [...,2M]."""
    projected = project(x, projection)
    waves = jnp.concatenate([jnp.cos(projected), jnp.sin(projected)], axis=-1)
    exponent = half_square(x)
    log_scale = lax.stop_gradient(exponent)
    scale = jnp.exp(exponent - log_scale)  # equals 1, and carries the gradient
    return Features(waves * scale * projection.shape[0] ** -0.5, log_scale)


def relu_features(x, projection) -> Features:
    """relu(w.x) + 1e-3, the paper's generalised attention (App. A.4). [...,K] -> [...,M]."""
    return generalized_features(x, projection, jax.nn.relu)


def generalized_features(x, projection, function, epsilon=1e-3) -> Features:
    """f(w.x) + epsilon for any f, and f(x) + epsilon without a projection.

    Eq. 5 with h = 1, without its 1 / sqrt(M), which the quotient cancels. The official code adds
    the epsilon.
    """
    if projection is not None:
        x = project(x, projection)
    values = function(x) + epsilon
    return Features(values, jnp.zeros_like(values[..., :1]))


def half_square(x):
    """|x|^2 / 2. [...,K] -> [...,1]."""
    return jnp.square(x).sum(-1, keepdims=True) / 2


def exponential(exponents) -> Features:
    """exp(exponents) / sqrt(number of them)."""
    log_scale = lax.stop_gradient(exponents.max(-1, keepdims=True))
    values = jnp.exp(exponents - log_scale) * exponents.shape[-1] ** -0.5
    return Features(values, log_scale)


SOFTMAX_KERNELS = {
    "positive": positive_features,
    "hyperbolic": hyperbolic_features,
    "trigonometric": trigonometric_features,
}


# ==== FAVOR+ (Algorithm 1) ========================================================================

LEAST = -1e30  # the log scale of no keys; finite, since -inf minus -inf is NaN
TINY = 1e-30  # smaller denominators count as 0, well before float32 ends at 1e-38


class State(NamedTuple):
    """What FAVOR+ keeps of all keys, however many: exp(log_scale) * sums is Buf1 = (K')^T C."""

    log_scale: jax.Array  # [B,H,1,1]
    sums: jax.Array  # [B,H,M,C]


def favor_attention(
    q,
    k,
    v,
    projection,
    *,
    kind="positive",
    causal=False,
    mask=None,
    chunk=128,
    seq_axis=None,
):
    """Attention by random features: D^-1 A V with A = phi(q) phi(k)^T (Eq. 4, Algorithm 1).

    q [B,T,H,K], k [B,S,H,K], v [B,S,H,V], projection [M,K] -> [B,T,H,V] in q's dtype, computed in
    float32 at least, in O((T + S) M (K + V)) time for each head. The estimate of exp(q.k / sqrt(K))
    is good where |q| and |k| are small: with independent rows its relative variance is
    (exp(|q + k|^2 / sqrt(K)) - 1) / M for positive features (Lemma 2). Weights that were trained
    with softmax attention need some more training.

    kind       "positive", "hyperbolic" or "trigonometric" approximate exp(q.k / sqrt(K)); the sums
               of the last can be near 0, and an output then large. "relu" is another kernel, which
               needs no projection. A function (x, projection) -> Features is a kernel of your own:
               its x is a chunk [B,H,t,K] that has not been scaled by K^-1/4
    causal     query i sees the keys 0 ... i
    mask       bool [B,S], False for keys that are padding. A query without keys gives zeros; so
               does one whose kernel with all its keys is below 1e-30 of the largest
    chunk      how many tokens are worked on at once; up to rounding the result is the same for all
    seq_axis   inside shard_map: the mesh axis over which the sequence is sharded. Each device sends
               its state, B H (M (V + 1) + 1) numbers whatever the length

    Raises ValueError for arguments that do not go together.
    """
    check_arguments(q, k, v, projection, kind, causal, mask, chunk)
    T = q.shape[1]
    dtype = q.dtype
    if mask is None:
        mask = jnp.ones(k.shape[:2], bool)
    else:  # whatever the padding holds, even NaN, has no effect
        k = jnp.where(mask[:, :, None, None], k, 0)
        v = jnp.where(mask[:, :, None, None], v, 0)
    phi = functools.partial(features_of, projection=projection, kind=kind)
    q = chunks_of(heads_first(q), chunk)
    keys = (
        chunks_of(heads_first(k), chunk),
        chunks_of(heads_first(with_ones(v)), chunk),
        chunks_of(mask[:, None, :, None], chunk),  # what pads the last chunk is hidden
    )

    state = empty_state(phi, *keys)
    if causal:
        if seq_axis:
            state = state_of_earlier_devices(add_keys(phi, state, keys), seq_axis)
        buffer = causal_scan(phi, state, q, keys)
    else:
        state = add_keys(phi, state, keys)
        if seq_axis:
            state = state_of_all_devices(state, seq_axis)
        buffer = lax.map(jax.checkpoint(lambda chunk: read(phi(chunk), state)), q)

    buffer = jnp.moveaxis(buffer, 0, 2)  # [B,H,T/t,t,C]
    B, H = buffer.shape[:2]
    out = normalize(buffer.reshape(B, H, -1, buffer.shape[-1]))
    return out.swapaxes(1, 2)[:, :T].astype(dtype)


def features_of(x, projection, kind) -> Features:
    """The features of queries or keys. [B,H,T,K] -> values [B,H,T,M], log_scale [B,H,T,1]."""
    if projection is not None:
        projection = projection.astype(x.dtype)
    if callable(kind):
        return kind(x, projection)
    if kind == "relu":
        return relu_features(x, projection)
    x = x * x.shape[-1] ** -0.25  # on q and on k, which gives 1 / sqrt(K)
    return SOFTMAX_KERNELS[kind](x, projection)


def with_ones(v):
    """C = [V 1]: the sums over the keys then hold numerator and denominator. [...,V] -> [...,C]."""
    return jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)


def heads_first(x):
    """[B,T,H,K] -> [B,H,T,K], in float32 at least."""
    return at_least_float32(x).swapaxes(1, 2)


def summarize(k: Features, c, mask) -> State:
    """Buf1 = (K')^T C over the keys that are there. k [B,H,S,M], c [B,H,S,C], mask [B,1,S,1]."""
    log_scales = jnp.where(mask, k.log_scale, LEAST)
    highest = log_scales.max(-2, keepdims=True)
    weights = jnp.where(mask, jnp.exp(log_scales - highest), 0)  # [B,H,S,1]
    return State(highest, (k.values * weights).mT @ c)


def add_keys(phi, state: State, keys) -> State:
    """The state with more keys, chunk by chunk; keys: k, c and mask in chunks."""

    @jax.checkpoint
    def step(state, part):
        k, c, mask = part
        return merge_states(state, summarize(phi(k), c, mask)), None

    state, _ = lax.scan(step, state, keys)
    return state


def read(q: Features, state: State):
    """Buf2 = Q' Buf1, without the factors exp(log_scale), which the quotient cancels. [B,H,T,C]."""
    return q.values @ state.sums


def normalize(buffer):
    """[Buf3 buf4] -> Buf3 / buf4; zeros where |buf4| is below TINY. [B,H,T,C] -> [B,H,T,V]."""
    numerator = buffer[..., :-1]
    denominator = buffer[..., -1:]
    none = jnp.abs(denominator) <= TINY  # False for NaN, which therefore shows in the output
    # Both are divided by the denominator's value first. Else the gradient would divide by its
    # square, which float32 rounds to 0 where the denominator is small.
    divisor = lax.stop_gradient(jnp.where(none, 1, denominator))
    quotient = (numerator / divisor) / jnp.where(none, 1, denominator / divisor)
    return jnp.where(none, 0, quotient)


def merge_states(first: State, second: State) -> State:
    """The state of the keys of both."""
    log_scale = jnp.maximum(first.log_scale, second.log_scale)
    sums = first.sums * jnp.exp(first.log_scale - log_scale)
    sums = sums + second.sums * jnp.exp(second.log_scale - log_scale)
    return State(log_scale, sums)


def empty_state(phi, k, c, mask) -> State:
    """The state with which a scan over keys in chunks begins: that of no keys."""
    B, H = k.shape[1:3]
    M = jax.eval_shape(phi, k[0]).values.shape[-1]
    state = init_state(B, H, M, c.shape[-1] - 1)
    state = jax.tree.map(lambda x: x.astype(c.dtype), state)
    state, *_ = same_axes((state, k, c, mask))
    return state


def causal_scan(phi, state: State, q, keys):
    """Buf2 with a causal mask (Eq. 11), chunk by chunk. q and keys in chunks -> [T/t,B,H,t,C].

    Inside a chunk this is the quadratic form with its mask; all earlier chunks are in the state,
    which begins as that of the tokens before. Each row is scaled by the largest log scale of the
    keys that it can see, so that no later key changes even its last bit. The backward pass keeps
    one state for each chunk, and computes the rest again.
    """
    t = q.shape[3]
    seen = jnp.tril(jnp.ones((t, t), bool))[None, None]  # [1,1,t,t]

    @jax.checkpoint
    def step(state, part):
        q, (k, c, mask) = part
        q_features = phi(q)
        k_features = phi(k)
        log_scales = jnp.where(mask, k_features.log_scale, LEAST)
        highest = lax.cummax(log_scales, axis=2)
        highest = jnp.maximum(highest, state.log_scale)  # [B,H,t,1]
        decay = jnp.where(seen & mask.mT, log_scales.mT - highest, -jnp.inf)  # [B,H,t,t]
        weights = (q_features.values @ k_features.values.mT) * jnp.exp(decay)  # the masked A
        past = jnp.exp(state.log_scale - highest)
        buffer = weights @ c + past * read(q_features, state)
        return merge_states(state, summarize(k_features, c, mask)), buffer

    _, buffers = lax.scan(step, state, (q, keys))
    return buffers


def chunks_of(x, chunk):
    """x [B,H,T,n], padded at its end with zeros -> [T/t,B,H,t,n] with t = chunk, or T if less."""
    B, H, T, n = x.shape
    t = min(chunk, T)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -T % t), (0, 0)))
    return jnp.moveaxis(x.reshape(B, H, -1, t, n), 2, 0)


def attention_matrix(q, k, projection, **options):
    """The matrix that favor_attention multiplies v by, to look at. [B,H,T,S].

    q [B,T,H,K], k [B,S,H,K]; the options are those of favor_attention, except seq_axis.
    """
    require("seq_axis" not in options, "attention_matrix takes no seq_axis")
    B, S, H, _ = k.shape
    one_for_each_key = jnp.broadcast_to(jnp.eye(S)[None, :, None, :], (B, S, H, S))
    out = favor_attention(q, k, one_for_each_key.astype(q.dtype), projection, **options)
    return out.swapaxes(1, 2)


def check_arguments(q, k, v, projection, kind, causal, mask, chunk):
    """Raises ValueError for arguments of favor_attention that do not go together."""
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    require(
        q.ndim == k.ndim == v.ndim == 4
        and k.shape[:3] == v.shape[:3]
        and q.shape[::2] == k.shape[::2]
        and q.shape[3] == k.shape[3],
        f"{shapes} are not [B,T,H,K], [B,S,H,K], [B,S,H,V]",
    )
    require(q.size and k.size and v.size, f"{shapes}: none may be empty")
    require(
        q.dtype == k.dtype == v.dtype and jnp.issubdtype(q.dtype, jnp.floating),
        f"q is {q.dtype}, k {k.dtype}, v {v.dtype}, not all of the same floating type",
    )
    require(
        callable(kind) or kind in [*SOFTMAX_KERNELS, "relu"],
        f"kind={kind!r} is none of {[*SOFTMAX_KERNELS, 'relu']}, and no function",
    )
    if kind in SOFTMAX_KERNELS:
        require(projection is not None, f"kind={kind!r} needs a projection")
    if projection is not None:
        require(
            projection.ndim == 2 and projection.shape[1] == q.shape[3] and len(projection) > 0,
            f"the projection is {projection.shape}, not [features, {q.shape[3]}]",
        )
    if mask is not None:
        wanted = (k.shape[0], k.shape[1])
        require(
            mask.shape == wanted and mask.dtype == bool,
            f"mask is {mask.dtype} {mask.shape}, not bool {wanted}",
        )
    require(
        not causal or q.shape[1] == k.shape[1],
        f"causal=True with {q.shape[1]} queries and {k.shape[1]} keys",
    )
    require(
        isinstance(chunk, int | np.integer) and chunk >= 1,
        f"chunk={chunk} is not a whole number of at least 1",
    )


def wide(x):  # same in every file
    """The dtype in which to compute with x: float32, or x's own if that is wider."""
    return jax.dtypes.canonicalize_dtype(np.promote_types(x.dtype, np.float32))


def at_least_float32(x):  # same in every file
    """x cast to the dtype wide(x)."""
    return x.astype(wide(x))


# ==== Decoding: one token at a time ===============================================================


def init_state(batch, heads, features, value_size) -> State:
    """The state of no keys. features: 2M for hyperbolic and trigonometric ones, else M."""
    sizes = {"batch": batch, "heads": heads, "features": features, "value_size": value_size}
    for name, size in sizes.items():
        require(size >= 1, f"{name}={size} is not at least 1")
    return State(
        jnp.full((batch, heads, 1, 1), LEAST, jnp.float32),
        jnp.zeros((batch, heads, features, value_size + 1), jnp.float32),
    )


def decode_step(state: State, q, k, v, projection, *, kind="positive"):
    """One token: its key joins the state, then its query sees all keys so far.

    q, k [B,1,H,K], v [B,1,H,V] -> (state, out [B,1,H,V]). Time and memory do not depend on the
    number of tokens before. Raises ValueError as favor_attention does, and for a state of other
    sizes.
    """
    check_arguments(q, k, v, projection, kind, causal=False, mask=None, chunk=1)
    for name, x in {"q": q, "k": k}.items():
        require(x.shape[1] == 1, f"{name} has {x.shape[1]} tokens, decode_step takes one")
    k_features = features_of(heads_first(k), projection, kind)
    c = heads_first(with_ones(v))
    B, H, _, M = k_features.values.shape
    wanted = (B, H, M, c.shape[-1])
    require(
        state.sums.shape == wanted,
        f"the sums of the state are {state.sums.shape}, these arguments need {wanted}",
    )
    mask = jnp.ones((B, 1, 1, 1), bool)
    state = merge_states(state, summarize(k_features, c, mask))
    buffer = read(features_of(heads_first(q), projection, kind), state)
    return state, normalize(buffer).swapaxes(1, 2).astype(q.dtype)


# ==== Sharding: the sequence sharded over devices =================================================


def state_of_all_devices(state: State, axis) -> State:
    """The state of the keys of all devices."""
    log_scales = lax.all_gather(state.log_scale, axis)  # [n,B,H,1,1], one number for each head
    highest = log_scales.max(0)
    sums = state.sums * jnp.exp(state.log_scale - highest)
    return State(highest, lax.psum(sums, axis))  # all-reduce: the sums over all keys


def state_of_earlier_devices(state: State, axis) -> State:
    """The state of the keys of the devices before this one: an exclusive prefix sum."""
    states = lax.all_gather(state, axis)  # [n,B,H,...]: every device gets the states of all
    earlier = jnp.arange(lax.axis_size(axis)) < lax.axis_index(axis)
    earlier = earlier.reshape(-1, 1, 1, 1, 1)
    log_scales = jnp.where(earlier, states.log_scale, LEAST)
    highest = log_scales.max(0)
    weights = jnp.where(earlier, jnp.exp(log_scales - highest), 0)
    return State(highest, (weights * states.sums).sum(0))


def same_axes(tree):  # same in every file
    """Inside shard_map: marks all arrays as varying over each mesh axis that any varies over."""
    axes = frozenset().union(*(jax.typeof(x).mat.varying for x in jax.tree.leaves(tree)))

    def vary(x):
        missing = tuple(axes - jax.typeof(x).mat.varying)
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree)


# ==== Demo: error against features (Fig. 4), time against length (Sec. 4.1) =======================

LENGTH = 4096  # of Fig. 4, with a head of 16
DIM = 16
SAMPLES = 15
NORMS = (1, 2, 4)  # of queries and keys, root mean square
FEATURES = (16, 64, 256, 1024)  # how many of them
QUERIES = 256  # for which the error is computed
PROJECTIONS = {"orthogonal": orthogonal_projection, "independent": gaussian_projection}
KINDS = ("positive", "trigonometric")
HEAD = 64  # of the table of times, one head with 256 features
MOST_MEMORY = 3e9  # bytes; what needs more is compiled, and not run
EXPECTED = (0.161, 9.0)  # error at a norm of 2, and the ratio of times at 4,096
MOST_ERROR = 0.25
LEAST_RATIO = 2.0


def make_errors(kind, make_projection, rows):
    """A jitted function of (q, k, v, exact, keys): the relative error for each key."""

    def error(q, k, v, exact, key):
        projection = make_projection(key, rows, DIM)
        out = favor_attention(q, k, v, projection, kind=kind)
        return jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact)

    @jax.jit
    def errors(q, k, v, exact, keys):
        return lax.map(lambda key: error(q, k, v, exact, key), keys)

    return errors


def measure_errors(seed):
    """Prints the errors; returns {(norm, kind, projection): [error for each of FEATURES]}."""
    print(f"error of attention, n = {LENGTH}, a head of {DIM}: median of {SAMPLES} projections")
    print(f"{'|q|, |k|':<10}{'features':<28}", *[f"M={m:<6}" for m in FEATURES])
    data_key, projection_key = jax.random.split(jax.random.key(seed))
    q, k, v = jax.random.normal(data_key, (3, 1, LENGTH, 1, DIM))
    q = q[:, :QUERIES]
    keys = jax.random.split(projection_key, SAMPLES)
    functions = {}
    for kind in KINDS:
        # Trigonometric features come in pairs: half the rows for as many features.
        rows = [m if kind == "positive" else m // 2 for m in FEATURES]
        for name, make_projection in PROJECTIONS.items():
            functions[kind, name] = [make_errors(kind, make_projection, m) for m in rows]
    errors = {}
    for norm in NORMS:
        scale = norm * DIM**-0.5
        exact = jax.jit(softmax_attention)(q * scale, k * scale, v)
        for (kind, name), row in functions.items():
            found = [float(jnp.median(f(q * scale, k * scale, v, exact, keys))) for f in row]
            errors[norm, kind, name] = found
            cells = [f"{error:<8.3f}" for error in found]
            label = f"{kind}, {name}"
            print(f"{norm:<10}{label:<28}", *cells, flush=True)
    print()
    return errors


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


def measure_costs(lengths):
    """Prints time and memory against the length; returns {name: [Cost for each length]}."""
    projection = orthogonal_projection(jax.random.key(0), 256, HEAD)
    favor = functools.partial(favor_attention, projection=projection)
    functions = {
        "softmax": softmax_attention,
        "FAVOR+": favor,
        "softmax, causal": functools.partial(softmax_attention, causal=True),
        "FAVOR+, causal": functools.partial(favor, causal=True),
    }
    print(f"milliseconds and MB, one head of {HEAD}, 256 positive features")
    print(f"{'n':>8}", *[f"{name:>23}" for name in functions])
    costs = {name: [] for name in functions}
    for n in lengths:
        qkv = jax.random.normal(jax.random.key(0), (3, 1, n, 1, HEAD))
        for name, function in functions.items():
            costs[name].append(cost(function, *qkv))
        latest = [history[-1] for history in costs.values()]
        cells = [f"{c.seconds * 1e3:9,.1f} ms {c.memory / 1e6:7,.1f} MB" for c in latest]
        print(f"{n:8,}", *cells, flush=True)
    for form in ("", ", causal"):
        pairs = zip(lengths, costs[f"softmax{form}"], costs[f"FAVOR+{form}"])
        faster = [f"{n:,}" for n, softmax, favor in pairs if favor.seconds < softmax.seconds]
        print(f"FAVOR+{form} is faster at n = {' '.join(faster) or 'none'}")
    return costs


def draw(path, errors, lengths, costs):
    """Left: error against the number of features. Right: seconds against the length."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for (norm, kind, name), row in errors.items():
        color = f"C{NORMS.index(norm)}"
        marker = "o" if kind == "positive" else "^"
        style = "-" if name == "orthogonal" else ":"
        label = f"|q| = {norm}: {kind}, {name}"
        left.plot(FEATURES, row, color + style, marker=marker, label=label)
    left.set(xlabel="features", ylabel="relative error of attention", xscale="log", yscale="log")
    left.set_xticks(FEATURES, [str(m) for m in FEATURES])
    left.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    for name, row in costs.items():
        color = "C0" if name.startswith("softmax") else "C1"
        style = ":" if name.endswith("causal") else "-"
        seconds = [cost.seconds for cost in row]
        right.plot(lengths, seconds, color + style, marker="o", label=name)
    right.set(xlabel=f"n (one head of {HEAD})", ylabel="seconds", yscale="log")
    right.set_xscale("log", base=2)
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def check_out(path):  # same in every file
    """Raises ValueError unless a figure can be written to path."""
    path = pathlib.Path(path)
    require(path.suffix in (".png", ".pdf", ".svg"), f"--out {path} is not a .png, .pdf or .svg")
    require(not path.is_dir(), f"--out {path} is a folder")
    require(os.access(path.parent, os.W_OK), f"--out {path}: its folder cannot be written to")


def main(argv=None) -> int:
    """Returns the exit status: 1 above MOST_ERROR or below LEAST_RATIO, 2 for bad input."""
    parser = argparse.ArgumentParser(description="Measures the error and the time of FAVOR+.")
    parser.add_argument(
        "--longest", type=int, default=14, help="the longest sequence is 2 to this power"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="performer.png", help="where to draw the figure")
    args = parser.parse_args(argv)
    try:
        require(12 <= args.longest <= 20, f"--longest {args.longest} is not from 12 to 20")
        require(0 <= args.seed < 2**32, f"--seed {args.seed} is not in 0 to {2**32 - 1}")
        check_out(args.out)
    except ValueError as error:
        print(f"performer.py: {error}", file=sys.stderr)
        return 2

    errors = measure_errors(args.seed)
    lengths = [2**i for i in range(8, args.longest + 1)]
    costs = measure_costs(lengths)
    error = errors[2, "positive", "orthogonal"][FEATURES.index(256)]
    at_4096 = lengths.index(4096)
    ratio = costs["softmax"][at_4096].seconds / costs["FAVOR+"][at_4096].seconds
    defaults = (args.longest, args.seed) == (14, 0)
    if defaults:
        expected = (
            f"expected {EXPECTED[0]:.3f} and {EXPECTED[1]:.1f}, at most {MOST_ERROR} and at least "
            f"{LEAST_RATIO}"
        )
    else:
        expected = "expected unknown, at most unknown"
    print(
        f"result: error with 256 features, times as fast as softmax at 4,096: got {error:.3f} and "
        f"{ratio:.1f}, {expected}"
    )
    try:
        draw(args.out, errors, lengths, costs)
        print(f"wrote {args.out}")
    except Exception as problem:  # matplotlib is missing, or it cannot draw here
        print(f"no figure: {type(problem).__name__}: {problem}")
    return int(defaults and not (error <= MOST_ERROR and ratio >= LEAST_RATIO))


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
