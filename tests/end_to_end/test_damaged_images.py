"""Tests of training with damaged images; numpy recomputes losses and accuracies."""

import io
import struct

import jax
import mini_runs
import numpy as np
import pytest
from numpy.testing import assert_allclose
from PIL import Image

from hivit_jax import inputs
from hivit_jax.data.order import permutation
from hivit_jax.main import main
from hivit_jax.models.classifier import Classifier
from hivit_jax.reporting import figures, metrics
from hivit_jax.train import train

pytestmark = pytest.mark.slow


SIZE, CLASSES, BATCH, STEPS = (32, 48), 7, 8, 8

TRAIN, VAL = 3 * CLASSES, 11  # numbers of images, not divisible by the batch size

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


# Split -> indices of damaged files
DAMAGED = {"train": (2, 9, 17), "val": (4,)}


# Step of a line in metrics.jsonl -> first step after the previous line
LINES = {3: 1, 4: 4, 5: 5, 6: 6, 8: 7}


def overrides_of(root):
    """Return the overrides of the run; the device resizes images on a canvas."""
    values = dict(data__dir=root, data__canvas=64, data__crop_scale=(1.0, 1.0))
    values |= dict(data__mean=MEAN, data__std=STD, data__flip=True, data__crop_pct=1.0)
    values |= dict(log_every=3, eval_every=4, checkpoint_every=5, total_steps=STEPS)
    values |= dict(data__max_unreadable=0.5, optimizer__warmup_epochs=3.0)
    return values | dict(
        data__name="folder",
        batch_size=BATCH,
        model__image_size=SIZE,
        model__num_classes=CLASSES,
        model__depths=(1, 1, 1),
        model__drop_path_rate=0.0,
    )


class Recorder:
    """Recorder of the network's inputs and outputs.

    Attributes:
      train, eval: [images, logits] of each batch.
      results: metrics of the last evaluation, as `train` returns them.
    """

    def __init__(self, workdir):
        self.workdir = workdir
        self.train, self.eval = [], []

    def record(self, call):
        """Wrap the method `call` of a classifier so that each call is recorded."""

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
    """Return (root, {split: (pixels, labels), ordered by file name})."""
    root, random = tmp_path_factory.mktemp("folder"), np.random.RandomState(0)
    files = {"train": ([], []), "val": ([], [])}
    for split, count in (("train", TRAIN), ("val", VAL)):
        labels = np.sort(np.arange(count) % CLASSES)
        for index, label in enumerate(labels):
            pixels = random.randint(0, 256, (*SIZE, 3)).astype(np.uint8)
            path = root / split / str(label) / f"{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
            if index in DAMAGED[split]:
                path.write_bytes(b"damaged")
            files[split][0].append(pixels)
            files[split][1].append(label)
    return root, {split: [*map(np.array, pair)] for split, pair in files.items()}


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory, single_device):
    """Return the `Recorder` of a finished run.

    With eight devices, their callbacks would wait for each other.
    """
    recorder = Recorder(tmp_path_factory.mktemp("run"))
    overrides = overrides_of(folder[0])
    config = mini_runs.classifier("photographs", **overrides)
    config.mixup = config.cutmix = 0.0
    config.random_erasing = 1.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(recorder.workdir / "cache"))
        patch.setattr(figures, "draw_run", lambda *_: None)
        patch.setattr(Classifier, "__call__", recorder.record(Classifier.__call__))
        recorder.results = train(config, recorder.workdir)
        jax.effects_barrier()
    return recorder


def order_of(seed, epochs, count):
    """Return the order of `count` training images in the first epochs, as indices."""
    return np.concatenate([permutation(seed, e, count) for e in range(epochs)])


def line_of(run, step, name):
    """Return the line of metrics.jsonl that contains a metric at a step."""
    lines = metrics.read(run.workdir / "metrics.jsonl")
    [found] = [line for line in lines if line["step"] == step and name in line]
    return found


def cross_entropy(logits, labels, smoothing):
    """Return the cross-entropy of each example with smoothed labels."""
    logits = np.float64(logits)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = np.eye(CLASSES)[labels] * (1 - smoothing) + smoothing / CLASSES
    return -(targets * log_probabilities).sum(-1)


