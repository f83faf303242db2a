"""gsam.py against three official codes, by hand, and by what the papers claim."""

import functools
import importlib
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import gsam
import vit
from common import ROOT, close, count, golden, matmul_flops, part

golden = functools.partial(golden, "gsam")


def nest(flat):
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree = {}
    for name, array in flat.items():
        layer, leaf = name.split("/")
        tree.setdefault(layer, {})[leaf] = jnp.asarray(array)
    return tree


def tree_of(arrays, prefix, index=...):
    """The tree of the arrays below prefix, each at index."""
    return nest({name: array[index] for name, array in part(arrays, prefix).items()})


def assert_close(got, want, tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=tolerance), got, want)


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def tanh_loss(params, x, y):
    """Of the goldens with dense1 and dense2."""
    hidden = jnp.tanh(x @ params["dense1"]["kernel"] + params["dense1"]["bias"])
    logits = hidden @ params["dense2"]["kernel"] + params["dense2"]["bias"]
    return -(y * jax.nn.log_softmax(logits)).sum(-1).mean()


def sigmoid_loss(params, x, y):
    """Of the goldens with head alone."""
    logits = x @ params["head"]["kernel"] + params["head"]["bias"]
    return optax.sigmoid_binary_cross_entropy(logits, y).sum(-1).mean()


def load(name):
    meta, arrays = golden(name)
    loss = sigmoid_loss if "params/head/bias" in arrays else tanh_loss
    return meta["config"], arrays, loss, tree_of(arrays, "params/")


def gradient_of(loss):
    """A gradient function, of a batch (x, y)."""

    def gradient(params, batch, key, step):
        value, grads = jax.value_and_grad(loss)(params, *batch)
        return (value, {"loss": value}), grads

    return gradient


def mesh_of(devices):
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))


# ==== Golden ======================================================================================


@pytest.mark.parametrize("name", ["gsam_mlp_grid", "gsam_logreg_grid"])
def test_c1_golden_gradients(name):
    config, arrays, loss, params = load(name)
    batch = arrays["in/x"], arrays["in/y"]

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(adaptive, minimize, rho, alpha):
        gradient = gsam.gsam(gradient_of(loss), rho, alpha, adaptive=adaptive, minimize=minimize)
        clean = jax.grad(loss)(params, *batch)
        step = gsam.perturbation(params, clean, rho, adaptive)
        return gradient(params, batch, None, 0), jax.tree.map(jnp.add, params, step)

    for i, row in enumerate(config["rows"]):
        adaptive = "big_vision" if row["adaptive_perturbation"] else None
        minimize = "perturbed" if row["minimize_fp"] else "clean"
        result = run(adaptive, minimize, jnp.float32(row["rho"]), row["alpha"])
        ((value, metrics), grads), perturbed = result
        assert_close(grads, tree_of(arrays, "out/g_gsam/", i), 1e-6)
        assert_close(perturbed, tree_of(arrays, "out/params_perturbed/", i), 1e-6)
        assert float(value) == pytest.approx(float(arrays["out/loss_clean"]), abs=1e-6)
        want = loss(tree_of(arrays, "out/params_perturbed/", i), *batch)
        assert float(metrics["perturbed_loss"]) == pytest.approx(float(want), abs=1e-6)
        assert float(metrics["gap"]) == pytest.approx(float(want - value), abs=1e-6)


def test_c1_golden_parts_of_a_gradient():
    config, arrays, _, _ = load("gsam_mlp_grid")
    clean = tree_of(arrays, "out/g_clean/")
    assert float(gsam.norm(clean)) == pytest.approx(float(arrays["out/g_clean_norm"]), rel=1e-6)
    for i, row in enumerate(config["rows"]):
        a, b = clean, tree_of(arrays, "out/g_robust/", i)
        if not row["minimize_fp"]:
            a, b = b, a
        assert_close(gsam.orthogonal_part(a, b), tree_of(arrays, "out/residual/", i), 1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "gsam_traj_sgdm",
        "gsam_traj_sgdm_nesterov_fpfalse",
        "gsam_traj_adamw",
        "gsam_traj_adamw_adaptive",
        "sam_traj_sgdm",
    ],
)
def test_c1_golden_training(name):
    config, arrays, loss, params = load(name)
    rates = jnp.asarray(config["lrs"])

    def rate_of_next(step):  # official: rho is that of the step after, so this is the one before
        return rates[step - 1]

    radius = config["gsam"]
    rho = gsam.rho_from_learning_rate(
        rate_of_next,
        radius["rho_max"],
        radius["rho_min"],
        radius["lr_max"],
        radius["lr_min"],
        official=True,
    )
    gradient = gsam.gsam(
        gradient_of(loss),
        rho,
        radius["alpha"],
        adaptive="big_vision" if radius.get("adaptive_perturbation") else None,
        minimize="perturbed" if radius.get("minimize_fp", True) else "clean",
    )
    make = {"optax.sgd": optax.sgd, "optax.adamw": optax.adamw}[config["optimizer"]]
    optimizer = make(lambda step: rates[step], **config["opt_kwargs"])

    @jax.jit
    def step(params, state, batch, i):
        (value, _), grads = gradient(params, batch, None, i)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value, grads

    state = optimizer.init(params)
    for i in range(config["steps"]):
        assert float(rho(i)) == pytest.approx(float(arrays["out/rho"][i]), abs=1e-6)
        batch = arrays["in/x"][i], arrays["in/y"][i]
        params, state, value, grads = step(params, state, batch, i)
        assert float(value) == pytest.approx(float(arrays["out/loss_clean"][i]), abs=1e-6)
        assert_close(grads, tree_of(arrays, "out/g_gsam/", i), 1e-6)
        assert_close(params, tree_of(arrays, "out/params/", i), 1e-6)


