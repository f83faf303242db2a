"""Variational diffusion models: likelihood bounds in bits per dimension, and a learned schedule.

    config = Config(image_size=32, width=128, depth=4)
    params = init_params(jax.random.key(0), config)
    cost = bits_per_dim(params, images, jax.random.key(1), config)  # images uint8 [B,32,32,3]
    print(cost["total"])
    pictures = sample(params, jax.random.key(2), 16, config, steps=250)  # int32 [16,32,32,3]

    mesh = make_mesh("data=1,model=1")  # training; for eight devices: "data=8,model=1"
    recipe = RECIPES["CIFAR-10"]
    state = init_state(jax.random.key(0), config, recipe_optimizer(recipe), mesh)
    step = make_train_step(config, recipe_optimizer(recipe), mesh, recipe.ema)
    state, metrics = step(state, {"images": images}, jax.random.key(1))

Paper     Kingma et al. 2021, "Variational Diffusion Models", arXiv:2107.00630 v6.
Here      The forward process and its reversal (Eq. 1 to 10, 23 to 32), the bound (Eq. 11) with T
          steps (Eq. 14) and in continuous time (Eq. 17), noise schedules that are linear, learned
          or a monotone network (App. H), the schedule that minimises the variance (Sec. 5.3, App.
          I), Fourier features (Eq. 34), ancestral sampling (Eq. 33).
Not here  Weighted losses (Eq. 19); augmentation of the pictures, though the network takes the
          official conditioning input, which says whether a picture was augmented. Compression
          (Sec. 6.3): examples/vdm_compress.py. The ODE (App. D): examples/vdm_ode.py. Training on
          your own pictures: examples/vdm_train.py.
Differs   From the paper, following the official code: the monotone network is
          |l1|(t) + |l3|(2 sigmoid(|l2|(2 t - 1)) - 1) / 1024.
          From the official code: with schedule="network" the ends of the schedule are exact (Eq.
          59). The official ends move as the inner part learns (endpoints="official").
          The inner part minimises the variance. The official code, which was released without
          this, minimises the bound throughout (schedule_objective="bound").
          Any number of channels and levels.
          Evenly spaced times for any batch size. The official ones fail for 49, 98, 103 and other
          sizes.
          GroupNorm's variance is mean((x - mean)^2), not E[x^2] - E[x]^2.
Claims    C1 terms, gradients, samples are those of the official code
          C2 with the best denoiser of Gaussian data the bound is the exact likelihood
          C3 the bound in continuous time does not depend on the schedule between its ends (Sec.
             5.1), but the variance of its estimate does (Sec. 5.3)
          C4 more steps tighten the bound, and L_T tends to L_inf (Sec. 4.1, App. F)
          C5 a uniform decoder costs log2(levels) bits per dimension: 8 for 256
          C6 the posterior is that of the forward process, by Bayes' rule
          C7 the learned schedule is monotone and keeps its ends; minimising the variance lowers it
          C8 low-discrepancy times lower the variance of a batch's loss (App. I.1)
          C9 they are in [0, 1) for any batch size
          C10 one device and eight give the same loss and gradients
Checked   google-research/vdm @ dc27b98: terms of the loss agree within 1e-5 of the largest value,
          the estimated noise within 1e-5, samples and gradients within 2e-3 (an ulp of z_t moves
          Fourier features of frequency 2^7 by 1.4e-4).
          The claims are tests in tests/test_vdm.py.
Run       python vdm.py
          81 s on two CPU cores. Held-out digits of 8x8 pixels cost 2.20 bits per dimension (a
          histogram for each pixel: 2.42); above 2.3 it fails
Axes      B pictures  H, W height and width  C channels  V levels of a pixel  D channels inside
          L blocks on the way down  T steps.  Inside shard_map B is a size on one device.
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
from jax.nn.initializers import constant, lecun_normal, normal, ones, zeros
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

# ==== Config ======================================================================================

GROUPS = 32  # of GroupNorm


def require(ok, message):  # same in every file
    """Raises ValueError(message) unless ok."""
    if not ok:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class Config:
    """One model; the defaults are those for CIFAR-10. Raises ValueError for bad values."""

    image_size: int | tuple[int, int] = 32  # height and width in pixels; one number for a square
    channels: int = 3
    levels: int = 256  # a pixel is an integer from 0 to levels - 1
    width: int = 128  # channels inside the score network, a multiple of 32, at least 64
    depth: int = 32  # blocks on the way down; there is one more on the way up
    attention: bool = False  # True: after every block; False: after the first middle block only
    fourier: tuple[int, ...] = (6, 7)  # the n of the features sin and cos of 2^n 2 pi z
    dropout: float = 0.1
    timesteps: int = 0  # T of the loss; 0 is continuous time
    schedule: str = "scalar"  # "linear" is fixed, "scalar" linear with learned ends, or "network"
    # For schedule="network": "exact" passes through both learned ends, "official" only near them.
    endpoints: str = "exact"
    # What the inner part of schedule="network" minimises: "variance" or "bound".
    schedule_objective: str = "variance"
    gamma_min: float = -13.3  # gamma(0) before training; gamma is -log(signal-to-noise ratio)
    gamma_max: float = 5.0  # gamma(1) before training
    low_discrepancy: bool = True  # the times of a batch are evenly spaced, not independent
    remat: bool = True  # recompute each block in the backward pass, to save memory

    def __post_init__(self):
        size = self.image_size
        if not isinstance(size, tuple | list):
            size = (size, size)
        require(
            len(size) == 2 and min(size) >= 1,
            f"image_size={size} is not one positive number or two",
        )
        object.__setattr__(self, "image_size", tuple(size))  # the class is frozen
        object.__setattr__(self, "fourier", tuple(self.fourier))
        for name, least in {"channels": 1, "levels": 2, "depth": 1, "timesteps": 0}.items():
            value = getattr(self, name)
            require(value >= least, f"{name}={value} is not at least {least}")
        # With 32 channels each group of GroupNorm would be one channel. It would remove whatever is
        # added to all pixels of a channel, such as the conditioning.
        require(
            self.width % GROUPS == 0 and self.width > GROUPS,
            f"width={self.width} is not a multiple of {GROUPS} above {GROUPS}",
        )
        choices = {
            "schedule": ("linear", "scalar", "network"),
            "endpoints": ("exact", "official"),
            "schedule_objective": ("variance", "bound"),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            require(value in allowed, f"{name}={value!r} is not one of {', '.join(allowed)}")
        require(
            -math.inf < self.gamma_min < self.gamma_max < math.inf,
            f"gamma_min={self.gamma_min} and gamma_max={self.gamma_max} are not finite numbers, "
            "the first below the second",
        )
        require(0 <= self.dropout < 1, f"dropout={self.dropout} is not in [0, 1)")
        if self.schedule == "network" and self.schedule_objective == "variance":
            require(
                self.timesteps == 0,
                f"with timesteps={self.timesteps} the bound depends on the whole schedule: "
                'schedule_objective="variance" needs timesteps=0',
            )
            require(
                self.endpoints == "exact",
                'with endpoints="official" the inner part of the network moves the ends: '
                'schedule_objective="variance" needs endpoints="exact"',
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of a picture."""
        return (*self.image_size, self.channels)


