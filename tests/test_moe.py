"""moe.py against the official code, by hand, and by what the paper claims.

Functions that stand in vit.py with the same text, reading and writing files for example, are
tested in test_vit.py.
"""

import dataclasses
import functools
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import common
import moe
from common import ROOT, close, close_gradients, count, matmul_flops, mesh_of, part

golden = functools.partial(common.golden, "moe")
GOLDENS = [path.stem for path in sorted((ROOT / "tests/golden/moe").glob("*.npz"))]
TINY = moe.Config(
    image_size=(8, 12),
    patch_size=4,
    width=16,
    depth=2,
    heads=2,
    mlp=24,
    classes=5,
    moe_blocks=(1,),
    experts=8,
    group=1,
    capacity_factor=0.8,
    capacity_multiple=1,
)


def change(config, **fields):
    return dataclasses.replace(config, **fields)


def shapes_of(config):
    return jax.eval_shape(functools.partial(moe.init_params, config=config), jax.random.key(0))


def random_params(config, seed=0, scale=0.3):
    """Weights without zeros, so that every path of the model counts."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return (scale * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree.map(draw, shapes_of(config))


def random_batch(config, size=8, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.uniform(-1, 1, (size, *config.image_size, config.channels)).astype(np.float32)
    labels = rng.integers(0, config.classes, size).astype(np.int32)
    return {"images": images, "labels": labels}


def everything_valid(x):
    return jnp.ones(x.shape[:2], bool)


# ==== Golden ======================================================================================


def fields_of(official):
    """The fields of a golden's config that every kind has."""
    return {
        "experts": official["E"],
        "k": official["k"],
        "capacity_factor": official["capacity_factor"],
        "capacity_multiple": official.get("multiple_of", 4),
        "batch_priority": official["batch_priority"],
        "noise_std": official.get("noise_std", 1.0),
        "importance_weight": official.get("importance_loss_weight", 0.0),
        "load_weight": official.get("load_loss_weight", 0.0),
    }


@pytest.mark.parametrize("name", [n for n in GOLDENS if n.startswith(("router", "aux"))])
def test_c1_golden_router(name):
    """Gates, choices and slots to the integer, both losses and the gradients of each."""
    meta, arrays = golden(name)
    config = change(TINY, **fields_of(meta["config"]))
    x = jnp.asarray(arrays["in/x"])
    kernel = jnp.asarray(arrays["params/dense/kernel"])
    slots = moe.capacity(x.shape[1], config)
    assert slots == arrays["out/capacity"]
    noise = arrays.get("in/noise_0")
    deviation = config.noise_std / config.experts

    def run(kernel, x):
        logits = x @ kernel
        noisy = logits if noise is None else logits + deviation * noise
        routing = moe.route(jax.nn.softmax(noisy), everything_valid(x), config)
        losses = {"importance": moe.importance_loss(jax.nn.softmax(logits), everything_valid(x))}
        if noise is not None:
            losses["load"] = moe.load_loss(logits, noisy, everything_valid(x), config.k, deviation)
        kept = routing.slots < slots
        at = jax.nn.one_hot(routing.experts, config.experts)[..., None]
        at = at * jax.nn.one_hot(routing.slots, slots)[..., None, :]  # [G,M,k,E,c]
        weights = (at * (routing.gates * kept)[..., None, None]).sum(2)
        weighted = (weights * arrays["in/ct_combine"]).sum()
        weighted += config.importance_weight * losses["importance"].mean()
        if noise is not None:
            weighted += config.load_weight * losses["load"].mean()
        return {"all": weighted} | {n: x.mean() for n, x in losses.items()}, (routing, losses)

    values, (routing, losses) = jax.jit(run)(kernel, x)
    indices = arrays["out/indices/indices"]
    np.testing.assert_array_equal(routing.experts, indices[..., 0])
    np.testing.assert_array_equal(routing.slots, indices[..., 1])
    close(routing.gates, arrays["out/indices/combine_weights"], 1e-5)
    for kind, loss in losses.items():
        close(loss, arrays[f"out/metrics/{kind}_loss"], 1e-5)
    jacobian = jax.jit(jax.jacrev(lambda *args: run(*args)[0], (0, 1)))(kernel, x)
    for kind, grads in jacobian.items():
        suffix = "" if kind == "all" else f"_{kind}"
        if kind == "all" and meta["config"]["gshard_loss_weight"]:
            continue  # the sum has a third loss, which the paper does not have
        wanted = arrays[f"grad{suffix}/dense/kernel"], arrays[f"grad_in{suffix}/x"]
        for got, want in zip(grads, wanted):
            close(got, want, 2e-5)


