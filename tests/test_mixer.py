"""mixer.py against the official code, by hand, and by what the paper claims.

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
from jax.sharding import NamedSharding

import mixer
import vit
from common import (
    close,
    close_gradients,
    count,
    count_collectives,
    golden,
    matmul_flops,
    mesh_of,
    part,
)

golden = functools.partial(golden, "mixer")
TINY = mixer.Config(
    image_size=(8, 12),
    patch_size=4,
    width=16,
    depth=2,
    tokens_mlp=8,
    channels_mlp=32,
    classes=5,
)


def change(config, **fields):
    return dataclasses.replace(config, **fields)


def shapes_of(config, model=mixer):
    return jax.eval_shape(functools.partial(model.init_params, config=config), jax.random.key(0))


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


def assert_same(got, want):
    got = mixer.named_leaves(got)
    want = mixer.named_leaves(want)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


# ==== Golden ======================================================================================


def load_golden(name):
    meta, arrays = golden(name)
    official = meta["config"]
    config = mixer.Config(
        image_size=tuple(official["image"]),
        patch_size=tuple(official["patch"]),
        width=official["hidden_dim"],
        depth=official["num_blocks"],
        tokens_mlp=official["tokens_mlp_dim"],
        channels_mlp=official["channels_mlp_dim"],
        classes=official["num_classes"] or 0,
        stochastic_depth=official.get("stoch_depth", 0.0),
    )
    return config, mixer.from_official(part(arrays, "params/"), config), arrays


def run_golden(config, params, arrays, kept=None):
    """Logits, loss, gradients of the weights and of the images."""

    @jax.jit
    def run(params, images):
        def loss(params, images):
            logits = mixer.forward(params, images, config, kept=kept)
            if config.classes:
                losses = optax.softmax_cross_entropy_with_integer_labels(
                    logits, arrays["in/labels"]
                )
                return losses.mean(), logits
            return (logits * arrays["in/loss_weights"]).sum(), logits

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, images)

    (loss, logits), (grads, image_grad) = run(params, arrays["in/images"])
    assert float(loss) == pytest.approx(float(arrays["out/loss"]), rel=1e-6)
    close(logits, arrays["out/logits"], 1e-5)
    close_gradients(mixer.to_official(grads, config), part(arrays, "grad/"))
    return image_grad


@pytest.mark.parametrize("name", ["mixer_square", "mixer_nonsquare", "mixer_headless"])
def test_golden_outputs_and_gradients(name):
    config, params, arrays = load_golden(name)
    image_grad = run_golden(config, params, arrays)
    close(image_grad, arrays["out/grad_images"], 2e-5)


@pytest.mark.parametrize("name", ["mixer_square", "mixer_nonsquare", "mixer_headless"])
def test_golden_intermediate_values(name):
    config, params, arrays = load_golden(name)

    @jax.jit
    def values(params, images):
        x = mixer.embed(params, images, config)
        out = {"stem": x, "pre_head_layer_norm": mixer.encode(params, images, config)}
        for i in range(config.depth):
            weights = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
            x = mixer.block(x, weights, config, jnp.ones((2, len(x), 1, 1)))
            out[f"block_{i}"] = x
        return out

    got = values(params, arrays["in/images"])
    for value, array in got.items():
        want = arrays[f"out/{value}"]
        close(array.reshape(want.shape), want, 1e-5)


def test_c6_golden_stochastic_depth():
    """Table 4, App. B: with the stored draws, values and gradients are those of big_vision."""
    config, params, arrays = load_golden("bv_mixer_stoch_depth")
    run_golden(config, params, arrays, kept=arrays["in/stoch_depth_masks"])
    images = arrays["in/images"]
    close(mixer.forward(params, images, config), arrays["out/logits_eval"], 1e-5)
    features = mixer.forward(params, images, change(config, classes=0))
    close(features, arrays["out/pre_logits"], 1e-5)


def test_c6_each_branch_is_kept_or_dropped_as_a_whole():
    """App. B: the rate grows linearly with depth; rows and branches are drawn separately."""
    config = change(TINY, depth=4, stochastic_depth=0.6)
    kept = np.asarray(mixer.draw_kept(jax.random.key(0), 4000, config))
    assert kept.shape == (4, 2, 4000, 1, 1) and set(np.unique(kept)) == {0.0, 1.0}
    np.testing.assert_allclose(
        1 - kept.mean((2, 3, 4)), [[0.0] * 2, [0.2] * 2, [0.4] * 2, [0.6] * 2], atol=0.03
    )
    last = kept[3, :, :, 0, 0]
    assert abs(np.corrcoef(last)[0, 1]) < 0.05  # the two branches of a block
    assert abs(np.corrcoef(kept[2, 0, :, 0, 0], last[0])[0, 1]) < 0.05  # two blocks
    assert mixer.draw_kept(jax.random.key(0), 3, change(config, depth=1)).min() == 1
    assert mixer.draw_kept(None, 3, config).min() == 1

    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 16)), jnp.float32)
    weights = jax.tree.map(lambda leaf: leaf[0], random_params(TINY)["blocks"])
    neither = np.zeros((2, 2, 1, 1), np.float32)
    np.testing.assert_array_equal(mixer.block(x, weights, TINY, neither), x)
    images = random_batch(TINY, 2)["images"]
    images[1] = images[0]
    params = random_params(config)
    rows = mixer.forward(params, images, config, key=jax.random.key(1))
    assert float(abs(rows[0] - rows[1]).max()) > 1e-3
    without_key = mixer.forward(params, images, config)
    assert_same(without_key, mixer.forward(params, images, change(config, stochastic_depth=0.0)))


# ==== Equations, worked by hand ===================================================================


def test_block_is_equation_1():
    """Column by column and row by row, in float64."""
    weights = jax.tree.map(lambda leaf: leaf[0].astype(np.float64), random_params(TINY)["blocks"])
    x = np.random.default_rng(0).normal(size=(6, 16))

    def norm(x, weights):
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return y * weights["scale"] + weights["bias"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def two_layers(column, weights):
        first = weights["dense1"]
        second = weights["dense2"]
        hidden = gelu(first["kernel"].T @ column + first["bias"])
        return second["kernel"].T @ hidden + second["bias"]

    u = np.empty_like(x)
    normalized = norm(x, weights["norm1"])
    for i in range(16):
        u[:, i] = x[:, i] + two_layers(normalized[:, i], weights["token_mixing"])
    y = np.empty_like(x)
    normalized = norm(u, weights["norm2"])
    for j in range(6):
        y[j] = u[j] + two_layers(normalized[j], weights["channel_mixing"])

    single = jax.tree.map(jnp.float32, weights)
    got = mixer.block(jnp.float32(x)[None], single, TINY, np.ones((2, 1, 1, 1), np.float32))
    close(got[0], y, 1e-5)


def test_second_bias_of_token_mixing_has_no_gradient():
    """It adds the same number to all channels of a token, which every LayerNorm takes out again."""
    batch = random_batch(TINY)

    def loss(params):
        return mixer.loss_fn(params, batch, None, TINY)[0]

    grads = mixer.named_leaves(jax.jit(jax.grad(loss))(random_params(TINY)))
    largest = max(float(np.abs(grad).max()) for grad in grads.values())
    bias = grads["blocks/token_mixing/dense2/bias"]
    assert float(np.abs(bias).max()) < 1e-6 * largest


def test_loss_counts_no_masked_row():
    batch = random_batch(TINY, 4)
    params = random_params(TINY)
    whole, metrics = mixer.loss_fn(params, batch, None, TINY)
    assert metrics == {"loss": whole}
    padded = {
        "images": np.concatenate([batch["images"], np.zeros((4, 8, 12, 3), np.float32)]),
        "labels": np.concatenate([batch["labels"], np.full(4, -1, np.int32)]),
    }
    assert float(mixer.loss_fn(params, padded, None, TINY)[0]) == pytest.approx(
        float(whole), rel=1e-6
    )


def test_recipes_are_those_of_table_4():
    """Rate, weight decay, RandAugment, mixup, stochastic depth."""
    rows = {
        name: (r.learning_rate, r.weight_decay, r.randaugment, r.mixup, r.stochastic_depth)
        for name, r in mixer.RECIPES.items()
    }
    assert rows["ImageNet"] == (1e-3, 0.1, 15, 0.5, 0.1)
    assert rows["ImageNet-21k, B"] == (1e-3, 0.1, 10, 0.2, 0.1)
    assert rows["ImageNet-21k, L"] == (1e-3, 0.1, 20, 0.5, 0.1)
    for recipe in mixer.RECIPES.values():
        assert recipe.source.startswith(("quoted: ", "reproduced: "))
        assert recipe.clip == 1.0
    assert mixer.RECIPES["fine-tuning"].optimizer == "sgd"
    assert mixer.RECIPES["fine-tuning"].weight_decay == 0


# ==== Claims ======================================================================================


def test_sizes_are_those_of_table_1():
    rows = {
        name: (c.depth, c.tokens, c.width, c.channels_mlp, c.tokens_mlp)
        for name, c in mixer.SIZES.items()
    }
    assert rows == {
        "S/32": (8, 49, 512, 2048, 256),
        "S/16": (8, 196, 512, 2048, 256),
        "B/32": (12, 49, 768, 3072, 384),
        "B/16": (12, 196, 768, 3072, 384),
        "L/32": (24, 49, 1024, 4096, 512),
        "L/16": (24, 196, 1024, 4096, 512),
        "H/14": (32, 256, 1280, 5120, 640),
    }
    assert mixer.Config() == mixer.SIZES["B/16"]


def parameter_count(config):
    leaves = jax.tree.leaves(mixer.param_table(config))
    return sum(math.prod(param.shape) for param in leaves)


def test_c1_parameter_counts():
    """Table 1, in millions and without the head; three to the last by the official tests."""
    millions = {
        "S/32": 19,
        "S/16": 18,
        "B/32": 60,
        "B/16": 59,
        "L/32": 206,
        "L/16": 207,
        "H/14": 431,
    }
    for name, config in mixer.SIZES.items():
        headless = parameter_count(change(config, classes=0))
        assert round(headless / 1e6) == millions[name], name
    exact = {"B/16": 59_880_472, "B/32": 60_293_428, "L/16": 208_196_168}
    for name, published in exact.items():
        assert parameter_count(mixer.SIZES[name]) == published, name


def forward_flops(model, config):
    """FLOPs of the matrix products of one image."""
    images = jax.ShapeDtypeStruct((1, *config.image_size, config.channels), "float32")
    forward = functools.partial(model.forward, config=config)
    return count(jax.make_jaxpr(forward)(shapes_of(config, model), images).jaxpr, matmul_flops)


def test_c2_flops_are_linear_in_the_number_of_patches():
    """Sec. 2: "linear in the number of input patches, unlike ViT whose complexity is quadratic"."""
    D, E, F = 16, 8, 32
    for T in (2, 4, 6):
        config = change(TINY, image_size=(8, 2 * T), classes=0)
        per_token = 48 * D + config.depth * (2 * D * E + 2 * D * F)
        assert forward_flops(mixer, config) == 2 * T * per_token

    def growth(T):  # of the FLOPs of a ViT from T tokens to T + 2
        fields = {"width": 16, "depth": 1, "heads": 4, "mlp": 32, "classes": 0, "pool": "gap"}
        configs = [vit.Config((8, 2 * tokens), 4, **fields) for tokens in (T, T + 2)]
        few, more = [forward_flops(vit, config) for config in configs]
        return more - few

    assert growth(2) < growth(4) < growth(6)


def permute_patches(params, order):
    """Weights for images whose patch i is the patch order[i] of the images of before."""
    mixing = params["blocks"]["token_mixing"]
    first = {**mixing["dense1"], "kernel": mixing["dense1"]["kernel"][:, order]}
    second = {
        "kernel": mixing["dense2"]["kernel"][:, :, order],
        "bias": mixing["dense2"]["bias"][:, order],
    }
    blocks = {**params["blocks"], "token_mixing": {"dense1": first, "dense2": second}}
    return {**params, "blocks": blocks}


def shuffle_patches(images, order):
    patches = np.asarray(mixer.patchify(images, (4, 4)))[:, order]  # [B,T,h,w,C]
    shuffled = patches.reshape(len(images), 2, 3, 4, 4, 3).swapaxes(2, 3)
    return shuffled.reshape(images.shape)


def test_c3_the_order_of_the_patches_does_not_matter():
    """Sec. 3.4: "invariant to the order of patches and pixels within the patches"."""
    rng = np.random.default_rng(1)
    order = rng.permutation(6)
    inside = rng.permutation(48)
    batch = random_batch(TINY)
    params = random_params(TINY)
    params["head"]["kernel"] *= 0.1
    moved = permute_patches(params, order)
    embed = moved["embed"]
    kernel = embed["kernel"].reshape(48, 16)[inside].reshape(4, 4, 3, 16)
    moved = {**moved, "embed": {**embed, "kernel": kernel}}
    patches = np.asarray(mixer.patchify(shuffle_patches(batch["images"], order), (4, 4)))
    patches = patches.reshape(8, 6, 48)[:, :, inside].reshape(8, 2, 3, 4, 4, 3)
    shuffled = {**batch, "images": patches.swapaxes(2, 3).reshape(batch["images"].shape)}

    run = jax.jit(functools.partial(mixer.forward, config=TINY))
    want = run(params, batch["images"])
    close(run(moved, shuffled["images"]), want, 1e-5)
    assert float(abs(run(params, shuffled["images"]) - want).max()) > 0.01

    mesh = mesh_of(1, 1)
    optimizer = optax.sgd(0.1, momentum=0.9)
    step = mixer.make_train_step(TINY, optimizer, mesh)
    curves = []
    for weights, data in ((params, batch), (moved, shuffled)):
        state = mixer.init_state(jax.random.key(0), TINY, optimizer, mesh, weights)
        losses = []
        for _ in range(20):
            state, metrics = step(state, data, jax.random.key(0))
            losses.append(float(metrics["loss"]))
        curves.append(losses)
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-5)
    assert curves[0][-1] < 0.7 * curves[0][0]


def test_c4_token_mixing_does_not_grow_with_the_width():
    """Sec. 2: the same token-mixing MLP is applied to every channel."""

    def token_weights(config):
        leaves = jax.tree.leaves(mixer.param_table(config)["blocks"]["token_mixing"])
        return sum(math.prod(param.shape) for param in leaves)

    B16 = mixer.SIZES["B/16"]
    assert token_weights(B16) == 12 * (2 * 196 * 384 + 384 + 196)
    assert token_weights(change(B16, width=7)) == token_weights(B16)


def crops_of(images, size):
    """The crops of a batch, from left to right and top to bottom: a list of batches."""
    height, width = size
    return [
        images[:, top : top + height, left : left + width]
        for top in range(0, images.shape[1], height)
        for left in range(0, images.shape[2], width)
    ]


@pytest.mark.parametrize("down, across", [(2, 2), (1, 3), (3, 1)])
def test_c5_an_enlarged_model_sees_crops(down, across):
    """App. C: W_1 and W_2 become block-diagonal, with a copy of the old weights for every crop."""
    crops = down * across
    new = change(TINY, image_size=(8 * down, 12 * across), tokens_mlp=8 * crops)
    params = random_params(TINY)
    adapted = mixer.adapt(params, TINY, new)
    mixer.check_names(mixer.named_leaves(adapted), mixer.named_leaves(shapes_of(new)), "adapted")
    assert not np.any(adapted["head"]["kernel"])
    assert adapted["embed"] is params["embed"]
    # The second bias changes no output, see above; each token has that of its place in its crop.
    old_bias = params["blocks"]["token_mixing"]["dense2"]["bias"].reshape(2, 2, 3)
    bias = adapted["blocks"]["token_mixing"]["dense2"]["bias"].reshape(2, 2 * down, 3 * across)
    np.testing.assert_array_equal(bias, np.tile(old_bias, (1, down, across)))

    images = random_batch(new, 2)["images"]
    old_run = jax.jit(functools.partial(mixer.encode, config=TINY))
    old_tokens = [old_run(params, crop) for crop in crops_of(images, (8, 12))]  # each [B,6,D]
    # Every token is exactly that of its crop, in the place of its patch.
    grids = np.stack(old_tokens).reshape(down, across, 2, 2, 3, 16)  # ..., B, rows, columns, D
    want = grids.transpose(2, 0, 3, 1, 4, 5).reshape(2, 6 * crops, 16)
    tokens = jax.jit(functools.partial(mixer.encode, config=new))(adapted, images)
    close(tokens, want, 1e-5)

    # So the features are the mean of the crops' features and, with the old head, the logits too.
    with_head = {**adapted, "head": params["head"]}
    logits = jax.jit(functools.partial(mixer.forward, config=new))(with_head, images)
    of_crops = [np.asarray(mixer.forward(params, crop, TINY)) for crop in crops_of(images, (8, 12))]
    close(logits, np.mean(of_crops, axis=0), 1e-5)


def test_adapt_without_a_larger_image_replaces_the_head_alone():
    params = random_params(TINY)
    adapted = mixer.adapt(params, TINY, change(TINY, classes=3, stochastic_depth=0.1))
    assert adapted["blocks"] is params["blocks"]
    assert adapted["head"]["kernel"].shape == (16, 3) and not np.any(adapted["head"]["kernel"])
    assert "head" not in mixer.adapt(params, TINY, change(TINY, classes=0))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"width": 32}, "a checkpoint of width=16 cannot become width=32"),
        ({"depth": 1}, "a checkpoint of depth=2 cannot become depth=1"),
        ({"patch_size": 2}, "a checkpoint of patch_size=(4, 4) cannot become patch_size=(2, 2)"),
        ({"channels_mlp": 8}, "a checkpoint of channels_mlp=32 cannot become channels_mlp=8"),
        (
            {"image_size": (12, 12)},
            "image_size=(12, 12) is not a multiple of (8, 12): a Mixer's weights are bound to its "
            "6 patches, so images grow by whole factors only (App. C)",
        ),
        (
            {"image_size": (16, 24)},
            "tokens_mlp=8 is not 32, 4 times that of the checkpoint, as image_size needs (App. C)",
        ),
    ],
    ids=str,
)
def test_adapt_names_what_does_not_fit(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        mixer.adapt(random_params(TINY), TINY, change(TINY, **fields))


def test_params_of_another_config_are_refused():
    """They would be cut or enlarged to something else in silence."""
    deeper = random_params(change(TINY, depth=3))
    message = "params: blocks/channel_mixing/dense1/bias has shape (3, 32), not (2, 32)"
    with pytest.raises(ValueError, match=re.escape(message)):
        mixer.adapt(deeper, TINY, TINY)
    with pytest.raises(ValueError, match=re.escape(message)):
        mixer.init_state(jax.random.key(0), TINY, optax.sgd(0.1), mesh_of(1, 1), deeper)
    with pytest.raises(ValueError, match=re.escape(message)):
        mixer.to_official(deeper, TINY)
    with pytest.raises(ValueError, match="params: head/bias is unknown"):
        mixer.to_official(random_params(TINY), change(TINY, classes=0))


# ==== Numbers and the compiled program ============================================================


def test_bfloat16_is_finite_and_close_at_extreme_inputs():
    config = change(TINY, dtype="bfloat16")
    batch = random_batch(TINY)
    batch["images"] = np.sign(batch["images"])
    params = random_params(TINY)

    @jax.jit
    def run(params):
        def loss(params):
            return mixer.loss_fn(params, batch, None, config)[0]

        return mixer.forward(params, batch["images"], config), jax.grad(loss)(params)

    close(run(params)[0], mixer.forward(params, batch["images"], TINY), 2e-2)
    params["blocks"]["token_mixing"]["dense1"]["kernel"] *= 1000
    logits, grads = run(params)
    assert logits.dtype == jnp.float32
    for leaf in jax.tree.leaves((logits, grads)):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_dtype_is_promoted_in_silence(dtype):
    """JAX_NUMPY_DTYPE_PROMOTION=strict makes every implicit promotion an error."""
    config = change(TINY, dtype=dtype, stochastic_depth=0.1)
    batch = random_batch(config)

    def loss(params, key):
        return mixer.loss_fn(params, batch, key, config)[0]

    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(jax.grad(loss), shapes_of(config), jax.random.key(0))


def test_everything_is_float32_with_x64_too():
    config = change(TINY, stochastic_depth=0.5)
    key = jax.random.key(0)
    draws = mixer.draw_kept(key, 50, config)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(mixer.draw_kept(key, 50, config), draws)  # drawn alike
        assert mixer.draw_kept(None, 50, config).dtype == np.float32
        params = shapes_of(config)
        batch = random_batch(config)
        batch["images"] = batch["images"].astype(np.float64)

        def loss(params):
            return mixer.loss_fn(params, batch, jax.random.key(0), config)[0]

        for array in [*jax.tree.leaves(params), jax.eval_shape(loss, params)]:
            assert array.dtype == np.float32


def test_remat_keeps_two_arrays_of_a_block():
    D, T = 16, 6
    batch = random_batch(TINY)
    kept = {}
    for remat in (True, False):

        def loss(params, remat=remat):
            return mixer.loss_fn(params, batch, None, change(TINY, remat=remat))[0]

        jaxpr = jax.make_jaxpr(jax.grad(loss))(shapes_of(TINY)).jaxpr
        forward = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
        stacked = [v.aval for v in forward.outvars if v.aval.shape[:1] == (TINY.depth,)]
        kept[remat] = sum(aval.size for aval in stacked)
    rows = TINY.depth * len(batch["images"])
    assert kept[True] == rows * 2 * T * D < kept[False] / 3  # inputs of both halves


def test_no_transpose_stands_alone_in_the_compiled_program():
    """The two swaps of token mixing (Eq. 1) are fused into LayerNorm and into the sum."""
    weights = jax.tree.map(lambda leaf: leaf[0], random_params(TINY)["blocks"])
    x = np.zeros((8, 6, 16), np.float32)
    kept = np.ones((2, 8, 1, 1), np.float32)
    run = jax.jit(functools.partial(mixer.block, config=TINY))
    program = run.lower(x, weights, kept=kept).compile().as_text()
    with_transposes = [part for part in program.split("\n\n") if " transpose(" in part]
    normalizing = [part for part in with_transposes if " subtract(" in part]
    summing = [part for part in with_transposes if " add(" in part and part not in normalizing]
    assert len(with_transposes) == len(normalizing) + len(summing) == 2
    assert not any("ENTRY" in part for part in with_transposes)


# ==== Sharding ====================================================================================

MESHES = [(1, 1), (2, 4), (4, 2), (8, 1)]  # devices for the rows, devices for the hidden units


@functools.cache
def one_device():
    params = random_params(TINY)
    batch = random_batch(TINY)
    batch["labels"][:2] = -1  # two rows that do not count, both on the first of four devices

    def loss(params):
        return mixer.loss_fn(params, batch, None, TINY)[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    return params, batch, float(value), mixer.named_leaves(grads)


@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize("data, model", MESHES)
def test_mesh_gives_the_loss_and_gradients_of_one_device(data, model, fsdp):
    params, batch, want, want_grads = one_device()
    config = change(TINY, fsdp=fsdp)
    mesh = mesh_of(data, model)
    specs = mixer.param_specs(config, mesh)
    placed = jax.device_put(params, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
    gradient = jax.jit(jax.value_and_grad(mixer.global_loss(config, mesh), has_aux=True))
    (value, metrics), grads = gradient(placed, batch, None)
    assert float(value) == float(metrics["loss"]) == pytest.approx(want, rel=1e-5)
    close_gradients(mixer.named_leaves(grads), want_grads, 1e-5)

    blocks = placed["blocks"]
    cuts = {"token_mixing": model, "channel_mixing": model * (data if fsdp else 1)}
    for name, parts in cuts.items():
        kernel = blocks[name]["dense1"]["kernel"]
        assert kernel.nbytes == kernel.addressable_shards[0].data.nbytes * parts


def collectives(config, data, model, gradient=False):
    """Collectives of global_loss or of its gradient."""
    loss = mixer.global_loss(config, mesh_of(data, model))

    def function(params, batch):
        return loss(params, batch, None)[0]

    if gradient:
        function = jax.grad(function)
    jaxpr = jax.make_jaxpr(function)(shapes_of(config), random_batch(config)).jaxpr
    return count_collectives(jaxpr)


def test_collectives_are_those_that_the_docstring_states():
    whole = collectives(TINY, 2, 4)
    assert whole == {"psum": 2 * 2 + 2, "all_gather": 0, "reduce_scatter": 0}  # blocks, loss
    config = change(TINY, fsdp=True)
    cut = collectives(config, 2, 4)
    assert cut == {"psum": 2 * 2 + 2, "all_gather": 2 * 2 + 2, "reduce_scatter": 0}  # embed, head
    deeper = collectives(change(config, depth=5), 2, 4)
    assert deeper["psum"] - cut["psum"] == deeper["all_gather"] - cut["all_gather"] == 3 * 2
    gradient = collectives(config, 2, 4, gradient=True)
    assert gradient["reduce_scatter"] == 2 * 2 + 2  # each gathered kernel's gradient is cut again
    assert gradient["all_gather"] == 2 * 2 * 2 + 2  # blocks gather again when they are recomputed
    alone = collectives(config, 1, 1, gradient=True)
    assert set(alone.values()) == {0}
    assert collectives(TINY, 1, 4)["psum"] == 2 * 2 and collectives(TINY, 8, 1)["psum"] == 2


def test_stochastic_depth_on_a_mesh_differs_between_rows_alone(monkeypatch):
    config = change(TINY, stochastic_depth=0.3)
    drawn = []
    keep = jax.random.bernoulli

    def record(key, p, shape):
        drawn.append((shape, sorted(jax.typeof(key).mat.varying)))
        return keep(key, p, shape)

    monkeypatch.setattr(jax.random, "bernoulli", record)
    loss = mixer.global_loss(config, mesh_of(2, 4))
    jax.eval_shape(loss, shapes_of(config), random_batch(config), jax.random.key(0))
    assert drawn == [((2, 2, 4, 1, 1), ["data"])]  # half of the 8 rows, the same over "model"


def test_train_step_compiles_once_and_equals_optax_on_one_device():
    config = change(TINY, fsdp=True)
    optimizer = optax.sgd(0.1, momentum=0.9)
    mesh = mesh_of(2, 4)
    state = mixer.init_state(jax.random.key(0), config, optimizer, mesh, random_params(TINY))
    params = jax.tree.map(np.asarray, state.params)
    opt_state = optimizer.init(params)
    step = mixer.make_train_step(config, optimizer, mesh)
    batch = random_batch(config)

    @jax.jit
    def by_hand(params, opt_state):
        def loss(params):
            return mixer.loss_fn(params, batch, None, config)[0]

        grads = jax.grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(3):
        state, _ = step(state, batch, jax.random.key(0))
        params, opt_state = by_hand(params, opt_state)
    assert step._cache_size() == 1 and int(state.step) == 3
    close_gradients(mixer.named_leaves(state.params), mixer.named_leaves(params), 1e-5)


def test_initial_values_are_those_of_the_official_layers():
    """lecun_normal with zero biases, where vit.py has glorot_uniform."""
    config = change(TINY, width=64, channels_mlp=128, image_size=32, tokens_mlp=32)
    params = jax.jit(mixer.init_params, static_argnums=1)(jax.random.key(0), config)
    blocks = params["blocks"]
    inputs = {
        "token_mixing/dense1": 64,
        "token_mixing/dense2": 32,
        "channel_mixing/dense1": 64,
        "channel_mixing/dense2": 128,
    }
    for name, fan_in in inputs.items():
        mlp, layer = name.split("/")
        layer = blocks[mlp][layer]
        assert float(layer["kernel"].std()) == pytest.approx(fan_in**-0.5, rel=0.1), name
        assert not np.any(layer["bias"])
        assert not np.array_equal(layer["kernel"][0], layer["kernel"][1])
    assert float(params["embed"]["kernel"].std()) == pytest.approx(48**-0.5, rel=0.1)
    assert not np.any(params["head"]["kernel"])


# ==== Checkpoints =================================================================================


@pytest.mark.parametrize("prefix", ["", "params/", "opt/target/"])
def test_official_names_go_there_and_back(prefix):
    params = random_params(TINY)
    flat = mixer.to_official(params, TINY)
    assert len(flat) == 2 * 12 + 6
    assert flat["stem/kernel"].shape == (4, 4, 3, 16)
    assert flat["MixerBlock_1/token_mixing/Dense_0/kernel"].shape == (6, 8)
    stored = {prefix + name: array for name, array in flat.items()}
    if prefix:
        stored["opt/state/step"] = np.array(3)  # what lies outside the prefix is left alone
    assert_same(mixer.from_official(stored, TINY), params)
    assert mixer.infer_config(stored, image_size=(8, 12)) == TINY


def test_saved_and_loaded_it_predicts_the_same_bits(tmp_path):
    params = random_params(TINY)
    mixer.save(tmp_path / "model.npz", params, TINY)
    assert_same(mixer.load(tmp_path / "model.npz", TINY), params)
    params["head"]["bias"][2] = np.inf
    with pytest.raises(ValueError, match="head/bias holds values that are not finite: not saved"):
        mixer.save(tmp_path / "other.npz", params, TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["model.npz"]


@pytest.mark.parametrize(
    "fields",
    [{"image_size": 8}, {"image_size": 16, "classes": 0, "depth": 11}, {"image_size": (8, 32)}],
    ids=str,
)
def test_infer_config(fields):
    config = change(TINY, **fields)
    flat = mixer.to_official(random_params(config), config)
    if "image_size" in fields and config.grid[0] != config.grid[1]:
        flat_config = mixer.infer_config(flat, image_size=config.image_size)
    else:
        flat_config = mixer.infer_config(flat)
    assert flat_config == config


KERNEL = "MixerBlock_0/token_mixing/Dense_0/kernel"


@pytest.mark.parametrize(
    "name, damage, message",
    [
        (KERNEL, lambda array: None, f"{KERNEL} is missing"),
        ("extra/kernel", lambda array: np.zeros(3), "extra/kernel is unknown"),
        (KERNEL, lambda array: array.T, f"{KERNEL} has shape (8, 6), not (6, 8)"),
        (KERNEL, lambda array: array.astype(str), f"{KERNEL} is <U32, not numeric"),
        ("head/bias", lambda array: array * np.nan, "head/bias holds values that are not finite"),
    ],
)
def test_strict_about_every_array(name, damage, message):
    flat = mixer.to_official(random_params(TINY), TINY)
    damaged = damage(flat.pop(name, None))
    if damaged is not None:
        flat[name] = damaged
    with pytest.raises(ValueError, match=re.escape(message)):
        mixer.from_official(flat, TINY)


def test_checkpoints_of_other_models_are_named():
    of_a_vit = {"Transformer/encoderblock_0/LayerNorm_0/scale": np.ones(3)}
    message = "encoderblock_0/LayerNorm_0/scale: it is one of a Vision Transformer, see vit.py"
    for read in (mixer.infer_config, functools.partial(mixer.from_official, config=TINY)):
        with pytest.raises(ValueError, match=message):
            read(of_a_vit)
        with pytest.raises(ValueError, match="Mixer/x, a name from before the release"):
            read({"Mixer/x": np.ones(3)})
    with pytest.raises(ValueError, match="has no array stem/kernel: it is not a Mixer"):
        mixer.infer_config({})
    flat = mixer.to_official(random_params(TINY), TINY)
    with pytest.raises(
        ValueError, match="is for 6 patches, which do not form a square: give image"
    ):
        mixer.infer_config(flat)
    with pytest.raises(ValueError, match=re.escape("stem/kernel has shape (3,), not 4 axes")):
        mixer.infer_config(flat | {"stem/kernel": np.ones(3)})


# ==== Errors ======================================================================================


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"image_size": (30, 32)}, "image_size=(30, 32) is not a positive multiple of patch_size="),
        ({"channels": 0}, "channels=0 is not at least 1"),
        ({"width": 0}, "width=0 is not at least 1"),
        ({"tokens_mlp": 0}, "tokens_mlp=0 is not at least 1"),
        ({"channels_mlp": 0}, "channels_mlp=0 is not at least 1"),
        ({"depth": -1}, "depth=-1 is not at least 1"),
        ({"classes": -1}, "classes=-1 is not at least 0"),
        ({"image_size": (224, 224, 3)}, "image_size=(224, 224, 3) is not one number or two"),
        ({"stochastic_depth": 1.0}, "stochastic_depth=1.0 is not in [0, 1)"),
        ({"dtype": "float16"}, "dtype='float16' is not one of float32, bfloat16"),
        ({"fsdp": True, "remat": False}, "fsdp=True needs remat=True"),
    ],
    ids=str,
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        mixer.Config(**fields)


@pytest.mark.parametrize(
    "images, message",
    [
        (np.zeros((2, 12, 8, 3), np.float32), "images are (2, 12, 8, 3), not [B, *(8, 12, 3)]"),
        (np.zeros((2, 8, 12, 3), np.uint8), "images are uint8, not floats in [-1, 1]"),
        (np.full((2, 8, 12, 3), 255.0), "images are from 255 to 255, not in [-1, 1]"),
        (np.full((2, 8, 12, 3), -2.0), "images are from -2 to -2, not in [-1, 1]"),
    ],
    ids=["shape", "dtype", "large", "small"],
)
def test_forward_refuses_images(images, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        mixer.forward(random_params(TINY), images, TINY)


def test_weights_of_another_model_are_refused():
    images = np.zeros((2, 8, 24, 3), np.float32)
    message = "params are for 6 patches, but image_size=(8, 24) has 12: see adapt"
    with pytest.raises(ValueError, match=re.escape(message)):
        mixer.forward(random_params(TINY), images, change(TINY, image_size=(8, 24)))
    with pytest.raises(ValueError, match="params have 2 blocks, not depth=1"):
        mixer.forward(random_params(TINY), images[:, :, :12], change(TINY, depth=1))
    flat = mixer.to_official(random_params(TINY), TINY)
    message = "the checkpoint is for 6 patches, and image_size=(8, 24) has 12: load it with"
    with pytest.raises(ValueError, match=re.escape(message)):
        mixer.from_official(flat, change(TINY, image_size=(8, 24)))


def test_draws_of_another_batch_are_refused():
    images = random_batch(TINY, 4)["images"]
    one_row = np.ones((2, 2, 1, 1, 1), np.float32)  # would be broadcast to all rows
    with pytest.raises(ValueError, match=re.escape("kept has shape (2, 2, 1, 1, 1), not (2, 2, 4")):
        mixer.forward(random_params(TINY), images, TINY, kept=one_row)


def test_labels_of_another_shape_are_refused():
    batch = random_batch(TINY, 2)
    batch["labels"] = batch["labels"][:, None]  # [B,1] would broadcast to [B,N] in silence
    with pytest.raises(ValueError, match=re.escape("labels are (2, 1), not (2,) or (2, 5)")):
        mixer.loss_fn(random_params(TINY), batch, None, TINY)


def test_meshes_that_do_not_divide_are_refused():
    odd = change(TINY, tokens_mlp=9)
    message = "blocks/token_mixing/dense1/bias (2, 9): 9 is not a multiple of mesh axis model=2"
    with pytest.raises(ValueError, match=re.escape(message)):
        mixer.param_specs(odd, mesh_of(1, 2))
    with pytest.raises(ValueError, match="18 is not a multiple of mesh axis data=4"):
        mixer.param_specs(change(TINY, width=18, fsdp=True), mesh_of(4, 1))
    loss = mixer.global_loss(TINY, mesh_of(8, 1))
    with pytest.raises(ValueError, match="a batch of 12 is not a multiple of data=8"):
        loss(random_params(TINY), random_batch(TINY, 12), None)


# ==== Demo ========================================================================================


def test_pixel_orders_are_what_their_names_say():
    config = mixer.DIGITS
    plain, patches, pixels = mixer.pixel_orders(config, seed=0).values()
    for order in (plain, patches, pixels):
        assert sorted(order) == list(range(28 * 28))
    image = np.arange(28 * 28).reshape(1, 28, 28, 1)
    np.testing.assert_array_equal(mixer.reorder(image, plain), image)
    before = np.asarray(mixer.patchify(image, (4, 4))).reshape(49, 16)
    after = np.asarray(mixer.patchify(mixer.reorder(image, patches), (4, 4))).reshape(49, 16)
    sets = [frozenset(patch) for patch in before]
    places = [sets.index(frozenset(patch)) for patch in after]  # every patch is one of before
    assert sorted(places) == list(range(49)) and places != list(range(49))
    inside = {tuple(np.argsort(np.argsort(patch))) for patch in after}
    assert len(inside) == 1 and inside != {tuple(range(16))}  # reordered alike in all patches
    mixed = np.asarray(mixer.patchify(mixer.reorder(image, pixels), (4, 4))).reshape(49, 16)
    assert not set(map(frozenset, mixed)) & set(sets)


def test_pictures_are_shifted_whole():
    images = np.zeros((200, 9, 9, 1), np.uint8)
    images[:, 4, 4] = 200
    moved = mixer.augment(images, np.random.default_rng(0), 4)
    assert moved.shape == images.shape and moved.dtype == np.uint8
    assert (moved.sum((1, 2, 3)) == 200).all()  # never further than to the edge
    _, rows, columns, _ = np.nonzero(moved)
    assert set(rows) == set(columns) == set(range(9))
    white = np.full((50, 9, 9, 1), 255, np.uint8)
    assert mixer.augment(white, np.random.default_rng(0), 4).min() == 255  # the edge goes on


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
    monkeypatch.setattr(mixer, "DIGITS", change(mixer.DIGITS, width=16, depth=1))


@pytest.mark.usefixtures("small_demo")
def test_demo_trains_and_draws(digits, tmp_path, capsys):
    out = tmp_path / "d.png"
    flags = ["--data", digits, "--out", str(out), "--steps", "3"]
    assert mixer.main([*flags, "--mesh", "data=2,model=2", "--fsdp"]) == 0
    text = capsys.readouterr().out.splitlines()
    assert text[0] == "40 digits, 8 held out, on 4 cpu(s)"
    assert [line for line in text if line.startswith("pixels")] == [
        "pixels as they are:",
        "pixels patches and pixels inside them shuffled:",
        "pixels all pixels shuffled:",
    ]
    assert (
        len(
            [
                line
                for line in text
                if re.fullmatch(r"step 3/3  loss \d\.\d{3} nats  0 s left", line)
            ]
        )
        == 3
    )
    got = r"result: held-out accuracy: got \d+\.\d %, expected unknown, at least unknown"
    assert re.fullmatch(got, text[-2])
    assert text[-1] == f"wrote {out}"
    assert out.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.usefixtures("small_demo")
def test_demo_stops_at_a_loss_that_is_not_finite(digits, tmp_path, capsys, monkeypatch):
    recipe = mixer.RECIPES["digits"]._replace(learning_rate=1e38)
    monkeypatch.setitem(mixer.RECIPES, "digits", recipe)
    out = tmp_path / "d.png"
    assert mixer.main(["--data", digits, "--out", str(out), "--steps", "30"]) == 1
    assert re.fullmatch(r"mixer.py: step \d+: the loss is (nan|inf)\n", capsys.readouterr().err)
    assert not out.exists()


@pytest.mark.usefixtures("small_demo")
def test_demo_prints_its_result_where_it_cannot_draw(digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # import fails
    assert mixer.main(["--data", digits, "--out", str(tmp_path / "d.png"), "--steps", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("result: held-out accuracy: got ")
    assert lines[-1].startswith("no figure: ")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--steps 0", "--steps 0 is not at least 1"),
        ("--seed -1", "--seed -1 is not in 0 to 4294967295"),
        ("--mesh data=1,model=3", "128 is not a multiple of mesh axis model=3"),
        ("--mesh data=3,model=1", "the batch of 64 is not a multiple of data=3"),
        ("--out f.npz", "--out f.npz is not a .png, .pdf or .svg"),
        ("--data missing.npz", "missing.npz does not exist"),
    ],
)
def test_demo_refuses_in_one_line(flags, message, digits, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mixer.main(["--data", digits, "--out", "d.png", "--steps", "2", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mixer.py: ") and message in error
    assert len(error.splitlines()) == 1 and list(tmp_path.iterdir()) == []
