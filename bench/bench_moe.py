"""moe.py beside a flax.linen V-MoE with one-hot dispatch, and what routing is worth on digits.

What      Times of the forward pass and of the train step (Adam, router noise, auxiliary losses).
          Figures that do not vary between runs: FLOPs and temporary bytes. Then trainings of the
          demo's model: without auxiliary losses (does the router collapse?), more capacities, and a
          dense ViT of the same FLOPs per image.
How       As bench_vit.py, whose measures it imports: one process, rounds interleaved in random
          order, medians. Before anything is timed, both must give the same logits and losses.
Run       make bench FILE=moe
          python bench/bench_moe.py --pairs 9 --seeds 3
          About 15 minutes on two CPU cores. Replaces the section of moe.py in bench/RESULTS.md.
"""

import argparse
import dataclasses
import functools
import math
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
    make_batch,
    speed_row,
    temporary_bytes,
    write_section,
)
from jax.sharding import AxisType

import moe
import vit

CAPACITIES = (1.05, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1)

# ==== The peer: dispatch and combine as products with one-hot arrays ==============================


class Mlp(nn.Module):
    """Two dense layers with a GELU between them."""

    hidden: int

    @nn.compact
    def __call__(self, x):  # [...,D] -> [...,D]
        y = nn.Dense(self.hidden, name="Dense_0")(x)
        return nn.Dense(x.shape[-1], name="Dense_1")(nn.gelu(y))


class Router(nn.Module):
    """A dense layer under the official name."""

    experts: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.experts, use_bias=False, name="dense")(x)


def squared_variation(x):
    return x.var(-1) / x.mean(-1) ** 2


class Mixture(nn.Module):
    """The paper's mixture. Sows its auxiliary loss."""

    config: moe.Config

    @nn.compact
    def __call__(self, x, noise):  # [B,T,D], [G,M,E] -> [B,T,D]
        config = self.config
        E, k = config.experts, config.k
        tokens = x.reshape(len(x) // config.group, -1, config.width)  # [G,M,D]
        G, M, _ = tokens.shape
        logits = Router(E, name="Router")(tokens)
        clean = nn.softmax(logits)
        gates = clean
        load = 0.0
        if noise is not None:
            deviation = config.noise_std / E
            noisy = logits + deviation * noise
            gates = nn.softmax(noisy)
            threshold = jax.lax.top_k(noisy, k)[0][..., -1:]
            chance = jax.scipy.stats.norm.cdf((logits - threshold) / deviation)
            load = squared_variation(chance.sum(1)).mean()
        importance = squared_variation(clean.sum(1)).mean()
        loss = config.importance_weight * importance + config.load_weight * load
        self.sow("losses", "auxiliary", loss)

        c = moe.capacity(M, config)
        top_gates, chosen = jax.lax.top_k(gates, k)
        chosen = jax.nn.one_hot(chosen, E)  # [G,M,k,E]
        queue = chosen.swapaxes(1, 2).reshape(G, k * M, E)
        places = ((jnp.cumsum(queue, 1) - queue) * queue).sum(-1)  # [G,k*M]
        places = places.reshape(G, k, M).swapaxes(1, 2)
        slots = jax.nn.one_hot(places, c)  # [G,M,k,c]; zeros where a choice is dropped
        dispatch = jnp.einsum("gmke,gmkc->gmec", chosen, slots)
        combine = jnp.einsum("gmke,gmkc,gmk->gmec", chosen, slots, top_gates)
        buffers = jnp.einsum("gmec,gmd->egcd", dispatch, tokens).reshape(E, G * c, -1)
        experts = nn.vmap(Mlp, variable_axes={"params": 0}, split_rngs={"params": True})
        outputs = experts(config.mlp, name="Mlp")(buffers).reshape(E, G, c, -1)
        y = jnp.einsum("gmec,egcd->gmd", combine, outputs)
        return y.reshape(x.shape)


class Block(nn.Module):
    """A block of the flax peer."""

    config: moe.Config
    has_experts: bool

    @nn.compact
    def __call__(self, x, noise):  # [B,T,D] -> [B,T,D]
        y = nn.LayerNorm(name="LayerNorm_0")(x)
        heads = self.config.heads
        x = x + nn.MultiHeadDotProductAttention(heads, name="SelfAttention")(y, y)
        y = nn.LayerNorm(name="LayerNorm_1")(x)
        if self.has_experts:
            return x + Mixture(self.config, name="Moe")(y, noise)
        return x + Mlp(self.config.mlp, name="Mlp")(y)


class Peer(nn.Module):
    """A V-MoE as one writes it in flax.linen."""

    config: moe.Config

    @nn.compact
    def __call__(self, images, noise):  # [B,H,W,C], [blocks,G,M,E] or None -> [B,N]
        config = self.config
        D = config.width
        patch = config.patch_size
        x = nn.Conv(D, patch, strides=patch, padding="VALID", name="embedding")(images)
        x = x.reshape(len(x), -1, D)
        token = self.param("cls", nn.initializers.zeros, (1, 1, D))
        x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x], axis=1)
        x = x + self.param("position", nn.initializers.normal(0.02), (1, x.shape[1], D))
        block = nn.remat(Block) if config.remat else Block
        for i in range(config.depth):
            own = None
            if noise is not None and i in config.moe_blocks:
                own = noise[config.moe_blocks.index(i)]
            x = block(config, i in config.moe_blocks, name=f"encoderblock_{i}")(x, own)
        x = nn.LayerNorm(name="encoder_norm")(x)[:, 0]
        if config.representation:
            x = nn.tanh(nn.Dense(config.representation, name="pre_logits")(x))
        return nn.Dense(config.classes, name="head")(x)


