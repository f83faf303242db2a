"""data/convert.py: each source that it reads, from files written here, and each mistake that it reports."""

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


def complaint(capsys, source, out, *options):
    """The one line on standard error of a run that must end with exit status 2 and write nothing."""
    before = out.read_bytes() if out.is_file() else None
    capsys.readouterr()  # what earlier runs printed
    with pytest.raises(SystemExit) as stop:
        convert.main([str(source), "--out", str(out), *options])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == ""
    assert printed.err.startswith("convert.py: ") and printed.err.count("\n") == 1, printed.err
    assert (out.read_bytes() if out.is_file() else None) == before, "a failed run changed --out"
    return printed.err


# ==== Files as their makers write them ============================================================


def write_idx(path, magic, sizes, data, pack=lambda raw: raw):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pack(struct.pack(f">{1 + len(sizes)}I", magic, *sizes) + bytes(data)))


def write_mnist(folder, pack=lambda raw: raw, suffix=""):
    """2 train and 1 test picture of 2 x 3 pixels, 0..11 and 250..255, with labels 7, 0 and 3."""
    write_idx(folder / f"train-images-idx3-ubyte{suffix}", 2051, (2, 2, 3), range(12), pack)
    write_idx(folder / f"train-labels-idx1-ubyte{suffix}", 2049, (2,), [7, 0], pack)
    write_idx(folder / f"t10k-images-idx3-ubyte{suffix}", 2051, (1, 2, 3), range(250, 256), pack)
    write_idx(folder / f"t10k-labels-idx1-ubyte{suffix}", 2049, (1,), [3], pack)
    return folder


def record(labels, seed):
    """One CIFAR record: `labels`, then the planes c; a pixel is seed + 50 c + 5 row + column, modulo 256."""
    planes = [[(seed + 50 * c + 5 * h + w) % 256 for h in range(32) for w in range(32)] for c in range(3)]
    return bytes(labels) + b"".join(bytes(plane) for plane in planes)


def write_cifar10(folder):
    """Batch i has one picture, seed i, label i; the test batch has two, seeds 6 and 7, labels 9 and 0."""
    folder.mkdir()
    for i in range(1, 6):
        (folder / f"data_batch_{i}.bin").write_bytes(record([i], i))
    (folder / "test_batch.bin").write_bytes(record([9], 6) + record([0], 7))
    return folder


def write_cifar100(folder):
    """Labels (coarse, fine): (19, 99), (0, 4) for training and (3, 50) for testing."""
    folder.mkdir()
    (folder / "train.bin").write_bytes(record([19, 99], 1) + record([0, 4], 2))
    (folder / "test.bin").write_bytes(record([3, 50], 3))
    return folder


def write_keras(path, **changes):
    """mnist.npz in small: 3 train and 2 test pictures of 2 x 2 pixels. A change to None removes the array."""
    arrays = {
        "x_train": np.arange(12, dtype=np.uint8).reshape(3, 2, 2),
        "y_train": np.array([2, 0, 1], np.uint8),
        "x_test": np.arange(100, 108, dtype=np.uint8).reshape(2, 2, 2),
        "y_test": np.array([1, 1], np.uint8),
    }
    np.savez(path, **{k: v for k, v in (arrays | changes).items() if v is not None})
    return path


def write_picture(path, pixels, **options):
    Image = pytest.importorskip("PIL.Image", reason="pictures need pillow")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(pixels)).save(path, **options)


def write_pictures(folder):
    """2 x 2 pixels each: class Zebra has a blue picture; ant, which sorts after it, a red and a green one."""
    for name, color in (("ant/b.png", (0, 255, 0)), ("ant/a.PNG", (255, 0, 0)), ("Zebra/z.bmp", (0, 0, 255))):
        write_picture(folder / name, np.full((2, 2, 3), color, np.uint8))
    (folder / "ant" / "notes.txt").write_text("no picture, left out")
    (folder / "ant" / "._a.png").write_text("what a Mac adds, left out")
    (folder / ".cache").mkdir()
    return folder


# ==== MNIST's IDX files ===========================================================================


@pytest.mark.parametrize(
    "pack, suffix", [(lambda raw: raw, ""), (gzip.compress, ".gz"), (lambda raw: raw, ".gz")]
)
def test_idx_values(tmp_path, pack, suffix):
    """Plain, gzipped, and unpacked by a downloader that kept the name: picture by picture, row by row."""
    got = run(write_mnist(tmp_path / "m", pack, suffix), tmp_path / "o.npz")
    assert {name: str(array.dtype) for name, array in got.items()} == {"images": "uint8", "labels": "int32"}
    assert got["images"].tolist() == [
        [[0, 1, 2], [3, 4, 5]],
        [[6, 7, 8], [9, 10, 11]],
        [[250, 251, 252], [253, 254, 255]],
    ]
    assert got["labels"].tolist() == [7, 0, 3]


