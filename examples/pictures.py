"""Labelled pictures for examples/train.py: an .npz, or a folder with a subfolder per class.

    source = open_pictures("flowers")    # flowers/rose/1.jpg, flowers/tulip/1.jpg, ...
    source.classes, source.labels[0]     # ["rose", "tulip"], 0
    picture = source.read(0)             # uint8 [H,W,3]
    smaller = resize(picture, (32, 32))  # uint8 [32,32,3]

What      Reads one picture at a time, so that a folder need not fit in memory; holds out a fifth of
          each class; crops and resizes.
Needs     Pillow (examples/requirements.txt).
Axes      N pictures  H, W height and width in pixels  C channels
"""

import collections
import hashlib
import pathlib
import sys
import zlib

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import convert  # noqa: E402, data/convert.py

from vit import read_npz, require  # noqa: E402


class ArrayPictures:
    """Pictures of an .npz: images uint8 [N,H,W] or [N,H,W,C], labels [N], class_names optional.

    Without class_names the distinct labels are the classes. Raises ValueError for other arrays.
    """

    def __init__(self, path):
        data = read_npz(path)
        names = ", ".join(data)
        require({"images", "labels"} <= set(data), f"{path} holds {names}, not images and labels")
        images = data["images"]
        labels = data["labels"]
        if images.ndim == 3:
            images = images[..., None]  # grey
        require(
            images.dtype == np.uint8 and images.ndim == 4 and images.size > 0,
            f"{path}: images are {images.dtype} {images.shape}, not uint8 [N,H,W] or [N,H,W,C]",
        )
        require(
            labels.dtype.kind in "iu" and labels.shape == images.shape[:1],
            f"{path}: labels are {labels.dtype} {labels.shape}, not integers [{len(images)}]",
        )
        low = int(labels.min())
        high = int(labels.max())
        require(low >= 0, f"{path}: there are labels below 0, such as {low}")
        if "class_names" in data:
            self.classes = [str(name) for name in data["class_names"]]
            require(
                high < len(self.classes),
                f"{path}: labels are {low} to {high}, not within 0 to {len(self.classes) - 1}",
            )
        else:
            values, labels = np.unique(labels, return_inverse=True)
            self.classes = [str(value) for value in values]
        self.path = path
        self.images = images
        self.labels = labels.astype(np.int32)
        self.channels = images.shape[3]
        self.size = images.shape[1:3]

    def read(self, i):
        """Picture i, uint8 [H,W,C]."""
        return self.images[i]

    def number_of_bytes(self, i) -> int:
        """Equal pictures have an equal number of bytes."""
        return self.images[i].nbytes

    def content(self, i) -> bytes:
        """The bytes that are compared to find equal pictures."""
        return self.images[i].tobytes()

    def digest(self) -> int:
        """A checksum of images and labels, whatever the path."""
        checksum = zlib.crc32(np.ascontiguousarray(self.images))
        return zlib.crc32(self.labels, checksum)


class FilePictures:
    """Pictures of a folder with one subfolder per class. Raises ValueError if there are none."""

    channels = 3
    size = None  # each picture has its own

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.classes = []
        self.files = []
        labels = []
        top = convert.listing(self.path)
        others = top.pictures + top.others
        nested = []
        for folder in top.folders:
            found = convert.listing(folder)
            require(found.pictures, f"{folder} has no pictures ({' '.join(convert.PICTURES)})")
            labels += [len(self.classes)] * len(found.pictures)
            self.classes.append(folder.name)
            self.files += found.pictures
            others += found.others
            nested += found.folders
        require(self.files, f"{path} has no folder with pictures; one per class is needed")
        self.labels = np.array(labels, np.int32)
        self.notes = []
        convert.add_note(self.notes, others, self.path, "skipped", "file")
        convert.add_note(self.notes, nested, self.path, "skipped", "nested folder")

    def read(self, i):
        """Picture i, uint8 [H,W,3]. Raises ValueError with its name if it cannot be read."""
        return read_file(self.files[i])

    def number_of_bytes(self, i) -> int:
        """Equal pictures have an equal number of bytes."""
        return self.files[i].stat().st_size

    def content(self, i) -> bytes:
        """The bytes that are compared to find equal pictures."""
        return self.files[i].read_bytes()

    def digest(self) -> int:
        """A checksum of the names and sizes of the files, wherever the folder lies."""
        rows = []
        for i, file in enumerate(self.files):
            rows.append(f"{file.relative_to(self.path).as_posix()} {self.number_of_bytes(i)}")
        return zlib.crc32("\n".join(rows).encode(errors="surrogateescape"))


class LoosePictures:
    """All pictures below a folder, without classes. Raises ValueError if there are none."""

    channels = 3

    def __init__(self, folder):
        self.path = pathlib.Path(folder)
        require(self.path.is_dir(), f"{folder} is not a folder")
        self.files = []
        for file in sorted(self.path.rglob("*")):
            if file.suffix.lower() in convert.PICTURES and file.is_file():
                self.files.append(file)
        suffixes = " ".join(convert.PICTURES)
        require(self.files, f"{folder} holds no pictures ({suffixes})")
        self.labels = np.zeros(len(self.files), np.int32)  # 0: no row is masked

    def read(self, i):
        """Picture i, uint8 [H,W,3]. Raises ValueError with its name if it cannot be read."""
        return read_file(self.files[i])


