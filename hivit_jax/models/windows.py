"""Windows of units that attention is limited to."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from hivit_jax.models.positions import Grid


@dataclass(frozen=True)
class Windows:
    """Windows of ``size`` units over a grid of units, row-major from the top left.

    A grid that they do not fill is padded at the bottom and the right.
    N = Gh*Gw units, W windows of S = Sh*Sw units each.
    """

    grid: Grid
    size: Grid

    @property
    def counts(self) -> Grid:
        """Windows per column and row."""
        return -(-self.grid[0] // self.size[0]), -(-self.grid[1] // self.size[1])

    @property
    def pairs(self) -> int:
        """Query-key pairs that attention computes, those of padding included."""
        return self.counts[0] * self.counts[1] * (self.size[0] * self.size[1]) ** 2

    def partition(self, x: jax.Array) -> jax.Array:
        """Units [B, N, ...] -> windows [B*W, S, ...]; zeros where there is no unit."""
        (rows, columns), (height, width) = self.counts, self.size
        rest = x.shape[2:]
        x = x.reshape(len(x), *self.grid, *rest)
        missing = rows * height - self.grid[0], columns * width - self.grid[1]
        x = jnp.pad(x, ((0, 0), *((0, n) for n in missing), *((0, 0),) * len(rest)))
        x = x.reshape(len(x), rows, height, columns, width, *rest).swapaxes(2, 3)
        return x.reshape(-1, height * width, *rest)

    def merge(self, x: jax.Array) -> jax.Array:
        """Windows [B*W, S, ...] -> units [B, N, ...]; undoes `partition`."""
        (rows, columns), (height, width) = self.counts, self.size
        rest = x.shape[2:]
        x = x.reshape(-1, rows, columns, height, width, *rest).swapaxes(2, 3)
        x = x.reshape(len(x), rows * height, columns * width, *rest)
        x = x[:, : self.grid[0], : self.grid[1]]
        return x.reshape(len(x), -1, *rest)


def make_windows(grid: Grid, side: int) -> Windows | None:
    """Windows of up to `side` x `side` units; None if `side` is 0 or one covers all."""
    size = (min(side, grid[0]), min(side, grid[1]))
    return None if side == 0 or size == grid else Windows(grid, size)
