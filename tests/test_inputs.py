"""Tests of the input pipeline, from config keys to batches."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import assert_batches_equal, digits_config, encode, folder_config
from numpy.testing import assert_array_equal
from PIL import Image

from hivit_jax import evaluate, inputs, models
from hivit_jax.augment import resample
from hivit_jax.data import notes, randaugment, transforms
from hivit_jax.data.order import permutation, samples_at
from hivit_jax.data.sources import digits, registry
from hivit_jax.data.sources.base import Source
from hivit_jax.data.unreadable import UnreadableImages, check_unreadable
from hivit_jax.errors import ConfigError, DataError
from hivit_jax.tasks import probing


def test_model_with_fewer_classes_than_the_dataset_is_an_error():
    for make_batches in (lambda c: inputs.train_batches(c, 0, 1), inputs.eval_batches):
        with pytest.raises(
            ConfigError, match="num_classes=9; expected at least 10, .*digits"
        ):
            next(make_batches(digits_config(model__num_classes=9)))


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
def test_invalid_values_of_data_keys_are_errors(overrides, message):
    with pytest.raises(ConfigError, match=message):
        next(inputs.train_batches(digits_config(**overrides), 0, 1))


def test_images_of_the_models_size_are_unchanged():
    cfg = digits_config(model__image_size=8)
    batch = next(inputs.train_batches(cfg, 0, 1))
    expected = digits.Digits("train").pixels()[permutation(0, 0, 1437)[:96]]
    assert_array_equal(batch["image"][..., 0], expected)


def test_batches_have_the_channels_and_shape_of_the_model():
    color = dict(model__in_channels=3, data__mean=(0.5,) * 3, data__std=(0.5,) * 3)
    cfg = digits_config(model__image_size=8, **color)
    batch = next(inputs.train_batches(cfg, 0, 1))
    gray = next(inputs.train_batches(digits_config(model__image_size=8), 0, 1))
    assert_array_equal(batch["image"], np.repeat(gray["image"], 3, -1))
    cfg = digits_config(model__image_size=(8, 24), **color)
    assert models.image_shape(cfg.model) == (8, 24, 3)
    assert next(inputs.train_batches(cfg, 0, 1))["image"].shape == (96, 8, 24, 3)


def test_crops_differ_between_epochs_and_seeds():
    cfg = digits_config(
        data__crop_scale=(0.3, 1.0), data__train_examples=100, batch_size=100
    )
    first_epoch, second_epoch = inputs.train_batches(cfg, 0, 2)
    uncropped = next(
        inputs.train_batches(
            digits_config(data__train_examples=100, batch_size=100), 0, 1
        )
    )
    assert_array_equal(first_epoch["label"], uncropped["label"])
    assert (first_epoch["image"] != uncropped["image"]).any((1, 2, 3)).mean() > 0.9
    cfg.seed = 1
    other_seed = next(inputs.train_batches(cfg, 0, 1))
    # Images are sorted by index, so that each image is compared with itself.
    images, labels = [], []
    for batch, seed, epoch in (
        (first_epoch, 0, 0),
        (second_epoch, 0, 1),
        (other_seed, 1, 0),
    ):
        by_index = np.argsort(permutation(seed, epoch, 100))
        images.append(batch["image"][by_index])
        labels.append(batch["label"][by_index])
    for other_images, other_labels in zip(images[1:], labels[1:], strict=True):
        assert_array_equal(other_labels, labels[0])
        assert (other_images != images[0]).any((1, 2, 3)).mean() > 0.9


@pytest.mark.slow
def test_device_and_host_resizing_agree(folder):
    """Canvases that the device resizes match the images that the host resizes."""
    canvas_config = folder_config(folder)
    host_config = folder_config(folder, data__canvas=0)
    for make_batches in (lambda c: inputs.train_batches(c, 3, 7), inputs.eval_batches):
        for canvas_batch, host_batch in zip(
            make_batches(canvas_config), make_batches(host_config), strict=True
        ):
            assert canvas_batch["image"].shape == (8, 64, 64, 3)
            assert canvas_batch["box"].shape == (8, 2, 3)
            assert host_batch["image"].shape == (8, 24, 24, 3)
            assert "box" not in host_batch
            pixels = resample.resample(
                canvas_batch["image"], canvas_batch["box"], (24, 24)
            )
            assert np.abs(pixels - host_batch["image"].astype(float)).mean() < 0.4
            for key in ("label", "weight", "unreadable"):
                assert_array_equal(canvas_batch[key], host_batch[key])


def test_evaluation_uses_center_crops(folder):
    source = registry.open_source(folder_config(folder).data, "test")
    batches = list(inputs.eval_batches(folder_config(folder, data__canvas=0)))
    images = np.concatenate([b["image"] for b in batches])
    weights = np.concatenate([b["weight"] for b in batches])
    # Two batches of 8 contain the 11 images; the other examples are padding.
    assert_array_equal(weights, np.arange(16) < 11)
    for image, index in zip(images, range(11), strict=False):
        encoded = source.sample(index)["image"]
        # With crop_pct=0.75, the shorter side becomes 24 / 0.75 = 32 pixels.
        resized = Image.open(io.BytesIO(encoded)).resize(
            (42, 32), Image.Resampling.BICUBIC
        )
        expected = np.asarray(resized)[4:28, 9:33]
        assert np.abs(image - expected.astype(float)).mean() < 0.4


def test_randaugment_changes_training_images_only(folder):
    """RandAugment processes the resized crop."""
    plain_config = folder_config(folder, data__canvas=0)
    cfg = folder_config(folder, data__randaugment=True)
    num_draws = transforms.DRAWS + randaugment.DRAWS
    num_changed = 0
    for batch_index, (augmented, plain) in enumerate(
        zip(
            inputs.train_batches(cfg, 0, 6),
            inputs.train_batches(plain_config, 0, 6),
            strict=True,
        )
    ):
        indices, epochs = samples_at(batch_index * 8 + np.arange(8), 40, 0)
        for k, (index, epoch) in enumerate(zip(indices, epochs, strict=True)):
            draws = transforms.uniforms(0, epoch, index, num_draws)
            draws = draws[-randaugment.DRAWS :]
            expected = randaugment.randaugment(plain["image"][k], draws)
            assert_array_equal(augmented["image"][k], expected)
            num_changed += (augmented["image"][k] != plain["image"][k]).any()
    # On average, a quarter of the 48 images get no operation.
    assert 24 < num_changed < 46
    assert_batches_equal(
        inputs.eval_batches(cfg), inputs.eval_batches(folder_config(folder))
    )
    with pytest.raises(ConfigError, match="randaugment with .*in_channels=1"):
        next(inputs.train_batches(digits_config(data__randaugment=True), 0, 1))


def test_files_with_too_few_channels_are_an_error(folder):
    cfg = folder_config(
        folder, model__in_channels=4, data__mean=(0.5,) * 4, data__std=(1.0,) * 4
    )
    with pytest.raises(DataError, match=r"JPEG: expected 4 channels, found 3; set"):
        next(inputs.train_batches(cfg, 0, 1))


# Keys of config.data

ARRAYS = ("image", "label", "weight", "unreadable", "box")


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
def default_batches(folder):
    """Return the result of `batches_of` for a config that resizes on the host."""
    return batches_of(folder_config(folder, data__canvas=0, data__flip=True))


def batches_of(cfg):
    """Return four training batches and all evaluation batches."""
    return list(inputs.train_batches(cfg, 0, 4)), list(inputs.eval_batches(cfg))


def identical(actual, expected):
    """Return True if the `ARRAYS` of two lists of batches are bit-identical."""
    return len(actual) == len(expected) and all(
        np.array_equal(batch.get(key), expected_batch.get(key))
        for batch, expected_batch in zip(actual, expected, strict=True)
        for key in ARRAYS
    )


@pytest.mark.parametrize(("key", "value", "train_changes", "eval_changes"), EFFECTS)
def test_data_keys_change_only_the_listed_batches(
    folder, default_batches, key, value, train_changes, eval_changes
):
    overrides = dict(data__canvas=0, data__flip=True) | {f"data__{key}": value}
    batches = batches_of(folder_config(folder, **overrides))
    unchanged = [
        identical(*pair) for pair in zip(batches, default_batches, strict=True)
    ]
    assert unchanged == [not train_changes, not eval_changes]


def pixels_of(folder, split):
    """Return the pixels of a split's files, sorted by class and name."""
    paths = sorted((folder / split).glob("*/*"))
    return [np.asarray(Image.open(path)) for path in paths]


