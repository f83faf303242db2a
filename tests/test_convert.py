"""data/convert.py: each source that it reads, from files written here, and its messages."""

import contextlib
import gzip
import hashlib
import importlib.util
import os
import pathlib
import re
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest

DATA = pathlib.Path(__file__).parents[1] / "data"
SPEC = importlib.util.spec_from_file_location("convert", DATA / "convert.py")
convert = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(convert)


def run(source, out, *options):
    """Converts, and reads the result as a demo does."""
    convert.main([str(source), "--out", str(out), *options])
    with np.load(out, allow_pickle=False) as archive:
        return dict(archive)


def printed_lines(capsys, source, out, *options):
    """What a run prints, line by line."""
    capsys.readouterr()  # what earlier runs printed
    run(source, out, *options)
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out.splitlines()


def content(path):
    """The bytes of the file, or None without one."""
    return path.read_bytes() if path.is_file() else None


def complaint(capsys, source, out, *options):
    """The one line on standard error of a run that must end with status 2 and write nothing."""
    before = content(out)
    capsys.readouterr()  # what earlier runs printed
    with pytest.raises(SystemExit) as stop:
        convert.main([str(source), "--out", str(out), *options])
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("convert.py: ")
    assert printed.err.count("\n") == 1, printed.err
    assert content(out) == before, "a failed run changed --out"
    return printed.err


# ==== Files as their makers write them ============================================================


def plain(raw):
    """Leaves the bytes as they are, where gzip.compress would pack them."""
    return raw


def write_idx(path, magic, sizes, data, pack=plain):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">{1 + len(sizes)}I", magic, *sizes)
    path.write_bytes(pack(header + bytes(data)))


def write_mnist(folder, pack=plain, suffix=""):
    """2 train and 1 test picture of 2 x 3 pixels, 0..11 and 250..255, with labels 7, 0 and 3."""
    write_idx(folder / f"train-images-idx3-ubyte{suffix}", 2051, (2, 2, 3), range(12), pack)
    write_idx(folder / f"train-labels-idx1-ubyte{suffix}", 2049, (2,), [7, 0], pack)
    write_idx(folder / f"t10k-images-idx3-ubyte{suffix}", 2051, (1, 2, 3), range(250, 256), pack)
    write_idx(folder / f"t10k-labels-idx1-ubyte{suffix}", 2049, (1,), [3], pack)
    return folder


def record(labels, seed):
    """One CIFAR record: `labels`, then the planes c = 0, 1, 2.

    A pixel is seed + 50 c + 5 row + column, modulo 256.
    """
    raw = bytes(labels)
    for c in range(3):
        raw += bytes((seed + 50 * c + 5 * h + w) % 256 for h in range(32) for w in range(32))
    return raw


def write_cifar10(folder):
    """Batch i has one picture, with seed i and label i.

    The test batch has two: seeds 6 and 7, labels 9 and 0.
    """
    folder.mkdir(parents=True)
    for i in range(1, 6):
        (folder / f"data_batch_{i}.bin").write_bytes(record([i], i))
    (folder / "test_batch.bin").write_bytes(record([9], 6) + record([0], 7))
    return folder


def write_cifar100(folder):
    """Labels (coarse, fine): (19, 99), (0, 4) for training and (3, 50) for testing."""
    folder.mkdir(parents=True)
    (folder / "train.bin").write_bytes(record([19, 99], 1) + record([0, 4], 2))
    (folder / "test.bin").write_bytes(record([3, 50], 3))
    return folder


def write_keras(path, **changes):
    """mnist.npz in small: 3 train and 2 test pictures of 2 x 2 pixels.

    A change to None removes the array.
    """
    arrays = {
        "x_train": np.arange(12, dtype=np.uint8).reshape(3, 2, 2),
        "y_train": np.array([2, 0, 1], np.uint8),
        "x_test": np.arange(100, 108, dtype=np.uint8).reshape(2, 2, 2),
        "y_test": np.array([1, 1], np.uint8),
    }
    arrays |= changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def write_picture(path, pixels, **options):
    Image = pytest.importorskip("PIL.Image", reason="pictures need pillow")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(pixels)).save(path, **options)


def write_frames(path, values):
    """One picture of 2 x 2 pixels with a frame in grey for each of `values`."""
    Image = pytest.importorskip("PIL.Image", reason="pictures need pillow")
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = [Image.new("L", (2, 2), value) for value in values]
    options = {"lossless": True} if path.suffix == ".webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)


