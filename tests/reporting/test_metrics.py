"""Tests of metrics.jsonl, throughput, the best checkpoint, and bucket workdirs."""

import json
import math
import sys
import time
from functools import partial
from types import ModuleType

import pytest
from etils import epath
from etils.epath import backend, gpath

from hivit_jax.checkpoints import read
from hivit_jax.errors import CheckpointError
from hivit_jax.reporting import console, figures, metrics


def write(workdir, steps, first_step=0):
    """Write a line of metrics.jsonl for each step."""
    writer = metrics.Writer(workdir, first_step)
    for step in steps:
        writer.scalars(step, {"loss": step / 8, "count": step})
    writer.close()


def logged_steps(workdir):
    """Return the steps in metrics.jsonl."""
    return [line["step"] for line in metrics.read(workdir / "metrics.jsonl")]


def test_each_call_writes_one_line(workdir):
    write(workdir, [10, 20])
    text = (workdir / "metrics.jsonl").read_text()
    assert text == (
        '{"step": 10, "loss": 1.25, "count": 10}\n'
        '{"step": 20, "loss": 2.5, "count": 20}\n'
    )
    write(workdir, [30], first_step=20)
    assert (workdir / "metrics.jsonl").read_text().startswith(text)
    assert logged_steps(workdir) == [10, 20, 30]


def test_lines_are_written_immediately(workdir):
    writer = metrics.Writer(workdir)
    writer.scalars(10, {"loss": 0.5})
    assert logged_steps(workdir) == [10]
    writer.close()