def test_idx_split(tmp_path, capsys):
    source = write_mnist(tmp_path / "m")
    assert run(source, tmp_path / "train.npz", "--split", "train")["labels"].tolist() == [7, 0]
    assert "train.npz: images uint8 [2, 2, 3], 8 classes" in capsys.readouterr().out
    test = run(source, tmp_path / "test.npz", "--split", "test")
    assert test["labels"].tolist() == [3] and test["images"].tolist() == [[[250, 251, 252], [253, 254, 255]]]


def test_idx_name_with_a_dot(tmp_path):
    source = write_mnist(tmp_path / "m")
    for path in list(source.iterdir()):
        path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    assert run(source, tmp_path / "o.npz")["labels"].tolist() == [7, 0, 3]


def test_idx_errors(tmp_path, capsys):
    source, out = write_mnist(tmp_path / "m"), tmp_path / "o.npz"
    images, labels = source / "train-images-idx3-ubyte", source / "train-labels-idx1-ubyte"
    write_idx(images, 2051, (2, 2, 3), range(11))
    assert f"{images} has 27 bytes, its sizes [2, 2, 3] require 28" in complaint(capsys, source, out)
    write_idx(images, 2051, (2, 2, 3), range(13))
    assert "29 bytes" in complaint(capsys, source, out)
    images.write_bytes(struct.pack(">2I", 2051, 2))  # cut inside the header
    assert f"{images} has 8 bytes" in complaint(capsys, source, out)
    write_idx(images, 2049, (2, 2, 3), range(12))
    assert f"{images} starts with magic number 2049, required is 2051" in complaint(capsys, source, out)
    images.write_bytes(gzip.compress(bytes(100))[:-9])
    assert f"{images} is a damaged gzip file" in complaint(capsys, source, out)
    write_idx(images, 2051, (0, 2, 3), [])
    assert "images are uint8 [0, 2, 3], required is" in complaint(capsys, source, out)
    write_idx(images, 2051, (3, 2, 3), range(18))
    assert "m/train: 3 images, 2 labels, required is one for each" in complaint(capsys, source, out)
    write_idx(images, 2051, (2, 3, 2), range(12))
    assert "images of (2, 3), required is (3, 2) as in" in complaint(capsys, source, out)
    write_idx(labels, 2051, (2,), [7, 0])
    assert f"{labels} starts with magic number 2051, required is 2049" in complaint(capsys, source, out)
    labels.unlink()
    assert f"{labels} is missing: --split all needs it" in complaint(capsys, source, out)
    assert run(source, out, "--split", "test")["labels"].tolist() == [3]  # which needs no train part


# ==== CIFAR's binaries ============================================================================


def check_pixels(image, seed):
    """Values of `record`, worked out by hand: a wrong order of planes, rows or columns changes them."""
    assert image.shape == (32, 32, 3)
    assert image[0, 0].tolist() == [seed, seed + 50, seed + 100]
    assert image[2, 1].tolist() == [seed + 11, seed + 61, seed + 111]
    assert image[31, 7].tolist() == [seed + 162, seed + 212, seed + 6]  # 100 + 155 + 7 = 262 = 6 modulo 256


def test_cifar10_values(tmp_path):
    source = write_cifar10(tmp_path / "c")
    got = run(source, tmp_path / "o.npz")
    assert got["labels"].tolist() == [1, 2, 3, 4, 5, 9, 0] and sorted(got) == ["images", "labels"]
    for image, seed in zip(got["images"], range(1, 8), strict=True):
        check_pixels(image, seed)
    assert run(source, tmp_path / "train.npz", "--split", "train")["labels"].tolist() == [1, 2, 3, 4, 5]
    assert run(source, tmp_path / "test.npz", "--split", "test")["labels"].tolist() == [9, 0]


def test_cifar100_values(tmp_path):
    source, out = write_cifar100(tmp_path / "c"), tmp_path / "o.npz"
    for options, labels in (([], [99, 4, 50]), (["--labels", "coarse"], [19, 0, 3])):
        got = run(source, out, *options)
        assert got["labels"].tolist() == labels
        for image, seed in zip(got["images"], (1, 2, 3), strict=True):
            check_pixels(image, seed)


