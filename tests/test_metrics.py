"""Lines, rates, pictures of a run, and the metrics that a task counts."""

import json
import time

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from etils.epath import backend, gpath
from ml_collections import ConfigDict
from numpy.testing import assert_allclose
from PIL import Image

from hivit_jax import checkpoint, figures, metrics, tasks

# metrics.jsonl


def write(workdir, steps, first_step=0):
    writer = metrics.Writer(workdir, first_step)
    for step in steps:
        writer.scalars(step, {"loss": step / 8, "count": step})
    writer.close()


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """An empty directory; without TensorBoard, whose import takes seconds."""
    monkeypatch.setattr(metrics, "_tensorboard", lambda workdir: None)
    return tmp_path


def steps(workdir):
    return [line["step"] for line in metrics.read(workdir / "metrics.jsonl")]


def test_one_line_per_call(workdir):
    write(workdir, [10, 20])
    text = (workdir / "metrics.jsonl").read_text()
    assert text == (
        '{"step": 10, "loss": 1.25, "count": 10}\n'
        '{"step": 20, "loss": 2.5, "count": 20}\n'
    )
    write(workdir, [30], first_step=20)
    assert (workdir / "metrics.jsonl").read_text().startswith(text)
    assert steps(workdir) == [10, 20, 30]


def test_lines_are_there_before_the_end(workdir):
    writer = metrics.Writer(workdir)
    writer.scalars(10, {"loss": 0.5})
    assert steps(workdir) == [10]
    writer.close()


def test_lines_after_the_checkpoint_are_dropped(workdir):
    write(workdir, [10, 20, 30, 40])
    write(workdir, [30, 40, 50], first_step=20)
    assert steps(workdir) == [10, 20, 30, 40, 50]
    write(workdir, [10])  # from the start again
    assert steps(workdir) == [10]
    assert [path.name for path in workdir.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_half_written_line_is_dropped(workdir, cut):
    write(workdir, [10, 20, 30])
    path = workdir / "metrics.jsonl"
    path.write_text(path.read_text()[:-cut])
    complete = [10, 20, 30] if cut == 1 else [10, 20]  # 1: only the newline is gone
    assert steps(workdir) == complete
    write(workdir, [30, 40], first_step=20)
    assert steps(workdir) == [10, 20, 30, 40]
    for line in path.read_text().splitlines():
        json.loads(line)


def test_no_file_has_no_lines(tmp_path):
    assert metrics.read(tmp_path / "metrics.jsonl") == []


# Rates


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until `clock[0]` is moved."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_throughput(clock):
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


def test_pause_does_not_count(clock):
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


# Lines of the terminal


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (0.4, "0:00"),
        (59.6, "1:00"),
        (83, "1:23"),
        (599, "9:59"),
        (3599.4, "59:59"),
        (3599.6, "1:00:00"),
        (3725, "1:02:05"),
        (360_000, "100:00:00"),
    ],
)
def test_duration(seconds, text):
    assert metrics.duration(seconds) == text


def test_step_line():
    values = dict(
        loss=0.54321,
        learning_rate=1.2e-3,
        images_per_second=3210.4,
        seconds_left=83,
        grad_norm=7.0,
        input_bound=0.1,
        unreadable=0,
    )
    line = metrics.step_line(120, 1000, values)
    expected = "step 120/1000  loss 0.5432  lr 1.20e-03  3,210 images/s  1:23 left"
    assert line == expected
    line = metrics.step_line(
        120, 1000, values | {"input_bound": 0.5, "unreadable": 1234}
    )
    assert line == (
        f"{expected}  (waiting for images in 50% of steps)  (1,234 unreadable images)"
    )


def test_eval_line():
    values = {"eval/loss": 0.54, "eval/count": 50_000, "eval/unreadable": 0}
    assert metrics.eval_line("step 120", values) == (
        "step 120  eval  loss 0.5400  (50,000 images)"
    )
    values |= {"eval/top1": 0.875, "eval/top5": 0.99999, "eval/count": 360}
    assert metrics.eval_line("step 120", values) == (
        "step 120  eval  loss 0.5400  top1 87.50 %  top5 100.00 %  (360 images)"
    )
    values["eval/unreadable"] = 2
    assert metrics.eval_line("step 120", values).endswith("(360 images, 2 unreadable)")


