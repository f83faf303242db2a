"""Trains a variational diffusion model (vdm.py) on your own pictures.

    python examples/vdm_train.py --data data/digits8x8.npz --levels 17 --steps 1000 --out run
    python examples/vdm_train.py --data cifar.npz --recipe CIFAR-10 --mesh data=8,model=1 --out run
    python examples/vdm_train.py --data mine.npz --set depth=4 --set "fourier=[6, 7]" --out run

Data      --data is an .npz with the array images, integers [B,H,W] or [B,H,W,C]; the largest is
          below --levels. data/convert.py makes one. A tenth is held out, unless --validation names
          pictures to hold out instead.
Model     --recipe names a row of vdm.RECIPES, which gives the size of the network, the batch, the
          learning rate and the average of the weights. --set changes a field of vdm.Config.
Writes    --out gets metrics.csv, state/ for --resume, and at the end model.npz with the averaged
          weights under the official names, model.json with the Config, and samples.png.
Resume    --resume goes on from the last complete state, bit for bit on the same mesh: the pictures
          of step n depend on the data, the seed and n alone. --steps may be another number.
Needs     examples/requirements.txt (orbax-checkpoint, pillow).
"""

import argparse
import contextlib
import dataclasses
import json
import math
import pathlib
import sys
import time
import zlib

import jax
import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]  # for the imports below, from any folder
import train  # noqa: E402

import vdm  # noqa: E402
from vdm import make_mesh, read_npz, require, run_program  # noqa: E402

SAMPLES = 16  # pictures in samples.png

# ==== Data and model ==============================================================================


def read_images(path, levels):
    """The pictures of an .npz, integers [B,H,W,C]. Raises ValueError if they are none."""
    data = read_npz(path)
    require("images" in data, f"{path} has no array images")
    images = data["images"]
    if images.ndim == 3:
        images = images[..., None]
    require(
        images.ndim == 4 and images.dtype.kind in "iu" and len(images) > 0,
        f"{path}: images are {images.dtype} {data['images'].shape}, not integers [B,H,W(,C)]",
    )
    low = images.min()
    high = images.max()
    require(
        0 <= low and high < levels,
        f"{path}: images are from {low} to {high}, but of --levels {levels} the largest is "
        f"{levels - 1}",
    )
    return images


def read_data(args):
    """Pictures to train on, and held-out ones."""
    images = read_images(args.data, args.levels)
    if args.validation:
        held_out = read_images(args.validation, args.levels)
        require(
            held_out.shape[1:] == images.shape[1:],
            f"{args.validation}: pictures {held_out.shape[1:]} are not {images.shape[1:]}",
        )
        return images, held_out
    require(len(images) >= 10, f"{args.data} has {len(images)} pictures, fewer than 10")
    images = images[np.random.default_rng(0).permutation(len(images))]
    held = len(images) // 10
    return images[held:], images[:held]


def make_config(args, images) -> vdm.Config:
    """The Config of the flags, for these pictures."""
    sizes = {**vdm.SIZES, "digits": vdm.DIGITS}
    H, W, C = images.shape[1:]
    own = {"image_size": (H, W), "channels": C, "levels": args.levels}
    if args.dropout is not None:
        own["dropout"] = args.dropout
    fields = train.fields_to_set(argparse.Namespace(model="vdm", set=args.set))
    require("levels" not in fields, "--set levels: the flag --levels is for that")
    return dataclasses.replace(sizes[args.recipe], **own, **fields)


def fill_in_recipe(args) -> vdm.Recipe:
    """The recipe with the flags that were given in place of its own values."""
    names = ", ".join(vdm.RECIPES)
    require(args.recipe in vdm.RECIPES, f"--recipe {args.recipe} is not one of {names}")
    recipe = vdm.RECIPES[args.recipe]
    given = {name: getattr(args, name) for name in ("batch", "steps", "learning_rate", "ema")}
    recipe = recipe._replace(**{name: x for name, x in given.items() if x is not None})
    require(recipe.batch >= 1, f"--batch {recipe.batch} is not at least 1")
    require(recipe.steps >= 1, f"--steps {recipe.steps} is not at least 1")
    require(
        0 < recipe.learning_rate < math.inf,
        f"--learning-rate {recipe.learning_rate} is not a finite number above 0",
    )
    return recipe


