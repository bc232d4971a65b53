"""Orders of pixels, cells and units; tables of positions.

An image is cut into *units* of ``patch_size`` pixels (16), row-major. A unit holds
``inner_patches`` x ``inner_patches`` (4x4) *cells*. Inside a unit cells are kept in
**merge order**: the order in which PatchMerge concatenates four neighbors, applied
recursively, so that every merge is a reshape ``[T, C] -> [T/4, 4C]``.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hivit_jax.errors import ConfigError

Grid = tuple[int, int]  # units per column, units per row


def check_grid(image_size: int | Sequence[int], patch_size: int) -> Grid:
    """Units per column and row of an image; ConfigError if they do not fill it."""
    sides = (image_size,) * 2 if isinstance(image_size, int) else tuple(image_size)
    fits = patch_size > 0 and min(sides) > 0 and not any(s % patch_size for s in sides)
    if len(sides) != 2 or not fits:
        raise ConfigError(
            f"image_size={image_size} is not filled by units of {patch_size} pixels; "
            f"expected height and width to be multiples of patch_size={patch_size}"
        )
    return sides[0] // patch_size, sides[1] // patch_size


def gather_tokens(x: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of [B, N, D] at ids, int [B, M]: [B, M, D]."""
    return jnp.take_along_axis(x, ids[:, :, None], axis=1)


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """Images [B, H, W, C] -> units [B, N, patch_size*patch_size*C].

    Units are row-major; inside a unit the index is
    ``(row*patch_size + col)*C + channel``. Any dtype. Official
    ``masked_autoencoder.py``, ``patchify``.
    """
    b, h, w, c = images.shape
    p = patch_size
    # The pixels of a row with their channels as one axis: XLA for TPUs would pad one of
    # three channels to a tile of 128.
    x = images.reshape(b, h // p, p, w // p, p * c)
    return x.transpose(0, 1, 3, 2, 4).reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(units: jax.Array, grid: Grid, patch_size: int) -> jax.Array:
    """Units [B, N, P*P*C] -> images [B, H, W, C]; undoes `patchify`."""
    b, p = len(units), patch_size
    x = units.reshape(b, *grid, p, -1).transpose(0, 1, 3, 2, 4)
    return x.reshape(b, grid[0] * p, grid[1] * p, -1)


def _merge_axes(levels: int) -> list[int]:
    """Order of the axes (row bits, ..., column bits, ...) that gives merge order.

    Official ``hivit.py``, ``PatchMerge``: top-left, bottom-left, top-right,
    bottom-right, so at every level the column bit is the slower one.
    """
    return [axis for i in range(levels) for axis in (levels + i, i)]


def units_to_cells(units: jax.Array, patch_size: int, inner_patches: int) -> jax.Array:
    """Units [B, K, P*P*C] -> cells in merge order [B*K*inner**2, cell*cell*C].

    The pixels of a cell are row-major with the channel fastest.
    """
    levels, cell = inner_patches.bit_length() - 1, patch_size // inner_patches
    bits = (2,) * levels
    row = cell * units.shape[-1] // patch_size**2  # of pixels of a cell, with channels
    x = units.reshape(-1, *bits, cell, *bits, row)
    # `_merge_axes` counts row bits then column bits; here a pixel axis lies between.
    bit_axes = [a + 1 if a < levels else a + 2 for a in _merge_axes(levels)]
    x = x.transpose(0, *bit_axes, levels + 1, 2 * levels + 2)
    return x.reshape(x.shape[0] * inner_patches**2, -1)


def tokens_to_map(tokens: jax.Array, grid: Grid, inner: int) -> jax.Array:
    """Tokens of all units, in merge order, -> raster map [B, Gh*inner, Gw*inner, C].

    Args:
      tokens: [B*N*inner**2, C], any leading shape with that many rows.
      grid: units per column and row; N = Gh*Gw.
      inner: cells per unit side at this stage (4, 2, 1).
    """
    levels = inner.bit_length() - 1
    x = tokens.reshape(-1, *grid, *(2,) * (2 * levels), tokens.shape[-1])
    # [B, Gh, Gw, (column bit, row bit) per level, C]; back to rows, columns.
    rows = [4 + 2 * i for i in range(levels)]
    columns = [3 + 2 * i for i in range(levels)]
    x = x.transpose(0, 1, *rows, 2, *columns, 3 + 2 * levels)
    return x.reshape(x.shape[0], grid[0] * inner, grid[1] * inner, -1)


def merge_order(inner: int) -> np.ndarray:
    """Raster index ``row*inner + col`` of the cell at each merge position."""
    levels = inner.bit_length() - 1
    raster = np.arange(inner**2).reshape((2,) * (2 * levels))
    return raster.transpose(_merge_axes(levels)).reshape(-1)


def sincos_table(grid: Grid, dim: int) -> np.ndarray:
    """Fixed 2-D sine-cosine positions, float32 [N, dim]; dim must be a multiple of 4.

    Column first, row second, each ``[sin, cos]`` (official ``util/pos_embed.py``).
    """
    omega = 10000.0 ** (-np.arange(dim // 4, dtype=np.float64) / (dim / 4))
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    angles = np.stack([columns, rows], 1)[:, :, None] * omega  # [N, 2, dim/4]
    table = np.concatenate([np.sin(angles), np.cos(angles)], -1)
    return table.reshape(-1, dim).astype(np.float32)


def relative_position_index(ids: jax.Array, grid: Grid) -> jax.Array:
    """Row of the relative position table for every pair of units.

    Args:
      ids: integer unit numbers [..., K]: all units, or the kept ones of each sample.
      grid: (Gh, Gw). The table has (2*Gh-1)*(2*Gw-1) rows.

    Returns:
      int [..., K, K], query first: ``(r1-r2+Gh-1)*(2*Gw-1) + (c1-c2+Gw-1)``
      (official ``hivit.py``; there a gather from a stored N x N buffer).
    """
    row, column = jnp.divmod(ids, grid[1])
    row = row[..., :, None] - row[..., None, :] + grid[0] - 1
    column = column[..., :, None] - column[..., None, :] + grid[1] - 1
    return row * (2 * grid[1] - 1) + column
