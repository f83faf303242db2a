"""examples/convert_weights.py: names and shapes by hand, there and back, beside the libraries."""

import functools
import importlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import mixer
import vit
from common import ROOT, close

sys.path.insert(0, str(ROOT / "examples"))
import convert_weights as convert  # noqa: E402, found by the line above

VIT = vit.Config(
    image_size=8,
    patch_size=4,
    width=16,
    depth=2,
    heads=2,
    mlp=24,
    classes=3,
    representation=5,
    gelu="exact",
)
MIXER = mixer.Config(
    image_size=8, patch_size=4, width=16, depth=2, tokens_mlp=6, channels_mlp=24, classes=3
)


def random_official(module, config, seed=0):
    """Random weights under the official names."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(functools.partial(module.init_params, config=config), jax.random.key(0))
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)
    return module.to_official(params, config)


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


# ==== By hand =====================================================================================


def test_arrays_of_timm_by_hand():
    """Of a dense layer y = x W official, y = W x in PyTorch; heads lie one after the other."""
    flat = random_official(vit, VIT)
    theirs = convert.from_official(flat, "timm")
    block = "Transformer/encoderblock_1"
    attention = f"{block}/MultiHeadDotProductAttention_1"
    rng = np.random.default_rng(1)
    x = rng.standard_normal(16, np.float32)
    qkv = theirs["blocks.1.attn.qkv.weight"] @ x + theirs["blocks.1.attn.qkv.bias"]
    for part, name in zip(np.split(qkv, 3), ("query", "key", "value")):
        kernel = flat[f"{attention}/{name}/kernel"]
        want = np.einsum("d,dhk->hk", x, kernel) + flat[f"{attention}/{name}/bias"]
        close(part.reshape(2, 8), want, 1e-6)
    heads = rng.standard_normal((2, 8), np.float32)
    want = np.einsum("hk,hkd->d", heads, flat[f"{attention}/out/kernel"])
    close(theirs["blocks.1.attn.proj.weight"] @ heads.ravel(), want, 1e-6)
    want = x @ flat[f"{block}/MlpBlock_3/Dense_0/kernel"]
    close(theirs["blocks.1.mlp.fc1.weight"] @ x, want, 1e-6)
    patch = theirs["patch_embed.proj.weight"]  # [D,C,h,w]
    np.testing.assert_array_equal(patch[7, 2, 1, 3], flat["embedding/kernel"][1, 3, 2, 7])
    np.testing.assert_array_equal(theirs["norm.weight"], flat["Transformer/encoder_norm/scale"])
    np.testing.assert_array_equal(theirs["pre_logits.fc.bias"], flat["pre_logits/bias"])


@pytest.mark.parametrize(
    ("module", "config", "library"),
    [
        (vit, VIT, "timm"),
        (vit, vit.Config(**{**vars(VIT), "representation": None}), "huggingface"),
        (vit, vit.Config(**{**vars(VIT), "pool": "gap", "classes": 0}), "timm"),
        (mixer, MIXER, "timm"),
    ],
)
def test_there_and_back(module, config, library):
    flat = random_official(module, config)
    theirs = convert.from_official(flat, library)
    heads = config.heads if module is vit else None
    assert_same(convert.to_official(theirs, library, heads), flat)
    prefixed = {f"params/{name}": array for name, array in flat.items()}
    assert_same(convert.from_official(prefixed, library), theirs)


def test_heads_are_the_width_divided_by_64():
    config = vit.Config(image_size=8, patch_size=4, width=192, depth=1, heads=3, mlp=8, classes=0)
    flat = random_official(vit, config)
    assert_same(convert.to_official(convert.from_official(flat, "timm"), "timm"), flat)


# ==== Program and errors ==========================================================================


def test_program_converts_files_of_both_kinds(tmp_path, capsys):
    flat = random_official(mixer, MIXER)
    vit.write_npz(tmp_path / "official.npz", flat)

    def run(source, target, *flags):
        return convert.main([str(tmp_path / source), str(tmp_path / target), *flags])

    assert run("official.npz", "timm.safetensors", "--to", "timm") == 0
    assert f"{len(flat)} arrays" in capsys.readouterr().out
    assert run("timm.safetensors", "back.npz", "--from", "timm") == 0
    assert "Config(image_size=(8, 8)" in capsys.readouterr().out
    assert_same(vit.read_npz(tmp_path / "back.npz"), flat)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        ({"fc_norm.weight": np.ones(16)}, "--from timm", "fc_norm.weight is unknown: no array of"),
        ({"norm.weight": None}, "--from timm", "encoder_norm/scale is missing"),
        ({"norm.running": np.ones(16)}, "--from timm", "norm.running is unknown: it is no weight"),
        ({}, "--from timm --heads 3", "does not divide into 3 heads"),
        ({}, "--from timm --heads 0", "--heads 0 is not at least 1"),
        ({}, "--from huggingface", "is unknown: no array of this model has that name"),
    ],
)
def test_mistakes_are_told_in_one_line(change, flags, message, tmp_path, capsys):
    arrays = {**convert.from_official(random_official(vit, VIT), "timm"), **change}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    vit.write_npz(tmp_path / "timm.npz", arrays)
    flags = ["--heads", "2", *flags.split()]
    assert convert.main([str(tmp_path / "timm.npz"), str(tmp_path / "out.npz"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("convert_weights.py: ") and message in error
    assert len(error.splitlines()) == 1 and not (tmp_path / "out.npz").exists()


def test_files_that_cannot_be_converted(tmp_path, capsys):
    def refused(message, source, *flags):
        assert convert.main([str(source), str(tmp_path / "out.npz"), *flags]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error) and len(error.splitlines()) == 1

    refused("none.safetensors does not exist", tmp_path / "none.safetensors", "--from", "timm")
    (tmp_path / "bad.safetensors").write_bytes(b"not one")
    refused("is not a readable .safetensors", tmp_path / "bad.safetensors", "--from", "timm")
    vit.write_npz(tmp_path / "vit.npz", random_official(vit, VIT))
    (tmp_path / "folder.safetensors").mkdir()
    flat = convert.from_official(random_official(mixer, MIXER), "timm")
    with pytest.raises(ValueError, match="folder.safetensors cannot be written"):
        convert.write_arrays(tmp_path / "folder.safetensors", flat)
    assert not list(tmp_path.glob("*.part"))
    refused(
        "pre_logits/.*: huggingface has no place for it",
        tmp_path / "vit.npz",
        "--to",
        "huggingface",
    )


# ==== Beside the libraries ========================================================================


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Installs torch, timm and transformers, if they are not here, into a folder of their own."""
    missing = []
    for name in ("torch", "timm", "transformers"):
        if importlib.util.find_spec(name) is None:
            missing.append(name)
    with pytest.MonkeyPatch.context() as patch:
        if missing:
            folder = str(tmp_path_factory.mktemp("packages"))
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", folder]
            subprocess.run([*pip, *missing], check=True, timeout=1800)
            patch.setattr(sys, "path", [*sys.path, folder])
        yield


