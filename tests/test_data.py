"""Order of samples, sources, batches."""

import io
import math
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image
from sklearn.datasets import load_digits

from hivit_jax import config
from hivit_jax.data import pipeline, sources
from hivit_jax.data.pipeline import permutation, samples_at
from hivit_jax.errors import ConfigError, DataError

RECIPE = Path(__file__).parents[1] / "configs" / "digits_mae.py"
IMAGENET = 1_281_167


def load(**overrides):
    """The digits recipe with everything that these tests depend on set."""
    values = {
        "seed": 0,
        "batch_size": 96,
        "model.image_size": 16,
        "model.in_channels": 1,
        "model.num_classes": 10,
        "data.name": "digits",
        "data.train_examples": 0,
        "data.subset": 0,
        "data.crop_scale": (1.0, 1.0),
    } | {key.replace("__", "."): value for key, value in overrides.items()}
    return config.load(str(RECIPE), [f"--config.{k}={v}" for k, v in values.items()])


def assert_batches_equal(ones, others):
    ones, others = list(ones), list(others)
    assert len(ones) == len(others) > 0
    for one, other in zip(ones, others, strict=True):
        assert one.keys() == other.keys() == {"image", "label", "weight"}
        for key, value in one.items():
            assert value.dtype == other[key].dtype
            assert_array_equal(value, other[key])


# Order


def test_every_epoch_is_a_permutation_of_its_own():
    orders = [permutation(seed, epoch, 1437) for seed in (0, 1) for epoch in range(3)]
    orders.append(permutation(0, 1_000_000, 1437))
    for order in orders:
        assert order.dtype == np.int64
        assert_array_equal(np.sort(order), np.arange(1437))
    for i, order in enumerate(orders):
        for other in orders[:i]:
            assert (order == other).mean() < 0.01  # 1 in 1437 by chance


def test_order_is_frozen():
    """A saved run goes on in this order, whatever the version of numpy."""
    first = [500, 469, 1156, 606, 909, 555, 794, 1425]
    assert permutation(0, 0, 1437)[:8].tolist() == first
    permutation.cache_clear()
    assert permutation(0, 0, 1437)[:8].tolist() == first


def test_positions_across_an_epoch_boundary():
    n = 10
    stream = np.concatenate([permutation(3, epoch, n) for epoch in range(4)])
    indices, epochs = samples_at(np.arange(40), n, 3)
    assert_array_equal(indices, stream)
    assert_array_equal(epochs, np.repeat(np.arange(4), n))
    indices, epochs = samples_at(np.arange(7, 24), n, 3)
    assert_array_equal(indices, stream[7:24])
    assert epochs.tolist() == [0] * 3 + [1] * 10 + [2] * 4
    # Any places, in any order: a share of a batch, say.
    places = np.array([29, 3, 10, 9, 30])
    assert_array_equal(samples_at(places, n, 3)[0], stream[places])


def test_jump_to_a_late_step(monkeypatch):
    """Costs the epochs of that batch alone, and gives what slicing the run gives."""
    needed = []

    def counted(seed, epoch, n):
        needed.append((seed, epoch, n))
        return permutation(seed, epoch, n)

    monkeypatch.setattr(pipeline, "permutation", counted)
    start = 100_000 * 4096
    epoch, place = divmod(start, IMAGENET)
    indices, epochs = samples_at(np.arange(start, start + 4096), IMAGENET, 0)
    assert needed == [(0, epoch, IMAGENET)]
    assert_array_equal(indices, permutation(0, epoch, IMAGENET)[place : place + 4096])
    assert (epochs == epoch).all()
    assert epoch == 319

    boundary = 320 * IMAGENET
    indices, epochs = samples_at(np.arange(boundary - 5, boundary + 3), IMAGENET, 0)
    assert needed[1:] == [(0, 319, IMAGENET), (0, 320, IMAGENET)]
    assert indices[:5].tolist() == permutation(0, 319, IMAGENET)[-5:].tolist()
    assert indices[5:].tolist() == permutation(0, 320, IMAGENET)[:3].tolist()
    assert epochs.tolist() == [319] * 5 + [320] * 3


# Sources


def scans(source):
    """Encoded images of a source as a set of bytes, and their pixels."""
    encoded = source.fetch(np.arange(len(source)))
    return [np.asarray(Image.open(io.BytesIO(png))) for png in encoded]