SIZES = {
    "CIFAR-10": Config(),
    "CIFAR-10, augmented": Config(
        width=256,
        attention=True,
        dropout=0.05,
        schedule="network",
        endpoints="official",
        schedule_objective="bound",
    ),
    "ImageNet 32": Config(width=256, depth=32),
}


# ==== Noise schedules (Sec. 3.2, App. H) ==========================================================

BEND_UNITS = 1024  # hidden units of the network schedule

# gamma(t) = -log SNR(t) grows with t. Then alpha^2 = sigmoid(-gamma), sigma^2 = sigmoid(gamma), and
# alpha^2 + sigma^2 = 1 without rounding errors where one of them is small.


def alpha(gamma):
    """What z_t keeps of the picture: alpha_t (Eq. 4)."""
    return jnp.sqrt(jax.nn.sigmoid(-gamma))


def sigma(gamma):
    """The deviation of the noise of z_t: sigma_t."""
    return jnp.sqrt(jax.nn.sigmoid(gamma))


def noise_schedule(params, t, config: Config):
    """gamma(t) for t in [0, 1], any shape. params: params["gamma"], empty for "linear"."""
    if config.schedule == "linear":
        return config.gamma_min + (config.gamma_max - config.gamma_min) * t
    if config.schedule == "scalar":
        return params["b"][0] + jnp.abs(params["w"][0]) * t
    start = params["l1"]["bias"][0]
    rise = jnp.abs(params["l1"]["kernel"][0, 0])
    if config.endpoints == "official":
        return start + rise * t + bend(params, t)
    # Eq. 59: a monotone function of t is moved and scaled to the ends start and start + rise.
    lowest = bend(params, 0.0)
    highest = 1 + bend(params, 1.0)
    return start + rise * (t + bend(params, t) - lowest) / (highest - lowest)


def bend(params, t):
    """l3(2 sigmoid(l2(2 t - 1)) - 1) / 1024 with positive kernels, so that it grows with t."""
    hidden = (2 * (jnp.asarray(t) - 0.5))[..., None] * jnp.abs(params["l2"]["kernel"][0])
    hidden = 2 * (jax.nn.sigmoid(hidden + params["l2"]["bias"]) - 0.5)  # [...,1024]
    return hidden @ jnp.abs(params["l3"]["kernel"][:, 0]) / BEND_UNITS


class Gammas(NamedTuple):
    """All that the losses need of a schedule."""

    at_0: jax.Array
    at_1: jax.Array
    at_t: jax.Array  # [B]
    weight: jax.Array  # [B]: gamma'(t) in Eq. 17, T expm1(gamma(t) - gamma(s)) in Eq. 14


def gammas_at(params, t, config: Config) -> Gammas:
    """The schedule at its ends and at the times t [B].

    With T steps each time is first rounded up to a multiple of 1 / T, above 0.
    """

    def gamma(t):
        return noise_schedule(params, t, config)

    T = config.timesteps
    if T == 0:
        at_t, weight = jax.jvp(gamma, (t,), (jnp.ones_like(t),))  # gamma and its derivative
    else:
        t = jnp.maximum(jnp.ceil(t * T), 1) / T
        at_t = gamma(t)
        weight = T * jnp.expm1(at_t - gamma(t - 1 / T))
    return Gammas(gamma(0.0), gamma(1.0), at_t, weight)


def draw_times(key, count, config: Config):
    """One time in [0, 1) for each of `count` pictures. [count]."""
    if config.low_discrepancy:
        return even_times(jax.random.uniform(key), count)
    return jax.random.uniform(key, (count,))


def even_times(u, count):
    """Low-discrepancy times (App. I.1): (u + i / count) mod 1, u one uniform number. [count]."""
    return (u + np.arange(count, dtype=np.float32) / count) % 1


# ==== Forward process and its reversal ============================================================


def encode(images, levels):
    """Levels 0 ... V-1 as the middles of V intervals of [-1, 1]: never -1 or 1. Any shape."""
    return 2 * (images.astype(jnp.float32) + 0.5) / levels - 1


def diffuse(x, gamma, eps):
    """z_t = alpha_t x + sigma_t eps (Eq. 1). x and eps [B,H,W,C], gamma [B]."""
    gamma = gamma[:, None, None, None]
    return alpha(gamma) * x + sigma(gamma) * eps


def posterior(z_t, eps, gamma_s, gamma_t):
    """Mean and variance of q(z_s | z_t, x) for s < t, where z_t = diffuse(x, gamma_t, eps).

    z_t and eps [B,H,W,C], gammas scalar -> mean [B,H,W,C], variance scalar. With the score
    network's estimate of eps it is the model's p(z_s | z_t) (Eq. 9). These are Eq. 31 and 32, which
    equal Eq. 25 and 24. They hold expm1 in place of differences, and so keep all digits where s is
    close to t.
    """
    ratio_minus_1 = jnp.expm1(gamma_s - gamma_t)  # of SNR(t) to SNR(s); negative
    mean = alpha(gamma_s) / alpha(gamma_t) * (z_t + sigma(gamma_t) * ratio_minus_1 * eps)
    variance = -ratio_minus_1 * jax.nn.sigmoid(gamma_s)
    return mean, variance


