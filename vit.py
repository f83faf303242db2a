"""Vision Transformer: an image is a sequence of patches, read by a plain Transformer encoder.

Paper     Dosovitskiy et al. 2020, "An Image is Worth 16x16 Words", arXiv:2010.11929 v2. Figure 6 is attention
          rollout: Abnar & Zuidema 2020, "Quantifying Attention Flow in Transformers", arXiv:2005.00928 v2.
Here      Patches, class token, positions (Eq. 1), encoder (Eq. 2, 3), representation (Eq. 4), attention
          (App. A), sizes (Table 1), resized positions (Sec. 3.2), recipes (Tables 3, 4), rollout.
Not here  AugReg, ViT-22B, LiT, Mixer; hybrid stem (Sec. 3.1), masked patches (App. B), MAP head, sigmoid.
Differs   From the paper, as the official code does: tanh GELU, LayerNorm epsilon 1e-6, last LayerNorm before
          any pooling, zero head, dropout after the positions too, decay of kernels only, not times the
          learning rate. From the official code: momentum in float32, not bfloat16; new dropout in each
          microbatch; variance as mean squared deviation; positions resize between rectangles too.
Claims    C1 parameter counts (Table 1)   C2 without positions the encoder commutes with patch permutations
          C3 resizing positions to the same grid changes nothing   C4 a zero head starts at log(classes) nats
          C5 rollout rows are distributions   C6 patch embedding is linear in flattened patches (Eq. 1)
          C7 a real trained model looks as in Sec. 4.5   C8 FLOPs linear in depth, attention quadratic in T
Checked   google-research/vision_transformer @ c6de1e5 and google-research/big_vision @ 0127fb6: outputs,
          gradients, optimizer steps, schedules, preprocessing; largest error 1.8e-6 of the largest value.
Read      Config, embed, attention_weights, block, features, attention_rollout, make_train_step, OFFICIAL
Run       python vit.py   74 s on two CPU cores: 97.8 % of 1,000 held-out MNIST digits right, at least 97.0 %
Axes      B batch  T tokens, class token first  S keys  D width  H heads  K head size  F hidden units of MLP
          L blocks  N classes  R representation  C channels.  In shard_map B, H and F are sizes per device.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import sys
import time
from typing import Literal, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import ad_checkpoint, lax
from jax.experimental import multihost_utils, pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.nn.initializers import glorot_uniform, lecun_normal, normal, ones, zeros
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P


# ==== Config ================================================================================================
def require(ok, message):  # same in every file
    """ValueError with the message unless ok."""
    if not ok:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class Config:
    """One Vision Transformer; the defaults are ViT-B/16. ValueError for what cannot be built."""

    image_size: tuple[int, int] = (224, 224)  # height, width in pixels
    patch_size: tuple[int, int] = (16, 16)  # height, width in pixels
    channels: int = 3
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072
    classes: int = 1000  # 0: no head, forward returns the features
    pool: Literal["token", "gap", "none", "token_none"] = "token"  # class token, mean, patches, all tokens
    representation: int | None = None  # width of a tanh layer before the head ("pre-logits")
    position: Literal["learned", "sincos2d", "none"] = "learned"
    class_position: bool = True  # the class token has a position (vision_transformer) or none (big_vision)
    gelu: Literal["tanh", "exact"] = "tanh"  # they differ by up to 5e-4
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"  # of products; all else is at least float32
    remat: bool = True  # recompute most of a block in the backward pass: a sixth of the memory
    attention: Literal["xla", "pallas", "cudnn"] = "xla"

    def __post_init__(self):
        for name, kind in get_type_hints(Config).items():
            value, allowed, least = getattr(self, name), get_args(kind), int(name != "classes")
            fits = get_origin(kind) is not Literal or value in allowed
            require(fits, f"{name}={value!r} is none of {', '.join(map(str, allowed))}")
            fits = kind not in (int, int | None) or value is None or value >= least
            require(fits, f"{name}={value} is not at least {least}")
            require(kind is not float or 0 <= value < 1, f"{name}={value} is not in [0, 1)")
        fits = all(1 <= p <= size and size % p == 0 for size, p in zip(self.image_size, self.patch_size))
        require(fits, f"image_size={self.image_size} is no positive multiple of patch_size={self.patch_size}")
        require(self.width % self.heads == 0, f"width={self.width} is not a multiple of heads={self.heads}")
        fits = self.position != "sincos2d" or (self.width % 4 == 0 and self.width > 4)
        require(fits, f"width={self.width} is not a multiple of 4 above 4, as position='sincos2d' needs")
        fits = self.attention == "xla" or not self.attention_dropout
        require(fits, f"attention={self.attention!r} has no dropout: use 'xla' or attention_dropout=0")

    grid = property(lambda c: (c.image_size[0] // c.patch_size[0], c.image_size[1] // c.patch_size[1]))
    class_token = property(lambda c: c.pool in ("token", "token_none"))


BASE = {"Ti": (192, 12, 3), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "H": (1280, 32, 16)}
SIZES = {  # Table 1; Ti and S came with later releases of the official code. Patch sizes as released
    f"{size}/{patch}": Config(width=D, depth=L, heads=H, mlp=4 * D, patch_size=(patch, patch))
    for size, (D, L, H) in BASE.items()
    for patch in {"Ti": [16], "S": [16, 32], "B": [8, 16, 32], "L": [16, 32], "H": [14]}[size]
}

# ==== Parameters: shape, sharding and initial value of each weight, declared once ===========================
Param = dataclasses.make_dataclass("Param", ["shape", "spec", "init"], frozen=True)  # a leaf of trees
QKV = "query", "key", "value"


def param_table(config: Config) -> dict:
    """Param of each weight, blocks stacked on a leading axis L. In spec, "data" counts with fsdp only."""
    L, D, H, F, N = config.depth, config.width, config.heads, config.mlp, config.classes
    (h, w), C, K, R = config.patch_size, config.channels, D // H, config.representation or D
    T = math.prod(config.grid) + (config.class_token and config.class_position)
    norm = lambda *shape: {"scale": Param(shape, P(), ones), "bias": Param(shape, P(), zeros)}
    dense = lambda kernel, bias: {"kernel": Param(*kernel), "bias": Param(*bias)}
    matrix, split, merge = glorot_uniform(1, 2, 0), glorot_uniform(1, (2, 3), 0), glorot_uniform((1, 2), 3, 0)
    heads = ((L, D, H, K), P(None, "data", "model"), split), ((L, H, K), P(None, "model"), zeros)
    wide, bias = ((L, D, F), P(None, "data", "model"), matrix), lambda n: ((n,), P(), zeros)
    table = {
        "embed": dense(((h, w, C, D), P(None, None, None, "data"), lecun_normal((0, 1, 2), 3)), bias(D)),
        "class": config.class_token and Param((D,), P(), zeros),
        "position": config.position == "learned" and Param((T, D), P(), normal(0.02)),
        "blocks": {
            "norm1": norm(L, D),
            **{name: dense(*heads) for name in QKV},
            "out": dense(((L, H, K, D), P(None, "model", None, "data"), merge), ((L, D), P(), zeros)),
            "norm2": norm(L, D),
            "mlp1": dense(wide, ((L, F), P(None, "model"), normal(1e-6))),
            "mlp2": dense(wide, ((L, D), P(), normal(1e-6))),  # transposed: a faster gradient on a CPU
        },
        "norm": norm(D),
        "pre_logits": config.representation and dense(((D, R), P("data"), lecun_normal()), bias(R)),
        "head": N and dense(((R, N), P("data"), zeros), bias(N)),
    }
    return {name: rows for name, rows in table.items() if rows}


def init_params(key: jax.Array, config: Config) -> dict:
    """Float32 weights drawn from the official distributions. Nested dict, shapes as in param_table."""
    table, treedef = jax.tree.flatten(param_table(config))
    return treedef.unflatten([p.init(k, p.shape) for k, p in zip(jax.random.split(key, len(table)), table)])


# ==== The idea: patches become tokens, tokens attend to each other ==========================================
def preprocess(images, size=None):
    """The official input, bilinear without antialiasing. [B,H,W,C] in [0, 255] -> [B,*size,C] in [-1, 1]."""
    shape = (len(images), *(size or images.shape[1:3]), images.shape[3])
    return jax.image.resize(jnp.asarray(images, jnp.float32), shape, "bilinear", antialias=False) / 127.5 - 1


def patchify(images, patch_size):
    """Cuts images into patches, row by row (Sec. 3.1). [B,H,W,C] -> [B,T,h,w,C]."""
    (B, H, W, C), (h, w) = images.shape, patch_size
    return images.reshape(B, H // h, h, W // w, w, C).swapaxes(2, 3).reshape(B, -1, h, w, C)


def sincos2d(grid, width, temperature=10_000.0):
    """Fixed positions of big_vision: sine and cosine of the column, then of the row. -> [T,D]."""
    frequency = temperature ** -(np.arange(width // 4) / (width // 4 - 1))
    y, x = (side.reshape(-1, 1) * frequency for side in np.mgrid[: grid[0], : grid[1]])
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1).astype(np.float32)


def resize_position_embedding(table, old_grid, new_grid, prefix):
    """Positions on another grid (rows, columns): linear, corners aligned (Sec. 3.2). [prefix+T,D] -> same."""
    table, T = np.asarray(table), math.prod(old_grid)
    require(len(table) == prefix + T, f"{len(table)} positions are not {prefix} + {T} of grid {old_grid}")
    # [new,old] for one side: at each new coordinate a hat function, which is linear interpolation
    hat = lambda old, new: np.maximum(0, 1 - np.abs(np.linspace(0, old - 1, new)[:, None] - np.arange(old)))
    cells = np.einsum("rR,cC,RCd->rcd", *map(hat, old_grid, new_grid), table[prefix:].reshape(*old_grid, -1))
    return np.concatenate([table[:prefix], cells.reshape(-1, table.shape[1]).astype(table.dtype)])


def dropout(key, x, rate):
    """Zeroes values of x [...] with probability rate, the others over 1 - rate. x itself without a key."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def softmax_terms(q, k):
    """exp(q k^T / sqrt(K) - highest) and its sum over the keys. 2 x [B,H,T,K] -> [B,H,T,S], [B,H,T,1]."""
    scores = jnp.einsum("bhtk,bhsk->bhts", q * q.shape[-1] ** -0.5, k)
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    terms = jnp.exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True)))
    return terms, terms.sum(-1, keepdims=True)


