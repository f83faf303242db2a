"""V-MoE: a Vision Transformer in which experts replace some MLPs. Each token goes to a few of them.

    config = Config(width=512, depth=8, heads=8, mlp=2048, patch_size=32, moe_blocks=(5, 7))
    params = init_params(jax.random.key(0), config)
    images = preprocess(pixels, config.image_size)  # [B,height,width,3], B a multiple of group=8
    logits, metrics = jax.jit(forward, static_argnames="config")(params, images, config)  # [B,N]

    optimizer = optax.adamw(1e-3)                   # training
    mesh = make_mesh("data=1,model=1")              # for eight devices: "data=8,model=1"
    state = init_state(jax.random.key(0), config, optimizer, mesh, params)
    step = make_train_step(config, optimizer, mesh)
    state, metrics = step(state, {"images": images, "labels": labels}, jax.random.key(1))

Paper     Riquelme et al. 2021, "Scaling Vision with Sparse Mixture of Experts", arXiv:2106.05974.
          Eq. 1 to 8, Sec. 3.1 and Sec. 3.2 are those of the Vision Transformer: Dosovitskiy et al.
          2020, "An Image is Worth 16x16 Words", arXiv:2010.11929 v2.
Here      Mixture of experts (Sec. 2.1), its place in a Vision Transformer, capacity (Sec. 2.4),
          Batch Prioritized Routing, the importance and load losses (App. A.2), sizes up to 15B,
          experts that are sharded over devices.
Not here  Dropout; Soft MoE, experts that choose tokens, ensembles (E3), the MAP head, experts
          without capacity; the released files, which are sharded and not .npz. A V-MoE from a
          dense model: examples/moe_upcycle.py. Training on your own pictures: examples/train.py.
Differs   From the paper, following the official code: tanh GELU, LayerNorm epsilon 1e-6, a zero
          head. All experts of a block start alike. Capacity is rounded up to a multiple of 4.
          From the official code: the router computes in float32 whatever the dtype.
          Variance is mean((x - mean)^2), not E[x^2] - E[x]^2.
          Rows with the label -1 are ignored, and they are not routed.
          With dtype="bfloat16" experts multiply in bfloat16.
Claims    C1 routing, losses and models are those of the official code
          C2 parameter counts of all sizes, up to 15B
          C3 FLOPs per token grow with k, not with the number of experts
          C4 balanced routing has no importance loss
          C5 Batch Prioritized Routing keeps the tokens of highest priority
          C6 dispatch by index equals dispatch by one-hot products
          C7 sharded experts give the same numbers, with two all-to-alls a layer in the forward
             pass
          C8 one device and eight drop the same choices
Checked   google-research/vmoe @ 942a78b: logits, losses and gradients of whole models differ by at
          most 1.4e-6 of the largest value, in float32 on a CPU. Choices and slots are identical.
          The claims are tests in tests/test_moe.py.
Run       python moe.py
          81 s on two CPU cores. Trained with a capacity factor of 1.05 and tested with 0.25, Batch
          Prioritized Routing gets 4.6 points more of the held-out digits right (85.4 %, not
          80.8 %; over three seeds 1.0 to 4.6); below 0.5 points it fails
Axes      B batch  T tokens of an image, class token first  G groups  M tokens of a group
          E experts  k experts of a token  c slots of an expert for one group  D width  F hidden
          units  H heads  K features of a head  S keys  L blocks  N classes  R representation
          C channels  h, w height and width of a patch. Inside shard_map B, G and, in the
          experts' weights, E are sizes on one device.
"""

import argparse
import contextlib
import dataclasses
import functools
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
from jax.nn.initializers import glorot_uniform, lecun_normal, normal, ones, zeros
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

# ==== Config ======================================================================================


