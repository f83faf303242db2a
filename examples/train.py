"""Trains a model of this repository on your own pictures, from scratch or from released weights.

    python examples/train.py vit --data flowers --size S/16 --epochs 100 --out run
    python examples/train.py mixer --data flowers --size S/16 --epochs 100 --out run
    python examples/train.py moe --data flowers --size S/32 --set experts=8 --epochs 100 --out run
    python examples/train.py vit --data flowers --checkpoint B_16.npz --recipe "to CIFAR" --out run
    python examples/train.py vit --checkpoint run/model.npz --predict photos --out run

Data      --data is an .npz (data/convert.py makes one) or a folder with one subfolder of pictures
          per class. A fifth of each class is held out, or --validation names other pictures.
          Training crops at random, resizes and flips; evaluation resizes the whole picture.
Writes    --out gets metrics.csv, state/ for --resume, and at the end model.npz, with the parameter
          names of the official code, and model.json, with the config and the class names.
Modes     --checkpoint starts from released or own weights: they are fitted to the image size, for
          a Mixer in whole multiples, and the head is replaced by zeros (the model's `adapt`).
          --probe fits a logistic regression to frozen features, five-fold. --evaluate only measures
          loss and accuracy on the held-out pictures, which are those of training if --data is
          the same. --predict writes predictions.csv, with the five likeliest classes of every
          picture of a folder.
Experts   Of moe, --set changes what no other flag does: --set experts=8 --set group=4, and with a
          checkpoint --set capacity_factor=1.5 --set batch_priority=true. A prediction of moe
          depends on the other pictures of its group, the pictures beside it in the batch.
Resume    --resume goes on from the last complete state, bit for bit on the same mesh, no matter
          when the process was killed: batch n depends on the pictures, the flags and n alone. All
          flags must be those of the run, --steps too. Without a state it starts afresh.
Gradient  --gradient sam --rho 0.05, or gsam with --alpha: SAM and GSAM (gsam.py). With --rho-min,
          rho follows the learning rate. --perturb shard perturbs on each device by its own
          pictures, as the papers trained.
Scale     --mesh data=4,model=2 --fsdp --accumulate n. --distributed runs over several processes:
          without a value on clusters that JAX detects, else HOST:PORT,PROCESSES,INDEX. --out must
          then be on a file system that all of them share.
Needs     examples/requirements.txt (orbax-checkpoint: states; grain: reading; pillow: decoding).
Axes      B pictures in a batch  N classes  H, W height and width in pixels  C channels
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import importlib
import io
import json
import logging
import math
import os
import pathlib
import re
import sys
import time
import zlib
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
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]  # for the imports below, from any folder
import pictures  # noqa: E402
from probe import FOLDS, probe  # noqa: E402

from vit import axis_if_split, make_mesh, read_npz, require, run_program  # noqa: E402

MODELS = ("vit", "mixer", "moe")
OPTIMIZERS = ("adam", "adamw", "sgd", "amos")
GRADIENTS = ("plain", "sam", "gsam")
PERTURB = ("global", "shard")
TRAINING_FLAGS = (
    *("recipe", "steps", "epochs", "optimizer", "learning_rate", "decay", "warmup"),
    *("weight_decay", "clip", "dropout", "stochastic_depth", "mixup"),
    *("rho", "rho_min", "alpha", "perturb"),
)
REGULARIZERS = ("dropout", "stochastic_depth")  # fields of a Config; no model has both
FIELDS_WITH_FLAGS = (  # fields of a Config that other flags or the pictures determine
    *("image_size", "patch_size", "channels", "classes", "dtype", "fsdp", "gelu"),
    *REGULARIZERS,
)

# ==== Optimizers ==================================================================================


def learning_rate(peak, steps, warmup, decay, end=1e-5):
    """The official schedules: linear warm-up, then "cosine" to 0 or "linear" to `end`."""
    decay_steps = max(steps - warmup, 1)
    if decay == "cosine":
        after_warmup = optax.cosine_decay_schedule(peak, decay_steps)
    else:
        after_warmup = optax.linear_schedule(peak, min(end, peak), decay_steps)
    if warmup == 0:
        return after_warmup
    rise = optax.linear_schedule(0, peak, warmup)
    return optax.join_schedules([rise, after_warmup], [warmup])


def kernels(params):
    """A mask for weight decay: True for kernels, the only weights that the official code decays."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def make_optimizer(name, rate, weight_decay, clip=None, momentum_dtype=None):
    """One of OPTIMIZERS, with the learning rate `rate`, a function of the step.

    weight_decay is multiplied by the learning rate. "adam" decays kernels only, as the official
    code does, "adamw" every weight; "sgd" and "amos" ignore it. clip bounds the global norm of the
    gradient, for amos each of its entries. momentum_dtype is bfloat16 in the official code.
    """
    if name == "amos":
        amos = importlib.import_module("amos")
        return amos.amos(rate, amos.eta_rules(), amos.slot_rules(), clip_value=clip)
    if name == "sgd":
        update = optax.sgd(rate, momentum=0.9, accumulator_dtype=momentum_dtype)
    elif name == "adam":
        update = optax.adamw(rate, weight_decay=weight_decay, mask=kernels, mu_dtype=momentum_dtype)
    else:
        update = optax.adamw(rate, weight_decay=weight_decay, mu_dtype=momentum_dtype)
    if clip is None:
        return update
    return optax.chain(optax.clip_by_global_norm(clip), update)


# ==== Gradients ===================================================================================
# A gradient is a function (params, batch, key, step) -> ((loss, metrics), grads). Functions from
# gradient to gradient can be combined in any order; step is for those that have a schedule.


def plain_gradient(model, config, mesh):
    """The gradient of the model's global loss."""
    value_and_grad = jax.value_and_grad(model.global_loss(config, mesh), has_aux=True)

    def gradient(params, batch, key, step):
        return value_and_grad(params, batch, key)

    return gradient


def as_rows(labels, classes):
    """Labels int [B] as rows with a single one, -1 as a row of zeros; float [B,N] as they are."""
    if labels.ndim == 2:
        return labels
    return jax.nn.one_hot(labels, classes, dtype=jnp.float32)


def weight_of_rows(labels):
    """1 for a row that counts, 0 for a masked one. int [B] or float [B,N] -> float32 [B]."""
    if labels.ndim == 2:
        return labels.sum(1)
    return (labels >= 0).astype(jnp.float32)