def test_cifar_class_names(tmp_path, capsys):
    source, out = write_cifar10(tmp_path / "c"), tmp_path / "o.npz"
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    (source / "batches.meta.txt").write_text("\n".join(names) + "\n\n")  # it ends with an empty line
    assert run(source, out)["class_names"].tolist() == names
    (source / "batches.meta.txt").write_text("airplane\n")
    assert "batches.meta.txt has 1 class names, required is 10" in complaint(capsys, source, out)


def test_cifar_errors(tmp_path, capsys):
    source, out = write_cifar10(tmp_path / "c"), tmp_path / "o.npz"
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

    source = write_cifar100(tmp_path / "hundred")
    (source / "train.bin").write_bytes(record([20, 5], 1))
    complained = complaint(capsys, source, out, "--labels", "coarse")
    assert "train.bin has a label 20, required is 0..19" in complained
    (source / "train.bin").write_bytes(record([1], 1))
    assert "train.bin has 3073 bytes, required is a multiple" in complaint(capsys, source, out)

    source = tmp_path / "python"
    source.mkdir()
    (source / "data_batch_1").write_bytes(b"\x80")
    assert "python version, which is pickles: take the binary version" in complaint(capsys, source, out)


# ==== Archives as Keras has them ==================================================================


def test_keras_values(tmp_path):
    source = write_keras(tmp_path / "k.npz")
    got = run(source, tmp_path / "o.npz")
    assert got["images"][[1, 3]].tolist() == [[[4, 5], [6, 7]], [[100, 101], [102, 103]]]
    assert got["labels"].tolist() == [2, 0, 1, 1, 1] and got["images"].shape == (5, 2, 2)
    assert run(source, tmp_path / "test.npz", "--split", "test")["labels"].tolist() == [1, 1]


def test_keras_colour_and_labels_in_a_column(tmp_path):
    """As keras.datasets.cifar10 gives them: [N,H,W,3] and [N,1]; here in Fortran order too."""
    colour = np.arange(36, dtype=np.uint8).reshape(3, 2, 2, 3)
    column = np.array([[2], [0], [1]], np.int64)
    source = write_keras(tmp_path / "k.npz", x_train=np.asfortranarray(colour), y_train=column)
    got = run(source, tmp_path / "o.npz", "--split", "train")
    assert got["images"].shape == (3, 2, 2, 3) and got["images"][1, 1, 0].tolist() == [18, 19, 20]
    assert got["labels"].tolist() == [2, 0, 1] and got["labels"].dtype == np.int32


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x_test": None}, "--split all needs x_test, the archive holds x_train, y_train, y_test"),
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
        ({"y_train": np.zeros(3, np.float32)}, "labels are float32 [3], required are integers [N] or [N,1]"),
        ({"y_train": np.zeros((3, 10), np.uint8)}, "labels are uint8 [3, 10], required are integers"),
        ({"y_train": np.zeros(2, np.uint8)}, "k.npz: train: 3 images, 2 labels, required is one for each"),
        ({"y_test": np.array([0, -1])}, "k.npz: test: labels -1..0, required is 0..65535 at most"),
        ({"y_test": np.array([0, 65536])}, "labels 0..65536"),
        ({"x_test": np.zeros((2, 2, 3), np.uint8)}, "test: images of (2, 3), required is (2, 2) as in"),
    ],
)
def test_keras_errors(tmp_path, capsys, changes, message):
    assert message in complaint(capsys, write_keras(tmp_path / "k.npz", **changes), tmp_path / "o.npz")


def test_keras_damaged(tmp_path, capsys):
    source, out = write_keras(tmp_path / "k.npz"), tmp_path / "o.npz"
    whole = source.read_bytes()
    source.write_bytes(whole[:-30])
    assert f"{source} is no complete .npz archive" in complaint(capsys, source, out)
    source.write_bytes(whole.replace(bytes(range(12)), bytes(12)))  # the checksum of x_train no longer fits
    assert f"{source} cannot be used: Bad CRC-32" in complaint(capsys, source, out)


# ==== A folder of pictures per class ==============================================================


def test_pictures_values(tmp_path):
    got = run(write_pictures(tmp_path / "p"), tmp_path / "o.npz", "--size", "2x2")
    assert got["class_names"].tolist() == ["Zebra", "ant"]
    assert got["labels"].tolist() == [0, 1, 1] and got["images"].shape == (3, 2, 2, 3)
    assert got["images"][:, 0, 0].tolist() == [[0, 0, 255], [255, 0, 0], [0, 255, 0]]


