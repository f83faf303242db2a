"""vit.py against the official code, by hand, and by what the paper claims."""

import dataclasses
import functools
import importlib.util
import inspect
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import vit
from common import (
    COLLECTIVES,
    ROOT,
    close,
    close_gradients,
    count,
    count_collectives,
    golden,
    matmul_flops,
    mesh_of,
    part,
)

golden = functools.partial(golden, "vit")
TINY = vit.Config(image_size=(8, 12), patch_size=4, width=16, depth=2, heads=4, mlp=32, classes=5)


def change(config, **fields):
    return dataclasses.replace(config, **fields)


def shapes_of(config):
    return jax.eval_shape(functools.partial(vit.init_params, config=config), jax.random.key(0))


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


# ==== Golden ======================================================================================

POOLED = ["vit_token", "vit_gap", "vit_representation"]
# The official code can also return all tokens; ours are those of encode.
CLASSIFIERS = {"token": "token", "gap": "gap", "unpooled": "gap", "token_unpooled": "token"}


def config_of(official):
    """Config of the official configuration in a golden's meta data."""
    return vit.Config(
        image_size=tuple(official["image"]),
        patch_size=tuple(official["patch"]),
        width=official["hidden_size"],
        depth=official["num_layers"],
        heads=official["num_heads"],
        mlp=official["mlp_dim"],
        classes=official["num_classes"],
        pool=CLASSIFIERS[official["classifier"]],
        representation=official.get("representation_size"),
        dropout=official.get("dropout_rate", 0.0),
    )


def load_golden(name):
    meta, arrays = golden(name)
    config = config_of(meta["config"])
    return config, vit.from_official(part(arrays, "params/"), config), arrays


@pytest.mark.parametrize("name", POOLED)
def test_golden_outputs_and_gradients(name):
    config, params, arrays = load_golden(name)

    @jax.jit
    def run(params, images):
        def loss(params, images):
            batch = {"images": images, "labels": arrays["in/labels"]}
            return vit.loss_fn(params, batch, None, config)[0]

        logits = vit.forward(params, images, config)
        features = vit.forward(params, images, change(config, classes=0))
        return jax.value_and_grad(loss, (0, 1))(params, images), logits, features

    (loss, (grads, image_grad)), logits, features = run(params, arrays["in/images"])
    assert float(loss) == pytest.approx(float(arrays["out/loss"]), rel=1e-6)
    close(logits, arrays["out/logits"], 1e-5)
    close(features, arrays["out/pre_logits"], 1e-5)
    close_gradients(vit.to_official(grads, config), part(arrays, "grad/"))
    close(image_grad, arrays["out/grad_images"], 2e-5)


@pytest.mark.parametrize("name", [*POOLED, "vit_unpooled", "vit_token_unpooled"])
def test_golden_intermediate_values(name):
    config, params, arrays = load_golden(name)

    @jax.jit
    def values(params, images):
        out = {"posembed": vit.embed(params, images, config)}
        patches = vit.patchify(images, config.patch_size)
        out["embedding"] = vit.linear(patches, params["embed"], "float32", axes=3)
        x = out["posembed"]
        for i in range(config.depth):
            weights = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
            y = vit.layer_norm(x, weights["norm1"])
            out[f"block_{i}_attention"] = vit.self_attention(y, weights, config)[0]
            x, _ = vit.block(x, weights, config)
            out[f"block_{i}"] = x
        out["encoded"] = vit.encode(params, images, config)
        if "unpooled" in name:  # the official code applies what follows to every token
            x = out["encoded"]
            if config.representation:
                x = jnp.tanh(vit.linear(x, params["pre_logits"], "float32"))
            out["logits"] = vit.linear(x, params["head"], "float32")
        return out

    got = values(params, arrays["in/images"])
    stored = {n: array for n, array in part(arrays, "out/").items() if n in got}
    assert len(stored) >= config.depth + 4
    for name_of_value, want in stored.items():
        close(np.reshape(got[name_of_value], want.shape), want, 1e-5)


def test_golden_model_with_dropout_when_it_is_off():
    """vit_dropout.npz: its dropout of attention weights is not here, the rest is tested by hand."""
    config, params, arrays = load_golden("vit_dropout")
    close(vit.forward(params, arrays["in/images"], config), arrays["out/logits_eval"], 1e-5)


def test_golden_position_resize():
    meta, arrays = golden("vit_posemb_interpolate")
    for spec in meta["specs"]:
        table = arrays[f"in/{spec['i']}/posemb"][0]
        old = (spec["old_grid"],) * 2
        new = (spec["new_grid"],) * 2
        got = vit.resize_position_embedding(table, old, new, prefix=int(spec["has_class_token"]))
        close(got, arrays[f"out/{spec['i']}/posemb"][0], 1e-6)


def test_golden_loading_for_fine_tuning():
    meta, arrays = golden("vit_load_pretrained_resize")
    old = config_of(meta["checkpoint_config"])
    new = config_of(meta["model_config"])
    params = vit.adapt(vit.from_official(part(arrays, "params/"), old), old, new)
    assert not np.any(params["head"]["kernel"]) and "pre_logits" not in params
    close(params["position"], arrays["out/posemb_after"][0], 1e-6)
    params["head"] = {"kernel": arrays["in/init_head_kernel"], "bias": arrays["in/init_head_bias"]}
    close(vit.forward(params, arrays["in/images"], new), arrays["out/logits"], 1e-5)


def test_golden_names_of_the_newer_official_code():
    """The official code, when it loads a released file, counts each kind of layer by itself."""
    meta, arrays = golden("vit_load_pretrained_resize")
    config = config_of(meta["model_config"])
    params = random_params(config)
    flat = {}
    for name, array in vit.to_official(params, config).items():
        for newer, released in vit.NEWER_BLOCK.items():
            name = name.replace(released, newer)
        flat[name] = array
    assert sorted(flat) == str(arrays["out/loaded_names"]).split("\n")
    assert_same(vit.from_official(flat, config), params)


def test_golden_preprocessing():
    meta, arrays = golden("vit_preprocess")
    size = (meta["target_size"],) * 2
    for i in range(3):
        got = vit.preprocess(arrays[f"in/{i}/image"][None], size)[0]
        close(got, arrays[f"out/{i}/finetune_eval"], 1e-6)


# ==== Equations, worked by hand ===================================================================


def test_patches_are_read_row_by_row():
    image = np.arange(2 * 4 * 6).reshape(1, 4, 12, 1)  # 4 rows, 12 columns; patches of 2 x 6
    got = np.asarray(vit.patchify(image, (2, 6)))[0, ..., 0]
    assert got.shape == (4, 2, 6)
    np.testing.assert_array_equal(got[1], [range(6, 12), range(18, 24)])  # right of the first
    np.testing.assert_array_equal(got[2], [range(24, 30), range(36, 42)])  # below the first


def test_attention_of_two_tokens():
    """Eq. 6, 7."""
    q = np.zeros((1, 1, 2, 4), np.float32)
    k = np.zeros((1, 1, 2, 4), np.float32)
    q[0, 0, 0, 0] = 2 * math.log(3)
    k[0, 0, 1, 0] = 1  # token 0 scores log(3) on token 1, after 1/sqrt(4)
    weights = vit.attention_weights(q, k)
    np.testing.assert_allclose(weights[0, 0], [[0.25, 0.75], [0.5, 0.5]], rtol=1e-6)
    v = np.array([[1.0, 10.0], [5.0, 50.0]], np.float32).reshape(1, 1, 2, 2)
    out = vit.attention_reference(q, k, v)
    np.testing.assert_allclose(out[0, 0], [[4, 40], [3, 30]], rtol=1e-6)


