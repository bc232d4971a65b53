"""Eight virtual CPU devices and full float32 products for every test."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Programs are compiled once for all processes; no TensorBoard."""
    import recipes

    directory = tmp_path_factory.mktemp("environment")
    return {
        "JAX_COMPILATION_CACHE_DIR": directory / "cache",
        "PYTHONPATH": recipes.not_installed(directory / "missing", "tensorboardX"),
    }
