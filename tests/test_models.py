"""The networks beyond the golden data: sizes, counts, initialisation, positions,
masking, drop path, bfloat16, official state dicts."""

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from hivit_jax.errors import CheckpointError, ConfigError
from hivit_jax.models import (
    NAMES,
    create_model,
    leaf_name,
    layers,
    named_leaves,
    positions,
    split,
)
from hivit_jax.models.hivit import Classifier, parameter_count
from hivit_jax.models.mae import (
    FixedTable,
    MaskedAutoencoder,
    random_masking,
    visible_units,
)
from hivit_jax.weights import from_official, to_official

MINI = dict(image_size=64, embed_dim=64, depths=(1, 1, 2), num_heads=2)
DECODER = dict(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
DEFAULTS = {
    "hivit_base": MINI | dict(num_classes=10),
    "mae_hivit_base": MINI | DECODER,
}


@cache
def abstract(name, **overrides):
    """A model without arrays, of its full size."""
    return nnx.eval_shape(lambda: create_model(name, **overrides))


def weight(path, leaf):
    """Numbers for a parameter that keep a variance of about 1 in every layer."""
    name = leaf_name(path)
    draw, kind = reference.normal(name, leaf.shape), name.rsplit("/", 1)[-1]
    if kind == "kernel":
        return draw / np.float32(np.sqrt(leaf.shape[0]))
    if kind in ("scale", "bias"):
        return np.float32(kind == "scale") + np.float32(0.1) * draw
    return np.float32(0.5) * draw


def mini(name="hivit_base", **overrides):
    """A small model whose every parameter matters."""
    model = abstract(name, **DEFAULTS[name] | overrides)
    graphdef, params = split(model)
    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(weight, params))


@cache
def drawn(name, seed, **overrides):
    """Parameters of a small model as it starts training, by name."""
    arguments = DEFAULTS[name] | overrides
    draw = jax.jit(lambda key: split(create_model(name, seed=key, **arguments))[1])
    return {k: np.asarray(v) for k, v in named_leaves(draw(jax.random.key(seed))).items()}


def pictures(shape, tag="pictures"):
    return jnp.asarray(reference.normal(tag, shape))


def sample_keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


# Parameters and cost


# (name, overrides): parameters, multiply-adds, the same plus 5 per LayerNorm output.
COUNTS = [
    ("hivit_tiny", {}, 19_181_668, 4_587_273_216, 4_603_080_576),
    ("hivit_small", {}, 37_526_464, 9_044_106_240, 9_071_955_840),
    ("hivit_base", {}, 66_418_952, 15_809_564_672, 15_846_697_472),
    ("hivit_tiny", {"fc_norm": False}, 19_180_900, 4_587_273_216, 4_603_078_656),
    ("hivit_small", {"fc_norm": False}, 37_525_696, 9_044_106_240, 9_071_953_920),
    ("hivit_base_24", {}, 79_050_792, 18_433_167_360, 18_474_311_680),
    ("mae_hivit_base", {}, 87_041_152, 7_921_586_176, 7_939_774_976),
]


@pytest.mark.parametrize(("name", "overrides", "parameters", "macs", "cost"), COUNTS)
def test_parameters_and_multiply_adds(name, overrides, parameters, macs, cost):
    model = abstract(name, **overrides)
    assert model.parameter_count() == parameters
    assert model.macs(layer_norm_cost=0) == macs
    assert model.macs() == cost


# As printed by the papers and MMPretrain: millions of parameters, G multiply-adds.
@pytest.mark.parametrize(
    ("name", "overrides", "parameters", "cost"),
    [
        ("hivit_tiny", {}, "19.18", "4.60"),
        ("hivit_small", {}, "37.53", "9.07"),
        ("hivit_base", {}, "66.42", "15.85"),
        ("hivit_tiny", {"fc_norm": False}, "19.181", "4.603"),
        ("hivit_small", {"fc_norm": False}, "37.526", "9.072"),
        ("hivit_base_24", {}, "79.051", "18.474"),
        ("mae_hivit_base", {}, "87.0412", "7.9398"),
    ],
)
def test_published_figures(name, overrides, parameters, cost):
    model = abstract(name, **overrides)

    def printed(value, like):
        return f"{value:.{len(like.split('.')[1])}f}"

    assert printed(model.parameter_count() / 1e6, parameters) == parameters
    assert printed(model.macs() / 1e9, cost) == cost


def test_parts_of_the_masked_autoencoder():
    model = abstract("mae_hivit_base")
    trained = nnx.state(model, nnx.All(nnx.Param, nnx.Not(FixedTable)))
    assert sum(leaf.size for leaf in jax.tree.leaves(trained)) == 86_940_800
    assert parameter_count(model.encoder) == 65_795_456
    # The patch convolution runs on all 196 units, the rest on 49.
    encoder = model.encoder.macs(196, 49, layer_norm_cost=0)
    assert f"{encoder / 1e9:.3f}" == "3.820"
    assert f"{(model.macs(layer_norm_cost=0) - encoder) / 1e9:.3f}" == "4.102"