def mixup(gradient, alpha, classes):
    """Wraps a gradient: each picture and its label are mixed with those of the previous row.

    As in the official code, one share ~ Beta(alpha, alpha) for the whole batch, at least one half.
    A row whose neighbour is masked stays as it is. Inside accumulate each microbatch has a share.
    """

    def mixed_gradient(params, batch, key, step):
        key, draw = jax.random.split(key)
        share = jax.random.beta(draw, alpha, alpha)
        share = jnp.maximum(share, 1 - share)
        counts = weight_of_rows(batch["labels"]) > 0
        shares = jnp.where(counts & jnp.roll(counts, 1), share, 1)  # [B]

        def mix(x):
            own = shares.reshape(-1, *[1] * (x.ndim - 1))
            return own * x + (1 - own) * jnp.roll(x, 1, axis=0)

        labels = as_rows(batch["labels"], classes)
        mixed = {"images": mix(batch["images"]), "labels": mix(labels)}
        return gradient(params, mixed, key, step)

    return mixed_gradient


def accumulate(gradient, parts, mesh):
    """Wraps a gradient: the weighted mean over microbatches, one after another to save memory.

    Microbatch j has the rows j, j + parts, ..., so that rows stay on their devices. It is weighted
    by its number of rows that count.
    """
    sharding = NamedSharding(mesh, P(None, "data"))

    def cut(x):
        rows, left = divmod(len(x), parts)
        require(left == 0, f"a batch of {len(x)} is not a multiple of {parts} microbatches")
        x = x.reshape(rows, parts, *x.shape[1:]).swapaxes(0, 1)  # [B,...] -> [parts,B/parts,...]
        return lax.with_sharding_constraint(x, sharding)

    def accumulated_gradient(params, batch, key, step):
        counts = weight_of_rows(batch["labels"])
        weights = cut(counts).sum(1) / jnp.maximum(counts.sum(), 1e-30)  # 0 if all are masked
        microbatches = jax.tree.map(cut, batch)

        def add(total, inputs):
            index, weight, microbatch = inputs
            new = gradient(params, microbatch, jax.random.fold_in(key, index), step)
            return jax.tree.map(lambda old, x: old + weight * x, total, new), None

        first = jax.tree.map(lambda x: x[0], microbatches)
        shapes = jax.eval_shape(gradient, params, first, key, step)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = lax.scan(add, zeros, (jnp.arange(parts), weights, microbatches))
        return total

    return accumulated_gradient


# ==== Batches =====================================================================================


def rows_of_process(mesh, batch_size):
    """First row and number of rows of a batch that lie on the devices of this process."""
    sharding = NamedSharding(mesh, P("data"))
    rows = [index[0] for index in sharding.addressable_devices_indices_map((batch_size,)).values()]
    require(rows, f"process {jax.process_index()} has no device of the mesh: enlarge --mesh")
    start = min(piece.start or 0 for piece in rows)  # None: from the first row
    stop = max(piece.stop or batch_size for piece in rows)  # None: to the last
    count = stop - start
    require(
        batch_size % count == 0 and start % count == 0,
        f"rows {start} to {stop - 1} are not an even share of a batch: reorder --mesh",
    )
    return start, count


class Reader:
    """Examples {"images": uint8 [H,W,C], "labels": int} of a source, at the model's image size.

    An unreadable picture raises ValueError; with skip_corrupt it is reported once and becomes a
    blank picture with the label -1, which the loss ignores.
    """

    def __init__(self, source, config, skip_corrupt=False, crop=1.0, flip=False):
        self.source = source
        self.config = config
        self.skip_corrupt = skip_corrupt
        self.crop = crop
        self.flip = flip
        self.reported = set()

    def blank(self):
        """An example that does not count."""
        shape = (*self.config.image_size, self.config.channels)
        return {"images": np.zeros(shape, np.uint8), "labels": np.int32(-1)}

    def whole(self, row):
        """The example of a row, the whole picture resized; row -1 gives a blank one."""
        picture = None
        if row >= 0:
            picture = self.read(row)
        if picture is None:
            return self.blank()
        picture = pictures.resize(picture, self.config.image_size)
        return {"images": picture, "labels": self.source.labels[row]}

    def augmented(self, row, rng):
        """The example of a row, cropped and flipped at random."""
        picture = self.read(row)
        if picture is None:
            return self.blank()
        box = None
        if self.crop < 1:
            box = pictures.random_box(rng, *picture.shape[:2], self.crop)
        picture = pictures.resize(picture, self.config.image_size, box)
        if self.flip and rng.random() < 0.5:
            picture = picture[:, ::-1]
        return {"images": picture, "labels": self.source.labels[row]}

    def read(self, row):
        """The picture with the model's channels; None if it is unreadable and skipped."""
        try:
            picture = self.source.read(row)
        except ValueError as error:
            if not self.skip_corrupt:
                raise ValueError(f"{error}, or go on without it: --skip-corrupt") from None
            if row not in self.reported:
                self.reported.add(row)
                print(f"skipped: {error}", file=sys.stderr, flush=True)  # of every process
            return None
        return pictures.with_channels(picture, self.config.channels)


@jax.jit
def scaled(batch):
    """uint8 images, which are four times smaller to move, become float32 in [-1, 1]."""
    return {**batch, "images": batch["images"].astype(jnp.float32) / 127.5 - 1}


def placed_batches(examples, mesh, batch_size, first=0):
    """Yields the batches of a grain dataset of examples, from number `first` on, on the mesh.

    Each process reads its own rows. A batch is made of `parts` local ones: local batch
    n * parts + i is part i of batch n, and this process reads part `own`.
    """
    sharding = NamedSharding(mesh, P("data"))
    start, count = rows_of_process(mesh, batch_size)
    parts = batch_size // count
    own = start // count
    local = examples.batch(count)
    local = local.slice(slice(first * parts + own, None, parts))  # every parts-th

    def place(array):
        shape = (batch_size, *array.shape[1:])
        return jax.make_array_from_process_local_data(sharding, array, shape)

    options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
    with contextlib.closing(iter(local.to_iter_dataset(options))) as reader:
        for batch in reader:
            yield scaled(jax.tree.map(place, batch))


