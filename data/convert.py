"""Makes the .npz that --data takes: images uint8 [N,H,W] or [N,H,W,C], labels int32 [N] in 0..classes-1.

From      a folder with MNIST's IDX files: train-images-idx3-ubyte and so on, plain or .gz; Fashion-MNIST too
          a folder with CIFAR's binaries: data_batch_1.bin ... test_batch.bin, or train.bin and test.bin
          an archive as Keras has them: .npz with x_train, y_train, x_test, y_test
          a folder of pictures: one sub-folder per class, named as the class (this needs pillow)
Not here  pickles, as in CIFAR's "python version": opening one can run any code that its maker put there
Run       python data/convert.py FOLDER_OR_NPZ --out my.npz --split train
Axes      N pictures  H rows  W columns  C channels
"""

import argparse
import contextlib
import gzip
import math
import os
import pathlib
import re
import zipfile
import zlib

import numpy as np

SPLITS = {"train": ("train",), "test": ("test",), "all": ("train", "test")}
CIFAR_FILES = {
    "cifar10": {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]},
    "cifar100": {"train": ["train.bin"], "test": ["test.bin"]},
}
CIFAR_LABELS = {  # label bytes before the pixels, which of them, number of classes, file with their names
    None: (1, 0, 10, "batches.meta.txt"),  # CIFAR-10
    "coarse": (2, 0, 20, "coarse_label_names.txt"),
    "fine": (2, 1, 100, "fine_label_names.txt"),
}
DEFAULTS = {"split": "all", "labels": "fine", "size": None, "grey": False}
PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def kind_of(source):
    """A key of READERS, told from what lies at the path `source`."""
    if not source.exists():
        raise ValueError(f"{source} does not exist")
    if source.is_file():
        if zipfile.is_zipfile(source):
            return "keras"
        raise ValueError(f"{source} is no complete .npz archive; for all other sources give their folder")
    files = {path.name for path in source.iterdir() if path.is_file()}
    if any(re.search(r"[-.]idx\d-ubyte", name) for name in files):
        return "idx"
    for kind, parts in CIFAR_FILES.items():
        if files & {*parts["train"], *parts["test"]}:
            return kind
    if "data_batch_1" in files or {"train", "test"} <= files:
        raise ValueError(f"{source} has CIFAR's python version, which is pickles: take the binary version")
    if any(path.is_dir() for path in source.iterdir()):
        return "pictures"
    raise ValueError(f"{source} holds neither IDX files, nor CIFAR's .bin files, nor a sub-folder per class")


def first_file(paths, split):
    """The first of `paths` that exists."""
    for path in paths:
        if path.is_file():
            return path
    raise ValueError(f"{paths[0]} is missing: --split {split} needs it")


