"""Eight virtual CPU devices, unless JAX_PLATFORMS names others, and full float32
products for every test; each program is compiled once, for all workers and processes.
"""

import atexit
import os
import shutil
import tempfile

from flags import quick_to_compile, virtual_devices

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit from their controller
    directory = tempfile.mkdtemp(prefix="hivit-programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = directory
    atexit.register(shutil.rmtree, directory, True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# JAX writes programs in place; one that is read too early is compiled again.
os.environ["PYTHONWARNINGS"] = "ignore:Error reading persistent compilation cache"
if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
    os.environ["XLA_FLAGS"] = f"{virtual_devices(8)} {quick_to_compile()}"

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")
jax.devices()  # reads the flags
os.environ["XLA_FLAGS"] = virtual_devices(8)  # libtpu reads too


def pytest_collection_modifyitems(items):
    """Files that train come first: they take longest, and workers end together."""
    items.sort(key=lambda item: not hasattr(item.module, "recipes"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Variables of a process without TensorBoard."""
    import recipes

    directory = tmp_path_factory.mktemp("environment")
    return {"PYTHONPATH": recipes.not_installed(directory, "tensorboardX")}
