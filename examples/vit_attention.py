"""What a trained Vision Transformer looks at, and what is inside it: Figures 6 and 7 of the paper.

What      --out F: pictures, each beside itself darkened by the attention rollout of the class
          token (Figure 6). F with _inside before its suffix: principal components of the patch
          filters, similarity of the position embeddings, and the mean attention distance of each
          head over the pictures given (Figure 7).
Paper     Dosovitskiy et al. 2020, arXiv:2010.11929 v2, Section 4.5 and Appendix D.7, D.8.
Needs     A checkpoint that vit.load reads; big_vision.py converts those of big_vision. Its Config
          is read from the shapes of its arrays. What they do not tell is a flag: --gelu, and
          --grid unless the patches form a square. Matplotlib, and pillow, which comes with it.
Run       python examples/real_vit.py --out vit_s14.npz --photos photos
          python examples/vit_attention.py vit_s14.npz photos/*.png --gelu exact
          8 s on two CPU cores
Axes      B pictures  H, W rows and columns of pixels  C channels  h, w the same of a patch
          T tokens, class token first  D width  L blocks; in [L,H] and [L,B,H,T,T] H is heads
"""

import argparse
import math
import pathlib
import re
import sys
from typing import NamedTuple

import jax
import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import convert  # noqa: E402, data/convert.py, found by the line above

import vit  # noqa: E402

require = vit.require

# ==== Checkpoint ==================================================================================


def read_checkpoint(path, gelu, grid=None):
    """Parameters and Config of a checkpoint. grid: its patches as "ROWSxCOLUMNS", if no square."""
    flat = vit.read_npz(path)
    fields = {"gelu": gelu}
    if grid is not None:
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", grid)
        require(match, f"--grid {grid} is not of the form ROWSxCOLUMNS, as 14x14")
        kernel = np.shape(vit.released_names(flat).get("embedding/kernel"))
        require(len(kernel) == 4, f"{path} has no array embedding/kernel [h,w,C,D]: it is no ViT")
        fields["image_size"] = (int(match[1]) * kernel[0], int(match[2]) * kernel[1])
    config = vit.infer_config(flat, **fields)
    return vit.from_official(flat, config), config


# ==== The three quantities of Figure 7, and the rollout of Figure 6 ===============================


def filters_pca(kernel, count=28):
    """Principal components of the D patch filters, strongest first. [h,w,C,D] -> [count,h,w,C].

    Their norm is 1. The sign of a component means nothing; here its largest value is positive.
    There are fewer than count where the filters span fewer dimensions.
    """
    *patch, D = kernel.shape
    filters = np.asarray(kernel, np.float64).reshape(-1, D).T  # [D,h*w*C]
    centred = filters - filters.mean(0)
    _, strength, rows = np.linalg.svd(centred, full_matrices=False)
    rows = rows[strength > 1e-9 * strength[0]][:count]
    largest = np.abs(rows).argmax(1)
    signs = np.sign(rows[np.arange(len(rows)), largest])
    return (signs[:, None] * rows).reshape(-1, *patch)


def position_similarity(table, grid):
    """Cosine between the positions of any two patches. [T,D] -> [rows,columns,rows,columns]."""
    patches = np.asarray(table, np.float64)[-math.prod(grid) :]  # without that of the class token
    patches = patches / np.linalg.norm(patches, axis=1, keepdims=True)
    return (patches @ patches.T).reshape(*grid, *grid)


def patch_distances(grid, patch_size):
    """Distance in pixels between the centres of any two patches, row by row. -> [T,T]."""
    places = np.stack(np.mgrid[: grid[0], : grid[1]], axis=-1)  # [rows,columns,2]
    centres = places.reshape(-1, 2) * patch_size
    return np.linalg.norm(centres[:, None] - centres, axis=-1)


def attention_distance(maps, grid, patch_size):
    """How far patches look, in pixels: distance averaged by attention (Sec. 4.5).

    [L,B,H,T,T] -> [L,H]. Attention to the class token has no distance: only patches count, and
    their weights are scaled to sum to 1.
    """
    patches = math.prod(grid)
    weights = np.asarray(maps)[..., -patches:, -patches:]
    total = weights.sum(-1, keepdims=True)
    weights = weights / np.maximum(total, 1e-30)  # a patch may look at the class token alone
    distance = np.einsum("lbhts,ts->lbht", weights, patch_distances(grid, patch_size))
    return distance.mean((1, 3))


