"""MLP-Mixer: MLPs alone, which mix the patches' features alternately across tokens and channels.

    flat = read_npz("Mixer-B_16.npz")               # a released checkpoint
    config = infer_config(flat)                     # its sizes, read from the shapes
    params = jax.device_put(from_official(flat, config))
    images = preprocess(pixels, config.image_size)  # [B,height,width,3], 0 to 255 -> -1 to 1
    logits = jax.jit(forward, static_argnames="config")(params, images, config)  # [B,N]

    optimizer = optax.adamw(1e-3)                   # training, here from random weights
    mesh = make_mesh("data=1,model=1")              # for eight devices: "data=4,model=2"
    state = init_state(jax.random.key(0), config, optimizer, mesh)  # to go on: (..., params)
    step = make_train_step(config, optimizer, mesh)
    state, metrics = step(state, {"images": images, "labels": labels}, jax.random.key(1))

Paper     Tolstikhin et al. 2021, "MLP-Mixer: An all-MLP Architecture for Vision",
          arXiv:2105.01601.
Here      Patches, token mixing and channel mixing (Sec. 2, Eq. 1), sizes (Table 1), stochastic
          depth (App. B), the settings of pre-training as numbers (Table 4), fine-tuning at a
          higher resolution (App. C).
Not here  What did not help (App. A), mixup and RandAugment, the recipes for JFT-300M. Training on
          your own pictures: examples/train.py.
Differs   From the paper, following the official code: tanh GELU, LayerNorm epsilon 1e-6, kernels
          drawn by lecun_normal, biases and the head zero; a branch that stochastic depth keeps is
          not divided by its probability of being kept. Image sizes must be multiples of the patch
          size, where the official code pads. App. C is applied to rectangles too.
          From the official code: variance as mean((x - mean)^2), not E[x^2] - E[x]^2; rows with
          the label -1 are ignored.
Claims    C1 parameter counts (Table 1)
          C2 FLOPs grow linearly with the number of patches, for a fixed tokens_mlp (Sec. 2)
          C3 the model does not depend on the order of the patches, nor on that of the pixels
             inside them, if the weights are permuted accordingly (Sec. 3.4)
          C4 the number of token-mixing weights does not depend on the width (Sec. 2)
          C5 enlarged as in App. C, the model gives the mean of the features of the crops
          C6 in training mode every branch is kept or dropped as a whole, as in the official code
Checked   google-research/vision_transformer @ c6de1e5 and, for stochastic depth,
          google-research/big_vision @ 0127fb6: outputs and gradients in float32 on a CPU differ
          from theirs by at most 9.1e-7 times the largest value. The claims are tests in
          tests/test_mixer.py.
Run       python mixer.py
          71 s on two CPU cores: 88.9 % of 1,000 held-out MNIST digits right, each shifted by up to
          4 pixels; below 87.0 % it fails. With the patches shuffled, and the pixels inside them
          (Sec. 3.4), it learns as well (90.8 %), with all pixels shuffled less well (78.5 %)
Axes      B batch  T tokens, which are the patches (S in the paper)  D width, the channels that are
          mixed (C in the paper)  E hidden units of token mixing (D_S)  F hidden units of channel
          mixing (D_C)  L blocks  N classes  C channels of the image  h, w height and width of a
          patch. Inside shard_map B, E and F are sizes on one device.
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
from jax.nn.initializers import lecun_normal, ones, zeros
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

# ==== Config ======================================================================================


def require(ok, message):  # same in every file
    """Raises ValueError(message) unless ok."""
    if not ok:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class Config:
    """One MLP-Mixer; the defaults are Mixer-B/16. Raises ValueError for bad values."""

    image_size: int | tuple[int, int] = 224  # height and width in pixels; one number for a square
    patch_size: int | tuple[int, int] = 16  # height and width in pixels
    channels: int = 3
    width: int = 768
    depth: int = 12
    tokens_mlp: int = 384  # hidden units of token mixing
    channels_mlp: int = 3072  # hidden units of channel mixing
    classes: int = 1000  # 0: no head, forward returns the features
    stochastic_depth: float = 0.0  # rate at which the last of several blocks drops a branch
    dtype: str = "float32"  # or "bfloat16": of dense layers and GELU; all else float32
    remat: bool = True  # recompute in the backward pass: S/16 at batch 8 needs 214 MB, not 1,159
    fsdp: bool = False  # shard weights and optimizer state over the mesh axis "data" too

    def __post_init__(self):
        for name in ("image_size", "patch_size"):
            size = getattr(self, name)
            if not isinstance(size, tuple | list):
                size = (size, size)
            require(len(size) == 2, f"{name}={size} is not one number or two")
            object.__setattr__(self, name, tuple(size))  # the class is frozen: no plain assignment
        for name in ("channels", "width", "depth", "tokens_mlp", "channels_mlp"):
            size = getattr(self, name)
            require(size >= 1, f"{name}={size} is not at least 1")
        require(self.classes >= 0, f"classes={self.classes} is not at least 0")
        require(
            self.dtype in ("float32", "bfloat16"),
            f"dtype={self.dtype!r} is not one of float32, bfloat16",
        )
        for size, patch in zip(self.image_size, self.patch_size, strict=True):
            require(
                patch >= 1 and size >= 1 and size % patch == 0,
                f"image_size={self.image_size} is not a positive multiple of "
                f"patch_size={self.patch_size}",
            )
        require(
            0 <= self.stochastic_depth < 1,
            f"stochastic_depth={self.stochastic_depth} is not in [0, 1)",
        )
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
        """Number of tokens: the patches."""
        return math.prod(self.grid)


SIZES = {  # Table 1. The default Config is B/16.
    "S/32": Config(patch_size=32, width=512, depth=8, tokens_mlp=256, channels_mlp=2048),
    "S/16": Config(patch_size=16, width=512, depth=8, tokens_mlp=256, channels_mlp=2048),
    "B/32": Config(patch_size=32, width=768, depth=12, tokens_mlp=384, channels_mlp=3072),
    "B/16": Config(patch_size=16, width=768, depth=12, tokens_mlp=384, channels_mlp=3072),
    "L/32": Config(patch_size=32, width=1024, depth=24, tokens_mlp=512, channels_mlp=4096),
    "L/16": Config(patch_size=16, width=1024, depth=24, tokens_mlp=512, channels_mlp=4096),
    "H/14": Config(patch_size=14, width=1280, depth=32, tokens_mlp=640, channels_mlp=5120),
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


def embed(params, images, config: Config):
    """The patches, flattened and projected (Sec. 2). [B,height,width,C] in [-1, 1] -> [B,T,D].

    Raises ValueError for images of another shape, dtype or range; the range is not checked under
    jit.
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
    return x.astype(jnp.float32)  # [B,T,D]


