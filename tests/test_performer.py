"""performer.py against the official code, the quadratic form, and what the paper claims."""

import functools
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import common
import performer
from common import ROOT, close, count, matmul_flops
from performer import Features, favor_attention

golden = functools.partial(common.golden, "performer")
GOLDENS = [path.stem for path in sorted((ROOT / "tests/golden/performer").glob("*.npz"))]


def normal(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), "float32") for shape in shapes]


# ==== Golden: the official formulas, composed from the file's parts ===============================


def official_positive(x, projection, is_query, epsilon):
    """x [B,H,T,K]. The maximum is of w.x, over all positions for keys; epsilon is added to exp."""
    features = performer.positive_features(x, projection)
    axes = -1 if is_query else (-1, -2)
    highest = (x @ projection.T).max(axes, keepdims=True)
    phi = features.values * jnp.exp(features.log_scale - highest)
    return phi + epsilon * len(projection) ** -0.5


def official_trigonometric(x, projection):
    """Scaled by the largest exp(|x|^2 / 2) of all positions."""
    features = performer.trigonometric_features(x, projection)
    highest = performer.half_square(x).max(-2, keepdims=True)
    return features.values * jnp.exp(features.log_scale - highest)


def official_features(x, projection, config, is_query):
    """x [B,T,H,K] -> [B,T,H,M]."""
    x = x.swapaxes(1, 2)
    if config["kind"] == "generalized":
        phi = performer.relu_features(x, projection).values
        assert config["kernel_fn"] == "relu" and config["kernel_epsilon"] == 1e-3
    else:
        x = x * x.shape[-1] ** -0.25
        if config["nonnegative_features"]:
            epsilon = config["numerical_stabilizer"]
            phi = official_positive(x, projection, is_query, epsilon)
        else:
            phi = official_trigonometric(x, projection)
    return phi.swapaxes(1, 2)


def as_they_are(x, projection):
    """Features that are given, not computed."""
    return Features(x, jnp.zeros_like(x[..., :1]))


def official_attention(q, k, v, projection, config):
    """FAVOR+ on official features, with the official rule for small denominators."""
    q = official_features(q, projection, config, is_query=True)
    k = official_features(k, projection, config, is_query=False)
    causal = config["unidirectional"]
    out = favor_attention(q, k, v, None, kind=as_they_are, causal=causal, chunk=5)
    matrix = jnp.einsum("bthm,bshm->bhts", q, k)
    if causal:
        matrix = jnp.tril(matrix)
    denominator = matrix.sum(-1).swapaxes(1, 2)[..., None]  # [B,T,H,1]
    if not config["renormalize_attention"]:
        return out * denominator
    small = config["numerical_stabilizer"]
    altered = denominator + 2 * small * (jnp.abs(denominator) <= small)
    return out * (denominator / altered)


@pytest.mark.parametrize("name", [name for name in GOLDENS if name.startswith("attn")])
def test_golden_attention_and_its_gradients(name):
    meta, arrays = golden(name)
    inputs = [arrays[f"in/{x}"] for x in "qkv"]
    shape = inputs[0].shape
    if len(shape) == 5:  # two axes of positions are one for us
        inputs = [x.reshape(x.shape[0], -1, *x.shape[3:]) for x in inputs]
    cotangent = arrays["in/cotangent"].reshape(*inputs[0].shape[:3], -1)
    projection = arrays.get("in/projection")

    def loss(q, k, v):
        out = official_attention(q, k, v, projection, meta["config"])
        return (out * cotangent).sum(), out

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (_, out), grads = run(*map(jnp.asarray, inputs))
    close(out, arrays["out/attn"].reshape(out.shape), 1e-5)
    wanted = [arrays[f"grad/{x}"].reshape(grad.shape) for x, grad in zip("qkv", grads)]
    largest = max(np.abs(x).max() for x in wanted)
    for grad, want in zip(grads, wanted):
        close(grad, want, 2e-5, largest)


FUNCTIONS = {
    "relu": jax.nn.relu,
    "exp": jnp.exp,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "requ": lambda x: jnp.square(jax.nn.relu(x)),
    "shiftedelu": lambda x: jax.nn.elu(x) + 1,
}


def features_by_tag(tag, x, projection):
    """What the official feature functions give; tag: as in the golden."""
    kind, *rest = tag.split("_")
    if "norm" in (kind, *rest):
        x = x * x.shape[-1] ** -0.25
    if kind in FUNCTIONS:
        given = projection if rest[0] == "proj" else None
        return performer.generalized_features(x, given, FUNCTIONS[kind]).values
    if kind in ("query", "key"):
        epsilon = float(rest[1].removeprefix("eps"))
        return official_positive(x, projection, kind == "query", epsilon)
    return official_trigonometric(x, projection)


