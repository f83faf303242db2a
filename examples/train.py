"""Trains a model of this repository on your own pictures: from scratch, or from released weights.

    python examples/train.py vit --data flowers --size S/16 --epochs 100 --out run
    python examples/train.py vit --data flowers --checkpoint B_16.npz --recipe "to CIFAR" --out run
    python examples/train.py vit --checkpoint run/model.npz --predict photos --out run

What      --data is an .npz (data/convert.py makes one) or a folder with a folder of pictures per
          class. A fifth of each class is held out, or --validation names another source. Pictures
          are cropped at random, resized and flipped; evaluation takes them whole.
          --out gets metrics.csv, the states to go on from, and at the end model.npz under the
          official names, with model.json beside it.
          --checkpoint fine-tunes: positions resized, a new head of zeros (the model's `adapt`).
          --probe: logistic regression on frozen features, five-fold, its penalty chosen by
          cross-validation within the other four folds. --evaluate: the held-out pictures alone.
          --predict FOLDER: the five likeliest classes of each picture, as a CSV.
Resume    --resume goes on from the last complete state, on the same mesh to the same bits, also
          after the process was killed at any moment: what the n-th batch holds depends on --seed
          and n alone.
Scale     --mesh data=4,model=2 --fsdp --accumulate n. --distributed joins several machines (by
          itself on a cluster that JAX knows, else with HOST:PORT,COUNT,INDEX); --out is then a
          folder that they share.
Needs     examples/requirements.txt: orbax-checkpoint keeps the state, grain reads, pillow decodes.
Axes      B pictures in a batch  N classes  H, W height and width in pixels  C channels
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import importlib
import json
import logging
import math
import os
import pathlib
import re
import sys
import time
from typing import Any, NamedTuple

import absl.logging
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec as P
from orbax.checkpoint import checkpoint_managers

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
import pictures  # noqa: E402, examples/pictures.py, found by the line above

from vit import make_mesh, read_npz, require, run_program  # noqa: E402

MODELS = [name for name in ("vit", "mixer", "moe") if (ROOT / f"{name}.py").exists()]
OPTIMIZERS = ("adam", "adamw", "sgd", "amos")

# ==== Optimizers ==================================================================================


def learning_rate(peak, steps, warmup, decay, end=1e-5):
    """The official schedules: a linear rise, then "cosine" to 0 or "linear" to `end`."""
    left = max(steps - warmup, 1)
    if decay == "cosine":
        fall = optax.cosine_decay_schedule(peak, left)
    else:
        fall = optax.linear_schedule(peak, end, left)
    if warmup == 0:
        return fall
    rise = optax.linear_schedule(0, peak, warmup)
    return optax.join_schedules([rise, fall], [warmup])


def kernels(params):
    """True for the kernels, the only weights that the official code decays."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def make_optimizer(name, rate, weight_decay, clip=None, momentum_dtype=None):
    """One of OPTIMIZERS with learning rate `rate`, a function of the step.

    weight_decay is as in the papers, times the learning rate: of kernels for "adam" (the official
    code's), of every weight for "adamw". clip is the largest global norm of the gradient; for amos
    the largest value of an entry.
    """
    if name == "amos":
        amos = importlib.import_module("amos")
        return amos.amos(rate, amos.eta_rules(), amos.slot_rules(), clip_value=clip)
    if name == "sgd":
        update = optax.sgd(rate, momentum=0.9, accumulator_dtype=momentum_dtype)
    elif name == "adam":
        update = optax.adamw(rate, mu_dtype=momentum_dtype, weight_decay=weight_decay, mask=kernels)
    else:
        update = optax.adamw(rate, mu_dtype=momentum_dtype, weight_decay=weight_decay)
    if clip is None:
        return update
    return optax.chain(optax.clip_by_global_norm(clip), update)


# ==== Gradients: functions (params, batch, key, step) -> ((loss, metrics), grads) =================


def plain_gradient(model, config, mesh):
    """The gradient of the model's global loss."""
    value_and_grad = jax.value_and_grad(model.global_loss(config, mesh), has_aux=True)

    def gradient(params, batch, key, step):
        return value_and_grad(params, batch, key)

    return gradient


def one_hot(labels, classes):
    """Labels int [B] as rows [B,N]; -1 becomes a row of zeros, which counts for nothing."""
    if labels.ndim == 2:
        return labels
    return jax.nn.one_hot(labels, classes, dtype=jnp.float32)


