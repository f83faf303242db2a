"""Takes a trained Vision Transformer to new classes: fine-tuning as in the paper, or a linear probe.

What      Fine-tuning: new head of zeros, positions resized to --size, all weights trained by SGD with
          momentum, cosine after a linear warm-up, clipping at norm 1, in microbatches (Sec. 3.2, App. B.1.1).
          --probe: logistic regression on frozen features instead, five-fold, its L2 penalty chosen by
          cross-validation within the other four folds. --untrained: the same network, freshly initialised.
Data      An .npz with images uint8 [N,H,W] or [N,H,W,C] and labels [N], as in data/. Of equal pictures the
          first is kept, so that none is both trained on and tested on. No augmentation.
Needs     A checkpoint that vit_attention.py reads; see there for --gelu and --grid.
Run       python examples/real_vit.py --out vit_s14.npz
          python examples/vit_finetune.py vit_s14.npz --gelu exact --data data/noto_emoji32.npz \\
              --probe --per-class 85
          3 min on two busy CPU cores: accuracy 60.9 % +- 2.3 over the folds, with --untrained 48.4 % +- 2.0.
          With --size 112 --steps 200 --batch 32 instead of the last two flags: fine-tuned in 19 min, 68.8 %
          of 382 pictures held out.
Axes      B pictures in a batch  N pictures  D width  K classes  C channels  H, W pixels
"""

import argparse
import dataclasses
import functools
import math
import os
import pathlib
import re
import sys
import time

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[1])]
from vit_attention import add_checkpoint_flags, read_checkpoint  # noqa: E402

import vit  # noqa: E402, found by the line above from whichever folder this is started

require = vit.require
RECIPE = vit.RECIPES["to CIFAR"]
FOLDS = 5
PENALTIES = 10.0 ** np.arange(-3, 2)  # times half the squared norm of the weights of standardised features

# ==== Data ==================================================================================================


def read_data(path, channels, per_class=None):
    """Pictures uint8 [N,H,W,C] and labels int [N], shuffled, none twice; of each class all, or per_class."""
    data = vit.read_npz(path)
    require({"images", "labels"} <= set(data), f"{path} holds {', '.join(data)}, not images and labels")
    images, labels = data["images"], data["labels"]
    images = images[..., None] if images.ndim == 3 else images
    fits = images.dtype == np.uint8 and images.ndim == 4 and len(images) > 0
    require(fits, f"{path}: images are {images.dtype} {images.shape}, not uint8 [N,H,W] or [N,H,W,C]")
    fits = labels.shape == images.shape[:1] and labels.dtype.kind in "iu"
    require(fits, f"{path}: labels are {labels.dtype} {labels.shape}, not integers [{len(images)}]")
    if images.shape[3] == 1:
        images = np.repeat(images, channels, axis=3)  # grey pictures for a network of RGB
    fits = images.shape[3] == channels
    require(fits, f"{path}: images have {images.shape[3]} channels, the checkpoint {channels}")
    once = np.unique(images.reshape(len(images), -1), axis=0, return_index=True)[1]
    order = np.random.default_rng(0).permutation(np.sort(once))  # files are sorted by label
    labels = np.unique(labels, return_inverse=True)[1].astype(np.int32)  # 0 to K - 1, whatever the file says
    order = order[rank_in_class(labels[order]) < (per_class or len(labels))]
    counts, least = np.bincount(labels[order], minlength=labels.max() + 1), max(FOLDS, per_class or 0)
    require(len(counts) > 1, f"{path}: all labels are alike")
    fits = counts.min() >= least
    require(fits, f"{path}: too few pictures: the smallest class has {counts.min()}, not {least}")
    return images[order], labels[order]


def rank_in_class(labels):
    """How many of the labels before it are the same. int [N] -> int [N]."""
    rank = np.zeros(len(labels), int)
    for label in np.unique(labels):
        rank[labels == label] = np.arange(np.sum(labels == label))
    return rank


def folds_of(labels):
    """The fold of each picture, every class spread evenly. int [N] -> int [N] below FOLDS."""
    return rank_in_class(labels) % FOLDS


def in_batches(function, images, batch, size):
    """function([B,*size,C] in [-1, 1]) over uint8 images [N,H,W,C], in batches of one shape. -> [N,...]."""
    out = []
    for i in range(0, len(images), batch):
        rows = np.minimum(np.arange(i, i + batch), len(images) - 1)  # the last batch repeats the last picture
        out.append(np.asarray(function(vit.preprocess(images[rows], size))))
    return np.concatenate(out)[: len(images)]


# ==== Linear probe ==========================================================================================


