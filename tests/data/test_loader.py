"""Tests of batches.

Each epoch contains every example once, a run can start at any step, and batches do not
depend on the number of processes and threads.
"""

import math
import os
import shutil
import threading

import jax
import numpy as np
import pytest
from datasets import assert_batches_equal, digits_config, folder_config
from numpy.testing import assert_array_equal

from hivit_jax import inputs
from hivit_jax.data.loader import Loader
from hivit_jax.data.order import permutation
from hivit_jax.data.sources import registry
from hivit_jax.data.sources.digits import Digits
from hivit_jax.errors import DataError


@pytest.mark.slow
def test_training_batches_follow_the_permutations_of_the_epochs():
    source, cfg = Digits("train"), digits_config()
    # 16 x 96 = 1,536 examples: one epoch of 1,437 images and 99 of the next
    batches = list(inputs.train_batches(cfg, 0, 16))
    assert len(batches) == 16
    order = np.concatenate([permutation(0, 0, 1437), permutation(0, 1, 1437)])
    for batch_index, batch in enumerate(batches):
        indices = order[batch_index * 96 : (batch_index + 1) * 96]
        assert batch["image"].shape == (96, 16, 16, 1)
        assert batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32
        assert_array_equal(batch["label"], source.labels[indices])
        assert batch["weight"].dtype == np.float32
        assert (batch["weight"] == 1).all()
        # Images are upscaled from 8x8 to 16x16, so the mean of each 2x2 block is close
        # to the original pixel.
        small = batch["image"].reshape(96, 8, 2, 8, 2).mean((2, 4))
        assert np.abs(small - source.pixels()[indices]).mean() < 12
    assert_batches_equal(batches, inputs.train_batches(cfg, 0, 16))


@pytest.mark.slow
@pytest.mark.parametrize("crop_scale", [(1.0, 1.0), (0.3, 1.0)])
def test_run_can_start_at_any_step(crop_scale):
    """Batches 13 to 17 cross an epoch boundary."""
    cfg = digits_config(data__crop_scale=crop_scale)
    from_step_0 = list(inputs.train_batches(cfg, 0, 18))
    assert_batches_equal(from_step_0[13:], inputs.train_batches(cfg, 13, 18))


@pytest.mark.parametrize("batch_size", [90, 96, 360, 512])
def test_evaluation_batches_hold_every_image_once(batch_size):
    source = Digits("test")
    cfg = digits_config(
        batch_size=batch_size, model__image_size=8, data__crop_scale=(0.3, 0.4)
    )
    batches = list(inputs.eval_batches(cfg))
    assert len(batches) == math.ceil(360 / batch_size)
    for batch in batches:
        assert batch["image"].shape == (batch_size, 8, 8, 1)
        assert batch["weight"].dtype == np.float32
    image, label, weight = (
        np.concatenate([batch[key] for batch in batches])
        for key in ("image", "label", "weight")
    )
    assert_array_equal(weight, np.arange(len(weight)) < 360)
    # Evaluation images are in order and are not cropped.
    assert_array_equal(image[:360, ..., 0], source.pixels())
    assert_array_equal(label[:360], source.labels)
    assert (image[360:] == 0).all()
    assert (label[360:] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 4])
