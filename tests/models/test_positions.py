"""Tests of the order of pixels, cells and units, and of position tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import mini, random_array
from numpy.testing import assert_allclose, assert_array_equal

from hivit_jax.models import positions


def coordinate_images(batch, height, width):
    """Return images [B, H, W, 3] whose pixels are (image, row, column)."""
    grid = np.meshgrid(
        np.arange(batch), np.arange(height), np.arange(width), indexing="ij"
    )
    return np.stack(grid, -1).astype(np.int32)


def test_patchify_is_row_major_and_unpatchify_inverts_it():
    images = coordinate_images(2, 12, 20)
    units = np.asarray(positions.patchify(jnp.asarray(images), 4))
    assert units.shape == (2, 15, 48)
    for unit in range(15):
        for row in range(4):
            for column in range(4):
                start = (row * 4 + column) * 3
                pixel = units[1, unit, start : start + 3]
                expected = [1, unit // 5 * 4 + row, unit % 5 * 4 + column]
                assert pixel.tolist() == expected
    back = positions.unpatchify(jnp.asarray(units), (3, 5), 4)
    assert_array_equal(back, images)


@pytest.mark.parametrize(
    ("inner", "patch_size", "grid"),
    [
        (2, 4, (2, 3)),
        (4, 4, (3, 2)),
        (4, 16, (2, 3)),
        (8, 8, (1, 3)),
        (8, 16, (2, 1)),
        (1, 2, (2, 3)),
    ],
)
def test_cells_and_maps_contain_their_pixels(inner, patch_size, grid):
    cell = patch_size // inner
    images = coordinate_images(2, grid[0] * patch_size, grid[1] * patch_size)
    units = positions.patchify(jnp.asarray(images), patch_size)
    cells = positions.units_to_cells(units, patch_size, inner)
    assert cells.shape == (2 * grid[0] * grid[1] * inner**2, cell * cell * 3)
    maps = np.asarray(positions.tokens_to_map(cells, grid, inner))
    assert maps.shape == (2, grid[0] * inner, grid[1] * inner, cell * cell * 3)
    for image, row, column in np.ndindex(maps.shape[:3]):
        rows = slice(row * cell, (row + 1) * cell)
        columns = slice(column * cell, (column + 1) * cell)
        expected = images[image, rows, columns].reshape(-1)
        assert_array_equal(maps[image, row, column], expected)


@pytest.mark.parametrize("channels", [1, 3, 9])
def test_cells_on_tpus_equal_those_of_the_transposition(channels, monkeypatch):
    """Units of nine channels are too large for the permutation matrix."""
    units = random_array((2, 3, 256 * channels))
    expected = positions.units_to_cells(units, 16, 4)
    monkeypatch.setattr(positions, "platform", lambda: "tpu")
    program = jax.make_jaxpr(positions.units_to_cells, static_argnums=(1, 2))
    assert ("dot_general" in str(program(units, 16, 4))) == (channels < 9)
    assert_array_equal(positions.units_to_cells(units, 16, 4), expected)


@pytest.mark.parametrize("inner", [1, 2, 4, 8])
def test_merge_order_equals_repeated_merging(inner):
    """`merge_order` equals PatchMerge's order, (0,0), (1,0), (0,1), (1,1), repeated."""
    cells = np.arange(inner**2).reshape(inner, inner, 1)
    while len(cells) > 1:
        corners = [
            cells[row::2, col::2] for row, col in [(0, 0), (1, 0), (0, 1), (1, 1)]
        ]
        cells = np.concatenate(corners, -1)
    assert_array_equal(positions.merge_order(inner), cells.reshape(-1))


def test_merge_order_of_four_cells_is_column_by_column():
    assert positions.merge_order(2).tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize(("grid", "dim"), [((14, 14), 512), ((2, 5), 12), ((3, 1), 4)])
def test_sincos_table_follows_the_formula(grid, dim):
    table = positions.sincos_table(grid, dim)
    assert table.shape == (grid[0] * grid[1], dim)
    assert table.dtype == np.float32
    expected = np.zeros(table.shape)
    quarter = dim // 4
    for unit in range(len(table)):
        row, column = unit // grid[1], unit % grid[1]
        for k in range(quarter):
            frequency = 10000 ** (-k / quarter)
            coordinates = (column, column, row, row)
            for part, (wave, coordinate) in enumerate(
                zip((np.sin, np.cos) * 2, coordinates, strict=True)
            ):
                value = wave(coordinate * frequency)
                expected[unit, part * quarter + k] = value
    assert_allclose(table, expected, atol=6e-8, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(3, 3), (2, 4), (5, 1)])
def test_relative_position_index_follows_the_formula(grid):
    num_units = grid[0] * grid[1]
    expected = np.zeros((num_units, num_units), int)
    for query in range(num_units):
        for key in range(num_units):
            row_distance = query // grid[1] - key // grid[1] + grid[0] - 1
            column_distance = query % grid[1] - key % grid[1] + grid[1] - 1
            expected[query, key] = row_distance * (2 * grid[1] - 1) + column_distance
    index = positions.relative_position_index(jnp.arange(num_units), grid)
    assert_array_equal(index, expected)
    assert expected.max() == (2 * grid[0] - 1) * (2 * grid[1] - 1) - 1
    ids = np.stack(
        [np.random.RandomState(s).permutation(num_units)[:3] for s in range(4)]
    )
    gathered = positions.relative_position_index(jnp.asarray(ids), grid)
    for sample in range(4):
        kept = expected[np.ix_(ids[sample], ids[sample])]
        assert_array_equal(gathered[sample], kept)


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(3, 3), (2, 4), (5, 1)])
def test_relative_position_bias_equals_indexing_of_the_table(grid):
    """Gradients of the table are compared too.

    The cotangent consists of integers, so that sums are exact in any order.
    """
    num_units, num_rows = grid[0] * grid[1], (2 * grid[0] - 1) * (2 * grid[1] - 1)
    index = positions.relative_position_index(jnp.arange(num_units), grid)
    table = random_array((num_rows, 2), "table")
    bias, backward = jax.vjp(lambda x: positions.relative_position_bias(x, grid), table)
    assert_array_equal(bias, np.moveaxis(np.asarray(table)[index], -1, 0))
    cotangent = np.arange(2.0 * num_units**2, dtype=np.float32)
    cotangent = cotangent.reshape(2, num_units, num_units)
    expected = np.zeros((num_rows, 2), np.float32)
    np.add.at(expected, np.asarray(index), np.moveaxis(cotangent, 0, -1))
    assert_array_equal(backward(cotangent)[0], expected)


@pytest.mark.slow
def test_attention_bias_has_query_rows_and_key_columns():
    """All queries are 0, so that the softmax depends only on the table."""
    attention = mini().encoder.stages[-1][0].attn
    kernel = attention.qkv.kernel[...].at[:, 0].set(0)
    attention.qkv.kernel[...] = kernel
    attention.qkv.bias[...] = attention.qkv.bias[...].at[0].set(0)
    x = random_array((2, 16, 64), "tokens")
    index = positions.relative_position_index(jnp.arange(16), (4, 4))
    out = attention(x, index)
    values = np.asarray(attention.qkv(x)[:, :, 2])  # [B, K, heads, width]
    table = np.asarray(attention.relative_position_bias_table[...])
    heads = []
    for head in range(2):
        weights = np.exp(table[np.asarray(index), head])  # [query, key]
        weights /= weights.sum(1, keepdims=True)
        heads.append(weights @ values[:, :, head])
    expected = attention.proj(jnp.concatenate(heads, -1))
    assert_allclose(out, expected, atol=2e-6)
