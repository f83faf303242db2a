"""vdm.py beside a plain flax.linen version of its U-Net and loss.

What      Times of the score network and of the train step (Adam, the bound as objective for both).
          Figures that do not vary between runs: FLOPs and temporary bytes. Then 3x3 convolutions
          in two forms, since that is what a step consists of.
How       As bench_vit.py, whose measures it imports: one process, rounds interleaved in random
          order, medians. Before anything is timed, both must give the same noise and losses.
Run       make bench FILE=vdm
          python bench/bench_vdm.py --pairs 7
          About 5 minutes on two CPU cores. Replaces the section of vdm.py in bench/RESULTS.md.
"""

import argparse
import functools
import os

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from bench_vit import (
    OPTIMIZER,
    ROOT,
    cost_row,
    flops,
    interleave,
    machine,
    speed_row,
    temporary_bytes,
    write_section,
)
from jax import lax

import vdm

CONFIG = vdm.Config(image_size=16, width=64, depth=2, dropout=0.0, schedule="linear")
BATCH = 16

# ==== The peer ====================================================================================


class Norm(nn.Module):
    """GroupNorm and swish."""

    @nn.compact
    def __call__(self, x):
        return nn.swish(nn.GroupNorm(name="norm", epsilon=1e-6)(x))


class Block(nn.Module):
    """A residual block."""

    width: int

    @nn.compact
    def __call__(self, x, cond):  # [B,H,W,I], [B,4D] -> [B,H,W,D]
        D = self.width
        y = nn.Conv(D, (3, 3), name="conv1")(Norm(name="GroupNorm_0")(x))
        y = y + nn.Dense(D, use_bias=False, name="cond_proj")(cond)[:, None, None]
        y = nn.Conv(D, (3, 3), name="conv2")(Norm(name="GroupNorm_1")(y))
        if x.shape[-1] != D:
            x = nn.Dense(D, name="nin_shortcut")(x)
        return x + y


class Attention(nn.Module):
    """Attention of one head over all pixels."""

    @nn.compact
    def __call__(self, x):  # [B,H,W,D] -> [B,H,W,D]
        B, H, W, D = x.shape
        y = nn.GroupNorm(name="GroupNorm_0", epsilon=1e-6)(x).reshape(B, H * W, D)
        q, k, v = (nn.Dense(D, name=name)(y) for name in ("q", "k", "v"))
        y = nn.softmax(q @ k.mT * D**-0.5) @ v
        return x + nn.Dense(D, name="proj_out")(y).reshape(B, H, W, D)


class Peer(nn.Module):
    """The U-Net as one writes it in flax.linen, with nn.remat where vdm.py has jax.checkpoint."""

    config: vdm.Config

    @nn.compact
    def __call__(self, z, gamma, conditioning):  # [B,H,W,C], [B], [B] -> [B,H,W,C]
        config = self.config
        D = config.width
        scaled = (gamma - config.gamma_min) / (config.gamma_max - config.gamma_min)
        cond = jnp.concatenate([vdm.sinusoids(scaled, D), conditioning[:, None]], axis=1)
        cond = nn.swish(nn.Dense(4 * D, name="dense0")(cond))
        cond = nn.swish(nn.Dense(4 * D, name="dense1")(cond))
        block = nn.remat(Block)
        x = nn.Conv(D, (3, 3), name="conv_in")(vdm.fourier_features(z, config.fourier))
        skips = [x]
        for i in range(config.depth):
            x = block(D, name=f"down.block_{i}")(x, cond)
            skips.append(x)
        x = block(D, name="mid.block_1")(x, cond)
        x = nn.remat(Attention)(name="mid.attn_1")(x)
        x = block(D, name="mid.block_2")(x, cond)
        for i in range(config.depth + 1):
            x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = block(D, name=f"up.block_{i}")(x, cond)
        x = Norm(name="GroupNorm_0")(x)
        return nn.Conv(config.channels, (3, 3), name="conv_out")(x) + z


def peer_params(flat):
    """The peer's weights, from those under official names."""
    renamed = {}
    for name, array in flat.items():
        name = name.removeprefix("score_model/")
        if "GroupNorm" in name and "attn" not in name:
            name = name.replace("GroupNorm_0", "GroupNorm_0/norm")
            name = name.replace("GroupNorm_1", "GroupNorm_1/norm")
        renamed[name] = array
    return flax.traverse_util.unflatten_dict(renamed, sep="/")


# ==== Both, as functions of weights and batch =====================================================


def ours(params, z, gamma, conditioning):
    return vdm.score_network(params, z, gamma, conditioning, CONFIG)


def peer(params, z, gamma, conditioning):
    return Peer(CONFIG).apply({"params": params}, z, gamma, conditioning)


def make_loss(score):
    """The bound, for a score function of weights and inputs."""

    def call(params, z, gamma, conditioning, config, keys=None):
        return score(params, z, gamma, conditioning)

    def loss(params, images, key):
        draws = vdm.draw_numbers(key, len(images), CONFIG)
        params = {"gamma": {}, "score_model": params}
        terms = vdm.losses(params, images, jnp.zeros(len(images)), draws, CONFIG, score=call)
        return sum(vdm.in_bits(term, CONFIG).mean() for term in terms)

    return loss


def make_step(loss):
    """A jitted train step, (params, opt_state, *batch) -> the same and the loss."""

    def step(params, opt_state, *batch):
        value, grads = jax.value_and_grad(loss)(params, *batch)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return jax.jit(step, donate_argnums=(0, 1))