def peer_params(flat):
    """The peer's weights, from those under official names."""
    renamed = {}
    for name, array in flat.items():
        name = name.removeprefix("Encoder/").replace("posembed_input/pos_embedding", "position")
        renamed[name] = array
    return flax.traverse_util.unflatten_dict(renamed, sep="/")


# ==== Both, as functions of weights, batch and key ================================================


def make_ours(config):
    """(forward, loss): logits, and the loss with noise."""

    def forward(params, images, noise=None):
        return moe.forward(params, images, config, noise=noise)[0]

    def loss(params, images, labels, key):
        batch = {"images": images, "labels": labels}
        return moe.loss_fn(params, batch, key, config)[0]

    return forward, loss


def make_peer(config):
    model = Peer(config)

    def forward(params, images, noise=None):
        return model.apply({"params": params}, images, noise)

    def loss(params, images, labels, key):
        noise = moe.draw_noise(key, len(images), config)
        logits, sown = model.apply({"params": params}, images, noise, mutable="losses")
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return nats + sum(jax.tree.leaves(sown))

    return forward, loss


def make_step(loss):
    """A jitted train step, (params, opt_state, *batch) -> the same and the loss."""

    def step(params, opt_state, *batch):
        value, grads = jax.value_and_grad(loss)(params, *batch)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return jax.jit(step, donate_argnums=(0, 1))