@pytest.mark.parametrize("name", [n for n in GOLDENS if n.startswith("dispatch")])
def test_c1_golden_dispatch_with_equal_gates(name):
    meta, arrays = golden(name)
    official = meta["config"]
    E = official["E"]
    config = change(TINY, experts=E, k=official["k"], batch_priority=official["batch_priority"])
    gates = jnp.asarray(arrays["in/gates"])
    routing = moe.route(gates, everything_valid(gates), config)
    np.testing.assert_array_equal(routing.experts, arrays["out/indices/indices"][..., 0])
    np.testing.assert_array_equal(routing.slots, arrays["out/indices/indices"][..., 1])
    slots = int(arrays["out/capacity"])
    buffers = moe.dispatch(jnp.asarray(arrays["in/data"]), routing, slots, config)
    want = arrays["out/einsum/buffer"]
    G = len(gates)
    if G % E == 0:  # the official code permutes the groups then
        want = want.reshape(E, G // E, E, slots, -1).swapaxes(1, 2).reshape(want.shape)
    np.testing.assert_array_equal(buffers, want)
    number = jnp.arange(1.0, E + 1)[:, None, None]  # the golden's experts are number * (v + 0.5)
    combined = moe.combine(number * (buffers + 0.5), routing, slots)
    close(combined, arrays["out/einsum/combined"], 1e-5)


def test_c1_golden_capacity():
    _, arrays = golden("capacity_table")
    seen = 0
    for row, want in zip(arrays["in/table"], arrays["out/capacity"]):
        choices, experts, factor, rounded, multiple = row
        if rounded or want < 1:
            continue
        config = change(TINY, k=1, experts=int(experts), capacity_factor=float(factor))
        config = change(config, capacity_multiple=int(multiple) or 1)
        assert moe.capacity(int(choices), config) == want
        seen += 1
    assert seen > 500


@pytest.mark.parametrize("name", [n for n in GOLDENS if n.startswith("layer")])
def test_c1_golden_layer(name):
    """Outputs and gradients of experts, router and tokens; "indices" is the official index form."""
    meta, arrays = golden(name)
    official = meta["config"]
    config = change(TINY, pool="gap", **fields_of(official))
    config = change(config, group=official["group_size"] // official["N"])
    tolerance = 1.0
    if official.get("bfloat16"):  # ours multiplies in bfloat16 too, the official code does not
        config = change(config, dtype="bfloat16")
        tolerance = 1000.0
    given = part(arrays, "params/")
    weights = {
        "router": {"kernel": given["Router/dense/kernel"]},
        "experts": {
            layer: {
                "kernel": given[f"Mlp/Dense_{i}/kernel"],
                "bias": given[f"Mlp/Dense_{i}/bias"],
            }
            for i, layer in enumerate(("dense1", "dense2"))
        },
    }
    noise = arrays.get("in/noise_0")

    def run(weights, x):
        y, report = moe.mixture(x, weights, config, noise, jnp.ones(len(x), bool))
        loss = config.importance_weight * report.importance_loss.mean()
        loss += config.load_weight * report.load_loss.mean()
        return (y * arrays["in/ct_y"]).sum() + loss, y

    value = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))
    (_, y), (grads, x_grad) = value(weights, jnp.asarray(arrays["in/x"]))
    close(y, arrays["out/indices/y"], 1e-5 * tolerance)
    close(x_grad, arrays["grad_in_indices/x"], 2e-5 * tolerance)
    got = moe.named_leaves(grads)
    renamed = {"Router/dense/kernel": got.pop("router/kernel")}
    for path, grad in got.items():
        _, layer, kind = path.split("/")
        renamed[f"Mlp/Dense_{int(layer[-1]) - 1}/{kind}"] = grad
    close_gradients(renamed, part(arrays, "grad_indices/"), 2e-5 * tolerance)


