"""SAM and GSAM: sharpness-aware training, as functions from gradient to gradient.

    # gradient: a function (params, batch, key, step) -> ((loss, metrics), grads)
    sharpness_aware = gsam(gradient, rho=0.05, alpha=0.4)  # with alpha=0: SAM
    (loss, metrics), grads = sharpness_aware(params, batch, key, step)
    updates, opt_state = optimizer.update(grads, opt_state, params)  # any optimizer of optax

    # The same for people who have a loss and no gradient function:
    value_and_grad = gsam_value_and_grad(loss_fn, rho=0.05, alpha=0.4)
    (loss, metrics), grads = jax.jit(value_and_grad)(params, *batch)  # metrics["gap"]

    # On a mesh, each device perturbing by its own rows, as the papers trained:
    sharpness_aware = per_shard(loss_fn, mesh, specs, rho=0.05, alpha=0.4)

Paper     Zhuang et al. 2022, "Surrogate Gap Minimization Improves Sharpness-Aware Training",
          arXiv:2203.08065 v2. SAM: Foret et al. 2020, "Sharpness-Aware Minimization for
          Efficiently Improving Generalization", arXiv:2010.01412; on ViT and Mixer: Chen et al.
          2021, arXiv:2106.01548.
Here      Algorithm 1 of GSAM, SAM as its special case; rho that follows the learning rate; two
          adaptive perturbations; devices that perturb jointly or separately; settings for ImageNet
          (part of Table 4); the largest Hessian eigenvalue, which the gap estimates.
Not here  Model state such as the statistics of batch normalisation. Training on your own
          pictures: examples/train.py.
Differs   From the official code (big_vision): a gradient of zero gives zero, not NaN;
          norms and inner products are float32 for bfloat16 gradients, too. The official rho is
          not clipped, so that early in warm-up it is below rho_min and even below zero, and it
          uses the learning rate of the next step; here it is clipped, and uses that of the step
          itself (official=True does as the official code). The loss at the perturbed weights and
          the gap are returned as metrics, not thrown away.
Claims    C1 the numbers of big_vision, google-research/sam and the authors' PyTorch code
          C2 with alpha=0 it is SAM; with rho=0 it is the gradient itself
          C3 to first order a step of GSAM lowers the gap more than a step of SAM, and changes the
             perturbed loss by as much
          C4 near a minimum, in the direction of its largest curvature, the gap is rho^2 / 2
             times the largest eigenvalue of the Hessian
          C5 GSAM costs what SAM costs: two gradients
          C6 devices that perturb jointly and devices that perturb separately are two algorithms
          C7 with wrong labels among the right ones SAM and GSAM generalise better
          C8 it composes with optimizers of optax, with clipping, MultiSteps and
             inject_hyperparams, and with bfloat16 weights
Checked   google-research/big_vision @ 0127fb6, google-research/sam @ dae9904,
          juntang-zhuang/GSAM @ a770275: gradients in float32 on a CPU, and weights after up to
          twelve steps, differ by at most 2.4e-7. The claims are tests in tests/test_gsam.py.
Run       python gsam.py
          29 s on two CPU cores: trained on digits of which 40 % carry wrong labels, SGD gets 63.0 %
          of the held-out digits right, SAM 70.9 % and GSAM 74.2 % (5 seeds, standard deviation at
          most 0.7); if GSAM gains less than 8 points on SGD, it fails
Axes      B rows of a batch  D pixels  F hidden units  N classes  S seeds. Weights have any shape.
"""

import argparse
import math
import os
import pathlib
import sys
import time
import zipfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import PartitionSpec as P


def require(ok, message):  # same in every file
    """Raises ValueError(message) unless ok."""
    if not ok:
        raise ValueError(message)


# ==== GSAM: Algorithm 1 ===========================================================================

ADAPTIVE = (None, "big_vision", "asam")
MINIMIZE = ("perturbed", "clean")