def attention_weights(q, k):
    """softmax(q k^T / sqrt(K)) over the keys, at least float32 (Eq. 6). 2 x [B,H,T,K] -> [B,H,T,S]."""
    return jnp.divide(*softmax_terms(q, k))


def attention_reference(q, k, v, key=None, rate=0.0):
    """Mean of v by attention weight, with dropout of the weights (Eq. 7). 3 x [B,H,T,K] -> [B,H,T,K]."""
    terms, total = softmax_terms(q, k)  # divided last: the quotients would be one more [B,H,T,S] array
    out = jnp.einsum("bhts,bhsk->bhtk", dropout(key, terms, rate).astype(v.dtype), v)
    return (out / total).astype(v.dtype)


def attention_rollout(maps):
    """What tokens draw from each input token, through all blocks (Abnar, Sec. 3). [L,B,H,T,T] -> [B,T,T]."""
    layers = (maps.mean(2) + jnp.eye(maps.shape[-1])) / 2  # [L,B,T,T], the identity is the residual
    return functools.reduce(lambda below, layer: layer @ below, layers)


# ==== Kernel: the same attention without the [B,H,T,S] array ================================================
def _attention_kernel(q_ref, k_ref, v_ref, out_ref, *, length, tile):
    """One tile of queries of one head against its keys, tile by tile. q, out [tile,K]; k, v [S,K]."""
    q = q_ref[...]

    def add_tile(i, carry):  # running maximum and sum of the softmax [tile], unnormalised output [tile,K]
        (highest, total, out), here = carry, pl.ds(i * tile, tile)
        scores = jnp.dot(q, k_ref[here, :].T, preferred_element_type=jnp.float32)  # [tile,tile]
        key = i * tile + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        scores = jnp.where(key < length, scores, -1e30)  # keys that only pad; finite, since inf - inf is NaN
        new = jnp.maximum(highest, scores.max(1))
        weights, shrink = jnp.exp(scores - new[:, None]), jnp.exp(highest - new)
        add = jnp.dot(weights.astype(v_ref.dtype), v_ref[here, :], preferred_element_type=jnp.float32)
        return new, total * shrink + weights.sum(1), out * shrink[:, None] + add

    start = (jnp.full(tile, -1e30), jnp.zeros(tile), jnp.zeros(q.shape))
    _, total, out = lax.fori_loop(0, k_ref.shape[0] // tile, add_tile, start)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)


@jax.custom_vjp
def attention_pallas(q, k, v):
    """attention_reference as one kernel, backward by the definition. 3 x [B,H,T,K] -> [B,H,T,K].
    Program (b, h, i) sees query tile i and all keys and values of one head. T is padded to whole tiles and
    masked, K to a power of two. Not yet measured on a GPU."""
    B, H, T, K = q.shape
    tile = min(64, max(16, pl.next_power_of_2(T)))
    padding = ((0, 0), (0, 0), (0, -T % tile), (0, max(16, pl.next_power_of_2(K)) - K))
    q, k, v = (jnp.pad(x, padding) for x in (q * K**-0.5, k, v))
    one = pl.BlockSpec((None, None, tile, q.shape[3]), lambda b, h, i: (b, h, i, 0))
    whole = pl.BlockSpec((None, None, *q.shape[2:]), lambda b, h, i: (b, h, 0, 0))
    specs = {"grid": (B, H, q.shape[2] // tile), "in_specs": [one, whole, whole], "out_specs": one}
    body = functools.partial(_attention_kernel, length=T, tile=tile)
    kernel = functools.partial(pl.pallas_call, body, out_shape=jax.eval_shape(lambda x: x, q), **specs)
    triton = kernel(compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2))
    # chosen when it is lowered, so that what is exported for a GPU is the kernel and not the interpreter
    out = lax.platform_dependent(q, k, v, cpu=kernel(interpret=True), cuda=triton, default=kernel())
    return out[:, :, :T, :K]


pullback = lambda saved, g: jax.vjp(attention_reference, *saved)[1](g)  # of the definition
attention_pallas.defvjp(lambda *qkv: (attention_pallas(*qkv), qkv), pullback)


def attention_cudnn(q, k, v):
    """attention_reference by cuDNN, or NotImplementedError. 3 x [B,H,T,K] -> [B,H,T,K]."""
    backend, K, need = jax.default_backend(), q.shape[-1], "a GPU, bfloat16 and a head size of 8, 16 ... 128"
    if backend != "gpu" or q.dtype != jnp.bfloat16 or K not in range(8, 129, 8):
        raise NotImplementedError(f"attention='cudnn' needs {need}, not {backend}, {q.dtype} and {K}")
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn").swapaxes(1, 2)


# ==== Model =================================================================================================
ATTENTION = {"xla": attention_reference, "pallas": attention_pallas, "cudnn": attention_cudnn}
gelu = jax.checkpoint(jax.nn.gelu, static_argnums=1)  # keeps nothing but its input for the backward pass
mean = functools.partial(jnp.mean, axis=-1, keepdims=True)
rescale = lambda x: lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)  # 1 / deviation, with the official epsilon
standardize = jax.custom_jvp(lambda x: (x - mean(x)) * rescale(x))  # to mean 0, variance 1 over the last axis
standardize.defjvps(lambda dx, y, x: (dx - mean(dx) - y * mean(y * dx)) * rescale(x))  # fewer arrays are kept
layer_norm = lambda x, weights: standardize(x) * weights["scale"] + weights["bias"]  # [...,D] -> [...,D]


def linear(x, weights, dtype, axes=1, model_axis=None):
    """x times kernel plus bias. [...,I] x [I,O] -> [...,O], I of so many axes, maybe cut over model_axis."""
    kernel, leading = weights["kernel"], x.shape[: x.ndim - axes]
    inputs = math.prod(kernel.shape[:axes])
    y = x.reshape(-1, inputs).astype(dtype) @ kernel.reshape(inputs, -1).astype(dtype)  # fast on a CPU: 2D
    if model_axis:
        y = lax.psum(y.astype(jnp.promote_types(dtype, jnp.float32)), model_axis)  # sums over all inputs
    return (y + weights["bias"].reshape(-1).astype(y.dtype)).reshape(*leading, *kernel.shape[axes:])


def gather(weights, table, data_axis):
    """Makes whole what fsdp cut over the mesh axis "data". Tree of arrays [...] -> same tree."""

    def whole(weight, param):
        for i, name in enumerate(param.spec):
            axis = i + weight.ndim - len(param.shape)  # a block's weight has lost the axis L
            if data_axis and name == "data" and weight.shape[axis] < param.shape[i]:
                weight = lax.all_gather(weight, data_axis, axis=axis, tiled=True)  # brings the others' parts
        return weight

    return jax.tree.map(whole, weights, table)


def block(x, weights, config: Config, key=None, data_axis=None, model_axis=None):
    """One block, over this device's heads and hidden units. [B,T,D] -> [B,T,D], and q, k [B,H,T,K]."""
    weights = gather(weights, param_table(config)["blocks"], data_axis)
    weights["mlp2"]["kernel"] = weights["mlp2"]["kernel"].T  # [F,D]
    keys = [None] * 4 if key is None else list(jax.random.split(key, 4))
    if key is not None and model_axis:  # each device draws for its own heads and hidden units
        keys[:2] = [jax.random.fold_in(k, lax.axis_index(model_axis)) for k in keys[:2]]
    qkv = jax.tree.map(lambda *w: jnp.stack(w, -3), *(weights[name] for name in QKV))
    y = linear(layer_norm(x, weights["norm1"]), qkv, config.dtype)  # [B,T,3,H,K]
    q, k, v = y.transpose(2, 0, 3, 1, 4)  # [B,H,T,K]: heads before tokens, twice as fast on a CPU
    noise = (keys[0], config.attention_dropout) if config.attention_dropout else ()
    y = ATTENTION[config.attention](q, k, v, *noise).swapaxes(1, 2)  # [B,T,H,K]
    y = linear(y, weights["out"], config.dtype, axes=2, model_axis=model_axis)
    x = ad_checkpoint.checkpoint_name(x + dropout(keys[2], y, config.dropout), "middle")  # Eq. 2
    y = linear(layer_norm(x, weights["norm2"]), weights["mlp1"], config.dtype)  # [B,T,F]
    y = dropout(keys[1], gelu(y, config.gelu == "tanh"), config.dropout)
    y = linear(y, weights["mlp2"], config.dtype, model_axis=model_axis)
    return x + dropout(keys[3], y, config.dropout), (q, k)  # Eq. 3


def embed(params, images, config: Config):
    """Tokens: class token first, patches times E, plus positions (Eq. 1). [B,H,W,C] in [-1, 1] -> [B,T,D]."""
    size, traced = (*config.image_size, config.channels), isinstance(images, jax.core.Tracer)
    require(images.shape[1:] == size, f"images {images.shape} are not [B, {', '.join(map(str, size))}]")
    low, high = (0, 0) if traced else (float(images.min()), float(images.max()))  # no values under jit
    fits = jnp.issubdtype(images.dtype, jnp.floating) and -1.001 < low <= high < 1.001
    require(fits, f"images are {images.dtype} from {low:.4g} to {high:.4g}, not floats in [-1, 1]")
    x = linear(patchify(images, config.patch_size), params["embed"], config.dtype, axes=3)
    x = x.astype(jnp.promote_types(config.dtype, jnp.float32))
    if config.class_token:
        x = jnp.concatenate([jnp.broadcast_to(params["class"], (len(x), 1, config.width)), x], axis=1)
    if config.position == "none":
        return x
    table = params["position"] if config.position == "learned" else sincos2d(config.grid, config.width)
    return x + jnp.pad(table, ((x.shape[1] - len(table), 0), (0, 0)))  # a class token without position gets 0


def forward(params, images, config: Config, *, key=None, data_axis=None, model_axis=None):
    """Logits. images [B,H,W,C] in [-1, 1] -> [B,N]; pools "none", "token_none": [B,T,N], class token first.
    A key turns dropout on. Axes are mesh axes, inside shard_map: a block sums twice over model_axis and, with
    fsdp, gathers its 6 kernels over data_axis. ValueError for images of another shape, dtype or range."""
    table = param_table(config)
    outer = {name: gather(params[name], table[name], data_axis) for name in table if name != "blocks"}
    if key is not None and data_axis:
        key = jax.random.fold_in(key, lax.axis_index(data_axis))  # other rows, other draws
    keys = (None, None) if key is None else (key, jax.random.split(jax.random.fold_in(key, 0), config.depth))
    layer = lambda x, inputs: (block(x, inputs[0], config, inputs[1], data_axis, model_axis)[0], None)
    keep = jax.checkpoint_policies.save_only_these_names("middle")  # and the input: the rest is recomputed
    layer = jax.checkpoint(layer, prevent_cse=False, policy=keep) if config.remat else layer
    x = dropout(keys[0], embed(outer, images, config), config.dropout)
    x, _ = lax.scan(layer, x, (params["blocks"], keys[1]))
    x = layer_norm(x, outer["norm"])
    if config.pool in ("token", "gap"):
        x = x[:, 0] if config.pool == "token" else x.mean(1)  # [B,D], Eq. 4
    if config.representation:
        x = jnp.tanh(linear(x, outer["pre_logits"], config.dtype)).astype(x.dtype)
    return linear(x, outer["head"], config.dtype).astype(x.dtype) if config.classes else x


def features(params, images, config: Config, **options):
    """What the head sees, arguments as forward. [B,H,W,C] -> [B,D], or [B,R] after pre-logits; [B,T,...]."""
    return forward(params, images, dataclasses.replace(config, classes=0), **options)


def attention_maps(params, images, config: Config):
    """Attention weights of every block by the definition. images [B,H,W,C] in [-1, 1] -> [L,B,H,T,T]."""
    layer = lambda x, weights: block(x, weights, dataclasses.replace(config, attention="xla"))
    _, (q, k) = lax.scan(layer, embed(params, images, config), params["blocks"])
    return jax.vmap(attention_weights)(q, k)


def loss_fn(params, images, labels, config: Config, *, key=None, data_axis=None, model_axis=None):
    """Mean softmax cross-entropy in nats. images [B,H,W,C] in [-1, 1], labels int [B] or [B,T] -> scalar."""
    logits = forward(params, images, config, key=key, data_axis=data_axis, model_axis=model_axis)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return lax.pmean(loss, data_axis) if data_axis else loss  # mean over the rows of all devices


# ==== Sharded training: batch over mesh axis "data", heads and hidden units over "model" ====================
FIELDS = "optimizer batch steps learning_rate decay warmup weight_decay clip dropout source"
Recipe = collections.namedtuple("Recipe", FIELDS)  # weight_decay: as in the paper, times the learning rate
RECIPES = {  # of B/16. Pre-training at 224 pixels, epochs turned into steps; fine-tuning at 384 pixels
    "ImageNet-21k": Recipe("adam", 4096, 312_000, 1e-3, "linear", 10_000, 0.03, None, 0.1, "quoted: Table 3"),
    "ImageNet": Recipe("adam", 4096, 93_800, 3e-3, "cosine", 10_000, 0.3, 1.0, 0.1, "quoted: Table 3"),
    "to ImageNet": Recipe("sgd", 512, 20_000, 0.03, "cosine", 500, 0.0, 1.0, 0.0, "quoted: Table 4"),
    "to CIFAR": Recipe("sgd", 512, 10_000, 0.01, "cosine", 500, 0.0, 1.0, 0.0, "quoted: Table 4"),
    "digits": Recipe("adam", 128, 1_200, 2e-3, "cosine", 60, 0.3, 1.0, 0.0, "reproduced: python vit.py"),
}


def schedule(base, steps, warmup=0, decay="cosine", end=1e-5):
    """Learning rate: linear warm-up from 0, times cosine to 0 or linear to end. -> function of the step."""
    done = lambda step: jnp.clip((step - warmup) / max(steps - warmup, 1), 0, 1)
    rise = lambda step: jnp.minimum(1, step / warmup) if warmup else 1
    if decay == "cosine":
        return lambda step: rise(step) * base * (1 + jnp.cos(jnp.pi * done(step))) / 2
    return lambda step: rise(step) * (end + (base - end) * (1 - done(step)))


def make_optimizer(recipe: Recipe, momentum_dtype=None) -> optax.GradientTransformation:
    """The official chain: Adam with decay of the kernels by the schedule alone, or SGD with momentum 0.9."""
    clip = optax.clip_by_global_norm(recipe.clip) if recipe.clip else optax.identity()
    rate = functools.partial(schedule, steps=recipe.steps, warmup=recipe.warmup, decay=recipe.decay)
    if recipe.optimizer == "sgd":
        return optax.chain(clip, optax.sgd(rate(recipe.learning_rate), 0.9, accumulator_dtype=momentum_dtype))
    kernels = functools.partial(jax.tree_util.tree_map_with_path, lambda path, _: path[-1].key == "kernel")
    adam = optax.scale_by_adam(b1=0.9, b2=0.999, mu_dtype=momentum_dtype), optax.scale(recipe.learning_rate)
    decay = optax.add_decayed_weights(recipe.weight_decay * recipe.learning_rate, mask=kernels)
    return optax.chain(clip, *adam, decay, optax.scale_by_schedule(rate(-1.0, end=-1e-5)))


def param_specs(config: Config, mesh, fsdp=False) -> dict:
    """PartitionSpec of each weight, as a tree. ValueError where the mesh does not divide a weight."""
    require(config.remat or not fsdp, "fsdp=True needs remat=True: else every gathered weight is kept")
    table, used = param_table(config), [a for a in mesh.shape if mesh.shape[a] > 1 and (fsdp or a == "model")]
    for name, param in named_leaves(table).items():
        for size, axis in zip(param.shape, param.spec):
            n = mesh.shape[axis] if axis in used else 1
            require(size % n == 0, f"{name} {param.shape}: {size} is not a multiple of mesh axis {axis}={n}")
    trim = lambda axes: trim(axes[:-1]) if axes and not axes[-1] else P(*axes)  # as jit itself does
    return jax.tree.map(lambda param: trim([axis if axis in used else None for axis in param.spec]), table)


def init_state(key, config: Config, optimizer, mesh, fsdp=False):
    """Parameters and optimizer state, each made where it belongs: else the step would compile twice."""
    init = lambda key: (params := init_params(key, config), optimizer.init(params))
    specs, slots = param_specs(config, mesh, fsdp), jax.eval_shape(init, key)[1]
    slots = optax.tree_map_params(optimizer, lambda _, s: s, slots, specs, transform_non_params=lambda _: P())
    return jax.jit(init, out_shardings=jax.tree.map(lambda s: NamedSharding(mesh, s), (specs, slots)))(key)


def on_mesh(function, config: Config, mesh, fsdp=False):
    """loss_fn, or another sum over a global batch: (params, images [B,H,W,C], labels [B], key) -> scalar."""
    axes = {f"{axis}_axis": axis for axis, n in mesh.shape.items() if n > 1}  # 1 device: no collectives
    local = lambda params, images, labels, key: function(params, images, labels, config, key=key, **axes)
    specs = (param_specs(config, mesh, fsdp), *[P(axes.get("data_axis"))] * 2, P())
    check = config.attention != "pallas"  # the kernel's interpreter cannot type mesh axes
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check)


