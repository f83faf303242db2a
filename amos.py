"""Amos: Adam with steps and weight decay that follow from the scale each weight should have.

    optimizer = amos(learning_rate=0.01, eta_fn=eta_rules(), shape_fn=slot_rules(), beta=0.99)
    state = optimizer.init(params)  # params: any tree of arrays; rules go by the names in it
    updates, state = optimizer.update(grads, state, params)  # the decay needs the parameters
    params = optax.apply_updates(params, updates)

    # The same without names: entries of scale 0.05 everywhere, slots as large as the parameters.
    optimizer = amos(learning_rate=0.01, eta_fn=0.05)

Paper     Tian & Parikh 2022, "Amos: An Adam-style Optimizer with Adaptive Weight Decay towards
          Model-Oriented Scale", arXiv:2210.11693 v2.
Here      Algorithm 1 with clipping and momentum; slots (the optimizer's arrays v and b) of which
          many entries share one number; rules that give eta, the scale, and the slots of a
          Transformer's parameters by their names; learning rates.
Not here  Models; fine-tuning, for which the official code takes Adam; saving, since the state is a
          pytree that any library saves. Tables of eta and slots: examples/amos_rules.py. Training
          on your own pictures: examples/train.py.
Differs   From the official code: v and b are float32 at least. There they have the parameters'
          dtype, and in bfloat16 a beta of 0.999 is 1. A schedule below zero counts as zero, where
          the official code gets NaN for good. Any pytree will do, not only those of Flax. init
          refuses a slot that does not fit; there update fails. Rules are a table, not expressions
          in strings. As in the official code, and unlike optax.adamw: schedules count from 1, and
          momentum is a mean of the updates, not of the gradients.
Claims    C1 the numbers of the official code
          C2 slots of the paper's models take 51 % of AdamW's bytes with momentum, 0.2 % without
          C3 the scale of a weight moves towards eta, ever more slowly
          C4 fewer steps than AdamW to the same loss (in bench/bench_amos.py 75 % and 90 %)
          C5 a gradient times a constant gives the same steps, for entries from 1e-17 to 1e18
          C6 it works inside optax's chain, MultiSteps, masked, partition, inject_hyperparams and
             apply_if_finite, and under automatic, explicit and manual sharding
          C7 scaling its updates by a rate once more is wrong, and so is adding decay once more
Checked   google-research/jestimator @ 326824a, amos.py and amos_helper.py: 14 runs of 20 or 30
          steps in float32 on a CPU; parameters differ by at most 2.4e-7. The claims are tests in
          tests/test_amos.py.
Run       python amos.py
          15 s on two CPU cores: an MLP on 4,000 digits, AdamW and Amos each at the best of three
          learning rates. Held-out loss 0.268 and 0.249 nats (5 seeds), 946,264 and 2,156 bytes of
          slots; if Amos's loss is higher than AdamW's, it fails
Axes      B rows of a batch  D pixels  N classes  R learning rates  S seeds. Parameters have any
          shape; v and b have the same one, or 1 along axes that share a number, or ().
"""

import argparse
import math
import os
import pathlib
import re
import sys
import time
import zipfile
from typing import Any, NamedTuple

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


# ==== The update: Algorithm 1 =====================================================================