def beside_flax(config, pairs) -> list[str]:
    """The table of moe.py and the peer."""
    images, labels = make_batch(config, config.group)
    batch = images, labels, jax.random.key(1)
    params = jax.jit(moe.init_params, static_argnums=1)(jax.random.key(0), config)
    flat = moe.to_official(params, config)
    rng = np.random.default_rng(1)
    flat["head/kernel"] = 0.02 * rng.normal(size=flat["head/kernel"].shape).astype(np.float32)
    contenders = {
        "moe.py": (*make_ours(config), moe.from_official(flat, config)),
        "flax": (*make_peer(config), peer_params(flat)),
    }
    wanted = None
    forwards = {}
    steps = {}
    figures = {}
    for name, (forward, loss, weights) in contenders.items():
        noise = moe.draw_noise(jax.random.key(1), len(images), config)
        got = (
            np.asarray(jax.jit(forward)(weights, images, noise)),
            float(jax.jit(loss)(weights, *batch)),
        )
        wanted = wanted or got
        error = np.abs(got[0] - wanted[0]).max() / np.abs(wanted[0]).max()
        assert error < 1e-4, f"the logits of {name} differ by {error:.1e} of the largest"
        assert abs(got[1] / wanted[1] - 1) < 1e-5, f"the losses are {got[1]} and {wanted[1]}"

        weights = jax.device_put(weights)
        step = make_step(loss)
        state = [weights, OPTIMIZER.init(weights)]
        figures[name] = {
            "forward GFLOP": flops(jax.make_jaxpr(forward)(weights, images).jaxpr) / 1e9,
            "gradient GFLOP": flops(jax.make_jaxpr(jax.grad(loss))(weights, *batch).jaxpr) / 1e9,
            "step MB": temporary_bytes(step.lower(*state, *batch)) / 1e6,
        }
        forwards[name] = functools.partial(jax.jit(forward), weights, images)
        copy = jax.tree.map(jnp.copy, state)

        def run(step=step, state=copy):
            *state[:], _ = step(*state, *batch)
            return state

        steps[name] = run
    seconds = {"forward pass, ms": interleave(forwards, 2 * pairs)}
    seconds["train step, ms"] = interleave(steps, pairs)
    rows = []
    for what, times in seconds.items():
        rows.append(speed_row(what, times["moe.py"], times["flax"], 1.0))
    for what in figures["flax"]:
        rows.append(cost_row(what, [figures["moe.py"][what]], [figures["flax"][what]], 1))
    return ["| | moe.py | flax, one-hot | ratio | goal |", "| --- | --- | --- | --- | --- |", *rows]


# ==== Trainings of the demo's model ===============================================================


def accuracies(params, mesh, images, labels) -> dict:
    """{batch_priority: [accuracy for each capacity]}."""
    found = {}
    for batch_priority in (False, True):
        row = []
        for factor in CAPACITIES:
            config = dataclasses.replace(
                moe.DIGITS, capacity_factor=factor, batch_priority=batch_priority
            )
            row.append(moe.evaluate(params, config, mesh, images, labels)[0])
        found[batch_priority] = row
    return found


def train_dense(config, mesh, images, labels, steps, seed):
    """A ViT, trained as moe.train trains a V-MoE. Returns its weights."""
    init_key, step_key = jax.random.split(jax.random.key(seed))
    optimizer = moe.make_optimizer(steps)
    state = vit.init_state(init_key, config, optimizer, mesh)
    step = vit.make_train_step(config, optimizer, mesh)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        rows = rng.integers(len(images), size=moe.RECIPES["digits"].batch)
        batch = moe.place(mesh, moe.augment(images[rows], rng, 2), labels[rows])
        state, _ = step(state, batch, step_key)
    return state.params


def dense_twin():
    """The ViT whose blocks have as many FLOPs as the demo's, and no router."""
    digits = moe.DIGITS
    c = moe.capacity(digits.group * digits.tokens, digits)
    slots_per_token = digits.experts * c / (digits.group * digits.tokens)
    names = ("image_size", "patch_size", "channels", "classes", "width", "depth", "heads", "pool")
    shared = {name: getattr(digits, name) for name in names}
    return vit.Config(**shared, mlp=math.ceil(digits.mlp * slots_per_token), remat=False)


