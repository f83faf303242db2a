"""vdm.py against the official code, by hand, and by what the paper claims.

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

import common
import vdm
from common import ROOT, close, mesh_of, part

golden = functools.partial(common.golden, "vdm")
GOLDENS = [path.stem for path in sorted((ROOT / "tests/golden/vdm").glob("*.npz"))]
TINY = vdm.Config(
    image_size=4, channels=1, levels=5, width=64, depth=1, dropout=0.0, fourier=(2,), gamma_min=-6.0
)
NETWORK = dataclasses.replace(TINY, schedule="network")


def change(config, **fields):
    return dataclasses.replace(config, **fields)


def random_params(config, seed=0, scale=0.3):
    """Weights without zeros, so that every path of the model counts."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(functools.partial(vdm.init_params, config=config), jax.random.key(0))

    def draw(leaf):
        return (scale * rng.normal(size=leaf.shape)).astype(np.float32)

    params = jax.tree.map(draw, shapes)
    schedule = jax.jit(lambda key: vdm.init_params(key, config)["gamma"])
    params["gamma"] = jax.device_get(schedule(jax.random.key(0)))
    return params


def random_images(config, count, seed=0):
    return np.random.default_rng(seed).integers(0, config.levels, (count, *config.shape))


# ==== Golden ======================================================================================

SCHEDULES = {"fixed": "linear", "learnable_scalar": "scalar", "learnable_nnet": "network"}


def config_of(meta, images):
    """The Config of a golden of the official model."""
    official = meta["config"]["all_model_hyperparameters"]
    return vdm.Config(
        image_size=images.shape[1:3],
        width=official["sm_n_embd"],
        depth=official["sm_n_layer"],
        attention=official["with_attention"],
        fourier=(6, 7) if official["with_fourier_features"] else (),
        timesteps=official["sm_n_timesteps"],
        schedule=SCHEDULES[official["gamma_type"]],
        endpoints="official",
        schedule_objective="bound",
        gamma_min=official["gamma_min"],
        gamma_max=official["gamma_max"],
        low_discrepancy=official["antithetic_time_sampling"],
    )


@pytest.mark.parametrize("name", [name for name in GOLDENS if name.startswith("gamma")])
def test_c1_golden_schedules(name):
    """gamma, its derivative, and the gradients of both."""
    meta, arrays = golden(name)
    schedule = SCHEDULES[meta["config"]["gamma_type"]]
    fields = {"endpoints": "official", "schedule_objective": "bound"}
    config = vdm.Config(schedule=schedule, **fields)
    params = {}
    for path, array in part(arrays, "params/").items():
        layer, _, kind = path.partition("/")
        if kind:
            params.setdefault(layer, {})[kind] = jnp.asarray(array)
        else:
            params[layer] = jnp.asarray(array)
    t = jnp.asarray(arrays["in/t"])

    def run(params):
        gammas = vdm.gammas_at(params, t, config)
        weighted = gammas.at_t * arrays["in/w_gamma"] + gammas.weight * arrays["in/w_dgamma"]
        return weighted.sum(), gammas

    grads, gammas = jax.jit(jax.grad(run, has_aux=True))(params)
    close(gammas.at_t, arrays["out/gamma"], 1e-6)
    close(gammas.weight, arrays["out/dgamma_dt"], 1e-6)
    close(gammas.at_0, arrays["out/gamma_at_0_scalar_arg"].reshape(()), 1e-6)
    close(gammas.at_1, arrays["out/gamma_at_1_scalar_arg"].reshape(()), 1e-6)
    for path, want in part(arrays, "grad/").items():
        close(vdm.named_leaves(grads)[path], want, 2e-5)


def test_c1_golden_blocks():
    """Residual blocks, attention, sinusoids; two heads are not in the paper."""
    _, arrays = golden("blocks")
    x = jnp.asarray(arrays["in/x"])
    weighting = np.cos(0.7 * np.arange(2 * 4 * 4 * 96, dtype=np.float32))

    def run(function, name):
        weights = {}
        for path, array in part(arrays, f"params/{name}/").items():
            layer, kind = path.split("/")
            weights.setdefault(layer, {})[kind] = jnp.asarray(array)

        def weighted(weights, x):
            out = function(x, weights)
            return (out.ravel() * weighting[: out.size]).sum(), out

        grads, out = jax.jit(jax.grad(weighted, (0, 1), has_aux=True))(weights, x)
        close(out, arrays[f"out/{name}"], 1e-5)
        # The official variance, E[x^2] - E[x]^2, is 6.3e-5 off what float64 gives, ours 3.4e-7.
        close(grads[1], arrays[f"grad/{name}:x"], 1e-4)
        largest = max(float(abs(leaf).max()) for leaf in jax.tree.leaves(grads[0]))
        for path, leaf in vdm.named_leaves(grads[0]).items():
            compare_gradient(arrays, f"grad{{}}/{name}/{path}", leaf, largest, 1e-4)

    def block(x, weights):
        # The golden's second block has 96 channels, and as many in nin_shortcut.
        return vdm.block(x, arrays["in/cond"], weights, TINY, None)

    run(block, "resnet_same")
    run(block, "resnet_project")
    run(vdm.pixel_attention, "attn_1head")
    for size in (32, 7):
        close(vdm.sinusoids(arrays["in/t"], size), arrays[f"out/temb_{size}"], 1e-5)
    corner = x[:1, :2, :2, :3]
    for first, last in ((6, 8), (0, 8)):
        features = vdm.fourier_features(corner, tuple(range(first, last)))[..., 3:]
        close(features, arrays[f"out/fourier_{first}_{last}"], 1e-5)


def compare_gradient(arrays, pattern, got, largest, tolerance):
    """With a golden's gradient, of which large ones are stored as slices, norm and sum."""
    got = np.asarray(got, np.float64)
    if pattern.format("") in arrays:
        close(got, arrays[pattern.format("")], tolerance, largest)
        return
    step = math.ceil(got.size / 120)
    close(got.ravel()[::step], arrays[pattern.format("slice")], tolerance, largest)
    want = float(arrays[pattern.format("norm")])
    assert np.linalg.norm(got) == pytest.approx(want, abs=tolerance * largest * got.size**0.5)


