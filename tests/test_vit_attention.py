"""examples/vit_attention.py and the command line of real_vit.py, whose checkpoint it reads."""

import dataclasses
import importlib.util
import sys
import types

import jax
import numpy as np
import pytest
from PIL import Image

import vit
from common import ROOT


def script(name, optimize=0):
    """An example as a module; with optimize=2 it has no docstrings, as under `python -OO`."""
    path = ROOT / f"examples/{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    exec(compile(path.read_text(), path, "exec", optimize=optimize), vars(module))
    return module


attention = script("vit_attention")
real_vit = script("real_vit")
TINY = vit.Config(image_size=8, patch_size=4, width=16, depth=2, heads=4, mlp=32, classes=5)


def change(config, **fields):
    return dataclasses.replace(config, **fields)


# ==== The quantities of Figure 7, by hand =========================================================


def test_filters_pca_finds_the_one_filter_of_a_bank():
    rng = np.random.default_rng(0)
    pattern = rng.normal(size=(4, 5, 3))
    mean = rng.normal(size=(4, 5, 3, 1))
    bank = pattern[..., None] * rng.normal(size=16) + mean  # one filter, of 16 strengths
    (component,) = attention.filters_pca(bank)
    largest = pattern.flat[np.abs(pattern).argmax()]
    want = pattern * np.sign(largest) / np.linalg.norm(pattern)
    np.testing.assert_allclose(component, want, atol=1e-12)


def test_filters_pca_orders_by_strength():
    strength = np.array([1.0, 4.0, 2.0, 3.0])
    axes = np.eye(12)[:4].T  # [h*w*C,4], four values of a patch
    bank = np.concatenate([axes * strength, -axes * strength], axis=1)  # pairs, so the mean is 0
    components = attention.filters_pca(bank.reshape(2, 2, 3, 8), 3)
    np.testing.assert_allclose(components.reshape(3, 12), np.eye(12)[[1, 3, 2]], atol=1e-12)


def test_filters_pca_gives_components_whose_largest_value_is_positive():
    bank = np.random.default_rng(0).normal(size=(4, 5, 3, 30))
    components = attention.filters_pca(bank).reshape(28, 60)
    assert np.all(components.max(1) > -components.min(1))
    np.testing.assert_allclose(components @ components.T, np.eye(28), atol=1e-12)


def test_position_similarity_of_known_angles():
    patches = np.array([[1, 0], [0, 2], [3, 3], [-4, 0], [1, 0], [0, 1]], float)  # a grid of 2 x 3
    with_class = np.concatenate([[[9, 9]], patches])
    similarity = attention.position_similarity(with_class, (2, 3))
    assert similarity.shape == (2, 3, 2, 3)
    np.testing.assert_allclose(similarity[0, 0], [[1, 0, 0.5**0.5], [-1, 1, 0]], atol=1e-12)
    np.testing.assert_allclose(similarity[0, 2, 1, 2], 0.5**0.5)
    without = attention.position_similarity(patches, (2, 3))
    np.testing.assert_array_equal(without, similarity)


@pytest.mark.parametrize("prefix", [0, 1], ids=["gap", "token"])
def test_attention_distance_by_hand(prefix):
    """Patches of 3 x 4 pixels, two rows of two: from each 0, 4, 3 and 5 pixels to the four."""
    T = prefix + 4
    uniform = np.full((T, T), 1 / T)
    itself = np.eye(T)
    below = np.eye(T)
    below[prefix:, prefix:] = 0.25 * np.eye(4)[[2, 3, 0, 1]]  # to the patch in the other row
    below[prefix:, :prefix] = 0.75  # and three times as much to the class token
    pictures = np.stack([[uniform, itself, below], [itself, itself, below]])  # two, of three heads
    distance = attention.attention_distance(pictures[None], (2, 2), (3, 4))
    np.testing.assert_allclose(distance, [[(3 + 0) / 2, 0, 3]], atol=1e-12)


def test_attention_to_the_class_token_alone_has_no_distance():
    maps = np.zeros((1, 1, 1, 5, 5))
    maps[..., 0] = 1
    assert attention.attention_distance(maps, (2, 2), (1, 1)) == 0


def test_distance_of_uniform_attention_is_that_of_two_random_points():
    """(2 + sqrt(2) + 5 asinh(1)) / 15 sides of a square, approached by ever smaller patches."""
    square = (2 + 2**0.5 + 5 * np.arcsinh(1)) / 15
    got = attention.patch_distances((40, 40), (1, 1)).mean() / 40
    assert got == pytest.approx(square, rel=1e-3)


def random_params(config):
    """Weights without zeros."""
    shapes = jax.eval_shape(lambda: vit.init_params(jax.random.key(0), config))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("pool", ["token", "gap"])