def training_batches(reader, rows, mesh, batch_size, seed, first):
    """Endless batches of the rows, shuffled anew in each epoch, from step `first` on."""
    examples = grain.MapDataset.source(rows).seed(seed).shuffle().repeat(None)
    return placed_batches(examples.random_map(reader.augmented), mesh, batch_size, first)


def evaluation_batches(reader, rows, mesh, batch_size):
    """Batches with each row once, in order; the last is filled up with blank examples."""
    missing = -len(rows) % batch_size  # to a whole batch
    padding = np.full(missing, -1)
    examples = grain.MapDataset.source(np.concatenate([rows, padding])).map(reader.whole)
    return placed_batches(examples, mesh, batch_size)


# ==== Evaluation ==================================================================================


def make_forward(model, config, mesh):
    """Jitted logits of a whole batch: (params, batch of B pictures) -> [B,N] on every device."""
    data_axis = axis_if_split(mesh, "data")
    model_axis = axis_if_split(mesh, "model")
    forward = functools.partial(
        model.forward, config=config, data_axis=data_axis, model_axis=model_axis
    )

    def local_logits(params, batch):
        if model.__name__ == "moe":  # a blank example must take no slot of an expert
            logits, _ = forward(params, batch["images"], valid=batch["labels"] >= 0)
            return logits
        return forward(params, batch["images"])

    sharded = jax.shard_map(
        local_logits,
        mesh=mesh,
        in_specs=(model.param_specs(config, mesh), P(data_axis)),
        out_specs=P(data_axis),
    )
    return jax.jit(sharded, out_shardings=NamedSharding(mesh, P()))


def place_params(model, config, mesh, params):
    """Weights on the mesh, for the modes that do not train."""
    specs = model.param_specs(config, mesh)
    return jax.device_put(params, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))


@jax.jit
def score(logits, labels):
    """Sums over the rows that count: [loss in nats, right answers, rows]. [B,N], int [B]."""
    counts = labels >= 0
    losses = -as_rows(labels, logits.shape[1]) * jax.nn.log_softmax(logits)
    right = (logits.argmax(-1) == labels) & counts
    return jnp.stack([losses.sum(), right.sum(), counts.sum()])


class Result(NamedTuple):
    """What an evaluation found."""

    loss: float  # mean, in nats
    accuracy: float  # per cent
    count: int  # pictures that could be read

    def __str__(self):
        return f"{self.accuracy:.1f} % of {self.count} pictures, loss {self.loss:.3f} nats"


def evaluate(forward, params, batches) -> Result:
    """The Result over all pictures of the batches."""
    sums = np.zeros(3)
    for batch in batches:
        sums += np.asarray(score(forward(params, batch), batch["labels"]))
    loss, right, count = sums
    require(count > 0, "none of the held-out pictures can be read")
    return Result(float(loss / count), float(100 * right / count), int(count))


# ==== What a run writes ===========================================================================


class SaveError(Exception):
    """A file of the run cannot be written or read."""


class States:
    """The training states of a run, written by orbax in the background and renamed when complete.

    A write that is interrupted, even by SIGKILL, never counts as a state.
    """

    def __init__(self, folder, keep):
        self.folder = pathlib.Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.LatestN(keep),
            cleanup_tmp_directories=True,
        )
        with self.one_line_errors():
            self.manager = ocp.CheckpointManager(self.folder, options=options)

    @contextlib.contextmanager
    def one_line_errors(self):
        """Turns orbax's errors, some of hundreds of lines, into a SaveError of one."""
        try:
            yield
        except (OSError, ValueError) as error:
            reason = first_line(error)
            if "No space left" in str(error):  # orbax hides errno in a ValueError
                reason = "no space left on device"
            raise SaveError(f"state in {self.folder}: {reason}") from None

    def latest(self):
        """The step of the last complete state, or None."""
        return self.manager.latest_step()

    def save(self, state, settings):
        """Starts to write. Raises SaveError if the write before this one has failed."""
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), settings=ocp.args.JsonSave(settings)
        )
        with self.one_line_errors():
            self.manager.wait_until_finished()
            self.manager.save(int(state.step), args=items)

    def restore(self, state, settings):
        """The last complete state, with the shardings of `state`.

        Raises ValueError if it belongs to a run with other settings.
        """
        step = self.latest()
        with self.one_line_errors():
            items = ocp.args.Composite(settings=ocp.args.JsonRestore())
            saved = self.manager.restore(step, args=items).settings
        for name, value in settings.items():
            require(
                saved.get(name) == value,
                f"--resume: the run in {self.folder} has {name}={saved.get(name)}, not {value}",
            )

        def like(leaf):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

        with self.one_line_errors():
            items = ocp.args.Composite(state=ocp.args.StandardRestore(jax.tree.map(like, state)))
            return self.manager.restore(step, args=items).state

    def close(self):
        """Waits for the last write. Raises SaveError if it has failed."""
        with self.one_line_errors():
            try:
                self.manager.wait_until_finished()
            finally:
                self.manager.close()


def first_line(error):
    """The first line of an error's message, or its type if there is no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def write_text(path, text):
    """Writes a file whole or not at all. Raises SaveError if it cannot be written."""
    partial = path.with_name(f"{path.name}.part")
    try:
        partial.write_text(text, encoding="utf-8", errors="surrogateescape")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise SaveError(f"{path} cannot be written: {error.strerror}") from None


def csv_text(rows, columns):
    """Dicts as CSV; a missing value is left blank."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


class Metrics:
    """metrics.csv, rewritten at each report. On resuming, rows after the restored step go."""

    def __init__(self, path, last_step):
        self.path = path
        self.rows = []
        if last_step and path.exists():
            with open(path, newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= last_step]

    def add(self, row):
        """Appends a dict; the first process writes the file."""
        self.rows.append(row)
        columns = list(dict.fromkeys(name for each in self.rows for name in each))
        if jax.process_index() == 0:
            write_text(self.path, csv_text(self.rows, columns))


