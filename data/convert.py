"""Makes the .npz that --data takes from MNIST, CIFAR, Keras' archives or folders of pictures.

It holds images uint8 [N,H,W] or [N,H,W,C] and labels int32 [N] in 0..classes-1.

From      a folder with MNIST's IDX files: train-images-idx3-ubyte and so on, plain or .gz;
          Fashion-MNIST too
          a folder with CIFAR's binaries: data_batch_1.bin ... test_batch.bin,
          or train.bin and test.bin
          a folder with one of these in it, as torchvision's MNIST, which has the files in raw
          an archive as Keras has them: .npz with x_train, y_train, x_test, y_test
          a folder of pictures: one sub-folder per class, named as the class (this needs pillow)
Not here  pickles, as in CIFAR's "python version": opening one can run any code
          that its maker put there
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
import signal
import sys
import zipfile
import zlib
from typing import NamedTuple

import numpy as np

DEFAULTS = {"split": "all", "labels": "fine", "size": None, "grey": False}
SPLITS = {"train": ("train",), "test": ("test",), "all": ("train", "test")}
IDX_STEMS = {"train": "train", "test": "t10k"}
CIFAR_FILES = {
    "cifar10": {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]},
    "cifar100": {"train": ["train.bin"], "test": ["test.bin"]},
}
PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
CLUTTER = ("thumbs.db", "desktop.ini")  # Windows adds these to a folder of pictures


class CifarLabels(NamedTuple):
    """How CIFAR's binaries hold the labels."""

    label_bytes: int  # of each record, before its pixels
    column: int  # which of these bytes is the label
    classes: int
    names_file: str


CIFAR_LABELS = {  # by the value of --labels, which CIFAR-10 does not have
    None: CifarLabels(1, 0, 10, "batches.meta.txt"),
    "coarse": CifarLabels(2, 0, 20, "coarse_label_names.txt"),
    "fine": CifarLabels(2, 1, 100, "fine_label_names.txt"),
}


class Part(NamedTuple):
    """Pictures from one place of the source, not checked yet."""

    where: object  # a path or a text, for messages
    images: np.ndarray  # [N,H,W] or [N,H,W,C]
    labels: np.ndarray  # [N]


class Data(NamedTuple):
    """What a reader found in a source."""

    parts: list  # of Part
    class_names: list | None = None
    notes: tuple = ()  # lines to print about what was left out


class Listing(NamedTuple):
    """What lies right below a folder, without hidden files and clutter, sorted by name."""

    folders: list
    pictures: list  # by their suffix
    others: list


# ==== Which kind of source ========================================================================


def listing(folder):
    """The Listing of `folder`."""
    found = Listing([], [], [])
    # The names are compared, not the paths: on Windows paths have no upper and lower case.
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.name.startswith(".") or path.name.lower() in CLUTTER:
            continue
        if path.is_dir():
            found.folders.append(path)
        elif path.suffix.lower() in PICTURES:
            found.pictures.append(path)
        else:
            found.others.append(path)
    return found


def kind_of_files(folder):
    """What the files right below `folder` are: "idx", "cifar10", "cifar100", "pickles" or None."""
    files = {path.name for path in folder.iterdir() if path.is_file()}
    if any(re.search(r"[-.]idx\d-ubyte", name) for name in files):
        return "idx"
    for kind, names in CIFAR_FILES.items():
        if files & {*names["train"], *names["test"]}:
            return kind
    if "data_batch_1" in files or {"train", "test"} <= files:
        return "pickles"
    return None


def data_below(source):
    """The folder of the only data set below `source`, or None without one.

    It is found right below `source`, as in cifar-10-batches-bin or raw, or in MNIST/raw.
    """
    found = []
    for folder in listing(source).folders:
        for candidate in (folder, folder / "raw"):
            if candidate.is_dir() and kind_of_files(candidate):
                found.append(candidate)
    if len(found) > 1:
        folders = ", ".join(str(folder) for folder in found)
        raise ValueError(f"{source} holds several data sets, give the folder of one: {folders}")
    return found[0] if found else None