@pytest.mark.parametrize("name", ["features_positive", "features_sincos", "features_generalized"])
def test_golden_features_and_their_gradients(name):
    _, arrays = golden(name)
    x = jnp.asarray(arrays["in/x"]).swapaxes(1, 2)
    tags = [key.removeprefix("out/") for key in arrays if key.startswith("out/")]
    assert len(tags) >= 2

    @jax.jit
    def run(x):
        def weighted(x, tag):
            out = features_by_tag(tag, x, jnp.asarray(arrays["in/projection"]))
            weights = jnp.cos(0.7 * jnp.arange(out.size)).reshape(out.shape)
            return (out * weights).sum(), out

        return {tag: jax.value_and_grad(weighted, has_aux=True)(x, tag) for tag in tags}

    for tag, ((_, out), grad) in run(x).items():
        close(out, arrays[f"out/{tag}"], 1e-5)
        close(grad, arrays[f"grad/{tag}"], 2e-5)


def test_golden_projections():
    """The official draw, to the bit; the independent one too."""
    _, arrays = golden("orthogonal_matrices")
    seen = 0
    for name, want in arrays.items():
        match = re.fullmatch(r"out/(ortho|iid)_seed(\d+)_(\d+)x(\d+)(?:_scaling(\d))?", name)
        if match:
            kind, seed, features, dim, scaling = match.groups()
            sizes = jax.random.key(int(seed)), int(features), int(dim)
            if kind == "iid":
                got = performer.gaussian_projection(*sizes)
            else:
                got = performer.orthogonal_projection(*sizes, scaling=int(scaling), official=True)
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
            seen += 1
    assert seen == 24


@pytest.mark.parametrize("causal", [False, True])
def test_golden_official_defaults(causal):
    """Features, attention and projection together, as make_fast_softmax_attention sets them."""
    name = "causal" if causal else "noncausal"
    _, arrays = golden(f"e2e_default_factory_{name}")
    config = {
        "kind": "softmax",
        "nonnegative_features": True,
        "numerical_stabilizer": 1e-6,
        "renormalize_attention": True,
        "unidirectional": causal,
    }
    q, k, v, projection = (
        jnp.asarray(arrays[x]) for x in ("in/q", "in/k", "in/v", "out/projection")
    )
    close(official_attention(q, k, v, projection, config), arrays["out/attn"], 1e-5)
    exact = performer.softmax_attention(q, k, v, causal=causal)
    close(exact, arrays["out/exact_softmax_reference"], 1e-5)


def test_the_official_code_leaks_the_future_and_ours_does_not():
    _, arrays = golden("BUG_causal_future_leak")
    official = arrays["out/attn"], arrays["out/attn_with_last_key_replaced"]
    assert np.abs(official[0] - official[1])[:, :-1].max() > 0.3
    q, k, v, projection = (jnp.asarray(arrays[f"in/{x}"]) for x in ("q", "k", "v", "projection"))
    other = k.at[:, -1].set(arrays["in/k_last_replacement"])
    run = functools.partial(favor_attention, projection=projection, causal=True)
    before, after = run(q, k, v), run(q, other, v)
    np.testing.assert_array_equal(before[:, :-1], after[:, :-1])
    assert np.abs(before - after)[:, -1].max() > 0.01


# ==== Equations, worked by hand ===================================================================

SMALL = performer.orthogonal_projection(jax.random.key(0), 32, 8)
KINDS = ["positive", "hyperbolic", "trigonometric", "relu"]
LONG = pytest.mark.long


def by_hand(q, k, v, projection, kind="positive", causal=False, mask=None):
    """The quadratic form, in float64: A = phi(q) phi(k)^T, normalised."""
    phi = []
    for x in (q, k):
        f = performer.features_of(performer.heads_first(x), projection, kind)
        phi.append(np.float64(f.values) * np.exp(np.float64(f.log_scale)))
    matrix = np.einsum("bhtm,bhsm->bhts", *phi)
    if causal:
        matrix = np.tril(matrix)
    if mask is not None:
        matrix = matrix * np.asarray(mask)[:, None, None, :]
    total = matrix.sum(-1, keepdims=True)
    matrix = np.divide(matrix, total, out=np.zeros_like(matrix), where=total != 0)
    return np.einsum("bhts,bshv->bthv", matrix, np.float64(v)), matrix


