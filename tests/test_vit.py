"""vit.py against the official code, by hand, and by what the paper claims."""

import dataclasses
import functools
import importlib.util
import json
import math
import operator
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import vit

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden/vit"
TINY = vit.Config(image_size=(8, 12), patch_size=(4, 4), width=16, depth=2, heads=4, mlp=32, classes=5)
POOLS = {"token": "token", "tok": "token", "gap": "gap", "unpooled": "none", "token_unpooled": "token_none"}

# ==== Golden ================================================================================================


@functools.cache
def golden(name):
    arrays = dict(np.load(GOLDEN / f"{name}.npz", allow_pickle=False))
    return json.loads(str(arrays.pop("meta"))), arrays


def part(arrays, prefix):
    """The arrays whose names begin with prefix, without it."""
    return {name[len(prefix) :]: a for name, a in arrays.items() if name.startswith(prefix)}


def config_of(c):
    """Config of the official configuration in a golden's meta data, of either code base."""
    big_vision = "posemb" in c
    width = c["width" if big_vision else "hidden_size"]
    representation = (width if c.get("rep_size") else None) if big_vision else c.get("representation_size")
    return vit.Config(
        image_size=tuple(c["image"]),
        patch_size=tuple(c["patch_size" if big_vision else "patch"]),
        width=width,
        depth=c["depth" if big_vision else "num_layers"],
        heads=c["num_heads"],
        mlp=c["mlp_dim"] or 4 * width,
        classes=c["num_classes"],
        pool=POOLS[c["pool_type" if big_vision else "classifier"]],
        representation=representation,
        position=c.get("posemb", "learned"),
        class_position=not big_vision,
        dropout=c.get("dropout_rate", 0.0),
        attention_dropout=c.get("attention_dropout_rate", 0.0),
    )


def nest(flat):
    """{"a/b": x} -> {"a": {"b": x}}, for two levels."""
    tree = {}
    for name, array in flat.items():
        top, leaf = name.split("/") if "/" in name else (name, "table")
        tree.setdefault(top, {})[leaf] = array
    return tree


