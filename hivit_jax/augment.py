"""Augmentation on the device, inside the train step: one key per sample.

A sample's draws depend on its key alone, so neither the number of devices nor
gradient accumulation changes them.
"""

import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def sample_keys(seed: int, purpose: str, first: jax.Array, count: int) -> jax.Array:
    """Keys [count] of the samples at positions first .. first+count-1 of a run.

    Args:
      seed: the run's.
      purpose: what is drawn for ("train", "eval"), so that no two uses share draws.
      first: uint32 scalar; wraps after 4.29e9 samples.
    """
    base = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
    positions = jnp.asarray(first, jnp.uint32) + jnp.arange(count, dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(base, positions)


def split_keys(keys: jax.Array, purpose: str) -> jax.Array:
    """Keys [B] of the samples for one purpose among several ("mask", "flip")."""
    return jax.vmap(lambda key: jax.random.fold_in(key, zlib.crc32(purpose.encode())))(
        keys
    )


def normalize(
    images: jax.Array, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
    """uint8 [B, H, W, C] -> float32, ``(x / 255 - mean) / std`` per channel."""
    scale = 255.0 * jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) - 255.0 * jnp.asarray(mean, jnp.float32)) / scale


def random_flip(images: jax.Array, keys: jax.Array) -> jax.Array:
    """Mirrors each image [B, H, W, C] left to right with probability one half."""
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def smooth_labels(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """int [B] -> float32 [B, num_classes]: ``smoothing`` is spread over all classes."""
    return (
        jax.nn.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes
    )
