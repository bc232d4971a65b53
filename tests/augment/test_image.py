"""Tests of normalization, flips and random erasing on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import keys_per_sample
from numpy.testing import assert_allclose, assert_array_equal

from hivit_jax.augment import image


def test_pixels_are_scaled_to_1_and_normalized():
    images = np.random.RandomState(0).randint(0, 256, (2, 5, 6, 3), np.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    out = image.normalize(jnp.asarray(images), mean, std)
    assert out.dtype == jnp.float32
    assert_allclose(out, (images / 255 - np.array(mean)) / np.array(std), atol=1e-6)


@pytest.mark.slow
def test_half_of_the_images_are_flipped():
    """The key of an image alone determines whether the image is flipped."""
    keys = keys_per_sample(1000)
    images = np.random.RandomState(0).rand(1000, 2, 3, 1).astype(np.float32)
    out = np.asarray(image.random_flip(jnp.asarray(images), keys))
    flipped = (out == images[:, :, ::-1]).all((1, 2, 3))
    unchanged = (out == images).all((1, 2, 3))
    assert (flipped ^ unchanged).all()
    # The standard error of the mean is 0.016.
    assert flipped.mean() == pytest.approx(0.5, abs=0.06)
    order = np.random.RandomState(1).permutation(1000)[:64]
    part = image.random_flip(jnp.asarray(images[order]), keys[order])
    assert_array_equal(part, out[order])


@pytest.mark.slow
def test_erased_rectangles_follow_their_distributions():
    """Frequency, area, aspect ratio and noise are as documented.

    The mean row of the top-left corners equals their mean column. The key of an image
    alone determines its rectangle and noise.
    """
    count, side = 1500, 40
    images = jnp.full((count, side, side, 3), 7.0)
    erase = jax.jit(image.random_erasing, static_argnums=2)
    out = np.asarray(erase(images, keys_per_sample(count), 0.25))
    erased_pixels = (out != 7).all(-1)
    assert_array_equal(erased_pixels, (out != 7).any(-1))
    erased_images = erased_pixels.any((1, 2))
    # The tolerance is four standard errors.
    assert erased_images.mean() == pytest.approx(0.25, abs=0.045)
    areas, log_aspects, corners = [], [], []
    for mask in erased_pixels[erased_images]:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        assert mask.sum() == height * width  # a filled rectangle
        areas.append(height * width / side**2)
        log_aspects.append(np.log(height / width))
        corners.append((rows[0], columns[0]))
    assert min(areas) > 0.015
    assert max(areas) < 0.36
    assert np.mean(areas) == pytest.approx((0.02 + 1 / 3) / 2, abs=0.025)
    assert np.abs(log_aspects).max() < np.log(1 / 0.3) + 0.15
    assert np.mean(log_aspects) == pytest.approx(0, abs=0.15)
    assert np.mean(corners, 0) == pytest.approx(np.mean(corners), rel=0.12)
    values = out[erased_pixels]
    assert values.mean() == pytest.approx(0, abs=0.01)
    assert values.std() == pytest.approx(1, abs=0.01)
    order = np.random.RandomState(1).permutation(count)[:16]
    part = image.random_erasing(images[order], keys_per_sample(count)[order], 0.25)
    assert_allclose(part, out[order], atol=1e-6)
    assert_array_equal(erase(images[:8], keys_per_sample(8), 0.0), images[:8])