def close(got, want, tolerance, largest=None):
    """Largest difference, as a share of the largest value of want or of what is given."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    error = np.abs(got - want).max() / (largest or np.abs(want).max())
    assert error < tolerance, f"error {error:.2e} of the largest value"


def close_gradients(got, want, tolerance=2e-5):
    """Two dicts of arrays; errors as a share of the largest value of all, since some are zero in theory."""
    assert got.keys() == want.keys()
    largest = max(np.abs(a).max() for a in want.values())
    for name in want:
        close(got[name], want[name], tolerance, largest)


FORWARD = [
    "vit_token",
    "vit_gap",
    "vit_representation",
    "vit_unpooled",
    "vit_token_unpooled",
    "bv_vit_sincos_gap",
]


@pytest.mark.parametrize("name", FORWARD)
def test_golden_outputs_and_gradients(name):
    meta, arrays = golden(name)
    config = config_of(meta["config"])
    params = vit.from_official(part(arrays, "params/"), config)
    images, labels = arrays["in/images"], arrays["in/labels"]

    def loss(params, images):
        return vit.loss_fn(params, images, labels, config)

    value, (grads, image_grad) = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, images)
    assert float(value) == pytest.approx(float(arrays["out/loss"]), rel=1e-6)
    layout = "vit" if config.class_position else "big_vision"
    close_gradients(vit.to_official(grads, config, layout), part(arrays, "grad/"))
    if "out/grad_images" in arrays:
        close(image_grad, arrays["out/grad_images"], 2e-5)
    run = jax.jit(lambda p, x: (vit.features(p, x, config), vit.forward(p, x, config)))
    pre_logits, logits = run(params, images)
    close(pre_logits, arrays["out/pre_logits"], 1e-5)
    close(logits, arrays["out/logits"], 1e-5)


@pytest.mark.parametrize("name", FORWARD)
def test_golden_intermediate_values(name):
    meta, arrays = golden(name)
    config = config_of(meta["config"])
    params = vit.from_official(part(arrays, "params/"), config)

    @jax.jit
    def values(params, images):
        out = {"posembed": vit.embed(params, images, config)}
        patches = vit.patchify(images, config.patch_size)
        out["embedding"] = vit.linear(patches, params["embed"], "float32", axes=3)
        x = out["posembed"]
        for i in range(config.depth):
            weights = jax.tree.map(operator.itemgetter(i), params["blocks"])
            silent = {**weights, "mlp2": jax.tree.map(jnp.zeros_like, weights["mlp2"])}
            out[f"block_{i}_attention"] = vit.block(x, silent, config)[0] - x  # without its MLP
            x = out[f"block_{i}"] = vit.block(x, weights, config)[0]
        out["encoded"] = vit.layer_norm(x, params["norm"])
        return out

    got = values(params, arrays["in/images"])
    got["with_posemb"] = got["posembed"]
    stored = {n: a for n, a in part(arrays, "out/").items() if n in got}
    assert len(stored) >= config.depth + 2
    for name, want in stored.items():
        close(np.reshape(got[name], want.shape), want, 1e-5)


def test_golden_dropout_falls_where_the_official_code_drops(monkeypatch):
    meta, arrays = golden("vit_dropout")
    config = dataclasses.replace(config_of(meta["config"]), remat=False)
    params = vit.from_official(part(arrays, "params/"), config)
    images, labels = arrays["in/images"], arrays["in/labels"]
    close(vit.forward(params, images, config), arrays["out/logits_eval"], 1e-5)
    masks = [(arrays[f"in/keep_mask/{name}"], meta["keep_prob"][name]) for name in meta["draw_order"]]
    drawn = []

    def stored_mask(key, keep, shape):
        mask, probability = masks[len(drawn) % len(masks)]
        drawn.append(probability)
        assert mask.shape == tuple(shape) and keep == pytest.approx(probability)
        return mask

    def loop(layer, x, inputs):  # lax.scan traces its body once, with one draw for all blocks
        for i in range(config.depth):
            x, _ = layer(x, jax.tree.map(operator.itemgetter(i), inputs))
        return x, None

    monkeypatch.setattr(jax.random, "bernoulli", stored_mask)
    monkeypatch.setattr(vit.lax, "scan", loop)
    key = jax.random.key(0)
    loss = lambda p: vit.loss_fn(p, images, labels, config, key=key)
    both = jax.jit(lambda p: (jax.value_and_grad(loss)(p), vit.forward(p, images, config, key=key)))
    (value, grads), logits = both(params)
    assert len(drawn) == 2 * len(masks)
    assert float(value) == pytest.approx(float(arrays["out/loss"]), rel=1e-6)
    close(logits, arrays["out/logits"], 1e-5)
    close_gradients(vit.to_official(grads, config), part(arrays, "grad/"))


def test_golden_position_resize():
    meta, arrays = golden("vit_posemb_interpolate")
    for spec in meta["specs"]:
        old, new, prefix = spec["old_grid"], spec["new_grid"], int(spec["has_class_token"])
        got = vit.resize_position_embedding(
            arrays[f"in/{spec['i']}/posemb"][0], (old, old), (new, new), prefix
        )
        close(got, arrays[f"out/{spec['i']}/posemb"][0], 1e-6)


def test_golden_loading_for_fine_tuning():
    meta, arrays = golden("vit_load_pretrained_resize")
    old, new = config_of(meta["checkpoint_config"]), config_of(meta["model_config"])
    params = vit.adapt(vit.from_official(part(arrays, "params/"), old), old, new)
    assert not np.any(params["head"]["kernel"]) and "pre_logits" not in params
    close(params["position"], arrays["out/posemb_after"][0], 1e-6)
    params["head"] = {"kernel": arrays["in/init_head_kernel"], "bias": arrays["in/init_head_bias"]}
    close(vit.forward(params, arrays["in/images"], new), arrays["out/logits"], 1e-5)
    linen = set(vit.to_official(params, new, "vit"))
    for official, newer in vit.NEWER.items():
        linen = {n if "pos_embedding" in n else n.replace(official, newer) for n in linen}
    assert sorted(linen) == str(arrays["out/loaded_names"]).split("\n")


def test_golden_class_position_folds_into_the_token_for_big_vision():
    _, token = golden("vit_token")
    meta, arrays = golden("bv_from_old_checkpoint")
    old = config_of(golden("vit_token")[0]["config"])
    new = dataclasses.replace(old, class_position=False)
    params = vit.from_official(part(token, "params/"), old)
    params = {**vit.adapt(params, old, new), "head": params["head"]}
    flat = vit.to_official(params, new, "big_vision")
    np.testing.assert_array_equal(flat["cls"], arrays["out/cls"])
    np.testing.assert_array_equal(flat["pos_embedding"], arrays["out/pos_embedding"])
    assert sorted(flat) == str(arrays["out/names"]).split("\n")
    close(vit.forward(params, token["in/images"], new), arrays["out/logits"], 1e-5)
    with pytest.raises(ValueError, match="class_position=False cannot become True"):
        vit.adapt(params, new, old)


@pytest.mark.parametrize("name", ["vit_preprocess", "bv_preprocess"])
def test_golden_preprocessing(name):
    meta, arrays = golden(name)
    size = (meta["target_size"],) * 2
    for i in range(3):
        image = arrays[f"in/{i}/image"][None]
        got = np.asarray(vit.preprocess(image, size)[0])
        if name == "vit_preprocess":
            close(got, arrays[f"out/{i}/finetune_eval"], 1e-6)
        else:  # big_vision drops the fractions after the resize
            np.testing.assert_allclose(vit.preprocess(image)[0], arrays[f"out/{i}/value_range"], atol=2e-7)
            lost = (got - arrays[f"out/{i}/resize"]) * 127.5
            assert -1e-3 < lost.min() and lost.max() < 1 + 1e-3


def test_golden_sincos_positions():
    _, arrays = golden("bv_sincos2d")
    for name, want in part(arrays, "out/").items():
        h, w, width, temperature = map(int, re.fullmatch(r"(\d+)x(\d+)x(\d+)_T(\d+)", name).groups())
        close(vit.sincos2d((h, w), width, temperature), want[0], 1e-6)


def test_golden_schedules():
    meta, arrays = golden("lr_schedules")
    covered = 0
    for spec in meta["specs"]:
        args, which = dict(spec["args"]), spec["which"]
        if args["decay_type"] not in ("cosine", "linear"):
            continue  # "rsqrt" and "stair" of big_vision are not the paper's
        rate = vit.schedule(
            args.get("base", 1.0),
            args["total_steps"],
            args["warmup_steps"],
            args["decay_type"],
            args.get("linear_end", 1e-5),
        )
        steps = jnp.asarray(arrays[f"in/{which}/steps"], jnp.float32)
        want = arrays.get(f"out/{which}/lr", arrays.get(f"out/{which}/mult"))
        close(jax.vmap(rate)(steps), want, 1e-6)
        covered += 1
    assert covered == 7


def test_golden_pretraining_optimizer():
    meta, arrays = golden("bv_adam_steps")
    c = meta["config"]
    recipe = vit.Recipe(
        "adam", 1, meta["total_steps"], c["lr"], "cosine", 2, c["wd"] / c["lr"], 1.0, 0.0, "test"
    )
    optimizer = vit.make_optimizer(recipe, momentum_dtype="bfloat16")
    params = nest(part(arrays, "params/"))
    state = optimizer.init(params)
    for step in range(5):
        grads = nest(part(arrays, f"in/grad_step{step}/"))
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        got = vit.named_leaves(params)
        got["pos_embedding"] = got.pop("pos_embedding/table")
        for name, want in part(arrays, f"out/step{step}/").items():
            close(got[name], want, 1e-5)


@pytest.mark.parametrize(
    "name, dtype, tolerance",
    [
        ("vit_finetune_steps_f32mom", None, 2e-6),
        # the official bfloat16 momentum rounds apart from ours wherever a value lies near the middle of two
        ("vit_finetune_steps", "bfloat16", 5e-3),
    ],
)
def test_golden_fine_tuning_steps(name, dtype, tolerance):
    meta, arrays = golden(name)
    config = config_of(meta["config"])
    recipe = vit.RECIPES["to CIFAR"]._replace(
        steps=meta["total_steps"],
        learning_rate=meta["base_lr"],
        warmup=meta["warmup_steps"],
        clip=meta["grad_clip"],
    )
    optimizer = vit.make_optimizer(recipe, dtype)
    params = jax.tree.map(jnp.array, vit.from_official(part(arrays, "params/"), config))
    state = optimizer.init(params)
    step = vit.make_train_step(config, optimizer, mesh_of(1, 1), accumulate=meta["accum_steps"])
    losses = []
    for i in range(meta["steps"]):
        batch = arrays["in/images"][i], arrays["in/labels"][i]
        params, state, loss = step(params, state, *batch, jax.random.key(0))
        losses.append(float(loss))
    close(losses, arrays["out/losses"], tolerance)
    want, got = part(arrays, "out/params_after/"), vit.to_official(params, config)
    close_gradients(got, want, tolerance)
    trace = next(
        s.trace for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "trace")) if hasattr(s, "trace")
    )
    close_gradients(vit.to_official(trace, config), part(arrays, "out/momentum_after/"), 4 * tolerance)


def mesh_of(data, model):
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


# ==== Equations, worked by hand =============================================================================


def test_patches_are_read_row_by_row():
    image = np.arange(2 * 4 * 6).reshape(1, 4, 12, 1)  # 4 rows, 12 columns; patches of 2 x 6
    got = np.asarray(vit.patchify(image, (2, 6)))[0, ..., 0]
    assert got.shape == (4, 2, 6)
    np.testing.assert_array_equal(got[1], [range(6, 12), range(18, 24)])  # right of the first
    np.testing.assert_array_equal(got[2], [range(24, 30), range(36, 42)])  # below the first


def test_attention_of_two_tokens_by_hand():
    q, k = np.zeros((2, 1, 1, 2, 4), np.float32)
    q[0, 0, 0, 0], k[0, 0, 1, 0] = 2 * math.log(3), 1.0  # token 0 scores log(3) on token 1 after 1/sqrt(4)
    weights = vit.attention_weights(q, k)
    np.testing.assert_allclose(weights[0, 0], [[0.25, 0.75], [0.5, 0.5]], rtol=1e-6)
    v = np.array([[1.0, 10.0], [5.0, 50.0]], np.float32).reshape(1, 1, 2, 2)
    np.testing.assert_allclose(vit.attention_reference(q, k, v)[0, 0], [[4, 40], [3, 30]], rtol=1e-6)


def test_recipes_tell_where_their_numbers_come_from():
    assert all(r.source.startswith(("quoted: ", "reproduced: ")) for r in vit.RECIPES.values())
    adam = vit.make_optimizer(vit.RECIPES["ImageNet"]._replace(warmup=0))
    params = {"a": {"kernel": jnp.ones(3), "bias": jnp.ones(3)}}
    updates, _ = adam.update(jax.tree.map(jnp.zeros_like, params), adam.init(params), params)
    np.testing.assert_allclose(
        updates["a"]["kernel"], -0.3 * 3e-3, rtol=1e-5
    )  # decay alone, not times the rate again
    np.testing.assert_array_equal(updates["a"]["bias"], 0)


def test_recipes_are_those_of_tables_3_and_4():
    """Learning rate, decay, weight decay, dropout; clipping at norm 1 is said below either table."""
    rows = {name: (*r[3:5], *r[6:9]) for name, r in vit.RECIPES.items()}
    assert rows["ImageNet-21k"] == (1e-3, "linear", 0.03, None, 0.1)
    assert rows["ImageNet"] == (3e-3, "cosine", 0.3, 1.0, 0.1)
    assert rows["to ImageNet"] == (0.03, "cosine", 0.0, 1.0, 0.0)
    assert rows["to CIFAR"] == (0.01, "cosine", 0.0, 1.0, 0.0)


def test_linear_decay_ends_still_going_downhill():
    recipe = vit.RECIPES["ImageNet-21k"]._replace(steps=2, warmup=0, weight_decay=0.0)
    adam, slope = vit.make_optimizer(recipe), {"kernel": jnp.ones(1)}
    state, seen = adam.init(slope), []
    for _ in range(4):
        updates, state = adam.update(slope, state, slope)
        seen.append(float(updates["kernel"][0]))
    np.testing.assert_allclose(seen, 1e-3 * np.array([-1, -0.500005, -1e-5, -1e-5]), rtol=1e-4)


def test_dropout_keeps_the_mean_and_differs_between_blocks_and_rows():
    x = jnp.ones((100, 100))
    y = vit.dropout(jax.random.key(0), x, 0.25)
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)} and abs(float(y.mean()) - 1) < 0.02
    config = dataclasses.replace(TINY, dropout=0.5, depth=1)
    images = np.zeros((2, 8, 12, 3), np.float32)  # two equal rows
    out = vit.features(random_params(config), images, config, key=jax.random.key(1))
    assert float(abs(out[0] - out[1]).max()) > 0.1


# ==== Claims ================================================================================================


def random_params(config, seed=0, scale=0.3):
    """Weights without zeros, so that every path of the model counts."""
    shapes = jax.eval_shape(lambda key: vit.init_params(key, config), jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: (scale * rng.normal(size=a.shape)).astype(np.float32), shapes)


def random_batch(config, size=8, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.uniform(-1, 1, (size, *config.image_size, config.channels)).astype(np.float32)
    return images, rng.integers(0, config.classes, size).astype(np.int32)


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
    """Table 1: 86M, 307M, 632M parameters; to the last one in the official test (1,000 classes, 224 px)."""
    assert vit.SIZES.keys() == PUBLISHED.keys()
    for name, count in PUBLISHED.items():
        shapes = jax.eval_shape(functools.partial(vit.init_params, config=vit.SIZES[name]), jax.random.key(0))
        assert sum(math.prod(a.shape) for a in jax.tree.leaves(shapes)) == count, name


@pytest.mark.parametrize("position, commutes", [("none", True), ("learned", False), ("sincos2d", False)])
def test_c2_without_positions_the_encoder_commutes_with_permutations(position, commutes):
    """Sec. 3.1: position embeddings are all that tells the encoder where a patch was."""
    config = dataclasses.replace(TINY, position=position, pool="none", classes=0)
    params = random_params(config)
    images, _ = random_batch(dataclasses.replace(config, classes=5), 2)
    order = np.random.default_rng(1).permutation(6)
    patches = np.asarray(vit.patchify(images, (4, 4)))[:, order]  # [B,T,h,w,C]
    shuffled = patches.reshape(2, 2, 3, 4, 4, 3).swapaxes(2, 3).reshape(images.shape)
    run = jax.jit(lambda x: vit.features(params, x, config))
    error = np.abs(run(images)[:, order] - run(shuffled)).max()  # jnp's max loses a NaN on a CPU
    assert error < 1e-5 if commutes else error > 0.1


def test_c3_resizing_to_the_same_grid_changes_nothing_and_rectangles_are_not_transposed():
    """Sec. 3.2: position embeddings are interpolated in 2D, according to their place in the image."""
    table = np.random.default_rng(0).normal(size=(1 + 7 * 14, 6)).astype(np.float32)
    np.testing.assert_array_equal(vit.resize_position_embedding(table, (7, 14), (7, 14), 1), table)
    rows, columns = np.mgrid[:2, :3].astype(np.float32)
    places = np.stack([rows.ravel(), columns.ravel()], axis=1)  # each patch knows its row and column
    got = vit.resize_position_embedding(places, (2, 3), (3, 5), 0).reshape(3, 5, 2)
    np.testing.assert_allclose(got[..., 0], np.linspace(0, 1, 3)[:, None] * np.ones(5), atol=1e-6)
    np.testing.assert_allclose(got[..., 1], np.ones((3, 1)) * np.linspace(0, 2, 5), atol=1e-6)
    with pytest.raises(ValueError, match="6 positions are not 1 \\+ 6 of grid"):
        vit.resize_position_embedding(places, (2, 3), (3, 5), 1)


def test_c4_a_zero_head_starts_at_log_classes():
    """Sec. 3.2: for fine-tuning the head is replaced by a zero-initialised one."""
    config = dataclasses.replace(TINY, classes=7)
    start = lambda key: vit.loss_fn(vit.init_params(key, config), *random_batch(config), config)
    loss = jax.jit(start)(jax.random.key(0))
    assert float(loss) == pytest.approx(math.log(7), abs=1e-5)


def test_c5_rollout_rows_are_distributions_and_known_attention_gives_the_product_by_hand():
    """Abnar & Zuidema, Sec. 3: A = 0.5 W + 0.5 I, multiplied recursively from the first layer on."""
    maps = vit.attention_maps(random_params(TINY), random_batch(TINY, 3)[0], TINY)
    assert maps.shape == (2, 3, 4, 7, 7)
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)
    rollout = vit.attention_rollout(maps)
    assert rollout.shape == (3, 7, 7) and float(rollout.min()) >= 0
    np.testing.assert_allclose(rollout.sum(-1), 1, atol=1e-5)
    # layer 1: everybody looks at token 0; layer 2: everybody looks at token 1, in both heads
    first, second = np.zeros((2, 1, 2, 3, 3), np.float32)
    first[..., 0], second[..., 1] = 1, 1
    got = vit.attention_rollout(jnp.stack([first, second]))[0]
    one = np.array([[1, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5]])
    two = np.array([[0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5]])
    np.testing.assert_allclose(got, two @ one)  # second layer on the left: not one @ two
    assert not np.allclose(two @ one, one @ two)


def test_c5_attention_maps_are_those_of_the_forward_pass():
    params, (images, _) = random_params(TINY), random_batch(TINY, 2)
    x = vit.embed(params, images, TINY)
    weights = jax.tree.map(lambda a: a[0], params["blocks"])
    y = vit.layer_norm(x, weights["norm1"])
    q, k, v = (
        np.einsum("btd,dhk->bthk", y, w["kernel"]) + w["bias"]
        for w in (weights[n] for n in ("query", "key", "value"))
    )
    scores = np.einsum("bthk,bshk->bhts", q, k) / 2  # sqrt of the head size 4
    weights_by_hand = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(vit.attention_maps(params, images, TINY)[0], weights_by_hand, rtol=1e-4)


def test_c6_patch_embedding_is_a_linear_map_of_flattened_patches():
    """Eq. 1: x_p E, equal to the convolution of the official code with stride and kernel of a patch."""
    params, (images, _) = random_params(TINY), random_batch(TINY, 2)
    embed = params["embed"]
    convolved = jax.lax.conv_general_dilated(
        images, embed["kernel"], (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    want = (convolved + embed["bias"]).reshape(2, 6, 16)
    flat = (
        np.asarray(vit.patchify(images, (4, 4))).reshape(2, 6, 48) @ embed["kernel"].reshape(48, 16)
        + embed["bias"]
    )
    got = vit.linear(vit.patchify(images, (4, 4)), embed, "float32", axes=3)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(got, flat, atol=1e-5)


def count(jaxpr, cost):
    """Sum of cost(equation) over a jaxpr, loop bodies times their trips."""
    total = 0
    for eqn in jaxpr.eqns:
        total += cost(eqn)
        trips = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += trips * count(inner, cost)
    return total


def matmul_flops(eqn):
    if eqn.primitive.name != "dot_general":
        return 0
    (contracted, _), _ = eqn.params["dimension_numbers"]
    sizes = [eqn.invars[0].aval.shape[i] for i in contracted]
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(sizes)


def flops(config):
    shapes = jax.eval_shape(functools.partial(vit.init_params, config=config), jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, *config.image_size, config.channels), "float32")
    return count(jax.make_jaxpr(lambda p, x: vit.forward(p, x, config))(shapes, images).jaxpr, matmul_flops)


def test_c8_flops_are_linear_in_depth_and_attention_quadratic_in_tokens():
    """Sec. 3.1, 4.5: cost of the encoder; every matrix product counted from the jaxpr."""
    base = dataclasses.replace(TINY, position="none", pool="gap", classes=0)
    depth = [flops(dataclasses.replace(base, depth=n)) for n in (1, 2, 3)]
    assert depth[2] - depth[1] == depth[1] - depth[0] > 0
    D, F, T = 16, 32, 6
    assert depth[1] - depth[0] == 2 * T * (4 * D * D + 2 * D * F) + 4 * T * T * D
    tokens = [
        flops(dataclasses.replace(base, image_size=(8, 4 * n), depth=1)) for n in (1, 2, 3)
    ]  # T = 2, 4, 6
    embed_and_linear = 2 * 2 * (48 * D + 4 * D * D + 2 * D * F)  # of two tokens
    quadratic = [total - (i + 1) * embed_and_linear for i, total in enumerate(tokens)]
    assert quadratic == [4 * T * T * D for T in (2, 4, 6)]


def test_remat_keeps_two_arrays_of_a_block_and_computes_all_but_two_products_again():
    config, D, F, T = dataclasses.replace(TINY, pool="gap", dropout=0.0), 16, 32, 6
    shapes = jax.eval_shape(functools.partial(vit.init_params, config=config), jax.random.key(0))
    images, labels = random_batch(config)
    total, kept = [], []
    for remat in (True, False):
        loss = functools.partial(vit.loss_fn, config=dataclasses.replace(config, remat=remat))
        jaxpr = jax.make_jaxpr(jax.grad(loss))(shapes, images, labels).jaxpr
        total.append(count(jaxpr, matmul_flops))
        blocks = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")  # the forward pass
        kept.append(sum(v.aval.size for v in blocks.outvars if v.aval.shape[:1] == (config.depth,)))
    again = 2 * T * (3 * D * D + D * F) + 4 * T * T * D  # q, k, v and the first of the MLP; attention itself
    assert total[0] - total[1] == config.depth * len(images) * again
    assert kept[0] == config.depth * len(images) * 2 * T * D < kept[1] / 4  # inputs of both halves


# ==== Kernel ================================================================================================


@pytest.mark.parametrize(
    "shape, dtype", [((2, 3, 17, 12), "float32"), ((1, 2, 150, 72), "float32"), ((1, 2, 64, 64), "bfloat16")]
)
def test_kernel_equals_the_definition(shape, dtype):
    rng = np.random.default_rng(0)
    q, k, v, g = (jnp.asarray(3 * rng.normal(size=shape), dtype) for _ in range(4))
    run = lambda f: jax.jit(lambda *a: (f(*a), jax.vjp(f, *a)[1](g)))(q, k, v)
    (got, got_grads), (want, want_grads) = run(vit.attention_pallas), run(vit.attention_reference)
    tolerance = 1e-5 if dtype == "float32" else 2e-2  # bfloat16 keeps 8 bits
    assert got.dtype == want.dtype
    close(got.astype("float32"), want.astype("float32"), tolerance)
    for a, b in zip(got_grads, want_grads, strict=True):
        close(a.astype("float32"), b.astype("float32"), tolerance)


def lowered_for(platform, function, *shapes):
    """Text of the program for a platform that this machine does not have."""
    if platform == "tpu":
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",)).as_text()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


# JAX 0.12 announces that it will drop Triton one day; until then it is what both versions have in common
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("platform, call", [("cuda", "__gpu$xla.gpu.triton"), ("tpu", "tpu_custom_call")])
@pytest.mark.parametrize("tokens, size, dtype", [(197, 64, "bfloat16"), (577, 80, "float32")])
def test_kernel_lowers_for(platform, call, tokens, size, dtype):
    shape = jax.ShapeDtypeStruct((2, 3, tokens, size), dtype)
    assert call in lowered_for(platform, vit.attention_pallas, shape, shape, shape)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype, tolerance", [("float32", 5e-3), ("bfloat16", 2e-2)]
)  # Triton multiplies as TF32
def test_kernel_on_a_gpu(dtype, tolerance):
    rng = np.random.default_rng(0)
    for T, K in ((197, 64), (577, 80), (50, 32)):
        q, k, v = (jnp.asarray(rng.normal(size=(2, 3, T, K)), dtype) for _ in range(3))
        want = vit.attention_reference(*(x.astype("float32") for x in (q, k, v)))
        close(jax.jit(vit.attention_pallas)(q, k, v).astype("float32"), want, tolerance)
        if dtype == "bfloat16":
            close(jax.jit(vit.attention_cudnn)(q, k, v).astype("float32"), want, tolerance)


def test_cudnn_refuses_where_it_cannot_run():
    q = jnp.zeros((1, 2, 4, 8), "bfloat16")
    with pytest.raises(
        NotImplementedError, match="needs a GPU, bfloat16 and a head size of 8, 16 ... 128, not cpu"
    ):
        vit.attention_cudnn(q, q, q)


def test_model_with_the_kernel_equals_the_model_without():
    params, batch = random_params(TINY), random_batch(TINY)
    config = dataclasses.replace(TINY, attention="pallas")
    value, grads = jax.jit(jax.value_and_grad(lambda p: vit.loss_fn(p, *batch, config)))(params)
    want, want_grads = jax.jit(jax.value_and_grad(lambda p: vit.loss_fn(p, *batch, TINY)))(params)
    assert float(value) == pytest.approx(float(want), rel=1e-5)
    close_gradients(vit.named_leaves(grads), vit.named_leaves(want_grads))


def test_bfloat16_is_finite_and_close_at_extreme_inputs():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    params, (images, labels) = random_params(TINY), random_batch(TINY)
    params["blocks"]["query"]["kernel"] *= 100  # attention that is all on one token
    images = np.sign(images)
    loss = lambda p: vit.loss_fn(p, images, labels, config)
    run = jax.jit(lambda p: (vit.forward(p, images, config), jax.grad(loss)(p)))
    logits, grads = run(params)
    assert logits.dtype == jnp.float32
    assert all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves((logits, grads)))
    params["blocks"]["query"]["kernel"] /= 100
    close(run(params)[0], vit.forward(params, images, TINY), 2e-2)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        config = dataclasses.replace(TINY, dtype="float64")
        params = jax.tree.map(np.float64, random_params(TINY))
        images = random_batch(TINY, 2)[0].astype(np.float64)
        exact = vit.forward(params, images, config)
        assert exact.dtype == np.float64
    close(vit.forward(random_params(TINY), images.astype(np.float32), TINY), exact, 1e-5)


# ==== Sharding ==============================================================================================

WIDE = dataclasses.replace(TINY, representation=8, dropout=0.0)
MESHES = [(1, 1), (2, 4), (4, 2), (8, 1)]


@functools.cache
def one_device():
    params, batch = random_params(WIDE), random_batch(WIDE)
    value, grads = jax.jit(jax.value_and_grad(lambda p: vit.loss_fn(p, *batch, WIDE)))(params)
    return params, batch, float(value), vit.named_leaves(grads)


@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize("data, model", MESHES)
def test_mesh_gives_the_loss_and_gradients_of_one_device(data, model, fsdp):
    params, batch, want, want_grads = one_device()
    mesh = mesh_of(data, model)
    specs = vit.param_specs(WIDE, mesh, fsdp)
    placed = jax.device_put(params, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
    loss = vit.on_mesh(vit.loss_fn, WIDE, mesh, fsdp)
    value, grads = jax.jit(jax.value_and_grad(loss))(placed, *batch, jax.random.key(0))
    assert float(value) == pytest.approx(want, rel=1e-5)
    close_gradients(vit.named_leaves(grads), want_grads, 1e-5)
    for (name, array), spec in zip(vit.named_leaves(placed).items(), jax.tree.leaves(specs), strict=True):
        cuts = math.prod(mesh.shape[axis] for axis in spec if axis)
        assert array.addressable_shards[0].data.nbytes * cuts == array.nbytes, name
    large = placed["blocks"]["mlp1"]["kernel"]
    assert large.nbytes == large.addressable_shards[0].data.nbytes * model * (data if fsdp else 1)


def on_one_device(config, fsdp, gradient=False, shape=(2, 4)):
    """Of the loss (or its gradient) on a mesh, per device: FLOPs of products, runs of each collective."""
    mesh = mesh_of(*shape)
    loss = vit.on_mesh(vit.loss_fn, config, mesh, fsdp)
    shapes = jax.eval_shape(functools.partial(vit.init_params, config=config), jax.random.key(0))
    images, labels = random_batch(config)
    function = jax.grad(loss) if gradient else loss
    jaxpr = jax.make_jaxpr(function)(shapes, images, labels, jax.random.key(0)).jaxpr
    names = {"psum": ("psum", "psum_invariant"), "gather": ("all_gather",), "scatter": ("reduce_scatter",)}
    times = {n: count(jaxpr, lambda eqn, p=p: int(eqn.primitive.name in p)) for n, p in names.items()}
    return {"flops": count(jaxpr, matmul_flops), **times}


def test_collectives_are_those_that_the_docstring_states():
    deep = dataclasses.replace(WIDE, depth=5)
    for fsdp in (False, True):
        shallow, more = on_one_device(WIDE, fsdp), on_one_device(deep, fsdp)
        assert more["psum"] - shallow["psum"] == 3 * 2  # three more blocks: attention and MLP each
        assert more["gather"] - shallow["gather"] == 3 * 6 * fsdp  # query, key, value, out, mlp1, mlp2
        assert shallow["psum"] == 2 * 2 + 1  # and the mean of the loss
        assert shallow["gather"] == (2 * 6 + 3) * fsdp  # and embed, pre_logits, head
        assert shallow["scatter"] == 0
    grads = on_one_device(WIDE, True, gradient=True)
    assert grads["scatter"] == 2 * 6 + 3  # each gathered kernel's gradient comes back in parts
    assert grads["gather"] == 2 * 2 * 6 + 3  # blocks gather once more when they are recomputed
    alone = on_one_device(WIDE, True, gradient=True, shape=(1, 1))
    assert not any(alone[name] for name in ("psum", "gather", "scatter"))
    models, rows = (on_one_device(WIDE, False, shape=shape) for shape in ((1, 4), (8, 1)))
    assert (models["psum"], rows["psum"]) == (2 * 2, 1)  # blocks over "model", the mean over "data"


def test_a_device_does_its_share_of_the_products():
    whole, half, eighth, parts = (
        on_one_device(WIDE, False, gradient=True, shape=shape)["flops"]
        for shape in ((1, 1), (2, 1), (8, 1), (2, 4))
    )
    assert whole == 2 * half == 8 * eighth
    assert half / 4 < parts < half / 3  # embedding and head are not cut over "model"


def test_train_step_compiles_once_and_microbatches_equal_the_whole_batch(fsdp=True):
    mesh, (images, labels) = mesh_of(2, 4), random_batch(WIDE, 16)
    optimizer = vit.make_optimizer(vit.RECIPES["to CIFAR"]._replace(steps=10, warmup=0))
    results, start = [], vit.init_state(jax.random.key(0), WIDE, optimizer, mesh, fsdp)
    for accumulate in (1, 4):
        state = jax.tree.map(jnp.copy, start)  # each run gives its own away
        step = vit.make_train_step(WIDE, optimizer, mesh, fsdp=fsdp, accumulate=accumulate)
        batch = jax.device_put((images, labels), NamedSharding(mesh, P("data")))
        for i in range(3):
            *state, loss = step(*state, *batch, jax.random.key(i))
        assert step._cache_size() == 1
        results.append((float(loss), vit.named_leaves(state[0])))
        slot = state[1][1][0].trace["blocks"]["mlp1"]["kernel"]  # momentum lies as its weight does
        assert slot.sharding == state[0]["blocks"]["mlp1"]["kernel"].sharding
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    close_gradients(results[1][1], results[0][1], 1e-5)


@pytest.mark.usefixtures("quick")
def test_initial_values_do_not_depend_on_the_mesh():
    optimizer = optax.sgd(0.1)
    one, many = (
        vit.init_state(jax.random.key(3), WIDE, optimizer, mesh_of(*m), True)[0] for m in ((1, 1), (2, 4))
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_array_equal(a, b)
    bound = math.sqrt(6 / (16 + 32))  # Glorot, of an MLP kernel [D,F]
    kernel = np.asarray(one["blocks"]["mlp1"]["kernel"])
    assert 0.95 * bound < np.abs(kernel).max() <= bound
    bound = math.sqrt(6 / (16 + 16))  # and of the query kernel [D,H,K], drawn as [D,H*K]
    kernel = np.asarray(one["blocks"]["query"]["kernel"])
    assert 0.95 * bound < np.abs(kernel).max() <= bound
    for values, deviation in ((one["position"], 0.02), (one["blocks"]["mlp1"]["bias"], 1e-6)):
        assert 0.7 * deviation < np.std(values) < 1.3 * deviation


def test_dropout_on_a_mesh_differs_between_rows_and_between_heads():
    config = dataclasses.replace(WIDE, dropout=0.3, attention_dropout=0.3, depth=1)
    params, mesh = random_params(config), mesh_of(2, 4)
    images, labels = (np.repeat(a[:1], 8, axis=0) for a in random_batch(config))  # eight equal rows
    drawn = []

    def rows(params, images, labels, config, *, key, data_axis, model_axis):  # no sum: the shards' own losses
        x = vit.features(params, images, config, key=key, data_axis=data_axis, model_axis=model_axis)
        own = jax.lax.axis_index(data_axis) == jnp.arange(2)
        return jax.lax.psum(jnp.where(own[:, None, None], x, 0), data_axis)

    features = jax.jit(vit.on_mesh(rows, config, mesh))(params, images, labels, jax.random.key(0))
    assert features.shape == (2, 4, 8)
    assert float(abs(features[0] - features[1]).max()) > 1e-3  # other devices, other draws
    keep = vit.jax.random.bernoulli

    def record(key, p, shape):
        drawn.append((jax.typeof(key).mat.varying, shape))
        return keep(key, p, shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.random, "bernoulli", record)
        jax.eval_shape(vit.on_mesh(rows, config, mesh), params, images, labels, jax.random.key(0))
    axes = [sorted(varying) for varying, _ in drawn]
    # after the positions, attention weights of the own head, residual, own hidden units, residual
    assert axes == [["data"], ["data", "model"], ["data"], ["data", "model"], ["data"]]


def test_sharded_kernel_equals_the_plain_step():
    params, batch, want, want_grads = one_device()
    config = dataclasses.replace(WIDE, attention="pallas")
    loss = vit.on_mesh(vit.loss_fn, config, mesh_of(2, 4))
    value, grads = jax.jit(jax.value_and_grad(loss))(params, *batch, jax.random.key(0))
    assert float(value) == pytest.approx(want, rel=1e-5)
    close_gradients(vit.named_leaves(grads), want_grads)


# ==== Checkpoints ===========================================================================================


@pytest.mark.parametrize("layout", ["vit", "big_vision"])
def test_official_names_go_there_and_back(layout):
    config = dataclasses.replace(TINY, representation=6, class_position=layout == "vit")
    params = random_params(config)
    flat = vit.to_official(params, config, layout)
    assert flat["cls"].shape == (1, 1, 16) and len(flat) == 2 * 16 + 10
    assert flat["Transformer/encoderblock_1/MlpBlock_" + "30"[layout != "vit"] + "/Dense_0/kernel"].shape == (
        16,
        32,
    )
    back = vit.from_official(flat, config)
    for name, array in vit.named_leaves(params).items():
        np.testing.assert_array_equal(vit.named_leaves(back)[name], array)


def test_strict_about_every_array():
    flat = vit.to_official(random_params(TINY), TINY)
    kernel = "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"
    for name, array, message in (
        (kernel, None, f"{kernel} is nothing, should be (16, 32)"),
        ("extra/kernel", np.zeros(3), "extra/kernel is (3,), should be nothing"),
        (kernel, flat[kernel].T, f"{kernel} is (32, 16), should be (16, 32)"),
    ):
        wrong = {n: a for n, a in flat.items() if n != name} | ({} if array is None else {name: array})
        with pytest.raises(ValueError, match=re.escape(message)):
            vit.from_official(wrong, TINY)
    with pytest.raises(ValueError, match="layout='big_vision', class_position=True is neither"):
        vit.to_official(random_params(TINY), TINY, "big_vision")


def test_saved_and_loaded_it_predicts_the_same_bits(tmp_path):
    params, (images, _) = random_params(TINY), random_batch(TINY)
    run = jax.jit(lambda p: vit.forward(p, images, TINY))
    vit.save(tmp_path / "model.npz", params, TINY)
    np.testing.assert_array_equal(run(vit.load(tmp_path / "model.npz", TINY)), run(params))


def broken(path, kind, flat):
    """Writes a checkpoint with one fault."""
    if kind == "truncated":
        np.savez(path, **flat)
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "pickles":
        np.savez(path, **flat, extra=np.array({"a": 1}, dtype=object))
    elif kind == "text":
        path.write_text("not an archive")
    elif kind == "nan":
        np.savez(path, **(flat | {"cls": np.full_like(flat["cls"], np.nan)}))


@pytest.mark.parametrize(
    "kind, message",
    [
        ("missing", "is not a readable .npz of plain arrays"),
        ("truncated", "is not a readable .npz of plain arrays"),
        ("pickles", "is not a readable .npz of plain arrays"),
        ("text", "is not a readable .npz of plain arrays"),
        ("nan", "cls holds values that are not finite"),
    ],
)
def test_broken_checkpoints_are_refused_in_one_sentence(tmp_path, kind, message):
    broken(tmp_path / "m.npz", kind, vit.to_official(random_params(TINY), TINY))
    with pytest.raises(ValueError, match=message) as error:
        vit.load(tmp_path / "m.npz", TINY)
    assert str(tmp_path / "m.npz") in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_checkpoint_of_another_size_is_refused(tmp_path):
    vit.save(tmp_path / "m.npz", random_params(TINY), TINY)
    with pytest.raises(ValueError, match=r"encoder_norm/bias is \(16,\), should be \(32,\)"):
        vit.load(tmp_path / "m.npz", dataclasses.replace(TINY, width=32))


def test_adapt_keeps_what_fits_and_names_what_does_not():
    config = dataclasses.replace(TINY, representation=6)
    params = random_params(config)
    new = dataclasses.replace(config, image_size=(16, 8), classes=3)
    adapted = vit.adapt(params, config, new)
    vit.check_names(vit.named_leaves(adapted), vit.named_leaves(random_params(new)), "adapted")
    assert adapted["pre_logits"] is params["pre_logits"] and not np.any(adapted["head"]["kernel"])
    for change in ({"width": 32}, {"patch_size": (2, 2)}, {"pool": "gap"}, {"representation": 7}):
        with pytest.raises(ValueError, match=f"a checkpoint of {next(iter(change))}=.* cannot become"):
            vit.adapt(params, config, dataclasses.replace(new, **change))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    vit.save_state(tmp_path / "s.npz", {"a": np.ones(3)}, {"seed": 1})
    before = (tmp_path / "s.npz").read_bytes()

    def full(file, **arrays):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space"):
        vit.save_state(tmp_path / "s.npz", {"a": np.zeros(3)}, {"seed": 1})
    assert (tmp_path / "s.npz").read_bytes() == before


def test_state_of_any_tree_and_dtype_comes_back_and_must_fit(tmp_path):
    optimizer = vit.make_optimizer(vit.RECIPES["digits"], "bfloat16")
    params = random_params(TINY)
    tree = {"params": params, "opt": optimizer.init(jax.tree.map(jnp.asarray, params)), "step": jnp.int32(7)}
    vit.save_state(tmp_path / "s.npz", tree, {"seed": 1, "mesh": "data=1,model=1"})
    back = vit.load_state(tmp_path / "s.npz", tree, {"seed": 1, "mesh": "data=1,model=1"})
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    with pytest.raises(ValueError, match="was made with seed=1, not 2"):
        vit.load_state(tmp_path / "s.npz", tree, {"seed": 2})
    with pytest.raises(ValueError, match="extra is nothing, should be"):
        vit.load_state(tmp_path / "s.npz", tree | {"extra": np.zeros(1)}, {"seed": 1})


# ==== Errors ================================================================================================


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_size": (30, 32)}, r"image_size=\(30, 32\) is no positive multiple of patch_size=\(16, 16\)"),
        ({"patch_size": (0, 16)}, "is no positive multiple of patch_size"),
        ({"width": 65, "heads": 4}, "width=65 is not a multiple of heads=4"),
        ({"depth": 0}, "depth=0 is not at least 1"),
        ({"classes": -1}, "classes=-1 is not at least 0"),
        ({"representation": 0}, "representation=0 is not at least 1"),
        ({"pool": "map"}, "pool='map' is none of token, gap, none, token_none"),
        ({"position": "rotary"}, "position='rotary' is none of learned, sincos2d, none"),
        ({"gelu": "relu"}, "gelu='relu' is none of tanh, exact"),
        ({"dtype": "float16"}, "dtype='float16' is none of float32, bfloat16, float64"),
        ({"attention": "flash"}, "attention='flash' is none of xla, pallas, cudnn"),
        ({"dropout": 1.0}, r"dropout=1.0 is not in \[0, 1\)"),
        ({"attention": "pallas", "attention_dropout": 0.1}, "attention='pallas' has no dropout"),
        ({"position": "sincos2d", "width": 6, "heads": 1}, "width=6 is not a multiple of 4 above 4"),
    ],
)
def test_config_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        vit.Config(**change)


@pytest.mark.parametrize(
    "images, message",
    [
        (np.zeros((2, 8, 8, 3), np.float32), r"images \(2, 8, 8, 3\) are not \[B, 8, 12, 3\]"),
        (np.zeros((8, 12, 3), np.float32), r"images \(8, 12, 3\) are not \[B, 8, 12, 3\]"),
        (np.zeros((2, 8, 12, 3), np.uint8), "images are uint8 from 0 to 0, not floats in"),
        (np.full((2, 8, 12, 3), 255.0), "images are float64 from 255 to 255, not floats in"),
        (np.full((2, 8, 12, 3), np.nan, np.float32), "images are float32 from nan to nan, not floats in"),
    ],
)
def test_images_that_do_not_fit_are_refused(images, message):
    for function in (vit.forward, vit.features, vit.attention_maps):
        with pytest.raises(ValueError, match=message):
            function(random_params(TINY), images, TINY)


@pytest.mark.usefixtures("quick")
def test_a_mesh_that_does_not_fit_is_refused():
    optimizer = optax.sgd(0.1)
    three = dataclasses.replace(TINY, width=18, heads=3, mlp=36)
    with pytest.raises(
        ValueError, match=r"blocks/key/bias \(2, 6, 8\): 6 is not a multiple of mesh axis model=8"
    ):
        vit.make_train_step(dataclasses.replace(three, heads=6, width=48), optimizer, mesh_of(1, 8))
    with pytest.raises(
        ValueError, match=r"blocks/key/bias \(2, 3, 6\): 3 is not a multiple of mesh axis model=2"
    ):
        vit.make_train_step(three, optimizer, mesh_of(1, 2))
    with pytest.raises(ValueError, match=r"18 is not a multiple of mesh axis data=4"):
        vit.make_train_step(three, optimizer, mesh_of(4, 1), fsdp=True)
    with pytest.raises(ValueError, match="fsdp=True needs remat=True"):
        vit.make_train_step(dataclasses.replace(TINY, remat=False), optimizer, mesh_of(2, 1), fsdp=True)
    step = vit.make_train_step(TINY, optimizer, mesh_of(4, 1), accumulate=2)
    state = vit.init_state(jax.random.key(0), TINY, optimizer, mesh_of(4, 1))
    with pytest.raises(ValueError, match="batch 12 is not a multiple of data=4 x accumulate=2"):
        step(*state, *random_batch(TINY, 12), jax.random.key(0))


# ==== Demo ==================================================================================================


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    """40 pictures of 14x14 whose class is told by the bright half, so that a few steps learn something."""
    rng = np.random.default_rng(0)
    labels = np.arange(40, dtype=np.uint8) % 2
    images = rng.integers(0, 100, (40, 14, 14), dtype=np.uint8)
    images[labels == 1, :7] += 150
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, images=images, labels=labels)
    return str(path)


@pytest.mark.usefixtures("quick")
def test_demo_trains_saves_and_draws(tiny_data, tmp_path, capsys):
    out = tmp_path / "d.png"
    flags = ["--data", tiny_data, "--out", str(out), "--batch", "12", "--every", "2"]
    assert vit.main([*flags, "--steps", "3", "--mesh", "data=2,model=2", "--fsdp", "--accumulate", "2"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^[\d,]+ parameters, 8 cpu device\(s\), simulated, compiled in", text, re.M)
    assert re.search(r"^step 2/3  loss \d\.\d{3} nats  [\d,]+ images/s  \d+ s left$", text, re.M)
    last = r"result: held-out accuracy: got \d+\.\d %, expected unknown, at least unknown"
    assert re.fullmatch(last, text.splitlines()[-1])
    assert out.read_bytes()[:4] == b"\x89PNG" and (tmp_path / "d.state.npz").exists()
    config = dataclasses.replace(vit.DIGITS, image_size=(14, 14), channels=1, classes=2)
    assert set(vit.load(tmp_path / "d.model.npz", config)) == set(vit.param_table(config))
    assert vit.main([*flags, "--steps", "4", "--resume"]) == 2
    assert "was made with steps=3, not 4" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_demo_evaluates_every_held_out_picture(tiny_data, tmp_path, capsys):
    vit.main(["--data", tiny_data, "--out", str(tmp_path / "d.png"), "--batch", "7", "--steps", "1"])
    got = float(re.search(r"got (\d+\.\d) %", capsys.readouterr().out)[1])
    images, labels, _ = vit.load_data(tiny_data)
    config = dataclasses.replace(vit.DIGITS, image_size=(14, 14), channels=1, classes=2)
    params = vit.load(tmp_path / "d.model.npz", config)
    guesses = vit.forward(params, vit.preprocess(images[:8]), config).argmax(-1)  # 8 of 40, in batches of 7
    right = guesses == labels[:8]
    assert right[:6].any()  # among those that pad the last batch: counted twice, they would show
    assert got == pytest.approx(100 * float(right.mean()), abs=0.05)


@pytest.mark.usefixtures("quick")
def test_demo_stops_at_a_loss_that_is_not_finite_and_keeps_the_last_good_state(tiny_data, tmp_path, capsys):
    flags = ["--data", tiny_data, "--out", str(tmp_path / "d.png"), *"--batch 4 --steps 70 --every 1".split()]
    assert vit.main([*flags, "--learning-rate", "1e38"]) == 1
    text = capsys.readouterr().out
    stopped = int(re.search(r"step (\d+): the loss is (nan|inf); stopped", text)[1])
    state = dict(np.load(tmp_path / "d.state.npz", allow_pickle=False))
    assert 1 <= int(state["2"]) < stopped
    assert all(np.isfinite(a).all() for n, a in state.items() if n != "flags")
    assert not (tmp_path / "d.model.npz").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--steps 0", "--steps 0 is not at least 1"),
        ("--batch 0", "--batch 0 is not at least 1"),
        ("--size B/17", "--size B/17 is none of digits, Ti/16, S/16, S/32"),
        ("--mesh 2x4", "--mesh 2x4 is not of the form data=4,model=2"),
        ("--mesh data=4,model=4", "--mesh data=4,model=4 asks for more than 8 cpu device(s), simulated"),
        ("--mesh data=1,model=8", "4 is not a multiple of mesh axis model=8"),
        ("--mesh data=8,model=1 --batch 12", "batch 12 is not a multiple of data=8 x accumulate=1"),
        ("--out nowhere/f.png", "--out nowhere/f.png cannot be written"),
        ("--out f.npz", "--out f.npz cannot be written"),
        ("--resume", "d.state.npz is not a readable .npz of plain arrays"),
        ("--data missing.npz", "missing.npz has no images and labels: data/convert.py makes such"),
        ("--size S/16", "image_size=(14, 14) is no positive multiple of patch_size=(16, 16)"),
    ],
)
def test_demo_refuses_in_one_line(flags, message, tiny_data, tmp_path, capsys):
    before = ["--data", tiny_data, "--out", str(tmp_path / "d.png"), "--steps", "2", "--batch", "4"]
    assert vit.main([*before, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vit.py: ") and message in error and len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"labels": np.zeros(4, int)}, "has no images and labels"),
        (
            {"images": np.zeros((0, 8, 8), np.uint8), "labels": np.zeros(0, int)},
            "uint8 (0, 8, 8, 1) and int64 (0,), not",
        ),
        (
            {"images": np.zeros((4, 8, 8), np.float32), "labels": np.zeros(4, int)},
            "float32 (4, 8, 8, 1) and int64 (4,)",
        ),
        (
            {"images": np.zeros((4, 8, 8), np.uint8), "labels": np.zeros(3, int)},
            "(4, 8, 8, 1) and int64 (3,), not",
        ),
        ({"images": np.zeros((4, 8, 8), np.uint8), "labels": np.zeros(4)}, "and float64 (4,), not"),
        (
            {"images": np.zeros((4, 8, 8), np.uint8), "labels": np.array([0, 1, 2, -1])},
            "labels are -1 to 2, not within",
        ),
        (
            {"images": np.zeros((4, 8, 8), np.uint8), "labels": np.array([0, 1, 2, 9])},
            "labels are 0 to 9, not within 0 to 3",
        ),
        (
            {
                "images": np.zeros((4, 8, 8), np.uint8),
                "labels": np.arange(4),
                "class_names": np.array(["a", "b"]),
            },
            "0 to 1",
        ),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(arrays, message, tmp_path):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(ValueError, match=re.escape(message)):
        vit.load_data(tmp_path / "d.npz")


def python(*flags, **options):
    """`python vit.py FLAGS` in a process of its own."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "vit.py"), *flags]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, **options
    )