def make_train_step(config: Config, optimizer, mesh, *, fsdp=False, accumulate=1):
    """Jitted (params, opt_state, images [B,H,W,C], labels [B], key) -> (params, opt_state, loss in nats).
    The first two are donated. B is cut over "data", and the rows of a device into microbatches that run in
    turn, each with its own reduction of gradients. fsdp cuts weights and optimizer state over "data" too."""
    # Differentiated from outside, through shard_map: that adds the gradients' collectives, none is written.
    value_and_grad = jax.value_and_grad(on_mesh(loss_fn, config, mesh, fsdp))
    rows, n, placed = mesh.shape["data"], accumulate, NamedSharding(mesh, P(None, "data"))
    # [B,...] -> [n,B/n,...]: each device cuts its own rows, nothing moves
    cut = lambda x: x.reshape(rows, n, -1, *x.shape[1:]).swapaxes(0, 1).reshape(n, -1, *x.shape[1:])

    def step(params, opt_state, images, labels, key):
        fits = len(images) % (rows * n) == 0
        require(fits, f"batch {len(images)} is not a multiple of data={rows} x {accumulate=}")
        if n == 1:
            loss, grads = value_and_grad(params, images, labels, key)
        else:
            add = lambda total, b: (optax.tree.add_scale(total, 1 / n, value_and_grad(params, *b)), None)
            images, labels = lax.with_sharding_constraint((cut(images), cut(labels)), placed)
            zero, keys = jax.tree.map(jnp.zeros_like, (jnp.float32(0), params)), jax.random.split(key, n)
            (loss, grads), _ = lax.scan(add, zero, (images, labels, keys))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.jit(step, donate_argnums=(0, 1))


