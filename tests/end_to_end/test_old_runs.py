"""Tests that runs and saved models of versions before 0.1 give the recorded results.

These commands wrote tests/parity/golden/old_runs, on one CPU device::

    git worktree add --detach ../first 167c532
    PYTHONPATH=../first .venv/bin/python tests/parity/golden/old_runs/write.py
"""

import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import reference
from golden.old_runs.outputs import outputs

import hivit_jax
from hivit_jax.main import main

OLD = reference.GOLDEN / "old_runs"


TASKS = ("mae", "classify", "linear_probe")


# Sums may be rounded differently by the recording version and by other CPUs.
RTOL = 1e-5


# Metrics that depend on measured time
TIMES = {"images_per_second", "seconds_left", "input_bound"}


# Task -> metrics that differ. In versions before 0.1, the statistics of a probe had
# gradients, which the gradient norm included.
NOT_COMPARABLE = {"linear_probe": {"gradient_norm"}}


pytestmark = [
    pytest.mark.usefixtures("minimal_output", "single_device"),
    pytest.mark.slow,
]


@pytest.fixture
def unpacked(tmp_path, monkeypatch):
    """Change to a directory with TASK/run and TASK/saved of every task."""
    for task in TASKS:
        with tarfile.open(OLD / f"{task}.tar.xz") as archive:
            archive.extractall(tmp_path / task, filter="data")
    monkeypatch.chdir(tmp_path)


def run(task, workdir, *flags):
    """Run the command line with the old recipe of a task."""
    recipe = f"--config={OLD / 'recipe.py'}:{task}"
    assert main([recipe, f"--workdir={workdir}", *flags]) == 0


def check_lines(task, workdir):
    """Check metrics.jsonl, except `TIMES` and `NOT_COMPARABLE`, against old values."""
    expected = [json.loads(x) for x in (OLD / f"{task}.jsonl").read_text().splitlines()]
    path = Path(workdir, "metrics.jsonl")
    lines = [json.loads(x) for x in path.read_text().splitlines()]
    assert [x["step"] for x in lines] == [x["step"] for x in expected]
    for line, old in zip(lines, expected, strict=True):
        for name in old.keys() - TIMES - NOT_COMPARABLE.get(task, set()):
            np.testing.assert_allclose(
                line[name], old[name], RTOL, err_msg=f"step {old['step']} {name}"
            )


@pytest.mark.parametrize(
    "task", [pytest.param("classify", marks=pytest.mark.extras), "mae", "linear_probe"]
)
def test_old_run_resumes(task, unpacked, capsys):
    """The run resumes at step 4 of 8 and logs the old metrics."""
    run(task, f"{task}/run")
    assert "resuming at step 4" in capsys.readouterr().out
    check_lines(task, f"{task}/run")


@pytest.mark.parametrize(
    "task", [pytest.param("classify", marks=pytest.mark.extras), "linear_probe"]
)
def test_old_run_initializes_a_new_run(task, unpacked):
    """A run that starts from the old encoder logs the old metrics."""
    run(task, "new", "--config.init_from=mae/run")
    check_lines(task, "new")


@pytest.mark.parametrize("task", TASKS)
def test_old_run_is_evaluated(task, unpacked, capsys):
    """``--mode eval`` prints the old values, up to one unit of the fourth decimal."""
    run(task, f"{task}/run", "--mode=eval")
    numbers = [
        [float(x) for x in re.findall(r"\d+\.?\d*", text.splitlines()[-1])]
        for text in (capsys.readouterr().out, (OLD / f"{task}.txt").read_text())
    ]
    np.testing.assert_allclose(*numbers, rtol=0, atol=1.01e-4)


@pytest.mark.parametrize("directory", ["run", "saved"])
@pytest.mark.parametrize("task", TASKS)
def test_old_model_is_loaded(task, directory, unpacked):
    """`load_pretrained` reads the workdir and the directory of `save_pretrained`."""
    values = outputs(hivit_jax.load_pretrained(f"{task}/{directory}"))
    if task == "linear_probe":
        # Old versions also counted the running mean and variance of 16 features.
        values["parameters"] += 32
    with np.load(OLD / f"{task}.npz") as expected:
        assert values.keys() == set(expected)
        for name, array in expected.items():
            np.testing.assert_allclose(
                values[name], array, RTOL, 1e-5, err_msg=name, strict=True
            )
