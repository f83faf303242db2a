"""examples/: the quantities of Figure 7 by hand, configs read from files, whole runs, mistakes."""

import dataclasses
import importlib.util
import pathlib
import sys

import jax
import numpy as np
import pytest

import vit

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def script(name):
    """An example as a module; the second imports the first by its name."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


attention, finetune = script("vit_attention"), script("vit_finetune")

# ==== The quantities of Figure 7, by hand ===================================================================


def test_filters_pca_finds_the_one_filter_of_a_bank():
    rng = np.random.default_rng(0)
    pattern = rng.normal(size=(4, 5, 3))
    bank = pattern[..., None] * rng.normal(size=16) + rng.normal(
        size=(4, 5, 3, 1)
    )  # one filter, 16 strengths
    (component,) = attention.filters_pca(bank)
    pattern *= np.sign(pattern.flat[np.abs(pattern).argmax()]) / np.linalg.norm(pattern)
    np.testing.assert_allclose(component, pattern, atol=1e-12)


def test_filters_pca_orders_by_strength_and_is_orthonormal():
    strength = np.array([1.0, 4.0, 2.0, 3.0])
    axes = np.eye(12)[:4].T  # [h*w*C,4], four pixels
    bank = np.concatenate([axes * strength, -axes * strength], axis=1)  # opposite pairs: their mean is 0
    components = attention.filters_pca(bank.reshape(2, 2, 3, 8), 3).reshape(3, 12)
    np.testing.assert_allclose(components, np.eye(12)[[1, 3, 2]], atol=1e-12)


def test_position_similarity_of_known_angles():
    x = np.array(
        [[9, 9], [1, 0], [0, 2], [3, 3], [-4, 0], [1, 0], [0, 1]], float
    )  # class token, grid of 2 x 3
    similarity = attention.position_similarity(x, (2, 3))
    assert similarity.shape == (2, 3, 2, 3)
    np.testing.assert_allclose(similarity[0, 0], [[1, 0, 0.5**0.5], [-1, 1, 0]], atol=1e-12)
    np.testing.assert_allclose(similarity[0, 2, 1, 2], 0.5**0.5)
    np.testing.assert_array_equal(
        attention.position_similarity(x[1:], (2, 3)), similarity
    )  # big_vision's table


@pytest.mark.parametrize("prefix", [0, 1])
def test_attention_distance_by_hand(prefix):
    """Patches of 3 x 4 pixels, two rows of two: from each patch 0, 4, 3 and 5 pixels to the four."""
    T = prefix + 4
    uniform, itself, below = np.full((T, T), 1 / T), np.eye(T), np.eye(T)
    below[prefix:, prefix:] = 0.25 * np.eye(4)[[2, 3, 0, 1]]  # to the patch in the other row
    below[prefix:, :prefix] = 0.75  # and three times as much to the class token, which has no place
    pictures = np.stack([[uniform, itself, below], [itself, itself, below]])  # two, of three heads
    distance = attention.attention_distance(pictures[None], (2, 2), (3, 4))
    np.testing.assert_allclose(distance, [[(3 + 0) / 2, 0, 3]], atol=1e-12)


def test_attention_that_goes_to_the_class_token_alone_has_no_distance():
    maps = np.zeros((1, 1, 1, 5, 5))
    maps[..., 0] = 1
    assert attention.attention_distance(maps, (2, 2), (1, 1)) == 0


def test_distance_of_uniform_attention_is_that_of_two_random_points():
    """(2 + sqrt(2) + 5 asinh(1)) / 15 sides for a square, met by ever smaller patches."""
    square = (2 + 2**0.5 + 5 * np.arcsinh(1)) / 15
    assert attention.patch_distances((40, 40), (1, 1)).mean() / 40 == pytest.approx(square, rel=1e-3)


# ==== Configs read from files ===============================================================================

TINY = vit.Config(image_size=(8, 8), patch_size=(4, 4), width=16, depth=2, heads=4, mlp=32, classes=5)
CONFIGS = {
    "python vit.py": {"channels": 1},
    "no head": {"classes": 0},
    "pre-logits": {"representation": 7, "gelu": "exact"},
    "no class token": {"pool": "gap"},
    "no class token of big_vision": {"pool": "gap", "class_position": False},
    "big_vision": {"class_position": False, "patch_size": (2, 4), "image_size": (6, 12)},
    "eleven blocks": {"depth": 11, "heads": 2, "mlp": 8, "width": 8},
    "rectangle": {"image_size": (8, 12)},
}


def change(config, **fields):
    return dataclasses.replace(config, **fields)


def random_params(config):
    """Parameters of which none is zero."""
    shapes = jax.eval_shape(lambda: vit.init_params(jax.random.key(0), config))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A function that writes a random checkpoint of TINY with other fields, and returns its path."""

    def write(**fields):
        config, path = change(TINY, **fields), tmp_path_factory.mktemp("checkpoint") / "vit.npz"
        vit.save(path, random_params(config), config)
        return path

    return write


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_infer_config(fields, checkpoint):
    path, config = checkpoint(**fields), change(TINY, **fields)
    grid = config.grid if len(set(config.grid)) > 1 else None
    flat = vit.read_npz(path)
    if not config.class_token:
        config = change(config, class_position=True)  # of no consequence
    assert attention.infer_config(flat, grid, config.gelu) == config
    assert attention.infer_config(flat, config.grid, config.gelu) == config
    vit.load(path, config)