def mlp(x, weights, config: Config, model_axis=None):
    """Two dense layers over the last axis, with a GELU between them. [...,I] -> [...,I].

    With model_axis the weights are those of this device's hidden units.
    """
    y = linear(x, weights["dense1"], config.dtype)
    y = jax.nn.gelu(y, approximate=True)
    return linear(y, weights["dense2"], config.dtype, model_axis=model_axis)


def block(x, weights, config: Config, kept, model_axis=None):
    """One Mixer layer (Eq. 1). [B,T,D] -> [B,T,D].

    kept [2,B,1,1] holds, for token mixing and for channel mixing, 1 where an example keeps this
    branch and 0 where it drops it: see draw_kept.
    """
    keep_tokens, keep_channels = kept

    # Token mixing: U = X + W_2 gelu(W_1 LN(X)) for each channel, a column of T numbers.
    y = layer_norm(x, weights["norm1"])
    y = y.swapaxes(1, 2)  # [B,D,T]
    y = mlp(y, weights["token_mixing"], config, model_axis)  # hidden activations are [B,D,E]
    y = y.swapaxes(1, 2)  # [B,T,D]
    x = x + keep_tokens * y.astype(x.dtype)
    x = checkpoint_name(x, "middle")  # by this name encode keeps it for the backward pass

    # Channel mixing: Y = U + W_4 gelu(W_3 LN(U)) for each token, a row of D numbers.
    y = layer_norm(x, weights["norm2"])
    y = mlp(y, weights["channel_mixing"], config, model_axis)  # hidden activations are [B,T,F]
    return x + keep_channels * y.astype(x.dtype)