# ==== Checkpoints: official names and ours ==================================================================
OFFICIAL = {"embed": "embedding", "class": "cls", "position": "Transformer/posembed_input/pos_embedding"}
OFFICIAL |= {name: f"MultiHeadDotProductAttention_1/{name}" for name in (*QKV, "out")}
OFFICIAL |= {"norm1": "LayerNorm_0", "norm2": "LayerNorm_2", "norm": "Transformer/encoder_norm"}
OFFICIAL |= {"mlp1": "MlpBlock_3/Dense_0", "mlp2": "MlpBlock_3/Dense_1"}  # ours -> released
NEWER = {"LayerNorm_2": "LayerNorm_1", "MlpBlock_3": "MlpBlock_0", OFFICIAL["position"]: "pos_embedding"}
NEWER |= {"MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0"}  # -> of big_vision


def official_names(config: Config) -> dict:
    """Released name -> (our path, function of that weight: a view of the official shape)."""
    names = {}
    for path in named_leaves(param_table(config)):
        top, *rest = path.split("/")
        for i in range(config.depth) if top == "blocks" else ():
            view = (lambda x, i=i: x[i].T) if path == "blocks/mlp2/kernel" else (lambda x, i=i: x[i])
            names[f"Transformer/encoderblock_{i}/{OFFICIAL[rest[0]]}/{rest[1]}"] = path, view
        if top != "blocks":
            index = {"class": (None, None), "position": None}.get(top, ...)  # [1,1,D] and [1,T,D]
            names["/".join([OFFICIAL.get(top, top), *rest])] = path, lambda x, index=index: x[index]
    return names


