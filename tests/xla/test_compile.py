"""Tests of the cache of compiled programs, and of the log lines of compilations."""

import re

import jax
import numpy as np
import pytest

from hivit_jax.xla.compile import with_compilation_log

pytestmark = pytest.mark.usefixtures("minimal_output")


@pytest.mark.parametrize(
    ("directory", "jax_setting", "expected"),
    [
        ("", None, "{}/run/compiled"),
        ("{}/programs", None, "{}/programs"),
        ("{}/programs", "/by/jax", "/by/jax"),
    ],
)
def test_programs_are_cached_in_the_workdir(
    directory, jax_setting, expected, run_main, tmp_path
):
    """`compilation_cache` sets another directory; JAX's own setting overrides both."""
    name = "jax_compilation_cache_dir"
    before = jax.config.values[name]
    jax.config.update(name, jax_setting)
    try:
        flags = ["--mode=eval", f"--workdir={tmp_path}/run"]
        cache = f"--config.compilation_cache={directory.format(tmp_path)}"
        code, calls = run_main(*flags, cache)
        assert code == 5  # there is no checkpoint
        assert len(calls) == 1
        assert jax.config.values[name] == expected.format(tmp_path)
    finally:
        jax.config.update(name, before)


def test_first_call_with_each_combination_of_shapes_is_logged(capsys):
    """The two lines contain the start and the duration of the compilation."""
    double = with_compilation_log(
        jax.jit(lambda values: 2 * values["x"]), "the doubling"
    )
    lines_of_calls = []
    for size in (3, 3, 4, 3):
        assert double({"x": np.ones(size)}).tolist() == [2.0] * size
        lines_of_calls.append(capsys.readouterr().out.splitlines())
    assert [len(lines) for lines in lines_of_calls] == [2, 0, 2, 0]
    start, end = lines_of_calls[0]
    assert start == "compiling the doubling, which may take minutes ..."
    assert re.fullmatch(r"(compiled|read from the cache) in \d+\.\d s", end)