def test_training_lines_exclude_unreadable_images_from_means(run, folder):
    """Loss, top-1, top-5 and learning rate of a line are the values of one step.

    The count of unreadable images includes all steps since the previous line.
    """
    labels, order = folder[1]["train"][1], order_of(0, 4, TRAIN)
    assert list(mini_runs.logged(run.workdir)) == list(LINES)
    peak = 0.016 * BATCH / 256
    is_damaged = np.isin(order, DAMAGED["train"])
    assert len(run.train) == STEPS
    for step, first in LINES.items():
        line = line_of(run, step, "loss")
        in_step = slice((step - 1) * BATCH, step * BATCH)
        logits, true_labels, valid = (
            run.train[step - 1][1],
            labels[order[in_step]],
            ~is_damaged[in_step],
        )
        losses = cross_entropy(logits, true_labels, 0.1)
        assert line["loss"] == pytest.approx(losses[valid].mean(), rel=1e-5)
        ranking = (-logits).argsort(-1)
        for k in (1, 5):
            is_correct = (ranking[:, :k] == true_labels[:, None]).any(-1)
            assert line[f"top{k}"] == pytest.approx(is_correct[valid].mean(), rel=1e-6)
        since_line = slice((first - 1) * BATCH, step * BATCH)
        assert line["unreadable"] == is_damaged[since_line].sum()
        # The three epochs of warmup are 7.875 steps.
        learning_rate = peak * (step - 1) / (3 * TRAIN / BATCH)
        assert line["learning_rate"] == pytest.approx(learning_rate, rel=1e-5)
    num_unreadable = sum(mini_runs.logged(run.workdir, "unreadable").values())
    assert num_unreadable == is_damaged[: STEPS * BATCH].sum()


def normalized(pixels):
    """Normalize pixels as the run does."""
    return (pixels / 255 - MEAN) / STD


def fraction_equal(images, others):
    """Return each image's fraction of pixels that are equal up to rounding."""
    return (np.abs(images - others) < 1e-4).all(-1).mean((1, 2))


def test_training_flips_and_erases_resized_images(run, folder):
    """Half of the images are flipped, and a rectangle of each image is erased."""
    pixels, order = normalized(folder[1]["train"][0]), order_of(0, 4, TRAIN)
    mirrored = []  # 1 for each flipped image, else 0
    for batch_index, (images, _) in enumerate(run.train):
        for image, index in zip(images, order[batch_index * BATCH :], strict=False):
            if index in DAMAGED["train"]:
                continue
            both_flips = np.stack([pixels[index], pixels[index, :, ::-1]])
            fractions = fraction_equal(image, both_flips)
            assert fractions.min() < 0.01
            # The rectangle covers 2 to 33 % of the image, before rounding.
            assert 0.6 < fractions.max() < 1 - 0.015
            changed = (np.abs(image - both_flips[fractions.argmax()]) > 1e-4).any(-1)
            rows, columns = np.where(changed.any(1))[0], np.where(changed.any(0))[0]
            box = np.ix_(*(np.arange(x[0], x[-1] + 1) for x in (rows, columns)))
            assert changed[box].all()
            mirrored.append(fractions.argmax())
    assert len(mirrored) > 50
    assert 0.3 < np.mean(mirrored) < 0.7


def readable_examples(folder):
    """Return pixels and labels of the readable validation images."""
    pixels, labels = folder[1]["val"]
    is_readable = ~np.isin(np.arange(VAL), DAMAGED["val"])
    return pixels[is_readable], labels[is_readable]


def test_evaluation_images_are_not_augmented(run, folder):
    """Images are in order, not flipped and not erased.

    Unreadable images and the padding of the last batch are black.
    """
    black = normalized(np.zeros((*SIZE, 3)))
    for evaluation in (run.eval[:2], run.eval[2:]):
        images = np.concatenate([images for images, _ in evaluation])
        expected = np.concatenate(
            [normalized(folder[1]["val"][0]), [black] * (2 * BATCH - VAL)]
        )
        expected[[*DAMAGED["val"]]] = black
        assert_allclose(images, expected, rtol=0, atol=1e-5)


