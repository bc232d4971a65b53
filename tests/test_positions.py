"""Orders of pixels, cells and units; tables of positions."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from networks import compiled, mini, pictures
from numpy.testing import assert_allclose, assert_array_equal

from hivit_jax.models import positions, resize
from hivit_jax.tree import split

# Positions


def coordinate_images(batch, height, width):
    """[B, H, W, 3]: every pixel holds its image, row and column."""
    grid = np.meshgrid(
        np.arange(batch), np.arange(height), np.arange(width), indexing="ij"
    )
    return np.stack(grid, -1).astype(np.int32)


def test_patchify_order_and_inverse():
    images = coordinate_images(2, 12, 20)
    units = np.asarray(positions.patchify(jnp.asarray(images), 4))
    assert units.shape == (2, 15, 48)
    for unit in range(15):
        for row in range(4):
            for column in range(4):
                first = (row * 4 + column) * 3
                pixel = units[1, unit, first : first + 3]
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
def test_cells_and_maps_hold_the_pixels_of_their_place(inner, patch_size, grid):
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


@pytest.mark.parametrize("inner", [1, 2, 4, 8])
def test_merge_order_is_repeated_merging(inner):
    """PatchMerge's concatenation, (row, column) = (0,0), (1,0), (0,1), (1,1)."""
    cells = np.arange(inner**2).reshape(inner, inner, 1)
    while len(cells) > 1:
        corners = [
            cells[row::2, col::2] for row, col in [(0, 0), (1, 0), (0, 1), (1, 1)]
        ]
        cells = np.concatenate(corners, -1)
    assert_array_equal(positions.merge_order(inner), cells.reshape(-1))


def test_merge_order_of_four_cells():
    assert positions.merge_order(2).tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize(("grid", "dim"), [((14, 14), 512), ((2, 5), 12), ((3, 1), 4)])
def test_sincos_table(grid, dim):
    table = positions.sincos_table(grid, dim)
    assert table.shape == (grid[0] * grid[1], dim)
    assert table.dtype == np.float32
    expected = np.zeros(table.shape)
    quarter = dim // 4
    for unit in range(len(table)):
        row, column = unit // grid[1], unit % grid[1]
        for k in range(quarter):
            w = 10000 ** (-k / quarter)
            places = (column, column, row, row)
            for part, (f, t) in enumerate(
                zip((np.sin, np.cos) * 2, places, strict=True)
            ):
                expected[unit, part * quarter + k] = f(t * w)
    assert_allclose(table, expected, atol=6e-8, rtol=0)


@pytest.mark.parametrize("grid", [(3, 3), (2, 4), (5, 1)])
def test_relative_position_index(grid):
    units = grid[0] * grid[1]
    expected = np.zeros((units, units), int)
    for query in range(units):
        for key in range(units):
            rows = query // grid[1] - key // grid[1] + grid[0] - 1
            columns = query % grid[1] - key % grid[1] + grid[1] - 1
            expected[query, key] = rows * (2 * grid[1] - 1) + columns
    index = positions.relative_position_index(jnp.arange(units), grid)
    assert_array_equal(index, expected)
    assert expected.max() == (2 * grid[0] - 1) * (2 * grid[1] - 1) - 1
    ids = np.stack([np.random.RandomState(s).permutation(units)[:3] for s in range(4)])
    gathered = positions.relative_position_index(jnp.asarray(ids), grid)
    for sample in range(4):
        kept = expected[np.ix_(ids[sample], ids[sample])]
        assert_array_equal(gathered[sample], kept)


