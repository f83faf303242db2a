"""The probability-flow ODE of a variational diffusion model: likelihoods and interpolation.

    python examples/vdm_train.py --data data/digits8x8.npz ... --out run
    python examples/vdm_ode.py --model run --data data/digits8x8.npz --levels 17 --out between.png

What      The ODE dz/dgamma = (sigma eps_hat(z) - sigma^2 z) / 2 carries z_0 to z_1 without noise,
          and all z_t have the distributions that the model gives them (App. D, Eq. 35 and 36, with
          gamma as the time). So log p(z_0) = log N(z_1; 0, I) + the integral of the divergence
          along the way. Hutchinson's trick estimates it: v^T J v for a random sign vector v.
Cost      -log p(x) <= E[-log p(x | z_0) - log p(z_0) + log q(z_0 | x)], z_0 drawn from q(z_0 | x).
          Unlike the bound of vdm.py it has no gap but those of the two ends.
Between   Two pictures are carried to z_1, mixed there along a great circle, and carried back.
Axes      B pictures  H, W height and width  C channels
"""

import argparse
import functools
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]  # for the imports below, from any folder
import vdm_train  # noqa: E402

import vdm  # noqa: E402
from vdm import check_out, require, run_program  # noqa: E402


def velocity(z, gamma, score):
    """dz / dgamma. z [B,H,W,C], gamma scalar; score: (z, gamma [B]) -> eps_hat."""
    eps_hat = score(z, jnp.broadcast_to(gamma, len(z)))
    return 0.5 * (vdm.sigma(gamma) * eps_hat - jax.nn.sigmoid(gamma) * z)


def integrate(function, y, start, stop, steps):
    """Solves dy / dgamma = function(y, gamma) from start to stop by the classic Runge-Kutta method.

    y: any tree of arrays.
    """
    h = (stop - start) / steps

    def add(y, slope, factor):
        return jax.tree.map(lambda a, b: a + factor * b, y, slope)

    def step(y, i):
        gamma = start + i * h
        k1 = function(y, gamma)
        k2 = function(add(y, k1, h / 2), gamma + h / 2)
        k3 = function(add(y, k2, h / 2), gamma + h / 2)
        k4 = function(add(y, k3, h), gamma + h)
        y = jax.tree.map(
            lambda a, *k: a + h / 6 * (k[0] + 2 * k[1] + 2 * k[2] + k[3]), y, k1, k2, k3, k4
        )
        return y, None

    y, _ = lax.scan(step, y, jnp.arange(steps))
    return y


def log_density(z_0, signs, gamma_0, gamma_1, score, steps):
    """log p(z_0) in nats, by Hutchinson's estimate. z_0 and signs (-1 or 1) [B,H,W,C] -> [B]."""

    def function(state, gamma):
        z, _ = state
        rate, slope = jax.jvp(lambda z: velocity(z, gamma, score), (z,), (signs,))
        return rate, (signs * slope).sum((1, 2, 3))

    z_1, integral = integrate(function, (z_0, jnp.zeros(len(z_0))), gamma_0, gamma_1, steps)
    log_prior = -0.5 * (jnp.square(z_1) + math.log(2 * math.pi)).sum((1, 2, 3))
    return log_prior + integral


def score_of(params, config):
    """The score network without conditioning: (z, gamma [B]) -> eps_hat."""

    def score(z, gamma):
        return vdm.score_network(params["score_model"], z, gamma, jnp.zeros(len(z)), config)

    return score


def bits_by_ode(params, images, key, config, steps):
    """The cost of each picture in bits per dimension. Integers [B,H,W,C] -> [B]."""
    eps_key, sign_key = jax.random.split(key)
    gamma_0 = vdm.noise_schedule(params["gamma"], 0.0, config)
    gamma_1 = vdm.noise_schedule(params["gamma"], 1.0, config)
    x = vdm.encode(images, config.levels)
    eps = jax.random.normal(eps_key, x.shape)
    signs = jax.random.rademacher(sign_key, x.shape, jnp.float32)
    z_0 = vdm.alpha(gamma_0) * x + vdm.sigma(gamma_0) * eps
    log_p = log_density(z_0, signs, gamma_0, gamma_1, score_of(params, config), steps)
    log_q = -0.5 * (jnp.square(eps) + math.log(2 * math.pi)) - jnp.log(vdm.sigma(gamma_0))
    decoder = vdm.reconstruction_loss(images, eps, gamma_0, config.levels)
    return vdm.in_bits(decoder + log_q.sum((1, 2, 3)) - log_p, config)


def between(params, first, second, count, config, steps):
    """`count` pictures from one to the other. Integers [H,W,C] -> integers [count,H,W,C]."""
    gamma_0 = vdm.noise_schedule(params["gamma"], 0.0, config)
    gamma_1 = vdm.noise_schedule(params["gamma"], 1.0, config)
    function = functools.partial(velocity, score=score_of(params, config))
    ends = vdm.alpha(gamma_0) * vdm.encode(jnp.stack([first, second]), config.levels)
    a, b = integrate(function, ends, gamma_0, gamma_1, steps)
    share = jnp.linspace(0, 1, count)[:, None, None, None]
    cosine = (a * b).sum() / (jnp.linalg.norm(a) * jnp.linalg.norm(b))
    angle = jnp.arccos(cosine)
    mixed = (jnp.sin((1 - share) * angle) * a + jnp.sin(share * angle) * b) / jnp.sin(angle)
    z_0 = integrate(function, mixed, gamma_1, gamma_0, steps)
    return vdm.decode(params, z_0, config)


def run(args):
    """Prints both costs, and draws the pictures between two."""
    require(args.count >= 2, f"--count {args.count} is not at least 2")
    require(args.steps >= 1, f"--steps {args.steps} is not at least 1")
    check_out(args.out)
    params, config = vdm_train.load_model(args.model)
    images = vdm_train.read_images(args.data, config.levels)
    vdm.check_images(images, config)
    require(len(images) >= args.count, f"{args.data} has fewer than --count {args.count} pictures")
    order = np.random.default_rng(args.seed).permutation(len(images))
    images = images[order[: args.count]]
    bound_key, ode_key = jax.random.split(jax.random.key(args.seed))
    bound = vdm.bits_per_dim(params, images, bound_key, config, repeats=8)
    by_ode = jax.jit(functools.partial(bits_by_ode, config=config, steps=args.steps))
    bits = np.asarray(by_ode(params, images, ode_key))
    error = bits.std() / math.sqrt(len(bits))
    print(f"bits per dimension by the bound: {bound['total']:.3f} +- {bound['standard_error']:.3f}")
    print(f"result: bits per dimension by the ODE: {bits.mean():.3f} +- {error:.3f}")
    mix = jax.jit(functools.partial(between, count=9, config=config, steps=args.steps))
    pictures = np.asarray(mix(params, images[0], images[1]))
    vdm_train.save_samples(args.out, pictures, config.levels)
    print(f"wrote {args.out}")


def main(argv=None) -> int:
    """Returns the exit status: 2 for bad input, in one line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="a folder that vdm_train.py wrote")
    parser.add_argument("--data", required=True, help="an .npz with the array images")
    parser.add_argument("--count", type=int, default=64, help="pictures to measure")
    parser.add_argument("--steps", type=int, default=50, help="of Runge-Kutta")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="between.png", help="nine pictures between two")
    args = parser.parse_args(argv)
    try:
        run(args)
    except ValueError as error:
        print(f"vdm_ode.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_program(main)
