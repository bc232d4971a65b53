"""Checks of the arguments of models: seeds, shapes of arrays, numbers of heads."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hivit_jax.errors import ConfigError


def make_key(seed: Any) -> jax.Array:
    """Return the PRNG key of a seed.

    Args:
      seed: integer of any type, or a typed or raw PRNG key, which is returned
        unchanged.

    Raises:
      ConfigError: the seed is neither an integer nor a key, or exceeds 64 bits.
    """
    dtype = getattr(seed, "dtype", None)
    if isinstance(seed, jax.Array):
        is_typed_key = jnp.issubdtype(dtype, jax.dtypes.prng_key)
        if seed.ndim == (0 if is_typed_key else 1) and (
            is_typed_key or dtype == jnp.uint32
        ):
            return seed
    is_integer_array_scalar = (
        dtype is not None and np.ndim(seed) == 0 and dtype.kind in "iu"
    )
    try:
        return jax.random.key(seed if is_integer_array_scalar else _to_int(seed))
    except (TypeError, OverflowError):
        raise ConfigError(
            f"seed={seed!r}; expected an integer of at most 64 bits or one PRNG key"
        ) from None


def _to_int(seed: Any) -> int:
    """Convert an integer of any type to int.

    Raises:
      TypeError: the seed is not an integer, or is a bool.
    """
    if isinstance(seed, bool | np.bool_):
        raise TypeError
    return operator.index(seed)


def check_shape(name: str, array: Any, axes: str, *expected: int | None) -> None:
    """Raise ConfigError unless an array has the expected shape.

    Args:
      name: name of the array in the message.
      axes: names of the axes in the message, such as "[B, N]".
      expected: expected size of each axis; None: any size.
    """
    shape = np.shape(array)
    if len(shape) == len(expected) and all(
        size in (None, found) for size, found in zip(expected, shape, strict=True)
    ):
        return
    sizes = ", ".join("any" if size is None else str(size) for size in expected)
    raise ConfigError(
        f"{name} has shape {list(shape)}; expected {axes} = [{sizes}] for these images "
        "and this model"
    )


def check_ids(name: str, ids: jax.Array, batch: int, units: int | None = None) -> None:
    """Raise ConfigError unless `ids` is an integer array [batch, units].

    Args:
      name: name of the argument in the message.
      units: expected size of the second axis; None: any size.
    """
    check_shape(name, ids, "[B, K]" if units is None else "[B, N]", batch, units)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ConfigError(f"{name} is {ids.dtype}; expected integer indices of units")


def check_drop_path_keys(keys: jax.Array | None, batch: int) -> None:
    """Raise ConfigError unless `keys` is None or has one PRNG key per image."""
    if keys is None:
        return
    if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        check_shape("drop_path_keys", keys, "[B]", batch)
    else:  # raw keys, from `jax.random.PRNGKey`
        check_shape("drop_path_keys", keys, "[B, key size]", batch, None)


def check_heads(dim_name: str, dim: int, heads_name: str, heads: int) -> None:
    """Raise ConfigError unless `dim` is a multiple of `heads`."""
    if heads < 1 or dim % heads:
        raise ConfigError(
            f"{heads_name}={heads}; expected a divisor of {dim_name}, which is {dim}"
        )
