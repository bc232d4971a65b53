"""Tests of random and center crops, and of resizing on the host and on the device."""

import math
from functools import partial

import jax
import numpy as np
import pytest
from datasets import noise_image
from numpy.testing import assert_array_equal
from PIL import Image

from benchmarks.photographs import photographs
from hivit_jax.augment import resample
from hivit_jax.data import crops as data_crops
from hivit_jax.data import transforms
from hivit_jax.data.crops import Box, Crop

SIZE = (224, 224)


def crops(height, width, count, scale=(0.2, 1.0), seed=0):
    """Return one random crop for each image index below `count`, in epoch 0.

    Args:
      height, width: size of every image.
    """
    return [
        data_crops.random_resized_crop(
            height, width, transforms.uniforms(seed, 0, index), scale
        )
        for index in range(count)
    ]


def resize_on_device(samples, size=SIZE, canvas=512, **options):
    """Resize crops on the device; return (images, canvases, spans).

    Args:
      samples: [(pixels, crop)].

    Returns:
      images: float [n, *size, C].
      canvases: uint8 [n, canvas, canvas, 3].
      spans: float32 [n, 2, 3], spans of the boxes in the canvases.
    """
    canvases = np.zeros((len(samples), canvas, canvas, 3), np.uint8)
    spans = [
        data_crops.paste_crop(pixels, crop, out, size, **options)
        for (pixels, crop), out in zip(samples, canvases, strict=True)
    ]
    spans = np.array(spans, np.float32)
    images = np.asarray(jit_resample(canvases, spans, size, **options))
    return images, canvases, spans


def jit_resample(canvases, spans, size=SIZE, **options):
    """Run `resample` as one program, because single operations compile slowly."""
    return jax.jit(partial(resample.resample, size=size, **options))(canvases, spans)


def pil_resize(image, size, box=None, filter=Image.Resampling.BICUBIC):
    """Resize with PIL in two steps, width first. PIL 13 may start with the height."""
    left, top, right, bottom = box or (0, 0, image.width, image.height)
    height = image.height
    image = image.resize((size[1], height), filter, (left, 0, right, height))
    return np.asarray(image.resize(size[::-1], filter, (0, top, size[1], bottom)))


def test_uniforms_are_frozen_uniform_and_independent():
    """The random numbers of a crop never change, so that saved runs resume exactly."""
    draws = transforms.uniforms(7, 3, 1_281_166)
    assert draws[:3] == FIRST_UNIFORMS
    assert len(draws) == transforms.DRAWS
    # Seed, epoch and image index each change all numbers.
    for other in ((8, 3, 5), (7, 4, 5), (7, 3, 6)):
        other_draws = transforms.uniforms(*other)
        assert not set(other_draws) & set(transforms.uniforms(7, 3, 5))
    draws = np.array([transforms.uniforms(0, 0, i) for i in range(2000)])
    assert (draws >= 0).all()
    assert (draws < 1).all()
    five_standard_errors = 5 / math.sqrt(12 * len(draws))
    assert np.abs(draws.mean(0) - 0.5).max() < five_standard_errors
    assert np.abs(np.corrcoef(draws.T) - np.eye(draws.shape[1])).max() < 0.15


FIRST_UNIFORMS = [0.2921524578225323, 0.3256742663793454, 0.9849989507135709]


@pytest.mark.parametrize(("height", "width"), [(120, 120), (100, 160)])
def test_random_crops_have_the_documented_distribution(height, width):
    """Random crops are uniform in area and position and log-uniform in aspect."""
    low, high, count = 0.1, 0.5, 600
    boxes = [crop.box for crop in crops(height, width, count, (low, high))]
    assert all(
        crop.box == crop.bounds and all(type(side) is int for side in crop.box)
        for crop in crops(height, width, 5)
    )
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
    # Means are within four standard errors.
    error = 4 / math.sqrt(12 * count)
    assert (h * w / area).mean() == pytest.approx(0.3, abs=error * 0.4)
    assert np.log(w / h).mean() == pytest.approx(0, abs=error * math.log(16 / 9))
    for corner, side, extent in ((top, h, height), (left, w, width)):
        free = side < extent
        relative = corner[free] / (extent - side[free])
        assert relative.mean() == pytest.approx(0.5, abs=error)
    # The first and the last possible row occur.
    assert (top == 0).any()
    assert (top + h == height).any()
    assert len(set(boxes)) > 0.9 * count


@pytest.mark.parametrize(
    ("shape", "size"),
    [((1, 50), (1, 1)), ((50, 1), (1, 1)), ((6, 60), (6, 8)), ((60, 6), (8, 6))],
)
def test_largest_central_crop_replaces_crops_that_do_not_fit(shape, size):
    """The crop is the largest central one with an aspect from 3/4 to 4/3."""
    for crop in crops(*shape, 20, (0.9, 1.0)):
        assert crop.box[2:] == size
        for first, side, extent in zip(crop.box[:2], size, shape, strict=True):
            assert abs(2 * first + side - extent) <= 1


