"""Weights of ViT and Mixer between the official names, timm's and Hugging Face's.

    python examples/convert_weights.py vit_base.safetensors B_16.npz --from timm
    python examples/convert_weights.py google_vit.safetensors B_16.npz --from huggingface
    python examples/convert_weights.py B_16.npz vit_base.safetensors --to timm

    flat = to_official(read_arrays("vit_base.safetensors"), "timm")
    config = vit.infer_config(flat, gelu="exact")
    params = vit.from_official(flat, config)

What      Each file holds the same model: arrays have other names, kernels are transposed, and timm
          keeps query, key and value in one array. The official names are those of vit.py and
          mixer.py. Hugging Face's are those of its files (google/vit-base-patch16-224), for
          ViTForImageClassification. Files are .npz or .safetensors, by their ending.
Differs   No array tells three things. GELU: timm and Hugging Face compute it exactly, for which
          vit.py has Config(gelu="exact"); mixer.py has the official approximation only, from which
          the outputs of timm's Mixer differ a little. The epsilon of LayerNorm: 1e-6 in the
          official code and in timm, 1e-12 by default in Hugging Face (layer_norm_eps). The number
          of heads: --heads, by default the width divided by 64, as in all released models but H/14,
          which has 16.
Not here  A LayerNorm behind the mean of the patches (timm's fc_norm), where the official code has
          one before it: such a model is refused by name, and so is all else that is unknown.
Checked   Outputs and a gradient against timm 1.0 and transformers 5.24 with random weights, in
          `make test-network`: within 1e-5 of the largest value.
Needs     examples/requirements.txt (safetensors), for .safetensors only.
"""

import argparse
import pathlib
import re
import sys

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import mixer  # noqa: E402, found from any folder by the line above
import vit  # noqa: E402
from vit import read_npz, require, write_npz  # noqa: E402

LIBRARIES = ("timm", "huggingface")

# Official name of a layer, its kind, its name in timm and in Hugging Face, or None if it has none
# there. {} is the number of a block.
ATTENTION = "Transformer/encoderblock_{}/MultiHeadDotProductAttention_1"
MLP = "Transformer/encoderblock_{}/MlpBlock_3"
LAYER = "vit.encoder.layer.{}"
VIT = [
    ("cls", "array", "cls_token", "vit.embeddings.cls_token"),
    (
        "Transformer/posembed_input/pos_embedding",
        "array",
        "pos_embed",
        "vit.embeddings.position_embeddings",
    ),
    ("embedding", "patches", "patch_embed.proj", "vit.embeddings.patch_embeddings.projection"),
    (
        "Transformer/encoderblock_{}/LayerNorm_0",
        "norm",
        "blocks.{}.norm1",
        f"{LAYER}.layernorm_before",
    ),
    (f"{ATTENTION}/query", "to heads", "blocks.{}.attn.q", f"{LAYER}.attention.attention.query"),
    (f"{ATTENTION}/key", "to heads", "blocks.{}.attn.k", f"{LAYER}.attention.attention.key"),
    (f"{ATTENTION}/value", "to heads", "blocks.{}.attn.v", f"{LAYER}.attention.attention.value"),
    (f"{ATTENTION}/out", "from heads", "blocks.{}.attn.proj", f"{LAYER}.attention.output.dense"),
    (
        "Transformer/encoderblock_{}/LayerNorm_2",
        "norm",
        "blocks.{}.norm2",
        f"{LAYER}.layernorm_after",
    ),
    (f"{MLP}/Dense_0", "dense", "blocks.{}.mlp.fc1", f"{LAYER}.intermediate.dense"),
    (f"{MLP}/Dense_1", "dense", "blocks.{}.mlp.fc2", f"{LAYER}.output.dense"),
    ("Transformer/encoder_norm", "norm", "norm", "vit.layernorm"),
    ("pre_logits", "dense", "pre_logits.fc", None),
    ("head", "dense", "head", "classifier"),
]
MIXER = [
    ("stem", "patches", "stem.proj", None),
    ("MixerBlock_{}/LayerNorm_0", "norm", "blocks.{}.norm1", None),
    ("MixerBlock_{}/token_mixing/Dense_0", "dense", "blocks.{}.mlp_tokens.fc1", None),
    ("MixerBlock_{}/token_mixing/Dense_1", "dense", "blocks.{}.mlp_tokens.fc2", None),
    ("MixerBlock_{}/LayerNorm_1", "norm", "blocks.{}.norm2", None),
    ("MixerBlock_{}/channel_mixing/Dense_0", "dense", "blocks.{}.mlp_channels.fc1", None),
    ("MixerBlock_{}/channel_mixing/Dense_1", "dense", "blocks.{}.mlp_channels.fc2", None),
    ("pre_head_layer_norm", "norm", "norm", None),
    ("head", "dense", "head", None),
]

# ==== Arrays ======================================================================================


def official_array(array, kind, leaf, heads):
    """An array of PyTorch in the official form. leaf: "weight" or "bias"."""
    if leaf == "weight" and kind == "patches":
        return array.transpose(2, 3, 1, 0)  # [D,C,h,w] -> [h,w,C,D]
    if leaf == "weight" and kind in ("dense", "to heads", "from heads"):
        array = array.T  # inputs first
    if kind == "to heads":
        return array.reshape(*array.shape[:-1], heads, -1)  # [D,D] -> [D,H,K], [D] -> [H,K]
    if leaf == "weight" and kind == "from heads":
        return array.reshape(heads, -1, array.shape[-1])  # [D,D] -> [H,K,D]
    return array