def eval_results(evaluation, folder):
    """Compute loss, top-1 and top-5 of the readable images from the logits."""
    is_readable = ~np.isin(np.arange(VAL), DAMAGED["val"])
    logits = np.concatenate([logits for _, logits in evaluation])[:VAL][is_readable]
    labels = readable_examples(folder)[1]
    ranking = (-logits).argsort(-1)
    return {
        "eval/loss": cross_entropy(logits, labels, 0.0).mean(),
        "eval/top1": (ranking[:, 0] == labels).mean(),
        "eval/top5": (ranking[:, :5] == labels[:, None]).any(-1).mean(),
        "eval/count": VAL - len(DAMAGED["val"]),
        "eval/unreadable": len(DAMAGED["val"]),
    }


def test_evaluation_means_exclude_unreadable_images(run, folder):
    """The run is evaluated at steps 4 and 8, each time in two batches."""
    assert len(run.eval) == 2 * 2
    assert list(mini_runs.logged(run.workdir, "eval/count")) == [4, 8]
    for step, evaluation in ((4, run.eval[:2]), (8, run.eval[2:])):
        expected = eval_results(evaluation, folder)
        line = line_of(run, step, "eval/loss")
        assert line.keys() == {"step"} | expected.keys()
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=1e-6), name
    assert run.results == {k: v for k, v in line.items() if k != "step"}


def test_tensorboard_file_equals_metrics_jsonl(run):
    """The TensorBoard file of a classifier contains no images."""
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    [path] = run.workdir.glob("events.*")
    content, offset, scalars, images = path.read_bytes(), 0, [], {}
    # An event has 8 bytes of length, 4 of checksum, its content, and 4 of checksum.
    while offset < len(content):
        size = struct.unpack_from("<Q", content, offset)[0]
        event = Event.FromString(content[offset + 12 : offset + 12 + size])
        offset += 16 + size
        for value in event.summary.value:
            if value.HasField("image"):
                image = Image.open(io.BytesIO(value.image.encoded_image_string))
                images[value.tag, event.step] = np.asarray(image)
            else:
                scalars.append((value.tag, event.step, value.simple_value))
    # Texts and hyperparameters have step 0.
    scalars = [(tag, step, value) for tag, step, value in scalars if step]
    expected = [
        (name if "/" in name else f"train/{name}", line["step"], np.float32(value))
        for line in metrics.read(run.workdir / "metrics.jsonl")
        for name, value in line.items()
        if name != "step"
    ]
    assert sorted(scalars) == sorted(expected)
    assert images == {}  # no curves either, because TensorBoard plots the scalars


def test_eval_mode_prints_the_last_evaluation(
    run, folder, monkeypatch, tmp_path, capsys
):
    """``--mode eval`` ignores Mixup, CutMix, random erasing and label smoothing.

    The exit code is 4 if too many images are damaged or the pipeline skips images.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    values = overrides_of(folder[0]) | {
        "model__name": "hivit_base",
        "model__patch_size": 16,
        "model__in_channels": 3,
        "data__train_examples": 0,
    }
    values |= dict(mixup=0.8, cutmix=1.0, random_erasing=1.0, label_smoothing=0.3)
    recipe = mini_runs.ROOT / "configs" / "digits_finetune.py"
    flags = [f"--config.{k.replace('__', '.')}={v}" for k, v in values.items()]
    command = [f"--config={recipe}", f"--workdir={run.workdir}", "--mode=eval", *flags]
    with mini_runs.minimal_output():
        assert main(command) == 0
        results = run.results
        compiling, compiled, line = capsys.readouterr().out.splitlines()
        assert compiling == "compiling the evaluation step, which may take minutes ..."
        assert compiled.startswith("compiled in ")
        assert line == (
            f"step 8  eval  loss {results['eval/loss']:.4f}  "
            f"top1 {results['eval/top1']:.2%}  top5 {results['eval/top5']:.2%}  "
            "(10 images, 1 unreadable)"
        ).replace("%", " %")
        # One of 11 images is unreadable.
        assert main([*command, "--config.data.max_unreadable=0.09"]) == 4
        assert "1 image of folder could not be read, 9.09%" in capsys.readouterr().err
        all_batches = inputs.source_batches
        monkeypatch.setattr(
            inputs, "source_batches", lambda *args: [next(all_batches(*args))]
        )
        assert main(command) == 4
        expected = "evaluated 7 images and could not read 1; expected 11 in total"
        assert expected in capsys.readouterr().err
