"""examples/big_vision.py against big_vision itself, there and back, whole runs, mistakes."""

import dataclasses
import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit
from common import ROOT, close, close_gradients, golden, part

golden = functools.partial(golden, "vit")
PATH = ROOT / "examples/big_vision.py"


def script(optimize=0):
    """The example as a module; with optimize=2 it has no docstrings, as under `python -OO`."""
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("bv", PATH))
    exec(compile(PATH.read_text(), PATH, "exec", optimize=optimize), vars(module))
    return module


big_vision = script()
TINY = vit.Config(image_size=8, patch_size=4, width=16, depth=3, heads=4, mlp=32, classes=5)


def change(config, **fields):
    return dataclasses.replace(config, **fields)


def random_params(config):
    """Weights without zeros."""
    shapes = jax.eval_shape(lambda: vit.init_params(jax.random.key(0), config))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


# ==== Golden ======================================================================================


@functools.cache
def sincos_gap():
    """Parameters, Config and arrays of the golden with fixed positions."""
    meta, arrays = golden("bv_vit_sincos_gap")
    flat = {name: array for name, array in arrays.items() if name.startswith("params/")}
    params, config = big_vision.from_big_vision(flat, image_size=meta["config"]["image"])
    return params, config, arrays


def test_golden_config():
    _, config, _ = sincos_gap()
    official = golden("bv_vit_sincos_gap")[0]["config"]
    assert config == vit.Config(
        image_size=official["image"],
        patch_size=official["patch_size"],
        width=official["width"],
        depth=official["depth"],
        heads=official["num_heads"],
        mlp=4 * official["width"],
        classes=official["num_classes"],
        pool=official["pool_type"],
        representation=official["width"],
    )


def test_golden_outputs_and_gradients():
    params, config, arrays = sincos_gap()

    @jax.jit
    def run(params, images):
        def loss(params):
            batch = {"images": images, "labels": arrays["in/labels"]}
            return vit.loss_fn(params, batch, None, config)[0]

        logits = vit.forward(params, images, config)
        features = vit.forward(params, images, change(config, classes=0))
        return jax.value_and_grad(loss)(params), logits, features

    (loss, grads), logits, features = run(params, arrays["in/images"])
    assert float(loss) == pytest.approx(float(arrays["out/loss"]), rel=1e-6)
    close(logits, arrays["out/logits"], 1e-5)
    close(features, arrays["out/pre_logits"], 1e-5)
    grads = big_vision.to_big_vision(grads, config)
    del grads["pos_embedding"]  # fixed there, a table like any other here
    close_gradients(grads, part(arrays, "grad/"))


def test_golden_intermediate_values():
    params, config, arrays = sincos_gap()
    close(params["position"], arrays["out/posemb"][0], 1e-6)

    @jax.jit
    def values(params, images):
        x = vit.embed(params, images, config)
        out = {"with_posemb": x}
        for i in range(config.depth):
            weights = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
            x, _ = vit.block(x, weights, config)
            out[f"block_{i}"] = x
        out["encoded"] = vit.encode(params, images, config)
        out["head_input"] = out["encoded"].mean(1)
        return out

    for name, got in values(params, arrays["in/images"]).items():
        close(got, arrays[f"out/{name}"], 1e-5)


def test_golden_stacked_blocks():
    """big_vision's layout with scan=True; its class token has no position."""
    meta, arrays = golden("bv_vit_tok_scan")
    flat = {name: array for name, array in arrays.items() if name.startswith("params/")}
    params, config = big_vision.from_big_vision(flat)
    assert (config.pool, config.depth) == ("token", meta["config"]["depth"])
    close(vit.encode(params, arrays["in/images"], config), arrays["out/encoded"], 1e-5)
    close(vit.forward(params, arrays["in/images"], config), arrays["out/logits"], 1e-5)


def test_golden_class_position_folds_into_the_token():
    """What big_vision makes of vit_token.npz, a checkpoint of the other code base."""
    _, token = golden("vit_token")
    _, arrays = golden("bv_from_old_checkpoint")
    released = part(token, "params/")
    old = vit.infer_config(released)
    flat = big_vision.to_big_vision(vit.from_official(released, old), old)
    np.testing.assert_array_equal(flat["cls"], arrays["out/cls"])
    np.testing.assert_array_equal(flat["pos_embedding"], arrays["out/pos_embedding"])
    assert sorted(flat) == str(arrays["out/names"]).split("\n")
    params, config = big_vision.from_big_vision(flat)
    assert config == old and not np.any(params["position"][0])
    close(vit.forward(params, token["in/images"], config), arrays["out/logits"], 1e-5)