def test_c1_golden_encoder_and_decoder():
    _, arrays = golden("encdec")
    close(vdm.encode(jnp.arange(256), 256), arrays["out/encode_all"], 1e-6)
    images = jnp.asarray(arrays["in/x"])
    close(vdm.encode(images, 256), arrays["out/encode"], 1e-6)
    z = jnp.asarray(arrays["in/z"])
    for i, gamma in enumerate(arrays["in/g_0"]):

        def log_probability(z, gamma):
            # z_0 / alpha_0 is the encoded picture plus exp(gamma_0 / 2) eps_0.
            eps_0 = (z - vdm.encode(images, 256)) * jnp.exp(-gamma / 2)
            # A gradient through z alone: eps_0 is a function of gamma only in this test.
            return -vdm.reconstruction_loss(images, eps_0, gamma, 256)

        def total(z, gamma):
            return log_probability(z, gamma).sum()

        close(log_probability(z, gamma), arrays[f"out/logprob_{i}"], 1e-5)
        logits = jax.nn.log_softmax(vdm.decoder_logits(z, gamma, 256))
        close(logits[:1, :1], arrays[f"out/decode_{i}"], 1e-5)
        chosen = vdm.decoder_logits(z, gamma, 256).argmax(-1)
        np.testing.assert_array_equal(chosen, arrays[f"out/decode_argmax_{i}"])
        grads = jax.grad(total, (0, 1))(z, gamma)
        close(grads[0], arrays[f"grad/z_{i}"], 1e-4)
        close(grads[1], arrays[f"grad/g_0_{i}"][0], 1e-4)


@pytest.mark.parametrize(
    "name",
    [
        *("loss_continuous_fixed", "loss_continuous_scalar", "loss_continuous_nnet_attention"),
        "loss_discrete_nnet_iid_time_T7",
        pytest.param("loss_discrete_scalar_T10", marks=pytest.mark.long),  # of both there is one
    ],
)
def test_c1_golden_losses(name):
    """Terms and gradients of the whole bound, with the captured draws."""
    meta, arrays = golden(name)
    images = arrays["in/images"]
    config = config_of(meta, images)
    params = vdm.from_official(part(arrays, "params/"), config)
    t = arrays["in/noise_t"]
    if config.low_discrepancy:
        t = vdm.even_times(t, 4)
    T = config.timesteps
    want_t = np.ceil(t * T) / T if T else t
    close(want_t, arrays["mid/t"], 1e-6)

    def terms_of(params):
        draws = vdm.Draws(t, arrays["in/noise_eps_0"], arrays["in/noise_eps"])
        return vdm.losses(params, images, arrays["in/conditioning"], draws, config)

    def bound(params):
        terms = terms_of(params)
        return sum(vdm.in_bits(term, config).mean() for term in terms), terms

    (bits, terms), grads = jax.jit(jax.value_and_grad(bound, has_aux=True))(params)
    close(terms.reconstruction, arrays["out/loss_recon"], 1e-6)
    close(terms.diffusion, arrays["out/loss_diff"], 1e-5)
    # The official prior takes a 1 from a 1: in float32 that leaves 1e-7 of each of 108 dimensions.
    np.testing.assert_allclose(terms.prior, arrays["out/loss_klz"], rtol=0, atol=1.1e-5)
    assert float(bits) == pytest.approx(float(arrays["out/bpd"]), rel=1e-5)

    gammas = vdm.gammas_at(params["gamma"], jnp.asarray(t), config)
    close(gammas.at_t, arrays["mid/g_t"], 1e-6)
    z_t = vdm.diffuse(vdm.encode(images, 256), gammas.at_t, arrays["in/noise_eps"])
    close(z_t, arrays["mid/z_t"], 1e-6)
    eps_hat = jax.jit(functools.partial(vdm.score_network, config=config))(
        params["score_model"], arrays["mid/z_t"], arrays["mid/g_t"], arrays["in/conditioning"]
    )
    close(eps_hat, arrays["mid/eps_hat"], 1e-5)  # of the stored z_t: the network itself

    official = vdm.to_official(grads, config)
    # An ulp of z_t moves eps_hat by 1.4e-4, through features of frequency 2^7; the gradients of
    # the schedule are sums that cancel, and move by up to 6e-3.
    largest = max(float(abs(g).max()) for g in official.values())
    for path, leaf in official.items():
        tolerance = 1e-2 if path.startswith("gamma") else 2e-3
        scale = float(abs(leaf).max()) if path.startswith("gamma") else largest
        compare_gradient(arrays, f"grad{{}}/{path}", leaf, scale, tolerance)


def test_c1_golden_sampling():
    meta, arrays = golden("sampling")
    config = config_of(meta, arrays["in/z_t"])
    params = vdm.from_official(part(arrays, "params/"), config)
    score = functools.partial(vdm.score_network, config=config)

    @jax.jit
    def step(z_t, i, steps, noise):
        conditioning = arrays["in/conditioning"]
        return vdm.ancestral_step(params, z_t, i, steps, noise, conditioning, config, score)

    for i in (0, 4, 9):
        z_s = step(arrays["in/z_t"], i, 10, arrays[f"in/noise_step{i}"])
        close(z_s, arrays[f"out/z_s_i{i}_T10"], 1e-3)
    z = arrays["in/z_1"]
    for i in range(4):  # each from the stored z: over several steps an ulp grows to 3e-2
        want = arrays[f"out/loop_z_after{i + 1}"]
        close(step(z, i, 4, arrays[f"in/noise_loop{i}"]), want, 1e-3)
        z = want
    np.testing.assert_array_equal(vdm.decode(params, z, config), arrays["out/loop_samples"])
    given = vdm.decode(params, arrays["in/z_0_given"], config)
    np.testing.assert_array_equal(given, arrays["out/generate_x_from_z0_given"])


def test_c1_golden_times():
    _, arrays = golden("antithetic_time")
    u = float(arrays["in/t0"])
    for count in (4, 5, 8, 49):
        t = vdm.even_times(u, count)
        close(t, arrays[f"out/t_n{count}"][:count], 1e-6)  # the official code has 50 for 49


def test_c1_golden_optimizer_and_average():
    meta, arrays = golden("optimizer_adamw_ema")
    official = meta["config"]
    recipe = vdm.RECIPES["CIFAR-10"]._replace(
        schedule_rate=1.0,
        learning_rate=official["learning_rate"],
        warmup=official["warmup"],
        weight_decay=official["weight_decay"],
    )
    optimizer = vdm.recipe_optimizer(recipe)

    def nested(flat):
        tree = {}
        for path, array in flat.items():
            layer, kind = path.split("/")
            tree.setdefault(layer, {})[kind] = jnp.asarray(array)
        return tree

    params = nested(part(arrays, "params/"))
    # The official mask also exempts scales of modules named layer_norm, of which there are none.
    params = {name: leaf for name, leaf in params.items() if name != "layer_norm"}
    average = params
    opt_state = optimizer.init(params)
    for step in range(official["steps"]):
        grads = nested(part(arrays, f"in/g{step}/"))
        del grads["layer_norm"]
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        average = vdm.update_average(average, params, official["ema_rate"])
        for tree, kind in ((params, "params"), (average, "ema")):
            want = part(arrays, f"out/{kind}_after{step + 1}/")
            for path, leaf in vdm.named_leaves(tree).items():
                close(leaf, want[path], 1e-5)