def test_features_by_hand():
    """One feature, w = (1, 0), x = (2, 1): exp(2 - 5/2), and its siblings."""
    x = jnp.array([[2.0, 1.0]])
    w = jnp.array([[1.0, 0.0]])

    def phi(function):
        features = function(x, w)
        return np.asarray(features.values * jnp.exp(features.log_scale))[0]

    np.testing.assert_allclose(phi(performer.positive_features), [np.exp(-0.5)], rtol=1e-6)
    hyperbolic = np.array([np.exp(-0.5), np.exp(-4.5)]) / np.sqrt(2)
    np.testing.assert_allclose(phi(performer.hyperbolic_features), hyperbolic, rtol=1e-6)
    waves = np.array([np.cos(2), np.sin(2)]) * np.exp(2.5)
    np.testing.assert_allclose(phi(performer.trigonometric_features), waves, rtol=1e-6)
    np.testing.assert_allclose(phi(performer.relu_features), [2.001], rtol=1e-6)


@pytest.mark.parametrize(
    "kind",
    ["positive", "trigonometric", *[pytest.param(k, marks=LONG) for k in ("hyperbolic", "relu")]],
)
def test_attention_is_the_quadratic_form(kind):
    """Cross attention with a mask; a row of the batch in which no key is left gives zeros."""
    q, k, v = normal((3, 7, 2, 8), (3, 11, 2, 8), (3, 11, 2, 5))
    mask = np.random.default_rng(0).random((3, 11)) < 0.6
    mask[2] = False
    run = functools.partial(favor_attention, projection=SMALL, kind=kind)
    want, matrix = by_hand(q, k, v, SMALL, kind, mask=mask)
    got = jax.jit(functools.partial(run, chunk=4))(q, k, v, mask=jnp.asarray(mask))
    close(got, want, 3e-5)  # trigonometric sums cancel
    assert not got[2].any()
    options = {"kind": kind, "mask": jnp.asarray(mask)}
    close(jax.jit(lambda: performer.attention_matrix(q, k, SMALL, **options))(), matrix, 3e-5)
    gradient = jax.grad(lambda *x: run(*x, mask=jnp.asarray(mask)).sum(), (0, 1, 2))
    grads = jax.jit(gradient)(q, k, v)
    assert all(bool(jnp.isfinite(grad).all()) for grad in grads)
    assert not any(grad[2].any() for grad in grads)


@pytest.mark.parametrize("kind", ["positive", "trigonometric"])
def test_a_masked_key_is_as_if_it_were_not_there(kind):
    """Whatever stands there, long keys or NaN."""
    q, k, v = normal((1, 6, 2, 8), (1, 9, 2, 8), (1, 9, 2, 4))
    mask = jnp.arange(9)[None] < 7
    padded_k = k.at[:, 7].set(50.0).at[:, 8].set(jnp.nan)
    padded_v = v.at[:, 8].set(jnp.nan)
    for causal in (False, True):
        queries = normal((1, 9, 2, 8), seed=1)[0] if causal else q
        options = {"projection": SMALL, "kind": kind, "causal": causal, "chunk": 4}
        run = jax.jit(functools.partial(favor_attention, **options))
        padded = run(queries, padded_k, padded_v, mask=mask)
        short = run(queries[:, :7], k[:, :7], v[:, :7])
        close(padded[:, : short.shape[1]], short, 1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_a_query_or_key_that_is_nan_shows_in_the_output(causal):
    """Zeros would hide it."""
    q, k, v = normal(*[(1, 12, 2, 8)] * 3)
    run = functools.partial(favor_attention, projection=SMALL, causal=causal, chunk=4)
    out = run(q.at[0, 9, 0].set(jnp.nan), k, v)
    assert jnp.isnan(out[0, 9, 0]).all() and jnp.isfinite(out[0, :, 1]).all()
    out = run(q, k.at[0, 4, 0].set(jnp.nan), v)
    assert jnp.isnan(out[0, 4:, 0]).all() and jnp.isfinite(out[0, :, 1]).all()


def test_the_projection_keeps_the_precision_of_the_tokens():
    """Float32 tokens with a projection of float64, and the other way round."""
    run = functools.partial(favor_attention, causal=True, chunk=4)
    with jax.enable_x64(True):
        for dtype, other in (("float32", "float64"), ("float64", "float32")):
            x = jax.ShapeDtypeStruct((1, 8, 2, 8), dtype)
            projection = jax.ShapeDtypeStruct((32, 8), other)
            assert jax.eval_shape(run, x, x, x, projection).dtype == dtype
    precision = [
        eqn.params["precision"]
        for eqn in jax.make_jaxpr(performer.project)(SMALL, SMALL).eqns
        if eqn.primitive.name == "dot_general"
    ]
    assert precision == [(jax.lax.Precision.HIGHEST,) * 2]


def test_a_denominator_that_is_too_small_gives_zeros():
    buffer = jnp.array([[2.0, 4.0, 2.0], [2e-31, 4e-31, 1e-31], [0.0, 0.0, 0.0]])
    out, pull = jax.vjp(performer.normalize, buffer)
    assert out.tolist() == [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]
    (grad,) = pull(jnp.ones_like(out))
    assert grad.tolist() == [[0.5, 0.5, -1.5], [0.0] * 3, [0.0] * 3]


def test_causal_where_the_first_keys_are_padding():
    """They have no scale, and the queries there see nothing."""
    q, k, v = normal(*[(1, 12, 2, 8)] * 3)
    mask = jnp.arange(12)[None] >= 6
    run = jax.jit(functools.partial(favor_attention, projection=SMALL, causal=True, chunk=4))
    out = run(q, k, v, mask=mask)
    assert not out[:, :6].any()
    close(out[:, 6:], run(*(x[:, 6:] for x in (q, k, v))), 1e-6)


def test_a_long_key_leaves_the_chunks_after_it_finite():
    """A trigonometric feature has the scale exp(|k|^2 / 2): here exp(141)."""
    q, k, v = normal(*[(1, 12, 2, 8)] * 3)
    k = k.at[:, 1].set(10.0)
    run = functools.partial(favor_attention, kind="trigonometric", causal=True, chunk=4)
    out, pull = jax.vjp(jax.jit(lambda *qkv: run(*qkv, SMALL)), q, k, v)
    assert all(bool(jnp.isfinite(x).all()) for x in (out, *pull(out)))
    close(out, by_hand(q, k, v, SMALL, "trigonometric", causal=True)[0], 1e-3)


# ==== Claims ======================================================================================


def estimates(features, make_projection, x, y, size, samples, seed=0):
    """`samples` estimates of exp(x.y), each from `size` rows."""
    make = functools.partial(make_projection, features=size, dim=len(x))

    def one(key):
        a, b = (features(z[None], make(key)) for z in (x, y))
        return (a.values * b.values).sum() * jnp.exp(a.log_scale + b.log_scale)[0, 0]

    return np.float64(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(seed), samples)))