def write_pictures(folder):
    """Class Zebra has a blue picture; class ant, which sorts after it, a red and a green one.

    All have 2 x 2 pixels.
    """
    write_picture(folder / "ant" / "b.png", np.full((2, 2, 3), (0, 255, 0), np.uint8))
    write_picture(folder / "ant" / "a.PNG", np.full((2, 2, 3), (255, 0, 0), np.uint8))
    write_picture(folder / "Zebra" / "z.bmp", np.full((2, 2, 3), (0, 0, 255), np.uint8))
    (folder / "ant" / "notes.txt").write_text("no picture, left out")
    (folder / "ant" / "._a.png").write_text("what a Mac adds, left out")
    (folder / ".cache").mkdir()
    return folder


# ==== MNIST's IDX files ===========================================================================


@pytest.mark.parametrize("pack, suffix", [(plain, ""), (gzip.compress, ".gz"), (plain, ".gz")])
def test_idx_values(tmp_path, pack, suffix):
    """Plain, gzipped, and unpacked by a downloader that kept the name: row by row."""
    got = run(write_mnist(tmp_path / "m", pack, suffix), tmp_path / "o.npz")
    assert sorted(got) == ["images", "labels"]
    assert got["images"].dtype == np.uint8
    assert got["labels"].dtype == np.int32
    assert got["images"].tolist() == [
        [[0, 1, 2], [3, 4, 5]],
        [[6, 7, 8], [9, 10, 11]],
        [[250, 251, 252], [253, 254, 255]],
    ]
    assert got["labels"].tolist() == [7, 0, 3]


def test_idx_split(tmp_path, capsys):
    source = write_mnist(tmp_path / "m")
    train = run(source, tmp_path / "train.npz", "--split", "train")
    assert train["labels"].tolist() == [7, 0]
    assert "train.npz: images uint8 [2, 2, 3], 8 classes" in capsys.readouterr().out
    test = run(source, tmp_path / "test.npz", "--split", "test")
    assert test["labels"].tolist() == [3]
    assert test["images"].tolist() == [[[250, 251, 252], [253, 254, 255]]]


def test_idx_name_with_a_dot(tmp_path):
    source = write_mnist(tmp_path / "m")
    for path in list(source.iterdir()):
        path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    assert run(source, tmp_path / "o.npz")["labels"].tolist() == [7, 0, 3]


def test_idx_errors(tmp_path, capsys):
    source = write_mnist(tmp_path / "m")
    out = tmp_path / "o.npz"
    images = source / "train-images-idx3-ubyte"
    labels = source / "train-labels-idx1-ubyte"

    write_idx(images, 2051, (2, 2, 3), range(11))
    expected = f"{images} has 27 bytes, its sizes [2, 2, 3] require 28"
    assert expected in complaint(capsys, source, out)
    write_idx(images, 2051, (2, 2, 3), range(13))
    assert "29 bytes" in complaint(capsys, source, out)
    images.write_bytes(struct.pack(">2I", 2051, 2))  # cut inside the header
    assert f"{images} has 8 bytes" in complaint(capsys, source, out)
    write_idx(images, 2049, (2, 2, 3), range(12))
    expected = f"{images} starts with magic number 2049, required is 2051"
    assert expected in complaint(capsys, source, out)
    images.write_bytes(gzip.compress(bytes(100))[:-9])
    assert f"{images} is a damaged gzip file" in complaint(capsys, source, out)

    write_idx(images, 2051, (0, 2, 3), [])
    assert "images are uint8 [0, 2, 3], required is" in complaint(capsys, source, out)
    write_idx(images, 2051, (3, 2, 3), range(18))
    expected = "m/train: 3 images, 2 labels, required is one for each"
    assert expected in complaint(capsys, source, out)
    write_idx(images, 2051, (2, 3, 2), range(12))
    assert "images of (2, 3), required is (3, 2) as in" in complaint(capsys, source, out)

    write_idx(labels, 2051, (2,), [7, 0])
    expected = f"{labels} starts with magic number 2051, required is 2049"
    assert expected in complaint(capsys, source, out)
    labels.unlink()
    assert f"{labels} is missing: --split all needs it" in complaint(capsys, source, out)
    test = run(source, out, "--split", "test")  # which needs no train part
    assert test["labels"].tolist() == [3]


# ==== CIFAR's binaries ============================================================================