def find_data(source):
    """The file or folder to read, which is `source` or lies below it, and a key of READERS."""
    if not source.exists():
        raise ValueError(f"{source} does not exist")
    if source.is_file():
        if zipfile.is_zipfile(source):
            return source, "keras"
        raise ValueError(
            f"{source} is no complete .npz archive; for all other sources give their folder"
        )

    folder = source
    if not kind_of_files(source):
        folder = data_below(source) or source
    kind = kind_of_files(folder)
    if kind == "pickles":
        raise ValueError(
            f"{folder} has CIFAR's python version, which is pickles: take the binary version"
        )
    if kind:
        return folder, kind
    if any(path.is_dir() for path in source.iterdir()):
        return source, "pictures"
    raise ValueError(
        f"{source} holds neither IDX files, nor CIFAR's .bin files, nor a sub-folder per class"
    )


# ==== MNIST, CIFAR and Keras ======================================================================


def first_file(paths, split):
    """The first of `paths` that exists."""
    for path in paths:
        if path.is_file():
            return path
    raise ValueError(f"{paths[0]} is missing: --split {split} needs it")


def read_idx(folder, stem, rank, split):
    """One IDX file -> uint8 array with `rank` axes.

    The magic number and the sizes of the axes are big-endian, 4 bytes each.
    """
    names = [f"{stem}{mark}idx{rank}-ubyte{end}" for end in ("", ".gz") for mark in "-."]
    path = first_file([folder / name for name in names], split)
    raw = path.read_bytes()
    # The content tells what is compressed: some downloaders unpack a file and keep the name .gz.
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is a damaged gzip file ({error}): fetch it again") from None

    start = 4 * (1 + rank)  # where the data begin
    magic = int.from_bytes(raw[:4], "big")
    sizes = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4)]
    required_magic = 0x0800 + rank  # 08 stands for unsigned bytes
    if magic != required_magic:
        raise ValueError(f"{path} starts with magic number {magic}, required is {required_magic}")
    required_bytes = start + math.prod(sizes)
    if len(raw) != required_bytes:
        raise ValueError(f"{path} has {len(raw)} bytes, its sizes {sizes} require {required_bytes}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(sizes)


def from_idx(folder, split):
    """MNIST's IDX files: one part for training, one for testing. images [N,H,W], labels [N]."""
    parts = []
    for name in SPLITS[split]:
        stem = IDX_STEMS[name]
        images = read_idx(folder, f"{stem}-images", 3, split)
        labels = read_idx(folder, f"{stem}-labels", 1, split)
        parts.append(Part(folder / stem, images, labels))
    return Data(parts)


def read_cifar(path, labels):
    """One of CIFAR's binaries -> Part with images [N,32,32,3], labels [N]."""
    layout = CIFAR_LABELS[labels]
    # A record is the labels, then a red, a green and a blue plane, each row by row.
    record = layout.label_bytes + 3 * 32 * 32
    raw = np.fromfile(path, np.uint8)
    if raw.size == 0 or raw.size % record:
        raise ValueError(
            f"{path} has {raw.size} bytes, required is a multiple of the record, {record}"
        )
    rows = raw.reshape(-1, record)
    values = rows[:, layout.column]
    if values.max() >= layout.classes:
        raise ValueError(f"{path} has a label {values.max()}, required is 0..{layout.classes - 1}")
    planes = rows[:, layout.label_bytes :].reshape(-1, 3, 32, 32)
    return Part(path, planes.transpose(0, 2, 3, 1), values)


def from_cifar(folder, split, labels=None):
    """CIFAR's binaries: one part per file, and the names of the classes if they are there."""
    files = CIFAR_FILES["cifar100" if labels else "cifar10"]
    parts = []
    for part in SPLITS[split]:
        for name in files[part]:
            path = first_file([folder / name], split)
            parts.append(read_cifar(path, labels))

    layout = CIFAR_LABELS[labels]
    path = folder / layout.names_file
    if not path.is_file():
        return Data(parts)
    names = path.read_text().split()
    if len(names) != layout.classes:
        raise ValueError(f"{path} has {len(names)} class names, required is {layout.classes}")
    return Data(parts, names)


def from_keras(path, split):
    """Keras' archive: one part for training, one for testing. images [N,H,W] or [N,H,W,C]."""
    parts = []
    try:
        with np.load(path, allow_pickle=False) as archive:
            for name in SPLITS[split]:
                for needed in (f"x_{name}", f"y_{name}"):
                    if needed not in archive:
                        held = ", ".join(list(archive)[:8])
                        raise ValueError(
                            f"--split {split} needs {needed}, the archive holds {held}"
                        )
                images = archive[f"x_{name}"]
                labels = archive[f"y_{name}"]
                if labels.ndim == 2 and labels.shape[1] == 1:  # [N,1], as Keras has CIFAR's
                    labels = labels[:, 0]
                parts.append(Part(f"{path}: {name}", images, labels))
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error)
        if "allow_pickle" in reason:  # numpy's message at an array of Python objects
            reason = "it holds pickled Python objects, required are plain arrays"
        raise ValueError(f"{path} cannot be used: {reason}") from None
    return Data(parts)