def as_json(config):
    """A Config as a dict after a round trip through JSON: tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def save_model(out, model, config, params, classes):
    """model.json, with the config and the class names, and model.npz, under the official names."""
    params = multihost_utils.process_allgather(params, tiled=True)
    config = dataclasses.replace(config, fsdp=False)  # how it was trained, not what it is
    about = {"model": model.__name__, "config": as_json(config), "classes": classes}
    if jax.process_index() == 0:
        write_text(out / "model.json", json.dumps(about, indent=1))
        try:
            model.save(out / "model.npz", params, config)
        except ValueError as error:
            raise SaveError(first_line(error)) from None


def load_checkpoint(args):
    """The model's module, and params, Config and class names of --checkpoint.

    Config and names are those of the .json beside it, if there is one; else the Config is read
    from the shapes of the arrays, and the names are numbers.
    """
    model = importlib.import_module(args.model)
    flat = read_npz(args.checkpoint)
    path = pathlib.Path(args.checkpoint).with_suffix(".json")
    about = {}
    if path.exists():
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not readable: {first_line(error)}") from None
    if isinstance(about, dict) and {"model", "config", "classes"} <= set(about):
        name = about["model"]
        require(name == args.model, f"{args.checkpoint} is a checkpoint of {name}")
        try:
            config = model.Config(**about["config"])
        except TypeError as error:
            raise ValueError(f"{path} is not readable: {first_line(error)}") from None
        config = dataclasses.replace(config, **fields_to_set(args))
        classes = about["classes"]
        require(
            not args.gelu or args.gelu == config.gelu,
            f"--gelu {args.gelu} is not that of {path}: leave it out",
        )
    else:
        fields = fields_to_set(args)
        if args.gelu:
            fields["gelu"] = args.gelu
        config = model.infer_config(flat, **fields)
        classes = [str(i) for i in range(config.classes)]
    return model, model.from_official(flat, config), config, classes


# ==== The task ====================================================================================


def fields_to_set(args) -> dict:
    """The fields of the model's Config that --set gives. Raises ValueError for unknown ones."""
    defaults = {}
    for field in dataclasses.fields(importlib.import_module(args.model).Config):
        if field.name not in FIELDS_WITH_FLAGS:
            defaults[field.name] = field.default
    fields = {}
    for text in args.set:
        name, _, value = text.partition("=")
        require(name in defaults, f"--set {text}: the field is not one of {', '.join(defaults)}")
        default = defaults[name]
        with contextlib.suppress(ValueError):  # a word, such as gap, is no JSON and stays text
            value = json.loads(value)
        if type(default) is float and type(value) is int:
            value = float(value)
        if type(default) is tuple and type(value) is list:
            value = tuple(value)
        kind = int if default is None else type(default)
        require(type(value) is kind, f"--set {text}: the value is not of type {kind.__name__}")
        fields[name] = value
    return fields


class Task(NamedTuple):
    """Model, weights and pictures of a run."""

    model: Any  # a module: vit, mixer or moe
    config: Any
    params: Any  # of the checkpoint; None: to be drawn
    source: Any
    rows: np.ndarray  # of source, to train on or to probe
    held_out_source: Any
    held_out_rows: np.ndarray


def read_task(args) -> Task:
    """Opens the pictures and the checkpoint. Raises ValueError if they do not fit each other."""
    source = pictures.open_pictures(args.data)
    if args.probe:  # all pictures, in folds
        held_out_source = source
        held_out_rows = np.arange(0)
        rows = pictures.shuffled_rows(source, args.per_class)
        pictures.check_classes(source, rows, least=max(FOLDS, args.per_class or 0))
    elif args.validation:
        held_out_source = pictures.open_pictures(args.validation)
        rows = np.arange(len(source.labels))
        held_out_rows = np.arange(len(held_out_source.labels))
        pictures.check_classes(source, rows, least=1)
        require(
            held_out_source.classes == source.classes,
            f"{args.validation}: its classes are not those of {args.data}",
        )
    else:
        held_out_source = source
        rows, held_out_rows = pictures.split(source)

    fields = {"classes": len(source.classes), "dtype": args.dtype, "fsdp": args.fsdp}
    for name in REGULARIZERS:
        if getattr(args, name) is not None:
            fields[name] = getattr(args, name)
    if args.checkpoint:
        model, params, config = from_checkpoint(args, source, fields)
    else:
        model, params, config = from_scratch(args, source, fields)
    pictures.check_channels(source, config.channels)
    pictures.check_channels(held_out_source, config.channels)
    patches = math.prod(config.grid)
    if patches <= 16:
        print(f"note: {patches} patches per picture are few; see --patch and --image-size")
    return Task(model, config, params, source, rows, held_out_source, held_out_rows)


def from_scratch(args, source, fields):
    """The model's module, no params, and a Config of --size for the source."""
    model = importlib.import_module(args.model)
    fields.update(fields_to_set(args))
    fields["channels"] = source.channels
    fields["image_size"] = args.image_size or source.size or 224
    if args.patch:
        fields["patch_size"] = args.patch
    if args.gelu:
        fields["gelu"] = args.gelu
    try:
        config = dataclasses.replace(model.SIZES[args.size], **fields)
    except ValueError as error:
        if "patch_size" in str(error):
            raise ValueError(f"{error}; see --patch and --image-size") from None
        raise
    return model, None, config


def from_checkpoint(args, source, fields):
    """The model's module, params and Config of --checkpoint, adapted to the source."""
    model, params, old, classes = load_checkpoint(args)
    if args.evaluate:  # as it is
        require(
            classes == source.classes,
            f"{args.checkpoint}: its {len(classes)} classes are not those of {args.data}",
        )
        return model, params, dataclasses.replace(old, dtype=args.dtype, fsdp=args.fsdp)
    if args.image_size:
        fields["image_size"] = args.image_size
    if hasattr(old, "representation"):
        fields["representation"] = None  # adapt drops this layer
    config = dataclasses.replace(old, **fields)
    if hasattr(old, "tokens_mlp"):  # of a Mixer: grows with the number of patches
        hidden = old.tokens_mlp * config.tokens // old.tokens
        config = dataclasses.replace(config, tokens_mlp=max(1, hidden))  # adapt refuses a wrong one
    params = model.adapt(params, old, config)
    if args.untrained:
        params = None
    return model, params, config


# ==== Training ====================================================================================