def test_parameters_of_larger_models():
    deeper = abstract("mae_hivit_base", decoder_depth=8)
    assert f"{deeper.parameter_count() / 1e6:.2f}" == "93.35"
    assert f"{abstract('hivit_large').parameter_count() / 1e6:.1f}" == "290.7"


def test_cost_at_another_image_size():
    model, larger = mini(), abstract("hivit_base", **MINI | dict(image_size=(96, 128)))
    assert model.macs((96, 128)) == larger.macs() - 64 * (1000 - 10)
    assert model.macs(64) == model.macs()
    with pytest.raises(ConfigError, match="image_size=100.*multiples of patch_size=16"):
        model.macs(100)


# Names


WIDTHS = {
    "tiny": (384, (1, 1, 10), 6),
    "small": (384, (2, 2, 20), 6),
    "base": (512, (2, 2, 20), 8),
    "base_24": (512, (2, 2, 24), 8),
    "large": (768, (2, 2, 40), 12),
}


def test_names():
    names = {f"{prefix}hivit_{size}" for prefix in ("", "mae_") for size in WIDTHS}
    assert set(NAMES) == names
    assert len(NAMES) == len(names)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_can_be_built(name):
    width, depths, heads = WIDTHS[name.split("hivit_")[1]]
    if name.startswith("mae_"):
        # One block fewer to build where the classifier already shows the depth.
        model = abstract(name, depths=(1, 1, 1), decoder_depth=1)
        depths = (1, 1, 1)
        assert isinstance(model, MaskedAutoencoder)
        assert model.multi_scale
        assert model.encoder.stages[-1][0].attn.relative_position_bias_table is None
    else:
        model = abstract(name)
        assert isinstance(model, Classifier)
        assert model.head.out_features == 1000
        table = model.encoder.stages[-1][0].attn.relative_position_bias_table
        assert table.shape == (27 * 27, heads)
        assert (model.fc_norm is None) == (name == "hivit_base_24")
        expected = 1e-5 if name == "hivit_base_24" else 1e-6
        assert model.encoder.patch_embed.norm.epsilon == expected
    encoder = model.encoder
    assert encoder.embed_dim == width
    blocks = [len(stage) for stage in encoder.stages]
    assert blocks == [2 * depths[0], 2 * depths[1], depths[2]]
    kernel = encoder.stages[-1][0].attn.qkv.kernel
    assert kernel.shape == (width, 3, heads, width // heads)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("hivit_bsae", {}, "unknown model name 'hivit_bsae'; did you mean 'hivit_base'"),
        ("mae_hivit_tinny", {}, "did you mean 'mae_hivit_tiny'"),
        ("resnet", {}, "unknown model name 'resnet'; known: hivit_tiny, .*large"),
        ("hivit_base", {"drop_path": 0.1}, "'drop_path'; did you mean 'drop_path_rate'"),
        ("hivit_base", {"decoder_depth": 8}, "override of hivit_base 'decoder_depth'"),
        ("mae_hivit_base", {"num_classes": 8}, "override of mae_hivit_base 'num_cl"),
        ("hivit_base", {"sincos_position": True}, "override of hivit_base 'sincos_"),
    ],
)
def test_unknown_names(name, overrides, message):
    with pytest.raises(ConfigError, match=message):
        create_model(name, **overrides)


# Initialisation


INITIAL = [
    ("hivit_base", {}),
    ("mae_hivit_base", {"relative_position": True}),
]


@pytest.mark.parametrize(("name", "overrides"), INITIAL)
def test_initial_parameters(name, overrides):
    params = drawn(name, 0, **overrides)
    tables, seen = [], set()
    for path, value in params.items():
        parts = path.split("/")
        assert value.dtype == np.float32
        if "patch_embed/proj" in path:
            bound = 1 / np.sqrt(48)
            assert -bound <= value.min() < -0.9 * bound < 0.9 * bound < value.max()
            assert value.max() <= bound
            if parts[-1] == "kernel":
                assert value.shape == (48, 16)
                assert value.std() == pytest.approx(bound / np.sqrt(3), rel=0.05)
        elif parts[-1] == "kernel":
            # Within five standard errors, and with the tails of a normal.
            error = 5 / np.sqrt(value.size)
            assert value.std() == pytest.approx(0.02, rel=error), path
            assert abs(value.mean()) < 0.02 * error, path
            assert np.abs(value).max() > 2 * 0.02, path
        elif parts[-1] == "bias":
            assert not value.any(), path
        elif parts[-1] == "scale":
            assert (value == 1).all(), path
        else:
            tables.append((parts[-1], value))
            continue
        seen.add(parts[-1])
    assert seen == {"kernel", "bias", "scale"}

    counts = {}
    for kind, value in tables:
        counts[kind] = counts.get(kind, 0) + 1
        error = 5 / np.sqrt(value.size)
        if kind == "decoder_pos_embed":
            assert_array_equal(value, positions.sincos_table((4, 4), 32))
        elif kind == "absolute_pos_embed" and name.startswith("mae_"):
            assert_array_equal(value, positions.sincos_table((4, 4), 64))
        else:
            assert value.std() == pytest.approx(0.02, rel=error), kind
            assert abs(value.mean()) < 0.02 * error, kind
    expected = {"absolute_pos_embed": 1, "relative_position_bias_table": 2}
    if name.startswith("mae_"):
        expected |= {"mask_token": 1, "decoder_pos_embed": 1}
    assert counts == expected