def require(ok, message):  # same in every file
    """Raises ValueError(message) unless ok."""
    if not ok:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class Config:
    """One V-MoE. Raises ValueError for bad values.

    The defaults are V-MoE-B/16, Every 2, without the layer before the head.
    """

    image_size: int | tuple[int, int] = 224  # height and width in pixels; one number for a square
    patch_size: int | tuple[int, int] = 16  # height and width in pixels
    channels: int = 3
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072  # hidden units of an MLP, and of each expert
    classes: int = 1000  # 0: no head, forward returns the features
    pool: str = "token"  # "token": the class token goes to the head; "gap": the mean of all tokens
    representation: int | None = None  # width of a tanh layer before the head, "pre-logits"
    moe_blocks: tuple[int, ...] = (1, 3, 5, 7, 9, 11)  # the blocks with experts, counted from 0
    experts: int = 32  # in each of these blocks
    k: int = 2  # experts of a token
    group: int = 8  # images whose tokens compete for the same slots
    capacity_factor: float = 1.05  # ratio of all slots to all choices, before rounding
    capacity_multiple: int = 4  # slots are rounded up to a multiple of this
    batch_priority: bool = False  # tokens with a large gate get their slots first
    noise_std: float = 1.0  # in training the router's noise has the deviation noise_std / experts
    importance_weight: float = 0.005  # factor of the importance loss
    load_weight: float = 0.005  # factor of the load loss
    dtype: str = "float32"  # or "bfloat16": of dense layers, GELU, products; all else float32
    remat: bool = True  # recompute each block in the backward pass, to save memory
    fsdp: bool = False  # only for the interface: see __post_init__

    def __post_init__(self):
        for name in ("image_size", "patch_size"):
            size = getattr(self, name)
            if not isinstance(size, tuple | list):
                size = (size, size)
            require(len(size) == 2, f"{name}={size} is not one number or two")
            object.__setattr__(self, name, tuple(size))  # the class is frozen: no plain assignment
        object.__setattr__(self, "moe_blocks", tuple(self.moe_blocks))
        counts = ("channels", "width", "depth", "heads", "mlp", "experts", "k", "group")
        for name in (*counts, "capacity_multiple"):
            size = getattr(self, name)
            require(size >= 1, f"{name}={size} is not at least 1")
        require(
            self.representation is None or self.representation >= 1,
            f"representation={self.representation} is not at least 1",
        )
        require(self.classes >= 0, f"classes={self.classes} is not at least 0")
        for name, choices in {"pool": ("token", "gap"), "dtype": ("float32", "bfloat16")}.items():
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
        require(
            self.moe_blocks
            and set(self.moe_blocks) <= set(range(self.depth))
            and sorted(set(self.moe_blocks)) == list(self.moe_blocks),
            f"moe_blocks={self.moe_blocks} is not one or more ascending numbers from 0 to "
            f"{self.depth - 1}",
        )
        require(self.k <= self.experts, f"k={self.k} is more than experts={self.experts}")
        require(
            0 < self.capacity_factor < math.inf,
            f"capacity_factor={self.capacity_factor} is not above 0 and finite",
        )
        for name in ("noise_std", "importance_weight", "load_weight"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{name}={value} is not at least 0 and finite")
        require(
            not self.fsdp,
            "fsdp=True is not supported: experts are sharded over the mesh axis data already, and "
            "all other weights are copied to every device",
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


def capacity(group_tokens, config: Config) -> int:
    """Number of slots of each expert for a group of so many tokens (Sec. 2.4).

    For 8 images of 50 tokens, k = 2, 8 experts and a factor of 1.05: 400 * 2 * 1.05 / 8 = 105
    slots, rounded up to 108, a multiple of 4. The order of the operations is that of the official
    code, since rounding errors can add a slot: 100 tokens, k = 1, 10 experts and a factor of 1.1
    make 12, not 11, with capacity_multiple=1.
    """
    slots = math.ceil(group_tokens * config.k * config.capacity_factor / config.experts)
    return slots + -slots % config.capacity_multiple


def every(n, depth) -> tuple:
    """moe_blocks of the models called Every n: the last of each n blocks, counted from 0."""
    return tuple(range(n - 1, depth, n))


def last(n, depth) -> tuple:
    """moe_blocks of the models called Last n: the last n of the odd blocks, counted from 0."""
    odd = every(2, depth)
    require(1 <= n <= len(odd), f"n={n} is not from 1 to {len(odd)}")
    return odd[-n:]


def standard_config(width, depth, mlp, heads, patch) -> Config:
    """A Config with 32 experts in every second block, and a layer before the head."""
    return Config(
        width=width,
        depth=depth,
        mlp=mlp,
        heads=heads,
        patch_size=patch,
        moe_blocks=every(2, depth),
        representation=width,
    )


# S has 8 blocks of width 512 and is not the ViT-S of other papers. 15B has the classes of JFT; the
# counts that are published for the others belong to 18,291 classes.
SIZES = {
    "S/32": standard_config(512, 8, 2048, 8, 32),
    "B/32": standard_config(768, 12, 3072, 12, 32),
    "B/16": standard_config(768, 12, 3072, 12, 16),
    "L/32": standard_config(1024, 24, 4096, 16, 32),
    "L/16": standard_config(1024, 24, 4096, 16, 16),
    "H/14": standard_config(1280, 32, 5120, 16, 14),
    "15B": dataclasses.replace(
        standard_config(1408, 48, 6400, 16, 14), representation=None, classes=29_593
    ),
}


# ==== Model: the Vision Transformer ===============================================================


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


def self_attention(x, weights, config: Config):
    """MSA (Eq. 5 to 8). [B,T,D] -> [B,T,D]."""
    q, k, v = project_qkv(x, weights, config.dtype)
    y = attention_reference(q, k, v).swapaxes(1, 2)  # [B,T,H,K]
    return linear(y, weights["out"], config.dtype, axes=2)  # Eq. 8


def mlp(x, weights, config: Config):
    """Two dense layers with a GELU between them. [...,D] -> [...,D]."""
    y = linear(x, weights["dense1"], config.dtype)  # [...,F]
    y = jax.nn.gelu(y, approximate=True)
    return linear(y, weights["dense2"], config.dtype)


# ==== Model: the mixture of experts ===============================================================


class Routing(NamedTuple):
    """What the router decides about each token of each group: its k experts, best first.

    An example of one group with six tokens, two experts, k = 1, and two slots for each expert:

        token     0  1  2  3  4  5
        expert    0  1  0  0  1  0
        slot      0  0  1  2  1  3     tokens 3 and 5 are dropped: expert 0 has no slots 2 and 3
    """

    experts: jax.Array  # int32 [G,M,k]
    gates: jax.Array  # float32 [G,M,k]: the factors of the experts' outputs
    slots: jax.Array  # int32 [G,M,k]: the place at this expert; a choice with slot >= c is dropped


NO_SLOT = jnp.iinfo(jnp.int32).max  # more than any c, so that dispatch drops it


def route(gates, valid, config: Config) -> Routing:
    """Sends each token to the k experts with its largest gates. [G,M,E], bool [G,M] -> Routing.

    The gates are the softmax over all experts, and are not made to sum to 1 over the k. All first
    choices get slots before any second choice. Within one rank of choice tokens are served in their
    order in the group; with batch_priority the token with the largest gate is served first (Batch
    Prioritized Routing). Tokens that are not valid get no slot, and push no other token back.
    """
    top_gates, experts = lax.top_k(gates, config.k)  # of equal gates the lower expert comes first
    if config.batch_priority:
        order = jnp.argsort(-top_gates[:, :, 0], axis=1, stable=True)
    else:
        order = jnp.broadcast_to(jnp.arange(gates.shape[1]), gates.shape[:2])
    slots = jax.vmap(functools.partial(give_slots, number=config.experts))(experts, order, valid)
    return Routing(experts, top_gates, slots)


def give_slots(experts, order, valid, number):
    """The slots of one group. experts int [M,k], order int [M], valid bool [M] -> int [M,k].

    order lists the tokens as they are served; number is how many experts there are. A choice's slot
    is the number of valid choices of the same expert that were served before it, including those
    that will be dropped. The result is in the order of the tokens.
    """
    M, k = experts.shape
    queue = experts[order].T.ravel()  # [k*M]: the first choices of all tokens, then the second
    chosen = jax.nn.one_hot(queue, number, dtype=jnp.int32)  # [k*M,E]
    chosen = jnp.where(jnp.tile(valid[order], k)[:, None], chosen, 0)
    earlier = jnp.cumsum(chosen, axis=0) - chosen
    slots = jnp.take_along_axis(earlier, queue[:, None], axis=1)
    slots = slots.reshape(k, M).T[jnp.argsort(order)]  # back to the order of the tokens
    return jnp.where(valid[:, None], slots, NO_SLOT)


def dispatch(tokens, routing: Routing, c, config: Config):
    """Copies each token into the buffers of its experts, of c slots each. [G,M,D] -> [E,G*c,D].

    Slots that no token has are zero. A choice whose slot does not exist is dropped.
    """
    G, M, D = tokens.shape
    copies = jnp.broadcast_to(tokens[:, :, None], (G, M, config.k, D))
    groups = jnp.arange(G)[:, None, None]
    buffers = jnp.zeros((config.experts, G, c, D), tokens.dtype)
    buffers = buffers.at[routing.experts, groups, routing.slots].set(copies, mode="drop")
    return buffers.reshape(config.experts, G * c, D)


def combine(outputs, routing: Routing, c):
    """The sum of the experts' outputs, weighted by the gates. [E,G*c,D] -> [G,M,D].

    A choice that was dropped adds nothing.
    """
    E, _, D = outputs.shape
    G = len(routing.gates)
    groups = jnp.arange(G)[:, None, None]
    places = outputs.reshape(E, G, c, D).at[routing.experts, groups, routing.slots]
    chosen = places.get(mode="fill", fill_value=0)  # [G,M,k,D]; zeros where there is no such slot
    return jnp.einsum("gmkd,gmk->gmd", chosen, routing.gates, precision="highest")


def importance_loss(gates, valid):
    """App. A.2: squared variation, over the experts, of the sum of each expert's gates. -> [G].

    gates [G,M,E]: without noise; valid bool [G,M].
    """
    importance = jnp.where(valid[:, :, None], gates, 0).sum(1)  # [G,E]
    return squared_variation(importance)


def load_loss(logits, noisy_logits, valid, k, deviation):
    """App. A.2: squared variation, over the experts, of each expert's expected load. -> [G].

    An expert's expected load is a sum over the tokens. Each adds the probability that it would
    choose this expert if the noise were drawn anew: that the clean logit plus new noise of this
    deviation exceeds the k-th largest noisy logit of the token. logits [G,M,E], valid bool [G,M].
    """
    threshold = lax.top_k(noisy_logits, k)[0][:, :, -1:]  # [G,M,1]
    probability = normal_cdf((logits - threshold) / deviation)
    load = jnp.where(valid[:, :, None], probability, 0).sum(1)  # [G,E]
    return squared_variation(load)


@jax.custom_jvp
def normal_cdf(x):
    """The probability that standard normal noise is below x.

    The derivative is given by hand, because differentiating lax.erf inside shard_map fails in JAX
    0.12.
    """
    return (1 + lax.erf(x / math.sqrt(2))) / 2


@normal_cdf.defjvp
def normal_cdf_jvp(primals, tangents):
    """The derivative is the normal density."""
    (x,) = primals
    (tangent,) = tangents
    density = jnp.exp(-jnp.square(x) / 2) / math.sqrt(2 * math.pi)
    return normal_cdf(x), density * tangent


def squared_variation(x):
    """(standard deviation / mean)^2 over the last axis; 0 where the mean is 0. [G,E] -> [G]."""
    mean = x.mean(-1)
    variance = x.var(-1)
    return jnp.where(mean == 0, 0, variance / jnp.where(mean == 0, 1, mean) ** 2)


class Report(NamedTuple):
    """What a mixture reports about its routing; the metrics are computed from it."""

    routing: Routing
    valid: jax.Array  # bool [G,M]: the tokens that took part
    importance_loss: jax.Array  # [G]
    load_loss: jax.Array  # [G]; 0 without noise
    entropy: jax.Array  # [G,M], of the gates without noise, in nats


def mixture(x, weights, config: Config, noise, valid, data_axis=None):
    """MoE(x) = sum over the chosen experts i of g(x)_i e_i(x) (Sec. 2.1).

    [B,T,D] -> [B,T,D], Report. weights are those of the block; only "router" and "experts" are
    used. Inside shard_map, with data_axis, weights["experts"] holds the experts of this device.
    noise: standard normal [G,M,E], or None. valid bool [B] is False for images to ignore.
    """
    B, T, D = x.shape
    G = B // config.group
    tokens = x.reshape(G, -1, D)  # a group is consecutive images: [G,M,D]
    M = tokens.shape[1]
    valid = jnp.repeat(valid, T).reshape(G, M)

    # By default a GPU or TPU would round the router's inputs, which can change the choice.
    kernel = weights["router"]["kernel"]
    logits = jnp.matmul(tokens.astype(jnp.float32), kernel, precision="highest")  # [G,M,E]
    gates = jax.nn.softmax(logits)
    importance = importance_loss(gates, valid)
    entropy = -(gates * jax.nn.log_softmax(logits)).sum(-1)
    load = jnp.zeros_like(importance)
    if noise is not None and config.noise_std > 0:
        deviation = config.noise_std / config.experts
        noisy_logits = logits + deviation * noise
        gates = jax.nn.softmax(noisy_logits)
        load = load_loss(logits, noisy_logits, valid, config.k, deviation)

    c = capacity(M, config)
    routing = route(gates, valid, config)
    buffers = dispatch(tokens.astype(config.dtype), routing, c, config)  # [E,G*c,D]
    if data_axis:
        # All-to-all: each device sends every other device the buffers of the experts that live
        # there. [E,G*c,D] -> [E/n,n*G*c,D] on n devices.
        buffers = lax.all_to_all(buffers, data_axis, split_axis=0, concat_axis=1, tiled=True)
    outputs = jax.vmap(functools.partial(mlp, config=config))(buffers, weights["experts"])
    if data_axis:
        # All-to-all: the outputs return to the devices that hold the tokens.
        outputs = lax.all_to_all(outputs, data_axis, split_axis=1, concat_axis=0, tiled=True)
    y = combine(outputs.astype(jnp.float32), routing, c)
    return y.reshape(B, T, D), Report(routing, valid, importance, load, entropy)


# ==== Model: blocks and the whole =================================================================


def block(x, weights, config: Config, noise, valid, data_axis=None):
    """One encoder block. [B,T,D] -> [B,T,D], and the Report of a block with experts, else None."""
    # Eq. 2: z' = MSA(LN(z)) + z
    y = layer_norm(x, weights["norm1"])
    x = x + self_attention(y, weights, config).astype(x.dtype)

    # Eq. 3, with a mixture in the place of the MLP where the block has experts.
    y = layer_norm(x, weights["norm2"])
    report = None
    if "experts" in weights:
        y, report = mixture(y, weights, config, noise, valid, data_axis)
    else:
        y = mlp(y, weights["mlp"], config)
    return x + y.astype(x.dtype), report


def draw_noise(key, count, config: Config, data_axis=None):
    """Standard normal noise for `count` images in each block with experts. -> [blocks,G,M,E].

    A group gets the same noise on any mesh: its number among all groups is folded into the key.
    """
    G = count // config.group
    number = jnp.arange(G)
    if data_axis:
        number = number + G * lax.axis_index(data_axis)
    shape = (len(config.moe_blocks), config.group * config.tokens, config.experts)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, number)
    noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)  # [G,blocks,M,E]
    return noise.swapaxes(0, 1)