def mixup(gradient, alpha, classes):
    """The gradient of pictures that are mixed with their neighbours in the batch, as are labels.

    The official form: one share a ~ Beta(alpha, alpha) for the whole batch, at least one half.
    """

    def mixed_gradient(params, batch, key, step):
        key, draw = jax.random.split(key)
        share = jax.random.beta(draw, alpha, alpha)
        share = jnp.maximum(share, 1 - share)
        batch = {**batch, "labels": one_hot(batch["labels"], classes)}
        batch = jax.tree.map(lambda x: share * x + (1 - share) * jnp.roll(x, 1, axis=0), batch)
        return gradient(params, batch, key, step)

    return mixed_gradient


def accumulate(gradient, count, mesh):
    """The gradient of a batch as the mean over microbatches, which run in turn to save memory.

    Microbatch j has the rows j::count, so that no row changes its device. A microbatch weighs as
    much as it has rows that count.
    """
    sharding = NamedSharding(mesh, P(None, "data"))

    def cut(x):
        x = x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)  # [B,...] -> [count,B/count,...]
        return lax.with_sharding_constraint(x, sharding)

    def accumulated_gradient(params, batch, key, step):
        microbatches = jax.tree.map(cut, batch)
        labels = microbatches["labels"]
        if labels.ndim == 2:
            rows = (labels >= 0).sum(1).astype(jnp.float32)
        else:
            rows = labels.sum((1, 2))
        weights = rows / jnp.maximum(rows.sum(), 1e-30)

        def add(total, inputs):
            index, weight, microbatch = inputs
            new = gradient(params, microbatch, jax.random.fold_in(key, index), step)
            return jax.tree.map(lambda t, x: t + weight * x, total, new), None

        shapes = jax.eval_shape(add_shapes, params, jax.tree.map(lambda x: x[0], microbatches))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = lax.scan(add, zeros, (jnp.arange(count), weights, microbatches))
        return total

    def add_shapes(params, microbatch):
        return gradient(params, microbatch, jax.random.key(0), 0)

    return accumulated_gradient


# ==== Batches: what the n-th one holds depends on the seed and n alone ============================


def rows_of_process(mesh, batch):
    """The first of the rows of a batch that this process places, and their number."""
    places = NamedSharding(mesh, P("data")).addressable_devices_indices_map((batch,)).values()
    starts = [rows[0].start or 0 for rows in places]
    stops = [rows[0].stop or batch for rows in places]
    return min(starts), max(stops) - min(starts)


class Reader:
    """Examples {"images": uint8 [H,W,C], "labels": int} of a source, in the model's size.

    A picture that cannot be read is a ValueError; with skip_corrupt it is named once and becomes a
    row with the label -1, which counts for nothing.
    """

    def __init__(self, source, config, skip_corrupt=False, crop=1.0, flip=False):
        self.source = source
        self.config = config
        self.skip_corrupt = skip_corrupt
        self.crop = crop
        self.flip = flip
        self.named = set()

    def whole(self, row):
        """The example of one row; row -1 only fills up a batch."""
        blank = np.zeros((*self.config.image_size, self.config.channels), np.uint8)
        picture = None if row < 0 else self.read(row)
        if picture is None:
            return {"images": blank, "labels": np.int32(-1)}
        picture = pictures.resize(picture, self.config.image_size)
        return {"images": picture, "labels": self.source.labels[row]}

    def augmented(self, row, rng):
        """The example of one row, cropped and flipped at random."""
        picture = self.read(row)
        if picture is None:
            return self.whole(-1)
        box = None
        if self.crop < 1:
            box = pictures.random_box(rng, *picture.shape[:2], self.crop)
        picture = pictures.resize(picture, self.config.image_size, box)
        if self.flip and rng.random() < 0.5:
            picture = picture[:, ::-1]
        return {"images": picture, "labels": self.source.labels[row]}

    def read(self, row):
        """The picture with the model's channels, or None."""
        try:
            picture = self.source.read(row)
        except ValueError as error:
            if not self.skip_corrupt:
                raise
            if row not in self.named:
                print(f"skipped: {error}", flush=True)
            self.named.add(row)
            return None
        return pictures.with_channels(picture, self.config.channels)


def scaled(batch):
    """uint8 images as float32 in [-1, 1]."""
    return {**batch, "images": batch["images"].astype(np.float32) / 127.5 - 1}