def load_model(folder):
    """Weights and Config of a folder that this program wrote. Raises ValueError without them."""
    folder = pathlib.Path(folder)
    path = folder / "model.json"
    require(path.exists(), f"{folder} has no model.json: it is no folder of vdm_train.py")
    try:
        about = json.loads(path.read_text())
        model = about["model"]
        require(model == "vdm", f"this is a model of {model}, not of vdm")
        config = vdm.Config(**about["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not readable: {train.first_line(error)}") from None
    return vdm.load(folder / "model.npz", config), config


# ==== Training ====================================================================================


def settings_of(recipe: vdm.Recipe, config: vdm.Config, args, images, held_out):
    """Name -> value of everything that must be the same for --resume."""
    settings = {f"recipe.{name}": value for name, value in recipe._asdict().items()}
    for name in ("steps", "bits", "source"):  # they do not change what a step does
        del settings[f"recipe.{name}"]
    for name, value in train.as_json(config).items():
        settings[f"config.{name}"] = value
    settings["seed"] = args.seed
    settings["checksum of the pictures"] = [
        zlib.crc32(np.ascontiguousarray(part)) for part in (images, held_out)
    ]
    return settings


def save_samples(path, pictures, levels):
    """The first pictures of integers [B,H,W,C] as a square in one picture file.

    As many are shown as make a square. Of more than three channels the first is shown, and of two.
    """
    from PIL import Image

    count, H, W, C = pictures.shape
    if C != 3:
        pictures = pictures[..., :1]
    side = math.isqrt(count)
    rows = pictures[: side**2].reshape(side, side, H, W, -1).swapaxes(1, 2)  # [side,H,side,W,C]
    sheet = rows.reshape(side * H, side * W, -1)
    sheet = (sheet * 255 // (levels - 1)).astype(np.uint8)
    if C != 3:
        sheet = sheet[..., 0]
    scale = max(1, 256 // H)
    size = (scale * side * W, scale * side * H)
    Image.fromarray(sheet).resize(size, Image.Resampling.NEAREST).save(path)


def save_model(out, params, config):
    """Writes model.npz and model.json. Raises SaveError if that cannot be done."""
    about = {"model": "vdm", "config": train.as_json(config)}
    train.write_text(out / "model.json", json.dumps(about, indent=1))
    try:
        vdm.save(out / "model.npz", jax.device_get(params), config)
    except ValueError as error:
        raise train.SaveError(train.first_line(error)) from None


def run_training(args, recipe, config, mesh, images, held_out, states):
    """Trains to the end, evaluates, saves the model, and draws samples."""
    init_key, step_key, test_key, sample_key = jax.random.split(jax.random.key(args.seed), 4)
    optimizer = vdm.recipe_optimizer(recipe)
    state = vdm.init_state(init_key, config, optimizer, mesh)
    settings = settings_of(recipe, config, args, images, held_out)
    if args.resume:
        if states.latest() is None:
            print(f"no state in {states.folder} yet: this is a new run")
        else:
            state = states.restore(state, settings)
    first = int(state.step)
    out = pathlib.Path(args.out)
    log = train.Metrics(out / "metrics.csv", first)
    step = vdm.make_train_step(config, optimizer, mesh, recipe.ema)
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(f"{size:,} parameters, {len(images)} pictures, {len(held_out)} held out", flush=True)

    def evaluate(params):
        """The bound on held-out pictures, with one key, so that evaluations can be compared."""
        return vdm.bits_per_dim(
            params, held_out, test_key, config, mesh=mesh, batch=args.test_batch
        )

    cost = None
    recent = []
    started = time.time()
    for done in range(first + 1, recipe.steps + 1):
        rows = np.random.default_rng((args.seed, done)).integers(len(images), size=recipe.batch)
        state, metrics = step(state, {"images": images[rows]}, step_key)
        recent.append(metrics)
        saves = done % args.every == 0 or done == recipe.steps
        reports = done % args.report == 0 or saves
        if not reports:
            continue
        row = {"step": done, **train.mean_metrics(recent, done)}
        recent = []
        seconds_per_step = (time.time() - started) / (done - first)
        left = seconds_per_step * (recipe.steps - done)
        print(
            f"step {done}/{recipe.steps}  loss {row['loss']:.3f} bits per dimension  "
            f"{left:.0f} s left",
            flush=True,
        )
        if saves:
            if not train.all_finite(state.params):
                raise FloatingPointError(f"step {done}: there are weights that are not finite")
            cost = evaluate(state.ema)
            print(f"held-out bits per dimension {describe(cost)}", flush=True)
            row.update({f"held_out_{name}": value for name, value in cost.items()})
        log.add(row)  # before the state: what is saved is in the table, too
        if saves:
            states.save(state, settings)

    if cost is None:  # the state that was resumed is the last one
        cost = evaluate(state.ema)
    save_model(out, state.ema, config)
    print(f"wrote {out / 'model.npz'}")
    devices = mesh.shape["data"]
    count = devices * math.ceil(SAMPLES / devices)
    pictures = vdm.sample(state.ema, sample_key, count, config, steps=args.sample_steps, mesh=mesh)
    save_samples(out / "samples.png", np.asarray(pictures)[:SAMPLES], config.levels)
    print(f"wrote {out / 'samples.png'}")
    print(f"result: held-out bits per dimension {describe(cost)}")


def describe(cost) -> str:
    """The total of bits_per_dim, its standard error, and the three terms."""
    terms = ", ".join(f"{name} {cost[name]:.3f}" for name in vdm.Terms._fields)
    return f"{cost['total']:.3f} +- {cost['standard_error']:.3f} ({terms})"


# ==== Command line ================================================================================


def make_parser():
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data", required=True, help="an .npz with the array images")
    add("--validation", help="other pictures to hold out (default: a tenth of --data)")
    add("--levels", type=int, default=256, help="values of a pixel (default: 256)")
    add("--out", default="run", help="folder for everything that is written (default: run)")
    add("--recipe", default="digits", help=f"{', '.join(vdm.RECIPES)} (default: digits)")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of vdm.Config")
    add("--dropout", type=float, help="rate (default: that of the model)")
    add("--steps", type=int, help="(default: that of the recipe)")
    add("--batch", type=int, help="pictures per step (default: that of the recipe)")
    add("--learning-rate", type=float, help="(default: that of the recipe)")
    add("--ema", type=float, help="decay of the average of the weights (default: the recipe's)")
    add("--test-batch", type=int, default=64, help="pictures per step of an evaluation")
    add("--sample-steps", type=int, default=250, help="steps from noise to a sample")
    add("--mesh", default="data=1,model=1", help="number of devices on each axis")
    add("--report", type=int, default=50, help="steps between lines of progress")
    add("--every", type=int, default=500, help="steps between evaluations and states")
    add("--keep", type=int, default=2, help="states to keep")
    add("--resume", action="store_true", help="go on from the last state, if there is one")
    add("--seed", type=int, default=0, help="of weights, batches and noise")
    return parser


def run(args):
    """Checks the flags, and trains."""
    for name in ("levels", "report", "every", "keep", "sample_steps", "test_batch"):
        value = getattr(args, name)
        require(value >= 1, f"{train.flag_of(name)} {value} is not at least 1")
    require(0 <= args.seed < 2**32, f"--seed {args.seed} is not in 0 to {2**32 - 1}")
    recipe = fill_in_recipe(args)
    images, held_out = read_data(args)
    config = make_config(args, images)
    mesh = make_mesh(args.mesh)
    devices = mesh.shape["data"]
    for flag, size in (("--batch", recipe.batch), ("--test-batch", args.test_batch)):
        require(size % devices == 0, f"{flag} {size} is not a multiple of data={devices}")
    out = pathlib.Path(args.out)
    train.make_folder(out)
    with contextlib.closing(train.States(out / "state", args.keep)) as states:
        require(
            args.resume or states.latest() is None,
            f"{states.folder} holds the states of a run: continue it with --resume, or choose "
            "another --out",
        )
        run_training(args, recipe, config, mesh, images, held_out, states)


def main(argv=None) -> int:
    """Returns the exit status: 0, 1 if a run fails, 2 for bad input; these print one line."""
    args = make_parser().parse_args(argv)
    try:
        run(args)
    except ValueError as error:
        print(f"vdm_train.py: {train.first_line(error)}", file=sys.stderr)
        return 2
    except (FloatingPointError, train.SaveError) as error:
        print(f"vdm_train.py: {train.first_line(error)}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        raise  # run_program ends without a word
    except OSError as error:
        print(f"vdm_train.py: {error.strerror or train.first_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    train.silence_orbax()
    run_program(main)
