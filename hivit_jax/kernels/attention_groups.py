"""Groups of images that the TPU attention kernel computes together, and the masks and
biases of the scores.

A group may start at any row of a tile, but a kernel loads whole tiles. The *window* of
a group is a range of whole tiles that contains the group. The *offset* of a group is
the number of rows between the start of the window and the start of the group. All
windows have W rows, enough for a group at any offset.

A bias [heads, N, N] is copied to windows before the kernel runs, once for each offset.
Otherwise the kernel would have to shift the bias for each group.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

LANES, TILE = 128, 8  # columns and rows of a float32 tile
MASKED = -1e30  # added to the scores of keys that must not be attended to


class Groups:
    """Groups of the images in a block of `rows` rows, with `tokens` rows per image.

    images: number of images of a group.
    size: number of rows of a group.
    window: number of rows of a window, W.
    offsets: all offsets, ascending.
    """

    def __init__(self, rows: int, tokens: int):
        self.rows, self.tokens = rows, tokens
        self.images = max(1, LANES // tokens)
        while rows // tokens % self.images:
            self.images -= 1
        self.size = self.images * tokens
        self.window = min(rows, _window_rows(self.size))
        starts = range(0, rows, self.size)
        last = rows - self.window
        offsets = {start - min(start // TILE * TILE, last) for start in starts}
        self.offsets = sorted(offsets)

    def for_each(self, attend):
        """Call attend(window, inside, score_mask, slot) for each group.

        - window: slice of the rows of the window.
        - inside: bool [W, 1], True for rows of the group.
        - score_mask(axis, heads=1): returns the float32 mask to add to scores [W, W]
          with keys along `axis`. In groups of several images, it is 0 if key and query
          are of the same image or both outside the group, else MASKED. In groups of one
          image, it is 0 for keys of the image, else MASKED, with length 1 along the
          query axis. With `heads` > 1, the queries of that many heads lie side by side.
        - slot(): returns the index of the group's offset in `offsets`.
        """
        tokens, window = self.tokens, self.window
        size, images = self.size, self.images

        def body(i, _):
            start = jnp.minimum(i * size // TILE * TILE, self.rows - window)
            start = pl.multiple_of(start, TILE)

            def image_index(axis, heads=1):
                """Return the index of each row's image in the group; -1 outside."""
                shape = [1, 1]
                shape[axis] = heads * window
                row = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
                row = (row % window if heads > 1 else row) + start - i * size
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

            def slot():
                return sum(
                    jnp.where(i * size - start == offset, index, 0)
                    for index, offset in enumerate(self.offsets)
                )

            attend(pl.ds(start, window), image_index(0) >= 0, score_mask, slot)

        jax.lax.fori_loop(0, self.rows // size, body, None)

    def bias_by_query(self, bias: jax.Array) -> jax.Array:
        """Copy a bias to windows, [heads, N, N] -> [offsets * heads, W, W].

        Rows are queries. The bias of keys that a query must not attend to is MASKED.
        """
        windows = [self._at_offset(bias, offset) for offset in self.offsets]
        return jnp.concatenate(windows)

    def bias_by_key(self, bias: jax.Array, heads_per_tile: int) -> jax.Array:
        """Copy a bias to windows, [heads, N, N] -> [offsets * heads/P, W, P * W].

        Like `bias_by_query`, but rows are keys, and P = `heads_per_tile` heads lie side
        by side.
        """
        bias = self.bias_by_query(bias).swapaxes(1, 2)
        shape = -1, heads_per_tile, self.window, self.window
        bias = bias.reshape(shape).swapaxes(1, 2)
        return bias.reshape(-1, self.window, heads_per_tile * self.window)

    def _at_offset(self, bias, offset):
        """Copy a bias to windows of one offset, [heads, N, N] -> [heads, W, W]."""
        image = (np.arange(self.window) - offset) // self.tokens
        image = np.where((image >= 0) & (image < self.images), image, -1)
        same = (image == image[:, None]) & (image >= 0)
        out = jnp.asarray(np.where(same, 0, MASKED)[None], bias.dtype)
        for start in range(offset, offset + self.size, self.tokens):
            padding = start, self.window - self.tokens - start
            out = out + jnp.pad(bias, ((0, 0), padding, padding))
        return out


def _window_rows(size):
    """Return the number of rows of a window for a group of `size` rows."""
    return size if size % TILE == 0 else -(-(size + TILE - 1) // TILE) * TILE


def bias_bytes(tokens: int, heads: int, head_width: int) -> int:
    """Return the bytes of VMEM for a bias and its gradient in the backward pass.

    These are five float32 arrays: two buffers for the bias, two for its gradient, and
    the array in which the gradient is summed. Assumes that a block holds enough images
    for groups of the largest size.
    """
    size = max(1, LANES // tokens) * tokens
    window, offsets = _window_rows(size), TILE // math.gcd(size, TILE)
    offsets += offsets > 1  # because the last window of a block may start earlier
    heads_per_tile = LANES // head_width
    columns = -(-heads_per_tile * window // LANES) * LANES
    arrays, itemsize = 5, 4
    return arrays * itemsize * offsets * heads // heads_per_tile * window * columns


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
    window = len(x) * head_width // LANES
    merged = x[:window]
    for i, lanes in enumerate(head_lanes(head_width)):
        merged = jnp.where(lanes, x[i * window : (i + 1) * window], merged)
    return merged
