"""mixer.py beside a plain flax.linen MLP-Mixer with the same weights, with and without remat.

What      Times of the forward pass and of the train step (Adam, state donated), and of one block's
          token mixing written in other ways. Figures that no noise touches: FLOPs and temporary
          bytes.
How       As bench_vit.py, whose measures it imports: one process, rounds interleaved in random
          order, medians. Before anything is timed, all contenders must give the same logits.
Run       make bench FILE=mixer
          python bench/bench_mixer.py --batch 8 --pairs 9 --size S/16
          About 5 minutes on two CPU cores. Replaces the section of mixer.py in bench/RESULTS.md.
"""

import argparse
import dataclasses
import functools
import os

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from bench_vit import (
    ROOT,
    Contender,
    cost_row,
    exact_figures,
    flax_contender,
    forward_of,
    interleave,
    machine,
    make_batch,
    make_timm,
    present_interface,
    speed_row,
    step_of,
    timm_table,
    write_section,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import mixer

# ==== The peer ====================================================================================


class MlpBlock(nn.Module):
    """Two dense layers with a GELU between them."""

    hidden: int

    @nn.compact
    def __call__(self, x):  # [...,I] -> [...,I]
        y = nn.gelu(nn.Dense(self.hidden)(x))
        return nn.Dense(x.shape[-1])(y)


class MixerBlock(nn.Module):
    """A layer of the flax peer."""

    config: mixer.Config

    @nn.compact
    def __call__(self, x):  # [B,T,D] -> [B,T,D]
        y = nn.LayerNorm()(x)
        y = jnp.swapaxes(y, 1, 2)
        y = MlpBlock(self.config.tokens_mlp, name="token_mixing")(y)
        x = x + jnp.swapaxes(y, 1, 2)
        y = nn.LayerNorm()(x)
        return x + MlpBlock(self.config.channels_mlp, name="channel_mixing")(y)


class Peer(nn.Module):
    """A Mixer as one writes it in flax.linen; Config.remat wraps each layer in nn.remat."""

    config: mixer.Config

    @nn.compact
    def __call__(self, images):  # [B,height,width,C] -> [B,N]
        patch = self.config.patch_size
        x = nn.Conv(self.config.width, patch, strides=patch, name="stem")(images)
        x = x.reshape(len(x), -1, self.config.width)
        layer = MixerBlock
        if self.config.remat:
            layer = nn.remat(MixerBlock)
        for i in range(self.config.depth):
            x = layer(self.config, name=f"MixerBlock_{i}")(x)
        x = nn.LayerNorm(name="pre_head_layer_norm")(x).mean(1)
        return nn.Dense(self.config.classes, kernel_init=nn.initializers.zeros, name="head")(x)


def make_flax(config, images, labels) -> Contender:
    """The peer, whose names are the released ones."""
    unflatten = functools.partial(flax.traverse_util.unflatten_dict, sep="/")
    return flax_contender(Peer(config), unflatten, images, labels)


def make_mixer(config, images, labels) -> Contender:
    """mixer.py on a mesh of one device, as its demo runs it."""
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    images, labels = jax.device_put((images, labels), NamedSharding(mesh, P("data")))
    return present_interface(mixer, config, mesh, images, labels)


def check_equal(config, contenders: dict):
    """As many weights in all contenders, and with the same weights the same logits."""
    params = mixer.init_params(jax.random.key(0), config)
    flat = mixer.to_official(params, config)
    rng = np.random.default_rng(1)
    flat["head/kernel"] = rng.normal(size=flat["head/kernel"].shape).astype(np.float32)
    want = None
    for name, contender in contenders.items():
        weights = contender.from_official(flat)
        got = np.asarray(contender.forward(weights, contender.images))
        if want is None:
            want = got
        error = np.abs(got - want).max() / np.abs(want).max()
        assert error < 1e-4, f"the logits of {name} differ by {error:.1e} of the largest"


# ==== Token mixing, written in three ways =========================================================


def swapped(x, weights, config):
    """As in mixer.py: swap, two products of matrices, swap."""
    y = mixer.layer_norm(x, weights["norm1"]).swapaxes(1, 2)
    y = mixer.mlp(y, weights["token_mixing"], config)
    return x + y.swapaxes(1, 2)


def einsum(x, weights, config):
    """Contracts the axis of the tokens where it stands."""
    first = weights["token_mixing"]["dense1"]
    second = weights["token_mixing"]["dense2"]
    y = mixer.layer_norm(x, weights["norm1"])
    y = jnp.einsum("btd,te->bed", y, first["kernel"]) + first["bias"][:, None]
    y = jax.nn.gelu(y)
    y = jnp.einsum("bed,et->btd", y, second["kernel"]) + second["bias"][:, None]
    return x + y


def batched(x, weights, config):
    """A product of matrices for each picture, with the weights from the left."""
    first = weights["token_mixing"]["dense1"]
    second = weights["token_mixing"]["dense2"]
    y = mixer.layer_norm(x, weights["norm1"])
    y = jnp.broadcast_to(first["kernel"].T, (len(x), *first["kernel"].T.shape)) @ y
    y = jax.nn.gelu(y + first["bias"][:, None])
    y = jnp.broadcast_to(second["kernel"].T, (len(x), *second["kernel"].T.shape)) @ y
    return x + y + second["bias"][:, None]


def token_mixing_rows(config, rows, pairs) -> list[str]:
    """Times of one token mixing, forward and with gradient."""
    params = mixer.init_params(jax.random.key(0), config)
    weights = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
    x = jax.random.normal(jax.random.key(1), (rows, config.tokens, config.width))
    programs = {}
    for form in (swapped, einsum, batched):

        def loss(x, weights, form=form):
            return jnp.square(form(x, weights, config)).sum()

        forward = jax.jit(functools.partial(form, config=config))
        gradient = jax.jit(jax.grad(loss, (0, 1)))
        programs[form.__name__, "forward"] = forward.lower(x, weights).compile()
        programs[form.__name__, "gradient"] = gradient.lower(x, weights).compile()
    functions = {name: functools.partial(run, x, weights) for name, run in programs.items()}
    seconds = {name: np.median(each) for name, each in interleave(functions, 3 * pairs).items()}
    lines = []
    for form in (swapped, einsum, batched):
        name = form.__name__
        cells = []
        for what in ("forward", "gradient"):
            ratio = seconds[name, what] / seconds["swapped", what]
            cells.append(f"{seconds[name, what] * 1e3:.1f} | {ratio:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def beside_timm(args, config, batch) -> list[str]:
    """The table of mixer.py and timm's Mixer."""
    letter, patch = args.size.split("/")
    try:
        timm = make_timm(f"mixer_{letter.lower()}{patch}_224", *batch)
    except ImportError as error:
        return [f"timm was absent: {error}."]
    return timm_table("mixer.py", make_mixer(config, *batch), timm, args.pairs)


# ==== Report ======================================================================================


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=9, help="rounds that count")
    parser.add_argument("--size", choices=mixer.SIZES, default="S/16")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    jax.config.update("jax_enable_compilation_cache", False)

    config = mixer.SIZES[args.size]
    batch = make_batch(config, args.batch)
    keep_all = dataclasses.replace(config, remat=False)
    contenders = {
        "mixer.py": make_mixer(config, *batch),
        "flax, remat": make_flax(config, *batch),
        "mixer.py, keeps all": make_mixer(keep_all, *batch),
        "flax, keeps all": make_flax(keep_all, *batch),
    }
    check_equal(config, contenders)
    figures = {name: exact_figures(contender) for name, contender in contenders.items()}
    forwards = {name: forward_of(contender) for name, contender in contenders.items()}
    forward = interleave(forwards, 3 * args.pairs)
    steps = {name: step_of(contender) for name, contender in contenders.items()}
    step = interleave(steps, args.pairs)

    def speed(what, seconds, peer, ours, goal=None):
        return speed_row(f"{what}: {ours} / {peer}", seconds[ours], seconds[peer], goal)

    def cost(what, unit, peer, ours="mixer.py", goal=None):
        both = [figures[ours][what]], [figures[peer][what]]
        return cost_row(f"{what}: {ours} / {peer}", *both, unit, goal)

    flags = f"--batch {args.batch} --pairs {args.pairs} --size {args.size}"
    lines = [
        f"`python bench/bench_mixer.py {flags}` on {machine()}; load {load:.1f} at the start.",
        "",
        f"Float32, {config.image_size[0]} pixels. Medians of {args.pairs} interleaved rounds, of",
        "three times as many for the forward pass; in brackets the range of the ratio. Times in",
        "ms, ratio peer / mixer.py, above 1 mixer.py is faster; other ratios: mixer.py / peer.",
        "remat is mixer.py's default. Without it lax.scan stacks all that the backward pass needs,",
        "which costs more than to compute it again. (JAX 0.10 undoes nn.remat on a CPU.)",
        "",
        "| | mixer.py | peer | ratio | goal |",
        "| --- | --- | --- | --- | --- |",
        speed("forward pass", forward, "flax, remat", "mixer.py", 1.0),
        speed("train step", step, "flax, remat", "mixer.py", 1.0),
        speed("train step", step, "flax, keeps all", "mixer.py, keeps all", 1.0),
        speed("train step", step, "flax, keeps all", "mixer.py"),
        cost("step bytes", 1e6, "flax, keeps all", goal=0.333),
        cost("step bytes", 1e6, "flax, remat"),
        cost("step bytes", 1e6, "flax, keeps all", "mixer.py, keeps all"),
        cost("forward FLOPs", 1e9, "flax, remat"),
        cost("gradient FLOPs", 1e9, "flax, remat"),
        cost("gradient FLOPs", 1e9, "flax, keeps all", "mixer.py, keeps all"),
        cost("step lines", 1, "flax, remat"),
        "",
        "Token mixing of one block in other forms. Times in ms, and the ratio to `swapped`,",
        "the form of mixer.py.",
        "",
        "| | forward | ratio | gradient | ratio |",
        "| --- | --- | --- | --- | --- |",
        *token_mixing_rows(config, args.batch, args.pairs),
        "",
        *beside_timm(args, config, batch),
    ]
    write_section(ROOT / "bench" / "RESULTS.md", "mixer.py", lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
