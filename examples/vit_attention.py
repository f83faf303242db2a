"""What a trained Vision Transformer looks at, and what is inside it: Figures 6 and 7 of the paper.

What      F: pictures, each beside itself darkened by the attention rollout of the class token (Figure 6).
          F with _inside before the suffix: principal components of the patch filters, similarity of the
          position embeddings, mean attention distance of each head over the pictures given (Figure 7).
Paper     Dosovitskiy et al. 2020, arXiv:2010.11929 v2, Section 4.5 and Appendix D.7, D.8.
Needs     A checkpoint under official names, or one that `python vit.py` wrote, with learned positions. Its
          Config is read from the shapes of its arrays. What they do not tell is a flag: --gelu, and --grid
          unless the patches form a square. Matplotlib, and pillow, which comes with it.
Run       python examples/real_vit.py --out vit_s14.npz --photos photos
          python examples/vit_attention.py vit_s14.npz photos/*.png --gelu exact --out vit_attention.png
          8 s on two CPU cores
Axes      B pictures  T tokens, class token first  D width  H heads  L blocks  C channels
"""

import argparse
import functools
import importlib.util
import math
import os
import pathlib
import re
import sys

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import vit  # noqa: E402, found by the line above from whichever folder this is started

require = vit.require

# ==== Checkpoint ============================================================================================


def infer_config(flat, grid=None, gelu="tanh") -> vit.Config:
    """The Config of arrays [...] under official names. grid: rows and columns of patches, if not a square."""

    def shape(pattern, rank):
        names = [name for name in flat if re.search(f"(^|/){pattern}$", name)]
        require(names, f"the checkpoint has no array {pattern}: it is no Vision Transformer of this kind")
        found = np.shape(flat[names[0]])
        require(len(found) == rank, f"{names[0]} is {found}, which is not of {rank} axes")
        return found

    (*patch, channels, width), (_, tokens, _) = shape("embedding/kernel", 4), shape("pos_embedding", 3)
    # big_vision leaves the class token without a position, and names the table in another way
    prefix = int("cls" in flat and "Transformer/posembed_input/pos_embedding" in flat)
    side = math.isqrt(tokens - prefix)
    rows = f"the position table has {tokens - prefix} rows of patches"
    require(grid or side**2 == tokens - prefix, f"{rows}, which is no square: give --grid ROWSxCOLUMNS")
    grid = grid or (side, side)
    require(math.prod(grid) == tokens - prefix, f"{rows}, not {grid[0]} x {grid[1]} of --grid")
    has = lambda name: f"{name}/kernel" in flat
    return vit.Config(
        image_size=tuple(n * size for n, size in zip(grid, patch)),
        patch_size=tuple(patch),
        channels=channels,
        width=width,
        depth=len({name.split("/")[1] for name in flat if "/encoderblock_" in name}),
        heads=shape("encoderblock_0/.*/query/kernel", 3)[1],
        mlp=shape("encoderblock_0/.*/Dense_0/kernel", 2)[1],
        classes=shape("head/kernel", 2)[1] if has("head") else 0,
        pool="token" if "cls" in flat else "gap",
        representation=shape("pre_logits/kernel", 2)[1] if has("pre_logits") else None,
        class_position=bool(prefix) or "cls" not in flat,
        gelu=gelu,
    )


def add_checkpoint_flags(add):
    """The flags that read_checkpoint takes, to a parser's add_argument."""
    add("checkpoint", help=".npz under official names: released, by python vit.py, or by real_vit.py")
    add("--gelu", choices=["tanh", "exact"], default="tanh", help="no checkpoint tells; default: %(default)s")
    add("--grid", metavar="ROWSxCOLUMNS", help="patches of the position table, where they form no square")


def read_checkpoint(args):
    """Parameters [...] and Config of the checkpoint on the command line."""
    grid = re.fullmatch(r"(\d+)x(\d+)", args.grid or "1x1")
    require(grid, f"--grid {args.grid} is not of the form ROWSxCOLUMNS, as 14x14")
    grid = tuple(map(int, grid.groups())) if args.grid else None
    config = infer_config(vit.read_npz(args.checkpoint), grid, args.gelu)
    return vit.load(args.checkpoint, config), config


# ==== The three quantities of Figure 7, and the rollout of Figure 6 =========================================


def filters_pca(kernel, count=28):
    """Principal components of the D patch filters, strongest first. [h,w,C,D] -> [at most count,h,w,C].

    Of unit norm. The sign of a component means nothing: here its largest value is positive.
    """
    *patch, D = kernel.shape
    filters = np.asarray(kernel, np.float64).reshape(-1, D).T  # [D,h*w*C]
    _, strength, rows = np.linalg.svd(filters - filters.mean(0), full_matrices=False)
    rows = rows[strength > 1e-9 * strength[0]][:count]
    signs = np.sign(np.take_along_axis(rows, np.abs(rows).argmax(1, keepdims=True), 1))
    return (signs * rows).reshape(-1, *patch)


