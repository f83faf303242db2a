"""Weights of ViT and Mixer between the official names, timm's and Hugging Face's.

    python examples/convert_weights.py model.safetensors timm_B_16.npz --from timm
    python examples/convert_weights.py model.safetensors google_B_16.npz --from huggingface
    python examples/convert_weights.py B_16.npz model.safetensors --to timm

    flat = from_library(read_arrays("model.safetensors"), "timm")
    config = vit.infer_config(flat, gelu="exact")
    params = vit.from_official(flat, config)

What      timm, Hugging Face and the official code store the same model under other names, with
          transposed kernels; timm keeps query, key and value in one array. Hugging Face's names are
          those of a saved ViTForImageClassification, such as google/vit-base-patch16-224; a saved
          ViTModel is read, too. The ending of a file says how it is read or written.
Not told  No array tells these. Look into timm's model.pretrained_cfg or Hugging Face's config.json.
          Heads: --heads, by default the width divided by 64 up to a width of 1,024.
          GELU: exact in timm and Hugging Face unless their settings say otherwise, tanh in the
          official files. In vit.py it is Config.gelu; mixer.py has tanh only.
          Epsilon of LayerNorm: 1e-6 in the official code and in timm. Hugging Face's default is
          1e-12: set layer_norm_eps=1e-6 for equal numbers.
          Pictures: vit.preprocess maps them to [-1, 1], the mean and deviation 0.5 of most timm
          files and of Google's. DINO, DeiT and MAE need ImageNet's, which examples/real_vit.py
          folds into the patch embedding.
          Pooling: a file with a class token is read as a model that passes it to the head.
Not here  What vit.py has no place for is refused by name: timm's fc_norm (a LayerNorm after the
          mean of the patches), LayerScale, registers, distillation tokens, attention pooling.
Checked   Outputs against timm 1.0 and transformers 5.24 (tests/golden/convert_weights), random
          weights; `make test-network` builds the libraries' models anew, compares a gradient, too,
          and loads converted files into them. All within 1e-5 of the largest value. No released
          file was converted.
Needs     examples/requirements.txt (safetensors), for .safetensors only.
"""

import argparse
import os
import pathlib
import re
import sys
from typing import NamedTuple

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import mixer  # noqa: E402, found from any folder by the line above
import vit  # noqa: E402
from vit import read_npz, require, run_program, write_npz  # noqa: E402

LIBRARIES = ("timm", "huggingface")
ENDINGS = (".npz", ".safetensors")


class Layer(NamedTuple):
    """The names of a layer, {} standing for the number of a block; None where it has none.

    kind: "array" has no parts; "norm", "dense" and "patches" have a kernel or scale, and a bias;
    "to heads" is a dense layer [D] -> [H,K], "from heads" one [H,K] -> [D].
    """

    kind: str
    official: str
    timm: str | None
    huggingface: str | None = None


