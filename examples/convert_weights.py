"""Weights of ViT and Mixer: official names to timm's or Hugging Face's, and back.

    python examples/convert_weights.py model.safetensors official.npz --from timm
    python examples/convert_weights.py model.safetensors official.npz --from huggingface
    python examples/convert_weights.py official.npz model.safetensors --to timm

    flat = from_library(read_arrays("model.safetensors"), "timm")
    config = vit.infer_config(flat, gelu="exact")
    params = vit.from_official(flat, config)

What      timm, Hugging Face and the official code store the same model under other names, with
          transposed kernels; timm keeps query, key and value in one array. Hugging Face's names are
          those of a saved ViTForImageClassification, such as google/vit-base-patch16-224; a saved
          ViTModel is read, too. The ending of a file says how it is read or written.
Check     No array tells the following. timm: model.blocks[0].attn.num_heads and mlp.act,
          model.norm.eps, and model.pretrained_cfg for the pictures. Hugging Face: config.json, and
          preprocessor_config.json for the pictures.
          Heads: --heads, by default the width divided by 64 up to a width of 1,024.
          GELU: by default exact in timm and Hugging Face, tanh in the official code. vit.py has
          Config.gelu, mixer.py tanh only.
          Epsilon of LayerNorm: 1e-6 here and in timm, 1e-12 by default in Hugging Face. With --to
          give the model layer_norm_eps=1e-6; with --from outputs differ a little.
          Pictures: vit.preprocess maps them to [-1, 1], the mean and deviation 0.5 of Google's
          files and of most in timm. DINO, DeiT and MAE need ImageNet's; official_weights in
          examples/real_vit.py shows how to fold them into the patch embedding.
          Pooling: a class token is read as what goes to the head. timm models that have one and
          average all the same (global_pool="avg", fc_norm=False) would be read wrongly.
Not here  Refused by name: timm's fc_norm (a LayerNorm after the mean of the patches), LayerScale,
          registers, distillation tokens, attention pooling; attention without biases; pre_logits in
          timm, and beside a head in Hugging Face. Pictures that are not square: call from_library.
Checked   Outputs of timm 1.0.31 and transformers 5.24 (tests/golden/convert_weights), random
          weights, within 1e-5 of the largest value, with the tanh GELU in timm's Mixer and
          layer_norm_eps=1e-6 in Hugging Face. `make test-network` builds larger models, and
          compares the gradient of the patch embedding, too. No released file was converted.
Needs     examples/requirements.txt (safetensors), for .safetensors only.
"""

import argparse
import contextlib
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

    kind says what lies below the name: "array" is one array; "norm" a scale and a bias; the others
    a kernel and a bias. "to heads" is a dense layer [D] -> [H,K], "from heads" one [H,K] -> [D].
    """

    kind: str
    official: str
    timm: str | None
    huggingface: str | None = None


BLOCK = "Transformer/encoderblock_{}"
ATTENTION = f"{BLOCK}/MultiHeadDotProductAttention_1"
HF_BLOCK = "vit.encoder.layer.{}"
# timm's attn.qkv stands here as attn.q, attn.k and attn.v: see split_qkv.
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
    Layer("dense", "pre_logits", None, "vit.pooler.dense"),  # of a ViTModel, which has no head
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
    """heads if given, else width / 64, as in Google's models up to L. Raises ValueError above."""
    if heads is None:
        require(
            width % 64 == 0 and width <= 1024,
            f"a width of {width} does not tell the number of heads: give --heads",
        )
        return width // 64
    require(width % heads == 0, f"a width of {width} is not a multiple of {heads} heads")
    return heads


def from_library(arrays, library, heads=None) -> dict:
    """Named numpy arrays of a library under the official names.

    They are ready for vit.from_official or mixer.from_official, which raise ValueError if one is
    missing. library: "timm" or "huggingface". heads: of a ViT; by default the width divided by 64.
    Raises ValueError for a name that has no place, and for heads that do not divide the width.
    """
    layers = layers_of(arrays)
    check_library(library, layers)
    if library == "timm":
        arrays = split_qkv(arrays)
    flat = {}
    for name, array in arrays.items():
        place = find(name, layers, library)
        if place is None and library == "huggingface":
            place = find(f"vit.{name}", layers, library)  # a saved ViTModel has no prefix
        require(place, refusal(name, layers, library))
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
        if layer.kind in ("to heads", "from heads"):
            count = number_of_heads(array.shape[-1], heads)
        flat[f"{official}/{part}"] = official_array(array, layer.kind, part, count)
    return flat


