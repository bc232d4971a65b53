"""Order of samples, sources, batches."""

import io
import math
import os
import shutil
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image
from sklearn.datasets import load_digits

from benchmarks import photographs
from hivit_jax import config, inputs, models
from hivit_jax.augment import resample
from hivit_jax.data import order, randaugment, transforms
from hivit_jax.data.order import permutation, samples_at
from hivit_jax.data.sources import digits as data_sources_digits
from hivit_jax.data.sources import registry
from hivit_jax.errors import ConfigError, DataError

RECIPE = Path(__file__).parents[1] / "configs" / "digits_finetune.py"
IMAGENET = 1_281_167


def load(**overrides):
    """A digits recipe with everything that these tests depend on set."""
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
        "data.canvas": 0,
    } | {key.replace("__", "."): value for key, value in overrides.items()}
    return config.load(str(RECIPE), [f"--config.{k}={v}" for k, v in values.items()])


def assert_batches_equal(ones, others):
    ones, others = list(ones), list(others)
    assert len(ones) == len(others) > 0
    for one, other in zip(ones, others, strict=True):
        assert one.keys() == other.keys() >= {"image", "label", "weight", "unreadable"}
        for key, value in one.items():
            assert value.dtype == other[key].dtype
            assert_array_equal(value, other[key])


# Order


def test_every_epoch_is_a_permutation_of_its_own():
    orders = [permutation(seed, epoch, 1437) for seed in (0, 1) for epoch in range(3)]
    orders.append(permutation(0, 1_000_000, 1437))
    for each in orders:
        assert each.dtype == np.int64
        assert_array_equal(np.sort(each), np.arange(1437))
    for i, each in enumerate(orders):
        for other in orders[:i]:
            assert (each == other).mean() < 0.01  # 1 in 1437 by chance


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

    monkeypatch.setattr(order, "permutation", counted)
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
    """Pixels and labels of all images of a source."""
    found = [source.sample(i) for i in range(len(source))]
    images = [np.asarray(Image.open(io.BytesIO(each["image"]))) for each in found]
    return images, [each["label"] for each in found]


def test_digits_splits():
    digits = load_digits()
    known = {}
    for image, label in zip(digits.images, digits.target, strict=True):
        known.setdefault(np.round(image * 255 / 16).astype(np.uint8).tobytes(), label)
    train, test = (
        data_sources_digits.Digits("train"),
        data_sources_digits.Digits("test"),
    )
    assert (len(train), len(test)) == (1437, 360)
    found = []
    for source in (train, test):
        assert source.labels.dtype == np.int32
        assert source.labels.shape == (len(source),)
        images, labels = scans(source)
        assert_array_equal(images, source.pixels())
        assert_array_equal(labels, source.labels)
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
    source = data_sources_digits.Digits("train")
    sample = source.sample(5)
    assert sample["image"][:8] == b"\x89PNG\r\n\x1a\n"
    assert sample == source.sample(np.int64(5))
    assert sample["label"] == source.labels[5]


def test_few_training_examples():
    whole = {image.tobytes() for image in data_sources_digits.Digits("train").pixels()}
    found = []
    for subset in (0, 1, 0):
        source = data_sources_digits.Digits("train", train_examples=100, subset=subset)
        assert np.bincount(source.labels).tolist() == [10] * 10
        found.append([image.tobytes() for image in source.pixels()])
        assert len(set(found[-1])) == 100
        assert set(found[-1]) <= whole
    assert found[0] == found[2]
    assert set(found[0]) != set(found[1])
    test = data_sources_digits.Digits("test", train_examples=100, subset=1)
    assert_array_equal(test.pixels(), data_sources_digits.Digits("test").pixels())


def test_larger_subset_holds_the_smaller():
    small, large = (
        {
            image.tobytes()
            for image in data_sources_digits.Digits("train", n, 2).pixels()
        }
        for n in (100, 1000)
    )
    assert len(large) == 1000
    assert small < large


@pytest.mark.parametrize("examples", [5, 101, 1010, 1437])
def test_training_examples_that_cannot_be_shared(examples):
    with pytest.raises(ConfigError, match=f"train_examples={examples}: .* 10 classes"):
        data_sources_digits.Digits("train", train_examples=examples)