def read_idx(folder, stem, rank, split):
    """One IDX file -> uint8 array with `rank` axes. Magic number and sizes are big-endian, 4 bytes each."""
    path = first_file([folder / f"{stem}{c}idx{rank}-ubyte{z}" for z in ("", ".gz") for c in "-."], split)
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":  # by content, not by name: some downloaders unpack and keep the .gz
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is a damaged gzip file ({error}): fetch it again") from None
    magic, *sizes = (int.from_bytes(raw[4 * i : 4 * i + 4], "big") for i in range(rank + 1))
    if magic != 0x0800 + rank:  # 08: unsigned bytes
        raise ValueError(f"{path} starts with magic number {magic}, required is {0x0800 + rank}")
    start = 4 * (rank + 1)
    if len(raw) != start + math.prod(sizes):
        raise ValueError(f"{path} has {len(raw)} bytes, its sizes {sizes} require {start + math.prod(sizes)}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(sizes)


def from_idx(folder, split):
    """MNIST's IDX files -> list of (where, images [N,H,W], labels [N]), one per part; no names."""
    parts = []
    for stem in [{"train": "train", "test": "t10k"}[part] for part in SPLITS[split]]:
        images = read_idx(folder, f"{stem}-images", 3, split)
        parts.append((folder / stem, images, read_idx(folder, f"{stem}-labels", 1, split)))
    return parts, None


def from_cifar(folder, split, labels=None):
    """CIFAR's binaries -> list of (where, images [N,32,32,3], labels [N]), one per file; names, if there."""
    label_bytes, column, classes, names_file = CIFAR_LABELS[labels]
    files = CIFAR_FILES["cifar100" if labels else "cifar10"]
    record = label_bytes + 3 * 32 * 32  # labels, then a red, a green and a blue plane, row by row
    parts = []
    for name in [name for part in SPLITS[split] for name in files[part]]:
        path = first_file([folder / name], split)
        raw = np.fromfile(path, np.uint8)
        if raw.size == 0 or raw.size % record:
            raise ValueError(f"{path} has {raw.size} bytes, required is a multiple of the record, {record}")
        rows = raw.reshape(-1, record)
        if rows[:, column].max() >= classes:
            raise ValueError(f"{path} has a label {rows[:, column].max()}, required is 0..{classes - 1}")
        images = rows[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        parts.append((path, images, rows[:, column]))
    names = (folder / names_file).read_text().split() if (folder / names_file).is_file() else None
    if names is not None and len(names) != classes:
        raise ValueError(f"{folder / names_file} has {len(names)} class names, required is {classes}")
    return parts, names


def from_keras(path, split):
    """Keras' archive -> list of (where, images [N,H,W] or [N,H,W,C], labels [N]), one per part; no names."""
    parts = []
    try:
        with np.load(path, allow_pickle=False) as archive:
            for part in SPLITS[split]:
                if missing := {f"x_{part}", f"y_{part}"} - {*archive}:
                    held = ", ".join(list(archive)[:8])
                    raise ValueError(f"--split {split} needs {min(missing)}, the archive holds {held}")
                images, labels = archive[f"x_{part}"], archive[f"y_{part}"]
                if labels.ndim == 2 and labels.shape[1] == 1:  # [N,1], as Keras has CIFAR's
                    labels = labels[:, 0]
                parts.append((f"{path}: {part}", images, labels))
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if "allow_pickle" in str(error):  # numpy's message at an array of Python objects
            error = "it holds pickled Python objects, required are plain arrays"
        raise ValueError(f"{path} cannot be used: {error}") from None
    return parts, None


def read_picture(path, height, width, grey):
    """One picture file -> uint8 [H,W,3], or [H,W] if grey; what is transparent becomes white."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ValueError("pictures need pillow: pip install pillow (matplotlib brings it)") from None
    try:
        with Image.open(path) as file:
            mode, picture = file.mode, ImageOps.exif_transpose(file).convert("RGBA")
    except Exception:  # pillow's decoders raise a dozen different types, all about this file
        raise ValueError(f"{path} cannot be read as a picture: repair or remove it") from None
    if mode[0] in "IF":  # pillow turns every value above 255 white
        raise ValueError(f"{path} has more than 8 bits per channel (mode {mode}), required is 8")
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture).convert("L" if grey else "RGB")
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


def from_pictures(folder, size, grey):
    """A sub-folder per class -> [(where, images [N,H,W,3] or [N,H,W], labels [N])], names; sorted by name."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size or "")
    if not match:
        raise ValueError(f"--size {size}: a folder of pictures needs rows x columns, as in --size 32x32")
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    images, labels = [], []
    for label, name in enumerate(names):
        files = [p for p in (folder / name).iterdir() if p.suffix.lower() in PICTURES and p.name[0] != "."]
        if not files:
            raise ValueError(f"{folder / name} has no pictures, required is one ({' '.join(PICTURES)})")
        for path in sorted(files, key=lambda path: path.name):
            images.append(read_picture(path, int(match[1]), int(match[2]), grey))
        labels += [label] * len(files)
    if not images:
        raise ValueError(f"{folder} has no sub-folder with pictures, required is one per class")
    return [(folder, np.stack(images), np.array(labels))], names


def joined(parts, names):
    """List of (where, images, labels), names or None -> the arrays of the .npz, checked for every source."""
    for where, images, labels in parts:
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.size == 0:
            found = f"{images.dtype} {list(images.shape)}"
            raise ValueError(f"{where}: images are {found}, required is uint8 [N,H,W] or [N,H,W,C]")
        if labels.dtype.kind not in "iu" or labels.ndim != 1:
            found = f"{labels.dtype} {list(labels.shape)}"
            raise ValueError(f"{where}: labels are {found}, required are integers [N] or [N,1]")
        if len(images) != len(labels):
            raise ValueError(f"{where}: {len(images)} images, {len(labels)} labels, required is one for each")
        if labels.min() < 0 or labels.max() >= 2**16:
            raise ValueError(f"{where}: labels {labels.min()}..{labels.max()}, required is 0..65535 at most")
        if images.shape[1:] != (shape := parts[0][1].shape[1:]):
            raise ValueError(
                f"{where}: images of {images.shape[1:]}, required is {shape} as in {parts[0][0]}"
            )
    images = np.ascontiguousarray(np.concatenate([images for _, images, _ in parts]))
    arrays = {"images": images, "labels": np.concatenate([labels for *_, labels in parts]).astype(np.int32)}
    return arrays if names is None else arrays | {"class_names": np.array(names)}


def save(out, arrays):
    """Writes another name, then renames. Equal arrays give equal bytes on every machine: numpy dates all
    members 1980-01-01, and nothing is compressed (what deflate makes depends on the version of zlib)."""
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, out)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):  # once renamed it is gone
            temporary.unlink()