def test_c1_golden_chain_of_big_vision():
    """rho there runs one step ahead of the learning rate, and goes below rho_min in warm-up."""
    config, arrays, loss, params = load("gsam_traj_bigvision_chain")
    rates = np.append(arrays["out/lr_opt"], arrays["out/lr_rho"][-1])
    np.testing.assert_allclose(rates[1:], arrays["out/lr_rho"], rtol=1e-6)

    def rate(step):
        return jnp.asarray(rates)[step]

    radius = config["gsam"]
    ends = radius["rho_max"], radius["rho_min"], radius["lr_max"], radius["lr_min"]
    rho = gsam.rho_from_learning_rate(rate, *ends, official=True)
    gradient = gsam.gsam(gradient_of(loss), rho, radius["alpha"])
    kernels = {"dense1": {"kernel": True, "bias": False}, "dense2": {"kernel": True, "bias": False}}
    optimizer = optax.chain(
        optax.clip_by_global_norm(config["grad_clip_norm"]),
        optax.scale_by_adam(mu_dtype="float32"),
        optax.scale(config["lr"]),
        optax.add_decayed_weights(config["wd"], kernels),
        optax.scale_by_schedule(lambda step: rate(step) / config["lr"]),
        optax.scale(-1),
    )
    state = optimizer.init(params)
    run = jax.jit(gradient)
    for i in range(config["steps"]):
        assert float(rho(i)) == pytest.approx(float(arrays["out/rho"][i]), abs=1e-6)
        _, grads = run(params, (arrays["in/x"][i], arrays["in/y"][i]), None, i)
        assert_close(grads, tree_of(arrays, "out/g_gsam/", i), 1e-6)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        assert_close(params, tree_of(arrays, "out/params/", i), 1e-6)


def test_c1_golden_pytorch():
    """The authors' code; its adaptive form is that of ASAM."""
    config, arrays, loss, first = load("gsam_pytorch_traj")
    for c, row in enumerate(config["rows"]):
        adaptive = "asam" if row["adaptive"] else None

        @jax.jit
        def run(params, batch, rho, alpha=row["alpha"], adaptive=adaptive):
            gradient = gsam.gsam(gradient_of(loss), rho, alpha, adaptive=adaptive)
            step = gsam.perturbation(params, jax.grad(loss)(params, *batch), rho, adaptive)
            return gradient(params, batch, None, 0)[1], jax.tree.map(jnp.add, params, step)

        params = first
        for i in range(config["steps"]):
            batch = arrays["in/x"][i], arrays["in/y"][i]
            grads, perturbed = run(params, batch, arrays[f"out/c{c}/rho"][i])
            assert_close(grads, tree_of(arrays, f"out/c{c}/g_gsam/", i), 1e-6)
            assert_close(perturbed, tree_of(arrays, f"out/c{c}/params_perturbed/", i), 1e-6)
            params = tree_of(arrays, f"out/c{c}/params/", i)


def test_c1_golden_optax_contrib():
    config, arrays, loss, params = load("sam_optax_contrib")
    gradient = jax.jit(gsam.gsam(gradient_of(loss), config["rho"]))
    optimizer = optax.sgd(config["learning_rate"], config["momentum"])
    state = optimizer.init(params)
    for i in range(config["steps"]):
        _, grads = gradient(params, (arrays["in/x"][i], arrays["in/y"][i]), None, i)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        assert_close(params, tree_of(arrays, "out/opaque/params/", i), 1e-6)


def test_c1_golden_rho_schedule():
    config, arrays, loss, params = load("gsam_rho_schedule")
    batch = arrays["in/x"], arrays["in/y"]

    @jax.jit
    def run(rho, alpha):
        return gsam.gsam(gradient_of(loss), rho, alpha)(params, batch, None, 0)[1]

    below = 0
    for i, row in enumerate(config["rows"]):
        ends = row["rho_max"], row["rho_min"], row["lr_max"], row["lr_min"]
        rho = gsam.rho_from_learning_rate(row["lr"], *ends, official=True)(0)
        assert float(rho) == pytest.approx(float(arrays["out/rho"][i]), abs=1e-6)
        grads = run(jnp.float32(rho), row["alpha"])
        assert_close(grads, tree_of(arrays, "out/g_gsam/", i), 1e-6)
        clipped = float(gsam.rho_from_learning_rate(row["lr"], *ends)(0))
        assert clipped == pytest.approx(np.clip(rho, row["rho_min"], row["rho_max"]), abs=1e-6)
        below += rho < 0
    assert below >= 1


