"""Vision Transformer: an image is a sequence of patches, read by a plain Transformer encoder.

    flat = read_npz("B_16.npz")                     # a released checkpoint
    config = infer_config(flat)                     # its sizes, read from the shapes
    params = jax.device_put(from_official(flat, config))
    images = preprocess(pixels, config.image_size)  # [B,height,width,3], 0 to 255 -> -1 to 1
    logits = jax.jit(forward, static_argnames="config")(params, images, config)  # [B,N]

    optimizer = optax.adamw(1e-3)                   # training, here from random weights
    mesh = make_mesh("data=1,model=1")              # for eight devices: "data=4,model=2"
    state = init_state(jax.random.key(0), config, optimizer, mesh)  # to go on: (..., params)
    step = make_train_step(config, optimizer, mesh)
    state, metrics = step(state, {"images": images, "labels": labels}, jax.random.key(1))

Paper     Dosovitskiy et al. 2020, "An Image is Worth 16x16 Words: Transformers for Image
          Recognition at Scale", arXiv:2010.11929 v2. Attention rollout (Figure 6): Abnar & Zuidema
          2020, "Quantifying Attention Flow in Transformers", arXiv:2005.00928 v2.
Here      Patches, class token and positions (Eq. 1), encoder (Eq. 2, 3), image representation
          (Eq. 4), attention (Eq. 5 to 8), sizes (Table 1), fine-tuning at another image size
          (Sec. 3.2), training recipes (Tables 3, 4, without JFT-300M), attention rollout.
Not here  Hybrid stem (Sec. 3.1), masked patches (App. B), attention dropout. Training on your own
          pictures: examples/train.py. Checkpoints of big_vision: examples/big_vision.py.
Differs   From the paper, following the official code: tanh GELU, LayerNorm epsilon 1e-6, a
          zero head for pre-training too; with pool="gap", LayerNorm before the mean, not after.
          From the official code: variance as mean((x - mean)^2), not E[x^2] - E[x]^2; position
          embeddings can be resized to rectangles; rows with the label -1 are ignored.
Claims    C1 parameter counts (Table 1)
          C2 without position embeddings the encoder commutes with permutations of the patches
          C3 resizing position embeddings to the same grid changes nothing
          C4 with a zero head the first loss is log(classes) nats
          C5 every row of the rollout is non-negative and sums to 1
          C6 the patch embedding is linear in the flattened patches (Eq. 1)
          C7 a real trained model shows the patterns of Sec. 4.5: similar positions of neighbours,
             attention that reaches farther in deeper layers
          C8 FLOPs are linear in depth; those of attention are quadratic in the number of tokens
Checked   google-research/vision_transformer @ c6de1e5: outputs and gradients in float32 on a CPU
          differ by at most 1.8e-6 times the largest value. The claims are tests in
          tests/test_vit.py.
Run       python vit.py
          88 s on two CPU cores: 97.4 % of 1,000 held-out MNIST digits right (96.5 % with JAX
          0.12); below 96.0 % it fails
Axes      B batch  T tokens, class token first  S keys  D width  H heads  K features of a head
          F hidden units  L blocks  N classes  R representation  C channels
          h, w height and width of a patch. Inside shard_map B, H and F are sizes on one device.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import pathlib
import re
import sys
import time
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import glorot_uniform, lecun_normal, normal, ones, zeros
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

# ==== Config ======================================================================================


def require(ok, message):  # same in every file
    """Raises ValueError(message) unless ok."""
    if not ok:
        raise ValueError(message)


CHOICES = {
    "pool": ("token", "gap"),
    "gelu": ("tanh", "exact"),
    "dtype": ("float32", "bfloat16"),
    "attention": ("xla", "cudnn"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """One Vision Transformer; the defaults are ViT-B/16. Raises ValueError for bad values."""

    image_size: int | tuple[int, int] = 224  # height and width in pixels; one number for a square
    patch_size: int | tuple[int, int] = 16  # height and width in pixels
    channels: int = 3
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072  # hidden units of the MLP
    classes: int = 1000  # 0: no head, forward returns the features
    pool: str = "token"  # "token": the class token goes to the head; "gap": the mean of all tokens
    representation: int | None = None  # width of a tanh layer before the head, "pre-logits"
    gelu: str = "tanh"  # "tanh" or "exact"; the two differ by up to 5e-4
    dropout: float = 0.0  # rate; after the positions, attention, GELU and MLP
    dtype: str = "float32"  # or "bfloat16": of dense layers, GELU, products; all else float32
    attention: str = "xla"  # "xla": plain einsums; "cudnn": fused, on a GPU in bfloat16 only
    remat: bool = True  # recompute in the backward pass: S/16 then needs a sixth of the memory
    fsdp: bool = False  # shard weights and optimizer state over the mesh axis "data" too

    def __post_init__(self):
        for name in ("image_size", "patch_size"):
            size = getattr(self, name)
            if not isinstance(size, tuple | list):
                size = (size, size)
            require(len(size) == 2, f"{name}={size} is not one number or two")
            object.__setattr__(self, name, tuple(size))  # the class is frozen: no plain assignment
        for name in ("channels", "width", "depth", "heads", "mlp"):
            size = getattr(self, name)
            require(size >= 1, f"{name}={size} is not at least 1")
        require(
            self.representation is None or self.representation >= 1,
            f"representation={self.representation} is not at least 1",
        )
        require(self.classes >= 0, f"classes={self.classes} is not at least 0")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            require(value in choices, f"{name}={value!r} is not one of {', '.join(choices)}")
        for size, patch in zip(self.image_size, self.patch_size, strict=True):
            require(
                patch >= 1 and size >= 1 and size % patch == 0,
                f"image_size={self.image_size} is not a positive multiple of "
                f"patch_size={self.patch_size}",
            )
        require(
            self.width % self.heads == 0,
            f"width={self.width} is not a multiple of heads={self.heads}",
        )
        require(0 <= self.dropout < 1, f"dropout={self.dropout} is not in [0, 1)")
        require(
            self.remat or not self.fsdp,
            "fsdp=True needs remat=True: without it the backward pass keeps every gathered weight",
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Number of rows and of columns of patches."""
        height, width = self.image_size
        h, w = self.patch_size
        return height // h, width // w

    @property
    def tokens(self) -> int:
        """Number of tokens: the patches, and the class token where there is one."""
        return math.prod(self.grid) + (self.pool == "token")


def standard_config(width, depth, heads, patch) -> Config:
    """A Config whose MLP has 4 x width hidden units, as all in Table 1."""
    return Config(width=width, depth=depth, heads=heads, mlp=4 * width, patch_size=patch)


