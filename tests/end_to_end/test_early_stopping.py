"""Tests of early stopping: scripted evaluations, interruptions and a second start."""

import json
import math
import shutil

import mini_runs
import pytest

from hivit_jax import evaluate
from hivit_jax.errors import ConfigError, DataError, Interrupted
from hivit_jax.reporting import metrics
from hivit_jax.tools import run_facts
from hivit_jax.tools.loading import read_model
from hivit_jax.train import train
from hivit_jax.training.early_stopping import stopping_flags

pytestmark = pytest.mark.usefixtures("minimal_output", "single_device")

CRITERION = ("eval/loss", "min")
# Step -> evaluation loss. With early_stopping=2, the run ends at step 5.
LOSSES = {1: 0.7, 2: 0.5, 3: 0.4, 4: 0.6, 5: 0.45, 6: 0.1}


@pytest.fixture
def evaluated_steps(monkeypatch):
    """Replace evaluation results with `LOSSES`; return the list of evaluated steps."""
    steps = []

    def scripted(*_):
        steps.append(steps[-1] + 1 if steps else 1)
        loss = LOSSES[steps[-1]]
        return {"eval/loss": loss, "eval/count": 64, "eval/unreadable": 0}

    monkeypatch.setattr(evaluate, "evaluate", scripted)
    return steps


def config(**overrides):
    """Return the config of a run of 6 steps that evaluates after each step."""
    mini = dict(total_steps=6, eval_every=1, keep_checkpoints=1, early_stopping=2)
    size = dict(model__embed_dim=32, model__depths="(1,1,1)")
    return mini_runs.mae(**mini | size | overrides)


@pytest.mark.extras
@pytest.mark.slow
def test_run_ends_at_the_same_step_after_interruptions(
    evaluated_steps, tmp_path, capsys
):
    """Early stopping ends a run at step 5, even if the run was interrupted or killed.

    The best checkpoint is kept, and the last printed line names it.
    """
    uninterrupted = tmp_path / "uninterrupted"
    assert train(config(), uninterrupted)["eval/loss"] == 0.45
    assert evaluated_steps == [1, 2, 3, 4, 5]
    assert mini_runs.saved_steps(uninterrupted) == [3, 5]
    *_, early, last = capsys.readouterr().out.splitlines()
    assert early == "early stopping: no better eval/loss in the last 2 evaluations"
    assert last.startswith("best checkpoint  step 3  eval  loss 0.4000")

    # The count of evaluations without improvement survives an interruption after step
    # 4, and a kill that loses step 4.
    workdir = tmp_path / "interrupted"
    evaluated_steps.clear()
    with pytest.raises(Interrupted):
        train(config(), workdir, lambda step: "why" if step == 4 else None)
    assert mini_runs.saved_steps(workdir) == [3, 4]
    for newest_step in (4, 3):
        resumed = tmp_path / f"resumed{newest_step}"
        shutil.copytree(workdir, resumed)
        if newest_step == 3:
            shutil.rmtree(resumed / "checkpoints" / "4")
        evaluated_steps[:] = range(1, newest_step + 1)
        train(config(), resumed)
        assert evaluated_steps == [1, 2, 3, 4, 5]
        assert mini_runs.logged(resumed, "eval/loss") == mini_runs.logged(
            uninterrupted, "eval/loss"
        )
        last_states = (
            mini_runs.saved_arrays(path, 5) for path in (uninterrupted, resumed)
        )
        mini_runs.assert_identical(*last_states)

    # The same command only evaluates. Without early stopping, the run continues.
    capsys.readouterr()
    files = sorted(uninterrupted.rglob("*"))
    assert train(config(), uninterrupted)["eval/loss"] == 0.1
    assert sorted(uninterrupted.rglob("*")) == files
    assert "early stopping: no better" in capsys.readouterr().out
    evaluated_steps[:] = range(1, 6)
    train(config(early_stopping=0), uninterrupted)
    assert mini_runs.logged(uninterrupted, "eval/loss")[6] == 0.1