def beside_flax(pairs) -> list[str]:
    """The table of vdm.py and the peer."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(vdm.init_params, config=CONFIG), jax.random.key(0))
    params = jax.tree.map(lambda x: 0.05 * rng.normal(size=x.shape).astype(np.float32), shapes)
    flat = vdm.to_official(params, CONFIG)
    images = rng.integers(0, CONFIG.levels, (BATCH, *CONFIG.shape))
    z = rng.normal(size=images.shape).astype(np.float32)
    gamma = rng.uniform(-13, 5, BATCH).astype(np.float32)
    inputs = z, gamma, np.zeros(BATCH, np.float32)
    batch = images, jax.random.key(0)
    contenders = {
        "vdm.py": (ours, params["score_model"]),
        "flax": (peer, peer_params(flat)),
    }
    wanted = None
    forwards = {}
    steps = {}
    figures = {}
    for name, (score, weights) in contenders.items():
        weights = jax.device_put(weights)
        loss = make_loss(score)
        forward = jax.jit(score)
        got = np.asarray(forward(weights, *inputs)), float(jax.jit(loss)(weights, *batch))
        wanted = wanted or got
        error = np.abs(got[0] - wanted[0]).max() / np.abs(wanted[0]).max()
        assert error < 1e-3, f"the noise of {name} differs by {error:.1e} of the largest"
        assert abs(got[1] / wanted[1] - 1) < 1e-3, f"the losses are {got[1]} and {wanted[1]}"

        step = make_step(loss)
        state = [weights, OPTIMIZER.init(weights)]
        figures[name] = {
            "forward GFLOP": flops(jax.make_jaxpr(score)(weights, *inputs).jaxpr) / 1e9,
            "gradient GFLOP": flops(jax.make_jaxpr(jax.grad(loss))(weights, *batch).jaxpr) / 1e9,
            "step MB": temporary_bytes(step.lower(*state, *batch)) / 1e6,
        }
        product = vdm.convolve
        vdm.convolve = by_xla  # as on other devices than a CPU; the peer has it in any case
        jax.clear_caches()  # of jax.checkpoint, which would not see the other function
        megabytes = temporary_bytes(make_step(make_loss(score)).lower(*state, *batch)) / 1e6
        figures[name]["step MB, both by XLA's convolution"] = megabytes
        vdm.convolve = product
        jax.clear_caches()
        forwards[name] = functools.partial(forward, weights, *inputs)
        copy = jax.tree.map(jnp.copy, state)

        def run(step=step, state=copy):
            *state[:], _ = step(*state, *batch)
            return state

        steps[name] = run
    seconds = {"score network, ms": interleave(forwards, 2 * pairs)}
    seconds["train step, ms"] = interleave(steps, pairs)
    rows = []
    for what, times in seconds.items():
        rows.append(speed_row(what, times["vdm.py"], times["flax"], 1.0))
    for what in figures["flax"]:
        rows.append(cost_row(what, [figures["vdm.py"][what]], [figures["flax"][what]], 1, 1.0))
    return ["| | vdm.py | flax | ratio | goal |", "| --- | --- | --- | --- | --- |", *rows]


# ==== Convolutions ================================================================================


def by_xla(x, weights):
    """XLA's own convolution."""
    numbers = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, weights["kernel"], (1, 1), "SAME", dimension_numbers=numbers)
    return y + weights["bias"]


def by_nine_products(x, weights):
    """A product for each place of the kernel, added up."""
    _, H, W, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = weights["bias"]
    for i in range(3):
        for j in range(3):
            y = y + padded[:, i : i + H, j : j + W] @ weights["kernel"][i, j]
    return y


def convolution_rows(pairs) -> list[str]:
    """Times and bytes of a network of three blocks by each form of convolution."""
    config = vdm.DIGITS
    params = vdm.init_params(jax.random.key(0), config)["score_model"]
    shape = (32, *config.shape)
    z = jax.random.normal(jax.random.key(1), shape)
    zeros = jnp.zeros(32)
    forms = {"one product (vdm.py)": vdm.convolve, "nine products": by_nine_products, "XLA": by_xla}
    functions = {}
    megabytes = {}
    for name, form in forms.items():

        def loss(params, z, form=form):
            kept = vdm.convolve
            vdm.convolve = form  # while it is traced
            try:
                return jnp.square(vdm.score_network(params, z, zeros, zeros, config)).sum()
            finally:
                vdm.convolve = kept

        compiled = jax.jit(jax.grad(loss)).lower(params, z).compile()
        megabytes[name] = compiled.memory_analysis().temp_size_in_bytes / 1e6
        functions[name] = functools.partial(compiled, params, z)
    times = interleave(functions, pairs)
    rows = []
    for name, seconds in times.items():
        rows.append(f"| {name} | {np.median(seconds) * 1e3:.0f} | {megabytes[name]:.0f} |")
    return rows


# ==== Report ======================================================================================


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=7, help="rounds that count")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    jax.config.update("jax_enable_compilation_cache", False)
    lines = [
        f"`python bench/bench_vdm.py --pairs {args.pairs}` on {machine()}; "
        f"load {load:.1f} at the start.",
        "",
        f"Pictures of 16x16x3, {CONFIG.width} channels, {CONFIG.depth} blocks on the way down, "
        f"batch {BATCH}, float32, remat.",
        f"Medians of {args.pairs} interleaved rounds, twice as many for the network alone; in",
        "brackets its range. Times: ratio flax / vdm.py, above 1 vdm.py is faster; the other rows:",
        "vdm.py / flax.",
        "",
        *beside_flax(args.pairs),
        "",
        "The gradient of the demo's network, batch 32, by three forms of 3x3 convolution:",
        "",
        "| form | ms | temporary MB |",
        "| --- | --- | --- |",
        *convolution_rows(args.pairs),
    ]
    path = ROOT / "bench/RESULTS.md"
    write_section(path, "vdm.py", lines)
    print("\n".join([*lines, "", f"wrote {path}"]))


if __name__ == "__main__":
    main()