def test_best_of_the_checkpoints_that_are_kept(tmp_path):
    lines = [
        {"step": 10, "loss": 0.1},
        {"step": 10, "eval/loss": 0.5, "eval/top1": 0.9, "eval/count": 8},
        {"step": 20, "eval/loss": 0.4, "eval/top1": 0.7, "eval/count": 8},
        {"step": 30, "eval/loss": 0.9, "eval/top1": 0.8, "eval/count": 8},
    ]
    text = "".join(json.dumps(line | {"eval/unreadable": 0}) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    best = metrics.best_line(tmp_path, [20, 30])
    assert best == (
        "best checkpoint  step 30  eval  loss 0.9000  top1 80.00 %  (8 images)  "
        f"{tmp_path}/checkpoints/30"
    )
    assert "step 10 " in metrics.best_line(tmp_path, [10, 20, 30])
    (tmp_path / "metrics.jsonl").write_text(text.replace("eval/top1", "x"))
    assert "step 20 " in metrics.best_line(tmp_path, [10, 20, 30])  # the lowest loss
    assert metrics.best_line(tmp_path, []).startswith("no checkpoint of an evaluated")


def test_say_is_for_one_process(monkeypatch, capsys):
    for index in range(2):
        monkeypatch.setattr(metrics.jax, "process_index", lambda index=index: index)
        metrics.say(f"process {index}")
    assert capsys.readouterr().out == "process 0\n"


# Pictures


def test_reconstruction_panels():
    """Two channels with their own mean and std; half of one image is removed."""
    mean, std = (0.5, 0.25), (0.5, 0.25)
    original = np.array([0.0, 0.25, 0.75, 1.0])[None, None, :, None] * [1, 0.5]
    predicted = np.array([0.25, 0.5, 1.5, -1.0])[None, None, :, None] * [1, 0.5]
    removed = np.array([0, 1, 1, 0])[None, None, :, None]
    panels = figures.reconstruction_panels(
        (original - mean) / std, (predicted - mean) / std, removed, mean, std
    )
    assert panels.shape == (1, 4, 1, 4, 2)
    clipped = np.clip(predicted, 0, 1)
    expected = [
        original,
        np.where([[[[0], [1], [1], [0]]]], 0.5, original),
        clipped,
        np.stack(
            [original[0, 0, 0], clipped[0, 0, 1], clipped[0, 0, 2], original[0, 0, 3]]
        )[None, None],
    ]
    assert_allclose(panels[0], np.concatenate(expected), atol=1e-12)
    assert panels.min() == 0
    assert panels.max() == 1


def test_panels_of_values_out_of_range():
    images = np.full((1, 2, 2, 1), 3.0)
    removed = np.ones((1, 2, 2, 1))
    panels = figures.reconstruction_panels(images, -images, removed, (0.5,), (0.5,))
    assert panels[0, :, 0, 0, 0].tolist() == [1, 0.5, 0, 0]


def pixels_of(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize("channels", [1, 3])
def test_draw_run(workdir, channels):
    writer = metrics.Writer(workdir)
    for step in (10, 20):
        writer.scalars(step, {"loss": 1 / step})
        writer.scalars(step, {"eval/loss": 2 / step, "eval/top1": step / 40})
    writer.close()
    panels = np.random.RandomState(0).rand(2, 4, 16, 16, channels)
    drawn = figures.draw_run(workdir, 20, panels)
    paths = {
        "curves": workdir / "figures" / "curves.png",
        "reconstruction": workdir / "figures" / "reconstruction_0000020.png",
    }
    assert drawn.keys() == paths.keys()
    sizes = {"curves": (440, 704), "reconstruction": (407, 704)}  # 110 dots per inch
    for name, path in paths.items():
        assert drawn[name].dtype == np.uint8
        for pixels in (drawn[name], pixels_of(path)):
            assert pixels.shape == (*sizes[name], 3)
            assert pixels.std() > 10  # not blank


def test_draw_run_without_panels_or_lines(tmp_path):
    drawn = figures.draw_run(tmp_path, 0, None)
    assert list(drawn) == ["curves"]
    assert [p.name for p in (tmp_path / "figures").iterdir()] == ["curves.png"]


def test_pictures_show_the_panels(tmp_path):
    """Black, grey and white panels are where they belong."""
    panels = np.stack([np.full((8, 8, 1), level) for level in (0, 0.5, 1, 0)])[None]
    pixels = figures.draw_reconstructions(tmp_path / "x.png", panels, "title")
    row = pixels[pixels.shape[0] * 2 // 3].mean(-1)
    middles = row[[len(row) * (2 * k + 1) // 8 for k in range(4)]]
    assert_allclose(middles, [0, 127.5, 255, 0], atol=1)


# What a task counts


def classify(logits, labels, smoothing=0.0, train=False):
    config = ConfigDict(
        dict(
            task="classify",
            label_smoothing=smoothing,
            **dict(mixup=0.0, cutmix=0.0, random_erasing=0.0),
            model=dict(num_classes=np.shape(logits)[-1]),
            data=dict(mean=(0.0,), std=(1.0,), flip=False),
        )
    )
    batch = {"image": jnp.zeros((len(labels), 2, 2, 1)), "label": jnp.asarray(labels)}
    keys = jnp.zeros(len(labels))

    def model(images, sample_keys):
        assert sample_keys is None
        return jnp.asarray(logits, jnp.float32)

    values = tasks.classification(model, batch, keys, config, train)
    return {name: np.asarray(value) for name, value in values.items()}


def test_top1_and_top5():
    logits = np.tile(np.arange(8.0), (8, 1))  # class 7 scores best
    values = classify(logits, np.arange(8))
    assert values["top1"].tolist() == [0, 0, 0, 0, 0, 0, 0, 1]
    assert values["top5"].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]


def test_equal_scores_go_by_class_number():
    values = classify(np.zeros((8, 8)), np.arange(8))
    assert values["top1"].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert values["top5"].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]


def test_cross_entropy_is_not_smoothed_in_evaluation():
    logits = np.log([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])
    values = classify(logits, [0, 1], smoothing=0.3)
    assert_allclose(values["loss"], [-np.log(0.5), -np.log(0.2)], rtol=1e-6)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """gs://bucket is a directory, whose files can be written but not appended to."""

    class StandIn:
        def __getattr__(self, name):
            def call(path, *args, **kwargs):
                assert str(path).startswith("gs://")
                assert "a" not in args[:1]
                args = [here(x) if str(x).startswith("gs://") else x for x in args]
                return getattr(backend.os_backend, name)(here(path), *args, **kwargs)

            return call

    def here(path):
        return str(path).replace("gs://bucket", str(tmp_path))

    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", StandIn())
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    return tmp_path


def test_workdir_in_a_bucket(bucket):
    """Lines, pictures and the config of a run; from the start, and taken up again."""
    workdir = epath.Path("gs://bucket/run")
    metrics.prepare_workdir(workdir)
    for first, steps_done in ((0, [1, 2, 3]), (2, [3, 4])):
        writer = metrics.Writer(workdir, first)
        for step in steps_done:
            writer.scalars(step, {"loss": 1.0 / step})
            assert steps(bucket / "run")[-1] == step
        writer.close()
    assert steps(bucket / "run") == [1, 2, 3, 4]
    figures.draw_run(workdir, 4, None)
    assert (bucket / "run" / "figures" / "curves.png").stat().st_size > 1000
    assert not list(bucket.rglob(".writable*"))
    assert str(checkpoint.absolute("gs://bucket/run")) == "gs://bucket/run"
    (bucket / "run/checkpoints/7/params").mkdir(parents=True)
    (bucket / "run/checkpoints/12/params").mkdir(parents=True)
    steps_there = [path.name for path in checkpoint.find("gs://bucket/run")]
    assert steps_there == ["12", "7"]
