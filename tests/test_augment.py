"""Augmentation on the device: one key per sample."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from hivit_jax import rng
from hivit_jax.augment import image, mixing


def test_normalize():
    images = np.random.RandomState(0).randint(0, 256, (2, 5, 6, 3), np.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    out = image.normalize(jnp.asarray(images), mean, std)
    assert out.dtype == jnp.float32
    assert_allclose(out, (images / 255 - np.array(mean)) / np.array(std), atol=1e-6)


def test_random_flip():
    keys = jax.random.split(jax.random.key(0), 1000)
    images = np.random.RandomState(0).rand(1000, 2, 3, 1).astype(np.float32)
    out = np.asarray(image.random_flip(jnp.asarray(images), keys))
    flipped = (out == images[:, :, ::-1]).all((1, 2, 3))
    same = (out == images).all((1, 2, 3))
    assert (flipped ^ same).all()
    # Standard error of the share: 0.016.
    assert flipped.mean() == pytest.approx(0.5, abs=0.06)
    order = np.random.RandomState(1).permutation(1000)[:64]
    part = image.random_flip(jnp.asarray(images[order]), keys[order])
    assert_array_equal(part, out[order])


def test_smooth_labels():
    out = np.asarray(mixing.smooth_labels(jnp.asarray([2, 0]), 4, 0.1))
    expected = [[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]
    assert_allclose(out, expected, atol=1e-7)
    assert_allclose(out.sum(1), 1, atol=1e-6)
    hard = mixing.smooth_labels(jnp.asarray([2, 0]), 4, 0.0)
    assert_array_equal(hard, np.eye(4)[[2, 0]])


def key_data(*arguments):
    return np.asarray(jax.random.key_data(rng.step_keys(*arguments).samples))


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
    keys = rng.step_keys(0, "train", jnp.uint32(0), 6).samples
    mask, flip = (rng.split_keys(keys, purpose) for purpose in ("mask", "flip"))
    data = [np.asarray(jax.random.key_data(k)) for k in (keys, mask, flip)]
    assert len(np.unique(np.concatenate(data), axis=0)) == 18
    part = jax.random.key_data(rng.split_keys(keys[2:4], "mask"))
    assert_array_equal(part, data[1][2:4])


# Erasing and mixing


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def test_random_erasing():
    """Rectangles of noise: how many, how large, of which shape, where."""
    count, side = 1500, 40
    images = jnp.full((count, side, side, 3), 7.0)
    erase = jax.jit(image.random_erasing, static_argnums=2)
    out = np.asarray(erase(images, keys(count), 0.25))
    erased = (out != 7).all(-1)
    assert_array_equal(erased, (out != 7).any(-1))
    found = erased.any((1, 2))
    assert found.mean() == pytest.approx(0.25, abs=0.045)  # four standard errors
    areas, aspects, corners = [], [], []
    for mask in erased[found]:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        assert mask.sum() == height * width  # one whole rectangle
        areas.append(height * width / side**2)
        aspects.append(np.log(height / width))
        corners.append((rows[0], columns[0]))
    assert min(areas) > 0.015
    assert max(areas) < 0.36
    assert np.mean(areas) == pytest.approx((0.02 + 1 / 3) / 2, abs=0.025)
    assert np.abs(aspects).max() < np.log(1 / 0.3) + 0.15
    assert np.mean(aspects) == pytest.approx(0, abs=0.15)
    assert np.mean(corners, 0) == pytest.approx(np.mean(corners), rel=0.12)
    values = out[erased]
    assert values.mean() == pytest.approx(0, abs=0.01)
    assert values.std() == pytest.approx(1, abs=0.01)
    order = np.random.RandomState(1).permutation(count)[:16]
    part = image.random_erasing(images[order], keys(count)[order], 0.25)
    assert_allclose(part, out[order], atol=1e-6)
    assert_array_equal(erase(images[:8], keys(8), 0.0), images[:8])


def mixed(seed, mixup, cutmix, batch=6, size=(20, 30), weight=None):
    """Images that are their own number everywhere, and targets, after `mixing.mix`."""
    numbers = jnp.arange(batch, dtype=jnp.float32)
    images = jnp.broadcast_to(numbers[:, None, None, None], (batch, *size, 1))
    weight = jnp.ones(batch) if weight is None else jnp.array(weight)
    out = MIX(images, jnp.eye(batch), weight, jax.random.key(seed), mixup, cutmix)
    return [np.asarray(x) for x in out]


MIX = jax.jit(mixing.mix, static_argnums=(4, 5))
PARTNER = [1, 0, 3, 2, 5, 4]


def test_mixup():
    """Every image with its neighbour, all by the same ratio, as are the targets."""
    ratios = []
    for seed in range(300):
        images, targets = mixed(seed, 0.8, 0.0)
        ratio = targets[0, 0]
        ratios.append(ratio)
        expected = ratio * np.eye(6) + (1 - ratio) * np.eye(6)[PARTNER]
        assert_allclose(targets, expected, atol=1e-6)
        assert (images == images[:, :1, :1]).all()
        pixels = ratio * np.arange(6) + (1 - ratio) * np.array(PARTNER)
        assert_allclose(images[:, 0, 0, 0], pixels, atol=1e-5)
    # Beta(0.8, 0.8): mean 1/2, variance 1 / (4 * 2.6).
    assert np.mean(ratios) == pytest.approx(0.5, abs=0.07)
    assert np.var(ratios) == pytest.approx(1 / 10.4, rel=0.2)


def test_cutmix():
    """One rectangle for all; the targets by what of the image is really left."""
    lefts = []
    for seed in range(300):
        images, targets = mixed(seed, 0.0, 1.0)
        other = images[..., 0] != np.arange(6)[:, None, None]
        assert (other == other[0]).all()
        assert_array_equal(
            images[..., 0],
            np.where(
                other, np.array(PARTNER)[:, None, None], np.arange(6)[:, None, None]
            ),
        )
        rows, columns = (np.flatnonzero(other[0].any(axis)) for axis in (1, 0))
        assert other[0].sum() == len(rows) * len(columns)
        left = 1 - other[0].mean()
        assert_allclose(
            targets, left * np.eye(6) + (1 - left) * np.eye(6)[PARTNER], atol=1e-6
        )
        lefts.append(left)
    assert np.min(lefts) < 0.2
    # Centres are anywhere, so that rectangles are cut at the borders: less than half.
    assert 0.5 < np.mean(lefts) < 0.75


def test_one_or_the_other():
    kinds = [(mixed(seed, 0.8, 1.0)[0] % 1 == 0).all() for seed in range(300)]
    assert np.mean(kinds) == pytest.approx(0.5, abs=0.12)  # four standard errors


def test_nothing_is_mixed_with_an_unreadable_image():
    images, targets = mixed(3, 0.8, 0.0, weight=[1, 0, 1, 1, 0, 1])
    for i in (0, 1, 4, 5):
        assert (images[i] == i).all()
        assert targets[i, i] == 1
    assert (images[2] != 2).all()