def compare(module, config, flat, model, logits_of, name_of_patches):
    """Logits, and the gradient of a weighted sum of them by the kernel of the patches."""
    torch = importlib.import_module("torch")
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, *config.image_size, 3)).astype(np.float32)
    weights = rng.standard_normal((2, config.classes), np.float32)
    params = module.from_official(flat, config)

    def weighted(params):
        logits = module.forward(params, images, config)
        return (logits * weights).sum(), logits

    grads, logits = jax.jit(jax.grad(weighted, has_aux=True))(params)
    model.eval()
    theirs = logits_of(model(torch.tensor(images.transpose(0, 3, 1, 2))))
    close(logits, theirs.detach().numpy(), 1e-5)
    (theirs * torch.tensor(weights)).sum().backward()
    (gradient,) = [p.grad.numpy() for n, p in model.named_parameters() if n == name_of_patches]
    close(grads["embed"]["kernel"], gradient.transpose(2, 3, 1, 0), 1e-5)


def randomized(model):
    """The model with random numbers in every array: some begin with zeros or ones."""
    torch = importlib.import_module("torch")
    torch.manual_seed(0)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.2)
    return model


def state_of(model):
    return {name: array.numpy() for name, array in model.state_dict().items()}


@pytest.mark.network
@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_small_patch32_224", {"num_classes": 7}),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False, "fc_norm": False}),
        ("vit_base_patch16_224", {"depth": 2}),
    ],
)
def test_timm_vit_gives_the_same(name, options):
    timm = importlib.import_module("timm")
    torch = importlib.import_module("torch")
    options = {"img_size": 64, "depth": 3, "num_classes": 5, **options}
    model = randomized(timm.create_model(name, **options))
    flat = convert.to_official(state_of(model), "timm")
    config = vit.infer_config(flat, gelu="exact")
    compare(vit, config, flat, model, lambda logits: logits, "patch_embed.proj.weight")
    back = convert.from_official(flat, "timm")
    other = timm.create_model(name, **options)
    other.load_state_dict({name: torch.tensor(array) for name, array in back.items()})
    assert_same(state_of(other), state_of(model))


@pytest.mark.network
@pytest.mark.usefixtures("packages")
def test_timm_mixer_gives_the_same():
    timm = importlib.import_module("timm")
    torch = importlib.import_module("torch")
    tanh = functools.partial(torch.nn.GELU, approximate="tanh")
    options = {"img_size": 64, "num_classes": 5, "act_layer": tanh}
    model = randomized(timm.create_model("mixer_s16_224", **options))
    flat = convert.to_official(state_of(model), "timm")
    config = mixer.infer_config(flat)
    compare(mixer, config, flat, model, lambda logits: logits, "stem.proj.weight")
    assert_same(convert.from_official(flat, "timm"), state_of(model))


@pytest.mark.network
@pytest.mark.usefixtures("packages")
def test_hugging_face_vit_gives_the_same(tmp_path):
    """With the official epsilon of LayerNorm: its own default is 1e-12."""
    transformers = importlib.import_module("transformers")
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            **sizes, num_hidden_layers=3, image_size=32, patch_size=8, num_labels=5,
            layer_norm_eps=1e-6,
        )
    )  # fmt: skip
    randomized(model).save_pretrained(tmp_path)
    arrays = convert.read_arrays(tmp_path / "model.safetensors")
    flat = convert.to_official(arrays, "huggingface", heads=4)
    config = vit.infer_config(flat, gelu="exact")
    name = "vit.embeddings.patch_embeddings.projection.weight"
    compare(vit, config, flat, model, lambda output: output.logits, name)
    back = convert.from_official(flat, "huggingface")
    convert.write_arrays(tmp_path / "model.safetensors", back)
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    assert_same(state_of(again), state_of(model))