SIZES = {  # Base, Large and Huge: Table 1. Tiny, Small and B/8 came with later official releases.
    "Ti/16": standard_config(192, 12, 3, 16),
    "S/32": standard_config(384, 12, 6, 32),
    "S/16": standard_config(384, 12, 6, 16),
    "B/32": standard_config(768, 12, 12, 32),
    "B/16": standard_config(768, 12, 12, 16),
    "B/8": standard_config(768, 12, 12, 8),
    "L/32": standard_config(1024, 24, 16, 32),
    "L/16": standard_config(1024, 24, 16, 16),
    "H/14": standard_config(1280, 32, 16, 14),
}


# ==== Model =======================================================================================


def preprocess(pixels, size=None):  # same in every file
    """The official input: resized to `size` (height, width), and from 0..255 to [-1, 1].

    pixels [B,height,width,C] -> float32 [B,*size,C]. Bilinear without antialiasing, as in the
    official code. Raises ValueError for values outside 0 to 255, except under jit.
    """
    pixels = jnp.asarray(pixels)
    if not isinstance(pixels, jax.core.Tracer):
        low = float(pixels.min())
        high = float(pixels.max())
        already_scaled = jnp.issubdtype(pixels.dtype, jnp.floating) and 0 < high <= 1
        require(
            0 <= low and high <= 255,
            f"pixels are from {low:.4g} to {high:.4g}, not within 0 to 255",
        )
        require(
            not already_scaled,
            f"pixels are floats of at most {high:.4g}: are they scaled already, and not 0 to 255?",
        )
    B, *old_size, C = pixels.shape
    shape = (B, *(size or old_size), C)
    resized = jax.image.resize(pixels.astype(jnp.float32), shape, "bilinear", antialias=False)
    return resized / 127.5 - 1


def patchify(images, patch_size):  # same in every file
    """Cuts images into patches, row by row. [B,height,width,C] -> [B,patches,h,w,C]."""
    B, height, width, C = images.shape
    h, w = patch_size
    patches = images.reshape(B, height // h, h, width // w, w, C)
    patches = patches.swapaxes(2, 3)  # [B,rows,columns,h,w,C]
    return patches.reshape(B, -1, h, w, C)


def linear(x, weights, dtype, axes=1, model_axis=None):  # same in every file
    """A dense layer: contracts the last `axes` axes of x with the first of the kernel, adds bias.

    [...,I] -> [...,O] for a kernel [I,O], where I and O may stand for several axes. With model_axis
    each device holds a slice of the inputs I, and the partial products are summed in float32.
    """
    kernel = weights["kernel"]
    leading = x.shape[: x.ndim - axes]
    inputs = math.prod(kernel.shape[:axes])
    outputs = kernel.shape[axes:]

    x = x.reshape(-1, inputs).astype(dtype)  # one product of two matrices: fast on a CPU
    kernel = kernel.reshape(inputs, -1).astype(dtype)
    y = x @ kernel
    if model_axis:
        y = lax.psum(y.astype(jnp.float32), model_axis)  # all-reduce: sums the slices of I
    # The bias comes after the sum: before it, every device would add its own.
    y = y + weights["bias"].reshape(-1).astype(y.dtype)
    return y.reshape(*leading, *outputs)


def layer_norm(x, weights):  # same in every file
    """LayerNorm over the last axis, with the official epsilon. [...,D] -> [...,D]."""
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    y = (x - mean) * lax.rsqrt(variance + 1e-6)
    return y * weights["scale"] + weights["bias"]


def dropout(key, x, rate):
    """Zeroes each value of x [...] with probability `rate` and scales up the others.

    Returns x unchanged where key is None.
    """
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0)


def embed(params, images, config: Config):
    """Eq. 1: z_0 = [class token; flattened patches times E] + positions.

    [B,height,width,C] in [-1, 1] -> [B,T,D]. Raises ValueError for images of another shape, dtype
    or range; the range is not checked under jit.
    """
    expected = (*config.image_size, config.channels)
    require(images.shape[1:] == expected, f"images are {images.shape}, not [B, *{expected}]")
    require(
        jnp.issubdtype(images.dtype, jnp.floating),
        f"images are {images.dtype}, not floats in [-1, 1]: see preprocess",
    )
    if not isinstance(images, jax.core.Tracer):
        low = float(images.min())
        high = float(images.max())
        require(
            -1.001 < low and high < 1.001,  # 0.001 for rounding
            f"images are from {low:.4g} to {high:.4g}, not in [-1, 1]: see preprocess",
        )
    patches = patchify(images, config.patch_size)
    x = linear(patches, params["embed"], config.dtype, axes=3)  # contracts h, w and C
    x = x.astype(jnp.float32)  # [B,patches,D]
    if config.pool == "token":
        class_token = jnp.broadcast_to(params["class"], (len(x), 1, config.width))
        x = jnp.concatenate([class_token, x], axis=1)
    return x + params["position"]


def project_qkv(x, weights, dtype):  # same in every file
    """Eq. 5: queries, keys and values by one matrix product. [B,T,D] -> three [B,H,T,K]."""
    # The three kernels side by side are one dense layer from D to 3 x H x K.
    layers = [weights[name] for name in ("query", "key", "value")]
    qkv = {
        "kernel": jnp.stack([layer["kernel"] for layer in layers], axis=1),  # [D,3,H,K]
        "bias": jnp.stack([layer["bias"] for layer in layers]),  # [3,H,K]
    }
    y = linear(x, qkv, dtype)  # [B,T,3,H,K]
    q, k, v = y.transpose(2, 0, 3, 1, 4)  # [3,B,H,T,K]
    return q, k, v


def attention_weights(q, k):  # same in every file
    """Eq. 6: A = softmax(q k^T / sqrt(K)) over the keys, in float32.

    q [B,H,T,K], k [B,H,S,K] -> [B,H,T,S].
    """
    q = q * q.shape[-1] ** -0.5
    scores = jnp.einsum("bhtk,bhsk->bhts", q, k, preferred_element_type=jnp.float32)
    return jax.nn.softmax(scores, axis=-1)


def attention_reference(q, k, v):  # same in every file
    """Eq. 7: the values v, averaged by attention weight: A v. Three [B,H,T,K] -> [B,H,T,K]."""
    weights = attention_weights(q, k).astype(v.dtype)
    return jnp.einsum("bhts,bhsk->bhtk", weights, v)