@pytest.mark.parametrize("name", [n for n in GOLDENS if n.startswith("vit")])
def test_c1_golden_model(name):
    """Every block, logits, losses, and all gradients of the whole loss."""
    meta, arrays = golden(name)
    official = meta["config"]
    config = moe.Config(
        image_size=tuple(official["image"]),
        patch_size=tuple(official["patch"]),
        width=official["hidden"],
        depth=official["num_layers"],
        heads=official["num_heads"],
        mlp=official["mlp_dim"],
        classes=official["num_classes"],
        pool=official["classifier"],
        representation=official["representation_size"],
        moe_blocks=official["moe_layers"],
        **fields_of(official),
    )
    config = change(config, group=official["group_size"] // config.tokens)
    flat = {name: array for name, array in arrays.items() if name.startswith("params/")}
    params = moe.from_official(flat, config)
    noise = None
    if "in/noise_0" in arrays:
        noise = jnp.stack([arrays["in/noise_0"], arrays["in/noise_1"]])

    @jax.jit
    def run(params, images):
        def loss(params):
            logits, metrics = moe.forward(params, images, config, noise=noise)
            nats = optax.softmax_cross_entropy_with_integer_labels(logits, arrays["in/labels"])
            return nats.mean() + metrics["auxiliary_loss"], (logits, metrics)

        x = moe.embed(params, images, config)
        blocks = []
        for i in range(config.depth):
            at = noise[config.moe_blocks.index(i)] if noise is not None and i % 2 else None
            valid = jnp.ones(len(x), bool)
            x, _ = moe.block(x, params["blocks"][str(i)], config, at, valid)
            blocks.append(x)
        return jax.value_and_grad(loss, has_aux=True)(params), blocks

    ((total, (logits, metrics)), grads), blocks = run(params, arrays["in/images"])
    for i, x in enumerate(blocks):
        close(x, arrays[f"out/features/encoderblock_{i}"], 1e-5)
    close(logits, arrays["out/logits"], 1e-5)
    close(total, arrays["out/total_loss"], 1e-5)
    close(metrics["auxiliary_loss"], arrays["out/auxiliary_loss_mean"], 1e-5)
    close_gradients(moe.to_official(grads, config), part(arrays, "grad/"))
    assert moe.infer_config(
        flat,
        image_size=config.image_size,
        **{name: getattr(config, name) for name in (*fields_of(official), "group")},
    ) == change(config, experts=config.experts)


# ==== Equations, worked by hand ===================================================================


def routing_of(gates, **fields):
    gates = jnp.asarray(gates, jnp.float32)
    valid = fields.pop("valid", jnp.ones(gates.shape[:2], bool))
    return moe.route(gates, valid, change(TINY, experts=gates.shape[2], **fields))


def test_the_example_of_the_docstring():
    """Six tokens, two experts, k = 1."""
    chosen = [0, 1, 0, 0, 1, 0]
    gates = [[[0.9, 0.1] if expert == 0 else [0.2, 0.8] for expert in chosen]]
    routing = routing_of(gates, k=1)
    assert routing.experts[0, :, 0].tolist() == chosen
    assert routing.slots[0, :, 0].tolist() == [0, 0, 1, 2, 1, 3]
    tokens = jnp.arange(1.0, 7)[None, :, None]
    buffers = moe.dispatch(tokens, routing, 2, change(TINY, experts=2, k=1))
    assert buffers[:, :, 0].tolist() == [[1, 3], [2, 5]]
    out = moe.combine(buffers, routing, 2)
    close(out[0, :, 0], [0.9, 1.6, 2.7, 0, 4.0, 0], 1e-6)


def test_first_choices_come_before_second_ones():
    """Token 0's second choice, expert 1, waits for the first choices of tokens 1 and 2."""
    gates = [[[0.6, 0.4], [0.3, 0.7], [0.1, 0.9]]]
    routing = routing_of(gates, k=2)
    assert routing.experts.tolist() == [[[0, 1], [1, 0], [1, 0]]]
    assert routing.slots.tolist() == [[[0, 2], [0, 1], [1, 2]]]
    close(routing.gates, np.sort(gates)[..., ::-1], 1e-6)  # not made to sum to 1
    first = routing_of(gates, k=2, batch_priority=True)  # in the order of tokens 2, 1, 0
    assert first.slots.tolist() == [[[0, 2], [1, 2], [0, 1]]]


def test_tokens_that_are_not_valid_take_no_slot():
    rng = np.random.default_rng(0)
    gates = rng.dirichlet(np.ones(4), (2, 9)).astype(np.float32)
    valid = np.ones((2, 9), bool)
    valid[0, [1, 2, 8]] = False
    for batch_priority in (False, True):
        fields = {"k": 2, "batch_priority": batch_priority}
        routing = routing_of(gates, valid=jnp.asarray(valid), **fields)
        alone = routing_of(gates[:1, valid[0]], **fields)
        np.testing.assert_array_equal(routing.slots[0][valid[0]], alone.slots[0])
        assert (routing.slots[0][~valid[0]] > 1000).all()
        np.testing.assert_array_equal(routing.slots[1], routing_of(gates, **fields).slots[1])


def test_capacity_by_hand():
    config = change(TINY, k=2, experts=8, capacity_factor=1.05, capacity_multiple=1)
    assert moe.capacity(400, config) == 105
    assert moe.capacity(400, change(config, capacity_multiple=4)) == 108
    rounding = change(config, k=1, experts=10, capacity_factor=1.1)
    assert moe.capacity(100, rounding) == 12  # 100 * 1.1 is 110.00000000000001


def test_c4_importance_loss_of_four_tokens():
    """App. A.2. Balanced: 0. All on one of two experts: (1/1)^2 = 1."""
    balanced = jnp.array([[[0.7, 0.3], [0.3, 0.7], [0.9, 0.1], [0.1, 0.9]]])
    valid = everything_valid(balanced)
    assert float(moe.importance_loss(balanced, valid)[0]) < 1e-12
    one = jnp.tile(jnp.array([1.0, 0.0]), (1, 4, 1))
    close(moe.importance_loss(one, valid), [1.0], 1e-6)
    skewed = jnp.array([[[0.5, 0.5], [0.75, 0.25], [0.75, 0.25], [1.0, 0.0]]])
    close(moe.importance_loss(skewed, valid), [0.25], 1e-6)  # sums 3 and 1: deviation 1, mean 2
    half = jnp.array([[True, True, False, False]])
    close(moe.importance_loss(skewed, half), [(0.25 / 1) ** 2], 1e-6)  # 1.25 and 0.75
    assert moe.importance_loss(skewed, ~valid).tolist() == [0.0]


def test_load_loss_of_four_tokens():
    """The threshold is the larger of the two noisy logits; P(logit + noise above it) is summed."""
    logits = jnp.array([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    noisy = logits.at[0, 0].set(jnp.array([0.5, 0.7]))  # here the other expert won: 0.7
    valid = everything_valid(logits)

    def phi(x):
        return 0.5 * (1 + math.erf(x / math.sqrt(2)))

    noise = 0.5
    first = phi(0.3 / noise) + 2 * phi(0) + phi(-1 / noise)
    second = phi(-0.7 / noise) + 2 * phi(-1 / noise) + phi(0)
    mean = (first + second) / 2
    want = ((first - second) / 2 / mean) ** 2
    close(moe.load_loss(logits, noisy, valid, 1, noise), [want], 1e-5)


def test_mixture_is_the_sum_over_the_chosen_experts():
    """Sec. 2.1, token by token in float64; the noise changes the gates, and is divided by E."""
    config = change(TINY, capacity_factor=4.0, noise_std=2.0)
    weights = random_params(config)["blocks"]["1"]
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 7, 16)).astype(np.float32)
    noise = rng.normal(size=(2, 7, 8)).astype(np.float32)
    run = jax.jit(functools.partial(moe.mixture, config=config, valid=jnp.ones(2, bool)))
    got, _ = run(x, weights, noise=noise)
    logits = x.astype(np.float64) @ weights["router"]["kernel"] + noise * 2.0 / 8
    gates = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    want = np.zeros((2, 7, 16))
    for b in range(2):
        for t in range(7):
            for e in np.argsort(-gates[b, t])[:2]:
                expert = jax.tree.map(lambda leaf, e=e: leaf[e], weights["experts"])
                want[b, t] += gates[b, t, e] * np.float64(moe.mlp(x[b, t], expert, config))
    close(got, want, 1e-5)


def test_metrics_by_hand():
    """Two groups of two images, one image not valid, two blocks with experts."""
    config = change(TINY, depth=3, moe_blocks=(0, 2), group=2, experts=4, importance_weight=0.3)
    params = random_params(config)
    images = random_batch(config, 4)["images"]
    valid = jnp.array([True, True, True, False])

    @jax.jit
    def run(params, images, valid):
        key = jax.random.key(0)
        _, metrics = moe.forward(params, images, config, valid=valid, key=key)
        noise = moe.draw_noise(key, 4, config)
        _, reports = moe.encode(params, images, config, noise=noise, valid=valid)
        return metrics, reports

    metrics, reports = run(params, images, valid)
    assert list(reports) == [0, 2]
    slots = moe.capacity(2 * config.tokens, config)
    loads, dropped, entropy, importance, load = [], [], [], 0, 0
    there = np.repeat(np.asarray(valid), config.tokens).reshape(2, -1)
    for report in reports.values():
        experts = np.asarray(report.routing.experts)[there]
        loads.append(np.bincount(experts.ravel(), minlength=4) / (experts.size / 4))
        dropped.append((np.asarray(report.routing.slots)[there] >= slots).mean())
        entropy.append(np.asarray(report.entropy)[there].mean())
        importance += report.importance_loss.mean()
        load += report.load_loss.mean()
    want = {
        "importance_loss": importance,
        "load_loss": load,
        "auxiliary_loss": 0.3 * importance + 0.005 * load,
        "dropped": np.mean(dropped),
        "largest_load": np.max(loads),
        "smallest_load": np.min(loads),
        "router_entropy": np.mean(entropy),
    }
    assert metrics.keys() == want.keys() and want["dropped"] > 0.05 and want["load_loss"] > 0
    for name, value in want.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-5), name


