"""amos.py beside optax.adamw: steps to the same loss, and seconds and bytes of an update.

What      The race of the demo, over three seeds and two lengths: each optimizer at the best of its learning
          rates, the last held-out loss, and when Amos is where AdamW ended. Then the update alone, on weights
          of the shapes of a BERT layer: milliseconds, bytes of slots, temporary bytes.
How       One process. Update times: each round runs every contender once, in random order; medians over the
          rounds after two that warm up.
Run       make bench FILE=amos   or   python bench/bench_amos.py --seeds 3 --pairs 15
          About 8 minutes on two CPU cores. Replaces the section of amos.py in RESULTS.md.
"""

import argparse
import datetime
import functools
import os
import pathlib
import platform
import random
import re
import sys
import time

import jax
import numpy as np
import optax
from jax.sharding import AxisType

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for `import amos`, started from any folder
import amos  # noqa: E402

# (steps, width, depth, length) of a race, and by how much its learning rates are greater than RATES
RACES = ((80, 32, 1, 32, 2), (200, 64, 2, 64, 1))
RATES = {"AdamW": (0.0025, 0.005, 0.01), "Amos": (0.025, 0.05, 0.1), "Amos, momentum 0.9": (0.025, 0.05, 0.1)}
RATES |= {"Amos, constant rate": (0.0125, 0.025, 0.05)}
BATCH = 32

# ==== The race ==============================================================================================


def optimizers(steps) -> dict:
    """name -> function of the learning rate."""
    amos_like = functools.partial(
        amos.amos, eta_fn=amos.eta_rules(), shape_fn=amos.slot_rules(), beta=0.98, clip_value=1.0
    )
    rate = lambda peak, end: amos.learning_rate_schedule(peak, steps // 10, end)
    return {
        **{name: functools.partial(make, steps=steps) for name, make in amos.OPTIMIZERS.items()},
        "Amos, momentum 0.9": lambda peak: amos_like(rate(peak, steps + 1), momentum=0.9),
        "Amos, constant rate": lambda peak: amos_like(rate(peak, None)),
    }


def curve(step, make, rate, config, steps, text, looks, loss, seed) -> list:
    """Held-out losses of one run, one for each of the demo's looks."""
    params = amos.init_params(jax.random.key(seed), config)
    state, losses = make(rate).init(params), []
    for i in range(steps):
        batch = amos.hide(text, (0, seed, i), BATCH, config.length)
        params, state, _ = step(params, state, *batch, rate)
        if (i + 1) % amos.EVERY == 0:
            losses.append(np.mean([float(loss(params, *look)) for look in looks]))
    return losses


def race(seeds) -> list[str]:
    """Lines of the table: a race for each length, a line for each optimizer."""
    text, held = amos.load_text(ROOT / "data/moby_dick.txt.gz")
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    lines = ["| steps, width x blocks | optimizer | best rate | last loss, nats | AdamW's last loss after |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for steps, width, depth, length, factor in RACES:
        goal, config = None, amos.Config(width=width, depth=depth, mlp=4 * width, length=length)
        looks, loss = [amos.hide(held, (1, i), BATCH, length) for i in range(8)], jax.jit(amos.loss_fn)
        for name, make in optimizers(steps).items():
            step, curves = amos.make_train_step(make, mesh), {}
            run = functools.partial(
                curve, step, make, config=config, steps=steps, text=text, looks=looks, loss=loss
            )
            for rate in np.array(RATES[name]) * factor:
                curves[rate] = np.array([run(rate, seed=seed) for seed in range(seeds)])
            best = min(curves, key=lambda rate: curves[rate][:, -1].mean())
            last = curves[best][:, -1]
            goal = goal or last.mean()  # AdamW comes first
            there = np.flatnonzero(curves[best].mean(0) <= goal)
            when = f"{amos.EVERY * (there[0] + 1) / steps:.0%} of its steps" if len(there) else "not reached"
            cells = f"{best:g} | {last.mean():.3f} ({last.min():.3f} to {last.max():.3f})"
            lines.append(f"| {steps}, {width} x {depth} | {name} | {cells} | {when} |")
            print(lines[-1], flush=True)
    return lines


# ==== The update ============================================================================================


def update_rows(pairs) -> list[str]:
    """Lines of the table: an update of weights as in two layers of BERT-base, 14 million parameters."""
    D, F, L = 768, 3072, 2
    norm = {"scale": (L, D), "bias": (L, D)}
    dense = lambda n, m: {"kernel": (L, n, m), "bias": (L, m)}
    tree = {name: dense(D, D) for name in ("query", "key", "value", "out")} | {"mlp1": dense(D, F)}
    tree = {"blocks": tree | {"mlp2": dense(F, D), "norm1": norm, "norm2": norm}}
    shapes, treedef = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, tuple))
    draw = lambda seed: [
        jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), n) for i, n in enumerate(shapes)
    ]
    params, grads = treedef.unflatten(draw(0)), treedef.unflatten(draw(1))
    rules = {"eta_fn": amos.eta_rules(), "shape_fn": amos.slot_rules()}
    contenders = {
        "optax.adamw": optax.adamw(1e-3),
        "optax.adafactor": optax.adafactor(1e-3),
        "amos": amos.amos(0.01, **rules),
        "amos, momentum 0.9": amos.amos(0.01, **rules, momentum=0.9),
        "amos, slots of the parameters' size": amos.amos(0.01, rules["eta_fn"]),
    }
    calls, sizes = {}, {}
    for name, optimizer in contenders.items():

        def step(params, state, grads, optimizer=optimizer):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = optimizer.init(params)
        compiled = jax.jit(step).lower(params, state, grads).compile()
        slots = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        sizes[name] = slots, compiled.memory_analysis().temp_size_in_bytes
        calls[name] = functools.partial(compiled, params, state, grads)
    seconds = {name: [] for name in calls}
    order = random.Random(0)
    for _ in range(2 + pairs):
        for name in order.sample(list(calls), len(calls)):
            started = time.perf_counter()
            jax.block_until_ready(calls[name]())
            seconds[name].append(time.perf_counter() - started)
    lines = ["| update of 14.2 million parameters | ms | slots, MB | temporaries, MB | time / adamw's |"]
    lines.append("| --- | --- | --- | --- | --- |")
    base = np.median(seconds["optax.adamw"][2:])
    for name, (slots, temporary) in sizes.items():
        s = np.median(seconds[name][2:])
        lines.append(
            f"| {name} | {s * 1e3:.1f} | {slots / 1e6:.2f} | {temporary / 1e6:.2f} | {s / base:.2f} |"
        )
    return lines


