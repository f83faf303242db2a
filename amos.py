"""Amos: an Adam whose learning rates and weight decay come from the scale that each weight should have.

Paper     Tian & Parikh 2022, "Amos: An Adam-style Optimizer with Adaptive Weight Decay towards
          Model-Oriented Scale", arXiv:2210.11693 v2.
Here      The update rule with its decays and reduced slots, eta and slots for the paper's models, schedules,
          hints for learning rate and beta; the race against AdamW on masked language modelling, as BERT.
Not here  Fine-tuning, data pipelines, --distributed.
Differs   From the official code: slots are at least float32 (there a beta of 0.999 is 1 in bfloat16, and a
          schedule changes the state's dtype); schedules end at 0, not below (there NaN); any pytree; rules
          without expressions in strings; a slot that does not fit is refused at init, not at update.
          As there and unlike optax: schedules count from 1, clipping is elementwise, momentum is of updates.
Claims    C1 the official code's steps   C2 slots take 51 % of AdamW's bytes with momentum, 0.2 % without
          C3 weights move towards scale eta, ever more slowly   C4 fewer steps than AdamW to the same loss
          C5 a gradient times a constant changes nothing   C6 optax's wrappers take it
          C7 scaling by a rate once more, or decay once more, is wrong
Checked   google-research/jestimator @ 326824a, amos.py and amos_helper.py: 14 runs of 20 or 30
          steps; parameters within 2.4e-7, updates within 1.8e-7.
Read      update_leaf, scale_by_amos, amos, TRANSFORMER, resolve, slot_specs, make_update
Run       python amos.py   84 s on two CPU cores: held-out loss, Amos less AdamW: -0.01 nats, at most 0.03
Axes      B batch  T tokens  D width  H heads  K head size  F hidden units of MLP  L blocks, stacked
          V tokens there are.  In shard_map B is a size per device.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import gzip
import json
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
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P


# ==== Config ================================================================================================
def require(ok, message):  # same in every file
    """Raises ValueError(message) unless ok."""
    if not ok:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class Config:
    """The demo's masked language model of bytes, a small BERT. ValueError for what cannot be built."""

    width: int = 64
    depth: int = 2
    heads: int = 2
    mlp: int = 256
    length: int = 64  # T, bytes in a window

    def __post_init__(self):
        sizes = self.width, self.depth, self.heads, self.mlp, self.length
        fits = min(sizes) >= 1 and self.width % self.heads == 0
        require(fits, f"width, depth, heads, mlp, length={sizes}: at least 1, and width a multiple of heads")


# ==== State =================================================================================================
class ScaleByAmosState(NamedTuple):
    """count int [], steps done; v and b, trees like the parameters, of slots."""

    count: jax.Array
    v: Any  # running mean of the squared gradient, not corrected for its start
    b: Any  # sum of the decay so far: slows steps and decay


# What is static about a parameter: its path, "a/b"; its shape; the scale of its entries; the shape of its v
# and b; the axes that share one number; the mesh axes over which these are cut (inside shard_map)
Leaf = collections.namedtuple("Leaf", "name shape eta slot reduced mesh_axes")


def resolve(params, eta_fn, shape_fn=None, specs=None) -> list:
    """The Leaf of each parameter, in the order of jax.tree.leaves. params: a tree of arrays [...], or of what
    else has shape and dtype. eta_fn: a function of (path, shape), a number, or a tree of numbers. shape_fn:
    a function, None for slots like the parameters. specs: the PartitionSpecs of the parameters, if cut.
    ValueError that names the leaf: eta not above 0, a slot that does not fit, a parameter of integers."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    same = jax.tree_util.treedef_is_leaf(jax.tree.structure(eta_fn))  # one for all, else a tree
    etas = [eta_fn] * len(leaves) if same else tree.flatten_up_to(eta_fn)
    cuts = [P()] * len(leaves) if specs is None else tree.flatten_up_to(specs)
    return [resolve_leaf(path, x, eta, shape_fn, spec) for (path, x), eta, spec in zip(leaves, etas, cuts)]


def resolve_leaf(path, x, eta, shape_fn, spec) -> Leaf:
    """The Leaf of one parameter x [...], cut by spec."""
    names = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
    name = "/".join(names) or "the parameter"
    require(hasattr(x, "dtype"), f"{name} is {x!r}, not an array")
    shape = tuple(x.shape)
    require(jnp.issubdtype(x.dtype, jnp.floating), f"{name} is {x.dtype}, not a float: see optax.masked")
    eta = float(eta(names, shape) if callable(eta) else eta)
    require(0 < eta < math.inf, f"{name} {shape}: eta={eta} is not above 0 and finite")
    slot = tuple(shape_fn(names, shape)) if shape_fn else shape
    fits = slot == () or (len(slot) == len(shape) and all(m in (1, n) for m, n in zip(slot, shape)))
    require(fits, f"{name} {shape}: a slot of shape {slot} is neither () nor, axis by axis, 1 or as long")
    reduced = tuple(i for i, n in enumerate(shape) if slot == () or slot[i] < n)
    cuts = [spec[i] for i in reduced if i < len(spec)]  # None, a name or a tuple of names each
    return Leaf(name, shape, eta, slot, reduced, tuple(jax.tree.leaves(cuts)))


# ==== The idea: the step is a share of the scale that a weight should have ==================================
def wide(x):  # same in every file
    """The dtype in which to compute with x: float32, or x's own if that is wider."""
    return jax.dtypes.canonicalize_dtype(np.promote_types(x.dtype, np.float32))


