"""Tests of the input pipeline, from config keys to batches."""

import io

import numpy as np
import pytest
from datasets import assert_batches_equal, digits_config, folder_config
from numpy.testing import assert_array_equal
from PIL import Image

from hivit_jax import inputs, models
from hivit_jax.augment import resample
from hivit_jax.data import randaugment, transforms
from hivit_jax.data.order import permutation, samples_at
from hivit_jax.data.sources import digits, registry
from hivit_jax.data.sources.base import Source
from hivit_jax.data.unreadable import UnreadableImages, check_unreadable
from hivit_jax.errors import ConfigError, DataError


def test_more_classes_than_the_model_has():
    for split in (lambda c: inputs.train_batches(c, 0, 1), inputs.eval_batches):
        with pytest.raises(
            ConfigError, match="num_classes=9; expected at least 10, .*digits"
        ):
            next(split(digits_config(model__num_classes=9)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"data__canvas": 15},
            "canvas=15 .*image_size=16; expected data.canvas=0 or at least 16",
        ),
        ({"data__canvas": -1}, "data.canvas=-1; expected at least 0"),
        ({"data__workers": -1}, "data.workers=-1; expected at least 0"),
        ({"data__crop_pct": 1.5}, "data.crop_pct=1.5; expected 0.001 to 1"),
        ({"data__max_unreadable": 2.0}, "data.max_unreadable=2.0; expected 0 to 1"),
        ({"data__interpolation": "bicubik"}, "expected 'bicubic' or 'bilinear'"),
        (
            {"data__value_range": (1, 0)},
            r"value_range=\(1, 0\); expected \(LOW, HIGH\)",
        ),
        ({"data__value_range": (0.5,)}, r"value_range=\(0.5,\); expected"),
        ({"data__value_range": (0, 1, 2)}, r"value_range=\(0, 1, 2\); expected"),
        ({"data__value_range": (0, "'x'")}, r"value_range=.*; expected"),
        ({"data__value_range": "(0,1e999)"}, r"value_range=\(0, inf\); expected"),
        ({"data__value_range": (3, 3)}, r"value_range=\(3, 3\); expected"),
    ],
)
def test_invalid_settings(overrides, message):
    with pytest.raises(ConfigError, match=message):
        next(inputs.train_batches(digits_config(**overrides), 0, 1))


def test_images_of_the_models_size_are_unchanged():
    cfg = digits_config(model__image_size=8)
    batch = next(inputs.train_batches(cfg, 0, 1))
    expected = digits.Digits("train").pixels()[permutation(0, 0, 1437)[:96]]
    assert_array_equal(batch["image"][..., 0], expected)


def test_other_image_shapes():
    color = dict(model__in_channels=3, data__mean=(0.5,) * 3, data__std=(0.5,) * 3)
    cfg = digits_config(model__image_size=8, **color)
    batch = next(inputs.train_batches(cfg, 0, 1))
    gray = next(inputs.train_batches(digits_config(model__image_size=8), 0, 1))
    assert_array_equal(batch["image"], np.repeat(gray["image"], 3, -1))
    cfg = digits_config(model__image_size=(8, 24), **color)
    assert models.image_shape(cfg.model) == (8, 24, 3)
    assert next(inputs.train_batches(cfg, 0, 1))["image"].shape == (96, 8, 24, 3)


def test_crops_differ_by_image_epoch_and_seed():
    cfg = digits_config(
        data__crop_scale=(0.3, 1.0), data__train_examples=100, batch_size=100
    )
    first, second = inputs.train_batches(cfg, 0, 2)
    other_seed = next(
        inputs.train_batches(
            digits_config(data__train_examples=100, batch_size=100), 0, 1
        )
    )
    assert_array_equal(first["label"], other_seed["label"])
    assert (first["image"] != other_seed["image"]).any((1, 2, 3)).mean() > 0.9
    order = [np.argsort(permutation(0, epoch, 100)) for epoch in (0, 1)]
    one, other = first["image"][order[0]], second["image"][order[1]]
    assert_array_equal(first["label"][order[0]], second["label"][order[1]])
    assert (one != other).any((1, 2, 3)).mean() > 0.9
    cfg.seed = 1
    seeded = next(inputs.train_batches(cfg, 0, 1))
    third = seeded["image"][np.argsort(permutation(1, 0, 100))]
    assert (one != third).any((1, 2, 3)).mean() > 0.9