def pair_of(norm, cosine, dim=8):
    """Two vectors of a norm, at an angle."""
    x = np.zeros(dim, np.float32)
    y = np.zeros(dim, np.float32)
    x[0] = norm
    y[0] = norm * cosine
    y[1] = norm * math.sqrt(1 - cosine**2)
    return x, y


SOFTMAX = list(performer.SOFTMAX_KERNELS.items())
PROJECTIONS = [performer.orthogonal_projection, performer.gaussian_projection]


@pytest.mark.parametrize(
    ("name", "features", "make_projection"),
    [*((*kind, PROJECTIONS[0]) for kind in SOFTMAX), (*SOFTMAX[0], PROJECTIONS[1])],
)
def test_c1_the_features_are_unbiased(name, features, make_projection):
    """Lemma 1: 2,000 projections of 16 rows, within 4 standard errors."""
    x, y = pair_of(1.0, 0.6)
    found = estimates(features, make_projection, x, y, 16, 2000)
    error = found.std() / math.sqrt(len(found))
    assert abs(found.mean() - np.exp(x @ y)) < 4 * error
    assert error < 0.05 * np.exp(x @ y)


def test_c1_the_official_blocks_are_biased():
    """The mean of 20,000 estimates of exp(0.25), q = k, each from a block of 8 rows."""
    official = functools.partial(performer.orthogonal_projection, official=True)
    x, y = pair_of(0.5, 1.0)
    ratios = []
    for make in (official, performer.orthogonal_projection):
        found = estimates(performer.positive_features, make, x, y, 8, 20_000)
        ratios.append(found.mean() / np.exp(x @ y))
    error = found.std() / math.sqrt(len(found)) / np.exp(x @ y)
    assert abs(ratios[1] - 1) < 4 * error, "ours"
    assert abs(ratios[0] - 1) > 0.03 > 4 * error, "official"


def squared_errors(x, y):
    """Lemma 2 (Eq. 8) for one row of independent projections."""
    kernel = np.exp(x @ y)
    plus = np.exp(((x + y) ** 2).sum())
    minus = np.exp(-((x - y) ** 2).sum())
    positive = plus * kernel**2 * (1 - 1 / plus)
    return {
        "trigonometric": plus / kernel**2 * (1 - minus) ** 2 / 2,
        "positive": positive,
        "hyperbolic": positive * (1 - 1 / plus) / 2,
    }