def test_c1_golden_bfloat16():
    config, arrays, loss, params = load("gsam_bfloat16")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    batch = [jnp.asarray(arrays[name], jnp.bfloat16) for name in ("in/x", "in/y")]
    ends = config["rho_max"], config["rho_min"], config["lr_max"], config["lr_min"]
    rho = gsam.rho_from_learning_rate(config["lr"], *ends)
    gradient = gsam.gsam(gradient_of(loss), rho, config["alpha"])
    _, grads = jax.jit(gradient)(params, batch, None, 0)
    want = tree_of(arrays, "out/py_lr/g_gsam/")
    largest = max(float(abs(leaf).max()) for leaf in jax.tree.leaves(want))
    for got, leaf in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        assert got.dtype == jnp.bfloat16
        close(got, leaf, 2e-2, largest)


def test_c1_golden_edges_where_the_official_code_gives_nan():
    """A constant loss, and gradients whose squares are too small for float32."""
    config, arrays, _, params = load("gsam_edge_zero_gradient")
    c = jnp.asarray(arrays["in/c"])
    losses = {
        "flat": lambda p: 0 * p["a"]["w"].sum() + 3.0,
        "linear_one_leaf": lambda p: (p["a"]["w"] * c).sum(),
        "tiny": lambda p: 1e-15 * (p["a"]["w"] * c).sum(),
        "tiny_underflow": lambda p: 1e-25 * (p["a"]["w"] * c).sum(),
    }
    for row in config["rows"]:
        case = f"{row['case']}_fp{int(row['minimize_fp'])}_alpha{row['alpha']}"
        run = gsam.gsam_value_and_grad(
            losses[row["case"]],
            config["rho"],
            row["alpha"],
            minimize="perturbed" if row["minimize_fp"] else "clean",
        )
        _, grads = run(params)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
        if not row["any_nan_g_gsam"]:
            want = tree_of(arrays, f"out/value/{case}/")
            largest = float(gsam.norm(want))
            assert_close(grads, want, 1e-6 * largest)


# ==== Golden: several devices =====================================================================


def as_batch(arrays, index=...):
    return {"x": arrays["in/x"][index], "y": arrays["in/y"][index]}


def loss_of_batch(loss):
    """loss_fn of per_shard: (params, batch, key) -> (loss, metrics)."""

    def loss_fn(params, batch, key):
        value = loss(params, batch["x"], batch["y"])
        return value, {"loss": value}

    return loss_fn


def global_gradient(loss, mesh):
    """The gradient of the mean over all devices."""

    def local(params, x, y):
        return jax.lax.pmean(loss(params, x, y), "data")

    whole = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P())

    def gradient(params, batch, key, step):
        value, grads = jax.value_and_grad(whole)(params, batch["x"], batch["y"])
        return (value, {"loss": value}), grads

    return gradient


@pytest.mark.parametrize("name", ["gsam_multidevice", "sam_multidevice"])
def test_c6_golden_devices_alone_and_together(name):
    config, arrays, loss, params = load(name)
    ends = config["rho_max"], config["rho_min"], config["lr_max"], config["lr_min"]
    rho = gsam.rho_from_learning_rate(config["lr"], *ends)
    mesh = mesh_of(4)
    specs = jax.tree.map(lambda _: P(), params)
    alone = gsam.per_shard(loss_of_batch(loss), mesh, specs, rho, config["alpha"])
    together = gsam.gsam(global_gradient(loss, mesh), rho, config["alpha"])
    batch = as_batch(arrays)
    (value, metrics), grads = jax.jit(alone)(params, batch, None, 0)
    assert float(value) == pytest.approx(float(arrays["out/mean_loss"]), abs=1e-6)
    assert float(metrics["loss"]) == float(value)
    assert_close(grads, tree_of(arrays, "out/mean_g_gsam/"), 1e-6)
    _, grads = jax.jit(together)(params, batch, None, 0)
    whole = tree_of(arrays, "out/whole_g_gsam/")
    assert_close(grads, whole, 1e-6)
    mean = tree_of(arrays, "out/mean_g_gsam/")
    apart = max(jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), mean, whole)))
    assert apart > 0.01  # the official code: 0.040 of 0.23


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_c6_devices_equal_a_loop_over_their_rows(devices):
    _, arrays, loss, params = load("gsam_multidevice")
    batch = as_batch(arrays)
    mesh = mesh_of(devices)
    specs = jax.tree.map(lambda _: P(), params)
    run = jax.jit(gsam.per_shard(loss_of_batch(loss), mesh, specs, 0.3, 0.4))
    (value, metrics), grads = run(params, batch, None, 0)
    one = jax.jit(gsam.gsam(gradient_of(loss), 0.3, 0.4))
    parts = []
    for x, y in zip(np.split(batch["x"], devices), np.split(batch["y"], devices)):
        parts.append(one(params, (x, y), None, 0))
    want = jax.tree.map(lambda *each: sum(each) / devices, *parts)
    assert_close(((value, metrics), grads), want, 1e-6)
    together = jax.jit(gsam.gsam(global_gradient(loss, mesh), 0.3, 0.4))(params, batch, None, 0)
    assert_close(together, one(params, (batch["x"], batch["y"]), None, 0), 1e-6)