def sharpness_aware_gradient(
    gradient, params, rho, alpha, adaptive=None, minimize="perturbed", mask=None
):
    """Algorithm 1: gradient is a function params -> ((loss, metrics), grads), called twice.

    f is the loss; f_p(w), the perturbed loss, stands for the largest loss within rho of w; their
    difference h = f_p - f, the surrogate gap, is small where the minimum is flat. Returns
    ((loss, metrics), grads) too, with f_p as "perturbed_loss" and h as "gap" among the metrics. The
    other arguments are those of gsam.
    """
    (loss, metrics), g = gradient(params)  # of f

    # To first order the loss at distance rho from the weights is largest in the direction of g.
    ascent = perturbation(params, g, rho, adaptive, mask)
    perturbed = jax.tree.map(jnp.add, params, ascent)
    (perturbed_loss, _), g_p = gradient(perturbed)  # of f_p

    if minimize == "perturbed":
        # Descend on f_p. The part of g that is orthogonal to g_p does not change f_p: to go up
        # along it raises f alone, and so lowers the gap.
        removed = orthogonal_part(g, g_p)
        grads = jax.tree.map(lambda a, b: a - (alpha * b).astype(a.dtype), g_p, removed)
    else:
        # Descend on f. The part of g_p that is orthogonal to g does not change f: to go down along
        # it lowers f_p alone, and so the gap.
        added = orthogonal_part(g_p, g)
        grads = jax.tree.map(lambda a, b: a + (alpha * b).astype(a.dtype), g, added)

    metrics = {**metrics, "perturbed_loss": perturbed_loss, "gap": perturbed_loss - loss}
    return (loss, metrics), grads


def perturbation(params, g, rho, adaptive=None, mask=None):
    """What to add to the weights to raise the loss most: rho * g / |g|.

    adaptive and mask: see gsam. A gradient of zero gives zero. Returns a tree like params, of its
    dtypes.
    """
    if mask is not None:
        g = jax.tree.map(lambda g, kept: jnp.where(kept, g, 0), g, mask)
    if adaptive == "asam":
        weighted = jax.tree.map(lambda w, g: jnp.abs(w) * g, params, g)
    else:
        weighted = g
    scale = rho / (norm(weighted) + 1e-12)  # the official epsilon

    def step(w, g):
        if adaptive == "asam":
            g = jnp.square(w) * g
        elif adaptive == "big_vision":
            g = jnp.abs(w) * g
        return (scale * g).astype(w.dtype)

    return jax.tree.map(step, params, g)


def orthogonal_part(a, b):
    """a less its projection on b, for two trees of the same shapes; a itself if b is zero."""
    unit = direction(b)
    projection = inner(a, unit)
    return jax.tree.map(lambda a, u: a - (projection * u).astype(a.dtype), a, unit)


def direction(tree):
    """The tree divided by its length; a tree of zeros stays as it is."""
    tree = jax.tree.map(at_least_float32, tree)
    # Divided by the largest entry first: squares of tiny gradients are zero in float32.
    largest = jnp.stack([jnp.abs(x).max(initial=0) for x in jax.tree.leaves(tree)]).max()
    tree = jax.tree.map(lambda x: x / jnp.where(largest > 0, largest, 1), tree)
    length = norm(tree)
    return jax.tree.map(lambda x: x / jnp.where(length > 0, length, 1), tree)


def wide(x):  # same in every file
    """The dtype in which to compute with x: float32, or x's own if that is wider."""
    return jax.dtypes.canonicalize_dtype(np.promote_types(x.dtype, np.float32))


def at_least_float32(x):  # same in every file
    """x cast to the dtype wide(x)."""
    return x.astype(wide(x))


def sum_of(function, *trees):
    """The sum of function(leaf, ...) over all leaves."""
    return sum(jax.tree.leaves(jax.tree.map(function, *trees)))


def inner(a, b):
    """The inner product of two trees, summed over all weights, in float32 at least."""
    return sum_of(lambda a, b: jnp.sum(at_least_float32(a) * at_least_float32(b)), a, b)


def norm(tree):
    """The length of a tree as one vector, in float32 at least."""
    return jnp.sqrt(inner(tree, tree))


# ==== The gradient functions ======================================================================