def refusal(name, layers, wanted):
    """Says why a name has no place among those wanted: a library's, or the official ones."""
    if wanted != "official" and find(name, layers, "official"):
        return f"{name} is an official name: such a file needs --to, not --from"
    for library in LIBRARIES:
        if library != wanted and find(name, layers, library):
            return f"{name} is one of {library}'s names: such a file needs --from {library}"
    return f"{name}: {'mixer.py' if layers is MIXER else 'vit.py'} has no such array"


def to_library(flat, library) -> dict:
    """The inverse of from_library; Hugging Face's names are those of ViTForImageClassification.

    Raises ValueError for arrays that are not a whole model, and for a layer that the library does
    not have.
    """
    layers = layers_of(flat)
    check_library(library, layers)
    check_official(flat)
    module = mixer if layers is MIXER else vit
    flat = module.released_names(flat)
    require(
        library != "huggingface" or "pre_logits/kernel" not in flat or "head/kernel" not in flat,
        "the file has pre_logits and a head; Hugging Face's ViTModel has pre_logits alone",
    )
    arrays = {}
    for name, array in flat.items():
        place = find(name, layers, "official")
        layer = place.layer
        template = getattr(layer, library)
        require(template, f"{name}: {library} has no such layer")
        theirs = template.format(place.block)
        if layer.kind == "array":
            arrays[theirs] = array
            continue
        part = "bias" if place.part == "bias" else "weight"
        arrays[f"{theirs}.{part}"] = torch_array(array, layer.kind, place.part)
    if library == "timm":
        arrays = join_qkv(arrays)
    return arrays


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
    # The library writes memory as it lies: a transposed view would come out scrambled.
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    try:
        module.save_file(arrays, partial, metadata={"format": "pt"})  # transformers wants to know
        partial.replace(path)
    except Exception as error:
        raise ValueError(f"{path} cannot be written: {error}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def check_files(source, target):
    """Raises ValueError for a missing source, unknown endings, and a target that is the source."""
    endings = " or ".join(ENDINGS)
    require(
        source.endswith(ENDINGS),
        f"{source} does not end with {endings}. A .pth or .bin becomes a .safetensors by "
        "safetensors.torch.save_file(torch.load(path, weights_only=True), target)",
    )
    require(target.endswith(ENDINGS), f"{target} does not end with {endings}")
    require(os.path.exists(source), f"{source} does not exist")
    same = os.path.exists(target) and os.path.samefile(source, target)
    require(not same, f"{target} is the file to read: choose another name to write")


def check_official(flat):
    """Raises ValueError unless the arrays are a whole model; returns its Config."""
    layers = layers_of(flat)
    module = mixer if layers is MIXER else vit
    for name in module.released_names(flat):
        require(find(name, layers, "official"), refusal(name, layers, "official"))
    config = module.infer_config(flat)
    module.from_official(flat, config)
    return config


def advice(config, library, written):
    """What a user has to set, since no array tells it. written: under the library's names."""
    if isinstance(config, mixer.Config):
        if written:
            return "official GELU: act_layer=functools.partial(torch.nn.GELU, approximate='tanh')"
        return "mixer.py has the tanh GELU, timm's Mixer by default the exact one: outputs differ"
    if not written:
        return 'if its GELU is exact: vit.infer_config(flat, gelu="exact"), train.py --gelu exact'
    if library == "timm":
        return f'timm: num_heads={config.heads}, and for the official GELU act_layer="gelu_tanh"'
    return (
        f"ViTConfig: num_attention_heads={config.heads}, layer_norm_eps=1e-6, and for the official "
        'GELU hidden_act="gelu_pytorch_tanh"'
    )


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
        require(args.heads is None or args.heads >= 1, f"--heads {args.heads} is not at least 1")
        require(
            args.heads is None or args.library_from,
            "--heads is for --from: the shapes of an official file tell them",
        )
        check_files(args.source, args.target)
        arrays = read_arrays(args.source)
        is_vit = layers_of(arrays) is VIT
        require(args.heads is None or is_vit, "--heads: a Mixer has none")
        if args.library_from:
            result = from_library(arrays, args.library_from, args.heads)
            config = check_official(result)
        else:
            config = check_official(arrays)
            result = to_library(arrays, args.library_to)
        write_arrays(args.target, result)
    except ValueError as error:
        print(f"convert_weights.py: {error}", file=sys.stderr)
        return 2
    if is_vit:
        assumed = " (assumed from the width)" if args.library_from and not args.heads else ""
        print(f"width {config.width}, {config.depth} blocks, {config.heads} heads{assumed}")
    print(advice(config, args.library_from or args.library_to, written=bool(args.library_to)))
    print(f"wrote {args.target}: {len(result)} arrays")
    return 0


if __name__ == "__main__":
    run_program(main)
