"""Eight virtual CPU devices, unless JAX_PLATFORMS names others, and full float32
products for every test; each program is compiled once, for all workers and processes.
"""

import atexit
import os
import shutil
import signal
import sys
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


@pytest.fixture(autouse=True)
def _restored_signals():
    """Commands run in this process install handlers."""
    handlers = {number: signal.getsignal(number) for number in (2, 15)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def quick():
    """Light compilation, no figures, no TensorBoard; see `recipes.quick`."""
    import recipes

    with recipes.quick():
        yield
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """40 training and 11 validation photographs of 64x48, in seven classes."""
    from benchmarks import photographs

    root = tmp_path_factory.mktemp("photographs")
    photographs.write(root, {"train": 40, "val": 11}, (64, 48))
    return root


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Variables of a process without TensorBoard."""
    import recipes

    directory = tmp_path_factory.mktemp("environment")
    return {"PYTHONPATH": recipes.not_installed(directory, "tensorboardX")}


@pytest.fixture
def joined(monkeypatch, tmp_path):
    """Runs flags as a process's own: (exit code, arguments and limits of its start).

    Where no cluster is found, "" as `problem`, the process goes on alone.
    """

    import recipes

    from hivit_jax import main

    def join(*flags, problem=""):
        def initialize(*arguments, **limits):
            asked.append((arguments, limits))
            raise ValueError(problem or "coordinator_address should be defined.")

        asked = []
        monkeypatch.setattr(jax.distributed, "initialize", initialize)
        # The last of these settings would hold until the tests end.
        monkeypatch.setattr(main, "keep_freed_memory", lambda: None)
        monkeypatch.setattr(
            sys, "argv", ["main", *recipes.arguments(peer_timeout=45), *flags]
        )
        return main.main(), asked

    return join
