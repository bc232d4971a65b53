"""Tests of the PRNG keys of a step."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_array_equal

from hivit_jax import rng


def key_data(*arguments):
    """Return the keys of a step's samples as integers."""
    return np.asarray(jax.random.key_data(rng.step_keys(*arguments).samples))


def test_sample_keys_depend_on_seed_purpose_and_position():
    keys_of_batch = key_data(0, "train", jnp.uint32(100), 8)
    halves = [key_data(0, "train", jnp.uint32(first), 4) for first in (100, 104)]
    assert_array_equal(keys_of_batch, np.concatenate(halves))
    assert len(np.unique(keys_of_batch, axis=0)) == 8
    for seed, purpose, first in (
        (1, "train", 100),
        (0, "eval", 100),
        (0, "train", 108),
    ):
        keys = key_data(seed, purpose, jnp.uint32(first), 8)
        assert not (keys[:, None] == keys_of_batch[None]).all(-1).any()


def test_sample_positions_wrap_after_32_bits():
    keys = key_data(0, "train", jnp.uint32(2**32 - 2), 4)
    assert_array_equal(keys[2:], key_data(0, "train", jnp.uint32(0), 2))


def test_derived_keys_differ_by_purpose_and_sample():
    keys = rng.step_keys(0, "train", jnp.uint32(0), 6).samples
    mask, flip = (rng.derive_keys(keys, purpose) for purpose in ("mask", "flip"))
    data = [np.asarray(jax.random.key_data(k)) for k in (keys, mask, flip)]
    assert len(np.unique(np.concatenate(data), axis=0)) == 18
    mask_keys_of_two = jax.random.key_data(rng.derive_keys(keys[2:4], "mask"))
    assert_array_equal(mask_keys_of_two, data[1][2:4])
