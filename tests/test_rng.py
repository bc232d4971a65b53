"""Tests of the PRNG keys of a step."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_array_equal

from hivit_jax import rng


def key_data(*arguments):
    """Return the samples' keys of a step as integers."""
    return np.asarray(jax.random.key_data(rng.step_keys(*arguments).samples))


def test_sample_keys_depend_on_the_position():
    keys_of_batch = key_data(0, "train", jnp.uint32(100), 8)
    halves = [key_data(0, "train", jnp.uint32(first), 4) for first in (100, 104)]
    assert_array_equal(keys_of_batch, np.concatenate(halves))
    assert len(np.unique(keys_of_batch, axis=0)) == 8
    for other in ((1, "train", 100, 8), (0, "eval", 100, 8), (0, "train", 108, 8)):
        keys = key_data(other[0], other[1], jnp.uint32(other[2]), other[3])
        assert not (keys[:, None] == keys_of_batch[None]).all(-1).any()


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