def check_pixels(image, seed):
    """Values of `record`, worked out by hand.

    A wrong order of planes, rows or columns changes them.
    """
    assert image.shape == (32, 32, 3)
    assert image[0, 0].tolist() == [seed, seed + 50, seed + 100]
    assert image[2, 1].tolist() == [seed + 11, seed + 61, seed + 111]
    # The last value is 100 + 155 + 7 = 262, which is 6 modulo 256.
    assert image[31, 7].tolist() == [seed + 162, seed + 212, seed + 6]


def test_cifar10_values(tmp_path):
    source = write_cifar10(tmp_path / "c")
    got = run(source, tmp_path / "o.npz")
    assert sorted(got) == ["images", "labels"]
    assert got["labels"].tolist() == [1, 2, 3, 4, 5, 9, 0]
    for image, seed in zip(got["images"], range(1, 8), strict=True):
        check_pixels(image, seed)
    train = run(source, tmp_path / "train.npz", "--split", "train")
    assert train["labels"].tolist() == [1, 2, 3, 4, 5]
    test = run(source, tmp_path / "test.npz", "--split", "test")
    assert test["labels"].tolist() == [9, 0]


@pytest.mark.parametrize("labels, expected", [(None, [99, 4, 50]), ("coarse", [19, 0, 3])])
def test_cifar100_values(tmp_path, labels, expected):
    source = write_cifar100(tmp_path / "c")
    options = ["--labels", labels] if labels else []
    got = run(source, tmp_path / "o.npz", *options)
    assert got["labels"].tolist() == expected
    for image, seed in zip(got["images"], (1, 2, 3), strict=True):
        check_pixels(image, seed)


def test_cifar_class_names(tmp_path, capsys):
    source = write_cifar10(tmp_path / "c")
    out = tmp_path / "o.npz"
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    listed = source / "batches.meta.txt"
    listed.write_text("\n".join(names) + "\n\n")  # it ends with an empty line
    assert run(source, out)["class_names"].tolist() == names
    listed.write_text("airplane\n")
    expected = "batches.meta.txt has 1 class names, required is 10"
    assert expected in complaint(capsys, source, out)


def test_cifar10_errors(tmp_path, capsys):
    source = write_cifar10(tmp_path / "c")
    out = tmp_path / "o.npz"
    batch = source / "data_batch_3.bin"
    for raw in (b"", record([3], 3)[:-1], record([3], 3) + b"x"):
        batch.write_bytes(raw)
        expected = f"{batch} has {len(raw)} bytes, required is a multiple of the record, 3073"
        assert expected in complaint(capsys, source, out)
    batch.write_bytes(record([10], 3))
    assert f"{batch} has a label 10, required is 0..9" in complaint(capsys, source, out)
    batch.unlink()
    assert f"{batch} is missing: --split all needs it" in complaint(capsys, source, out)
    assert "--labels means nothing for" in complaint(capsys, source, out, "--labels", "coarse")


def test_cifar100_errors(tmp_path, capsys):
    source = write_cifar100(tmp_path / "c")
    out = tmp_path / "o.npz"
    (source / "train.bin").write_bytes(record([20, 5], 1))
    expected = "train.bin has a label 20, required is 0..19"
    assert expected in complaint(capsys, source, out, "--labels", "coarse")
    (source / "train.bin").write_bytes(record([1], 1))
    expected = "train.bin has 3073 bytes, required is a multiple"
    assert expected in complaint(capsys, source, out)


@pytest.mark.parametrize("files", [["data_batch_1"], ["train", "test"]])
def test_cifar_pickles(tmp_path, capsys, files):
    """CIFAR's python version is refused, for its folder and for the folder above it."""
    source = tmp_path / "root" / "python"
    source.mkdir(parents=True)
    for name in files:
        (source / name).write_bytes(b"\x80")
    expected = f"{source} has CIFAR's python version, which is pickles: take the binary version"
    assert expected in complaint(capsys, source, tmp_path / "o.npz")
    assert expected in complaint(capsys, source.parent, tmp_path / "o.npz")


# ==== A data set below the folder that was given ==================================================


@pytest.mark.parametrize("given", ["root", "root/FashionMNIST", "root/FashionMNIST/raw"])
def test_torchvision_mnist(tmp_path, capsys, given):
    """torchvision has the files in root/FashionMNIST/raw: any of the three can be given."""
    raw = write_mnist(tmp_path / "root" / "FashionMNIST" / "raw")
    out = tmp_path / "o.npz"
    lines = printed_lines(capsys, tmp_path / given, out)
    expected = [] if given.endswith("raw") else [f"read {raw}"]
    assert lines == [*expected, f"{out}: images uint8 [3, 2, 3], 8 classes"]
    with np.load(out, allow_pickle=False) as archive:
        assert archive["labels"].tolist() == [7, 0, 3]


