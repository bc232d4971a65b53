"""Parameters that depend on the image, resized to another image size or number of
channels, as numpy arrays.
"""

import numpy as np

from hivit_jax.models.positions import Grid


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
    rows, columns = map(resize_matrix, grid, new_grid)
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

    As `resize_grid_table`, on its rows and columns of pixels. No factor makes up for
    the other number of pixels.
    """
    dim = kernel.shape[-1]
    pixels = np.asarray(kernel).reshape(cell * cell, -1)
    return resize_grid_table(pixels, (cell,) * 2, (new_cell,) * 2).reshape(-1, dim)


def resize_matrix(old: int, new: int) -> np.ndarray:
    """Weight of each of `old` samples in each new one: float64 [new, old].

    The cubic kernel with a = -0.75 over four samples, those at the edge repeated.
    """
    a, samples = -0.75, np.arange(old)
    position = (np.arange(new)[:, None] + 0.5) * old / new - 0.5
    taps = np.floor(position) + np.arange(-1, 3)  # [new, 4]
    t = np.abs(position - taps)
    near = ((a + 2) * t - (a + 3)) * t**2 + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    weights = np.where(t <= 1, near, far)
    inside = np.clip(taps, 0, old - 1)[:, :, None] == samples  # [new, 4, old]
    return (weights[:, :, None] * inside).sum(1)


def channel_weights(old: int, new: int) -> np.ndarray:
    """Part of each of `old` channels' weights in each new one: float64 [new, old].

    More channels: they take turns, and those that share an old one get equal parts of
    it. Fewer: old channels take turns, and add up. Every column adds up to 1, so an
    image of equal channels gives the same whatever their number.
    """
    few, many = min(old, new), max(old, new)
    turns = np.equal.outer(np.arange(many) % few, np.arange(few)).astype(np.float64)
    return turns / turns.sum(0) if new >= old else turns.T


def resize_channels(kernel: np.ndarray, old: int, new: int) -> np.ndarray:
    """Patch embedding [cell*cell*old, dim] -> [cell*cell*new, dim], in the same dtype.

    For images of `new` channels, see `channel_weights`.
    """
    kernel = np.asarray(kernel)
    if old == new:
        return kernel
    dim = kernel.shape[-1]
    pixels = kernel.reshape(-1, old, dim).astype(np.float64)
    return (channel_weights(old, new) @ pixels).reshape(-1, dim).astype(kernel.dtype)