def settings_of(task: Task, args):
    """What must be the same for --resume. Pictures are compared by their digests, not by path."""
    names = ["model", "batch", "steps", "optimizer", "learning_rate", "decay", "warmup"]
    names += ["weight_decay", "clip", "mixup", "accumulate", "crop", "no_flip", "seed"]
    names += ["gradient", "rho", "rho_min", "alpha", "perturb"]
    settings = {name: getattr(args, name) for name in names}
    if args.perturb == "shard":  # what is computed then depends on the number of devices
        settings["mesh"] = args.mesh
    for name, value in as_json(task.config).items():
        settings[f"config.{name}"] = value
    rows = zlib.crc32(np.ascontiguousarray(task.rows))
    held_out = task.held_out_source.digest()
    settings["checksum of the pictures"] = [task.source.digest(), rows, held_out]
    return settings


def make_step(task: Task, args, optimizer, rate, mesh):
    """The train step, with mixup, accumulation, SAM and GSAM if requested.

    --perturb global perturbs the weights once, by all pictures of a step; --perturb shard on each
    device, and for each microbatch, by its own.
    """
    model = task.model
    sharpness_aware = args.gradient in ("sam", "gsam")
    if sharpness_aware:
        gsam = importlib.import_module("gsam")
        last_rate = float(rate(args.steps))
        ends = args.rho, args.rho_min, args.learning_rate, min(last_rate, args.learning_rate)
        rho = gsam.rho_from_learning_rate(rate, *ends)
    if sharpness_aware and args.perturb == "shard":
        loss_fn = functools.partial(model.loss_fn, config=task.config)
        specs = model.param_specs(task.config, mesh)
        gradient = gsam.per_shard(loss_fn, mesh, specs, rho, args.alpha)
    else:
        gradient = plain_gradient(model, task.config, mesh)
    if args.mixup:
        gradient = mixup(gradient, args.mixup, task.config.classes)
    if args.accumulate > 1:
        gradient = accumulate(gradient, args.accumulate, mesh)
    if sharpness_aware and args.perturb == "global":
        gradient = gsam.gsam(gradient, rho, args.alpha)
    return model.make_train_step(task.config, optimizer, mesh, gradient)


