"""Resizing of parameters to another image size or number of channels, in NumPy."""

import numpy as np

from hivit_jax.models.positions import Grid


def resize_grid_table(table: np.ndarray, grid: Grid, new_grid: Grid) -> np.ndarray:
    """Resize absolute positions to another grid, [Gh*Gw, D] -> [Gh'*Gw', D].

    The interpolation is bicubic, as in the official supervised loader: torch's
    ``interpolate(mode="bicubic", align_corners=False)`` without antialiasing. The table
    is resized in float64 and returned in its own dtype. If the grids are equal, the
    table is returned unchanged.

    Raises:
      ValueError: the table does not have the shape of `grid`.
    """
    table = np.asarray(table)
    maps = table.reshape(*grid, table.shape[-1])
    if tuple(grid) == tuple(new_grid):
        return table
    rows, columns = map(resize_matrix, grid, new_grid)
    resized = columns @ np.tensordot(rows, maps.astype(np.float64), 1)
    return resized.reshape(-1, table.shape[-1]).astype(table.dtype)


def resize_relative_table(table: np.ndarray, grid: Grid, new_grid: Grid) -> np.ndarray:
    """Resize a relative position bias table to another grid.

    The table is [(2*Gh-1)*(2*Gw-1), heads]. Applies `resize_grid_table` to the table as
    a map, which has a row for each row difference and a column for each column
    difference.
    """
    shapes = [(2 * rows - 1, 2 * columns - 1) for rows, columns in (grid, new_grid)]
    return resize_grid_table(table, *shapes)


def resize_table_geometrically(
    table: np.ndarray, side: int, new_side: int
) -> np.ndarray:
    """Resize a relative position table of square windows, as in SimMIM's finetuning.

    The shape changes from [(2*side-1)**2, heads] to [(2*new_side-1)**2, heads].
    Interpolates with a cubic spline whose knots are at geometrically growing distances.
    """
    if side == new_side:
        return table
    matrix = geometric_matrix(side, new_side)
    maps = table.reshape(2 * side - 1, 2 * side - 1, -1).astype(np.float64)
    resized = matrix @ np.tensordot(matrix, maps, 1)
    return resized.reshape(-1, table.shape[-1]).astype(table.dtype)


def geometric_matrix(side: int, new_side: int) -> np.ndarray:
    """Return the matrix of `resize_table_geometrically`, [2*new_side-1, 2*side-1]."""
    # Imported here, because the import takes 0.5 s and only SimMIM needs it.
    from scipy.interpolate import CubicSpline

    if side == 1:
        return np.ones((2 * new_side - 1, 1))
    # Finds the ratio for which the outermost knot lies at the distance new_side - 1.
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (ratio ** (side - 1) - 1) / (ratio - 1) > new_side - 1:
            high = ratio
        else:
            low = ratio
    positive = np.cumsum(ratio ** np.arange(side - 1))
    knots = np.concatenate([-positive[::-1], [0], positive])
    points = np.clip(np.arange(1 - new_side, new_side), knots[0], knots[-1])
    return CubicSpline(knots, np.eye(len(knots)), bc_type="not-a-knot")(points)


def resize_patch_kernel(kernel: np.ndarray, side: int, new_side: int) -> np.ndarray:
    """Resize a patch embedding from squares of `side` pixels per side to `new_side`.

    The shape changes from [side*side*C, dim] to [new_side*new_side*C, dim]. Applies
    `resize_grid_table` to the rows and columns of pixels. The weights are not rescaled
    for the new number of pixels.
    """
    dim = kernel.shape[-1]
    pixels = np.asarray(kernel).reshape(side * side, -1)
    return resize_grid_table(pixels, (side,) * 2, (new_side,) * 2).reshape(-1, dim)


def resize_matrix(old: int, new: int) -> np.ndarray:
    """Return the matrix that resizes `old` samples to `new`, float64 [new, old].

    Uses the cubic kernel with a = -0.75 over four samples. Samples at the edge are
    repeated.
    """
    a = -0.75
    position = (np.arange(new)[:, None] + 0.5) * old / new - 0.5
    taps = np.floor(position) + np.arange(-1, 3)  # [new, 4]
    t = np.abs(position - taps)
    near = ((a + 2) * t - (a + 3)) * t**2 + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    weights = np.where(t <= 1, near, far)
    one_hot = np.clip(taps, 0, old - 1)[:, :, None] == np.arange(old)  # [new, 4, old]
    return (weights[:, :, None] * one_hot).sum(1)


def channel_matrix(old: int, new: int) -> np.ndarray:
    """Return the matrix from weights of `old` channels to `new`, float64 [new, old].

    For new > old, new channel i gets the weights of old channel ``i % old``, divided by
    the number of new channels that share this old channel. For new < old, new channel i
    gets the summed weights of all old channels j with ``j % new == i``. Every column
    sums to 1, so images whose channels are equal give the same embedding for any number
    of channels.
    """
    few, many = min(old, new), max(old, new)
    cycle = np.equal.outer(np.arange(many) % few, np.arange(few)).astype(np.float64)
    return cycle / cycle.sum(0) if new >= old else cycle.T


def resize_channels(kernel: np.ndarray, old: int, new: int) -> np.ndarray:
    """Adapt a patch embedding to `new` instead of `old` channels.

    The shape changes from [pixels*old, dim] to [pixels*new, dim]. Multiplies the
    channels by `channel_matrix`. The result has the dtype of `kernel`.
    """
    kernel = np.asarray(kernel)
    if old == new:
        return kernel
    dim = kernel.shape[-1]
    pixels = kernel.reshape(-1, old, dim).astype(np.float64)
    return (channel_matrix(old, new) @ pixels).reshape(-1, dim).astype(kernel.dtype)