def test_look_takes_what_the_head_sees(pool):
    config = change(TINY, image_size=(8, 12), pool=pool)
    params = random_params(config)
    images = np.random.default_rng(1).integers(0, 256, (2, 8, 12, 3), dtype=np.uint8)
    masks, distance = attention.look(params, images, config)
    maps = vit.attention_maps(params, vit.preprocess(images), config)  # of both pictures at once
    rollout = np.asarray(vit.attention_rollout(maps))
    if pool == "token":
        want = rollout[:, 0, 1:]
    else:
        want = rollout.mean(1)
    np.testing.assert_allclose(masks, want.reshape(2, 2, 3), atol=1e-6)
    want = attention.attention_distance(maps, (2, 3), (4, 4))
    np.testing.assert_allclose(distance, want, atol=1e-5)


# ==== Pictures ====================================================================================


def test_read_picture_takes_the_centre(tmp_path):
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = [10, 20, 30]
    Image.fromarray(pixels).save(tmp_path / "stripes.png")
    picture = attention.read_picture(tmp_path / "stripes.png", TINY, display_rows=32)
    assert picture.pixels.shape == (8, 8, 3) and picture.display.shape == (32, 32, 3)
    for part in (picture.pixels, picture.display):
        np.testing.assert_array_equal(part, np.broadcast_to([10, 20, 30], part.shape))
    assert not picture.more_frames
    grey = attention.read_picture(tmp_path / "stripes.png", change(TINY, channels=1))
    assert grey.pixels.shape == (8, 8, 1) and np.all(grey.pixels == 18)  # 10, 20, 30 in luma


def test_what_is_transparent_becomes_white(tmp_path):
    pixels = np.full((8, 8, 4), 200, np.uint8)
    pixels[..., 3] = 0
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    assert np.all(attention.read_picture(tmp_path / "clear.png", TINY).pixels == 255)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pictures_of_more_than_8_bits_are_refused(mode, tmp_path):
    dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    Image.fromarray(np.full((8, 8), 500, dtype)).save(tmp_path / "deep.tiff")
    with pytest.raises(ValueError, match="more than 8 bits per channel"):
        attention.read_picture(tmp_path / "deep.tiff", TINY)


