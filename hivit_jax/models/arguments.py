"""Checks of Python arguments: fields of configs, seeds, shapes of arrays."""

import math
import operator
from collections.abc import Callable
from dataclasses import fields
from types import UnionType
from typing import Any, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np

from hivit_jax.errors import ConfigError


def convert_fields(config: Any) -> None:
    """Convert numbers of numpy and JAX in a frozen dataclass to those of Python.

    Raises:
      ConfigError: a value does not have the type of its field.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        convert, expected = _converter(field.type)
        try:
            converted = convert(value)
        except (TypeError, ValueError, OverflowError, IndexError):
            raise ConfigError(f"{field.name}={value!r}; expected {expected}") from None
        object.__setattr__(config, field.name, converted)


def check_range(config: Any, least: float, *names: str) -> None:
    """Raise a ConfigError if a field is less than `least`."""
    for name in names:
        value = getattr(config, name)
        if value < least:
            raise ConfigError(f"{name}={value}; expected {least} or more")


def _converter(type_: Any) -> tuple[Callable, str]:
    """Return (conversion to a field's type, description of the type)."""
    if get_origin(type_) is UnionType:  # int | tuple[int, int]
        one, several = (_converter(each) for each in get_args(type_))

        def convert(value):
            return (several if np.ndim(value) else one)[0](value)

        return convert, f"{one[1]} or {several[1]}"
    if get_origin(type_) is tuple:
        return lambda value: tuple(map(_to_int, value)), "a sequence of integers"
    return {
        bool: (_to_bool, "True or False"),
        int: (_to_int, "an integer"),
        float: (_to_float, "a finite number"),
        str: (lambda value: value, "a string"),
    }[type_]


def _to_bool(value):
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise TypeError


def _to_int(value):
    if isinstance(value, bool | np.bool_):
        raise TypeError
    return operator.index(value)


def _to_float(value):
    if isinstance(value, bool | np.bool_ | str) or not math.isfinite(value):
        raise TypeError
    return float(value)


def make_key(seed: Any) -> jax.Array:
    """Return the PRNG key of a seed: an integer of any kind, or a PRNG key itself.

    Raises:
      ConfigError: any other seed, or an integer of more than 64 bits.
    """
    dtype = getattr(seed, "dtype", None)
    if isinstance(seed, jax.Array):
        is_key = jnp.issubdtype(dtype, jax.dtypes.prng_key)
        if seed.ndim == (0 if is_key else 1) and (is_key or dtype == jnp.uint32):
            return seed
    integer = dtype is not None and np.ndim(seed) == 0 and dtype.kind in "iu"
    try:
        return jax.random.key(seed if integer else _to_int(seed))
    except (TypeError, OverflowError):
        raise ConfigError(
            f"seed={seed!r}; expected an integer of at most 64 bits or one PRNG key"
        ) from None


def check_shape(name: str, array: Any, axes: str, *expected: int | None) -> None:
    """Raise a ConfigError unless an array has the expected shape.

    Args:
      axes: names of the axes in the message, such as "[B, N]".
      expected: size of each axis; None: any.
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
    """Raise a ConfigError unless `ids` is an integer array [B, units]."""
    check_shape(name, ids, "[B, K]" if units is None else "[B, N]", batch, units)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ConfigError(f"{name} is {ids.dtype}; expected integers, indices of units")


def check_drop_path_keys(keys: jax.Array | None, batch: int) -> None:
    """Raise a ConfigError unless there is one PRNG key for each image."""
    if keys is None:
        return
    if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        check_shape("drop_path_keys", keys, "[B]", batch)
    else:  # keys of `jax.random.PRNGKey`
        check_shape("drop_path_keys", keys, "[B, 2]", batch, None)