def decoder_logits(z, gamma_0, levels):
    """log p(x | z_0) of each level, before normalisation (Eq. 8). z = z_0 / alpha_0. [...,V]."""
    values = encode(jnp.arange(levels), levels)
    return -0.5 * jnp.exp(-gamma_0) * jnp.square(z[..., None] - values)


# ==== The score network ===========================================================================


def score_network(params, z, gamma, conditioning, config: Config, keys=None):
    """An estimate of the noise eps in z_t (Sec. 3.4). z [B,H,W,C], gamma [B] -> [B,H,W,C].

    A U-Net that never changes the resolution. params: params["score_model"]. conditioning [B]: one
    number for each picture, in the official code 1 if it was augmented. keys [B]: for dropout.
    """
    scaled_gamma = (gamma - config.gamma_min) / (config.gamma_max - config.gamma_min)
    features = sinusoids(scaled_gamma, config.width)
    features = jnp.concatenate([features, conditioning[:, None]], axis=1)
    cond = jax.nn.swish(dense(features, params["dense0"]))
    cond = jax.nn.swish(dense(cond, params["dense1"]))  # [B,4D]

    run_block = block
    run_attention = pixel_attention
    if config.remat:  # the backward pass gets the inputs of both, and computes the rest again
        run_block = jax.checkpoint(block, static_argnums=3)
        run_attention = jax.checkpoint(pixel_attention)

    def layer(x, weights, number):
        """One block and, if there is one, its attention. number: for the keys of dropout."""
        layer_keys = None
        if keys is not None:
            layer_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
        x = run_block(x, cond, weights["block"], config, layer_keys)
        if "attn" in weights:
            x = run_attention(x, weights["attn"])
        return x

    def down(x, inputs):
        weights, number = inputs
        x = layer(x, weights, number)
        return x, x

    def up(x, inputs):
        weights, number, skip = inputs
        return layer(jnp.concatenate([x, skip], axis=-1), weights, number), None

    L = config.depth
    first = convolve(fourier_features(z, config.fourier), params["conv_in"])  # [B,H,W,D]
    x, skips = lax.scan(down, first, (params["down"], jnp.arange(L)))
    middle = params["mid"]
    x = layer(x, {"block": middle["block_1"], "attn": middle["attn_1"]}, L)
    x = layer(x, {"block": middle["block_2"]}, L + 1)
    skips = jnp.concatenate([first[None], skips])[::-1]  # [L+1,B,H,W,D], the last one first
    x, _ = lax.scan(up, x, (params["up"], L + 2 + jnp.arange(L + 1), skips))
    x = jax.nn.swish(group_norm(x, params["GroupNorm_0"]))
    return convolve(x, params["conv_out"]) + z


def block(x, cond, weights, config: Config, keys):
    """Two convolutions, with the conditioning [B,4D] added between. [B,H,W,I] -> [B,H,W,D]."""
    y = jax.nn.swish(group_norm(x, weights["GroupNorm_0"]))
    y = convolve(y, weights["conv1"])
    y = y + (cond @ weights["cond_proj"]["kernel"])[:, None, None]
    y = jax.nn.swish(group_norm(y, weights["GroupNorm_1"]))
    if keys is not None and config.dropout > 0:
        y = drop(keys, y, config.dropout)
    y = convolve(y, weights["conv2"])
    if "nin_shortcut" in weights:
        x = dense(x, weights["nin_shortcut"])
    return x + y


def pixel_attention(x, weights):
    """Self-attention of one head over all pixels, added to x. [B,H,W,D] -> [B,H,W,D]."""
    B, H, W, D = x.shape
    y = group_norm(x, weights["GroupNorm_0"]).reshape(B, H * W, D)
    q, k, v = (dense(y, weights[name]) for name in ("q", "k", "v"))
    scores = q @ k.mT * D**-0.5  # [B,HW,HW]
    shares = jax.nn.softmax(scores)
    y = dense(shares @ v, weights["proj_out"])
    return x + y.reshape(B, H, W, D)


def convolve(x, weights):
    """3x3 convolution, the picture padded with zeros. [B,H,W,I] -> [B,H,W,O]."""
    kernel = weights["kernel"]  # [3,3,I,O]
    if jax.default_backend() == "cpu":
        y = convolve_on_cpu(x, kernel)
    else:
        axes = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=axes)
    return y + weights["bias"]


def convolve_on_cpu(x, kernel):
    """A product of matrices: on a CPU the gradient of XLA's convolution is 12 times as slow."""

    @jax.checkpoint  # the backward pass builds the windows again, which costs little
    def convolve_one(picture):
        H, W, _ = picture.shape
        padded = jnp.pad(picture, ((1, 1), (1, 1), (0, 0)))
        windows = [padded[i : i + H, j : j + W] for i in range(3) for j in range(3)]
        return jnp.concatenate(windows, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])

    few = math.gcd(len(x), 4)  # pictures at a time: windows take 9 times the memory of x
    return lax.map(convolve_one, x, batch_size=few)


def dense(x, weights):
    """A dense layer. [...,I] -> [...,O]."""
    return x @ weights["kernel"] + weights["bias"]


def group_norm(x, weights):
    """GroupNorm: the pixels and channels of each group get mean 0 and variance 1. [B,H,W,D]."""
    groups = x.reshape(*x.shape[:-1], GROUPS, -1)
    axes = (1, 2, 4)  # all but the picture and the group
    mean = groups.mean(axes, keepdims=True)
    variance = jnp.square(groups - mean).mean(axes, keepdims=True)
    groups = (groups - mean) * lax.rsqrt(variance + 1e-6)
    return groups.reshape(x.shape) * weights["scale"] + weights["bias"]


def drop(keys, x, rate):
    """Each picture draws by its own key, so that a mesh does not matter. keys [B], x [B,...]."""
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(kept, x / (1 - rate), 0)


def sinusoids(x, count):
    """sin and cos of 1,000 x at periods from 2 pi to 20,000 pi. [B] -> [B,count]."""
    half = count // 2
    frequencies = jnp.exp(jnp.arange(half) * -(math.log(10_000) / (half - 1)))
    angles = (1000 * x)[:, None] * frequencies
    features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
    return jnp.pad(features, ((0, 0), (0, count % 2)))  # an odd count ends with a 0


