"""Papers that fit together: each model of examples/train.py under GSAM, by Amos.

performer.py and memeff_attention.py in a model are tested in test_byte_lm.py.
"""

import csv
import sys

import numpy as np
import pytest

import mixer
import moe
import vit
from common import ROOT, close_gradients

sys.path.insert(0, str(ROOT / "examples"))
import train  # noqa: E402, found by the line above

SMALL = {
    vit: vit.Config(patch_size=4, width=16, depth=1, heads=4, mlp=32),
    mixer: mixer.Config(patch_size=4, width=16, depth=1, tokens_mlp=8, channels_mlp=32),
    moe: moe.Config(
        patch_size=4, width=16, depth=1, heads=2, mlp=16, moe_blocks=(0,), experts=8, group=1
    ),
}
# Endings of names. A key's bias cancels in the softmax, an output bias of token mixing in every
# later LayerNorm. Their gradients are rounding errors, which Amos scales up to full steps.
WITHOUT_EFFECT = ("key/bias", "token_mixing/Dense_1/bias")
MESHES = {vit: "data=2,model=4", mixer: "data=2,model=4", moe: "data=8,model=1"}


@pytest.mark.parametrize("module", SMALL, ids=lambda module: module.__name__)
def test_gsam_and_amos_train_it_alike_on_one_device_and_on_eight(module, tmp_path, monkeypatch):
    monkeypatch.setitem(module.SIZES, "small", SMALL[module])
    rng = np.random.default_rng(0)
    labels = np.arange(20) % 2
    images = (rng.integers(0, 100, (20, 8, 8)) + 100 * labels[:, None, None]).astype(np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    flags = [
        "--data",
        tmp_path / "data.npz",
        *"--size small --batch 8 --steps 3 --report 1".split(),
    ]
    flags += "--gradient gsam --rho 0.1 --alpha 0.4 --optimizer amos --learning-rate 0.05".split()
    found = []
    for mesh in ("data=1,model=1", MESHES[module]):
        out = tmp_path / mesh
        arguments = [module.__name__, *flags, "--mesh", mesh, "--out", out]
        assert train.main([*map(str, arguments)]) == 0
        with open(out / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        weights = vit.read_npz(out / "model.npz")
        weights = {name: x for name, x in weights.items() if not name.endswith(WITHOUT_EFFECT)}
        found.append((weights, rows))
    (one, rows_of_one), (eight, rows_of_eight) = found
    close_gradients(eight, one, 1e-4)
    for name in ("loss", "gap"):
        got = [float(row[name]) for row in rows_of_eight]
        np.testing.assert_allclose(got, [float(row[name]) for row in rows_of_one], rtol=1e-3)
    assert min(float(row["gap"]) for row in rows_of_one) > 0  # a perturbed loss was computed
    losses = [float(row["loss"]) for row in rows_of_one]
    assert losses[-1] < losses[0]