@pytest.mark.slow
def test_device_and_host_resizing_agree(folder):
    """Canvases that the device resizes match the images that the host resizes."""
    shipped, resized = folder_config(folder), folder_config(folder, data__canvas=0)
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


def test_evaluation_uses_center_crops(folder):
    source = registry.open_source(folder_config(folder).data, "test")
    batches = list(inputs.eval_batches(folder_config(folder, data__canvas=0)))
    images = np.concatenate([b["image"] for b in batches])
    weights = np.concatenate([b["weight"] for b in batches])
    assert_array_equal(weights, np.arange(16) < 11)
    for image, index in zip(images, range(11), strict=False):
        encoded = source.sample(index)["image"]
        resized = Image.open(io.BytesIO(encoded)).resize(
            (42, 32), Image.Resampling.BICUBIC
        )
        expected = np.asarray(resized)[4:28, 9:33]
        assert np.abs(image - expected.astype(float)).mean() < 0.4


def test_randaugment(folder):
    """RandAugment is applied to the resized crop, in training only."""
    plain = folder_config(folder, data__canvas=0)
    cfg = folder_config(folder, data__randaugment=True)
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
    assert 24 < changed < 46  # of 48; a quarter of them get no operation
    assert_batches_equal(
        inputs.eval_batches(cfg), inputs.eval_batches(folder_config(folder))
    )
    with pytest.raises(ConfigError, match="randaugment with .*in_channels=1"):
        next(inputs.train_batches(digits_config(data__randaugment=True), 0, 1))


def test_files_with_too_few_channels(folder):
    """The error names the file and the key."""
    cfg = folder_config(
        folder, model__in_channels=4, data__mean=(0.5,) * 4, data__std=(1.0,) * 4
    )
    with pytest.raises(DataError, match=r"JPEG: expected 4 channels, found 3; set"):
        next(inputs.train_batches(cfg, 0, 1))


# Every key of config.data

KEYS = ("image", "label", "weight", "unreadable", "box")


# (key, value, training batches change, evaluation batches change)
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
    ("flip", False, False, False),  # applied on the device
    ("mean", (0.1, 0.2, 0.3), False, False),
    ("std", (0.1, 0.2, 0.3), False, False),
]


@pytest.fixture(scope="module")
def unchanged_batches(folder):
    """Return four training batches, resized on the host, and all evaluation batches."""
    return batches_of(folder_config(folder, data__canvas=0, data__flip=True))


def batches_of(cfg):
    """Return four training batches and all evaluation batches."""
    return list(inputs.train_batches(cfg, 0, 4)), list(inputs.eval_batches(cfg))


def identical(ones, others):
    """Return True if two lists of batches are bit-identical."""
    return len(ones) == len(others) and all(
        np.array_equal(one.get(key), other.get(key))
        for one, other in zip(ones, others, strict=True)
        for key in KEYS
    )


@pytest.mark.parametrize(("key", "value", "train", "evaluation"), EFFECTS)
def test_batches_change_with_a_key(
    folder, unchanged_batches, key, value, train, evaluation
):
    overrides = dict(data__canvas=0, data__flip=True) | {f"data__{key}": value}
    batches = batches_of(folder_config(folder, **overrides))
    unchanged = [
        identical(*pair) for pair in zip(batches, unchanged_batches, strict=True)
    ]
    assert unchanged == [not train, not evaluation]


def pixels_of(folder, split):
    """Return the pixels of the files, in the order of their names."""
    paths = sorted((folder / split).glob("*/*"))
    return [np.asarray(Image.open(path)) for path in paths]


def test_splits_by_name(folder):
    """Training and evaluation swap splits, labels included."""
    swapped = dict(data__train_split="val", data__eval_split="train")
    cfg = folder_config(folder, data__canvas=0, data__crop_scale=(1.0, 1.0), **swapped)
    [batch] = inputs.train_batches(cfg, 0, 1)
    classes = sorted(path.name for path in (folder / "train").iterdir())
    for split, batches in (("val", [batch]), ("train", list(inputs.eval_batches(cfg)))):
        paths = sorted((folder / split).glob("*/*"))
        order = permutation(0, 0, 11)[:8] if split == "val" else range(40)
        labels = [classes.index(paths[index].parent.name) for index in order]
        assert np.concatenate([b["label"] for b in batches]).tolist() == labels


