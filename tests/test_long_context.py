"""examples/long_context.py: the zigzag ring and the cache against memeff_attention.py."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import memeff_attention as memeff
from common import ROOT, close, count, matmul_flops

sys.path.insert(0, str(ROOT / "examples"))
import long_context  # noqa: E402


def normal(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), "float32") for shape in shapes]


# ==== Zigzag ======================================================================================


def mesh_of(n):
    return jax.make_mesh((n,), ("seq",), axis_types=(AxisType.Auto,))


def zigzag(n, length, **options):
    """zigzag_attention on n devices, of whole arrays in their usual order."""
    local = functools.partial(long_context.zigzag_attention, seq_axis="seq", **options)
    return long_context.on_mesh(mesh_of(n), local, long_context.zigzag_order(length, n))


def test_zigzag_order_by_hand():
    order = long_context.zigzag_order(12, 3)
    assert order.tolist() == [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]


@pytest.mark.parametrize("n", [2, 8])
@pytest.mark.parametrize("few", [0, 2**16])
def test_zigzag_gives_the_values_and_gradients_of_one_device(n, few, monkeypatch):
    """With heads that share keys; head by head, and all heads at once."""
    monkeypatch.setattr(memeff, "FEW", few)
    *qkv, dout = normal((2, 48, 4, 8), (2, 48, 2, 8), (2, 48, 2, 6), (2, 48, 4, 6))
    ring = zigzag(n, 48, scale=0.3, q_chunk=4, kv_chunk=4)
    definition = functools.partial(memeff.attention_by_definition, causal=True, scale=0.3)

    def both(function):
        return jax.jit(lambda *qkv: (function(*qkv), jax.vjp(function, *qkv)[1](dout)))(*qkv)

    got, want = both(ring), both(definition)
    close(got[0], want[0], 1e-6)
    largest = max(float(jnp.abs(grad).max()) for grad in want[1])
    for a, b in zip(got[1], want[1]):
        close(a, b, 1e-6, largest)


def flops_of_branches(jaxpr):
    """FLOPs of the products in each branch of the first cond in a jaxpr."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "cond":
            return [count(branch.jaxpr, matmul_flops) for branch in eqn.params["branches"]]
        for value in jax.tree.leaves(tuple(eqn.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns") and (found := flops_of_branches(inner)):
                return found
    return None


def test_zigzag_gives_all_devices_the_same_work():
    """An earlier and a later block cost half of a block each; in order, a whole one and nothing."""
    x = jax.ShapeDtypeStruct((1, 512, 1, 64), "float32")
    chunks = {"q_chunk": 16, "kv_chunk": 16}
    whole = count(jax.make_jaxpr(functools.partial(memeff.attention, **chunks))(
        *[jax.ShapeDtypeStruct((1, 128, 1, 64), "float32")] * 3
    ).jaxpr, matmul_flops)  # fmt: skip
    local = functools.partial(memeff.ring_attention, seq_axis="seq", causal=True, **chunks)
    in_order = long_context.on_mesh(mesh_of(4), local, np.arange(512))
    for function, earlier, later in (
        (zigzag(4, 512, **chunks), whole / 2, whole / 2),
        (in_order, whole, 0),
    ):
        branches = flops_of_branches(jax.make_jaxpr(function)(x, x, x).jaxpr)
        assert branches[1:] == [earlier, later]


@pytest.mark.parametrize("n", [2, 8])
def test_zigzag_moves_as_much_as_the_ring_in_order(n):
    x = jax.ShapeDtypeStruct((1, 64, 1, 8), "float32")
    forward = jax.make_jaxpr(zigzag(n, 64))(x, x, x)
    gradient = jax.make_jaxpr(memeff.gradient_of(zigzag(n, 64)))(x, x, x)
    assert long_context.ppermutes(forward.jaxpr) == 2 * n
    assert long_context.ppermutes(gradient.jaxpr) == 6 * n


@pytest.mark.parametrize(("length", "devices"), [(10, 4), (0, 4), (8, 0)])
def test_zigzag_order_refuses(length, devices):
    with pytest.raises(ValueError, match=f"length {length} is not a positive multiple of 2 x"):
        long_context.zigzag_order(length, devices)


def test_zigzag_attention_refuses():
    def run(T, S):
        local = functools.partial(long_context.zigzag_attention, seq_axis="seq")
        specs = {"in_specs": P(None, "seq"), "out_specs": P(None, "seq")}
        q, k = normal((1, 2 * T, 1, 4), (1, 2 * S, 1, 4))
        return jax.shard_map(local, mesh=mesh_of(2), **specs)(q, k, k)

    with pytest.raises(ValueError, match="3 tokens on a device are not an even number"):
        run(3, 3)
    with pytest.raises(ValueError, match="2 queries and 4 keys on a device"):
        run(2, 4)


# ==== Cache =======================================================================================


def test_decoding_equals_causal_attention_with_rows_of_any_length():
    q, k, v = normal((2, 7, 4, 4), (2, 7, 2, 4), (2, 7, 2, 4))
    prompt = np.array([3, 1])  # the tokens that each row begins with
    cache = long_context.init_cache(2, 8, 2, 4)
    for b, n in enumerate(prompt):
        cache["k"] = cache["k"].at[b, :n].set(k[b, :n])
        cache["v"] = cache["v"].at[b, :n].set(v[b, :n])
    cache["length"] = jnp.asarray(prompt)
    step = jax.jit(functools.partial(long_context.decode_step, scale=2.0))
    want = memeff.attention_by_definition(q, k, v, causal=True, scale=2.0)

    def token(x, i):
        return jnp.stack([x[b, prompt[b] + i] for b in range(2)])[:, None]

    for i in range(4):
        cache, out = step(cache, token(q, i), token(k, i), token(v, i))
        close(out, token(want, i), 1e-5)
    assert cache["length"].tolist() == [7, 5] and not cache["overflow"].any()


def test_a_full_cache_is_refused_or_flagged_and_left_as_it_is():
    cache = long_context.init_cache(2, 3, 1, 4)
    cache["length"] = jnp.array([3, 2])
    token = jnp.ones((2, 1, 1, 4))
    with pytest.raises(ValueError, match=r"rows \[0\] of the cache are full, at 3 tokens"):
        long_context.decode_step(cache, token, token, token)
    after, _ = jax.jit(long_context.decode_step)(cache, token, token, token)
    assert after["overflow"].tolist() == [True, False]
    assert after["length"].tolist() == [3, 3]
    assert not after["k"][0].any()
    assert after["k"][1, 2].all() and not after["k"][1, :2].any()
    after["length"] = jnp.array([0, 0])  # emptied rows: the flag of what was lost stays
    again, _ = jax.jit(long_context.decode_step)(after, token, token, token)
    assert again["overflow"].tolist() == [True, False]


def test_init_cache_takes_sizes_and_a_dtype():
    cache = long_context.init_cache(2, 3, 4, 5, value_size=6, dtype=jnp.bfloat16)
    assert cache["k"].shape == (2, 3, 4, 5) and cache["v"].shape == (2, 3, 4, 6)
    assert cache["k"].dtype == cache["v"].dtype == jnp.bfloat16


def test_a_window_over_the_cache():
    q, k, v = normal(*[(1, 6, 2, 4)] * 3)
    cache = long_context.init_cache(1, 6, 2, 4)
    want = memeff.attention_by_definition(q, k, v, causal=True, window=2)
    step = jax.jit(functools.partial(long_context.decode_step, window=2))
    for i in range(6):
        cache, out = step(cache, *(x[:, i : i + 1] for x in (q, k, v)))
        close(out[:, 0], want[:, i], 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"k": (1, 1, 4, 8)},
            "k is float32 (1, 1, 4, 8), but the cache takes float32 (1, 1, 2, 8)",
        ),
        ({"q": (1, 2, 4, 8)}, "q is float32 (1, 2, 4, 8), but the cache takes"),
        ({"v": (2, 1, 2, 8)}, "v is float32 (2, 1, 2, 8), but the cache takes"),
        ({"dtype": "float16"}, "q is float16 (1, 1, 4, 8), but the cache takes float32"),
        ({"window": 0}, "window=0 is not at least 1"),
    ],
)
def test_decode_step_refuses(change, message):
    shapes = {"q": (1, 1, 4, 8), "k": (1, 1, 2, 8), "v": (1, 1, 2, 8)} | change
    dtype = change.get("dtype", "float32")
    q, k, v = (jnp.ones(shapes[name], dtype) for name in "qkv")
    cache = long_context.init_cache(1, 4, 2, 8)
    with pytest.raises(ValueError) as error:
        long_context.decode_step(cache, q, k, v, window=change.get("window"))
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["batch", "length", "kv_heads", "head_size", "value_size"])
def test_init_cache_refuses(name):
    sizes = {"batch": 1, "length": 1, "kv_heads": 1, "head_size": 1} | {name: 0}
    with pytest.raises(ValueError, match=f"{name}=0 is not at least 1"):
        long_context.init_cache(**sizes)


