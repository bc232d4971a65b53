"""Pixels: decoding, resizing, random crops."""

import io
import math

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from hivit_jax.data import pipeline, transforms


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