def attention_cudnn(q, k, v):
    """attention_reference by cuDNN, which never stores the weights [T,S].

    Raises NotImplementedError where cuDNN cannot do it.
    """
    backend = jax.default_backend()
    K = q.shape[-1]
    if backend != "gpu" or q.dtype != jnp.bfloat16 or K % 8 or K > 128:
        raise NotImplementedError(
            "attention='cudnn' needs a GPU, bfloat16 and a head size of 8, 16 ... 128, "
            f"not {backend}, {q.dtype} and {K}"
        )
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B,T,H,K]
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn").swapaxes(1, 2)


def self_attention(x, weights, config: Config, model_axis=None):
    """MSA (Eq. 5 to 8). [B,T,D] -> [B,T,D], and q, k [B,H,T,K], which attention_maps needs.

    weights: one block's; with model_axis, only this device's heads.
    """
    q, k, v = project_qkv(x, weights, config.dtype)
    if config.attention == "cudnn":
        y = attention_cudnn(q, k, v)
    else:
        y = attention_reference(q, k, v)
    y = y.swapaxes(1, 2)  # [B,T,H,K]
    y = linear(y, weights["out"], config.dtype, axes=2, model_axis=model_axis)  # Eq. 8
    return y, (q, k)


def mlp(x, weights, config: Config, key=None, model_axis=None):
    """Two dense layers with a GELU between them. [B,T,D] -> [B,T,D].

    weights: a block's "mlp"; with model_axis, only this device's hidden units. key: for dropout
    after the GELU; block itself drops after the MLP.
    """
    y = linear(x, weights["dense1"], config.dtype)  # [B,T,F]
    y = jax.nn.gelu(y, approximate=config.gelu == "tanh")
    y = dropout(key, y, config.dropout)
    return linear(y, weights["dense2"], config.dtype, model_axis=model_axis)


def dropout_keys(key, model_axis):
    """Keys for dropout in a block: after attention, of the hidden units, after the MLP; or None."""
    if key is None:
        return None, None, None
    attention_key, hidden_key, mlp_key = jax.random.split(key, 3)
    if model_axis:
        # Each device holds other hidden units and needs other masks for them. The outputs of
        # attention and MLP are the same on all devices of the axis, and so must be their masks.
        hidden_key = jax.random.fold_in(hidden_key, lax.axis_index(model_axis))
    return attention_key, hidden_key, mlp_key


def block(x, weights, config: Config, key=None, model_axis=None):
    """One encoder block. [B,T,D] -> [B,T,D], and q, k [B,H,T,K] for attention_maps."""
    attention_key, hidden_key, mlp_key = dropout_keys(key, model_axis)

    # Eq. 2: z' = MSA(LN(z)) + z
    y = layer_norm(x, weights["norm1"])
    y, (q, k) = self_attention(y, weights, config, model_axis)
    x = x + dropout(attention_key, y.astype(x.dtype), config.dropout)
    x = checkpoint_name(x, "middle")  # by this name encode keeps it for the backward pass

    # Eq. 3: z = MLP(LN(z')) + z'
    y = layer_norm(x, weights["norm2"])
    y = mlp(y, weights["mlp"], config, hidden_key, model_axis)
    x = x + dropout(mlp_key, y.astype(x.dtype), config.dropout)
    return x, (q, k)


def encode(params, images, config: Config, *, key=None, data_axis=None, model_axis=None):
    """All tokens after the last LayerNorm, class token first. [B,height,width,C] -> [B,T,D].

    The arguments are those of forward.
    """
    depth = len(params["blocks"]["norm1"]["scale"])
    require(depth == config.depth, f"params have {depth} blocks, not depth={config.depth}")
    table = param_table(config)

    def layer(x, inputs):
        weights, block_key = inputs
        # Makes the weights of this block whole where fsdp has sharded them; else does nothing.
        weights = gather(weights, table["blocks"], config, data_axis)
        x, _ = block(x, weights, config, block_key, model_axis)
        return x, None

    if config.remat:
        # Only the inputs of a block's two halves are kept; everything else is computed again.
        # prevent_cse=False is safe inside a scan, and faster.
        keep = jax.checkpoint_policies.save_only_these_names("middle")
        layer = jax.checkpoint(layer, prevent_cse=False, policy=keep)

    embed_key = None
    block_keys = None
    if key is not None:
        if data_axis:
            # Each device has other rows and needs other masks.
            key = jax.random.fold_in(key, lax.axis_index(data_axis))
        embed_key, encoder_key = jax.random.split(key)
        block_keys = jax.random.split(encoder_key, config.depth)

    whole = gather(params["embed"], table["embed"], config, data_axis)
    x = embed({**params, "embed": whole}, images, config)
    x = dropout(embed_key, x, config.dropout)
    x, _ = lax.scan(layer, x, (params["blocks"], block_keys))
    return layer_norm(x, params["norm"])


def forward(params, images, config: Config, *, key=None, data_axis=None, model_axis=None):
    """Logits. images [B,height,width,C] in [-1, 1] -> [B,N]; without classes [B,D] or [B,R].

    With a key Config.dropout is applied; its masks depend on the mesh. data_axis and model_axis are
    names of mesh axes, for use inside shard_map: each block does two all-reduces over model_axis
    and, with fsdp, six all-gathers over data_axis. Meant for jit: outside, every call compiles the
    blocks again. Raises ValueError for images of another shape, dtype or range.
    """
    x = encode(params, images, config, key=key, data_axis=data_axis, model_axis=model_axis)
    if config.pool == "token":
        x = x[:, 0]  # [B,D], Eq. 4
    else:
        x = x.mean(1)  # [B,D]
    table = param_table(config)
    if config.representation:
        weights = gather(params["pre_logits"], table["pre_logits"], config, data_axis)
        x = linear(x, weights, config.dtype).astype(jnp.float32)
        x = jnp.tanh(x)  # [B,R]
    if config.classes:
        weights = gather(params["head"], table["head"], config, data_axis)
        x = linear(x, weights, config.dtype).astype(jnp.float32)  # [B,N]
    return x


def one_hot(labels, classes):  # same in every file
    """Integer labels as one-hot rows. [B] -> float32 [B,N].

    The label -1 gives a row of zeros. Any other label that is not a class gives NaN, so that the
    mistake shows in the loss. Raises ValueError for labels that are not integers.
    """
    require(
        jnp.issubdtype(labels.dtype, jnp.integer),
        f"labels [B] are {labels.dtype}, not integers",
    )
    labels = labels.astype(jnp.int32)
    rows = jax.nn.one_hot(labels, classes, dtype=jnp.float32)
    known = (labels >= -1) & (labels < classes)
    return jnp.where(known[:, None], rows, jnp.nan)