def encode(params, images, config: Config, *, noise=None, valid=None, data_axis=None):
    """All tokens after the last LayerNorm [B,T,D], and {block: Report} of those with experts.

    noise as from draw_noise; the other arguments are those of forward.
    """
    B = len(images)
    require(
        B % config.group == 0,
        f"{B} images on a device are not a multiple of group={config.group}",
    )
    check_blocks(params, config)
    if valid is None:
        valid = jnp.ones(B, bool)
    require(
        valid.shape == (B,) and valid.dtype == bool,
        f"valid is {valid.dtype} {valid.shape}, not bool ({B},)",
    )
    if noise is not None:
        groups = B // config.group
        wanted = (len(config.moe_blocks), groups, config.group * config.tokens, config.experts)
        require(noise.shape == wanted, f"noise has shape {noise.shape}, not {wanted}")

    def layer(x, weights, noise, valid):
        return block(x, weights, config, noise, valid, data_axis)

    if config.remat:
        layer = jax.checkpoint(layer)  # keeps the inputs of a block, and computes the rest again

    x = embed(params, images, config)
    reports = {}
    for i in range(config.depth):
        block_noise = None
        if noise is not None and i in config.moe_blocks:
            block_noise = noise[config.moe_blocks.index(i)]
        x, report = layer(x, params["blocks"][str(i)], block_noise, valid)
        if report:
            reports[i] = report
    return layer_norm(x, params["norm"]), reports