def test_digits_splits():
    digits = load_digits()
    known = {}
    for image, label in zip(digits.images, digits.target, strict=True):
        known.setdefault(np.round(image * 255 / 16).astype(np.uint8).tobytes(), label)
    train, test = sources.Digits("train"), sources.Digits("test")
    assert (len(train), len(test)) == (1437, 360)
    found = []
    for source in (train, test):
        assert source.labels.dtype == np.int32
        assert source.labels.shape == (len(source),)
        images = scans(source)
        assert_array_equal(images, source.pixels())
        for image, label in zip(images, source.labels, strict=True):
            assert image.shape == (8, 8)
            assert image.dtype == np.uint8
            assert known[image.tobytes()] == label
        found.append({image.tobytes() for image in images})
    # All 1,797 scans differ, so no image is in both splits.
    assert not found[0] & found[1]
    assert len(found[0] | found[1]) == len(known) == 1797
    # The split never moves.
    assert test.labels[:12].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5, 2, 8]
    assert np.bincount(test.labels).tolist() == COUNTS


COUNTS = [27, 35, 36, 29, 30, 40, 44, 39, 39, 41]


def test_digits_as_png():
    source = sources.Digits("train")
    png = source.fetch(np.array([5, 3]))
    assert [data[:8] for data in png] == [b"\x89PNG\r\n\x1a\n"] * 2
    assert png == [source.fetch(np.array([i]))[0] for i in (5, 3)]


def test_few_training_examples():
    whole = {image.tobytes() for image in sources.Digits("train").pixels()}
    found = []
    for subset in (0, 1, 0):
        source = sources.Digits("train", train_examples=100, subset=subset)
        assert np.bincount(source.labels).tolist() == [10] * 10
        found.append([image.tobytes() for image in source.pixels()])
        assert len(set(found[-1])) == 100
        assert set(found[-1]) <= whole
    assert found[0] == found[2]
    assert set(found[0]) != set(found[1])
    test = sources.Digits("test", train_examples=100, subset=1)
    assert_array_equal(test.pixels(), sources.Digits("test").pixels())


def test_larger_subset_holds_the_smaller():
    small, large = (
        {image.tobytes() for image in sources.Digits("train", n, 2).pixels()}
        for n in (100, 1000)
    )
    assert len(large) == 1000
    assert small < large


@pytest.mark.parametrize("examples", [5, 101, 1010, 1437])
def test_training_examples_that_cannot_be_shared(examples):
    with pytest.raises(ConfigError, match=f"train_examples={examples}: .* 10 classes"):
        sources.Digits("train", train_examples=examples)


def test_number_of_images_without_opening():
    assert sources.num_examples({"name": "imagenet2012"}, "train") == IMAGENET
    assert sources.num_examples({"name": "imagenet2012"}, "test") == 50_000
    data = {"name": "digits", "train_examples": 100, "subset": 0}
    assert sources.num_examples(data, "train") == 100
    assert sources.num_examples(data, "test") == 360


def test_unknown_dataset():
    for name, message in [
        ("digit", "unknown data.name 'digit'; did you mean 'digits'"),
        ("imagenet", "did you mean 'imagenet2012'"),
        ("xyz", "known: digits, synthetic, imagenet2012"),
    ]:
        with pytest.raises(ConfigError, match=message):
            next(pipeline.train_batches(load(data__name=name), 0, 1))


def test_dataset_that_cannot_be_read():
    for batches in (
        lambda config: pipeline.train_batches(config, 0, 1),
        pipeline.eval_batches,
    ):
        with pytest.raises(DataError, match="imagenet2012"):
            next(batches(load(data__name="imagenet2012")))


def test_more_classes_than_the_model_has():
    for split in (lambda c: pipeline.train_batches(c, 0, 1), pipeline.eval_batches):
        with pytest.raises(ConfigError, match="num_classes=9, but digits .* up to 9"):
            next(split(load(model__num_classes=9)))


# Batches


def test_training_batches():
    source, cfg = sources.Digits("train"), load()
    batches = list(pipeline.train_batches(cfg, 0, 16))  # 1,536 of 1,437 images
    assert len(batches) == 16
    order = np.concatenate([permutation(0, 0, 1437), permutation(0, 1, 1437)])
    for step, batch in enumerate(batches):
        places = order[step * 96 : (step + 1) * 96]
        assert batch["image"].shape == (96, 16, 16, 1)
        assert batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32
        assert_array_equal(batch["label"], source.labels[places])
        assert batch["weight"].dtype == np.float32
        assert (batch["weight"] == 1).all()
        # Twice the size, yet the same picture: four pixels average to about one.
        small = batch["image"].reshape(96, 8, 2, 8, 2).mean((2, 4))
        assert np.abs(small - source.pixels()[places]).mean() < 12
    assert_batches_equal(batches, pipeline.train_batches(cfg, 0, 16))


def test_images_of_their_own_size_are_unchanged():
    cfg = load(model__image_size=8)
    batch = next(pipeline.train_batches(cfg, 0, 1))
    expected = sources.Digits("train").pixels()[permutation(0, 0, 1437)[:96]]
    assert_array_equal(batch["image"][..., 0], expected)