def position_similarity(table, grid):
    """Cosine of the position embeddings of any two patches. [prefix+T,D] -> [rows,columns,rows,columns]."""
    patches = np.asarray(table, np.float64)[-math.prod(grid) :]  # without that of the class token
    patches = patches / np.linalg.norm(patches, axis=1, keepdims=True)
    return (patches @ patches.T).reshape(*grid, *grid)


def patch_distances(grid, patch_size):
    """Distance in pixels between the centres of any two patches. -> [T,T]."""
    centres = np.stack(np.mgrid[: grid[0], : grid[1]], -1).reshape(-1, 2) * patch_size
    return np.linalg.norm(centres[:, None] - centres, axis=-1)


def attention_distance(maps, grid, patch_size):
    """How far patches look, in pixels: distance averaged by attention (Sec. 4.5). [L,B,H,T,T] -> [L,H].

    What goes to the class token has no distance: patches alone count, their weights scaled to sum to 1.
    """
    patches = math.prod(grid)
    weights = np.asarray(maps)[..., -patches:, -patches:]
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    distance = np.einsum("lbhts,ts->lbht", weights, patch_distances(grid, patch_size))
    return distance.mean((1, 3))


def look(params, images, config):
    """Rollout to the output and attention distance. uint8 [B,H,W,C] -> [B,rows,columns], [L,H].

    One picture at a time: all maps of ViT-L/16 at 384 pixels are 0.5 GB.
    """
    maps_of = jax.jit(functools.partial(vit.attention_maps, config=config))
    masks, distances = [], []
    for image in images:
        maps = maps_of(params, vit.preprocess(image[None]))
        rollout = np.asarray(vit.attention_rollout(maps))[0]  # [T,T]
        source = rollout[0] if config.class_token else rollout.mean(0)  # what the head sees draws from these
        masks.append(source[-math.prod(config.grid) :].reshape(config.grid))
        distances.append(attention_distance(maps, config.grid, config.patch_size))
    return np.stack(masks), np.mean(distances, axis=0)


# ==== Pictures and figures ==================================================================================