def gsam(gradient, rho, alpha=0.0, *, adaptive=None, minimize="perturbed", mask=None):
    """SAM (alpha=0) or GSAM (alpha > 0) around a gradient, as a gradient of the same form.

    gradient: a function (params, batch, key, step) -> ((loss, metrics), grads), metrics a dict.
    The returned one calls it twice, with the same batch, key and step, so that both passes drop
    the same units. Its loss is that of the unperturbed weights; its metrics are those of
    `gradient`, and "perturbed_loss" and "gap".

    rho       length of the perturbation, a number or a function of the step, such as
              rho_from_learning_rate; for the Python number 0 gsam returns `gradient` itself,
              without the two metrics
    alpha     weight of the orthogonal part, whose removal lowers the gap
    adaptive  "asam" perturbs by rho * w^2 g / norm(|w| g), "big_vision" by rho * |w| g / norm(g),
              where the paper has rho * g / norm(g); the length is then no longer rho
    minimize  "perturbed", the paper's form; or "clean", big_vision's other one, where alpha=0 is
              the plain gradient and not SAM
    mask      a tree like params of True and False; False leaves a weight unperturbed

    bfloat16 weights round a small perturbation away: keep a float32 copy where rho is small.

    On a mesh, a gradient of the global loss makes all devices perturb jointly, by all rows;
    per_shard is the other way. With microbatches (`accumulate` of examples/train.py)
    gsam(accumulate(g, n)) perturbs once, by all rows, and accumulate(gsam(g), n) once for each
    microbatch, by its own rows, as n devices do in per_shard.

    Raises ValueError for a rho or alpha that is negative or not finite, for an unknown mode and for
    a mask of another structure.
    """
    check_options(rho, alpha, adaptive, minimize)
    if isinstance(rho, int | float) and rho == 0:
        return gradient

    def gsam_gradient(params, batch, key, step):
        if mask is not None:
            require(
                jax.tree.structure(mask) == jax.tree.structure(params),
                f"mask is {jax.tree.structure(mask)}, not like params, "
                f"{jax.tree.structure(params)}",
            )

        def at(params):
            return gradient(params, batch, key, step)

        radius = rho(step) if callable(rho) else rho
        return sharpness_aware_gradient(at, params, radius, alpha, adaptive, minimize, mask)

    return gsam_gradient


def check_options(rho, alpha, adaptive, minimize):
    """Raises ValueError for what gsam cannot use. Functions and traced values are not checked."""
    for name, value in (("rho", rho), ("alpha", alpha)):
        if not callable(value) and not isinstance(value, jax.core.Tracer):
            require(0 <= value < math.inf, f"{name}={value} is not at least 0 and finite")
    require(adaptive in ADAPTIVE, f"adaptive={adaptive!r} is not one of {ADAPTIVE}")
    require(minimize in MINIMIZE, f"minimize={minimize!r} is not one of {MINIMIZE}")


def gsam_value_and_grad(loss_fn, rho, alpha=0.0, **options):
    """gsam for a plain loss: loss_fn(params, *batch) -> a scalar.

    Returns a function (params, *batch, step=0) -> ((loss, metrics), grads), where the metrics are
    "perturbed_loss" and "gap", and step is for a rho that follows a schedule. options: those of
    gsam. Raises ValueError as gsam does, and for a loss that is not a scalar.
    """

    def gradient(params, batch, key, step):
        def scalar_loss(params):
            loss = loss_fn(params, *batch)
            require(jnp.shape(loss) == (), f"the loss has shape {jnp.shape(loss)}, not ()")
            return loss

        loss, grads = jax.value_and_grad(scalar_loss)(params)
        return (loss, {}), grads

    sharpness_aware = gsam(gradient, rho, alpha, **options)

    def value_and_grad(params, *batch, step=0):
        return sharpness_aware(params, batch, None, step)

    return value_and_grad