def test_number_of_images():
    data = load(data__train_examples=100).data
    assert registry.num_examples(data, "train") == 100
    assert registry.num_examples(data, "test") == 360


def test_more_classes_than_the_model_has():
    for split in (lambda c: inputs.train_batches(c, 0, 1), inputs.eval_batches):
        with pytest.raises(
            ConfigError, match="num_classes=9; expected at least 10, .*digits"
        ):
            next(split(load(model__num_classes=9)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data__canvas": 15}, "canvas=15 .*image_size=16; expected 0 or at least 16"),
        ({"data__canvas": -1}, "data.canvas=-1; expected at least 0"),
        ({"data__workers": -1}, "data.workers=-1; expected at least 0"),
        ({"data__crop_pct": 1.5}, "data.crop_pct=1.5; expected 0.001 to 1"),
        ({"data__max_unreadable": 2.0}, "data.max_unreadable=2.0; expected 0 to 1"),
        ({"data__interpolation": "bicubik"}, "expected 'bicubic' or 'bilinear'"),
    ],
)
def test_settings_that_cannot_work(overrides, message):
    with pytest.raises(ConfigError, match=message):
        next(inputs.train_batches(load(**overrides), 0, 1))


# Batches


def test_training_batches():
    source, cfg = data_sources_digits.Digits("train"), load()
    batches = list(inputs.train_batches(cfg, 0, 16))  # 1,536 of 1,437 images
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
    assert_batches_equal(batches, inputs.train_batches(cfg, 0, 16))


def test_images_of_their_own_size_are_unchanged():
    cfg = load(model__image_size=8)
    batch = next(inputs.train_batches(cfg, 0, 1))
    expected = data_sources_digits.Digits("train").pixels()[
        permutation(0, 0, 1437)[:96]
    ]
    assert_array_equal(batch["image"][..., 0], expected)


def test_other_image_shapes():
    colour = dict(model__in_channels=3, data__mean=(0.5,) * 3, data__std=(0.5,) * 3)
    cfg = load(model__image_size=8, **colour)
    batch = next(inputs.train_batches(cfg, 0, 1))
    grey = next(inputs.train_batches(load(model__image_size=8), 0, 1))
    assert_array_equal(batch["image"], np.repeat(grey["image"], 3, -1))
    cfg = load(model__image_size=(8, 24), **colour)
    assert models.image_shape(cfg.model) == (8, 24, 3)
    assert next(inputs.train_batches(cfg, 0, 1))["image"].shape == (96, 8, 24, 3)


@pytest.mark.parametrize("crop_scale", [(1.0, 1.0), (0.3, 1.0)])
def test_run_can_start_at_any_step(crop_scale):
    """Steps 13 to 17, across the end of the first epoch, from a run that began at 0."""
    cfg = load(data__crop_scale=crop_scale)
    whole = list(inputs.train_batches(cfg, 0, 18))
    assert_batches_equal(whole[13:], inputs.train_batches(cfg, 13, 18))


def test_crops_differ_by_image_epoch_and_seed():
    cfg = load(data__crop_scale=(0.3, 1.0), data__train_examples=100, batch_size=100)
    first, second = inputs.train_batches(cfg, 0, 2)
    plain = next(
        inputs.train_batches(load(data__train_examples=100, batch_size=100), 0, 1)
    )
    assert_array_equal(first["label"], plain["label"])
    assert (first["image"] != plain["image"]).any((1, 2, 3)).mean() > 0.9
    places = [np.argsort(permutation(0, epoch, 100)) for epoch in (0, 1)]
    one, other = first["image"][places[0]], second["image"][places[1]]
    assert_array_equal(first["label"][places[0]], second["label"][places[1]])
    assert (one != other).any((1, 2, 3)).mean() > 0.9
    cfg.seed = 1
    seeded = next(inputs.train_batches(cfg, 0, 1))
    third = seeded["image"][np.argsort(permutation(1, 0, 100))]
    assert (one != third).any((1, 2, 3)).mean() > 0.9