def read_picture(path, config, display=320):
    """The centre of a picture, for the model and larger for the eye: 2 x uint8 [H,W,C]."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("L" if config.channels == 1 else "RGB")
    except Exception as error:  # pillow lets through what its decoders raise
        raise ValueError(f"{path} is not a readable picture: {error}") from None
    H, W = config.image_size
    scale = min(image.height / H, image.width / W)
    across, down = max(1, round(W * scale)), max(1, round(H * scale))
    left, top = (image.width - across) // 2, (image.height - down) // 2
    image = image.crop((left, top, left + across, top + down))
    larger = max(1, display / H)
    sizes = (W, H), (round(W * larger), round(H * larger))
    pixels = [np.asarray(image.resize(size, Image.Resampling.BICUBIC)) for size in sizes]
    return [x.reshape(*x.shape[:2], config.channels) for x in pixels]


def draw_rollout(path, pictures, masks):
    """Figure 6: pictures, list of uint8 [H,W,C], each beside itself times its mask [B,rows,columns].

    Brightness is in proportion to the rollout. The brightest twentieth of the patches is cut off at 1, since
    one patch can have 20 times the mean: it would leave all others black.
    """
    import matplotlib.pyplot as plt

    columns = min(3, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    height, width = pictures[0].shape[:2]
    size = (3.4 * columns, 1.7 * rows * height / width + 0.29)
    figure, axes = plt.subplots(rows, 2 * columns, figsize=size, squeeze=False, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, title in zip(axes[0], ["Input", "Attention"] * columns):
        ax.set_title(title, fontsize=10)
    for (left, right), picture, mask in zip(axes.reshape(-1, 2), pictures, masks):
        mask = np.minimum(mask / np.quantile(mask, 0.95), 1)
        mask = jax.image.resize(mask[..., None], (*picture.shape[:2], 1), "bilinear")
        grey = {"cmap": "gray", "vmin": 0, "vmax": 255} if picture.shape[2] == 1 else {}
        left.imshow(picture.squeeze(), **grey)
        right.imshow((picture * np.asarray(mask)).astype(np.uint8).squeeze(), **grey)
    figure.savefig(path, dpi=120, bbox_inches="tight", pad_inches=0.03)
    plt.close(figure)


def mosaic(tiles, fill):
    """Tiles side by side, with lines of fill between them. [r,c,h,w,...] -> [r*(h+1)-1,c*(w+1)-1,...]."""
    r, c, h, w, *rest = tiles.shape
    padding = [(0, 0), (0, 0), (0, 1), (0, 1)] + [(0, 0)] * len(rest)
    tiles = np.pad(tiles, padding, constant_values=fill).swapaxes(1, 2)
    return tiles.reshape(r * (h + 1), c * (w + 1), *rest)[:-1, :-1]


def draw_filters(ax, components):
    """Figure 7, left. components [n,h,w,C], each scaled so that 0 is grey."""
    n, h, w, C = components.shape
    scaled = 0.5 + 0.5 * components / np.abs(components).max((1, 2, 3), keepdims=True)
    columns = min(7, n)
    scaled = np.pad(scaled, ((0, -n % columns), (0, 0), (0, 0), (0, 0)), constant_values=1)
    scaled = np.broadcast_to(scaled, (*scaled.shape[:3], 3))  # grey becomes RGB
    ax.imshow(mosaic(scaled.reshape(-1, columns, h, w, 3), 1.0))
    ax.set_axis_off()
    ax.set_title(f"{'RGB' if C == 3 else 'Grey'} embedding filters\n(first {n} principal components)")


def draw_similarity(ax, similarity):
    """Figure 7, centre. similarity [rows,columns,rows,columns]; every k-th patch, at most 8 a side."""
    rows, columns = similarity.shape[:2]
    every = math.ceil(max(rows, columns) / 8)
    image = ax.imshow(mosaic(similarity[::every, ::every], np.nan), vmin=-1, vmax=1)
    for axis, count, name in ((ax.xaxis, columns, "column"), (ax.yaxis, rows, "row")):
        shown = np.arange(0, count, every)
        axis.set_ticks((np.arange(len(shown)) + 0.5) * (count + 1) - 1, shown + 1)
        axis.set_label_text(f"Input patch {name}")
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.figure.colorbar(image, ax=ax, shrink=0.9, ticks=[-1, 0, 1]).set_label("Cosine similarity", labelpad=-4)
    ax.set_title("Position embedding similarity")


def draw_distance(ax, distance, uniform):
    """Figure 7, right. distance [L,H] in pixels; uniform: that of attention to all patches alike."""
    layers = np.arange(1, len(distance) + 1)
    ax.axhline(uniform, color="0.6", linestyle="--", linewidth=1, label="uniform attention")
    ax.plot(layers, distance.mean(1), color="C0", alpha=0.4, label="mean of the heads")
    ax.plot(layers, distance, "o", color="C0", markersize=4)
    ax.plot([], [], "o", color="C0", markersize=4, label="a head")
    ax.set(xlabel="Network depth (layer)", ylabel="Mean attention distance (pixels)")
    ax.set_ylim(0, 1.1 * max(uniform, distance.max()))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(loc="lower right", fontsize=8)
    ax.set_title("Mean attention distance")


def draw_inside(path, params, distance, config):
    """Figure 7 of a checkpoint: distance [L,H] in pixels, the rest from its parameters."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained", width_ratios=[1.75, 1.3, 1.1])
    figure.get_layout_engine().set(wspace=0.06)
    draw_filters(axes[0], filters_pca(params["embed"]["kernel"]))
    draw_similarity(axes[1], position_similarity(params["position"], config.grid))
    draw_distance(axes[2], distance, patch_distances(config.grid, config.patch_size).mean())
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ==== Command line ==========================================================================================


def check_out(out):
    """The path of a figure, as a Path. ValueError where it cannot be written, or without matplotlib."""
    out = pathlib.Path(out)
    fits = out.parent.is_dir() and os.access(out.parent, os.W_OK) and out.suffix in (".png", ".pdf", ".svg")
    require(fits, f"--out {out} cannot be written: it needs a folder that is there and .png, .pdf or .svg")
    require(importlib.util.find_spec("matplotlib"), "no figures without matplotlib: pip install matplotlib")
    return out


def run(args):
    """Reads, looks, prints and draws. ValueError for what a flag or a file gets wrong."""
    out = check_out(args.out)
    params, config = read_checkpoint(args)
    require(config.channels in (1, 3), f"the checkpoint has {config.channels} channels, a picture 1 or 3")
    inputs, pictures = zip(*(read_picture(path, config) for path in args.images))
    masks, distance = look(params, np.stack(inputs), config)
    uniform = patch_distances(config.grid, config.patch_size).mean()
    print(f"mean attention distance in pixels; uniform attention has {uniform:.1f}:")
    for i, heads in enumerate(distance, 1):
        print(f"layer {i:2}  mean {heads.mean():5.1f}  heads {' '.join(f'{x:5.1f}' for x in sorted(heads))}")
    inside = out.with_stem(f"{out.stem}_inside")
    draw_rollout(out, pictures, masks)
    draw_inside(inside, params, distance, config)
    print(f"wrote {out} and {inside}")


def main(argv=None):
    """Command line: see the docstring of the file. Bad input: one sentence, exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_checkpoint_flags(parser.add_argument)
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="pictures of any size; their centre counts"
    )
    parser.add_argument("--out", default="vit_attention.png", help="figure to draw (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        run(args)
    except ValueError as error:
        parser.exit(2, f"vit_attention.py: {error}\n")


if __name__ == "__main__":
    main()
