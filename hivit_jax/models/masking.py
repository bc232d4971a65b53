"""Random masking of units."""

import jax
import jax.numpy as jnp

from hivit_jax.errors import ConfigError


def visible_units(units: int, mask_ratio: float) -> int:
    """Return the number of visible units, ``int(units * (1 - mask_ratio))``.

    Raises:
      ConfigError: a mask ratio outside (0, 1), or one that leaves no visible unit.
    """
    if not 0 < mask_ratio < 1:
        raise ConfigError(f"mask_ratio={mask_ratio}; expected 0 < mask_ratio < 1")
    kept = int(units * (1 - mask_ratio))
    if kept == 0:
        raise ConfigError(
            f"mask_ratio={mask_ratio} keeps none of {units} units; "
            f"expected at most {1 - 1 / units:.4f}"
        )
    return kept


@jax.named_scope("input")
def random_masking(
    noise: jax.Array, kept: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keep the `kept` units with the lowest noise; break ties by the lower index.

    Args:
      noise: [B, N].

    Returns:
      ids_shuffle: int [B, N], units in order of noise; visible units come first.
      ids_restore: int [B, N], rank of each unit in that order.
      mask: float32 [B, N], 0 keep, 1 removed.
    """
    ids_shuffle = jnp.argsort(noise, axis=1, stable=True)
    ids_restore = jnp.argsort(ids_shuffle, axis=1)
    mask = (ids_restore >= kept).astype(jnp.float32)
    return ids_shuffle, ids_restore, mask