def fourier_features(z, powers):
    """z, and sin and cos of 2^n 2 pi z for each n of powers. [B,H,W,C] -> [B,H,W,C(1+2N)].

    N is the number of powers. Eq. 34 and App. C, whose n is larger by 1.
    """
    frequencies = 2 * math.pi * 2.0 ** jnp.asarray(powers, jnp.float32)
    angles = (z[..., None] * frequencies).reshape(*z.shape[:-1], -1)  # channel by channel
    return jnp.concatenate([z, jnp.sin(angles), jnp.cos(angles)], axis=-1)


# ==== The bound (Eq. 11) ==========================================================================


def prior_loss(x, gamma_1):
    """KL[q(z_1 | x) || N(0, I)] of each picture, in nats. [B,H,W,C] -> [B]."""
    kept = jax.nn.sigmoid(-gamma_1)  # alpha_1^2, small; the variance of z_1 is 1 - kept
    # This is (variance + mean^2 - 1 - log(variance)) / 2. The ones are cancelled by hand, since
    # float32 would leave a rounding error of theirs.
    nats = 0.5 * (kept * jnp.square(x) - kept - jnp.log1p(-kept))
    return nats.sum((1, 2, 3))


def reconstruction_loss(images, eps_0, gamma_0, levels):
    """-log p(x | z_0) of each picture, in nats (Eq. 8), over all levels. [B,H,W,C] -> [B]."""
    z = encode(images, levels) + jnp.exp(gamma_0 / 2) * eps_0  # z_0 / alpha_0
    log_probabilities = jax.nn.log_softmax(decoder_logits(z, gamma_0, levels))
    chosen = jnp.take_along_axis(log_probabilities, images.astype(jnp.int32)[..., None], axis=-1)
    return -chosen.sum((1, 2, 3, 4))


def diffusion_loss(eps, eps_hat, weight):
    """Eq. 14, or in continuous time Eq. 17, of each picture, in nats. [B,H,W,C], [B] -> [B].

    weight: that of Gammas. The mean over times is L_T, or L_inf.
    """
    return 0.5 * weight * jnp.square(eps - eps_hat).sum((1, 2, 3))


class Terms(NamedTuple):
    """The three terms of the bound, for each picture, in nats. Each [B]."""

    prior: jax.Array
    reconstruction: jax.Array
    diffusion: jax.Array


class Draws(NamedTuple):
    """The random numbers of a batch."""

    t: jax.Array  # [B]
    eps_0: jax.Array  # [B,H,W,C], standard normal, for z_0
    eps: jax.Array  # [B,H,W,C], standard normal, for z_t
    keys: jax.Array | None = None  # [B], for dropout; None: no dropout


def draw_numbers(key, count, config: Config, dropout=False) -> Draws:
    """Draws for a whole batch. Called outside shard_map, they do not depend on the mesh."""
    time_key, eps_0_key, eps_key, dropout_key = jax.random.split(key, 4)
    keys = None
    if dropout and config.dropout > 0:
        keys = jax.random.split(dropout_key, count)
    shape = (count, *config.shape)
    return Draws(
        draw_times(time_key, count, config),
        jax.random.normal(eps_0_key, shape),
        jax.random.normal(eps_key, shape),
        keys,
    )


def losses(params, images, conditioning, draws: Draws, config: Config, *, score=score_network):
    """The Terms of the bound for given draws. Nothing else is random.

    images: integers [B,H,W,C] below config.levels; conditioning [B]. score: a function with the
    arguments of score_network. Raises ValueError for images of another shape or dtype, or, except
    under jit, out of range.
    """
    check_images(images, config)
    gammas = gammas_at(params["gamma"], draws.t, config)
    return losses_at(params["score_model"], gammas, images, conditioning, draws, config, score)


def losses_at(params, gammas: Gammas, images, conditioning, draws, config, score=score_network):
    """Like losses, with the schedule evaluated already. params: params["score_model"]."""
    x = encode(images, config.levels)
    z_t = diffuse(x, gammas.at_t, draws.eps)
    eps_hat = score(params, z_t, gammas.at_t, conditioning, config, draws.keys)
    return Terms(
        prior_loss(x, gammas.at_1),
        reconstruction_loss(images, draws.eps_0, gammas.at_0, config.levels),
        diffusion_loss(draws.eps, eps_hat, gammas.weight),
    )


def check_images(images, config: Config):
    """Raises ValueError for images that are not integers [B,H,W,C] within the levels."""
    H, W, C = config.shape
    require(images.shape[1:] == (H, W, C), f"images are {images.shape}, not [B, {H}, {W}, {C}]")
    require(len(images) > 0, f"images are {images.shape}: there is none")
    require(jnp.issubdtype(images.dtype, jnp.integer), f"images are {images.dtype}, not integers")
    if not isinstance(images, jax.core.Tracer):
        low = int(images.min())
        high = int(images.max())
        require(
            0 <= low and high < config.levels,
            f"images are from {low} to {high}, not within the levels 0 to {config.levels - 1}",
        )


def in_bits(nats, config: Config):
    """Nats of a picture as bits per dimension."""
    return nats / (math.prod(config.shape) * math.log(2))


def bits_per_dim(params, images, key, config: Config, *, mesh=None, batch=128, repeats=1) -> dict:
    """Estimates the bound on the cost of images, integers [B,H,W,C], in bits per dimension.

    Returns means over the pictures: "prior", "reconstruction" and "diffusion", their sum "total",
    and its "standard_error", as if all pictures were drawn independently. For each picture
    `repeats` times and noises are drawn. mesh: that of the weights, if they are on one; batch must
    be a multiple of its axis data.
    """
    check_images(images, config)
    mesh = mesh or make_mesh("data=1,model=1")
    devices = mesh.shape["data"]
    require(
        batch >= 1 and batch % devices == 0,
        f"batch={batch} is not a positive multiple of data={devices}",
    )
    rounds = []
    for repeat_key in jax.random.split(key, repeats):
        time_key, order_key, noise_key = jax.random.split(repeat_key, 3)
        times = draw_times(time_key, len(images), config)
        times = np.asarray(jax.random.permutation(order_key, times))  # images may be sorted
        parts = []
        for first in range(0, len(images), batch):
            rows = np.arange(first, first + batch) % len(images)  # fills up the last batch
            batch_key = jax.random.fold_in(noise_key, first)
            terms = batch_bits(params, images[rows], times[rows], batch_key, config, mesh)
            parts.append(np.asarray(terms)[:, : len(images) - first])
        rounds.append(np.concatenate(parts, axis=1))
    terms = np.mean(rounds, axis=0)  # [3,B]
    total = terms.sum(0)
    means = dict(zip(Terms._fields, map(float, terms.mean(1)), strict=True))
    error = float(total.std() / math.sqrt(len(total)))
    return {**means, "total": float(total.mean()), "standard_error": error}


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def batch_bits(params, images, times, key, config, mesh):
    """The three terms of each picture at the times [B], in bits per dimension. [3,B]."""
    draws = draw_numbers(key, len(images), config)._replace(t=times)
    gammas = gammas_at(params["gamma"], draws.t, config)
    conditioning = jnp.zeros(len(images))
    sharded = sharded_losses(config, mesh)
    return in_bits(
        jnp.stack(sharded(params["score_model"], gammas, images, conditioning, draws)), config
    )