def test_c6_a_port_with_the_defaults_gives_n_times_the_other_gradient():
    """What the docstring of per_shard warns of: gradients inside shard_map, pmean after."""
    _, arrays, loss, params = load("sam_multidevice")

    def ported(params, x, y):
        grads = jax.grad(loss)(params, x, y)
        step = gsam.perturbation(params, grads, 0.3)
        grads = jax.grad(loss)(jax.tree.map(jnp.add, params, step), x, y)
        return jax.lax.pmean(grads, "data")

    mesh = mesh_of(4)
    port = jax.shard_map(ported, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P())
    got = jax.jit(port)(params, arrays["in/x"], arrays["in/y"])
    whole = tree_of(arrays, "out/whole_g_gsam/")
    assert_close(got, jax.tree.map(lambda x: 4 * x, whole), 1e-6)
    right = tree_of(arrays, "out/mean_g_gsam/")["dense2"]["bias"]
    np.testing.assert_allclose(right, [0.332, -0.179, -0.104, -0.049], atol=6e-4)
    np.testing.assert_allclose(got["dense2"]["bias"], [1.323, -0.712, -0.424, -0.187], atol=6e-4)


@pytest.mark.parametrize("name", ["sam_google_research_traj", "sam_google_research_clip"])
def test_c6_golden_google_research_sam(name):
    """One device, four that perturb alone and four together; weight decay is in the loss."""
    config, arrays, plain_loss, first = load(name)

    def loss(params, x, y):
        squares = sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(params))
        return plain_loss(params, x, y) + 0.5 * config["weight_decay"] * squares

    specs = jax.tree.map(lambda _: P(), first)
    rho = config["sam_rho"]
    gradients = {
        "dev1": gsam.gsam(global_gradient(loss, mesh_of(1)), rho),
        "dev4_unsynced": gsam.per_shard(loss_of_batch(loss), mesh_of(4), specs, rho),
        "dev4_synced": gsam.gsam(global_gradient(loss, mesh_of(4)), rho),
    }
    clip = optax.clip_by_global_norm(config["gradient_clipping"])
    optimizer = optax.sgd(config["learning_rate"], config["momentum"], config["nesterov"])
    for case, gradient in gradients.items():

        @jax.jit
        def step(params, state, batch, gradient=gradient):
            _, grads = gradient(params, batch, None, 0)
            grads, _ = clip.update(grads, clip.init(params))
            updates, state = optimizer.update(grads, state)
            return optax.apply_updates(params, updates), state, grads

        params = first
        state = optimizer.init(params)
        for i in range(config["steps"]):
            params, state, grads = step(params, state, as_batch(arrays, i))
            assert_close(grads, tree_of(arrays, f"out/{case}/grad/", i), 1e-6)
            assert_close(params, tree_of(arrays, f"out/{case}/params/", i), 1e-6)


# ==== Claims ======================================================================================