def placed(dataset, mesh, batch, first=0):
    """The batches of a grain data set of rows, from batch number `first` on, placed on the mesh.

    Every process reads only its own rows.
    """
    sharding = NamedSharding(mesh, P("data"))
    start, count = rows_of_process(mesh, batch)
    parts = batch // count  # of each batch; this process takes part start // count
    dataset = dataset.batch(count).map(scaled)
    dataset = dataset.slice(slice(first * parts + start // count, None, parts))

    def place(rows):
        shape = (batch, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
    with contextlib.closing(iter(dataset.to_iter_dataset(options))) as reader:
        for example in reader:
            yield jax.tree.map(place, example)


def training_batches(reader, rows, mesh, batch, seed, first):
    """Batches of the rows, shuffled anew in each epoch, from step `first` on, without an end."""
    dataset = grain.MapDataset.source(rows).seed(seed).shuffle().repeat(None)
    return placed(dataset.random_map(reader.augmented), mesh, batch, first)


def evaluation_batches(reader, rows, mesh, batch):
    """Batches of the rows, each once and in order; the last is filled up with masked rows."""
    rows = np.concatenate([rows, np.full(-len(rows) % batch, -1)])
    return placed(grain.MapDataset.source(rows).map(reader.whole), mesh, batch)


# ==== Evaluation ==================================================================================


def make_forward(model, config, mesh):
    """Jitted logits of a whole batch: (params, images [B,H,W,C]) -> [B,N] on every device."""
    axes = {}
    for axis in ("data", "model"):
        if mesh.shape[axis] > 1:
            axes[f"{axis}_axis"] = axis

    def local_logits(params, images):
        out = model.forward(params, images, config, **axes)
        if isinstance(out, tuple):  # moe returns metrics as well
            out = out[0]
        return out

    rows = P(axes.get("data_axis"))
    specs = (model.param_specs(config, mesh), rows)
    sharded = jax.shard_map(local_logits, mesh=mesh, in_specs=specs, out_specs=rows)
    return jax.jit(sharded, out_shardings=NamedSharding(mesh, P()))


@jax.jit
def score(logits, labels):
    """Sums over the rows with a label: loss in nats, right answers, rows. [B,N], [B] -> [3]."""
    counts = labels >= 0
    losses = -one_hot(labels, logits.shape[1]) * jax.nn.log_softmax(logits)
    right = (logits.argmax(-1) == labels) & counts
    return jnp.stack([losses.sum(), right.sum(), counts.sum()])


def evaluate(forward, params, batches):
    """Mean loss in nats, per cent right, and the number of pictures, over all that can be read."""
    total = np.zeros(3)
    for batch in batches:
        total += np.asarray(score(forward(params, batch["images"]), batch["labels"]))
    loss, right, count = total
    require(count > 0, "no held-out picture can be read")
    return loss / count, 100 * right / count, int(count)


# ==== Linear probe ================================================================================

FOLDS = 5
PENALTIES = 10.0 ** np.arange(-3, 2)  # times half the squared norm of the weights


def fit_probe(x, labels, penalties, steps=200):
    """Logistic regression for each of P penalties. x [n,D], labels [n] -> [D+1,P,N], biases last.

    Nesterov's accelerated gradient; its rate, 1 / (largest curvature), needs no search.
    """
    x = np.pad(x, ((0, 0), (0, 1)), constant_values=1).astype(np.float32)
    classes = labels.max() + 1
    targets = np.eye(classes, dtype=np.float32)[labels][:, None]  # [n,1,N]
    decay = np.float32(penalties)[:, None] * np.ones((x.shape[1], 1, 1), np.float32)
    decay[-1] = 0  # the biases are free
    rate = 1 / (np.linalg.norm(x, 2) ** 2 / (2 * len(x)) + decay[0])
    weights = np.zeros((x.shape[1], len(penalties), classes), np.float32)
    ahead = weights
    for i in range(steps):
        logits = np.tensordot(x, ahead, 1)  # [n,P,N]
        likely = np.exp(logits - logits.max(-1, keepdims=True))
        likely /= likely.sum(-1, keepdims=True)
        gradient = np.tensordot(x.T, likely - targets, 1) / len(x) + decay * ahead
        before = weights
        weights = ahead - rate * gradient
        ahead = weights + np.float32(i / (i + 3)) * (weights - before)
    return weights


def probe_once(x, labels, train, test):
    """Per cent of `test` that a probe of `train` gets right, by penalty. x [n,D]; others [n]."""
    x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-6)
    weights = fit_probe(x[train], labels[train], PENALTIES)
    guess = (np.tensordot(x[test], weights[:-1], 1) + weights[-1]).argmax(-1)  # [tests,P]
    return 100 * np.mean(guess == labels[test, None], axis=0)


def probe(x, labels):
    """Per cent right in each fold, and its penalty. x [n,D], labels [n] -> 2 x [FOLDS]."""
    folds = pictures.rank_in_class(labels) % FOLDS
    accuracy = []
    penalties = []
    for fold in range(FOLDS):
        rest = folds != fold  # the pictures of this fold play no part in the choice
        others = [i for i in range(FOLDS) if i != fold]
        inner = [probe_once(x, labels, rest & (folds != i), folds == i) for i in others]
        best = np.mean(inner, axis=0).argmax()
        accuracy.append(probe_once(x, labels, rest, folds == fold)[best])
        penalties.append(PENALTIES[best])
    return np.array(accuracy), np.array(penalties)


# ==== What a run keeps ============================================================================


class SaveError(Exception):
    """The training state could not be written."""


class Keeper:
    """The training states of a run, by orbax: written aside while training goes on, then renamed.

    A state is complete or does not count, whenever the process is killed.
    """

    def __init__(self, folder, keep):
        self.folder = pathlib.Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.LatestN(keep),
            cleanup_tmp_directories=True,
        )
        with self.errors_in_one_line():
            self.manager = ocp.CheckpointManager(self.folder, options=options)

    @contextlib.contextmanager
    def errors_in_one_line(self):
        try:
            yield
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            if "No space left" in str(error):
                reason = "no space is left on the device"
            raise SaveError(f"{self.folder}: the state cannot be written: {reason}") from None

    def save(self, state, settings):
        """Starts to write; what went wrong with the state before this one is said here."""
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), settings=ocp.args.JsonSave(settings)
        )
        with self.errors_in_one_line():
            self.manager.wait_until_finished()
            self.manager.save(step, args=items)

    def restore(self, state, settings):
        """The last complete state, placed as `state` is. ValueError where the settings differ."""
        step = self.manager.latest_step()
        require(step is not None, f"--resume: there is no complete state in {self.folder}")
        wanted = ocp.args.Composite(settings=ocp.args.JsonRestore())
        saved = self.manager.restore(step, args=wanted).settings
        for name, value in settings.items():
            require(
                saved.get(name) == value,
                f"--resume: the run in {self.folder} was made with {name}={saved.get(name)}, "
                f"not {value}",
            )

        def like(leaf):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

        wanted = ocp.args.Composite(state=ocp.args.StandardRestore(jax.tree.map(like, state)))
        return self.manager.restore(step, args=wanted).state

    def close(self):
        """Waits for the last write."""
        with self.errors_in_one_line():
            self.manager.wait_until_finished()
            self.manager.close()