def test_infer_config_of_newer_names():
    """Newer Flax counts LayerNorm_1, MlpBlock_0; the position table keeps its name in the official code."""
    flat = vit.to_official(random_params(TINY), TINY)
    for old, new in (("LayerNorm_2", "LayerNorm_1"), ("MlpBlock_3", "MlpBlock_0"), ("tion_1/", "tion_0/")):
        flat = {name.replace(old, new): array for name, array in flat.items()}
    vit.from_official(flat, TINY)  # which knows these names
    assert attention.infer_config(flat) == TINY


# ==== Scripts from start to end =============================================================================


@pytest.fixture
def pictures(tmp_path):
    """Two pictures of colour noise, one wide and one of grey, as PNG files."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for name, shape in (("wide", (9, 31, 3)), ("grey", (40, 20))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / f"{name}.png")
    return [str(tmp_path / "wide.png"), str(tmp_path / "grey.png")]


@pytest.fixture
def data(tmp_path):
    """60 pictures of 3 classes that differ in brightness, some of them twice, and labels 2, 3, 5."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.array([2, 3, 5], np.uint8), 20)
    images = (rng.integers(0, 40, (60, 8, 8)) + 50 * labels[:, None, None]).astype(np.uint8)
    images[10:13] = images[:3]
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    return str(tmp_path / "data.npz")


def test_read_picture_takes_the_centre(tmp_path):
    from PIL import Image

    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = [10, 20, 30]
    Image.fromarray(pixels).save(tmp_path / "stripes.png")
    small, large = attention.read_picture(tmp_path / "stripes.png", change(TINY, image_size=(8, 8)), 32)
    assert small.shape == (8, 8, 3) and large.shape == (32, 32, 3)
    for picture in (small, large):
        np.testing.assert_array_equal(picture, np.broadcast_to([10, 20, 30], picture.shape))


def test_look_takes_the_rollout_of_the_class_token(checkpoint):
    """Maps and rollout of both pictures at once, by the definition."""
    path = checkpoint(image_size=(8, 12))
    config = change(TINY, image_size=(8, 12))
    params = vit.load(path, config)
    images = np.random.default_rng(1).integers(0, 256, (2, 8, 12, 3), dtype=np.uint8)
    masks, distance = attention.look(params, images, config)
    maps = vit.attention_maps(params, vit.preprocess(images), config)
    wanted = vit.attention_rollout(maps)[:, 0, 1:].reshape(2, 2, 3)
    np.testing.assert_allclose(masks, wanted, atol=1e-6)
    np.testing.assert_allclose(distance, attention.attention_distance(maps, (2, 3), (4, 4)), atol=1e-5)