def loss_fn(params, batch, key, config: Config, *, data_axis=None, model_axis=None):
    """Softmax cross-entropy in nats, the mean over the valid rows of all devices.

    batch: {"images": [B,height,width,C] in [-1, 1], "labels": int [B], -1 for rows to ignore, or
    float [B,N], rows that sum to 1, for mixtures of classes, or to 0, to ignore them}. Returns the
    loss and {"loss": loss}. The loss is 0 if no row is valid. Raises ValueError for labels of
    another shape or dtype, and for classes=0.
    """
    require(config.classes > 0, "classes=0: without a head there is no loss")
    targets = batch["labels"]
    if targets.ndim == 1:
        targets = one_hot(targets, config.classes)
    wanted = (len(batch["images"]), config.classes)
    require(
        targets.shape == wanted,
        f"labels are {batch['labels'].shape}, not {wanted[:1]} or {wanted}",
    )
    logits = forward(
        params, batch["images"], config, key=key, data_axis=data_axis, model_axis=model_axis
    )
    total = -(targets * jax.nn.log_softmax(logits)).sum()
    count = targets.sum()
    if data_axis:
        total = lax.psum(total, data_axis)  # all-reduce: the rows of all devices
        count = lax.psum(count, data_axis)
    loss = total / jnp.where(count > 0, count, 1)  # no valid row: 0, not 0/0
    return loss, {"loss": loss}


def attention_maps(params, images, config: Config):
    """Attention weights (Eq. 6) of every block. [B,height,width,C] -> float32 [L,B,H,T,S].

    Large: 22 MB for one image of B/16 at 224 pixels, 191 MB at 384.
    """

    def layer(x, weights):
        x, (q, k) = block(x, weights, config)
        return x, attention_weights(q, k)

    _, maps = lax.scan(layer, embed(params, images, config), params["blocks"])
    return maps


def attention_rollout(maps):
    """An estimate of how much each output token draws from each input token. -> [B,T,S].

    maps: [L,B,H,T,S]. Abnar & Zuidema, Sec. 3: the product A_L ... A_2 A_1 over the blocks, where
    A = 0.5 W + 0.5 I, W is the mean of the attention weights over the heads, and I stands for the
    residual connection.
    """
    layers = (maps.mean(2) + jnp.eye(maps.shape[-1])) / 2  # [L,B,T,S]
    rollout = layers[0]
    for layer in layers[1:]:
        rollout = layer @ rollout
    return rollout


# ==== Parameters, fine-tuning, recipes ============================================================


@dataclasses.dataclass(frozen=True)
class Param:  # same in every file
    """Shape, sharding and initialiser of one weight. A dataclass, since jax.tree opens tuples."""

    shape: tuple
    spec: P  # the mesh axis that shards each array axis, if any
    init: Callable  # (key, shape, dtype) -> array


def param_table(config: Config) -> dict:
    """The Param of each weight, as a nested dict. Blocks are stacked on a leading axis L."""
    L = config.depth
    D = config.width
    H = config.heads
    K = D // H
    F = config.mlp
    T = config.tokens
    R = config.representation or D  # what the head reads
    N = config.classes
    C = config.channels
    h, w = config.patch_size

    def dense(kernel, bias):
        return {"kernel": kernel, "bias": bias}

    def norm(*shape):
        return {"scale": Param(shape, P(), ones), "bias": Param(shape, P(), zeros)}

    # As in the official code: fan-in and fan-out of [D,H,K] are those of a matrix [D,H*K].
    split_heads = glorot_uniform(in_axis=1, out_axis=(2, 3), batch_axis=0)
    merge_heads = glorot_uniform(in_axis=(1, 2), out_axis=3, batch_axis=0)
    matrix = glorot_uniform(in_axis=1, out_axis=2, batch_axis=0)
    to_heads = dense(  # declared alike for all three, drawn separately
        Param((L, D, H, K), P(None, "data", "model", None), split_heads),
        Param((L, H, K), P(None, "model", None), zeros),
    )
    table = {
        "embed": dense(
            Param((h, w, C, D), P(None, None, None, "data"), lecun_normal(in_axis=(0, 1, 2))),
            Param((D,), P(), zeros),
        ),
        "position": Param((T, D), P(), normal(0.02)),
        "blocks": {
            "norm1": norm(L, D),
            "query": to_heads,
            "key": to_heads,
            "value": to_heads,
            "out": dense(
                Param((L, H, K, D), P(None, "model", None, "data"), merge_heads),
                Param((L, D), P(), zeros),
            ),
            "norm2": norm(L, D),
            "mlp": {
                "dense1": dense(
                    Param((L, D, F), P(None, "data", "model"), matrix),
                    Param((L, F), P(None, "model"), normal(1e-6)),
                ),
                "dense2": dense(
                    Param((L, F, D), P(None, "model", "data"), matrix),
                    Param((L, D), P(), normal(1e-6)),
                ),
            },
        },
        "norm": norm(D),
    }
    if config.pool == "token":
        table["class"] = Param((D,), P(), zeros)
    if config.representation:
        table["pre_logits"] = dense(
            Param((D, R), P("data", None), lecun_normal()), Param((R,), P(), zeros)
        )
    if config.classes:
        table["head"] = dense(Param((R, N), P("data", None), zeros), Param((N,), P(), zeros))
    return table


def init_params(key: jax.Array, config: Config) -> dict:  # same in every file
    """Float32 weights from the official distributions. Nested dict, shapes as in param_table."""
    declared, treedef = jax.tree.flatten(param_table(config))
    keys = jax.random.split(key, len(declared))
    arrays = [p.init(k, p.shape, jnp.float32) for k, p in zip(keys, declared, strict=True)]
    return treedef.unflatten(arrays)


def interpolation_matrix(old, new):  # same in every file
    """Matrix [new,old] that resamples `old` values at `new` points, linearly, ends aligned."""
    points = np.linspace(0, old - 1, new)
    distance = np.abs(points[:, None] - np.arange(old))
    return np.maximum(0, 1 - distance)  # the two nearest values share a weight of 1