class Log:
    """metrics.csv: a row for each report, written whole each time. On resuming, later rows go."""

    def __init__(self, path, last_step):
        self.path = path
        self.rows = []
        if last_step and path.exists():
            with open(path, newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= last_step]

    def add(self, **row):
        """A row, with the columns that it has."""
        self.rows.append(row)
        if jax.process_index() > 0:
            return
        columns = dict.fromkeys(name for row in self.rows for name in row)
        partial = self.path.with_suffix(".csv.part")
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(partial, self.path)


def save_model(folder, model, config, params, classes):
    """model.npz under the official names, and model.json with what its arrays do not tell."""
    params = multihost_utils.process_allgather(params, tiled=True)
    if jax.process_index() == 0:
        model.save(folder / "model.npz", params, config)
        about = {"model": model.__name__, "config": as_json(config), "classes": classes}
        (folder / "model.json").write_text(json.dumps(about, indent=1))


def as_json(config):
    """A Config as JSON would give it back: tuples are lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def load_checkpoint(model, args):
    """Params, Config and class names of --checkpoint; the .json beside it, if any, tells more."""
    flat = read_npz(args.checkpoint)
    about = pathlib.Path(args.checkpoint).with_suffix(".json")
    if about.exists():
        about = json.loads(about.read_text())
        name = about["model"]
        require(name == model.__name__, f"{args.checkpoint} is a checkpoint of {name}")
        config = model.Config(**about["config"])
        classes = about["classes"]
    else:
        fields = {"gelu": args.gelu} if args.gelu else {}
        config = model.infer_config(flat, **fields)
        classes = [str(i) for i in range(config.classes)]
    return model.from_official(flat, config), config, classes


# ==== The run =====================================================================================


class Task(NamedTuple):
    """What is trained, and on what."""

    model: Any
    config: Any
    params: Any  # of the checkpoint, or None
    source: Any
    rows: np.ndarray  # of source, for training
    held_source: Any
    held_rows: np.ndarray


def read_task(args) -> Task:
    """Opens the data and the checkpoint. ValueError where they do not fit each other."""
    model = importlib.import_module(args.model)
    source = pictures.open_pictures(args.data)
    if args.validation:
        held_source = pictures.open_pictures(args.validation)
        rows = np.arange(len(source.labels))
        held_rows = np.arange(len(held_source.labels))
        pictures.check_classes(source, rows, least=1)
        require(
            held_source.classes == source.classes,
            f"{args.validation}: its classes are not those of {args.data}",
        )
    else:
        held_source = source
        rows, held_rows = pictures.split(source)

    params = None
    fields = {"classes": len(source.classes), "fsdp": args.fsdp, "dtype": args.dtype}
    if args.dropout:
        fields["dropout"] = args.dropout
    if args.checkpoint:
        params, old, classes = load_checkpoint(model, args)
        fields["channels"] = old.channels
        if args.image_size:
            fields["image_size"] = args.image_size
        if args.evaluate:
            require(
                classes == source.classes,
                f"{args.checkpoint} knows {len(classes)} classes that are not those of {args.data}",
            )
        config = dataclasses.replace(old, **fields)
        if hasattr(config, "representation") and not args.evaluate:
            config = dataclasses.replace(config, representation=None)
        if not args.evaluate:
            params = model.adapt(params, old, config)
        if args.untrained:
            params = None
    else:
        fields["channels"] = source.channels
        fields["image_size"] = args.image_size or source.size or 224
        if args.patch:
            fields["patch_size"] = args.patch
        try:
            config = dataclasses.replace(model.SIZES[args.size], **fields)
        except ValueError as error:
            raise ValueError(f"{error} (--patch, --image-size)") from None
    for each in (source, held_source):
        pictures.check_channels(each, config.channels)
    patches = math.prod(config.grid)
    if patches <= 16:
        print(f"note: {patches} patches a picture are few; smaller ones by --patch")
    return Task(model, config, params, source, rows, held_source, held_rows)


def initial_state(task: Task, args, optimizer, mesh):
    """The state before the first step; its weights are those of the checkpoint, if there is one."""
    state = task.model.init_state(jax.random.key(args.seed), task.config, optimizer, mesh)
    if task.params is None:
        return state
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state.params)
    return state._replace(params=jax.device_put(task.params, shardings))


def settings_of(task: Task, args):
    """What must be the same for --resume; of the data the content, not the path."""
    names = (
        *("model", "batch", "steps", "optimizer", "learning_rate", "decay", "warmup"),
        *("weight_decay", "clip", "mixup", "accumulate", "crop", "no_flip", "seed"),
    )
    settings = {name: getattr(args, name) for name in names}
    settings["config"] = as_json(task.config)
    settings["data"] = task.source.digest()
    return settings


def make_step(task: Task, args, optimizer, mesh):
    """The train step, with mixup and accumulation where they are asked for."""
    gradient = plain_gradient(task.model, task.config, mesh)
    if args.mixup:
        gradient = mixup(gradient, args.mixup, task.config.classes)
    if args.accumulate > 1:
        gradient = accumulate(gradient, args.accumulate, mesh)
    return task.model.make_train_step(task.config, optimizer, mesh, gradient)


def train(task: Task, args, mesh, keeper):
    """Trains to the end, evaluates, saves the model."""
    rate = learning_rate(args.learning_rate, args.steps, args.warmup, args.decay)
    optimizer = make_optimizer(args.optimizer, rate, args.weight_decay, args.clip)
    state = initial_state(task, args, optimizer, mesh)
    settings = settings_of(task, args)
    if args.resume:
        state = keeper.restore(state, settings)
    first = int(state.step)
    out = pathlib.Path(args.out)
    log = Log(out / "metrics.csv", first)
    step = make_step(task, args, optimizer, mesh)
    forward = make_forward(task.model, task.config, mesh)
    reader = Reader(task.source, task.config, args.skip_corrupt, args.crop, not args.no_flip)
    held = Reader(task.held_source, task.config, args.skip_corrupt)
    evaluated = functools.partial(evaluation_batches, held, task.held_rows, mesh, args.batch)
    key = jax.random.key(args.seed)
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    kind = f"{mesh.size} {jax.default_backend()} device(s)"
    print(f"{size:,} parameters, {len(task.rows)} pictures, {len(task.held_rows)} held out, {kind}")

    result = None
    recent = []  # metrics of the steps since the last report
    started = reported = time.time()
    batches = training_batches(reader, task.rows, mesh, args.batch, args.seed, first)
    with contextlib.closing(batches):
        for done in range(first + 1, args.steps + 1):
            state, metrics = step(state, next(batches), key)
            recent.append(metrics)
            if done == first + 1:
                jax.block_until_ready(metrics)
                print(f"compiled in {time.time() - started:.1f} s", flush=True)
                started = reported = time.time()  # without the first step
            if done % args.report and done % args.every and done != args.steps:
                continue

            row = mean_metrics(recent, done)
            speed = args.batch * len(recent) / max(time.time() - reported, 1e-9)
            left = (time.time() - started) / max(done - first - 1, 1) * (args.steps - done)
            text = f"step {done}/{args.steps}  loss {row['loss']:.3f} nats"
            print(f"{text}  {speed:,.0f} pictures/s  {left:.0f} s left", flush=True)
            if done % args.every == 0 or done == args.steps:
                keeper.save(state, settings)
                result = evaluate(forward, state.params, evaluated())
                loss, right, _ = result
                row |= {"held_out_loss": loss, "held_out_accuracy": right}
                print(f"held-out loss {loss:.3f} nats, {right:.1f} % right", flush=True)
            log.add(step=done, pictures_per_second=round(speed, 1), **row)
            recent = []
            reported = time.time()

    if result is None:  # resumed after the last step
        result = evaluate(forward, state.params, evaluated())
    print_result(result)
    save_model(out, task.model, task.config, state.params, task.source.classes)
    print(f"wrote {out / 'model.npz'}")


def mean_metrics(recent, done):
    """The mean of each metric over some steps. FloatingPointError where a loss is not finite."""
    recent = jax.device_get(recent)
    for i, metrics in enumerate(recent):
        if not math.isfinite(metrics["loss"]):
            step = done - len(recent) + i + 1
            raise FloatingPointError(f"step {step}: the loss is {metrics['loss']}")
    return {name: float(np.mean([m[name] for m in recent])) for name in recent[0]}


def run_evaluation(task: Task, args, mesh):
    """Prints loss and accuracy of the held-out pictures."""
    forward = make_forward(task.model, task.config, mesh)
    reader = Reader(task.held_source, task.config, args.skip_corrupt)
    batches = evaluation_batches(reader, task.held_rows, mesh, args.batch)
    print_result(evaluate(forward, task.params, batches))


def print_result(result):
    loss, right, count = result
    print(f"result: held-out accuracy {right:.1f} % of {count} pictures, loss {loss:.3f} nats")


def run_probe(task: Task, args, mesh):
    """Features of all pictures, then the probe of each fold."""
    config = dataclasses.replace(task.config, classes=0)
    params = task.params
    if params is None:
        params = jax.jit(task.model.init_params, static_argnums=1)(
            jax.random.key(args.seed), config
        )
    else:
        params = {name: leaf for name, leaf in params.items() if name != "head"}
    rows = pictures.shuffled_rows(task.source, args.per_class)
    pictures.check_classes(task.source, rows, least=max(FOLDS, args.per_class or 0))
    forward = make_forward(task.model, config, mesh)
    reader = Reader(task.source, config)
    started = time.time()
    features = []
    for batch in evaluation_batches(reader, rows, mesh, args.batch):
        features.append(np.asarray(forward(params, batch["images"])))
    features = np.concatenate(features)[: len(rows)]
    print(f"features {features.shape} in {time.time() - started:.1f} s", flush=True)
    accuracy, penalties = probe(features, task.source.labels[rows])
    for fold in range(FOLDS):
        print(f"fold {fold + 1}  accuracy {accuracy[fold]:.1f} %  penalty {penalties[fold]:g}")
    spread = f"{accuracy.mean():.1f} % +- {accuracy.std():.1f}"
    print(f"result: linear probe, accuracy {spread} over {FOLDS} folds of {len(rows)} pictures")


class LoosePictures:
    """All pictures below a folder, without labels."""

    channels = 3

    def __init__(self, folder):
        require(pathlib.Path(folder).is_dir(), f"--predict {folder} is no folder")
        suffixes = pictures.convert.PICTURES
        files = sorted(pathlib.Path(folder).rglob("*"))
        self.files = [file for file in files if file.suffix.lower() in suffixes]
        require(self.files, f"--predict {folder} holds no pictures ({' '.join(suffixes)})")
        self.labels = np.zeros(len(self.files), np.int32)
        self.path = folder

    read = pictures.FilePictures.read


def run_prediction(args, mesh):
    """predictions.csv in --out: the five likeliest classes of each picture of --predict."""
    model = importlib.import_module(args.model)
    params, config, classes = load_checkpoint(model, args)
    require(config.classes > 0, f"{args.checkpoint} has no head: there is nothing to predict")
    source = LoosePictures(args.predict)
    pictures.check_channels(source, config.channels)
    forward = make_forward(model, config, mesh)
    reader = Reader(source, config, args.skip_corrupt)
    rows = np.arange(len(source.files))
    table = []
    for batch in evaluation_batches(reader, rows, mesh, args.batch):
        logits = forward(params, batch["images"])
        likely = np.asarray(jax.nn.softmax(logits))
        labels = multihost_utils.process_allgather(batch["labels"], tiled=True)
        for chances, label in zip(likely, labels):
            cells = []
            for i in np.argsort(-chances)[:5]:
                if label >= 0:  # it could be read
                    cells += [classes[i], f"{chances[i]:.4f}"]
            table.append(cells)
    if jax.process_index() > 0:
        return
    path = pathlib.Path(args.out) / "predictions.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        numbers = range(1, 1 + min(5, len(classes)))
        writer.writerow(["file", *(f"{name}{i}" for i in numbers for name in ("class", "chance"))])
        for i, picture in enumerate(source.files):
            writer.writerow([picture.relative_to(args.predict), *table[i]])
    print(f"wrote {path}: {len(source.files)} pictures")


# ==== Command line ================================================================================


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line."""

    def error(self, message):
        self.exit(2, f"train.py: {message}\n")


