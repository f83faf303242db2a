"""The scale and the slots that Amos gives to every weight of a ViT, a Mixer, a V-MoE, BERT and T5.

    python examples/amos_rules.py vit-b16
    python examples/amos_rules.py t5-base --momentum

Prints a line for each parameter: path, shape, eta, shape and bytes of its slots; last their sum,
beside that of AdamW. For a model of one's own: its tree of shapes and, where a name is new, a Rule.

The rules for BERT are those of the official code for its pre-training, and those for convolutions
are of its README. The rules for T5 are those that the first author published for his experiments
with t5x (google-research/jestimator, issue 9): scale 1, embedding 1, relative positions 0.5, query
sqrt(1 / (D * 64)), the MLP's second kernel sqrt(2 / F). What he wrote there of the other kernels
and of the slots was not at hand; those rules are ours, on the same grounds. So are the rules for
ViT, Mixer and V-MoE, for which the official code has none.
"""

import argparse
import math
import pathlib
import sys

import jax
import jax.numpy as jnp

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import amos  # noqa: E402, found from any folder by the line above
import mixer  # noqa: E402
import moe  # noqa: E402
import vit  # noqa: E402
from amos import ALL, ALL_BUT_LAST, LAST, Rule  # noqa: E402

# ==== Rules =======================================================================================

# The network for MNIST of the official README, to copy: most pixels are near zero, and so is half
# of what comes out of a ReLU.
CONVOLUTION = (
    Rule("scale", ALL, eta=1.0),
    Rule("bias", ALL, eta=0.5),
    Rule("Conv_0/kernel", ALL_BUT_LAST, gain=8),
    Rule("(Dense_1|head)/kernel", ALL_BUT_LAST, gain=1),
    Rule("kernel", ALL_BUT_LAST, gain=2),
)

T5_HEAD = 64  # units of a head
T5 = (
    Rule("scale", ALL, eta=1.0),
    Rule("embedding", LAST, eta=1.0),  # T5 does not scale them down
    Rule("rel_embedding", LAST, eta=0.5),
    # T5 does not divide scores by the root of the head's size: queries are smaller by that factor.
    Rule("query/kernel", ALL_BUT_LAST, gain=1 / T5_HEAD),
    Rule("wo/kernel", ALL_BUT_LAST, gain=2),
    Rule("kernel", ALL_BUT_LAST),
)

# ==== Models, as trees of shapes ==================================================================


def shapes_of(tree):
    """The tree with a float32 jax.ShapeDtypeStruct for each tuple of sizes."""

    def leaf(shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    return jax.tree.map(leaf, tree, is_leaf=lambda x: isinstance(x, tuple))


def norm(width):
    """A LayerNorm."""
    return {"scale": (width,), "bias": (width,)}


def dense(inputs, outputs):
    """A dense layer."""
    return {"kernel": (inputs, outputs), "bias": (outputs,)}


def bert():
    """BERT-base as the official code trains it: 32,000 words, names shortened, kernels [in,out]."""
    width = 768
    hidden = 3072
    words = 32_000
    layer = {
        **{name: dense(width, width) for name in ("query", "key", "value", "attention_out")},
        "attention_layer_norm": norm(width),
        "dense1": dense(width, hidden),
        "dense2": dense(hidden, width),
        "layer_norm": norm(width),
    }
    tree = {
        "embedder": {
            "token_embed": {"embedding": (words, width)},
            "position_embed": {"embedding": (512, width)},
            "segment_embed": {"embedding": (1, width)},
            "layer_norm": norm(width),
        },
        "encoder": {f"layer_{i}": layer for i in range(12)},
        "mlm": dense(width, width),
        "mlm_layer_norm": norm(width),
        "mlm_output": {"bias": (words,)},
    }
    return shapes_of(tree)


def t5():
    """T5-base, version 1.0: 32,128 words, no biases, relative positions, output tied to input."""
    width = 768
    hidden = 3072
    scale = {"scale": (width,)}
    attention = {name: {"kernel": (width, width)} for name in ("query", "key", "value", "out")}
    encoder = {
        "attention": attention,
        "pre_attention_layer_norm": scale,
        "mlp": {"wi": {"kernel": (width, hidden)}, "wo": {"kernel": (hidden, width)}},
        "pre_mlp_layer_norm": scale,
    }
    decoder = {
        **encoder,
        "encoder_decoder_attention": attention,
        "pre_cross_attention_layer_norm": scale,
    }
    tree = {"token_embedder": {"embedding": (32_128, width)}}
    for name, layer in (("encoder", encoder), ("decoder", decoder)):
        tree[name] = {
            **{f"layers_{i}": layer for i in range(12)},
            "relpos_bias": {"rel_embedding": (12, 32)},
            f"{name}_norm": scale,
        }
    return shapes_of(tree)


def shapes_in(module, config):
    """The parameters of vit.py, mixer.py or moe.py."""
    return jax.eval_shape(lambda key: module.init_params(key, config), jax.random.key(0))


# name -> (function that makes the tree of shapes, rules)
MODELS = {
    "vit-b16": (lambda: shapes_in(vit, vit.Config(pool="gap")), amos.TRANSFORMER),
    "mixer-b16": (lambda: shapes_in(mixer, mixer.Config()), amos.TRANSFORMER),
    "moe-s32": (lambda: shapes_in(moe, moe.SIZES["S/32"]), amos.TRANSFORMER),
    "bert-base": (bert, amos.TRANSFORMER),
    "t5-base": (t5, T5),
}


def describe(params, rules, momentum=False) -> str:
    """The table of a tree of shapes: a line for each parameter, last the sum."""
    rows = [("parameter", "shape", "eta", "slots", "bytes")]
    total = 0
    adamw = 0
    leaves = amos.resolve(params, amos.eta_rules(rules), amos.slot_rules(rules))
    for leaf, param in zip(leaves, jax.tree.leaves(params)):
        entry = amos.wide(param).itemsize
        size = 2 * entry * math.prod(leaf.slot)
        if momentum:
            size += entry * math.prod(param.shape)
        total += size
        adamw += 2 * entry * math.prod(param.shape)
        shape = str(tuple(param.shape))
        rows.append((leaf.name, shape, f"{leaf.eta:.4g}", f"2 x {leaf.slot}", f"{size:,}"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join(cells).rstrip())
    lines.append(f"{total:,} bytes of slots, {total / adamw:.2%} of AdamW's {adamw:,}")
    return "\n".join(lines)


def main(argv=None) -> int:
    """Prints the table of a model. Returns the exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--momentum", action="store_true", help="count the slot of momentum, too")
    args = parser.parse_args(argv)
    make, rules = MODELS[args.model]
    print(describe(make(), rules, args.momentum))
    return 0


if __name__ == "__main__":
    sys.exit(main())