BLOCK = "Transformer/encoderblock_{}"
ATTENTION = f"{BLOCK}/MultiHeadDotProductAttention_1"
HF_BLOCK = "vit.encoder.layer.{}"
VIT = [
    Layer("array", "cls", "cls_token", "vit.embeddings.cls_token"),
    Layer(
        "array",
        "Transformer/posembed_input/pos_embedding",
        "pos_embed",
        "vit.embeddings.position_embeddings",
    ),
    Layer("patches", "embedding", "patch_embed.proj", "vit.embeddings.patch_embeddings.projection"),
    Layer("norm", f"{BLOCK}/LayerNorm_0", "blocks.{}.norm1", f"{HF_BLOCK}.layernorm_before"),
    Layer(
        "to heads",
        f"{ATTENTION}/query",
        "blocks.{}.attn.q",
        f"{HF_BLOCK}.attention.attention.query",
    ),
    Layer(
        "to heads", f"{ATTENTION}/key", "blocks.{}.attn.k", f"{HF_BLOCK}.attention.attention.key"
    ),
    Layer(
        "to heads",
        f"{ATTENTION}/value",
        "blocks.{}.attn.v",
        f"{HF_BLOCK}.attention.attention.value",
    ),
    Layer(
        "from heads",
        f"{ATTENTION}/out",
        "blocks.{}.attn.proj",
        f"{HF_BLOCK}.attention.output.dense",
    ),
    Layer("norm", f"{BLOCK}/LayerNorm_2", "blocks.{}.norm2", f"{HF_BLOCK}.layernorm_after"),
    Layer(
        "dense",
        f"{BLOCK}/MlpBlock_3/Dense_0",
        "blocks.{}.mlp.fc1",
        f"{HF_BLOCK}.intermediate.dense",
    ),
    Layer("dense", f"{BLOCK}/MlpBlock_3/Dense_1", "blocks.{}.mlp.fc2", f"{HF_BLOCK}.output.dense"),
    Layer("norm", "Transformer/encoder_norm", "norm", "vit.layernorm"),
    Layer("dense", "pre_logits", None, "vit.pooler.dense"),  # in files without a head
    Layer("dense", "head", "head", "classifier"),
]
MIXER = [
    Layer("patches", "stem", "stem.proj"),
    Layer("norm", "MixerBlock_{}/LayerNorm_0", "blocks.{}.norm1"),
    Layer("dense", "MixerBlock_{}/token_mixing/Dense_0", "blocks.{}.mlp_tokens.fc1"),
    Layer("dense", "MixerBlock_{}/token_mixing/Dense_1", "blocks.{}.mlp_tokens.fc2"),
    Layer("norm", "MixerBlock_{}/LayerNorm_1", "blocks.{}.norm2"),
    Layer("dense", "MixerBlock_{}/channel_mixing/Dense_0", "blocks.{}.mlp_channels.fc1"),
    Layer("dense", "MixerBlock_{}/channel_mixing/Dense_1", "blocks.{}.mlp_channels.fc2"),
    Layer("norm", "pre_head_layer_norm", "norm"),
    Layer("dense", "head", "head"),
]

# ==== Arrays ======================================================================================


def official_array(array, kind, part, heads):
    """An array of PyTorch in the official form. part: "kernel", "scale" or "bias"."""
    if part == "kernel" and kind == "patches":
        return array.transpose(2, 3, 1, 0)  # [D,C,h,w] -> [h,w,C,D]
    if part == "kernel":
        array = array.T  # inputs first
    if kind == "to heads":
        return array.reshape(*array.shape[:-1], heads, -1)  # [D,D] -> [D,H,K], [D] -> [H,K]
    if part == "kernel" and kind == "from heads":
        return array.reshape(heads, -1, array.shape[-1])  # [D,D] -> [H,K,D]
    return array


def torch_array(array, kind, part):
    """The inverse of official_array."""
    if part == "kernel" and kind == "patches":
        return array.transpose(3, 2, 0, 1)  # [h,w,C,D] -> [D,C,h,w]
    if kind == "to heads":
        array = array.reshape(*array.shape[:-2], -1)  # [D,H,K] -> [D,D], [H,K] -> [D]
    if part == "kernel" and kind == "from heads":
        array = array.reshape(-1, array.shape[-1])  # [H,K,D] -> [D,D]
    if part == "kernel":
        array = array.T  # outputs first
    return array


def split_qkv(arrays):
    """timm's arrays attn.qkv as three, attn.q, attn.k and attn.v."""
    split = {}
    for name, array in arrays.items():
        if ".attn.qkv." in name:
            for letter, part in zip("qkv", np.split(array, 3)):
                split[name.replace(".qkv.", f".{letter}.")] = part
        else:
            split[name] = array
    return split


def join_qkv(arrays):
    """The inverse of split_qkv."""
    joined = {}
    for name, array in arrays.items():
        if ".attn.q." in name:
            parts = [arrays[name.replace(".q.", f".{letter}.")] for letter in "qkv"]
            joined[name.replace(".q.", ".qkv.")] = np.concatenate(parts)
        elif ".attn.k." not in name and ".attn.v." not in name:
            joined[name] = array
    return joined


# ==== Names =======================================================================================


class Place(NamedTuple):
    """Where a name belongs."""

    layer: Layer
    block: str | None  # its number
    part: str | None  # what follows the layer's name: "weight", "kernel", ...


