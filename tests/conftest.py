"""Tests run on 8 simulated CPU devices; with TEST_GPU=1 those marked gpu, alone, on the GPU."""

import atexit
import os
import pathlib
import shutil
import sys
import tempfile

import pytest

GPU = os.environ.get("TEST_GPU") == "1"
# By the environment, not by jax.config: tests start processes of their own.
if not GPU:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiles sooner, to slower code
os.environ["MPLBACKEND"] = "Agg"  # no window, on a machine with a display either
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # What a test or a process has compiled is there for the next, until the tests end.
    cache = tempfile.mkdtemp(prefix="jax-compiled-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax  # noqa: E402, after the environment that it reads
import optax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)  # before anything asks for a device
jax.config.update("jax_default_matmul_precision", "highest")  # else GPUs multiply float32 as TF32
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # for `import vit` from any folder


@pytest.fixture(autouse=True)
def optimized_if_long(request):
    """Long tests, which run more than they compile, do so with all optimizations of XLA."""
    long = request.node.get_closest_marker("long") is not None
    jax.config.update("jax_disable_most_optimizations", not GPU and not long)


def pytest_report_header():
    return f"jax {jax.__version__}, optax {optax.__version__}, on the {jax.default_backend()}"


def pytest_collection_modifyitems(config, items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if GPU:
        config.hook.pytest_deselected(items=[item for item in items if item not in marked])
        items[:] = marked
    if jax.default_backend() != "gpu":
        skip = pytest.mark.skip(reason="needs a GPU: TEST_GPU=1 make test, where there is one")
        for item in marked:
            item.add_marker(skip)
