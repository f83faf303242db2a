"""Memory-efficient attention: exact softmax attention without a matrix of queries times keys.

Paper     Rabe & Staats 2021, "Self-attention Does Not Need O(n^2) Memory", arXiv:2112.05682 v3.
Here      The running softmax (Sec. 2) in its stable form (Sec. 3), the paper's code (Fig. 1) and experiment.
          Beyond it: mask, bias, causal, window, segments, grouped heads, a backward pass from the saved
          log-sum-exp, flash attention kernels.
Not here  Dropout of weights; --resume and --distributed. Ring attention, cache: examples/long_context.py.
Differs   From the official code: any chunk goes with any length (there, one that does not divide the keys
          counts some twice, one that does not divide the queries crashes); a running maximum, not one per
          chunk; the output has q's dtype. A query that sees nothing gets zeros.
Claims    C1 exact for every length, chunk, mask and bias   C2 59 and 32 times less memory at 16,384 tokens
          C3 memory linear in length   C4 stable at logits of +-1e4   C5 ring: more devices, less memory each
          C6 parts merge in any split and order   C7 causal: half the FLOPs if long (0.63 at 4,096 tokens)
Checked   google-research/google-research @ 30adf0e, memory_efficient_attention: outputs and gradients;
          largest error 1.9e-7 and 7.3e-6 of the largest value.
Read      attention, attend_reference, tile_table, forward_tiles, backward_tiles, attend_xla, merge
Run       python memeff_attention.py   74 s on two CPU cores: 2.71 bits per held-out byte, at most 2.85
Axes      B batch  T queries  S keys  H heads  G heads of keys  R = H / G  K head size  V value size
          t, s chunk sizes  D width  F hidden units of MLP  L blocks.  In shard_map B is a size per device.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import gzip
import math
import os
import pathlib
import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P


# ==== Config ================================================================================================
def require(ok, message):  # same in every file
    """Raises ValueError(message) unless ok."""
    if not ok:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class Config:
    """The demo's language model of bytes; the paper has none. ValueError for what cannot be built."""

    width: int = 128
    depth: int = 2
    heads: int = 2
    mlp: int = 512
    implementation: str = "xla"  # of attention

    def __post_init__(self):
        sizes = self.width, self.depth, self.heads, self.mlp
        fits = min(sizes) >= 1 and self.width % (2 * self.heads) == 0
        require(fits, f"width, depth, heads, mlp={sizes}: at least 1, and width a multiple of 2 x heads")


