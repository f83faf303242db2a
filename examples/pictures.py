"""Labelled pictures for examples/train.py: an .npz in memory, or a folder with a folder per class.

    source = open_pictures("flowers")    # flowers/rose/1.jpg, flowers/tulip/1.jpg, ...
    source.classes, source.labels[0]     # ["rose", "tulip"], 0
    picture = source.read(0)             # uint8 [H,W,3]
    smaller = resize(picture, (32, 32))  # uint8 [32,32,3]

What      Reading one picture at a time, so that a folder need not fit in memory; splitting off a
          fifth of each class; cropping and resizing.
Needs     Pillow (examples/requirements.txt).
Axes      N pictures  H, W height and width in pixels  C channels
"""

import hashlib
import pathlib
import sys
import zlib

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import convert  # noqa: E402, data/convert.py, found by the line above

from vit import read_npz, require  # noqa: E402


class ArrayPictures:
    """Pictures of an .npz: images uint8 [N,H,W] or [N,H,W,C], labels [N], maybe class_names.

    Without class_names the distinct labels are the classes. ValueError for anything else.
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
        if "class_names" in data:
            self.classes = [str(name) for name in data["class_names"]]
            low = int(labels.min())
            high = int(labels.max())
            require(
                0 <= low and high < len(self.classes),
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

    def content(self, i) -> bytes:
        """What makes two pictures equal."""
        return self.images[i].tobytes()

    def digest(self) -> int:
        """A number that changes with the data, wherever the file lies."""
        return zlib.crc32(self.labels.tobytes(), zlib.crc32(self.images.tobytes()))


class FilePictures:
    """Pictures of a folder that holds one folder per class. ValueError if there are none."""

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
        """Picture i, uint8 [H,W,3]. ValueError with its name where it cannot be read."""
        picture, _ = convert.open_picture(self.files[i])
        return np.asarray(picture)

    def content(self, i) -> bytes:
        """What makes two pictures equal."""
        return self.files[i].read_bytes()

    def digest(self) -> int:
        """A number that changes with the names and sizes of the files, wherever the folder lies."""
        rows = [f"{f.relative_to(self.path).as_posix()} {f.stat().st_size}" for f in self.files]
        return zlib.crc32("\n".join(rows).encode())


def open_pictures(path):
    """The pictures at path: a folder with a folder per class, or an .npz."""
    require(pathlib.Path(path).exists(), f"{path} does not exist")
    if not pathlib.Path(path).is_dir():
        return ArrayPictures(path)
    source = FilePictures(path)
    for note in source.notes:
        print(note)
    return source


# ==== Which pictures are for training, which are held out =========================================


def rank_in_class(labels):
    """How many of the labels before it are the same. int [N] -> int [N]."""
    rank = np.zeros(len(labels), int)
    for label in np.unique(labels):
        same = labels == label
        rank[same] = np.arange(same.sum())
    return rank


def shuffled_rows(source, per_class=None):
    """Rows of the source in a fixed random order; of each class all, or per_class.

    Equal pictures are taken once, so that none is both trained on and held out.
    """
    seen = set()
    once = []
    for row in range(len(source.labels)):
        digest = hashlib.sha256(source.content(row)).digest()
        if digest not in seen:
            seen.add(digest)
            once.append(row)
    rows = np.random.default_rng(0).permutation(once)
    if per_class is not None:
        rows = rows[rank_in_class(source.labels[rows]) < per_class]
    return rows


def check_classes(source, rows, least):
    """ValueError unless there are two classes and every class has at least so many pictures."""
    require(len(source.classes) > 1, f"{source.path}: there is one class, {source.classes[0]}")
    counts = np.bincount(source.labels[rows], minlength=len(source.classes))
    fewest = int(counts.argmin())
    require(
        counts[fewest] >= least,
        f"{source.path}: class {source.classes[fewest]} has {counts[fewest]} pictures, "
        f"at least {least} are needed",
    )


def split(source):
    """Rows for training, and a fifth of each class that is held out; see shuffled_rows."""
    rows = shuffled_rows(source)
    check_classes(source, rows, least=2)
    held = rank_in_class(source.labels[rows]) % 5 == 0
    return rows[~held], rows[held]


# ==== Cropping and resizing =======================================================================


def with_channels(picture, channels):
    """A picture with so many channels: grey is repeated, colours become grey. uint8 [H,W,C]."""
    if picture.shape[2] == channels:
        return picture
    if picture.shape[2] == 1:
        return np.repeat(picture, channels, axis=2)
    grey = picture @ np.array([0.299, 0.587, 0.114])  # the usual weights of red, green and blue
    return np.rint(grey)[..., None].astype(np.uint8)


def check_channels(source, channels):
    """ValueError unless with_channels can give the pictures so many channels."""
    fits = source.channels in (1, channels) or (source.channels == 3 and channels == 1)
    require(fits, f"{source.path}: {source.channels} channels, but the model takes {channels}")


def resize(picture, size, box=None):
    """Bilinear; of a box (left, top, right, bottom) only that part. uint8 [H,W,C] -> [*size,C]."""
    from PIL import Image

    height, width = size
    planes = []
    for plane in np.moveaxis(picture, -1, 0):
        image = Image.fromarray(np.ascontiguousarray(plane))
        planes.append(image.resize((width, height), Image.Resampling.BILINEAR, box=box))
    return np.stack(planes, axis=-1)


def random_box(rng, height, width, least):
    """A random part of at least this share of the area, with sides from 3:4 to 4:3.

    The official augmentation ("Inception crop"), with least = 0.05. Left, top, right, bottom.
    """
    area = height * width * rng.uniform(least, 1)
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    across = min(width, np.sqrt(area * ratio))
    down = min(height, np.sqrt(area / ratio))
    left = rng.uniform(0, width - across)
    top = rng.uniform(0, height - down)
    return left, top, left + across, top + down