def test_dropout_keeps_the_mean():
    y = vit.dropout(jax.random.key(0), jnp.ones((100, 100)), 0.25)
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert abs(float(y.mean()) - 1) < 0.02


def test_dropout_falls_in_four_places_and_nowhere_else(monkeypatch):
    """As the official code: after the positions; hidden units and both sums of a block."""
    config = change(TINY, dropout=0.5, depth=1, remat=False)
    drawn = []

    def record(key, keep, shape):
        drawn.append((keep, shape))
        return jnp.ones(shape, bool)  # nothing is dropped, but all is scaled up

    monkeypatch.setattr(jax.random, "bernoulli", record)
    params = random_params(config)
    images = random_batch(config, 2)["images"]
    got = vit.encode(params, images, config, key=jax.random.key(0))
    assert drawn == [(0.5, (2, 7, 16)), (0.5, (2, 7, 16)), (0.5, (2, 7, 32)), (0.5, (2, 7, 16))]

    weights = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
    x = 2 * vit.embed(params, images, config)
    x = x + 2 * vit.self_attention(vit.layer_norm(x, weights["norm1"]), weights, config)[0]
    y = vit.linear(vit.layer_norm(x, weights["norm2"]), weights["mlp"]["dense1"], "float32")
    y = vit.linear(2 * jax.nn.gelu(y), weights["mlp"]["dense2"], "float32")
    close(got, vit.layer_norm(x + 2 * y, params["norm"]), 1e-5)


def test_dropout_differs_between_rows():
    config = change(TINY, dropout=0.5)
    images = np.zeros((2, 8, 12, 3), np.float32)  # two equal rows
    out = vit.forward(random_params(config), images, config, key=jax.random.key(1))
    assert float(abs(out[0] - out[1]).max()) > 0.1


def test_dropout_differs_between_blocks():
    config = change(TINY, dropout=0.5)
    params = jax.tree.map(jnp.zeros_like, random_params(config))
    params["blocks"]["mlp"]["dense2"]["bias"] += 1  # each block adds 2 or 0 to every value
    params["norm"]["scale"] += 1
    images = np.zeros((1, 8, 12, 3), np.float32)
    tokens = np.asarray(vit.encode(params, images, config, key=jax.random.key(1)))[0]
    distinct = [len(np.unique(token.round(4))) for token in tokens]
    assert max(distinct) == 3  # 0, 2 and 4 before the LayerNorm; equal draws give 0 and 4


def test_loss_by_hand_counts_no_masked_row():
    logits = np.log([[1.0, 3.0], [1.0, 1.0], [9.0, 1.0]])
    config = change(TINY, classes=2, depth=1)
    params = jax.tree.map(jnp.zeros_like, random_params(config))

    def loss(labels, logits):
        batch = {"images": np.zeros((3, 8, 12, 3), np.float32), "labels": np.asarray(labels)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vit, "forward", lambda *args, **axes: jnp.asarray(logits, jnp.float32))
            value, metrics = vit.loss_fn(params, batch, None, config)
        assert metrics == {"loss": value}
        return float(value)

    both = (math.log(4 / 3) + math.log(2)) / 2
    assert loss([1, 0, -1], logits) == pytest.approx(both, rel=1e-6)
    assert loss([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]], logits) == pytest.approx(both, rel=1e-6)
    mixed = 0.5 * math.log(4) + 0.5 * math.log(4 / 3)
    assert loss([[0.5, 0.5], [0.0, 0.0], [0.0, 0.0]], logits) == pytest.approx(mixed, rel=1e-6)
    assert loss([-1, -1, -1], logits) == 0
    for unknown in (2, -2):  # no class and no mask: it must not pass in silence
        assert math.isnan(loss([1, 0, unknown], logits))


def test_recipes_are_those_of_tables_3_and_4():
    """Learning rate, decay, weight decay, dropout; below either table: clipping at norm 1."""
    rows = {
        name: (r.learning_rate, r.decay, r.weight_decay, r.clip, r.dropout)
        for name, r in vit.RECIPES.items()
    }
    assert rows["ImageNet-21k"] == (1e-3, "linear", 0.03, None, 0.1)
    assert rows["ImageNet"] == (3e-3, "cosine", 0.3, 1.0, 0.1)
    assert rows["to ImageNet"] == (0.03, "cosine", 0.0, 1.0, 0.0)
    assert rows["to CIFAR"] == (0.01, "cosine", 0.0, 1.0, 0.0)
    for recipe in vit.RECIPES.values():
        assert recipe.source.startswith(("quoted: ", "reproduced: "))


# ==== Claims ======================================================================================

PUBLISHED = {
    "Ti/16": 5_717_416,
    "S/16": 22_050_664,
    "S/32": 22_878_952,
    "B/8": 86_576_872,
    "B/16": 86_567_656,
    "B/32": 88_224_232,
    "L/16": 304_326_632,
    "L/32": 306_535_400,
    "H/14": 632_045_800,
}


def test_sizes_are_those_of_table_1():
    rows = {name: (c.depth, c.width, c.mlp, c.heads) for name, c in vit.SIZES.items()}
    assert rows["B/16"] == rows["B/32"] == (12, 768, 3072, 12)
    assert rows["L/16"] == rows["L/32"] == (24, 1024, 4096, 16)
    assert rows["H/14"] == (32, 1280, 5120, 16)


def test_c1_parameter_counts():
    """Table 1: 86M, 307M, 632M parameters; to the last one in the official test (1,000 classes)."""
    assert vit.SIZES.keys() == PUBLISHED.keys()
    for name, published in PUBLISHED.items():
        leaves = jax.tree.leaves(vit.param_table(vit.SIZES[name]))
        assert sum(math.prod(param.shape) for param in leaves) == published, name


@pytest.mark.parametrize("with_positions", [False, True])
def test_c2_without_positions_the_encoder_commutes_with_permutations(with_positions):
    """Sec. 3.1: position embeddings are all that tells the encoder where a patch was."""
    params = random_params(TINY)
    if not with_positions:
        params["position"] *= 0
    images = random_batch(TINY, 2)["images"]
    order = np.random.default_rng(1).permutation(6)
    patches = np.asarray(vit.patchify(images, (4, 4)))[:, order]  # [B,T,h,w,C]
    shuffled = patches.reshape(2, 2, 3, 4, 4, 3).swapaxes(2, 3).reshape(images.shape)
    run = jax.jit(lambda images: vit.encode(params, images, TINY))
    tokens = np.asarray(run(images))
    moved = np.asarray(run(shuffled))
    error = np.abs(tokens[:, 1 + order] - moved[:, 1:]).max()
    if with_positions:
        assert error > 0.1
    else:
        assert error < 1e-5


def test_c3_resizing_to_the_same_grid_changes_nothing():
    """Sec. 3.2: 2D interpolation "according to their location in the original image"."""
    table = np.random.default_rng(0).normal(size=(1 + 7 * 14, 6)).astype(np.float32)
    same = vit.resize_position_embedding(table, (7, 14), (7, 14), 1)
    np.testing.assert_array_equal(same, table)

    rows, columns = np.mgrid[:2, :3].astype(np.float32)
    places = np.stack([rows.ravel(), columns.ravel()], axis=1)  # each patch knows where it is
    got = vit.resize_position_embedding(places, (2, 3), (3, 5), 0).reshape(3, 5, 2)
    np.testing.assert_allclose(got[..., 0], np.linspace(0, 1, 3)[:, None] * np.ones(5), atol=1e-6)
    np.testing.assert_allclose(got[..., 1], np.ones((3, 1)) * np.linspace(0, 2, 5), atol=1e-6)