def spread(values) -> str:
    """Mean and range."""
    return f"{np.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def trainings(seeds, steps) -> list[str]:
    """Tables of accuracy, with and without auxiliary losses, and of the dense ViT."""
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    images, labels = moe.load_digits(ROOT / "data/mnist5k.npz")
    held = len(images) // 5
    test = images[:held], labels[:held]
    rest = images[held:], labels[held:]
    moe.REPORT = steps
    configs = {
        "with both": moe.DIGITS,
        "without": dataclasses.replace(moe.DIGITS, importance_weight=0.0, load_weight=0.0),
    }
    by_capacity = {False: [], True: []}
    lines = []
    for name, config in configs.items():
        accuracy, largest, smallest, dropped = [], [], [], []
        for seed in range(seeds):
            params = moe.train(config, mesh, *rest, steps, seed)
            right, metrics = moe.evaluate(params, config, mesh, *test)
            accuracy.append(right)
            largest.append(metrics["largest_load"])
            smallest.append(metrics["smallest_load"])
            dropped.append(100 * metrics["dropped"])
            if name == "with both":
                for batch_priority, row in accuracies(params, mesh, *test).items():
                    by_capacity[batch_priority].append(row)
        loads = f"{np.mean(smallest):.2f} to {np.mean(largest):.2f}"
        lines.append(f"| {name} | {spread(accuracy)} | {loads} | {np.mean(dropped):.0f} |")

    twin = dense_twin()
    dense = []
    for seed in range(seeds):
        params = train_dense(twin, mesh, *rest, steps, seed)
        dense.append(vit_accuracy(params, twin, mesh, *test))
    rows = []
    for i, factor in enumerate(CAPACITIES):
        plain, priority = ([row[i] for row in by_capacity[kind]] for kind in (False, True))
        saved = np.subtract(priority, plain)
        rows.append(f"| {factor} | {spread(plain)} | {spread(priority)} | {spread(saved)} |")
    return [
        f"The demo's model, {steps} steps, {seeds} seeds: mean and range. Loads are those of the",
        "experts with fewest and most choices in any block, 1 is balanced, means over the seeds.",
        "",
        "| auxiliary losses | accuracy, % | loads | choices dropped, % |",
        "| --- | --- | --- | --- |",
        *lines,
        f"| dense ViT, mlp={twin.mlp}, as many FLOPs | {spread(dense)} | | |",
        "",
        "Trained with a capacity factor of 1.05 and both losses, tested with others:",
        "",
        "| capacity factor | accuracy, % | with BPR | points saved |",
        "| --- | --- | --- | --- |",
        *rows,
    ]


def vit_accuracy(params, config, mesh, images, labels) -> float:
    """Accuracy of the dense ViT in per cent."""
    forward = jax.jit(functools.partial(vit.forward, config=config))
    right = 0
    for first in range(0, len(images), 100):
        rows = slice(first, first + 100)
        batch = moe.place(mesh, images[rows], labels[rows])
        right += int((forward(params, batch["images"]).argmax(-1) == batch["labels"]).sum())
    return 100 * right / len(images)


# ==== Report ======================================================================================


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=9, help="rounds that count")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind")
    parser.add_argument("--steps", type=int, default=moe.RECIPES["digits"].steps)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    jax.config.update("jax_enable_compilation_cache", False)
    config = dataclasses.replace(moe.SIZES["S/32"], experts=8, moe_blocks=(5, 7))
    flags = f"--pairs {args.pairs} --seeds {args.seeds} --steps {args.steps}"
    lines = [
        f"`python bench/bench_moe.py {flags}` on {machine()}; load {load:.1f} at the start.",
        "",
        "V-MoE-S/32, 8 experts in blocks 5 and 7, k = 2, one group of 8 images, float32, remat.",
        f"Medians of {args.pairs} interleaved rounds, twice as many for the forward pass; in",
        "brackets its range. Times: ratio flax / moe.py, above 1 moe.py is faster; the",
        "other rows: moe.py / flax.",
        "",
        *beside_flax(config, args.pairs),
        "",
        *trainings(args.seeds, args.steps),
    ]
    path = ROOT / "bench/RESULTS.md"
    write_section(path, "moe.py", lines)
    print("\n".join([*lines, "", f"wrote {path}"]))


if __name__ == "__main__":
    main()