def resize_position_embedding(positions, old_grid, new_grid, prefix):  # same in every file
    """Position embeddings for another grid of patches, by 2D interpolation (Sec. 3.2).

    [prefix+old,D] -> [prefix+new,D], for grids (rows, columns) of old and new patches. The first
    `prefix` rows, those of a class token, stay as they are.
    """
    positions = np.asarray(positions)
    patches = math.prod(old_grid)
    require(
        len(positions) == prefix + patches,
        f"{len(positions)} positions are not {prefix} + {patches} of grid {old_grid}",
    )
    cells = positions[prefix:].reshape(*old_grid, -1)  # [old rows,old columns,D]
    to_rows = interpolation_matrix(old_grid[0], new_grid[0])
    to_columns = interpolation_matrix(old_grid[1], new_grid[1])
    cells = np.einsum("ri,cj,ijd->rcd", to_rows, to_columns, cells)  # i, j: old row and column
    cells = cells.reshape(-1, positions.shape[1]).astype(positions.dtype)
    return np.concatenate([positions[:prefix], cells])


def adapt(params, old_config: Config, new_config: Config) -> dict:
    """Pre-trained weights for fine-tuning (Sec. 3.2): positions resized, a new zero head.

    The head is new even for the same number of classes. "pre_logits" is dropped where new_config
    has none, as in the official code. All other weights are the same arrays as in params. Raises
    ValueError if another field of the architecture differs.
    """
    architecture = ["patch_size", "channels", "width", "depth", "heads", "mlp", "pool", "gelu"]
    for name in [*architecture, "representation"]:
        old = getattr(old_config, name)
        new = getattr(new_config, name)
        dropped = name == "representation" and new is None
        require(old == new or dropped, f"a checkpoint of {name}={old} cannot become {name}={new}")
    check_names(named_leaves(params), named_leaves(param_table(old_config)), "params")
    table = param_table(new_config)
    params = {name: params[name] for name in table if name != "head"}
    prefix = int(new_config.pool == "token")
    params["position"] = resize_position_embedding(
        params["position"], old_config.grid, new_config.grid, prefix
    )
    if new_config.classes:
        params["head"] = jax.tree.map(lambda p: np.zeros(p.shape, np.float32), table["head"])
    return params


class Recipe(NamedTuple):
    """Training hyper-parameters, which examples/train.py can follow."""

    optimizer: str  # "adam", b1=0.9 and b2=0.999, or "sgd", momentum 0.9
    batch: int
    steps: int
    learning_rate: float  # the highest of the schedule
    decay: str  # of the learning rate, after a linear warm-up
    warmup: int  # steps
    weight_decay: float  # decoupled, of kernels only, multiplied by the learning rate
    clip: float | None  # largest global norm of the gradient
    dropout: float
    source: str  # quoted from the paper, or reproduced here


# Of ViT-B/16: pre-training at 224 pixels, steps = epochs x images / batch; fine-tuning at 384
# pixels, where Table 4 has several learning rates to choose from and the warm-up is that of the
# official code. Columns as in Recipe.
RECIPES = {
    "ImageNet-21k": Recipe(
        "adam", 4096, 312_000, 1e-3, "linear", 10_000, 0.03, None, 0.1, "quoted: Table 3"
    ),
    "ImageNet": Recipe(
        "adam", 4096, 93_800, 3e-3, "cosine", 10_000, 0.3, 1.0, 0.1, "quoted: Table 3"
    ),
    "to ImageNet": Recipe(
        "sgd", 512, 20_000, 0.03, "cosine", 500, 0.0, 1.0, 0.0, "quoted: Table 4"
    ),
    "to CIFAR": Recipe("sgd", 512, 10_000, 0.01, "cosine", 500, 0.0, 1.0, 0.0, "quoted: Table 4"),
    "digits": Recipe(
        "adam", 128, 1_100, 2e-3, "cosine", 60, 0.3, 1.0, 0.0, "reproduced: python vit.py"
    ),
}


# ==== Sharded training: rows over mesh axis "data", heads and hidden units over "model" ===========


def gather(weights, table, config: Config, data_axis):  # same in every file
    """All-gathers weights that fsdp has sharded over "data". Tree of arrays -> the same tree."""
    if not config.fsdp or data_axis is None:
        return weights

    def whole(weight, param):
        if "data" not in tuple(param.spec):
            return weight
        axis = tuple(param.spec).index("data")
        axis -= len(param.shape) - weight.ndim  # inside the scan a block's weight has no axis L
        return lax.all_gather(weight, data_axis, axis=axis, tiled=True)

    return jax.tree.map(whole, weights, table)


def trimmed_spec(axes):  # same in every file
    """PartitionSpec without None at the end, as jit returns it; any other recompiles a step."""
    axes = list(axes)
    while axes and axes[-1] is None:
        axes.pop()
    return P(*axes)


def param_specs(config: Config, mesh) -> dict:
    """The PartitionSpec of each weight. Raises ValueError if the mesh does not divide a weight."""

    def spec_of(path, param):
        axes = []
        for size, axis in zip(param.shape, tuple(param.spec)):
            devices = 1 if axis is None else mesh.shape[axis]
            if devices == 1 or (axis == "data" and not config.fsdp):
                axes.append(None)
                continue
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            require(
                size % devices == 0,
                f"{name} {param.shape}: {size} is not a multiple of mesh axis {axis}={devices}",
            )
            axes.append(axis)
        return trimmed_spec(axes)

    return jax.tree_util.tree_map_with_path(spec_of, param_table(config))


def make_mesh(text):  # same in every file
    """A mesh from text such as "data=4,model=2".

    Without an accelerator CPUs are simulated, if this is called before JAX is used.
    """
    match = re.fullmatch(r"data=([1-9]\d*),model=([1-9]\d*)", text)
    require(match, f"--mesh {text} is not of the form data=4,model=2")
    shape = (int(match[1]), int(match[2]))
    needed = math.prod(shape)
    with contextlib.suppress(RuntimeError):  # JAX is in use already; its devices are counted below
        jax.config.update("jax_num_cpu_devices", max(needed, jax.config.jax_num_cpu_devices))
    count = jax.device_count()
    require(needed <= count, f"--mesh {text} needs {needed} devices, there are {count}")
    return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


class State(NamedTuple):
    """What a training run carries from step to step."""

    params: Any
    opt_state: Any
    step: Any  # int32, the number of steps done


def slot_spec(slot, spec, param):  # same in every file
    """The PartitionSpec of a slot, an optimizer's array for one weight, such as Adam's mean.

    It is that of the weight, on the axes where their sizes agree.
    """
    if slot.ndim != param.ndim:
        return P()
    axes = []
    for i, axis in enumerate(tuple(spec)):
        axes.append(axis if slot.shape[i] == param.shape[i] else None)
    return trimmed_spec(axes)