def check_blocks(params, config: Config):
    """Raises ValueError for params whose blocks, experts or head are not those of config."""
    depth = len(params["blocks"])
    require(depth == config.depth, f"params have {depth} blocks, not depth={config.depth}")
    found = tuple(i for i in range(depth) if "router" in params["blocks"][str(i)])
    require(
        found == config.moe_blocks,
        f"params have experts in the blocks {found}, not moe_blocks={config.moe_blocks}",
    )
    for i in found:
        _, experts = params["blocks"][str(i)]["router"]["kernel"].shape
        require(
            experts == config.experts,
            f"params have {experts} experts, not experts={config.experts}",
        )
    require(
        ("pre_logits" in params) == (config.representation is not None),
        f"params {'have' if 'pre_logits' in params else 'lack'} the layer pre_logits, and "
        f"representation={config.representation}",
    )


def forward(
    params,
    images,
    config: Config,
    *,
    key=None,
    noise=None,
    valid=None,
    data_axis=None,
    model_axis=None,
):
    """Logits and metrics. images [B,height,width,C] in [-1, 1] -> [B,N], {name: scalar}.

    With a key the router gets noise, as in training; noise [blocks,G,M,E], standard normal, is used
    instead of a draw. valid bool [B] is False for images to ignore, such as those that fill up a
    last batch: they take no slots and count in no metric. An image's logits depend on the other
    images of its group. With classes=0 the result is the features, [B,D] or [B,R]. Metrics are
    those of routing_metrics.

    data_axis is the name of the mesh axis over which images and experts are sharded, for use inside
    shard_map. Each block with experts does two all-to-alls over it in the forward pass, each of
    E*G*c*D numbers; the gradient does two more, and with remat those of the forward pass again.
    model_axis must be None: no weight is sharded over it. Raises ValueError for images of another
    shape, dtype or range, for a number of images that group does not divide, and for params of
    another config.
    """
    require(
        model_axis is None,
        f"model_axis={model_axis!r} is not None: moe.py shards nothing over it",
    )
    if noise is None and key is not None:
        noise = draw_noise(key, len(images), config, data_axis)
    x, reports = encode(params, images, config, noise=noise, valid=valid, data_axis=data_axis)
    if config.pool == "token":
        x = x[:, 0]  # [B,D]
    else:
        x = x.mean(1)  # [B,D]
    if config.representation:
        x = linear(x, params["pre_logits"], config.dtype).astype(jnp.float32)
        x = jnp.tanh(x)  # [B,R]
    if config.classes:
        x = linear(x, params["head"], config.dtype).astype(jnp.float32)  # [B,N]
    return x, routing_metrics(reports, config, data_axis)