@pytest.mark.parametrize(
    "name, write, labels",
    [
        ("cifar-10-batches-bin", write_cifar10, [1, 2, 3, 4, 5, 9, 0]),
        ("cifar-100-binary", write_cifar100, [99, 4, 50]),
    ],
)
def test_folder_above_cifar(tmp_path, name, write, labels):
    write(tmp_path / "root" / name)
    (tmp_path / "root" / "other").mkdir()
    assert run(tmp_path / "root", tmp_path / "o.npz")["labels"].tolist() == labels


def test_several_data_sets(tmp_path, capsys):
    root = tmp_path / "root"
    mnist = write_mnist(root / "MNIST" / "raw")
    cifar = write_cifar10(root / "cifar-10-batches-bin")
    expected = f"{root} holds several data sets, give the folder of one: {mnist}, {cifar}"
    assert expected in complaint(capsys, root, tmp_path / "o.npz")


def test_own_files_come_first(tmp_path):
    """What lies below a folder is of no interest where the folder itself holds a data set."""
    source = write_mnist(tmp_path / "m")
    write_cifar10(source / "cifar-10-batches-bin")
    write_cifar100(source / "raw")
    assert run(source, tmp_path / "o.npz")["labels"].tolist() == [7, 0, 3]


# ==== Archives as Keras has them ==================================================================


def test_keras_values(tmp_path):
    source = write_keras(tmp_path / "k.npz")
    got = run(source, tmp_path / "o.npz")
    assert got["images"].shape == (5, 2, 2)
    assert got["images"][1].tolist() == [[4, 5], [6, 7]]
    assert got["images"][3].tolist() == [[100, 101], [102, 103]]
    assert got["labels"].tolist() == [2, 0, 1, 1, 1]
    test = run(source, tmp_path / "test.npz", "--split", "test")
    assert test["labels"].tolist() == [1, 1]


def test_keras_colour_and_labels_in_a_column(tmp_path):
    """As keras.datasets.cifar10 gives them: [N,H,W,3] and [N,1]; here in Fortran order too."""
    colour = np.arange(36, dtype=np.uint8).reshape(3, 2, 2, 3)
    column = np.array([[2], [0], [1]], np.int64)
    source = write_keras(tmp_path / "k.npz", x_train=np.asfortranarray(colour), y_train=column)
    got = run(source, tmp_path / "o.npz", "--split", "train")
    assert got["images"].shape == (3, 2, 2, 3)
    assert got["images"][1, 1, 0].tolist() == [18, 19, 20]
    assert got["labels"].tolist() == [2, 0, 1]
    assert got["labels"].dtype == np.int32


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x_test": None}, "--split all needs x_test, the archive holds x_train, y_train, y_test"),
        ({"y_test": None}, "--split all needs y_test, the archive holds x_train, y_train, x_test"),
        (
            {"y_train": np.array([1, "two", 3], object)},
            "it holds pickled Python objects, required are plain arrays",
        ),
        (
            {"x_train": np.zeros((3, 2, 2), np.float32)},
            "k.npz: train: images are float32 [3, 2, 2], required is uint8",
        ),
        (
            {"x_train": np.zeros((3, 4), np.uint8)},
            "images are uint8 [3, 4], required is uint8 [N,H,W] or [N,H,W,C]",
        ),
        (
            {"y_train": np.zeros(3, np.float32)},
            "labels are float32 [3], required are integers [N] or [N,1]",
        ),
        (
            {"y_train": np.zeros((3, 10), np.uint8)},
            "labels are uint8 [3, 10], required are integers",
        ),
        (
            {"y_train": np.zeros(2, np.uint8)},
            "k.npz: train: 3 images, 2 labels, required is one for each",
        ),
        (
            {"y_test": np.array([0, -1])},
            "k.npz: test: labels -1..0, required is 0..65535 at most",
        ),
        ({"y_test": np.array([0, 65536])}, "labels 0..65536"),
        (
            {"x_test": np.zeros((2, 2, 3), np.uint8)},
            "test: images of (2, 3), required is (2, 2) as in",
        ),
    ],
)
def test_keras_errors(tmp_path, capsys, changes, message):
    source = write_keras(tmp_path / "k.npz", **changes)
    assert message in complaint(capsys, source, tmp_path / "o.npz")