@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_process_batches_concatenate_to_the_global_batch(
    monkeypatch, num_processes, name
):
    train_examples = 1000 if name == "synthetic" else 0
    overrides = dict(data__crop_scale=(0.3, 1.0), data__train_examples=train_examples)
    cfg = digits_config(data__name=name, **overrides)

    def batches():
        return [*inputs.train_batches(cfg, 14, 16), *inputs.eval_batches(cfg)]

    expected, per_process = batches(), []
    monkeypatch.setattr(jax, "process_count", lambda: num_processes)
    for index in range(num_processes):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        per_process.append(batches())
    sizes = {len(batch["label"]) for part in per_process for batch in part}
    assert sizes == {96 // num_processes}
    joined = [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for parts in zip(*per_process, strict=True)
    ]
    assert_batches_equal(joined, expected)


@pytest.mark.parametrize("workers", [1, 5])
def test_batches_do_not_depend_on_threads(folder, workers):
    """Batches are equal for any number of threads and any first step."""
    batches = list(inputs.train_batches(folder_config(folder), 0, 12))
    cfg = folder_config(folder, data__workers=workers)
    assert_batches_equal(batches, inputs.train_batches(cfg, 0, 12))
    assert_batches_equal(batches[7:], inputs.train_batches(cfg, 7, 12))


@pytest.mark.parametrize(("workers", "core_ids"), [(1, {0, 1, 2}), (0, {5})])
def test_data_workers_sets_the_number_of_threads(
    folder, monkeypatch, workers, core_ids
):
    """With data.workers=0, there is one thread per core."""
    monkeypatch.setattr(
        os, "sched_getaffinity", lambda process: core_ids, raising=False
    )
    cfg = folder_config(folder, data__workers=workers, batch_size=40)
    batches = inputs.train_batches(cfg, 0, 100)
    next(batches)
    threads = [
        thread for thread in threading.enumerate() if thread.name.startswith("read")
    ]
    assert len(threads) == 1
    batches.close()


def test_closing_the_iterator_ends_the_threads(folder):
    batches = inputs.train_batches(folder_config(folder, data__workers=3), 0, 1000)
    next(batches)
    assert any(thread.name.startswith("read") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("read") for thread in threading.enumerate())


@pytest.fixture
def damaged(folder, tmp_path):
    """Return a copy of the folder with damaged files, and the paths of these files.

    Three training files and one validation file are damaged. One of the training files
    is a dangling link.
    """
    root = tmp_path / "damaged"
    shutil.copytree(folder, root)
    files = sorted(root.glob("train/*/*")), sorted(root.glob("val/*/*"))
    broken = [files[0][3], files[0][17], files[0][30], files[1][5]]
    broken[0].write_bytes(broken[0].read_bytes()[:-30])
    broken[1].write_bytes(b"")
    broken[2].unlink()
    broken[2].symlink_to("nowhere")
    broken[3].write_bytes(b"not an image")
    return root, broken


def test_unreadable_images_keep_their_positions(folder, damaged, capfd):
    root, broken = damaged
    intact = list(inputs.train_batches(folder_config(folder), 0, 10))
    batches = list(inputs.train_batches(folder_config(root), 0, 10))
    num_unreadable = 0
    for batch, intact_batch in zip(batches, intact, strict=True):
        unreadable = batch["unreadable"] == 1
        num_unreadable += unreadable.sum()
        assert_array_equal(batch["weight"], 1 - batch["unreadable"])
        assert (batch["image"][unreadable] == 0).all()
        assert (batch["label"][unreadable] == 0).all()
        for key in ("image", "label", "box"):
            assert_array_equal(batch[key][~unreadable], intact_batch[key][~unreadable])
    # 10 batches of 8 read each of the 40 training files twice.
    assert num_unreadable == 2 * 3
    err = capfd.readouterr().err
    for path in broken[:3]:
        assert err.count(f"cannot read {path}: ") == 1
    assert err.count("cannot read") == 3  # one line per file
    assert "truncated" in err
    evaluation = list(inputs.eval_batches(folder_config(root)))
    assert sum(batch["weight"].sum() for batch in evaluation) == 10
    assert sum(batch["unreadable"].sum() for batch in evaluation) == 1
    assert capfd.readouterr().err.count(str(broken[3])) == 1


@pytest.mark.parametrize(
    ("multi_label", "label", "message"),
    [
        (False, [1, 0], r"one label per image, found \[1, 0\]; set data.multi_label"),
        (True, [0, 2], r"of length at most 10, found \[0, 2\]; multi_hot in"),
        (True, 2, r"of length at most 10, found 2; multi_hot in"),
    ],
)
def test_label_of_wrong_form_is_an_error(
    folder, monkeypatch, multi_label, label, message
):
    """A label must be one number or, with data.multi_label, a vector of 0 and 1."""
    config = folder_config(folder)
    source = registry.open_source(config.data, "train")
    example = source.sample(0) | {"label": label}
    monkeypatch.setattr(source, "sample", lambda index: example)
    transform = inputs.make_task(config, "train").transform(train=True)
    transform._num_labels = 10 * multi_label
    loader = Loader(source, transform, 0, 1)
    batch = loader.empty_batch(0, 1)
    with pytest.raises(DataError, match=message):
        loader.fill(batch, 0, 0, np.zeros(1, int), np.zeros(1, int))


@pytest.mark.parametrize("wrong", [10, -1])
def test_label_outside_the_classes_is_an_error(folder, monkeypatch, wrong):
    cfg = folder_config(folder)
    source = registry.open_source(cfg.data, "train")
    monkeypatch.setattr(source, "labels", np.where(source.labels == 3, wrong, 0))
    message = rf"coffee/\d+.JPEG: expected .* 0 to 9, found {wrong}; .*num_classes=10"
    with pytest.raises(DataError, match=message):
        list(inputs.train_batches(cfg, 0, 5))
    with cfg.unlocked():
        # Without num_classes, as in a masked autoencoder, labels are not checked.
        cfg.model.num_classes = None
    labels = [batch["label"] for batch in inputs.train_batches(cfg, 0, 5)]
    assert set(np.concatenate(labels)) == {0, wrong}