def test_center_crops_are_pixels_of_the_files(folder):
    """Center crops of 24x24 from 48x64 are unresized pixels of the files.

    Without random crops, training uses the same center crops, each once per epoch.
    """
    options = dict(data__crop_pct=0.5, data__crop_scale=(1.0, 1.0), data__canvas=0)
    train, evaluation = batches_of(folder_config(folder, **options))
    for split, batches, count in (("train", train, 32), ("val", evaluation, 11)):
        expected = [pixels[12:36, 20:44] for pixels in pixels_of(folder, split)]
        if split == "train":
            expected = np.stack(expected)[permutation(0, 0, 40)]
        images = np.concatenate([batch["image"] for batch in batches])
        assert_array_equal(images[:count], expected[:count])


def halved(pixels, taps):
    """Halve an image with filter `taps`: columns first, rounding after each axis."""
    for axis in (1, 0):
        pixels, total = np.moveaxis(np.float64(pixels), axis, 0), 0
        middle, weights = np.arange(24) * 2 + (4 if axis else 0) * 2, 0
        for offset, weight in taps.items():
            position = middle + offset
            inside = (position >= 0) & (position < len(pixels))
            weight = (weight * inside)[:, None, None]
            total = total + weight * pixels[position.clip(0, len(pixels) - 1)]
            weights = weights + weight
        pixels = np.moveaxis(np.rint(total / weights).clip(0, 255), 0, axis)
    return pixels.astype(np.uint8)


def pil_halved(name):
    """Return a function that halves the center of an image with PIL."""
    box = (8, 0, 56, 48)
    method = Image.Resampling[name.upper()]
    return lambda pixels: np.asarray(
        Image.fromarray(pixels).resize((24, 24), method, box)
    )


CUBIC = {-1: -0.0625, 0: 0.5625, 1: 0.5625, 2: -0.0625}


RESIZED = {
    ("bicubic", True): pil_halved("bicubic"),
    ("bilinear", True): pil_halved("bilinear"),
    ("bicubic", False): lambda pixels: halved(pixels, CUBIC),
    ("bilinear", False): lambda pixels: halved(pixels, {0: 0.5, 1: 0.5}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("interpolation", "antialias"), RESIZED)
def test_images_are_resized_as_configured(folder, interpolation, antialias):
    """Images are halved as data.interpolation and data.antialias specify.

    The host is bit-exact. The device, which also normalizes, may round ties
    differently.
    """
    resizing = dict(data__interpolation=interpolation, data__antialias=antialias)
    moments = dict(data__mean=(0.1, 0.5, 0.9), data__std=(0.2, 0.4, 0.8))
    options = resizing | moments | dict(data__crop_pct=1.0)
    expected = np.stack(
        [*map(RESIZED[interpolation, antialias], pixels_of(folder, "val"))]
    )
    cfg = folder_config(folder, data__canvas=0, **options)
    host = np.concatenate([b["image"] for b in inputs.eval_batches(cfg)])[:11]
    assert_array_equal(host, expected)
    cfg = folder_config(folder, data__canvas=64, **options)
    images = [*map(inputs.make_task(cfg).preprocess, inputs.eval_batches(cfg))]
    device = np.concatenate(images)[:11] * (0.2, 0.4, 0.8) + (0.1, 0.5, 0.9)
    difference = np.abs(device * 255 - expected)
    assert difference.max() < 1.01
    assert difference.mean() < 0.2


# Before the first step


class Listed(Source):
    """Source of examples in a list: bytes, or an exception."""

    classes = ("a", "b")

    def __init__(self, *samples, classes=("a", "b")):
        self.samples, self.classes = samples, classes

    def __len__(self):
        return len(self.samples)

    def sample(self, index):
        example = self.samples[index]
        if isinstance(example, Exception):
            raise example
        return example if isinstance(example, dict) else {"image": example, "label": 0}


def encode(values, kind="PNG"):
    """Encode pixels as an image file."""
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind)
    return buffer.getvalue()


GOOD = encode(np.arange(64, dtype=np.uint8).reshape(8, 8))
FLOATS = encode(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8), "TIFF")


@pytest.fixture
def opened(monkeypatch):
    """Return a function that sets the sources of both splits.

    The function returns (config, task).
    """

    def make(train, test, **overrides):
        sources = {"train": train, "test": test}
        monkeypatch.setattr(inputs, "open_source", lambda _, split: sources[split])
        cfg = digits_config(model__image_size=8, **overrides)
        return cfg, inputs.make_task(cfg)

    return make


