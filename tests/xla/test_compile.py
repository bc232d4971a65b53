"""Tests of the cache of compiled programs."""

import jax
import pytest

pytestmark = pytest.mark.usefixtures("minimal_output")


@pytest.mark.parametrize(
    ("key", "jax_setting", "expected"),
    [
        ("", None, "{}/run/compiled"),
        ("{}/programs", None, "{}/programs"),
        ("{}/programs", "/by/jax", "/by/jax"),
    ],
)
def test_programs_are_cached_in_the_workdir(
    key, jax_setting, expected, run_main, tmp_path
):
    """`compilation_cache` selects another directory, unless JAX has its own setting."""
    name = "jax_compilation_cache_dir"
    before = jax.config.values[name]
    jax.config.update(name, jax_setting)
    try:
        flags = ["--mode=eval", f"--workdir={tmp_path}/run"]
        cache = f"--config.compilation_cache={key.format(tmp_path)}"
        code, calls = run_main(*flags, cache)
        assert code == 5  # there is no checkpoint
        assert len(calls) == 1
        assert jax.config.values[name] == expected.format(tmp_path)
    finally:
        jax.config.update(name, before)