def test_crop_of_the_full_area_is_the_whole_image():
    for crop in crops(30, 30, 10, (1.0, 1.0)):
        assert crop == Crop(Box(0, 0, 30, 30), Box(0, 0, 30, 30))


@pytest.mark.slow
def test_random_crops_equal_pil():
    """Crops that the device or the host resizes equal PIL's up to rounding."""
    samples = [
        (photographs()[name], crop)
        for name in sorted(photographs())
        for crop in crops(*photographs()[name].shape[:2], 3, seed=len(name))
        if max(crop.box[2:]) <= 512
    ]
    assert len(samples) > 15
    device = resize_on_device(samples)[0]
    for (pixels, crop), actual in zip(samples, device, strict=True):
        top, left, height, width = crop.box
        part = Image.fromarray(pixels[top : top + height, left : left + width])
        assert np.abs(actual - pil_resize(part, SIZE)).mean() < 0.002
        # PIL 13 starts with the height where that is faster, and rounds differently.
        installed_pil = np.asarray(part.resize(SIZE, Image.Resampling.BICUBIC))
        assert np.abs(actual - installed_pil).mean() < 0.35
        out = np.zeros((*SIZE, 3), np.uint8)
        spans = data_crops.paste_crop(pixels, crop, out, SIZE)
        assert np.abs(out - installed_pil.astype(float)).mean() < 0.002
        assert spans == ((0, 224, 224), (0, 224, 224))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(224, 224), (168, 280), (280, 168)])
def test_center_crops_equal_pil(size):
    """A center crop equals PIL's resize to cover size / 0.875, followed by a crop."""
    samples, expected = [], []
    for name in sorted(photographs()):
        pixels = photographs()[name]
        height, width = pixels.shape[:2]
        samples.append((pixels, data_crops.center_crop(height, width, size, 0.875)))
        scale = max(size[0] / 0.875 / height, size[1] / 0.875 / width)
        resized = [math.floor(side * scale + 1e-9) for side in (height, width)]
        image = pil_resize(Image.fromarray(pixels), resized)
        top, left = (round((r - s) / 2) for r, s in zip(resized, size, strict=True))
        expected.append(image[top : top + size[0], left : left + size[1]])
    device = resize_on_device(samples, size, canvas=640)[0]
    for (pixels, crop), actual, reference in zip(
        samples, device, expected, strict=True
    ):
        assert actual.shape == reference.shape == (*size, 3)
        assert np.abs(actual - reference).mean() < 0.01
        out = np.zeros((*size, 3), np.uint8)
        data_crops.paste_crop(pixels, crop, out, size)
        # The host calls PIL, and PIL 13 may start with the height.
        assert np.abs(out - reference.astype(float)).mean() < 0.35


def test_center_crop_of_a_500x375_image_has_the_expected_box():
    """500x375 is resized to 341x256 and cropped to 224x224 at row 16, column 58."""
    crop = data_crops.center_crop(375, 500, SIZE, 224 / 256)
    scale = 375 / 256
    assert crop.box.top == 16 * scale
    assert crop.box.height == 224 * scale
    assert crop.box.left == pytest.approx(58 * 500 / 341)
    assert crop.box.width == pytest.approx(224 * 500 / 341)
    assert crop.bounds == Box(0, 0, 375, 500)
    whole_image = data_crops.center_crop(8, 8, (16, 16), 1.0)
    assert whole_image.box == whole_image.bounds == Box(0, 0, 8, 8)


@pytest.mark.slow
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("antialias", [True, False])
def test_resizing_equals_a_reference_up_to_rounding(interpolation, antialias):
    """The reference is PIL with antialiasing, and `resize_axis` without."""
    options = dict(interpolation=interpolation, antialias=antialias)
    pixels = photographs()["cat"]
    crop = Crop(*[Box(20, 30, 260, 330)] * 2)
    device = resize_on_device([(pixels, crop)], **options)[0][0]
    out = np.zeros((*SIZE, 3), np.uint8)
    data_crops.paste_crop(pixels, crop, out, SIZE, **options)
    # Bilinear interpolation has many ties, which are rounded either way.
    tolerance = 0.002 if interpolation == "bicubic" else 0.02
    assert np.abs(out - device).mean() < tolerance
    part = pixels[20:280, 30:360]
    if antialias:
        filter = Image.Resampling[interpolation.upper()]
        expected = pil_resize(Image.fromarray(part), SIZE, filter=filter)
    else:
        expected = part.astype(float)
        for axis in (1, 0):
            expected = np.rint(resize_axis(expected, axis, interpolation)).clip(0, 255)
    assert np.abs(device - expected).mean() < tolerance


