"""Tests of label smoothing, Mixup and CutMix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from hivit_jax.augment import mixing


def test_label_smoothing_is_spread_evenly_over_all_classes():
    out = np.asarray(mixing.smooth_labels(jnp.asarray([2, 0]), 4, 0.1))
    expected = [[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]
    assert_allclose(out, expected, atol=1e-7)
    assert_allclose(out.sum(1), 1, atol=1e-6)
    hard = mixing.smooth_labels(jnp.asarray([2, 0]), 4, 0.0)
    assert_array_equal(hard, np.eye(4)[[2, 0]])


def mix_numbered_images(seed, mixup, cutmix, batch_size=6, size=(20, 30), weight=None):
    """Mix images whose pixels are their index; return mixed images and targets."""
    indices = jnp.arange(batch_size, dtype=jnp.float32)
    images = jnp.broadcast_to(indices[:, None, None, None], (batch_size, *size, 1))
    weight = jnp.ones(batch_size) if weight is None else jnp.array(weight)
    out = MIX(images, jnp.eye(batch_size), weight, jax.random.key(seed), mixup, cutmix)
    return [np.asarray(x) for x in out]


MIX = jax.jit(mixing.mix, static_argnums=(4, 5))
PARTNERS = [1, 0, 3, 2, 5, 4]  # index of the image that is mixed into each image


@pytest.mark.slow
def test_mixup_mixes_all_neighbors_with_the_same_ratio():
    ratios = []
    for seed in range(300):
        images, targets = mix_numbered_images(seed, 0.8, 0.0)
        ratio = targets[0, 0]
        ratios.append(ratio)
        expected_targets = ratio * np.eye(6) + (1 - ratio) * np.eye(6)[PARTNERS]
        assert_allclose(targets, expected_targets, atol=1e-6)
        assert (images == images[:, :1, :1]).all()
        expected_pixels = ratio * np.arange(6) + (1 - ratio) * np.array(PARTNERS)
        assert_allclose(images[:, 0, 0, 0], expected_pixels, atol=1e-5)
    # Beta(0.8, 0.8): mean 1/2, variance 1 / (4 * 2.6).
    assert np.mean(ratios) == pytest.approx(0.5, abs=0.07)
    assert np.var(ratios) == pytest.approx(1 / 10.4, rel=0.2)


@pytest.mark.slow
def test_cutmix_exchanges_one_rectangle_between_neighbors():
    """Targets weight the two labels by the remaining and the exchanged area."""
    remaining_areas = []
    for seed in range(300):
        images, targets = mix_numbered_images(seed, 0.0, 1.0)
        own, partner = (np.array(x)[:, None, None] for x in (range(6), PARTNERS))
        exchanged = images[..., 0] != own
        assert (exchanged == exchanged[0]).all()
        assert_array_equal(images[..., 0], np.where(exchanged, partner, own))
        rows, columns = (np.flatnonzero(exchanged[0].any(axis)) for axis in (1, 0))
        assert exchanged[0].sum() == len(rows) * len(columns)
        remaining = 1 - exchanged[0].mean()
        assert_allclose(
            targets,
            remaining * np.eye(6) + (1 - remaining) * np.eye(6)[PARTNERS],
            atol=1e-6,
        )
        remaining_areas.append(remaining)
    assert np.min(remaining_areas) < 0.2
    # The mean exceeds 1/2, because rectangles are clipped at the borders.
    assert 0.5 < np.mean(remaining_areas) < 0.75


@pytest.mark.slow
def test_half_of_the_batches_get_mixup_and_half_cutmix():
    # Pixels are integers after CutMix, but not after Mixup, which averages images.
    batches = [mix_numbered_images(seed, 0.8, 1.0)[0] for seed in range(300)]
    is_cutmix = [(images % 1 == 0).all() for images in batches]
    assert np.mean(is_cutmix) == pytest.approx(0.5, abs=0.12)  # four standard errors


@pytest.mark.slow
def test_pairs_with_an_unreadable_image_are_not_mixed():
    images, targets = mix_numbered_images(3, 0.8, 0.0, weight=[1, 0, 1, 1, 0, 1])
    for i in (0, 1, 4, 5):  # images 1 and 4 are unreadable, 0 and 5 their partners
        assert (images[i] == i).all()
        assert targets[i, i] == 1
    assert (images[2] != 2).all()