@pytest.mark.parametrize(("name", "overrides"), INITIAL)
def test_seed_decides_parameters(name, overrides):
    one, other = drawn(name, 0, **overrides), drawn(name, 1, **overrides)
    drawn.cache_clear()
    again = drawn(name, 0, **overrides)
    for path, value in one.items():
        assert_array_equal(value, again[path])
        fixed = ("norm" in path and "proj" not in path) or "decoder_pos_embed" in path
        fixed |= path.endswith("bias") and "patch_embed/proj" not in path
        fixed |= path.endswith("absolute_pos_embed") and name.startswith("mae_")
        assert (value == other[path]).all() == fixed, path
    # No two draws share a stream.
    firsts = [v.flat[0] for v in one.values() if v.flat[0] not in (0, 1)]
    assert len(set(firsts)) == len(firsts) - (1 if 0 in firsts else 0)


def test_integer_seed_is_its_key():
    def kernel(seed):
        return create_model("hivit_base", seed=seed, **MINI, num_classes=10).head.kernel

    keyed = jax.jit(lambda key: kernel(key)[...])(jax.random.key(3))
    assert_array_equal(jax.jit(lambda: kernel(3)[...])(), keyed)


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
        corners = [cells[row::2, col::2] for row, col in [(0, 0), (1, 0), (0, 1), (1, 1)]]
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


# Masking


@pytest.mark.parametrize(
    ("units", "ratio", "kept"),
    [(196, 0.75, 49), (196, 0.6, 78), (16, 0.6, 6), (16, 0.9375, 1), (4, 0.5, 2)],
)
def test_visible_units(units, ratio, kept):
    assert visible_units(units, ratio) == kept


@pytest.mark.parametrize("ratio", [0, 1, 1.5, -0.1, 0.0, 1.0])
def test_mask_ratio_out_of_range(ratio):
    message = re.escape(f"mask_ratio={ratio}; expected 0 < mask_ratio < 1")
    with pytest.raises(ConfigError, match=message):
        visible_units(196, ratio)


def test_mask_ratio_that_keeps_nothing():
    with pytest.raises(ConfigError, match="keeps none of 16 .* at most 0.9375"):
        visible_units(16, 0.95)


def test_random_masking():
    noise = np.random.RandomState(0).rand(5, 16)
    ids_keep, ids_restore, mask = map(np.asarray, random_masking(jnp.asarray(noise), 6))
    for sample in range(5):
        order = sorted(range(16), key=lambda unit: noise[sample, unit])
        assert ids_keep[sample].tolist() == order[:6]
        assert ids_restore[sample].tolist() == [order.index(unit) for unit in range(16)]
        removed = [float(unit in order[6:]) for unit in range(16)]
        assert mask[sample].tolist() == removed
    assert mask.dtype == np.float32
    assert mask.sum() == 5 * 10


def test_equal_noise_goes_by_unit_number():
    noise = jnp.asarray([[0.5] * 6, [0.5, 0.1, 0.5, 0.1, 0.5, 0.1]])
    ids_keep, ids_restore, _ = random_masking(noise, 4)
    assert ids_keep.tolist() == [[0, 1, 2, 3], [1, 3, 5, 0]]
    assert ids_restore.tolist() == [[0, 1, 2, 3, 4, 5], [3, 0, 4, 1, 5, 2]]


def kept_units(batch, units, kept):
    rows = [np.random.RandomState(s).permutation(units)[:kept] for s in range(batch)]
    return jnp.asarray(np.stack(rows))