# ==== Parameters: shape and number of inputs of each weight, declared once ==================================
def param_table(config: Config) -> dict:
    """(shape, inputs) of each weight, blocks stacked on a leading axis L. No inputs: a scale, 1 at first."""
    L, D, H, F = config.depth, config.width, config.heads, config.mlp
    blocks = {"norm1": ((L, D), 0), "qkv": ((L, D, 3, H, D // H), D), "out": ((L, H, D // H, D), D)}
    blocks |= {"norm2": ((L, D), 0), "mlp1": ((L, D, F), D), "mlp2": ((L, F, D), F)}
    ends = {"embed": ((256, D), 1), "before": ((256, D), 1), "norm": ((D,), 0), "head": ((D, 256), D)}
    return ends | {"blocks": blocks}


def init_params(key: jax.Array, config: Config) -> dict:
    """Float32 weights, normal with variance 1 / inputs. Nested dict, shapes as in param_table."""
    table, treedef = jax.tree.flatten(param_table(config), is_leaf=lambda x: isinstance(x, tuple))
    draw = lambda key, shape, n: jax.random.normal(key, shape) * n**-0.5 if n else jnp.ones(shape)
    return treedef.unflatten([draw(k, *row) for k, row in zip(jax.random.split(key, len(table)), table)])


# ==== The idea: the softmax runs along the keys, chunk by chunk =============================================
# What is static in a call. groups: (G, H / G); chunks: (t, s) of the forward and of the backward pass
Plan = collections.namedtuple("Plan", "scale causal window query_offset bias_fn groups chunks return_lse")
Arrays = collections.namedtuple("Arrays", "q k v bias mask q_segments kv_segments bias_params")
TILE = 64  # queries or keys of a kernel's tile
FEW = 2**16  # scores of a head: with fewer, all heads are worked on together
LEAST = -1e30  # below every score, but finite: the difference of two infinities is not a number
wide = lambda x: jnp.promote_types(jax.dtypes.canonicalize_dtype(x.dtype), jnp.float32)  # same in every file
at_least_float32 = lambda x: x.astype(wide(x))  # same in every file
flip = lambda x: x.swapaxes(-1, -2)


def visible(plan: Plan, see, rows, keys, mask=None, q_segments=None, kv_segments=None):
    """`see`, and whether a query sees a key. rows [t,1], keys [s], both indices -> boolean [...,t,s]."""
    rows = rows + plan.query_offset
    see = see & (keys <= rows) if plan.causal else see
    see = see & (keys > rows - plan.window) if plan.window else see
    see = see if mask is None else see & mask
    return see if q_segments is None else see & (q_segments[..., :, None] == kv_segments[..., None, :])


def attend_reference(plan: Plan, x: Arrays):
    """The definition: softmax(scale q k^T + bias) v over the keys seen. -> [B,T,H,V], lse [B,H,T]."""
    rows, keys = jnp.arange(x.q.shape[1]), jnp.arange(x.k.shape[1])
    k, v = (jnp.repeat(at_least_float32(a), plan.groups[1], axis=2) for a in (x.k, x.v))  # for each head of q
    scores = plan.scale * jnp.einsum("bthk,bshk->bhts", at_least_float32(x.q), k)
    scores += 0 if x.bias is None else x.bias
    scores += plan.bias_fn(x.bias_params, rows + plan.query_offset, keys) if plan.bias_fn else 0
    scores = jnp.where(visible(plan, True, rows[:, None], keys, *x[4:7]), scores, -jnp.inf)
    highest = lax.stop_gradient(jnp.maximum(scores.max(-1), LEAST))  # [B,H,T]
    terms = jnp.exp(scores - highest[..., None])  # [B,H,T,S]
    total = terms.sum(-1)
    divisor = jnp.where(total > 0, total, 1)  # a query that sees nothing gets zeros
    out = jnp.einsum("bhts,bshv->bthv", terms / divisor[..., None], v)
    return out.astype(x.q.dtype), jnp.where(total > 0, highest + jnp.log(divisor), -jnp.inf)


def attention_checkpointed(q, k, v, *, q_chunk=1024, kv_chunk=4096):
    """The paper's own form (Fig. 1): highest score, sum, sum of values of each chunk of keys, merged last;
    jax.checkpoint recomputes scores for the gradient. [B,T,H,K], [B,S,H,K], [B,S,H,V] -> [B,T,H,V]."""
    (B, T, H, K), S, t, s = q.shape, k.shape[1], min(q_chunk, q.shape[1]), min(kv_chunk, k.shape[1])

    def chunks(x, n):  # [T/n,B,n,H,K], padded
        x = jnp.pad(at_least_float32(x), ((0, 0), (0, -x.shape[1] % n), (0, 0), (0, 0)))
        return jnp.moveaxis(x.reshape(B, -1, n, *x.shape[2:]), 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def summarize(q, k, v, start):
        scores = jnp.einsum("bthk,bshk->bhts", q * K**-0.5, k)
        scores = jnp.where(start + jnp.arange(s) < S, scores, LEAST)  # the rest only pads
        highest = lax.stop_gradient(scores.max(-1, keepdims=True))
        terms = jnp.exp(scores - highest)
        return highest, terms.sum(-1, keepdims=True), jnp.einsum("bhts,bshv->bhtv", terms, v)

    def attend_chunk(q):
        highest, total, out = lax.map(lambda part: summarize(q, *part), parts)  # [S/s,B,H,t,...]
        weight = jnp.exp(highest - highest.max(0))
        return (out * weight).sum(0) / (total * weight).sum(0)  # [B,H,t,V]

    parts = chunks(k, s), chunks(v, s), jnp.arange(0, S, s)
    out = lax.map(attend_chunk, chunks(q, t)).transpose(1, 0, 3, 2, 4)  # [B,T/t,t,H,V]
    return out.reshape(B, -1, H, v.shape[-1])[:, :T].astype(q.dtype)


def tile_table(plan: Plan, T, S, t, s, masked):
    """The pairs of chunks in which some query sees some key, and no others: those where all see all, and then
    those that need a mask. Two int arrays [n,4]: first query and key of the tile, and the first of each that
    count: the last tile is moved back to fit, and what it shares with its neighbour is hidden there."""
    i, j = (index.ravel() for index in np.indices((-(-T // t), -(-S // s))))
    row, key = np.minimum(i * t, T - t), np.minimum(j * s, S - s)
    low, high = i * t + plan.query_offset, row + t - 1 + plan.query_offset  # first and last query that count
    some, every = np.full(len(i), True), (row == i * t) & (key == j * s) & (not masked)
    if plan.causal:
        some, every = some & (j * s <= high), every & (key + s - 1 <= low)
    if plan.window:
        some, every = some & (key + s - 1 > low - plan.window), every & (key > high - plan.window)
    table = np.stack([row, key, i * t, j * s], axis=1).astype(np.int32)
    return table[some & every], table[some & ~every]


def cut(x, start, size, axis):
    """x[start : start + size] along an axis of x [...]; x itself if it is None or has length 1 there."""
    return x if x is None or x.shape[axis] == 1 else lax.dynamic_slice_in_dim(x, start, size, axis)


def add_at(x, part, row, key):
    """x [...] plus part [...] from x[...,row,key] on; part is first summed over axes where x has length 1."""
    part = part.sum([i for i, n in enumerate(x.shape) if n == 1 < part.shape[i]], keepdims=True)
    start = [jnp.int32(i) for i in (*[0] * (x.ndim - 2), row, key)]
    return lax.dynamic_update_slice(x, lax.dynamic_slice(x, start, part.shape) + part, start)


def scan_tiles(plan: Plan, t, s, add_tile, carry, q, k, bias, mask, q_segments, kv_segments, bias_params):
    """carry after add_tile(carry, row, key, bias, see) on all tiles of q [...,T,K] and k [...,S,K]: the first
    query and key, bias, and what is seen, None for all. Both broadcast to [...,t,s]."""

    def step(carry, tile, masked):
        row, key, first_row, first_key = tile
        rows, keys = row + jnp.arange(t), key + jnp.arange(s)
        square = lambda x: cut(cut(x, row, t, -2), key, s, -1)
        here, see = jnp.zeros((1, 1)) if bias is None else square(bias), None
        if plan.bias_fn:
            here += plan.bias_fn(bias_params, rows + plan.query_offset, keys).reshape(*plan.groups, t, s)
        if masked:
            segments = cut(q_segments, row, t, -1), cut(kv_segments, key, s, -1)
            see = (rows >= first_row)[:, None] & (keys >= first_key)
            see = visible(plan, see, rows[:, None], keys, square(mask), *segments)
        return add_tile(carry, row, key, here.astype(wide(q)), see), None

    carry, _ = same_axes((carry, q))
    tables = tile_table(plan, q.shape[-2], k.shape[-2], t, s, mask is not None or q_segments is not None)
    for table, masked in zip(tables, (False, True)):
        carry = lax.scan(functools.partial(step, masked=masked), carry, table)[0] if len(table) else carry
    return carry


def forward_tiles(plan: Plan, q, k, v, *rest):
    """The running softmax (Sec. 2, 3). q [...,T,K], k [...,S,K], v [...,S,V] -> [...,T,V], lse [...,T,1]."""
    t, s = plan.chunks[0]

    def add_tile(carry, row, key, bias, see):
        highest, total, out = (cut(x, row, t, -2) for x in carry)  # score [...,t,1], sum of terms, of values
        q_, k_, v_ = (at_least_float32(cut(*x, -2)) for x in ((q, row, t), (k, key, s), (v, key, s)))
        scores = (plan.scale * q_) @ flip(k_) + bias  # [...,t,s]
        scores = scores if see is None else jnp.where(see, scores, -jnp.inf)
        new = lax.stop_gradient(jnp.maximum(highest, scores.max(-1, keepdims=True)))
        terms, shrink = jnp.exp(scores - new), jnp.exp(highest - new)
        parts = new, total * shrink + terms.sum(-1, keepdims=True), out * shrink + terms @ v_
        return tuple(lax.dynamic_update_slice_in_dim(x, part, row, -2) for x, part in zip(carry, parts))

    start = lambda n, value: jnp.full((*q.shape[:-1], n), value, wide(q))
    carry = start(1, LEAST), start(1, 0), start(v.shape[-1], 0)
    highest, total, out = scan_tiles(plan, t, s, add_tile, carry, q, k, *rest)
    divisor = jnp.where(total > 0, total, 1)  # a query that sees nothing gets zeros
    return out / divisor, jnp.where(total > 0, highest + jnp.log(divisor), -jnp.inf)


def backward_tiles(plan: Plan, saved, cotangents):
    """Gradients of forward_tiles: the weights are exp(scores - lse), no pass must first find their sum. Tiles
    are [...,s,t] here: a CPU multiplies fastest where the left side's last axis is summed."""
    ((q, k, v, *rest), out, lse), (dout, dlse), (t, s) = saved, cotangents, plan.chunks[1]
    bias, *_, bias_params = rest
    q, dout = lax.optimization_barrier((q, dout))  # XLA on a CPU errs in (x @ ones).sum(): hide constants
    delta = flip(jnp.where(lse > -jnp.inf, (out * dout).sum(-1, keepdims=True) - dlse, 0))  # [...,1,T]
    lse, k_flipped = flip(jnp.where(lse > -jnp.inf, lse, -LEAST)), flip(k)

    def add_tile(grads, row, key, bias_, see):
        dq_flipped, dk, dv, dbias, dparams = grads
        q_, k_, v_ = (at_least_float32(cut(*x, -2)) for x in ((q, row, t), (k, key, s), (v, key, s)))
        dout_, k_flipped_ = cut(dout, row, t, -2), at_least_float32(cut(k_flipped, key, s, -1))
        scores = k_ @ flip(plan.scale * q_) + flip(bias_)
        scores = scores if see is None else jnp.where(flip(see), scores, -jnp.inf)
        weights = jnp.exp(scores - cut(lse, row, t, -1))
        dscores = weights * (v_ @ flip(dout_) - cut(delta, row, t, -1))
        dq_flipped = add_at(dq_flipped, k_flipped_ @ dscores, 0, row)
        dk, dv = add_at(dk, dscores @ q_, key, 0), add_at(dv, weights @ dout_, key, 0)
        if bias is not None:
            dbias = add_at(dbias, flip(dscores), row, key)  # a start beyond an axis of 1 is 0
        if plan.bias_fn:
            positions = row + jnp.arange(t) + plan.query_offset, key + jnp.arange(s)
            value, pull = jax.vjp(lambda params: plan.bias_fn(params, *positions), bias_params)
            (more,) = pull(flip(dscores).reshape(-1, *value.shape).sum(0).astype(value.dtype))
            dparams = jax.tree.map(jnp.add, dparams, more)
        return dq_flipped, dk, dv, dbias, dparams

    inputs = flip(q), k, v, bias, bias_params
    grads = jax.tree.map(lambda x: jnp.zeros_like(x, wide(x)), inputs)
    dq_flipped, dk, *others = scan_tiles(plan, t, s, add_tile, grads, q, k, *rest)
    grads = plan.scale * dq_flipped, plan.scale * dk, *others
    dq_flipped, dk, dv, dbias, dparams = jax.tree.map(lambda g, x: g.astype(x.dtype), grads, inputs)
    return flip(dq_flipped), dk, dv, dbias, None, None, None, dparams


attend = jax.custom_vjp(forward_tiles, nondiff_argnums=(0,))  # jax.grad of jax.grad works, jax.jvp is refused
attend.defvjp(lambda plan, *inputs: (results := attend(plan, *inputs), (inputs, *results)), backward_tiles)


def same_axes(tree):
    """Inside shard_map: arrays [...] made to vary over every mesh axis that any of them varies over."""
    axes = frozenset().union(*(jax.typeof(x).mat.varying for x in jax.tree.leaves(tree)))
    missing = lambda x: tuple(axes - jax.typeof(x).mat.varying)
    return jax.tree.map(lambda x: lax.pcast(x, missing(x), to="varying") if missing(x) else x, tree)


def in_turn(function, arrays):
    """function of each index of the first axis. Arrays [n,...], [1,...] if shared -> results [n,...]."""
    shared = {name: x[0] for name, x in arrays.items() if len(x) == 1}
    own = {name: x for name, x in arrays.items() if len(x) > 1}
    if not own:
        return jax.tree.map(lambda y: y[None], function(shared))
    return lax.map(lambda arrays: function(shared | arrays), own)


def over_heads(plan: Plan, function, arrays):
    """function(arrays), each [B|1,G|1,H/G|1,...]; on a CPU head by head: up to 1.8 times as fast."""
    few = arrays["q"].shape[-2] * arrays["k"].shape[-2] < FEW
    if jax.default_backend() != "cpu" or few or plan.bias_fn:  # bias_fn gives all heads at once
        return function(arrays)
    for _ in range(3):
        function = functools.partial(in_turn, function)
    return function(arrays)


def attend_xla(plan: Plan, x: Arrays):
    """attend_reference, with no array of T times S but those passed in. -> [B,T,H,V], lse [B,H,T]."""
    x, (G, R), (B, T) = same_axes(x), plan.groups, x.q.shape[:2]
    q, k, v = (a.swapaxes(1, 2) for a in x[:3])
    k, v = map(at_least_float32, (k, v)) if R > 1 else (k, v)  # their gradients are sums over heads
    split = lambda a: a.reshape(len(a), *((G, R) if a.shape[1] == G * R else (1, 1)), *a.shape[2:])
    names = "q", "bias", "mask", "q_segments", "kv_segments"
    arrays = {name: a for name, a in x._replace(q=q)._asdict().items() if name in names and a is not None}
    arrays = {name: split(a) for name, a in arrays.items()} | {"k": k[:, :, None], "v": v[:, :, None]}
    function = lambda a: attend(plan, *(a.get(name) for name in Arrays._fields[:-1]), x.bias_params)
    out, lse = over_heads(plan, function, arrays)
    return out.reshape(B, G * R, T, -1).swapaxes(1, 2).astype(x.q.dtype), lse.reshape(B, G * R, T)


def chunk_sizes(q, k, plan: Plan, q_chunk=None, kv_chunk=None):
    """(t, s) of the forward and of the backward pass. q [B,T,H,K], k [B,S,G,K]."""
    sizes = ((1024, 512), (512, 1024)) if plan.causal else ((2048, 512), (512, 2048))  # fastest on two cores
    at_once = 1 if jax.default_backend() == "cpu" else len(q) * q.shape[2]  # heads, as in over_heads
    limit = max(64, min(2**17 // at_once, max(plan.window or 2**17, 128)))  # what a window hides is wasted
    even = lambda n, most: -(-n // (64 * -(-n // min(most, limit)))) * 64  # as few chunks, of one length
    size = lambda x, given, most: min(x.shape[1], given or even(x.shape[1], most))
    return tuple((size(q, q_chunk, t), size(k, kv_chunk, s)) for t, s in sizes)


def check(plan: Plan, x: Arrays, q_chunk, kv_chunk):
    """ValueError for arrays [...] or numbers that do not go together."""
    shapes = f"q {x.q.shape}, k {x.k.shape}, v {x.v.shape}"
    require(x.q.ndim == x.k.ndim == x.v.ndim == 4, f"{shapes} are not all [batch,length,heads,size]")
    (B, T, H, K), (S, G) = x.q.shape, x.k.shape[1:3]
    fits = x.k.shape == (B, S, G, K) and x.v.shape[:3] == (B, S, G) and 0 not in (*x.q.shape, *x.k.shape)
    require(fits and x.v.shape[3], f"{shapes} are not [B,T,H,K], [B,S,G,K], [B,S,G,V] without a zero")
    require(H % G == 0, f"{H} heads of q are not a multiple of {G} heads of k and v")
    fits = x.q.dtype == x.k.dtype == x.v.dtype and jnp.issubdtype(x.q.dtype, jnp.floating)
    require(fits, f"q is {x.q.dtype}, k {x.k.dtype}, v {x.v.dtype}, not all of one floating type")
    kinds = {"bias": (jnp.floating, (B, H, T, S)), "mask": (jnp.bool_, (B, H, T, S))}
    kinds |= {"q_segments": (jnp.integer, (B, 1, T)), "kv_segments": (jnp.integer, (B, 1, S))}
    for name, (kind, full) in kinds.items():
        shape, dtype = np.shape(getattr(x, name)), getattr(getattr(x, name), "dtype", kind)
        fits = len(shape) in (0, len(full)) and all(n in (1, m) for n, m in zip(shape, full))
        message = f"{name} is {dtype} {shape}, not {kind.__name__} that broadcasts to {full}"
        require(fits and jnp.issubdtype(dtype, kind), message)
    require((x.q_segments is None) == (x.kv_segments is None), "q_segments and kv_segments need each other")
    numbers = ("q_chunk", q_chunk, 1), ("kv_chunk", kv_chunk, 1), ("window", plan.window, 1)
    for name, n, least in (*numbers, ("query_offset", plan.query_offset, -(2**30))):
        fits = n is None or (isinstance(n, int | np.integer) and least <= n <= 2**30)
        require(fits, f"{name}={n} is no whole number from {least} to {2**30}")
    require(plan.causal or not plan.window, f"window={plan.window} needs causal=True")
    require(plan.bias_fn or x.bias_params is None, "bias_params need bias_fn")
    if plan.bias_fn:
        indices = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (T, S))
        shape = jax.eval_shape(plan.bias_fn, x.bias_params, *indices).shape
        require(shape == (H, T, S), f"bias_fn gives {shape} for {T} queries and {S} keys, not {(H, T, S)}")


def attention(
    q, k, v, *, bias=None, mask=None, causal=False, window=None, query_offset=0, q_segments=None,
    kv_segments=None, scale=None, bias_fn=None, bias_params=None, q_chunk=None, kv_chunk=None,
    implementation="xla", return_lse=False,
):  # fmt: skip
    """softmax(scale q k^T + bias) v over the keys that a query sees. q [B,T,H,K], k [B,S,G,K], v [B,S,G,V] ->
    [B,T,H,V] in q's dtype, computed in float32 at least; G divides H. A query that sees nothing gets zeros.

    bias, mask    float and boolean (True: attend), up to four axes that broadcast to [B,H,T,S]
    causal        query i sees keys 0 ... i + query_offset; with window=w only the last w of those
    q_segments    int [B,T], with kv_segments int [B,S]: a query sees the keys of its own segment
    bias_fn       bias_fn(bias_params, positions, keys) -> [H,t,s]: a bias that is no array. int [t] i +
                  query_offset, int [s]; differentiable in bias_params, a tree of floats, and in nothing else
    scale         1 / sqrt(K) by default
    q_chunk       t; kv_chunk is s. By default 2,048 and 512, backward 512 and 2,048 (causal: 1,024 and 512,
                  512 and 1,024), about the window if less, evened out. Smaller ones need less memory
    return_lse    also log(sum(exp(scores))), natural, [B,H,T], -inf for a query that sees nothing
    implementation   xla and reference (the definition) take everything; pallas takes q, k, v, causal, window,
                  query_offset, scale, return_lse; cudnn takes q, k, v, causal, window, scale
    A score below -1e30 counts as not seen. Call it under jit; numbers are static. A GPU multiplies float32
    as TF32 unless JAX is told otherwise. NotImplementedError for what an implementation does not take, else
    ValueError. In float64 on a CPU use axis B, not jax.vmap: XLA then errs in lse (JAX 0.10.2, 0.12.0.1)."""
    require(implementation in ATTENTION, f"implementation={implementation!r} is none of {[*ATTENTION]}")
    four = lambda a: a if a is None else jnp.asarray(a)[(None,) * (4 - np.ndim(a))]
    row = lambda a: a if a is None else jnp.asarray(a)[:, None]
    q, k, v = map(jnp.asarray, (q, k, v))
    x = Arrays(q, k, v, four(bias), four(mask), row(q_segments), row(kv_segments), bias_params)
    plan = Plan(None, causal, window, query_offset, bias_fn, None, None, return_lse)
    check(plan, x, q_chunk, kv_chunk)
    groups, chunks = (k.shape[2], q.shape[2] // k.shape[2]), chunk_sizes(q, k, plan, q_chunk, kv_chunk)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    out, lse = ATTENTION[implementation](plan._replace(scale=scale, groups=groups, chunks=chunks), x)
    return (out, lse) if return_lse else out


def merge(first, second):
    """Attention over two sets of keys from that over each. 2 x (out [B,T,H,V], lse [B,H,T]) -> the same."""
    lse = jnp.logaddexp(first[1], second[1])
    share = lambda x: jnp.exp(x - jnp.where(lse > -jnp.inf, lse, 0)).swapaxes(1, 2)[..., None]  # [B,T,H,1]
    return sum(out * share(x) for out, x in (first, second)).astype(first[0].dtype), lse


# ==== Kernel: flash attention, tiles of queries against tiles of keys that never leave the chip =============
def tile_scores(plan: Plan, q, k, row, key, length):
    """Scores of a tile, -inf for hidden keys. q [t,K] from query row on, k [s,K] from key on -> [t,s]."""
    scores = plan.scale * jnp.dot(q, k.T, preferred_element_type=jnp.float32)
    rows = row + lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    keys = key + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    return jnp.where(visible(plan, keys < length, rows, keys), scores, -jnp.inf)  # from length on: padding


def seen_tiles(plan: Plan, start, n, backwards=False):
    """Range of n tiles that queries start ... start + TILE - 1 see; backwards: that see these keys."""
    if not plan.causal:
        return 0, n
    near, far = plan.query_offset, plan.query_offset + 1 - (plan.window or 2 * n * TILE)  # keys, from a query
    low, high = (-near, -far) if backwards else (far, near)
    tile = lambda x: jnp.clip(lax.div(x + 4 * n * TILE, TILE) - 4 * n, 0, n)  # floor, also of x < 0
    return tile(start + low), tile(start + TILE - 1 + high + TILE)


def flash_forward_kernel(q_ref, k_ref, v_ref, out_ref, lse_ref, *, plan, length):
    """Program (b, h, i): tile i of a head's queries, all its keys. q [T,K], k [S,K], v [S,V], out [t,V]."""
    row = pl.program_id(2) * TILE
    q = q_ref[pl.ds(row, TILE), :]

    def add_tile(j, carry):  # running maximum and sum of the softmax [t,1], sum of values [t,V]
        (highest, total, out), here = carry, pl.ds(j * TILE, TILE)
        scores = tile_scores(plan, q, k_ref[here, :], row, j * TILE, length)
        new = jnp.maximum(highest, scores.max(1, keepdims=True))
        terms, shrink = jnp.exp(scores - new), jnp.exp(highest - new)
        add = jnp.dot(terms.astype(v_ref.dtype), v_ref[here, :], preferred_element_type=jnp.float32)
        return new, total * shrink + terms.sum(1, keepdims=True), out * shrink + add

    start = jnp.full((TILE, 1), LEAST), jnp.zeros((TILE, 1)), jnp.zeros(out_ref.shape)
    highest, total, out = lax.fori_loop(*seen_tiles(plan, row, len(k_ref) // TILE), add_tile, start)
    divisor = jnp.where(total > 0, total, 1)
    out_ref[...] = out / divisor
    lse_ref[...] = jnp.where(total > 0, highest + jnp.log(divisor), -jnp.inf)


def flash_backward_kernel(q, k, v, dout, lse, delta, dq_ref, dk_ref, dv_ref, *, plan, length):
    """Program (b, h, i): tiles i of dq, dk, dv [t,.], from q, dout, lse, delta [T,.] and k, v [S,.]."""
    start, dot = pl.program_id(2) * TILE, functools.partial(jnp.dot, preferred_element_type=jnp.float32)

    def tile(i, j):  # weights and gradients of scores [t,s] of tile i of queries, j of keys; these tiles
        rows, keys = pl.ds(i, TILE), pl.ds(j, TILE)
        q_, k_, v_, dout_ = q[rows, :], k[keys, :], v[keys, :], dout[rows, :]
        weights = jnp.exp(tile_scores(plan, q_, k_, i, j, length) - lse[rows, :])
        dscores = weights * (dot(dout_, v_.T) - delta[rows, :])
        return weights.astype(q_.dtype), dscores.astype(q_.dtype), q_, k_, dout_

    def of_query(j, dq):
        _, dscores, _, k_, _ = tile(start, j * TILE)
        return dq + dot(dscores, k_)

    def of_key(i, grads):
        weights, dscores, q_, _, dout_ = tile(i * TILE, start)
        return grads[0] + dot(dscores.T, q_), grads[1] + dot(weights.T, dout_)

    n, zeros = len(k) // TILE, (jnp.zeros(dk_ref.shape), jnp.zeros(dv_ref.shape))
    dq = lax.fori_loop(*seen_tiles(plan, start, n), of_query, zeros[0])
    dk, dv = lax.fori_loop(*seen_tiles(plan, start, n, backwards=True), of_key, zeros)
    dq_ref[...], dk_ref[...], dv_ref[...] = plan.scale * dq, plan.scale * dk, dv


def flash_call(kernel, plan: Plan, length, inputs, sizes):
    """kernel on the grid (B, H, tiles). Program (b, h, i) sees a head of each input [B,H|G,n,.], where H / G
    programs share a head of keys, and tile i of each output [B,H,n,size], float32."""
    (B, H, n), kernel = inputs[0].shape[:3], functools.partial(kernel, plan=plan, length=length)
    index = lambda share: lambda b, h, i: (b, lax.div(h, share), 0, 0)
    whole = [pl.BlockSpec((None, None, n, x.shape[3]), index(H // x.shape[1])) for x in inputs]
    tiles = [pl.BlockSpec((None, None, TILE, size), lambda b, h, i: (b, h, i, 0)) for size in sizes]
    shapes = [jax.ShapeDtypeStruct((B, H, n, size), jnp.float32) for size in sizes]
    specs = {"grid": (B, H, n // TILE), "in_specs": whole, "out_specs": tiles, "out_shape": shapes}
    call = functools.partial(pl.pallas_call, kernel, **specs)
    triton = call(compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2))
    # chosen when it is lowered, so that what is exported for a GPU is the kernel and not the interpreter
    return lax.platform_dependent(*inputs, cpu=call(interpret=True), cuda=triton, default=call())


def pad_tiles(x, length):
    """x [B,H,n,K] with zeros to whole tiles of at least length, and K to a power of two, as Triton asks."""
    rows, K = -(-max(length, x.shape[2]) // TILE) * TILE, x.shape[3]
    size = K if K == 1 else max(16, pl.next_power_of_2(K))  # 1: lse and delta, which no product reads
    return jnp.pad(x, ((0, 0), (0, 0), (0, rows - x.shape[2]), (0, size - K)))


def flash_forward(plan: Plan, q, k, v):
    """Flash attention. q [B,H,T,K], k [B,G,S,K], v [B,G,S,V] -> [B,H,T,V], lse [B,H,T,1], float32."""
    inputs = [pad_tiles(x, max(q.shape[2], k.shape[2])) for x in (q, k, v)]
    out, lse = flash_call(flash_forward_kernel, plan, k.shape[2], inputs, (inputs[2].shape[3], 1))
    return out[:, :, : q.shape[2], : v.shape[3]], lse[:, :, : q.shape[2]]


def flash_backward(plan: Plan, saved, cotangents):
    """Gradients of q, k and v. A query that sees nothing has weights exp(-inf - 1e30), zeros."""
    (q, k, v, out, lse), (dout, dlse), n = saved, cotangents, max(saved[0].shape[2], saved[1].shape[2])
    delta = jnp.where(lse > -jnp.inf, (out * dout).sum(-1, keepdims=True) - dlse, 0)
    lse = jnp.where(lse > -jnp.inf, lse, -LEAST)
    inputs = [pad_tiles(x, n) for x in (q, k, v, dout.astype(q.dtype), lse, delta)]
    grads = flash_call(flash_backward_kernel, plan, k.shape[2], inputs, [x.shape[3] for x in inputs[:3]])
    total = lambda g, x: g.reshape(*x.shape[:2], -1, *g.shape[2:]).sum(2)  # over the heads that share x
    crop = lambda g, x: total(g, x)[:, :, : x.shape[2], : x.shape[3]].astype(x.dtype)
    return tuple(map(crop, grads, (q, k, v)))


flash = jax.custom_vjp(flash_forward, nondiff_argnums=(0,))
flash.defvjp(lambda plan, *qkv: (results := flash(plan, *qkv), (*qkv, *results)), flash_backward)


def refuse(implementation, plan: Plan, x: Arrays, *fields):
    """NotImplementedError for an array [...] beside q, k, v, and for bias_fn or these fields of the plan."""
    given = [n for n in Arrays._fields[3:] if getattr(x, n) is not None] + ["x64"] * jax.config.jax_enable_x64
    if given := given + [name for name in ("bias_fn", *fields) if getattr(plan, name)]:
        raise NotImplementedError(f"implementation={implementation!r} takes no {', '.join(given)}: use 'xla'")


def attend_pallas(plan: Plan, x: Arrays):
    """attend_reference as flash kernels. Not yet measured on a GPU. -> [B,T,H,V], lse [B,H,T]."""
    refuse("pallas", plan, x)
    out, lse = flash(plan, *(a.swapaxes(1, 2) for a in x[:3]))
    return out.swapaxes(1, 2).astype(x.q.dtype), lse[..., 0]


def attend_cudnn(plan: Plan, x: Arrays):
    """attend_reference by cuDNN, or NotImplementedError with the reason. -> [B,T,H,V], no lse."""
    refuse("cudnn", plan, x, "query_offset", "return_lse")
    backend, kind, sizes = jax.default_backend(), x.q.dtype, {x.q.shape[-1], x.v.shape[-1]}
    if backend != "gpu" or kind != jnp.bfloat16 or len(sizes) > 1 or not sizes <= set(range(8, 129, 8)):
        need = "a GPU, bfloat16 and one head size of 8, 16 ... 128"
        raise NotImplementedError(f"implementation='cudnn' needs {need}, not {backend}, {kind}, {sizes}")
    options = {"is_causal": plan.causal, "local_window_size": plan.window and (plan.window - 1, 0)}
    return jax.nn.dot_product_attention(*x[:3], scale=plan.scale, implementation="cudnn", **options), None


attention_reference = functools.partial(attention, implementation="reference")
ATTENTION = {"xla": attend_xla, "reference": attend_reference, "pallas": attend_pallas, "cudnn": attend_cudnn}


# ==== Model: a causal Transformer that reads and predicts bytes =============================================
rms_norm = lambda x, scale: x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale


def rotary(x):
    """Positions as rotations: pairs of channels turn with the index of the byte. [B,T,H,K] -> [B,T,H,K]."""
    (T, K), (a, b) = x.shape[1::2], jnp.split(x, 2, axis=-1)
    angle = jnp.arange(T)[:, None, None] * 10_000.0 ** -(jnp.arange(K // 2) / (K // 2))  # [T,1,K/2]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def block(x, weights, config: Config):
    """One block. [B,T,D] -> [B,T,D]."""
    q, k, v = jnp.einsum("btd,dchk->cbthk", rms_norm(x, weights["norm1"]), weights["qkv"])
    y = attention(rotary(q), rotary(k), v, causal=True, implementation=config.implementation)
    x = x + jnp.einsum("bthk,hkd->btd", y, weights["out"])
    y = rms_norm(x, weights["norm2"]).reshape(-1, x.shape[-1])  # [B*T,D]: twice as fast on a CPU
    return x + (jax.nn.gelu(y @ weights["mlp1"]) @ weights["mlp2"]).reshape(x.shape)


def forward(params, tokens, config: Config):
    """Logits of the next byte. tokens int [B,T] -> [B,T,256]."""
    layer = lambda x, weights: (block(x, weights, config), None)
    last = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))  # the byte before each
    x, _ = lax.scan(layer, params["embed"][tokens] + params["before"][last], params["blocks"])
    return rms_norm(x, params["norm"]) @ params["head"]


def loss_fn(params, tokens, config: Config, *, data_axis=None):
    """Mean cross-entropy in bits per byte. tokens int [B,T+1], -1 behind the end of a text -> scalar."""
    logits, targets = forward(params, tokens[:, :-1], config), tokens[:, 1:]
    bits = optax.softmax_cross_entropy_with_integer_labels(logits, targets.clip(0)) / math.log(2)
    sums = jnp.stack([jnp.where(targets < 0, 0, bits).sum(), (targets >= 0).sum()])
    bits, count = lax.psum(sums, data_axis) if data_axis else sums  # sums over the rows of all devices
    return bits / count


# ==== Sharded training: batch over mesh axis "data"; the sequence itself: examples/long_context.py ==========
def sharded_loss(config: Config, mesh):
    """loss_fn of a global batch: (params, tokens [B,T+1]) -> scalar."""
    data_axis = "data" if mesh.shape["data"] > 1 else None  # 1 device: no collectives
    local = lambda params, tokens: loss_fn(params, tokens, config, data_axis=data_axis)
    check = config.implementation != "pallas"  # the kernel's interpreter cannot type mesh axes
    return jax.shard_map(local, mesh=mesh, in_specs=(P(), P(data_axis)), out_specs=P(), check_vma=check)


def make_train_step(config: Config, optimizer, mesh):
    """Jitted (params, opt_state, tokens [B,T+1]) -> (params, opt_state, bits per byte), donating."""
    # Differentiated from outside, through shard_map: that adds the gradients' collectives, none is written.
    value_and_grad = jax.value_and_grad(sharded_loss(config, mesh))

    def step(params, opt_state, tokens):
        loss, grads = value_and_grad(params, tokens)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.jit(step, donate_argnums=(0, 1))


# ==== Demo ==================================================================================================
EXPECTED, MOST = 2.71, 2.85  # bits per byte of held-out text, with the default flags


def load_text(path):  # same in every file
    """Bytes of a text, plain or .gz: uint8 [n], all but the last twentieth, and that. Or ValueError."""
    try:
        text = (gzip.decompress if str(path).endswith(".gz") else bytes)(pathlib.Path(path).read_bytes())
    except Exception as error:  # OSError, EOFError, zlib.error
        raise ValueError(f"--data {path} is no readable text, plain or .gz: {error}") from None
    return np.split(np.frombuffer(text, np.uint8), [len(text) - len(text) // 20])


def temporary(function, *arrays):
    """Compiled for these arrays [...], and the bytes it needs beside them and its results."""
    compiled = (function if hasattr(function, "lower") else jax.jit(function)).lower(*arrays).compile()
    return compiled, compiled.memory_analysis().temp_size_in_bytes


def train_on_text(args):
    """Trains on a text -> bits per byte of what was held out, or NaN. ValueError for a flag that is wrong."""
    for name, n in (("steps", args.steps), ("batch", args.batch), ("context", args.context)):
        require(n >= 1, f"--{name} {n} is not at least 1")
    require(8 <= args.longest <= 16, f"--longest {args.longest} is not from 8 to 16")
    (text, held), T, out = load_text(args.data), args.context, pathlib.Path(args.out)
    require(re.fullmatch(r"data=[1-9]\d*", args.mesh), f"--mesh {args.mesh} is not of the form data=4")
    devices = int(args.mesh[5:])
    fits = os.access(out.parent, os.W_OK) and out.suffix in (".png", ".pdf", ".svg")
    require(fits, f"--out {out} cannot be written: it needs a folder that is there and .png, .pdf or .svg")
    require(args.batch % devices == 0, f"--batch {args.batch} is not a multiple of data={devices}")
    require(len(held) > 1 and len(text) > T + 1, f"{args.data}: {len(text)} bytes are few for --context {T}")
    with contextlib.suppress(RuntimeError):  # too late, devices are in use: they are counted below
        jax.config.update("jax_num_cpu_devices", devices)
    count, kind = jax.device_count(), jax.default_backend()
    kind = f"{count} {kind} device(s)" + ", simulated" * (kind == "cpu" and count > 1)
    require(devices <= count, f"--mesh {args.mesh} asks for more than {kind}")
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    rate = optax.warmup_cosine_decay_schedule(0, args.learning_rate, args.steps // 10 + 1, args.steps + 1)
    config, optimizer = Config(), optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.95))
    params, started = init_params(jax.random.key(args.seed), config), time.time()
    state = jax.device_put((params, optimizer.init(params)), everywhere)  # placed, else it compiles twice
    batch = jax.ShapeDtypeStruct((args.batch, T + 1), jnp.int32, sharding=rows)
    step, ours = temporary(make_train_step(config, optimizer, mesh), *state, batch)
    print(f"{optax.tree.size(params):,} parameters, {kind}, compiled in {time.time() - started:.1f} s")
    plain = make_train_step(dataclasses.replace(config, implementation="reference"), optimizer, mesh)
    plain = temporary(plain, *state, batch)[1]
    print(f"temporaries of a step: {ours / 1e6:,.0f} MB, with plain attention {plain / 1e6:,.0f} MB")
    require(ours <= 1e6 * args.memory, f"a step takes {ours / 1e6:,.0f} MB, over --memory {args.memory}")
    started = time.time()
    for i in range(args.steps):
        starts = np.random.default_rng((args.seed, i)).integers(len(text) - T, size=(args.batch, 1))
        *state, loss = step(*state, jax.device_put(text[starts + np.arange(T + 1)].astype(np.int32), rows))
        if not np.isfinite(loss := float(loss)):
            print(f"step {i + 1}: the loss is {loss}; stopped")
            return math.nan
        if (i + 1) % 20 == 0 or i + 1 == args.steps:
            rate = (i + 1) / (time.time() - started)
            left = f"{args.batch * T * rate:,.0f} bytes/s  {(args.steps - i - 1) / rate:.0f} s left"
            print(f"step {i + 1}/{args.steps}  loss {loss:.3f} bits per byte  {left}", flush=True)
    return evaluate(state[0], held, args.batch, T, jax.jit(sharded_loss(config, mesh)), rows)


def evaluate(params, text, batch, T, loss, rows):
    """Bits per byte of a text uint8 [n] in windows of T bytes; what is missing in the last batch is -1."""
    n, bits = -(-(len(text) - 1) // (batch * T)) * batch, 0.0
    tokens = np.pad(np.int32(text), (0, n * T + 1 - len(text)), constant_values=-1)
    for part in np.arange(n).reshape(-1, batch, 1):
        window = tokens[part * T + np.arange(T + 1)]
        bits += float(loss(params, jax.device_put(window, rows))) * (window[:, 1:] >= 0).sum()
    return bits / (len(text) - 1)


def measure(longest):
    """The paper's experiment, attention on [1,n,1,64] in bfloat16 -> {n: [(temporary bytes, seconds) of
    inference by the definition and here, of the gradient by the definition and here]}."""
    gradient = lambda f: jax.grad(lambda *qkv: f(*qkv).astype(jnp.float32).sum(), (0, 1, 2))
    functions, rows = [attention_reference, attention], {}
    print(f"{'n':>8} {'inference, plain':>23} {'ours':>23} {'gradient, plain':>23} {'ours':>23}")
    for n in (2**i for i in range(8, longest + 1, 2)):
        qkv, rows[n] = jax.random.normal(jax.random.key(0), (3, 1, n, 1, 64), jnp.bfloat16), []
        for function in (*functions, *map(gradient, functions)):
            (compiled, size), seconds = temporary(function, *qkv), []
            while size < 3e9 and len(seconds) < 3 and sum(seconds) < 1:  # beyond, plain attention is not run
                started = time.perf_counter()
                jax.block_until_ready(compiled(*qkv))
                seconds.append(time.perf_counter() - started)
            rows[n].append((size, min(seconds, default=math.nan)))
        cells = (f"{size / 1e6:10,.1f} MB {s * 1e3:6,.0f} ms" for size, s in rows[n])
        print(f"{n:8,}", *cells, flush=True)
    slow = [n for n, row in rows.items() if row[1][1] > row[0][1] or row[3][1] > row[2][1]]
    print(f"ours is slower at n = {slow or 'none'}; nan: over 3 GB, not run")
    return rows


def draw_memory(path, rows):
    """Memory against n, beside what the paper's abstract says of n = 16,384."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no figure without matplotlib: pip install matplotlib")
    figure, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for i, name in enumerate(("plain, inference", "ours, inference", "plain, gradient", "ours, gradient")):
        sizes, style = [row[i][0] / 1e6 for row in rows.values()], f"C{i // 2}{'-' if i % 2 else '--'}o"
        ax.plot(list(rows), sizes, style, label=name)
    for i, n in ((0, 59), (2, 32)) if 2**14 in rows else ():
        ax.plot(2**14, rows[2**14][i][0] / 1e6 / n, f"C{i // 2}*", ms=15, label=f"plain / {n} (abstract)")
    ax.set(xlabel="n (one head of 64, bfloat16)", ylabel="temporary memory, MB", yscale="log")
    ax.set_xscale("log", base=2)
    ax.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"wrote {path}")


def run_length(length, path, rows=8192):
    """Self-attention over the first bytes of a text, embedded at random; so many rows of them at a time."""
    require(length >= 1, f"--length {length} is not at least 1")
    text, rows = np.resize(np.concatenate(load_text(path)), length), min(rows, length)
    q, k, v = (table[text][None, :, None] for table in jax.random.normal(jax.random.key(0), (3, 256, 64)))
    call, size = temporary(attention, q[:, :rows], k, v)
    print(f"{length:,} tokens, {size / 1e6:,.0f} MB of temporaries; {rows:,} tell how long all will take")
    started, worst = time.time(), 0.0
    for i in range(0, length, rows):
        first, done = min(i, length - rows), min(i + rows, length)
        out = np.float64(call(q[:, first : first + rows], k, v)[0, 0, 0])
        scores = np.float64(k[0, :, 0]) @ np.float64(q[0, first, 0]) / 8  # one query of each round in float64
        weights = np.exp(scores - scores.max())
        worst = np.maximum(worst, np.abs(weights @ np.float64(v[0, :, 0]) / weights.sum() - out).max())
        left = (time.time() - started) * (length / done - 1)
        print(f"{done:,} of {length:,} queries, {left:,.0f} s left, largest error {worst:.1e}", flush=True)
    return int(not worst < 1e-5)


def main(argv=None) -> int:
    """Exit status 1 above MOST or --length's 1e-5, or for a loss not finite; 2 for bad input, in one line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for flag, default, text in (
        ("steps", 240, None),
        ("batch", 1, "windows per step, over all devices"),
        ("context", 2048, "bytes in a window"),
        ("learning-rate", 1e-2, "highest of the schedule"),
        ("seed", 0, None),
        ("mesh", "data=1", "devices for the batch"),
        ("data", str(pathlib.Path(__file__).parent / "data/moby_dick.txt.gz"), "a text, plain or .gz"),
        ("out", "memeff_attention.png", "figure"),
        ("memory", 150, "MB of temporaries that a step may take"),
        ("longest", 14, "the table goes up to n = 2 to this power"),
        ("length", None, "only self-attention over so many tokens, as 1048576"),
    ):
        parser.add_argument(f"--{flag}", type=type(default or 0), default=default, help=text)
    args = parser.parse_args(argv)
    try:
        if args.length is not None:
            return run_length(args.length, args.data)
        got = train_on_text(args)
    except ValueError as error:
        print(f"memeff_attention.py: {error}", file=sys.stderr)
        return 2
    draw_memory(args.out, measure(args.longest))
    same = lambda name: getattr(args, name) == parser.get_default(name)
    known = all(map(same, "steps batch context learning_rate seed data memory".split()))
    expected = f"expected {EXPECTED}, at most {MOST}" if known else "expected unknown, at most unknown"
    print(f"result: held-out bits per byte: got {got:.2f}, {expected}")
    return int(not got <= (MOST if known else math.inf))


if __name__ == "__main__":
    sys.exit(main())