def fit_probe(x, labels, penalties, steps=200):
    """Logistic regression, for each of P penalties. x [N,D], labels [N] -> weights [D+1,P,K], biases last.

    Nesterov's accelerated gradient; its rate, 1 / (largest curvature), needs no search.
    """
    x = np.pad(x, ((0, 0), (0, 1)), constant_values=1).astype(np.float32)
    targets = np.eye(labels.max() + 1, dtype=np.float32)[labels][:, None]  # [N,1,K]
    decay = np.float32(penalties)[:, None] * np.ones((x.shape[1], 1, 1), np.float32)
    decay[-1] = 0  # the biases are free
    rate = 1 / (np.linalg.norm(x, 2) ** 2 / (2 * len(x)) + decay[0])
    weights = ahead = np.zeros((x.shape[1], len(penalties), targets.shape[2]), np.float32)
    for i in range(steps):
        logits = np.tensordot(x, ahead, 1)  # [N,P,K]
        likely = np.exp(logits - logits.max(-1, keepdims=True))
        residual = likely / likely.sum(-1, keepdims=True) - targets
        gradient = np.tensordot(x.T, residual, 1) / len(x) + decay * ahead
        before, weights = weights, ahead - rate * gradient
        ahead = weights + np.float32(i / (i + 3)) * (weights - before)
    return weights


def probe_once(x, labels, train, test):
    """Per cent of test that a probe of train gets right. x [N,D], labels, train, test [N] -> [penalties]."""
    x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-6)
    weights = fit_probe(x[train], labels[train], PENALTIES)
    guess = (np.tensordot(x[test], weights[:-1], 1) + weights[-1]).argmax(-1)  # [tests,P]
    return 100 * np.mean(guess == labels[test, None], axis=0)


def probe(x, labels):
    """Per cent right in each fold, and the penalty that was best among the others. x [N,D], labels [N]."""
    folds, results = folds_of(labels), []
    for fold in range(FOLDS):
        rest = folds != fold  # the pictures of this fold play no part in the choice
        inner = [probe_once(x, labels, rest & (folds != i), folds == i) for i in range(FOLDS) if i != fold]
        best = np.mean(inner, axis=0).argmax()
        results.append((probe_once(x, labels, rest, folds == fold)[best], PENALTIES[best]))
    return np.array(results).T


def run_probe(args, params, config, images, labels):
    """Features of all pictures uint8 [N,H,W,C], labels [N], then the probe of each fold."""
    started = time.time()
    if args.untrained:
        params = jax.jit(vit.init_params, static_argnums=1)(jax.random.key(args.seed), config)
    features = jax.jit(functools.partial(vit.features, config=config))
    x = in_batches(lambda batch: features(params, batch), images, 8, config.image_size)  # 32: slower on a CPU
    print(f"features {x.shape} in {time.time() - started:.1f} s", flush=True)
    started = time.time()
    accuracy, penalties = probe(x, labels)
    for fold, (right, penalty) in enumerate(zip(accuracy, penalties), 1):
        print(f"fold {fold}  accuracy {right:.1f} %  penalty {penalty:g}")
    print(f"{FOLDS} folds in {time.time() - started:.1f} s")
    spread = f"+- {accuracy.std():.1f} over {FOLDS} folds of {len(labels)} pictures"
    print(f"result: linear probe, {kind(args)}: accuracy {accuracy.mean():.1f} % {spread}")


def kind(args):
    return "untrained network" if args.untrained else "checkpoint"


# ==== Fine-tuning ===========================================================================================


def make_mesh(text):
    """The mesh of --mesh; CPU devices are simulated where that is all there is."""
    parts = re.fullmatch(r"data=(\d+),model=(\d+)", text)
    require(parts, f"--mesh {text} is not of the form data=4,model=2")
    shape = tuple(map(int, parts.groups()))
    require(all(shape), f"--mesh {text} has an axis of no devices")
    try:
        jax.config.update("jax_num_cpu_devices", math.prod(shape))
    except RuntimeError:  # devices are already in use, in a notebook or a test
        pass
    count = jax.device_count()
    require(math.prod(shape) <= count, f"--mesh {text} needs {math.prod(shape)} devices, there are {count}")
    return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def start(args, params, config, mesh):
    """Optimizer, and on the mesh its state and parameters [...]: those given, with --untrained fresh ones."""
    recipe = RECIPE._replace(steps=args.steps, batch=args.batch, learning_rate=args.learning_rate)
    recipe = recipe._replace(warmup=args.steps * RECIPE.warmup // RECIPE.steps)  # the same part of the run
    optimizer = vit.make_optimizer(recipe)
    fresh, state = vit.init_state(jax.random.key(args.seed), config, optimizer, mesh)
    if args.untrained:
        return optimizer, state, fresh
    return optimizer, state, jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), params, fresh)