def test_a_router_that_broke_shows_in_the_metrics():
    params = random_params(TINY)
    params["blocks"]["1"]["router"]["kernel"][3, 3] = np.nan
    run = jax.jit(functools.partial(moe.loss_fn, config=TINY))
    _, metrics = run(params, random_batch(TINY), jax.random.key(0))
    for name in ("loss", "importance_loss", "auxiliary_loss", "router_entropy"):
        assert math.isnan(metrics[name]), name


def test_loss_counts_no_masked_row():
    """Masked rows take no slots: with them the others get the same logits and losses."""
    config = change(TINY, group=2, batch_priority=True)
    batch = random_batch(config, 6)
    batch["labels"][[0, 3, 5]] = -1
    params = random_params(config)
    run = jax.jit(functools.partial(moe.loss_fn, config=config))
    (loss, metrics), other = run(params, batch, None), {**batch}
    other["images"] = batch["images"].copy()
    other["images"][[0, 3, 5]] = 0.5
    again, metrics_again = run(params, other, None)
    assert float(loss) == float(again)
    assert jax.tree.map(float, metrics) == jax.tree.map(float, metrics_again)
    total = float(metrics["loss"] + metrics["auxiliary_loss"])
    assert float(loss) == pytest.approx(total, rel=1e-6)
    nobody = {**batch, "labels": np.full(6, -1, np.int32)}
    loss, metrics = run(params, nobody, None)
    assert float(loss) == float(metrics["dropped"]) == 0
    assert all(math.isfinite(x) for x in metrics.values())


def test_noise_is_drawn_for_every_group_block_token_and_key():
    config = change(TINY, depth=3, moe_blocks=(0, 2), group=2)
    noise = moe.draw_noise(jax.random.key(0), 4, config)
    assert noise.shape == (2, 2, 2 * config.tokens, 8)
    assert len(np.unique(noise)) == noise.size
    assert abs(float(noise.std()) - 1) < 0.1
    assert (moe.draw_noise(jax.random.key(1), 4, config) != noise).all()
    params = random_params(config)
    images = random_batch(config, 4)["images"]
    run = jax.jit(functools.partial(moe.forward, params, images, config))
    with_key, metrics = run(key=jax.random.key(0))
    close(with_key, run(noise=noise)[0], 1e-6)
    assert float(abs(with_key - run()[0]).max()) > 1e-3
    assert float(metrics["load_loss"]) > 0 and float(run()[1]["load_loss"]) == 0
    silent = change(config, noise_std=0.0)
    run_silent = jax.jit(functools.partial(moe.forward, params, images, silent))
    close(run_silent(noise=noise)[0], run()[0], 1e-6)


# ==== Claims ======================================================================================


def parameter_count(config):
    return sum(math.prod(param.shape) for param in jax.tree.leaves(moe.param_table(config)))


def test_c2_parameter_counts():
    """In millions, with 18,291 classes, and as many as published for the 15B model."""
    millions = {
        "S/32": 296.9,
        "B/32": 980.6,
        "B/16": 979.0,
        "L/32": 3448.2,
        "L/16": 3446.0,
        "H/14": 7160.8,
    }
    for name, want in millions.items():
        config = change(moe.SIZES[name], classes=18_291)
        assert round(parameter_count(config) / 1e6, 1) == want, name
    assert round(parameter_count(moe.SIZES["15B"]) / 1e6, 1) == 14705.1
    for name, n, want in (("S/32", 2, 166.7), ("H/14", 5, 2688.6)):
        config = moe.SIZES[name]
        config = change(config, classes=18_291, moe_blocks=moe.last(n, config.depth))
        assert round(parameter_count(config) / 1e6, 1) == want, name
    assert moe.last(2, 8) == (5, 7) and moe.every(2, 8) == (1, 3, 5, 7)


def forward_flops(config, images=4):
    """FLOPs of the matrix products for a batch."""
    batch = jax.ShapeDtypeStruct((images, *config.image_size, config.channels), "float32")
    forward = functools.partial(moe.forward, config=config)
    return count(jax.make_jaxpr(forward)(shapes_of(config), batch).jaxpr, matmul_flops)


def test_c3_flops_grow_with_k_and_not_with_the_experts():
    """With as many slots as choices; what is left is the router, 2 D E per token."""
    config = change(TINY, capacity_factor=1.0, group=4)
    tokens = 4 * config.tokens

    def cost(**fields):
        return forward_flops(change(config, **fields))

    router = 2 * tokens * config.width * 7  # 14 experts less 7
    assert cost(experts=14, k=2) - cost(experts=7, k=2) == router
    more = cost(experts=7, k=2) - cost(experts=7, k=1)
    expert = 4 * tokens * config.width * config.mlp
    assert more == expert + 2 * tokens * config.width  # one more expert, and its share of the sum


def test_flops_are_at_most_the_official_ones():
    """V-MoE-S/32, 8 images, E = 8, k = 2: the products, and what XLA counted for the index form."""
    config = change(moe.SIZES["S/32"], experts=8, moe_blocks=(5, 7))
    assert parameter_count(config) == 56_999_400
    D, F, M, c = 512, 2048, 400, 108
    embed = 2 * 392 * 32 * 32 * 3 * D
    attention = 8 * M * D * D + 4 * 8 * 50 * 50 * D
    dense = 4 * M * D * F
    mixture = 4 * 8 * c * D * F + 2 * M * D * 8 + 2 * M * 2 * D  # experts, router, weighted sum
    head = 2 * 8 * D * (D + 1000)
    want = embed + 8 * attention + 6 * dense + 2 * mixture + head
    assert forward_flops(config, 8) == want <= 25_729_982_464