def torch_array(array, kind, leaf):
    """The inverse of official_array. leaf: "kernel", "scale" or "bias"."""
    if kind == "to heads":
        array = array.reshape(*array.shape[:-2], -1)
    if leaf != "kernel":
        return array
    if kind == "patches":
        return array.transpose(3, 2, 0, 1)
    if kind == "from heads":
        array = array.reshape(-1, array.shape[-1])
    return array.T


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


def pattern_of(template):
    """A regular expression for the names that a template stands for; its group is the block."""
    return re.escape(template).replace(r"\{\}", r"(\d+)")


def find_layer(name, rules, column):
    """The rule, the number of the block (or None) and the leaf of a name, as it is in a column."""
    for rule in rules:
        if rule[column] is None:
            continue
        separator = "/" if column == 0 else r"\."
        tail = "" if rule[1] == "array" else rf"{separator}(\w+)"
        match = re.fullmatch(f"{pattern_of(rule[column])}{tail}", name)
        if match:
            groups = list(match.groups())
            leaf = None if rule[1] == "array" else groups.pop()
            return rule, groups[0] if groups else None, leaf
    raise ValueError(f"{name} is unknown: no array of this model has that name")


def rules_of(arrays):
    """VIT or MIXER, by the names of the arrays."""
    mixes = any("token_mixing" in name or "mlp_tokens" in name for name in arrays)
    return MIXER if mixes else VIT


def to_official(arrays, library, heads=None) -> dict:
    """Named numpy arrays of a library under the official names, for vit.from_official or mixer's.

    library: "timm" or "huggingface". heads: of a ViT; by default the width divided by 64. Raises
    ValueError for an unknown name; that none is missing is checked by from_official.
    """
    require(library in LIBRARIES, f"{library!r} is not one of {', '.join(LIBRARIES)}")
    column = 2 + LIBRARIES.index(library)
    rules = rules_of(arrays)
    if library == "timm":
        arrays = split_qkv(arrays)
    flat = {}
    for name, array in arrays.items():
        rule, number, leaf = find_layer(name, rules, column)
        official, kind = rule[:2]
        official = official.format(number)
        if kind == "array":
            flat[official] = array
            continue
        require(leaf in ("weight", "bias"), f"{name} is unknown: it is no weight and no bias")
        width = array.shape[-1]
        count = heads or max(width // 64, 1)
        require(
            "heads" not in kind or width % count == 0,
            f"{name} {array.shape} does not divide into {count} heads",
        )
        ours = leaf
        if leaf == "weight":
            ours = "scale" if kind == "norm" else "kernel"
        flat[f"{official}/{ours}"] = official_array(array, kind, leaf, count)
    return flat


def from_official(flat, library) -> dict:
    """The inverse of to_official. Raises ValueError for a name that is unknown to the library."""
    require(library in LIBRARIES, f"{library!r} is not one of {', '.join(LIBRARIES)}")
    column = 2 + LIBRARIES.index(library)
    rules = rules_of(flat)
    module = mixer if rules is MIXER else vit
    arrays = {}
    for name, array in module.released_names(flat).items():
        rule, number, leaf = find_layer(name, rules, 0)
        require(rule[column], f"{name}: {library} has no place for it")
        theirs = rule[column].format(number)
        if leaf is None:
            arrays[theirs] = array
            continue
        tail = "bias" if leaf == "bias" else "weight"
        arrays[f"{theirs}.{tail}"] = torch_array(array, rule[1], leaf)
    if library == "timm":
        arrays = join_qkv(arrays)
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


# ==== Files =======================================================================================


def read_arrays(path) -> dict:
    """The named arrays of an .npz or .safetensors. Raises ValueError if it is not readable."""
    if not str(path).endswith(".safetensors"):
        return read_npz(path)
    from safetensors.numpy import load_file

    require(pathlib.Path(path).exists(), f"{path} does not exist")
    try:
        arrays = load_file(path)
    except Exception as error:  # of the library, of numpy and of the system
        raise ValueError(f"{path} is not a readable .safetensors: {error}") from None
    return {name: np.asarray(array, np.float32) for name, array in arrays.items()}


def write_arrays(path, arrays):
    """Writes an .npz or .safetensors. Raises ValueError if it cannot be written."""
    if not str(path).endswith(".safetensors"):
        write_npz(path, arrays)
        return
    from safetensors.numpy import save_file

    partial = pathlib.Path(f"{path}.part")
    try:
        save_file(arrays, partial)
        partial.replace(path)
    except Exception as error:
        raise ValueError(f"{path} cannot be written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def check_official(flat):
    """The Config of official arrays; raises ValueError unless they are all there."""
    if rules_of(flat) is MIXER:
        config = mixer.infer_config(flat)
        mixer.from_official(flat, config)
    else:
        config = vit.infer_config(flat, gelu="exact")
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
        require(args.heads is None or args.heads >= 1, f"--heads {args.heads} is not at least 1")
        arrays = read_arrays(args.source)
        if args.library_from:
            result = to_official(arrays, args.library_from, args.heads)
            config = check_official(result)
        else:
            config = check_official(arrays)
            result = from_official(arrays, args.library_to)
        write_arrays(args.target, result)
    except ValueError as error:
        print(f"convert_weights.py: {error}", file=sys.stderr)
        return 2
    print(config)
    print(f"wrote {args.target}: {len(result)} arrays")
    return 0


if __name__ == "__main__":
    sys.exit(main())
