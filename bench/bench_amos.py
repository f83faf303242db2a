"""amos.py beside optax.adamw: steps to the same loss; milliseconds and bytes of an update.

What      A race on BERT's task with bytes: a small Transformer predicts 15 % of the bytes of a
          window, most of which are hidden from it. Two lengths of training, each optimizer at the
          best of its learning rates by the last held-out loss: that loss, and the share of the
          steps after which it is where AdamW ended. AdamW's gradients are clipped by their global
          norm, those of Amos entry by entry, as is usual for each. Then the update alone, on
          parameters of the shapes of two layers of BERT-base.
How       One process. Each round of updates runs every contender once, in random order; medians
          over the rounds after two that warm up.
Run       make bench FILE=amos
          python bench/bench_amos.py --seeds 3 --pairs 15
          About 8 minutes on two CPU cores. Replaces the section of amos.py in bench/RESULTS.md.
Axes      B windows  T bytes  D width  H heads  K head size  F hidden units of the MLP  L blocks
"""

import argparse
import functools
import gzip
import os
import pathlib
import random
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for `import amos`, started from any folder
import amos  # noqa: E402

BATCH = 32
LOOK_EVERY = 10  # steps between two looks at the held-out text
HIDDEN = 256  # the token that hides a byte


class Race(NamedTuple):
    """A length of training and the size of its model."""

    steps: int
    width: int
    depth: int
    length: int  # T, bytes of a window
    factor: int  # of the learning rates in RATES
    heads: int = 2


RACES = (Race(80, 32, 1, 32, 2), Race(200, 64, 2, 64, 1))
RATES = {
    "AdamW": (0.0025, 0.005, 0.01, 0.02),
    "Amos": (0.025, 0.05, 0.1),
    "Amos, momentum 0.9": (0.025, 0.05, 0.1),
    "Amos, constant rate": (0.00625, 0.0125, 0.025, 0.05),
}

# ==== A small BERT of bytes =======================================================================