def update_leaf(
    g, w, v, b, *, t, xi, eta, beta, extra_l2, d_coef, c_coef, epsilon, shared=(), mesh_axes=()
):
    """One step of one parameter. Returns what to add to w, and the new v and b.

    g, w [...]: gradient and parameter. v: running mean of the squared gradient. b: the decay so
    far; 1 + b is the product of 1 + gamma over the steps. Entries along the axes `shared` have one
    v and one b together: these arrays have size 1 there, or the shape () if all entries share. t:
    number of the step, from 1. xi: the learning rate. eta: the scale that the entries of w should
    have. mesh_axes: inside shard_map, the mesh axes over which shared axes are sharded.
    """
    # The paper's M_2(g)^2, the mean of the squares over the entries that share a number.
    count = math.prod(g.shape[i] for i in shared)
    keepdims = v.ndim == g.ndim  # a slot of shape () has no axes to keep
    g2 = jnp.square(g).sum(shared, keepdims=keepdims) / max(count, 1)  # 0 if w is empty
    if mesh_axes:
        g2 = lax.pmean(g2, mesh_axes)  # all-reduce: the mean over all parts of the parameter

    # As in Adam: the step is xi * eta where the gradient is as large as it usually is.
    v = beta * v + (1 - beta) * g2
    inverse = (1 - beta**t) / jnp.maximum(v, epsilon)  # 1 / v_hat
    step = xi * eta * jnp.sqrt(inverse) * g

    # A random step of xi * eta adds (xi * eta)^2 to the mean square of w, and a decay of gamma / 2
    # takes gamma times it away. With gamma = xi^2 the two cancel where the mean square is eta^2.
    # Here gamma is c xi^2 times the square of the gradient divided by its usual square.
    c = 1 / jnp.sqrt(1 + c_coef * jnp.sqrt(xi) * b)
    gamma = c * jnp.square(xi) * inverse * g2

    # As b grows, c weakens the decay, and d both the step and the decay, so no schedule needs to
    # know the number of steps in advance.
    d = 1 / (1 + d_coef * jnp.sqrt(xi * eta) * b)
    update = -d * (step + (gamma / 2 + extra_l2) * w)
    b = b + gamma * (1 + b)
    return update, v, b


# ==== The optimizer ===============================================================================


class ScaleByAmosState(NamedTuple):
    """State of scale_by_amos: the steps done, int32 [], and v and b of each parameter."""

    count: jax.Array
    v: Any
    b: Any