def test_keras_damaged(tmp_path, capsys):
    source = write_keras(tmp_path / "k.npz")
    out = tmp_path / "o.npz"
    whole = source.read_bytes()
    source.write_bytes(whole[:-30])
    assert f"{source} is no complete .npz archive" in complaint(capsys, source, out)
    changed = whole.replace(bytes(range(12)), bytes(12))  # the checksum of x_train no longer fits
    source.write_bytes(changed)
    assert f"{source} cannot be used: Bad CRC-32" in complaint(capsys, source, out)


# ==== A folder of pictures per class ==============================================================


def test_pictures_values(tmp_path):
    got = run(write_pictures(tmp_path / "p"), tmp_path / "o.npz", "--size", "2x2")
    assert got["class_names"].tolist() == ["Zebra", "ant"]
    assert got["labels"].tolist() == [0, 1, 1]
    assert got["images"].shape == (3, 2, 2, 3)
    assert got["images"][:, 0, 0].tolist() == [[0, 0, 255], [255, 0, 0], [0, 255, 0]]


def test_pictures_keep_rows_and_columns(tmp_path):
    """Without a change of size no pixel changes; --size is rows x columns."""
    pixels = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)
    write_picture(tmp_path / "p" / "a" / "1.png", pixels)
    got = run(tmp_path / "p", tmp_path / "o.npz", "--size", "2x3", "--grey")
    assert got["images"].tolist() == [pixels.tolist()]
    got = run(tmp_path / "p", tmp_path / "o.npz", "--size", "2x3")
    assert got["images"].shape == (1, 2, 3, 3)
    assert (got["images"][0] == pixels[..., None]).all()


def test_pictures_resized(tmp_path):
    """A left half 0 and a right half 200 stay so when shrunk; only the seam may be blurred."""
    pixels = np.zeros((16, 32), np.uint8)
    pixels[:, 16:] = 200
    write_picture(tmp_path / "p" / "a" / "1.png", pixels)
    image = run(tmp_path / "p", tmp_path / "o.npz", "--size", "4x8", "--grey")["images"][0]
    assert image.shape == (4, 8)
    assert (image[:, :3] == 0).all()
    assert (image[:, 5:] == 200).all()


def test_pictures_grey_transparent(tmp_path):
    red_and_unseen_red = np.array([[[255, 0, 0, 255], [255, 0, 0, 0]]], np.uint8)
    write_picture(tmp_path / "p" / "a" / "1.png", red_and_unseen_red)
    got = run(tmp_path / "p", tmp_path / "o.npz", "--size", "1x2")
    assert got["images"].tolist() == [[[[255, 0, 0], [255, 255, 255]]]]
    got = run(tmp_path / "p", tmp_path / "o.npz", "--size", "1x2", "--grey")
    assert got["images"].tolist() == [[[76, 255]]]  # ITU-R 601: 0.299 * 255 = 76.2


def test_pictures_turned(tmp_path):
    exif = pytest.importorskip("PIL.Image").Exif()
    exif[0x0112] = 3  # orientation: the camera was upside down
    pixels = np.array([[10, 20], [30, 40]], np.uint8)
    write_picture(tmp_path / "p" / "a" / "1.png", pixels, exif=exif)
    got = run(tmp_path / "p", tmp_path / "o.npz", "--size", "2x2", "--grey")
    assert got["images"].tolist() == [[[40, 30], [20, 10]]]


def test_pictures_skipped_files(tmp_path, capsys):
    """Files that are no pictures are counted and named, but not those that a system adds."""
    source = write_pictures(tmp_path / "p")
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store"):
        (source / "ant" / name).write_text("")
        (source / name).write_text("")
    *notes, _ = printed_lines(capsys, source, tmp_path / "o.npz", "--size", "2x2")
    assert notes == ["skipped 1 file without a picture's suffix: ant/notes.txt"]

    for name in ("ant/x.svg", "Zebra/y.pdf", "Zebra/README"):
        (source / name).write_text("")
    *notes, _ = printed_lines(capsys, source, tmp_path / "o.npz", "--size", "2x2")
    named = "Zebra/README, Zebra/y.pdf, ant/notes.txt, ant/x.svg"
    assert notes == [f"skipped 4 files without a picture's suffix: {named}"]

    for i in range(3):
        (source / "ant" / f"{i}.txt").write_text("")
    *notes, _ = printed_lines(capsys, source, tmp_path / "o.npz", "--size", "2x2")
    named = "Zebra/README, Zebra/y.pdf, ant/0.txt, ant/1.txt, ant/2.txt, ... and 2 more"
    assert notes == [f"skipped 7 files without a picture's suffix: {named}"]


