"""Makes a V-MoE from the checkpoint of a dense ViT, and tells what a V-MoE costs.

    python examples/moe_upcycle.py --checkpoint B_16.npz --set experts=8 --out sparse
    python examples/train.py moe --checkpoint sparse/model.npz --data flowers --out run
    python examples/moe_upcycle.py --size H/14 --devices 32

Copies    In each block that gets experts, every second one unless --set moe_blocks=[1,3] says
          otherwise, all experts start as copies of the block's MLP. The router is drawn at random.
          All other weights stay as they are.
Changes   A token is sent to k of E experts that are all alike, so the mixture returns the MLP's
          output, multiplied by the sum of the gates of those experts that had a slot for the token.
          The gates are not made to sum to 1. With k = E and a capacity factor of at least 1 the new
          model computes what the dense one did. With k < E the branch of the MLP is scaled down, to
          between k / E and 1 of what it was. The program prints how far the logits move, on
          --pictures. Training must make up for it.
Costs     Parameters, those that work for one token, FLOPs of the forward pass per token, and bytes
          on each device: of the weights, and with the gradient and Adam's two slots. Experts are
          spread over --devices; every device holds all other weights. Activations are not counted.
Writes    model.npz, under the official names of V-MoE, and model.json, as examples/train.py does.
Needs     examples/requirements.txt, since it reads and writes checkpoints with train.py.
"""

import argparse
import dataclasses
import functools
import math
import pathlib
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]  # for the imports below, from any folder
import pictures  # noqa: E402
import train  # noqa: E402

import moe  # noqa: E402
import vit  # noqa: E402
from moe import require, run_program  # noqa: E402

SHARED_FIELDS = (  # in both Configs
    *("image_size", "patch_size", "channels", "width", "depth", "heads", "mlp"),
    *("classes", "pool", "representation"),
)
LAYERS_OF_A_BLOCK = ("norm1", "query", "key", "value", "out", "norm2")


def sparse_config(dense: vit.Config, fields) -> moe.Config:
    """The V-MoE with the architecture of a ViT; fields set what a ViT does not have.

    Raises ValueError for fields that the ViT determines.
    """
    for name in fields:
        require(name not in SHARED_FIELDS, f"--set {name}: it is that of the checkpoint")
    require(dense.gelu == "tanh", f"the checkpoint has gelu={dense.gelu}, and moe.py has tanh only")
    shared = {name: getattr(dense, name) for name in SHARED_FIELDS}
    return moe.Config(**{**shared, "moe_blocks": moe.every(2, dense.depth), **fields})


def upcycle(params, config: moe.Config, key) -> dict:
    """The weights of a V-MoE from those of a ViT, whose MLPs are copied into the experts.

    params as those of vit.py: blocks stacked on a leading axis. Raises ValueError if they do not
    fit config.
    """
    shapes = moe.param_table(config)
    keys = jax.random.split(key, config.depth)
    blocks = {}
    for i in range(config.depth):
        dense = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), params["blocks"])
        block = {name: dense[name] for name in LAYERS_OF_A_BLOCK}
        if i in config.moe_blocks:
            block["experts"] = jax.tree.map(
                lambda leaf: np.broadcast_to(leaf, (config.experts, *leaf.shape)), dense["mlp"]
            )
            router = shapes["blocks"][str(i)]["router"]["kernel"]
            block["router"] = {"kernel": np.asarray(router.init(keys[i], router.shape, np.float32))}
        else:
            block["mlp"] = dense["mlp"]
        blocks[str(i)] = block
    sparse = {**params, "blocks": blocks}
    moe.check_names(moe.named_leaves(sparse), moe.named_leaves(shapes), "the V-MoE")
    return sparse


def difference(params, dense: vit.Config, sparse_params, config: moe.Config, images):
    """How far apart the logits of both models are.

    Returns the largest difference, relative to the largest logit of the dense model, and the share
    of the images that get the same class from both.
    """
    want = jax.jit(functools.partial(vit.forward, config=dense))(params, images)
    got, _ = jax.jit(functools.partial(moe.forward, config=config))(sparse_params, images)
    largest = float(jnp.abs(got - want).max() / jnp.maximum(jnp.abs(want).max(), 1e-30))
    same = float((got.argmax(-1) == want.argmax(-1)).mean())
    return largest, same


class Costs(NamedTuple):
    """What a V-MoE costs."""

    parameters: int
    active: int  # parameters that work for one token
    on_device: int  # parameters on each device
    flops_per_token: float  # of a forward pass

    def __str__(self):
        gigabytes = 4 * self.on_device / 1e9  # float32
        return (
            f"{self.parameters / 1e6:,.1f} million parameters, {self.active / 1e6:,.1f} million of "
            f"them for one token\n"
            f"{self.flops_per_token / 1e6:,.1f} million FLOPs per token, forward\n"
            f"{gigabytes:.2f} GB of weights on each device, {4 * gigabytes:.2f} GB with gradient "
            "and Adam's slots"
        )