def per_shard(loss_fn, mesh, specs, rho, alpha=0.0, **options):
    """gsam where each device perturbs by the m rows that it holds, called m-sharpness.

    loss_fn: (params, batch, key) -> (loss, metrics), means over one device's rows, without
    collectives. Returns a gradient (params, batch, key, step) -> ((loss, metrics), grads) of a
    whole batch whose rows are sharded over the mesh axis "data". Each device computes the GSAM
    gradient of its rows, and the finished gradients, losses and metrics are averaged, each device
    with the same weight. The result depends on the number of devices, as that of the official codes
    does. options: those of gsam.

    specs: the PartitionSpec of each weight. Every device needs all weights, since each perturbs
    its own copy: ValueError if one is sharded over several devices.

    Do not move the official pmap code into shard_map as it stands: JAX then sums the gradients of
    the weights that the devices share, so that all devices perturb alike, and the result is n times
    that of gsam. A test shows it.
    """
    for axis, devices in mesh.shape.items():
        require(
            axis == "data" or devices == 1,
            f"mesh axis {axis}={devices}: each device needs all weights to perturb them on its "
            "own, so only the axis data may have several devices; gsam perturbs all alike",
        )
    for path, spec in jax.tree_util.tree_leaves_with_path(specs):
        axes = [axis for axis in jax.tree.leaves(tuple(spec)) if mesh.shape[axis] > 1]
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        require(
            not axes,
            f"{name} is sharded over {axes}: each device needs all weights to perturb them on its "
            "own; gsam perturbs all alike",
        )
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def own_gradient(params, batch, key, step):
        return value_and_grad(params, batch, key)

    sharpness_aware = gsam(own_gradient, rho, alpha, **options)

    def of_one_device(params, batch, key, step):
        # A copy for each device: otherwise JAX would sum the gradients over the devices.
        params = lax.pcast(params, "data", to="varying")
        if key is not None:
            key = jax.random.fold_in(key, lax.axis_index("data"))  # each draws for its own rows
        result = sharpness_aware(params, batch, key, step)
        return lax.pmean(result, "data")  # all-reduce: the mean of the finished gradients

    return jax.shard_map(
        of_one_device,
        mesh=mesh,
        in_specs=(P(), P("data"), P(), P()),
        out_specs=P(),
    )


def rho_from_learning_rate(learning_rate, rho_max, rho_min, lr_max, lr_min=0.0, official=False):
    """rho as a linear function of the learning rate (Algorithm 1): a function of the step.

    learning_rate: a number or a function of the step. rho is rho_min where it is at most lr_min,
    rho_max where it is at least lr_max, and rho_max everywhere if lr_min = lr_max. official=True
    does as big_vision: rho is not clipped, and uses the learning rate of the next step. Raises
    ValueError unless 0 <= rho_min <= rho_max and lr_min <= lr_max.
    """
    require(
        0 <= rho_min <= rho_max < math.inf,
        f"rho_min={rho_min} and rho_max={rho_max} are not finite with 0 <= rho_min <= rho_max",
    )
    require(lr_min <= lr_max, f"lr_min={lr_min} is above lr_max={lr_max}")

    def rho(step):
        if lr_min == lr_max:
            return rho_max
        if official:
            step = step + 1
        rate = learning_rate(step) if callable(learning_rate) else learning_rate
        share = (rate - lr_min) / (lr_max - lr_min)
        if not official:
            share = jnp.clip(share, 0, 1)
        return rho_min + (rho_max - rho_min) * share

    return rho


def sharpness(loss_fn, params, *batch, steps=20, key=None):
    """The Hessian's eigenvalue of the largest absolute value, by power iteration.

    loss_fn(params, *batch) -> a scalar. Returns an estimate of the eigenvalue, which is negative
    where that curvature is, and of its eigenvector, a tree like params. Each of the `steps` costs
    about two gradients; no matrix is ever stored. key: a PRNG key for the starting vector, by
    default jax.random.key(0).
    """
    if key is None:
        key = jax.random.key(0)
    gradient = jax.grad(lambda params: loss_fn(params, *batch))

    def hessian_times(vector):
        return jax.jvp(gradient, (params,), (vector,))[1]

    def unit(tree):
        """The direction of a tree, with the dtypes of params."""
        return jax.tree.map(lambda x, w: x.astype(w.dtype), direction(tree), params)

    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    start = [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves)]
    start = unit(treedef.unflatten(start))
    vector = lax.fori_loop(0, steps, lambda _, vector: unit(hessian_times(vector)), start)
    return inner(vector, hessian_times(vector)), vector


class Recipe(NamedTuple):
    """Settings of GSAM for ImageNet."""

    rho_max: float
    rho_min: float
    alpha: float