# ==== Equations, worked by hand ===================================================================

S = 0.4  # deviation of the Gaussian data


def gaussian_score(params, z, gamma, conditioning, config, keys=None):
    """E[eps | z_t] for x ~ N(0, S^2): the best estimate. params is a factor, 1 for the best."""
    gamma = gamma[:, None, None, None]
    variance = S**2 * jax.nn.sigmoid(-gamma) + jax.nn.sigmoid(gamma)  # of z_t
    return params * vdm.sigma(gamma) * z / variance


def gaussian_error(gamma):
    """The mean of (eps - E[eps | z_t])^2 for one dimension."""
    signal = S**2 / (1 + np.exp(gamma))
    return signal / (signal + 1 / (1 + np.exp(-gamma)))


def gaussian_losses(config, gamma_params, count, key=0, factor=1.0):
    """x [count], its prior and its diffusion loss, for one dimension and one draw each."""
    keys = jax.random.split(jax.random.key(key), 3)
    x = S * jax.random.normal(keys[0], (count, 1, 1, 1))
    eps = jax.random.normal(keys[1], x.shape)
    t = vdm.draw_times(keys[2], count, config)
    gammas = vdm.gammas_at(gamma_params, t, config)
    eps_hat = gaussian_score(factor, vdm.diffuse(x, gammas.at_t, eps), gammas.at_t, None, config)
    return vdm.prior_loss(x, gammas.at_1), vdm.diffusion_loss(eps, eps_hat, gammas.weight)


def test_terms_of_one_pixel_by_hand():
    """Level 3 of 5 is x = 0.4; the noise is given; every term as the paper writes it."""
    image = jnp.full((1, 1, 1, 1), 3)
    x = float(vdm.encode(image, 5)[0, 0, 0, 0])
    assert x == pytest.approx(0.4)
    gamma_1 = 0.7
    variance = 1 / (1 + math.exp(-gamma_1))
    want = 0.5 * ((1 - variance) * x**2 + variance - math.log(variance) - 1)
    close(vdm.prior_loss(vdm.encode(image, 5), gamma_1), [want], 1e-5)

    gamma_0 = -1.0
    z = x + math.exp(gamma_0 / 2) * 0.3  # z_0 / alpha_0
    values = [-0.8, -0.4, 0.0, 0.4, 0.8]
    weights = [math.exp(-0.5 * (z - value) ** 2 * math.exp(-gamma_0)) for value in values]
    want = -math.log(weights[3] / sum(weights))
    eps_0 = jnp.full((1, 1, 1, 1), 0.3)
    close(vdm.reconstruction_loss(image, eps_0, gamma_0, 5), [want], 1e-5)

    config = change(TINY, schedule="linear", gamma_min=-6.0, gamma_max=4.0)
    gammas = vdm.gammas_at({}, jnp.array([0.25]), config)
    close(gammas.at_t, [-3.5], 1e-6)
    close(gammas.weight, [10.0], 1e-6)
    gammas = vdm.gammas_at({}, jnp.array([0.0]), change(config, timesteps=5))
    close(gammas.at_t, [-4.0], 1e-6)  # t = 0 is rounded up to 1/5 as well
    gammas = vdm.gammas_at({}, jnp.array([0.21]), change(config, timesteps=5))
    close(gammas.at_t, [-2.0], 1e-6)  # t = 2/5, s = 1/5
    close(gammas.weight, [5 * math.expm1(-2.0 + 4.0)], 1e-6)


def test_score_network_gets_what_the_losses_say():
    """z_t, gamma, conditioning and keys reach the score function; its answer reaches the loss."""
    images = random_images(TINY, 3)
    eps = jnp.ones((3, *TINY.shape))
    seen = {}

    def score(params, z, gamma, conditioning, config, keys=None):
        seen.update(params=params, z=z, gamma=gamma, conditioning=conditioning, keys=keys)
        return eps - 2

    t = jnp.array([0.1, 0.5, 0.9])
    conditioning = jnp.array([0.0, 1.0, 0.5])
    config = change(TINY, schedule="linear")
    params = {"gamma": {}, "score_model": "weights"}
    draws = vdm.Draws(t, eps, eps, "keys")
    terms = vdm.losses(params, images, conditioning, draws, config, score=score)
    close(terms.diffusion, np.full(3, 0.5 * 11.0 * 4 * 16), 1e-5)  # gamma' is 5 + 6
    assert seen["params"] == "weights" and seen["keys"] == "keys"
    assert (seen["conditioning"] == conditioning).all()
    close(seen["gamma"], -6 + 11 * t, 1e-6)
    alpha = 1 / np.sqrt(1 + np.exp(seen["gamma"]))
    x = 2 * (images + 0.5) / 5 - 1
    want = alpha[:, None, None, None] * x + np.sqrt(1 - alpha**2)[:, None, None, None]
    close(seen["z"], want, 1e-5)


def test_convolution_is_the_same_on_a_cpu_and_elsewhere(monkeypatch):
    """Value and gradient of the two forms; the second is XLA's own."""
    rng = np.random.default_rng(0)
    x, cotangent = rng.standard_normal((2, 6, 4, 5, 6), np.float32)  # not a multiple of 4 pictures
    weights = {
        "kernel": rng.standard_normal((3, 3, 6, 6), np.float32),
        "bias": rng.standard_normal(6, np.float32),
    }
    found = []
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        y, pull = jax.vjp(vdm.convolve, x, weights)
        found.append(jax.tree.leaves((y, pull(cotangent))))
    for got, want in zip(*found):
        close(got, want, 1e-5)
    assert "conv_general_dilated" in str(jax.make_jaxpr(vdm.convolve)(x, weights))


def test_conditioning_time_and_dropout_change_the_estimate():
    config = change(TINY, dropout=0.5)
    params = random_params(config)["score_model"]
    z = np.random.default_rng(0).normal(size=(2, *config.shape)).astype(np.float32)
    run = jax.jit(functools.partial(vdm.score_network, config=config))
    base = run(params, z, jnp.array([0.0, 0.0]), jnp.zeros(2))
    assert abs(base - run(params, z, jnp.array([1.0, 0.0]), jnp.zeros(2)))[0].max() > 1e-3
    assert abs(base - run(params, z, jnp.array([0.0, 0.0]), jnp.ones(2))).max() > 1e-3
    keys = jax.random.split(jax.random.key(0), 2)
    dropped = run(params, z, jnp.zeros(2), jnp.zeros(2), keys=keys)
    assert abs(base - dropped).min() > 0
    swapped = run(params, z[::-1], jnp.zeros(2), jnp.zeros(2), keys=keys[::-1])
    close(swapped[::-1], dropped, 1e-5)  # a picture's key is its own