def test_relative_bias_is_added_query_first():
    """With zero queries the softmax sees the table alone."""
    attention = mini().encoder.stages[-1][0].attn
    kernel = attention.qkv.kernel[...].at[:, 0].set(0)
    attention.qkv.kernel[...] = kernel
    attention.qkv.bias[...] = attention.qkv.bias[...].at[0].set(0)
    x = pictures((2, 16, 64), "tokens")
    index = positions.relative_position_index(jnp.arange(16), (4, 4))
    out = attention(x, index)
    values = np.asarray(attention.qkv(x)[:, :, 2])  # [B, K, heads, width]
    table = np.asarray(attention.relative_position_bias_table[...])
    heads = []
    for head in range(2):
        raised = np.exp(table[np.asarray(index), head])  # [query, key]
        heads.append(raised / raised.sum(1, keepdims=True) @ values[:, :, head])
    expected = attention.proj(jnp.concatenate(heads, -1))
    assert_allclose(out, expected, atol=2e-6)


# Other sizes and channels


def numbered(grid, channels=1):
    """Numbers in [-0.5, 0.5) that do not repeat soon, [rows, columns, channels]."""
    numbers = np.arange(channels * grid[0] * grid[1]) * 7919 % 1009 / 1009 - 0.5
    return numbers.reshape(channels, *grid).transpose(1, 2, 0)


def bicubic_by_hand(maps, grid):
    """[h, w, D] -> [*grid, D]: each new place sums 4x4 old ones, one by one."""

    def cubic(x, a=-0.75):
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    out = np.zeros((*grid, maps.shape[-1]))
    for row, column in np.ndindex(grid):
        y = (row + 0.5) * maps.shape[0] / grid[0] - 0.5
        x = (column + 0.5) * maps.shape[1] / grid[1] - 0.5
        for i in range(int(np.floor(y)) - 1, int(np.floor(y)) + 3):
            for j in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
                inside = min(max(i, 0), len(maps) - 1), min(max(j, 0), len(maps[0]) - 1)
                out[row, column] += cubic(y - i) * cubic(x - j) * maps[inside]
    return out


GRIDS = [((14, 14), (24, 24)), ((14, 14), (7, 7)), ((3, 5), (4, 7)), ((4, 3), (9, 2))]


@pytest.mark.parametrize(("grid", "new"), [*GRIDS, ((5, 2), (1, 1)), ((1, 2), (3, 2))])
def test_grid_table_of_another_size(grid, new):
    maps = numbered(grid, 3)
    table = resize.resize_grid_table(maps.reshape(-1, 3), grid, new)
    assert table.shape == (new[0] * new[1], 3)
    assert_allclose(table.reshape(*new, 3), bicubic_by_hand(maps, new), atol=1e-13)
    small = resize.resize_grid_table(np.float32(maps).reshape(-1, 3), grid, new)
    assert small.dtype == np.float32
    assert_allclose(small, table, atol=2e-7)


@pytest.mark.parametrize(("grid", "new"), [*GRIDS, ((27, 27), (47, 47))])
def test_tables_resized_as_torch_does(grid, new):
    with np.load(reference.GOLDEN / "bicubic.npz") as arrays:
        expected = arrays["{}x{}_{}x{}".format(*grid, *new)].reshape(-1, 1)
    table = numbered(grid).reshape(-1, 1)
    assert_allclose(resize.resize_grid_table(table, grid, new), expected, atol=5e-8)
    if grid == (27, 27):  # the differences within 14x14 and 24x24 units
        table = resize.resize_relative_table(table, (14, 14), (24, 24))
        assert_allclose(table, expected, atol=5e-8)


@pytest.mark.parametrize(("grid", "new"), [((4, 4), (6, 6)), ((2, 5), (3, 2))])
def test_relative_table_is_a_map_of_differences(grid, new):
    spans = [(2 * rows - 1, 2 * columns - 1) for rows, columns in (grid, new)]
    table = numbered(spans[0], 2).reshape(-1, 2)
    resized = resize.resize_relative_table(table, grid, new)
    assert_array_equal(resized, resize.resize_grid_table(table, *spans))
    assert len(resized) == (2 * new[0] - 1) * (2 * new[1] - 1)


def test_resized_constants_stay_constant():
    constant = np.full((6 * 4, 2), 0.7)
    resized = resize.resize_grid_table(constant, (6, 4), (9, 11))
    assert_allclose(resized, 0.7, rtol=1e-14)