def draw_kept(key, B, config: Config):
    """Stochastic depth (App. B): which branches to keep. -> float32 [L,2,B,1,1], 1 or 0.

    Block i = 0 ... L-1 drops each of its two branches, for each of B examples separately, with
    probability stochastic_depth * i / (L - 1); a single block drops nothing. Without a key all
    branches are kept.
    """
    L = config.depth
    shape = (L, 2, B, 1, 1)
    if key is None or config.stochastic_depth == 0:
        return jnp.ones(shape, jnp.float32)
    rates = config.stochastic_depth * jnp.linspace(0, 1, L, dtype=jnp.float32)
    kept = jax.random.bernoulli(key, 1 - rates.reshape(L, 1, 1, 1, 1), shape)
    return kept.astype(jnp.float32)


def encode(params, images, config: Config, *, key=None, kept=None, data_axis=None, model_axis=None):
    """All tokens after the last LayerNorm. [B,height,width,C] -> [B,T,D].

    The arguments are those of forward.
    """
    blocks = params["blocks"]
    depth, tokens, _ = blocks["token_mixing"]["dense1"]["kernel"].shape
    require(depth == config.depth, f"params have {depth} blocks, not depth={config.depth}")
    require(
        tokens == config.tokens,
        f"params are for {tokens} patches, but image_size={config.image_size} has "
        f"{config.tokens}: see adapt",
    )
    table = param_table(config)

    def layer(x, inputs):
        weights, kept = inputs
        # Makes the weights of this block whole where fsdp has sharded them; else does nothing.
        weights = gather(weights, table["blocks"], config, data_axis)
        return block(x, weights, config, kept, model_axis), None

    if config.remat:
        # Only the inputs of a block's two halves are kept, x and "middle"; everything else is
        # computed again. prevent_cse=False is safe inside a scan, and faster.
        keep = jax.checkpoint_policies.save_only_these_names("middle")
        layer = jax.checkpoint(layer, prevent_cse=False, policy=keep)

    if kept is None:
        if key is not None and data_axis:
            # Each device has other examples and needs other draws.
            key = jax.random.fold_in(key, lax.axis_index(data_axis))
        kept = draw_kept(key, len(images), config)
    shape = (config.depth, 2, len(images), 1, 1)
    require(kept.shape == shape, f"kept has shape {kept.shape}, not {shape}")

    whole = gather(params["embed"], table["embed"], config, data_axis)
    x = embed({**params, "embed": whole}, images, config)
    x, _ = lax.scan(layer, x, (blocks, kept))
    return layer_norm(x, params["norm"])


def forward(
    params, images, config: Config, *, key=None, kept=None, data_axis=None, model_axis=None
):
    """Logits. images [B,height,width,C] in [-1, 1] -> [B,N]; without classes the features [B,D].

    With a key Config.stochastic_depth is applied; the draws depend on the number of devices on the
    data axis. kept, as returned by draw_kept for this device's examples, replaces them.

    data_axis and model_axis are names of mesh axes, for use inside shard_map. In the forward pass
    each block does two all-reduces over model_axis, each of 4*B*T*D bytes. With fsdp it also does
    two all-gathers over data_axis, each of 4*D*F bytes.

    Meant for jit: outside, every call compiles the blocks again. Raises ValueError for images of
    another shape, dtype or range.
    """
    axes = {"data_axis": data_axis, "model_axis": model_axis}
    x = encode(params, images, config, key=key, kept=kept, **axes)
    x = x.mean(1)  # [B,D]
    if config.classes:
        table = param_table(config)
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
    T = config.tokens
    E = config.tokens_mlp
    F = config.channels_mlp
    N = config.classes
    C = config.channels
    h, w = config.patch_size
    matrix = lecun_normal(in_axis=1, out_axis=2, batch_axis=0)

    def dense(kernel, bias):
        return {"kernel": kernel, "bias": bias}

    def norm(*shape):
        return {"scale": Param(shape, P(), ones), "bias": Param(shape, P(), zeros)}

    table = {
        "embed": dense(
            Param((h, w, C, D), P(None, None, None, "data"), lecun_normal(in_axis=(0, 1, 2))),
            Param((D,), P(), zeros),
        ),
        "blocks": {
            "norm1": norm(L, D),
            "token_mixing": {  # few weights, and T is rarely a multiple of "data": no fsdp here
                "dense1": dense(
                    Param((L, T, E), P(None, None, "model"), matrix),
                    Param((L, E), P(None, "model"), zeros),
                ),
                "dense2": dense(
                    Param((L, E, T), P(None, "model"), matrix),
                    Param((L, T), P(), zeros),
                ),
            },
            "norm2": norm(L, D),
            "channel_mixing": {
                "dense1": dense(
                    Param((L, D, F), P(None, "data", "model"), matrix),
                    Param((L, F), P(None, "model"), zeros),
                ),
                "dense2": dense(
                    Param((L, F, D), P(None, "model", "data"), matrix),
                    Param((L, D), P(), zeros),
                ),
            },
        },
        "norm": norm(D),
    }
    if config.classes:
        table["head"] = dense(Param((D, N), P("data", None), zeros), Param((N,), P(), zeros))
    return table