def test_c4_a_head_of_zeros_starts_at_log_classes():
    """Sec. 3.2: for fine-tuning the head is replaced by a zero-initialised one."""
    config = change(TINY, classes=7)

    @jax.jit
    def first_loss(key):
        return vit.loss_fn(vit.init_params(key, config), random_batch(config), None, config)[0]

    assert float(first_loss(jax.random.key(0))) == pytest.approx(math.log(7), abs=1e-5)


def test_c5_rollout_rows_are_distributions():
    """Abnar & Zuidema, Sec. 3: A = 0.5 W + 0.5 I, multiplied from the first layer on."""
    maps = vit.attention_maps(random_params(TINY), random_batch(TINY, 3)["images"], TINY)
    assert maps.shape == (2, 3, 4, 7, 7)
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)
    rollout = vit.attention_rollout(maps)
    assert rollout.shape == (3, 7, 7) and float(rollout.min()) >= 0
    np.testing.assert_allclose(rollout.sum(-1), 1, atol=1e-5)


def test_c5_rollout_of_known_attention_is_the_product_by_hand():
    maps = np.zeros((2, 1, 2, 3, 3), np.float32)
    maps[0, ..., 0] = 1  # in the first layer everybody looks at token 0
    maps[1, ..., 1] = 1  # in the second at token 1, in both heads
    one = np.array([[1, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5]])
    two = np.array([[0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5]])
    np.testing.assert_allclose(vit.attention_rollout(maps)[0], two @ one)
    assert not np.allclose(two @ one, one @ two)


def test_c5_attention_maps_are_those_of_the_forward_pass():
    params = random_params(TINY)
    images = random_batch(TINY, 2)["images"]
    weights = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
    y = np.asarray(vit.layer_norm(vit.embed(params, images, TINY), weights["norm1"]))
    q, k = (
        np.einsum("btd,dhk->bthk", y, weights[name]["kernel"]) + weights[name]["bias"]
        for name in ("query", "key")
    )
    scores = np.exp(np.einsum("bthk,bshk->bhts", q, k) / 2)  # sqrt of the head size 4
    by_hand = scores / scores.sum(-1, keepdims=True)
    np.testing.assert_allclose(vit.attention_maps(params, images, TINY)[0], by_hand, rtol=1e-4)