def find(name, layers, library) -> Place | None:
    """The Place of a name in "timm", "huggingface" or "official"; None if it has none."""
    separator = "/" if library == "official" else r"\."
    for layer in layers:
        template = getattr(layer, library)
        if template is None:
            continue
        pattern = re.escape(template).replace(r"\{\}", r"(?P<block>\d+)")
        if layer.kind != "array":
            pattern += rf"{separator}(?P<part>\w+)"
        match = re.fullmatch(pattern, name)
        if match:
            groups = match.groupdict()
            return Place(layer, groups.get("block"), groups.get("part"))
    return None


def layers_of(names):
    """VIT or MIXER, by the names of the arrays."""
    mixes = any("token_mixing" in name or "mlp_tokens" in name for name in names)
    return MIXER if mixes else VIT


def check_library(library, layers):
    """Raises ValueError for a library that does not have the model."""
    require(library in LIBRARIES, f"{library!r} is not one of {', '.join(LIBRARIES)}")
    require(
        layers is VIT or library == "timm",
        "the arrays are those of a Mixer, which Hugging Face does not have",
    )


def number_of_heads(width, heads):
    """heads, or by default what released models have. Raises ValueError for an unusual width."""
    if heads is None:
        require(
            width % 64 == 0 and width <= 1024,
            f"a width of {width} does not tell the number of heads: give --heads",
        )
        return width // 64
    require(
        heads >= 1 and width % heads == 0, f"a width of {width} is no multiple of {heads} heads"
    )
    return heads


def from_library(arrays, library, heads=None) -> dict:
    """Named numpy arrays of a library under the official names, for vit.from_official or mixer's.

    library: "timm" or "huggingface". heads: of a ViT; by default the width divided by 64. Raises
    ValueError for a name that vit.py or mixer.py has no place for; vit.from_official and
    mixer.from_official raise for one that is missing.
    """
    layers = layers_of(arrays)
    check_library(library, layers)
    if library == "timm":
        arrays = split_qkv(arrays)
    elif not any(name.startswith("vit.") for name in arrays):  # a ViTModel
        arrays = {f"vit.{name}": array for name, array in arrays.items()}
    flat = {}
    for name, array in arrays.items():
        place = find(name, layers, library)
        if place is None:
            raise ValueError(f"{name} is no array of {library}'s that {reason(name, layers)}")
        layer = place.layer
        official = layer.official.format(place.block)
        if layer.kind == "array":
            flat[official] = array
            continue
        require(place.part in ("weight", "bias"), f"{name} is neither a weight nor a bias")
        part = "bias"
        if place.part == "weight":
            part = "scale" if layer.kind == "norm" else "kernel"
        count = None
        if "heads" in layer.kind:
            count = number_of_heads(array.shape[-1], heads)
        flat[f"{official}/{part}"] = official_array(array, layer.kind, part, count)
    return flat


def reason(name, layers):
    """The end of the sentence that says why a name is refused."""
    for other in (*LIBRARIES, "official"):
        if find(name, layers, other):
            return f"is read here: it is one of {other}"
    return f"{'mixer.py' if layers is MIXER else 'vit.py'} has a place for"


def to_library(flat, library) -> dict:
    """The inverse of from_library. Raises ValueError for a layer that the library does not have."""
    layers = layers_of(flat)
    check_library(library, layers)
    module = mixer if layers is MIXER else vit
    flat = module.released_names(flat)
    require(
        library != "huggingface" or "pre_logits/kernel" not in flat or "head/kernel" not in flat,
        "pre_logits: Hugging Face has this layer in a model without a head only",
    )
    arrays = {}
    for name, array in flat.items():
        place = find(name, layers, "official")
        require(place, f"{name} is no official name")
        layer = place.layer
        template = getattr(layer, library)
        require(template, f"{name}: {library} has no such layer")
        theirs = template.format(place.block)
        if layer.kind == "array":
            arrays[theirs] = array
            continue
        require(place.part in ("kernel", "scale", "bias"), f"{name} is no official name")
        part = "bias" if place.part == "bias" else "weight"
        arrays[f"{theirs}.{part}"] = torch_array(array, layer.kind, place.part)
    if library == "timm":
        arrays = join_qkv(arrays)
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


