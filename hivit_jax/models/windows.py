"""Windows of tokens for window attention."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from hivit_jax.models.positions import Grid


@dataclass(frozen=True)
class Windows:
    """Non-overlapping windows over a grid of tokens, in row-major order.

    The grid is padded at the bottom and the right to a multiple of the window size.
    Shapes below: N = Gh*Gw tokens in W windows of S = Sh*Sw tokens.

    grid: (Gh, Gw), tokens along height and width.
    size: (Sh, Sw), tokens of a window along height and width.
    shift: tokens by which the windows are shifted to the bottom right. The windows at
      the border continue at the opposite side, see `shift_mask`.
    attend_padding: `Attention` pads its input with zeros before the projections and
      attends to the padding, as in Swin. False: `Attention` pads queries, keys and
      values, and masks the padding.
    """

    grid: Grid
    size: Grid
    shift: int = 0
    attend_padding: bool = False

    @property
    def counts(self) -> Grid:
        """Numbers of windows along height and width."""
        return -(-self.grid[0] // self.size[0]), -(-self.grid[1] // self.size[1])

    @property
    def is_padded(self) -> bool:
        """True if the grid is not a multiple of the window size."""
        return bool(self.grid[0] % self.size[0] or self.grid[1] % self.size[1])

    @property
    def pairs(self) -> int:
        """Number of query-key pairs that attention computes, including padding."""
        return self.counts[0] * self.counts[1] * (self.size[0] * self.size[1]) ** 2

    def partition(self, x: jax.Array) -> jax.Array:
        """Return windows, [B, N, ...] -> [B*W, S, ...], padded with zeros."""
        (rows, columns), (height, width) = self.counts, self.size
        rest = x.shape[2:]
        x = x.reshape(len(x), *self.grid, *rest)
        padding = rows * height - self.grid[0], columns * width - self.grid[1]
        x = jnp.pad(x, ((0, 0), *((0, n) for n in padding), *((0, 0),) * len(rest)))
        if self.shift:
            x = jnp.roll(x, (-self.shift, -self.shift), (1, 2))
        x = x.reshape(len(x), rows, height, columns, width, *rest).swapaxes(2, 3)
        return x.reshape(-1, height * width, *rest)

    def merge(self, x: jax.Array) -> jax.Array:
        """Return tokens, [B*W, S, ...] -> [B, N, ...]; the inverse of `partition`."""
        (rows, columns), (height, width) = self.counts, self.size
        rest = x.shape[2:]
        x = x.reshape(-1, rows, columns, height, width, *rest).swapaxes(2, 3)
        x = x.reshape(len(x), rows * height, columns * width, *rest)
        if self.shift:
            x = jnp.roll(x, (self.shift, self.shift), (1, 2))
        x = x[:, : self.grid[0], : self.grid[1]]
        return x.reshape(len(x), self.grid[0] * self.grid[1], *rest)

    def shift_mask(self) -> np.ndarray:
        """Return the mask to add to the scores of shifted windows, float32 [W, S, S].

        As in the official code, the mask is -100 for pairs of tokens that share a
        window only because windows continue at the opposite side, else 0.
        """
        numbers = []  # region numbers, 0 to 2, along the height and the width
        for count, side in zip(self.counts, self.size, strict=True):
            position = np.arange(count * side)
            in_last = position >= (count - 1) * side
            is_wrapped = position >= count * side - self.shift
            numbers.append(in_last.astype(int) + is_wrapped)
        regions = 3 * numbers[0][:, None] + numbers[1]
        (rows, columns), (height, width) = self.counts, self.size
        regions = regions.reshape(rows, height, columns, width).swapaxes(1, 2)
        regions = regions.reshape(rows * columns, height * width)
        different = regions[:, :, None] != regions[:, None, :]
        return np.where(different, np.float32(-100), np.float32(0))


def make_windows(grid: Grid, side: int) -> Windows | None:
    """Return windows of at most `side` x `side` tokens.

    Return None if `side` is 0 or if one window covers the grid.
    """
    size = (min(side, grid[0]), min(side, grid[1]))
    return None if side == 0 or size == grid else Windows(grid, size)
