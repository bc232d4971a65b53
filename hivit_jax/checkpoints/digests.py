"""Digests of arrays, and a check for numbers that are not finite.

Checkpoints contain digests, because Orbax restores flipped bits without an error.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hivit_jax.tree import named_leaves


def digests(trees: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return {item: {array name: digest}}; a digest has 64 bits, as hex text.

    The digest does not depend on the array's sharding. If a single number changes, the
    digest always changes. Numbers must have at most 32 bits.
    """
    result: dict[str, dict[str, str]] = {}
    for item, tree in trees.items():
        # Fetch each digest before starting the next, because XLA:CPU aborts when too
        # many small collectives are in flight.
        sums = {n: jax.device_get(_digest(x)) for n, x in named_leaves(tree).items()}
        result[item] = {n: f"{high:08x}{low:08x}" for n, (high, low) in sums.items()}
    return result


def nonfinite_names(tree: Any) -> list[str]:
    """Return the names of the arrays of a pytree that contain inf or NaN."""

    def is_finite(x):
        if _is_small_and_local(x):
            return np.isfinite(jax.device_get(x)).all()
        return _finite_on_device(x)

    return [name for name, x in named_leaves(tree).items() if not is_finite(x)]


@jax.jit
def _finite_on_device(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def _is_small_and_local(x: jax.Array | np.ndarray) -> bool:
    """Return True for small arrays whose whole value is on this host.

    These arrays are processed on the host. On the devices, XLA would compile a program
    for each of their many shapes.
    """
    return x.size <= 2**16 and getattr(x, "is_fully_replicated", True)


def _digest(x: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Return the digest of an array as two numbers, uint32 [2]."""
    if not _is_small_and_local(x):
        return _digest_on_device(x if isinstance(x, jax.Array) else jax.device_put(x))
    x = np.ascontiguousarray(jax.device_get(x)).reshape(-1)
    bits = x.view(f"u{x.itemsize}").astype(np.uint32)
    return np.stack(_mixed_sums(bits, np.arange(x.size, dtype=np.uint32)))


@jax.jit
def _digest_on_device(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    positions, stride = jnp.uint32(0), 1
    for axis in reversed(range(x.ndim)):
        positions += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * stride
        stride = stride * x.shape[axis] % 2**32
    return jnp.stack(_mixed_sums(bits.astype(jnp.uint32), positions))


def _mixed_sums(bits: Any, positions: Any) -> list:
    """Mix uint32 bits with their uint32 positions, and return two sums modulo 2**32.

    `mix` is the finalizer of MurmurHash3. For a fixed position, each summand is a
    bijection of the bits. Therefore a change of a single number changes both sums.
    """

    def mix(h):
        h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
        h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
        return h ^ (h >> 16)

    return [
        mix(bits ^ mix(positions + np.uint32(seed))).sum(dtype=np.uint32)
        for seed in (0x9E3779B9, 0x7F4A7C15)
    ]
