"""Tests of attention in windows, and of blocks with global attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mini_runs import classifier
from networks import (
    MINI,
    abstract_model,
    jit_model,
    mini,
    numpy_attention,
    random_array,
)
from numpy.testing import assert_allclose, assert_array_equal

from hivit_jax import inputs
from hivit_jax.errors import ConfigError
from hivit_jax.models import create_model
from hivit_jax.models.windows import Windows
from hivit_jax.tree import named_leaves

# Neither 5 rows nor 7 columns of units are a multiple of 3, so the last windows are
# padded.
UNEVEN = dict(image_size=(80, 112), window_size=3)


def window_units(grid, side):
    """Yield the units of each window, as (row, column) pairs."""
    for top in range(0, grid[0], side):
        for left in range(0, grid[1], side):
            rows = range(top, min(top + side, grid[0]))
            columns = range(left, min(left + side, grid[1]))
            yield [(row, column) for row in rows for column in columns]


@pytest.mark.parametrize(("grid", "size"), [((5, 7), (3, 3)), ((4, 6), (4, 2))])
def test_windows_contain_their_units_and_zero_padding(grid, size):
    windows = Windows(grid, size)
    units = jnp.arange(1, 1 + 2 * grid[0] * grid[1]).reshape(2, -1, 1)
    partitioned = np.asarray(windows.partition(units))
    assert partitioned.shape == (2 * np.prod(windows.counts), size[0] * size[1], 1)
    window_index = 0
    for sample in range(2):
        padded = np.zeros((grid[0] + size[0], grid[1] + size[1]), int)
        padded[: grid[0], : grid[1]] = np.asarray(units[sample, :, 0]).reshape(grid)
        for top in range(0, grid[0], size[0]):
            for left in range(0, grid[1], size[1]):
                expected = padded[top : top + size[0], left : left + size[1]]
                actual = partitioned[window_index, :, 0]
                assert_array_equal(actual, expected.reshape(-1))
                window_index += 1
    assert_array_equal(windows.merge(partitioned), units)


@pytest.mark.slow
def test_attention_in_one_window_is_global():
    global_model, windowed_model = (
        mini(depths=(1, 1, 1), window_size=side) for side in (0, 14)
    )
    images = random_array((2, 64, 64, 3))
    outputs = [
        jit_model(model, lambda m, x: m(x))(images)
        for model in (global_model, windowed_model)
    ]
    assert_array_equal(*outputs)
    assert windowed_model.macs() == global_model.macs()
    for side in (4, 14):
        encoder = abstract_model("hivit_base", **MINI, window_size=side).encoder
        assert [block.attn.windows for block in encoder.stages[-1]] == [None, None]


@pytest.mark.slow
@pytest.mark.parametrize("relative_position", [True, False])
@pytest.mark.parametrize(
    ("image_size", "side"), [((80, 112), 3), ((64, 96), 2), ((32, 112), 4)]
)
def test_attention_in_windows_equals_numpy(image_size, side, relative_position):
    """The attention is computed with and without a key mask."""
    sizes = dict(image_size=image_size, window_size=side)
    model = mini(**sizes, relative_position=relative_position)
    attention, grid = model.encoder.stages[-1][0].attn, model.encoder.grid
    height, width = min(side, grid[0]), min(side, grid[1])
    if relative_position:
        table = np.asarray(attention.relative_position_bias_table[...])
        assert table.shape == ((2 * height - 1) * (2 * width - 1), 2)
    x = random_array((2, grid[0] * grid[1], 64), "tokens")
    mask = np.ones(x.shape[:2], np.int32)
    mask[0, ::5] = 0
    mask[1, 3:9] = 0

    def run(attention, x, mask):
        return attention(x), attention(x, key_mask=mask)

    outputs = map(np.asarray, jit_model(attention, run)(x, mask))
    for out, visible in zip(outputs, (np.ones_like(mask), mask), strict=True):
        assert np.isfinite(out).all()
        for sample in range(2):
            for window in window_units(grid, side):
                units = [row * grid[1] + column for row, column in window]
                keys = [i for i, n in enumerate(units) if visible[sample, n]]
                if not keys:
                    continue
                bias = np.full((2, len(units), len(units)), -np.inf, np.float32)
                bias[:, :, keys] = 0
                if relative_position:
                    for query, (row, column) in enumerate(window):
                        for key in keys:
                            row_distance = row - window[key][0] + height - 1
                            column_distance = column - window[key][1] + width - 1
                            table_row = row_distance * (2 * width - 1) + column_distance
                            bias[:, query, key] = table[table_row]
                tokens = np.asarray(x)[sample, units]
                expected = numpy_attention(attention, tokens, bias)
                assert_allclose(out[sample, units], expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("global_blocks", [(), (1,)])
def test_only_a_global_block_connects_windows(global_blocks):
    model = mini(**UNEVEN, global_blocks=global_blocks)
    tables = [b.attn.relative_position_bias_table for b in model.encoder.stages[-1]]
    # Tables of 5x7 units, or of windows of 3x3 units.
    expected_shapes = [
        (9 * 13 if block_index in global_blocks else 5 * 5, 2)
        for block_index in range(2)
    ]
    assert [table.shape for table in tables] == expected_shapes
    image = np.asarray(random_array((1, 80, 112, 3)))
    changed = image.copy()
    changed[:, 48:64, 96:112] += 3  # unit (3, 6), in the corner window
    images = jnp.asarray(np.concatenate([image, changed]))
    run = jit_model(model, lambda model, images: model.features(images)[-1])
    out = np.asarray(run(images))
    differs = (np.abs(out[0] - out[1]) > 1e-6).any(-1)
    if global_blocks:
        assert differs.all()
    else:
        assert np.argwhere(differs).tolist() == [[3, 6], [4, 6]]


@pytest.mark.slow
def test_gradients_of_windows_without_keys_are_finite():
    """In each image, all keys of one window are masked or padding."""
    attention = mini(**UNEVEN).encoder.stages[-1][0].attn
    mask = jnp.ones((2, 5, 7)).at[0, 3:, 6:].set(0).at[1, :3, :3].set(0).reshape(2, 35)

    def gradients(attention, x):
        return jax.grad(lambda a, x: (a(x, key_mask=mask) ** 2).sum(), (0, 1))(
            attention, x
        )

    results = jit_model(attention, gradients)(random_array((2, 35, 64), "tokens"))
    for name, gradient in named_leaves(results).items():
        assert np.isfinite(gradient).all(), name
        assert np.abs(gradient).max() > 0, name


@pytest.mark.parametrize(
    ("image_size", "side", "pairs"),
    [
        (64, 2, 4 * 4**2),
        ((64, 96), 2, 6 * 4**2),
        ((64, 96), 3, 4 * 9**2),
        ((32, 96), 5, 2 * 10**2),
    ],
)
def test_cost_counts_pairs_in_the_same_window(image_size, side, pairs):
    """`pairs` is the number of query-key pairs in all windows, including padding.

    Two products of width 64 process each pair: the scores and the weighted values.
    """
    sizes = MINI | dict(image_size=image_size)
    global_model = abstract_model("hivit_base", **sizes)
    model = abstract_model("hivit_base", **sizes, window_size=side, global_blocks=(0,))
    units = global_model.encoder.grid[0] * global_model.encoder.grid[1]
    assert global_model.macs() - model.macs() == 2 * 64 * (units**2 - pairs)
    model_of_default_size = abstract_model(
        "hivit_base", **MINI, window_size=side, global_blocks=(0,)
    )
    assert model_of_default_size.macs(image_size) == model.macs()


def test_windows_with_dropped_units_are_refused():
    with pytest.raises(ConfigError, match="window_size=2: masked pretraining drops"):
        create_model("mae_hivit_base", **MINI, window_size=2)
    model = abstract_model("hivit_base", **MINI, window_size=2)
    ids_keep, images = jnp.zeros((2, 3), int), jnp.zeros((2, 64, 64, 3))
    with pytest.raises(ConfigError, match="window_size=2 with ids_keep"):
        model.encoder(images, ids_keep=ids_keep)


def test_config_keys_set_windows():
    keys = dict(model__window_size=3, model__global_blocks="(1,)")
    config = classifier(**keys, model__image_size=80)
    encoder = nnx.eval_shape(inputs.task_of_recipe(config).build_model).encoder
    windows = [block.attn.windows for block in encoder.stages[-1]]
    assert windows == [Windows((5, 5), (3, 3)), None]