def costs_of(config: moe.Config, devices) -> Costs:
    """The Costs on so many devices. Raises ValueError if they do not divide the experts.

    Nothing is computed and no device is needed: shapes and the program suffice.
    """
    mesh = AbstractMesh((devices, 1), ("data", "model"))
    specs = moe.named_leaves(moe.param_specs(config, mesh))
    parameters = 0
    active = 0
    on_device = 0
    for name, param in moe.named_leaves(moe.param_table(config)).items():
        size = math.prod(param.shape)
        parameters += size
        if "/experts/" in name:
            active += size * config.k // config.experts
        else:
            active += size
        if "data" in tuple(specs[name]):
            on_device += size // devices
        else:
            on_device += size
    flops_per_token = forward_flops(config) / (config.group * config.tokens)
    return Costs(parameters, active, on_device, flops_per_token)


def forward_flops(config: moe.Config) -> float:
    """FLOPs of a forward pass of one group, by XLA's count of the program before it is optimised.

    A product counts as two FLOPs; what is not a matrix product is in it, too.
    """
    config = dataclasses.replace(config, remat=False)
    shapes = jax.eval_shape(functools.partial(moe.init_params, config=config), jax.random.key(0))
    shape = (config.group, *config.image_size, config.channels)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    lowered = jax.jit(functools.partial(moe.forward, config=config)).lower(shapes, images)
    return lowered.cost_analysis()["flops"]


def read_images(path, config: moe.Config):
    """Two groups of pictures of a data set, always the same ones, as the model wants them."""
    source = pictures.open_pictures(path)
    pictures.check_channels(source, config.channels)
    count = 2 * config.group
    require(len(source.labels) >= count, f"{path} has fewer than {count} pictures, two groups")
    rows = np.random.default_rng(0).permutation(len(source.labels))[:count]
    found = [pictures.with_channels(source.read(row), config.channels) for row in rows]
    found = [pictures.resize(picture, config.image_size) for picture in found]
    return moe.preprocess(np.stack(found))


def run(args):
    """Prints the costs, and with --checkpoint converts it."""
    require(args.devices >= 1, f"--devices {args.devices} is not at least 1")
    if args.size:
        require(args.size in moe.SIZES, f"--size {args.size} is not one of {', '.join(moe.SIZES)}")
        args.model = "moe"
        config = dataclasses.replace(moe.SIZES[args.size], **train.fields_to_set(args))
        print(f"V-MoE-{args.size}, {config.experts} experts, k={config.k}, {args.devices} devices")
        print(costs_of(config, args.devices))
        return

    fields = train.fields_to_set(argparse.Namespace(model="moe", set=args.set))
    read = argparse.Namespace(model="vit", checkpoint=args.checkpoint, gelu=args.gelu, set=[])
    _, params, dense, classes = train.load_checkpoint(read)
    config = sparse_config(dense, fields)
    sparse_params = upcycle(params, config, jax.random.key(args.seed))
    images = read_images(args.pictures, config)
    out = pathlib.Path(args.out)
    train.make_folder(out)

    print(f"{config.experts} experts in blocks {config.moe_blocks}, k={config.k}")
    print(costs_of(config, args.devices))
    largest, same = difference(params, dense, sparse_params, config, images)
    print(f"before training the logits differ by {largest:.1e} of the largest logit")
    print(f"result: got the class of the dense model for {same:.0%} of {len(images)} pictures")
    train.save_model(out, moe, config, sparse_params, classes)
    print(f"wrote {out / 'model.npz'}")


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", help="of vit.py, an .npz with the official names")
    source.add_argument("--size", help="print the costs of a size such as B/16, and write nothing")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of moe.Config, such as experts=8, k=1 or moe_blocks=[1,3]",
    )
    parser.add_argument("--gelu", choices=("tanh", "exact"), help="which the checkpoint has")
    parser.add_argument(
        "--devices", type=int, default=1, help="number of devices that share the experts"
    )
    pictures_path = str(ROOT / "data/noto_emoji32.npz")
    parser.add_argument("--pictures", default=pictures_path, help="to compare both models on")
    parser.add_argument("--seed", type=int, default=0, help="of the router")
    parser.add_argument("--out", default="sparse", help="folder for model.npz (default: sparse)")
    return parser


def main(argv=None) -> int:
    """Returns the exit status: 0, 1 if a file cannot be written, 2 for bad input."""
    args = make_parser().parse_args(argv)
    try:
        run(args)
    except ValueError as error:
        print(f"moe_upcycle.py: {train.first_line(error)}", file=sys.stderr)
        return 2
    except train.SaveError as error:
        print(f"moe_upcycle.py: {train.first_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_program(main)