def test_every_layer_draws_its_own_dropout(monkeypatch):
    """Two blocks down, two in the middle, three up."""
    seen = set()

    def drop(keys, x, rate):
        jax.debug.callback(lambda data: seen.add(bytes(data)), jax.random.key_data(keys))
        return x

    monkeypatch.setattr(vdm, "drop", drop)
    config = change(TINY, depth=2, dropout=0.5)
    params = random_params(config)["score_model"]
    keys = jax.random.split(jax.random.key(0), 1)
    z = np.zeros((1, *config.shape), np.float32)
    run = jax.jit(functools.partial(vdm.score_network, config=config))
    run(params, z, jnp.zeros(1), jnp.zeros(1), keys=keys)
    jax.effects_barrier()
    assert len(seen) == 7


def test_dropout_keeps_the_mean():
    x = jnp.ones((400, 50))
    y = vdm.drop(jax.random.split(jax.random.key(0), 400), x, 0.3)
    assert set(np.unique(y).tolist()) == {0.0, float(np.float32(1) / np.float32(0.7))}
    assert float(y.mean()) == pytest.approx(1, abs=0.02)
    assert len(np.unique(y, axis=0)) == 400


def test_the_network_starts_as_the_identity():
    """conv_out is zero at first: the estimate of the noise is z_t."""
    params = jax.jit(vdm.init_params, static_argnums=1)(jax.random.key(0), TINY)["score_model"]
    z = np.random.default_rng(0).normal(size=(1, *TINY.shape)).astype(np.float32)
    got = vdm.score_network(params, z, jnp.zeros(1), jnp.zeros(1), TINY)
    np.testing.assert_array_equal(got, z)


def test_initial_values_are_those_of_the_official_code():
    params = jax.jit(vdm.init_params, static_argnums=1)(jax.random.key(0), change(TINY, depth=2))
    network = params["score_model"]
    for path in (("conv_out",), ("mid", "block_1", "conv2"), ("mid", "attn_1", "proj_out")):
        layer = functools.reduce(lambda tree, name: tree[name], path, network)
        assert not np.any(layer["kernel"]), path
    for stack in ("down", "up"):
        assert not np.any(network[stack]["block"]["conv2"]["kernel"])
        assert not np.any(network[stack]["block"]["cond_proj"]["kernel"])
    kernel = network["up"]["block"]["conv1"]["kernel"]
    assert kernel.shape == (3, 3, 3, 128, 64)
    assert float(kernel.std()) == pytest.approx((9 * 128) ** -0.5, rel=0.05)
    kernel = network["down"]["block"]["conv1"]["kernel"]
    assert float(kernel[1].std()) == pytest.approx((9 * 64) ** -0.5, rel=0.05)
    assert (kernel[0] != kernel[1]).all()
    assert params["gamma"]["w"].tolist() == [11.0] and params["gamma"]["b"].tolist() == [-6.0]


# ==== Claims ======================================================================================


def test_c2_the_bound_is_the_likelihood_of_gaussian_data():
    """The mean cost is the entropy and the gap of the prior, if p(x | z_0) is Bayes' posterior."""
    config = change(TINY, schedule="linear", gamma_min=-5.0, gamma_max=2.0)
    prior, diffusion = gaussian_losses(config, {}, 200_000)
    precision = 1 / S**2 + math.exp(5)
    decoder = 0.5 * math.log(2 * math.pi * math.e / precision)  # entropy of x given z_0
    entropy = 0.5 * math.log(2 * math.pi * math.e * S**2)
    kept = 1 / (1 + math.exp(2))
    variance = kept * S**2 + 1 - kept  # of z_1, over all x
    gap = 0.5 * (variance - 1 - math.log(variance))
    cost = float(prior.mean() + diffusion.mean()) + decoder
    error = float((prior + diffusion).std()) / math.sqrt(200_000)
    assert cost == pytest.approx(entropy + gap, abs=4 * error) and error < 0.01