@jax.jit
def all_finite(tree):
    """Whether a tree of arrays holds no NaN and no infinity."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def mean_metrics(recent, last_step):
    """The mean of each metric over the last steps. FloatingPointError if a loss is not finite."""
    recent = jax.device_get(recent)
    for i, metrics in enumerate(recent):
        if not math.isfinite(metrics["loss"]):
            step = last_step - len(recent) + 1 + i
            raise FloatingPointError(f"step {step}: the loss is {metrics['loss']}")
    return {name: float(np.mean([metrics[name] for metrics in recent])) for name in recent[0]}


class Clock:
    """Speed and time left, without the first step, which compiles."""

    def __init__(self, first, steps, batch_size):
        self.steps = steps
        self.batch_size = batch_size
        self.started = self.reported = time.time()
        self.first = self.last = first

    def compiled(self):
        """To be called after the first step. Returns its seconds."""
        seconds = time.time() - self.started
        self.started = self.reported = time.time()
        self.first += 1
        self.last += 1
        return seconds

    def report(self, done):
        """Pictures per second since the last report, and seconds left."""
        now = time.time()
        speed = self.batch_size * (done - self.last) / max(now - self.reported, 1e-9)
        left = (now - self.started) / max(done - self.first, 1) * (self.steps - done)
        self.last = done
        return speed, left

    def go_on(self):
        """To be called after a report, whose own time does not count as speed."""
        self.reported = time.time()


def train(task: Task, args, mesh, states):
    """Trains to the end and saves the model."""
    rate = learning_rate(args.learning_rate, args.steps, args.warmup, args.decay)
    optimizer = make_optimizer(args.optimizer, rate, args.weight_decay, args.clip)
    init_key, step_key = jax.random.split(jax.random.key(args.seed))
    state = task.model.init_state(init_key, task.config, optimizer, mesh, task.params)
    settings = settings_of(task, args)
    if args.resume and states.latest() is None:
        print(f"no state in {states.folder} yet: starting from the beginning")
    elif args.resume:
        state = states.restore(state, settings)
    first = int(state.step)
    out = pathlib.Path(args.out)
    log = Metrics(out / "metrics.csv", first)

    step = make_step(task, args, optimizer, rate, mesh)
    forward = make_forward(task.model, task.config, mesh)
    reader = Reader(task.source, task.config, args.skip_corrupt, args.crop, not args.no_flip)
    held_out_reader = Reader(task.held_out_source, task.config, args.skip_corrupt)

    def evaluated():
        rows = task.held_out_rows
        microbatch = args.batch // args.accumulate  # what fits into memory
        batches = evaluation_batches(held_out_reader, rows, mesh, microbatch)
        return evaluate(forward, state.params, batches)

    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    devices = f"{mesh.size} {jax.default_backend()} device(s)"
    counts = f"{len(task.rows)} pictures, {len(task.held_out_rows)} held out"
    print(f"{size:,} parameters, {counts}, {devices}", flush=True)

    if first == 0:  # an evaluation that fails should fail now, not after hours
        print(f"before training: held-out accuracy {evaluated()}", flush=True)
    result = None
    recent = []  # metrics of the steps since the last report
    clock = Clock(first, args.steps, args.batch)
    batches = training_batches(reader, task.rows, mesh, args.batch, args.seed, first)
    with contextlib.closing(batches):
        for done in range(first + 1, args.steps + 1):
            state, metrics = step(state, next(batches), step_key)
            recent.append(metrics)
            if done == first + 1:
                jax.block_until_ready(metrics)
                print(f"compiled in {clock.compiled():.1f} s", flush=True)
            saves = done % args.every == 0 or done == args.steps
            reports = done % args.report == 0 or saves
            if not reports:
                continue

            row = {"step": done, **mean_metrics(recent, done)}
            recent = []
            speed, left = clock.report(done)
            row["pictures_per_second"] = round(speed, 1)
            text = f"step {done}/{args.steps}  loss {row['loss']:.3f} nats"
            if "gap" in row:  # of SAM and GSAM
                text += f"  gap {row['gap']:.4f}"
            if "dropped" in row:  # of moe
                load = f"{row['smallest_load']:.2f} to {row['largest_load']:.2f}"
                text += f"  load {load}  dropped {row['dropped']:.1%}"
            print(f"{text}  {speed:,.0f} pictures/s  {left:.0f} s left", flush=True)
            if saves:
                result = evaluated()
                print(f"held-out accuracy {result}", flush=True)
                row["held_out_loss"] = result.loss
                row["held_out_accuracy"] = result.accuracy
                if not all_finite(state.params):
                    raise FloatingPointError(f"step {done}: there are weights that are not finite")
            log.add(row)  # before the state: what is saved is in the table too
            if saves:
                states.save(state, settings)
            clock.go_on()

    if result is None:  # resumed after the last step
        result = evaluated()
    print(f"result: held-out accuracy {result}")
    save_model(out, task.model, task.config, state.params, task.source.classes)
    print(f"wrote {out / 'model.npz'}")


# ==== Other modes =================================================================================


def run_evaluation(task: Task, args, mesh):
    """Prints loss and accuracy of the held-out pictures."""
    params = place_params(task.model, task.config, mesh, task.params)
    forward = make_forward(task.model, task.config, mesh)
    reader = Reader(task.held_out_source, task.config, args.skip_corrupt)
    batches = evaluation_batches(reader, task.held_out_rows, mesh, args.batch)
    print(f"result: held-out accuracy {evaluate(forward, params, batches)}")


def run_probe(task: Task, args, mesh):
    """Computes the features of all pictures and prints the accuracy of the probe of each fold."""
    config = dataclasses.replace(task.config, classes=0)  # forward then returns the features
    if task.params is None:
        init = jax.jit(task.model.init_params, static_argnums=1)
        params = jax.device_get(init(jax.random.key(args.seed), config))
    else:
        params = {name: leaf for name, leaf in task.params.items() if name != "head"}
    params = place_params(task.model, config, mesh, params)
    forward = make_forward(task.model, config, mesh)
    reader = Reader(task.source, config)
    started = time.time()
    features = []
    for batch in evaluation_batches(reader, task.rows, mesh, args.batch):
        features.append(np.asarray(forward(params, batch)))
    features = np.concatenate(features)[: len(task.rows)]
    print(f"features {features.shape} in {time.time() - started:.1f} s", flush=True)

    accuracy, penalties = probe(features, task.source.labels[task.rows])
    for fold in range(FOLDS):
        print(f"fold {fold + 1}  accuracy {accuracy[fold]:.1f} %  penalty {penalties[fold]:g}")
    spread = f"{accuracy.mean():.1f} % +- {accuracy.std():.1f} between {FOLDS} folds"
    print(f"result: linear probe, accuracy {spread}, {len(task.rows)} pictures in all")


def run_prediction(args, mesh):
    """Writes predictions.csv: the five likeliest classes of each picture of --predict."""
    model, params, config, classes = load_checkpoint(args)
    require(config.classes > 0, f"{args.checkpoint} has no head, so it cannot predict")
    source = pictures.LoosePictures(args.predict)
    pictures.check_channels(source, config.channels)
    config = dataclasses.replace(config, dtype=args.dtype, fsdp=args.fsdp)
    params = place_params(model, config, mesh, params)
    forward = make_forward(model, config, mesh)
    reader = Reader(source, config, args.skip_corrupt)
    best = min(5, config.classes)
    table = []
    for batch in evaluation_batches(reader, np.arange(len(source.files)), mesh, args.batch):
        probabilities = np.asarray(jax.nn.softmax(forward(params, batch)))
        labels = multihost_utils.process_allgather(batch["labels"], tiled=True)
        for chances, label in zip(probabilities, labels):
            row = {}
            if label >= 0:  # the picture could be read
                for place, i in enumerate(np.argsort(-chances)[:best], 1):
                    row[f"class{place}"] = classes[i]
                    row[f"probability{place}"] = f"{chances[i]:.4f}"
            table.append(row)

    columns = ["file"]
    for place in range(1, best + 1):
        columns += [f"class{place}", f"probability{place}"]
    for file, row in zip(source.files, table):  # the last batch has more rows
        row["file"] = file.relative_to(source.path).as_posix()
    path = pathlib.Path(args.out) / "predictions.csv"
    if jax.process_index() == 0:
        write_text(path, csv_text(table[: len(source.files)], columns))
    print(f"wrote {path}: {len(source.files)} pictures")


# ==== Command line ================================================================================


class Parser(argparse.ArgumentParser):
    """Reports a usage error in one line."""

    def error(self, message):
        self.exit(2, f"train.py: {message}\n")


class FromScratch(NamedTuple):
    """Defaults of the flags that a recipe can set."""

    optimizer: str = "adam"
    batch: int = 128
    learning_rate: float = 1e-3
    decay: str = "cosine"
    weight_decay: float = 0.1
    clip: float | None = 1.0
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    mixup: float = 0.0


WARMUP_SHARE = 0.05  # of the steps, without a recipe


def image_size(text):
    """224 -> (224, 224), 224x320 -> (224, 320): height and width in pixels."""
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text} is not of the form 224 or 224x320")
    return int(match[1]), int(match[2] or match[1])


def make_parser():
    parser = Parser(prog="train.py", description="Trains a model of this repository on pictures.")
    add = parser.add_argument
    add("model", choices=MODELS)
    add("--data", help="an .npz, or a folder with one subfolder of pictures per class")
    add(
        "--validation", help="other pictures to hold out (default: a fifth of each class of --data)"
    )
    add("--out", default="run", help="folder for everything that is written (default: run)")
    add("--size", help="model size such as S/16, needed without --checkpoint")
    add("--patch", type=int, help="patch side in pixels (default: that of --size)")
    add(
        "--image-size",
        type=image_size,
        help="pixels, 224 or 224x320 (default: the checkpoint's; of an .npz: as stored; else 224)",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="another field of the model's Config, such as experts=8 of moe",
    )
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of dense layers")
    add("--skip-corrupt", action="store_true", help="report unreadable pictures and skip them")
    add("--seed", type=int, default=0)

    add = parser.add_argument_group("weights and modes").add_argument
    add("--checkpoint", help="weights to start from, an .npz with the official parameter names")
    add("--gelu", choices=("tanh", "exact"), help="for vit, as the checkpoint has (default: tanh)")
    add("--untrained", action="store_true", help="random weights instead of the checkpoint's")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--probe", action="store_true", help="fit a linear probe, do not train")
    mode.add_argument("--evaluate", action="store_true", help="only measure held-out accuracy")
    mode.add_argument("--predict", metavar="FOLDER", help="write predictions.csv for its pictures")
    add("--per-class", type=int, help="with --probe: use so many pictures of each class")

    add = parser.add_argument_group("training (a --recipe sets other defaults)").add_argument
    add("--recipe", help="a recipe of the model's paper by name, such as 'to CIFAR'")
    add("--epochs", type=float, help="(default: the steps of the recipe, else 30 epochs)")
    add("--steps", type=int, help="instead of --epochs")
    add("--batch", type=int, help="pictures per step, over all devices (default: 128)")
    add("--optimizer", choices=OPTIMIZERS, help="(default: adam)")
    add("--learning-rate", type=float, help="peak of the schedule (default: 0.001)")
    add("--decay", choices=("cosine", "linear"), help="of the learning rate (default: cosine)")
    add("--warmup", type=int, help="steps (default: the share of the recipe, else 5 %%)")
    add("--weight-decay", type=float, help="multiplied by the learning rate (default: 0.1)")
    add(
        "--clip",
        type=float,
        help="largest norm of the gradient, for amos largest entry; 0: no clipping (default: 1)",
    )
    add("--dropout", type=float, help="rate, for vit (default: 0)")
    add("--stochastic-depth", type=float, help="rate of the last block, for mixer (default: 0)")
    add("--mixup", type=float, metavar="ALPHA", help="of the Beta distribution (default: none)")
    add("--gradient", choices=GRADIENTS, default="plain", help="(default: plain)")
    add("--rho", type=float, help="length of the perturbation, for sam and gsam")
    add(
        "--rho-min",
        type=float,
        help="rho follows the learning rate between this and --rho (default: it is constant)",
    )
    add("--alpha", type=float, help="weight of the gap, for gsam")
    add(
        "--perturb",
        choices=PERTURB,
        help="by all pictures of a step, or on each device by its own (default: global)",
    )
    add("--crop", type=float, default=0.05, help="least share of the area (default: 0.05; 1: none)")
    add("--no-flip", action="store_true", help="do not mirror pictures, such as digits or text")

    add = parser.add_argument_group("running").add_argument
    add("--mesh", default="data=1,model=1", help="number of devices on each axis")
    add("--fsdp", action="store_true", help="shard weights and optimizer state over data too")
    add("--accumulate", type=int, default=1, help="microbatches per step")
    add("--distributed", nargs="?", const="", metavar="HOST:PORT,PROCESSES,INDEX")
    add("--report", type=int, default=50, help="steps between lines of progress (default: 50)")
    add(
        "--every", type=int, default=500, help="steps between evaluations and states (default: 500)"
    )
    add("--keep", type=int, default=2, help="states to keep (default: 2)")
    add("--resume", action="store_true", help="go on from the last state, if there is one")
    return parser


def flag_of(name):
    return "--" + name.replace("_", "-")


def check_flags(args):
    """Raises ValueError for flags that are wrong or do not go together."""
    for name in ("steps", "batch", "accumulate", "report", "every", "keep", "patch", "per_class"):
        value = getattr(args, name)
        require(value is None or value >= 1, f"{flag_of(name)} {value} is not at least 1")
    for name in ("epochs", "learning_rate"):
        value = getattr(args, name)
        fits = value is None or 0 < value < math.inf
        require(fits, f"{flag_of(name)} {value} is not a finite number above 0")
    for name in ("weight_decay", "mixup", "warmup", "clip"):
        value = getattr(args, name)
        fits = value is None or 0 <= value < math.inf
        require(fits, f"{flag_of(name)} {value} is not a finite number of at least 0")
    require(0 < args.crop <= 1, f"--crop {args.crop} is not above 0 and at most 1")
    require(0 <= args.seed < 2**32, f"--seed {args.seed} is not in 0 to {2**32 - 1}")

    if args.checkpoint:
        for name in ("size", "patch"):
            given = getattr(args, name) is not None
            require(not given, f"{flag_of(name)} is that of the checkpoint: leave it out")
    else:
        sizes = importlib.import_module(args.model).SIZES
        for name in ("predict", "evaluate", "probe", "untrained"):
            require(not getattr(args, name), f"{flag_of(name)} needs a --checkpoint")
        require(args.size, "there is neither --size nor --checkpoint")
        require(args.size in sizes, f"--size {args.size} is not one of {', '.join(sizes)}")
    require(args.data or args.predict, "--data is needed: an .npz or a folder")
    require(args.probe or args.per_class is None, "--per-class is for --probe only")
    require(
        args.per_class is None or args.per_class >= FOLDS,
        f"--per-class {args.per_class} is fewer than the {FOLDS} folds",
    )
    has_gelu = hasattr(importlib.import_module(args.model).Config, "gelu")
    require(has_gelu or not args.gelu, f"--gelu is not for {args.model}")
    require(not (args.steps and args.epochs), "--steps and --epochs do not go together")
    if args.probe or args.evaluate or args.predict:
        for name in TRAINING_FLAGS:
            require(getattr(args, name) is None, f"{flag_of(name)} is for training only")
        require(args.gradient == "plain", "--gradient is for training only")
    if args.probe:
        for name in ("validation", "skip_corrupt", "resume"):
            require(not getattr(args, name), f"{flag_of(name)} does not go with --probe")
    if args.evaluate or args.predict:
        for name in ("image_size", "untrained", "resume"):
            require(not getattr(args, name), f"{flag_of(name)} does not go with this mode")


def fill_in_sharpness(args):
    """Sets the flags of SAM and GSAM that were not given. Raises ValueError for wrong ones."""
    flags = {"rho": args.rho, "rho_min": args.rho_min, "alpha": args.alpha, "perturb": args.perturb}
    if args.gradient == "plain":
        for name, value in flags.items():
            require(value is None, f"{flag_of(name)} needs --gradient sam or gsam")
        return
    require(args.rho is not None, f"--gradient {args.gradient} needs --rho, such as 0.05")
    for name in ("rho", "rho_min", "alpha"):
        value = flags[name]
        fits = value is None or 0 <= value < math.inf
        require(fits, f"{flag_of(name)} {value} is not a finite number of at least 0")
    if args.gradient == "sam":
        require(args.alpha is None, "--alpha is for --gradient gsam")
        args.alpha = 0.0
    require(args.alpha is not None, "--gradient gsam needs --alpha, such as 0.4")
    if args.rho_min is None:
        args.rho_min = args.rho
    require(args.rho_min <= args.rho, f"--rho-min {args.rho_min} is above --rho {args.rho}")
    args.perturb = args.perturb or "global"
    whole = args.mesh.endswith("model=1") and not args.fsdp
    require(
        args.perturb == "global" or whole,
        "--perturb shard needs all weights on every device: a --mesh with model=1 and no --fsdp",
    )
    require(
        args.perturb == "global" or args.model != "moe",
        "--perturb shard needs all weights on every device, and those of moe are sharded",
    )


def fill_in_recipe(args):
    """Sets the flags that were not given as the recipe does.

    Returns the share of the steps that the learning rate rises.
    """
    recipe = FromScratch()
    share = WARMUP_SHARE
    if args.recipe:
        recipes = importlib.import_module(args.model).RECIPES
        require(
            args.recipe in recipes, f"--recipe {args.recipe} is not one of {', '.join(recipes)}"
        )
        recipe = recipes[args.recipe]
        share = recipe.warmup / recipe.steps
        if args.steps is None and args.epochs is None:
            args.steps = recipe.steps
        if getattr(recipe, "randaugment", 0):
            strength = f"of strength {recipe.randaugment}"
            print(f"note: the recipe asks for RandAugment {strength}, which this program lacks")
    optimizer = args.optimizer or recipe.optimizer
    if optimizer in ("sgd", "amos"):
        require(args.weight_decay is None, f"--optimizer {optimizer} takes no --weight-decay")
    for name, default in FromScratch._field_defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, getattr(recipe, name, default))
    config_class = importlib.import_module(args.model).Config
    for name in REGULARIZERS:
        if not hasattr(config_class, name):
            require(not getattr(args, name), f"{flag_of(name)} is not for {args.model}")
            setattr(args, name, None)
    if args.clip == 0:
        args.clip = None
    return share


def fill_in_steps(args, pictures_per_epoch, warmup_share):
    """Sets --steps and --warmup if they were not given."""
    if args.steps is None:
        epochs = 30 if args.epochs is None else args.epochs
        args.steps = max(1, round(epochs * pictures_per_epoch / args.batch))
    if args.warmup is None:
        args.warmup = min(round(args.steps * warmup_share), args.steps - 1)
    require(args.warmup < args.steps, f"--warmup {args.warmup} is not below {args.steps} steps")


def make_folder(path):
    """Makes the folder --out. Raises ValueError if nothing can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        trial = path / f".writable.{os.getpid()}"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise ValueError(f"--out {path} cannot be written to: {error.strerror}") from None