class FromScratch(NamedTuple):
    """What flags are without --recipe; names as in the recipes of the models."""

    optimizer: str = "adam"
    batch: int = 128
    learning_rate: float = 1e-3
    decay: str = "cosine"
    weight_decay: float = 0.1
    clip: float | None = 1.0
    dropout: float = 0.0


def make_parser():
    parser = Parser(prog="train.py", description="Trains a model of this repository on pictures.")
    add = parser.add_argument
    add("model", choices=MODELS)
    add("--data", help="an .npz, or a folder with a folder of pictures per class")
    add("--validation", help="another one, held out, instead of a fifth of --data")
    add("--out", default="run", help="the run's folder")
    add("--size", help="S/16, B/16, ...: a row of the model's SIZES")
    add("--patch", type=int, help="side of a patch in pixels, instead of that of --size")
    add("--image-size", type=int, help="pictures are resized to this; .npz: as they are, else 224")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")

    weights = parser.add_argument_group("released or own weights")
    add = weights.add_argument
    add("--checkpoint", help="an .npz under the official names")
    add("--gelu", choices=("tanh", "exact"), help="what no released checkpoint tells; else tanh")
    add("--untrained", action="store_true", help="its network, freshly initialised, to compare")
    add("--probe", action="store_true", help="a linear probe of frozen features instead")
    add("--per-class", type=int, help="with --probe: so many pictures of each class")
    add("--evaluate", action="store_true", help="the held-out pictures alone")
    add("--predict", metavar="FOLDER", help="the five likeliest classes of each picture")

    training = parser.add_argument_group("training; a recipe gives what is not said")
    add = training.add_argument
    add("--recipe", help="a recipe of the model's paper by name")
    add("--epochs", type=float)
    add("--steps", type=int)
    add("--batch", type=int, help="pictures in a step, over all devices")
    add("--optimizer", choices=OPTIMIZERS)
    add("--learning-rate", type=float, help="the highest of the schedule")
    add("--decay", choices=("cosine", "linear"))
    add("--warmup", type=int, help="steps")
    add("--weight-decay", type=float, help="times the learning rate")
    add("--clip", type=float, help="largest norm of the gradient; 0: none")
    add("--dropout", type=float)
    add("--mixup", type=float, default=0.0, metavar="ALPHA")
    add("--crop", type=float, default=0.05, help="least share of the area; 1: no random crop")
    add("--no-flip", action="store_true", help="for digits and text")
    add("--skip-corrupt", action="store_true", help="name pictures that cannot be read and go on")
    add("--seed", type=int, default=0)

    running = parser.add_argument_group("running")
    add = running.add_argument
    add("--mesh", default="data=1,model=1", help="devices for rows, for heads and hidden units")
    add("--fsdp", action="store_true", help="cut weights and optimizer state over data as well")
    add("--accumulate", type=int, default=1, help="microbatches in a step")
    add("--distributed", nargs="?", const="", metavar="HOST:PORT,COUNT,INDEX")
    add("--report", type=int, default=50, help="steps between lines of progress")
    add("--every", type=int, default=500, help="steps between evaluations and saved states")
    add("--keep", type=int, default=2, help="states that are kept")
    add("--resume", action="store_true", help="go on from the last complete state")
    return parser