def per_unit(x, batch):
    """Rows of a stage [B*K*cells, C] -> [B, K, cells*C]."""
    return np.asarray(x).reshape(batch, -1, x.shape[-1] * (len(x) // batch // 16))


def test_stem_of_visible_units_is_that_of_all():
    encoder, images = mini().encoder, pictures((3, 64, 64, 3))
    ids_keep = kept_units(3, 16, 5)
    full = encoder(images)
    kept = encoder(images, ids_keep=ids_keep)
    for stage in range(2):
        cells = (16, 4)[stage]
        every = np.asarray(full[stage]).reshape(3, 16, cells, -1)
        some = np.asarray(kept[stage]).reshape(3, 5, cells, -1)
        expected = np.take_along_axis(every, np.asarray(ids_keep)[:, :, None, None], 1)
        assert_allclose(some, expected, atol=1e-6, rtol=0)
    assert kept[2].shape == (3, 5, 64)
    # Units do meet in the main stage.
    main = np.take_along_axis(np.asarray(full[2]), np.asarray(ids_keep)[..., None], 1)
    assert np.abs(main - kept[2]).max() > 0.1


@pytest.mark.parametrize("relative_position", [True, False])
def test_units_kept_in_another_order(relative_position):
    """Keeping every unit in any order is the whole image in that order."""
    encoder = mini(relative_position=relative_position).encoder
    images, order = pictures((2, 64, 64, 3)), kept_units(2, 16, 16)
    expected = jnp.take_along_axis(encoder(images)[-1], order[..., None], 1)
    assert_allclose(encoder(images, ids_keep=order)[-1], expected, atol=2e-5)


def test_prediction_does_not_see_removed_units():
    model = mini("mae_hivit_base")
    images, noise = pictures((2, 64, 64, 3)), jnp.asarray(reference.noise("x", 2, 16))
    out = model(images, noise=noise)
    removed = positions.unpatchify(
        jnp.repeat(out.mask[..., None], 768, -1), (4, 4), 16
    )
    changed = model(images + removed, noise=noise)
    assert_array_equal(out.pred, changed.pred)
    assert_array_equal(out.latent, changed.latent)
    other = model(images + (1 - removed), noise=noise)
    assert np.abs(out.pred - other.pred).max() > 0.01


def test_loss_is_the_mean_over_removed_units():
    model = mini("mae_hivit_base", norm_pix_loss=False)
    images, noise = pictures((3, 64, 64, 3)), jnp.asarray(reference.noise("x", 3, 16))
    out = model(images, noise=noise, mask_ratio=0.6)
    errors = np.square(np.asarray(out.pred) - positions.patchify(images, 16)).mean(-1)
    assert_allclose(out.unit_loss, errors, rtol=1e-5)
    removed = np.asarray(out.mask) == 1
    assert removed.sum() == 3 * 10
    assert_allclose(out.loss, errors[removed].mean(), rtol=1e-5)


@cache
def masked_runs():
    """Main stage outputs: images, the same with masked units' pixels changed."""
    encoder, images = mini().encoder, pictures((3, 64, 64, 3))
    mask = np.ones((3, 16), np.int32)
    mask[0, [2, 7, 15]] = 0
    mask[1, 1:] = 0
    mask[2] = 0
    hidden = jnp.repeat(jnp.asarray(1 - mask, jnp.float32)[..., None], 768, -1)
    changed = images + 3 * positions.unpatchify(hidden, (4, 4), 16)
    run = nnx.jit(lambda encoder, images, mask: encoder(images, key_mask=mask)[-1])
    first = run(encoder, images, jnp.asarray(mask))
    return mask, np.asarray(first), np.asarray(run(encoder, changed, jnp.asarray(mask)))


def test_key_mask_hides_units():
    mask, out, changed = masked_runs()
    for sample in range(2):
        seen = mask[sample] == 1
        assert_array_equal(out[sample, seen], changed[sample, seen])
        assert (out[sample, ~seen] != changed[sample, ~seen]).any(-1).all()


def test_wholly_masked_sample():
    """No key left: the softmax is uniform, not NaN."""
    assert np.isfinite(masked_runs()[1]).all()
    attention = mini().encoder.stages[-1][0].attn
    x = pictures((2, 16, 64), "tokens")
    index = positions.relative_position_index(jnp.arange(16), (4, 4))
    out = attention(x, index, key_mask=jnp.asarray([[0] * 16, [1] * 16]))
    values = attention.qkv(x)[:, :, 2].reshape(2, 16, 64)
    uniform = attention.proj(jnp.broadcast_to(values.mean(1, keepdims=True), x.shape))
    assert_allclose(out[0], uniform[0], atol=2e-6)
    assert_array_equal(out[1], attention(x, index)[1])


# Drop path


def test_drop_path_of_rate_zero_or_without_keys():
    x = pictures((6, 4), "rows")
    assert layers.drop_path(x, 0.0, sample_keys(3), 0) is x
    assert layers.drop_path(x, 0.7, None, 0) is x


@pytest.mark.parametrize("shape", [(16 * 3, 5), (16, 3, 5)])
def test_drop_path_drops_or_scales_whole_samples(shape):
    x = pictures(shape, "rows")
    out = layers.drop_path(x, 0.75, sample_keys(16), 3)
    assert out.shape == x.shape
    before, after = (np.asarray(a).reshape(16, 3, 5) for a in (x, out))
    kept = after.any((1, 2))
    assert 0 < kept.sum() < 16
    assert_array_equal(after[kept], before[kept] * 4)
    assert not after[~kept].any()


def test_drop_path_draws():
    """A sample's own key and the number of the draw decide, nothing else."""
    keys, ones = sample_keys(4000), jnp.ones((4000, 1))

    def draws(keys, draw=0):
        return np.asarray(layers.drop_path(ones[: len(keys)], 0.25, keys, draw))

    every = draws(keys)
    # Standard error of the mean: sqrt(0.25 / 0.75 / 4000) = 0.009.
    assert every.mean() == pytest.approx(1, abs=0.045)
    order = np.random.RandomState(0).permutation(4000)
    assert_array_equal(draws(keys[order]), every[order])
    assert_array_equal(draws(keys[100:150]), every[100:150])
    other = draws(keys, draw=1)
    # Independent: both dropped one time in sixteen.
    assert ((every == 0) & (other == 0)).mean() == pytest.approx(1 / 16, abs=0.02)


def test_models_without_drop_path_ignore_keys():
    images = pictures((2, 64, 64, 3))
    model, keys = mini(), sample_keys(2)
    assert_array_equal(model(images, sample_keys=keys), model(images))
    dropping = mini(drop_path_rate=0.5)
    assert_array_equal(dropping(images), model(images))
    assert (dropping(images, sample_keys=keys) != model(images)).any()


def test_drop_path_of_a_model_depends_on_the_sample_alone():
    model = mini(drop_path_rate=0.9)
    image = jnp.tile(pictures((1, 64, 64, 3)), (8, 1, 1, 1))
    keys, order = sample_keys(8), np.array([3, 1, 4, 0, 5, 2, 6, 7])
    run = nnx.jit(lambda model, images, keys: model(images, sample_keys=keys))
    out = np.asarray(run(model, image, keys))
    assert len(np.unique(out.round(4), axis=0)) > 4
    assert_allclose(run(model, image, keys[order]), out[order], atol=1e-5)


def test_drop_path_rates_rise_over_residual_blocks(monkeypatch):
    """Every branch of every block has its rate and a draw of its own."""
    calls = []

    def record(x, rate, keys, draw):
        assert keys is not None
        calls.append((rate, draw))
        return x

    monkeypatch.setattr(layers, "drop_path", record)
    model = abstract("hivit_tiny", drop_path_rate=0.05)
    jax.eval_shape(
        lambda: model(jnp.zeros((2, 224, 224, 3)), sample_keys=sample_keys(2))
    )
    linear = [0.05 * block / 13 for block in range(14)]  # 2 + 2 + 10 residual blocks
    expected = linear[:4] + [rate for rate in linear[4:] for _ in range(2)]
    assert [rate for rate, _ in calls] == pytest.approx(expected, abs=1e-9)
    draws = [draw for _, draw in calls]
    assert len(set(draws)) == len(draws) == 24


def test_decoder_has_no_drop_path(monkeypatch):
    model = mini("mae_hivit_base", drop_path_rate=0.5)
    rates = []

    def record(x, rate, keys, draw):
        rates.append((rate, keys is None))
        return x

    monkeypatch.setattr(layers, "drop_path", record)
    images, noise = jnp.zeros((2, 64, 64, 3)), jnp.zeros((2, 16))
    jax.eval_shape(lambda: model(images, noise=noise, sample_keys=sample_keys(2)))
    encoder = [0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.5, 0.5]
    assert [rate for rate, _ in rates] == pytest.approx([*encoder, 0, 0])
    assert [none for _, none in rates] == [False] * 8 + [True] * 2


# Other sizes


SIZES = [
    {"image_size": (64, 96)},
    {"image_size": (48, 16)},
    {"in_channels": 1},
    {"in_channels": 5},
    {"image_size": 32, "patch_size": 8},
    {"image_size": (64, 96), "patch_size": 32},
    {"depths": (1, 2), "inner_patches": 2, "patch_size": 8, "image_size": (16, 24)},
    {"depths": (1, 1, 1, 1), "inner_patches": 8},
    {"depths": (1, 1, 1, 1), "inner_patches": 8, "image_size": (32, 48)},
    {"num_heads": 1},
    {"num_heads": 16},
    {"embed_dim": 48, "num_heads": 3, "mlp_ratio": 2.5, "stem_mlp_ratio": 1.5},
    {"relative_position": False},
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_shapes_at_other_sizes(sizes):
    classifier = abstract("hivit_base", **MINI | dict(num_classes=10) | sizes)
    autoencoder = abstract("mae_hivit_base", **MINI | DECODER | sizes)
    encoder = classifier.encoder
    image = sizes.get("image_size", 64)
    height, width = (image, image) if isinstance(image, int) else image
    channels, patch = sizes.get("in_channels", 3), sizes.get("patch_size", 16)
    images = jnp.zeros((2, height, width, channels))

    def run():
        noise = jnp.zeros((2, units))
        return (
            classifier(images),
            classifier.features(images),
            autoencoder(images, noise=noise, mask_ratio=0.4),
            autoencoder.features(images),
        )

    units = (height // patch) * (width // patch)
    logits, features, out, same = jax.eval_shape(run)
    assert logits.shape == (2, 10)
    inner, dim = sizes.get("inner_patches", 4), sizes.get("embed_dim", 64)
    expected, latent = [], 0
    while inner:
        sides = (height * inner // patch, width * inner // patch)
        expected.append((2, *sides, dim // inner))
        latent += dim * inner
        inner //= 2
    assert [x.shape for x in features] == expected
    assert [x.shape for x in same] == expected
    kept = int(units * (1 - 0.4))
    assert out.latent.shape == (2, kept, latent)
    assert out.pred.shape == (2, units, patch * patch * channels)
    assert out.mask.shape == out.unit_loss.shape == (2, units)
    assert out.loss.shape == ()
    assert encoder.stages[-1][0].attn.qkv.kernel.shape[2] == sizes.get("num_heads", 2)


@pytest.mark.parametrize("sizes", [SIZES[0] | SIZES[3], SIZES[6], SIZES[8]], ids=str)
def test_features_hold_what_is_at_their_place(sizes):
    """A changed pixel moves the one stem cell that it lies in, and no other."""
    encoder = mini(**sizes).encoder
    shape = (1, *encoder.image_size, encoder.in_channels)
    images = np.asarray(pictures(shape))
    places = [(0, 0), (5, shape[2] - 2), (shape[1] - 1, 9), (shape[1] - 6, shape[2] - 5)]
    batch = [images]
    for number, (row, column) in enumerate(places):
        batch.append(images.copy())
        batch[-1][0, row, column, number % shape[3]] += 3
    batch = jnp.asarray(np.concatenate(batch))
    run = nnx.jit(lambda encoder, images: (encoder(images), encoder.features(images)))
    stages, features = run(encoder, batch)
    for level, x in enumerate(features[:-1]):
        x = np.asarray(x)
        cell = shape[1] // x.shape[1]
        for (row, column), changed in zip(places, x[1:], strict=True):
            moved = (np.abs(changed - x[0]) > 1e-6).any(-1)
            assert np.argwhere(moved).tolist() == [[row // cell, column // cell]], level
    main = np.asarray(stages[-1]).reshape(features[-1].shape)
    assert_array_equal(features[-1], main)


def test_shifted_image_shifts_stem_features():
    model = mini(image_size=(64, 96))
    images = pictures((2, 64, 96, 3))
    run = nnx.jit(lambda model, images: model.features(images))
    features = run(model, images)
    shifted = run(model, jnp.roll(images, (16, 32), (1, 2)))
    for cells, x, moved in zip((4, 2), features, shifted, strict=False):
        assert_array_equal(moved, jnp.roll(x, (cells, 2 * cells), (1, 2)))
    # The position table stays where it is.
    assert np.abs(shifted[2] - jnp.roll(features[2], (1, 2), (1, 2))).max() > 0.1


@pytest.mark.parametrize("shape", [(64, 64, 1), (64, 96, 3), (32, 64, 3)])
@pytest.mark.parametrize("name", ["hivit_base", "mae_hivit_base"])
def test_images_of_another_size(name, shape):
    model, images = abstract(name, **DEFAULTS[name]), jnp.zeros((2, *shape))
    arguments = dict(noise=jnp.zeros((2, 16))) if name.startswith("mae_") else {}
    message = re.escape(f"images are {shape} (height, width, channels)")
    with pytest.raises(ConfigError, match=message + r".* built for \(64, 64, 3\)"):
        model(images, **arguments)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"image_size": 100}, "image_size=100 .*multiples of patch_size=16"),
        ({"image_size": (64, 72)}, r"image_size=\(64, 72\) .*patch_size=16"),
        ({"image_size": 8}, "image_size=8 "),
        ({"image_size": (64, 64, 3)}, r"image_size=\(64, 64, 3\)"),
        ({"num_heads": 3}, "num_heads=3 does not divide embed_dim=64"),
        ({"num_heads": 0}, "num_heads=0 does not divide embed_dim=64"),
        ({"depths": (1, 1)}, r"depths=\(1, 1\) with inner_patches=4"),
        ({"depths": (1, 0, 1)}, r"depths=\(1, 0, 1\)"),
        ({"depths": (2,), "inner_patches": 1}, r"depths=\(2,\) with inner_patches=1"),
        ({"inner_patches": 8}, "inner_patches=8"),
        ({"patch_size": 2}, "patch_size=2 is not a multiple of inner_patches=4"),
        ({"embed_dim": 66, "num_heads": 3}, "embed_dim=66: expected a multiple of 4"),
        ({"decoder_num_heads": 5}, "decoder_num_heads=5 .* decoder_embed_dim=32"),
        ({"decoder_embed_dim": 30}, "decoder_embed_dim=30: expected a multiple of 4"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(overrides, message):
    with pytest.raises(ConfigError, match=message):
        create_model("mae_hivit_base", **MINI | DECODER | overrides)
    if "decoder" not in message:
        with pytest.raises(ConfigError, match=message):
            create_model("hivit_base", **MINI | overrides)


# Targets


def test_targets_give_the_pixels_back():
    images = pictures((2, 64, 64, 3)) * 0.3 + 0.5
    units = np.asarray(positions.patchify(images, 16), np.float64)
    model = mini("mae_hivit_base")
    target, mean, scale = model.targets(images)
    assert_allclose(target * scale + mean, units, atol=1e-6)
    assert_allclose(mean[..., 0], units.mean(-1), atol=1e-6)
    assert_allclose(scale[..., 0], np.sqrt(units.var(-1, ddof=1) + 1e-6), rtol=1e-5)
    assert_allclose(np.asarray(target).var(-1, ddof=1), 1, rtol=1e-3)
    model.norm_pix_loss = False
    target, mean, scale = model.targets(images)
    assert_array_equal(target, positions.patchify(images, 16))
    assert not mean.any()
    assert (scale == 1).all()


def mae_gradients(model):
    images, noise = pictures((2, 64, 64, 3)), jnp.asarray(reference.noise("x", 2, 16))
    graphdef, params = split(model)

    @jax.jit
    def run(params):
        out = nnx.merge(graphdef, params)(images, noise=noise)
        return out.loss, out

    (loss, out), gradients = jax.value_and_grad(run, has_aux=True)(params)
    return loss, out, named_leaves(gradients), named_leaves(params)


@cache
def mae_run(dtype):
    return mae_gradients(mini("mae_hivit_base", dtype=dtype))


def test_only_the_decoder_table_is_fixed():
    gradients = mae_run("float32")[2]
    assert not gradients.pop("decoder_pos_embed").any()
    for name, gradient in gradients.items():
        assert gradient.any(), name


# bfloat16


def test_bfloat16_masked_autoencoder():
    """Activations are bfloat16, everything that is kept or compared is float32.

    Outputs are of order 1. The limits are twice what is found.
    """
    loss32, out32, gradients32, _ = mae_run("float32")
    loss, out, gradients, params = mae_run("bfloat16")
    assert loss.dtype == out.pred.dtype == out.unit_loss.dtype == jnp.float32
    assert out.latent.dtype == jnp.bfloat16
    assert {p.dtype for p in params.values()} == {jnp.dtype("float32")}
    assert {g.dtype for g in gradients.values()} == {jnp.dtype("float32")}
    assert loss == pytest.approx(float(loss32), rel=2e-3)
    assert out32.pred.std() > 0.5
    assert_allclose(out.pred, out32.pred, atol=0.1)
    assert np.abs(out.pred - out32.pred).std() < 0.02
    assert not np.array_equal(out.pred, out32.pred)
    for name, gradient in gradients32.items():
        error = np.linalg.norm(gradients[name] - gradient)
        assert error <= 0.05 * np.linalg.norm(gradient) + 1e-6, name


def test_bfloat16_classifier():
    images = pictures((2, 64, 64, 3))
    expected, model = mini()(images), mini(dtype="bfloat16")
    logits = model(images)
    assert logits.dtype == model.pooled(images).dtype == jnp.float32
    assert [x.dtype for x in model.encoder(images)] == [jnp.bfloat16] * 3
    assert expected.std() > 0.5
    assert_allclose(logits, expected, atol=0.1)
    params = split(model)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def equations(jaxpr):
    """All equations of a jaxpr, those of inner functions included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("name", ["hivit_base", "mae_hivit_base"])
def test_float32_inside_bfloat16(name):
    """Softmax and LayerNorm statistics are float32, matrix products bfloat16."""
    model = mini(name, dtype="bfloat16")
    images, arguments = pictures((2, 64, 64, 3)), {}
    attentions, norms, products = 2, 1 + 2 + 2 + 2 + 4, []
    if name.startswith("mae_"):
        arguments = dict(noise=jnp.asarray(reference.noise("x", 2, 16)))
        attentions, norms = attentions + 1, norms + 1 + 2 + 1
    else:
        norms += 1
    jaxpr = jax.make_jaxpr(lambda images: model(images, **arguments))(images)
    found = {"exp": [], "rsqrt": []}
    for equation in equations(jaxpr.jaxpr):
        kind = equation.primitive.name
        dtypes = {v.aval.dtype for v in equation.invars}
        if kind in found:
            found[kind] += dtypes
        if kind == "dot_general":
            products.append(dtypes)
    assert found["exp"] == [jnp.dtype("float32")] * attentions
    assert found["rsqrt"] == [jnp.dtype("float32")] * norms
    low = [dtypes == {jnp.dtype("bfloat16")} for dtypes in products]
    # patch embedding, stem MLPs, merges, main blocks with six products; then the rest.
    encoder = 1 + 2 * 4 + 2 + 6 * 2
    if name.startswith("mae_"):
        assert low == [True] * (encoder + 1 + 6 + 1)
    else:
        assert low == [True] * encoder + [False]  # the head


# Official state dicts


FIXTURES = [k for k, v in reference.FIXTURES.items() if "state_dict" in v]


def fixture_model(fixture):
    """The abstract model of a fixture."""
    facts = reference.FIXTURES[fixture]
    if fixture == "mmpretrain_tiny":
        return abstract("hivit_tiny", fc_norm=False, layer_norm_eps=1e-5)
    if fixture in reference.SUPERVISED:
        return abstract(f"hivit_{fixture[4:]}")
    config = dict(facts.get("config", {}))
    overrides = {reference.OUR_NAMES.get(k, k): v for k, v in config.items()}
    overrides = {k: tuple(v) if type(v) is list else v for k, v in overrides.items()}
    name = "hivit_base" if "num_classes" in config else "mae_hivit_base"
    return abstract(name, **overrides)


@pytest.mark.parametrize("fixture", FIXTURES)
def test_official_state_dict_and_back(fixture):
    """Names and bytes; every number of the state dict is another one."""
    shapes = reference.FIXTURES[fixture]["state_dict"]
    state, start = {}, 0
    for name, shape in shapes.items():
        if not name.endswith("relative_position_index"):
            size = int(np.prod(shape))
            numbers = np.arange(start, start + size, dtype=np.uint32)
            state[name], start = numbers.view(np.float32).reshape(shape), start + size
    model = fixture_model(fixture)
    ours = from_official(state, model)
    for path, leaf in jax.tree_util.tree_leaves_with_path(split(model)[1]):
        assert named_leaves(ours)[leaf_name(path)].shape == leaf.shape
    back = to_official(ours, model)
    if fixture == "mmpretrain_tiny":
        names = {
            "backbone.pos_embed": "absolute_pos_embed",
            "head.fc.weight": "head.weight",
            "head.fc.bias": "head.bias",
        }
        state = {
            names.get(k, k.removeprefix("backbone.")): v for k, v in state.items()
        }
    if "nohifeat" in fixture:  # stored there, never applied
        del state["norm.weight"], state["norm.bias"]
    assert back.keys() == state.keys()
    for name, array in state.items():
        assert back[name].shape == array.shape, name
        assert back[name].dtype == np.float32
        assert back[name].tobytes() == array.tobytes(), name


@pytest.fixture
def mae_state():
    return reference.state_dict("mae_mini"), fixture_model("mae_mini")


@pytest.mark.parametrize("name", ["blocks.0.mlp.fc1.weight", "mask_token", "norm.bias"])
def test_missing_entry(mae_state, name):
    state, model = mae_state
    del state[name]
    with pytest.raises(CheckpointError, match=f"has no '{re.escape(name)}'"):
        from_official(state, model)


@pytest.mark.parametrize("name", ["cls_token", "blocks.99.norm1.weight"])
def test_extra_entry(mae_state, name):
    state, model = mae_state
    state[name] = np.zeros(3, np.float32)
    with pytest.raises(CheckpointError, match=f"no place for '{re.escape(name)}'"):
        from_official(state, model)


def test_relative_position_index_is_not_an_entry(mae_state):
    state, model = mae_state
    expected = named_leaves(from_official(state, model))
    for name in ("relative_position_index", "blocks.6.attn.relative_position_index"):
        state[name] = np.zeros((16, 16), np.int64)
    for name, array in named_leaves(from_official(state, model)).items():
        assert_array_equal(array, expected[name])


@pytest.mark.parametrize(
    ("name", "shape", "here"),
    [
        ("absolute_pos_embed", (1, 196, 64), [1, 16, 64]),
        ("patch_embed.proj.weight", (16, 1, 4, 4), [16, 3, 4, 4]),
        ("blocks.6.attn.qkv.weight", (64, 192), [192, 64]),
        ("decoder_embed.weight", (32, 64), [32, 448]),
        ("norm.weight", (64,), [448]),
    ],
)
def test_wrongly_shaped_entry(mae_state, name, shape, here):
    state, model = mae_state
    state[name] = np.zeros(shape, np.float32)
    message = re.escape(f"'{name}' is {list(shape)}, here {here}")
    with pytest.raises(CheckpointError, match=message):
        from_official(state, model)