def look(params, images, config):
    """Rollout to the output, and attention distance. uint8 [B,H,W,C] -> [B,rows,columns], [L,H].

    One picture at a time, since all attention maps of ViT-L/16 at 384 pixels take 0.5 GB.
    """
    maps_of = jax.jit(lambda params, image: vit.attention_maps(params, image, config))
    masks = []
    distances = []
    for image in images:
        maps = maps_of(params, vit.preprocess(image[None]))  # [L,1,H,T,T]
        rollout = np.asarray(vit.attention_rollout(maps))[0]  # [T,T]
        if config.pool == "token":
            source = rollout[0]  # what the class token draws from each token
        else:
            source = rollout.mean(0)
        masks.append(source[-math.prod(config.grid) :].reshape(config.grid))
        distances.append(attention_distance(maps, config.grid, config.patch_size))
    return np.stack(masks), np.mean(distances, axis=0)


# ==== Pictures ====================================================================================


class Picture(NamedTuple):
    """The centre of a picture, cut to the proportions of the model's input."""

    pixels: np.ndarray  # uint8 [H,W,C], what the model sees
    display: np.ndarray  # the same with more pixels, for the eye
    more_frames: bool  # the file has frames or pages after this one


def read_picture(path, config, display_rows=320):
    """The Picture in a file, for a model of this Config. ValueError for what is no picture."""
    require(pathlib.Path(path).exists(), f"{path} does not exist")
    image, more_frames = convert.open_picture(path)
    if config.channels == 1:
        image = image.convert("L")
    rows, columns = config.image_size
    scale = min(image.height / rows, image.width / columns)
    height = max(1, round(rows * scale))
    width = max(1, round(columns * scale))
    top = (image.height - height) // 2
    left = (image.width - width) // 2
    image = image.crop((left, top, left + width, top + height))

    def resized(factor):
        size = (round(columns * factor), round(rows * factor))
        pixels = np.asarray(image.resize(size))  # bicubic, with antialiasing
        return pixels.reshape(*pixels.shape[:2], config.channels)

    return Picture(resized(1), resized(max(1, display_rows / rows)), more_frames)


# ==== Figure 6 ====================================================================================