def test_split_keys_select_directories(folder):
    """Training on "val" and evaluation on "train" yield the labels of the files."""
    swapped = dict(data__train_split="val", data__eval_split="train")
    cfg = folder_config(folder, data__canvas=0, data__crop_scale=(1.0, 1.0), **swapped)
    [batch] = inputs.train_batches(cfg, 0, 1)
    classes = sorted(path.name for path in (folder / "train").iterdir())
    for split, batches in (("val", [batch]), ("train", list(inputs.eval_batches(cfg)))):
        paths = sorted((folder / split).glob("*/*"))
        # One training batch of 8 images in random order; all images in evaluation.
        order = permutation(0, 0, 11)[:8] if split == "val" else range(40)
        labels = [classes.index(paths[index].parent.name) for index in order]
        assert np.concatenate([b["label"] for b in batches]).tolist() == labels


def test_center_crops_are_pixels_of_the_files(folder):
    """Center crops of 24x24 from 48x64 pixels are not resized.

    Without random crops, training also uses center crops, in random order.
    """
    options = dict(data__crop_pct=0.5, data__crop_scale=(1.0, 1.0), data__canvas=0)
    train, evaluation = batches_of(folder_config(folder, **options))
    # `batches_of` yields 4 x 8 of the 40 training images, and all 11 validation images.
    for split, batches, count in (("train", train, 32), ("val", evaluation, 11)):
        expected = [pixels[12:36, 20:44] for pixels in pixels_of(folder, split)]
        if split == "train":
            expected = np.stack(expected)[permutation(0, 0, 40)]
        images = np.concatenate([batch["image"] for batch in batches])
        assert_array_equal(images[:count], expected[:count])