# ==== Sampling (Eq. 33) ===========================================================================


def sample(params, key, count, config: Config, *, steps=1000, mesh=None):
    """`count` pictures by ancestral sampling. -> int32 [count,H,W,C], levels.

    mesh: that of the weights, if they are on one; count must be a multiple of its axis data.
    Conditioning is 0.
    """
    mesh = mesh or make_mesh("data=1,model=1")
    check_mesh(mesh)
    devices = mesh.shape["data"]
    require(
        count >= 1 and count % devices == 0,
        f"count={count} is not a positive multiple of data={devices}",
    )
    require(steps >= 1, f"steps={steps} is not at least 1")
    data = P(axis_if_split(mesh, "data"))
    score = jax.shard_map(
        functools.partial(score_network, config=config),
        mesh=mesh,
        in_specs=(P(), data, data, data),
        out_specs=data,
    )

    @jax.jit
    def run(params, key):
        first_key, step_key = jax.random.split(key)
        conditioning = jnp.zeros(count)

        def step(z_t, i):
            noise = jax.random.normal(jax.random.fold_in(step_key, i), z_t.shape)
            return ancestral_step(params, z_t, i, steps, noise, conditioning, config, score), None

        z_1 = jax.random.normal(first_key, (count, *config.shape))
        z_0, _ = lax.scan(step, z_1, jnp.arange(steps))
        return decode(params, z_0, config)

    return run(params, key)


def ancestral_step(params, z_t, i, steps, noise, conditioning, config: Config, score):
    """Step i of `steps`: from z_t at t = 1 - i / steps to z_s at s = t - 1 / steps.

    score: score_network without its config.
    """
    gamma_t = noise_schedule(params["gamma"], (steps - i) / steps, config)
    gamma_s = noise_schedule(params["gamma"], (steps - i - 1) / steps, config)
    gammas = jnp.broadcast_to(gamma_t, len(z_t))
    eps_hat = score(params["score_model"], z_t, gammas, conditioning)
    mean, variance = posterior(z_t, eps_hat, gamma_s, gamma_t)
    return mean + jnp.sqrt(variance) * noise


def decode(params, z_0, config: Config):
    """The likeliest level of each pixel. [B,H,W,C] -> int32 [B,H,W,C]."""
    gamma_0 = noise_schedule(params["gamma"], 0.0, config)
    return decoder_logits(z_0 / alpha(gamma_0), gamma_0, config.levels).argmax(-1)


# ==== Parameters and recipes ======================================================================


@dataclasses.dataclass(frozen=True)
class Param:  # same in every file
    """Shape, sharding and initialiser of one weight. A dataclass, since jax.tree opens tuples."""

    shape: tuple
    spec: P  # the mesh axis that shards each array axis, if any
    init: Callable  # (key, shape, dtype) -> array


def param_table(config: Config) -> dict:
    """The Param of each weight, as a nested dict. Blocks are stacked on a leading axis L.

    Layers have their names in the official code, so that only the blocks need renaming.
    """
    D = config.width
    C = config.channels
    L = config.depth
    inputs = C * (1 + 2 * len(config.fourier))
    kernel_init = lecun_normal()

    def dense(inputs, outputs, init=kernel_init):
        kernel = Param((inputs, outputs), P(), init)
        return {"kernel": kernel, "bias": Param((outputs,), P(), zeros)}

    def conv(inputs, outputs, init=kernel_init):
        kernel = Param((3, 3, inputs, outputs), P(), init)
        return {"kernel": kernel, "bias": Param((outputs,), P(), zeros)}

    def norm(size):
        return {"scale": Param((size,), P(), ones), "bias": Param((size,), P(), zeros)}

    def block_of(inputs):
        layers = {
            "GroupNorm_0": norm(inputs),
            "conv1": conv(inputs, D),
            "cond_proj": {"kernel": Param((4 * D, D), P(), zeros)},
            "GroupNorm_1": norm(D),
            "conv2": conv(D, D, zeros),
        }
        if inputs != D:
            layers["nin_shortcut"] = dense(inputs, D)
        return layers

    def attention_layer():
        layers = {name: dense(D, D) for name in ("q", "k", "v")}
        return {"GroupNorm_0": norm(D), **layers, "proj_out": dense(D, D, zeros)}

    def stack(layer, count):
        """The same layer, `count` times."""

        def stacked(param):
            init = lecun_normal(batch_axis=0) if param.init is kernel_init else param.init
            return Param((count, *param.shape), P(), init)

        return jax.tree.map(stacked, layer)

    def layers_of(inputs):
        layers = {"block": block_of(inputs)}
        if config.attention:
            layers["attn"] = attention_layer()
        return layers

    score_model = {
        "dense0": dense(D + 1, 4 * D),
        "dense1": dense(4 * D, 4 * D),
        "conv_in": conv(inputs, D),
        "down": stack(layers_of(D), L),
        "mid": {"block_1": block_of(D), "attn_1": attention_layer(), "block_2": block_of(D)},
        "up": stack(layers_of(2 * D), L + 1),  # each gets what came down beside it
        "GroupNorm_0": norm(D),
        "conv_out": conv(D, C, zeros),
    }
    return {"gamma": schedule_table(config), "score_model": score_model}