def fill_in_recipe(args):
    """Flags that were not given, from the recipe. All but the number of steps."""
    recipe = FromScratch()
    if args.recipe:
        recipes = importlib.import_module(args.model).RECIPES
        require(args.recipe in recipes, f"--recipe {args.recipe} is none of {', '.join(recipes)}")
        recipe = recipes[args.recipe]
        if args.steps is None and args.epochs is None:
            args.steps = recipe.steps
    for name in FromScratch._fields:
        if getattr(args, name) is None:
            setattr(args, name, getattr(recipe, name))
    args.clip = args.clip or None
    # The warm-up is the same share of a shorter run.
    args.warmup_share = getattr(recipe, "warmup", 1) / getattr(recipe, "steps", 20)


def fill_in_steps(args, pictures_of_an_epoch):
    """--steps and --warmup, where they were not given."""
    if args.steps is None:
        epochs = 30 if args.epochs is None else args.epochs
        args.steps = max(1, round(epochs * pictures_of_an_epoch / args.batch))
    if args.warmup is None:
        args.warmup = int(args.steps * args.warmup_share)
    require(args.warmup < args.steps, f"--warmup {args.warmup} is not below {args.steps} steps")


def check_flags(args):
    """ValueError for what can be said before anything is read."""
    for name in ("steps", "batch", "accumulate", "report", "every", "keep", "patch", "per_class"):
        value = getattr(args, name)
        flag = name.replace("_", "-")
        require(value is None or value >= 1, f"--{flag} {value} is not at least 1")
    for name in ("epochs", "learning_rate"):
        value = getattr(args, name)
        flag = name.replace("_", "-")
        fits = value is None or 0 < value < math.inf
        require(fits, f"--{flag} {value} is not a finite number above 0")
    for name in ("weight_decay", "mixup", "warmup"):
        value = getattr(args, name)
        flag = name.replace("_", "-")
        fits = value is None or 0 <= value < math.inf
        require(fits, f"--{flag} {value} is not a finite number of at least 0")
    require(args.clip is None or args.clip > 0, f"--clip {args.clip} is not at least 0")
    require(0 < args.crop <= 1, f"--crop {args.crop} is not above 0 and at most 1")
    require(0 <= args.seed < 2**32, f"--seed {args.seed} is not in 0 to {2**32 - 1}")
    if args.predict or args.evaluate:
        require(args.checkpoint, "--predict and --evaluate need a --checkpoint")
    require(args.data or args.predict, "--data is needed: an .npz or a folder")
    if args.checkpoint:
        require(not args.patch, "--patch is that of the checkpoint: leave it out")
    else:
        sizes = importlib.import_module(args.model).SIZES
        require(args.size in sizes, f"--size {args.size} is none of {', '.join(sizes)}")
    out = pathlib.Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out} is no folder that can be made: {error.strerror}") from None
    require(os.access(out, os.W_OK), f"--out {out} is a folder that cannot be written to")