def at_least_float32(x):  # same in every file
    """x cast to the dtype wide(x)."""
    return x.astype(wide(x))


def update_leaf(leaf, g, w, v, b, xi, t, *, beta, extra_l2, d_coef, c_coef, epsilon):
    """Step t = 1, 2 ... of one parameter w [...] with gradient g [...]: what to add to w, new v, new b.
    xi is the learning rate: where Adam moves an entry by about xi, this moves it by xi * eta."""
    require(g.shape == w.shape, f"{leaf.name}: a gradient of shape {g.shape} for a parameter {w.shape}")
    kind, g, w, eta = g.dtype, at_least_float32(g), at_least_float32(w), leaf.eta
    # M2(g)^2 of the paper: mean square over the axes that share a slot
    g2 = jnp.square(g).mean(leaf.reduced, keepdims=leaf.slot != ()) if g.size else jnp.zeros(leaf.slot)
    g2 = lax.pmean(g2, leaf.mesh_axes) if leaf.mesh_axes else g2  # mean over the parts of a cut axis
    v = beta * v + (1 - beta) * g2
    inverse = (1 - beta**t) / jnp.maximum(v, epsilon)  # 1 / v_hat, as in Adam
    c = 1 / jnp.sqrt(1 + c_coef * jnp.sqrt(xi) * b)  # weight decay fades as b grows
    d = 1 / (1 + d_coef * jnp.sqrt(xi * eta) * b)  # and so do steps and decay together
    gamma = c * xi**2 * inverse * g2  # no eta in it: so w comes to rest near eta
    delta = d * (xi * eta * jnp.sqrt(inverse) * g + (gamma / 2 + extra_l2) * w)
    b = b + gamma * (1 + b)
    return -delta.astype(kind), v.astype(wide(w)), b.astype(wide(w))


def check_numbers(numbers: dict):
    """ValueError for a number out of range, as far as it is known, or of a type that cannot hold it."""
    for name, x in numbers.items():
        low, high = 2.0**-126 * (name == "epsilon"), 1 if name in ("beta", "epsilon") else math.inf
        if not callable(x) and not isinstance(x, jax.core.Tracer):
            require(low <= float(x) < high, f"{name}={x} is not at least {low:g} and below {high}")
        kind = jnp.dtype(getattr(x, "dtype", jnp.float32))  # in bfloat16 a beta of 0.999 is 1
        fits = kind.itemsize >= 4
        require(fits, f"{name} is {kind}: use inject_hyperparams(..., hyperparam_dtype=jnp.float32)")


