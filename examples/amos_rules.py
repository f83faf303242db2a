"""Which scale and which slots Amos gives to every weight of a ViT, a Mixer, BERT and T5.

What      The resolved table of amos.py's rules for models that are written down here as shapes: path, shape,
          eta, slots, bytes, and their sum beside AdamW's. For another model: its shapes and, where a name is
          new, one rule.
Paper     Tian & Parikh 2022, arXiv:2210.11693. The rules for BERT are those of the official code; it has none
          for the others (its own refuse a ViT), and no T5: theirs follow the same reasons.
Needs     amos.py.
Run       python examples/amos_rules.py vit-b16        (mixer-b16, bert-base, t5-base; --momentum 0.9)
Axes      D width  H heads  K head size  F hidden units of MLP  L blocks  T tokens  V vocabulary
"""

import argparse
import pathlib
import sys

import jax
import jax.numpy as jnp

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import amos  # noqa: E402, found by the line above from whichever folder this is started

NORM = {"scale": ("D",), "bias": ("D",)}


def shapes(tree, **sizes):
    """A tree of float32 shapes from one of tuples of letters and numbers."""
    leaf = lambda row: jax.ShapeDtypeStruct([sizes.get(n, n) for n in row], jnp.float32)
    return jax.tree.map(leaf, tree, is_leaf=lambda x: isinstance(x, tuple))


def dense(*kernel, bias=None):
    """A layer with a kernel and a bias, of the kernel's last axis if nothing else is said."""
    return {"kernel": kernel, "bias": bias or kernel[-1:]}


def vit():
    """vit.py's B/16 with pool="gap": blocks stacked on a leading axis L."""
    blocks = {name: {"scale": ("L", "D"), "bias": ("L", "D")} for name in ("norm1", "norm2")}
    blocks |= {name: dense("L", "D", "H", "K", bias=("L", "H", "K")) for name in ("query", "key", "value")}
    blocks |= {"out": dense("L", "H", "K", "D", bias=("L", "D"))}
    blocks |= {"mlp1": dense("L", "D", "F", bias=("L", "F")), "mlp2": dense("L", "F", "D", bias=("L", "D"))}
    ends = {"embed": dense(16, 16, 3, "D"), "position": (196, "D"), "norm": NORM, "head": dense("D", 1000)}
    return shapes(ends | {"blocks": blocks}, D=768, H=12, K=64, F=3072, L=12)


def mixer():
    """Mixer-B/16 under the names of the released checkpoints: 196 tokens, token MLP of 384."""
    mlp = lambda n, hidden: {"Dense_0": dense(n, hidden), "Dense_1": dense(hidden, n)}
    block = {"LayerNorm_0": NORM, "token_mixing": mlp(196, 384), "LayerNorm_1": NORM}
    block |= {"channel_mixing": mlp("D", 3072)}
    tree = {f"MixerBlock_{i}": block for i in range(12)}
    tree |= {"stem": dense(16, 16, 3, "D"), "pre_head_layer_norm": NORM, "head": dense("D", 1000)}
    return shapes(tree, D=768)


def bert():
    """BERT-base as the official code pre-trains it, names shortened: 32,000 words, kernels of two axes."""
    layer = {name: dense("D", "D") for name in ("query", "key", "value", "attention_out")}
    layer |= {"dense1": dense("D", "F"), "dense2": dense("F", "D")}
    layer |= {"attention_layer_norm": NORM, "layer_norm": NORM}
    tables = {"token_embed": ("V", "D"), "position_embed": (512, "D"), "segment_embed": (1, "D")}
    tree = {"embedder": {name: {"embedding": shape} for name, shape in tables.items()} | {"layer_norm": NORM}}
    tree |= {"encoder": {f"layer_{i}": layer for i in range(12)}}
    tree |= {"mlm": dense("D", "D"), "mlm_layer_norm": NORM, "mlm_output": {"bias": ("V",)}}
    return shapes(tree, D=768, F=3072, V=32_000)


def t5():
    """T5-base, version 1.0: 32,128 words, no biases, relative positions [heads, buckets], head tied."""
    kernel, norm = lambda *shape: {"kernel": shape}, {"scale": ("D",)}
    attention = {name: kernel("D", "D") for name in ("query", "key", "value", "out")}
    mlp = {"wi": kernel("D", "F"), "wo": kernel("F", "D")}
    encoder = {
        "attention": attention,
        "mlp": mlp,
        "pre_attention_layer_norm": norm,
        "pre_mlp_layer_norm": norm,
    }
    decoder = encoder | {"encoder_decoder_attention": attention, "pre_cross_attention_layer_norm": norm}
    tree = {"token_embedder": {"embedding": ("V", "D")}}
    for name, layer in (("encoder", encoder), ("decoder", decoder)):
        tree[name] = {f"layers_{i}": layer for i in range(12)}
        tree[name] |= {"relpos_bias": {"rel_embedding": (12, 32)}, f"{name}_norm": norm}
    return shapes(tree, D=768, F=3072, V=32_128)


MODELS = {"vit-b16": (vit, amos.TRANSFORMER), "mixer-b16": (mixer, amos.TRANSFORMER)}
MODELS |= {"bert-base": (bert, amos.TRANSFORMER), "t5-base": (t5, amos.TRANSFORMER)}


def main(argv=None) -> int:
    """Prints the table of a model."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--momentum", type=float, default=None)
    args = parser.parse_args(argv)
    tree, table = MODELS[args.model][0](), MODELS[args.model][1]
    print(amos.describe_rules(tree, amos.eta_rules(table), amos.slot_rules(table), args.momentum))
    return 0


if __name__ == "__main__":
    sys.exit(main())