def random_case(seed=0):
    """A batch and weights of tanh_loss, in float32."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {
        "dense1": {"kernel": draw(6, 8), "bias": draw(8)},
        "dense2": {"kernel": draw(8, 4), "bias": draw(4)},
    }
    return params, (draw(16, 6), jax.nn.one_hot(rng.integers(0, 4, 16), 4))


def test_c2_without_alpha_it_is_sam_and_without_rho_nothing():
    """Algorithm 1; SAM: the gradient at w + rho g / |g|."""
    params, batch = random_case()
    plain = gradient_of(tanh_loss)
    assert gsam.gsam(plain, 0) is plain and gsam.gsam(plain, 0.0, alpha=0.4) is plain

    @jax.jit
    def sam(params):
        grads = jax.grad(tanh_loss)(params, *batch)
        step = gsam.perturbation(params, grads, 0.3)
        perturbed = jax.tree.map(jnp.add, params, step)
        return jax.grad(tanh_loss)(perturbed, *batch)

    _, grads = jax.jit(gsam.gsam(plain, 0.3))(params, batch, None, 0)
    assert_same(grads, sam(params))
    _, clean = jax.jit(gsam.gsam(plain, 0.3, minimize="clean"))(params, batch, None, 0)
    assert_same(clean, jax.jit(jax.grad(tanh_loss))(params, *batch))
    _, traced = jax.jit(lambda rho: gsam.gsam(plain, rho)(params, batch, None, 0))(0.0)
    assert_close(traced, clean, 1e-6)


def test_c3_to_first_order_gsam_lowers_the_gap_and_leaves_the_perturbed_loss():
    """ "simultaneously minimizing" both: Algorithm 1 takes from g what is orthogonal to g_p."""
    with jax.enable_x64(True):
        params, batch = random_case()
        params, batch = jax.tree.map(lambda x: x.astype(jnp.float64), (params, batch))
        rho = 0.1
        g = jax.grad(tanh_loss)(params, *batch)
        step = gsam.perturbation(params, g, rho)
        g_p = jax.grad(tanh_loss)(jax.tree.map(jnp.add, params, step), *batch)
        removed = gsam.orthogonal_part(g, g_p)
        assert abs(float(gsam.inner(removed, g_p))) < 1e-12
        assert float(gsam.norm(removed)) > 1e-3

        def values(distance):
            """f and, at a perturbation that is held fixed, f_p after a move along `removed`."""
            moved = jax.tree.map(lambda w, r: w + distance * r, params, removed)
            perturbed = jax.tree.map(jnp.add, moved, step)
            return float(tanh_loss(moved, *batch)), float(tanh_loss(perturbed, *batch))

        clean, perturbed = values(0.0)
        small = 1e-4
        clean_after, perturbed_after = values(small)
        rise = float(gsam.inner(removed, removed))
        assert (clean_after - clean) / small == pytest.approx(rise, rel=1e-2)
        assert abs(perturbed_after - perturbed) / small < 1e-2 * rise


def test_c4_at_a_minimum_the_gap_is_the_largest_eigenvalue():
    """Abstract: "equivalent to the dominant eigenvalue of Hessian at a local minimum"."""
    rng = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(rng.normal(size=(7, 7)))
    eigenvalues = np.array([9.0, 5, 4, 3, 2, 1, 0.5])
    hessian = jnp.asarray(rotation @ np.diag(eigenvalues) @ rotation.T, jnp.float32)

    def loss(params):
        w = jnp.concatenate([params["a"], params["b"]])
        return w @ hessian @ w / 2 + 1

    zero = {"a": jnp.zeros(3), "b": jnp.zeros(4)}
    value, vector = jax.jit(functools.partial(gsam.sharpness, loss, steps=60))(zero)
    assert float(value) == pytest.approx(9, rel=1e-4)
    assert float(gsam.norm(vector)) == pytest.approx(1, rel=1e-5)
    along = abs(np.concatenate([vector["a"], vector["b"]]) @ rotation[:, 0])
    assert along == pytest.approx(1, abs=1e-3)

    rho = 0.1
    beside = jax.tree.map(lambda v: 1e-5 * v, vector)  # at the minimum the gradient is zero
    (_, metrics), _ = gsam.gsam_value_and_grad(loss, rho)(beside)
    assert float(metrics["gap"]) == pytest.approx(rho**2 / 2 * float(value), rel=1e-3)


def test_c5_gsam_costs_what_sam_costs():
    """Abstract: "the same computational cost"; products counted from the jaxpr, all of them."""
    shape = {
        "kernel": jax.ShapeDtypeStruct((64, 64), "float32"),
        "bias": jax.ShapeDtypeStruct((64,), "float32"),
    }
    params = {"dense1": shape, "dense2": shape}
    batch = (jax.ShapeDtypeStruct((256, 64), "float32"),) * 2

    def flops(gradient):
        run = functools.partial(gradient, key=None, step=0)
        return count(jax.make_jaxpr(run)(params, batch).jaxpr, matmul_flops)

    plain = gradient_of(tanh_loss)
    sam = flops(gsam.gsam(plain, 0.1))
    assert flops(gsam.gsam(plain, 0.1, 0.4)) <= 1.02 * sam
    assert 2 * flops(plain) <= sam <= 2.04 * flops(plain)
    compiled = {}
    for name, gradient in (("sam", gsam.gsam(plain, 0.1)), ("gsam", gsam.gsam(plain, 0.1, 0.4))):
        run = functools.partial(gradient, key=None, step=0)
        compiled[name] = jax.jit(run).lower(params, batch).compile().cost_analysis()["flops"]
    assert compiled["gsam"] <= 1.02 * compiled["sam"]


@pytest.mark.long
def test_c7_with_wrong_labels_sam_and_gsam_generalise_better():
    """The demo's race, for two seeds of it and a third of the steps: a margin of 4 points."""
    data = gsam.read_data(ROOT / "data/mnist5k.npz")
    plain = gsam.mlp_gradient
    accuracy = {}
    for name, gradient in (
        ("SGD", plain),
        ("SAM", gsam.gsam(plain, gsam.RHO)),
        ("GSAM", gsam.gsam(plain, gsam.RHO, gsam.ALPHA)),
    ):
        _, _, found, _ = gsam.train(name, gradient, data, gsam.STEPS, seed=1)
        accuracy[name] = found["accuracy"][-1].mean()
    assert accuracy["SAM"] > accuracy["SGD"] + 4
    assert accuracy["GSAM"] > accuracy["SAM"]