def routing_metrics(reports, config: Config, data_axis=None) -> dict:
    """Statistics of the routing of all groups, on all devices, in all blocks with experts.

    importance_loss  summed over the blocks, mean over the groups with valid images
    load_loss        likewise
    auxiliary_loss   both, multiplied by their weights: what is added to the loss of the task
    dropped          share of all choices that got no slot
    largest_load     of all experts and blocks; the load of an expert is its number of choices
                     divided by what balanced routing would give it
    smallest_load    likewise, 0 for an expert without tokens
    router_entropy   of the gates, mean over tokens, in nats: log(E) where the router is undecided
    """
    blocks = jax.tree.map(lambda *x: jnp.stack(x), *reports.values())  # [blocks,G,...]
    valid = blocks.valid
    c = capacity(valid.shape[2], config)
    chosen = jax.nn.one_hot(blocks.routing.experts, config.experts)  # [blocks,G,M,k,E]
    sums = {  # each [blocks], but choices
        "groups": valid.any(2).sum(1, dtype=jnp.float32),
        "tokens": valid.sum((1, 2), dtype=jnp.float32),
        "choices": jnp.where(valid[..., None, None], chosen, 0).sum((1, 2, 3)),  # [blocks,E]
        "kept": (blocks.routing.slots < c).sum((1, 2, 3), dtype=jnp.float32),
        "importance_loss": blocks.importance_loss.sum(1),
        "load_loss": blocks.load_loss.sum(1),
        "entropy": jnp.where(valid, blocks.entropy, 0).sum((1, 2)),
    }
    if data_axis:
        sums = lax.psum(sums, data_axis)  # all-reduce: over the groups of all devices

    groups = jnp.maximum(sums["groups"], 1)  # 1, not 0, where no image is valid
    tokens = jnp.maximum(sums["tokens"], 1)
    importance = (sums["importance_loss"] / groups).sum()
    load = (sums["load_loss"] / groups).sum()
    relative = sums["choices"] * config.experts / (config.k * tokens[:, None])  # 1: balanced
    return {
        "importance_loss": importance,
        "load_loss": load,
        "auxiliary_loss": config.importance_weight * importance + config.load_weight * load,
        "dropped": ((config.k * sums["tokens"] - sums["kept"]) / (config.k * tokens)).mean(),
        "largest_load": relative.max(),
        "smallest_load": relative.min(),
        "router_entropy": (sums["entropy"] / tokens).mean(),
    }


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
    """Softmax cross-entropy plus the auxiliary losses; both are means over all devices.

    batch: {"images": [B,height,width,C] in [-1, 1], "labels": int [B], -1 for rows to ignore, or
    float [B,N], rows that sum to 1, for mixtures of classes, or to 0, to ignore them}. Returns the
    sum and the metrics of routing_metrics with "loss", the cross-entropy alone in nats, the mean
    over the valid rows. That loss is 0 if no row is valid.
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
    logits, metrics = forward(
        params,
        batch["images"],
        config,
        key=key,
        valid=targets.sum(-1) != 0,
        data_axis=data_axis,
        model_axis=model_axis,
    )
    total = -(targets * jax.nn.log_softmax(logits)).sum()
    count = targets.sum()
    if data_axis:
        total = lax.psum(total, data_axis)  # all-reduce: the rows of all devices
        count = lax.psum(count, data_axis)
    loss = total / jnp.where(count > 0, count, 1)  # no valid row: 0, not 0/0
    return loss + metrics["auxiliary_loss"], {"loss": loss, **metrics}


# ==== Parameters, fine-tuning, recipes ============================================================


@dataclasses.dataclass(frozen=True)
class Param:  # same in every file
    """Shape, sharding and initialiser of one weight. A dataclass, since jax.tree opens tuples."""

    shape: tuple
    spec: P  # the mesh axis that shards each array axis, if any
    init: Callable  # (key, shape, dtype) -> array


def same_for_all_experts(init):
    """An initialiser of [E,...] that gives every expert the same draw, as in the official code."""

    def init_experts(key, shape, dtype):
        return jnp.broadcast_to(init(key, shape[1:], dtype), shape)

    return init_experts


def param_table(config: Config) -> dict:
    """The Param of each weight, as a nested dict. Experts are stacked on a leading axis E."""
    D = config.width
    H = config.heads
    K = D // H
    F = config.mlp
    E = config.experts
    T = config.tokens
    R = config.representation or D  # what the head reads
    N = config.classes
    C = config.channels
    h, w = config.patch_size

    def dense(shape, axes=1, init=None):
        """A dense layer from the first `axes` axes to the others."""
        inputs = tuple(range(axes))
        outputs = tuple(range(axes, len(shape)))
        # As in the official code: fan-in and fan-out of [D,H,K] are those of a matrix [D,H*K].
        init = init or glorot_uniform(in_axis=inputs, out_axis=outputs)
        return {"kernel": Param(shape, P(), init), "bias": Param(shape[axes:], P(), zeros)}

    def norm():
        return {"scale": Param((D,), P(), ones), "bias": Param((D,), P(), zeros)}

    def mlp_layer(inputs, outputs):
        layer = dense((inputs, outputs))
        return {**layer, "bias": Param((outputs,), P(), normal(1e-6))}

    def stack(param):
        """The same weight of E experts, always sharded over "data"."""
        return Param((E, *param.shape), P("data"), same_for_all_experts(param.init))

    mlp_layers = {"dense1": mlp_layer(D, F), "dense2": mlp_layer(F, D)}
    blocks = {}
    for i in range(config.depth):
        blocks[str(i)] = {
            "norm1": norm(),
            "query": dense((D, H, K)),
            "key": dense((D, H, K)),
            "value": dense((D, H, K)),
            "out": dense((H, K, D), axes=2),
            "norm2": norm(),
        }
        if i in config.moe_blocks:
            blocks[str(i)]["router"] = {"kernel": Param((D, E), P(), lecun_normal())}
            blocks[str(i)]["experts"] = jax.tree.map(stack, mlp_layers)
        else:
            blocks[str(i)]["mlp"] = mlp_layers

    table = {
        "embed": dense((h, w, C, D), axes=3, init=lecun_normal(in_axis=(0, 1, 2))),
        "position": Param((T, D), P(), normal(0.02)),
        "blocks": blocks,
        "norm": norm(),
    }
    if config.pool == "token":
        table["class"] = Param((D,), P(), zeros)
    if config.representation:
        table["pre_logits"] = dense((D, R), init=lecun_normal())
    if config.classes:
        table["head"] = dense((R, N), init=zeros)
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
    """Pre-trained weights for fine-tuning: positions resized, a new zero head.

    The head is new even for the same number of classes. "pre_logits" is dropped where new_config
    has none. All other weights are the same arrays as in params. Raises ValueError if another field
    of the architecture differs.
    """
    architecture = ["patch_size", "channels", "width", "depth", "heads", "mlp", "pool"]
    for name in [*architecture, "moe_blocks", "experts", "representation"]:
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
    source: str  # quoted from the official code, or reproduced here


# Of B/16. For fine-tuning at 384 pixels the official code has capacity_factor=1.5.
RECIPES = {
    "to ImageNet": Recipe(
        "sgd", 1024, 10_000, 0.003, "cosine", 500, 0.0, 10.0, "quoted: official code"
    ),
    "to CIFAR": Recipe(
        "sgd", 1024, 1_000, 0.0015, "cosine", 100, 0.0, 10.0, "quoted: official code"
    ),
    "digits": Recipe("adam", 32, 1_000, 3e-3, "cosine", 60, 0.1, 1.0, "reproduced: python moe.py"),
}


# ==== Sharded training: images and experts over mesh axis "data" ==================================


def trimmed_spec(axes):  # same in every file
    """PartitionSpec without None at the end, as jit returns it; any other recompiles a step."""
    axes = list(axes)
    while axes and axes[-1] is None:
        axes.pop()
    return P(*axes)


def param_specs(config: Config, mesh) -> dict:
    """The PartitionSpec of each weight. Raises ValueError if the mesh does not divide the experts.

    Experts are sharded over "data"; every device has all the other weights.
    """
    require(
        mesh.shape["model"] == 1,
        f"model={mesh.shape['model']}: moe.py shards nothing over this mesh axis, it must be 1",
    )
    devices = mesh.shape["data"]
    require(
        config.experts % devices == 0,
        f"experts={config.experts} are not a multiple of mesh axis data={devices}",
    )

    def spec_of(param):
        return P() if devices == 1 else param.spec

    return jax.tree.map(spec_of, param_table(config))


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

    def local_loss(params, batch, key):
        return loss_fn(params, batch, key, config, data_axis=data_axis)

    sharded_loss = jax.shard_map(
        local_loss,
        mesh=mesh,
        in_specs=(param_specs(config, mesh), P(data_axis), P()),
        out_specs=P(),
    )

    def loss(params, batch, key):
        rows = len(batch["images"])
        devices = mesh.shape["data"]
        require(
            rows % (devices * config.group) == 0,
            f"a batch of {rows} is not a multiple of data={devices} times group={config.group}",
        )
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


# ==== Checkpoints: the names of the official code =================================================

OFFICIAL_LAYERS = {  # ours -> name in the checkpoints of google-research/vmoe
    "embed": "embedding",
    "norm": "Encoder/encoder_norm",
    "pre_logits": "pre_logits",
    "head": "head",
    "class": "cls",
    "position": "Encoder/posembed_input/pos_embedding",
}
OFFICIAL_BLOCK = {  # below Encoder/encoderblock_0, encoderblock_1, ...
    "norm1": "LayerNorm_0",
    "query": "SelfAttention/query",
    "key": "SelfAttention/key",
    "value": "SelfAttention/value",
    "out": "SelfAttention/out",
    "norm2": "LayerNorm_1",
    "mlp/dense1": "Mlp/Dense_0",
    "mlp/dense2": "Mlp/Dense_1",
    "router": "Moe/Router/dense",
    "experts/dense1": "Moe/Mlp/Dense_0",
    "experts/dense2": "Moe/Mlp/Dense_1",
}


def named_leaves(tree) -> dict:  # same in every file
    """Path -> leaf of any tree of arrays: {"a/b/kernel": ...}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def infer_config(flat, **fields) -> Config:
    """The Config of a checkpoint, read from the names and shapes of its arrays.

    fields are what no shape tells, such as k, group and capacity_factor, whose defaults are those
    of Config, and image_size where the patches do not form a square. Names may begin with
    "params/". Raises ValueError if the arrays are not those of a V-MoE.
    """
    flat = {name.removeprefix("params/"): array for name, array in flat.items()}
    position = OFFICIAL_LAYERS["position"]

    def shape(name, rank):
        require(name in flat, f"the checkpoint has no array {name}: it is not a V-MoE")
        found = np.shape(flat[name])
        require(len(found) == rank, f"{name} has shape {found}, not {rank} axes")
        return found

    h, w, channels, width = shape("embedding/kernel", 4)
    pool = "token" if "cls" in flat else "gap"
    if "image_size" not in fields:
        patches = shape(position, 3)[1] - (pool == "token")
        side = math.isqrt(patches)
        require(
            side**2 == patches,
            f"the position table has {patches} patches, which do not form a square: "
            "give image_size=(height, width)",
        )
        fields["image_size"] = (side * h, side * w)
    names = re.compile(r"Encoder/encoderblock_(\d+)/(.*)")
    found = [match.groups() for name in flat if (match := names.fullmatch(name))]
    moe_blocks = sorted(int(i) for i, name in found if name == "Moe/Router/dense/kernel")
    require(moe_blocks, "the checkpoint has no Moe/Router/dense/kernel: it is not a V-MoE")
    experts, _, hidden = shape(f"Encoder/encoderblock_{moe_blocks[0]}/Moe/Mlp/Dense_0/kernel", 3)
    inferred = {
        "patch_size": (h, w),
        "channels": channels,
        "width": width,
        "depth": len({i for i, _ in found}),
        "heads": shape("Encoder/encoderblock_0/SelfAttention/query/kernel", 3)[1],
        "mlp": hidden,
        "classes": 0,
        "pool": pool,
        "moe_blocks": moe_blocks,
        "experts": experts,
    }
    if "head/kernel" in flat:
        inferred["classes"] = shape("head/kernel", 2)[1]
    if "pre_logits/kernel" in flat:
        inferred["representation"] = shape("pre_logits/kernel", 2)[1]
    return Config(**{**inferred, **fields})