def test_c6_patch_embedding_is_a_linear_map_of_flattened_patches():
    """Eq. 1: x_p E; the official code has it as a convolution whose stride is a patch."""
    embedding = random_params(TINY)["embed"]
    images = random_batch(TINY, 2)["images"]
    patches = vit.patchify(images, (4, 4))
    got = vit.linear(patches, embedding, "float32", axes=3)
    convolved = jax.lax.conv_general_dilated(
        images,
        embedding["kernel"],
        window_strides=(4, 4),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(got, convolved.reshape(2, 6, 16) + embedding["bias"], atol=1e-5)
    flat = np.asarray(patches).reshape(2, 6, 48) @ embedding["kernel"].reshape(48, 16)
    np.testing.assert_allclose(got, flat + embedding["bias"], atol=1e-5)


def forward_flops(config):
    """FLOPs of the matrix products of one image."""
    images = jax.ShapeDtypeStruct((1, *config.image_size, config.channels), "float32")
    forward = functools.partial(vit.forward, config=config)
    return count(jax.make_jaxpr(forward)(shapes_of(config), images).jaxpr, matmul_flops)


def test_c8_flops_are_linear_in_depth_and_attention_quadratic_in_tokens():
    """Sec. 3.1, 4.5: cost of the encoder; every matrix product counted from the jaxpr."""
    base = change(TINY, pool="gap", classes=0)
    D, F, T = 16, 32, 6
    one, two, three = [forward_flops(change(base, depth=depth)) for depth in (1, 2, 3)]
    assert three - two == two - one == 2 * T * (4 * D * D + 2 * D * F) + 4 * T * T * D
    for T in (2, 4, 6):
        total = forward_flops(change(base, image_size=(8, 2 * T), depth=1))
        linear_in_tokens = 2 * T * (48 * D + 4 * D * D + 2 * D * F)
        assert total - linear_in_tokens == 4 * T * T * D


def test_remat_keeps_two_arrays_of_a_block_and_computes_all_but_two_products_again():
    config = change(TINY, pool="gap")
    D, F, T = 16, 32, 6
    batch = random_batch(config)
    total = {}
    kept = {}
    for remat in (True, False):

        def loss(params, remat=remat):
            return vit.loss_fn(params, batch, None, change(config, remat=remat))[0]

        jaxpr = jax.make_jaxpr(jax.grad(loss))(shapes_of(config)).jaxpr
        total[remat] = count(jaxpr, matmul_flops)
        forward = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
        stacked = [v.aval for v in forward.outvars if v.aval.shape[:1] == (config.depth,)]
        kept[remat] = sum(aval.size for aval in stacked)
    rows = config.depth * len(batch["images"])
    again = 2 * T * (3 * D * D + D * F) + 4 * T * T * D  # q, k, v, first of the MLP; attention
    assert total[True] - total[False] == rows * again
    assert kept[True] == rows * 2 * T * D < kept[False] / 4  # inputs of both halves


# ==== Numbers and the compiled program ============================================================


def test_bfloat16_is_finite_and_close_at_extreme_inputs():
    config = change(TINY, dtype="bfloat16")
    batch = random_batch(TINY)
    batch["images"] = np.sign(batch["images"])
    params = random_params(TINY)

    @jax.jit
    def run(params):
        def loss(params):
            return vit.loss_fn(params, batch, None, config)[0]

        return vit.forward(params, batch["images"], config), jax.grad(loss)(params)

    close(run(params)[0], vit.forward(params, batch["images"], TINY), 2e-2)
    params["blocks"]["query"]["kernel"] *= 100  # attention that is all on one token
    logits, grads = run(params)
    assert logits.dtype == jnp.float32
    for leaf in jax.tree.leaves((logits, grads)):
        assert np.isfinite(leaf).all()


def test_with_bfloat16_sums_norms_and_softmax_stay_float32():
    """As the comment at Config.dtype says; on a mesh, where sums are over devices too."""
    config = change(TINY, dtype="bfloat16", representation=8)
    loss = vit.global_loss(config, mesh_of(2, 4))
    batch = random_batch(config)
    jaxpr = jax.make_jaxpr(loss)(shapes_of(config), batch, None).jaxpr
    for names in (("exp",), ("rsqrt",), COLLECTIVES["psum"]):
        dtypes = set()

        def record(eqn, names=names, dtypes=dtypes):
            if eqn.primitive.name in names:
                dtypes.add(eqn.invars[0].aval.dtype)
            return 0

        count(jaxpr, record)
        assert dtypes == {np.dtype("float32")}, names
    features = functools.partial(vit.forward, config=change(config, classes=0))
    assert jax.eval_shape(features, shapes_of(config), batch["images"]).dtype == np.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_dtype_is_promoted_in_silence(dtype):
    """JAX_NUMPY_DTYPE_PROMOTION=strict makes every implicit promotion an error."""
    config = change(TINY, dtype=dtype, dropout=0.1, representation=6)
    batch = random_batch(config)

    def loss(params, key):
        return vit.loss_fn(params, batch, key, config)[0]

    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(jax.grad(loss), shapes_of(config), jax.random.key(0))
        vit.preprocess(np.zeros((1, 8, 12, 3), np.uint8))


def test_everything_is_float32_with_x64_too():
    with jax.enable_x64(True):
        params = shapes_of(TINY)
        batch = random_batch(TINY)
        batch["images"] = batch["images"].astype(np.float64)
        logits = jax.eval_shape(lambda p: vit.forward(p, batch["images"], TINY), params)
        loss, _ = jax.eval_shape(lambda p: vit.loss_fn(p, batch, None, TINY), params)
        inputs = jax.eval_shape(vit.preprocess, np.zeros((1, 8, 12, 3)))  # float64
        for array in [*jax.tree.leaves(params), logits, loss, inputs]:
            assert array.dtype == np.float32
        saved = vit.to_official(random_params(TINY), TINY)
        assert {array.dtype for array in saved.values()} == {np.dtype("float32")}


def test_cudnn_refuses_where_it_cannot_run():
    q = jnp.zeros((1, 2, 4, 8), "bfloat16")
    needs = "needs a GPU, bfloat16 and a head size of 8, 16 ... 128, not cpu"
    with pytest.raises(NotImplementedError, match=needs):
        vit.attention_cudnn(q, q, q)
    with pytest.raises(NotImplementedError, match=needs):
        config = change(TINY, attention="cudnn")
        vit.forward(random_params(config), random_batch(config)["images"], config)


@pytest.mark.parametrize("dtype, K", [("float32", 8), ("bfloat16", 12), ("bfloat16", 136)])
def test_cudnn_refuses_on_a_gpu_what_it_cannot_do(dtype, K, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    q = jnp.zeros((1, 2, 4, K), dtype)
    with pytest.raises(NotImplementedError, match=f"not gpu, {dtype} and {K}$"):
        vit.attention_cudnn(q, q, q)


@pytest.mark.gpu
def test_cudnn_equals_the_definition_on_a_gpu():
    rng = np.random.default_rng(0)
    for T, K in ((197, 64), (577, 80), (50, 32)):
        q, k, v = (jnp.asarray(rng.normal(size=(2, 3, T, K)), "bfloat16") for _ in range(3))
        want = vit.attention_reference(*(x.astype("float32") for x in (q, k, v)))
        close(jax.jit(vit.attention_cudnn)(q, k, v).astype("float32"), want, 2e-2)


# ==== Sharding ====================================================================================

WIDE = change(TINY, representation=8)
MESHES = [  # devices for the rows, devices for the heads, fsdp
    (1, 1, False),
    (1, 2, False),
    (2, 2, True),
    (2, 4, False),
    (2, 4, True),
    (8, 1, False),
    (8, 1, True),
]


def some_masked(batch):
    """The batch with two rows that do not count, both on the first of four devices."""
    labels = batch["labels"].copy()
    labels[:2] = -1
    return {**batch, "labels": labels}


@functools.cache
def one_device():
    params = random_params(WIDE)
    batch = some_masked(random_batch(WIDE))

    def loss(params):
        return vit.loss_fn(params, batch, None, WIDE)[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    return params, batch, float(value), vit.named_leaves(grads)


@pytest.mark.parametrize("data, model, fsdp", MESHES)
def test_mesh_gives_the_loss_and_gradients_of_one_device(data, model, fsdp):
    params, batch, want, want_grads = one_device()
    config = change(WIDE, fsdp=fsdp)
    mesh = mesh_of(data, model)
    specs = vit.param_specs(config, mesh)
    placed = jax.device_put(params, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
    gradient = jax.jit(jax.value_and_grad(vit.global_loss(config, mesh), has_aux=True))
    (value, metrics), grads = gradient(placed, batch, None)
    assert float(value) == float(metrics["loss"]) == pytest.approx(want, rel=1e-5)
    close_gradients(vit.named_leaves(grads), want_grads, 1e-5)

    specs = vit.named_leaves(specs)
    for name, array in vit.named_leaves(placed).items():
        cuts = math.prod(mesh.shape[axis] for axis in tuple(specs[name]) if axis)
        assert array.addressable_shards[0].data.nbytes * cuts == array.nbytes, name
    kernel = placed["blocks"]["mlp"]["dense1"]["kernel"]
    cuts = model * (data if fsdp else 1)
    assert kernel.nbytes == kernel.addressable_shards[0].data.nbytes * cuts


def costs(config, data, model, gradient=False):
    """FLOPs of products and collectives on one device, of global_loss or of its gradient."""
    loss = vit.global_loss(config, mesh_of(data, model))

    def function(params, batch):
        return loss(params, batch, None)[0]

    if gradient:
        function = jax.grad(function)
    jaxpr = jax.make_jaxpr(function)(shapes_of(config), random_batch(config)).jaxpr
    return {"flops": count(jaxpr, matmul_flops), **count_collectives(jaxpr)}


@pytest.mark.parametrize("fsdp", [False, True])
def test_collectives_are_those_that_the_docstring_states(fsdp):
    config = change(WIDE, fsdp=fsdp)
    shallow = costs(config, 2, 4)
    deeper = costs(change(config, depth=5), 2, 4)
    assert deeper["psum"] - shallow["psum"] == 3 * 2  # three more blocks: attention and MLP each
    assert shallow["psum"] == 2 * 2 + 2  # and the sum and the count of the loss
    assert shallow["reduce_scatter"] == 0
    if fsdp:
        assert deeper["all_gather"] - shallow["all_gather"] == 3 * 6  # q, k, v, out, dense1, dense2
        assert shallow["all_gather"] == 2 * 6 + 3  # and embed, pre_logits, head
    else:
        assert shallow["all_gather"] == 0


def test_collectives_of_the_gradient_and_of_a_device_that_is_alone():
    config = change(WIDE, fsdp=True)
    gradient = costs(config, 2, 4, gradient=True)
    assert gradient["reduce_scatter"] == 2 * 6 + 3  # each gathered kernel's gradient is cut again
    assert gradient["all_gather"] == 2 * 2 * 6 + 3  # blocks gather again when they are recomputed
    alone = costs(config, 1, 1, gradient=True)
    assert alone["psum"] == alone["all_gather"] == alone["reduce_scatter"] == 0
    assert costs(WIDE, 1, 4)["psum"] == 2 * 2  # blocks, over "model"
    assert costs(WIDE, 8, 1)["psum"] == 2  # the loss, over "data"


def test_a_device_does_its_share_of_the_products():
    whole, half, eighth, parts = [
        costs(WIDE, data, model, gradient=True)["flops"]
        for data, model in ((1, 1), (2, 1), (8, 1), (2, 4))
    ]
    assert whole == 2 * half == 8 * eighth
    assert half / 4 < parts < half / 3  # embedding and head are not cut over "model"


def test_train_step_compiles_once_and_equals_optax_on_one_device():
    config = change(WIDE, fsdp=True)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
    mesh = mesh_of(2, 4)
    key = jax.random.key(0)
    state = vit.init_state(key, config, optimizer, mesh)
    params = jax.tree.map(np.asarray, state.params)
    opt_state = optimizer.init(params)
    step = vit.make_train_step(config, optimizer, mesh)
    batch = random_batch(config)

    @jax.jit
    def by_hand(params, opt_state):
        def loss(params):
            return vit.loss_fn(params, batch, None, config)[0]

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    for i in range(3):
        old = state
        state, metrics = step(state, batch, key)
        params, opt_state, loss = by_hand(params, opt_state)
        assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
        assert int(state.step) == i + 1
    assert step._cache_size() == 1
    assert old.params["position"].is_deleted()  # given away
    close_gradients(vit.named_leaves(state.params), vit.named_leaves(params), 1e-5)
    momentum = state.opt_state[1][0].trace["blocks"]["mlp"]["dense1"]["kernel"]
    assert momentum.sharding == state.params["blocks"]["mlp"]["dense1"]["kernel"].sharding


def test_train_step_hands_step_and_folded_key_to_a_gradient():
    optimizer = optax.sgd(1.0)
    mesh = mesh_of(1, 1)
    key = jax.random.key(7)

    def gradient(params, batch, key, step):
        metrics = {"loss": jnp.float32(step), "draw": jax.random.uniform(key)}
        return (metrics["loss"], metrics), jax.tree.map(jnp.ones_like, params)

    step = vit.make_train_step(TINY, optimizer, mesh, gradient)
    state = vit.init_state(key, TINY, optimizer, mesh)
    bias = np.asarray(state.params["head"]["bias"])
    for i in range(2):
        state, metrics = step(state, random_batch(TINY), key)
        assert float(metrics["loss"]) == i
        assert metrics["draw"] == jax.random.uniform(jax.random.fold_in(key, i))
    np.testing.assert_allclose(state.params["head"]["bias"], bias - 2)


def test_a_state_can_start_from_given_weights():
    params = jax.tree.map(jnp.asarray, random_params(TINY))
    optimizer = optax.sgd(1.0, momentum=0.9)
    mesh = mesh_of(1, 1)
    state = vit.init_state(jax.random.key(0), TINY, optimizer, mesh, params)
    assert_same(state.params, params)
    step = vit.make_train_step(TINY, optimizer, mesh)
    state, _ = step(state, random_batch(TINY), jax.random.key(0))
    assert_same(params, random_params(TINY))  # the step gave away copies
    sharded = vit.init_state(jax.random.key(0), TINY, optimizer, mesh_of(1, 2), random_params(TINY))
    assert sharded.params["blocks"]["mlp"]["dense1"]["kernel"].sharding.spec == P(
        None, None, "model"
    )


def test_initial_values_do_not_depend_on_the_mesh():
    config = change(WIDE, fsdp=True)
    key = jax.random.key(3)
    one = vit.init_state(key, config, optax.sgd(0.1), mesh_of(1, 1)).params
    many = vit.init_state(key, config, optax.sgd(0.1), mesh_of(2, 4)).params
    assert_same(one, many)
    bound = math.sqrt(6 / (16 + 32))  # Glorot, of an MLP kernel [D,F]
    kernel = np.asarray(one["blocks"]["mlp"]["dense1"]["kernel"])
    assert 0.95 * bound < np.abs(kernel).max() <= bound
    bound = math.sqrt(6 / (16 + 16))  # and of the query kernel [D,H,K], drawn as [D,H*K]
    kernel = np.asarray(one["blocks"]["query"]["kernel"])
    assert 0.95 * bound < np.abs(kernel).max() <= bound
    assert 0.014 < np.std(one["position"]) < 0.026
    assert 0.7e-6 < np.std(one["blocks"]["mlp"]["dense1"]["bias"]) < 1.3e-6


def test_dropout_on_a_mesh_differs_between_rows_and_between_hidden_units(monkeypatch):
    config = change(WIDE, dropout=0.3, depth=1)
    drawn = []
    keep = jax.random.bernoulli

    def record(key, p, shape):
        drawn.append(sorted(jax.typeof(key).mat.varying))
        return keep(key, p, shape)

    monkeypatch.setattr(jax.random, "bernoulli", record)
    loss = vit.global_loss(config, mesh_of(2, 4))
    jax.eval_shape(loss, shapes_of(config), random_batch(config), jax.random.key(0))
    # After the positions, after attention, own hidden units, after the MLP.
    assert drawn == [["data"], ["data"], ["data", "model"], ["data"]]


def test_slots_smaller_than_their_weights_are_placed_too():
    """Optimizers such as Amos keep one number for a row of a kernel, or for a whole weight."""

    def init(params):
        rows = jax.tree.map(lambda p: p.mean(-1, keepdims=True), params)
        whole = jax.tree.map(lambda p: p.mean(), params)
        return optax.ScaleByRssState(rows), optax.ScaleByRssState(whole)

    def update(updates, state, params=None):
        return updates, state

    optimizer = optax.GradientTransformation(init, update)
    state = vit.init_state(jax.random.key(0), TINY, optimizer, mesh_of(2, 4))
    rows, whole = (slots.sum_of_squares["blocks"] for slots in state.opt_state)
    assert rows["query"]["kernel"].sharding.spec == P(None, None, "model")  # [L,D,H,1]
    assert rows["mlp"]["dense1"]["kernel"].sharding.spec == P()  # [L,D,1]
    assert whole["query"]["kernel"].sharding.spec == P()  # []


# ==== Checkpoints =================================================================================


def assert_same(got, want):
    got = vit.named_leaves(got)
    want = vit.named_leaves(want)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


@pytest.mark.parametrize("prefix", ["", "params/", "opt/target/", "params/img/"])
def test_official_names_go_there_and_back(prefix):
    config = change(TINY, representation=6)
    params = random_params(config)
    flat = vit.to_official(params, config)
    assert len(flat) == 2 * 16 + 10
    assert flat["cls"].shape == (1, 1, 16)
    assert flat["Transformer/posembed_input/pos_embedding"].shape == (1, 7, 16)
    assert flat["Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel"].shape == (16, 32)
    stored = {prefix + name: array for name, array in flat.items()}
    if prefix:
        stored["opt/state/step"] = np.array(3)  # what lies outside the prefix is left alone
    assert_same(vit.from_official(stored, config), params)
    assert vit.infer_config(stored, image_size=(8, 12)) == config


KERNEL = "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"
POSITION = "Transformer/posembed_input/pos_embedding"


@pytest.mark.parametrize(
    "name, damage, message",
    [
        (KERNEL, lambda array: None, f"{KERNEL} is missing"),
        ("extra/kernel", lambda array: np.zeros(3), "extra/kernel is unknown"),
        (
            "MAPHead_0/probe",
            lambda array: np.zeros((1, 1, 16)),
            "MAPHead_0/probe is unknown",
        ),
        (KERNEL, np.transpose, f"{KERNEL} has shape (32, 16), not (16, 32)"),
        (KERNEL, lambda array: array.astype(str), f"{KERNEL} is <U32, not numeric"),
        ("cls", lambda array: array * np.nan, "cls holds values that are not finite"),
        (POSITION, lambda array: array[:, 1:], f"{POSITION} has shape (1, 6, 16), not (1, 7, 16)"),
    ],
)
def test_strict_about_every_array(name, damage, message):
    flat = vit.to_official(random_params(TINY), TINY)
    damaged = damage(flat.pop(name, None))
    if damaged is not None:
        flat[name] = damaged
    with pytest.raises(ValueError, match=re.escape(message)):
        vit.from_official(flat, TINY)


@pytest.mark.parametrize(
    "fields",
    [
        {"image_size": 8},
        {"image_size": 8, "classes": 0},
        {"image_size": 16, "representation": 7, "channels": 1},
        {"image_size": 8, "pool": "gap"},
        {"image_size": 8, "depth": 11, "heads": 2, "mlp": 8, "width": 8},
        {"image_size": (8, 16), "patch_size": (2, 4), "gelu": "exact"},
    ],
    ids=str,
)
def test_infer_config(fields):
    config = change(TINY, **fields)
    flat = vit.to_official(random_params(config), config)
    given = {"gelu": config.gelu} if config.gelu != "tanh" else {}
    assert vit.infer_config(flat, **given) == config


def test_infer_config_refuses_what_is_no_vit():
    flat = vit.to_official(random_params(TINY), TINY)
    with pytest.raises(ValueError, match="6 patches, which do not form a square: give image_size"):
        vit.infer_config(flat)
    assert vit.infer_config(flat, image_size=(8, 12)) == TINY
    with pytest.raises(ValueError, match="has no array embedding/kernel: it is not a ViT"):
        vit.infer_config({"stem/kernel": np.zeros((4, 4, 3, 16))})
    with pytest.raises(
        ValueError, match=re.escape("embedding/kernel has shape (48, 16), not 4 axes")
    ):
        vit.infer_config(flat | {"embedding/kernel": np.zeros((48, 16))})


def test_saved_and_loaded_it_predicts_the_same_bits(tmp_path):
    params = random_params(TINY)
    vit.save(tmp_path / "model.npz", params, TINY)
    assert_same(vit.load(tmp_path / "model.npz", TINY), params)
    assert [path.name for path in tmp_path.iterdir()] == ["model.npz"]


def test_bfloat16_in_an_npz_is_read_as_such(tmp_path):
    """numpy writes it as two raw bytes; so do real files of big_vision."""
    flat = vit.to_official(random_params(TINY), TINY)
    half = {name: array.astype(jnp.bfloat16) for name, array in flat.items()}
    vit.write_npz(tmp_path / "half.npz", half)
    params = vit.load(tmp_path / "half.npz", TINY)
    for name, array in vit.to_official(params, TINY).items():
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, flat[name], rtol=1e-2, err_msg=name)


def write_bad_file(path, kind):
    flat = vit.to_official(random_params(TINY), TINY)
    if kind == "truncated":
        np.savez(path, **flat)
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "damaged":
        np.savez(path, **flat)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
    elif kind == "pickles":
        np.savez(path, **flat, extra=np.array({"a": 1}, dtype=object))
    elif kind == "text":
        path.write_text("not an archive")
    elif kind == "torch":
        import zipfile

        with zipfile.ZipFile(path, "w") as archive:  # a .pth is a zip archive of other files
            archive.writestr("model/data.pkl", b"pickle")
    elif kind == "npy":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))


@pytest.mark.parametrize(
    "kind, message",
    [
        ("missing", "does not exist"),
        ("truncated", "is not an .npz, or only the first part of one"),
        ("damaged", "is not a readable .npz of plain arrays"),
        ("pickles", "is not a readable .npz of plain arrays"),
        ("text", "is not an .npz, or only the first part of one"),
        ("torch", "is not an .npz: model/data.pkl is not an array"),
        ("npy", "is not an .npz, or only the first part of one"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path, kind, message):
    path = tmp_path / "m.npz"
    write_bad_file(path, kind)
    with pytest.raises(ValueError, match=message) as error:
        vit.load(path, TINY)
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    params = random_params(TINY)
    params["head"]["bias"][2] = np.inf
    with pytest.raises(ValueError, match="head/bias holds values that are not finite: not saved"):
        vit.save(tmp_path / "m.npz", params, TINY)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "s.npz"
    vit.write_npz(path, {"a": np.ones(3)})
    before = path.read_bytes()

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(ValueError, match="s.npz cannot be written: No space left on device"):
        vit.write_npz(path, {"a": np.zeros(3)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "fields",
    [
        {"width": 32},
        {"depth": 3},
        {"mlp": 8},
        {"channels": 1},
        {"patch_size": 2},
        {"pool": "gap"},
        {"representation": 7},
        {"gelu": "exact"},
        {"heads": 2},
    ],
    ids=str,
)
def test_adapt_names_what_does_not_fit(fields):
    (name,) = fields
    old = change(TINY, representation=6)
    with pytest.raises(ValueError, match=f"a checkpoint of {name}=.* cannot become {name}="):
        vit.adapt(random_params(old), old, change(old, **fields))


def test_adapt_keeps_what_fits():
    old = change(TINY, representation=6)
    params = random_params(old)
    new = change(old, image_size=(16, 8), classes=3, dropout=0.1)
    adapted = vit.adapt(params, old, new)
    vit.check_names(vit.named_leaves(adapted), vit.named_leaves(shapes_of(new)), "adapted")
    assert adapted["pre_logits"] is params["pre_logits"]
    assert not np.any(adapted["head"]["kernel"])
    assert {leaf.dtype for leaf in jax.tree.leaves(adapted)} == {np.dtype("float32")}
    probe = change(old, classes=0)
    assert "head" not in vit.adapt(params, old, probe)


# ==== Errors ======================================================================================


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"image_size": (30, 32)},
            "image_size=(30, 32) is not a positive multiple of patch_size=(",
        ),
        ({"patch_size": (0, 16)}, "is not a positive multiple of patch_size=(0, 16)"),
        ({"image_size": (0, 16)}, "image_size=(0, 16) is not a positive multiple"),
        ({"width": 770}, "width=770 is not a multiple of heads=12"),
        ({"heads": 0}, "heads=0 is not at least 1"),
        ({"depth": -1}, "depth=-1 is not at least 1"),
        ({"channels": 0}, "channels=0 is not at least 1"),
        ({"width": 0}, "width=0 is not at least 1"),
        ({"mlp": 0}, "mlp=0 is not at least 1"),
        ({"representation": 0}, "representation=0 is not at least 1"),
        ({"classes": -1}, "classes=-1 is not at least 0"),
        ({"image_size": (224, 224, 3)}, "image_size=(224, 224, 3) is not one number or two"),
        ({"dropout": 1.0}, "dropout=1.0 is not in [0, 1)"),
        ({"dropout": -0.1}, "dropout=-0.1 is not in [0, 1)"),
        ({"pool": "map"}, "pool='map' is not one of token, gap"),
        ({"gelu": "erf"}, "gelu='erf' is not one of tanh, exact"),
        ({"dtype": "float16"}, "dtype='float16' is not one of float32, bfloat16"),
        ({"attention": "pallas"}, "attention='pallas' is not one of xla, cudnn"),
        ({"fsdp": True, "remat": False}, "fsdp=True needs remat=True"),
    ],
    ids=str,
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        vit.Config(**fields)


def test_one_number_means_a_square():
    config = vit.Config(image_size=224, patch_size=16)
    assert config.image_size == (224, 224) and config.patch_size == (16, 16)
    assert config == vit.Config() and config.grid == (14, 14) and config.tokens == 197
    assert vit.Config(image_size=[32, 64]).image_size == (32, 64)


@pytest.mark.parametrize(
    "images, message",
    [
        (np.zeros((2, 12, 8, 3), np.float32), "images are (2, 12, 8, 3), not [B, *(8, 12, 3)]"),
        (np.zeros((2, 8, 12, 3), np.uint8), "images are uint8, not floats in [-1, 1]"),
        (np.full((2, 8, 12, 3), 255.0), "images are from 255 to 255, not in [-1, 1]"),
        (np.full((2, 8, 12, 3), -2.0), "images are from -2 to -2, not in [-1, 1]"),
        (np.full((2, 8, 12, 3), np.nan), "images are from nan to nan, not in [-1, 1]"),
    ],
    ids=["shape", "dtype", "large", "small", "nan"],
)
def test_forward_refuses_images(images, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        vit.forward(random_params(TINY), images, TINY)


@pytest.mark.parametrize(
    "pixels, message",
    [
        (np.full((1, 2, 2, 1), 0.5), "pixels are floats of at most 0.5: are they scaled already"),
        (np.full((1, 2, 2, 1), -1.0), "pixels are from -1 to -1, not within 0 to 255"),
        (np.full((1, 2, 2, 1), 256), "pixels are from 256 to 256, not within 0 to 255"),
    ],
    ids=["scaled", "negative", "large"],
)
def test_preprocess_refuses(pixels, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        vit.preprocess(pixels)


def test_labels_and_weights_of_another_shape_are_refused():
    batch = random_batch(TINY, 2)
    batch["labels"] = batch["labels"][:, None]  # [B,1] would broadcast to [B,N] in silence
    with pytest.raises(ValueError, match=re.escape("labels are (2, 1), not (2,) or (2, 5)")):
        vit.loss_fn(random_params(TINY), batch, None, TINY)
    batch["labels"] = np.array([1.7, 2.0])  # would be rounded in silence
    with pytest.raises(ValueError, match=re.escape("labels [B] are float64, not integers")):
        vit.loss_fn(random_params(TINY), batch, None, TINY)
    with pytest.raises(ValueError, match="params have 2 blocks, not depth=1"):
        vit.forward(random_params(TINY), batch["images"], change(TINY, depth=1))


def test_preprocess_takes_black_pictures():
    for dtype in (np.uint8, np.float32):
        np.testing.assert_array_equal(vit.preprocess(np.zeros((1, 2, 2, 1), dtype)), -1)
    almost = vit.preprocess(np.ones((1, 2, 2, 1), np.uint8))  # 1 of 255, not 1 of 1
    np.testing.assert_allclose(almost, 1 / 127.5 - 1, rtol=1e-6)


def test_params_of_another_config_are_refused():
    """They would be saved in part, in silence."""
    deeper = random_params(change(TINY, depth=3))
    message = "params: blocks/key/bias has shape (3, 4, 4), not (2, 4, 4)"
    with pytest.raises(ValueError, match=re.escape(message)):
        vit.to_official(deeper, TINY)
    with pytest.raises(ValueError, match=re.escape(message)):
        vit.adapt(deeper, TINY, TINY)
    with pytest.raises(ValueError, match=re.escape(message)):
        vit.init_state(jax.random.key(0), TINY, optax.sgd(0.1), mesh_of(1, 1), deeper)


def test_position_tables_of_another_size_are_refused():
    with pytest.raises(ValueError, match=re.escape("6 positions are not 1 + 6 of grid (2, 3)")):
        vit.resize_position_embedding(np.zeros((6, 2)), (2, 3), (3, 5), 1)


def test_meshes_that_do_not_divide_are_refused():
    three = change(TINY, width=18, heads=3)
    with pytest.raises(
        ValueError, match=re.escape("blocks/key/bias (2, 3, 6): 3 is not a multiple")
    ):
        vit.param_specs(three, mesh_of(1, 2))
    with pytest.raises(ValueError, match="18 is not a multiple of mesh axis data=4"):
        vit.param_specs(change(three, fsdp=True), mesh_of(4, 1))
    loss = vit.global_loss(TINY, mesh_of(8, 1))
    with pytest.raises(ValueError, match="a batch of 12 is not a multiple of data=8"):
        loss(random_params(TINY), random_batch(TINY, 12), None)


# ==== Demo ========================================================================================


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """40 pictures of 28x28; their class is told by the bright half, so that they can be learnt."""
    rng = np.random.default_rng(0)
    labels = np.arange(40, dtype=np.uint8) % 2
    images = rng.integers(0, 100, (40, 28, 28), dtype=np.uint8)
    images[labels == 1, :14] += 150
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, images=images, labels=labels)
    return str(path)


@pytest.fixture
def small_demo(monkeypatch):
    """The demo with a smaller network, which compiles faster."""
    monkeypatch.setattr(vit, "DIGITS", change(vit.DIGITS, width=16, depth=1, mlp=32))


@pytest.mark.usefixtures("small_demo")
def test_demo_trains_and_draws(digits, tmp_path, capsys):
    out = tmp_path / "d.png"
    flags = ["--data", digits, "--out", str(out), "--steps", "3"]
    assert vit.main([*flags, "--mesh", "data=2,model=2", "--fsdp"]) == 0
    text = capsys.readouterr().out.splitlines()
    assert text[0] == "40 digits, 8 held out, on 4 cpu(s)"
    assert re.fullmatch(r"step 3/3  loss \d\.\d{3} nats  0 s left", text[1])
    got = r"result: held-out accuracy: got \d+\.\d %, expected unknown, at least unknown"
    assert re.fullmatch(got, text[2])
    assert text[3] == f"wrote {out}"
    assert out.read_bytes()[:4] == b"\x89PNG"


def test_demo_counts_every_held_out_picture_once():
    config = change(TINY, image_size=8, channels=1, classes=3)
    params = random_params(config)
    images = np.random.default_rng(0).integers(0, 256, (130, 8, 8, 1), dtype=np.uint8)
    guesses = np.asarray(vit.forward(params, vit.preprocess(images), config).argmax(-1))
    labels = guesses.copy()
    labels[5:] = (labels[5:] + 1) % 3  # the first five are right, two of them in the padding, too
    assert vit.accuracy(params, config, mesh_of(1, 1), images, labels) == 100 * 5 / 130


def test_augmentation_moves_and_never_invents():
    images = np.zeros((50, 9, 9, 1), np.uint8)
    images[:, 4, 4] = 200
    moved = vit.augment(images, np.random.default_rng(0), 2)
    assert set(np.unique(moved)) <= {0, 200}
    assert moved.shape == images.shape and len(np.unique(moved, axis=0)) > 10


@pytest.mark.usefixtures("small_demo")
def test_demo_stops_at_a_loss_that_is_not_finite(digits, tmp_path, capsys, monkeypatch):
    recipe = vit.RECIPES["digits"]._replace(learning_rate=1e38)
    monkeypatch.setitem(vit.RECIPES, "digits", recipe)
    out = tmp_path / "d.png"
    assert vit.main(["--data", digits, "--out", str(out), "--steps", "70"]) == 1
    assert re.fullmatch(r"vit.py: step \d+: the loss is (nan|inf)\n", capsys.readouterr().err)
    assert not out.exists()


@pytest.mark.usefixtures("small_demo")
def test_demo_prints_its_result_where_it_cannot_draw(digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # import fails
    assert vit.main(["--data", digits, "--out", str(tmp_path / "d.png"), "--steps", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("result: held-out accuracy: got ")
    assert lines[-1].startswith("no figure: ")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--steps 0", "--steps 0 is not at least 1"),
        ("--seed -1", "--seed -1 is not in 0 to 4294967295"),
        ("--seed 9223372036854775808", "--seed 9223372036854775808 is not in 0 to 4294967295"),
        ("--mesh 2x4", "--mesh 2x4 is not of the form data=4,model=2"),
        ("--mesh data=4,model=4", "--mesh data=4,model=4 needs 16 devices, there are 8"),
        ("--mesh data=1,model=8", "4 is not a multiple of mesh axis model=8"),
        ("--mesh data=3,model=1", "the batch of 128 is not a multiple of data=3"),
        ("--out nowhere/f.png", "--out nowhere/f.png: its folder cannot be written to"),
        ("--out f.npz", "--out f.npz is not a .png, .pdf or .svg"),
        ("--out folder.png", "--out folder.png is a folder"),
        ("--data missing.npz", "missing.npz does not exist"),
        (
            "--data emoji.npz",
            "are not ten or more uint8 [B,28,28] and integers [B]; examples/train",
        ),
        ("--data one.npz", "one.npz has no array labels"),
        ("--data eleven.npz", "eleven.npz: labels are from 0 to 10, not within 0 to 9"),
        ("--data few.npz", "are not ten or more uint8 [B,28,28] and integers [B]; examples/train"),
        ("--data floats.npz", "floats.npz: images float64 (20, 28, 28) and labels int64 (20,) are"),
        ("--data real.npz", "real.npz: images uint8 (20, 28, 28) and labels float64 (20,) are not"),
        ("--data short.npz", "short.npz: images uint8 (20, 28, 28) and labels int64 (19,) are not"),
    ],
)
def test_demo_refuses_in_one_line(flags, message, digits, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    np.savez("emoji.npz", images=np.zeros((20, 32, 32, 3), np.uint8), labels=np.zeros(20, int))
    pictures = np.zeros((20, 28, 28), np.uint8)
    np.savez("one.npz", images=pictures)
    np.savez("floats.npz", images=pictures / 255, labels=np.zeros(20, int))
    np.savez("real.npz", images=pictures, labels=np.zeros(20))
    np.savez("short.npz", images=pictures, labels=np.zeros(19, int))
    np.savez("few.npz", images=np.zeros((4, 28, 28), np.uint8), labels=np.zeros(4, int))
    np.savez("eleven.npz", images=pictures, labels=np.arange(20) % 11)
    before = sorted(tmp_path.iterdir())
    assert vit.main(["--data", digits, "--out", "d.png", "--steps", "2", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vit.py: ") and message in error
    assert len(error.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_mesh_leaves_devices_that_are_there_already():
    program = """
import jax
import vit
jax.config.update("jax_num_cpu_devices", 4)
vit.make_mesh("data=1,model=1")
assert jax.device_count() == 4
assert vit.make_mesh("data=2,model=2").size == 4
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize(
    "stop, status", [(KeyboardInterrupt, 130), (BrokenPipeError, 141), (None, 0)]
)
def test_a_program_ends_without_a_traceback(stop, status):
    """In a process of its own: run_program replaces standard output after a closed pipe."""
    body = f"raise {stop.__name__}" if stop else "return 0"
    program = f"""
import os
import sys
{inspect.getsource(vit.run_program)}
def main():
    {body}
run_program(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (status, b"", b"")


# ==== The real model: network =====================================================================

EXAMPLES = ROOT / "examples"
REAL = vit.Config(
    image_size=224, patch_size=14, width=384, depth=12, heads=6, mlp=1536, classes=0, gelu="exact"
)
# Run by a process that has onnx and onnxruntime, on the model as published.
REFERENCE = """
import numpy as np, real_vit
images = real_vit.photographs(224)
features = real_vit.backbone_features(real_vit.fetch(), (images - 127.5) / 127.5)
np.savez("reference.npz", images=images, features=features)
"""


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Path of the checkpoint, photographs uint8 [3,224,224,3], features by onnxruntime [3,257,384].

    The packages that this needs go into a folder of their own, which only the processes here see.
    """
    folder = tmp_path_factory.mktemp("real")
    paths = [str(folder / "packages"), str(EXAMPLES)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}

    def python(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{arguments}:\n{done.stdout}{done.stderr}"
        return done.stdout

    packages = ("onnx", "onnxruntime", "pillow")
    python("-m", "pip", "install", "--quiet", "--target", "packages", *packages)
    script = str(EXAMPLES / "real_vit.py")
    printed = python(script, "--out", "vit_s14.npz", "--photos", "photos")
    assert "198 arrays, 21,619,584 parameters" in printed
    assert len(list((folder / "photos").glob("*.png"))) == 3
    python("-c", REFERENCE)
    reference = vit.read_npz(folder / "reference.npz")
    return folder / "vit_s14.npz", reference["images"], reference["features"]


@pytest.fixture(scope="module")
def attention():
    """examples/vit_attention.py as a module."""
    spec = importlib.util.spec_from_file_location("vit_attention", EXAMPLES / "vit_attention.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.network
def test_features_of_the_real_model_equal_those_of_onnxruntime(real):
    path, images, want = real
    assert vit.infer_config(vit.read_npz(path), gelu="exact") == REAL
    run = jax.jit(lambda params, images: vit.encode(params, images, REAL))
    got = run(vit.load(path, REAL), vit.preprocess(images))
    assert got.shape == want.shape == (3, 257, 384)
    error = np.abs(got - want).max()
    deviation = want.std()
    print(f"largest difference {error:.2g}, standard deviation of the features {deviation:.3g}")
    assert error < 1e-4
    assert deviation > 2


@pytest.mark.network
def test_c7_real_model_position_embeddings(real, attention):
    """Sec. 4.5: "closer patches tend to have more similar position embeddings", "patches in the
    same row/column have similar embeddings".
    """
    path, _, _ = real
    params = vit.load(path, REAL)
    similarity = attention.position_similarity(params["position"], REAL.grid).reshape(256, 256)
    apart = attention.patch_distances(REAL.grid, (1, 1))  # in patches
    near = similarity[(apart > 0) & (apart < 2)].mean()
    far = similarity[apart >= 2].mean()
    print(f"cosine of position embeddings: neighbours {near:.2f}, others {far:.2f}")
    assert near > 0.5  # measured: 0.66
    assert far < 0.2  # measured: 0.07

    row, column = np.divmod(np.arange(256), 16)
    aligned = (row[:, None] == row) | (column[:, None] == column)
    gains = []
    for least in range(2, 15):
        ring = (apart >= least) & (apart < least + 1)  # at one and the same distance
        gains.append(similarity[ring & aligned].mean() - similarity[ring & ~aligned].mean())
    print(f"cosine in one row or column, less that of others as far away: {np.round(gains, 2)}")
    assert min(gains) > 0.2  # measured: 0.23


@pytest.mark.network
def test_c7_real_model_attention_distance(real, attention):
    """Sec. 4.5: "the attention distance increases with network depth"; "some heads attend to most
    of the image already in the lowest layers".

    The second holds in this model. The first holds from the second layer on, and for the last
    third of the layers against the first third; but of all layers the first has the largest mean
    distance.
    """
    path, images, _ = real
    _, distance = attention.look(vit.load(path, REAL), images, REAL)  # [L,H]
    uniform = attention.patch_distances(REAL.grid, REAL.patch_size).mean()
    layers = distance.mean(1)
    print(f"mean attention distance by layer: {layers.round(1)}, uniform {uniform:.1f} pixels")
    all_layers = np.corrcoef(range(12), layers)[0, 1]
    from_second = np.corrcoef(range(1, 12), layers[1:])[0, 1]
    print(f"correlation with depth {all_layers:.2f}, from layer 2 {from_second:.2f}")
    assert layers[-4:].mean() > layers[:4].mean() + 8  # measured: 82.6, 69.6
    assert from_second > 0.75  # measured: 0.84; with the first layer 0.31
    assert layers.argmax() == 0  # the exception: 100.6

    least = distance[:3].min(1)
    largest = distance[:3].max(1)
    print(f"heads of layers 1 to 3: least {least.round(1)}, largest {largest.round(1)}")
    assert min(largest) > uniform / 2  # measured: 123.6, 77.6, 115.3 of 116.6
    assert min(least[1:]) < uniform / 4  # while other heads of these layers are local: 21.4