def test_other_image_shapes():
    colour = dict(model__in_channels=3, data__mean=(0.5,) * 3, data__std=(0.5,) * 3)
    cfg = load(model__image_size=8, **colour)
    batch = next(pipeline.train_batches(cfg, 0, 1))
    grey = next(pipeline.train_batches(load(model__image_size=8), 0, 1))
    assert_array_equal(batch["image"], np.repeat(grey["image"], 3, -1))
    cfg = load(model__image_size=(8, 24), **colour)
    assert pipeline.image_shape(cfg) == (8, 24, 3)
    assert next(pipeline.train_batches(cfg, 0, 1))["image"].shape == (96, 8, 24, 3)


@pytest.mark.parametrize("crop_scale", [(1.0, 1.0), (0.3, 1.0)])
def test_run_can_start_at_any_step(crop_scale):
    """Steps 13 to 17, across the end of the first epoch, from a run that began at 0."""
    cfg = load(data__crop_scale=crop_scale)
    whole = list(pipeline.train_batches(cfg, 0, 18))
    assert_batches_equal(whole[13:], pipeline.train_batches(cfg, 13, 18))


def test_crops_differ_by_image_epoch_and_seed():
    cfg = load(data__crop_scale=(0.3, 1.0), data__train_examples=100, batch_size=100)
    first, second = pipeline.train_batches(cfg, 0, 2)
    plain = next(
        pipeline.train_batches(load(data__train_examples=100, batch_size=100), 0, 1)
    )
    assert_array_equal(first["label"], plain["label"])
    assert (first["image"] != plain["image"]).any((1, 2, 3)).mean() > 0.9
    places = [np.argsort(permutation(0, epoch, 100)) for epoch in (0, 1)]
    one, other = first["image"][places[0]], second["image"][places[1]]
    assert_array_equal(first["label"][places[0]], second["label"][places[1]])
    assert (one != other).any((1, 2, 3)).mean() > 0.9
    cfg.seed = 1
    seeded = next(pipeline.train_batches(cfg, 0, 1))
    third = seeded["image"][np.argsort(permutation(1, 0, 100))]
    assert (one != third).any((1, 2, 3)).mean() > 0.9


@pytest.mark.parametrize("batch_size", [90, 96, 360, 512])
def test_evaluation_batches_hold_every_image_once(batch_size):
    source = sources.Digits("test")
    cfg = load(batch_size=batch_size, model__image_size=8, data__crop_scale=(0.3, 0.4))
    batches = list(pipeline.eval_batches(cfg))
    assert len(batches) == math.ceil(360 / batch_size)
    for batch in batches:
        assert batch["image"].shape == (batch_size, 8, 8, 1)
        assert batch["weight"].dtype == np.float32
    image, label, weight = (
        np.concatenate([batch[key] for batch in batches])
        for key in ("image", "label", "weight")
    )
    assert_array_equal(weight, np.arange(len(weight)) < 360)
    # In order, and never cropped.
    assert_array_equal(image[:360, ..., 0], source.pixels())
    assert_array_equal(label[:360], source.labels)
    assert (image[360:, ..., 0] == source.pixels()[0]).all()
    assert (label[360:] == source.labels[0]).all()


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_shares_of_processes_make_the_batch(monkeypatch, processes, name):
    examples = 1000 if name == "synthetic" else 0
    cfg = load(
        data__name=name, data__crop_scale=(0.3, 1.0), data__train_examples=examples
    )

    def batches():
        return [*pipeline.train_batches(cfg, 14, 16), *pipeline.eval_batches(cfg)]

    whole, shares = batches(), []
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    for index in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        shares.append(batches())
    assert {len(b["label"]) for share in shares for b in share} == {96 // processes}
    joined = [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for parts in zip(*shares, strict=True)
    ]
    assert_batches_equal(joined, whole)


def test_synthetic_images_need_no_tensorflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # importing it fails
    cfg = load(data__name="synthetic", data__train_examples=1000)
    batches = list(pipeline.train_batches(cfg, 0, 12))
    assert_batches_equal(batches, pipeline.train_batches(cfg, 0, 12))
    assert_batches_equal(batches[11:], pipeline.train_batches(cfg, 11, 12))
    for batch in batches:
        assert batch["image"].shape == (96, 16, 16, 1)
        assert batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32
        assert set(batch["label"]) == set(range(10))
        assert batch["weight"].dtype == np.float32
        assert (batch["weight"] == 1).all()
    assert len(np.unique(batches[0]["image"], axis=0)) > 32
    count = sum(batch["weight"].sum() for batch in pipeline.eval_batches(cfg))
    assert count == sources.num_examples(cfg.data, "test") > 0