# With a = -0.75 the cubic keeps a ramp at samples and halfway between them; elsewhere
# it bends it by up to 4.9 % of a step on each axis (a = -0.5 would not).
@pytest.mark.parametrize(("new", "bend"), [((4, 6), 0), ((16, 18), 0.049)])
def test_resized_ramps_stay_ramps_inside(new, bend):
    def ramp(grid):
        places = [(np.arange(n) + 0.5) / n for n in grid]
        return 24 * places[0][:, None] - 24 * places[1] + 1  # steps of 3 and 2 in 8x12

    table = ramp((8, 12)).reshape(-1, 1)
    resized = resize.resize_grid_table(table, (8, 12), new).reshape(new)
    inner = tuple(slice(n // 4, n - n // 4) for n in new)
    assert_allclose(resized[inner], ramp(new)[inner], atol=bend * (3 + 2) + 1e-13)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_the_same_size_keeps_every_byte(dtype):
    table = np.asarray(numbered((7, 9), 2).reshape(-1, 2), dtype)
    kernel = np.asarray(numbered((4 * 4 * 3, 8))[..., 0], dtype)
    for before, after in (
        (table, resize.resize_grid_table(table, (7, 9), (7, 9))),
        (table, resize.resize_relative_table(table, (4, 5), (4, 5))),
        (kernel, resize.resize_patch_kernel(kernel, 4, 4)),
        (kernel, resize.resize_channels(kernel, 3, 3)),
    ):
        assert after.dtype == dtype
        assert after.tobytes() == before.tobytes()
    assert resize.resize_grid_table(table, (7, 9), (3, 4)).dtype == dtype
    assert resize.resize_channels(kernel, 3, 1).dtype == dtype


@pytest.mark.parametrize("new", [2, 5, 8])
def test_patch_kernel_of_another_cell(new):
    """Every channel and output on its own, over rows and columns of pixels."""
    kernel = numbered((4 * 4 * 3, 5))[..., 0]
    resized = resize.resize_patch_kernel(kernel, 4, new)
    assert resized.shape == (new * new * 3, 5)
    pixels, expected = kernel.reshape(4, 4, 3, 5), resized.reshape(new, new, 3, 5)
    for channel in range(3):
        by_hand = bicubic_by_hand(pixels[:, :, channel], (new, new))
        assert_allclose(expected[:, :, channel], by_hand, atol=1e-13)


def test_a_table_of_another_grid():
    with pytest.raises(ValueError, match="reshape"):
        resize.resize_grid_table(np.zeros((12, 4)), (2, 3), (4, 4))


def test_channel_weights():
    shares = resize.channel_weights
    assert shares(1, 3).tolist() == [[1 / 3]] * 3
    assert shares(3, 1).tolist() == [[1, 1, 1]]
    assert shares(2, 3).tolist() == [[0.5, 0], [0, 1], [0.5, 0]]
    assert shares(3, 2).tolist() == [[1, 0, 1], [0, 1, 0]]
    assert shares(3, 6).tolist() == (np.tile(np.eye(3), (2, 1)) / 2).tolist()
    assert shares(4, 4).tolist() == np.eye(4).tolist()


@pytest.mark.parametrize("old", [1, 3])
def test_grey_images_of_any_number_of_channels(old):
    model, grey = mini(in_channels=old, image_size=32), pictures((2, 32, 32, 1))
    _, params = split(model)
    kernel = params["encoder"]["patch_embed"]["proj"]["kernel"]

    def logits(model, channels):
        return compiled(model, lambda m, x: m(x))(jnp.tile(grey, channels))

    expected = logits(model, old)
    for new in {1: (3, 4), 3: (1, 2, 6)}[old]:
        graphdef, _ = split(mini(in_channels=new, image_size=32))
        resized = resize.resize_channels(kernel, old, new)
        assert resized.shape == (16 * new, 16)
        params["encoder"]["patch_embed"]["proj"]["kernel"] = jnp.asarray(resized)
        assert_allclose(logits(nnx.merge(graphdef, params), new), expected, atol=1e-5)
