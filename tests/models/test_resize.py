"""Tests of tables and kernels resized to another image size or number of channels."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from networks import bicubic_like_torch, jit_model, mini, random_array
from numpy.testing import assert_allclose, assert_array_equal

from hivit_jax.models import resize
from hivit_jax.tree import split


def irregular_map(grid, channels=1):
    """Return irregular numbers in [-0.5, 0.5), [rows, columns, channels].

    The sequence of numbers repeats after 1,009.
    """
    numbers = np.arange(channels * grid[0] * grid[1]) * 7919 % 1009 / 1009 - 0.5
    return numbers.reshape(channels, *grid).transpose(1, 2, 0)


GRIDS = [((14, 14), (24, 24)), ((14, 14), (7, 7)), ((3, 5), (4, 7)), ((4, 3), (9, 2))]


@pytest.mark.parametrize(
    ("grid", "new_grid"), [*GRIDS, ((5, 2), (1, 1)), ((1, 2), (3, 2))]
)
def test_grid_table_is_resized_bicubically(grid, new_grid):
    maps = irregular_map(grid, 3)
    table = resize.resize_grid_table(maps.reshape(-1, 3), grid, new_grid)
    assert table.shape == (new_grid[0] * new_grid[1], 3)
    assert_allclose(
        table.reshape(*new_grid, 3), bicubic_like_torch(maps, new_grid), atol=1e-13
    )
    table32 = resize.resize_grid_table(np.float32(maps).reshape(-1, 3), grid, new_grid)
    assert table32.dtype == np.float32
    assert_allclose(table32, table, atol=2e-7)


@pytest.mark.parametrize(("grid", "new_grid"), [*GRIDS, ((27, 27), (47, 47))])
def test_tables_equal_those_resized_by_torch(grid, new_grid):
    with np.load(reference.GOLDEN / "bicubic.npz") as arrays:
        expected = arrays["{}x{}_{}x{}".format(*grid, *new_grid)].reshape(-1, 1)
    table = irregular_map(grid).reshape(-1, 1)
    assert_allclose(
        resize.resize_grid_table(table, grid, new_grid), expected, atol=5e-8
    )
    if grid == (27, 27):  # relative tables of 14x14 units have 27x27 rows
        table = resize.resize_relative_table(table, (14, 14), (24, 24))
        assert_allclose(table, expected, atol=5e-8)


@pytest.mark.parametrize(("grid", "new_grid"), [((4, 4), (6, 6)), ((2, 5), (3, 2))])
def test_relative_table_is_resized_as_a_map_of_differences(grid, new_grid):
    table_sizes = [
        (2 * rows - 1, 2 * columns - 1) for rows, columns in (grid, new_grid)
    ]
    table = irregular_map(table_sizes[0], 2).reshape(-1, 2)
    resized = resize.resize_relative_table(table, grid, new_grid)
    assert_array_equal(resized, resize.resize_grid_table(table, *table_sizes))
    assert len(resized) == (2 * new_grid[0] - 1) * (2 * new_grid[1] - 1)


def test_resized_constants_stay_constant():
    constant = np.full((6 * 4, 2), 0.7)
    resized = resize.resize_grid_table(constant, (6, 4), (9, 11))
    assert_allclose(resized, 0.7, rtol=1e-14)


# PyTorch's cubic filter (a = -0.75) reproduces a ramp at the positions of the old 8x12
# grid and halfway between two of them. All positions of the 4x6 grid are halfway. At
# other positions, such as many of the 16x18 grid, the result deviates on each axis by
# less than 4.9 % of the step between neighboring values of the old grid. With a = -0.5,
# no result would deviate.
@pytest.mark.parametrize(("new_grid", "deviation"), [((4, 6), 0), ((16, 18), 0.049)])
def test_resized_ramps_stay_ramps_inside(new_grid, deviation):
    def ramp(grid):
        axes = [(np.arange(n) + 0.5) / n for n in grid]
        return (
            24 * axes[0][:, None] - 24 * axes[1] + 1
        )  # differences of 3 and 2 in 8x12

    table = ramp((8, 12)).reshape(-1, 1)
    resized = resize.resize_grid_table(table, (8, 12), new_grid).reshape(new_grid)
    inner = tuple(slice(n // 4, n - n // 4) for n in new_grid)
    assert_allclose(
        resized[inner], ramp(new_grid)[inner], atol=deviation * (3 + 2) + 1e-13
    )


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_resizing_to_an_equal_size_keeps_every_byte(dtype):
    table = np.asarray(irregular_map((7, 9), 2).reshape(-1, 2), dtype)
    kernel = np.asarray(irregular_map((4 * 4 * 3, 8))[..., 0], dtype)
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


@pytest.mark.parametrize("new_side", [2, 5, 8])
def test_patch_kernel_is_resized_per_channel_and_output(new_side):
    """The weights of each channel and output are resized as an image of their own."""
    kernel = irregular_map((4 * 4 * 3, 5))[..., 0]
    resized = resize.resize_patch_kernel(kernel, 4, new_side)
    assert resized.shape == (new_side * new_side * 3, 5)
    pixels = kernel.reshape(4, 4, 3, 5)
    actual = resized.reshape(new_side, new_side, 3, 5)
    for channel in range(3):
        expected = bicubic_like_torch(pixels[:, :, channel], (new_side, new_side))
        assert_allclose(actual[:, :, channel], expected, atol=1e-13)


def test_table_of_one_unit_repeats_its_bias():
    """Each head's only bias is used at every distance."""
    table = np.array([[0.5, -2]], np.float32)
    resized = resize.resize_table_geometrically(table, 1, 3)
    assert_array_equal(resized, np.tile(table, (25, 1)))


def test_table_that_does_not_fit_its_grid_is_refused():
    with pytest.raises(ValueError, match="reshape"):
        resize.resize_grid_table(np.zeros((12, 4)), (2, 3), (4, 4))


def test_columns_of_the_channel_matrix_sum_to_1():
    matrix = resize.channel_matrix
    assert matrix(1, 3).tolist() == [[1 / 3]] * 3
    assert matrix(3, 1).tolist() == [[1, 1, 1]]
    assert matrix(2, 3).tolist() == [[0.5, 0], [0, 1], [0.5, 0]]
    assert matrix(3, 2).tolist() == [[1, 0, 1], [0, 1, 0]]
    assert matrix(3, 6).tolist() == (np.tile(np.eye(3), (2, 1)) / 2).tolist()
    assert matrix(4, 4).tolist() == np.eye(4).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("old_channels", [1, 3])
def test_gray_images_give_equal_logits_with_any_channels(old_channels):
    model = mini(in_channels=old_channels, image_size=32)
    gray = random_array((2, 32, 32, 1))
    _, params = split(model)
    kernel = params["encoder"]["patch_embed"]["proj"]["kernel"]

    def logits(model, channels):
        return jit_model(model, lambda m, x: m(x))(jnp.tile(gray, channels))

    expected = logits(model, old_channels)
    for new_channels in {1: (3, 4), 3: (1, 2, 6)}[old_channels]:
        graphdef, _ = split(mini(in_channels=new_channels, image_size=32))
        resized = resize.resize_channels(kernel, old_channels, new_channels)
        assert resized.shape == (16 * new_channels, 16)
        params["encoder"]["patch_embed"]["proj"]["kernel"] = jnp.asarray(resized)
        assert_allclose(
            logits(nnx.merge(graphdef, params), new_channels), expected, atol=1e-5
        )
