"""Lines, rates, pictures of a run, and the metrics that a task counts."""

import io
import json
import struct
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes
from etils import epath
from etils.epath import backend, gpath
from numpy.testing import assert_allclose
from PIL import Image

from hivit_jax import inputs
from hivit_jax.checkpoints import read
from hivit_jax.data.order import permutation
from hivit_jax.main import main
from hivit_jax.models.classifier import Classifier
from hivit_jax.reporting import console, figures, metrics
from hivit_jax.tasks.classification import classification_metrics
from hivit_jax.train import train

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
    assert console.duration(seconds) == text


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
    line = console.step_line(120, 1000, values)
    expected = "step 120/1000  loss 0.5432  lr 1.20e-03  3,210 images/s  1:23 left"
    assert line == expected
    line = console.step_line(
        120, 1000, values | {"input_bound": 0.5, "unreadable": 1234}
    )
    assert line == (
        f"{expected}  (waiting for images in 50% of steps)  (1,234 unreadable images)"
    )


def test_eval_line():
    values = {"eval/loss": 0.54, "eval/count": 50_000, "eval/unreadable": 0}
    assert console.eval_line("step 120", values) == (
        "step 120  eval  loss 0.5400  (50,000 images)"
    )
    values |= {"eval/top1": 0.875, "eval/top5": 0.99999, "eval/count": 360}
    assert console.eval_line("step 120", values) == (
        "step 120  eval  loss 0.5400  top1 87.50 %  top5 100.00 %  (360 images)"
    )
    values["eval/unreadable"] = 2
    assert console.eval_line("step 120", values).endswith("(360 images, 2 unreadable)")


def test_best_of_the_checkpoints_that_are_kept(tmp_path):
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
    of_all = partial(console.best_line, tmp_path, [10, 20, 30])
    assert "step 10 " in of_all(("eval/top1", "max"))
    assert "step 20 " in of_all(("eval/top1", "min"))
    assert "step 20 " in of_all(("eval/loss", "min"))
    assert "step 30 " in of_all(("eval/loss", "max"))
    none = console.best_line(tmp_path, [], ("eval/loss", "min"))
    assert none.startswith("no checkpoint of an evaluated")


def test_only_one_process_logs(monkeypatch, capsys):
    for index in range(2):
        monkeypatch.setattr(console.jax, "process_index", lambda index=index: index)
        console.log(f"process {index}")
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
    pictures = {"reconstruction": figures.reconstructions(panels, "title")}
    drawn = figures.draw_run(workdir, 20, pictures)
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
    drawn = figures.draw_run(tmp_path, 0, {})
    assert list(drawn) == ["curves"]
    assert [p.name for p in (tmp_path / "figures").iterdir()] == ["curves.png"]