# ==== Folders of pictures =========================================================================


def has_more_frames(file):
    """Whether frames or pages follow the first one of a picture that pillow has opened."""
    try:
        return getattr(file, "is_animated", False)  # formats with one frame lack it
    except Exception:  # a second frame is there, but damaged
        return True


def open_picture(path):
    """A picture file as pillow's RGB image, upright, and whether more frames follow.

    What is transparent becomes white.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ValueError(
            "pictures need pillow: pip install pillow (matplotlib brings it)"
        ) from None
    try:
        with Image.open(path) as file:
            mode = file.mode
            picture = ImageOps.exif_transpose(file).convert("RGBA")
            more_frames = has_more_frames(file)
    except Exception:  # pillow's decoders raise a dozen different types, all about this file
        raise ValueError(f"{path} cannot be read as a picture: repair or remove it") from None
    if mode[0] in "IF":  # pillow turns every value above 255 white
        raise ValueError(f"{path} has more than 8 bits per channel (mode {mode}), required is 8")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB"), more_frames


def read_picture(path, height, width, grey):
    """One picture file -> uint8 [H,W,3], or [H,W] if grey; and whether more frames follow."""
    picture, more_frames = open_picture(path)
    if grey:
        picture = picture.convert("L")
    bilinear = 2  # pillow's number for it
    return np.asarray(picture.resize((width, height), bilinear)), more_frames


def add_note(notes, paths, folder, before, noun, after=""):
    """Adds a line on `paths`, if there are any: their number and the names of the first five.

    As in "skipped 3 files outside the class folders: a.txt, b.txt, c.txt".
    """
    if not paths:
        return
    names = [path.relative_to(folder).as_posix() for path in paths[:5]]
    if len(paths) > 5:
        names.append(f"... and {len(paths) - 5} more")
    if len(paths) > 1:
        noun += "s"
    notes.append(f"{before} {len(paths)} {noun}{after}: {', '.join(names)}")


def from_pictures(folder, size, grey):
    """A sub-folder per class: one part, with images [N,H,W,3], or [N,H,W] if grey.

    The classes are sorted by name, and so are the pictures of each.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size or "")
    if not match:
        raise ValueError(
            f"--size {size}: a folder of pictures needs rows x columns, as in --size 32x32"
        )
    height = int(match[1])
    width = int(match[2])

    images = []
    labels = []
    nested_folders = []
    other_files = []
    with_more_frames = []
    top = listing(folder)
    for label, class_folder in enumerate(top.folders):
        found = listing(class_folder)
        if not found.pictures:
            suffixes = " ".join(PICTURES)
            raise ValueError(f"{class_folder} has no pictures, required is one ({suffixes})")
        for path in found.pictures:
            image, more_frames = read_picture(path, height, width, grey)
            images.append(image)
            labels.append(label)
            if more_frames:
                with_more_frames.append(path)
        nested_folders += found.folders
        other_files += found.others
    if not images:
        raise ValueError(f"{folder} has no sub-folder with pictures, required is one per class")

    notes = []
    loose_files = top.pictures + top.others
    add_note(notes, loose_files, folder, "skipped", "file", " outside the class folders")
    add_note(notes, other_files, folder, "skipped", "file", " without a picture's suffix")
    add_note(notes, nested_folders, folder, "skipped", "nested folder")
    add_note(notes, with_more_frames, folder, "used only the first frame of", "picture")
    class_names = [path.name for path in top.folders]
    part = Part(folder, np.stack(images), np.array(labels))
    return Data([part], class_names, tuple(notes))


