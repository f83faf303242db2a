"""examples/moe_upcycle.py, a V-MoE from a dense checkpoint; and examples/train.py with moe.py."""

import argparse
import dataclasses
import functools
import json
import math
import re
import sys

import jax
import numpy as np
import optax
import pytest

import moe
import vit
from common import ROOT, close, mesh_of

sys.path.insert(0, str(ROOT / "examples"))
import moe_upcycle  # noqa: E402, found by the line above
import train  # noqa: E402

DENSE = vit.Config(image_size=8, patch_size=4, width=16, depth=3, heads=2, mlp=24, classes=5)
SPARSE = moe_upcycle.sparse_config(
    DENSE, {"experts": 4, "k": 4, "group": 2, "capacity_factor": 1.0, "moe_blocks": (0, 2)}
)


def random_params(config=DENSE):
    """Weights without zeros."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(vit.init_params, config=config), jax.random.key(0))
    return jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), shapes)


def images():
    return np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 3)).astype(np.float32)


def test_with_k_equal_to_the_experts_it_computes_what_the_dense_model_did():
    params = random_params()
    sparse = moe_upcycle.upcycle(params, SPARSE, jax.random.key(0))
    want = jax.jit(functools.partial(vit.forward, config=DENSE))(params, images())
    got, metrics = jax.jit(functools.partial(moe.forward, config=SPARSE))(sparse, images())
    close(got, want, 1e-5)
    assert metrics["dropped"] == 0
    routers = [sparse["blocks"][i]["router"]["kernel"] for i in ("0", "2")]
    assert np.abs(routers[0] - routers[1]).min() > 0  # each block draws its own
    largest, same = moe_upcycle.difference(params, DENSE, sparse, SPARSE, images())
    assert largest < 1e-5 and same == 1
    fewer = dataclasses.replace(SPARSE, k=1)
    assert moe_upcycle.difference(params, DENSE, sparse, fewer, images())[0] > 0.05


def test_with_fewer_the_branch_is_scaled_by_the_sum_of_the_gates():
    config = dataclasses.replace(SPARSE, k=2, capacity_factor=4.0)
    params = random_params()
    weights = moe_upcycle.upcycle(params, config, jax.random.key(0))["blocks"]["0"]
    x = np.random.default_rng(1).normal(size=(2, 5, 16)).astype(np.float32)
    got, _ = moe.mixture(x, weights, config, None, np.ones(2, bool))
    dense = jax.tree.map(lambda leaf: leaf[0], params["blocks"]["mlp"])
    gates = np.sort(np.asarray(jax.nn.softmax(x @ weights["router"]["kernel"])))[..., -2:]
    close(got, moe.mlp(x, dense, config) * gates.sum(-1, keepdims=True), 1e-5)


def test_costs_by_hand():
    """Two blocks with experts of 2 x 16 x 24 + 24 + 16 = 808 parameters each."""
    config = dataclasses.replace(SPARSE, k=2)
    costs = moe_upcycle.costs_of(config, devices=2)
    every = sum(math.prod(param.shape) for param in jax.tree.leaves(moe.param_table(config)))
    assert costs.parameters == every
    assert costs.active == every - 2 * 2 * 808  # two of four experts do not work
    assert costs.on_device == every - 2 * 2 * 808  # two of four lie on the other device
    params = moe_upcycle.upcycle(random_params(), config, jax.random.key(0))
    state = moe.init_state(jax.random.key(0), config, optax.sgd(0.1), mesh_of(2, 1), params)
    leaves = jax.tree.leaves(state.params)
    assert sum(leaf.addressable_shards[0].data.size for leaf in leaves) == costs.on_device
    one_less = dataclasses.replace(config, k=1)
    saved = costs.flops_per_token - moe_upcycle.costs_of(one_less, 1).flops_per_token
    assert saved > 2 * 4 * 16 * 24  # at least the products of an expert, in each of two blocks


def test_writes_a_checkpoint_that_train_py_reads(tmp_path, capsys):
    vit.save(tmp_path / "dense.npz", random_params(), DENSE)
    flags = ["--checkpoint", str(tmp_path / "dense.npz"), "--out", str(tmp_path / "new")]
    fields = ["--set", "experts=4", "--set", "group=2", "--devices", "4"]
    assert moe_upcycle.main([*flags, *fields]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("4 experts in blocks (1,), k=2\n")
    assert re.search(r"^before training the logits differ by \d\.\de-0\d of", printed, re.M)
    assert re.search(r"^result: got the class .* for \d+% of 4 pictures$", printed, re.M)
    about = json.loads((tmp_path / "new/model.json").read_text())
    assert about["classes"] == ["0", "1", "2", "3", "4"]
    read = argparse.Namespace(
        model="moe", checkpoint=tmp_path / "new/model.npz", gelu=None, set=["k=1"]
    )
    _, params, config, _ = train.load_checkpoint(read)
    assert config == moe_upcycle.sparse_config(DENSE, {"experts": 4, "group": 2, "k": 1})
    np.testing.assert_array_equal(
        params["blocks"]["1"]["experts"]["dense1"]["kernel"][3],
        vit.load(tmp_path / "dense.npz", DENSE)["blocks"]["mlp"]["dense1"]["kernel"][1],
    )


def test_what_it_makes_is_trained_by_train_py_and_tested_with_other_capacities(tmp_path, capsys):
    """60 pictures of three classes that differ in brightness."""
    dense = dataclasses.replace(DENSE, classes=3)
    vit.save(tmp_path / "dense.npz", random_params(dense), dense)
    flags = ["--checkpoint", str(tmp_path / "dense.npz"), "--out", str(tmp_path / "new")]
    fields = ["--set", "experts=2", "--set", "k=1", "--set", "group=2"]
    assert moe_upcycle.main([*flags, *fields]) == 0

    labels = np.repeat(np.arange(3), 20)
    images = np.random.default_rng(0).integers(0, 60, (60, 8, 8)) + 80 * labels[:, None, None]
    np.savez(tmp_path / "data.npz", images=images.astype(np.uint8), labels=labels)
    flags = ["moe", "--data", str(tmp_path / "data.npz"), "--out", str(tmp_path / "run")]
    flags += ["--batch", "16", "--crop", "1"]
    rates = ["--steps", "20", "--learning-rate", "0.01", "--report", "10"]
    assert train.main([*flags, *rates, "--checkpoint", str(tmp_path / "new/model.npz")]) == 0
    printed = capsys.readouterr().out
    number = r"\d+\.\d"
    progress = rf"  load {number}+ to {number}+  dropped {number}%  [\d,]+ pictures/s"
    assert len(re.findall(progress, printed)) == 2
    accuracy = re.search(r"^result: (held-out accuracy (\d+\.\d) %.*)", printed, re.M)
    assert float(accuracy[2]) > 60
    header, *_ = (tmp_path / "run/metrics.csv").read_text().splitlines()
    assert {"dropped", "auxiliary_loss", "router_entropy"} <= set(header.split(","))

    evaluate = ["--checkpoint", str(tmp_path / "run/model.npz"), "--evaluate"]
    one_slot = ["--set", "capacity_factor=0.01", "--set", "capacity_multiple=1"]
    assert train.main([*flags, *evaluate, *one_slot]) == 0
    starved = capsys.readouterr().out
    assert "result: held-out accuracy" in starved and accuracy[1] not in starved


def test_a_size_needs_no_devices(capsys):
    assert moe_upcycle.main(["--size", "15B", "--devices", "32"]) == 0
    printed = capsys.readouterr().out
    assert "14,705.1 million parameters" in printed and "5.16 GB of weights" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--size B/17", "--size B/17 is not one of S/32"),
        ("--size B/16 --devices 0", "--devices 0 is not at least 1"),
        ("--size B/16 --devices 7", "experts=32 are not a multiple of mesh axis data=7"),
        ("--size B/16 --set k=33", "k=33 is more than experts=32"),
        ("--checkpoint missing.npz", "missing.npz does not exist"),
        ("--checkpoint dense.npz --gelu exact", "has gelu=exact, and moe.py has tanh only"),
        ("--checkpoint dense.npz --set width=32", "--set width: it is that of the checkpoint"),
        ("--checkpoint dense.npz --set group=9999", "has fewer than 19998 pictures, two groups"),
    ],
)
def test_mistakes_are_told_in_one_line(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vit.save("dense.npz", random_params(), DENSE)
    assert moe_upcycle.main(flags.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("moe_upcycle.py: ") and message in error
    assert len(error.splitlines()) == 1


# ==== moe.py in examples/train.py =================================================================

SMALL_MOE = moe.Config(
    patch_size=4, width=16, depth=1, heads=2, mlp=16, moe_blocks=(0,), experts=4, group=2
)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """The flags of 40 pictures of two classes, and a small row of SIZES."""
    monkeypatch.setitem(moe.SIZES, "small", SMALL_MOE)
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(40) % 2)
    return ["--data", str(tmp_path / "data.npz"), "--out", str(tmp_path / "run"), "--steps", "2"]


def random_moe_params(config):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(moe.init_params, config=config), jax.random.key(0))
    return jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), shapes)


def test_blank_examples_take_no_slot_of_an_expert():
    """Whatever they hold, the others of their group get the same logits."""
    config = dataclasses.replace(
        SMALL_MOE, image_size=8, channels=1, classes=3, capacity_factor=0.5
    )
    params = random_moe_params(config)
    images = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 1)).astype(np.float32)
    blanks = np.array([True, False, True, False])
    forward = train.make_forward(moe, config, mesh_of(1, 1))

    def logits(images, labels):
        return np.asarray(forward(params, {"images": images, "labels": labels}))[~blanks]

    labels = np.where(blanks, -1, 0)
    got = logits(images, labels)
    other = np.where(blanks[:, None, None, None], 0, images)
    np.testing.assert_array_equal(got, logits(other, labels))
    assert np.abs(got - logits(images, np.zeros(4, int))).max() > 0.01  # there they take slots


def test_fields_that_set_gives():
    def fields(*given, model="moe"):
        flags = [flag for text in given for flag in ("--set", text)]
        return train.fields_to_set(train.make_parser().parse_args([model, *flags]))

    given = ("k=1", "noise_std=2", "pool=gap", "representation=8", "batch_priority=true")
    assert fields(*given, "moe_blocks=[0,2]") == {
        **{"k": 1, "noise_std": 2.0, "pool": "gap", "representation": 8},
        **{"batch_priority": True, "moe_blocks": (0, 2)},
    }
    assert fields(model="vit") == {}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--set expert=8", "--set expert=8: the field is not one of width, depth"),
        ("--set dtype=bfloat16", "--set dtype=bfloat16: the field is not one of"),
        ("--set k=two", "--set k=two: the value is not of type int"),
        ("--set k", "--set k: the value is not of type int"),
        ("--set batch_priority=1", "--set batch_priority=1: the value is not of type bool"),
        ("--set k=9", "k=9 is more than experts=4"),
        ("--dropout 0.1", "--dropout is not for moe"),
        ("--fsdp", "fsdp=True is not supported: experts are"),
        (
            "--batch 6 --accumulate 2",
            "--batch 6 is not a multiple of data x accumulate x group=2: 4",
        ),
        ("--gradient sam --rho 0.1 --perturb shard", "and those of moe are sharded"),
    ],
)
def test_train_py_refuses_in_one_line(flags, message, data, capsys):
    assert train.main(["moe", *data, "--size", "small", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: ") and message in error
    assert len(error.splitlines()) == 1


def test_train_py_refuses_the_checkpoint_of_a_vit(data, tmp_path, capsys):
    vit.save(tmp_path / "vit.npz", random_params(), DENSE)
    assert train.main(["moe", *data, "--checkpoint", str(tmp_path / "vit.npz")]) == 2
    assert "it is not a V-MoE" in capsys.readouterr().err