# ==== Whole runs ==================================================================================


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A function that writes a random checkpoint of TINY with other fields, once, and its path."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def write(**fields):
        path = folder / f"{fields}.npz"
        if not path.exists():
            config = change(TINY, **fields)
            vit.save(path, random_params(config), config)
        return str(path)

    return write


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A wide picture of colour noise, a high one in grey, and an animation that begins black."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    wide = Image.fromarray(rng.integers(0, 256, (9, 31, 3), dtype=np.uint8))
    wide.save(folder / "wide.png")
    grey = Image.fromarray(rng.integers(0, 256, (40, 20), dtype=np.uint8))
    grey.save(folder / "grey.png")
    frames = [Image.new("L", (8, 8), value) for value in (0, 255)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    return [str(folder / name) for name in ("wide.png", "grey.png", "moving.gif")]


def test_draws_two_figures(checkpoint, pictures, tmp_path, capsys, monkeypatch):
    """On pictures of three formats, for a model of grey pictures whose patches form no square."""
    seen = []
    look = attention.look
    monkeypatch.setattr(attention, "look", lambda *args: seen.append(args) or look(*args))
    path = checkpoint(channels=1, image_size=(8, 12))
    out = tmp_path / "figure.png"
    inside = tmp_path / "figure_inside.png"
    flags = ["--grid", "2x3", "--gelu", "exact", "--out", str(out)]
    assert attention.main([path, *pictures, *flags]) == 0
    (_, images, config) = seen[0]
    assert config == change(TINY, channels=1, image_size=(8, 12), gelu="exact")
    assert len(images) == 3 and not np.any(images[2])  # the first frame is black
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"used only the first frame of {pictures[2]}"
    assert lines[1].startswith("mean attention distance in pixels; uniform attention has 4.7:")
    assert lines[2].startswith("layer  1  mean ") and lines[3].startswith("layer  2  mean ")
    assert lines[4:] == [f"wrote {out} and {inside}"]
    for path in (out, inside):
        content = path.read_bytes()
        assert content[:4] == b"\x89PNG" and len(content) > 10_000


def test_prints_its_result_where_it_cannot_draw(
    checkpoint, pictures, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # its import fails
    out = tmp_path / "figure.png"
    assert attention.main([checkpoint(), pictures[0], "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].startswith("layer  2  mean ")
    assert printed.err.startswith("vit_attention.py: no figure: ")
    assert printed.err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("name", ["vit_attention", "real_vit"])
def test_help_without_docstrings(name, capsys):
    """Under `python -OO` a module's docstring is None."""
    module = script(name, optimize=2)
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0 and "--out" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["vit_attention", "real_vit"])
def test_ends_by_run_program(name, monkeypatch):
    """Which is tested with vit.py, for Ctrl-C and a closed pipe."""
    started = []
    monkeypatch.setattr(vit, "run_program", started.append)
    path = ROOT / f"examples/{name}.py"
    names = {"__name__": "__main__", "__file__": str(path)}
    exec(compile(path.read_text(), path, "exec"), names)
    assert started == [names["main"]]


# ==== Mistakes ====================================================================================


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory, pictures):
    """A folder with files that are no checkpoints and no pictures."""
    folder = tmp_path_factory.mktemp("mistakes")
    np.savez(folder / "data.npz", images=np.zeros((2, 8, 8), np.uint8), labels=np.zeros(2, int))
    (folder / "text.png").write_text("no picture")
    (folder / "folder.png").mkdir()
    (folder / "used_inside.png").mkdir()
    return folder


@pytest.mark.parametrize(
    "fields, arguments, message",
    [
        (None, "wide.png", "none.npz does not exist"),
        (None, "--out f.png --grid 2x2 wide.png", "none.npz does not exist"),
        ({}, "none.png", "none.png does not exist"),
        ({}, "wide.png text.png", "text.png cannot be read as a picture"),
        ({}, "wide.png --out none/f.png", "--out none/f.png: its folder cannot be written to"),
        ({}, "wide.png --out f.txt", "--out f.txt is not a .png, .pdf or .svg"),
        ({}, "wide.png --out folder.png", "--out folder.png is a folder"),
        ({}, "wide.png --out used.png", "--out used_inside.png is a folder"),
        ({}, "wide.png --grid 6", "--grid 6 is not of the form ROWSxCOLUMNS, as 14x14"),
        ({}, "wide.png --grid 0x4", "--grid 0x4 is not of the form ROWSxCOLUMNS, as 14x14"),
        ({}, "wide.png --grid 2x3", "pos_embedding has shape (1, 5, 16), not (1, 7, 16)"),
        ({"image_size": (8, 12)}, "wide.png", "6 patches, which do not form a square: give image"),
        ({"channels": 2}, "wide.png", "takes images of 2 channels; a picture has 1 or 3"),
        ({"channels": 4}, "wide.png", "takes images of 4 channels; a picture has 1 or 3"),
    ],
)
def test_refuses_in_one_line(
    fields, arguments, message, checkpoint, pictures, mistakes, capsys, monkeypatch
):
    monkeypatch.chdir(mistakes)
    monkeypatch.setattr(attention, "look", None)  # refused before the work
    path = "none.npz" if fields is None else checkpoint(**fields)
    words = [pictures[0] if word == "wide.png" else word for word in arguments.split()]
    before = sorted(mistakes.rglob("*"))
    assert attention.main([path, *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("vit_attention.py: ")
    assert message in printed.err and printed.err.count("\n") == 1
    assert sorted(mistakes.rglob("*")) == before


@pytest.mark.parametrize("flags", [[], ["--grid", "2x2"]], ids=["square", "grid"])
def test_refuses_what_is_no_checkpoint(flags, mistakes, pictures, capsys):
    assert attention.main([str(mistakes / "data.npz"), pictures[0], *flags]) == 2
    error = capsys.readouterr().err
    assert "has no array embedding/kernel" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--out folder.png", "--out folder.png is a folder"),
        ("--out none/v.npz", "--out none/v.npz: its folder cannot be written to"),
        ("--out v.npz --photos text.png", "cannot read or write text.png: File exists"),
        ("--out v.npz", "cannot import onnx"),
    ],
)
def test_real_vit_refuses_before_the_download(flags, message, mistakes, capsys, monkeypatch):
    monkeypatch.chdir(mistakes)
    monkeypatch.setattr(real_vit, "fetch", None)
    monkeypatch.setitem(sys.modules, "onnx", None)  # its import fails
    assert real_vit.main(flags.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("real_vit.py: ")
    assert message in printed.err and printed.err.count("\n") == 1


def test_real_vit_refuses_another_wheel(tmp_path, capsys, monkeypatch):
    for module in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))  # can be imported
    wheel = tmp_path / "other.whl"
    wheel.write_bytes(b"another package")
    out = tmp_path / "v.npz"
    assert real_vit.main(["--out", str(out), "--wheel", str(wheel)]) == 2
    error = capsys.readouterr().err
    assert "other.whl has sha256" in error and "required is 90a0b02e" in error
    assert real_vit.main(["--out", str(out), "--wheel", str(tmp_path / "none.whl")]) == 2
    assert "none.whl: No such file or directory" in capsys.readouterr().err
    assert not out.exists()


def test_real_vit_leaves_a_closed_pipe_to_run_program(monkeypatch):
    def write(*arguments):
        raise BrokenPipeError

    monkeypatch.setattr(real_vit, "write", write)
    with pytest.raises(BrokenPipeError):
        real_vit.main([])