def draw_rollout(path, pictures, masks):
    """Figure 6: pictures, uint8 [H,W,C] each, beside themselves times their masks [rows,columns].

    Brightness is in proportion to the rollout. The brightest twentieth of the patches is cut off
    at 1, since one patch can have 20 times the mean: it would leave all others black.
    """
    import matplotlib.pyplot as plt

    columns = min(3, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    height, width = pictures[0].shape[:2]
    size = (3.4 * columns, 1.7 * rows * height / width + 0.29)
    figure, axes = plt.subplots(
        rows, 2 * columns, figsize=size, squeeze=False, layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for column in range(columns):
        axes[0, 2 * column].set_title("Input", fontsize=10)
        axes[0, 2 * column + 1].set_title("Attention", fontsize=10)
    for ax in axes.flat:
        ax.set_axis_off()

    for (left, right), picture, mask in zip(axes.reshape(-1, 2), pictures, masks):
        mask = np.minimum(mask / np.quantile(mask, 0.95), 1)
        mask = jax.image.resize(mask[..., None], (height, width, 1), "bilinear")
        rgb = np.broadcast_to(picture, (height, width, 3))  # grey becomes RGB
        left.imshow(rgb)
        right.imshow((rgb * np.asarray(mask)).astype(np.uint8))
    figure.savefig(path, dpi=120, bbox_inches="tight", pad_inches=0.03)
    plt.close(figure)


# ==== Figure 7 ====================================================================================


def mosaic(tiles, fill):
    """Tiles side by side with lines of fill between. [r,c,h,w,...] -> [r*(h+1)-1,c*(w+1)-1,...]."""
    r, c, h, w, *rest = tiles.shape
    padding = [(0, 0), (0, 0), (0, 1), (0, 1)] + [(0, 0)] * len(rest)
    tiles = np.pad(tiles, padding, constant_values=fill)
    tiles = tiles.swapaxes(1, 2)  # [r,h+1,c,w+1,...]
    return tiles.reshape(r * (h + 1), c * (w + 1), *rest)[:-1, :-1]


def draw_filters(ax, components):
    """Figure 7, left. components [n,h,w,C], each scaled so that 0 is grey."""
    n, h, w, C = components.shape
    largest = np.abs(components).max((1, 2, 3), keepdims=True)
    scaled = 0.5 + 0.5 * components / largest
    columns = min(7, n)
    missing = -n % columns  # in the last row, filled up with white
    scaled = np.pad(scaled, ((0, missing), (0, 0), (0, 0), (0, 0)), constant_values=1)
    scaled = np.broadcast_to(scaled, (*scaled.shape[:3], 3))  # grey becomes RGB
    ax.imshow(mosaic(scaled.reshape(-1, columns, h, w, 3), fill=1.0))
    ax.set_axis_off()
    colours = "RGB" if C == 3 else "Grey"
    ax.set_title(f"{colours} embedding filters\n(first {n} principal components)")


def draw_similarity(ax, similarity):
    """Figure 7, centre. similarity [rows,columns,rows,columns]; at most 8 tiles a side."""
    rows, columns = similarity.shape[:2]
    every = math.ceil(max(rows, columns) / 8)
    tiles = mosaic(similarity[::every, ::every], fill=np.nan)
    image = ax.imshow(tiles, vmin=-1, vmax=1)
    for axis, count, name in ((ax.xaxis, columns, "column"), (ax.yaxis, rows, "row")):
        shown = np.arange(0, count, every)
        middles = (np.arange(len(shown)) + 0.5) * (count + 1) - 1
        axis.set_ticks(middles, shown + 1)
        axis.set_label_text(f"Input patch {name}")
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.9, ticks=[-1, 0, 1])
    bar.set_label("Cosine similarity", labelpad=-4)
    ax.set_title("Position embedding similarity")


def draw_distance(ax, distance, uniform):
    """Figure 7, right. distance [L,H] in pixels; uniform: with equal attention to all patches."""
    layers = np.arange(1, len(distance) + 1)
    ax.axhline(uniform, color="0.6", linestyle="--", linewidth=1, label="uniform attention")
    ax.plot(layers, distance.mean(1), color="C0", alpha=0.4, label="mean of the heads")
    ax.plot(layers, distance, "o", color="C0", markersize=4)
    ax.plot([], [], "o", color="C0", markersize=4, label="a head")  # for the legend
    ax.set(xlabel="Network depth (layer)", ylabel="Mean attention distance (pixels)")
    ax.set_ylim(0, 1.1 * max(uniform, distance.max()))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(loc="lower right", fontsize=8)
    ax.set_title("Mean attention distance")


def draw_inside(path, params, distance, config):
    """Figure 7 of a checkpoint: distance [L,H] in pixels, the rest from its parameters."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, 3, figsize=(14, 4), layout="constrained", width_ratios=[1.75, 1.3, 1.1]
    )
    figure.get_layout_engine().set(wspace=0.06)
    draw_filters(axes[0], filters_pca(params["embed"]["kernel"]))
    draw_similarity(axes[1], position_similarity(params["position"], config.grid))
    uniform = patch_distances(config.grid, config.patch_size).mean()
    draw_distance(axes[2], distance, uniform)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ==== Command line ================================================================================


def print_distances(distance, uniform):
    """Attention distance [L,H] in pixels, a line per layer, its heads in order."""
    print(f"mean attention distance in pixels; uniform attention has {uniform:.1f}:")
    for i, heads in enumerate(distance, 1):
        listed = " ".join(f"{x:5.1f}" for x in sorted(heads))
        print(f"layer {i:2}  mean {heads.mean():5.1f}  heads {listed}")


def main(argv=None) -> int:
    """Exit status 2 for a mistake, in one line; 1 where no figure can be drawn."""
    parser = argparse.ArgumentParser(
        description="Draws what a trained Vision Transformer looks at, and what is inside it."
    )
    parser.add_argument("checkpoint", help=".npz that vit.load reads")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="pictures; their centre counts")
    parser.add_argument("--gelu", choices=vit.CHOICES["gelu"], default="tanh", help="of the model")
    parser.add_argument("--grid", metavar="ROWSxCOLUMNS", help="patches, if they form no square")
    parser.add_argument("--out", default="vit_attention.png", help="the first figure")
    args = parser.parse_args(argv)
    out = pathlib.Path(args.out)
    try:
        vit.check_out(out)
        inside = out.with_stem(f"{out.stem}_inside")
        vit.check_out(inside)
        params, config = read_checkpoint(args.checkpoint, args.gelu, args.grid)
        require(
            config.channels in (1, 3),
            f"{args.checkpoint} takes images of {config.channels} channels; a picture has 1 or 3",
        )
        pictures = [read_picture(path, config) for path in args.images]
    except ValueError as error:
        print(f"vit_attention.py: {error}", file=sys.stderr)
        return 2

    for path, picture in zip(args.images, pictures):
        if picture.more_frames:
            print(f"used only the first frame of {path}")
    masks, distance = look(params, [picture.pixels for picture in pictures], config)
    print_distances(distance, patch_distances(config.grid, config.patch_size).mean())
    try:
        draw_rollout(out, [picture.display for picture in pictures], masks)
        draw_inside(inside, params, distance, config)
    except Exception as error:  # no matplotlib, or one that cannot draw here
        print(f"vit_attention.py: no figure: {error}", file=sys.stderr)
        return 1
    print(f"wrote {out} and {inside}")
    return 0


if __name__ == "__main__":
    vit.run_program(main)