def init_params(key: jax.Array, config: Config) -> dict:  # same in every file
    """Float32 weights from the official distributions. Nested dict, shapes as in param_table."""
    declared, treedef = jax.tree.flatten(param_table(config))
    keys = jax.random.split(key, len(declared))
    arrays = [p.init(k, p.shape, jnp.float32) for k, p in zip(keys, declared, strict=True)]
    return treedef.unflatten(arrays)


def block_diagonal(kernel, copies):
    """Kernels [L,I,O] -> [L,copies*I,copies*O], with `copies` of each along the diagonal."""
    depth, inputs, outputs = kernel.shape
    eye = np.eye(copies, dtype=kernel.dtype)
    repeated = np.einsum("ab,lio->laibo", eye, kernel)
    return repeated.reshape(depth, copies * inputs, copies * outputs)


def enlarge_token_mixing(weights, old_grid, new_grid):
    """Token mixing for a larger image: App. C. Returns a tree like weights, of numpy arrays.

    The larger image is cut into crops of the old size. Each is mixed by a copy of the old weights,
    and the weights between crops are zero. Crop after crop, the tokens have another order than in
    the image, where they stand row by row; hence the permutation.
    """
    rows, columns = old_grid
    down = new_grid[0] // rows
    across = new_grid[1] // columns
    crops = down * across
    # order[i] is the number, counted crop after crop, of token i of the image.
    numbers = np.arange(math.prod(new_grid)).reshape(down, across, rows, columns)
    order = numbers.swapaxes(1, 2).ravel()

    weights = jax.tree.map(np.asarray, weights)
    first = weights["dense1"]
    second = weights["dense2"]
    return {
        "dense1": {  # from the tokens to the hidden units
            "kernel": block_diagonal(first["kernel"], crops)[:, order],
            "bias": np.tile(first["bias"], crops),
        },
        "dense2": {  # and back
            "kernel": block_diagonal(second["kernel"], crops)[:, :, order],
            "bias": np.tile(second["bias"], crops)[:, order],
        },
    }


def adapt(params, old_config: Config, new_config: Config) -> dict:
    """Pre-trained weights for fine-tuning: a new zero head, and larger images (App. C).

    The image may grow by whole factors; tokens_mlp must grow with the number of patches. Before the
    first step the features of the larger image are the mean of those of its crops of the old size.
    The head is new even for the same number of classes. Weights that stay the same are not copied.
    Raises ValueError if another field of the architecture differs.
    """
    check_names(named_leaves(params), named_leaves(param_table(old_config)), "params")
    for name in ("patch_size", "channels", "width", "depth", "channels_mlp"):
        old = getattr(old_config, name)
        new = getattr(new_config, name)
        require(old == new, f"a checkpoint of {name}={old} cannot become {name}={new}")
    old_size = old_config.image_size
    new_size = new_config.image_size
    for old, new in zip(old_size, new_size, strict=True):
        require(
            new % old == 0,
            f"image_size={new_size} is not a multiple of {old_size}: a Mixer's weights are bound "
            f"to its {old_config.tokens} patches, so images grow by whole factors only (App. C)",
        )
    crops = new_config.tokens // old_config.tokens
    hidden = crops * old_config.tokens_mlp
    require(
        new_config.tokens_mlp == hidden,
        f"tokens_mlp={new_config.tokens_mlp} is not {hidden}, {crops} times that of the "
        "checkpoint, as image_size needs (App. C)",
    )
    table = param_table(new_config)
    params = {name: params[name] for name in table if name != "head"}
    if crops > 1:
        mixing = params["blocks"]["token_mixing"]
        mixing = enlarge_token_mixing(mixing, old_config.grid, new_config.grid)
        params["blocks"] = {**params["blocks"], "token_mixing": mixing}
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
    clip: float  # largest global norm of the gradient
    mixup: float  # both parameters of the Beta distribution; 0: none
    randaugment: int  # strength, with two operations a picture; 0: none
    stochastic_depth: float
    source: str  # quoted from paper or official code, or reproduced here