def test_golden_sincos_positions():
    _, arrays = golden("bv_sincos2d")
    assert len(arrays) == 3
    for name, want in part(arrays, "out/").items():
        sizes = re.fullmatch(r"(\d+)x(\d+)x(\d+)_T(\d+)", name).groups()
        rows, columns, width, temperature = map(int, sizes)
        close(big_vision.sincos2d((rows, columns), width, temperature), want[0], 1e-6)


def test_golden_preprocessing():
    meta, arrays = golden("bv_preprocess")
    size = (meta["target_size"],) * 2
    for i in range(3):
        image = arrays[f"in/{i}/image"][None]
        want = arrays[f"out/{i}/value_range"]
        np.testing.assert_allclose(vit.preprocess(image)[0], want, atol=2e-7)
        # After a resize big_vision drops what is below whole numbers.
        resized = np.asarray(vit.preprocess(image, size)[0])
        dropped = (resized - arrays[f"out/{i}/resize"]) * 127.5
        assert -1e-3 < dropped.min() and dropped.max() < 1 + 1e-3


# ==== There and back ==============================================================================


@functools.cache
def plain(pool="token"):
    """A Config, and the arrays of a checkpoint of big_vision that has it."""
    config = change(TINY, pool=pool, representation=6)
    return config, big_vision.to_big_vision(random_params(config), config)


def stacked(flat, depth):
    """The arrays as big_vision has them with scan=True: blocks on a leading axis."""
    out = {}
    for name, array in flat.items():
        if "/encoderblock_" not in name:
            out[name] = array
        elif "/encoderblock_0/" in name:
            layers = [flat[name.replace("_0/", f"_{i}/", 1)] for i in range(depth)]
            out[name.replace("/encoderblock_0/", "/encoderblock/")] = np.stack(layers)
    return out


@pytest.mark.parametrize("pool", ["token", "gap"])
def test_names_and_arrays_come_back(pool):
    config, flat = plain(pool)
    assert flat["Transformer/encoderblock_2/MlpBlock_0/Dense_1/kernel"].shape == (32, 16)
    assert flat["pos_embedding"].shape == (1, 4, 16)
    assert ("cls" in flat) == (pool == "token")
    params, found = big_vision.from_big_vision(flat)
    assert found == config
    assert_same(big_vision.to_big_vision(params, config), flat)


@pytest.mark.parametrize("prefix", ["", "params/", "opt/target/", "params/img/"])
def test_stacked_blocks(prefix):
    config, flat = plain()
    params, _ = big_vision.from_big_vision(flat)
    stored = {prefix + name: array for name, array in stacked(flat, 3).items()}
    assert len(stored) == len(flat) - 2 * 16
    if prefix:
        stored["opt/0/mu/Transformer/encoderblock/LayerNorm_0/bias"] = np.zeros((3, 16))
    again, found = big_vision.from_big_vision(stored)
    assert found == config
    assert_same(vit.named_leaves(again), vit.named_leaves(params))


def test_fields_that_no_array_tells():
    config, flat = plain("gap")
    params, found = big_vision.from_big_vision(flat, image_size=(4, 16), gelu="exact")
    assert found == change(config, image_size=(4, 16), gelu="exact")
    np.testing.assert_array_equal(params["position"], flat["pos_embedding"][0])


def test_fixed_positions_beside_a_class_token():
    config, flat = plain()
    flat = {name: array for name, array in flat.items() if name != "pos_embedding"}
    params, _ = big_vision.from_big_vision(flat, image_size=8)
    want = big_vision.sincos2d((2, 2), 16)
    np.testing.assert_array_equal(params["position"], np.concatenate([np.zeros((1, 16)), want]))


# ==== Mistakes ====================================================================================

UNKNOWN = ["MAPHead_0/probe", "Transformer/encoderblock_1/MlpBlock_0/Dense_2/kernel", "t"]


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_vit_lacks_is_refused_by_its_own_name(name):
    _, flat = plain("gap")
    with pytest.raises(ValueError) as error:
        big_vision.from_big_vision({**flat, name: np.zeros((1, 1, 16))})
    assert str(error.value) == f"the checkpoint has {name}, which vit.py does not have"