READERS = {  # what reads a source of this kind, and the options it takes
    "idx": (from_idx, {"split"}),
    "cifar10": (from_cifar, {"split"}),
    "cifar100": (from_cifar, {"split", "labels"}),
    "keras": (from_keras, {"split"}),
    "pictures": (from_pictures, {"size", "grey"}),
}


def convert(source, out, **given):
    """Reads `source`, whatever its kind, writes `out`, returns its arrays; ValueError for what is wrong."""
    if out.suffix != ".npz" or out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"--out {out} must be a file name that ends in .npz, in a folder that exists")
    kind = kind_of(source)
    if out.exists() and out.samefile(source):
        raise ValueError(f"--out {out} is the source itself, required is another name")
    reader, takes = READERS[kind]
    for name in given:
        if given[name] != DEFAULTS[name] and name not in takes:
            raise ValueError(f"--{name} means nothing for {source} (kind {kind}): leave it out")
    arrays = joined(*reader(source, **{name: given[name] for name in takes}))
    save(out, arrays)
    return arrays


def main(argv=None):
    """The command line; a mistake ends it with one line and exit status 2."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("source", type=pathlib.Path, help="a folder, or an .npz archive as Keras has them")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the .npz to write, or to replace")
    parser.add_argument("--split", choices=SPLITS, help="all (default): train, then test")
    parser.add_argument("--labels", choices=("fine", "coarse"), help="CIFAR-100: 100 classes (default) or 20")
    parser.add_argument("--size", metavar="HxW", help="pictures: resize all to H rows and W columns")
    parser.add_argument("--grey", action="store_true", help="pictures: one channel, images [N,H,W]")
    parser.set_defaults(**DEFAULTS)
    arguments = parser.parse_args(argv)
    try:
        arrays = convert(**vars(arguments))
    except (ValueError, OSError) as error:
        parser.exit(2, f"convert.py: {error}\n")
    classes = int(arrays["labels"].max()) + 1
    print(f"{arguments.out}: images uint8 {list(arrays['images'].shape)}, {classes} classes")


if __name__ == "__main__":
    main()