def official_places(config: Config) -> dict:
    """Official name -> (path of our weight, index into it that selects the official array)."""
    places = {}
    for path in named_leaves(param_table(config)):  # "blocks/3/mlp/dense1/kernel", "class"
        layer, *rest = path.split("/")
        if layer == "class":
            places[OFFICIAL_LAYERS[layer]] = path, (np.newaxis, np.newaxis)  # [D], official [1,1,D]
        elif layer == "position":
            places[OFFICIAL_LAYERS[layer]] = path, np.newaxis  # [T,D], official [1,T,D]
        elif layer == "blocks":
            i, *middle, kind = rest
            name = OFFICIAL_BLOCK["/".join(middle)]
            places[f"Encoder/encoderblock_{i}/{name}/{kind}"] = path, ...  # the whole array
        else:
            places[f"{OFFICIAL_LAYERS[layer]}/{rest[0]}"] = path, ...
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
    """Parameters from arrays under official names, as float32 numpy arrays.

    Names may begin with "params/". Raises ValueError for an array that is missing, unknown, of a
    wrong shape, not numeric or not finite.
    """
    flat = {name.removeprefix("params/"): array for name, array in flat.items()}
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
    """The inverse of from_official: numpy arrays under the official names.

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
    """Writes an .npz under official names, which load reads.

    The file does not store k, group and capacity_factor: see infer_config. Raises ValueError for
    weights that are not finite.
    """
    flat = to_official(params, config)
    for name, array in flat.items():
        require(np.isfinite(array).all(), f"{name} holds values that are not finite: not saved")
    write_npz(path, flat)


def load(path, config: Config) -> dict:  # same in every file
    """Parameters from an .npz under official names. Raises as read_npz and from_official do."""
    return from_official(read_npz(path), config)


# ==== Demo: digits at full and at low capacity ====================================================

DIGITS = Config(
    image_size=28,
    patch_size=4,
    channels=1,
    classes=10,
    width=64,
    depth=2,
    heads=4,
    mlp=128,
    pool="gap",
    moe_blocks=(0, 1),
    experts=8,
    remat=False,
)
FACTORS = (1.05, 0.5, 0.25, 0.1)  # capacity factors of the test
LOW = 0.25  # the capacity factor of the result and of the figure's digits
EXPECTED = 4.6  # points of accuracy that Batch Prioritized Routing saves at LOW
FLOOR = 0.5  # points; below, the demo fails
REPORT = 100  # steps between lines of progress


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
    init_key, step_key = jax.random.split(jax.random.key(seed))
    optimizer = make_optimizer(steps)
    state = init_state(init_key, config, optimizer, mesh)
    step = make_train_step(config, optimizer, mesh)
    rng = np.random.default_rng(seed)
    started = time.time()
    for i in range(1, steps + 1):
        rows = rng.integers(len(images), size=RECIPES["digits"].batch)
        batch = place(mesh, augment(images[rows], rng, 2), labels[rows])
        state, metrics = step(state, batch, step_key)
        metrics = jax.tree.map(float, metrics)
        loss = metrics["loss"]
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {i}: the loss is {loss}")
        if i % REPORT == 0 or i == steps:
            left = (time.time() - started) / i * (steps - i)
            print(
                f"step {i}/{steps}  loss {loss:.3f} nats  load {metrics['smallest_load']:.2f} to "
                f"{metrics['largest_load']:.2f}  dropped {metrics['dropped']:.1%}  "
                f"{left:.0f} s left",
                flush=True,
            )
    return state.params


def evaluate(params, config: Config, mesh, images, labels):
    """Accuracy in per cent on images uint8 [B,28,28,1], and the means of the batches' metrics."""
    data_axis = axis_if_split(mesh, "data")

    def local(params, batch):
        labels = batch["labels"]
        logits, metrics = forward(
            params, batch["images"], config, valid=labels >= 0, data_axis=data_axis
        )
        right = (logits.argmax(-1) == labels).sum()
        if data_axis:
            right = lax.psum(right, data_axis)  # all-reduce: the right guesses of all devices
        return right, metrics

    specs = param_specs(config, mesh), P(data_axis)
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P()))
    size = RECIPES["digits"].batch
    right = 0
    every_metrics = []
    for first in range(0, len(images), size):
        rows = np.arange(first, first + size)
        inside = rows < len(images)
        # The last batch is filled up with the first images. Their label is -1: they take no slots.
        rows = rows % len(images)
        answers = np.where(inside, labels[rows], -1)
        count, metrics = run(params, place(mesh, images[rows], answers))
        right += int(count)
        every_metrics.append(metrics)
    means = jax.tree.map(lambda *x: float(np.mean(x)), *every_metrics)
    return 100 * right / len(images), means


