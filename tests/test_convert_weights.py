"""examples/convert_weights.py: outputs of timm and transformers, there and back, errors."""

import functools
import importlib
import importlib.util
import subprocess
import sys

import jax
import numpy as np
import pytest

import mixer
import vit
from common import ROOT, close, golden, part

sys.path.insert(0, str(ROOT / "examples"))
import convert_weights as convert  # noqa: E402, found by the line above

VIT = vit.Config(
    image_size=8, patch_size=4, width=16, depth=2, heads=2, mlp=24, classes=3, gelu="exact"
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


# ==== Golden: outputs of the libraries ============================================================


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("timm_vit", vit),
        ("timm_mixer", mixer),
        ("huggingface_vit", vit),
        ("huggingface_vit_model", vit),
    ],
)
def test_golden_outputs_of_the_libraries(name, module):
    """Converted weights give the libraries' outputs, and come back as they were."""
    meta, arrays = golden("convert_weights", name)
    weights = part(arrays, "weights/")
    library = name.partition("_")[0]
    flat = convert.from_library(weights, library, meta.get("heads"))
    fields = {"gelu": "exact"} if module is vit else {}
    config = module.infer_config(flat, **fields)
    forward = jax.jit(module.forward, static_argnames="config")
    close(
        forward(module.from_official(flat, config), arrays["images"], config), arrays["out"], 1e-5
    )
    if name == "huggingface_vit_model":
        weights = {f"vit.{name}": array for name, array in weights.items()}
    assert_same(convert.to_library(flat, library), weights)


# ==== There and back, heads =======================================================================


@pytest.mark.parametrize(
    ("module", "config", "library"),
    [
        (vit, VIT, "huggingface"),
        (vit, vit.Config(**{**vars(VIT), "pool": "gap", "classes": 0}), "timm"),
        (mixer, MIXER, "timm"),
    ],
)
def test_there_and_back(module, config, library):
    flat = random_official(module, config)
    theirs = convert.to_library(flat, library)
    heads = config.heads if module is vit else None
    assert_same(convert.from_library(theirs, library, heads), flat)
    prefixed = {f"params/{name}": array for name, array in flat.items()}
    assert_same(convert.to_library(prefixed, library), theirs)


def test_heads_are_the_width_divided_by_64_where_released_models_have_that():
    config = vit.Config(image_size=8, patch_size=4, width=192, depth=1, heads=3, mlp=8, classes=0)
    flat = random_official(vit, config)
    assert_same(convert.from_library(convert.to_library(flat, "timm"), "timm"), flat)
    for width in (1280, 100):  # ViT-H has 16, not 20
        with pytest.raises(ValueError, match=f"a width of {width} does not tell the number of"):
            convert.number_of_heads(width, None)
    assert convert.number_of_heads(1280, 16) == 16


def test_a_part_of_a_model_is_refused():
    flat = random_official(vit, VIT)
    del flat["Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/bias"]
    with pytest.raises(ValueError, match="encoderblock_1/.*/query/bias is missing"):
        convert.to_library(flat, "timm")


# ==== Program and errors ==========================================================================