def test_an_empty_split_is_an_error(opened):
    """A split of 0 examples, from any source, is an error before the first step."""
    for train, test, name in (
        (Listed(GOOD), Listed(), "test"),
        (Listed(), Listed(GOOD), "train"),
    ):
        with pytest.raises(DataError, match=f"the {name} split of digits is empty"):
            opened(train, test)


def test_splits_have_the_same_classes(opened):
    with pytest.raises(DataError, match="the same classes in both splits, found 2"):
        opened(Listed(GOOD), Listed(GOOD, classes=("a", "c")))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            [b""] * 20,
            "all 8 checked images of the test split .*\n.*check_data",
        ),
        (
            [OSError("gone")],
            "all 8 checked images of the test split of digits are unreadable",
        ),
        ([FLOATS], r"example 0: expected 8 or 16 bits, .*value_range="),
        ([{"image": GOOD, "label": 10}], "example 0: expected a label from 0 to 9"),
    ],
)
def test_both_splits_are_read_before_the_first_step(opened, bad, message):
    """A few evenly spaced examples of each split are read before the first step.

    A single damaged image is not an error.
    """
    inputs.check_splits(*opened(Listed(GOOD, b"", GOOD), Listed(b"", GOOD)))
    cfg, task = opened(Listed(GOOD), Listed(*bad))
    with pytest.raises(DataError, match=message):
        inputs.check_splits(cfg, task)
    cfg, task = opened(Listed(*bad), Listed(GOOD))
    with pytest.raises(DataError, match=message.replace("test split", "train split")):
        inputs.check_splits(cfg, task)


@pytest.mark.parametrize(
    ("total", "expected"), [(2, [0, 1]), (6, [*range(6)]), (21, [0, 4, 8, 12, 16, 20])]
)
def test_figures_show_evenly_spaced_examples(opened, total, expected):
    """With class folders, the first examples would all be of the same class."""
    images = Listed(*[encode(np.full((8, 8), i, np.uint8)) for i in range(total)])
    cfg, _ = opened(Listed(GOOD), images)
    assert inputs.some_test_examples(cfg, 6)["index"].tolist() == expected


def test_a_range_of_values_reaches_the_batches(opened):
    cfg, task = opened(Listed(FLOATS), Listed(FLOATS), data__value_range=(0, 1))
    inputs.check_splits(cfg, task)
    batch = next(inputs.eval_batches(cfg))
    expected = np.rint(np.linspace(0, 255, 64)).reshape(8, 8)
    assert_array_equal(batch["image"][0, ..., 0], expected)


# Unreadable images


def batch_of(*examples):
    """Return a batch of these (index, unreadable) pairs."""
    index, unreadable = zip(*examples, strict=True)
    return {"index": np.array(index), "unreadable": np.array(unreadable, np.float32)}


def test_unreadable_images_are_counted_once(monkeypatch):
    """An image whose last reading failed counts once over all epochs and processes."""
    unreadable = UnreadableImages()
    batches = [
        batch_of((0, 1), (1, 0)),
        batch_of((2, 1), (0, 1)),
        batch_of((0, 1), (-1, 0)),
    ]
    assert [*unreadable.watch(batches)] == batches
    assert unreadable.gather() == 2
    assert [*unreadable.watch(batches)] == batches
    assert unreadable.gather() == 2
    assert unreadable.indices == {0, 2}
    # Another process fails to read images 2 and 7. This process fails to read image 5,
    # and reads image 0 after its storage recovered.
    list(unreadable.watch([batch_of((0, 0), (5, 1))]))
    monkeypatch.setattr(
        "hivit_jax.data.unreadable.gather_objects",
        lambda mine: [mine, ({2, 7}, set())],
    )
    assert unreadable.gather() == 3
    assert unreadable.indices == {2, 5, 7}


def test_share_of_unreadable_images():
    """data.max_unreadable is a fraction of the images of the split."""
    data = digits_config(data__max_unreadable=0.001).data
    check_unreadable(1, data, "train")  # of 1,437
    with pytest.raises(
        DataError, match=r"2 images of digits .* 0.14% of the 1,437 .* 0.10%"
    ):
        check_unreadable(2, data, "train")
    with pytest.raises(DataError, match="check_data"):
        check_unreadable(1, data, "test")