def test_lines_after_the_checkpoint_are_dropped(workdir):
    write(workdir, [10, 20, 30, 40])
    write(workdir, [30, 40, 50], first_step=20)
    assert logged_steps(workdir) == [10, 20, 30, 40, 50]
    write(workdir, [10])  # first_step=0: a new run
    assert logged_steps(workdir) == [10]
    assert [path.name for path in workdir.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_half_written_line_is_dropped(workdir, cut):
    write(workdir, [10, 20, 30])
    path = workdir / "metrics.jsonl"
    path.write_text(path.read_text()[:-cut])
    # cut=1 removes only the newline.
    assert logged_steps(workdir) == ([10, 20, 30] if cut == 1 else [10, 20])
    write(workdir, [30, 40], first_step=20)
    assert logged_steps(workdir) == [10, 20, 30, 40]
    for line in path.read_text().splitlines():
        json.loads(line)


def test_missing_file_has_no_lines(tmp_path):
    assert metrics.read(tmp_path / "metrics.jsonl") == []


@pytest.fixture
def clock(monkeypatch):
    """Return a list whose first element is the time."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_throughput_is_measured_since_the_last_read(clock):
    """`read` returns (images per second, fraction of steps that waited for images)."""
    throughput = metrics.Throughput()
    for starved in (True, False, False, False):
        throughput.add(96, starved)
    clock[0] += 2
    assert throughput.read() == (192, 0.25)
    throughput.add(10)
    clock[0] += 4
    assert throughput.read() == (2.5, 0)
    clock[0] += 1
    assert throughput.read() == (0, 0)


def test_throughput_ignores_pauses(clock):
    throughput = metrics.Throughput()
    throughput.add(100)
    clock[0] += 1
    with throughput.pause():
        clock[0] += 60
    clock[0] += 3
    with throughput.pause():
        clock[0] += 7
    assert throughput.read() == (25, 0)
    throughput.add(100)
    clock[0] += 10
    assert throughput.read() == (10, 0)


def test_best_line_names_the_best_saved_checkpoint(tmp_path):
    lines = [
        {"step": 10, "loss": 0.1},
        {"step": 10, "eval/loss": 0.5, "eval/top1": 0.9, "eval/count": 8},
        {"step": 20, "eval/loss": 0.4, "eval/top1": 0.7, "eval/count": 8},
        {"step": 30, "eval/loss": 0.9, "eval/top1": 0.8, "eval/count": 8},
    ]
    text = "".join(json.dumps(line | {"eval/unreadable": 0}) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    best = console.best_line(tmp_path, [20, 30], ("eval/top1", "max"))
    assert best == (
        "best checkpoint  step 30  eval  loss 0.9000  top1 80.00 %  (8 images)  "
        f"{tmp_path}/checkpoints/30"
    )
    best_line = partial(console.best_line, tmp_path, [10, 20, 30])
    assert "step 10 " in best_line(("eval/top1", "max"))
    assert "step 20 " in best_line(("eval/top1", "min"))
    assert "step 20 " in best_line(("eval/loss", "min"))
    assert "step 30 " in best_line(("eval/loss", "max"))
    no_best_line = console.best_line(tmp_path, [], ("eval/loss", "min"))
    assert no_best_line.startswith("best checkpoint  none: no saved")


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ((0.9, 0.4, 0.4), 2),  # the first of equal losses
        ((math.nan, 0.4, 0.6), 2),
        ((math.nan, math.inf, math.nan), 1),
        ((None, None, None), 1),  # a task without eval/loss
    ],
)
def test_of_equal_values_the_lowest_loss_is_the_best(losses, expected):
    lines = [{"step": 0, "eval/top1": 0.5, "eval/loss": 0.1}]
    for step, loss in enumerate(losses, 1):
        line = {"step": step, "eval/top1": 0.8}
        lines.append(line if loss is None else line | {"eval/loss": loss})
    assert metrics.best_evaluation(lines, ("eval/top1", "max"))["step"] == expected


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """Map gs://bucket to a local directory; return the directory.

    As in Cloud Storage, files cannot be appended to.
    """

    class BucketBackend:
        def __getattr__(self, name):
            def call(path, *args, **kwargs):
                assert str(path).startswith("gs://")
                assert "a" not in args[:1]
                args = [local(x) if str(x).startswith("gs://") else x for x in args]
                result = getattr(backend.os_backend, name)(local(path), *args, **kwargs)
                if name == "glob":
                    return [
                        match.replace(str(tmp_path), "gs://bucket") for match in result
                    ]
                return result

            return call

    def local(path):
        return str(path).replace("gs://bucket", str(tmp_path))

    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", BucketBackend())
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setitem(sys.modules, "gcsfs", ModuleType("gcsfs"))
    monkeypatch.setenv("EPATH_USE_TF", "false")
    return tmp_path


def test_bucket_workdir_receives_metrics_and_figures(bucket):
    """A resumed run adds its lines. Only complete checkpoints are found."""
    workdir = epath.Path("gs://bucket/run")
    metrics.prepare_workdir(workdir)
    for first_step, new_steps in ((0, [1, 2, 3]), (2, [3, 4])):
        writer = metrics.Writer(workdir, first_step)
        for step in new_steps:
            writer.scalars(step, {"loss": 1.0 / step})
            assert logged_steps(bucket / "run")[-1] == step
        writer.close()
    assert logged_steps(bucket / "run") == [1, 2, 3, 4]
    figures.draw_run(workdir, 4, {})
    assert (bucket / "run" / "figures" / "curves.png").stat().st_size > 1000
    assert not list(bucket.rglob(".writable*"))
    assert str(read.absolute("gs://bucket/run")) == "gs://bucket/run"
    for step in (7, 12, 15):  # step 15 is incomplete
        (bucket / f"run/checkpoints/{step}/params").mkdir(parents=True)
        if step < 15:
            (bucket / f"run/checkpoints/{step}/commit_success.txt").touch()
    found = [path.name for path in read.find_checkpoints("gs://bucket/run")]
    assert found == ["12", "7"]
    path = "gs://bucket/run/checkpoints"
    assert [str(p) for p in read.find_checkpoints(f"{path}/7")] == [f"{path}/7"]
    with pytest.raises(CheckpointError, match="15: expected commit_success.txt"):
        read.find_checkpoints(f"{path}/15")
