"""Augmentation on the device: one key per sample."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from hivit_jax import augment


def test_normalize():
    images = np.random.RandomState(0).randint(0, 256, (2, 5, 6, 3), np.uint8)
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