def bent(seed, size=40.0):
    """Weights of a schedule that is far from linear."""
    gamma = jax.jit(lambda key: vdm.init_params(key, NETWORK)["gamma"])(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    l2 = {"kernel": 2 + rng.random((1, 1024)), "bias": rng.normal(size=1024) + 2 * (seed % 2) - 1}
    gamma = {**gamma, "l2": l2, "l3": {"kernel": size * rng.random((1024, 1))}}
    return jax.tree.map(lambda leaf: np.array(leaf, np.float32), gamma)


def test_c3_the_bound_does_not_depend_on_the_schedule_between_its_ends():
    """With an estimate that is not the best one, too. The variance does depend on it."""
    means = []
    variances = []
    for config, gamma in ((NETWORK, bent(0)), (NETWORK, bent(1)), (NETWORK, bent(2, 0.0))):
        run = jax.jit(functools.partial(gaussian_losses, config, count=20_000, factor=0.8))
        _, diffusion = run(gamma)
        means.append(float(diffusion.mean()))
        variances.append(float(diffusion.var()))
    error = math.sqrt(max(variances) / 20_000)
    assert max(means) - min(means) < 4 * error < 0.2 * means[0]
    assert max(variances) > 1.5 * min(variances)


def test_c4_more_steps_tighten_the_bound():
    config = change(TINY, schedule="linear")

    def bound(T):
        """The exact mean of L_T."""
        times = jnp.arange(1, T + 1) / T
        gammas = vdm.gammas_at({}, times, change(config, timesteps=T))
        return float(np.mean(0.5 * np.float64(gammas.weight) * gaussian_error(gammas.at_t)))

    bounds = [bound(T) for T in (1, 2, 4, 16, 64, 1024)]
    assert all(coarse > fine for coarse, fine in zip(bounds, bounds[1:]))
    times = (np.arange(10_000) + 0.5) / 10_000
    gammas = vdm.gammas_at({}, jnp.asarray(times), config)
    limit = float(np.mean(0.5 * np.float64(gammas.weight) * gaussian_error(gammas.at_t)))
    assert 0 < bounds[-1] - limit < 0.01 * limit < 0.02 * (bounds[0] - limit)
    _, draws = gaussian_losses(change(config, timesteps=4), {}, 100_000)
    assert float(draws.mean()) == pytest.approx(bounds[2], rel=0.02)


def test_c5_a_uniform_decoder_costs_the_logarithm_of_the_levels():
    config = change(TINY, levels=256)
    images = random_images(config, 3)
    eps = np.random.default_rng(1).normal(size=images.shape)
    nats = vdm.reconstruction_loss(jnp.asarray(images), eps, 60.0, 256)
    close(vdm.in_bits(nats, config), [8.0] * 3, 1e-5)


def test_c6_the_posterior_is_that_of_the_forward_process():
    """By Bayes' rule in float64: Eq. 20 to 25. And the KL of two posteriors is Eq. 14's summand."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, eps, other = rng.normal(size=(3, 50))
        for gamma_s, gamma_t in ((-9.0, -8.99), (-3.0, 1.0), (0.0, 5.0)):
            alpha_s, alpha_t = (math.sqrt(1 / (1 + math.exp(g))) for g in (gamma_s, gamma_t))
            var_s, var_t = 1 - alpha_s**2, 1 - alpha_t**2
            z_t = alpha_t * x + math.sqrt(var_t) * eps
            a = alpha_t / alpha_s
            var = var_t - a**2 * var_s  # of z_t given z_s
            precision = a**2 / var + 1 / var_s
            want_mean = (a * z_t / var + alpha_s * x / var_s) / precision
            mean, variance = vdm.posterior(z_t, eps, gamma_s, gamma_t)
            np.testing.assert_allclose(mean, want_mean, rtol=1e-9, atol=1e-12)
            assert float(variance) == pytest.approx(1 / precision, rel=1e-9)
            model_mean, _ = vdm.posterior(z_t, other, gamma_s, gamma_t)
            kl = (mean - model_mean) ** 2 / (2 * variance)
            want = 0.5 * math.expm1(gamma_t - gamma_s) * (eps - other) ** 2
            np.testing.assert_allclose(kl, want, rtol=1e-9)


def test_sampling_gives_the_distribution_of_the_data():
    """With the best estimate for Gaussian data: the deviation of the samples is S."""
    config = change(TINY, schedule="linear", gamma_min=-8.0)
    params = {"gamma": {}, "score_model": 1.0}
    score = functools.partial(gaussian_score, config=config)
    key = jax.random.key(0)
    steps = 100

    def step(z, i):
        noise = jax.random.normal(jax.random.fold_in(key, i), z.shape)
        return vdm.ancestral_step(params, z, i, steps, noise, None, config, score), None

    z_1 = jax.random.normal(jax.random.key(1), (20_000, 1, 1, 1))
    z_0, _ = jax.jit(lambda z: jax.lax.scan(step, z, jnp.arange(steps)))(z_1)
    assert float(z_0.std()) == pytest.approx(S, rel=0.03)
    assert abs(float(z_0.mean())) < 0.02


def test_c7_the_schedule_is_monotone_and_keeps_its_ends():
    t = jnp.linspace(0, 1, 1001)
    for seed in range(3):
        gamma = bent(seed)
        gamma["l2"]["kernel"] = gamma["l2"]["kernel"] * np.where(np.arange(1024) % 2, -1, 1)
        gamma["l3"]["kernel"] = -gamma["l3"]["kernel"]
        values = vdm.noise_schedule(gamma, t, NETWORK)
        assert (jnp.diff(values) > 0).all()
        close(values[np.array([0, -1])], [-6.0, 5.0], 1e-6)
        middle = (values[500] + 6) / 11
        assert abs(float(middle) - 0.5) > 0.05  # it is bent
        official = change(NETWORK, endpoints="official", schedule_objective="bound")
        drifted = vdm.noise_schedule(gamma, t, official)
        assert abs(float(drifted[-1]) - 5) > 1


def gradient_case():
    """A small model with dropout, and a batch."""
    config = change(NETWORK, dropout=0.2, fourier=())  # without features that magnify rounding
    params = random_params(config, scale=0.1)
    params["gamma"] = jax.tree.map(np.float32, bent(0, 5.0))
    batch = {"images": random_images(config, 8), "conditioning": np.linspace(0, 1, 8)}
    batch["conditioning"] = batch["conditioning"].astype(np.float32)
    return config, params, batch


@functools.cache
def compiled_gradient(config, mesh):
    return jax.jit(functools.partial(vdm.loss_gradient, config=config, mesh=mesh))


def gradient_on(mesh, config, params, batch):
    metrics, grads = compiled_gradient(config, mesh)(params, batch, jax.random.key(3))
    return metrics, vdm.named_leaves(jax.device_get(grads))


@pytest.mark.parametrize(
    "score",
    ["one weight", pytest.param("network", marks=pytest.mark.long)],
)
def test_c7_the_gradient_is_that_of_the_variance_between_the_ends(score, monkeypatch):
    """The inner weights get the gradient of the mean of L^2, all others that of the bound.

    With the objective "bound" all get that of the bound.
    """
    config = change(NETWORK, fourier=())
    params = random_params(config, scale=0.1)
    params["gamma"] = bent(0, 5.0)
    score_function = vdm.score_network
    if score == "one weight":
        params["score_model"] = jnp.float32(0.8)
        score_function = gaussian_score
        stub = functools.partial(vdm.losses_at, config=config, score=score_function)
        monkeypatch.setattr(vdm, "sharded_losses", lambda config, mesh: stub)
    images = random_images(config, 8)
    conditioning = jnp.linspace(0, 1, 8)
    draws = vdm.draw_numbers(jax.random.key(3), 8, config)

    def means(params):
        """The bound, and the mean square of the diffusion loss."""
        terms = vdm.losses(params, images, conditioning, draws, config, score=score_function)
        bits = vdm.in_bits(jnp.stack(terms), config)  # [3,8]
        return (bits.sum(0).mean(), jnp.square(bits[2]).mean()), bits[2]

    @jax.jit
    def run(params):
        (bound, _), pull, diffusion = jax.vjp(means, params, has_aux=True)
        return bound, pull((1.0, 0.0))[0], pull((0.0, 1.0))[0], diffusion

    bound, *trees, diffusion = jax.device_get(run(params))
    bound_grads, square_grads = (vdm.named_leaves(tree) for tree in trees)
    batch = {"images": images, "conditioning": conditioning}
    for objective in ("variance", "bound"):
        changed = change(config, schedule_objective=objective)
        metrics, grads = gradient_on(mesh_of(1, 1), changed, params, batch)
        assert float(metrics["loss"]) == pytest.approx(float(bound), rel=1e-5)
        assert float(metrics["variance"]) == pytest.approx(float(diffusion.var()), rel=1e-4)
        for name, leaf in grads.items():
            if "attn_1/k/bias" in name:
                continue  # softmax does not change with it: zero, up to rounding
            inner = objective == "variance" and name.startswith(("gamma/l2", "gamma/l3"))
            want = square_grads[name] if inner else bound_grads[name]
            close(leaf, want, 1e-4, max(float(abs(want).max()), 1e-6))


def test_c7_the_gradient_of_the_squares_is_that_of_the_variance():
    """Finite differences of the variance over many draws, in float64, along one direction."""
    with jax.enable_x64(True):
        gamma = jax.tree.map(np.float64, bent(0, 5.0))

        @jax.jit
        def moments(size):
            bends = {**gamma, "l3": {"kernel": jnp.float64(size) * gamma["l3"]["kernel"]}}
            t = (jnp.arange(20_000) + 0.5) / 20_000
            gammas = vdm.gammas_at(bends, t, NETWORK)
            mean = 0.5 * gammas.weight * gaussian_error_of(gammas.at_t)
            squares = 3 * mean**2  # the mean of the square of eps^2 times a number
            return squares.mean(), squares.mean() - mean.mean() ** 2

        slope = jax.grad(lambda size: moments(size)[0])(1.0)
        variance = [float(moments(1 + h)[1]) for h in (-1e-4, 1e-4)]
        assert float(slope) == pytest.approx((variance[1] - variance[0]) / 2e-4, rel=1e-3)


@pytest.mark.long
def test_c7_on_digits_the_learned_schedule_halves_the_variance():
    """The demo's model: 4.2 times is what the demo prints."""
    images = vdm.read_digits(ROOT / "data/digits8x8.npz")
    test = images[: vdm.HELD_OUT]
    rest = images[vdm.HELD_OUT :]
    key = jax.random.key(1)
    steps = vdm.RECIPES["digits"].steps
    params = vdm.train(mesh_of(1, 1), rest, steps, key, np.random.default_rng(1))
    found = vdm.compare_schedules(params, test, key)
    means, variances = ({k: f(bits) for k, (_, bits) in found.items()} for f in (np.mean, np.var))
    assert variances["linear"] > 2 * variances["learned"]
    error = math.sqrt(sum(variances.values()) / (vdm.REPEATS * vdm.HELD_OUT))
    assert abs(means["linear"] - means["learned"]) < 3 * error  # one bound


def gaussian_error_of(gamma):
    signal = S**2 * jax.nn.sigmoid(-gamma)
    return signal / (signal + jax.nn.sigmoid(gamma))


def test_c8_low_discrepancy_times_lower_the_variance():
    """Of the mean over a batch of 16."""
    config = change(TINY, schedule="linear")

    def deviation(config):
        run = jax.jit(jax.vmap(lambda key: batch_mean(key, config)))
        return float(run(jnp.arange(500)).std())

    def batch_mean(key, config):
        t = vdm.draw_times(jax.random.key(key), 16, config)
        gammas = vdm.gammas_at({}, t, config)
        return (0.5 * gammas.weight * gaussian_error_of(gammas.at_t)).mean()

    assert deviation(config) < 0.2 * deviation(change(config, low_discrepancy=False))


def test_c9_times_for_any_batch_size():
    for count in range(1, 201):
        t = vdm.even_times(np.random.default_rng(count).random(dtype=np.float32), count)
        assert t.shape == (count,) and (0 <= t).all() and (t < 1).all()
        gaps = np.diff(np.sort(t))
        assert count == 1 or np.abs(gaps - 1 / count).max() < 1e-5
    drawn = vdm.draw_times(jax.random.key(0), 9, TINY)
    close(np.sort(np.diff(drawn))[1:], np.full(7, 1 / 9), 1e-5)
    t = vdm.draw_times(jax.random.key(0), 1000, change(TINY, low_discrepancy=False))
    assert 0.4 < float(t.mean()) < 0.6 and float(jnp.diff(jnp.sort(t)).max()) > 2e-3


# ==== Sharding ====================================================================================


@pytest.mark.long
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_c10_devices_give_the_loss_and_gradients_of_one(devices):
    config, params, batch = gradient_case()
    want, want_grads = gradient_on(mesh_of(1, 1), config, params, batch)
    metrics, grads = gradient_on(mesh_of(devices, 1), config, params, batch)
    same_metrics(metrics, want)
    same_gradients(grads, want_grads)


def same_metrics(got, want):
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert float(value) == pytest.approx(float(want[name]), rel=1e-5), name


def same_gradients(got, want):
    # Gradients of the schedule are sums over pictures that cancel: 3.8e-5 with one on each device.
    for group, tolerance in (("gamma/", 1e-4), ("score_model/", 1e-5)):
        common.close_gradients(part(got, group), part(want, group), tolerance)


def test_no_device_needs_anything_from_another():
    config, params, batch = gradient_case()
    draws = vdm.draw_numbers(jax.random.key(0), 8, config)
    gammas = vdm.gammas_at(params["gamma"], draws.t, config)
    rest = batch["images"], batch["conditioning"], draws
    sharded = vdm.sharded_losses(config, mesh_of(8, 1))
    jaxpr = jax.make_jaxpr(sharded)(params["score_model"], gammas, *rest)
    for name in ("psum", "all_gather", "ppermute", "all_to_all", "reduce_scatter"):
        assert f" {name}" not in str(jaxpr)


def test_c10_train_step_on_eight_devices_compiles_once_and_follows_optax_on_one():
    config, params, batch = gradient_case()
    optimizer = optax.sgd(1e-4, momentum=0.9)
    mesh = mesh_of(8, 1)
    state = vdm.init_state(jax.random.key(0), config, optimizer, mesh, params)
    step = vdm.make_train_step(config, optimizer, mesh, 0.75)
    opt_state = jax.jit(optimizer.init)(params)
    average = params
    gradient = compiled_gradient(config, mesh_of(1, 1))

    @jax.jit
    def update(grads, opt_state, params, average):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, average, params)
        return opt_state, params, average

    for i in range(2):
        state, metrics = step(state, batch, jax.random.key(0))
        want, grads = gradient(params, batch, jax.random.fold_in(jax.random.key(0), i))
        opt_state, params, average = update(grads, opt_state, params, average)
        same_metrics(metrics, want)
        if i == 0:  # the momentum is the first gradient
            momentum = jax.device_get(state.opt_state[0].trace)
            same_gradients(vdm.named_leaves(momentum), vdm.named_leaves(jax.device_get(grads)))
    assert step._cache_size() == 1 and int(state.step) == 2
    common.close_gradients(vdm.named_leaves(state.params), vdm.named_leaves(params), 1e-5)
    common.close_gradients(vdm.named_leaves(state.ema), vdm.named_leaves(average), 1e-5)


