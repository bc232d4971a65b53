"""From a recipe's value to its effect in a run: real runs against the second
implementation in `plain.py`, and every key of every task.
"""

from functools import cache

import jax
import numpy as np
import plain
import pytest
import recipes
import traces
from traces import STEPS, mismatches


@pytest.fixture(scope="module", autouse=True)
def quick():
    with recipes.quick():
        yield


@pytest.fixture(scope="module")
def trace_of(tmp_path_factory):
    """name -> `Trace`."""
    folder = tmp_path_factory.mktemp("folder")
    traces.write_folder(folder)

    @cache
    def run(name):
        workdir = tmp_path_factory.mktemp(name.replace(", ", "_")) / "run"
        start = {"init_from": run("mae").workdir} if name == "linear_probe" else {}
        return traces.Trace(name, folder, workdir, **start)

    return run


# --- Every step, from files to parameters ---------------------------------------------


@pytest.mark.parametrize("name", traces.TRACES)
def test_every_step(name, trace_of):
    """Three training steps and the evaluation are those of the plain implementation."""
    trace = trace_of(name)
    assert mismatches(trace, trace.config) == {}
    line = trace.line(STEPS, "eval/loss")
    assert (line["eval/count"], line["eval/unreadable"]) == (10, 1)
    assert {x: line[x] for x in trace.results} == trace.results
    assert [x["step"] for x in trace.lines if "eval/loss" in x] == [2, 3]


def test_both_kinds_of_mixing(trace_of):
    """The steps of the classifier's trace have Mixup and CutMix."""
    kinds = set()
    for step in range(STEPS):
        key = plain.sample_keys(5, "train", step * traces.BATCH, 1)[0]
        which = jax.random.split(plain.fold(key, "step"), 4)[0]
        kinds.add(bool(jax.random.bernoulli(which)))
    assert kinds == {True, False}


def test_what_is_not_trained(trace_of):
    """The decoder's table in pretraining; the whole encoder in a linear probe, which is
    the pretrained one, under a head of its own.
    """
    states = [trace_of("mae").params(step) for step in (0, STEPS)]
    table = "decoder_pos_embed"
    np.testing.assert_array_equal(states[0][table], states[1][table])
    pretrained = states[1]
    for step in range(STEPS + 1):
        params = trace_of("linear_probe").params(step)
        for name, array in params.items():
            if name.startswith("encoder/"):
                np.testing.assert_array_equal(array, pretrained[name])
    born = trace_of("linear_probe").params(0)["head/kernel"]
    assert born.std() == pytest.approx(0.01, rel=0.15)