# Pre-training at 224 pixels, steps = epochs x images / batch. Fine-tuning: the paper chooses among
# learning rates and steps; those here are the official code's. Columns as in Recipe.
RECIPES = {
    "ImageNet": Recipe(
        "adam", 4096, 93_800, 1e-3, "linear", 10_000, 0.1, 1.0, 0.5, 15, 0.1, "quoted: Table 4"
    ),
    "ImageNet-21k, B": Recipe(
        "adam", 4096, 1_040_000, 1e-3, "linear", 10_000, 0.1, 1.0, 0.2, 10, 0.1, "quoted: Table 4"
    ),
    "ImageNet-21k, L": Recipe(
        "adam", 4096, 1_040_000, 1e-3, "linear", 10_000, 0.1, 1.0, 0.5, 20, 0.1, "quoted: Table 4"
    ),
    "fine-tuning": Recipe(
        "sgd", 512, 10_000, 0.03, "cosine", 500, 0.0, 1.0, 0.0, 0, 0.0, "quoted: official code"
    ),
    "digits": Recipe(
        "adam", 64, 500, 5e-3, "cosine", 25, 0.1, 1.0, 0.0, 0, 0.0, "reproduced: python mixer.py"
    ),
}


# ==== Sharded training: rows over mesh axis "data", hidden units of both MLPs over "model" ========


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

OFFICIAL_LAYERS = {  # ours -> name in the checkpoints of vision_transformer and big_vision
    "embed": "stem",
    "norm": "pre_head_layer_norm",
    "head": "head",
}
OFFICIAL_BLOCK = {  # below MixerBlock_0, MixerBlock_1, ...
    "norm1": "LayerNorm_0",
    "token_mixing/dense1": "token_mixing/Dense_0",
    "token_mixing/dense2": "token_mixing/Dense_1",
    "norm2": "LayerNorm_1",
    "channel_mixing/dense1": "channel_mixing/Dense_0",
    "channel_mixing/dense2": "channel_mixing/Dense_1",
}
PREFIXES = (
    "params/",  # of training states
    "opt/target/",  # of older training states
)


def named_leaves(tree) -> dict:  # same in every file
    """Path -> leaf of any tree of arrays: {"a/b/kernel": ...}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def released_names(flat) -> dict:
    """The arrays of a checkpoint, known prefixes removed. Raises ValueError for another model's."""
    for prefix in PREFIXES:
        below = {n.removeprefix(prefix): array for n, array in flat.items() if n.startswith(prefix)}
        if below:
            flat = below
    for name in flat:
        require(
            not name.startswith("Transformer/"),
            f"the checkpoint has {name}: it is one of a Vision Transformer, see vit.py",
        )
        require(
            not name.startswith("Mixer/"),
            f"the checkpoint has {name}, a name from before the release; big_vision converts it",
        )
    return flat


def infer_config(flat, **fields) -> Config:
    """The Config of a released checkpoint, read from the shapes of its arrays.

    fields are what no shape tells, such as image_size where the patches do not form a square.
    Raises ValueError if the arrays are not those of a Mixer.
    """
    flat = released_names(flat)

    def shape(name, rank):
        require(name in flat, f"the checkpoint has no array {name}: it is not a Mixer")
        found = np.shape(flat[name])
        require(len(found) == rank, f"{name} has shape {found}, not {rank} axes")
        return found

    h, w, channels, width = shape("stem/kernel", 4)
    patches, tokens_mlp = shape("MixerBlock_0/token_mixing/Dense_0/kernel", 2)
    if "image_size" not in fields:
        side = math.isqrt(patches)
        require(
            side**2 == patches,
            f"the checkpoint is for {patches} patches, which do not form a square: "
            "give image_size=(height, width)",
        )
        fields["image_size"] = (side * h, side * w)
    inferred = {
        "patch_size": (h, w),
        "channels": channels,
        "width": width,
        "depth": len({name.split("/")[0] for name in flat if name.startswith("MixerBlock_")}),
        "tokens_mlp": tokens_mlp,
        "channels_mlp": shape("MixerBlock_0/channel_mixing/Dense_0/kernel", 2)[1],
        "classes": 0,
    }
    if "head/kernel" in flat:
        inferred["classes"] = shape("head/kernel", 2)[1]
    return Config(**{**inferred, **fields})