def test_pictures_show_the_panels(tmp_path):
    """Black, grey and white panels are where they belong."""
    panels = np.stack([np.full((8, 8, 1), level) for level in (0, 0.5, 1, 0)])[None]
    pixels = figures.reconstructions(panels, "title")
    row = pixels[pixels.shape[0] * 2 // 3].mean(-1)
    middles = row[[len(row) * (2 * k + 1) // 8 for k in range(4)]]
    assert_allclose(middles, [0, 127.5, 255, 0], atol=1)


# What a task counts


def classify(logits, labels):
    values = classification_metrics(
        jnp.asarray(logits, jnp.float32), jnp.asarray(labels)
    )
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
    values = classify(logits, [0, 1])
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
    figures.draw_run(workdir, 4, {})
    assert (bucket / "run" / "figures" / "curves.png").stat().st_size > 1000
    assert not list(bucket.rglob(".writable*"))
    assert str(read.absolute("gs://bucket/run")) == "gs://bucket/run"
    (bucket / "run/checkpoints/7/params").mkdir(parents=True)
    (bucket / "run/checkpoints/12/params").mkdir(parents=True)
    steps_there = [path.name for path in read.find_steps("gs://bucket/run")]
    assert steps_there == ["12", "7"]


# A run whose every number is counted again

SIZE, CLASSES, BATCH, STEPS = (32, 48), 7, 8, 8
TRAIN, VAL = 3 * CLASSES, 11  # 8 divides neither
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
DAMAGED = {"train": (2, 9, 17), "val": (4,)}
# Of 8 steps: where a line is written, and the first step that it is about.
LINES = {3: 1, 4: 4, 5: 5, 6: 6, 8: 7}


def overrides_of(root):
    """Sizes that 8 does not divide; a canvas, from which the device resizes."""
    flags = dict(data__dir=root, data__canvas=64, data__crop_scale=(1.0, 1.0))
    flags |= dict(data__mean=MEAN, data__std=STD, data__flip=True, data__crop_pct=1.0)
    flags |= dict(log_every=3, eval_every=4, checkpoint_every=5, total_steps=STEPS)
    flags |= dict(data__max_unreadable=0.5, optimizer__warmup_epochs=3.0)
    return flags | dict(
        data__name="folder",
        batch_size=BATCH,
        model__image_size=SIZE,
        model__num_classes=CLASSES,
        model__depths=(1, 1, 1),
        model__drop_path_rate=0.0,
    )


class Seen:
    """What the network was given and put out, batch by batch, in training and in
    evaluation; a run's workdir and its pictures.
    """

    def __init__(self, workdir):
        self.workdir, self.pictures = workdir, {}
        self.train, self.eval = [], []

    def draw(self, workdir, step, panels):
        random = np.random.RandomState(step)
        self.pictures[step] = random.randint(0, 256, (4, 6, 3)).astype(np.uint8)
        return {"curves": self.pictures[step]}

    def recorded(self, call):
        def run(model, images, *, drop_path_keys=None):
            logits = call(model, images, drop_path_keys=drop_path_keys)
            batches = self.eval if drop_path_keys is None else self.train
            jax.debug.callback(
                lambda *xs: batches.append([*map(np.array, xs)]), images, logits
            )
            return logits

        return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """(root, split -> pixels and labels of the files in order)."""
    root, random = tmp_path_factory.mktemp("folder"), np.random.RandomState(0)
    files = {"train": ([], []), "val": ([], [])}
    for split, count in (("train", TRAIN), ("val", VAL)):
        labels = np.sort(np.arange(count) % CLASSES)
        for number, label in enumerate(labels):
            pixels = random.randint(0, 256, (*SIZE, 3)).astype(np.uint8)
            path = root / split / str(label) / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
            if number in DAMAGED[split]:
                path.write_bytes(b"damaged")
            files[split][0].append(pixels)
            files[split][1].append(label)
    return root, {split: [*map(np.array, each)] for split, each in files.items()}


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    seen, devices = Seen(tmp_path_factory.mktemp("run")), jax.devices()
    overrides = overrides_of(folder[0])
    config = recipes.classifier("photographs", **overrides)
    config.mixup = config.cutmix = 0.0
    config.random_erasing = 1.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(seen.workdir / "cache"))
        patch.setattr(figures, "draw_run", seen.draw)
        patch.setattr(Classifier, "__call__", seen.recorded(Classifier.__call__))
        # Without this the callbacks of eight devices wait for each other.
        patch.setattr(jax, "devices", lambda: devices[:1])
        name = "jax_disable_most_optimizations"
        before = jax.config.values[name]
        jax.config.update(name, True)
        try:
            seen.results = train(config, seen.workdir)
            jax.effects_barrier()
        finally:
            jax.config.update(name, before)
    return seen


def order_of(seed, epochs, count):
    """Indices of the training images, position by position."""
    return np.concatenate([permutation(seed, e, count) for e in range(epochs)])


def line_of(run, step, name):
    lines = metrics.read(run.workdir / "metrics.jsonl")
    [found] = [line for line in lines if line["step"] == step and name in line]
    return found


def cross_entropy(logits, labels, smoothing):
    logits = np.float64(logits)
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = np.eye(CLASSES)[labels] * (1 - smoothing) + smoothing / CLASSES
    return -(targets * log).sum(-1)


def test_lines_are_of_the_newest_step(run, folder):
    """Loss, top-1, top-5 and learning rate, every third step; unreadable images are
    those of all steps since the line before, and have no part in the means.
    """
    labels, order = folder[1]["train"][1], order_of(0, 4, TRAIN)
    assert list(recipes.lines(run.workdir)) == list(LINES)
    peak = 0.016 * BATCH / 256
    bad = np.isin(order, DAMAGED["train"])
    assert len(run.train) == STEPS
    for step, first in LINES.items():
        line = line_of(run, step, "loss")
        here = slice((step - 1) * BATCH, step * BATCH)
        logits, true, good = run.train[step - 1][1], labels[order[here]], ~bad[here]
        losses = cross_entropy(logits, true, 0.1)
        assert line["loss"] == pytest.approx(losses[good].mean(), rel=1e-5)
        rank = (-logits).argsort(-1)
        for k in (1, 5):
            hit = (rank[:, :k] == true[:, None]).any(-1)
            assert line[f"top{k}"] == pytest.approx(hit[good].mean(), rel=1e-6)
        assert line["unreadable"] == bad[(first - 1) * BATCH : step * BATCH].sum()
        # The three epochs of warmup are 7.875 steps.
        rate = peak * (step - 1) / (3 * TRAIN / BATCH)
        assert line["learning_rate"] == pytest.approx(rate, rel=1e-5)
    assert sum(recipes.lines(run.workdir, "unreadable").values()) == bad[:64].sum()


def normalized(pixels):
    return (pixels / 255 - MEAN) / STD


def same(images, others):
    """Share of pixels that are the same but for rounding, for each image."""
    return (np.abs(images - others) < 1e-4).all(-1).mean((1, 2))


def test_training_flips_and_erases_what_the_device_resizes(run, folder):
    """Half of the images are mirrored, and in all of them one rectangle is noise."""
    pixels, order = normalized(folder[1]["train"][0]), order_of(0, 4, TRAIN)
    mirrored = []
    for step, (images, _) in enumerate(run.train):
        for image, index in zip(images, order[step * BATCH :], strict=False):
            if index in DAMAGED["train"]:
                continue
            either = np.stack([pixels[index], pixels[index, :, ::-1]])
            shares = same(image, either)
            assert shares.min() < 0.01
            assert 0.6 < shares.max() < 1 - 0.015
            changed = (np.abs(image - either[shares.argmax()]) > 1e-4).any(-1)
            rows, columns = np.where(changed.any(1))[0], np.where(changed.any(0))[0]
            box = np.ix_(*(np.arange(x[0], x[-1] + 1) for x in (rows, columns)))
            assert changed[box].all()
            mirrored.append(shares.argmax())
    assert len(mirrored) > 50
    assert 0.3 < np.mean(mirrored) < 0.7


def readable(folder):
    """Pixels and labels of the validation images that can be read."""
    pixels, labels = folder[1]["val"]
    good = ~np.isin(np.arange(VAL), DAMAGED["val"])
    return pixels[good], labels[good]


def test_evaluation_sees_files_as_they_are(run, folder):
    """In order; neither mirrored nor erased; the last batch filled up."""
    black = normalized(np.zeros((*SIZE, 3)))
    for evaluation in (run.eval[:2], run.eval[2:]):
        images = np.concatenate([images for images, _ in evaluation])
        expected = np.concatenate(
            [normalized(folder[1]["val"][0]), [black] * (2 * BATCH - VAL)]
        )
        expected[[*DAMAGED["val"]]] = black
        assert_allclose(images, expected, rtol=0, atol=1e-5)


def eval_results(evaluation, folder):
    """Loss, top-1 and top-5 of the readable images, from the logits; no smoothing."""
    good = ~np.isin(np.arange(VAL), DAMAGED["val"])
    logits = np.concatenate([logits for _, logits in evaluation])[:VAL][good]
    labels = readable(folder)[1]
    rank = (-logits).argsort(-1)
    return {
        "eval/loss": cross_entropy(logits, labels, 0.0).mean(),
        "eval/top1": (rank[:, 0] == labels).mean(),
        "eval/top5": (rank[:, :5] == labels[:, None]).any(-1).mean(),
        "eval/count": VAL - len(DAMAGED["val"]),
        "eval/unreadable": len(DAMAGED["val"]),
    }


def test_means_of_an_evaluation(run, folder):
    """Over readable images alone; every fourth step and the last."""
    assert len(run.eval) == 2 * 2
    assert list(recipes.lines(run.workdir, "eval/count")) == [4, 8]
    for step, evaluation in ((4, run.eval[:2]), (8, run.eval[2:])):
        expected = eval_results(evaluation, folder)
        line = line_of(run, step, "eval/loss")
        assert line.keys() == {"step"} | expected.keys()
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=1e-6), name
    assert run.results == {k: v for k, v in line.items() if k != "step"}


def test_tensorboard(run):
    """Values, steps and names are those of metrics.jsonl; pictures those drawn."""
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    [path] = run.workdir.glob("events.*")
    content, at, scalars, pictures = path.read_bytes(), 0, [], {}
    while at < len(content):  # length, its CRC, an event, its CRC
        size = struct.unpack_from("<Q", content, at)[0]
        event = Event.FromString(content[at + 12 : at + 12 + size])
        at += 16 + size
        for value in event.summary.value:
            if value.HasField("image"):
                image = Image.open(io.BytesIO(value.image.encoded_image_string))
                pictures[value.tag, event.step] = np.asarray(image)
            else:
                scalars.append((value.tag, event.step, value.simple_value))
    expected = [
        (name, line["step"], np.float32(value))
        for line in metrics.read(run.workdir / "metrics.jsonl")
        for name, value in line.items()
        if name != "step"
    ]
    assert sorted(scalars) == sorted(expected)
    assert pictures.keys() == {("curves", 4), ("curves", 8)}
    for (_, step), pixels in pictures.items():
        np.testing.assert_array_equal(pixels, run.pictures[step])


def test_mode_eval_of_damaged_files(run, folder, monkeypatch, tmp_path, capsys):
    """The same numbers, whatever training would mix, erase and smooth; code 4 where
    more are damaged than may be, or the pipeline leaves images out.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    values = overrides_of(folder[0]) | {
        "model__name": "hivit_base",
        "model__patch_size": 16,
        "model__in_channels": 3,
        "data__train_examples": 0,
    }
    values |= dict(mixup=0.8, cutmix=1.0, random_erasing=1.0, label_smoothing=0.3)
    recipe = recipes.ROOT / "configs" / "digits_finetune.py"
    flags = [f"--config.{k.replace('__', '.')}={v}" for k, v in values.items()]
    command = [f"--config={recipe}", f"--workdir={run.workdir}", "--mode=eval", *flags]
    with recipes.quick():
        assert main(command) == 0
        found = run.results
        assert capsys.readouterr().out == (
            f"step 8  eval  loss {found['eval/loss']:.4f}  "
            f"top1 {found['eval/top1']:.2%}  top5 {found['eval/top5']:.2%}  "
            "(10 images, 1 unreadable)\n"
        ).replace("%", " %")
        assert main([*command, "--config.data.max_unreadable=0.09"]) == 4  # 1 of 11
        assert "1 images of folder could not be read, 9.09%" in capsys.readouterr().err
        whole = inputs.eval_batches
        monkeypatch.setattr(inputs, "eval_batches", lambda c: [next(whole(c))])
        assert main(command) == 4
        expected = "evaluated 7 images and could not read 1; expected 11 in total"
        assert expected in capsys.readouterr().err