@pytest.mark.extras
@pytest.mark.slow
def test_new_best_is_saved_between_checkpoints(
    evaluated_steps, tmp_path, capsys, monkeypatch
):
    """Log, commands and report name the same best step, which is saved.

    A run without evaluations saves only its last step.
    """
    train(config(early_stopping=0, total_steps=5), tmp_path)
    assert mini_runs.saved_steps(tmp_path) == [3, 5]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("best checkpoint  step 3  eval  loss 0.4000")
    pretrained = read_model(tmp_path)
    note = "(step 5, the newest; the best is step 3)"
    assert capsys.readouterr().out == f"model: {pretrained.path} {note}\n"
    best = run_facts._best(metrics.evaluations(tmp_path), CRITERION)
    assert best == "eval/loss 0.4 at step 3"

    monkeypatch.setattr(evaluate, "evaluate", lambda *_: {})
    train(config(early_stopping=0, total_steps=2), tmp_path / "without_evaluation")
    assert mini_runs.saved_steps(tmp_path / "without_evaluation") == [2]


@pytest.mark.slow
def test_failed_evaluation_ends_the_run(evaluated_steps, tmp_path, monkeypatch):
    """If the last evaluation fails, the resumed run repeats it and trains no step."""

    def failing(*arguments):
        if len(evaluated_steps) == 4:
            raise DataError("cannot access the images")
        return scripted(*arguments)

    scripted = evaluate.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate", failing)
        with pytest.raises(DataError, match="cannot access the images"):
            train(config(), tmp_path)
    assert mini_runs.saved_steps(tmp_path) == [3, 5]
    assert evaluated_steps == [1, 2, 3, 4]
    assert train(config(), tmp_path)["eval/loss"] == LOSSES[5]
    assert evaluated_steps == [1, 2, 3, 4, 5]
    assert mini_runs.saved_steps(tmp_path) == [3, 5]
    assert mini_runs.logged(tmp_path, "eval/loss")[5] == LOSSES[5]


def test_evaluations_since_best_are_counted_up_to_a_step(tmp_path):
    def count(step, criterion=("eval/loss", "min")):
        return metrics.evaluation_progress(tmp_path, step, criterion)[0]

    assert count(9) == 0
    writer = metrics.Writer(tmp_path)
    # Step 5 has the loss of step 3, which is not an improvement.
    for step, loss in (LOSSES | {5: 0.4}).items():
        writer.scalars(step, {"loss": 1.0})
        writer.scalars(step, {"eval/loss": loss, "eval/count": 64})
    writer.close()
    assert [count(step) for step in LOSSES] == [0, 0, 0, 1, 2, 0]
    assert [count(step, ("eval/loss", "max")) for step in LOSSES] == [0, 1, 2, 3, 4, 5]
    writer = metrics.Writer(tmp_path, 6)
    writer.scalars(7, {"eval/loss": math.nan, "eval/count": 64})
    writer.close()
    assert count(7) == 1
    assert count(7, ("eval/top1", "max")) == 7


# Program of one process that prints the `stopping_flags` of some steps
PROGRAM = """
import json, sys
from pathlib import Path
from hivit_jax.distributed import processes
from hivit_jax.training.early_stopping import stopping_flags

address, index, workdir, best, *steps = sys.argv[1:]
processes.connect(address, 2, int(index), 60.0)
criterion = best, "min"
found = [stopping_flags(Path(workdir), 2, criterion, int(s)) for s in steps]
print(json.dumps(found))
processes.exit_together(0)
"""


@pytest.mark.slow
@pytest.mark.processes
def test_processes_stop_at_the_same_step(tmp_path):
    """Both processes follow the metrics of process 0.

    The losses in the metrics file of process 1 would never end the run.
    """
    for index in range(2):
        (tmp_path / f"{index}").mkdir()
        writer = metrics.Writer(tmp_path / f"{index}")
        for step, loss in LOSSES.items():
            values = {"eval/loss": -step if index else loss, "eval/count": 64}
            writer.scalars(step, values)
        writer.close()
    decisions_0, decisions_1 = (
        [stopping_flags(tmp_path / name, 2, CRITERION, step) for step in LOSSES]
        for name in "01"
    )
    assert [end_early for end_early, _ in decisions_0] == [False] * 4 + [True, False]
    assert not any(end_early for end_early, _ in decisions_1)

    address = mini_runs.free_address()
    processes = [
        mini_runs.start_process(
            *("-c", PROGRAM, address, index, tmp_path / f"{index}", "eval/loss"),
            *LOSSES,
        )
        for index in range(2)
    ]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    for out, _ in outputs:
        assert json.loads(out.splitlines()[-1]) == [[*pair] for pair in decisions_0]


def test_early_stopping_requires_evaluations():
    with pytest.raises(ConfigError, match="early_stopping=2 with data.eval_split"):
        config(data__name="folder", data__eval_split="none")