# ==== Report ================================================================================================


def machine() -> str:
    """Processor, cores, memory, versions and date."""
    info = pathlib.Path("/proc/cpuinfo")
    name = re.search("model name.*: (.*)", info.read_text() if info.exists() else "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"{name[1] if name else platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB"
    versions = f"Python {platform.python_version()}, jax {jax.__version__}"
    return f"{machine}, JAX on {jax.devices()[0].device_kind}, {versions}, {datetime.date.today()}"


def main():
    add = (parser := argparse.ArgumentParser(description=__doc__.partition("\n")[0])).add_argument
    add("--seeds", type=int, default=3, help="of each run of the race")
    add("--pairs", type=int, default=15, help="rounds of updates that count")
    args, load = parser.parse_args(), os.getloadavg()[0]
    flags = f"--seeds {args.seeds} --pairs {args.pairs}"
    lines = [
        f"`python bench/bench_amos.py {flags}` on {machine()}; load {load:.1f} at the start.",
        "",
        *update_rows(args.pairs),
        "",
        "No Pallas kernel was written: that it pays would have to be seen on a GPU, and none was to be had.",
        "",
        f"The race: masked bytes of Moby Dick, batch {BATCH}; means of {args.seeds} seeds, and their range.",
        "The schedule is warm-up and linear decay for all but the constant rate.",
        "",
        *race(args.seeds),
    ]
    path = ROOT / "bench/RESULTS.md"
    head, *sections = (path.read_text() if path.exists() else "# Results").strip().split("\n\n## ")
    sections = [section for section in sections if not section.startswith("amos.py\n")]
    sections = sorted([*sections, "\n".join(["amos.py", "", *lines])])
    path.write_text("\n\n## ".join([head, *sections]) + "\n")
    print("\n".join([*lines, "", f"wrote {path}"]))


if __name__ == "__main__":
    main()
