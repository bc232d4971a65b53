"""Groups of images that the TPU attention kernel computes together, and the masks and
biases of the scores.

A group may start at any row of a tile, but a kernel loads whole tiles. The *window* of
a group is a range of whole tiles that contains the group. The *offset* of a group is
the number of rows between the start of the window and the start of the group. All
windows have W rows, enough for a group at any offset.

A bias [heads, N, N] is expanded to arrays [W, W] before the kernel runs, one for each
head and offset. Otherwise the kernel would have to shift the bias for each group.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from hivit_jax.kernels.numerics import TILE_ROWS

LANES = 128  # columns of a tile
MASKED = -1e30  # added to the scores of keys that must not be attended to


class Groups:
    """Groups of the images in a block of `rows` rows, with `tokens` rows per image.

    images_per_group: number of images of a group.
    group_rows: number of rows of a group.
    window_rows: number of rows of a window, W.
    offsets: all offsets, ascending.
    """

    def __init__(self, rows: int, tokens: int):
        self.rows, self.tokens = rows, tokens
        # A group has at most 128 rows, the lanes of a tile, unless one image has more.
        self.images_per_group = max(1, LANES // tokens)
        while rows // tokens % self.images_per_group:
            self.images_per_group -= 1
        self.group_rows = self.images_per_group * tokens
        self.window_rows = min(rows, _window_rows(self.group_rows))
        starts, last = range(0, rows, self.group_rows), rows - self.window_rows
        self.offsets = sorted(
            {start - min(start // TILE_ROWS * TILE_ROWS, last) for start in starts}
        )

    def for_each(self, attend):
        """Call attend(window, inside, score_mask, offset_index) for each group.

        - window: slice of the rows of the window.
        - inside: bool [W, 1], True for rows of the group.
        - score_mask(axis, heads=1): returns the float32 mask to add to the scores, with
          the W keys along `axis`. If groups consist of one image, the other axis has
          length 1, and the mask is 0 for the keys of the image, else MASKED. Otherwise,
          the other axis has heads * W queries, head after head, and the mask is 0 where
          key and query belong to the same image or are both outside the group, else
          MASKED.
        - offset_index(): returns the index of the group's offset in `offsets`.
        """
        tokens, window_rows = self.tokens, self.window_rows
        group_rows, images = self.group_rows, self.images_per_group

        def body(i, _):
            start = i * group_rows // TILE_ROWS * TILE_ROWS
            start = jnp.minimum(start, self.rows - window_rows)
            start = pl.multiple_of(start, TILE_ROWS)

            def image_index(axis, heads=1):
                """Return the index of each row's image in the group; -1 outside."""
                shape = [1, 1]
                shape[axis] = heads * window_rows
                row = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
                row = row % window_rows if heads > 1 else row
                row = row + start - i * group_rows
                index = jnp.full(shape, -1)
                for j in range(images):
                    in_image = (row >= j * tokens) & (row < (j + 1) * tokens)
                    index = jnp.where(in_image, j, index)
                return index

            def score_mask(axis, heads=1):
                keys = image_index(axis)
                if images == 1:
                    return jnp.where(keys >= 0, 0.0, MASKED)
                queries = image_index(1 - axis, heads)
                return jnp.where(keys == queries, 0.0, MASKED)

            def offset_index():
                return sum(
                    jnp.where(i * group_rows - start == offset, index, 0)
                    for index, offset in enumerate(self.offsets)
                )

            window = pl.ds(start, window_rows)
            attend(window, image_index(0) >= 0, score_mask, offset_index)

        jax.lax.fori_loop(0, self.rows // group_rows, body, None)

    def bias_by_query(self, bias: jax.Array) -> jax.Array:
        """Expand a bias for each offset, [heads, N, N] -> [offsets * heads, W, W].

        Rows are queries. The bias of keys that a query must not attend to is MASKED.
        """
        return jnp.concatenate([self._expand(bias, offset) for offset in self.offsets])

    def bias_by_key(self, bias: jax.Array, heads_per_tile: int) -> jax.Array:
        """Expand a bias for each offset, [heads, N, N] -> [offsets * heads/P, W, P*W].

        Like `bias_by_query`, but rows are keys, and P = `heads_per_tile` heads lie side
        by side.
        """
        bias = self.bias_by_query(bias).swapaxes(1, 2)
        shape = -1, heads_per_tile, self.window_rows, self.window_rows
        bias = bias.reshape(shape).swapaxes(1, 2)
        return bias.reshape(-1, self.window_rows, heads_per_tile * self.window_rows)

    def _expand(self, bias, offset):
        """Expand a bias for one offset, [heads, N, N] -> [heads, W, W]."""
        image = (np.arange(self.window_rows) - offset) // self.tokens
        image = np.where((image >= 0) & (image < self.images_per_group), image, -1)
        is_same = (image == image[:, None]) & (image >= 0)
        out = jnp.asarray(np.where(is_same, 0, MASKED)[None], bias.dtype)
        for start in range(offset, offset + self.group_rows, self.tokens):
            padding = start, self.window_rows - self.tokens - start
            out = out + jnp.pad(bias, ((0, 0), padding, padding))
        return out


def _window_rows(group_rows):
    """Return the number of rows of a window for a group of `group_rows` rows."""
    if group_rows % TILE_ROWS == 0:
        return group_rows
    return -(-(group_rows + TILE_ROWS - 1) // TILE_ROWS) * TILE_ROWS


def bias_bytes(tokens: int, heads: int, head_width: int) -> int:
    """Return the bytes of VMEM for a bias and its gradient in the backward pass.

    These are five float32 arrays: two buffers for the bias, two for its gradient, and
    the array in which the gradient is summed. Assumes that a block holds enough images
    for groups of the largest size.
    """
    group_rows = max(1, LANES // tokens) * tokens
    window_rows = _window_rows(group_rows)
    num_offsets = TILE_ROWS // math.gcd(group_rows, TILE_ROWS)
    # One more offset: a window that would extend past the end of its block starts
    # earlier instead, which may give its group another offset.
    num_offsets += num_offsets > 1
    heads_per_tile = LANES // head_width
    columns = -(-heads_per_tile * window_rows // LANES) * LANES
    num_head_tiles, num_arrays, itemsize = heads // heads_per_tile, 5, 4
    return num_arrays * itemsize * num_offsets * num_head_tiles * window_rows * columns


def head_lanes(head_width: int) -> list[jax.Array]:
    """Return one mask [1, 128] for each head of a tile: True for the head's lanes."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    return [(lane // head_width) == i for i in range(LANES // head_width)]


def stack_heads(x: jax.Array, head_width: int, inside: jax.Array, dtype) -> jax.Array:
    """Stack the heads that share 128 lanes, [W, 128] -> [heads * W, 128].

    Lanes of other heads, and rows where `inside` is False, are zero.
    """
    parts = [jnp.where(lanes & inside, x, 0.0) for lanes in head_lanes(head_width)]
    return jnp.concatenate(parts).astype(dtype)


def merge_heads(x: jax.Array, head_width: int) -> jax.Array:
    """Undo `stack_heads`, [heads * W, 128] -> [W, 128].

    Of the rows of each head, only this head's lanes are used.
    """
    window_rows = len(x) * head_width // LANES
    merged = x[:window_rows]
    for i, lanes in enumerate(head_lanes(head_width)):
        head_rows = x[i * window_rows : (i + 1) * window_rows]
        merged = jnp.where(lanes, head_rows, merged)
    return merged