def join_devices(args):
    """The mesh over the devices of all processes. Only the first process goes on printing."""
    if args.distributed is not None:
        match = re.fullmatch(r"(.+:\d+),([1-9]\d*),(\d+)", args.distributed)
        if match:
            address = match[1]
            processes = int(match[2])
            index = int(match[3])
            devices = math.prod(int(n) for n in re.findall(r"=(\d+)", args.mesh))
            jax.config.update("jax_num_cpu_devices", max(1, devices // processes))
            jax.distributed.initialize(address, processes, index)
        else:
            form = "HOST:PORT,PROCESSES,INDEX"
            require(
                args.distributed == "",
                f"--distributed {args.distributed} is not of the form {form}",
            )
            jax.distributed.initialize()
        jax.device_count()  # starts the backend, so that make_mesh cannot change the device count
    mesh = make_mesh(args.mesh)
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w")
    parts = mesh.shape["data"] * args.accumulate
    require(
        args.batch % parts == 0,
        f"--batch {args.batch} is not a multiple of data x accumulate = {parts}",
    )
    return mesh


def check_groups(config, args, mesh):
    """Raises ValueError unless a microbatch on a device is whole groups of moe."""
    group = getattr(config, "group", 1)
    parts = mesh.shape["data"] * args.accumulate * group
    require(
        args.batch % parts == 0,
        f"--batch {args.batch} is not a multiple of data x accumulate x group={group}: {parts}",
    )


def run(args):
    """Runs the chosen mode."""
    check_flags(args)
    fill_in_sharpness(args)
    warmup_share = fill_in_recipe(args)
    out = pathlib.Path(args.out)
    make_folder(out)
    mesh = join_devices(args)
    if args.predict:
        run_prediction(args, mesh)
        return
    task = read_task(args)
    check_groups(task.config, args, mesh)
    if jax.process_count() > 1:
        settings = [settings_of(task, args), args.mesh, args.every, args.report]
        settings = json.dumps(settings).encode()
        checksums = multihost_utils.process_allgather(np.uint32(zlib.crc32(settings)))
        require(
            len(set(checksums.tolist())) == 1,
            "the processes have different flags or see different pictures",
        )
    if args.probe:
        run_probe(task, args, mesh)
    elif args.evaluate:
        run_evaluation(task, args, mesh)
    else:
        fill_in_steps(args, len(task.rows), warmup_share)
        with contextlib.closing(States(out / "state", args.keep)) as states:
            require(
                args.resume or states.latest() is None,
                f"{states.folder} holds the states of a run: continue it with --resume, "
                "or choose another --out",
            )
            train(task, args, mesh, states)


def silence_orbax():
    """Leaves out what orbax and its threads print of an error, which main reports in one line."""
    absl.logging.set_verbosity(absl.logging.FATAL)
    for name in ("asyncio", "concurrent.futures"):
        logging.getLogger(name).setLevel(logging.CRITICAL)

    def hook(unraisable):
        # After a failure each pending write of orbax ends with this error.
        if str(unraisable.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = hook


def main(argv=None) -> int:
    """Returns the exit status: 0, 1 if a run fails, 2 for bad input; these print one line."""
    args = make_parser().parse_args(argv)
    try:
        run(args)
    except (ValueError, NotImplementedError) as error:  # the latter from attention="cudnn"
        print(f"train.py: {first_line(error)}", file=sys.stderr)
        return 2
    except (FloatingPointError, SaveError) as error:
        print(f"train.py: {first_line(error)}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        raise  # run_program ends without a word
    except OSError as error:
        reason = error.strerror or first_line(error)
        print(f"train.py: {error.filename or args.out}: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    silence_orbax()
    run_program(main)