def try_capacities(params, mesh, images, labels):
    """Prints accuracy for each capacity factor, without and with Batch Prioritized Routing.

    The share of dropped choices and the load are those with Batch Prioritized Routing.

    Returns {batch_priority: [accuracy for each of FACTORS]}.
    """
    print(f"{'capacity':>8} {'dropped':>8} {'largest load':>13} {'accuracy':>9} {'with BPR':>9}")
    results = {False: [], True: []}
    for factor in FACTORS:
        for batch_priority in results:
            config = dataclasses.replace(
                DIGITS, capacity_factor=factor, batch_priority=batch_priority
            )
            found, metrics = evaluate(params, config, mesh, images, labels)
            results[batch_priority].append(found)
        print(
            f"{factor:8} {metrics['dropped']:8.1%} {metrics['largest_load']:13.2f} "
            f"{results[False][-1]:7.1f} % {results[True][-1]:7.1f} %",
            flush=True,
        )
    return results


def kept_patches(params, images):
    """Which patches have a slot at any of their experts in the last block, with BPR at LOW.

    images uint8 [B,28,28,1] -> bool [B,28,28]: whether a pixel's patch has one.
    """
    config = dataclasses.replace(DIGITS, capacity_factor=LOW, batch_priority=True)
    run = jax.jit(functools.partial(encode, config=config))
    _, reports = run(params, images.astype(np.float32) / 127.5 - 1)
    slots = reports[config.moe_blocks[-1]].routing.slots  # [G,M,k]
    kept = (slots < capacity(slots.shape[1], config)).any(-1)
    kept = np.asarray(kept).reshape(len(images), *config.grid)
    h, w = config.patch_size
    return kept.repeat(h, axis=1).repeat(w, axis=2)