def resize_axis(pixels, axis, interpolation):
    """Resize an axis to 224 pixels, each from the nearest two (bilinear) or four."""
    n = pixels.shape[axis]
    position = (np.arange(224) + 0.5) * n / 224 - 0.5
    below, total, weights = np.floor(position).astype(int), 0, 0
    for tap in (0, 1) if interpolation == "bilinear" else (-1, 0, 1, 2):
        x = np.abs(position - below - tap)
        if interpolation == "bilinear":
            weight = 1 - x
        else:
            near, far = (
                1.5 * x**3 - 2.5 * x**2 + 1,
                -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2,
            )
            weight = np.where(x <= 1, near, far)
        weight = weight * ((below + tap >= 0) & (below + tap < n))
        shape = [-1 if k == axis else 1 for k in range(3)]
        neighbors = np.take(pixels, np.clip(below + tap, 0, n - 1), axis)
        total, weights = total + neighbors * weight.reshape(shape), weights + weight
    return total / weights.reshape(shape)


@pytest.mark.slow
def test_host_copies_only_the_crop_to_the_canvas():
    """The unresized crop is at the top left of a canvas of zeros."""
    pixels = noise_image(300, 400, 3)
    crop = Crop(*[Box(20, 30, 200, 250)] * 2)
    _, canvases, spans = resize_on_device([(pixels, crop)])
    assert_array_equal(canvases[0, :200, :250], pixels[20:220, 30:280])
    assert (canvases[0, 200:] == 0).all()
    assert (canvases[0, :, 250:] == 0).all()
    assert spans[0].tolist() == [[0, 200, 200], [0, 250, 250]]


@pytest.mark.slow
def test_pixels_outside_the_bounds_of_a_crop_have_no_effect():
    pixels = noise_image(300, 400, 3)
    crop = Crop(*[Box(20, 30, 200, 250)] * 2)
    changed = np.full_like(pixels, 255)
    changed[20:220, 30:280] = pixels[20:220, 30:280]
    result, result_changed = resize_on_device([(pixels, crop), (changed, crop)])[0]
    assert_array_equal(result, result_changed)


@pytest.mark.slow
def test_canvas_of_a_center_crop_includes_the_margin_of_the_filter():
    """The result equals the resampling of the whole image."""
    pixels = noise_image(375, 500, 3)
    crop = data_crops.center_crop(375, 500, SIZE, 0.875)
    actual, canvases, spans = resize_on_device([(pixels, crop)])
    extents = spans[0, :, 2].astype(int)
    # The box has 328 rows and columns, and the filter reads a few pixels around it.
    assert (extents < 345).all()
    assert (canvases[0, extents[0] :] == 0).all()
    canvas = np.zeros((1, 512, 512, 3), np.uint8)
    canvas[0, :375, :500] = pixels
    spans = np.array(
        [
            [crop.box[axis], crop.box[2 + axis], side]
            for axis, side in enumerate((375, 500))
        ],
        np.float32,
    )
    assert np.abs(actual - jit_resample(canvas, spans[None])).mean() < 1e-3


@pytest.mark.slow
def test_crop_larger_than_the_canvas_is_resized_on_the_host():
    pixels = noise_image(700, 600, 3)
    crop = Crop(*[Box(0, 0, 700, 600)] * 2)
    actual, canvases, spans = resize_on_device([(pixels, crop)])
    assert spans[0].tolist() == [[0, 224, 224]] * 2
    expected = Image.fromarray(pixels).resize(SIZE, Image.Resampling.BICUBIC)
    assert_array_equal(canvases[0, :224, :224], expected)
    # The device does not change images that have the final size.
    assert_array_equal(actual[0], expected)


@pytest.mark.slow
def test_resizing_keeps_flat_colors_and_clips_overshoots():
    for level in (0, 1, 127, 255):
        image = np.full((9, 7, 3), level, np.uint8)
        crop = Crop(*[Box(0, 0, 9, 7)] * 2)
        assert (resize_on_device([(image, crop)], (16, 5), canvas=32)[0] == level).all()
    # A bicubic filter overshoots at an edge; the pixels must not wrap around.
    edge = np.zeros((8, 8, 3), np.uint8)
    edge[:, 4:] = 255
    crop = Crop(*[Box(0, 0, 8, 8)] * 2)
    larger = resize_on_device([(edge, crop)], (32, 32), canvas=64)[0][0, 0, :, 0]
    assert larger[:12].max() < 40
    assert larger[20:].min() > 215
    assert larger.min() >= 0
    assert larger.max() <= 255


@pytest.mark.slow
def test_samples_are_resampled_independently():
    """The pixels of an image do not depend on the rest of the batch."""
    samples = [
        (photographs()[name], crops(*photographs()[name].shape[:2], 1, (0.2, 0.3))[0])
        for name in sorted(photographs())
    ]
    _, canvases, spans = resize_on_device(samples)
    run = jax.jit(resample.resample, static_argnums=2)
    together = np.asarray(run(canvases, spans, SIZE))
    for i in (0, 3, 6):
        alone = np.asarray(run(canvases[i : i + 1], spans[i : i + 1], SIZE))[0]
        assert_array_equal(alone, together[i])