def model_of(out):
    return dict(np.load(out.with_suffix(".model.npz"), allow_pickle=False))


@pytest.mark.usefixtures("quick")
def test_killed_and_resumed_it_ends_with_the_same_bits(tiny_data, tmp_path):
    flags = ["--data", tiny_data, "--batch", "4", "--steps", "30", "--every", "1", "--mesh", "data=2,model=1"]
    whole, cut = tmp_path / "whole.png", tmp_path / "cut.png"
    with python(*flags, "--out", str(whole)) as uncut:  # beside the other, on a core of its own
        with python(*flags, "--out", str(cut)) as run:
            last = int(np.random.default_rng(time.time_ns()).integers(2, 25))
            for line in run.stdout:
                if line.startswith(f"step {last}/"):
                    run.send_signal(signal.SIGKILL)
            run.wait(timeout=60)
        assert "result:" in uncut.communicate(timeout=120)[0]
    assert run.returncode == -signal.SIGKILL and not cut.with_suffix(".model.npz").exists()
    with python(*flags, "--out", str(cut), "--resume") as run:
        text = run.communicate(timeout=120)[0]
    first = int(re.search(r"^step (\d+)/30", text, re.M)[1])
    assert last < first <= 30, f"killed after step {last}, resumed with step {first}"
    for name, array in model_of(whole).items():
        np.testing.assert_array_equal(model_of(cut)[name], array, err_msg=name)