def official_places(config: Config) -> dict:
    """Official name -> (path of our weight, index into it that selects the official array)."""
    places = {}
    for path in named_leaves(param_table(config)):
        layer, *middle, kind = path.split("/")  # "head/bias" or "blocks/norm1/scale"
        if layer == "blocks":
            name = OFFICIAL_BLOCK["/".join(middle)]
            for i in range(config.depth):
                places[f"MixerBlock_{i}/{name}/{kind}"] = path, i
        else:
            places[f"{OFFICIAL_LAYERS[layer]}/{kind}"] = path, ...  # the whole array
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
    that is missing, unknown, of a wrong shape, not numeric or not finite, and for a checkpoint of
    another number of patches.
    """
    flat = released_names(flat)
    params = jax.tree.map(lambda param: np.empty(param.shape, np.float32), param_table(config))
    leaves = named_leaves(params)  # the same arrays: to fill them is to fill params
    places = official_places(config)
    expected = {name: leaves[path][index] for name, (path, index) in places.items()}
    one_per_patch = "MixerBlock_0/token_mixing/Dense_1/bias"
    if one_per_patch in flat:
        patches = np.size(flat[one_per_patch])
        require(
            patches == config.tokens,
            f"the checkpoint is for {patches} patches, and image_size={config.image_size} has "
            f"{config.tokens}: load it with the Config of infer_config, then see adapt",
        )
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

    Raises ValueError for weights that are not finite.
    """
    flat = to_official(params, config)
    for name, array in flat.items():
        require(np.isfinite(array).all(), f"{name} holds values that are not finite: not saved")
    write_npz(path, flat)


def load(path, config: Config) -> dict:  # same in every file
    """Parameters from an .npz under official names. Raises as read_npz and from_official do."""
    return from_official(read_npz(path), config)


# ==== Demo: digits as they are, with patches shuffled, with all pixels shuffled ===================

DIGITS = Config(
    image_size=28,
    patch_size=4,
    channels=1,
    classes=10,
    width=64,
    depth=4,
    tokens_mlp=64,
    channels_mlp=128,
)
AS_THEY_ARE = "as they are"
REPORT = 100  # steps between lines of progress
EXPECTED = 88.9  # per cent of the held-out digits as they are, with the default flags
FLOOR = 87.0


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


def pixel_orders(config: Config, seed) -> dict:
    """Three orders of an image's pixels (Sec. 3.4). Name -> indices [height*width].

    In the second the patches have changed places, and so have the pixels inside them, in the same
    way in every patch.
    """
    height, width = config.image_size
    image = np.arange(height * width)
    patches = patchify(image.reshape(1, height, width, 1), config.patch_size)
    patches = patches.reshape(config.tokens, -1)  # [T,h*w]
    rng = np.random.default_rng(seed)
    patches = rng.permutation(patches, axis=0)
    patches = rng.permutation(patches, axis=1)
    patches = patches.reshape(*config.grid, *config.patch_size)  # [rows,columns,h,w]
    return {
        AS_THEY_ARE: image,
        "patches and pixels inside them shuffled": patches.swapaxes(1, 2).ravel(),
        "all pixels shuffled": rng.permutation(image),
    }


def reorder(images, order):
    """Puts the pixels of images [B,height,width,C] into another order [height*width]."""
    B, height, width, C = images.shape
    return images.reshape(B, height * width, C)[:, order].reshape(images.shape)


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


