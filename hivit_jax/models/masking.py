"""Random masking of units, the squares of an image that are masked as a whole."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from hivit_jax.errors import ConfigError
from hivit_jax.kernels.target import varying_axes


def count_visible_units(units: int, mask_ratio: float) -> int:
    """Return the number of visible units, ``int(units * (1 - mask_ratio))``.

    Raises:
      ConfigError: the mask ratio is outside (0, 1) or leaves no visible unit.
    """
    return _count_visible(units, mask_ratio, lambda ratio: int(units * (1 - ratio)))


def count_simmim_visible_units(units: int, mask_ratio: float) -> int:
    """Return SimMIM's number of visible units, ``units - ceil(units * mask_ratio)``.

    Differs from `count_visible_units` only because of floating-point errors.

    Raises:
      ConfigError: the mask ratio is outside (0, 1) or leaves no visible unit.
    """
    return _count_visible(
        units, mask_ratio, lambda ratio: units - math.ceil(units * ratio)
    )


def _count_visible(units: int, mask_ratio: float, count: Callable[[float], int]) -> int:
    """Return ``count(mask_ratio)``, the number of visible units.

    Raises:
      ConfigError: the mask ratio is outside (0, 1) or leaves no visible unit.
    """
    if np.ndim(mask_ratio) or not 0 < mask_ratio < 1:
        raise ConfigError(f"mask_ratio={mask_ratio}; expected 0 < mask_ratio < 1")
    visible = count(mask_ratio)
    if visible < 1:
        largest = _largest_mask_ratio(units, count)
        raise ConfigError(
            f"mask_ratio={mask_ratio} keeps none of {units} units; expected "
            + (f"a mask_ratio of at most {largest}" if largest else "at least 2 units")
        )
    return visible


def _largest_mask_ratio(units: int, count: Callable[[float], int]) -> float:
    """Return the largest valid ratio, to a few decimals; 0 if no ratio is valid."""
    digits = max(2, len(str(units)))
    step = 10**-digits
    ratio = round(1 - 1 / units, digits)
    while ratio > 0 and count(ratio) < 1:
        ratio = round(ratio - step, digits)
    return ratio


@jax.named_scope("input")
def random_masking(
    noise: jax.Array, num_visible: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mask all units except the `num_visible` units with the lowest noise.

    Args:
      noise: [B, N]. Of units with equal noise, the unit with the lower index comes
        first.

    Returns:
      ids_shuffle: int [B, N], indices of the units in order of noise; visible units
        come first.
      ids_restore: int [B, N], rank of each unit in the order of noise.
      mask: float32 [B, N], 0 visible, 1 masked.
    """
    ids_shuffle = _argsort(noise)
    ids_restore = _argsort(ids_shuffle)
    mask = (ids_restore >= num_visible).astype(jnp.float32)
    return ids_shuffle, ids_restore, mask


def _argsort(x: jax.Array) -> jax.Array:
    """Return the indices that stably sort each row of x [B, N], int32 [B, N]."""
    order = jnp.argsort(x, axis=1, stable=True)
    # Without `pcast`, JAX 0.10 assumes that the order is equal on all devices of a
    # `jax.shard_map`, and gradients use the masks of the first device for all devices.
    axes = varying_axes(x) - varying_axes(order)
    return jax.lax.pcast(order, tuple(axes), to="varying") if axes else order