@pytest.mark.usefixtures("quick")
def test_two_processes_of_four_devices_train_as_one_of_eight(tiny_data, tmp_path):
    flags = ["--data", tiny_data, "--fsdp", *"--batch 8 --steps 4 --every 2 --mesh data=4,model=2".split()]
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    runs = [python(*flags, "--out", str(two), "--distributed", f"{address},2,{i}") for i in range(2)]
    try:
        assert vit.main([*flags, "--out", str(one)]) == 0  # while the others compile
        texts = [run.communicate(timeout=120)[0] for run in runs]
    finally:
        for run in runs:  # a peer that waits for a dead one never ends by itself
            run.kill()
            run.wait()
    assert [run.returncode for run in runs] == [0, 0], texts
    losses = [re.findall(r"loss (\d\.\d+) nats", text) for text in texts]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    assert re.search(r"8 cpu device\(s\), simulated", texts[0])
    close_gradients(model_of(two), model_of(one), 1e-5)


# ==== The real model: network ===============================================================================

EXAMPLES = ROOT / "examples"
REAL_SIZE = {
    "image_size": (224, 224),
    "patch_size": (14, 14),
    "width": 384,
    "depth": 12,
    "heads": 6,
    "mlp": 1536,
}
REAL = vit.Config(**REAL_SIZE, classes=0, gelu="exact")
# Run by a process that has onnx and onnxruntime, on the model as published.
REFERENCE = """
import numpy as np, real_vit
images, names = real_vit.photographs(224)
features = real_vit.backbone_features(real_vit.fetch(), (images.astype(np.float64) - 127.5) / 127.5)
np.savez("reference.npz", images=images, features=features)
"""


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Path of the checkpoint, photographs uint8 [3,224,224,3], their features by onnxruntime [3,257,384].

    The packages that this needs go into a folder of their own, which only the processes here see.
    """
    folder = tmp_path_factory.mktemp("real")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder / "packages"), str(EXAMPLES)])}

    def python(*arguments):
        command = [sys.executable, *map(str, arguments)]
        options = {"cwd": folder, "env": environment, "capture_output": True, "text": True, "timeout": 600}
        done = subprocess.run(command, **options)
        assert done.returncode == 0, f"{arguments}:\n{done.stdout}{done.stderr}"
        return done.stdout

    python("-m", "pip", "install", "--quiet", "--target", "packages", "onnx", "onnxruntime", "pillow")
    printed = python(EXAMPLES / "real_vit.py", "--out", "vit_s14.npz", "--photos", "photos")
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
def test_features_of_the_real_model_equal_those_of_onnxruntime(real, attention):
    path, images, wanted = real
    assert attention.infer_config(vit.read_npz(path), gelu="exact") == REAL
    config = dataclasses.replace(REAL, pool="token_none")
    got = jax.jit(vit.features, static_argnums=2)(vit.load(path, config), vit.preprocess(images), config)
    assert got.shape == wanted.shape == (3, 257, 384)
    error, deviation = np.abs(got - wanted).max(), wanted.std()
    print(f"largest difference {error:.2g}, standard deviation of the features {deviation:.3g}")
    assert error < 1e-4 and deviation > 2


@pytest.mark.network
def test_c7_real_model_position_embeddings_and_attention_distance(real, attention):
    """Section 4.5: "closer patches tend to have more similar position embeddings", "patches in the same
    row/column have similar embeddings"; "the attention distance increases with network depth"; "some heads
    attend to most of the image already in the lowest layers".

    The first two and the last hold in this model. The third holds from the second layer on, and for the last
    third of the layers against the first; but of all layers the first has the largest mean distance.
    """
    path, images, _ = real
    params, grid = vit.load(path, REAL), REAL.grid
    similarity = attention.position_similarity(params["position"], grid).reshape(256, 256)
    apart = attention.patch_distances(grid, (1, 1))  # in patches
    near, far = similarity[(apart > 0) & (apart < 2)].mean(), similarity[apart >= 2].mean()
    print(f"cosine of position embeddings: neighbours {near:.2f}, others {far:.2f}")
    assert near > 0.5 and far < 0.2  # measured: 0.66, 0.07
    row, column = np.divmod(np.arange(256), 16)
    aligned = (row[:, None] == row) | (column[:, None] == column)
    for least in range(2, 15):  # at one and the same distance
        ring = (apart >= least) & (apart < least + 1)
        assert similarity[ring & aligned].mean() > similarity[ring & ~aligned].mean() + 0.2  # at least 0.22

    _, distance = attention.look(params, images, REAL)  # [L,H]
    layers, uniform = distance.mean(1), attention.patch_distances(grid, (14, 14)).mean()
    all_layers, from_second = (np.corrcoef(range(i, 12), layers[i:])[0, 1] for i in (0, 1))
    print(f"mean attention distance by layer: {layers.round(1)}, uniform {uniform:.1f} pixels")
    print(f"correlation with depth {all_layers:.2f}, from layer 2 {from_second:.2f}")
    assert layers[-4:].mean() > layers[:4].mean() + 8  # measured: 82.6, 69.6
    assert from_second > 0.75  # measured: 0.84; with the first layer 0.31
    assert layers.argmax() == 0  # the exception: 100.6
    print(f"heads of layers 1 to 3: least {distance[:3].min(1)}, largest {distance[:3].max(1)}")
    assert (distance[:3].max(1) > uniform / 2).all()  # measured: 123.6, 77.6, 115.3 of 116.6
    assert distance[1:3].min() < uniform / 4  # while other heads of these layers are local: 21.4