def init_state(key, config: Config, optimizer, mesh, params=None) -> State:
    """Weights, optimizer state and step 0, each created on the mesh with its sharding.

    The weights are copies of `params` if given, for example from load or adapt; otherwise they are
    drawn. mesh has the axes "data" and "model", both Auto; optimizer is one of optax that needs
    nothing but gradients and weights. Raises ValueError for params of another config.
    """
    if params is not None:
        check_names(named_leaves(params), named_leaves(param_table(config)), "params")

    def init(key, params):
        if params is None:
            params = init_params(key, config)
        return State(params, optimizer.init(params), jnp.int32(0))

    shapes = jax.eval_shape(init, key, params)
    specs = param_specs(config, mesh)
    slot_specs = optax.tree_map_params(
        optimizer,
        slot_spec,  # for arrays that belong to a weight
        shapes.opt_state,
        specs,
        shapes.params,
        transform_non_params=lambda _: P(),
    )
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), State(specs, slot_specs, P()))
    if params is not None:
        params = jax.device_put(params, shardings.params)
    return jax.jit(init, out_shardings=shardings)(key, params)


def axis_if_split(mesh, axis):  # same in every file
    """The name of a mesh axis, or None if it has one device and needs no communication."""
    if mesh.shape[axis] == 1:
        return None
    return axis


def global_loss(config: Config, mesh):
    """loss_fn for a whole batch on the mesh: (params, batch, key) -> (loss, metrics)."""
    data_axis = axis_if_split(mesh, "data")
    model_axis = axis_if_split(mesh, "model")

    def local_loss(params, batch, key):
        return loss_fn(params, batch, key, config, data_axis=data_axis, model_axis=model_axis)

    sharded_loss = jax.shard_map(
        local_loss,
        mesh=mesh,
        in_specs=(param_specs(config, mesh), P(data_axis), P()),
        out_specs=P(),
    )

    def loss(params, batch, key):
        rows = len(batch["images"])
        devices = mesh.shape["data"]
        require(rows % devices == 0, f"a batch of {rows} is not a multiple of data={devices}")
        return sharded_loss(params, batch, key)

    return loss


def make_train_step(config: Config, optimizer, mesh, gradient=None):
    """One jitted step: (state, batch, key) -> (state, metrics). It donates the old state.

    batch and metrics are those of loss_fn. Pass the same key in every step: state.step is folded
    in. gradient, if given, replaces the plain gradient of global_loss, for example to accumulate
    microbatches or for SAM: a function (params, batch, key, step) -> ((loss, metrics), grads).
    """
    loss = global_loss(config, mesh)

    def plain_gradient(params, batch, key, step):
        # Differentiated outside shard_map: JAX itself then sums the gradients over the devices.
        return jax.value_and_grad(loss, has_aux=True)(params, batch, key)

    gradient = gradient or plain_gradient

    def step(state, batch, key):
        key = jax.random.fold_in(key, state.step)
        (_, metrics), grads = gradient(state.params, batch, key, state.step)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, opt_state, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0)


# ==== Checkpoints: the names of the released weights ==============================================

OFFICIAL_LAYERS = {  # ours -> name in the checkpoints of vision_transformer
    "embed": "embedding",
    "norm": "Transformer/encoder_norm",
    "pre_logits": "pre_logits",
    "head": "head",
}
OFFICIAL_BLOCK = {  # below Transformer/encoderblock_0, encoderblock_1, ...
    "norm1": "LayerNorm_0",
    "query": "MultiHeadDotProductAttention_1/query",
    "key": "MultiHeadDotProductAttention_1/key",
    "value": "MultiHeadDotProductAttention_1/value",
    "out": "MultiHeadDotProductAttention_1/out",
    "norm2": "LayerNorm_2",
    "mlp/dense1": "MlpBlock_3/Dense_0",
    "mlp/dense2": "MlpBlock_3/Dense_1",
}
OFFICIAL_POSITION = "Transformer/posembed_input/pos_embedding"
NEWER_BLOCK = {  # names of newer official code, which counts each type separately -> released
    "LayerNorm_1/": "LayerNorm_2/",
    "MultiHeadDotProductAttention_0/": "MultiHeadDotProductAttention_1/",
    "MlpBlock_0/": "MlpBlock_3/",
}
PREFIXES = (
    "params/",  # of training states
    "opt/target/",  # of older training states
    "img/",  # of the image tower of LiT
)