def test_pictures_outside_the_classes(tmp_path, capsys):
    source = write_pictures(tmp_path / "p")
    (source / "ant" / "notes.txt").unlink()
    (source / "labels.csv").write_text("")
    (source / "loose.png").write_text("")
    *notes, _ = printed_lines(capsys, source, tmp_path / "o.npz", "--size", "2x2")
    assert notes == ["skipped 2 files outside the class folders: loose.png, labels.csv"]


def test_pictures_nested_folders(tmp_path, capsys):
    """A folder in a class folder is skipped, with its pictures and whatever its name is."""
    source = write_pictures(tmp_path / "p")
    (source / "ant" / "notes.txt").unlink()
    write_picture(source / "ant" / "more" / "c.png", np.zeros((2, 2), np.uint8))
    (source / "Zebra" / "old.png").mkdir()
    (source / "Zebra" / ".git").mkdir()
    out = tmp_path / "o.npz"
    *notes, last = printed_lines(capsys, source, out, "--size", "2x2")
    assert notes == ["skipped 2 nested folders: Zebra/old.png, ant/more"]
    assert last == f"{out}: images uint8 [3, 2, 2, 3], 2 classes"


def test_pictures_with_more_frames(tmp_path, capsys):
    """Only the first of several frames is used, and the pictures that have more are named."""
    source = tmp_path / "p"
    for name in ("animated.gif", "pages.tiff", "moving.webp", "moving.png"):
        write_frames(source / "several" / name, [10, 200, 90])
    for name in ("one.gif", "one.tiff", "one.webp", "one.png"):
        write_frames(source / "single" / name, [10])
    out = tmp_path / "o.npz"
    *notes, _ = printed_lines(capsys, source, out, "--size", "2x2", "--grey")
    named = "several/animated.gif, several/moving.png, several/moving.webp, several/pages.tiff"
    assert notes == [f"used only the first frame of 4 pictures: {named}"]
    with np.load(out, allow_pickle=False) as archive:
        assert archive["images"].shape == (8, 2, 2)
        assert (archive["images"] == 10).all()


def test_pictures_with_a_damaged_second_frame(tmp_path, capsys):
    """The first frame is whole, so the picture is used; that more was there is said."""
    path = tmp_path / "p" / "a" / "1.gif"
    write_frames(path, [10, 200])
    raw = path.read_bytes()
    second = raw.rindex(b"\x2c\x00\x00\x00\x00\x02\x00\x02\x00")  # place and size of frame 2
    path.write_bytes(raw[: second + 3])
    *notes, _ = printed_lines(capsys, tmp_path / "p", tmp_path / "o.npz", "--size", "2x2")
    assert notes == ["used only the first frame of 1 picture: a/1.gif"]


def test_pictures_errors(tmp_path, capsys):
    source = write_pictures(tmp_path / "p")
    out = tmp_path / "o.npz"
    for size in ("32", "0x4", "4x-4", "4x4x3", "axb"):
        expected = f"--size {size}: a folder of pictures needs rows x columns, as in --size 32x32"
        assert expected in complaint(capsys, source, out, "--size", size)
    expected = "--size None: a folder of pictures needs rows x columns"
    assert expected in complaint(capsys, source, out)

    options = ("--size", "2x2")
    expected = "--split means nothing for"
    assert expected in complaint(capsys, source, out, *options, "--split", "train")
    deep = source / "ant" / "deep.png"
    write_picture(deep, np.full((2, 2), 300, np.uint16))
    expected = f"{deep} has more than 8 bits per channel (mode I;16)"
    assert expected in complaint(capsys, source, out, *options)
    deep.unlink()

    whole = (source / "ant" / "a.PNG").read_bytes()
    bad = source / "Zebra" / "bad.png"
    for damaged in (b"", b"no picture", whole[:40], whole[:45]):
        bad.write_bytes(damaged)
        expected = f"{bad} cannot be read as a picture"
        assert expected in complaint(capsys, source, out, *options)
    bad.unlink()

    (source / "Empty").mkdir()
    expected = "Empty has no pictures, required is one (.bmp"
    assert expected in complaint(capsys, source, out, *options)
    (tmp_path / "hidden" / ".git").mkdir(parents=True)
    expected = "hidden has no sub-folder with pictures"
    assert expected in complaint(capsys, tmp_path / "hidden", out, *options)


