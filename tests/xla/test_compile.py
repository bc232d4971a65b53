"""Tests of the cache of compiled programs."""

import jax
import pytest

pytestmark = pytest.mark.usefixtures("minimal_output")


@pytest.mark.parametrize(
    ("given", "by_jax", "expected"),
    [
        ("", None, "{}/run/compiled"),
        ("{}/programs", None, "{}/programs"),
        ("{}/programs", "/by/jax", "/by/jax"),
    ],
)
def test_directory_of_compiled_programs(given, by_jax, expected, run_main, tmp_path):
    """The cache is in the workdir unless the config or JAX's settings name another."""
    name = "jax_compilation_cache_dir"
    before = jax.config.values[name]
    jax.config.update(name, by_jax)
    try:
        flags = ["--mode=eval", f"--workdir={tmp_path}/run"]
        cache = f"--config.compilation_cache={given.format(tmp_path)}"
        code, calls = run_main(*flags, cache)
        assert code == 5  # there is no checkpoint
        assert len(calls) == 1
        assert jax.config.values[name] == expected.format(tmp_path)
    finally:
        jax.config.update(name, before)