def named_leaves(tree) -> dict:  # same in every file
    """Path -> leaf of any tree of arrays: {"a/b/kernel": ...}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def released_names(flat) -> dict:
    """The arrays of a checkpoint under the names of the released files, known prefixes removed."""
    for prefix in PREFIXES:  # one after the other, for they can be nested: params/img/...
        below = {n.removeprefix(prefix): array for n, array in flat.items() if n.startswith(prefix)}
        if below:
            flat = below
    renamed = {}
    for name, array in flat.items():
        if name.startswith("Transformer/encoderblock_"):
            for newer, released in NEWER_BLOCK.items():
                name = name.replace(newer, released)
        renamed[name] = array
    return renamed


def infer_config(flat, **fields) -> Config:
    """The Config of a released checkpoint, read from the shapes of its arrays.

    fields are what no shape tells, such as gelu="exact", or image_size where the patches do not
    form a square. Raises ValueError if the arrays are not those of a ViT.
    """
    flat = released_names(flat)

    def shape(name, rank):
        require(name in flat, f"the checkpoint has no array {name}: it is not a ViT of this kind")
        found = np.shape(flat[name])
        require(len(found) == rank, f"{name} has shape {found}, not {rank} axes")
        return found

    h, w, channels, width = shape("embedding/kernel", 4)
    pool = "token" if "cls" in flat else "gap"
    if "image_size" not in fields:
        patches = shape(OFFICIAL_POSITION, 3)[1] - (pool == "token")
        side = math.isqrt(patches)
        require(
            side**2 == patches,
            f"the position table has {patches} patches, which do not form a square: "
            "give image_size=(height, width)",
        )
        fields["image_size"] = (side * h, side * w)
    block = "Transformer/encoderblock_"
    inferred = {
        "patch_size": (h, w),
        "channels": channels,
        "width": width,
        "depth": len({name.split("/")[1] for name in flat if name.startswith(block)}),
        "heads": shape(f"{block}0/{OFFICIAL_BLOCK['query']}/kernel", 3)[1],
        "mlp": shape(f"{block}0/{OFFICIAL_BLOCK['mlp/dense1']}/kernel", 2)[1],
        "classes": 0,
        "pool": pool,
    }
    if "head/kernel" in flat:
        inferred["classes"] = shape("head/kernel", 2)[1]
    if "pre_logits/kernel" in flat:
        inferred["representation"] = shape("pre_logits/kernel", 2)[1]
    return Config(**{**inferred, **fields})


def official_places(config: Config) -> dict:
    """Official name -> (path of our weight, index into it that selects the official array)."""
    places = {}
    for path in named_leaves(param_table(config)):  # "blocks/mlp/dense1/kernel", "class"
        layer, *rest = path.split("/")
        if layer == "class":
            places["cls"] = path, (np.newaxis, np.newaxis)  # ours [D], official [1,1,D]
        elif layer == "position":
            places[OFFICIAL_POSITION] = path, np.newaxis  # ours [T,D], official [1,T,D]
        elif layer == "blocks":
            *middle, kind = rest
            name = OFFICIAL_BLOCK["/".join(middle)]
            for i in range(config.depth):
                places[f"Transformer/encoderblock_{i}/{name}/{kind}"] = path, i
        else:
            places[f"{OFFICIAL_LAYERS[layer]}/{rest[0]}"] = path, ...  # the whole array
    return places


def check_names(found, expected, where):  # same in every file
    """Raises ValueError unless both dicts of arrays have the same names and shapes."""
    for name in sorted(expected):
        require(name in found, f"{where}: {name} is missing")
    for name in sorted(found):
        require(name in expected, f"{where}: {name} is unknown")
        got = np.shape(found[name])
        wanted = np.shape(expected[name])
        require(got == wanted, f"{where}: {name} has shape {got}, not {wanted}")


def from_official(flat, config: Config) -> dict:
    """Parameters from the arrays of a released checkpoint, as float32 numpy arrays.

    If names have a known prefix, only the arrays below it are used. Raises ValueError for an array
    that is missing, unknown, of a wrong shape, not numeric or not finite.
    """
    flat = released_names(flat)
    params = jax.tree.map(lambda param: np.empty(param.shape, np.float32), param_table(config))
    leaves = named_leaves(params)  # the same arrays: to fill them is to fill params
    places = official_places(config)
    expected = {name: leaves[path][index] for name, (path, index) in places.items()}
    check_names(flat, expected, "checkpoint")
    for name, (path, index) in places.items():
        array = np.asarray(flat[name])
        require(
            jnp.issubdtype(array.dtype, jnp.number),
            f"checkpoint: {name} is {array.dtype}, not numeric",
        )
        array = array.astype(np.float32)
        require(np.isfinite(array).all(), f"checkpoint: {name} holds values that are not finite")
        leaves[path][index] = array
    return params


def to_official(params, config: Config) -> dict:
    """The inverse of from_official: numpy arrays under the released names.

    Raises ValueError for params of another config.
    """
    leaves = named_leaves(params)
    check_names(leaves, named_leaves(param_table(config)), "params")
    flat = {}
    for name, (path, index) in official_places(config).items():
        flat[name] = np.asarray(leaves[path])[index]
    return flat


def write_npz(path, arrays):  # same in every file
    """Writes named arrays whole or not at all. Raises ValueError if they cannot be written."""
    partial = f"{path}.{os.getpid()}.part"
    try:
        with open(partial, "wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):  # after a success there is nothing to remove
            os.remove(partial)


def read_npz(path) -> dict:  # same in every file
    """The named arrays of an .npz. Raises ValueError unless it is whole and holds arrays only."""
    require(os.path.exists(path), f"{path} does not exist")
    require(zipfile.is_zipfile(path), f"{path} is not an .npz, or only the first part of one")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # numpy lets through what zipfile, zlib and the system raise
        raise ValueError(f"{path} is not a readable .npz of plain arrays: {error}") from None
    for name, array in arrays.items():
        require(isinstance(array, np.ndarray), f"{path} is not an .npz: {name} is not an array")
        if array.dtype.str == "|V2":  # how numpy stores bfloat16
            arrays[name] = array.view(jnp.bfloat16)
    return arrays


def save(path, params, config: Config):
    """Writes an .npz under official names, which load and the official code read.

    The file does not tell Config.gelu: see infer_config. Raises ValueError for weights that are
    not finite.
    """
    flat = to_official(params, config)
    for name, array in flat.items():
        require(np.isfinite(array).all(), f"{name} holds values that are not finite: not saved")
    write_npz(path, flat)


def load(path, config: Config) -> dict:  # same in every file
    """Parameters from an .npz under official names. Raises as read_npz and from_official do."""
    return from_official(read_npz(path), config)


# ==== Demo: handwritten digits ====================================================================

DIGITS = Config(
    image_size=28, patch_size=7, channels=1, classes=10, width=128, depth=3, heads=4, mlp=256
)
REPORT = 100  # steps between lines of progress
EXPECTED = 97.4  # per cent of the held-out digits, with the default flags
FLOOR = 96.0


def check_out(path):  # same in every file
    """Raises ValueError unless a figure can be written to path."""
    path = pathlib.Path(path)
    require(path.suffix in (".png", ".pdf", ".svg"), f"--out {path} is not a .png, .pdf or .svg")
    require(not path.is_dir(), f"--out {path} is a folder")
    require(os.access(path.parent, os.W_OK), f"--out {path}: its folder cannot be written to")


def load_digits(path):  # same in every file
    """Pictures uint8 [B,28,28,1] and labels int32 [B], shuffled: the file is sorted by label."""
    data = read_npz(path)
    for name in ("images", "labels"):
        require(name in data, f"{path} has no array {name}")
    images = data["images"]
    labels = data["labels"]
    require(
        images.dtype == np.uint8
        and images.shape[1:] == (28, 28)
        and labels.dtype.kind in "iu"
        and labels.shape == (len(images),)
        and len(images) >= 10,
        f"{path}: images {images.dtype} {images.shape} and labels {labels.dtype} {labels.shape} "
        "are not ten or more uint8 [B,28,28] and integers [B]; examples/train.py takes others",
    )
    low = labels.min()
    high = labels.max()
    require(0 <= low and high <= 9, f"{path}: labels are from {low} to {high}, not within 0 to 9")
    order = np.random.default_rng(0).permutation(len(images))
    return images[order][..., None], labels[order].astype(np.int32)


def augment(images, rng, most):  # same in every file
    """Shifts each picture by up to `most` pixels in any direction. uint8 [B,height,width,C]."""
    B, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    down, across = rng.integers(0, 2 * most + 1, (2, B, 1, 1))  # into padded; `most`: not moved
    rows = down + np.arange(height)[:, None]  # [B,height,1]
    columns = across + np.arange(width)  # [B,1,width]
    return padded[np.arange(B)[:, None, None], rows, columns]


def place(mesh, images, labels):  # same in every file
    """A batch on the mesh: images uint8 [B,height,width,C] become floats in [-1, 1]."""
    batch = {"images": images.astype(np.float32) / 127.5 - 1, "labels": labels}
    return jax.device_put(batch, NamedSharding(mesh, P("data")))


def make_optimizer(steps):  # same in every file
    """Adam with the settings of the recipe "digits" and a cosine schedule of `steps` steps."""
    recipe = RECIPES["digits"]
    warmup = min(recipe.warmup, steps - 1)
    learning_rate = optax.warmup_cosine_decay_schedule(0, recipe.learning_rate, warmup, steps)

    def kernels(params):  # weight decay is for them alone
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)

    return optax.chain(
        optax.clip_by_global_norm(recipe.clip),
        optax.adamw(learning_rate, weight_decay=recipe.weight_decay, mask=kernels),
    )


def train(config: Config, mesh, images, labels, steps, seed):
    """Trains on images uint8 [B,28,28,1], shifted at random. Returns the weights."""
    optimizer = make_optimizer(steps)
    init_key, step_key = jax.random.split(jax.random.key(seed))
    state = init_state(init_key, config, optimizer, mesh)
    step = make_train_step(config, optimizer, mesh)
    rng = np.random.default_rng(seed)
    started = time.time()
    for i in range(1, steps + 1):
        rows = rng.integers(len(images), size=RECIPES["digits"].batch)
        batch = place(mesh, augment(images[rows], rng, 2), labels[rows])
        state, metrics = step(state, batch, step_key)
        loss = float(metrics["loss"])
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {i}: the loss is {loss}")
        if i % REPORT == 0 or i == steps:
            left = (time.time() - started) / i * (steps - i)
            print(f"step {i}/{steps}  loss {loss:.3f} nats  {left:.0f} s left", flush=True)
    return state.params


def accuracy(params, config: Config, mesh, images, labels):  # same in every file
    """Accuracy in per cent on images uint8 [B,28,28,1] and their labels, batch by batch."""

    @jax.jit
    def count_right(params, batch):
        # Without shard_map: XLA divides the work by the shardings of weights and images.
        guesses = forward(params, batch["images"], config).argmax(-1)
        return (guesses == batch["labels"]).sum()

    size = RECIPES["digits"].batch
    right = 0
    for first in range(0, len(images), size):
        rows = np.arange(first, first + size)
        inside = rows < len(images)
        rows = rows % len(images)  # the last batch is filled up with the first images
        answers = np.where(inside, labels[rows], -1)  # -1 is never a guess
        right += int(count_right(params, place(mesh, images[rows], answers)))
    return 100 * right / len(images)


def draw(path, params, config: Config, images, labels):
    """The first image of each digit with its prediction, and the rollout of the class token."""
    import matplotlib.pyplot as plt

    _, shown = np.unique(labels, return_index=True)
    images = images[shown]
    labels = labels[shown]
    inputs = preprocess(images)
    guesses = forward(params, inputs, config).argmax(-1)
    rollout = attention_rollout(attention_maps(params, inputs, config))
    heat = rollout[:, 0, 1:].reshape(-1, *config.grid)  # from the class token to the patches
    size = (1.2 * len(images), 3)
    figure, axes = plt.subplots(2, len(images), figsize=size, layout="constrained", squeeze=False)
    for i, (top, bottom) in enumerate(axes.T):
        if guesses[i] == labels[i]:
            top.set_title(f"{guesses[i]}")
        else:
            top.set_title(f"{guesses[i]}, not {labels[i]}")
        for ax in (top, bottom):
            ax.imshow(images[i], cmap="gray")
            ax.set_axis_off()
        smooth = jax.image.resize(heat[i], config.image_size, "bilinear")
        bottom.imshow(smooth, cmap="inferno", alpha=0.7)
    figure.suptitle("Held-out digits with predictions; below, what the class token attends to")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv=None) -> int:
    """Returns the exit status: 1 below FLOOR or for a loss that is not finite, 2 for bad input."""
    parser = argparse.ArgumentParser(description="Trains a small Vision Transformer on digits.")
    data = str(pathlib.Path(__file__).parent / "data/mnist5k.npz")
    recipe = RECIPES["digits"]
    parser.add_argument("--steps", type=int, default=recipe.steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mesh", default="data=1,model=1", help="number of devices on each axis")
    parser.add_argument("--fsdp", action="store_true", help="shard the weights over data too")
    parser.add_argument("--data", default=data, help=".npz of digits")
    parser.add_argument("--out", default="vit.png", help="where to draw the figure")
    args = parser.parse_args(argv)
    try:
        require(args.steps >= 1, f"--steps {args.steps} is not at least 1")
        require(0 <= args.seed < 2**32, f"--seed {args.seed} is not in 0 to {2**32 - 1}")
        check_out(args.out)
        images, labels = load_digits(args.data)
        config = dataclasses.replace(DIGITS, fsdp=args.fsdp)
        mesh = make_mesh(args.mesh)
        param_specs(config, mesh)  # raises if the mesh does not divide the weights
        devices = mesh.shape["data"]
        require(
            recipe.batch % devices == 0,
            f"--mesh {args.mesh}: the batch of {recipe.batch} is not a multiple of data={devices}",
        )
    except ValueError as error:
        print(f"vit.py: {error}", file=sys.stderr)
        return 2

    held = len(images) // 5
    print(f"{len(images)} digits, {held} held out, on {mesh.size} {jax.default_backend()}(s)")
    try:
        params = train(config, mesh, images[held:], labels[held:], args.steps, args.seed)
    except FloatingPointError as error:
        print(f"vit.py: {error}", file=sys.stderr)
        return 1
    got = accuracy(params, config, mesh, images[:held], labels[:held])
    defaults = (args.steps, args.seed, args.data) == (recipe.steps, 0, data)
    if defaults:
        expected = f"expected {EXPECTED} %, at least {FLOOR} %"
    else:
        expected = "expected unknown, at least unknown"
    print(f"result: held-out accuracy: got {got:.1f} %, {expected}")
    try:
        draw(args.out, params, config, images[:held], labels[:held])
        print(f"wrote {args.out}")
    except Exception as error:  # matplotlib is missing, or it cannot draw here
        print(f"no figure: {type(error).__name__}: {error}")
    return int(defaults and not got >= FLOOR)


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
