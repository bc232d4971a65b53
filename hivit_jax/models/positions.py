"""Conversions between images, units, cells and maps; position tables.

An image is split into *units* of ``patch_size`` x ``patch_size`` (16x16) pixels in
row-major order. A unit consists of ``inner_patches`` x ``inner_patches`` (4x4) *cells*.
The cells of a unit are in **merge order**: the order in which PatchMerge concatenates
four neighbors, applied recursively. Therefore every merge is a reshape
``[T, C] -> [T/4, 4C]``.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hivit_jax.errors import ConfigError
from hivit_jax.kernels.target import platform

# Values per unit up to which a permutation matrix reorders units. On a TPU, transposing
# larger units is faster.
MAX_PERMUTED_SIZE = 2048
Grid = tuple[int, int]  # units or tokens along the height and along the width


def image_grid(image_size: int | Sequence[int], patch_size: int) -> Grid:
    """Return the grid of an image.

    Raises:
      ConfigError: a side is not a multiple of `patch_size`.
    """
    sides = tuple(image_size) if np.ndim(image_size) else (image_size,) * 2
    fits = patch_size > 0 and min(sides) > 0 and not any(s % patch_size for s in sides)
    if len(sides) != 2 or not fits:
        raise ConfigError(
            f"image_size={image_size} is not valid; expected a side or "
            f"(height, width), multiples of patch_size={patch_size}"
        )
    return sides[0] // patch_size, sides[1] // patch_size


def gather_tokens(x: jax.Array, ids: jax.Array) -> jax.Array:
    """Return the tokens of x [B, N, D] at the indices ids, int [B, M]: [B, M, D]."""
    return jnp.take_along_axis(x, ids[:, :, None], axis=1)


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """Split images [B, H, W, C] of any dtype into units [B, N, P*P*C], P = patch_size.

    Units are in row-major order. The index inside a unit is
    ``(row*P + col)*C + channel``, as in ``patchify`` of the official
    ``masked_autoencoder.py``.
    """
    b, h, w, c = images.shape
    p = patch_size
    # The pixels and channels of a row share one axis, because XLA:TPU would pad a
    # separate axis of three channels to a tile of 128.
    x = images.reshape(b, h // p, p, w // p, p * c)
    return x.transpose(0, 1, 3, 2, 4).reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(units: jax.Array, grid: Grid, patch_size: int) -> jax.Array:
    """Join units [B, N, P*P*C] to images [B, H, W, C]; the inverse of `patchify`."""
    b, p = len(units), patch_size
    row_length = units.shape[-1] // p  # pixels times channels
    x = units.reshape(b, *grid, p, row_length).transpose(0, 1, 3, 2, 4)
    return x.reshape(b, grid[0] * p, grid[1] * p, row_length // p)


def _merge_axes(levels: int) -> list[int]:
    """Return the permutation of a cell's (row bits, column bits) for merge order.

    At every level the row bit varies faster than the column bit, because ``PatchMerge``
    of the official ``hivit.py`` concatenates top-left, bottom-left, top-right,
    bottom-right.
    """
    return [axis for i in range(levels) for axis in (levels + i, i)]


def units_to_cells(units: jax.Array, patch_size: int, inner_patches: int) -> jax.Array:
    """Split units [B, K, P*P*C] into cells [B*K*I*I, (P/I)*(P/I)*C] in merge order.

    P is `patch_size` and I is `inner_patches`. The pixels of a cell are in row-major
    order, and the channel varies fastest.
    """
    size = units.shape[-1]
    if platform() == "tpu" and size <= MAX_PERMUTED_SIZE:
        # A product with a permutation matrix is exact and moves half as many bytes as a
        # transposition, in which XLA:TPU pads the pixels of a row to a tile of 128.
        order = _split_units(np.arange(size), patch_size, inner_patches).reshape(-1)
        permutation = jax.nn.one_hot(order, size, axis=0, dtype=units.dtype)
        units = jnp.matmul(units, permutation, precision="highest")
        return units.reshape(-1, size // inner_patches**2)
    return _split_units(units, patch_size, inner_patches)


def _split_units(units, patch_size, inner_patches):
    """Split units [..., P*P*C] by a transposition; see `units_to_cells`."""
    levels, cell_size = inner_patches.bit_length() - 1, patch_size // inner_patches
    bits = (2,) * levels
    row_length = cell_size * units.shape[-1] // patch_size**2  # pixels times channels
    x = units.reshape(-1, *bits, cell_size, *bits, row_length)
    # In x, an axis of pixel rows lies between the row bits and the column bits.
    bit_axes = [a + 1 if a < levels else a + 2 for a in _merge_axes(levels)]
    x = x.transpose(0, *bit_axes, levels + 1, 2 * levels + 2)
    return x.reshape(x.shape[0] * inner_patches**2, cell_size * row_length)


def tokens_to_map(tokens: jax.Array, grid: Grid, inner: int) -> jax.Array:
    """Arrange the tokens of all units as maps [B, Gh*inner, Gw*inner, C].

    Args:
      tokens: B*N*inner**2 tokens in merge order, [..., C].
      grid: (Gh, Gw), with N = Gh*Gw.
      inner: cells per unit side at this stage (4, 2, 1).
    """
    levels = inner.bit_length() - 1
    x = tokens.reshape(-1, *grid, *(2,) * (2 * levels), tokens.shape[-1])
    # x is [B, Gh, Gw, (column bit, row bit) per level, C].
    rows = [4 + 2 * i for i in range(levels)]
    columns = [3 + 2 * i for i in range(levels)]
    x = x.transpose(0, 1, *rows, 2, *columns, 3 + 2 * levels)
    return x.reshape(x.shape[0], grid[0] * inner, grid[1] * inner, tokens.shape[-1])


def merge_order(inner: int) -> np.ndarray:
    """Return the indices ``row*inner + col`` of a unit's cells in merge order."""
    levels = inner.bit_length() - 1
    raster = np.arange(inner**2).reshape((2,) * (2 * levels))
    return raster.transpose(_merge_axes(levels)).reshape(-1)