# From Table 4: AdamW, learning rate 3e-3 to 3e-5 linear, weight decay 0.3, 300 epochs, warm-up of
# 10,000 steps of 4,096 pictures. ViT-B/32 is the official configuration of big_vision too.
RECIPES = {
    "ViT-S/32": Recipe(0.6, 0.0, 0.4),
    "ViT-S/16": Recipe(0.6, 0.0, 1.0),
    "ViT-B/32": Recipe(0.6, 0.1, 0.6),
    "ViT-B/16": Recipe(0.6, 0.2, 0.4),
    "Mixer-S/32": Recipe(0.5, 0.0, 0.2),
    "Mixer-S/16": Recipe(0.5, 0.0, 0.6),
    "Mixer-B/32": Recipe(0.7, 0.2, 0.05),
    "Mixer-B/16": Recipe(0.5, 0.2, 0.01),
}


# ==== Demo: digits, of which many carry a wrong label =============================================

TRAINING = 1000  # digits to train on; the others are held out
WRONG = 0.4  # share of wrong labels
WIDTH = 64  # hidden units
SEEDS = 5
LOOKS = 12  # at the held-out digits in a run
BATCH = 100
LEARNING_RATE = 0.05  # cosine to 0, momentum 0.9
STEPS = 600
RHO = 0.2
ALPHA = 0.2
EXPECTED = 11.3  # points of held-out accuracy that GSAM gains, with the default flags
FLOOR = 8.0


def read_npz(path) -> dict:  # same in every file
    """The named arrays of an .npz. Raises ValueError unless it is whole and holds arrays only."""
    require(os.path.exists(path), f"{path} does not exist")
    require(zipfile.is_zipfile(path), f"{path} is not an .npz, or only the first part of one")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # numpy lets through what zipfile, zlib and the system raise
        raise ValueError(f"{path} is not a readable .npz of plain arrays: {error}") from None
    for name, array in arrays.items():
        require(isinstance(array, np.ndarray), f"{path} is not an .npz: {name} is not an array")
        if array.dtype.str == "|V2":  # how numpy stores bfloat16
            arrays[name] = array.view(jnp.bfloat16)
    return arrays


def check_out(path):  # same in every file
    """Raises ValueError unless a figure can be written to path."""
    path = pathlib.Path(path)
    require(path.suffix in (".png", ".pdf", ".svg"), f"--out {path} is not a .png, .pdf or .svg")
    require(not path.is_dir(), f"--out {path} is a folder")
    require(os.access(path.parent, os.W_OK), f"--out {path}: its folder cannot be written to")


def load_digits(path):  # same in every file
    """Pictures uint8 [B,28,28,1] and labels int32 [B], shuffled: the file is sorted by label."""
    data = read_npz(path)
    for name in ("images", "labels"):
        require(name in data, f"{path} has no array {name}")
    images = data["images"]
    labels = data["labels"]
    require(
        images.dtype == np.uint8
        and images.shape[1:] == (28, 28)
        and labels.dtype.kind in "iu"
        and labels.shape == (len(images),)
        and len(images) >= 10,
        f"{path}: images {images.dtype} {images.shape} and labels {labels.dtype} {labels.shape} "
        "are not ten or more uint8 [B,28,28] and integers [B]; examples/train.py takes others",
    )
    low = labels.min()
    high = labels.max()
    require(0 <= low and high <= 9, f"{path}: labels are from {low} to {high}, not within 0 to 9")
    order = np.random.default_rng(0).permutation(len(images))
    return images[order][..., None], labels[order].astype(np.int32)


class Data(NamedTuple):  # same in every file
    """Digits float32 [B,D] in 0 to 1, with labels int32 [B]."""

    images: jax.Array  # to train on
    labels: jax.Array
    held_out_images: jax.Array
    held_out_labels: jax.Array