def scale_by_amos(
    learning_rate, eta_fn, shape_fn=None, beta=0.999, extra_l2=0.0, d_coef=0.25, c_coef=0.25,
    epsilon=2.0**-125, *, shapes=None, specs=None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """The update rule as an optax transformation. Its updates are added as they are.

    learning_rate   xi, about 1 / sqrt(number of batches in the data), or a function of the step 1, 2 ...
    eta_fn          scale of a parameter's entries: (path, shape) -> float, as eta_rules gives; or a number,
                    or a tree of numbers. path is a tuple of strings
    shape_fn        shape of v and b: (path, shape) -> tuple, () or 1 where an axis shares one, as slot_rules
                    gives; None: that of the parameter, twice its memory
    beta            of the mean of squared gradients; choose 1 - beta near xi
    extra_l2        added to the decay, not times the learning rate
    d_coef, c_coef  how fast steps, and decay, fade
    shapes, specs   inside shard_map: trees of the whole parameters, or their shapes, and of PartitionSpecs;
                    a shard's own shape would give another eta, unnoticed with check_vma=False. init: outside
    optax.inject_hyperparams needs static_args=("eta_fn", "shape_fn") and, for amos, "momentum", "clip_value";
    a schedule then counts from 0. ValueError as in resolve, for numbers out of range, and without params."""
    numbers = {"beta": beta, "extra_l2": extra_l2, "d_coef": d_coef, "c_coef": c_coef, "epsilon": epsilon}
    check_numbers({"learning_rate": learning_rate} | numbers)
    require((shapes is None) == (specs is None), "shapes= and specs= need each other")

    def rules(params):
        same = shapes is None or jax.tree.structure(shapes) == jax.tree.structure(params)
        require(same, "shapes= is another tree than the parameters")
        return resolve(params if shapes is None else shapes, eta_fn, shape_fn, specs)

    def init(params):
        leaves, tree = jax.tree.flatten(params)
        rows = list(zip(rules(params), leaves))
        zeros = lambda: tree.unflatten(jnp.zeros(leaf.slot, wide(x)) for leaf, x in rows)
        return ScaleByAmosState(jnp.zeros([], jnp.int32), zeros(), zeros())

    def update(updates, state, params=None, **extra):
        known = params is not None
        require(known, "amos requires the current value of parameters: update(gradients, state, params)")
        leaves, tree = jax.tree.flatten(params)
        cut = shapes is None and any(jax.typeof(x).mat.varying for x in leaves)
        require(not cut, "amos inside shard_map needs shapes= and specs= of the whole parameters")
        count = optax.safe_increment(state.count)
        xi = learning_rate(count) if callable(learning_rate) else learning_rate
        rows = zip(rules(params), *(tree.flatten_up_to(x) for x in (updates, params, state.v, state.b)))
        columns = list(zip(*(update_leaf(*row, xi, count, **numbers) for row in rows))) or [()] * 3
        updates, v, b = map(tree.unflatten, columns)
        return updates, ScaleByAmosState(count, v, b)

    return optax.GradientTransformationExtraArgs(init, update)


def amos(
    learning_rate, eta_fn, shape_fn=None, beta=0.999, momentum=None, clip_value=None, extra_l2=0.0,
    d_coef=0.25, c_coef=0.25, epsilon=2.0**-125, *, shapes=None, specs=None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """The optimizer: gradients clipped entry by entry to +-clip_value, scale_by_amos with its arguments, and
    a running mean of the updates (a slot of the parameter's size). momentum, clip_value: None or 0: without.
    The learning rate and the weight decay are in it: do not chain optax.scale or add_decayed_weights."""
    require(not momentum or momentum < 1, f"momentum={momentum} is not below 1")
    parts, numbers = [], (beta, extra_l2, d_coef, c_coef, epsilon)
    if clip_value and clip_value > 0:
        parts.append(optax.clip(clip_value))
    parts.append(scale_by_amos(learning_rate, eta_fn, shape_fn, *numbers, shapes=shapes, specs=specs))
    if momentum and momentum > 0:
        mean = optax.ema(momentum, debias=False)  # its first value is 1 - momentum of the first update

        def update(updates, state, params=None):  # a mean in float32 of updates in the gradients' type
            new, state = mean.update(updates, state)
            return jax.tree.map(lambda x, old: x.astype(old.dtype), new, updates), state

        init = lambda params: mean.init(jax.tree.map(at_least_float32, params))
        parts.append(optax.GradientTransformation(init, update))
    return optax.chain(*parts) if len(parts) > 1 else parts[0]


def learning_rate_schedule(learning_rate, warmup=0, end=None, timescale=None):
    """Learning rate at step t = 1, 2 ...: up to learning_rate in `warmup` steps, then constant, or down to 0
    at step `end` and after, or times sqrt(timescale / (t + timescale)). ValueError for one below 0."""
    known = not isinstance(learning_rate, jax.core.Tracer)
    require(not known or 0 <= learning_rate < math.inf, f"learning_rate={learning_rate} is not at least 0")
    require(end is None or end > warmup, f"end={end} is not after warmup={warmup}")
    require(timescale is None or timescale > 0, f"timescale={timescale} is not above 0")

    def rate(t):
        rise = jnp.minimum(1, t / warmup) if warmup else 1
        fall = jnp.clip((end - t) / (end - warmup), 0, 1) if end else 1
        return learning_rate * rise * fall * (jnp.sqrt(timescale / (t + timescale)) if timescale else 1)

    return rate


def suggest(batches) -> dict:
    """learning_rate and beta for data of so many batches: 1 / sqrt(batches); 1 minus it, at most 0.999."""
    require(batches >= 2, f"batches={batches} is not at least 2")
    return {"learning_rate": batches**-0.5, "beta": min(1 - batches**-0.5, 0.999)}


# Rules for a kind of model: name of a parameter -> (its eta from the fan-in n, the input axes: their product
# is n, and they share a slot). The first that fits the end of the path counts. Kernels have inputs first.
constant, root = (lambda value: lambda n: value), (lambda gain: lambda n: math.sqrt(gain / n))
ALL, FIRST, LAST, BUT_LAST = slice(None), slice(0, 1), slice(-1, None), slice(0, -1)
TRANSFORMER = {  # as the official BERT, RoPE and RPE. Mixer as well: both of its MLPs are of this kind
    "scale": (constant(1.0), ALL),  # of LayerNorm
    "relpos_embed|rel_embedding": (constant(0.5), LAST),  # relative positions
    "bias": (constant(0.5), ALL),
    "embedding|pos_embedding|position|class|cls": (root(2), LAST),  # two or three are added up, then a norm
    "(query|key|value|qkv)/kernel": (root(1), FIRST),  # [D,H,K], [D,3,H,K], or [D,D]
    "(mlp2|dense2|wo|Dense_1)/kernel": (root(2), BUT_LAST),  # half of its inputs are near 0
    "kernel": (root(1), BUT_LAST),  # out [H,K,D], mlp1, head, patches [h,w,C,D]
}
CONVOLUTION = {  # of the official MNIST network: pixels are mostly 0, other inputs half of the time (ReLU)
    "scale": (constant(1.0), ALL),
    "bias": (constant(0.5), ALL),
    "Conv_0/kernel": (root(8), BUT_LAST),
    "(Dense_1|head)/kernel": (root(1), BUT_LAST),
    "kernel": (root(2), BUT_LAST),
}


def find_rule(table, stacked, path, shape):
    """eta, and the axes that share a slot. ValueError for a path that no rule names."""
    name = "/".join(path)
    # "blocks/0/kernel" is of one layer in a list of them
    first = int(bool(stacked and re.search(rf"(^|/){re.escape(stacked)}(?!\d+/)", name)))
    for pattern, (eta, inputs) in table.items():
        if re.fullmatch(rf"(.*/)?({pattern})", name):
            axes = range(first, len(shape))[inputs]
            return eta(max(1, math.prod(shape[i] for i in axes))), axes
    raise ValueError(f"no rule names {name} {tuple(shape)}: there are {', '.join(table)}")


def eta_rules(table=TRANSFORMER, stacked="blocks/"):
    """eta_fn of a table of rules. Parameters below `stacked`, if not in a list, have a leading axis of layers
    that counts for nothing: each layer has its own slots. None: there are no such."""
    return lambda path, shape: find_rule(table, stacked, path, shape)[0]


def slot_rules(table=TRANSFORMER, stacked="blocks/"):
    """shape_fn of a table of rules: one number for each output unit or each row of an embedding."""

    def slot(path, shape):
        axes = find_rule(table, stacked, path, shape)[1]
        return () if len(axes) == len(shape) else tuple(1 if i in axes else n for i, n in enumerate(shape))

    return slot


def describe_rules(params, eta_fn, shape_fn=None, momentum=None) -> str:
    """A line for each parameter [...]: path, shape, eta, shape and bytes of its slots; last the sum."""
    rows, total = [("parameter", "shape", "eta", "slots", "bytes")], 0
    for leaf, x in zip(resolve(params, eta_fn, shape_fn), jax.tree.leaves(params)):
        size = wide(x).itemsize * (2 * math.prod(leaf.slot) + bool(momentum) * math.prod(leaf.shape))
        total += size
        rows.append((leaf.name, str(leaf.shape), f"{leaf.eta:.4g}", f"2 x {leaf.slot}", f"{size:,}"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(n) for cell, n in zip(row, widths)).rstrip() for row in rows]
    adamw = sum(2 * wide(x).itemsize * math.prod(x.shape) for x in jax.tree.leaves(params))
    return "\n".join([*lines, f"{total:,} bytes of slots, {total / max(adamw, 1):.2%} of AdamW's {adamw:,}"])


# ==== Problem: masked language modelling, BERT's task, on bytes =============================================
MASK = 256  # the token that hides a byte


def param_table(config: Config) -> dict:
    """(shape, deviation) of each weight at first, blocks stacked on a leading axis L. None: all are 1."""
    L, D, H, F, V = config.depth, config.width, config.heads, config.mlp, MASK + 1
    norm = lambda *shape: {"scale": (shape, None), "bias": (shape, 0)}
    dense = lambda kernel, bias: {"kernel": (kernel, 0.02), "bias": (bias, 0)}  # 0.02: as BERT
    blocks = {"norm1": norm(L, D), "norm2": norm(L, D)}
    blocks |= {"qkv": dense((L, D, 3, H, D // H), (L, 3, H, D // H)), "out": dense((L, H, D // H, D), (L, D))}
    blocks |= {"mlp1": dense((L, D, F), (L, F)), "mlp2": dense((L, F, D), (L, D))}
    ends = {name: {"embedding": ((V, D), 0.02)} for name in ("here", "before", "after")}
    ends |= {"position": ((config.length, D), 0.02)}
    return ends | {"norm": norm(D), "blocks": blocks, "last": norm(D), "head": dense((D, V), (V,))}


def init_params(key: jax.Array, config: Config) -> dict:
    """Float32 weights. Nested dict, shapes as in param_table."""
    table, treedef = jax.tree.flatten(param_table(config), is_leaf=lambda x: isinstance(x, tuple))
    draw = lambda key, shape, s: jnp.ones(shape) if s is None else s * jax.random.normal(key, shape)
    return treedef.unflatten([draw(k, *row) for k, row in zip(jax.random.split(key, len(table)), table)])


def layer_norm(x, weights):  # same in every file
    """LayerNorm over the last axis, with the official epsilon. [...,D] -> [...,D]."""
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    y = (x - mean) * lax.rsqrt(variance + 1e-6)
    return y * weights["scale"] + weights["bias"]


def block(x, weights):
    """One block, every byte sees all of its window. [B,T,D] -> [B,T,D]."""
    y, qkv, out = layer_norm(x, weights["norm1"]), weights["qkv"], weights["out"]
    q, k, v = jnp.moveaxis(jnp.einsum("btd,dchk->btchk", y, qkv["kernel"]) + qkv["bias"], 2, 0)
    scores = jnp.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    y = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), v)
    x = x + jnp.einsum("bthk,hkd->btd", y, out["kernel"]) + out["bias"]
    y = layer_norm(x, weights["norm2"]).reshape(-1, x.shape[-1])  # [B*T,D]: twice as fast on a CPU
    y = jax.nn.gelu(y @ weights["mlp1"]["kernel"] + weights["mlp1"]["bias"])
    return x + (y @ weights["mlp2"]["kernel"] + weights["mlp2"]["bias"]).reshape(x.shape)


def forward(params, tokens):
    """Logits of the byte at each place. tokens int [B,T] -> [B,T,V]."""
    tables = [params[name]["embedding"] for name in ("here", "before", "after")]
    padded, T = jnp.pad(tokens, ((0, 0), (1, 1))), tokens.shape[1]
    neighbours = tokens, padded[:, :T], padded[:, 2:]  # without them a short run learns frequencies alone
    x = sum(table[ids] for table, ids in zip(tables, neighbours)) + params["position"][:T]
    x = layer_norm(x, params["norm"])
    x, _ = lax.scan(lambda x, weights: (block(x, weights), None), x, params["blocks"])
    return layer_norm(x, params["last"]) @ params["head"]["kernel"] + params["head"]["bias"]


def loss_fn(params, tokens, labels, *, data_axis=None):
    """Mean cross-entropy of the bytes asked for, in nats. tokens, labels int [B,T], -1: not asked -> []."""
    loss = optax.softmax_cross_entropy_with_integer_labels(forward(params, tokens), labels.clip(0))
    sums = jnp.stack([jnp.where(labels < 0, 0, loss).sum(), (labels >= 0).sum()])
    loss, count = lax.psum(sums, data_axis) if data_axis else sums  # sums over the rows of all devices
    return loss / count


# ==== Sharded training: the batch over mesh axis "data"; slots are cut as their parameters are ==============
def slot_specs(shapes, param_specs, shape_fn=None):
    """Tree of the PartitionSpecs of v and b: an axis that shares a number is not cut. shapes: the whole
    parameters [...], or anything with their shapes and types."""
    tree = jax.tree.structure(shapes)
    rows = zip(resolve(shapes, 1.0, shape_fn), tree.flatten_up_to(param_specs))
    cut = lambda leaf, spec: [None if i in leaf.reduced else axis for i, axis in enumerate(spec)]
    return tree.unflatten(P(*cut(leaf, spec)) if leaf.slot else P() for leaf, spec in rows)


def state_specs(optimizer, shapes, param_specs, shape_fn=None):
    """Tree of the PartitionSpecs of the state of amos(...), or of a chain of it and others that keep scalars.
    ValueError for arrays of another optimizer."""
    slots = slot_specs(shapes, param_specs, shape_fn)
    known = {ScaleByAmosState: (P(), slots, slots), optax.EmaState: (P(), param_specs)}

    def place(x):
        require(type(x) in known or x.shape == (), f"no specs are known for the {x} of another optimizer")
        return type(x)(*known[type(x)]) if type(x) in known else P()

    return jax.tree.map(place, jax.eval_shape(optimizer.init, shapes), is_leaf=lambda x: type(x) in known)


def make_update(optimizer, mesh, param_specs, specs):
    """Jitted (gradients, state, params) -> (updates, state), all [...] cut by param_specs and by the state's
    specs, each device at its own part. optimizer: amos(..., shapes=, specs=). One all-reduce for each
    parameter that is cut along an axis which shares a number of v."""
    arguments = {"in_specs": (param_specs, specs, param_specs), "out_specs": (param_specs, specs)}
    return jax.jit(jax.shard_map(optimizer.update, mesh=mesh, **arguments))


def loss_on_mesh(mesh):
    """loss_fn of a global batch: (params, tokens [B,T], labels [B,T]) -> scalar."""
    data_axis = "data" if mesh.shape["data"] > 1 else None  # 1 device: no collectives
    local = functools.partial(loss_fn, data_axis=data_axis)
    return jax.shard_map(local, mesh=mesh, in_specs=(P(), P(data_axis), P(data_axis)), out_specs=P())


def make_train_step(make_optimizer, mesh):
    """Jitted (params, opt_state, tokens [B,T], labels [B,T], rate) -> (params, opt_state, loss in nats),
    donating the first two. make_optimizer(rate) gives the optimizer: one compilation for a grid of rates."""
    # Differentiated from outside, through shard_map: that adds the gradients' collectives, none is written.
    value_and_grad = jax.value_and_grad(loss_on_mesh(mesh))

    def step(params, opt_state, tokens, labels, rate):
        loss, grads = value_and_grad(params, tokens, labels)
        updates, opt_state = make_optimizer(rate).update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.jit(step, donate_argnums=(0, 1))


# ==== Checkpoints: a training state, and what another tree can take of one ==================================
def check_names(found, expected, where):  # same in every file
    """Raises ValueError unless both dicts of arrays have the same names and shapes."""
    for name in sorted(expected):
        require(name in found, f"{where}: {name} is missing")
    for name in sorted(found):
        require(name in expected, f"{where}: {name} is unknown")
        got = np.shape(found[name])
        wanted = np.shape(expected[name])
        require(got == wanted, f"{where}: {name} has shape {got}, not {wanted}")


def write_npz(path, arrays):  # same in every file
    """Writes named arrays whole or not at all. Raises ValueError if they cannot be written."""
    partial = f"{path}.{os.getpid()}.part"
    try:
        with open(partial, "wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):  # after a success there is nothing to remove
            os.remove(partial)


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


def named_leaves(tree) -> dict:  # same in every file
    """Path -> leaf of any tree of arrays: {"blocks/mlp1/kernel": ...}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def save_state(path, tree, flags):  # same in every file
    """Writes a training state, any tree of arrays [...], and the flags that made it. Whole or not at all."""
    write_npz(path, {**named_leaves(tree), "flags": json.dumps(flags)})


def load_state(path, like, flags):  # same in every file
    """The tree of save_state, arrays [...] on the host. ValueError unless it fits like and the flags."""
    arrays = read_npz(path)
    saved = json.loads(str(arrays.pop("flags", "{}")))
    for name, value in flags.items():
        require(saved.get(name) == value, f"{path} was made with {name}={saved.get(name)}, not {value}")
    check_names(arrays, wanted := named_leaves(like), path)
    for name, leaf in wanted.items():
        kind = arrays[name].dtype
        require(kind.kind == "V" or kind == leaf.dtype, f"{path}: {name} is {kind}, should be {leaf.dtype}")
    leaves = [arrays[name].view(leaf.dtype) for name, leaf in wanted.items()]  # bfloat16 is read as raw bytes
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def restore(arrays, like, rename=lambda name: name):
    """The tree `like`, arrays [...], with what it can take of named arrays, under rename(its path) -> (tree,
    report). report: lists of paths taken as they are; resized, the common corner being copied; missing, kept
    as in like; and of names that are unused. ValueError for an array of another rank."""
    leaves, report = named_leaves(like), {"taken": [], "resized": [], "missing": []}
    report["unused"] = sorted(set(arrays) - {rename(name) for name in leaves})
    new = []
    for name, leaf in leaves.items():
        found = arrays.get(rename(name))
        if found is None:
            report["missing"].append(name)
            new.append(leaf)
            continue
        if found.dtype.kind == "V":  # as which numpy reads bfloat16
            found = found.view(jnp.bfloat16)
        fits = found.ndim == leaf.ndim
        require(fits, f"{name} {leaf.shape} cannot take {rename(name)} {found.shape}: another rank")
        report["taken" if found.shape == leaf.shape else "resized"].append(name)
        corner = tuple(slice(min(sizes)) for sizes in zip(found.shape, leaf.shape))
        new.append(jnp.asarray(leaf).at[corner].set(found[corner].astype(leaf.dtype)))
    return jax.tree.unflatten(jax.tree.structure(like), new), report


# ==== Demo ==================================================================================================
EXPECTED, MOST = -0.01, 0.03  # nats, Amos's last held-out loss less AdamW's, with the default flags
EVERY = 10  # steps between two looks at the held-out text
rate_of = lambda peak, steps: learning_rate_schedule(peak, steps // 10, steps + 1)
RULES = eta_rules(), slot_rules()
OPTIMIZERS = {  # one schedule for both, and 0.98 for both means of squared gradients
    "AdamW": lambda peak, steps: optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(lambda t: rate_of(peak, steps)(t + 1), b2=0.98, weight_decay=0.01),  # optax counts from 0
    ),
    "Amos": lambda peak, steps: amos(rate_of(peak, steps), *RULES, beta=0.98, clip_value=1.0),
}
Run = collections.namedtuple("Run", "name rate losses seconds scales")  # [looks], [looks], [leaves]


def load_text(path):  # same in every file
    """Bytes of a text, plain or .gz: uint8 [n], all but the last twentieth, and that. Or ValueError."""
    try:
        text = (gzip.decompress if str(path).endswith(".gz") else bytes)(pathlib.Path(path).read_bytes())
    except Exception as error:  # OSError, EOFError, zlib.error
        raise ValueError(f"--data {path} is no readable text, plain or .gz: {error}") from None
    return np.split(np.frombuffer(text, np.uint8), [len(text) - len(text) // 20])


def hide(text, seed, batch, length):
    """BERT's task: of 15 % of the bytes, 80 % are hidden, 10 % are others, 10 % stay; all are asked for.
    text uint8 [n] -> tokens, labels int [batch,length], -1: not asked."""
    rng = np.random.default_rng(seed)
    labels = text[rng.integers(len(text) - length, size=(batch, 1)) + np.arange(length)].astype(np.int32)
    asked, how = rng.random((2, batch, length))
    tokens = np.where(how < 0.8, MASK, np.where(how < 0.9, rng.integers(MASK, size=labels.shape), labels))
    return np.where(asked < 0.15, tokens, labels).astype(np.int32), np.where(asked < 0.15, labels, -1)


def check_flags(args):
    """The text, what is held out, the mesh. ValueError for a flag that is wrong."""
    fits = args.steps >= EVERY and args.steps % EVERY == 0
    require(fits, f"--steps {args.steps} is not a positive multiple of {EVERY}")
    require(args.batch >= 1, f"--batch {args.batch} is not at least 1")
    number = r"\d*\.?\d+(e-?\d+)?"
    for name, rates in (("adamw", args.adamw), ("amos", args.amos)):
        fits = re.fullmatch(f"{number}(,{number})*", rates) and min(map(float, rates.split(","))) > 0
        require(fits, f"--{name} {rates} is not of the form 0.01,0.02")
    (text, held), out, T = load_text(args.data), pathlib.Path(args.out), Config().length
    require(re.fullmatch(r"data=[1-9]\d*", args.mesh), f"--mesh {args.mesh} is not of the form data=4")
    devices = int(args.mesh[5:])
    fits = os.access(out.parent, os.W_OK) and out.suffix in (".png", ".pdf", ".svg")
    require(fits, f"--out {out} cannot be written: it needs a folder that is there and .png, .pdf or .svg")
    require(args.batch % devices == 0, f"--batch {args.batch} is not a multiple of data={devices}")
    require(len(held) > T, f"{args.data}: {len(held)} held-out bytes are fewer than {T + 1}")
    with contextlib.suppress(RuntimeError):  # too late, devices are in use: they are counted below
        jax.config.update("jax_num_cpu_devices", devices)
    count, kind = jax.device_count(), jax.default_backend()
    kind = f"{count} {kind} device(s)" + ", simulated" * (kind == "cpu" and count > 1)
    require(devices <= count, f"--mesh {args.mesh} asks for more than {kind}")
    return text, held, jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,)), kind


def root_mean_square(tree):
    """Of each leaf [...] of a tree: float [leaves]."""
    return np.array([np.sqrt(np.square(x).mean()) for x in map(np.asarray, jax.tree.leaves(tree))])


def run_steps(run: Run, state, step, loss, batches, held):
    """Fills in losses and seconds of a run that begins at (params, opt_state) [...], and its last scales.
    batches: step -> tokens, labels [B,T] on the mesh; held: a list of such, to look at."""
    seconds = 0.0
    for i in range(EVERY * len(run.losses)):
        started, batch = time.time(), batches(i)
        *state, last = step(*state, *batch, run.rate)
        last = float(last)
        seconds += time.time() - started
        if not np.isfinite(last):
            print(f"{run.name} {run.rate:g}, step {i + 1}: the loss is {last}; stopped")
            break
        if (i + 1) % EVERY == 0:
            run.losses[i // EVERY] = np.mean([float(loss(state[0], *batch)) for batch in held])
            run.seconds[i // EVERY] = seconds
    run.scales[:] = root_mean_square(state[0])


def race(args, flags, text, held, mesh, kind):
    """A Run for each optimizer and rate, on the same batches; and the parameters [...] that all begin with.
    Saved after each run; --resume skips finished runs."""
    T, rates, everywhere = Config().length, {"AdamW": args.adamw, "Amos": args.amos}, NamedSharding(mesh, P())
    params = jax.device_put(init_params(jax.random.key(args.seed), Config()), everywhere)
    pairs = [(name, float(rate)) for name in OPTIMIZERS for rate in rates[name].split(",")]
    sizes = dict.fromkeys(("losses", "seconds"), args.steps // EVERY)
    sizes |= {"scales": len(jax.tree.leaves(params))}
    known = {name: np.full((len(pairs), n), np.nan) for name, n in sizes.items()}
    saved = pathlib.Path(args.out).with_suffix(".state.npz")
    known = load_state(saved, known, flags) if args.resume else known
    runs = [Run(*pair, *(known[name][i] for name in sizes)) for i, pair in enumerate(pairs)]
    place = lambda batch: jax.device_put(batch, NamedSharding(mesh, P("data")))
    batches = lambda i: place(hide(text, (0, args.seed, i), args.batch, T))
    held, loss = [place(hide(held, (1, i), args.batch, T)) for i in range(4)], jax.jit(loss_on_mesh(mesh))
    started, states, steps = time.time(), {}, {}
    for name in sorted({run.name for run in runs if np.isnan(run.scales).any()}):  # not yet finished
        make = functools.partial(OPTIMIZERS[name], steps=args.steps)
        states[name] = jax.device_put((params, make(1.0).init(params)), everywhere)
        steps[name] = make_train_step(make, mesh).lower(*states[name], *batches(0), 1.0).compile()
    seconds, started = time.time() - started, time.time()
    print(f"{optax.tree.size(params):,} parameters, {kind}, compiled in {seconds:.1f} s; {len(runs)} runs")
    for i, run in enumerate(runs):
        if np.isnan(run.scales).any():
            start = jax.tree.map(jnp.copy, states[run.name])  # a step donates it
            run_steps(run, start, steps[run.name], loss, batches, held)
            save_state(saved, known, flags)
            speed = args.batch * T * args.steps / run.seconds[-1]
            left = f"{speed:,.0f} bytes/s  {(time.time() - started) * (len(runs) / (i + 1) - 1):.0f} s left"
            print(f"{run.name} {run.rate:g}: held-out loss {run.losses[-1]:.3f} nats  {left}", flush=True)
    return runs, params


def compare(runs, params):
    """Tells which run of each optimizer was best, and when Amos was where AdamW ended -> these two runs.
    params [...]: those of the model."""
    last = lambda run: math.inf if np.isnan(run.losses[-1]) else run.losses[-1]
    theirs, ours = (min((run for run in runs if run.name == name), key=last) for name in OPTIMIZERS)
    for text, options in (("", {}), (" with momentum", {"momentum": 0.9})):
        table = describe_rules(params, *RULES, **options)
        print(f"Amos{text}: {table.splitlines()[-1]}")
    for run in (theirs, ours):
        end = f"{run.losses[-1]:.3f} nats after {EVERY * len(run.losses)} steps, {run.seconds[-1]:.1f} s"
        print(f"best rate of {run.name}: {run.rate:g}, {end}")
    there = np.flatnonzero(ours.losses <= theirs.losses[-1])
    when = f"after {EVERY * (there[0] + 1)} steps, {ours.seconds[there[0]]:.1f} s" if len(there) else "never"
    print(f"Amos is at AdamW's last loss: {when}")
    return theirs, ours


def draw_race(path, runs, params):
    """Left the held-out loss of two runs, right the scale of each weight, at first params [...] and last."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no figure without matplotlib: pip install matplotlib")
    rules = [(i, leaf) for i, leaf in enumerate(resolve(params, *RULES)) if "bias" not in leaf.name]
    show, rows = [i for i, _ in rules], range(len(rules))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    right.plot([leaf.eta for _, leaf in rules], rows, "k|", ms=14, mew=2, label="eta")
    right.plot(root_mean_square(params)[show], rows, "C2o", alpha=0.7, label="at first")
    for i, run in enumerate(runs):
        x = EVERY * np.arange(1, len(run.losses) + 1)
        left.plot(x, run.losses, f"C{i}", label=f"{run.name}, rate {run.rate:g}")
        right.plot(run.scales[show], rows, f"C{i}o", alpha=0.7, label=run.name)
    left.axhline(runs[0].losses[-1], color="grey", ls=":", label=f"{runs[0].name}'s last loss")
    left.set(xlabel="steps", ylabel="held-out loss, nats per byte asked for", yscale="log")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    left.legend()
    right.set_yticks(rows, [leaf.name for _, leaf in rules], fontsize=7)
    right.set(xlabel="root mean square of a weight", xscale="log")
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"wrote {path}")


def main(argv=None) -> int:
    """Exit status 1 above MOST, 2 for bad input, told in one line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for flag, default, text in (
        ("steps", 200, "of each run"),
        ("batch", 32, "windows per step, over all devices"),
        ("adamw", "0.0025,0.005,0.01", "learning rates of AdamW"),
        ("amos", "0.025,0.05,0.1", "learning rates of Amos"),
        ("seed", 0, None),
        ("mesh", "data=1", "devices for the batch"),
        ("data", str(pathlib.Path(__file__).parent / "data/moby_dick.txt.gz"), "a text, plain or .gz"),
        ("out", "amos.png", "figure; beside it goes what is known of the runs (.state.npz)"),
    ):
        parser.add_argument(f"--{flag}", type=type(default), default=default, help=text)
    parser.add_argument("--resume", action="store_true", help="go on after the last run that was finished")
    args = parser.parse_args(argv)
    flags = {k: v for k, v in vars(args).items() if k not in ("out", "resume")}
    try:
        runs, params = race(args, flags, *check_flags(args))
    except ValueError as error:
        print(f"amos.py: {error}", file=sys.stderr)
        return 2
    theirs, ours = compare(runs, params)
    got = ours.losses[-1] - theirs.losses[-1]
    if np.isfinite(got):
        draw_race(args.out, (theirs, ours), params)
    known = all(v == parser.get_default(k) for k, v in flags.items())
    expected, most = (f"{EXPECTED} nats", f"{MOST} nats") if known else ("unknown", "unknown")
    got_text = f"got {got:.3f} nats, expected {expected}, at most {most}"
    print(f"result: last held-out loss, Amos less AdamW: {got_text}")
    return int(not got <= (MOST if known else math.inf))


if __name__ == "__main__":
    sys.exit(main())
