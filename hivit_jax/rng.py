"""PRNG keys of one step."""

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Keys(NamedTuple):
    """PRNG keys of one step: one per sample, [B], and one for the batch."""

    samples: jax.Array
    step: jax.Array


def step_keys(seed: int, purpose: str, first: jax.Array, count: int) -> Keys:
    """Return the keys of one step.

    Args:
      seed: seed of the run.
      purpose: "train" or "eval". Different purposes have independent keys.
      first: uint32 scalar, position of the first sample in the run or evaluation; wraps
        around after 4.29e9 samples.
      count: number of samples.
    """
    base = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
    positions = jnp.asarray(first, jnp.uint32) + jnp.arange(count, dtype=jnp.uint32)
    samples = jax.vmap(jax.random.fold_in, (None, 0))(base, positions)
    return Keys(samples, derive_keys(samples[:1], "step")[0])


def derive_keys(keys: jax.Array, purpose: str) -> jax.Array:
    """Derive independent sample keys [B] for one purpose, such as "mask" or "flip"."""
    purpose_id = zlib.crc32(purpose.encode())
    return jax.vmap(lambda key: jax.random.fold_in(key, purpose_id))(keys)