def test_bits_per_dim_counts_every_picture_once_on_any_mesh():
    """Seven pictures in batches of four, the last one filled up; the times are even over all."""
    config, params, _ = gradient_case()
    images = random_images(config, 7)
    options = {"batch": 4, "repeats": 2}
    costs = [
        vdm.bits_per_dim(params, images, jax.random.key(0), config, mesh=mesh, **options)
        for mesh in (None, mesh_of(4, 1))
    ]
    assert costs[0] == pytest.approx(costs[1], rel=1e-5)
    losses = jax.jit(functools.partial(vdm.losses, config=config))
    rounds = []
    for key in jax.random.split(jax.random.key(0), 2):
        time_key, order_key, noise_key = jax.random.split(key, 3)
        u = jax.random.uniform(time_key)
        times = jax.random.permutation(order_key, (u + jnp.arange(7) / 7) % 1)
        parts = []
        for first, rows in ((0, [0, 1, 2, 3]), (4, [4, 5, 6, 0])):
            draws = vdm.draw_numbers(jax.random.fold_in(noise_key, first), 4, config)
            draws = draws._replace(t=times[np.array(rows)])
            parts.append(np.stack(losses(params, images[rows], jnp.zeros(4), draws)))
        rounds.append(np.concatenate(parts, axis=1)[:, :7] / (16 * math.log(2)))
    found = np.mean(rounds, axis=0)
    want = [*found.mean(1), found.sum(0).mean()]
    assert list(costs[0].values())[:4] == pytest.approx(want, rel=1e-4, abs=1e-6)
    assert costs[0]["standard_error"] == pytest.approx(found.sum(0).std() / 7**0.5, rel=1e-4)