def halved(pixels, taps):
    """Halve the center 48x48 pixels of an image [48, 64, 3].

    Filters along the width, then along the height, and rounds after each pass.

    Args:
      taps: {offset from an even position: weight}.
    """
    for axis, start in ((1, 8), (0, 0)):
        pixels, weighted_sum = np.moveaxis(np.float64(pixels), axis, 0), 0
        even, weight_sum = start + np.arange(24) * 2, 0
        for offset, weight in taps.items():
            positions = even + offset
            inside = (positions >= 0) & (positions < len(pixels))
            weight = (weight * inside)[:, None, None]
            neighbors = pixels[positions.clip(0, len(pixels) - 1)]
            weighted_sum = weighted_sum + weight * neighbors
            weight_sum = weight_sum + weight
        pixels = np.rint(weighted_sum / weight_sum).clip(0, 255)
        pixels = np.moveaxis(pixels, 0, axis)
    return pixels.astype(np.uint8)


def pil_halved(name):
    """Return a function that halves the center of an image with PIL.

    Args:
      name: name of PIL's filter, in lower case.
    """
    box = (8, 0, 56, 48)
    method = Image.Resampling[name.upper()]
    return lambda pixels: np.asarray(
        Image.fromarray(pixels).resize((24, 24), method, box)
    )