def test_c8_it_composes_with_optax():
    """Clipping, MultiSteps, adamw, inject_hyperparams, bfloat16 weights, rho as a schedule."""
    params, batch = random_case()
    clipped = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1))
    cases = [
        (jnp.float32, clipped),
        (jnp.float32, optax.MultiSteps(optax.adamw(0.01), every_k_schedule=2)),
        (jnp.float32, optax.inject_hyperparams(optax.adamw)(learning_rate=0.01)),
        (jnp.bfloat16, clipped),
    ]
    rho = optax.linear_schedule(0.1, 0.3, 4)
    gradient = gsam.gsam(gradient_of(tanh_loss), rho, 0.4)
    for dtype, optimizer in cases:
        weights = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params)

        @jax.jit
        def step(weights, state, i, optimizer=optimizer):
            (loss, _), grads = gradient(weights, batch, None, i)
            updates, state = optimizer.update(grads, state, weights)
            return optax.apply_updates(weights, updates), state, loss

        state = optimizer.init(weights)
        losses = []
        for i in range(6):
            weights, state, loss = step(weights, state, i)
            losses.append(float(loss))
        assert losses[-1] < losses[0]
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(weights))


# ==== Options =====================================================================================


def test_a_mask_leaves_weights_unperturbed():
    params, batch = random_case()
    g = jax.grad(tanh_loss)(params, *batch)
    mask = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
    step = gsam.perturbation(params, g, 0.3, mask=mask)
    assert not np.any(step["dense1"]["bias"]) and not np.any(step["dense2"]["bias"])
    assert float(gsam.norm(step)) == pytest.approx(0.3, rel=1e-5)
    seen = []

    def gradient(params, batch, key, step):
        seen.append(params)
        return gradient_of(tanh_loss)(params, batch, key, step)

    gsam.gsam(gradient, 0.3, 0.4, mask=mask)(params, batch, None, 0)
    assert_close(seen[1], jax.tree.map(jnp.add, params, step), 1e-6)


def test_perturbations_by_hand():
    params = {"a": jnp.array([2.0]), "b": jnp.array([0.0, -1.0])}
    g = {"a": jnp.array([3.0]), "b": jnp.array([5.0, 4.0])}
    length = math.sqrt(9 + 25 + 16)
    assert_close(
        gsam.perturbation(params, g, 0.5),
        {"a": np.array([1.5]) / length, "b": np.array([2.5, 2.0]) / length},
        1e-6,
    )
    assert_close(
        gsam.perturbation(params, g, 0.5, "big_vision"),
        {"a": np.array([3.0]) / length, "b": np.array([0.0, 2.0]) / length},
        1e-6,
    )
    zero = jax.tree.map(jnp.zeros_like, g)
    assert_same(gsam.perturbation(params, zero, 0.5), zero)  # not 0/0
    length = math.sqrt(36 + 0 + 16)  # of |w| g
    assert_close(
        gsam.perturbation(params, g, 0.5, "asam"),
        {"a": np.array([6.0]) / length, "b": np.array([0.0, 2.0]) / length},
        1e-6,
    )


def test_orthogonal_parts_of_tiny_gradients():
    """Their squares are zero in float32."""
    a = {"a": jnp.array([3e-25, 1e-25]), "b": jnp.array([2e-25])}
    b = {"a": jnp.array([0.0, 5e-30]), "b": jnp.array([0.0])}
    part = gsam.orthogonal_part(a, b)
    np.testing.assert_allclose(part["a"], [3e-25, 0], atol=1e-31)
    np.testing.assert_allclose(part["b"], [2e-25], rtol=1e-6)
    zero = jax.tree.map(jnp.zeros_like, b)
    assert_same(gsam.orthogonal_part(a, zero), a)


def test_sharpness_of_bfloat16_weights():
    def loss(params):
        return (jnp.array([1.0, 4.0, -6.0]) * jnp.square(params["w"].astype("float32"))).sum() / 2

    value, vector = gsam.sharpness(loss, {"w": jnp.ones(3, "bfloat16")}, steps=40)
    assert float(value) == pytest.approx(-6, rel=1e-2)  # the largest in size
    assert vector["w"].dtype == jnp.bfloat16


def test_both_passes_get_the_same_batch_key_and_step():
    calls = []

    def gradient(params, batch, key, step):
        calls.append((batch, key, step))
        return (jnp.float32(1), {"other": 2}), params

    rho_steps = []

    def rho(step):
        rho_steps.append(step)
        return 0.1

    (_, metrics), _ = gsam.gsam(gradient, rho)({"w": jnp.ones(2)}, "batch", "key", 7)
    assert calls == [("batch", "key", 7)] * 2 and rho_steps == [7]
    assert metrics["other"] == 2 and set(metrics) == {"other", "perturbed_loss", "gap"}


def test_devices_draw_with_keys_of_their_own():
    def loss_fn(params, batch, key):
        return jax.random.uniform(key) + 0 * (params["w"] * batch["x"].mean()), {}

    run = gsam.per_shard(loss_fn, mesh_of(4), {"w": P()}, 0.1)
    key = jax.random.key(5)
    (loss, _), _ = jax.jit(run)({"w": jnp.float32(1)}, {"x": jnp.ones(8)}, key, 0)
    draws = [float(jax.random.uniform(jax.random.fold_in(key, i))) for i in range(4)]
    assert float(loss) == pytest.approx(np.mean(draws), rel=1e-6)


