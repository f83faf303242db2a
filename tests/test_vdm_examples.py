"""examples/vdm_train.py, vdm_ode.py, vdm_compress.py: runs, an exact likelihood, a round trip."""

import dataclasses
import functools
import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdm
from common import ROOT, close

sys.path.insert(0, str(ROOT / "examples"))
import vdm_compress  # noqa: E402, found by the line above
import vdm_ode  # noqa: E402
import vdm_train  # noqa: E402

TINY = vdm.Config(
    image_size=4,
    channels=1,
    levels=5,
    width=64,
    depth=1,
    dropout=0.0,
    fourier=(),
    gamma_min=-4.0,
    gamma_max=4.0,
)


@pytest.fixture
def data(tmp_path):
    """40 pictures of 4x4 with five levels."""
    images = np.random.default_rng(0).integers(0, 5, (40, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=images)
    return str(tmp_path / "data.npz")


@pytest.fixture
def model(tmp_path):
    """A folder as vdm_train.py writes it, with untrained weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    params = vdm.init_params(jax.random.key(0), TINY)
    vdm.save(folder / "model.npz", params, TINY)
    about = {"model": "vdm", "config": dataclasses.asdict(TINY)}
    (folder / "model.json").write_text(json.dumps(about))
    return str(folder)


# ==== Training ====================================================================================

FIELDS = ("width=64", "depth=1", "fourier=[2]", "schedule=network", "gamma_min=-6")
SMALL = [flag for field in FIELDS for flag in ("--set", field)]
SMALL += ["--levels", "5", "--batch", "9", "--report", "2", "--every", "2", "--sample-steps", "2"]


def test_stopped_and_resumed_it_ends_with_the_same_weights(data, tmp_path, capsys):
    """On three devices, which do not divide the 16 samples; first with more --steps."""
    flags = ["--data", data, *SMALL, "--steps", "4", "--dropout", "0.1"]
    flags += ["--mesh", "data=3,model=1", "--test-batch", "3"]
    whole = str(tmp_path / "whole")
    assert vdm_train.main([*flags, "--out", whole]) == 0
    text = capsys.readouterr().out
    number = r"-?\d+\.\d+"
    terms = (
        rf"{number} \+- {number} \(prior {number}, reconstruction {number}, diffusion {number}\)"
    )
    assert re.search(rf"^result: held-out bits per dimension {terms}$", text, re.M)
    assert (tmp_path / "whole/samples.png").read_bytes()[:4] == b"\x89PNG"
    params, config = vdm_train.load_model(whole)
    assert (config.levels, config.channels, config.dropout) == (5, 1, 0.1)
    assert config.fourier == (2,) and config.gamma_min == -6.0

    part = str(tmp_path / "part")

    class Stop(Exception):
        pass

    save = vdm_train.train.States.save

    def save_once(states, state, settings):
        if int(state.step) == 4:
            raise Stop
        save(states, state, settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vdm_train.train.States, "save", save_once)
        with pytest.raises(Stop):
            vdm_train.main([*flags, "--out", part, "--steps", "6"])
    assert vdm_train.main([*flags, "--out", part]) == 2
    assert "holds the states of a run" in capsys.readouterr().err
    assert vdm_train.main([*flags, "--out", part, "--resume", "--seed", "1"]) == 2
    assert "has seed=0, not 1" in capsys.readouterr().err
    assert vdm_train.main([*flags, "--out", part, "--resume"]) == 0
    again, _ = vdm_train.load_model(part)
    for name, leaf in vdm.named_leaves(params).items():
        np.testing.assert_array_equal(vdm.named_leaves(again)[name], leaf)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--levels 4", "images are from 0 to 4, but of --levels 4 the largest is 3"),
        ("--recipe cats", "--recipe cats is not one of CIFAR-10"),
        ("--steps 0", "--steps 0 is not at least 1"),
        ("--batch 0", "--batch 0 is not at least 1"),
        ("--learning-rate nan", "--learning-rate nan is not a finite number above 0"),
        ("--set levels=9", "--set levels: the flag --levels is for that"),
        ("--set wide=9", "--set wide=9: the field is not one of"),
        ("--set width=65", "width=65 is not a multiple of 32"),
        ("--mesh data=2,model=1", "--batch 9 is not a multiple of data=2"),
        ("--test-batch 0", "--test-batch 0 is not at least 1"),
        ("--validation other.npz", "other.npz: pictures (9, 9, 1) are not (4, 4, 1)"),
        ("--data few.npz", "few.npz has 3 pictures, fewer than 10"),
        ("--data floats.npz", "floats.npz: images are float64 (3, 4, 4), not integers"),
    ],
)
def test_mistakes_are_told_in_one_line(flags, message, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("other.npz", images=np.zeros((3, 9, 9), int))
    np.savez("few.npz", images=np.zeros((3, 4, 4), int))
    np.savez("floats.npz", images=np.zeros((3, 4, 4)))
    assert vdm_train.main(["--data", data, *SMALL, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vdm_train.py: ") and message in error
    assert len(error.splitlines()) == 1


# ==== The ODE =====================================================================================

S = 0.4  # deviation of Gaussian data


def gaussian_score(z, gamma):
    """E[eps | z_t] for x ~ N(0, S^2)."""
    gamma = gamma[:, None, None, None]
    variance = S**2 * jax.nn.sigmoid(-gamma) + jax.nn.sigmoid(gamma)
    return vdm.sigma(gamma) * z / variance


def variance_of(gamma):
    """Of z_t."""
    return (S**2 + math.exp(gamma)) / (1 + math.exp(gamma))


def test_the_ode_gives_the_likelihood_of_gaussian_data():
    """z_1 = z_0 sqrt(v_1 / v_0), so log p(z_0) = log N(z_1; 0, 1) + log(v_1 / v_0) / 2."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(3, 2, 2, 1)).astype(np.float32)
    signs = np.sign(rng.normal(size=z.shape)).astype(np.float32)
    got = vdm_ode.log_density(z, signs, -5.0, 4.0, gaussian_score, 40)
    ratio = variance_of(4.0) / variance_of(-5.0)
    want = -0.5 * (z**2 * ratio + math.log(2 * math.pi)) + 0.5 * math.log(ratio)
    close(got, want.sum((1, 2, 3)), 1e-4)
    function = functools.partial(vdm_ode.velocity, score=gaussian_score)
    there = vdm_ode.integrate(function, jnp.asarray(z), -5.0, 4.0, 40)
    close(there, z * math.sqrt(ratio), 1e-4)
    close(vdm_ode.integrate(function, there, 4.0, -5.0, 40), z, 1e-4)


def test_the_cost_by_the_ode_is_below_the_bound(model, data, tmp_path, capsys):
    out = tmp_path / "between.png"
    flags = ["--model", model, "--data", data, "--out", str(out)]
    assert vdm_ode.main([*flags, "--count", "8", "--steps", "6"]) == 0
    text = capsys.readouterr().out
    bound, ode = (
        float(re.search(rf"by the {name}: (\d+\.\d+)", text)[1]) for name in ("bound", "ODE")
    )
    assert 0 < ode < bound
    assert out.read_bytes()[:4] == b"\x89PNG"
    params, config = vdm_train.load_model(model)
    first, second = random_pictures(2)
    pictures = vdm_ode.between(params, first, second, config, 6, 3)
    np.testing.assert_array_equal(pictures[0], first)
    np.testing.assert_array_equal(pictures[2], second)


def test_mixing_on_a_great_circle():
    a = jnp.array([2.0, 0.0])
    b = jnp.array([0.0, 2.0])
    share = jnp.linspace(0, 1, 3)[:, None]
    half = math.sqrt(2)
    close(vdm_ode.on_great_circle(a, b, share), [[2, 0], [half, half], [0, 2]], 1e-6)
    for same in (a, a + 1e-6):  # not 0 / 0
        close(vdm_ode.on_great_circle(a, same, share), [[2, 0]] * 3, 1e-5)
    for row in np.random.default_rng(0).normal(size=(20, 50)).astype(np.float32):
        close(vdm_ode.on_great_circle(row, row, share), [row] * 3, 1e-5)  # cosines above 1, too


def test_runge_kutta_is_of_fourth_order():
    got = vdm_ode.integrate(lambda y, gamma: y, 1.0, 0.0, 1.0, 8)
    assert float(got) == pytest.approx(math.e, rel=1e-5)


def random_pictures(count):
    return np.random.default_rng(1).integers(0, 5, (count, *TINY.shape))


# ==== Compression =================================================================================


def test_the_stack_gives_back_what_was_pushed():
    rng = np.random.default_rng(0)
    stack = vdm_compress.new_stack(50, 200, 0)
    heads = stack.heads.copy()
    tail = np.concatenate(stack.tail)
    shift = rng.normal(size=50)
    steps = rng.integers(-80, 81, (30, 50))
    before = stack.bits()
    for step in steps:
        vdm_compress.push_normal(stack, step, shift, 0.7)
    assert stack.bits() > before
    for step in steps[::-1]:
        np.testing.assert_array_equal(vdm_compress.pop_normal(stack, shift, 0.7), step)
    np.testing.assert_array_equal(stack.heads, heads)
    np.testing.assert_array_equal(np.concatenate(stack.tail), tail)


def test_a_symbol_costs_the_logarithm_of_its_share():
    stack = vdm_compress.new_stack(1000, 0, 0)
    before = stack.bits()
    start = np.full(1000, 5)
    stack.push(start, np.full(1000, 2**vdm_compress.SHARE_BITS // 8))
    assert (stack.bits() - before) / 1000 == pytest.approx(3, abs=1e-3)


def test_shares_are_positive_and_whole():
    steps = np.arange(-vdm_compress.LIMIT, vdm_compress.LIMIT + 2)
    for shift, scale in ((0.0, 1.0), (9.0, 0.1), (-30.0, 1.0)):
        starts = vdm_compress.normal_start(steps, shift, scale)
        assert starts[0] == 0 and starts[-1] == 2**vdm_compress.SHARE_BITS
        assert (np.diff(starts) > 0).all()
    logits = np.array([[0.0, -1e6, 3.0], [0.0, 0.0, 0.0]])
    starts = vdm_compress.level_starts(logits)
    assert (starts[:, 0] == 0).all() and (starts[:, -1] == 2**vdm_compress.SHARE_BITS).all()
    assert (np.diff(starts) > 0).all()


def test_shares_of_the_levels_are_those_of_the_decoder():
    params = vdm.init_params(jax.random.key(0), TINY)
    coder = vdm_compress.Coder(params, TINY, 3)
    z_0 = np.random.default_rng(0).normal(size=16)
    got = np.diff(coder.decoder(z_0)) / 2**vdm_compress.SHARE_BITS
    z = jnp.asarray(z_0 / vdm_compress.alpha(TINY.gamma_min), jnp.float32)
    want = jax.nn.softmax(vdm.decoder_logits(z, TINY.gamma_min, TINY.levels))
    close(got, want, 1e-4)


def test_pictures_come_back_and_so_do_the_first_bits():
    params = vdm.init_params(jax.random.key(0), TINY)
    coder = vdm_compress.Coder(params, TINY, 3)
    stack = vdm_compress.new_stack(16, 16 * 6, 0)
    heads = stack.heads.copy()
    tail = np.concatenate(stack.tail)
    pictures = random_pictures(5)
    for picture in pictures:
        coder.push(stack, picture)
    back = [coder.pop(stack) for _ in pictures][::-1]
    np.testing.assert_array_equal(back, pictures)
    np.testing.assert_array_equal(stack.heads, heads)
    np.testing.assert_array_equal(np.concatenate(stack.tail), tail)


def test_the_net_rate_is_the_bound():
    """Within 2 %: 150 pictures, since the latents that the stack gives are random."""
    config = dataclasses.replace(TINY, gamma_min=-2.0, gamma_max=3.0)
    params = vdm.init_params(jax.random.key(0), config)
    coder = vdm_compress.Coder(params, config, 2)
    stack = vdm_compress.new_stack(16, 16 * 6, 0)
    before = stack.bits()
    pictures = random_pictures(150)
    for picture in pictures:
        coder.push(stack, picture)
    rate = (stack.bits() - before) / pictures.size
    bound = vdm_compress.bound_of(params, pictures, config, 2, jax.random.key(0))
    assert rate == pytest.approx(bound["total"], rel=0.02)


def test_program_restores_what_it_wrote(model, data, tmp_path, capsys):
    packed = str(tmp_path / "packed.npz")
    flags = ["--model", model, "--steps", "3"]
    assert vdm_compress.main([*flags, "--data", data, "--count", "4", "--out", packed]) == 0
    assert re.search(r"^result: net rate \d+\.\d+ bits per", capsys.readouterr().out, re.M)
    back = str(tmp_path / "back.npz")
    assert vdm_compress.main(["--model", model, "--restore", packed, "--out", back]) == 0
    with np.load(back) as restored, np.load(data) as original:
        np.testing.assert_array_equal(restored["images"][..., 0], original["images"][:4])

    capsys.readouterr()
    arrays = vdm.read_npz(packed)

    def refused(message, **changed):
        damaged = str(tmp_path / "damaged.npz")
        np.savez(damaged, **{**arrays, **changed})
        flags = ["--model", model, "--restore", damaged, "--out", str(tmp_path / "none.npz")]
        assert vdm_compress.main(flags) == 2
        error = capsys.readouterr().err
        assert error.startswith("vdm_compress.py: ") and message in error, error
        assert error.count("\n") == 1 and not (tmp_path / "none.npz").exists()

    tail = arrays["tail"].copy()
    tail[-3] ^= 1
    refused("is damaged: its checksum is wrong", tail=tail)
    refused("was written with another model", checksum=np.uint32(1))
    refused("heads is missing or of another type", heads=arrays["heads"].astype(float))
    heads = arrays["heads"][:9]
    checksum = np.uint32(vdm_compress.checksum_of(heads, arrays["tail"]))
    refused("9 lanes, not 16: it belongs to another", heads=heads, stack_checksum=checksum)
    checksum = np.uint32(vdm_compress.checksum_of(arrays["heads"], tail[:3]))
    refused(
        "the stack is empty: it is damaged, or began with", tail=tail[:3], stack_checksum=checksum
    )


def test_mistakes_of_ode_and_compression_are_one_line(model, data, tmp_path, capsys):
    def refused(program, message, *flags):
        assert program.main([*map(str, flags)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1

    out = str(tmp_path / "out.png")
    ode = ["--model", model, "--data", data, "--out", out]
    refused(vdm_ode, "--count 1 is not at least 2", *ode, "--count", 1)
    refused(vdm_ode, "--steps 0 is not at least 1", *ode, "--steps", 0)
    refused(vdm_ode, "has fewer than --count 64 pictures", *ode)
    refused(vdm_ode, "has no model.json", *ode, "--model", tmp_path)
    (tmp_path / "model.json").write_text('{"model": "vit", "config": {}}')
    refused(vdm_ode, "this is a model of vit, not of vdm", *ode, "--model", tmp_path)
    refused(vdm_ode, "--seed -1 is not in 0 to", *ode, "--seed", -1)
    refused(vdm_ode, "out.svg is not a .png", *ode, "--out", tmp_path / "out.svg")
    compress = ["--model", model, "--data", data, "--out", out]
    refused(vdm_compress, "--count 99 is not from 1 to 40", *compress, "--count", 99)
    refused(vdm_compress, "--steps 0 is not at least 1", *compress, "--steps", 0)
    refused(vdm_compress, "--seed -1 is not in 0 to", *compress, "--seed", -1)
    refused(vdm_compress, "its folder cannot be written to", *compress, "--out", "no/where.npz")