@pytest.mark.parametrize("batch_size", [90, 96, 360, 512])
def test_evaluation_batches_hold_every_image_once(batch_size):
    source = data_sources_digits.Digits("test")
    cfg = load(batch_size=batch_size, model__image_size=8, data__crop_scale=(0.3, 0.4))
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
    # In order, and never cropped.
    assert_array_equal(image[:360, ..., 0], source.pixels())
    assert_array_equal(label[:360], source.labels)
    assert (image[360:] == 0).all()
    assert (label[360:] == 0).all()


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_shares_of_processes_make_the_batch(monkeypatch, processes, name):
    examples = 1000 if name == "synthetic" else 0
    cfg = load(
        data__name=name, data__crop_scale=(0.3, 1.0), data__train_examples=examples
    )

    def batches():
        return [*inputs.train_batches(cfg, 14, 16), *inputs.eval_batches(cfg)]

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


def test_made_up_images_have_no_canvas():
    """So they may be larger than it."""
    cfg = load(data__name="synthetic", model__image_size=64, data__canvas=32)
    assert next(inputs.train_batches(cfg, 0, 1))["image"].shape == (96, 64, 64, 1)


def test_synthetic_images_need_no_tensorflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # importing it fails
    cfg = load(data__name="synthetic", data__train_examples=1000)
    batches = list(inputs.train_batches(cfg, 0, 12))
    assert_batches_equal(batches, inputs.train_batches(cfg, 0, 12))
    assert_batches_equal(batches[11:], inputs.train_batches(cfg, 11, 12))
    for batch in batches:
        assert batch["image"].shape == (96, 16, 16, 1)
        assert batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32
        assert set(batch["label"]) == set(range(10))
        assert batch["weight"].dtype == np.float32
        assert (batch["weight"] == 1).all()
    assert len(np.unique(batches[0]["image"], axis=0)) > 32
    count = sum(batch["weight"].sum() for batch in inputs.eval_batches(cfg))
    assert count == registry.num_examples(cfg.data, "test") > 0


# Batches of files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 training and 11 validation photographs of 64x48, in seven classes."""
    root = tmp_path_factory.mktemp("photographs")
    photographs.write(root, {"train": 40, "val": 11}, (64, 48))
    return root


def load_folder(root, **overrides):
    return load(
        **{
            "data__name": "folder",
            "data__dir": root,
            "batch_size": 8,
            "model__image_size": 24,
            "model__in_channels": 3,
            "data__mean": (0.5, 0.5, 0.5),
            "data__std": (0.2, 0.2, 0.2),
            "data__crop_scale": (0.3, 1.0),
            "data__crop_pct": 0.75,
            "data__canvas": 64,
        }
        | overrides
    )


def test_batches_for_the_device_and_of_the_host_show_the_same(folder):
    """Crops on a canvas, resized as the train step does it, are the host's images."""
    shipped, resized = load_folder(folder), load_folder(folder, data__canvas=0)
    for batches in (lambda c: inputs.train_batches(c, 3, 7), inputs.eval_batches):
        for one, other in zip(batches(shipped), batches(resized), strict=True):
            assert one["image"].shape == (8, 64, 64, 3)
            assert one["box"].shape == (8, 2, 3)
            assert other["image"].shape == (8, 24, 24, 3)
            assert "box" not in other
            pixels = resample.resample(one["image"], one["box"], (24, 24))
            assert np.abs(pixels - other["image"].astype(float)).mean() < 0.4
            for key in ("label", "weight", "unreadable"):
                assert_array_equal(one[key], other[key])


def test_evaluation_sees_the_middle_of_every_file(folder):
    source = registry.open_source(load_folder(folder).data, "test")
    batches = list(inputs.eval_batches(load_folder(folder, data__canvas=0)))
    images = np.concatenate([b["image"] for b in batches])
    weights = np.concatenate([b["weight"] for b in batches])
    assert_array_equal(weights, np.arange(16) < 11)
    for image, index in zip(images, range(11), strict=False):
        encoded = source.sample(index)["image"]
        whole = Image.open(io.BytesIO(encoded)).resize(
            (42, 32), Image.Resampling.BICUBIC
        )
        expected = np.asarray(whole)[4:28, 9:33]
        assert np.abs(image - expected.astype(float)).mean() < 0.4