def schedule_table(config: Config) -> dict:
    """The weights of a noise schedule."""
    start = constant(config.gamma_min)
    rise = constant(config.gamma_max - config.gamma_min)
    if config.schedule == "linear":
        return {}
    if config.schedule == "scalar":
        return {"w": Param((1,), P(), rise), "b": Param((1,), P(), start)}
    return {
        "l1": {"kernel": Param((1, 1), P(), rise), "bias": Param((1,), P(), start)},
        "l2": {
            "kernel": Param((1, BEND_UNITS), P(), normal(0.01)),
            "bias": Param((BEND_UNITS,), P(), zeros),
        },
        "l3": {"kernel": Param((BEND_UNITS, 1), P(), normal(0.01))},
    }


def init_params(key: jax.Array, config: Config) -> dict:  # same in every file
    """Float32 weights from the official distributions. Nested dict, shapes as in param_table."""
    declared, treedef = jax.tree.flatten(param_table(config))
    keys = jax.random.split(key, len(declared))
    arrays = [p.init(k, p.shape, jnp.float32) for k, p in zip(keys, declared, strict=True)]
    return treedef.unflatten(arrays)


class Recipe(NamedTuple):
    """Training hyper-parameters: AdamW with b1=0.9, b2=0.99, and a rate that is constant."""

    batch: int
    steps: int
    learning_rate: float
    schedule_rate: float  # factor on the updates of the noise schedule
    warmup: int  # steps of a linear rise from 0
    weight_decay: float  # decoupled, of all weights but biases
    ema: float  # decay of the average of the weights, with which the model is tested
    bits: float  # per dimension on test pictures
    source: str  # of bits


CIFAR_10 = Recipe(
    batch=128,
    steps=10_000_000,
    learning_rate=2e-4,
    schedule_rate=1.0,
    warmup=100,
    weight_decay=0.01,
    ema=0.9999,
    bits=2.637,
    source="quoted: official README",
)
RECIPES = {
    "CIFAR-10": CIFAR_10,
    "CIFAR-10, augmented": CIFAR_10._replace(
        batch=1024,
        steps=100_000_000,
        bits=2.49,
        source="quoted: the paper, by the official README",
    ),
    # A short training needs a schedule that learns faster, and a shorter average.
    "digits": CIFAR_10._replace(
        batch=32,
        steps=300,
        learning_rate=3e-3,
        schedule_rate=30.0,
        warmup=20,
        ema=0.95,
        bits=2.2,
        source="reproduced: python vdm.py",
    ),
}


def recipe_optimizer(recipe: Recipe):
    """AdamW of a recipe. As in the official code only leaves named bias are exempt from decay.

    The gradients are those of loss_gradient: a dict with "gamma" and "score_model". Raises
    ValueError for a recipe without warm-up.
    """
    require(recipe.warmup >= 1, f"warmup={recipe.warmup} is not at least 1")
    rate = optax.linear_schedule(0, recipe.learning_rate, recipe.warmup)

    def decayed(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "bias", params)

    def scale_schedule(updates, params):
        scaled = jax.tree.map(lambda update: recipe.schedule_rate * update, updates["gamma"])
        return {**updates, "gamma": scaled}

    return optax.chain(
        optax.adamw(rate, b1=0.9, b2=0.99, weight_decay=recipe.weight_decay, mask=decayed),
        optax.stateless(scale_schedule),
    )


# ==== Sharded training: pictures over mesh axis "data", weights on every device ===================


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
    ema: Any  # average of params
    step: Any  # int32, the number of steps done


def init_state(key, config: Config, optimizer, mesh, params=None) -> State:
    """Weights, optimizer state, average and step 0, each a whole copy on every device.

    The weights are copies of `params` if given, for example from load; else they are drawn. mesh
    has the axes "data" and "model", both Auto; "model" must have size 1. Raises ValueError for
    params of another config.
    """
    check_mesh(mesh)
    if params is not None:
        check_names(named_leaves(params), named_leaves(param_table(config)), "params")

    def init(key, params):
        if params is None:
            params = init_params(key, config)
        return State(params, optimizer.init(params), params, jnp.int32(0))

    return jax.jit(init, out_shardings=NamedSharding(mesh, P()))(key, params)


def check_mesh(mesh):
    """Raises ValueError unless the mesh axis "model" has size 1."""
    model = mesh.shape["model"]
    require(model == 1, f"model={model}: vdm.py shards nothing over this mesh axis, it must be 1")


def axis_if_split(mesh, axis):  # same in every file
    """The name of a mesh axis, or None if it has one device and needs no communication."""
    if mesh.shape[axis] == 1:
        return None
    return axis


def sharded_losses(config: Config, mesh):
    """losses_at for a whole batch on the mesh. No device needs anything from another one.

    It takes the arguments of losses_at up to draws.
    """
    check_mesh(mesh)
    data = P(axis_if_split(mesh, "data"))
    gammas = Gammas(P(), P(), data, data)
    return jax.shard_map(
        functools.partial(losses_at, config=config),
        mesh=mesh,
        in_specs=(P(), gammas, data, data, data),
        out_specs=data,
    )