def check_names(found, wanted, where):  # same in every file
    """ValueError for an array that is missing, unknown or misshaped. Two dicts of name -> array [...]."""
    for name in sorted(found.keys() | wanted.keys()):
        shapes = [np.shape(arrays[name]) if name in arrays else "nothing" for arrays in (found, wanted)]
        require(shapes[0] == shapes[1], f"{where}: {name} is {shapes[0]}, should be {shapes[1]}")


def from_official(flat, config: Config) -> dict:
    """Parameters, or gradients, from arrays [...] under either official names. float32, on the host."""
    for old, new in NEWER.items():
        flat = {name if old in name else name.replace(new, old): array for name, array in flat.items()}
    params = jax.tree.map(lambda param: np.empty(param.shape, np.float32), param_table(config))
    leaves = named_leaves(params)
    places = {name: view(leaves[path]) for name, (path, view) in official_names(config).items()}
    check_names(flat, places, "checkpoint")
    for name, place in places.items():
        place[...] = flat[name]
    return params


def to_official(tree, config: Config, layout="vit") -> dict:
    """The inverse of from_official: numpy arrays [...] named as released ("vit") or as in "big_vision"."""
    stored, here = config.class_token and config.position == "learned", config.class_position
    fits = layout in ("vit", "big_vision") and (not stored or here == (layout == "vit"))
    require(fits, f"layout={layout!r}, class_position={here} is neither 'vit', True nor 'big_vision', False")
    flat, leaves = {}, named_leaves(tree)
    for name, (path, view) in official_names(config).items():
        for old, new in NEWER.items() if layout == "big_vision" else ():
            name = name.replace(old, new)
        flat[name] = view(np.asarray(leaves[path]))
    return flat