CUBIC = {-1: -0.0625, 0: 0.5625, 1: 0.5625, 2: -0.0625}


# (interpolation, antialias) -> function that halves the center of an image
REFERENCE_RESIZE = {
    ("bicubic", True): pil_halved("bicubic"),
    ("bilinear", True): pil_halved("bilinear"),
    ("bicubic", False): lambda pixels: halved(pixels, CUBIC),
    ("bilinear", False): lambda pixels: halved(pixels, {0: 0.5, 1: 0.5}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("interpolation", "antialias"), REFERENCE_RESIZE)
def test_images_are_resized_as_configured(folder, interpolation, antialias):
    """Resizing follows data.interpolation and data.antialias.

    The host is bit-exact. The device, which also normalizes, may round ties
    differently.
    """
    resizing = dict(data__interpolation=interpolation, data__antialias=antialias)
    moments = dict(data__mean=(0.1, 0.5, 0.9), data__std=(0.2, 0.4, 0.8))
    options = resizing | moments | dict(data__crop_pct=1.0)
    resize = REFERENCE_RESIZE[interpolation, antialias]
    expected = np.stack([*map(resize, pixels_of(folder, "val"))])
    cfg = folder_config(folder, data__canvas=0, **options)
    host = np.concatenate([b["image"] for b in inputs.eval_batches(cfg)])[:11]
    assert_array_equal(host, expected)
    cfg = folder_config(folder, data__canvas=64, **options)
    images = [*map(inputs.make_task(cfg).preprocess, inputs.eval_batches(cfg))]
    device = np.concatenate(images)[:11] * (0.2, 0.4, 0.8) + (0.1, 0.5, 0.9)
    difference = np.abs(device * 255 - expected)
    assert difference.max() < 1.01
    assert difference.mean() < 0.2


# Checks before the first step


class ListSource(Source):
    """Source of examples in a list.

    An example is an encoded image with label 0, a dict, or an exception to raise.
    """

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


GOOD = encode(np.arange(64, dtype=np.uint8).reshape(8, 8), "PNG")
FLOATS = encode(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8), "TIFF")


@pytest.fixture
def replace_sources(monkeypatch):
    """Return a function that replaces the sources of both splits.

    The function returns (config, task) for images of 8x8 pixels.
    """

    def make(train, test, **overrides):
        sources = {"train": train, "test": test}
        monkeypatch.setattr(inputs, "open_source", lambda _, split: sources[split])
        cfg = digits_config(model__image_size=8, **overrides)
        return cfg, inputs.make_task(cfg)

    return make


def test_empty_split_is_an_error(replace_sources):
    """`make_task` raises the error."""
    for train, test, name in (
        (ListSource(GOOD), ListSource(), "test"),
        (ListSource(), ListSource(GOOD), "train"),
    ):
        with pytest.raises(DataError, match=f"the {name} split of digits is empty"):
            replace_sources(train, test)


def test_splits_with_different_classes_are_an_error(replace_sources):
    with pytest.raises(DataError, match="the same classes in both splits, found 2"):
        replace_sources(ListSource(GOOD), ListSource(GOOD, classes=("a", "c")))


@pytest.mark.parametrize(
    ("bad_examples", "message"),
    [
        (
            [b""] * 20,
            "the test split of .* no readable image among the 8 checked\n.*check_data",
        ),
        (
            [OSError("gone")],
            "the test split of digits has no readable image among the 1 checked",
        ),
        ([FLOATS], r"example 0: expected 8 or 16 bits, .*value_range="),
        ([{"image": GOOD, "label": 10}], "example 0: expected a label from 0 to 9"),
    ],
)
def test_check_splits_reads_both_splits(replace_sources, bad_examples, message):
    """A single damaged image is not an error."""
    inputs.check_splits(
        *replace_sources(ListSource(GOOD, b"", GOOD), ListSource(b"", GOOD))
    )
    cfg, task = replace_sources(ListSource(GOOD), ListSource(*bad_examples))
    with pytest.raises(DataError, match=message):
        inputs.check_splits(cfg, task)
    cfg, task = replace_sources(ListSource(*bad_examples), ListSource(GOOD))
    with pytest.raises(DataError, match=message.replace("test split", "train split")):
        inputs.check_splits(cfg, task)


