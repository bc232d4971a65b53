"""Order, sources, batches, crops on the host, and augmentation on the device."""

import io
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from sklearn.datasets import load_digits

from hivit_jax import augment, config
from hivit_jax.data import pipeline, sources, transforms
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


# Crops


@pytest.fixture
def tf():
    return pipeline._tensorflow()


@pytest.fixture
def boxes(tf, monkeypatch):
    """Boxes (top, left, height, width) of the crops made in a test."""
    found, crop = [], tf.image.crop_to_bounding_box

    def record(image, *box):
        found.append([int(side) for side in box])
        return crop(image, *box)

    monkeypatch.setattr(tf.image, "crop_to_bounding_box", record)
    return found


def noise_image(*shape):
    return np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(120, 120), (100, 160)])
def test_random_crops(boxes, height, width):
    image, low, high, count = noise_image(height, width, 3), 0.1, 0.5, 150
    for seed in range(count):
        out = transforms.random_resized_crop(image, (8, 12), (low, high), [7, seed])
        assert out.shape == (8, 12, 3)
        assert out.dtype == "uint8"
    top, left, h, w = np.array(boxes).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    # Sides are rounded to whole pixels after area and aspect are drawn.
    area = height * width
    assert ((h + 0.5) * (w + 0.5) >= low * area).all()
    assert ((h - 0.5) * (w - 0.5) <= high * area).all()
    assert ((w + 0.5) / (h - 0.5) >= 3 / 4).all()
    assert ((w - 0.5) / (h + 0.5) <= 4 / 3).all()
    # Uniform area, log-uniform aspect, uniform place: means within four errors.
    error = 4 / math.sqrt(12 * count)
    assert (h * w / area).mean() == pytest.approx(0.3, abs=error * 0.4)
    assert np.log(w / h).mean() == pytest.approx(0, abs=error * math.log(16 / 9))
    for place, side, whole in ((top, h, height), (left, w, width)):
        assert (place / (whole - side)).mean() == pytest.approx(0.5, abs=error)
    assert len(set(map(tuple, boxes))) > 0.9 * count


def test_crop_is_a_function_of_its_seed(boxes):
    image = noise_image(40, 50, 3)

    def crop(seed):
        return np.asarray(transforms.random_resized_crop(image, (8, 8), (0.2, 1), seed))

    one, again, other = crop([1, 2]), crop([1, 2]), crop([2, 1])
    assert_array_equal(one, again)
    assert (one != other).any()
    top, left, height, width = boxes[0]
    part = image[top : top + height, left : left + width]
    assert_array_equal(one, transforms.resize(part, (8, 8)))


@pytest.mark.parametrize(
    ("shape", "size"),
    [((1, 50), (1, 1)), ((50, 1), (1, 1)), ((6, 60), (6, 8)), ((60, 6), (8, 6))],
)
def test_image_that_no_crop_fits(boxes, shape, size):
    """The largest centred crop of an allowed aspect."""
    image = noise_image(*shape, 1)
    out = transforms.random_resized_crop(image, (8, 8), (0.9, 1.0), [0, 0])
    assert out.shape == (8, 8, 1)
    top, left, *found = boxes[0]
    assert tuple(found) == size
    for first, side, whole in zip((top, left), size, shape, strict=True):
        assert abs(2 * first + side - whole) <= 1


def test_crop_of_everything_is_plain_resize(boxes):
    image = noise_image(30, 30, 3)
    for seed in range(10):
        out = transforms.random_resized_crop(image, (8, 8), (1.0, 1.0), [seed, 0])
        assert_array_equal(out, transforms.resize(image, (8, 8)))
    assert boxes == [[0, 0, 30, 30]] * 10


def test_resize_keeps_flat_colours_and_range():
    for level in (0, 1, 127, 255):
        image = np.full((9, 7, 3), level, np.uint8)
        assert (transforms.resize(image, (16, 5)).numpy() == level).all()
    # Bicubic overshoots at an edge; it must not wrap around.
    edge = np.zeros((8, 8, 1), np.uint8)
    edge[:, 4:] = 255
    larger = transforms.resize(edge, (32, 32)).numpy()[0, :, 0].astype(int)
    assert larger[:12].max() < 40
    assert larger[20:].min() > 215
    # Downwards every pixel counts.
    mean = transforms.resize(noise_image(64, 64, 1), (2, 2)).numpy().astype(float)
    assert np.abs(mean - 127.5).max() < 20


def test_decode():
    image = noise_image(5, 7, 3)
    for channels in (1, 3):
        buffer = io.BytesIO()
        Image.fromarray(image[..., 0] if channels == 1 else image).save(buffer, "PNG")
        decoded = transforms.decode(buffer.getvalue(), channels).numpy()
        assert_array_equal(decoded, image[..., :channels])


# On the device


def test_normalize():
    images = noise_image(2, 5, 6, 3)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    out = augment.normalize(jnp.asarray(images), mean, std)
    assert out.dtype == jnp.float32
    assert_allclose(out, (images / 255 - np.array(mean)) / np.array(std), atol=1e-6)


def test_random_flip():
    keys = jax.random.split(jax.random.key(0), 1000)
    images = np.random.RandomState(0).rand(1000, 2, 3, 1).astype(np.float32)
    out = np.asarray(augment.random_flip(jnp.asarray(images), keys))
    flipped = (out == images[:, :, ::-1]).all((1, 2, 3))
    same = (out == images).all((1, 2, 3))
    assert (flipped ^ same).all()
    # Standard error of the share: 0.016.
    assert flipped.mean() == pytest.approx(0.5, abs=0.06)
    order = np.random.RandomState(1).permutation(1000)[:64]
    part = augment.random_flip(jnp.asarray(images[order]), keys[order])
    assert_array_equal(part, out[order])


def test_smooth_labels():
    out = np.asarray(augment.smooth_labels(jnp.asarray([2, 0]), 4, 0.1))
    expected = [[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]
    assert_allclose(out, expected, atol=1e-7)
    assert_allclose(out.sum(1), 1, atol=1e-6)
    hard = augment.smooth_labels(jnp.asarray([2, 0]), 4, 0.0)
    assert_array_equal(hard, np.eye(4)[[2, 0]])


def key_data(*arguments):
    return np.asarray(jax.random.key_data(augment.sample_keys(*arguments)))


def test_sample_keys_go_by_position():
    whole = key_data(0, "train", jnp.uint32(100), 8)
    halves = [key_data(0, "train", jnp.uint32(first), 4) for first in (100, 104)]
    assert_array_equal(whole, np.concatenate(halves))
    assert len(np.unique(whole, axis=0)) == 8
    for other in ((1, "train", 100, 8), (0, "eval", 100, 8), (0, "train", 108, 8)):
        keys = key_data(other[0], other[1], jnp.uint32(other[2]), other[3])
        assert not (keys[:, None] == whole[None]).all(-1).any()


def test_sample_keys_beyond_32_bits():
    last = key_data(0, "train", jnp.uint32(2**32 - 2), 4)
    assert_array_equal(last[2:], key_data(0, "train", jnp.uint32(0), 2))


def test_keys_for_one_purpose():
    keys = augment.sample_keys(0, "train", jnp.uint32(0), 6)
    mask, flip = (augment.split_keys(keys, purpose) for purpose in ("mask", "flip"))
    data = [np.asarray(jax.random.key_data(k)) for k in (keys, mask, flip)]
    assert len(np.unique(np.concatenate(data), axis=0)) == 18
    part = jax.random.key_data(augment.split_keys(keys[2:4], "mask"))
    assert_array_equal(part, data[1][2:4])