def test_pictures_without_pillow(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    (tmp_path / "p" / "a").mkdir(parents=True)
    (tmp_path / "p" / "a" / "1.png").write_bytes(b"")
    message = complaint(capsys, tmp_path / "p", tmp_path / "o.npz", "--size", "2x2")
    assert "pictures need pillow: pip install pillow" in message
    assert run(write_mnist(tmp_path / "m"), tmp_path / "o.npz")["labels"].tolist() == [7, 0, 3]


# ==== What is written =============================================================================


@pytest.mark.parametrize(
    "write, name, options",
    [
        (write_mnist, "folder", []),
        (write_cifar10, "folder", []),
        (write_keras, "file.npz", []),
        (write_pictures, "folder", ["--size", "2x2"]),
    ],
)
def test_same_input_same_bytes(tmp_path, write, name, options):
    """Two copies of the source, made in another order and dated years apart, two names of --out."""
    digests = set()
    for copy in ("one", "two"):
        home = tmp_path / copy
        home.mkdir()
        source = write(home / name)
        # The order in which a folder lists its files is, often, that of their creation.
        paths = [path for path in source.rglob("*") if path.is_file()]
        for path in sorted(paths, reverse=copy == "two"):
            raw = path.read_bytes()
            path.unlink()
            path.write_bytes(raw)
            os.utime(path, (1e9, 1e9))

        out = home / f"{copy}.npz"
        run(source, out, *options)
        with zipfile.ZipFile(out) as archive:
            for info in archive.infolist():
                assert info.date_time == (1980, 1, 1, 0, 0, 0)
                assert info.compress_type == zipfile.ZIP_STORED
        digests.add(hashlib.sha256(out.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_order_does_not_come_from_the_file_system(tmp_path, monkeypatch):
    source = write_pictures(tmp_path / "p")
    run(source, tmp_path / "a.npz", "--size", "2x2")
    listed = pathlib.Path.iterdir
    monkeypatch.setattr(pathlib.Path, "iterdir", lambda path: sorted(listed(path), reverse=True))
    run(source, tmp_path / "b.npz", "--size", "2x2")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_out_errors(tmp_path, capsys):
    source = write_keras(tmp_path / "k.npz")
    (tmp_path / "folder.npz").mkdir()
    for out in (tmp_path / "none" / "o.npz", tmp_path / "folder.npz", tmp_path / "o.zip"):
        expected = f"--out {out} must be a file name that ends in .npz, in a folder that exists"
        assert expected in complaint(capsys, source, out)
    assert f"--out {source} is the source itself" in complaint(capsys, source, source)
    long = tmp_path / ("x" * 250 + ".npz")  # has no room for the temporary file's ending
    assert f"--out {long} cannot be written: File name too long" in complaint(capsys, source, long)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@contextlib.contextmanager
def failing_write(monkeypatch, error):
    """np.savez writes four bytes and then raises `error`."""

    def write_half(file, **arrays):
        file.write(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", write_half)
        yield


def test_a_run_that_fails_leaves_the_old_file(tmp_path, capsys, monkeypatch):
    source = write_keras(tmp_path / "k.npz")
    out = tmp_path / "o.npz"
    out.write_bytes(b"old")
    with failing_write(monkeypatch, OSError(28, "No space left on device")):
        message = complaint(capsys, source, out)
    assert f"--out {out} cannot be written: No space left on device" in message
    assert names_in(tmp_path) == ["k.npz", "o.npz"]

    os.link(out, tmp_path / "link")
    assert run(source, out)["labels"].tolist() == [2, 0, 1, 1, 1]
    assert (tmp_path / "link").read_bytes() == b"old", "a run must rename, not write into the file"
    assert names_in(tmp_path) == ["k.npz", "link", "o.npz"]


def test_ctrl_c(tmp_path, capsys, monkeypatch):
    """Status 130, no traceback, and neither a half-written file nor a change of the old one."""
    source = write_keras(tmp_path / "k.npz")
    out = tmp_path / "o.npz"
    out.write_bytes(b"old")
    ends = (SystemExit, KeyboardInterrupt)  # the second one would end pytest, too
    with failing_write(monkeypatch, KeyboardInterrupt()), pytest.raises(ends) as stop:
        convert.main([str(source), "--out", str(out)])
    assert stop.type is SystemExit
    assert stop.value.code == 130
    assert capsys.readouterr() == ("", "")
    assert names_in(tmp_path) == ["k.npz", "o.npz"]
    assert out.read_bytes() == b"old"


# ==== The command line ============================================================================


def run_script(folder, *arguments, python=(), **options):
    """Runs convert.py as a process in `folder`; `python` are options of Python itself."""
    command = [sys.executable, "-W", "error", *python, str(DATA / "convert.py"), *arguments]
    options = {"stdout": subprocess.PIPE} | options
    return subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, text=True, **options)


def test_source_errors(tmp_path, capsys):
    out = tmp_path / "o.npz"
    assert f"{tmp_path / 'none'} does not exist" in complaint(capsys, tmp_path / "none", out)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"{empty} holds neither IDX files, nor" in complaint(capsys, empty, out)
    source = write_mnist(tmp_path / "m")
    images = source / "train-images-idx3-ubyte"
    expected = f"{images} is no complete .npz archive; for all other sources give their folder"
    assert expected in complaint(capsys, images, out)
    for option in (["--grey"], ["--size", "2x2"], ["--labels", "coarse"]):
        expected = f"{option[0]} means nothing for {source} (kind idx): leave it out"
        assert expected in complaint(capsys, source, out, *option)


def test_as_a_script(tmp_path):
    """It needs numpy alone, from any folder; a mistake is one line and no traceback."""
    source = write_mnist(tmp_path / "m")
    done = run_script(tmp_path, "m", "--out", "o.npz")
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout == "o.npz: images uint8 [3, 2, 3], 8 classes\n"
    (source / "t10k-labels-idx1-ubyte").unlink()
    done = run_script(tmp_path, "m", "--out", "o.npz")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("convert.py: m/t10k-labels-idx1-ubyte is missing")
    assert done.stderr.count("\n") == 1


def test_help_without_docstrings(tmp_path):
    """python -OO drops the docstring that --help shows; the options are still shown."""
    done = run_script(tmp_path, "--help", python=["-OO"])
    assert done.returncode == 0
    assert done.stderr == ""
    assert "pictures: resize all to H rows and W columns" in done.stdout


def test_output_into_a_closed_pipe(tmp_path):
    """As in `python data/convert.py ... | true`: the file is whole, and there is no traceback."""
    write_mnist(tmp_path / "m")
    reading, writing = os.pipe()
    os.close(reading)
    done = run_script(tmp_path, "m", "--out", "o.npz", stdout=writing)
    os.close(writing)
    assert done.stderr == ""
    with np.load(tmp_path / "o.npz", allow_pickle=False) as archive:
        assert archive["labels"].tolist() == [7, 0, 3]


def test_file_names_that_cannot_be_printed(tmp_path):
    """Where the terminal lacks a letter its code is printed, as on standard error."""
    source = write_pictures(tmp_path / "p")
    (source / "ant" / "notes.txt").rename(source / "ant" / "\u540d.txt")
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = run_script(tmp_path, "p", "--out", "o.npz", "--size", "2x2", env=ascii_only)
    assert done.stderr == ""
    assert "skipped 1 file without a picture's suffix: ant/\\u540d.txt" in done.stdout


# ==== The files in data/ ==========================================================================


def test_readme_checksums():
    text = (DATA / "README.md").read_text()
    rows = re.findall(r"^\| (\S+\.npz) \|.*`([0-9a-f]{64})` \|$", text, re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(path.name for path in DATA.glob("*.npz"))
    for name, digest in rows:
        assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == digest, name


def test_readme_mnist():
    with np.load(DATA / "mnist5k.npz", allow_pickle=False) as archive:
        images = archive["images"]
        labels = archive["labels"]
    assert images.shape == (5000, 28, 28)
    assert images.dtype == np.uint8
    assert labels.tolist() == sorted(labels.tolist())
    assert np.bincount(labels).tolist() == [500] * 10


def test_readme_emoji():
    with np.load(DATA / "noto_emoji32.npz", allow_pickle=False) as archive:
        images = archive["images"]
        labels = archive["labels"]
        assert len(archive["class_names"]) == 9
        assert len(archive["subcategory_names"]) == 99
    assert images.shape == (1906, 32, 32, 3)
    assert images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [85, 159, 270, 131, 264, 386, 169, 224, 218]
    pictures = [image.tobytes() for image in images]
    assert len(set(pictures)) == 1892
    # As many pairs as pictures: equal pictures share a category.
    assert len(set(zip(pictures, labels.tolist(), strict=True))) == 1892