def test_warnings_name_small_classes_and_unmatched_exclusions(tmp_path, monkeypatch):
    """`check_splits` and `dataset_warnings` return these warnings.

    If no labels are needed (False), only the warning about exclusions is left.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for k, name in enumerate("abcdefg"):
        (tmp_path / "own" / name).mkdir(parents=True)
        for n in range(4 if k == 0 else 1):
            (tmp_path / "own" / name / f"{n}.png").write_bytes(GOOD)
    (tmp_path / "list.txt").write_text("a/0.png\nz/0.png\n*.png\n")
    keys = dict(data__eval_fraction=0.3, data__exclude=tmp_path / "list.txt")
    cfg = folder_config(tmp_path / "own", model__num_classes=0, **keys)
    exclusion_warning, class_warning = inputs.check_splits(cfg, inputs.make_task(cfg))
    assert exclusion_warning == (
        f"data.exclude={tmp_path}/list.txt: 2 entries match no image, the first is "
        "'z/0.png'; expected paths as check_data --list writes them"
    )
    assert class_warning == (
        "the evaluation has no image of 6 classes: b, c, d, e, f, ... and 1 more"
    )
    splits, both = inputs.used_splits(cfg), [exclusion_warning, class_warning]
    assert notes.dataset_warnings(cfg.data, splits, True) == both
    assert notes.dataset_warnings(cfg.data, splits, False) == [exclusion_warning]
    # A split that does not exist is an error only when its images are read.
    keys = dict(data__train_split=".", data__eval_split="nowhere")
    cfg = folder_config(tmp_path / "own", **keys)
    assert notes.dataset_warnings(cfg.data, splits, True) == []


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("1 2 3", "class: 0; labels start at 0: subtract 1 from labels that start"),
        ("0 2", "class: 1"),
        ("1 3", "classes: 0, 2"),
        ("0 1 2", None),
        ("a b", None),
    ],
)
@pytest.mark.parametrize("multi_label", [False, True])
def test_warning_names_classes_without_training_images(
    labels, expected, multi_label, tmp_path
):
    """Labels in a CSV file that start at 1 leave the first output of a model unused."""
    lines = [f"{k}.png,{label}" for k, label in enumerate(labels.split())]
    (tmp_path / "own.csv").write_text("\n".join(["path,label", *lines]))
    keys = dict(data__name="csv", data__eval_split="none", model__num_classes=0)
    keys |= dict(data__multi_label=multi_label)
    data = folder_config(tmp_path / "own.csv", **keys).data
    found = notes.dataset_warnings(data, ("train",), True)
    if expected is None:
        assert found == []
    else:
        [line] = found
        assert line.startswith("the training has no image of ")
        assert expected in line
        assert ("subtract" in line) == ("subtract" in expected)
    assert notes.dataset_warnings(data, ("train",), False) == []


def test_evaluations_warn_of_unmatched_exclusions(tmp_path, monkeypatch, capsys):
    """`--mode eval` and the probes print the warning once, at the start."""

    class Started(Exception):
        pass

    def start(*_):
        raise Started

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in "ab":
        for split in ("train", "val"):
            path = tmp_path / "own" / split / name / f"{split}.png"
            path.parent.mkdir(parents=True)
            path.write_bytes(GOOD)
    # The second entry matches an image of the training split only.
    (tmp_path / "list.txt").write_text("z.png\na/train.png\n")
    keys = dict(data__exclude=tmp_path / "list.txt", model__num_classes=0)
    cfg = folder_config(tmp_path / "own", **keys)
    pretrained = SimpleNamespace(info={}, recipe={}, arguments={})
    monkeypatch.setattr(evaluate.load, "read_for", lambda *_: pretrained)
    monkeypatch.setattr(evaluate, "make_mesh", start)
    with pytest.raises(Started):
        evaluate.evaluate_checkpoint(cfg, tmp_path)
    monkeypatch.setattr(evaluate.load, "read_for", start)
    with pytest.raises(Started):
        probing.make_encoder(cfg, inputs.make_task(cfg), None, False)
    line, line_of_probe = capsys.readouterr().out.splitlines()
    assert line == line_of_probe
    assert line.startswith(f"warning: data.exclude={tmp_path}/list.txt: 1 entry match")
    assert "the first is 'z.png'" in line


@pytest.mark.parametrize(
    ("total", "expected"), [(2, [0, 1]), (6, [*range(6)]), (21, [0, 4, 8, 12, 16, 20])]
)
def test_some_test_examples_are_evenly_spaced(replace_sources, total, expected):
    """The first examples of class folders would all have the same class."""
    images = [encode(np.full((8, 8), i, np.uint8), "PNG") for i in range(total)]
    cfg, _ = replace_sources(ListSource(GOOD), ListSource(*images))
    assert inputs.some_test_examples(cfg, 6)["index"].tolist() == expected


def test_value_range_is_mapped_to_uint8(replace_sources):
    cfg, task = replace_sources(
        ListSource(FLOATS), ListSource(FLOATS), data__value_range=(0, 1)
    )
    inputs.check_splits(cfg, task)
    batch = next(inputs.eval_batches(cfg))
    expected = np.rint(np.linspace(0, 255, 64)).reshape(8, 8)
    assert_array_equal(batch["image"][0, ..., 0], expected)


# Unreadable images


def batch_of(*examples):
    """Return a batch of (index, unreadable) pairs."""
    index, unreadable = zip(*examples, strict=True)
    return {"index": np.array(index), "unreadable": np.array(unreadable, np.float32)}


def test_unreadable_images_are_counted_once(monkeypatch):
    """Each image whose last read failed counts once, over all epochs and processes."""
    unreadable = UnreadableImages(digits_config().data, 1437)
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
    # Another process fails to read images 2 and 7. This process fails to read images 5
    # and 9, and reads images 0 and 9 after their storage recovered.
    list(unreadable.watch([batch_of((0, 0), (5, 1), (9, 1)), batch_of((9, 0))]))
    monkeypatch.setattr(
        "hivit_jax.data.unreadable.gather_objects",
        lambda mine: [mine, ({2, 7}, set())],
    )
    assert unreadable.gather() == 3
    assert unreadable.indices == {2, 5, 7}


def test_too_many_unreadable_images_announce_the_end(capsys):
    """The line is printed once, before the next log line ends the run."""
    unreadable = UnreadableImages(digits_config(data__max_unreadable=0.001).data, 1437)
    list(unreadable.watch([batch_of((0, 1), (1, 0)), batch_of((0, 1))]))
    assert capsys.readouterr().err == ""
    list(unreadable.watch([batch_of((2, 1)), batch_of((3, 1))]))
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "2 unreadable images, more than data.max_unreadable=0.001 allows: the run ends "
        "at one of its next log lines"
    )


def test_too_large_fraction_of_unreadable_images_is_an_error():
    """data.max_unreadable is a fraction of the images of the split."""
    data = digits_config(data__max_unreadable=0.001).data
    check_unreadable(1, 1437, data)  # 0.07%
    with pytest.raises(
        DataError, match=r"2 images of digits .* 0.14% of the 1,437 .* 0.10%"
    ):
        check_unreadable(2, 1437, data)
    with pytest.raises(DataError, match="check_data"):
        check_unreadable(1, 360, data, "test")