# ==== Program =====================================================================================


def test_program_compares_the_rings(capsys):
    assert long_context.main(["--devices", "2", "--length", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("2 devices, in order: ") and "12 ppermutes" in lines[1]
    assert lines[2].startswith("2 devices, zigzag: ") and "12 ppermutes" in lines[2]
    assert lines[3].startswith("cache: 64 tokens one by one")


def test_program_runs_alone(capsys):
    assert long_context.main(["--alone", "20000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("20,000 tokens, ") and len(lines) == 4
    assert lines[-1].startswith("20,000 of 20,000 queries, 0 s left, error ")


@pytest.mark.parametrize("wrong", ["compare", "decode"])
def test_program_fails_if_one_of_its_parts_is_wrong(wrong, monkeypatch):
    for name in ("compare", "decode"):
        monkeypatch.setattr(long_context, name, lambda *args, name=name: float(name == wrong))
    assert long_context.main(["--devices", "2", "--length", "64"]) == 1


def test_program_sees_a_wrong_query(monkeypatch):
    right = memeff.attention
    monkeypatch.setattr(memeff, "attention", lambda *args: right(*args) + 1e-3)
    assert long_context.run_alone(64, rows=32) > 5e-4


@pytest.mark.parametrize("error", [np.nan, 2e-5])
def test_program_fails_on_an_error(error, monkeypatch):
    monkeypatch.setattr(long_context, "run_alone", lambda length: error)
    assert long_context.main(["--alone", "100"]) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--length", "30"], "length 30 is not a positive multiple of 2 x 8 devices"),
        (["--devices", "64", "--length", "128"], "--devices 64: there are 8"),
        (["--alone", "0"], "--alone 0 is not at least 1"),
    ],
)
def test_program_refuses_in_one_line(flags, message, capsys):
    jax.devices()  # in use, as in a notebook
    assert long_context.main(flags) == 2
    assert capsys.readouterr().err == f"long_context.py: {message}\n"
