"""Set-up of the tests: eight virtual CPU devices, matrix precision, compilation cache.

JAX_PLATFORMS selects another backend. All workers, subprocesses and later test runs
share the cache, so that each program is compiled once.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

from flags import fast_compile_flag, processor_digest, virtual_devices_flag

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit the variable set here
    cache = Path(__file__).parents[1] / ".pytest_cache" / "programs"
    if sum(path.stat().st_size for path in cache.rglob("*")) > 2**31:  # bytes
        shutil.rmtree(cache)
    # One directory per processor, because programs use the processor's instruction set.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache / processor_digest())
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Without most optimizations, the tests' programs compile two to four times as fast.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# JAX writes cache entries in place. A process that finds a half-written entry compiles
# the program again and warns.
os.environ["PYTHONWARNINGS"] = "ignore:Error reading persistent compilation cache"
if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
    os.environ["XLA_FLAGS"] = f"{virtual_devices_flag(8)} {fast_compile_flag()}"

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")
jax.devices()  # initializes the backend, which reads XLA_FLAGS
# libtpu, which reads XLA_FLAGS later, must not receive the flag for fast compiles.
os.environ["XLA_FLAGS"] = virtual_devices_flag(8)


def pytest_collection_modifyitems(items):
    """Move the tests of files that ``import mini_runs`` to the front.

    Most of these files train and take longest. If they start first, all workers end at
    about the same time.
    """
    items.sort(key=lambda item: not hasattr(item.module, "mini_runs"))


@pytest.fixture(autouse=True)
def _restore_signal_handlers():
    """Restore the signal handlers that commands replace in this process."""
    numbers = signal.SIGINT, signal.SIGTERM
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def minimal_output():
    """Disable figures and TensorBoard events; let equal runs share their programs.

    After the tests, the fixture enables the compilation cache, which a run may have
    disabled.
    """
    import mini_runs

    with mini_runs.minimal_output():
        yield
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.fixture(scope="module")
def single_device():
    """Let runs use one device, which needs a quarter of the CPU time of eight."""
    import mini_runs

    with mini_runs.visible_devices(1):
        yield


@pytest.fixture
def shard_small_arrays(monkeypatch):
    """Lower the minimum size of sharded arrays to 64 elements."""
    from hivit_jax.distributed import sharding

    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """Return an empty directory.

    TensorBoard events are disabled, because the import of TensorBoard takes seconds.
    """
    from hivit_jax.reporting import boards

    monkeypatch.setattr(boards, "tensorboards", lambda *_: [])
    return tmp_path


@pytest.fixture
def cache_directory(tmp_path, monkeypatch):
    """Return the path of a directory that replaces the user's cache directory."""
    from hivit_jax.data.sources import registry

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    registry._open.cache_clear()
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Return a directory of 40 training and 11 validation photographs.

    The photographs have 64x48 pixels and belong to seven classes.
    """
    from benchmarks import photographs

    root = tmp_path_factory.mktemp("photographs")
    photographs.write(root, {"train": 40, "val": 11}, (64, 48))
    return root


@pytest.fixture(scope="module")
def without_tensorboard(tmp_path_factory):
    """Return environment variables that make imports of tensorboardX fail."""
    import mini_runs

    directory = tmp_path_factory.mktemp("blocked")
    return {"PYTHONPATH": mini_runs.block_imports(directory, "tensorboardX")}


@pytest.fixture
def run_main(monkeypatch, tmp_path):
    """Return a function that runs `main` and records `jax.distributed.initialize`.

    The function returns the exit code of `main` and the (arguments, keyword arguments)
    of each recorded call. `jax.distributed.initialize` is replaced by a function that
    raises ValueError with the message `problem`. The default is JAX's message on a
    machine outside any cluster.
    """
    import mini_runs

    from hivit_jax import main

    def run(*flags, problem=""):
        def initialize(*arguments, **options):
            calls.append((arguments, options))
            raise ValueError(problem or "coordinator_address should be defined.")

        calls = []
        monkeypatch.setattr(jax.distributed, "initialize", initialize)
        # Replaced, because its settings of malloc would outlive the test.
        monkeypatch.setattr(main, "keep_freed_memory", lambda: None)
        monkeypatch.setattr(
            sys, "argv", ["main", *mini_runs.arguments(peer_timeout=45), *flags]
        )
        return main.main(), calls

    return run
