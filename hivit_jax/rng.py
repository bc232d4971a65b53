"""Keys of the random draws of one step."""

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Keys(NamedTuple):
    """What is drawn from in a step: a key for each sample, [B], and one for all."""

    samples: jax.Array
    step: jax.Array


def step_keys(seed: int, purpose: str, first: jax.Array, count: int) -> Keys:
    """Keys of the step whose samples are at positions first .. first+count-1 of a run.

    Args:
      seed: the run's.
      purpose: what is drawn for ("train", "eval"), so that no two uses share draws.
      first: uint32 scalar; wraps after 4.29e9 samples.
    """
    base = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
    positions = jnp.asarray(first, jnp.uint32) + jnp.arange(count, dtype=jnp.uint32)
    samples = jax.vmap(jax.random.fold_in, (None, 0))(base, positions)
    return Keys(samples, split_keys(samples[:1], "step")[0])


def split_keys(keys: jax.Array, purpose: str) -> jax.Array:
    """Keys [B] of the samples for one purpose among several ("mask", "flip")."""
    return jax.vmap(lambda key: jax.random.fold_in(key, zlib.crc32(purpose.encode())))(
        keys
    )