@pytest.mark.parametrize(
    "name, array, fields, message",
    [
        (
            "pos_embedding",
            None,
            {},
            "no pos_embedding: if its positions are fixed, give image_size",
        ),
        (
            "pos_embedding",
            np.zeros((1, 4, 16)),
            {"image_size": 12},
            "not of the 9 patches in (12, 12)",
        ),
        ("pos_embedding", np.zeros((1, 6, 16)), {}, "6 patches, which do not form a square: give"),
        (vit.OFFICIAL_POSITION, np.zeros((1, 5, 16)), {}, "its names are not those of big_vision"),
        ("embedding/kernel", None, {}, "has no array embedding/kernel: it is not a ViT"),
        ("head/bias", np.full(5, np.nan), {}, "head/bias holds values that are not finite"),
        ("Transformer/encoderblock/x", np.zeros(()), {}, "has Transformer/encoderblock_0/x, which"),
    ],
)
def test_refuses(name, array, fields, message):
    _, flat = plain("gap")
    flat = {**flat, name: array}
    if array is None:
        del flat[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        big_vision.from_big_vision(flat, **fields)


def test_refuses_position_tables_without_a_leading_axis():
    _, flat = plain()
    with pytest.raises(ValueError, match=re.escape("pos_embedding is (4, 16), which has not 3")):
        big_vision.from_big_vision({**flat, "pos_embedding": np.zeros((4, 16))})


def test_refuses_what_is_no_vit():
    with pytest.raises(ValueError, match="has no embedding/kernel .* it is not a ViT"):
        big_vision.from_big_vision({"stem/kernel": np.zeros((4, 4, 3, 16))})


@pytest.mark.parametrize("width", [4, 18])
def test_widths_without_fixed_positions(width):
    with pytest.raises(ValueError, match=f"width={width} is no multiple of 4 above 4"):
        big_vision.sincos2d((2, 2), width)


# ==== Command line ================================================================================


def test_converts_there_and_back(tmp_path, capsys):
    config, flat = plain()
    source = tmp_path / "in.npz"
    out = tmp_path / "out.npz"
    back = tmp_path / "back.npz"
    half = {name: array.astype(jnp.bfloat16) for name, array in flat.items()}
    vit.write_npz(source, {f"params/{name}": array for name, array in half.items()})
    assert big_vision.main([str(source), str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    count = sum(array.size for array in flat.values()) + 16  # the class token's position
    assert lines == [f"wrote {out}: {len(flat)} arrays, {count:,} parameters", str(config)]
    params, _ = big_vision.from_big_vision(half)
    assert_same(vit.named_leaves(vit.load(out, config)), vit.named_leaves(params))

    assert big_vision.main([str(out), str(back), "--to-big-vision"]) == 0
    assert_same(vit.read_npz(back), {name: np.float32(array) for name, array in half.items()})


@pytest.mark.parametrize("text, size", [("8", (8, 8)), ("4x16", (4, 16))])
def test_image_size_on_the_command_line(text, size, tmp_path):
    _, flat = plain("gap")
    without = {name: array for name, array in flat.items() if name != "pos_embedding"}
    vit.write_npz(tmp_path / "in.npz", without)
    out = tmp_path / "out.npz"
    assert big_vision.main([str(tmp_path / "in.npz"), str(out), "--image-size", text]) == 0
    got = vit.read_npz(out)[vit.OFFICIAL_POSITION][0]
    grid = (size[0] // 4, size[1] // 4)
    np.testing.assert_array_equal(got, big_vision.sincos2d(grid, 16))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("none.npz out.npz", "none.npz does not exist"),
        ("in.npz folder", "folder is a folder"),
        ("in.npz none/out.npz", "none/out.npz: its folder cannot be written to"),
        ("in.npz folder/../in.npz", "in.npz is the checkpoint to be read"),
        ("in.npz out.npz --image-size 8,8", "--image-size 8,8 is not of the form 224 or ROWSx"),
        ("in.npz out.npz --image-size 0", "--image-size 0 is not of the form 224 or ROWSxCOLUMNS"),
        ("in.npz out.npz --image-size 9", "image_size=(9, 9) is not a positive multiple"),
        ("in.npz out.npz --to-big-vision", f"has no array {vit.OFFICIAL_POSITION}"),
    ],
)
def test_refuses_in_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vit.write_npz("in.npz", plain()[1])
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.iterdir())
    assert big_vision.main(arguments.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("big_vision.py: ")
    assert message in printed.err and printed.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_help_without_docstrings(capsys):
    """Under `python -OO` a module's docstring is None."""
    with pytest.raises(SystemExit) as stop:
        script(optimize=2).main(["--help"])
    assert stop.value.code == 0 and "--to-big-vision" in capsys.readouterr().out


def test_ends_by_run_program(monkeypatch):
    """Which is tested with vit.py, for Ctrl-C and a closed pipe."""
    started = []
    monkeypatch.setattr(vit, "run_program", started.append)
    names = {"__name__": "__main__", "__file__": str(PATH)}
    exec(compile(PATH.read_text(), PATH, "exec"), names)
    assert started == [names["main"]]
