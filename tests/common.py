"""What several test files need: goldens, comparison, meshes, costs counted from the jaxpr."""

import functools
import json
import math
import pathlib

import jax
import numpy as np
from jax.sharding import AxisType

ROOT = pathlib.Path(__file__).parents[1]


@functools.cache
def golden(paper, name):
    """A golden's meta data, and its arrays by name."""
    with np.load(ROOT / f"tests/golden/{paper}/{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    meta = json.loads(str(arrays.pop("meta")))
    return meta, arrays


def part(arrays, prefix):
    """The arrays whose names begin with prefix, without it."""
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }


def close(got, want, tolerance, largest=None):
    """Asserts that they differ by less than tolerance times `largest`, or the largest of want."""
    got = np.asarray(got, np.float64)
    want = np.asarray(want, np.float64)
    assert got.shape == want.shape
    error = np.abs(got - want).max() / (largest or np.abs(want).max())
    assert error < tolerance, f"error {error:.2e} of the largest value"


def close_gradients(got, want, tolerance=2e-5):
    """The same for dicts, as a share of the largest value of all: some are zero in theory."""
    assert got.keys() == want.keys()
    largest = max(np.abs(array).max() for array in want.values())
    for name in want:
        close(got[name], want[name], tolerance, largest)


def mesh_of(data, model):
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def count(jaxpr, cost):
    """Sum of cost(equation) over a jaxpr, loop bodies times their trips."""
    total = 0
    for eqn in jaxpr.eqns:
        total += cost(eqn)
        trips = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += trips * count(inner, cost)
    return total


def matmul_flops(eqn):
    """FLOPs of a matrix product; 0 for any other equation."""
    if eqn.primitive.name != "dot_general":
        return 0
    (contracted, _), _ = eqn.params["dimension_numbers"]
    summed = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    return 2 * math.prod(eqn.outvars[0].aval.shape) * summed


COLLECTIVES = {
    "psum": ("psum", "psum_invariant"),
    "all_gather": ("all_gather",),
    "reduce_scatter": ("reduce_scatter",),
}


def count_collectives(jaxpr):
    """How often each collective runs."""
    return {
        kind: count(jaxpr, lambda eqn, names=names: int(eqn.primitive.name in names))
        for kind, names in COLLECTIVES.items()
    }
