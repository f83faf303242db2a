"""The probability-flow ODE of a variational diffusion model: likelihoods and interpolation.

    python examples/vdm_train.py --data data/digits8x8.npz --levels 17 --out run
    python examples/vdm_ode.py --model run --data data/digits8x8.npz --out between.png

What      The ODE dz/dgamma = (sigma eps_hat(z) - sigma^2 z) / 2 carries z_0 to z_1 without noise
          (App. D, Eq. 35 and 36, with gamma as the time). Were eps_hat exact, z_t would have the
          same distribution as in the model. The ODE has a density of its own: log p(z_0) = log
          N(z_1; 0, I) + the integral of the divergence along the way. Hutchinson's trick estimates
          the divergence: v^T J v for a random sign vector v.
Cost      -log p(x) <= E[-log p(x | z_0) - log p(z_0) + log q(z_0 | x)], z_0 drawn from q(z_0 | x).
          The only gap is how far q(z_0 | x) is from the true posterior. Too few --steps falsify the
          cost in either direction: double them to see whether it changes.
Pictures  Of a file that vdm_train.py has trained on, nine tenths were trained on: give --data other
          pictures to compare with held-out bits per dimension.
Between   Two pictures are carried to z_1, mixed there along a great circle, and carried back.
Needs     examples/requirements.txt (orbax-checkpoint, pillow), through vdm_train.py.
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
import train  # noqa: E402
import vdm_train  # noqa: E402

import vdm  # noqa: E402
from vdm import check_out, require, run_program  # noqa: E402

BATCH = 64  # pictures that go through the network at once
DRAWN = 9  # pictures from one to the other, a square of 3 by 3


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
        """y + factor * slope, for trees."""
        return jax.tree.map(lambda a, b: a + factor * b, y, slope)

    def mean_slope(k1, k2, k3, k4):
        return (k1 + 2 * k2 + 2 * k3 + k4) / 6

    def step(y, i):
        gamma = start + i * h
        k1 = function(y, gamma)
        k2 = function(add(y, k1, h / 2), gamma + h / 2)
        k3 = function(add(y, k2, h / 2), gamma + h / 2)
        k4 = function(add(y, k3, h), gamma + h)
        return add(y, jax.tree.map(mean_slope, k1, k2, k3, k4), h), None

    y, _ = lax.scan(step, y, jnp.arange(steps))
    return y


def log_density(z_0, signs, gamma_0, gamma_1, score, steps):
    """log p(z_0) in nats, by Hutchinson's estimate. z_0 and signs (-1 or 1) [B,H,W,C] -> [B]."""

    def rates(state, gamma):
        """d/dgamma of z, and of the integral of the divergence up to z."""
        z, _ = state

        def velocity_at(z):
            return velocity(z, gamma, score)

        dz, jacobian_times_signs = jax.jvp(velocity_at, (z,), (signs,))
        divergence = (signs * jacobian_times_signs).sum((1, 2, 3))
        return dz, divergence

    z_1, integral = integrate(rates, (z_0, jnp.zeros(len(z_0))), gamma_0, gamma_1, steps)
    return log_normal(z_1) + integral


def log_normal(z):
    """log N(z; 0, I) in nats. [B,H,W,C] -> [B]."""
    return -0.5 * (jnp.square(z) + math.log(2 * math.pi)).sum((1, 2, 3))


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
    # q(z_0 | x) is normal with the deviation sigma_0: of its log density eps has all but that.
    log_q = log_normal(eps) - math.prod(config.shape) * jnp.log(vdm.sigma(gamma_0))
    reconstruction = vdm.reconstruction_loss(images, eps, gamma_0, config.levels)
    return vdm.in_bits(reconstruction - log_p + log_q, config)


def between(params, first, second, config, steps, count=DRAWN):
    """`count` pictures from one to the other. Integers [H,W,C] -> integers [count,H,W,C]."""
    gamma_0 = vdm.noise_schedule(params["gamma"], 0.0, config)
    gamma_1 = vdm.noise_schedule(params["gamma"], 1.0, config)
    function = functools.partial(velocity, score=score_of(params, config))
    x = vdm.encode(jnp.stack([first, second]), config.levels)
    z_0 = vdm.alpha(gamma_0) * x  # z_0 without noise
    z_1 = integrate(function, z_0, gamma_0, gamma_1, steps)
    mixed = on_great_circle(z_1[0], z_1[1], jnp.linspace(0, 1, count)[:, None, None, None])
    z_0 = integrate(function, mixed, gamma_1, gamma_0, steps)
    return vdm.decode(params, z_0, config)


def on_great_circle(a, b, share):
    """Points from a to b, at the shares of the angle between them; a line if there is none."""
    cosine = (a * b).sum() / (jnp.linalg.norm(a) * jnp.linalg.norm(b))
    angle = jnp.arccos(cosine.clip(-1, 1))
    sine = jnp.sin(angle)
    near = sine < 1e-4  # where the quotients below are 0 / 0
    divisor = jnp.where(near, 1, sine)
    weight_a = jnp.where(near, 1 - share, jnp.sin((1 - share) * angle) / divisor)
    weight_b = jnp.where(near, share, jnp.sin(share * angle) / divisor)
    return weight_a * a + weight_b * b


def run(args):
    """Prints both costs, and draws the pictures between two."""
    require(args.count >= 2, f"--count {args.count} is not at least 2: two are mixed")
    require(args.steps >= 1, f"--steps {args.steps} is not at least 1")
    require(0 <= args.seed < 2**32, f"--seed {args.seed} is not in 0 to {2**32 - 1}")
    check_out(args.out)
    require(args.out.endswith(".png"), f"--out {args.out} is not a .png")
    params, config = vdm_train.load_model(args.model)
    images = vdm_train.read_images(args.data, config.levels)
    vdm.check_images(images, config)
    require(len(images) >= args.count, f"{args.data} has fewer than --count {args.count} pictures")
    order = np.random.default_rng(args.seed).permutation(len(images))
    images = images[order[: args.count]]
    bound_key, ode_key = jax.random.split(jax.random.key(args.seed))
    bound = vdm.bits_per_dim(params, images, bound_key, config, repeats=8)
    by_ode = jax.jit(functools.partial(bits_by_ode, config=config, steps=args.steps))
    parts = []
    for first in range(0, len(images), BATCH):
        part_key = jax.random.fold_in(ode_key, first)
        parts.append(np.asarray(by_ode(params, images[first : first + BATCH], part_key)))
    bits = np.concatenate(parts)
    error = bits.std() / math.sqrt(len(bits))
    print(f"bits per dimension by the bound: {bound['total']:.3f} +- {bound['standard_error']:.3f}")
    print(f"result: bits per dimension by the ODE: {bits.mean():.3f} +- {error:.3f}")
    mix = jax.jit(functools.partial(between, config=config, steps=args.steps))
    pictures = np.asarray(mix(params, images[0], images[1]))
    vdm_train.save_samples(args.out, pictures, config.levels)
    print(f"wrote {args.out}")


def main(argv=None) -> int:
    """Returns the exit status: 0, or 2 for bad input, which is told in one line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="a folder that vdm_train.py wrote")
    parser.add_argument("--data", required=True, help="an .npz with the array images")
    parser.add_argument("--count", type=int, default=64, help="pictures to measure")
    parser.add_argument("--steps", type=int, default=50, help="Runge-Kutta steps from z_0 to z_1")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures and of the noise")
    parser.add_argument("--out", default="between.png", help="pictures from one to another, .png")
    args = parser.parse_args(argv)
    try:
        run(args)
    except ValueError as error:
        print(f"vdm_ode.py: {train.first_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_program(main)