def adapt(params, config: Config, new: Config) -> dict:
    """A checkpoint for fine-tuning (Sec. 3.2): positions [T,D] resized or folded into class, head zeroed."""
    for name in "patch_size channels width depth heads mlp pool position gelu representation".split():
        old, now = getattr(config, name), getattr(new, name)
        fits = old == now or (name == "representation" and now is None)
        require(fits, f"a checkpoint of {name}={old} cannot become {name}={now}")
    params = {name: params[name] for name in param_table(new) if name in params}
    if new.position == "learned":
        had, has = (int(c.class_token and c.class_position) for c in (config, new))
        require(had >= has, "class_position=False cannot become True")
        table = resize_position_embedding(params["position"], config.grid, new.grid, had)
        if had > has:
            params["class"] = params["class"] + table[0]
        params["position"] = table[had - has :]
    if new.classes:
        params["head"] = jax.tree.map(lambda p: np.zeros(p.shape, np.float32), param_table(new)["head"])
    return params


def write_npz(path, arrays):  # same in every file
    """Writes named arrays [...] whole or not at all: to a temporary file beside path, then renamed."""
    with open(part := f"{path}.{os.getpid()}.part", "wb") as file:
        np.savez(file, **arrays)
    os.replace(part, path)


def read_npz(path) -> dict:  # same in every file
    """The named arrays [...] of an .npz. ValueError if it is missing, truncated, no .npz or holds pickles."""
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # numpy lets through what zipfile, zlib, pickle and the system raise
        raise ValueError(f"{path} is not a readable .npz of plain arrays: {error}") from None


def save(path, params, config: Config):
    """Writes params [...] as an .npz under official names, which load and the official code read."""
    write_npz(path, to_official(params, config, "vit" if config.class_position else "big_vision"))


def load(path, config: Config) -> dict:
    """Parameters [...] from an official .npz. ValueError for one missing, unknown, misshaped, not finite."""
    for name, array in (flat := read_npz(path)).items():
        require(np.isfinite(array).all(), f"{path}: {name} holds values that are not finite")
    return from_official(flat, config)