def test_c5_bpr_keeps_the_tokens_of_highest_priority():
    """The k choices of the first tokens in the order of their largest gates, without exception."""
    rng = np.random.default_rng(0)
    gates = rng.dirichlet(np.full(4, 0.5), (1, 40)).astype(np.float32)
    routing = routing_of(gates, k=1, batch_priority=True)
    slots = 5
    for expert in range(4):
        chose = np.flatnonzero(np.asarray(routing.experts)[0, :, 0] == expert)
        by_priority = chose[np.argsort(-gates[0, chose, expert])]
        kept = chose[np.asarray(routing.slots)[0, chose, 0] < slots]
        assert set(kept) == set(by_priority[:slots]) and len(chose) > slots


@pytest.mark.long
def test_c5_at_a_low_capacity_bpr_loses_less(tmp_path, capsys):
    """The demo's model, whole: it is right more often with Batch Prioritized Routing."""
    assert moe.main(["--out", str(tmp_path / "d.png")]) == 0
    saved = re.search(r"^result: .*: got (-?\d+\.\d) points", capsys.readouterr().out, re.M)
    assert float(saved[1]) > 0.5


def one_hot_mixture(x, weights, config):
    """The paper's form: dispatch and combine as products with one-hot arrays [G,M,E,c]."""
    tokens = x.reshape(-1, config.group * config.tokens, x.shape[-1])
    gates = jax.nn.softmax(tokens @ weights["router"]["kernel"])
    routing = moe.route(gates, everything_valid(tokens), config)
    slots = moe.capacity(tokens.shape[1], config)
    experts = jax.nn.one_hot(routing.experts, config.experts)[..., None]
    places = experts * jax.nn.one_hot(routing.slots, slots)[..., None, :]  # [G,M,k,E,c]
    buffers = jnp.einsum("gmkec,gmd->egcd", places, tokens)
    outputs = jax.vmap(functools.partial(moe.mlp, config=config))(buffers, weights["experts"])
    combined = jnp.einsum("gmkec,gmk,egcd->gmd", places, routing.gates, outputs)
    return combined.reshape(x.shape)


@pytest.mark.parametrize("factor", [0.3, 4.0])
def test_c6_index_form_is_the_one_hot_form(factor):
    config = change(TINY, capacity_factor=factor, group=2, batch_priority=True)
    weights = random_params(config)["blocks"]["1"]
    x, cotangent = np.random.default_rng(0).normal(size=(2, 4, 7, 16)).astype(np.float32)

    def by_index(weights, x):
        return moe.mixture(x, weights, config, None, jnp.ones(len(x), bool))[0]

    def run(function):
        out, pull = jax.vjp(function, weights, x)
        return out, *pull(cotangent)

    got = jax.jit(lambda: run(by_index))()
    want = jax.jit(lambda: run(lambda weights, x: one_hot_mixture(x, weights, config)))()
    close(got[0], want[0], 1e-5)
    close_gradients(moe.named_leaves(got[1:]), moe.named_leaves(want[1:]), 1e-5)
    assert (np.asarray(got[0]) == 0).all(-1).any() == (factor < 1)  # some tokens have no expert


# ==== Sharding ====================================================================================