# ==== Files =======================================================================================


def safetensors():
    """The module safetensors.numpy. Raises ValueError if it is not installed."""
    try:
        import safetensors.numpy as module
    except ImportError:
        raise ValueError(".safetensors files need: pip install safetensors") from None
    return module


def read_arrays(path) -> dict:
    """The arrays of an .npz or .safetensors, float32. Raises ValueError if it is not readable."""
    require(pathlib.Path(path).exists(), f"{path} does not exist")
    if str(path).endswith(".safetensors"):
        module = safetensors()
        try:
            arrays = module.load_file(path)
        except Exception as error:  # the library, numpy and the system raise different classes
            raise ValueError(f"{path} is not a readable .safetensors: {error}") from None
    else:
        arrays = read_npz(path)
    for name, array in arrays.items():
        is_float = array.dtype.kind == "f" or array.dtype.name == "bfloat16"
        require(is_float, f"{path}: {name} is {array.dtype}, not floating")
        arrays[name] = array.astype(np.float32)
    return arrays


def write_arrays(path, arrays):
    """Writes an .npz or .safetensors. Raises ValueError if it cannot be written."""
    if not str(path).endswith(".safetensors"):
        write_npz(path, arrays)
        return
    module = safetensors()
    partial = pathlib.Path(f"{path}.{os.getpid()}.part")
    try:
        module.save_file(arrays, partial, metadata={"format": "pt"})  # transformers wants to know
        partial.replace(path)
    except Exception as error:
        raise ValueError(f"{path} cannot be written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def check_files(source, target):
    """Raises ValueError for endings that are unknown, and for a target that is the source."""
    for path in (source, target):
        require(
            path.endswith(ENDINGS),
            f"{path} does not end with {' or '.join(ENDINGS)}. A .pth or .bin becomes one by "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), target)",
        )
    same = os.path.exists(target) and os.path.samefile(source, target)
    require(not same, f"{target} is the file to read: choose another name to write")


def check_official(flat, gelu):
    """Raises ValueError unless the arrays are a whole model; returns its Config."""
    if layers_of(flat) is MIXER:
        config = mixer.infer_config(flat)
        mixer.from_official(flat, config)
    else:
        config = vit.infer_config(flat, gelu=gelu)
        vit.from_official(flat, config)
    return config


def main(argv=None) -> int:
    """Returns the exit status: 0, or 2 for bad input, which is told in one line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", help=".npz or .safetensors to read")
    parser.add_argument("target", help=".npz or .safetensors to write")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--from", dest="library_from", choices=LIBRARIES, help="whose names are read")
    what.add_argument("--to", dest="library_to", choices=LIBRARIES, help="whose names to write")
    parser.add_argument("--heads", type=int, help="of a ViT to read (default: its width / 64)")
    args = parser.parse_args(argv)
    try:
        require(args.heads is None or args.library_from, "--heads: an official file tells them")
        check_files(args.source, args.target)
        arrays = read_arrays(args.source)
        is_vit = layers_of(arrays) is VIT
        require(args.heads is None or is_vit, "--heads: a Mixer has none")
        if args.library_from:
            result = from_library(arrays, args.library_from, args.heads)
            config = check_official(result, gelu="exact")
        else:
            config = check_official(arrays, gelu="tanh")
            result = to_library(arrays, args.library_to)
        write_arrays(args.target, result)
    except ValueError as error:
        print(f"convert_weights.py: {error}", file=sys.stderr)
        return 2
    print(config)
    if args.library_from and is_vit:
        print('read it with vit.infer_config(flat, gelu="exact"), or train.py --gelu exact')
    if args.library_to == "timm":
        print('the official GELU: timm.create_model(..., act_layer="gelu_tanh")')
    if args.library_to == "huggingface":
        print(
            'the official GELU and LayerNorm: hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6'
        )
    print(f"wrote {args.target}: {len(result)} arrays")
    return 0


if __name__ == "__main__":
    run_program(main)