def read_data(path) -> Data:
    """TRAINING digits, a share WRONG of them with a label of another class, and the rest."""
    images, labels = load_digits(path)
    images = images.reshape(len(images), -1).astype(np.float32) / 255
    count = min(TRAINING, len(images) * 4 // 5)
    rng = np.random.default_rng(1)
    wrong = rng.random(count) < WRONG
    noisy = np.where(wrong, (labels[:count] + rng.integers(1, 10, count)) % 10, labels[:count])
    data = Data(images[:count], noisy.astype(np.int32), images[count:], labels[count:])
    return jax.tree.map(jnp.asarray, data)


def mlp(params, images):
    """Logits of a network with one hidden layer. [B,D] -> [B,N]."""
    hidden = jax.nn.relu(images @ params["dense1"]["kernel"] + params["dense1"]["bias"])  # [B,F]
    return hidden @ params["dense2"]["kernel"] + params["dense2"]["bias"]


def init_mlp(key):
    """Weights of mlp."""
    first, second = jax.random.split(key)
    init = jax.nn.initializers.lecun_normal()
    return {
        "dense1": {"kernel": init(first, (28 * 28, WIDTH)), "bias": jnp.zeros(WIDTH)},
        "dense2": {"kernel": init(second, (WIDTH, 10)), "bias": jnp.zeros(10)},
    }


def mlp_loss(params, images, labels):
    """Softmax cross-entropy in nats, the mean over the rows."""
    logits = mlp(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def mlp_gradient(params, batch, key, step):
    """The plain gradient of mlp_loss, for gsam."""
    loss, grads = jax.value_and_grad(mlp_loss)(params, batch["images"], batch["labels"])
    return (loss, {"loss": loss}), grads


def quality(params, data: Data):
    """Held-out accuracy in per cent; loss in nats and gap for RHO on all training digits."""
    guesses = mlp(params, data.held_out_images).argmax(-1)
    rows = {"images": data.images, "labels": data.labels}
    (loss, metrics), _ = gsam(mlp_gradient, RHO)(params, rows, None, 0)
    accuracy = 100 * (guesses == data.held_out_labels).mean()
    return {"accuracy": accuracy, "loss": loss, "gap": metrics["gap"]}


def train(name, gradient, data: Data, steps, seed):
    """Trains SEEDS networks at once, by vmap.

    Returns their weights, with a leading axis S; the steps after which they were examined; what
    `quality` found there, arrays [looks,S]; and the seconds that one step of all seeds took.
    """
    optimizer = optax.sgd(optax.cosine_decay_schedule(LEARNING_RATE, steps), momentum=0.9)
    init_key, step_key = jax.random.split(jax.random.key(seed))

    def start(key):
        params = init_mlp(key)
        return params, optimizer.init(params)

    def go_on(state, key, first, last):
        def step(i, state):
            params, opt_state = state
            rows = jax.random.randint(jax.random.fold_in(key, i), (BATCH,), 0, len(data.images))
            batch = {"images": data.images[rows], "labels": data.labels[rows]}
            _, grads = gradient(params, batch, None, i)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        return lax.fori_loop(first, last, step, state)

    state = jax.jit(jax.vmap(start))(jax.random.split(init_key, SEEDS))
    keys = jax.random.split(step_key, SEEDS)
    go_on = jax.jit(jax.vmap(go_on, in_axes=(0, 0, None, None)))
    examine = jax.jit(jax.vmap(lambda params: quality(params, data)))
    part = max(1, steps // LOOKS)
    found = []
    after = []
    seconds = []  # for each step of a part
    started = time.time()
    for first in range(0, steps, part):
        last = min(first + part, steps)
        part_started = time.time()
        state = jax.block_until_ready(go_on(state, keys, first, last))
        seconds.append((time.time() - part_started) / (last - first))
        found.append(examine(state[0]))
        after.append(last)
        loss = found[-1]["loss"].mean()
        gap = found[-1]["gap"].mean()
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {last}: the loss is {loss}")
        left = (time.time() - started) / last * (steps - last)
        print(
            f"{name}: step {last}/{steps}  loss {loss:.3f} nats  gap {gap:.4f}  {left:.0f} s left",
            flush=True,
        )
    curves = {key: np.stack([each[key] for each in found]) for key in found[0]}
    return state[0], after, curves, min(seconds)  # the first part compiles


def loss_along(params, direction, distances, data: Data):
    """Loss in nats at params + distance * direction, for each distance."""

    def at(distance):
        moved = jax.tree.map(lambda w, v: w + distance * v, params, direction)
        return mlp_loss(moved, data.images, data.labels)

    return jax.jit(jax.vmap(at))(distances)


def draw(path, curves, profiles, distances):
    """Left: the gap during training. Right: loss along the eigenvector of the largest curvature.

    curves: name -> (steps, gaps [looks,S]); profiles: name -> losses at the distances.
    """
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, (steps, gaps) in curves.items():
        left.plot(steps, gaps.mean(1), label=name)
        left.fill_between(steps, gaps.min(1), gaps.max(1), alpha=0.2)
        right.plot(distances, profiles[name] - profiles[name].min(), label=name)
    left.set(xlabel="step", ylabel=f"gap in nats, rho={RHO}", title="Gap: mean of the seeds, range")
    left.set_ylim(0)
    right.set(
        xlabel="distance along the first eigenvector of the Hessian",
        ylabel="training loss above its least, nats",
        title="How sharp the minimum is, first seed",
    )
    left.legend()
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv=None) -> int:
    """Returns the exit status: 1 below FLOOR or for a loss that is not finite, 2 for bad input."""
    parser = argparse.ArgumentParser(description="Trains on wrong labels by SGD, SAM and GSAM.")
    data_path = str(pathlib.Path(__file__).parent / "data/mnist5k.npz")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each of three runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rho", type=float, default=RHO, help="length of the perturbation")
    parser.add_argument("--alpha", type=float, default=ALPHA, help="of GSAM")
    parser.add_argument("--data", default=data_path, help=".npz of digits")
    parser.add_argument("--out", default="gsam.png", help="where to draw the figure")
    args = parser.parse_args(argv)
    try:
        require(args.steps >= 1, f"--steps {args.steps} is not at least 1")
        require(0 <= args.seed < 2**32, f"--seed {args.seed} is not in 0 to {2**32 - 1}")
        check_out(args.out)
        data = read_data(args.data)
        gradients = {
            "SGD": mlp_gradient,
            "SAM": gsam(mlp_gradient, args.rho),
            "GSAM": gsam(mlp_gradient, args.rho, args.alpha),
        }
    except ValueError as error:
        print(f"gsam.py: {error}", file=sys.stderr)
        return 2

    wrong = f"{100 * WRONG:.0f} % of their labels wrong"
    print(
        f"{len(data.labels)} digits, {wrong}, {len(data.held_out_labels)} held out, {SEEDS} seeds"
    )
    distances = jnp.linspace(-1.5, 1.5, 61)
    accuracies = {}
    curves = {}
    profiles = {}
    summary = []
    for name, gradient in gradients.items():
        try:
            params, steps, found, seconds = train(name, gradient, data, args.steps, args.seed)
        except FloatingPointError as error:
            print(f"gsam.py: {name}, {error}", file=sys.stderr)
            return 1
        find = jax.jit(
            jax.vmap(lambda params: sharpness(mlp_loss, params, data.images, data.labels))
        )
        eigenvalues, directions = find(params)
        first = jax.tree.map(lambda x: x[0], (params, directions))
        profiles[name] = np.asarray(loss_along(*first, distances, data))
        curves[name] = steps, found["gap"]
        accuracies[name] = found["accuracy"][-1]
        mean = f"{accuracies[name].mean():.1f} % +- {accuracies[name].std():.1f}"
        summary.append(
            f"{name}: held-out accuracy {mean}, gap {found['gap'][-1].mean():.4f} nats, largest "
            f"eigenvalue {eigenvalues.mean():.1f}, {1e3 * seconds:.1f} ms a step"
        )
    print("\n".join(summary))
    got = accuracies["GSAM"].mean() - accuracies["SGD"].mean()
    settings = (args.steps, args.seed, args.rho, args.alpha, args.data)
    defaults = settings == (STEPS, 0, RHO, ALPHA, data_path)
    if defaults:
        expected = f"expected {EXPECTED} points, at least {FLOOR} points"
    else:
        expected = "expected unknown, at least unknown"
    print(f"result: held-out accuracy of GSAM above that of SGD: got {got:.1f} points, {expected}")
    try:
        draw(args.out, curves, profiles, distances)
        print(f"wrote {args.out}")
    except Exception as error:  # matplotlib is missing, or it cannot draw here
        print(f"no figure: {type(error).__name__}: {error}")
    return int(defaults and not got >= FLOOR)


def run_program(main):  # same in every file
    """Exits with the status that main returns; after Ctrl-C or `| head` without a traceback."""
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # otherwise Python fails to flush
        status = 141
    sys.exit(status)


if __name__ == "__main__":
    run_program(main)