@pytest.mark.parametrize(("name", "features"), SOFTMAX)
@pytest.mark.parametrize("cosine", [-0.8, 0.3])
def test_c2_mean_squared_errors_are_those_of_lemma_2(name, features, cosine):
    x, y = pair_of(0.7, cosine)
    found = estimates(features, performer.gaussian_projection, x, y, 1, 200_000)
    got = ((found - np.exp(x @ y)) ** 2).mean()
    assert got == pytest.approx(squared_errors(x, y)[name], rel=0.1)


def test_c2_positive_features_win_where_the_kernel_is_small():
    """exp(q.k) = exp(-4): at least 100 times less squared error than trigonometric features."""
    x, y = pair_of(2.0, -1.0)
    errors = {}
    for name, features in SOFTMAX:
        found = estimates(features, performer.gaussian_projection, x, y, 64, 2000)
        errors[name] = ((found - np.exp(x @ y)) ** 2).mean()
    assert errors["trigonometric"] > 100 * errors["positive"]


@pytest.mark.parametrize("cosine", [-0.5, 0.5])
def test_c3_orthogonal_projections_have_the_smaller_error(cosine):
    """Theorem 2 of the arXiv version: smaller by at least its bound, 8 rows, 40,000 draws."""
    x, y = pair_of(0.5, cosine)
    kernel = np.exp(x @ y)
    errors = []
    for make_projection in PROJECTIONS:
        found = estimates(performer.positive_features, make_projection, x, y, 8, 40_000)
        squares = (found - kernel) ** 2
        errors.append(squares.mean())
        deviation = squares.std() / math.sqrt(len(squares))
    m, d = 8, 8
    norms = np.exp(-(x @ x + y @ y) / 2)
    bound = 2 * (m - 1) / (m * (d + 2)) * (kernel - norms) ** 2
    assert errors[0] < errors[1] - bound + 4 * deviation
    assert errors[0] < 0.95 * errors[1]


def test_c4_the_error_falls_as_one_over_the_root_of_the_features():
    q, k, v = normal((1, 64, 1, 16), (1, 64, 1, 16), (1, 64, 1, 16))
    q, k = 0.4 * q, 0.4 * k
    exact = performer.softmax_attention(q, k, v)

    def error(features):
        def one(key):
            projection = performer.gaussian_projection(key, features, 16)
            return jnp.square(favor_attention(q, k, v, projection) - exact).mean()

        return float(
            jnp.sqrt(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 16)).mean())
        )

    few, many = error(32), error(288)  # nine times as many
    assert few / many == pytest.approx(3, rel=0.2)


@pytest.mark.parametrize(
    ("causal", "gradient"),
    [(True, True), (False, False), pytest.param(True, False, marks=pytest.mark.long)],
)
def test_c5_flops_and_memory_grow_linearly(causal, gradient):
    projection = jnp.ones((64, 32))

    def cost(length):
        def run(*qkv):
            return favor_attention(*qkv, projection, causal=causal).sum()

        function = jax.grad(run, (0, 1, 2)) if gradient else run
        x = jax.ShapeDtypeStruct((1, length, 2, 32), "float32")
        memory = jax.jit(function).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes
        return count(jax.make_jaxpr(function)(x, x, x).jaxpr, matmul_flops), memory

    short, long = cost(4096), cost(8192)
    assert long[0] == 2 * short[0]
    assert long[1] <= 2.1 * short[1]