def test_samples_are_the_same_on_any_mesh():
    config = change(TINY, schedule="linear")
    params = random_params(config, scale=0.05)
    key = jax.random.key(0)
    pictures = [
        vdm.sample(params, key, 4, config, steps=3, mesh=mesh) for mesh in (None, mesh_of(4, 1))
    ]
    np.testing.assert_array_equal(*pictures)
    assert pictures[0].shape == (4, *config.shape) and pictures[0].dtype == jnp.int32
    assert 0 <= pictures[0].min() < pictures[0].max() <= 4
    assert (vdm.sample(params, jax.random.key(1), 4, config, steps=3) != pictures[0]).any()


# ==== Checkpoints and sizes =======================================================================


def parameter_count(config):
    return sum(math.prod(param.shape) for param in jax.tree.leaves(vdm.param_table(config)))


def test_parameter_counts_are_the_official_ones():
    assert parameter_count(vdm.SIZES["CIFAR-10"]) == 30_578_181
    assert parameter_count(vdm.SIZES["CIFAR-10, augmented"]) == 139_279_877
    assert parameter_count(vdm.SIZES["ImageNet 32"]) == 122_137_605
    without = change(vdm.SIZES["CIFAR-10, augmented"], attention=False)
    assert parameter_count(without) == 122_140_677


def test_saved_and_loaded_it_is_the_same(tmp_path):
    config = change(NETWORK, depth=2, attention=True)
    params = random_params(config)
    vdm.save(tmp_path / "model.npz", params, config)
    loaded = vdm.load(tmp_path / "model.npz", config)
    for name, leaf in vdm.named_leaves(params).items():
        np.testing.assert_array_equal(vdm.named_leaves(loaded)[name], leaf)
    flat = vdm.read_npz(tmp_path / "model.npz")
    kernel = flat["score_model/up.block_2/conv1/kernel"]
    np.testing.assert_array_equal(
        kernel, params["score_model"]["up"]["block"]["conv1"]["kernel"][2]
    )
    assert flat["score_model/mid.attn_1/q/kernel"].shape == (64, 64)
    params["gamma"]["l1"]["bias"] = np.array([np.nan])
    with pytest.raises(ValueError, match="gamma/l1/bias holds values that are not finite: not"):
        vdm.save(tmp_path / "other.npz", params, config)


KERNEL = "score_model/down.block_0/conv1/kernel"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (KERNEL, lambda array: None, f"{KERNEL} is missing"),
        ("extra", lambda array: np.zeros(3), "extra is unknown"),
        (KERNEL, lambda array: array[..., :9], f"{KERNEL} has shape (3, 3, 64, 9), not (3, 3, 64"),
        (KERNEL, lambda array: array.astype(str), f"{KERNEL} is <U32, not numeric"),
        ("gamma/w", lambda array: array * np.nan, "gamma/w holds values that are not finite"),
    ],
)
def test_strict_about_every_array(name, damage, message):
    flat = vdm.to_official(random_params(TINY), TINY)
    damaged = damage(flat.pop(name, None))
    if damaged is not None:
        flat[name] = damaged
    with pytest.raises(ValueError, match=re.escape(message)):
        vdm.from_official(flat, TINY)


# ==== Errors ======================================================================================


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": (8, 8, 1)}, "image_size=(8, 8, 1) is not one positive number or two"),
        ({"image_size": 0}, "image_size=(0, 0) is not one positive number or two"),
        ({"channels": 0}, "channels=0 is not at least 1"),
        ({"levels": 1}, "levels=1 is not at least 2"),
        ({"depth": 0}, "depth=0 is not at least 1"),
        ({"timesteps": -1}, "timesteps=-1 is not at least 0"),
        ({"width": 32}, "width=32 is not a multiple of 32 above 32"),
        ({"width": 100}, "width=100 is not a multiple of 32 above 32"),
        ({"schedule": "cosine"}, "schedule='cosine' is not one of linear, scalar, network"),
        ({"endpoints": "free"}, "endpoints='free' is not one of exact, official"),
        ({"schedule_objective": "loss"}, "schedule_objective='loss' is not one of variance, bound"),
        ({"gamma_min": 5.0}, "gamma_min=5.0 and gamma_max=5.0 are not finite numbers, the first"),
        ({"gamma_max": math.inf}, "gamma_min=-13.3 and gamma_max=inf are not finite numbers"),
        ({"dropout": 1.0}, "dropout=1.0 is not in [0, 1)"),
        (
            {"schedule": "network", "timesteps": 9},
            "with timesteps=9 the bound depends on the whole",
        ),
        (
            {"schedule": "network", "endpoints": "official"},
            'schedule_objective="variance" needs endpoints="exact"',
        ),
    ],
    ids=str,
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        vdm.Config(**fields)