def draw(path, results, images, kept):
    """Left: accuracy against capacity. Right: digits without the patches that BPR drops."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subfigures(1, 2)
    ax = left.subplots()
    for batch_priority, row in results.items():
        name = "Batch Prioritized Routing" if batch_priority else "slots in the order of tokens"
        ax.plot(FACTORS, row, marker="o", label=name)
    ax.set(xlabel="capacity factor", ylabel="held-out accuracy in per cent", xscale="log")
    ax.set_xticks(FACTORS, [str(factor) for factor in FACTORS])
    ax.minorticks_off()
    ax.legend()

    for ax, image, mask in zip(right.subplots(2, 4).flat, images[..., 0], kept):
        ax.imshow(np.where(mask, image, 128), cmap="gray", vmin=0, vmax=255)
        ax.set_axis_off()
    right.suptitle(f"What BPR drops at a capacity factor of {LOW}, greyed")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv=None) -> int:
    """Returns the exit status: 1 below FLOOR or for a loss that is not finite, 2 for bad input."""
    parser = argparse.ArgumentParser(description="Trains a small V-MoE on digits.")
    data = str(pathlib.Path(__file__).parent / "data/mnist5k.npz")
    recipe = RECIPES["digits"]
    parser.add_argument("--steps", type=int, default=recipe.steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mesh", default="data=1,model=1", help="number of devices on each axis")
    parser.add_argument("--data", default=data, help=".npz of digits")
    parser.add_argument("--out", default="moe.png", help="where to draw the figure")
    args = parser.parse_args(argv)
    try:
        require(args.steps >= 1, f"--steps {args.steps} is not at least 1")
        require(0 <= args.seed < 2**32, f"--seed {args.seed} is not in 0 to {2**32 - 1}")
        check_out(args.out)
        images, labels = load_digits(args.data)
        mesh = make_mesh(args.mesh)
        param_specs(DIGITS, mesh)  # raises if the mesh does not divide the experts
        least = mesh.shape["data"] * DIGITS.group
        require(
            recipe.batch % least == 0,
            f"--mesh {args.mesh}: the batch of {recipe.batch} is not a multiple of {least}, "
            f"the devices times group={DIGITS.group}",
        )
    except ValueError as error:
        print(f"moe.py: {error}", file=sys.stderr)
        return 2

    held = len(images) // 5
    print(f"{len(images)} digits, {held} held out, on {mesh.size} {jax.default_backend()}(s)")
    try:
        params = train(DIGITS, mesh, images[held:], labels[held:], args.steps, args.seed)
    except FloatingPointError as error:
        print(f"moe.py: {error}", file=sys.stderr)
        return 1
    results = try_capacities(params, mesh, images[:held], labels[:held])
    saved = results[True][FACTORS.index(LOW)] - results[False][FACTORS.index(LOW)]
    defaults = (args.steps, args.seed, args.data) == (recipe.steps, 0, data)
    if defaults:
        expected = f"expected {EXPECTED} points, at least {FLOOR} points"
    else:
        expected = "expected unknown, at least unknown"
    print(f"result: accuracy that BPR saves at {LOW}: got {saved:.1f} points, {expected}")
    shown = images[: DIGITS.group]
    kept = kept_patches(params, shown)
    try:
        draw(args.out, results, shown, kept)
        print(f"wrote {args.out}")
    except Exception as error:  # matplotlib is missing, or it cannot draw here
        print(f"no figure: {type(error).__name__}: {error}")
    return int(defaults and not saved >= FLOOR)


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