def join_devices(args):
    """The mesh, over the devices of all processes."""
    if args.distributed is not None:
        match = re.fullmatch(r"(.+:\d+),([1-9]\d*),(\d+)", args.distributed)
        require(
            match or not args.distributed,
            f"--distributed {args.distributed} is not of the form HOST:PORT,COUNT,INDEX",
        )
        if match:
            address, count, index = match[1], int(match[2]), int(match[3])
            needed = math.prod(int(n) for n in re.findall(r"=(\d+)", args.mesh))
            jax.config.update("jax_num_cpu_devices", max(1, needed // count))
            jax.distributed.initialize(address, count, index)
        else:
            jax.distributed.initialize()
        jax.device_count()  # from here on the devices are fixed
    mesh = make_mesh(args.mesh)
    parts = mesh.shape["data"] * args.accumulate
    require(
        args.batch % parts == 0,
        f"--batch {args.batch} is not a multiple of data x accumulate = {parts}",
    )
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    return mesh


def run(args):
    """Does what the flags say."""
    fill_in_recipe(args)
    check_flags(args)
    mesh = join_devices(args)
    if args.predict:
        run_prediction(args, mesh)
        return
    task = read_task(args)
    if args.probe:
        run_probe(task, args, mesh)
    elif args.evaluate:
        run_evaluation(task, args, mesh)
    else:
        fill_in_steps(args, len(task.rows))
        keeper = Keeper(pathlib.Path(args.out) / "state", args.keep)
        with contextlib.closing(keeper):
            require(
                args.resume or keeper.manager.latest_step() is None,
                f"{keeper.folder} holds the states of a run: --resume goes on with it, "
                "or choose another --out",
            )
            train(task, args, mesh, keeper)


def main(argv=None) -> int:
    """Exit status 1 where a run breaks off, 2 for bad input; each is told in one line."""
    args = make_parser().parse_args(argv)
    absl.logging.set_verbosity(absl.logging.FATAL)  # orbax's tracebacks: errors are told below
    for name in ("asyncio", "concurrent.futures"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        run(args)
    except (ValueError, NotImplementedError) as error:
        print(f"train.py: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except (FloatingPointError, SaveError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_program(main)