def test_pictures_keep_rows_and_columns(tmp_path):
    """Without a change of size no pixel changes; --size is rows x columns."""
    pixels = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)
    write_picture(tmp_path / "p" / "a" / "1.png", pixels)
    got = run(tmp_path / "p", tmp_path / "o.npz", "--size", "2x3", "--grey")
    assert got["images"].tolist() == [pixels.tolist()]
    got = run(tmp_path / "p", tmp_path / "o.npz", "--size", "2x3")
    assert got["images"].shape == (1, 2, 3, 3) and (got["images"][0] == pixels[..., None]).all()


def test_pictures_resized(tmp_path):
    """A left half 0 and a right half 200 stay so at a quarter of the size; only the seam may be blurred."""
    pixels = np.zeros((16, 32), np.uint8)
    pixels[:, 16:] = 200
    write_picture(tmp_path / "p" / "a" / "1.png", pixels)
    image = run(tmp_path / "p", tmp_path / "o.npz", "--size", "4x8", "--grey")["images"][0]
    assert image.shape == (4, 8) and (image[:, :3] == 0).all() and (image[:, 5:] == 200).all()


def test_pictures_grey_transparent_turned(tmp_path):
    pixels = np.array([[[255, 0, 0, 255], [255, 0, 0, 0]]], np.uint8)  # red, and red that nobody sees
    write_picture(tmp_path / "p" / "a" / "1.png", pixels)
    got = run(tmp_path / "p", tmp_path / "o.npz", "--size", "1x2")
    assert got["images"].tolist() == [[[[255, 0, 0], [255, 255, 255]]]]
    got = run(tmp_path / "p", tmp_path / "o.npz", "--size", "1x2", "--grey")
    assert got["images"].tolist() == [[[76, 255]]]  # ITU-R 601: 0.299 * 255 = 76.2

    exif = pytest.importorskip("PIL.Image").Exif()
    exif[0x0112] = 3  # orientation: the camera was upside down
    write_picture(tmp_path / "q" / "a" / "1.png", np.array([[10, 20], [30, 40]], np.uint8), exif=exif)
    got = run(tmp_path / "q", tmp_path / "o.npz", "--size", "2x2", "--grey")
    assert got["images"].tolist() == [[[40, 30], [20, 10]]]


def test_pictures_errors(tmp_path, capsys):
    source, out = write_pictures(tmp_path / "p"), tmp_path / "o.npz"
    for size in ("32", "0x4", "4x-4", "4x4x3", "axb"):
        expected = f"--size {size}: a folder of pictures needs rows x columns, as in --size 32x32"
        assert expected in complaint(capsys, source, out, "--size", size)
    assert "--size None: a folder of pictures needs rows x columns" in complaint(capsys, source, out)
    options = ("--size", "2x2")
    assert "--split means nothing for" in complaint(capsys, source, out, *options, "--split", "train")
    write_picture(source / "ant" / "deep.png", np.full((2, 2), 300, np.uint16))
    assert "deep.png has more than 8 bits per channel (mode I;16)" in complaint(capsys, source, out, *options)
    (source / "ant" / "deep.png").unlink()
    whole = (source / "ant" / "a.PNG").read_bytes()
    for damaged in (b"", b"no picture", whole[:40], whole[:45]):
        (source / "Zebra" / "bad.png").write_bytes(damaged)
        expected = f"{source / 'Zebra' / 'bad.png'} cannot be read as a picture"
        assert expected in complaint(capsys, source, out, *options)
    (source / "Zebra" / "bad.png").unlink()
    (source / "Empty").mkdir()
    assert "Empty has no pictures, required is one (.bmp" in complaint(capsys, source, out, *options)
    (tmp_path / "hidden" / ".git").mkdir(parents=True)
    assert "hidden has no sub-folder with pictures" in complaint(capsys, tmp_path / "hidden", out, *options)