def init_params(key, race: Race):
    """Float32 weights: kernels and tables of deviation 0.02, as BERT's, and blocks stacked."""
    L = race.depth
    D = race.width
    H = race.heads
    F = 4 * D
    keys = iter(jax.random.split(key, 20))

    def normal(*shape):
        return 0.02 * jax.random.normal(next(keys), shape)

    def dense(kernel, bias):
        return {"kernel": normal(*kernel), "bias": jnp.zeros(bias)}

    def norm(*shape):
        return {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}

    return {
        "here": {"embedding": normal(HIDDEN + 1, D)},
        "before": {"embedding": normal(HIDDEN + 1, D)},
        "after": {"embedding": normal(HIDDEN + 1, D)},
        "position": {"embedding": normal(race.length, D)},
        "norm": norm(D),
        "blocks": {
            "norm1": norm(L, D),
            "qkv": dense((L, D, 3, H, D // H), (L, 3, H, D // H)),
            "out": dense((L, H, D // H, D), (L, D)),
            "norm2": norm(L, D),
            "mlp1": dense((L, D, F), (L, F)),
            "mlp2": dense((L, F, D), (L, D)),
        },
        "last": norm(D),
        "head": dense((D, HIDDEN + 1), (HIDDEN + 1,)),
    }


def layer_norm(x, weights):
    """LayerNorm over the last axis. [...,D] -> [...,D]."""
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + 1e-6) * weights["scale"] + weights["bias"]


def block(x, weights):
    """One block; every byte sees all of its window. [B,T,D] -> [B,T,D]."""
    y = layer_norm(x, weights["norm1"])
    qkv = jnp.einsum("btd,dchk->cbthk", y, weights["qkv"]["kernel"])
    q, k, v = qkv + weights["qkv"]["bias"][:, None, None]
    scores = jnp.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    heads = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), v)
    x = x + jnp.einsum("bthk,hkd->btd", heads, weights["out"]["kernel"]) + weights["out"]["bias"]
    y = layer_norm(x, weights["norm2"])
    y = jax.nn.gelu(y @ weights["mlp1"]["kernel"] + weights["mlp1"]["bias"])
    return x + y @ weights["mlp2"]["kernel"] + weights["mlp2"]["bias"]


def loss_fn(params, tokens, labels):
    """Mean cross-entropy in nats of the bytes asked for. tokens, labels int [B,T], -1: not asked.

    A byte is embedded with its two neighbours: without them so short a training learns how frequent
    bytes are and nothing else.
    """
    T = tokens.shape[1]
    padded = jnp.pad(tokens, ((0, 0), (1, 1)))  # beyond the window there are bytes 0
    x = params["here"]["embedding"][tokens]
    x = (
        x
        + params["before"]["embedding"][padded[:, :T]]
        + params["after"]["embedding"][padded[:, 2:]]
    )
    x = layer_norm(x + params["position"]["embedding"], params["norm"])
    x, _ = lax.scan(lambda x, weights: (block(x, weights), None), x, params["blocks"])
    logits = layer_norm(x, params["last"]) @ params["head"]["kernel"] + params["head"]["bias"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels.clip(0))
    asked = labels >= 0
    return jnp.where(asked, losses, 0).sum() / asked.sum()


def load_text():
    """Bytes of Moby Dick, uint8: those to train on, and the last twentieth."""
    text = np.frombuffer(gzip.decompress((ROOT / "data/moby_dick.txt.gz").read_bytes()), np.uint8)
    return np.split(text, [len(text) - len(text) // 20])


def hide(text, seed, length, batch=BATCH):
    """BERT's task on random windows: tokens and labels int32 [B,T]; the label -1 is not asked for.

    15 % of the bytes are asked for; of these 80 % are hidden, 10 % are replaced by any byte, and
    10 % are left as they are.
    """
    rng = np.random.default_rng(seed)
    starts = rng.integers(len(text) - length, size=(batch, 1))
    labels = text[starts + np.arange(length)].astype(np.int32)
    asked, how = rng.random((2, batch, length))
    replaced = np.where(how < 0.9, rng.integers(HIDDEN, size=labels.shape), labels)
    tokens = np.where(how < 0.8, HIDDEN, replaced)
    asked = asked < 0.15
    return np.where(asked, tokens, labels).astype(np.int32), np.where(asked, labels, -1)


# ==== The race ====================================================================================


def optimizers(steps) -> dict:
    """name -> function of the learning rate. All but one have one schedule."""

    def schedule(rate, end=steps + 1):
        return amos.learning_rate_schedule(rate, steps // 10, end)

    def adamw(rate):
        rates = schedule(rate)
        # optax counts from 0.
        adamw = optax.adamw(lambda count: rates(count + 1), b2=0.98, weight_decay=0.01)
        return optax.chain(optax.clip_by_global_norm(1.0), adamw)

    def amos_at(rates, **options):
        rules = (amos.eta_rules(), amos.slot_rules())
        return amos.amos(rates, *rules, beta=0.98, clip_value=1.0, **options)

    return {
        "AdamW": adamw,
        "Amos": lambda rate: amos_at(schedule(rate)),
        "Amos, momentum 0.9": lambda rate: amos_at(schedule(rate), momentum=0.9),
        "Amos, constant rate": lambda rate: amos_at(schedule(rate, None)),
    }


def make_step(make):
    """Jitted (params, state, tokens, labels, rate) -> (params, state): one for all rates."""

    @jax.jit
    def step(params, state, tokens, labels, rate):
        grads = jax.grad(loss_fn)(params, tokens, labels)
        updates, state = make(rate).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def curve(step, make, rate, race: Race, texts, loss, seed, steps=None) -> list:
    """Held-out losses of one run, after every LOOK_EVERY steps."""
    text, held_out = texts
    looks = [hide(held_out, (1, i), race.length) for i in range(8)]
    params = init_params(jax.random.key(seed), race)
    state = make(rate).init(params)
    losses = []
    for i in range(steps or race.steps):
        tokens, labels = hide(text, (0, seed, i), race.length)
        params, state = step(params, state, tokens, labels, rate)
        if (i + 1) % LOOK_EVERY == 0:
            losses.append(np.mean([float(loss(params, *look)) for look in looks]))
    return losses


def race_rows(race: Race, texts, seeds) -> list[str]:
    """Lines of the table: one for each optimizer, at the best of its learning rates."""
    rows = []
    goal = None
    loss = jax.jit(loss_fn)
    for name, make in optimizers(race.steps).items():
        step = make_step(make)
        curves = {}
        for rate in RATES[name]:
            rate *= race.factor
            runs = [curve(step, make, rate, race, texts, loss, seed) for seed in range(seeds)]
            curves[rate] = np.array(runs)  # [seeds,looks]
        means = {
            rate: np.nan_to_num(runs[:, -1].mean(), nan=np.inf) for rate, runs in curves.items()
        }
        best = min(means, key=means.get)
        last = curves[best][:, -1]
        if goal is None:
            goal = last.mean()  # AdamW comes first
        there = np.flatnonzero(curves[best].mean(0) <= goal)
        when = "not reached"
        if len(there):
            when = f"{LOOK_EVERY * (there[0] + 1) / race.steps:.0%} of its steps"
        loss_range = f"{last.mean():.3f} ({last.min():.3f} to {last.max():.3f})"
        size = f"{race.steps}, {race.width} x {race.depth}"
        rows.append(f"| {size} | {name} | {best:g} | {loss_range} | {when} |")
        print(rows[-1], flush=True)
    return rows


# ==== The update ==================================================================================


def two_layers():
    """Parameters of two layers of BERT-base, as normal draws, and as many gradients."""
    D = 768
    F = 3072
    L = 2

    def draw(seed):
        keys = iter(jax.random.split(jax.random.key(seed), 20))

        def normal(*shape):
            return jax.random.normal(next(keys), (L, *shape))

        layers = {}
        sizes = {"mlp1": (D, F), "mlp2": (F, D)}
        for name in ("query", "key", "value", "out", "mlp1", "mlp2"):
            n, m = sizes.get(name, (D, D))
            layers[name] = {"kernel": normal(n, m), "bias": normal(m)}
        for name in ("norm1", "norm2"):
            layers[name] = {"scale": normal(D), "bias": normal(D)}
        return {"blocks": layers}

    return draw(0), draw(1)


def update_rows(pairs) -> list[str]:
    """Lines of the table: milliseconds, bytes of slots and temporary bytes of an update."""
    params, grads = two_layers()
    rules = {"eta_fn": amos.eta_rules(), "shape_fn": amos.slot_rules()}
    contenders = {
        "optax.adamw": optax.adamw(1e-3),
        "optax.adafactor": optax.adafactor(1e-3),
        "amos": amos.amos(0.01, **rules),
        "amos, momentum 0.9": amos.amos(0.01, **rules, momentum=0.9),
        "amos, slots of the parameters' size": amos.amos(0.01, rules["eta_fn"]),
    }
    calls = {}
    sizes = {}
    for name, optimizer in contenders.items():

        def step(params, state, grads, optimizer=optimizer):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = optimizer.init(params)
        compiled = jax.jit(step).lower(params, state, grads).compile()
        slots = sum(x.nbytes for x in jax.tree.leaves(state))
        sizes[name] = slots, compiled.memory_analysis().temp_size_in_bytes
        calls[name] = functools.partial(compiled, params, state, grads)
    seconds = {name: [] for name in calls}
    order = random.Random(0)
    for _ in range(2 + pairs):
        for name in order.sample(list(calls), len(calls)):
            started = time.perf_counter()
            jax.block_until_ready(calls[name]())
            seconds[name].append(time.perf_counter() - started)
    medians = {name: np.median(values[2:]) for name, values in seconds.items()}
    rows = []
    for name, (slots, temporary) in sizes.items():
        ratio = medians[name] / medians["optax.adamw"]
        rows.append(
            f"| {name} | {1e3 * medians[name]:.1f} | {slots / 1e6:.2f} | {temporary / 1e6:.2f} | "
            f"{ratio:.2f} |"
        )
    return rows


def main():
    from bench_vit import machine, write_section  # it needs flax; the race does not

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="of each run of the race")
    parser.add_argument("--pairs", type=int, default=15, help="rounds of updates that count")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    flags = f"--seeds {args.seeds} --pairs {args.pairs}"
    texts = load_text()
    lines = [
        f"`python bench/bench_amos.py {flags}` on {machine()}; load {load:.1f} at the start.",
        "",
        "| update of 14.2 million parameters | ms | slots, MB | temporaries, MB | time / adamw's |",
        "| --- | --- | --- | --- | --- |",
        *update_rows(args.pairs),
        "",
        f"The race: masked bytes of Moby Dick, batch {BATCH}; means of {args.seeds} seeds, and "
        "their range. The schedule is warm-up and linear decay for all but the constant rate.",
        "",
        "| steps, width x blocks | optimizer | best rate | last loss, nats | AdamW's loss after |",
        "| --- | --- | --- | --- | --- |",
    ]
    for race in RACES:
        lines += race_rows(race, texts, args.seeds)
    write_section(ROOT / "bench/RESULTS.md", "amos.py", lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