def finetune(args, params, config, images, labels):
    """Trains on four folds, tests on the fifth: uint8 [N,H,W,C], labels [N]. Writes --out."""
    mesh, folds = make_mesh(args.mesh), folds_of(labels)
    parts = mesh.shape["data"] * args.accumulate
    require(args.batch % parts == 0, f"--batch {args.batch} is not a multiple of data x accumulate = {parts}")
    train, test = np.flatnonzero(folds), np.flatnonzero(folds == 0)
    optimizer, state, params = start(args, params, config, mesh)
    step = vit.make_train_step(config, optimizer, mesh, accumulate=args.accumulate)
    rng, cut = np.random.default_rng(args.seed), NamedSharding(mesh, P("data"))
    epochs = -(-args.steps * args.batch // len(train))
    order = np.concatenate([rng.permutation(train) for _ in range(epochs)])
    started = time.time()
    for i in range(args.steps):
        rows = order[i * args.batch : (i + 1) * args.batch]
        batch = jax.device_put((vit.preprocess(images[rows], config.image_size), labels[rows]), cut)
        params, state, loss = step(params, state, *batch, jax.random.key(i))  # for dropout; there is none
        require(np.isfinite(loss), f"step {i + 1}: the loss is {loss}; nothing was written")
        if (i + 1) % max(args.steps // 10, 1) == 0:
            seconds = time.time() - started
            left = f"{seconds:.0f} s, {seconds / (i + 1) * (args.steps - i - 1):.0f} s left"
            print(f"step {i + 1}/{args.steps}  loss {float(loss):.3f} nats  {left}", flush=True)
    logits = jax.jit(functools.partial(vit.forward, config=config))
    guess = lambda batch: logits(params, jax.device_put(batch, cut))
    batch = args.batch // args.accumulate
    right = in_batches(guess, images[test], batch, config.image_size).argmax(1) == labels[test]
    if args.out:
        vit.save(args.out, jax.device_get(params), config)
        print(f"wrote {args.out}")
    counts = f"of {len(test)} pictures, after {args.steps} steps on {len(train)} others"
    print(f"result: fine-tuning, {kind(args)}: accuracy {100 * right.mean():.1f} % {counts}")


# ==== Command line ==========================================================================================


def run(args):
    """Checks, reads, and does what is asked. ValueError for what a flag or a file gets wrong."""
    for name in ("steps", "batch", "accumulate", "size", "per_class"):
        value = getattr(args, name)
        require(value is None or value >= 1, f"--{name.replace('_', '-')} {value} is not at least 1")
    require(args.learning_rate > 0, f"--learning-rate {args.learning_rate} is not above 0")
    fits = not args.out or os.access(pathlib.Path(args.out).parent, os.W_OK)
    require(fits, f"--out {args.out} cannot be written: its folder must be there")
    params, config = read_checkpoint(args)
    images, labels = read_data(args.data, config.channels, args.per_class)
    new = dataclasses.replace(
        config,
        classes=0 if args.probe else int(labels.max()) + 1,
        representation=None,
        image_size=(args.size, args.size) if args.size else config.image_size,
    )
    params = vit.adapt(params, config, new)
    (run_probe if args.probe else finetune)(args, params, new, images, labels)


def main(argv=None):
    """Command line: see the docstring of the file. Bad input: one sentence, exit status 2."""
    add = (parser := argparse.ArgumentParser(description=__doc__.partition("\n")[0])).add_argument
    add_checkpoint_flags(add)
    add("--data", required=True, help=".npz with images and labels; data/convert.py makes one")
    add("--per-class", type=int, help="use that many pictures of each class, instead of all")
    add("--probe", action="store_true", help="logistic regression on frozen features, instead of fine-tuning")
    add("--untrained", action="store_true", help="the same network freshly initialised, to compare with")
    add("--size", type=int, help="side of the pictures in pixels, instead of the checkpoint's")
    add("--steps", type=int, default=RECIPE.steps)
    add("--batch", type=int, default=RECIPE.batch, help="pictures per step, over all devices")
    add("--learning-rate", type=float, default=RECIPE.learning_rate)
    add("--accumulate", type=int, default=1, help="microbatches per step")
    add("--seed", type=int, default=0)
    add("--mesh", default="data=1,model=1", help="devices for the batch, and for heads and hidden units")
    add("--out", help=".npz to write the fine-tuned model to")
    args = parser.parse_args(argv)
    try:
        run(args)
    except ValueError as error:
        parser.exit(2, f"vit_finetune.py: {error}\n")


if __name__ == "__main__":
    main()