def amos(
    learning_rate,
    eta_fn,
    shape_fn=None,
    beta=0.999,
    momentum=None,
    clip_value=None,
    extra_l2=0.0,
    d_coef=0.25,
    c_coef=0.25,
    epsilon=2.0**-125,
    *,
    shapes=None,
    specs=None,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer: clipped gradients, scale_by_amos, momentum.

    clip_value  bounds each entry of the gradient
    momentum    weight of the past in a running mean of the updates, which needs a slot of the
                parameter's size
    the others  those of scale_by_amos

    None, or 0 and below as in the official code, leaves out clipping or momentum. Learning rate and
    weight decay are in the updates already: do not chain optax.scale or add_decayed_weights.

    The state is a ScaleByAmosState, in a tuple of optax.chain if there is clipping or momentum;
    optax.tree.get(state, "v") finds v in both.

    optax.inject_hyperparams needs static_args=("eta_fn", "shape_fn", "momentum", "clip_value"). It
    counts from 0: give it lambda t: schedule(t + 1). Raises ValueError as scale_by_amos does, and
    for momentum >= 1.
    """
    require(not momentum or momentum < 1, f"momentum={momentum} is not below 1")
    parts = []
    if clip_value and clip_value > 0:
        parts.append(optax.clip(clip_value))
    update_rule = scale_by_amos(
        learning_rate,
        eta_fn,
        shape_fn,
        beta=beta,
        extra_l2=extra_l2,
        d_coef=d_coef,
        c_coef=c_coef,
        epsilon=epsilon,
        shapes=shapes,
        specs=specs,
    )
    parts.append(update_rule)
    if momentum and momentum > 0:
        parts.append(mean_of_updates(momentum))
    if len(parts) == 1:
        return parts[0]
    return optax.chain(*parts)


def scale_by_amos(
    learning_rate,
    eta_fn,
    shape_fn=None,
    beta=0.999,
    extra_l2=0.0,
    d_coef=0.25,
    c_coef=0.25,
    epsilon=2.0**-125,
    *,
    shapes=None,
    specs=None,
) -> optax.GradientTransformationExtraArgs:
    """Algorithm 1 as a transformation of optax, without clipping and momentum.

    learning_rate   xi, or a function of the step 1, 2 ...; the authors advise 1 / sqrt(N) for data
                    that make N batches
    eta_fn          scale of the entries of a parameter, a function (path, shape) -> float such as
                    eta_rules(), or one number for all; path is a tuple of strings
    shape_fn        shape of v and b, a function (path, shape) -> tuple such as slot_rules(); None
                    is that of the parameter, which takes as much memory as Adam
    beta            of the mean of squares; the authors advise a 1 - beta of the order of xi
    extra_l2        decay that is added to gamma / 2; it is not multiplied by the learning rate
    d_coef, c_coef  how fast the steps, and the decay, get smaller
    epsilon         least value of v
    shapes, specs   needed inside shard_map only, where a device sees a part of a parameter: trees
                    of the whole parameters, as arrays or jax.ShapeDtypeStruct, and of their
                    PartitionSpecs; see state_specs

    That shapes and specs are missing is noticed only with check_vma=True, the default of shard_map.

    A row of an embedding that does not occur has gradient zero and does not move (without momentum
    and extra_l2). A row that occurred once and returns after 3,000 steps moves by 30 times xi * eta
    (beta = 0.999), since v has nearly forgotten it while the bias correction counts all steps. A
    gradient that is not finite makes v and b not finite for good: wrap the optimizer in
    optax.apply_if_finite.

    Raises ValueError for a number that is out of range; from init, for a parameter that is not
    real, an eta that is not above 0 and a slot that does not fit; from update, without params, for
    a gradient of another shape, and for a state that other rules have made.
    """
    numbers = {
        "beta": beta,
        "extra_l2": extra_l2,
        "d_coef": d_coef,
        "c_coef": c_coef,
        "epsilon": epsilon,
    }
    check_numbers({"learning_rate": learning_rate, **numbers})
    require((shapes is None) == (specs is None), "shapes= and specs= must be given together")

    def resolved(params):
        """The Leaf of each parameter."""
        if shapes is None:
            return resolve(params, eta_fn, shape_fn)
        if not jax.tree.leaves(params):
            return []  # optax.tree_map_params calls init with a placeholder that has no leaves
        require(
            jax.tree.structure(shapes) == jax.tree.structure(params),
            "shapes= has another structure than the parameters",
        )
        return resolve(shapes, eta_fn, shape_fn, specs)

    def init(params):
        leaves, treedef = jax.tree.flatten(params)
        slots = [zero_slot(w, leaf) for w, leaf in zip(leaves, resolved(params))]
        v = treedef.unflatten(slots)
        # A copy: one buffer as v and as b could not be donated.
        b = treedef.unflatten([jnp.copy(slot) for slot in slots])
        return ScaleByAmosState(jnp.zeros([], jnp.int32), v, b)

    def update(updates, state, params=None, **extra_args):
        require(
            params is not None,
            "amos requires the current value of parameters: update(gradients, state, params)",
        )
        leaves, treedef = jax.tree.flatten(params)
        if shapes is None:
            # What varies over a mesh axis is a part: this is inside shard_map.
            require(
                not any(jax.typeof(w).mat.varying for w in leaves),
                "amos inside shard_map needs shapes= and specs= of the whole parameters",
            )
        else:
            check_parts(leaves, treedef.flatten_up_to(shapes), treedef.flatten_up_to(specs))
        count = optax.safe_increment(state.count)
        xi = learning_rate(count) if callable(learning_rate) else learning_rate
        xi = jnp.maximum(xi, 0)
        grads = treedef.flatten_up_to(updates)
        v = treedef.flatten_up_to(state.v)
        b = treedef.flatten_up_to(state.b)
        new_updates = []
        new_v = []
        new_b = []
        for leaf, g, w, v_old, b_old in zip(resolved(params), grads, leaves, v, b):
            require(
                g.shape == w.shape,
                f"{leaf.name}: a gradient of shape {g.shape} for a parameter {w.shape}",
            )
            require(
                v_old.shape == leaf.slot or shapes is not None or w.size == 0,
                f"{leaf.name}: the state has a slot of shape {v_old.shape}, the rules give "
                f"{leaf.slot}: was it made with other rules?",
            )
            update, v_new, b_new = update_leaf(
                at_least_float32(g),
                at_least_float32(w),
                v_old,
                b_old,
                t=count,
                xi=xi,
                eta=leaf.eta,
                shared=leaf.shared,
                mesh_axes=leaf.mesh_axes,
                **numbers,
            )
            new_updates.append(update.astype(jnp.result_type(g, w)))
            new_v.append(v_new.astype(v_old.dtype))
            new_b.append(b_new.astype(b_old.dtype))
        state = ScaleByAmosState(count, treedef.unflatten(new_v), treedef.unflatten(new_b))
        return treedef.unflatten(new_updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def mean_of_updates(momentum):
    """optax.ema in float32 at least; its first value is (1 - momentum) times the first update."""
    mean = optax.ema(momentum, debias=False)

    def init(params):
        return mean.init(jax.tree.map(lambda w: jnp.zeros_like(w, dtype=wide(w)), params))

    def update(updates, state, params=None):
        means, state = mean.update(jax.tree.map(at_least_float32, updates), state)
        return jax.tree.map(lambda x, u: x.astype(u.dtype), means, updates), state

    return optax.GradientTransformation(init, update)


def learning_rate_schedule(learning_rate, warmup=0, end=None, timescale=None):
    """A function of the step t = 1, 2 ..., as the official code has it.

    It is learning_rate times up to three factors: t / warmup, up to 1; after the warm-up, a linear
    fall from 1 to 0 at step `end`; and, from the first step on, sqrt(timescale / (t + timescale)).
    Raises ValueError for numbers out of range.
    """
    require(
        isinstance(learning_rate, jax.core.Tracer) or 0 <= learning_rate < math.inf,
        f"learning_rate={learning_rate} is not at least 0 and finite",
    )
    require(warmup >= 0, f"warmup={warmup} is not at least 0")
    require(end is None or warmup < end < math.inf, f"end={end} is not after warmup={warmup}")
    require(
        timescale is None or 0 < timescale < math.inf,
        f"timescale={timescale} is not above 0 and finite",
    )

    def rate(t):
        xi = learning_rate
        if warmup:
            xi = xi * jnp.minimum(1, t / warmup)
        if end:
            xi = xi * jnp.clip((end - t) / (end - warmup), 0, 1)
        if timescale:
            xi = xi * jnp.sqrt(timescale / (t + timescale))
        return xi

    return rate


# ==== Checks and dtypes ===========================================================================


def wide(x):  # same in every file
    """The dtype in which to compute with x: float32, or x's own if that is wider."""
    return jax.dtypes.canonicalize_dtype(np.promote_types(x.dtype, np.float32))


def at_least_float32(x):  # same in every file
    """x cast to the dtype wide(x)."""
    return x.astype(wide(x))


def check_numbers(numbers: dict):
    """Raises ValueError for a number out of range, unless it is traced, or below 32 bits."""
    ranges = {"beta": (0, 1), "epsilon": (2.0**-126, 1)}  # smaller ones are 0 on many devices
    for name, value in numbers.items():
        if callable(value):  # a schedule
            continue
        lowest, below = ranges.get(name, (0, math.inf))
        if not isinstance(value, jax.core.Tracer):
            require(
                lowest <= float(value) < below,
                f"{name}={value} is not at least {lowest:g} and below {below}",
            )
        dtype = jnp.dtype(getattr(value, "dtype", jnp.float32))
        require(
            dtype.itemsize >= 4,  # in bfloat16 a beta of 0.999 is 1
            f"{name} is {dtype}: use inject_hyperparams(..., hyperparam_dtype=jnp.float32)",
        )


def check_parts(params, shapes, specs):
    """Raises ValueError unless the parts of a device, in shard_map, fit the whole and its specs."""
    for w, whole, spec in zip(params, shapes, specs):
        part = list(whole.shape)
        for i, axes in enumerate(spec):
            part[i] //= math.prod(lax.axis_size(axis) for axis in jax.tree.leaves(axes))
        require(
            w.shape == tuple(part),
            f"shapes= and specs= say that a device has {tuple(part)} of {whole.shape}, by {spec}; "
            f"it has {w.shape}",
        )


# ==== Rules: eta and slots by name ================================================================

# Axes of a kernel, which has its inputs first.
ALL = slice(None)
FIRST = slice(0, 1)
LAST = slice(-1, None)
ALL_BUT_LAST = slice(0, -1)
SECOND_LAST = slice(-2, -1)


class Rule(NamedTuple):
    """eta and slots of the parameters whose path ends as the regular expression `path` says."""

    path: str
    axes: slice  # those whose entries share one number in v and b; an axis of layers is not counted
    eta: float | None = None  # None: sqrt(gain / n), where n entries share a number
    gain: float = 1.0


# If the inputs of a layer have scale 1, so have its outputs when the entries of its kernel have the
# scale sqrt(1 / n), n the number of inputs; sqrt(2 / n) if half of the inputs are near zero, as
# after a GELU or ReLU. Scale, bias, embedding (of width n) and the MLP's second kernel are as in
# the official code for BERT. The others follow the same reasons for the names of vit.py, mixer.py
# and moe.py.
TRANSFORMER = (
    Rule("scale", ALL, eta=1.0),  # of LayerNorm
    Rule("bias", ALL, eta=0.5),
    Rule("relpos_embed|rel_embedding", LAST, eta=0.5),  # relative positions
    Rule("embedding|pos_embedding|position|class|cls", LAST, gain=2),
    Rule("experts/dense1/kernel", SECOND_LAST),  # [E,D,F]: of each expert's own inputs
    Rule("experts/dense2/kernel", SECOND_LAST, gain=2),
    Rule("(query|key|value|qkv)/kernel", FIRST),  # [D,H,K], [D,3,H,K] or [D,D]
    Rule("(mlp2|dense2|wo|Dense_1)/kernel", ALL_BUT_LAST, gain=2),
    Rule("kernel", ALL_BUT_LAST),  # also [H,K,D], behind attention, and patches [h,w,C,D]
)


def eta_rules(rules=TRANSFORMER, stacked="blocks/"):
    """eta_fn by the first Rule that fits.

    Parameters below `stacked` have a leading axis of layers, which counts for nothing, unless the
    path goes on with a number, as for a list of layers: "blocks/0/kernel", but not
    "blocks/layer_0/kernel". None: no parameter has one. A kernel whose name is not in the table is
    assumed to have its inputs first; examples/amos_rules.py shows how to print what was resolved.
    Raises ValueError for a path that no rule fits, and if a rule leaves no axis to count.
    """

    def eta_fn(path, shape):
        rule, axes = find_rule(rules, stacked, path, shape)
        if rule.eta is not None:
            return rule.eta
        require(axes, f"{'/'.join(path)} {tuple(shape)}: the rule {rule.path} leaves no axis")
        n = math.prod(shape[i] for i in axes)
        return math.sqrt(rule.gain / max(n, 1))

    return eta_fn


def slot_rules(rules=TRANSFORMER, stacked="blocks/"):
    """shape_fn by the first Rule that fits; see eta_rules.

    A kernel has one number for each output unit, an embedding one for each row; a parameter all of
    whose entries share one has the shape ().
    """

    def shape_fn(path, shape):
        _, axes = find_rule(rules, stacked, path, shape)
        if len(axes) == len(shape):
            return ()
        return tuple(1 if i in axes else size for i, size in enumerate(shape))

    return shape_fn


def find_rule(rules, stacked, path, shape):
    """The first Rule that fits a path, and the axes that share a number."""
    name = "/".join(path)
    first = 0
    if stacked and re.search(rf"(^|/){re.escape(stacked.rstrip('/'))}/(?!\d+/)", name):
        first = 1
    for rule in rules:
        if re.fullmatch(rf"(.*/)?({rule.path})", name):
            return rule, range(first, len(shape))[rule.axes]
    known = ", ".join(rule.path for rule in rules)
    raise ValueError(f"no rule fits {name or 'the parameter'} {tuple(shape)}: there are {known}")


class Leaf(NamedTuple):
    """What is fixed about a parameter before the first step."""

    name: str  # its path, such as "blocks/mlp/dense1/kernel"
    eta: float
    slot: tuple  # shape of v and b
    shared: tuple  # axes whose entries share one number
    mesh_axes: tuple  # inside shard_map: mesh axes over which shared axes are sharded


def resolve(params, eta_fn, shape_fn=None, specs=None) -> list:
    """The Leaf of each parameter, in the order of jax.tree.leaves.

    params: a tree of arrays, or of anything with shape and dtype. eta_fn, shape_fn, specs and
    errors: see scale_by_amos.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    cuts = [P()] * len(leaves) if specs is None else treedef.flatten_up_to(specs)
    found = []
    for (path, w), spec in zip(leaves, cuts):
        path = names_of(path)
        name = "/".join(path) or "the parameter"
        check_parameter(name, w)
        shape = tuple(w.shape)
        eta = eta_of(eta_fn, path, shape)
        require(0 < eta < math.inf, f"{name} {shape}: eta={eta} is not above 0 and finite")
        slot = shape if shape_fn is None else tuple(shape_fn(path, shape))
        shared = shared_axes(name, shape, slot)
        cut = [spec[i] for i in shared if i < len(spec)]  # None, a name or a tuple of names each
        found.append(Leaf(name, eta, slot, shared, tuple(jax.tree.leaves(cut))))
    return found


def names_of(path):
    """The strings of a path of jax.tree_util, without the attribute "value" at its end.

    Flax has parameters in boxes with that attribute. A field "value" of your own is dropped, too.
    """
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def check_parameter(name, w):
    """Raises ValueError unless w is an array of real numbers."""
    require(hasattr(w, "dtype"), f"{name} is {w!r}, not an array")
    require(
        not jnp.issubdtype(w.dtype, jnp.complexfloating),
        f"{name} is {w.dtype}: wrap the optimizer in optax.contrib.split_real_and_imaginary",
    )
    require(
        jnp.issubdtype(w.dtype, jnp.floating),
        f"{name} is {w.dtype}, not a float: leave it out with optax.masked",
    )


def eta_of(eta_fn, path, shape):
    """eta_fn's number as a float of Python, under jit as well."""
    with jax.ensure_compile_time_eval():
        return float(eta_fn(path, shape) if callable(eta_fn) else eta_fn)


def shared_axes(name, shape, slot):
    """The axes along which a slot is shorter than its parameter.

    Raises ValueError for a slot that does not fit.
    """
    if slot == ():
        return tuple(range(len(shape)))
    require(
        len(slot) == len(shape) and all(m in (1, n) for m, n in zip(slot, shape)),
        f"{name} {shape}: a slot of shape {slot} is neither () nor, axis by axis, 1 or as long",
    )
    return tuple(i for i, size in enumerate(shape) if slot[i] < size)


def zero_slot(w, leaf: Leaf):
    """v or b before the first step: made from the parameter, so that it is sharded like it."""
    zeros = jnp.zeros_like(w, dtype=wide(w))
    return zeros.sum(leaf.shared, keepdims=leaf.slot != ())


# ==== Sharding: slots like their parameters =======================================================


def trimmed_spec(axes):  # same in every file
    """PartitionSpec without None at the end, as jit returns it; any other recompiles a step."""
    axes = list(axes)
    while axes and axes[-1] is None:
        axes.pop()
    return P(*axes)


def slot_spec(slot, spec, param):  # same in every file
    """The PartitionSpec of a slot, an optimizer's array for one weight, such as Adam's mean.

    It is that of the weight, on the axes where their sizes agree.
    """
    if slot.ndim != param.ndim:
        return P()
    axes = []
    for i, axis in enumerate(tuple(spec)):
        axes.append(axis if slot.shape[i] == param.shape[i] else None)
    return trimmed_spec(axes)


def state_specs(optimizer, params, specs):
    """The PartitionSpecs of an optimizer's state, a tree like optimizer.init(params).

    params: the whole parameters, or their shapes; specs: a tree of their PartitionSpecs. Under jit
    slots are sharded like their parameters by themselves; only jax.jit(optimizer.init) needs these
    as out_shardings. In shard_map each device updates its part, with one all-reduce for each
    parameter that is sharded along an axis which shares a number. The gradients must be averaged
    over the devices already:

        optimizer = amos(..., shapes=params, specs=specs)
        opt_specs = state_specs(optimizer, params, specs)
        update = jax.shard_map(
            optimizer.update,
            mesh=mesh,
            in_specs=(specs, opt_specs, specs),
            out_specs=(specs, opt_specs),
        )
    """
    return optax.tree_map_params(
        optimizer,
        slot_spec,
        jax.eval_shape(optimizer.init, params),
        specs,
        params,
        transform_non_params=lambda _: P(),
    )


# ==== Demo: AdamW and Amos train an MLP on digits =================================================

WIDTH = 128  # hidden units in each of two layers
HELD_OUT = 1000  # digits
BATCH = 64
STEPS = 600
SEEDS = 5
LOOKS = 12  # at the held-out digits in a run
RATES = {"AdamW": (0.001, 0.002, 0.004), "Amos": (0.02, 0.04, 0.08)}
EXPECTED = -0.02  # nats, held-out loss of Amos less that of AdamW, with the default flags
CEILING = 0.0
DIGITS_RULES = (
    Rule("bias", ALL, eta=0.5),
    Rule("dense1/kernel", ALL_BUT_LAST, gain=8),  # most pixels are near zero
    Rule("dense2/kernel", ALL_BUT_LAST, gain=2),  # behind a ReLU
    Rule("dense3/kernel", ALL_BUT_LAST, gain=1),  # as in the official network for MNIST
)


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
    """Digits to train on; the last HELD_OUT, or a fifth if there are few, are held out."""
    images, labels = load_digits(path)
    images = images.reshape(len(images), -1).astype(np.float32) / 255
    count = len(images) - min(HELD_OUT, len(images) // 5)
    data = Data(images[:count], labels[:count], images[count:], labels[count:])
    return jax.tree.map(jnp.asarray, data)


def optimizers(steps):
    """name -> function of the learning rate. Both have one schedule and one decay of squares."""

    def adamw(rate):
        schedule = learning_rate_schedule(rate, steps // 10, steps + 1)
        return optax.adamw(lambda count: schedule(count + 1), b2=0.98, weight_decay=0.01)

    def amos_with_slots(rate):
        schedule = learning_rate_schedule(rate, steps // 10, steps + 1)
        return amos(schedule, eta_rules(DIGITS_RULES), slot_rules(DIGITS_RULES), beta=0.98)

    return {"AdamW": adamw, "Amos": amos_with_slots}


def init_mlp(key):
    """Weights of an MLP with two hidden layers, of scale sqrt(1 / n) for n inputs."""
    sizes = (28 * 28, WIDTH, WIDTH, 10)
    params = {}
    for i, (n, m) in enumerate(zip(sizes, sizes[1:]), 1):
        kernel = jax.random.normal(jax.random.fold_in(key, i), (n, m)) / math.sqrt(n)
        params[f"dense{i}"] = {"kernel": kernel, "bias": jnp.zeros(m)}
    return params


def mlp_loss(params, images, labels):
    """Softmax cross-entropy of the MLP in nats, the mean over the rows."""
    x = images
    for name in ("dense1", "dense2"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    logits = x @ params["dense3"]["kernel"] + params["dense3"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(name, data: Data, steps, seed):
    """Trains a network for each learning rate and each of SEEDS starts, all at once by vmap.

    Returns the steps after which they were examined; held-out losses [R,S,looks]; the root mean
    square of each parameter at the end, a tree of arrays [R,S]; and the bytes of one network's
    slots. Raises FloatingPointError if no learning rate has a finite mean loss.
    """
    make = optimizers(steps)[name]
    rates = jnp.repeat(jnp.array(RATES[name]), SEEDS)
    init_key, step_key = jax.random.split(jax.random.key(seed))
    init_keys = jnp.tile(jax.random.split(init_key, SEEDS), len(RATES[name]))
    step_keys = jnp.tile(jax.random.split(step_key, SEEDS), len(RATES[name]))

    def start(rate, key):
        params = init_mlp(key)
        return params, make(rate).init(params)

    def go_on(state, rate, key, first, last):
        def step(i, state):
            params, opt_state = state
            rows = jax.random.randint(jax.random.fold_in(key, i), (BATCH,), 0, len(data.images))
            grads = jax.grad(mlp_loss)(params, data.images[rows], data.labels[rows])
            updates, opt_state = make(rate).update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        state = lax.fori_loop(first, last, step, state)
        return state, mlp_loss(state[0], data.held_out_images, data.held_out_labels)

    state = jax.jit(jax.vmap(start))(rates, init_keys)
    go_on = jax.jit(jax.vmap(go_on, in_axes=(0, 0, 0, None, None)))
    part = max(1, steps // LOOKS)
    after = []
    losses = []
    started = time.time()
    for first in range(0, steps, part):
        last = min(first + part, steps)
        state, loss = go_on(state, rates, step_keys, first, last)
        loss = np.asarray(loss).reshape(-1, SEEDS)
        means = loss.mean(1)
        if not np.isfinite(means).any():
            raise FloatingPointError(f"step {last}: no learning rate has a finite loss")
        after.append(last)
        losses.append(loss)
        left = (time.time() - started) / last * (steps - last)
        best = np.nanmin(means)
        print(f"{name}: step {last}/{steps}  loss {best:.3f} nats  {left:.0f} s left", flush=True)
    params, opt_state = state
    scales = jax.tree.map(
        lambda w: jnp.sqrt(jnp.square(w).mean(tuple(range(1, w.ndim)))).reshape(-1, SEEDS), params
    )
    slot_bytes = sum(x.nbytes for x in jax.tree.leaves(opt_state)) // len(rates)
    return after, np.stack(losses, -1), scales, slot_bytes


def draw(path, curves, scales):
    """Left: held-out loss at the best rates. Right: the scale of each parameter beside its eta.

    curves: name -> (steps, losses [S,looks]); scales: name -> a tree of numbers.
    """
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    leaves = resolve(jax.eval_shape(init_mlp, jax.random.key(0)), eta_rules(DIGITS_RULES))
    rows = range(len(leaves))
    right.plot([leaf.eta for leaf in leaves], rows, "k|", markersize=12, label="eta")
    for name, (steps, losses) in curves.items():
        left.plot(steps, losses.mean(0), label=name)
        left.fill_between(steps, losses.min(0), losses.max(0), alpha=0.2)
        right.plot(jax.tree.leaves(scales[name]), rows, "o", label=name)
    left.set(xlabel="step", ylabel="held-out loss in nats", title="Mean of the seeds, range")
    left.set_yscale("log")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    right.set(xlabel="root mean square of the entries", title="Scale of each parameter")
    right.set_xscale("log")
    right.set_xticks([], minor=True)
    right.set_xticks([0.03, 0.1, 0.3], ["0.03", "0.1", "0.3"])
    right.set_ylim(-0.5, len(leaves) + 1)  # with room for the legend
    right.set_yticks(rows, [leaf.name for leaf in leaves])
    left.legend()
    right.legend(loc="upper left")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv=None) -> int:
    """Returns the exit status: 1 above CEILING or if no loss is finite, 2 for bad input."""
    parser = argparse.ArgumentParser(description="Trains on digits with AdamW and with Amos.")
    data_path = str(pathlib.Path(__file__).parent / "data/mnist5k.npz")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", default=data_path, help=".npz of digits")
    parser.add_argument("--out", default="amos.png", help="where to draw the figure")
    args = parser.parse_args(argv)
    try:
        require(args.steps >= 1, f"--steps {args.steps} is not at least 1")
        require(0 <= args.seed < 2**32, f"--seed {args.seed} is not in 0 to {2**32 - 1}")
        check_out(args.out)
        data = read_data(args.data)
    except ValueError as error:
        print(f"amos.py: {error}", file=sys.stderr)
        return 2

    print(f"{len(data.labels)} digits, {len(data.held_out_labels)} held out, {SEEDS} seeds")
    last = {}
    curves = {}
    scales = {}
    for name, rates in RATES.items():
        try:
            steps, losses, found, slot_bytes = train(name, data, args.steps, args.seed)
        except FloatingPointError as error:
            print(f"amos.py: {name}, {error}", file=sys.stderr)
            return 1
        means = losses[:, :, -1].mean(1)  # [R]
        best = int(np.nanargmin(means))
        last[name] = means[best]
        curves[name] = steps, losses[best]
        scales[name] = jax.tree.map(lambda x, best=best: float(x[best].mean()), found)
        table = ", ".join(f"{rate:g}: {mean:.3f}" for rate, mean in zip(rates, means))
        print(f"{name}: held-out loss by learning rate {table} nats; {slot_bytes:,} bytes of slots")
    got = last["Amos"] - last["AdamW"]
    defaults = (args.steps, args.seed, args.data) == (STEPS, 0, data_path)
    if defaults:
        expected = f"expected {EXPECTED} nats, at most {CEILING} nats"
    else:
        expected = "expected unknown, at most unknown"
    print(f"result: held-out loss of Amos less that of AdamW: got {got:.3f} nats, {expected}")
    try:
        draw(args.out, curves, scales)
        print(f"wrote {args.out}")
    except Exception as error:  # matplotlib is missing, or it cannot draw here
        print(f"no figure: {type(error).__name__}: {error}")
    return int(defaults and not got <= CEILING)


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