@functools.cache
def one_device(experts):
    config = change(TINY, experts=experts)
    params = random_params(config)
    batch = random_batch(config, 16)
    batch["labels"][:3] = -1  # rows that do not count

    def loss(params):
        return moe.loss_fn(params, batch, jax.random.key(0), config)

    (value, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return config, params, batch, float(value), metrics, moe.named_leaves(grads)


@pytest.mark.parametrize(
    ("devices", "experts"),
    [
        *[(1, 8), (2, 8), (4, 8), (8, 8), (4, 16)],
        *[pytest.param(devices, 16, marks=pytest.mark.long) for devices in (1, 2, 8)],
    ],
)
def test_c7_mesh_gives_the_losses_metrics_and_gradients_of_one_device(devices, experts):
    config, params, batch, want, want_metrics, want_grads = one_device(experts)
    mesh = mesh_of(devices, 1)
    specs = moe.param_specs(config, mesh)
    placed = jax.device_put(params, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
    gradient = jax.jit(jax.value_and_grad(moe.global_loss(config, mesh), has_aux=True))
    (value, metrics), grads = gradient(placed, batch, jax.random.key(0))
    assert float(value) == pytest.approx(want, rel=1e-5)
    assert metrics.keys() == want_metrics.keys()
    for name in metrics:
        assert float(metrics[name]) == pytest.approx(float(want_metrics[name]), rel=1e-5), name
    close_gradients(moe.named_leaves(grads), want_grads, 1e-5)
    kernel = placed["blocks"]["1"]["experts"]["dense1"]["kernel"]
    assert kernel.nbytes == kernel.addressable_shards[0].data.nbytes * devices


def count_of(primitive, config, devices, gradient=False):
    loss = moe.global_loss(config, mesh_of(devices, 1))

    def function(params, batch):
        return loss(params, batch, None)[0]

    if gradient:
        function = jax.grad(function)
    jaxpr = jax.make_jaxpr(function)(shapes_of(config), random_batch(config)).jaxpr
    return count(jaxpr, lambda eqn: int(eqn.primitive.name == primitive))


def test_c7_two_all_to_alls_a_layer():
    deeper = change(TINY, depth=4, moe_blocks=(0, 2, 3))
    assert count_of("all_to_all", TINY, 4) == 2
    assert count_of("all_to_all", deeper, 4) == 6
    assert count_of("all_to_all", deeper, 1) == 0
    assert count_of("all_to_all", change(TINY, remat=False), 4, gradient=True) == 4


def test_c8_one_device_and_eight_drop_the_same_tokens():
    config = change(TINY, capacity_factor=0.5, batch_priority=True)
    params = random_params(config)
    images = random_batch(config)["images"]
    key = jax.random.key(0)

    def slots(params, images, data_axis):
        noise = moe.draw_noise(key, len(images), config, data_axis)
        _, reports = moe.encode(params, images, config, noise=noise, data_axis=data_axis)
        return reports[1].routing.slots

    want = jax.jit(functools.partial(slots, data_axis=None))(params, images)
    mesh = mesh_of(8, 1)
    sharded = jax.shard_map(
        functools.partial(slots, data_axis="data"),
        mesh=mesh,
        in_specs=(moe.param_specs(config, mesh), P("data")),
        out_specs=P("data"),
    )
    np.testing.assert_array_equal(jax.jit(sharded)(params, images), want)
    assert 0.3 < (np.asarray(want) >= moe.capacity(7, config)).mean() < 0.8


def test_train_step_compiles_once_and_equals_optax_on_one_device():
    optimizer = optax.sgd(0.1, momentum=0.9)
    mesh = mesh_of(4, 1)
    state = moe.init_state(jax.random.key(0), TINY, optimizer, mesh, random_params(TINY))
    params = jax.tree.map(np.asarray, state.params)
    opt_state = optimizer.init(params)
    step = moe.make_train_step(TINY, optimizer, mesh)
    batch = random_batch(TINY)
    key = jax.random.key(0)

    @jax.jit
    def by_hand(params, opt_state, i):
        def loss(params):
            return moe.loss_fn(params, batch, jax.random.fold_in(key, i), TINY)[0]

        grads = jax.grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for i in range(3):
        state, _ = step(state, batch, key)
        params, opt_state = by_hand(params, opt_state, i)
    assert step._cache_size() == 1 and int(state.step) == 3
    close_gradients(moe.named_leaves(state.params), moe.named_leaves(params), 1e-5)
    trace = state.opt_state[0].trace["blocks"]["1"]["experts"]["dense1"]["kernel"]
    assert trace.addressable_shards[0].data.shape[0] == 2  # of 8 experts


# ==== Numbers and the compiled program ============================================================


def test_bfloat16_routes_as_float32_and_is_finite():
    """At extreme inputs; the router computes in float32."""
    config = change(TINY, dtype="bfloat16")
    batch = random_batch(TINY)
    batch["images"] = np.sign(batch["images"])
    params = random_params(TINY)
    params["blocks"]["1"]["experts"]["dense1"]["kernel"] *= 1000

    def loss(params):
        return moe.loss_fn(params, batch, jax.random.key(0), config)[0]

    logits, metrics = jax.jit(functools.partial(moe.forward, config=config))(
        params, batch["images"]
    )
    assert logits.dtype == jnp.float32
    for leaf in jax.tree.leaves((logits, metrics, jax.jit(jax.grad(loss))(params))):
        assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 16)), "float32")
    weights = params["blocks"]["1"]
    run = jax.jit(moe.mixture, static_argnames="config")
    reports = [
        run(x, weights, config=c, noise=None, valid=jnp.ones(2, bool))[1] for c in (config, TINY)
    ]
    np.testing.assert_array_equal(reports[0].entropy, reports[1].entropy)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_dtype_is_promoted_in_silence(dtype):
    """JAX_NUMPY_DTYPE_PROMOTION=strict makes every implicit promotion an error."""
    config = change(TINY, dtype=dtype)
    batch = random_batch(config)

    def loss(params, key):
        return moe.loss_fn(params, batch, key, config)[0]

    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(jax.grad(loss), shapes_of(config), jax.random.key(0))


def test_initial_values_are_those_of_the_official_code():
    config = change(TINY, width=64, mlp=128, depth=2, representation=32)
    params = jax.jit(moe.init_params, static_argnums=1)(jax.random.key(0), config)
    block = params["blocks"]["1"]
    experts = block["experts"]["dense1"]["kernel"]
    assert (experts == experts[:1]).all()  # all experts alike
    assert float(experts.std()) == pytest.approx(math.sqrt(2 / (64 + 128)), rel=0.1)
    assert 0 < float(abs(block["experts"]["dense1"]["bias"]).max()) < 1e-5
    assert float(block["router"]["kernel"].std()) == pytest.approx(64**-0.5, rel=0.15)
    assert float(block["query"]["kernel"].std()) == pytest.approx(64**-0.5, rel=0.1)
    assert float(block["out"]["kernel"].std()) == pytest.approx(64**-0.5, rel=0.1)
    assert float(params["embed"]["kernel"].std()) == pytest.approx(48**-0.5, rel=0.1)
    assert float(params["position"].std()) == pytest.approx(0.02, rel=0.15)
    assert float(params["pre_logits"]["kernel"].std()) == pytest.approx(64**-0.5, rel=0.1)
    assert not np.any(params["head"]["kernel"]) and not np.any(params["class"])


# ==== Checkpoints =================================================================================


def test_saved_and_loaded_it_is_the_same(tmp_path):
    params = random_params(TINY)
    moe.save(tmp_path / "model.npz", params, TINY)
    loaded = moe.load(tmp_path / "model.npz", TINY)
    for name, leaf in moe.named_leaves(params).items():
        np.testing.assert_array_equal(moe.named_leaves(loaded)[name], leaf)
    flat = moe.read_npz(tmp_path / "model.npz")
    assert flat["Encoder/encoderblock_1/Moe/Mlp/Dense_0/kernel"].shape == (8, 16, 24)
    assert flat["Encoder/posembed_input/pos_embedding"].shape == (1, 7, 16)
    params["head"]["bias"][2] = np.inf
    with pytest.raises(ValueError, match="head/bias holds values that are not finite: not saved"):
        moe.save(tmp_path / "other.npz", params, TINY)
    with pytest.raises(ValueError, match="params: blocks/1/experts/dense1/bias has shape"):
        moe.to_official(random_params(change(TINY, experts=4)), TINY)