def test_microbatches_inside_and_around():
    """gsam(accumulate(g)) is gsam of the whole batch; accumulate(gsam(g)) is per_shard."""
    sys.path.insert(0, str(ROOT / "examples"))
    train = importlib.import_module("train")
    params, (x, y) = random_case()
    batch = {"images": x, "labels": y}

    def plain(params, batch, key, step):
        value, grads = jax.value_and_grad(tanh_loss)(params, batch["images"], batch["labels"])
        return (value, {"loss": value}), grads

    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    key = jax.random.key(0)
    inside = jax.jit(gsam.gsam(train.accumulate(plain, 4, mesh), 0.3, 0.4))
    whole = jax.jit(gsam.gsam(plain, 0.3, 0.4))(params, batch, key, 0)
    assert_close(inside(params, batch, key, 0), whole, 1e-6)

    around = jax.jit(train.accumulate(gsam.gsam(plain, 0.3, 0.4), 4, mesh))
    own = gsam.per_shard(
        loss_of_batch(tanh_loss), mesh_of(4), jax.tree.map(lambda _: P(), params), 0.3, 0.4
    )
    order = np.arange(16).reshape(4, 4).T.ravel()  # microbatch j has the rows j, j + 4, ...
    alone = jax.jit(own)(params, {"x": x[order], "y": y[order]}, key, 0)
    assert_close(around(params, batch, key, 0), alone, 1e-6)
    with pytest.raises(ValueError, match="a batch of 16 is not a multiple of 3 microbatches"):
        train.accumulate(plain, 3, mesh)(params, batch, key, 0)


# ==== Errors ======================================================================================


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rho": -0.1}, "rho=-0.1 is not at least 0 and finite"),
        ({"rho": math.inf}, "rho=inf is not at least 0 and finite"),
        ({"rho": np.float32(-1)}, "rho=-1.0 is not at least 0 and finite"),
        ({"rho": 0.1, "alpha": math.nan}, "alpha=nan is not at least 0 and finite"),
        ({"rho": 0.1, "alpha": -0.4}, "alpha=-0.4 is not at least 0 and finite"),
        (
            {"rho": 0.1, "adaptive": "sam"},
            "adaptive='sam' is not one of (None, 'big_vision', 'asam'",
        ),
        ({"rho": 0.1, "minimize": "gap"}, "minimize='gap' is not one of ('perturbed', 'clean')"),
    ],
    ids=str,
)
def test_options_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        gsam.gsam(gradient_of(tanh_loss), **options)