def test_what_does_not_fit_is_refused():
    images = random_images(TINY, 2)
    draws = vdm.Draws(jnp.zeros(2), images * 0.0, images * 0.0)
    params = random_params(TINY)

    def refused(message, images):
        with pytest.raises(ValueError, match=re.escape(message)):
            vdm.losses(params, images, jnp.zeros(2), draws, TINY)

    refused("images are (2, 4, 4, 3), not [B, 4, 4, 1]", np.zeros((2, 4, 4, 3), int))
    refused("images are (0, 4, 4, 1): there is none", images[:0])
    refused("images are float64, not integers", images / 4)
    refused("images are from 0 to 5, not within the levels 0 to 4", images // 4 * 5)
    refused("images are from -1 to", images - 1)
    for count, mesh in ((0, None), (3, mesh_of(2, 1))):
        with pytest.raises(ValueError, match=f"count={count} is not a positive multiple of data="):
            vdm.sample(params, jax.random.key(0), count, TINY, mesh=mesh)
    for batch, mesh in ((0, None), (3, mesh_of(2, 1))):
        with pytest.raises(ValueError, match=f"batch={batch} is not a positive multiple of data="):
            vdm.bits_per_dim(params, images, jax.random.key(0), TINY, mesh=mesh, batch=batch)
    with pytest.raises(ValueError, match="model=2: vdm.py shards nothing over this mesh axis"):
        vdm.sample(params, jax.random.key(0), 2, TINY, mesh=mesh_of(1, 2))
    with pytest.raises(ValueError, match="warmup=0 is not at least 1"):
        vdm.recipe_optimizer(vdm.RECIPES["digits"]._replace(warmup=0))
    deeper = random_params(change(TINY, depth=2))
    with pytest.raises(ValueError, match="params: score_model/down/block/GroupNorm_0/bias has sh"):
        vdm.init_state(jax.random.key(0), TINY, optax.sgd(0.1), mesh_of(1, 1), deeper)
    with pytest.raises(ValueError, match="steps=0 is not at least 1"):
        vdm.sample(params, jax.random.key(0), 1, TINY, steps=0)
    with pytest.raises(ValueError, match="model=2: vdm.py shards nothing over this mesh axis"):
        vdm.init_state(jax.random.key(0), TINY, optax.sgd(0.1), mesh_of(2, 2))
    with pytest.raises(ValueError, match=re.escape("ema=1.0 is not in [0, 1)")):
        vdm.make_train_step(TINY, optax.sgd(0.1), mesh_of(1, 1), 1.0)
    step = vdm.make_train_step(TINY, optax.sgd(0.1), mesh_of(4, 1), 0.9)
    state = vdm.init_state(jax.random.key(0), TINY, optax.sgd(0.1), mesh_of(4, 1))
    with pytest.raises(ValueError, match="a batch of 2 is not a multiple of data=4"):
        step(state, {"images": images}, jax.random.key(0))


# ==== Demo ========================================================================================


@pytest.fixture
def small_demo(monkeypatch, tmp_path):
    """The flags of a demo on a few digits."""
    monkeypatch.setattr(vdm, "HELD_OUT", 12)
    monkeypatch.setattr(vdm, "REPEATS", 2)
    monkeypatch.setattr(vdm, "sample", lambda *args, **options: np.zeros((32, 8, 8, 1)))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 17, (40, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "tiny.npz", images=images)
    return ["--data", str(tmp_path / "tiny.npz"), "--out", str(tmp_path / "d.png"), "--steps", "2"]


def test_demo_trains_and_draws(small_demo, tmp_path, capsys):
    assert vdm.main(small_demo) == 0
    text = capsys.readouterr().out.splitlines()
    assert text[0] == "40 digits, 12 held out, on 1 cpu(s)"
    number = r"\d+\.\d+"
    assert re.fullmatch(
        rf"step 2/2  loss {number} bits per dimension  variance {number}  0 s left", text[1]
    )
    assert text[2] == "bits per dimension, uniform: 4.09"
    terms = f"prior {number}, reconstruction {number}, diffusion {number}"
    assert re.fullmatch(
        rf"bits per dimension, this model: {terms}, standard error {number}", text[4]
    )
    result = (
        rf"result: held-out bits per dimension: got {number}, expected unknown, at most unknown"
    )
    assert re.fullmatch(result, text[-2])
    assert text[-1].startswith("wrote ") and (tmp_path / "d.png").read_bytes()[:4] == b"\x89PNG"


def test_histogram_of_pixels_by_hand():
    train = np.array([[0], [0], [1]])
    test = np.array([[0], [1]])
    want = -(math.log2(3 / 5) + math.log2(2 / 5)) / 2  # counts 2 and 1, and one more of each
    assert vdm.histogram_bits(train, test, 2) == pytest.approx(want)


def test_straight_is_linear_between_the_same_ends():
    gamma = vdm.straight({"gamma": bent(0)})["gamma"]
    close(vdm.noise_schedule(gamma, jnp.array([0, 0.25, 1.0]), NETWORK), [-6, -3.25, 5], 1e-6)


def test_demo_stops_at_a_loss_that_is_not_finite(small_demo, capsys, monkeypatch):
    def step(state, batch, key):
        return state, {"loss": np.inf, "variance": 0.0}

    monkeypatch.setattr(vdm, "make_train_step", lambda *args: step)
    assert vdm.main(small_demo) == 1
    assert capsys.readouterr().err == "vdm.py: step 1: the loss is inf\n"


def test_demo_prints_its_result_where_it_cannot_draw(small_demo, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # import fails
    params = random_params(vdm.DIGITS)
    monkeypatch.setattr(vdm, "train", lambda *args: params)
    monkeypatch.setattr(vdm, "compare_schedules", lambda *args: None)
    assert vdm.main(small_demo) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("result: held-out bits per dimension: got ")
    assert lines[-1].startswith("no figure: ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--steps 0", "--steps 0 is not at least 1"),
        ("--seed -1", "--seed -1 is not in 0 to 4294967295"),
        ("--mesh data=1,model=2", "model=2: vdm.py shards nothing over this mesh axis"),
        ("--mesh data=3,model=1", "the batch of 32 is not a multiple of data=3"),
        ("--out f.npz", "--out f.npz is not a .png, .pdf or .svg"),
        ("--data missing.npz", "missing.npz does not exist"),
        ("--data other.npz", "other.npz has no array images"),
        ("--data few.npz", "few.npz: images (9, 8, 8) are not 24 or more [B,8,8]"),
        ("--data wide.npz", "images are (40, 9, 8, 1), not [B, 8, 8, 1]"),
        ("--data bright.npz", "images are from 17 to 17, not within the levels 0 to 16"),
    ],
)
def test_demo_refuses_in_one_line(flags, message, small_demo, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("other.npz", pictures=np.zeros(3))
    np.savez("few.npz", images=np.zeros((9, 8, 8), np.uint8))
    np.savez("wide.npz", images=np.zeros((40, 9, 8), np.uint8))
    np.savez("bright.npz", images=np.full((40, 8, 8), 17, np.uint8))
    assert vdm.main([*small_demo, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vdm.py: ") and message in error
    assert len(error.splitlines()) == 1 and not list(tmp_path.glob("*.png"))