def named_leaves(tree) -> dict:  # same in every file
    """Path -> leaf of any tree of arrays [...]."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def save_state(path, tree, flags):  # same in every file
    """Writes a training state, any tree of arrays [...], and the flags that made it. Whole or not at all."""
    write_npz(path, {**named_leaves(tree), "flags": json.dumps(flags)})


def load_state(path, like, flags):  # same in every file
    """The tree of save_state, arrays [...] on the host. ValueError unless it fits like and the flags."""
    arrays = read_npz(path)
    saved = json.loads(str(arrays.pop("flags", "{}")))
    for name, value in flags.items():
        require(saved.get(name) == value, f"{path} was made with {name}={saved.get(name)}, not {value}")
    check_names(arrays, wanted := named_leaves(like), path)
    for name, leaf in wanted.items():
        kind = arrays[name].dtype
        require(kind.kind == "V" or kind == leaf.dtype, f"{path}: {name} is {kind}, should be {leaf.dtype}")
    leaves = [arrays[name].view(leaf.dtype) for name, leaf in wanted.items()]  # bfloat16 is read as raw bytes
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


# ==== Demo ==================================================================================================
DIGITS = Config(width=128, depth=3, heads=4, mlp=256, patch_size=(7, 7))
EXPECTED, FLOOR = 97.8, 97.0  # per cent of 1,000 held-out digits, with the default flags


def load_data(path):
    """Pictures uint8 [N,H,W,C], labels [N], number of classes. ValueError for what cannot be trained on."""
    data = read_npz(path) if os.path.exists(path) else {}
    require({"images", "labels"} <= set(data), f"{path} has no images and labels: data/convert.py makes such")
    images, labels = data["images"], data["labels"]
    images = images[..., None] if images.ndim == 3 else images  # grey
    fits = images.dtype == np.uint8 and images.ndim == 4 and len(images) > 1
    fits = fits and labels.dtype.kind in "iu" and labels.shape == images.shape[:1]
    kinds = f"{images.dtype} {images.shape} and {labels.dtype} {labels.shape}"
    require(fits, f"{path}: images and labels are {kinds}, not uint8 [N,H,W] or [N,H,W,C] and integers [N]")
    low, high = int(labels.min()), int(labels.max())
    classes = len(data["class_names"]) if "class_names" in data else min(high + 1, len(images))
    require(0 <= low <= high < classes, f"{path}: labels are {low} to {high}, not within 0 to {classes - 1}")
    order = np.random.default_rng(0).permutation(len(images))  # files are sorted by label
    return images[order], labels[order].astype(np.int32), classes


def place(mesh, images, labels):
    """A batch on the mesh, uint8 [B,H,W,C] -> float32 in [-1, 1], int [B]. Each process places its rows."""
    rows, f = NamedSharding(mesh, P("data")), jax.make_array_from_callback
    scaled = f(images.shape, rows, lambda i: images[i].astype(np.float32) / 127.5 - 1)
    return scaled, f(labels.shape, rows, lambda i: labels[i])


def prepare(args, flags):
    """All that train needs, checked and compiled. ValueError for what a flag, file or mesh gets wrong."""
    for name in ("steps", "batch", "accumulate", "every"):
        require(getattr(args, name) >= 1, f"--{name} {getattr(args, name)} is not at least 1")
    match = re.fullmatch(r"data=([1-9]\d*),model=([1-9]\d*)", args.mesh)
    require(match, f"--mesh {args.mesh} is not of the form data=4,model=2")
    out, shape = pathlib.Path(args.out), tuple(map(int, match.groups()))
    fits = os.access(out.parent, os.W_OK) and out.suffix in (".png", ".pdf", ".svg")
    require(fits, f"--out {out} cannot be written: it needs a folder that is there and .png, .pdf or .svg")
    require(args.size in ("digits", *SIZES), f"--size {args.size} is none of digits, {', '.join(SIZES)}")
    fits = args.batch % (shape[0] * args.accumulate) == 0
    require(fits, f"--batch {args.batch} is not a multiple of data={shape[0]} x accumulate={args.accumulate}")
    images, labels, classes = load_data(args.data)
    config = {"image_size": images.shape[1:3], "channels": images.shape[3], "classes": classes}
    config = dataclasses.replace(SIZES.get(args.size, DIGITS), **config)
    join = args.distributed.split(",") if args.distributed else []
    with contextlib.suppress(RuntimeError):  # too late, devices are in use: they are counted below
        jax.config.update("jax_num_cpu_devices", max(1, math.prod(shape) // int((join or "11")[1])))
    if args.distributed is not None:
        jax.distributed.initialize(*join[:1], *map(int, join[1:]))
    count, kind = jax.device_count(), jax.default_backend()
    kind = f"{count} {kind} device(s)" + ", simulated" * (kind == "cpu" and count > 1)
    require(math.prod(shape) <= count, f"--mesh {args.mesh} asks for more than {kind}")
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    recipe = RECIPES["digits"]._replace(steps=args.steps, learning_rate=args.learning_rate)
    optimizer, key, started = make_optimizer(recipe), jax.random.key(args.seed), time.time()
    state = *init_state(key, config, optimizer, mesh, args.fsdp), jnp.int32(0)  # weights, slots, steps done
    if args.resume:
        loaded = load_state(out.with_suffix(".state.npz"), state, flags)
        state = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), loaded, state)
    step = make_train_step(config, optimizer, mesh, fsdp=args.fsdp, accumulate=args.accumulate)
    batch = (np.resize(x, (args.batch, *x.shape[1:])) for x in (images, labels))
    step = step.lower(*state[:2], *place(mesh, *batch), key).compile()
    print(f"{optax.tree.size(state[0]):,} parameters, {kind}, compiled in {time.time() - started:.1f} s")
    return config, mesh, step, state, images, labels


def train(args, flags, config, mesh, step, state, images, labels):
    """Trains on uint8 [N,H,W,C], int [N], saves and draws. -> per cent right of those held out, or NaN."""
    (params, opt_state, first), out, key = state, pathlib.Path(args.out), jax.random.key(args.seed)
    fetch = functools.partial(multihost_utils.process_allgather, tiled=True)  # by all processes together
    (H, W), held, started = config.image_size, min(1000, len(images) // 5), time.time()
    y, x, pad = np.arange(H)[:, None], np.arange(W), 3 + (H + W) // 12
    padded = np.pad(images[held:], ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")
    for i in range(int(first), args.steps):
        rng = np.random.default_rng((args.seed, i))  # by seed and step alone: --resume goes on alike
        rows, dy, dx = rng.integers(np.reshape([len(padded), 5, 5], (3, 1, 1, 1)), size=(3, args.batch, 1, 1))
        a = rng.uniform(-0.15, 0.15, (4, args.batch, 1, 1))  # each picture is shifted, stretched and slanted
        down = pad - 2 + dy + y + a[0] * (y - H / 2) + a[1] * (x - W / 2)
        across = pad - 2 + dx + x + a[2] * (x - W / 2) + a[3] * (y - H / 2)
        pictures = padded[rows, np.rint(down).astype(int), np.rint(across).astype(int)]
        batch = place(mesh, pictures, labels[held:][rows.ravel()])
        params, opt_state, loss = step(params, opt_state, *batch, jax.random.fold_in(key, i))
        if not np.isfinite(loss := float(loss)):
            print(f"step {i + 1}: the loss is {loss}; stopped, and the last good training state is kept")
            return math.nan
        if (i + 1) % args.every == 0 or i + 1 == args.steps:
            state = *fetch((params, opt_state)), np.int32(i + 1)
            if jax.process_index() == 0 and all(np.isfinite(x).all() for x in jax.tree.leaves(state)):
                save_state(out.with_suffix(".state.npz"), state, flags)
            rate = (i + 1 - first) / (time.time() - started)
            left = f"{args.batch * rate:,.0f} images/s  {(args.steps - i - 1) / rate:.0f} s left"
            print(f"step {i + 1}/{args.steps}  loss {loss:.3f} nats  {left}", flush=True)
    # outside shard_map: XLA itself cuts this sum over the mesh, where weights and rows lie
    count, right = jax.jit(lambda p, x, y: (forward(p, x, config).argmax(-1) == y).sum()), 0
    for i in range(0, held, args.batch):  # the last batch is padded with pictures that have no label
        rows = np.arange(i, i + args.batch)
        answers = np.where(rows < held, labels[rows % held], -1)
        right += int(count(params, *place(mesh, images[rows % held], answers)))
    params = fetch(params)
    if jax.process_index() == 0:
        save(out.with_suffix(".model.npz"), params, config)
        one = np.unique(labels[:held], return_index=True)[1][:10]  # the first of each class
        draw(out, params, config, images[one], labels[one])
    return 100 * right / held


def draw(path, params, config: Config, images, labels):
    """Pictures uint8 [N,H,W,C] with their predictions, and below where the class token looks, by rollout."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no figure without matplotlib: pip install matplotlib")
    look = jax.jit(lambda p, x: (forward(p, x, config).argmax(-1), attention_maps(p, x, config)))
    guesses, maps = look(params, preprocess(images))
    heat = attention_rollout(maps)[:, 0, 1:].reshape(-1, *config.grid)  # from class token to patches
    figure, axes = plt.subplots(2, len(images), figsize=(1.2 * len(images), 3), layout="constrained")
    for i, (top, bottom) in enumerate(axes.T):
        top.set_title(f"{guesses[i]}" if guesses[i] == labels[i] else f"{guesses[i]}, not {labels[i]}")
        for ax in (top, bottom):
            ax.imshow(images[i].squeeze(), cmap="gray")
            ax.set_axis_off()
        bottom.imshow(jax.image.resize(heat[i], config.image_size, "bilinear"), cmap="inferno", alpha=0.7)
    figure.suptitle("Held-out pictures with predictions; below, where the class token looks (rollout)")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"wrote {path}")