def test_pictures_without_pillow(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    (tmp_path / "p" / "a").mkdir(parents=True)
    (tmp_path / "p" / "a" / "1.png").write_bytes(b"")
    message = complaint(capsys, tmp_path / "p", tmp_path / "o.npz", "--size", "2x2")
    assert "pictures need pillow: pip install pillow" in message
    assert run(write_mnist(tmp_path / "m"), tmp_path / "o.npz")["labels"].tolist() == [7, 0, 3]


# ==== What is written, and the command line =======================================================


@pytest.mark.parametrize("kind", ["idx", "cifar10", "keras", "pictures"])
def test_same_input_same_bytes(tmp_path, kind):
    """Two copies of the source, made in another order and dated years apart, two names of the result."""
    digests = set()
    for copy in ("one", "two"):
        home = tmp_path / copy
        home.mkdir()
        write = {
            "idx": write_mnist,
            "cifar10": write_cifar10,
            "keras": write_keras,
            "pictures": write_pictures,
        }
        source = write[kind](home / ("s.npz" if kind == "keras" else "s"))
        paths = sorted((p for p in source.rglob("*") if p.is_file()), reverse=copy == "two")
        for path in paths:  # the order in which a folder lists its files is, often, that of their creation
            raw = path.read_bytes()
            path.unlink()
            path.write_bytes(raw)
            os.utime(path, (1e9, 1e9))
        out = home / f"{copy}.npz"
        run(source, out, *(["--size", "2x2"] if kind == "pictures" else []))
        with zipfile.ZipFile(out) as archive:
            assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
            assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
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
    long = tmp_path / ("x" * 250 + ".npz")  # a name that has no room for the temporary file's ending
    assert f"--out {long} cannot be written: File name too long" in complaint(capsys, source, long)


def test_a_run_that_fails_leaves_the_old_file(tmp_path, capsys, monkeypatch):
    source, out = write_keras(tmp_path / "k.npz"), tmp_path / "o.npz"
    out.write_bytes(b"old")

    def disk_is_full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", disk_is_full)
        assert "cannot be written: No space left on device" in complaint(capsys, source, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k.npz", "o.npz"]
    os.link(out, tmp_path / "link")  # and a run that succeeds renames: it does not write into the old file
    assert run(source, out)["labels"].tolist() == [2, 0, 1, 1, 1]
    assert (tmp_path / "link").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k.npz", "link", "o.npz"]


def test_source_errors(tmp_path, capsys):
    out = tmp_path / "o.npz"
    assert f"{tmp_path / 'none'} does not exist" in complaint(capsys, tmp_path / "none", out)
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'} holds neither IDX files, nor" in complaint(capsys, tmp_path / "empty", out)
    images = write_mnist(tmp_path / "m") / "train-images-idx3-ubyte"
    assert f"{images} is no complete .npz archive; for all other" in complaint(capsys, images, out)
    for option in (["--grey"], ["--size", "2x2"], ["--labels", "coarse"]):
        expected = f"{option[0]} means nothing for {tmp_path / 'm'} (kind idx): leave it out"
        assert expected in complaint(capsys, tmp_path / "m", out, *option)


def test_as_a_script(tmp_path):
    """It needs numpy alone, from any folder; a mistake is one line and no traceback."""
    source = write_mnist(tmp_path / "m")
    command = [sys.executable, "-W", "error", str(DATA / "convert.py"), "m", "--out", "o.npz"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "o.npz: images uint8 [3, 2, 3]" in done.stdout
    (source / "t10k-labels-idx1-ubyte").unlink()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("convert.py: m/t10k-labels-idx1-ubyte is missing")


# ==== The files in data/ ==========================================================================


def test_readme_checksums():
    rows = re.findall(r"^\| (\S+\.npz) \|.*`([0-9a-f]{64})` \|$", (DATA / "README.md").read_text(), re.M)
    assert sorted(name for name, _ in rows) == sorted(path.name for path in DATA.glob("*.npz"))
    for name, digest in rows:
        assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == digest, name


def test_readme_numbers():
    with np.load(DATA / "mnist5k.npz", allow_pickle=False) as archive:
        images, labels = archive["images"], archive["labels"]
    assert images.shape == (5000, 28, 28) and images.dtype == np.uint8
    assert labels.tolist() == sorted(labels.tolist()) and np.bincount(labels).tolist() == [500] * 10
    with np.load(DATA / "noto_emoji32.npz", allow_pickle=False) as archive:
        images, labels, names = archive["images"], archive["labels"], archive["class_names"]
        assert len(archive["subcategory_names"]) == 99
    assert images.shape == (1906, 32, 32, 3) and images.dtype == np.uint8 and len(names) == 9
    assert np.bincount(labels).tolist() == [85, 159, 270, 131, 264, 386, 169, 224, 218]
    pictures = [image.tobytes() for image in images]
    assert len(set(pictures)) == 1892
    assert len(set(zip(pictures, labels.tolist(), strict=True))) == 1892  # equal pictures share a category
