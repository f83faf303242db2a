"""Checkpoints of google-research/big_vision for vit.py, and back.

    flat = vit.read_npz("vit_s16_i1k_300ep.npz")
    params, config = from_big_vision(flat, image_size=224)
    flat = to_big_vision(params, config)

What      Both code bases hold the same model under other names. Beside the names, the class token
          has a position in vision_transformer and vit.py, and none in big_vision: loaded, its
          position is zero; saved, its position is added to it. Fixed positions of sines and
          cosines are in no array of big_vision; here they become a table like any other.
Not here  The attention-pooling head (MAPHead_0) and whatever else vit.py lacks is refused by name.
          No array tells that a model reads the first patch alone (pool_type "0"): it is loaded as
          one that takes the mean of all patches.
Checked   google-research/big_vision @ 0127fb6: outputs, gradients, positions, converted weights;
          largest error 5.4e-7 of the largest value.
Run       python examples/big_vision.py big_vision.npz vit.npz --image-size 224
          python examples/big_vision.py vit.npz big_vision.npz --to-big-vision
Axes      T patches, in vit.py with the class token first  D width  L blocks
          h, w rows and columns of a patch  C channels
"""

import argparse
import math
import os
import pathlib
import re
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import vit  # noqa: E402, found by the line above from whichever folder this is started

require = vit.require
SCANNED = "/encoderblock/"  # in names of blocks that are stacked on a leading axis


def sincos2d(grid, width, temperature=10_000):
    """Fixed positions: sine and cosine of the column, then those of the row. -> float32 [T,D].

    grid is (rows, columns). The wavelengths grow from 2 pi to 2 pi times temperature. ValueError
    for a width that is no multiple of 4 above 4.
    """
    require(
        width % 4 == 0 and width > 4,
        f"width={width} is no multiple of 4 above 4, which positions of sines and cosines need",
    )
    exponents = np.arange(width // 4) / (width // 4 - 1)
    frequencies = temperature**-exponents  # [D/4]
    rows, columns = np.mgrid[: grid[0], : grid[1]]
    y = rows.reshape(-1, 1) * frequencies  # [T,D/4]
    x = columns.reshape(-1, 1) * frequencies
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1).astype(np.float32)


def big_vision_name(name):
    """The name in big_vision of an array that is called `name` in the released files."""
    if name == vit.OFFICIAL_POSITION:
        return "pos_embedding"
    for newer, released in vit.NEWER_BLOCK.items():
        name = name.replace(released, newer)
    return name


def unstacked(flat):
    """The arrays of a checkpoint with each block under its own name: encoderblock_0, 1, ..."""
    single = {}
    for name, array in flat.items():
        if SCANNED not in name:
            single[name] = array
            continue
        for i, layer in enumerate(np.atleast_1d(array)):  # [L,...]
            single[name.replace(SCANNED, f"/encoderblock_{i}/")] = layer
    return single


def positions(flat, image_size):
    """The position table [1,T,D] that vit.py needs, from arrays without prefixes and stacks."""
    if "pos_embedding" in flat:
        table = flat["pos_embedding"]
        require(np.ndim(table) == 3, f"pos_embedding is {np.shape(table)}, which has not 3 axes")
    else:
        kernel = np.shape(flat.get("embedding/kernel"))
        require(
            len(kernel) == 4, "the checkpoint has no embedding/kernel [h,w,C,D]: it is not a ViT"
        )
        require(
            image_size is not None,
            "the checkpoint has no pos_embedding: if its positions are fixed, give image_size",
        )
        grid = vit.Config(image_size=image_size, patch_size=kernel[:2]).grid
        table = sincos2d(grid, kernel[3])[None]
    if "cls" in flat:
        table = np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)
    return table


def from_big_vision(flat, **fields):
    """Parameters and Config of the arrays of a checkpoint; float32 in host memory.

    Blocks may be apart or stacked on a leading axis. fields of the Config are what the arrays do
    not tell, such as gelu="exact", or image_size where there are no positions or the patches form
    no square. ValueError for arrays that are missing, misshaped or unknown to vit.py.
    """
    flat = vit.released_names(unstacked(flat))
    require(
        vit.OFFICIAL_POSITION not in flat,
        f"the checkpoint has {vit.OFFICIAL_POSITION}: its names are not those of big_vision",
    )
    table = positions(flat, fields.get("image_size"))
    flat = {name: array for name, array in flat.items() if name != "pos_embedding"}
    flat[vit.OFFICIAL_POSITION] = table
    config = vit.infer_config(flat, **fields)
    require(
        table.shape[1] == config.tokens,
        f"pos_embedding is not of the {math.prod(config.grid)} patches in {config.image_size}",
    )
    unknown = flat.keys() - vit.official_places(config).keys()
    if unknown:
        name = big_vision_name(min(unknown))
        raise ValueError(f"the checkpoint has {name}, which vit.py does not have")
    return vit.from_official(flat, config), config


def to_big_vision(params, config):
    """The arrays of a checkpoint of big_vision, by name. Positions are written as learned ones."""
    flat = vit.to_official(params, config)
    if config.pool == "token":
        table = flat[vit.OFFICIAL_POSITION]  # [1,T,D], class token first
        flat["cls"] = flat["cls"] + table[:, :1]
        flat[vit.OFFICIAL_POSITION] = table[:, 1:]
    return {big_vision_name(name): array for name, array in flat.items()}


# ==== Command line ================================================================================


def image_size_of(text):
    """Rows and columns of pixels, from "224" or "224x160"; nothing from nothing."""
    if text is None:
        return {}
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    require(match, f"--image-size {text} is not of the form 224 or ROWSxCOLUMNS, as 224x160")
    rows = int(match[1])
    columns = int(match[2] or rows)
    return {"image_size": (rows, columns)}


def convert(source, out, to_big_vision_names, image_size):
    """Reads the checkpoint `source`, writes `out` and says so. ValueError for what is wrong."""
    require(not out.is_dir(), f"{out} is a folder")
    require(os.access(out.parent, os.W_OK), f"{out}: its folder cannot be written to")
    require(out.resolve() != source.resolve(), f"{out} is the checkpoint to be read")
    fields = image_size_of(image_size)
    flat = vit.read_npz(source)
    if to_big_vision_names:
        config = vit.infer_config(flat, **fields)
        converted = to_big_vision(vit.from_official(flat, config), config)
    else:
        params, config = from_big_vision(flat, **fields)
        converted = vit.to_official(params, config)
    vit.write_npz(out, converted)
    count = sum(array.size for array in converted.values())
    print(f"wrote {out}: {len(converted)} arrays, {count:,} parameters")
    print(config)


def main(argv=None) -> int:
    """Exit status 2 for a mistake, in one line."""
    parser = argparse.ArgumentParser(
        description="Converts checkpoints of big_vision to the names that vit.py reads, or back."
    )
    parser.add_argument("source", type=pathlib.Path, help=".npz to read")
    parser.add_argument("out", type=pathlib.Path, help=".npz to write")
    parser.add_argument("--to-big-vision", action="store_true", help="the other way")
    parser.add_argument("--image-size", metavar="SIZE", help="224 or 224x160, if no array tells")
    args = parser.parse_args(argv)
    try:
        convert(args.source, args.out, args.to_big_vision, args.image_size)
    except ValueError as error:
        print(f"big_vision.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    vit.run_program(main)