def test_randaugment(folder):
    """Of the resized crop, by numbers of its own; never in evaluation."""
    plain = load_folder(folder, data__canvas=0)
    cfg = load_folder(folder, data__randaugment=True)
    count = transforms.DRAWS + randaugment.DRAWS
    changed = 0
    for step, (one, other) in enumerate(
        zip(
            inputs.train_batches(cfg, 0, 6),
            inputs.train_batches(plain, 0, 6),
            strict=True,
        )
    ):
        indices, epochs = samples_at(step * 8 + np.arange(8), 40, 0)
        for k, (index, epoch) in enumerate(zip(indices, epochs, strict=True)):
            draws = transforms.uniforms(0, epoch, index, count)[-randaugment.DRAWS :]
            expected = randaugment.randaugment(other["image"][k], draws)
            assert_array_equal(one["image"][k], expected)
            changed += (one["image"][k] != other["image"][k]).any()
    assert 24 < changed < 46  # of 48, of which a quarter meets no operation
    assert_batches_equal(
        inputs.eval_batches(cfg), inputs.eval_batches(load_folder(folder))
    )
    with pytest.raises(ConfigError, match="randaugment with .*in_channels=1"):
        next(inputs.train_batches(load(data__randaugment=True), 0, 1))


@pytest.mark.parametrize("workers", [1, 5])
def test_threads_change_nothing(folder, workers):
    batches = list(inputs.train_batches(load_folder(folder), 0, 12))
    cfg = load_folder(folder, data__workers=workers)
    assert_batches_equal(batches, inputs.train_batches(cfg, 0, 12))
    assert_batches_equal(batches[7:], inputs.train_batches(cfg, 7, 12))


@pytest.mark.parametrize(("workers", "usable"), [(1, {0, 1, 2}), (0, {5})])
def test_number_of_threads(folder, monkeypatch, workers, usable):
    """As told, or one for each core; more work waits than both have."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: usable, raising=False)
    cfg = load_folder(folder, data__workers=workers, batch_size=40)
    batches = inputs.train_batches(cfg, 0, 100)
    next(batches)
    threads = [each for each in threading.enumerate() if each.name.startswith("read")]
    assert len(threads) == 1
    batches.close()


def test_threads_end_with_the_batches(folder):
    batches = inputs.train_batches(load_folder(folder, data__workers=3), 0, 1000)
    next(batches)
    assert any(thread.name.startswith("read") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("read") for thread in threading.enumerate())


@pytest.fixture
def damaged(folder, tmp_path):
    """The folder with 3 training files and 1 of validation spoilt; their names."""
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


def test_unreadable_images_shift_nothing(folder, damaged, capfd):
    root, broken = damaged
    whole = list(inputs.train_batches(load_folder(folder), 0, 10))
    batches = list(inputs.train_batches(load_folder(root), 0, 10))
    bad = 0
    for one, other in zip(batches, whole, strict=True):
        unreadable = one["unreadable"] == 1
        bad += unreadable.sum()
        assert_array_equal(one["weight"], 1 - one["unreadable"])
        assert (one["image"][unreadable] == 0).all()
        assert (one["label"][unreadable] == 0).all()
        for key in ("image", "label", "box"):
            assert_array_equal(one[key][~unreadable], other[key][~unreadable])
    assert bad == 2 * 3  # 80 places: every file twice
    err = capfd.readouterr().err
    for path in broken[:3]:
        assert err.count(f"cannot read {path}: ") == 1
    assert err.count("cannot read") == 3  # once each
    assert "truncated" in err
    evaluation = list(inputs.eval_batches(load_folder(root)))
    assert sum(batch["weight"].sum() for batch in evaluation) == 10
    assert sum(batch["unreadable"].sum() for batch in evaluation) == 1
    assert capfd.readouterr().err.count(str(broken[3])) == 1


def test_share_of_unreadable_images():
    """0.1 % of an epoch, or of what was seen once that is more."""
    data = load(data__max_unreadable=0.001).data
    inputs.check_unreadable(1, 50, data, "train")  # of 1,437
    with pytest.raises(DataError, match=r"2 images of digits .* 0.14%; .* 0.10%"):
        inputs.check_unreadable(2, 50, data, "train")
    inputs.check_unreadable(2, 2000, data, "train")
    with pytest.raises(DataError, match="check_data"):
        inputs.check_unreadable(1, 360, data, "test")


@pytest.mark.parametrize("wrong", [10, -1])
def test_label_outside_the_classes(folder, monkeypatch, wrong):
    cfg = load_folder(folder)
    source = registry.open_source(cfg.data, "train")
    monkeypatch.setattr(source, "labels", np.where(source.labels == 3, wrong, 0))
    message = rf"coffee/\d+.JPEG: expected .* 0 to 9, found {wrong}; .*num_classes=10"
    with pytest.raises(DataError, match=message):
        list(inputs.train_batches(cfg, 0, 5))
    with cfg.unlocked():
        cfg.model.num_classes = None  # a masked autoencoder looks at no label
    labels = [batch["label"] for batch in inputs.train_batches(cfg, 0, 5)]
    assert set(np.concatenate(labels)) == {0, wrong}


def test_channels_no_file_has(folder):
    cfg = load_folder(
        folder, model__in_channels=4, data__mean=(0.5,) * 4, data__std=(1.0,) * 4
    )
    with pytest.raises(ConfigError, match=r"in_channels=4 .*; expected 3 .* or 1"):
        next(inputs.train_batches(cfg, 0, 1))


# Every key of config.data, in batches

KEYS = ("image", "label", "weight", "unreadable", "box")
# Key and value -> whether training batches change, whether evaluation's do.
EFFECTS = [
    ("crop_scale", (0.8, 1.0), True, False),
    ("crop_pct", 0.5, False, True),
    ("interpolation", "bilinear", True, True),
    ("antialias", False, True, True),
    ("canvas", 64, True, True),
    ("workers", 3, False, False),
    ("max_unreadable", 0.5, False, False),
    ("randaugment", True, True, False),
    ("train_split", "val", True, False),
    ("eval_split", "train", False, True),
    ("flip", False, False, False),  # which is up to the device
    ("mean", (0.1, 0.2, 0.3), False, False),
    ("std", (0.1, 0.2, 0.3), False, False),
]


@pytest.fixture(scope="module")
def as_it_is(folder):
    """Four training batches of the host's images, and all of evaluation."""
    return batches_of(load_folder(folder, data__canvas=0, data__flip=True))