@pytest.mark.parametrize("fields", [{"channels": 1}, {"pool": "gap", "image_size": (8, 12)}], ids=str)
def test_vit_attention_draws_two_figures(fields, checkpoint, pictures, tmp_path, capsys):
    flags = ["--grid", "2x3"] if "image_size" in fields else []
    out = tmp_path / "figure.png"
    attention.main([str(checkpoint(**fields)), *pictures, "--out", str(out), *flags])
    assert out.stat().st_size > 1000 and (tmp_path / "figure_inside.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "layer  2  mean" in printed and f"wrote {out}" in printed


@pytest.mark.usefixtures("quick")
def test_vit_finetune_trains_on_a_mesh(checkpoint, data, tmp_path, capsys):
    path = str(checkpoint(channels=1, representation=7))
    out = tmp_path / "tuned.npz"
    flags = "--steps 40 --batch 16 --accumulate 2 --mesh data=2,model=2 --size 16 --learning-rate 0.03"
    finetune.main([path, "--data", data, "--out", str(out), *flags.split()])
    printed = capsys.readouterr().out
    assert "step 40/40  loss" in printed and "of 12 pictures, after 40 steps on 45 others" in printed
    assert float(printed.partition("accuracy ")[2].split()[0]) > 60  # three brightnesses
    config = attention.infer_config(vit.read_npz(out))
    assert config == change(TINY, channels=1, image_size=(16, 16), classes=3)
    vit.load(out, config)


@pytest.mark.parametrize("flags", [[], ["--untrained"]], ids=["checkpoint", "untrained"])
def test_vit_finetune_probes(flags, checkpoint, data, capsys, monkeypatch):
    path, fresh = checkpoint(channels=1), random_params(change(TINY, channels=1, classes=0))
    seen = []
    monkeypatch.setattr(
        vit, "init_params", lambda key, config: seen.append(config) or fresh
    )  # compiles for 5 s
    finetune.main([str(path), "--data", data, "--probe", "--per-class", "17", *flags])
    printed = capsys.readouterr().out
    assert f"linear probe, {'untrained network' if flags else 'checkpoint'}: accuracy" in printed
    assert "over 5 folds of 51 pictures" in printed
    assert seen == ([change(TINY, channels=1, classes=0)] if flags else [])
    assert float(printed.partition(": accuracy ")[2].split()[0]) > 60


def test_probe_separates_what_can_be_separated_and_nothing_else():
    rng = np.random.default_rng(0)
    labels = np.arange(100) % 4
    x = rng.normal(size=(100, 6)).astype(np.float32)
    by_chance, _ = finetune.probe(x, labels)
    x[:, :4] += 10 * np.eye(4)[labels]
    accuracy, _ = finetune.probe(x, labels)
    assert accuracy.min() == 100 and 5 < by_chance.mean() < 45


def test_fit_probe_is_at_its_minimum():
    """The gradient of the penalised loss, written out, is zero there."""
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(40, 3)), np.arange(40) % 2
    for penalty, weights in zip([0.1, 1], finetune.fit_probe(x, labels, [0.1, 1]).swapaxes(0, 1)):
        residual = jax.nn.softmax(x @ weights[:3] + weights[3]) - np.eye(2)[labels]
        np.testing.assert_allclose(x.T @ residual / 40 + penalty * weights[:3], 0, atol=1e-6)
        np.testing.assert_allclose(residual.mean(0), 0, atol=1e-6)


def test_no_picture_is_in_two_folds(data):
    images, labels = finetune.read_data(data, 3)
    assert images.shape == (57, 8, 8, 3) and sorted(np.bincount(labels)) == [17, 20, 20]
    assert len(np.unique(images.reshape(57, -1), axis=0)) == 57
    counts = [np.bincount(labels[finetune.folds_of(labels) == fold]) for fold in range(5)]
    assert np.ptp(counts, axis=0).max() == 1  # each class spread evenly


# ==== Mistakes ==============================================================================================


