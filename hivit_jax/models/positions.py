"""Where pixels, cells and units sit: orders of tokens and tables of positions.

An image is cut into *units* of ``patch_size`` pixels (16), row-major. A unit holds
``inner_patches`` x ``inner_patches`` (4x4) *cells*. Inside a unit cells are kept in
**merge order**: the order in which PatchMerge concatenates four neighbours, applied
recursively, so that every merge is a reshape ``[T, C] -> [T/4, 4C]``.

At the end: parameters that depend on the image, made to fit another size or number of
channels, as numpy arrays.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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


def rows_at(x: jax.Array, ids: jax.Array) -> jax.Array:
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


@dataclass(frozen=True)
class Windows:
    """Windows of ``size`` units over a grid of units, row-major from the top left.

    Where they do not fill it, the grid is padded at the bottom and the right.
    N = Gh*Gw units, W windows of S = Sh*Sw units each.
    """

    grid: Grid
    size: Grid

    @classmethod
    def over(cls, grid: Grid, side: int) -> "Windows | None":
        """Windows of up to `side` x `side` units; None if one covers the grid."""
        size = (min(side, grid[0]), min(side, grid[1]))
        return None if side == 0 or size == grid else cls(grid, size)

    @property
    def counts(self) -> Grid:
        """Windows per column and row."""
        return -(-self.grid[0] // self.size[0]), -(-self.grid[1] // self.size[1])

    @property
    def pairs(self) -> int:
        """Query-key pairs that attention computes, those of padding included."""
        return self.counts[0] * self.counts[1] * (self.size[0] * self.size[1]) ** 2

    def split(self, x: jax.Array) -> jax.Array:
        """Units [B, N, ...] -> windows [B*W, S, ...]; zeros where there is no unit."""
        (rows, columns), (height, width) = self.counts, self.size
        rest = x.shape[2:]
        x = x.reshape(len(x), *self.grid, *rest)
        missing = rows * height - self.grid[0], columns * width - self.grid[1]
        x = jnp.pad(x, ((0, 0), *((0, n) for n in missing), *((0, 0),) * len(rest)))
        x = x.reshape(len(x), rows, height, columns, width, *rest).swapaxes(2, 3)
        return x.reshape(-1, height * width, *rest)

    def join(self, x: jax.Array) -> jax.Array:
        """Windows [B*W, S, ...] -> units [B, N, ...]; undoes `split`."""
        (rows, columns), (height, width) = self.counts, self.size
        rest = x.shape[2:]
        x = x.reshape(-1, rows, columns, height, width, *rest).swapaxes(2, 3)
        x = x.reshape(len(x), rows * height, columns * width, *rest)
        x = x[:, : self.grid[0], : self.grid[1]]
        return x.reshape(len(x), -1, *rest)


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


def resize_grid_table(table: np.ndarray, grid: Grid, new_grid: Grid) -> np.ndarray:
    """Absolute positions [Gh*Gw, D] -> those of another grid, in the same dtype.

    Bicubic as in the official supervised loader: torch's ``interpolate(mode="bicubic",
    align_corners=False)``, without antialiasing; computed in float64. The same grid
    gives the same table. ValueError if the table is not one of `grid`.
    """
    table = np.asarray(table)
    maps = table.reshape(*grid, table.shape[-1])
    if tuple(grid) == tuple(new_grid):
        return table
    rows, columns = map(_bicubic, grid, new_grid)
    resized = columns @ np.tensordot(rows, maps.astype(np.float64), 1)
    return resized.reshape(-1, table.shape[-1]).astype(table.dtype)


def resize_relative_table(table: np.ndarray, grid: Grid, new_grid: Grid) -> np.ndarray:
    """Relative positions [(2*Gh-1)*(2*Gw-1), heads] of a grid -> those of another.

    As `resize_grid_table`, on the map of all differences of rows and columns.
    """
    spans = [(2 * rows - 1, 2 * columns - 1) for rows, columns in (grid, new_grid)]
    return resize_grid_table(table, *spans)


def resize_patch_kernel(kernel: np.ndarray, cell: int, new_cell: int) -> np.ndarray:
    """Patch embedding [cell*cell*C, dim] -> [new_cell*new_cell*C, dim], same dtype.

    As `resize_grid_table`, on its rows and columns of pixels; as there no factor makes
    up for the other number of pixels.
    """
    dim = kernel.shape[-1]
    pixels = np.asarray(kernel).reshape(cell * cell, -1)
    return resize_grid_table(pixels, (cell,) * 2, (new_cell,) * 2).reshape(-1, dim)


def _bicubic(old: int, new: int) -> np.ndarray:
    """What each of `old` samples adds to each new one: float64 [new, old].

    The cubic kernel with a = -0.75 over four samples, those at the edge repeated.
    """
    a, samples = -0.75, np.arange(old)
    place = (np.arange(new)[:, None] + 0.5) * old / new - 0.5
    taps = np.floor(place) + np.arange(-1, 3)  # [new, 4]
    t = np.abs(place - taps)
    near = ((a + 2) * t - (a + 3)) * t**2 + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    weights = np.where(t <= 1, near, far)
    inside = np.clip(taps, 0, old - 1)[:, :, None] == samples  # [new, 4, old]
    return (weights[:, :, None] * inside).sum(1)


def channel_shares(old: int, new: int) -> np.ndarray:
    """What each of `old` channels' weights gives to each new one: float64 [new, old].

    More channels: they take turns, and those that share an old one get equal parts of
    it. Fewer: old channels take turns, and add up. Every column adds up to 1, so an
    image of equal channels gives the same whatever their number.
    """
    few, many = min(old, new), max(old, new)
    turns = np.equal.outer(np.arange(many) % few, np.arange(few)).astype(np.float64)
    return turns / turns.sum(0) if new >= old else turns.T


def resize_channels(kernel: np.ndarray, old: int, new: int) -> np.ndarray:
    """Patch embedding [cell*cell*old, dim] -> [cell*cell*new, dim], in the same dtype.

    For images of `new` channels, see `channel_shares`.
    """
    kernel = np.asarray(kernel)
    if old == new:
        return kernel
    dim = kernel.shape[-1]
    pixels = kernel.reshape(-1, old, dim).astype(np.float64)
    return (channel_shares(old, new) @ pixels).reshape(-1, dim).astype(kernel.dtype)