def merge_neighbors(x: jax.Array, grid: Grid) -> jax.Array:
    """Reorder row-major tokens [B, H*W, C] to merge order, padded to even sides.

    Args:
      grid: (H, W). An odd H gets a row of zeros, an odd W a column of zeros.

    Returns:
      [B*H'*W', C], where H' and W' are the padded sides. Every four consecutive rows
      are a square of 2x2 tokens, in the order of `PatchMerge`.
    """
    rows, columns = (-(-side // 2) for side in grid)
    x = x.reshape(len(x), *grid, x.shape[-1])
    padding = 2 * rows - grid[0], 2 * columns - grid[1]
    x = jnp.pad(x, ((0, 0), *((0, n) for n in padding), (0, 0)))
    x = x.reshape(len(x), rows, 2, columns, 2, x.shape[-1])
    return x.transpose(0, 1, 3, 4, 2, 5).reshape(-1, x.shape[-1])


def sincos_table(grid: Grid, dim: int, class_tokens: int = 0) -> np.ndarray:
    """Return the 2-D sine-cosine position table, float32 [class_tokens + N, dim].

    The first half of an embedding encodes the column of the unit and the second half
    its row, each as ``[sin, cos]`` (official ``util/pos_embed.py``). `dim` must be a
    multiple of 4. The embeddings of class tokens come first and are 0.
    """
    omega = 10000.0 ** (-np.arange(dim // 4, dtype=np.float64) / (dim / 4))
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    angles = np.stack([columns, rows], 1)[:, :, None] * omega  # [N, 2, dim/4]
    table = np.concatenate([np.sin(angles), np.cos(angles)], -1)
    table = table.reshape(-1, dim).astype(np.float32)
    return np.pad(table, ((class_tokens, 0), (0, 0)))


def relative_position_index(ids: jax.Array, grid: Grid) -> jax.Array:
    """Return the row of the relative position table for each pair of units.

    Args:
      ids: int [..., K], indices of all units, or of the kept units of each sample.
      grid: (Gh, Gw). The table has (2*Gh-1)*(2*Gw-1) rows.

    Returns:
      int [..., K, K], query first: ``(r1-r2+Gh-1)*(2*Gw-1) + (c1-c2+Gw-1)``. The
      official ``hivit.py`` gathers these indices from a stored N x N buffer.
    """
    rows, columns = jnp.divmod(ids, grid[1])
    row_offset = rows[..., :, None] - rows[..., None, :] + grid[0] - 1
    column_offset = columns[..., :, None] - columns[..., None, :] + grid[1] - 1
    return row_offset * (2 * grid[1] - 1) + column_offset


def relative_position_bias(table: jax.Array, grid: Grid) -> jax.Array:
    """Return the relative position bias of all units, row-major: [heads, N, N].

    Equals the table's rows at `relative_position_index`. The bias is built from slices,
    because the gradient of a gather is a scatter-add, which TPUs execute serially.

    Args:
      table: [(2*Gh-1)*(2*Gw-1), heads].
    """
    (height, width), heads = grid, table.shape[1]
    # The table is reversed, so that each query's entries are in the order of the keys.
    x = table.T.reshape(heads, 2 * height - 1, 2 * width - 1)[:, ::-1, ::-1]
    starts = range(width - 1, -1, -1)
    x = jnp.stack([x[:, :, i : i + width] for i in starts], 1)
    x = x.reshape(heads, width, -1)  # [heads, Gw of queries, (2*Gh-1) * Gw of keys]
    starts = range((height - 1) * width, -1, -width)
    x = jnp.stack([x[:, :, i : i + height * width] for i in starts], 1)
    return x.reshape(heads, height * width, height * width)
