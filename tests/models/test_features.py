"""Tests of feature maps, of all units or only kept units, and of block outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import (
    DEFAULTS,
    MINI,
    abstract_model,
    abstract_outputs,
    jit_model,
    mini,
    random_array,
    unoptimized_jit,
)
from numpy.testing import assert_allclose, assert_array_equal

from hivit_jax.distributed.sharding import AXES, BATCH, make_mesh, state_shardings
from hivit_jax.errors import ConfigError
from hivit_jax.tree import named_leaves, split

KEPT = jnp.asarray([[5, 0, 3], [1, 4, 2]])


def without_branches(**overrides):
    """Return a model whose residual branches add 0."""
    graphdef, params = split(mini(**overrides))

    def cut(path, leaf):
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        ends_branch = "fc2" in names or ("attn" in names and "proj" in names)
        return jnp.zeros_like(leaf) if ends_branch else leaf

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(cut, params))


def numpy_maps(model, image):
    """Compute the maps of one image cell by cell in NumPy."""
    encoder = model.encoder
    params = {k: np.asarray(v) for k, v in named_leaves(split(encoder)[1]).items()}

    def norm(x, name):
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-6)
        return x * params[f"{name}/scale"] + params[f"{name}/bias"]

    kernel, bias = params["patch_embed/proj/kernel"], params["patch_embed/proj/bias"]
    side = encoder.config.cell_size

    def embed(i, j):
        pixels = image[side * i : side * (i + 1), side * j : side * (j + 1)]
        return norm(pixels.reshape(-1) @ kernel + bias, "patch_embed/norm")

    rows, columns = len(image) // side, image.shape[1] // side
    maps = [np.array([[embed(i, j) for j in range(columns)] for i in range(rows)])]
    for level in range(len(encoder.merges)):
        x, reduction = maps[-1], params[f"merges/{level}/reduction/kernel"]

        def merge(i, j, x=x, level=level, reduction=reduction):
            corners = [(0, 0), (1, 0), (0, 1), (1, 1)]
            four = [x[2 * i + down, 2 * j + right] for down, right in corners]
            return norm(np.concatenate(four), f"merges/{level}/norm") @ reduction

        rows, columns = rows // 2, columns // 2
        maps.append(
            np.array([[merge(i, j) for j in range(columns)] for i in range(rows)])
        )
    maps[-1] = maps[-1] + params["absolute_pos_embed"].reshape(maps[-1].shape)
    return maps


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        {"image_size": 48},
        {"image_size": (32, 48)},
        {"image_size": (48, 32), "depths": (1, 1, 1, 1), "inner_patches": 8},
    ],
    ids=str,
)
def test_maps_and_kept_units_equal_those_computed_in_numpy(sizes):
    """The NumPy version computes each cell separately.

    The channels of a pixel encode the image, the row and the column of the pixel, so
    that all cells differ.
    """
    model = without_branches(**sizes)
    height, width = model.config.image_size
    axes = [-0.5, 0.5], np.arange(height) / height, np.arange(width) / width
    images = np.stack(np.meshgrid(*axes, indexing="ij"), -1).astype(np.float32)

    def run(model, images):
        return model.features(images), model.features(images, KEPT)

    result = jit_model(model, run)(jnp.asarray(images))
    maps, kept_units = jax.tree.map(np.asarray, result)
    for sample in range(2):
        expected = numpy_maps(model, images[sample])
        assert len(expected) == len(maps)
        for level, expected_map in enumerate(expected):
            assert_allclose(maps[level][sample], expected_map, atol=1e-5)
            inner = model.config.inner_patches >> level
            for i, unit in enumerate(KEPT[sample].tolist()):
                row, column = divmod(unit, width // 16)
                rows = slice(row * inner, (row + 1) * inner)
                columns = slice(column * inner, (column + 1) * inner)
                cells = kept_units[level][sample, i]
                assert cells.shape == (inner, inner, expected_map.shape[-1])
                assert_allclose(cells, expected_map[rows, columns], atol=1e-5)
    # No two positions have the same features, so that another order fails.
    for x in maps:
        vectors = x.reshape(-1, x.shape[-1])
        gaps = np.abs(vectors[:, None] - vectors).max(-1) + 9 * np.eye(len(vectors))
        assert gaps.min() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("image_size", [64, (80, 112)])
def test_stride_32_is_a_maximum_of_2x2_values(image_size):
    """Each value is the maximum of 2x2 values; an odd last row or column is dropped."""
    model = mini(image_size=image_size)
    height, width = model.config.image_size
    images = random_array((2, height, width, 3))
    run = jit_model(model, lambda model, x: model.features(x, stride_32=True))
    *_, x, pooled = map(np.asarray, run(images))
    assert pooled.shape == (2, height // 32, width // 32, 64)
    for row, column in np.ndindex(pooled.shape[1:3]):
        four = x[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert_array_equal(pooled[:, row, column], four.max((1, 2)))


def test_stride_32_refuses_kept_units_and_narrow_maps():
    images = jnp.zeros((2, 64, 64, 3))
    model = abstract_model("hivit_base", **MINI)
    with pytest.raises(ConfigError, match="stride_32=True with ids_keep; expected"):
        model.features(images, KEPT, stride_32=True)
    narrow = abstract_model("hivit_base", **MINI | dict(image_size=(16, 64)))
    with pytest.raises(ConfigError, match="stride_32=True with a 1x4 .*at least 2x2"):
        narrow.features(images[:, :16], stride_32=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFAULTS)
def test_classifier_and_autoencoder_return_features_and_layers(name):
    def run(model):
        images = jnp.zeros((2, 64, 64, 3))
        maps, layers = model.features(images, KEPT), model.layers(images)
        return maps, layers, model.layers(images, attention=True)

    model = abstract_model(name, **DEFAULTS[name], dtype="bfloat16")
    maps, layers, with_attention = abstract_outputs(run, model)
    assert [x.shape for x in maps] == [
        (2, 3, 4, 4, 16),
        (2, 3, 2, 2, 32),
        (2, 3, 1, 1, 64),
    ]
    for layer in layers:
        assert (layer.tokens.shape, layer.tokens.dtype) == ((2, 16, 64), jnp.bfloat16)
        assert layer.attention is None
    for layer in with_attention:
        attention = layer.attention
        assert (attention.shape, attention.dtype) == ((2, 2, 16, 16), jnp.float32)


@pytest.mark.slow
def test_returned_attention_reproduces_the_block_output():
    """The attention weights, applied to the values, give the tokens after the block.

    Of the two blocks tested, one has windows and one has global attention.
    """
    model = mini(
        image_size=(48, 80), depths=(1, 1, 3), window_size=2, global_blocks=(0, 2)
    )

    def run(model, images):
        encoder = model.encoder
        layers, outputs = encoder.layers(images, attention=True), []
        for block_index in (1, 2):
            before, layer = layers[block_index - 1 : block_index + 1]
            block = encoder.stages[-1][block_index]
            values = block.attn.qkv(block.norm1(before.tokens))[:, :, 2]
            weights, windows = layer.attention, block.attn.windows
            if windows is not None:
                values = windows.partition(values)
                weights = weights.reshape(-1, *weights.shape[2:])
            x = jnp.einsum("bhqk,bkhd->bqhd", weights, values)
            x = x if windows is None else windows.merge(x)
            x = before.tokens + block.attn.proj(x.reshape(2, 15, 64))
            outputs.append(x + block.mlp(block.norm2(x)))
        return layers, outputs, encoder(images)[-1]

    result = jit_model(model, run)(random_array((2, 48, 80, 3)))
    layers, outputs, last = jax.tree.map(np.asarray, result)
    for layer, output in zip(layers[1:], outputs, strict=True):
        assert_allclose(output, layer.tokens, atol=1e-5)
    assert_array_equal(layers[-1].tokens, last)
    expected_shapes = [(2, 2, 15, 15), (2, 6, 2, 4, 4), (2, 2, 15, 15)]
    assert [layer.attention.shape for layer in layers] == expected_shapes
    for layer in layers:
        assert_allclose(layer.attention.sum(-1), 1, rtol=1e-6)
    # The last window has one unit; its three padding units are never attended to.
    assert_array_equal(layers[1].attention[:, -1, ..., 1:], 0)


@pytest.mark.slow
@pytest.mark.parametrize("windows", [{}, dict(window_size=3, global_blocks=(1,))])
def test_features_on_eight_devices_equal_one_device(windows):
    graphdef, params = split(mini(image_size=(48, 80), **windows))
    images = random_array((8, 48, 80, 3))
    ids_keep = jnp.stack([jnp.roll(jnp.arange(15), n)[:6] for n in range(8)])

    @unoptimized_jit
    def run(params, images, ids_keep):
        model = nnx.merge(graphdef, params)
        if windows:
            return model.features(images, stride_32=True), model.layers(images, True)
        return model.features(images), model.features(images, ids_keep)

    expected = run(params, images, ids_keep)
    mesh = make_mesh(dict.fromkeys(AXES, 1) | dict(data=4, fsdp=2), batch_size=8)
    shardings = state_shardings(mesh, params)
    assert any("fsdp" in x.spec for x in jax.tree.leaves(shardings))
    over_batch = jax.sharding.NamedSharding(mesh, BATCH)
    out = run(
        jax.device_put(params, shardings),
        jax.device_put(images, over_batch),
        jax.device_put(ids_keep, over_batch),
    )
    for on_one, on_eight in zip(*map(jax.tree.leaves, (expected, out)), strict=True):
        assert len(on_eight.sharding.device_set) == 8
        assert_allclose(on_eight, on_one, atol=1e-5)