KERNEL = "Encoder/encoderblock_1/Moe/Router/dense/kernel"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (KERNEL, lambda array: None, f"{KERNEL} is missing"),
        ("extra/kernel", lambda array: np.zeros(3), "extra/kernel is unknown"),
        (KERNEL, lambda array: array.T, f"{KERNEL} has shape (8, 16), not (16, 8)"),
        (KERNEL, lambda array: array.astype(str), f"{KERNEL} is <U32, not numeric"),
        ("head/bias", lambda array: array * np.nan, "head/bias holds values that are not finite"),
    ],
)
def test_strict_about_every_array(name, damage, message):
    flat = moe.to_official(random_params(TINY), TINY)
    damaged = damage(flat.pop(name, None))
    if damaged is not None:
        flat[name] = damaged
    with pytest.raises(ValueError, match=re.escape(message)):
        moe.from_official(flat, TINY)


def test_infer_config_names_what_it_lacks():
    flat = moe.to_official(random_params(TINY), TINY)
    with pytest.raises(ValueError, match="has 6 patches, which do not form a square"):
        moe.infer_config(flat)
    with pytest.raises(ValueError, match="has no array embedding/kernel: it is not a V-MoE"):
        moe.infer_config({})
    dense = {name: array for name, array in flat.items() if "Moe" not in name}
    with pytest.raises(ValueError, match="has no Moe/Router/dense/kernel: it is not a V-MoE"):
        moe.infer_config(dense, image_size=(8, 12))
    square = change(TINY, image_size=8, classes=0, representation=6)
    found = moe.infer_config(moe.to_official(random_params(square), square), group=1)
    defaults = {"capacity_factor": 1.05, "capacity_multiple": 4}
    assert found == change(square, **defaults)


def test_adapt_resizes_positions_and_replaces_the_head():
    params = random_params(change(TINY, representation=6))
    new = change(TINY, image_size=(16, 24), classes=3)
    adapted = moe.adapt(params, change(TINY, representation=6), new)
    moe.check_names(moe.named_leaves(adapted), moe.named_leaves(shapes_of(new)), "adapted")
    assert not np.any(adapted["head"]["kernel"]) and adapted["blocks"] is params["blocks"]
    np.testing.assert_array_equal(adapted["position"][0], params["position"][0])
    with pytest.raises(ValueError, match="a checkpoint of experts=8 cannot become experts=4"):
        moe.adapt(random_params(TINY), TINY, change(TINY, experts=4))
    with pytest.raises(ValueError, match=re.escape("of moe_blocks=(1,) cannot become moe_blocks")):
        moe.adapt(random_params(TINY), TINY, change(TINY, moe_blocks=(0,)))


# ==== Errors ======================================================================================


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 33}, "k=33 is more than experts=32"),
        ({"k": 0}, "k=0 is not at least 1"),
        ({"experts": 0}, "experts=0 is not at least 1"),
        ({"group": 0}, "group=0 is not at least 1"),
        ({"capacity_multiple": 0}, "capacity_multiple=0 is not at least 1"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0 is not above 0"),
        ({"capacity_factor": -1.0}, "capacity_factor=-1.0 is not above 0 and finite"),
        ({"capacity_factor": math.inf}, "capacity_factor=inf is not above 0 and finite"),
        ({"noise_std": -1.0}, "noise_std=-1.0 is not at least 0"),
        ({"noise_std": math.inf}, "noise_std=inf is not at least 0 and finite"),
        ({"load_weight": -1.0}, "load_weight=-1.0 is not at least 0"),
        ({"moe_blocks": ()}, "moe_blocks=() is not one or more ascending numbers from 0 to 11"),
        ({"moe_blocks": (1, 12)}, "moe_blocks=(1, 12) is not one or more ascending numbers"),
        ({"moe_blocks": (3, 1)}, "moe_blocks=(3, 1) is not one or more ascending"),
        ({"fsdp": True}, "fsdp=True is not supported: experts are sharded over the mesh axis data"),
        ({"width": 65}, "width=65 is not a multiple of heads=12"),
        ({"classes": -1}, "classes=-1 is not at least 0"),
        ({"representation": 0}, "representation=0 is not at least 1"),
        ({"pool": "map"}, "pool='map' is not one of token, gap"),
        ({"dtype": "float16"}, "dtype='float16' is not one of float32, bfloat16"),
        ({"image_size": (224, 224, 3)}, "image_size=(224, 224, 3) is not one number or two"),
        ({"patch_size": 15}, "image_size=(224, 224) is not a positive multiple of patch_size"),
    ],
    ids=str,
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        moe.Config(**fields)


def test_what_does_not_fit_is_refused():
    params = random_params(TINY)
    with pytest.raises(ValueError, match="3 images on a device are not a multiple of group=2"):
        moe.forward(params, random_batch(TINY, 3)["images"], change(TINY, group=2))
    with pytest.raises(ValueError, match=re.escape("images are (2, 8, 8, 3), not [B, *(8, 12, 3)")):
        moe.forward(params, np.zeros((2, 8, 8, 3), np.float32), TINY)
    with pytest.raises(
        ValueError, match=re.escape("noise has shape (1, 2, 7, 8), not (1, 8, 7, 8")
    ):
        moe.forward(params, random_batch(TINY)["images"], TINY, noise=np.zeros((1, 2, 7, 8)))
    with pytest.raises(ValueError, match=re.escape("valid is int64 (8,), not bool (8,)")):
        moe.forward(params, random_batch(TINY)["images"], TINY, valid=np.ones(8, int))
    with pytest.raises(ValueError, match="is not None: moe.py shards nothing over it"):
        moe.forward(params, random_batch(TINY)["images"], TINY, model_axis="model")
    batch = random_batch(TINY)
    batch["labels"] = batch["labels"][:, None]
    with pytest.raises(ValueError, match=re.escape("labels are (8, 1), not (8,) or (8, 5)")):
        moe.loss_fn(params, batch, None, TINY)
    with pytest.raises(ValueError, match="classes=0: without a head there is no loss"):
        moe.loss_fn(params, batch, None, change(TINY, classes=0))
    with pytest.raises(ValueError, match="n=0 is not from 1 to 4"):
        moe.last(0, 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 3}, "params have 2 blocks, not depth=3"),
        ({"moe_blocks": (0,)}, "params have experts in the blocks (1,), not moe_blocks=(0,)"),
        ({"experts": 4}, "params have 8 experts, not experts=4"),
        ({"representation": 6}, "params lack the layer pre_logits, and representation=6"),
    ],
)
def test_params_of_another_config_are_refused(fields, message):
    """Some of them would run, and give a silently wrong result."""
    config = change(TINY, **fields)
    with pytest.raises(ValueError, match=re.escape(message)):
        moe.forward(random_params(TINY), random_batch(TINY)["images"], config)
    optimizer = optax.sgd(0.1)
    with pytest.raises(ValueError, match="params: "):
        moe.init_state(jax.random.key(0), config, optimizer, mesh_of(1, 1), random_params(TINY))