def batches_of(cfg):
    return list(inputs.train_batches(cfg, 0, 4)), list(inputs.eval_batches(cfg))


def identical(ones, others):
    return len(ones) == len(others) and all(
        np.array_equal(one.get(key), other.get(key))
        for one, other in zip(ones, others, strict=True)
        for key in KEYS
    )


@pytest.mark.parametrize(("key", "value", "train", "evaluation"), EFFECTS)
def test_batches_change_with_a_key(folder, as_it_is, key, value, train, evaluation):
    overrides = dict(data__canvas=0, data__flip=True) | {f"data__{key}": value}
    batches = batches_of(load_folder(folder, **overrides))
    same = [identical(*pair) for pair in zip(batches, as_it_is, strict=True)]
    assert same == [not train, not evaluation]


def pixels_of(folder, split):
    """Pixels of the files, as PIL reads them in the order of their names."""
    paths = sorted((folder / split).glob("*/*"))
    return [np.asarray(Image.open(path)) for path in paths]


def test_splits_by_name(folder):
    """Labels too: of 11 validation images in training, of 40 training in evaluation."""
    swapped = dict(data__train_split="val", data__eval_split="train")
    cfg = load_folder(folder, data__canvas=0, data__crop_scale=(1.0, 1.0), **swapped)
    [batch] = inputs.train_batches(cfg, 0, 1)
    classes = sorted(path.name for path in (folder / "train").iterdir())
    for split, found in (("val", [batch]), ("train", list(inputs.eval_batches(cfg)))):
        paths = sorted((folder / split).glob("*/*"))
        order = permutation(0, 0, 11)[:8] if split == "val" else range(40)
        labels = [classes.index(paths[index].parent.name) for index in order]
        assert np.concatenate([each["label"] for each in found]).tolist() == labels


def test_crops_of_the_middle_are_the_files_pixels(folder):
    """Half of 48x64 is 24x32: nothing is resized. Without random crops training has
    the same ones, of every image once in an epoch.
    """
    options = dict(data__crop_pct=0.5, data__crop_scale=(1.0, 1.0), data__canvas=0)
    train, evaluation = batches_of(load_folder(folder, **options))
    for split, batches, count in (("train", train, 32), ("val", evaluation, 11)):
        expected = [pixels[12:36, 20:44] for pixels in pixels_of(folder, split)]
        if split == "train":
            expected = np.stack(expected)[permutation(0, 0, 40)]
        images = np.concatenate([batch["image"] for batch in batches])
        assert_array_equal(images[:count], expected[:count])