def main(argv=None) -> int:
    """Exit status 1 below the floor or when the loss is not finite, 2 for bad input, told in one line."""
    parser, recipe = argparse.ArgumentParser(description=__doc__.partition("\n")[0]), RECIPES["digits"]
    for flag, default, text in (
        ("steps", recipe.steps, None),
        ("batch", recipe.batch, "pictures per step, over all devices"),
        ("accumulate", 1, "microbatches per step"),
        ("learning-rate", recipe.learning_rate, "highest of the schedule"),
        ("seed", 0, None),
        ("mesh", "data=1,model=1", "devices for the batch, and for heads and hidden units"),
        ("data", str(pathlib.Path(__file__).parent / "data/mnist5k.npz"), ".npz: data/convert.py makes one"),
        ("out", "vit.png", "figure; beside it go the model (.model.npz) and the training state (.state.npz)"),
        ("size", "digits", f"digits, {', '.join(SIZES)}"),
        ("every", 100, "steps between progress lines, each with a training state"),
    ):
        parser.add_argument(f"--{flag}", type=type(default), default=default, help=text)
    parser.add_argument("--fsdp", action="store_true", help="cut weights and optimizer state over data too")
    parser.add_argument("--resume", action="store_true", help="go on from the training state beside --out")
    parser.add_argument("--distributed", nargs="?", const="", metavar="HOST:PORT,COUNT,INDEX")
    args = parser.parse_args(argv)
    flags = {k: v for k, v in vars(args).items() if k not in ("out", "resume", "distributed", "every")}
    try:
        ready = prepare(args, flags)
    except ValueError as error:
        print(f"vit.py: {error}", file=sys.stderr)
        return 2
    known, got = all(v == parser.get_default(k) for k, v in flags.items()), train(args, flags, *ready)
    expected = f"expected {EXPECTED} %, at least {FLOOR} %" if known else "expected unknown, at least unknown"
    print(f"result: held-out accuracy: got {got:.1f} %, {expected}")
    return int(not got >= (FLOOR if known else 0))


if __name__ == "__main__":
    sys.exit(main())