def read_file(path):
    """A picture file as uint8 [H,W,3]. Raises ValueError with its name if it cannot be read."""
    picture, _ = convert.open_picture(path)
    return np.asarray(picture)


def open_pictures(path):
    """The pictures at path: an .npz, or a folder with a subfolder per class."""
    if not pathlib.Path(path).is_dir():
        return ArrayPictures(path)
    source = FilePictures(path)
    for note in source.notes:
        print(note)
    return source


# ==== Which pictures are for training, which are held out =========================================


def rank_in_class(labels):
    """The position of each label among equal ones: [4,7,4] -> [0,0,1]. int [N] -> int [N]."""
    order = np.argsort(labels, kind="stable")
    first = np.searchsorted(labels[order], labels[order])  # where each label begins
    rank = np.empty(len(labels), int)
    rank[order] = np.arange(len(labels)) - first
    return rank


def distinct_rows(source):
    """The rows of a source, without those that repeat an earlier picture byte for byte."""
    sizes = [source.number_of_bytes(row) for row in range(len(source.labels))]
    of_size = collections.Counter(sizes)
    seen = set()
    rows = []
    for row, size in enumerate(sizes):
        if of_size[size] > 1:  # else it cannot equal another, and is not read here
            digest = hashlib.sha256(source.content(row)).digest()
            if digest in seen:
                continue
            seen.add(digest)
        rows.append(row)
    repeated = len(sizes) - len(rows)
    if repeated:
        print(f"{source.path}: {repeated} pictures repeat others and are left out")
    return np.array(rows)


def shuffled_rows(source, per_class=None):
    """The distinct rows of a source in a fixed random order; of each class at most per_class."""
    rows = np.random.default_rng(0).permutation(distinct_rows(source))
    if per_class is not None:
        rows = rows[rank_in_class(source.labels[rows]) < per_class]
    return rows


def check_classes(source, rows, least):
    """Raises ValueError unless there are two classes, and each has at least `least` pictures."""
    require(
        len(source.classes) > 1,
        f"{source.path}: there is one class, {source.classes[0]}; two are needed",
    )
    counts = np.bincount(source.labels[rows], minlength=len(source.classes))
    smallest = int(counts.argmin())
    require(
        counts[smallest] >= least,
        f"{source.path}: class {source.classes[smallest]} has {counts[smallest]} distinct "
        f"pictures, fewer than {least}",
    )


def split(source):
    """Rows for training, and a fifth of each class, rounded up, that is held out."""
    rows = shuffled_rows(source)
    check_classes(source, rows, least=2)
    held_out = rank_in_class(source.labels[rows]) % 5 == 0
    return rows[~held_out], rows[held_out]


# ==== Cropping and resizing =======================================================================


def with_channels(picture, channels):
    """Grey is repeated, RGB becomes grey; see check_channels. uint8 [H,W,C] -> [H,W,channels]."""
    if picture.shape[2] == channels:
        return picture
    if picture.shape[2] == 1:
        return np.repeat(picture, channels, axis=2)
    grey = picture @ np.array([0.299, 0.587, 0.114])  # the usual weights of red, green and blue
    return np.rint(grey)[..., None].astype(np.uint8)


def check_channels(source, channels):
    """Raises ValueError unless with_channels can turn the pictures into such of `channels`."""
    same = source.channels == channels
    grey_to_any = source.channels == 1
    colours_to_grey = source.channels == 3 and channels == 1
    require(
        same or grey_to_any or colours_to_grey,
        f"{source.path}: the pictures have {source.channels} channels, the model takes {channels}",
    )


def resize(picture, size, box=None):
    """Bilinear resize of a picture, or of its box (left, top, right, bottom), to (height, width).

    uint8 [H,W,C] -> [*size,C]. Pillow takes one channel at a time, so any number will do.
    """
    from PIL import Image

    height, width = size
    planes = []
    for plane in np.moveaxis(picture, -1, 0):
        image = Image.fromarray(np.ascontiguousarray(plane))
        planes.append(image.resize((width, height), Image.Resampling.BILINEAR, box=box))
    return np.stack(planes, axis=-1)


def random_box(rng, height, width, least):
    """A random crop (left, top, right, bottom), the official code's "Inception crop".

    Its share of the area is uniform in [least, 1] and its sides are from 3:4 to 4:3, as far as it
    fits into the picture: a side that is longer than the picture's is cut.
    """
    area = height * width * rng.uniform(least, 1)
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    box_width = min(width, np.sqrt(area * ratio))
    box_height = min(height, np.sqrt(area / ratio))
    left = rng.uniform(0, width - box_width)
    top = rng.uniform(0, height - box_height)
    return left, top, left + box_width, top + box_height