def loss_gradient(params, batch, key, config: Config, mesh):
    """Metrics and gradients of a batch on the mesh.

    Metrics are in bits per dimension: "loss", the bound, and its three terms; "variance", that of
    the diffusion loss of single pictures, which schedule_objective="variance" lowers.

    The score network and the ends of the schedule follow the gradient of the bound. The inner part
    of the schedule does not change the bound in continuous time (Sec. 5.1), but it changes the
    variance of the estimate that a batch gives. This variance is E[L^2] - E[L]^2, where L is the
    diffusion loss of one picture at its time t. E[L] does not change, so the variance falls as
    E[L^2] falls, and the gradient of that is E[2 L dL] (App. I.2, Eq. 60 to 62).

    The backward pass through the network already gives the gradient of each picture's L with
    respect to gamma(t) and gamma'(t) at its own t. It is sent on into the schedule twice: once as
    it is, for the bound, and once multiplied by 2 L, for the variance. So the network needs one
    backward pass only.
    """
    images = batch["images"]
    check_images(images, config)
    B = len(images)
    draws = draw_numbers(key, B, config, dropout=True)
    conditioning = batch.get("conditioning", jnp.zeros(B))

    def terms_of(score_params, gammas):
        sharded = sharded_losses(config, mesh)
        terms = sharded(score_params, gammas, images, conditioning, draws)
        return jax.tree.map(lambda nats: in_bits(nats, config), terms)

    def schedule(gamma_params):
        return gammas_at(gamma_params, draws.t, config)

    gammas, into_schedule = jax.vjp(schedule, params["gamma"])
    # Differentiated outside shard_map, so that JAX sums the weights' gradients over the devices.
    terms, into_network = jax.vjp(terms_of, params["score_model"], gammas)
    shares = jax.tree.map(lambda term: jnp.full_like(term, 1 / B), terms)  # of the batch's mean
    score_grads, gamma_grads = into_network(shares)
    (schedule_grads,) = into_schedule(gamma_grads)
    if config.schedule == "network" and config.schedule_objective == "variance":
        scaled = Gammas(
            at_0=jnp.zeros_like(gamma_grads.at_0),
            at_1=jnp.zeros_like(gamma_grads.at_1),
            at_t=2 * terms.diffusion * gamma_grads.at_t,
            weight=2 * terms.diffusion * gamma_grads.weight,
        )
        (inner_grads,) = into_schedule(scaled)
        schedule_grads = {**inner_grads, "l1": schedule_grads["l1"]}  # l1 holds the ends
    means = {name: term.mean() for name, term in terms._asdict().items()}
    metrics = {"loss": sum(means.values()), **means, "variance": terms.diffusion.var()}
    return metrics, {"gamma": schedule_grads, "score_model": score_grads}


def update_average(average, params, ema):
    """Updates the exponential moving average of the weights with new ones."""
    return jax.tree.map(lambda old, new: ema * old + (1 - ema) * new, average, params)


def make_train_step(config: Config, optimizer, mesh, ema):
    """One jitted step: (state, batch, key) -> (state, metrics). It donates the old state.

    batch: {"images": integers [B,H,W,C]}, and "conditioning" [B] if there is any. Pass the same key
    in every step: state.step is folded in. ema: decay of the average of the weights. Inside the
    step the range of the images is not checked: see check_images.
    """
    require(0 <= ema < 1, f"ema={ema} is not in [0, 1)")

    def step(state, batch, key):
        rows = len(batch["images"])
        devices = mesh.shape["data"]
        require(rows % devices == 0, f"a batch of {rows} is not a multiple of data={devices}")
        key = jax.random.fold_in(key, state.step)
        metrics, grads = loss_gradient(state.params, batch, key, config, mesh)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = update_average(state.ema, params, ema)
        return State(params, opt_state, average, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0)


# ==== Checkpoints: the names of the official code =================================================


def named_leaves(tree) -> dict:  # same in every file
    """Path -> leaf of any tree of arrays: {"a/b/kernel": ...}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def official_places(config: Config) -> dict:
    """Official name -> (path of our weight, index into it that selects the official array)."""
    places = {}
    for path in named_leaves(param_table(config)):  # "score_model/down/block/conv1/bias", "gamma/w"
        top, layer, *rest = path.split("/")
        if layer in ("down", "up"):
            kind, *rest = rest
            for i in range(config.depth + (layer == "up")):
                places["/".join([top, f"{layer}.{kind}_{i}", *rest])] = path, i
        elif layer == "mid":
            name, *rest = rest
            places["/".join([top, f"mid.{name}", *rest])] = path, ...
        else:
            places[path] = path, ...  # the whole array, under our own name
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

    Raises ValueError for weights that are not finite.
    """
    flat = to_official(params, config)
    for name, array in flat.items():
        require(np.isfinite(array).all(), f"{name} holds values that are not finite: not saved")
    write_npz(path, flat)


def load(path, config: Config) -> dict:  # same in every file
    """Parameters from an .npz under official names. Raises as read_npz and from_official do."""
    return from_official(read_npz(path), config)


# ==== Demo: bits per dimension of digits, under two noise schedules ==============================

DIGITS = Config(
    image_size=8,
    channels=1,
    levels=17,
    width=64,
    depth=1,
    fourier=(3,),
    dropout=0.0,
    schedule="network",
    gamma_min=-7.0,
    remat=False,
)
HELD_OUT = 300
REPEATS = 5  # draws for each held-out picture
REPORT = 50  # steps between lines of progress
CEILING = 2.3  # bits per dimension of the held-out digits, with the default flags


def check_out(path):  # same in every file
    """Raises ValueError unless a figure can be written to path."""
    path = pathlib.Path(path)
    require(path.suffix in (".png", ".pdf", ".svg"), f"--out {path} is not a .png, .pdf or .svg")
    require(not path.is_dir(), f"--out {path} is a folder")
    require(os.access(path.parent, os.W_OK), f"--out {path}: its folder cannot be written to")


def read_digits(path):
    """Digits uint8 [B,8,8,1] with levels 0 to 16, shuffled: the file is in the order of writers."""
    data = read_npz(path)
    require("images" in data, f"{path} has no array images")
    images = data["images"][..., None]
    require(
        images.ndim == 4 and len(images) >= 2 * HELD_OUT,
        f"{path}: images {images.shape[:-1]} are not {2 * HELD_OUT} or more [B,8,8]",
    )
    check_images(images, DIGITS)
    return images[np.random.default_rng(0).permutation(len(images))]


def histogram_bits(train, test, levels):
    """Bits per dimension of a model without dependence between pixels: a histogram for each."""
    counts = np.stack([(train == level).sum(0) for level in range(levels)]) + 1  # none impossible
    shares = counts / counts.sum(0)  # [V,H,W,C]
    found = np.take_along_axis(shares, test.astype(int), axis=0)
    return float(-np.log2(found).mean())


def train(mesh, images, steps, key, rng):
    """The averaged weights after training on images uint8 [B,8,8,1]. rng: numpy's, for batches."""
    recipe = RECIPES["digits"]
    optimizer = recipe_optimizer(recipe)
    init_key, step_key = jax.random.split(key)
    state = init_state(init_key, DIGITS, optimizer, mesh)
    step = make_train_step(DIGITS, optimizer, mesh, recipe.ema)
    started = time.time()
    for i in range(1, steps + 1):
        rows = rng.integers(len(images), size=recipe.batch)
        state, metrics = step(state, {"images": images[rows]}, step_key)
        loss = float(metrics["loss"])
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {i}: the loss is {loss}")
        if i % REPORT == 0 or i == steps:
            left = (time.time() - started) / i * (steps - i)
            print(
                f"step {i}/{steps}  loss {loss:.3f} bits per dimension  variance "
                f"{float(metrics['variance']):.2f}  {left:.0f} s left",
                flush=True,
            )
    return state.ema