def test_what_does_not_fit_is_refused():
    params, batch = random_case()
    with pytest.raises(ValueError, match="mask is .*, not like params"):
        gsam.gsam(gradient_of(tanh_loss), 0.1, mask={"dense1": True})(params, batch, None, 0)
    with pytest.raises(ValueError, match=re.escape("the loss has shape (16,), not ()")):
        gsam.gsam_value_and_grad(lambda params, x, y: (x @ params["dense1"]["kernel"]).sum(1), 0.1)(
            params, *batch
        )
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with pytest.raises(ValueError, match="mesh axis model=4: each device needs all weights"):
        gsam.per_shard(tanh_loss, mesh, {}, 0.1)
    with pytest.raises(
        ValueError, match=re.escape("a/kernel is sharded over ['data']: each device")
    ):
        gsam.per_shard(tanh_loss, mesh_of(4), {"a": {"kernel": P(None, "data")}}, 0.1)
    alone = jax.make_mesh((4, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    gsam.per_shard(
        tanh_loss, alone, {"a": {"kernel": P(None, "model")}}, 0.1
    )  # not cut: one device
    with pytest.raises(
        ValueError, match="rho_min=0.2 and rho_max=0.1 are not finite with 0 <= rho_min"
    ):
        gsam.rho_from_learning_rate(1e-3, 0.1, 0.2, 1e-3)
    with pytest.raises(ValueError, match="lr_min=0.1 is above lr_max=0.01"):
        gsam.rho_from_learning_rate(1e-3, 0.2, 0.1, 0.01, 0.1)


# ==== Demo ========================================================================================


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """40 pictures of 28x28 in ten classes."""
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, images=images, labels=np.arange(40, dtype=np.uint8) % 10)
    return str(path)


def test_wrong_labels_are_as_many_as_stated():
    data = gsam.read_data(ROOT / "data/mnist5k.npz")
    images, labels = gsam.load_digits(ROOT / "data/mnist5k.npz")
    assert data.images.shape == (1000, 784) and data.held_out_images.shape == (4000, 784)
    assert float(data.images.min()) == 0 and float(data.images.max()) == 1
    wrong = np.random.default_rng(1).random(1000) < gsam.WRONG
    np.testing.assert_array_equal(data.labels != labels[:1000], wrong)  # none stays right by chance
    assert 0.37 < wrong.mean() < 0.43
    np.testing.assert_array_equal(data.held_out_labels, labels[1000:])


def test_demo_trains_and_draws(digits, tmp_path, capsys):
    out = tmp_path / "d.png"
    assert gsam.main(["--data", digits, "--out", str(out), "--steps", "13"]) == 0
    text = capsys.readouterr().out.splitlines()
    assert text[0] == "32 digits, 40 % of their labels wrong, 8 held out, 5 seeds"
    for name in ("SGD", "SAM", "GSAM"):
        progress = rf"{name}: step 13/13  loss \d\.\d{{3}} nats  gap \d\.\d{{4}}  0 s left"
        assert any(re.fullmatch(progress, line) for line in text)
        summary = (
            rf"{name}: held-out accuracy \d+\.\d % \+- \d+\.\d, gap .* eigenvalue .* ms a step"
        )
        assert any(re.fullmatch(summary, line) for line in text)
    got = r"result: held-out accuracy of GSAM above that of SGD: got -?\d+\.\d points, expected.*"
    assert re.fullmatch(got, text[-2])
    assert text[-1] == f"wrote {out}" and out.read_bytes()[:4] == b"\x89PNG"


def test_demo_stops_at_a_loss_that_is_not_finite(digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gsam, "LEARNING_RATE", 1e38)
    out = tmp_path / "d.png"
    assert gsam.main(["--data", digits, "--out", str(out), "--steps", "12"]) == 1
    assert re.fullmatch(r"gsam.py: SGD, step \d+: the loss is (nan|inf)\n", capsys.readouterr().err)
    assert not out.exists()


@pytest.mark.parametrize(("gain", "status"), [(8.1, 0), (7.9, 1), (math.nan, 1)])
def test_demo_prints_its_result_where_it_cannot_draw(gain, status, capsys, monkeypatch, tmp_path):
    """With stand-ins for all that takes long. Below the floor it fails."""
    params = jax.vmap(gsam.init_mlp)(jax.random.split(jax.random.key(0), gsam.SEEDS))
    accuracy = {"SGD": 60.0, "SAM": 61.0, "GSAM": 60.0 + gain}

    def train(name, gradient, data, steps, seed):
        found = {"accuracy": np.full((1, gsam.SEEDS), accuracy[name])}
        return params, [steps], found | {"gap": np.ones((1, gsam.SEEDS))}, 0.001

    def sharpness(loss, params, images, labels):
        return jnp.ones(()), params

    monkeypatch.setattr(gsam, "train", train)
    monkeypatch.setattr(gsam, "sharpness", sharpness)
    monkeypatch.setattr(gsam, "loss_along", lambda params, direction, distances, data: distances)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # import fails
    monkeypatch.chdir(tmp_path)
    assert gsam.main([]) == status
    lines = capsys.readouterr().out.splitlines()
    expected = f"got {gain:.1f} points, expected 11.3 points, at least 8.0 points"
    assert lines[-2] == f"result: held-out accuracy of GSAM above that of SGD: {expected}"
    assert lines[-1].startswith("no figure: ")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--steps 0", "--steps 0 is not at least 1"),
        ("--seed -1", "--seed -1 is not in 0 to 4294967295"),
        ("--rho -1", "rho=-1.0 is not at least 0 and finite"),
        ("--alpha nan", "alpha=nan is not at least 0 and finite"),
        ("--out f.npz", "--out f.npz is not a .png, .pdf or .svg"),
        ("--data missing.npz", "missing.npz does not exist"),
    ],
)
def test_demo_refuses_in_one_line(flags, message, digits, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert gsam.main(["--data", digits, "--out", "d.png", "--steps", "2", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gsam.py: ") and message in error
    assert len(error.splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_it_trains_a_vit():
    """Around the gradient of vit.py, on 2 x 4 devices, the numbers of one device."""
    config = vit.Config(image_size=8, patch_size=4, width=16, depth=1, heads=4, mlp=32, classes=3)
    rng = np.random.default_rng(0)
    batch = {
        "images": rng.uniform(-1, 1, (8, 8, 8, 3)).astype(np.float32),
        "labels": rng.integers(0, 3, 8).astype(np.int32),
    }
    optimizer = optax.sgd(0.1)
    results = []
    for shape in ((1, 1), (2, 4)):
        mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        value_and_grad = jax.value_and_grad(vit.global_loss(config, mesh), has_aux=True)

        def plain(params, batch, key, step, value_and_grad=value_and_grad):
            return value_and_grad(params, batch, key)

        step = vit.make_train_step(config, optimizer, mesh, gsam.gsam(plain, 0.1, 0.4))
        state = vit.init_state(jax.random.key(0), config, optimizer, mesh)
        found = []
        for _ in range(4):
            state, metrics = step(state, batch, jax.random.key(0))
            found.append([float(metrics[name]) for name in ("loss", "perturbed_loss", "gap")])
        results.append(found)
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4, atol=1e-5)
    assert results[0][-1][0] < results[0][0][0]