def test_meshes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="experts=6 are not a multiple of mesh axis data=4"):
        moe.param_specs(change(TINY, experts=6), mesh_of(4, 1))
    with pytest.raises(ValueError, match="model=2: moe.py shards nothing over this mesh axis"):
        moe.param_specs(TINY, mesh_of(2, 2))
    loss = moe.global_loss(change(TINY, group=2), mesh_of(8, 1))
    with pytest.raises(ValueError, match="a batch of 8 is not a multiple of data=8 times group=2"):
        loss(random_params(TINY), random_batch(TINY), None)


# ==== Demo ========================================================================================


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """40 pictures of 28x28 in two classes."""
    rng = np.random.default_rng(0)
    labels = np.arange(40, dtype=np.uint8) % 2
    images = rng.integers(0, 100, (40, 28, 28), dtype=np.uint8)
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, images=images, labels=labels)
    return str(path)


@pytest.fixture
def small_demo(monkeypatch):
    """The demo with a smaller network, which compiles faster."""
    small = change(moe.DIGITS, width=16, depth=1, moe_blocks=(0,), experts=4, mlp=16)
    monkeypatch.setattr(moe, "DIGITS", small)
    monkeypatch.setattr(moe, "FACTORS", (moe.LOW,))


@pytest.mark.usefixtures("small_demo")
def test_demo_trains_and_draws(digits, tmp_path, capsys):
    out = tmp_path / "d.png"
    flags = ["--data", digits, "--out", str(out), "--steps", "3"]
    assert moe.main([*flags, "--mesh", "data=2,model=1"]) == 0
    text = capsys.readouterr().out.splitlines()
    assert text[0] == "40 digits, 8 held out, on 2 cpu(s)"
    number = r"\d+\.\d"
    progress = rf"step 3/3  loss {number}+ nats  load {number}+ to {number}+  dropped {number}%"
    assert re.fullmatch(rf"{progress}  0 s left", text[1])
    assert re.fullmatch(rf" *0.25 +{number}% +{number}+ +{number} % +{number} %", text[3])
    got = rf"result: accuracy that BPR saves at 0.25: got -?{number} points, expected unknown, .*"
    assert re.fullmatch(got, text[-2])
    assert text[-1] == f"wrote {out}"
    assert out.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.usefixtures("small_demo")
def test_demo_evaluates_every_digit_once(digits):
    """40 digits are one batch of 32 and one of 8; what fills it up takes no slots."""
    images, _ = moe.load_digits(digits)
    params = random_params(moe.DIGITS)
    forward = jax.jit(functools.partial(moe.forward, config=moe.DIGITS))
    guesses = []
    for rows in (slice(0, 32), slice(32, 40)):
        logits, _ = forward(params, images[rows].astype(np.float32) / 127.5 - 1)
        guesses.append(np.argmax(logits, -1).astype(np.int32))
    guesses = np.concatenate(guesses)
    accuracy, metrics = moe.evaluate(params, moe.DIGITS, mesh_of(2, 1), images, guesses)
    assert accuracy == 100 and 0 < metrics["dropped"] < 0.9
    wrong = np.where(np.arange(40) < 30, guesses, (guesses + 1) % 10)
    assert moe.evaluate(params, moe.DIGITS, mesh_of(2, 1), images, wrong)[0] == 75


@pytest.mark.usefixtures("small_demo")
def test_demo_stops_at_a_loss_that_is_not_finite(digits, tmp_path, capsys, monkeypatch):
    recipe = moe.RECIPES["digits"]._replace(learning_rate=1e38)
    monkeypatch.setitem(moe.RECIPES, "digits", recipe)
    out = tmp_path / "d.png"
    assert moe.main(["--data", digits, "--out", str(out), "--steps", "30"]) == 1
    assert re.fullmatch(r"moe.py: step \d+: the loss is (nan|inf)\n", capsys.readouterr().err)
    assert not out.exists()


@pytest.mark.usefixtures("small_demo")
def test_demo_prints_its_result_where_it_cannot_draw(digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # import fails
    params = random_params(moe.DIGITS)
    monkeypatch.setattr(moe, "train", lambda *args: params)
    assert moe.main(["--data", digits, "--out", str(tmp_path / "d.png"), "--steps", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("result: accuracy that BPR saves at 0.25: got ")
    assert lines[-1].startswith("no figure: ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--steps 0", "--steps 0 is not at least 1"),
        ("--seed -1", "--seed -1 is not in 0 to 4294967295"),
        ("--mesh data=1,model=2", "model=2: moe.py shards nothing over this mesh axis"),
        ("--mesh data=3,model=1", "experts=8 are not a multiple of mesh axis data=3"),
        ("--mesh data=8,model=1", "the batch of 32 is not a multiple of 64"),
        ("--out f.npz", "--out f.npz is not a .png, .pdf or .svg"),
        ("--data missing.npz", "missing.npz does not exist"),
    ],
)
def test_demo_refuses_in_one_line(flags, message, digits, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert moe.main(["--data", digits, "--out", "d.png", "--steps", "2", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("moe.py: ") and message in error
    assert len(error.splitlines()) == 1 and list(tmp_path.iterdir()) == []
