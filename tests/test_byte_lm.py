"""examples/byte_lm.py: the model, its sharding, its cache, and the program as a user runs it."""

import dataclasses
import functools
import gzip
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from common import ROOT, close, close_gradients
from vit import named_leaves

sys.path.insert(0, str(ROOT / "examples"))
import byte_lm  # noqa: E402

SMALL = byte_lm.Config(width=16, depth=2, heads=2, mlp=32)


@pytest.fixture(scope="module")
def params():
    """Weights as init_params makes them, but drawn by numpy: nothing to compile."""
    shapes = jax.eval_shape(functools.partial(byte_lm.init_params, config=SMALL), jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(path, x):
        if "norm" in jax.tree_util.keystr(path):
            return jnp.ones(x.shape)
        return jnp.asarray(rng.normal(size=x.shape, scale=0.25), "float32")

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.gz"
    path.write_bytes(gzip.compress(b"the quick brown fox jumps over the lazy dog. " * 40))
    return str(path)


def tokens_of(batch, length):
    return np.random.default_rng(0).integers(0, 256, (batch, length + 1)).astype(np.int32)


# ==== Model =======================================================================================


def test_the_model_sees_no_later_byte(params):
    tokens = tokens_of(1, 19)
    change = tokens.copy()
    change[0, 12] += 1
    run = jax.jit(lambda tokens: byte_lm.forward(params, tokens % 256, SMALL))
    same = np.asarray(run(tokens) == run(change)).all((0, 2))
    assert same[:12].all() and not same[12:].any()


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(i, j):
        return (byte_lm.rotary(q, jnp.array([i])) * byte_lm.rotary(k, jnp.array([j]))).sum()

    close(score(7, 3), score(104, 100), 1e-5)
    assert abs(score(7, 3) - score(7, 4)) > 0.01


def test_forward_by_hand(params):
    """In float64: both embeddings, rotary positions of q and k, attention, two residuals."""
    weights = jax.tree.map(np.float64, params)
    tokens = tokens_of(2, 9)[:, :-1]

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale

    def turn(x):  # channels c and c + K/2 as one complex number
        half = x.shape[3] // 2
        angle = np.arange(x.shape[1])[:, None, None] * 10_000.0 ** -(np.arange(half) / half)
        z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
        return np.concatenate([z.real, z.imag], -1)

    before = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    x = weights["embed"][tokens] + weights["before"][before]
    for i in range(SMALL.depth):
        layer = {name: leaf[i] for name, leaf in weights["blocks"].items()}
        q, k, v = np.einsum("btd,dchk->cbthk", norm(x, layer["norm1"]), layer["qkv"])
        scores = np.einsum("bthk,bshk->bhts", turn(q), turn(k)) * q.shape[3] ** -0.5
        terms = np.tril(np.exp(scores))
        y = np.einsum("bhts,bshv->bthv", terms / terms.sum(-1, keepdims=True), v)
        x = x + np.einsum("bthk,hkd->btd", y, layer["out"])
        hidden = np.float64(jax.nn.gelu(norm(x, layer["norm2"]) @ layer["mlp1"]))
        x = x + hidden @ layer["mlp2"]
    want = norm(x, weights["norm"]) @ weights["head"]
    close(byte_lm.forward(params, tokens, SMALL), want, 1e-5)


def test_memeff_is_its_definition(params):
    tokens = tokens_of(2, 24)
    config = dataclasses.replace(SMALL, attention="reference")
    want = jax.jit(lambda tokens: byte_lm.forward(params, tokens, config))(tokens)
    close(jax.jit(lambda tokens: byte_lm.forward(params, tokens, SMALL))(tokens), want, 1e-5)


@pytest.mark.parametrize(("devices", "attention"), [(2, "memeff"), (8, "performer")])
def test_meshes_give_the_loss_and_gradients_of_one_device(devices, attention, params):
    tokens = tokens_of(8, 24)
    tokens[1, 7:] = -1  # the end of a text: the mean is over bytes, not over windows
    mesh = byte_lm.make_mesh(devices)
    config = dataclasses.replace(SMALL, attention=attention)
    sharded = jax.jit(jax.value_and_grad(byte_lm.global_loss(config, mesh)))
    plain = jax.jit(jax.value_and_grad(lambda *x: byte_lm.loss_fn(*x, config)))
    (loss, grads), (want, want_grads) = sharded(params, tokens), plain(params, tokens)
    close(loss, want, 1e-5)
    close_gradients(named_leaves(grads), named_leaves(want_grads), 1e-5)


def test_bits_are_counted_over_the_bytes_that_are_there(params):
    tokens = tokens_of(2, 24)
    tokens[1, 7:] = -1
    logits = byte_lm.forward(params, tokens[:, :-1].clip(0), SMALL)
    bits = -np.asarray(jax.nn.log_softmax(logits), np.float64) / np.log(2)
    counted = [bits[b, t, tokens[b, t + 1]] for b, n in ((0, 24), (1, 6)) for t in range(n)]
    close(byte_lm.loss_fn(params, tokens, SMALL), np.mean(counted), 1e-5)


def test_a_step_compiles_once_and_learns(params):
    mesh = byte_lm.make_mesh(2)
    optimizer = optax.adam(1e-2)
    params = jax.tree.map(np.asarray, params)  # the step donates what is put on the mesh
    state = jax.device_put((params, optimizer.init(params)), NamedSharding(mesh, P()))
    step = byte_lm.make_train_step(SMALL, optimizer, mesh)
    tokens = jax.device_put(tokens_of(2, 16), NamedSharding(mesh, P("data")))
    losses = []
    for _ in range(8):
        *state, bits = step(*state, tokens)
        losses.append(float(bits))
    assert step._cache_size() == 1
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("attention", ["memeff", "performer"])
def test_reading_byte_by_byte_gives_the_logits_of_the_whole(attention, params):
    config = dataclasses.replace(SMALL, attention=attention)
    tokens = tokens_of(1, 9)[:, :-1]
    want = byte_lm.forward(params, tokens, config)[0]
    state = byte_lm.init_state(config, 9)
    read = jax.jit(functools.partial(byte_lm.read_byte, config=config))
    sizes = [x.size for x in jax.tree.leaves(state)]
    for byte, logits in zip(tokens[0], want):
        state, got = read(params, state, jnp.int32(byte))
        close(got, logits, 2e-5)
    assert [x.size for x in jax.tree.leaves(state)] == sizes


def test_generate_writes_the_likeliest_bytes_at_a_low_temperature(params):
    prompt = np.frombuffer(b"Call me", np.uint8)
    new = byte_lm.generate(params, SMALL, prompt, 5, jax.random.key(0), 1e-6)
    written = np.append(prompt, new)[None].astype(np.int32)
    logits = byte_lm.forward(params, written, SMALL)[0]
    assert (new == logits.argmax(-1)[len(prompt) - 1 : -1]).all()


def test_bytes_are_drawn_anew_and_temperature_divides_the_logits(params):
    prompt = np.frombuffer(b"Call me", np.uint8)
    key = jax.random.key(0)
    flat = params | {"head": 0 * params["head"]}
    assert len(set(byte_lm.generate(flat, SMALL, prompt, 20, key, 1.0).tolist())) > 10
    hot = params | {"head": 4 * params["head"]}
    same = byte_lm.generate(hot, SMALL, prompt, 20, key, 4.0)
    assert (same == byte_lm.generate(params, SMALL, prompt, 20, key, 1.0)).all()


def test_windows_begin_anywhere():
    rng = np.random.default_rng(0)
    windows = byte_lm.window(np.arange(7, dtype=np.uint8), rng, 200, 4)
    assert {int(row[0]) for row in windows} == {0, 1, 2}
    assert (np.diff(windows) == 1).all()


def test_every_held_out_byte_counts_once():
    """A loss that is known for each byte: the byte before it."""
    held = np.random.default_rng(0).integers(0, 200, 101).astype(np.uint8)

    def loss(params, tokens):
        tokens = np.asarray(tokens)
        assert tokens.shape == (batch, context + 1)
        return tokens[:, :-1][tokens[:, 1:] >= 0].mean()

    mesh = byte_lm.make_mesh(1)
    for batch, context in ((1, 7), (3, 16), (2, 100), (4, 300)):
        got = byte_lm.evaluate(loss, None, held, batch, context, mesh)
        assert got == pytest.approx(held[:-1].mean())


# ==== Program =====================================================================================

TINY = ["--steps", "3", "--context", "32", "--width", "16", "--depth", "1", "--generate", "4"]


def test_program_trains_saves_and_continues(text, tmp_path, capsys):
    out = str(tmp_path / "model.npz")
    flags = [*TINY, "--data", text, "--batch", "2", "--devices", "2"]
    assert byte_lm.main([*flags, "--out", out]) == 0
    trained = capsys.readouterr().out.splitlines()
    assert trained[0].startswith("step 3/3  ")
    assert re.fullmatch(r"held-out bits per byte: \d\.\d{3}, of 89 bytes, memeff", trained[1])
    assert trained[2] == f"wrote {out}" and trained[3].startswith("Call me ")
    assert byte_lm.main([*flags, "--checkpoint", out]) == 0
    assert capsys.readouterr().out.splitlines() == [trained[1], *trained[3:]]


def record_steps(monkeypatch, text, *flags):
    """Runs the program with steps that change nothing: (optimizer, weights, tokens) of each."""
    seen = []

    def make(config, optimizer, mesh):
        def step(params, opt_state, tokens):
            seen.append((optimizer, jax.tree.map(np.asarray, params), np.asarray(tokens)))
            return params, opt_state, 8.0

        return step

    monkeypatch.setattr(byte_lm, "make_train_step", make)
    assert byte_lm.main([*TINY, "--data", text, "--generate", "0", "--prompt", "", *flags]) == 0
    return seen


def test_each_step_has_its_window_each_seed_its_weights_and_gradients_are_clipped(
    monkeypatch, text
):
    first = record_steps(monkeypatch, text)
    second = record_steps(monkeypatch, text, "--seed", "1")
    assert len({tokens.tobytes() for _, _, tokens in first + second}) == 6
    optimizer, params, _ = first[0]
    assert (params["embed"] != second[0][1]["embed"]).any()

    def third_update(size):
        weights = {"norm": params["norm"]}
        state = optimizer.init(weights)
        for scale in (1e-4, 1e-4, size):
            grads = {"norm": np.full_like(params["norm"], scale)}
            updates, state = optimizer.update(grads, state, weights)
        return updates["norm"]

    close(third_update(1000.0), third_update(1.0), 1e-5)


def test_take_over_starts_from_the_weights_and_ends_with_performer(monkeypatch, text, capsys):
    seen = record_steps(monkeypatch, text, "--take-over", "1")
    assert (seen[2][1]["embed"] == seen[3][1]["embed"]).all()
    assert capsys.readouterr().out.strip().endswith(", performer")


@pytest.mark.long
def test_softmax_weights_that_are_taken_over_recover(capsys):
    """Sec. 4.3: softmax weights serve FAVOR+ after some more steps, here 120."""
    assert byte_lm.main(["--take-over", "120", "--generate", "0"]) == 0
    lines = re.findall(r"held-out bits per byte: (.*), of .*, (.*)", capsys.readouterr().out)
    assert [kind for _, kind in lines] == ["memeff", "performer", "performer"]
    before, right_after, at_the_end = (float(bits) for bits, _ in lines)
    assert right_after > before + 0.2
    assert at_the_end < right_after - 0.4 * (right_after - before)


def test_program_stops_at_a_loss_that_is_not_finite(text, tmp_path, capsys):
    out = tmp_path / "model.npz"
    flags = [*TINY, "--data", text, "--steps", "8", "--learning-rate", "1e38", "--out", str(out)]
    assert byte_lm.main(flags) == 1
    assert re.fullmatch(r"byte_lm.py: step \d: the loss is (nan|inf)\n", capsys.readouterr().err)
    assert not out.exists()


def test_program_saves_no_weights_that_are_not_finite(text, tmp_path, capsys, monkeypatch):
    def broken_step(params, opt_state, tokens):
        return params | {"norm": np.nan * params["norm"]}, opt_state, 8.0

    monkeypatch.setattr(byte_lm, "make_train_step", lambda *args: broken_step)
    out = tmp_path / "model.npz"
    assert byte_lm.main([*TINY, "--data", text, "--out", str(out)]) == 1
    assert capsys.readouterr().err == "byte_lm.py: after step 3 weights are not finite\n"
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "--steps 0 is not at least 1"),
        (["--context", "0"], "--context 0 is not at least 1"),
        (["--generate", "-1"], "--generate -1 is negative"),
        (["--take-over", "-1"], "--take-over -1 is negative"),
        (["--take-over", "1", "--attention", "performer"], "--take-over starts from --attention"),
        (["--seed", "-1"], "--seed -1 is not in 0 to 4294967295"),
        (["--learning-rate", "nan"], "--learning-rate nan is not a positive number"),
        (["--temperature", "0"], "--temperature 0.0 is not a positive number"),
        (["--devices", "64"], "--devices 64: there are 8"),
        (["--devices", "0"], "--devices 0 is not at least 1"),
        (["--devices", "2"], "--batch 1 is not a multiple of --devices 2"),
        (["--context", "9999"], "1710 bytes are too few for --context 9999"),
        (["--data", "nothing.gz"], "--data nothing.gz is not a readable text"),
        (["--prompt", ""], "--prompt is empty"),
        (["--out", "x.txt"], "--out x.txt is not an .npz"),
        (["--out", "nowhere/x.npz"], "--out nowhere/x.npz: there is no such folder"),
        (["--width", "6"], "width=6 is not a multiple of 2 x heads=2"),
        (["--depth", "0"], "depth=0 is not at least 1"),
        (["--heads", "0"], "heads=0 is not at least 1"),
        (["--seed", "4294967296"], "--seed 4294967296 is not in 0 to"),
        (["--learning-rate", "inf"], "--learning-rate inf is not a positive number"),
        (["--temperature", "inf"], "--temperature inf is not a positive number"),
        (["--checkpoint", "nothing.npz"], "nothing.npz does not exist"),
    ],
)
def test_program_refuses_in_one_line(flags, message, text, capsys):
    jax.devices()  # in use, as in a notebook
    assert byte_lm.main(["--data", text, "--context", "32", *flags]) == 2
    out, error = capsys.readouterr()
    assert error.startswith("byte_lm.py: ") and message in error and error.count("\n") == 1
    assert not out


@pytest.mark.parametrize(("count", "context"), [(30, 8), (40, 37)])
def test_a_text_that_is_too_short_is_refused(count, context, tmp_path, capsys):
    """Of 30 bytes one is held out, and none can be measured; 38 leave one window of 37 and 1."""
    path = tmp_path / "short.txt"
    path.write_bytes(b"x" * count)
    assert byte_lm.main([*TINY, "--data", str(path), "--context", str(context)]) == 2
    assert "bytes are too few for --context" in capsys.readouterr().err


def test_a_truncated_archive_is_refused(text, tmp_path):
    path = tmp_path / "half.gz"
    path.write_bytes(pathlib.Path(text).read_bytes()[:40])
    with pytest.raises(ValueError, match="is not a readable text"):
        byte_lm.load_text(path)


def test_weights_of_another_config_are_refused(params, tmp_path):
    path = tmp_path / "model.npz"
    np.savez(path, **named_leaves(params))
    with pytest.raises(ValueError, match=r"blocks/mlp1 has shape \(2, 16, 32\), not \(1, 16, 32\)"):
        byte_lm.load_params(path, byte_lm.Config(16, 1, 2, 32))