def halved(pixels, taps):
    """Pixels between two others, along both axes; columns first, each axis rounded."""
    for axis in (1, 0):
        pixels, total = np.moveaxis(np.float64(pixels), axis, 0), 0
        middle, weights = np.arange(24) * 2 + (4 if axis else 0) * 2, 0
        for offset, weight in taps.items():
            place = middle + offset
            inside = (place >= 0) & (place < len(pixels))
            weight = (weight * inside)[:, None, None]
            total = total + weight * pixels[place.clip(0, len(pixels) - 1)]
            weights = weights + weight
        pixels = np.moveaxis(np.rint(total / weights).clip(0, 255), 0, axis)
    return pixels.astype(np.uint8)


def by_pil(name):
    box = (8, 0, 56, 48)
    method = Image.Resampling[name.upper()]
    return lambda pixels: np.asarray(
        Image.fromarray(pixels).resize((24, 24), method, box)
    )


CUBIC = {-1: -0.0625, 0: 0.5625, 1: 0.5625, 2: -0.0625}
RESIZED = {
    ("bicubic", True): by_pil("bicubic"),
    ("bilinear", True): by_pil("bilinear"),
    ("bicubic", False): lambda pixels: halved(pixels, CUBIC),
    ("bilinear", False): lambda pixels: halved(pixels, {0: 0.5, 1: 0.5}),
}


@pytest.mark.parametrize(("interpolation", "antialias"), RESIZED)
def test_images_are_resized_as_told(folder, interpolation, antialias):
    """48x64 to half of it, of which 24x24: by the host to the bit; by the device, which
    also normalizes, but for what lies between two numbers and is rounded otherwise.
    """
    how = dict(data__interpolation=interpolation, data__antialias=antialias)
    moments = dict(data__mean=(0.1, 0.5, 0.9), data__std=(0.2, 0.4, 0.8))
    options = how | moments | dict(data__crop_pct=1.0)
    expected = np.stack(
        [*map(RESIZED[interpolation, antialias], pixels_of(folder, "val"))]
    )
    cfg = load_folder(folder, data__canvas=0, **options)
    host = np.concatenate([b["image"] for b in inputs.eval_batches(cfg)])[:11]
    assert_array_equal(host, expected)
    cfg = load_folder(folder, data__canvas=64, **options)
    images = [*map(inputs.make_task(cfg).preprocess, inputs.eval_batches(cfg))]
    device = np.concatenate(images)[:11] * (0.2, 0.4, 0.8) + (0.1, 0.5, 0.9)
    difference = np.abs(device * 255 - expected)
    assert difference.max() < 1.01
    assert difference.mean() < 0.2


def test_digits_by_key():
    """The first number of training images of each class, as chosen by the subset."""
    digits = load_digits()
    known = {
        np.rint(image * 255 / 16).astype(np.uint8).tobytes(): label
        for image, label in zip(digits.images, digits.target, strict=True)
    }
    found = {}
    for examples, subset in ((0, 0), (50, 0), (50, 3), (70, 3)):
        choice = dict(data__train_examples=examples, data__subset=subset)
        cfg = load(model__image_size=8, batch_size=80, **choice)
        [batch] = inputs.train_batches(cfg, 0, 1)
        images = [image.tobytes() for image in batch["image"]]
        labels = batch["label"].tolist()
        assert labels == [known[image] for image in images]
        found[examples, subset] = set(images)
        if examples:  # 80 of `examples`, over again
            counts = np.bincount(labels[:examples], minlength=10)
            assert counts.tolist() == [examples // 10] * 10
            assert len(found[examples, subset]) == examples
        [first, *_] = inputs.eval_batches(cfg)
        source = data_sources_digits.Digits("test")
        assert_array_equal(first["image"][..., 0], source.pixels()[:80])
    assert len(found[0, 0]) == 80
    assert found[50, 3] < found[70, 3]
    assert len(found[50, 3] & found[50, 0]) < 25