def test_program_converts_files_of_both_kinds(tmp_path, capsys):
    flat = random_official(vit, VIT)
    vit.write_npz(tmp_path / "official.npz", flat)

    def run(source, target, *flags):
        return convert.main([str(tmp_path / source), str(tmp_path / target), *flags])

    assert run("official.npz", "hf.safetensors", "--to", "huggingface") == 0
    text = capsys.readouterr().out
    assert f"{len(flat)} arrays" in text and "num_attention_heads=2, layer_norm_eps=1e-6" in text
    safe_open = importlib.import_module("safetensors").safe_open
    with safe_open(tmp_path / "hf.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert run("hf.safetensors", "back.npz", "--from", "huggingface", "--heads", "2") == 0
    assert 'vit.infer_config(flat, gelu="exact")' in capsys.readouterr().out
    assert_same(vit.read_npz(tmp_path / "back.npz"), flat)
    assert run("hf.safetensors", "back.safetensors", "--from", "huggingface", "--heads", "2") == 0
    assert_same(convert.read_arrays(tmp_path / "back.safetensors"), flat)

    vit.write_npz(tmp_path / "mixer.npz", random_official(mixer, MIXER))
    assert run("mixer.npz", "timm.npz", "--to", "timm") == 0
    assert "act_layer=functools.partial(torch.nn.GELU" in capsys.readouterr().out
    assert run("timm.npz", "back.npz", "--from", "timm") == 0
    assert "mixer.py has the tanh GELU" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.part"))


def test_half_precision_becomes_float32(tmp_path):
    x = np.arange(4, dtype=np.float16)
    vit.write_npz(tmp_path / "x.npz", {"x": x})
    assert convert.read_arrays(tmp_path / "x.npz")["x"].dtype == np.float32
    convert.write_arrays(tmp_path / "x.safetensors", {"x": x})
    assert convert.read_arrays(tmp_path / "x.safetensors")["x"].dtype == np.float32


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (
            {"fc_norm.weight": np.ones(16)},
            "--from timm",
            "fc_norm.weight: vit.py has no such array",
        ),
        ({"norm.weight": None}, "--from timm", "encoder_norm/scale is missing"),
        ({"norm.running": np.ones(16)}, "--from timm", "norm.running is neither a weight nor"),
        ({"norm.weight": np.ones(16, bool)}, "--from timm", "norm.weight is bool, not floating"),
        ({}, "--from timm --heads 3", "a width of 16 is not a multiple of 3 heads"),
        ({}, "--from timm --heads 0", "--heads 0 is not at least 1"),
        ({}, "--from huggingface", "is one of timm's names: such a file needs --from timm"),
        ({}, "--to huggingface", "is one of timm's names: such a file needs --from timm"),
        ({}, "--to timm --heads 2", "--heads is for --from: the shapes of"),
    ],
)
def test_mistakes_are_told_in_one_line(change, flags, message, tmp_path, capsys):
    arrays = {**convert.to_library(random_official(vit, VIT), "timm"), **change}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    vit.write_npz(tmp_path / "timm.npz", arrays)
    if "--from" in flags and "--heads" not in flags:
        flags += " --heads 2"
    paths = str(tmp_path / "timm.npz"), str(tmp_path / "out.npz")
    assert convert.main([*paths, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("convert_weights.py: ") and message in error
    assert len(error.splitlines()) == 1 and not (tmp_path / "out.npz").exists()


def test_files_that_cannot_be_converted(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refused(message, source, target, *flags):
        assert convert.main([source, target, *flags]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1

    vit.write_npz("vit.npz", random_official(vit, VIT))
    vit.write_npz("mixer.npz", random_official(mixer, MIXER))
    with_layer = vit.Config(**{**vars(VIT), "representation": 5})
    vit.write_npz("layer.npz", random_official(vit, with_layer))
    (tmp_path / "bad.safetensors").write_bytes(b"not one")
    (tmp_path / "folder.safetensors").mkdir()

    to_timm = "--to", "timm"
    to_hugging_face = "--to", "huggingface"
    refused("none.npz does not exist", "none.npz", "vit.npz", *to_timm)
    refused("is not a readable .safetensors", "bad.safetensors", "out.npz", *to_timm)
    refused("x.pth does not end with .npz or", "x.pth", "out.npz", *to_timm)
    refused("out.bin does not end with .npz or", "vit.npz", "out.bin", *to_timm)
    refused("vit.npz is the file to read", "vit.npz", "./vit.npz", *to_timm)
    refused("cannot be written", "vit.npz", "folder.safetensors", *to_timm)
    refused("cannot be written", "vit.npz", "mixer.npz/x.safetensors", *to_timm)
    refused("pre_logits/bias: timm has no such layer", "layer.npz", "out.npz", *to_timm)
    refused("the file has pre_logits and a head", "layer.npz", "out.npz", *to_hugging_face)
    refused("a Mixer, which Hugging Face does not", "mixer.npz", "out.npz", *to_hugging_face)
    heads = "--from", "timm", "--heads", "2"
    refused("--heads: a Mixer has none", "mixer.npz", "out.npz", *heads)
    refused("is an official name: such a file needs --to", "vit.npz", "out.npz", *heads)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)  # import fails
    refused("need: pip install safetensors", "bad.safetensors", "out.npz", *to_timm)
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob("out*"))


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
    flat = convert.from_library(state_of(model), "timm")
    config = vit.infer_config(flat, gelu="exact")
    compare(vit, config, flat, model, lambda logits: logits, "patch_embed.proj.weight")
    back = convert.to_library(flat, "timm")
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
    flat = convert.from_library(state_of(model), "timm")
    config = mixer.infer_config(flat)
    compare(mixer, config, flat, model, lambda logits: logits, "stem.proj.weight")
    assert_same(convert.to_library(flat, "timm"), state_of(model))


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
    flat = convert.from_library(arrays, "huggingface", heads=4)
    config = vit.infer_config(flat, gelu="exact")
    name = "vit.embeddings.patch_embeddings.projection.weight"
    compare(vit, config, flat, model, lambda output: output.logits, name)
    back = convert.to_library(flat, "huggingface")
    convert.write_arrays(tmp_path / "model.safetensors", back)
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    assert_same(state_of(again), state_of(model))