# ==== What is written =============================================================================


def check_part(part, first):
    """ValueError if `part` does not fit the .npz, or has other sizes than the part `first`."""
    where, images, labels = part
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.size == 0:
        found = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"{where}: images are {found}, required is uint8 [N,H,W] or [N,H,W,C]")
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        found = f"{labels.dtype} {list(labels.shape)}"
        raise ValueError(f"{where}: labels are {found}, required are integers [N] or [N,1]")
    if len(images) != len(labels):
        raise ValueError(
            f"{where}: {len(images)} images, {len(labels)} labels, required is one for each"
        )
    if labels.min() < 0 or labels.max() >= 2**16:
        raise ValueError(
            f"{where}: labels {labels.min()}..{labels.max()}, required is 0..65535 at most"
        )
    found = images.shape[1:]
    required = first.images.shape[1:]
    if found != required:
        raise ValueError(f"{where}: images of {found}, required is {required} as in {first.where}")


def joined(data):
    """The arrays of the .npz, checked for every source."""
    for part in data.parts:
        check_part(part, data.parts[0])
    images = np.concatenate([part.images for part in data.parts])
    labels = np.concatenate([part.labels for part in data.parts])
    arrays = {"images": np.ascontiguousarray(images), "labels": labels.astype(np.int32)}
    if data.class_names is not None:
        arrays["class_names"] = np.array(data.class_names)
    return arrays


def save(out, arrays):
    """Writes under another name, then renames: nothing half-written is left, nor under `out`.

    Equal arrays give equal bytes on every machine: numpy dates all members 1980-01-01, and nothing
    is compressed (what deflate makes depends on the version of zlib).
    """
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
    """Reads `source`, whatever its kind, and writes `out`; returns the lines to print.

    ValueError for what is wrong.
    """
    if out.suffix != ".npz" or out.is_dir() or not out.parent.is_dir():
        raise ValueError(
            f"--out {out} must be a file name that ends in .npz, in a folder that exists"
        )
    path, kind = find_data(source)
    if out.exists() and out.samefile(source):
        raise ValueError(f"--out {out} is the source itself, required is another name")
    reader, takes = READERS[kind]
    for name, value in given.items():
        if name not in takes and value != DEFAULTS[name]:
            raise ValueError(f"--{name} means nothing for {path} (kind {kind}): leave it out")

    options = {name: given[name] for name in takes}
    data = reader(path, **options)
    arrays = joined(data)
    save(out, arrays)

    lines = [*data.notes]
    if path != source:
        lines.insert(0, f"read {path}")
    shape = list(arrays["images"].shape)
    classes = int(arrays["labels"].max()) + 1
    lines.append(f"{out}: images uint8 {shape}, {classes} classes")
    return lines


def main(argv=None):
    """The command line; a mistake ends it with one line and exit status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", type=pathlib.Path, help="a folder, or an .npz archive as Keras has them"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, required=True, help="the .npz to write, or to replace"
    )
    parser.add_argument("--split", choices=SPLITS, help="all (default): train, then test")
    parser.add_argument(
        "--labels", choices=("fine", "coarse"), help="CIFAR-100: 100 classes (default) or 20"
    )
    parser.add_argument(
        "--size", metavar="HxW", help="pictures: resize all to H rows and W columns"
    )
    parser.add_argument("--grey", action="store_true", help="pictures: one channel, images [N,H,W]")
    parser.set_defaults(**DEFAULTS)
    arguments = parser.parse_args(argv)
    try:
        lines = convert(**vars(arguments))
    except (ValueError, OSError) as error:
        parser.exit(2, f"convert.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130)  # what a shell expects after Ctrl-C, without a traceback
    print("\n".join(lines))


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        # A reader that closes the pipe, as head does, ends the program in silence.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    # A file name with letters that the terminal does not have is printed with their codes.
    sys.stdout.reconfigure(errors="backslashreplace")
    main()