def complaint(module, capsys, *arguments):
    """The one line on standard error of a run that must end with exit status 2."""
    with pytest.raises(SystemExit) as stop:
        module.main([str(x) for x in arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1, error
    assert error.startswith(f"{module.__name__}.py: "), error
    return error


@pytest.mark.parametrize("module", [attention, finetune])
def test_bad_checkpoints(module, checkpoint, pictures, data, tmp_path, capsys):
    rest = pictures[:1] if module is attention else ["--data", data]
    found = complaint(module, capsys, tmp_path / "none.npz", *rest)
    assert "none.npz is not a readable .npz" in found
    assert "has no array embedding/kernel" in complaint(module, capsys, data, *rest)
    oblong = checkpoint(image_size=(8, 12))
    assert "6 rows of patches, which is no square: give --grid" in complaint(module, capsys, oblong, *rest)
    assert "6 rows of patches, not 2 x 2" in complaint(module, capsys, oblong, "--grid", "2x2", *rest)
    assert "--grid 6 is not of the form" in complaint(module, capsys, oblong, "--grid", "6", *rest)
    np.savez(tmp_path / "flat.npz", **{**vit.read_npz(checkpoint()), "embedding/kernel": np.zeros((48, 16))})
    assert "(48, 16), which is not of 4 axes" in complaint(module, capsys, tmp_path / "flat.npz", *rest)


def test_bad_pictures_and_figures(checkpoint, pictures, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no picture")
    run = lambda *arguments: complaint(attention, capsys, checkpoint(), *arguments)
    assert "text.png is not a readable picture" in run(pictures[0], tmp_path / "text.png")
    assert "none.png is not a readable picture" in run(tmp_path / "none.png")
    assert "cannot be written" in run(pictures[0], "--out", tmp_path / "none" / "figure.png")
    assert "cannot be written" in run(pictures[0], "--out", tmp_path / "figure.txt")
    two = checkpoint(channels=2)
    assert "has 2 channels" in complaint(attention, capsys, two, pictures[0])


def test_bad_data(checkpoint, data, tmp_path, capsys):
    path, images, labels = checkpoint(), *(vit.read_npz(data)[name] for name in ("images", "labels"))

    def run(images=images, labels=labels, flags=()):
        np.savez(tmp_path / "bad.npz", images=images, labels=labels)
        return complaint(finetune, capsys, path, "--data", tmp_path / "bad.npz", *flags)

    assert "none.npz is not" in complaint(finetune, capsys, path, "--data", tmp_path / "none.npz")
    assert "not images and labels" in complaint(finetune, capsys, path, "--data", path)
    assert "too few pictures: the smallest class has 1, not 5" in run(images[:21], labels[:21])
    assert "too few pictures: the smallest class has 17, not 18" in run(flags=["--per-class", "18"])
    assert "too few pictures: the smallest class has 0, not 5" in run(images[:1].repeat(60, 0))
    assert "all labels are alike" in run(labels=0 * labels)
    assert "images are float64" in run(images / 255)
    assert "labels are uint8 (59,)" in run(labels=labels[:59])
    assert "images have 2 channels, the checkpoint 3" in run(images[..., None].repeat(2, 3))


FLAGS = {
    "--steps 0": "--steps 0 is not at least 1",
    "--per-class 0": "--per-class 0 is not at least 1",
    "--learning-rate 0": "--learning-rate 0.0 is not above 0",
    "--size 9": "image_size=(9, 9)",
    "--mesh 2x2": "--mesh 2x2 is not of the form data=4,model=2",
    "--mesh data=0,model=1": "has an axis of no devices",
    "--mesh data=99,model=1": "needs 99 devices",
    "--mesh data=1,model=8": "is not a multiple of mesh axis model=8",
    "--batch 6 --accumulate 4": "--batch 6 is not a multiple of data x accumulate = 4",
    "--out none/tuned.npz": "--out none/tuned.npz cannot be written",
}


@pytest.mark.parametrize("flags", FLAGS)
def test_bad_flags(flags, checkpoint, data, capsys):
    assert FLAGS[flags] in complaint(finetune, capsys, checkpoint(), "--data", data, *flags.split())