@pytest.mark.parametrize("causal", [False, True])
def test_c5_the_gradient_keeps_no_features(causal):
    """8,192 queries and keys have 67 MB of features; with states for each chunk 2.4 MB are kept."""
    projection = jnp.ones((1024, 8))

    def run(*qkv):
        return favor_attention(*qkv, projection, causal=causal).sum()

    x = jax.ShapeDtypeStruct((1, 8192, 1, 8), "float32")
    memory = jax.jit(jax.grad(run, (0, 1, 2))).lower(x, x, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 20e6


CHUNKS = [("positive", 1), ("positive", 64), *((kind, 5) for kind in KINDS)]


@pytest.mark.parametrize(("kind", "chunk"), CHUNKS)
def test_c6_causal_is_the_masked_quadratic_form(kind, chunk):
    """Values and gradients, at a length that no chunk but 1 divides."""
    q, k, v, cotangent = normal(*[(2, 23, 2, 8)] * 4)

    def loss(q, k, v):
        out = favor_attention(q, k, v, SMALL, kind=kind, causal=True, chunk=chunk)
        return (out * cotangent).sum(), out

    def quadratic(q, k, v):
        a, b = (performer.features_of(performer.heads_first(x), SMALL, kind) for x in (q, k))
        phi_q = a.values * jnp.exp(a.log_scale)
        phi_k = b.values * jnp.exp(b.log_scale)
        matrix = jnp.tril(phi_q @ phi_k.mT)
        matrix = matrix / matrix.sum(-1, keepdims=True)
        out = jnp.einsum("bhts,bshv->bthv", matrix, v)
        return (out * cotangent).sum(), out

    def run(function):
        return jax.jit(jax.value_and_grad(function, (0, 1, 2), has_aux=True))(q, k, v)

    (_, out), grads = run(loss)
    (_, want), want_grads = run(quadratic)
    tolerance = 3e-4 if kind == "trigonometric" else 2e-5  # denominators near 0
    close(out, want, tolerance)
    largest = max(float(jnp.abs(x).max()) for x in want_grads)
    for got, wanted in zip(grads, want_grads):
        close(got, wanted, tolerance, largest)


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_c6_no_output_depends_on_the_future(chunk):
    """To the last bit, also where keys are 40 times as long as those before them."""
    q, k, v = normal(*[(1, 16, 2, 8)] * 3)
    run = jax.jit(functools.partial(favor_attention, projection=SMALL, causal=True, chunk=chunk))
    before = run(q, k, v)
    for t in (0, 6, 14):
        for factor in (1.0, 40.0):
            other = [x.at[:, t + 1 :].set(-factor * x[:, t + 1 :]) for x in (q, k, v)]
            after = run(*other)
            np.testing.assert_array_equal(before[:, : t + 1], after[:, : t + 1])
            assert (before[:, t + 1 :] != after[:, t + 1 :]).any()


@pytest.mark.parametrize("kind", ["positive", "trigonometric"])
def test_c7_decoding_gives_the_same_numbers(kind):
    q, k, v = normal((2, 9, 3, 8), (2, 9, 3, 8), (2, 9, 3, 4))
    want = favor_attention(q, k, v, SMALL, kind=kind, causal=True)
    width = 32 if kind == "positive" else 64
    state = performer.init_state(2, 3, width, 4)
    step = jax.jit(functools.partial(performer.decode_step, projection=SMALL, kind=kind))
    for i in range(9):
        token = slice(i, i + 1)
        state, out = step(state, q[:, token], k[:, token], v[:, token])
        close(out, want[:, token], 1e-4)
    assert state.sums.shape == (2, 3, width, 5)


@pytest.mark.parametrize(
    ("kind", "causal"),
    [
        *[("positive", False), ("positive", True), ("trigonometric", True), ("relu", True)],
        *[pytest.param(kind, False, marks=pytest.mark.long) for kind in KINDS[1:]],
        pytest.param("hyperbolic", True, marks=pytest.mark.long),
    ],
)
def test_c8_finite_in_bfloat16_at_a_norm_of_30(kind, causal):
    q, k, v = normal(*[(2, 40, 2, 8)] * 3)
    q, k = (30 * x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    q, k, v = (x.astype("bfloat16") for x in (q, k, v))

    def loss(*qkv):
        out = favor_attention(*qkv, SMALL, kind=kind, causal=causal, chunk=16)
        return out.astype("float32").sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    assert out.dtype == jnp.bfloat16
    assert all(bool(jnp.isfinite(x).all()) for x in (out, *grads))
    assert np.abs(out).max() > 0.1


# ==== C9: the sequence cut over devices ===========================================================


def on_devices(n, **options):
    mesh = jax.make_mesh((n,), ("seq",), axis_types=(AxisType.Auto,))
    local = functools.partial(favor_attention, projection=SMALL, seq_axis="seq", **options)
    cut = P(None, "seq")
    return jax.shard_map(local, mesh=mesh, in_specs=(cut, cut, cut), out_specs=cut)


@pytest.mark.parametrize(
    ("n", "causal"),
    [
        *[(2, True), (8, True), (8, False)],
        *[pytest.param(n, n > 2, marks=pytest.mark.long) for n in (2, 4)],
    ],
)
def test_c9_devices_give_the_numbers_of_one(n, causal):
    q, k, v, cotangent = normal(*[(2, 48, 2, 8)] * 4)
    options = {"causal": causal, "chunk": 4}

    def run(function):
        def loss(*qkv):
            out = function(*qkv)
            return (out * cotangent).sum(), out

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    (_, out), grads = run(on_devices(n, **options))
    alone = functools.partial(favor_attention, projection=SMALL, **options)
    (_, want), want_grads = run(alone)
    close(out, want, 1e-5)
    largest = max(float(jnp.abs(x).max()) for x in want_grads)
    for got, wanted in zip(grads, want_grads):
        close(got, wanted, 2e-5, largest)


def test_c9_a_device_that_has_only_padding_sees_nothing():
    """The first of four: it must not take the keys of later devices for earlier ones."""
    q, k, v = normal(*[(1, 32, 2, 8)] * 3)
    mask = jnp.arange(32)[None] >= 8
    mesh = jax.make_mesh((4,), ("seq",), axis_types=(AxisType.Auto,))

    def local(q, k, v, mask):
        return favor_attention(q, k, v, SMALL, causal=True, mask=mask, chunk=4, seq_axis="seq")

    cut = P(None, "seq")
    run = jax.shard_map(local, mesh=mesh, in_specs=(cut,) * 4, out_specs=cut)
    out = jax.jit(run)(q, k, v, mask)
    assert not out[:, :8].any()
    close(out, favor_attention(q, k, v, SMALL, causal=True, mask=mask), 1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_c9_traffic_does_not_depend_on_the_length(causal):
    """One exchange of states: their log scales [2,2,1,1] and sums [2,2,32,9]."""

    def numbers_sent(length):
        x = jax.ShapeDtypeStruct((2, length, 2, 8), "float32")
        jaxpr = jax.make_jaxpr(on_devices(4, causal=causal, chunk=4))(x, x, x).jaxpr
        sent = {}

        def look(eqn):
            name = eqn.primitive.name.removesuffix("_invariant")
            if name in ("all_gather", "psum", "ppermute", "all_to_all", "pmax"):
                size = sum(v.aval.size for v in eqn.invars)
                sent[name] = sent.get(name, 0) + size
            return 0

        count(jaxpr, look)
        return sent

    scales, sums = 2 * 2, 2 * 2 * 32 * 9
    wanted = {"all_gather": scales + sums} if causal else {"all_gather": scales, "psum": sums}
    assert numbers_sent(64) == numbers_sent(256) == wanted


def test_heads_cut_over_a_mesh_axis():
    """Each device has its own heads; nothing is exchanged."""
    q, k, v = normal(*[(2, 12, 4, 8)] * 3)
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
    heads = P(None, None, "model")
    local = functools.partial(favor_attention, projection=SMALL, causal=True, chunk=4)
    run = jax.shard_map(local, mesh=mesh, in_specs=(heads,) * 3, out_specs=heads)
    close(jax.jit(run)(q, k, v), local(q, k, v), 1e-6)


# ==== Errors ======================================================================================

X = np.zeros((2, 6, 4, 8), np.float32)
WRONG = [
    ({"q": X[0]}, "q (6, 4, 8), k (2, 6, 4, 8), v (2, 6, 4, 8) are not [B,T,H,K]"),
    ({"v": X[:, :5]}, "v (2, 5, 4, 8) are not [B,T,H,K]"),
    ({"k": X[..., :4]}, "k (2, 6, 4, 4), v (2, 6, 4, 8) are not [B,T,H,K]"),
    ({"q": X[:, :, :2]}, "q (2, 6, 2, 8), k"),
    ({"q": X[:, :0]}, "none may be empty"),
    ({"k": X.astype("float16")}, "q is float32, k float16, v float32, not all of the same"),
    ({name: X.astype(int) for name in "qkv"}, "not all of the same floating type"),
    ({"projection": SMALL[:, :4]}, "the projection is (32, 4), not [features, 8]"),
    ({"projection": SMALL[:0]}, "the projection is (0, 8), not [features, 8]"),
    ({"projection": SMALL[0]}, "the projection is (8,), not [features, 8]"),
    ({"projection": None}, "kind='positive' needs a projection"),
    ({"kind": "cosine"}, "kind='cosine' is none of"),
    ({"mask": np.ones((2, 5), bool)}, "mask is bool (2, 5), not bool (2, 6)"),
    ({"mask": np.ones((2, 6), int)}, "mask is int64 (2, 6), not bool (2, 6)"),
    ({"q": X[:, :4], "causal": True}, "causal=True with 4 queries and 6 keys"),
    ({"chunk": 0}, "chunk=0 is not a whole number of at least 1"),
    ({"chunk": 2.5}, "chunk=2.5 is not a whole number of at least 1"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_attention_refuses(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        favor_attention(**({"q": X, "k": X, "v": X, "projection": SMALL} | change))


def test_attention_matrix_refuses_a_mesh_axis():
    with pytest.raises(ValueError, match="attention_matrix takes no seq_axis"):
        performer.attention_matrix(X, X, SMALL, seq_axis="seq")


def test_projections_refuse():
    for make in PROJECTIONS:
        with pytest.raises(ValueError, match="features=0 is not at least 1"):
            make(jax.random.key(0), 0, 8)
        with pytest.raises(ValueError, match="dim=0 is not at least 1"):
            make(jax.random.key(0), 8, 0)
    with pytest.raises(ValueError, match="scaling=2 is neither 0 nor 1"):
        performer.orthogonal_projection(jax.random.key(0), 8, 8, scaling=2)


def test_decoding_refuses():
    state = performer.init_state(2, 4, 32, 8)
    token = X[:, :1]
    with pytest.raises(
        ValueError, match=re.escape("(2, 4, 32, 9), these arguments need (2, 2, 32")
    ):
        performer.decode_step(state, token[:, :, :2], token[:, :, :2], token[:, :, :2], SMALL)
    with pytest.raises(ValueError, match="q has 2 tokens, decode_step takes one"):
        performer.decode_step(state, X[:, :2], token, token, SMALL)
    with pytest.raises(ValueError, match="k has 2 tokens, decode_step takes one"):
        performer.decode_step(state, token, X[:, :2], X[:, :2], SMALL)
    with pytest.raises(ValueError, match="heads=0 is not at least 1"):
        performer.init_state(1, 0, 1, 1)


# ==== Demo ========================================================================================


@pytest.fixture
def small_demo(monkeypatch):
    monkeypatch.setattr(performer, "LENGTH", 64)
    monkeypatch.setattr(performer, "FEATURES", (256,))
    monkeypatch.setattr(performer, "NORMS", (2,))
    monkeypatch.setattr(performer, "SAMPLES", 2)


@pytest.mark.usefixtures("small_demo")
def test_demo_measures_and_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(performer, "measure_costs", lambda lengths: COSTS)
    out = tmp_path / "figure.png"
    monkeypatch.setattr(performer, "MOST_ERROR", 0.001)
    assert performer.main(["--out", str(out)]) == 1
    text = capsys.readouterr().out
    assert out.stat().st_size > 10_000
    assert len(re.findall(r"(?:positive|trigonometric), (?:orthogonal|independent) ", text)) == 4
    assert re.search(r"result: error with 256 .*: got \d\.\d{3} and 3\.0, expected", text)


COSTS = {
    "softmax": [performer.Cost(10, 3.0)] * 7,
    "FAVOR+": [performer.Cost(10, 1.0)] * 7,
    "softmax, causal": [performer.Cost(10, math.nan)] * 7,
    "FAVOR+, causal": [performer.Cost(10, 1.0)] * 7,
}


@pytest.mark.parametrize(
    ("error", "seconds", "status"),
    [(0.2, 1.0, 0), (0.3, 1.0, 1), (0.2, 2.0, 1), (math.nan, 1.0, 1)],
)
def test_demo_fails_on_a_bad_result(error, seconds, status, monkeypatch, tmp_path):
    errors = {(2, "positive", "orthogonal"): [error] * 4}
    costs = COSTS | {"FAVOR+": [performer.Cost(10, seconds)] * 7}
    monkeypatch.setattr(performer, "measure_errors", lambda seed: errors)
    monkeypatch.setattr(performer, "measure_costs", lambda lengths: costs)
    monkeypatch.setattr(performer, "draw", lambda *args: None)
    assert performer.main(["--out", str(tmp_path / "x.png")]) == status


def test_demo_measures_costs_and_keeps_to_its_memory(monkeypatch, capsys):
    costs = performer.measure_costs([256])
    assert all(row[0].seconds > 0 and row[0].memory > 0 for row in costs.values())
    assert "FAVOR+, causal is faster at n = " in capsys.readouterr().out
    monkeypatch.setattr(performer, "MOST_MEMORY", 0)
    q = jnp.zeros((1, 256, 1, 64))
    cost = performer.cost(performer.softmax_attention, q, q, q)
    assert cost.memory > 0 and math.isnan(cost.seconds)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--longest", "4"], "--longest 4 is not from 12 to 20"),
        (["--seed", "-1"], "--seed -1 is not in 0 to 4294967295"),
        (["--out", "x.txt"], "--out x.txt is not a .png"),
    ],
)
def test_demo_refuses_in_one_line(flags, message, capsys):
    assert performer.main(flags) == 2
    out, error = capsys.readouterr()
    assert error.startswith(f"performer.py: {message}") and error.count("\n") == 1
    assert not out


def test_demo_prints_its_result_where_it_cannot_draw(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    monkeypatch.setattr(
        performer, "measure_errors", lambda seed: {(2, "positive", "orthogonal"): [0.1] * 4}
    )
    monkeypatch.setattr(performer, "measure_costs", lambda lengths: COSTS)
    assert performer.main(["--out", str(tmp_path / "x.png")]) == 0
    text = capsys.readouterr().out
    assert "result: " in text and "no figure: " in text