def train(config: Config, mesh, images, labels, order, steps, seed):
    """Trains on images uint8 [B,28,28,1], shifted at random, with their pixels in another order.

    Returns the weights and the loss of each step in nats.
    """
    optimizer = make_optimizer(steps)
    init_key, step_key = jax.random.split(jax.random.key(seed))
    state = init_state(init_key, config, optimizer, mesh)
    step = make_train_step(config, optimizer, mesh)
    rng = np.random.default_rng(seed)
    losses = []
    started = time.time()
    for i in range(1, steps + 1):
        rows = rng.integers(len(images), size=RECIPES["digits"].batch)
        pictures = reorder(augment(images[rows], rng, 4), order)
        state, metrics = step(state, place(mesh, pictures, labels[rows]), step_key)
        losses.append(float(metrics["loss"]))
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"step {i}: the loss is {losses[-1]}")
        if i % REPORT == 0 or i == steps:
            left = (time.time() - started) / i * (steps - i)
            print(f"step {i}/{steps}  loss {losses[-1]:.3f} nats  {left:.0f} s left", flush=True)
    return state.params, losses


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


def draw(path, losses, params, config: Config):
    """Losses of all runs (name -> list) and the first token-mixing weights of one (Fig. 5)."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subfigures(1, 2)
    ax = left.subplots()
    window = min(20, len(losses[AS_THEY_ARE]))
    for name, values in losses.items():
        smooth = np.convolve(values, np.full(window, 1 / window), mode="valid")
        ax.plot(window + np.arange(len(smooth)), smooth, label=name)
    ax.set(xlabel="step", ylabel=f"loss in nats, mean of {window} steps", ylim=(0, None))
    ax.legend(title="Pixels of the digits")

    kernel = np.asarray(params["blocks"]["token_mixing"]["dense1"]["kernel"])[0]  # [T,E]
    largest = np.argsort(-np.square(kernel).sum(0))[:24]  # the units with the largest weights
    for ax, unit in zip(right.subplots(4, 6).flat, largest):
        limit = np.abs(kernel[:, unit]).max()
        image = kernel[:, unit].reshape(config.grid)
        ax.imshow(image, cmap="RdBu", vmin=-limit, vmax=limit)
        ax.set_axis_off()
    right.suptitle("Weights of 24 hidden units of the first token mixing")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv=None) -> int:
    """Returns the exit status: 1 below FLOOR or for a loss that is not finite, 2 for bad input."""
    parser = argparse.ArgumentParser(description="Trains a small MLP-Mixer on shuffled digits.")
    data = str(pathlib.Path(__file__).parent / "data/mnist5k.npz")
    recipe = RECIPES["digits"]
    parser.add_argument("--steps", type=int, default=recipe.steps, help="of each of three runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mesh", default="data=1,model=1", help="number of devices on each axis")
    parser.add_argument("--fsdp", action="store_true", help="shard the weights over data too")
    parser.add_argument("--data", default=data, help=".npz of digits")
    parser.add_argument("--out", default="mixer.png", help="where to draw the figure")
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
        print(f"mixer.py: {error}", file=sys.stderr)
        return 2

    held = len(images) // 5
    print(f"{len(images)} digits, {held} held out, on {mesh.size} {jax.default_backend()}(s)")
    held_out = augment(images[:held], np.random.default_rng(args.seed), 4)
    losses = {}
    results = {}
    for name, order in pixel_orders(config, args.seed).items():
        print(f"pixels {name}:")
        try:
            params, losses[name] = train(
                config, mesh, images[held:], labels[held:], order, args.steps, args.seed
            )
        except FloatingPointError as error:
            print(f"mixer.py: {error}", file=sys.stderr)
            return 1
        pictures = reorder(held_out, order)
        results[name] = accuracy(params, config, mesh, pictures, labels[:held])
        if name == AS_THEY_ARE:
            shown = params
    for name, result in results.items():
        print(f"held-out accuracy {result:.1f} %, pixels {name}")
    got = results[AS_THEY_ARE]
    defaults = (args.steps, args.seed, args.data) == (recipe.steps, 0, data)
    if defaults:
        expected = f"expected {EXPECTED} %, at least {FLOOR} %"
    else:
        expected = "expected unknown, at least unknown"
    print(f"result: held-out accuracy: got {got:.1f} %, {expected}")
    try:
        draw(args.out, losses, shown, config)
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