def straight(params):
    """The same weights with a schedule that is linear between the same ends."""
    gamma = params["gamma"]
    no_bend = {"kernel": jnp.zeros_like(gamma["l3"]["kernel"])}
    return {**params, "gamma": {**gamma, "l3": no_bend}}


def diffusion_bits(params, images, key):
    """Times and diffusion losses in bits per dimension of single draws, one for each picture."""
    config = dataclasses.replace(DIGITS, low_discrepancy=False)
    draws = draw_numbers(key, len(images), config)
    terms = losses(params, images, jnp.zeros(len(images)), draws, config)
    return draws.t, in_bits(terms.diffusion, config)


def compare_schedules(params, images, key):
    """Prints mean and variance of the diffusion loss under both schedules, and their ratio.

    Returns {name: (times, losses)} for single draws.
    """
    run = jax.jit(diffusion_bits)
    found = {}
    for name, weights in {"linear": straight(params), "learned": params}.items():
        parts = [run(weights, images, jax.random.fold_in(key, i)) for i in range(REPEATS)]
        t, bits = (np.concatenate(part) for part in zip(*parts, strict=True))
        found[name] = t, bits
        error = bits.std() / math.sqrt(len(bits))
        print(
            f"{name:>8} schedule: diffusion loss {bits.mean():.3f} +- {error:.3f}, variance of "
            f"single draws {bits.var():.3f}",
            flush=True,
        )
    ratio = found["linear"][1].var() / found["learned"][1].var()
    print(f"the variance under the linear schedule is {ratio:.2f} times that under the learned one")
    return found


def draw(path, params, pictures, found):
    """Left: samples. Middle: gamma(t). Right: the diffusion loss over t under both schedules."""
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    rows = pictures[..., 0].reshape(4, 8, 8, 8)  # 4 rows of 8 samples
    rows = np.pad(rows, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=8)
    left.imshow(rows.swapaxes(1, 2).reshape(40, 80), cmap="gray", vmin=0, vmax=16)
    left.set_axis_off()
    left.set_title("samples")
    times = np.linspace(0, 1, 101)
    for name, weights in {"linear": straight(params), "learned": params}.items():
        middle.plot(times, noise_schedule(weights["gamma"], times, DIGITS), label=name)
        t, bits = found[name]
        bins = (20 * t).astype(int)
        means = np.bincount(bins, bits, 20) / np.maximum(np.bincount(bins, minlength=20), 1)
        right.plot((np.arange(20) + 0.5) / 20, means, marker="o", label=name)
    middle.set(xlabel="t", ylabel="gamma(t) = -log SNR")
    right.set(xlabel="t", ylabel="diffusion loss in bits per dimension", ylim=(0, None))
    middle.legend()
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv=None) -> int:
    """Returns the exit status: 1 above CEILING or for a loss not finite, 2 for bad input."""
    parser = argparse.ArgumentParser(description="Trains a small diffusion model on digits.")
    data = str(pathlib.Path(__file__).parent / "data/digits8x8.npz")
    recipe = RECIPES["digits"]
    parser.add_argument("--steps", type=int, default=recipe.steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mesh", default="data=1,model=1", help="number of devices on each axis")
    parser.add_argument("--data", default=data, help=".npz of digits")
    parser.add_argument("--out", default="vdm.png", help="where to draw the figure")
    args = parser.parse_args(argv)
    try:
        require(args.steps >= 1, f"--steps {args.steps} is not at least 1")
        require(0 <= args.seed < 2**32, f"--seed {args.seed} is not in 0 to {2**32 - 1}")
        check_out(args.out)
        images = read_digits(args.data)
        mesh = make_mesh(args.mesh)
        check_mesh(mesh)
        devices = mesh.shape["data"]
        require(
            recipe.batch % devices == 0,
            f"--mesh {args.mesh}: the batch of {recipe.batch} is not a multiple of data={devices}",
        )
    except ValueError as error:
        print(f"vdm.py: {error}", file=sys.stderr)
        return 2

    test = images[:HELD_OUT]
    rest = images[HELD_OUT:]
    print(f"{len(images)} digits, {HELD_OUT} held out, on {mesh.size} {jax.default_backend()}(s)")
    keys = jax.random.split(jax.random.key(args.seed), 4)
    train_key, test_key, schedule_key, sample_key = keys
    try:
        params = train(mesh, rest, args.steps, train_key, np.random.default_rng(args.seed))
    except FloatingPointError as error:
        print(f"vdm.py: {error}", file=sys.stderr)
        return 1
    cost = bits_per_dim(
        params, test, test_key, DIGITS, mesh=mesh, batch=recipe.batch, repeats=REPEATS
    )
    levels = DIGITS.levels
    print(f"bits per dimension, uniform: {math.log2(levels):.2f}")
    histogram = histogram_bits(rest, test, levels)
    print(f"bits per dimension, a histogram for each pixel: {histogram:.2f}")
    terms = ", ".join(f"{name} {cost[name]:.3f}" for name in Terms._fields)
    print(f"bits per dimension, this model: {terms}, standard error {cost['standard_error']:.3f}")
    found = compare_schedules(params, test, schedule_key)
    defaults = (args.steps, args.seed, args.data) == (recipe.steps, 0, data)
    if defaults:
        expected = f"expected {recipe.bits}, at most {CEILING}"
    else:
        expected = "expected unknown, at most unknown"
    print(f"result: held-out bits per dimension: got {cost['total']:.2f}, {expected}")
    pictures = np.asarray(sample(params, sample_key, 32, DIGITS, steps=100, mesh=mesh))
    try:
        draw(args.out, params, pictures, found)
        print(f"wrote {args.out}")
    except Exception as error:  # matplotlib is missing, or it cannot draw here
        print(f"no figure: {type(error).__name__}: {error}")
    return int(defaults and not cost["total"] <= CEILING)


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
