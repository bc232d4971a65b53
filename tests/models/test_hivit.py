"""Tests of HiViT: parameters, multiply-adds, initialization, sizes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import (
    DECODER,
    DEFAULTS,
    MINI,
    abstract_model,
    abstract_outputs,
    initial_params,
    jit_model,
    mini,
    random_array,
)
from numpy.testing import assert_array_equal

from hivit_jax.errors import ConfigError
from hivit_jax.models import create_model, positions
from hivit_jax.models.flops import encoder_cost, parameter_count

# Parameters and cost

# (name, overrides, parameters, multiply-adds, multiply-adds + 5 per LayerNorm output)
COSTS = [
    ("hivit_tiny", {}, 19_181_668, 4_587_273_216, 4_603_080_576),
    ("hivit_small", {}, 37_526_464, 9_044_106_240, 9_071_955_840),
    ("hivit_base", {}, 66_418_952, 15_809_564_672, 15_846_697_472),
    ("hivit_tiny", {"fc_norm": False}, 19_180_900, 4_587_273_216, 4_603_078_656),
    ("hivit_small", {"fc_norm": False}, 37_525_696, 9_044_106_240, 9_071_953_920),
    ("hivit_base_24", {}, 79_050_792, 18_433_167_360, 18_474_311_680),
    ("mae_hivit_base", {}, 87_041_152, 7_921_586_176, 7_939_774_976),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides", "parameter_count", "macs", "cost"), COSTS
)
def test_counts_of_parameters_and_multiply_adds_are_exact(
    name, overrides, parameter_count, macs, cost
):
    model = abstract_model(name, **overrides)
    assert model.parameter_count() == parameter_count
    assert model.macs(layer_norm_cost=0) == macs
    assert model.macs() == cost


@pytest.mark.slow
# Published by the papers and MMPretrain: millions of parameters, 1e9 multiply-adds.
@pytest.mark.parametrize(
    ("name", "overrides", "parameter_count", "cost"),
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
def test_published_numbers_are_reproduced(name, overrides, parameter_count, cost):
    model = abstract_model(name, **overrides)

    def rounded(value, like):
        return f"{value:.{len(like.split('.')[1])}f}"

    count = model.parameter_count() / 1e6
    assert rounded(count, parameter_count) == parameter_count
    assert rounded(model.macs() / 1e9, cost) == cost


def test_parts_of_the_autoencoder_have_known_parameters_and_cost():
    model = abstract_model("mae_hivit_base")
    trained_params = nnx.state(model, nnx.Param)
    assert sum(leaf.size for leaf in jax.tree.leaves(trained_params)) == 86_940_800
    # The official encoder includes the norm of the latent.
    assert parameter_count(model.encoder) + parameter_count(model.norm) == 65_795_456
    # The patch embedding and the decoder's blocks and prediction count all 196 units,
    # the other parts count 49.
    encoder = encoder_cost(model.encoder, (14, 14), 49, layer_norm_cost=0)
    block = 196 * 12 * 512**2 + 2 * 196**2 * 512
    decoder = 49 * 3584 * 512 + 6 * block + 196 * 512 * 768
    assert decoder == 4_102_389_760
    assert model.macs(layer_norm_cost=0) == encoder + decoder


@pytest.mark.slow
def test_larger_models_have_known_numbers_of_parameters():
    deeper = abstract_model("mae_hivit_base", decoder_depth=8)
    assert f"{deeper.parameter_count() / 1e6:.2f}" == "93.35"
    assert f"{abstract_model('hivit_large').parameter_count() / 1e6:.1f}" == "290.7"


def test_cost_at_another_image_size_equals_that_of_a_larger_model():
    model = mini()
    larger = abstract_model("hivit_base", **MINI | dict(image_size=(96, 128)))
    # The larger model has a head for 1000 classes instead of 10.
    assert model.macs((96, 128)) == larger.macs() - 64 * (1000 - 10)
    assert model.macs(64) == model.macs()
    with pytest.raises(ConfigError, match="image_size=100.*multiples of patch_size=16"):
        model.macs(100)


@pytest.mark.slow
def test_model_without_a_head_returns_pooled_features():
    """The model lacks the parameters and multiply-adds of the head."""
    model, headless = mini(), mini(num_classes=0)
    images = random_array((2, 64, 64, 3))
    pooled = jit_model(model, lambda model, images: model.pooled(images))(images)
    out = jit_model(headless, lambda model, images: model(images))(images)
    assert_array_equal(out, pooled)
    assert model.parameter_count() - headless.parameter_count() == 64 * 10 + 10
    assert model.macs() - headless.macs() == 64 * 10


def test_layer_ids_of_a_masked_autoencoder_extend_those_of_a_classifier():
    """The layer of all decoder parameters follows the last block of the encoder."""
    ids = abstract_model("mae_hivit_base", **MINI, **DECODER).layer_ids()
    classifier_ids = abstract_model("hivit_base", **MINI).layer_ids()
    assert ids["encoder/merges/0/norm/scale"] == 2
    assert ids["encoder/stages/2/1/mlp/fc1/kernel"] == 6
    for name, layer in ids.items():
        expected = classifier_ids[name] if name.startswith("encoder/") else 7
        assert layer == expected, name


# Initialization

MODELS = [
    ("hivit_base", {}),
    ("mae_hivit_base", {"relative_position": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "overrides"), MODELS)
def test_initial_parameters_follow_their_distributions(name, overrides):
    params = initial_params(name, 0, **overrides)
    others, kinds = [], set()  # others: position tables and the mask token
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
            # The tolerance of mean and deviation is five standard errors of the mean.
            # Values above two standard deviations show that nothing is truncated there.
            error = 5 / np.sqrt(value.size)
            assert value.std() == pytest.approx(0.02, rel=error), path
            assert abs(value.mean()) < 0.02 * error, path
            assert np.abs(value).max() > 2 * 0.02, path
        elif parts[-1] == "bias":
            assert not value.any(), path
        elif parts[-1] == "scale":
            assert (value == 1).all(), path
        else:
            others.append((parts[-1], value))
            continue
        kinds.add(parts[-1])
    assert kinds == {"kernel", "bias", "scale"}

    counts = {}
    for kind, value in others:
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


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_output_shapes_follow_from_the_sizes(sizes):
    classifier = abstract_model("hivit_base", **MINI | dict(num_classes=10) | sizes)
    autoencoder = abstract_model("mae_hivit_base", **MINI | DECODER | sizes)
    size = sizes.get("image_size", 64)
    height, width = (size, size) if isinstance(size, int) else size
    channels, patch = sizes.get("in_channels", 3), sizes.get("patch_size", 16)
    units = (height // patch) * (width // patch)
    images, noise = jnp.zeros((2, height, width, channels)), jnp.zeros((2, units))

    def run(classifier, autoencoder):
        return (
            classifier(images),
            classifier.features(images),
            autoencoder(images, noise=noise, mask_ratio=0.4),
            autoencoder.features(images),
        )

    logits, classifier_maps, out, autoencoder_maps = abstract_outputs(
        run, classifier, autoencoder
    )
    assert logits.shape == (2, 10)
    inner, dim = sizes.get("inner_patches", 4), sizes.get("embed_dim", 64)
    expected, latent = [], 0
    while inner:
        sides = (height * inner // patch, width * inner // patch)
        expected.append((2, *sides, dim // inner))
        latent += dim * inner
        inner //= 2
    assert [x.shape for x in classifier_maps] == expected
    assert [x.shape for x in autoencoder_maps] == expected
    visible = int(units * (1 - 0.4))
    assert out.latent.shape == (2, visible, latent)
    assert out.pred.shape == (2, units, patch * patch * channels)
    assert out.mask.shape == out.unit_loss.shape == (2, units)
    assert out.loss.shape == ()
    attention = classifier.encoder.stages[-1][0].attn
    assert attention.qkv.kernel.shape[2] == sizes.get("num_heads", 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        {"image_size": (64, 96), "in_channels": 5},
        {"depths": (1, 2), "inner_patches": 2, "patch_size": 8, "image_size": (16, 24)},
        {"depths": (1, 1, 1, 1), "inner_patches": 8, "image_size": (32, 48)},
    ],
    ids=str,
)
def test_stem_features_are_local(sizes):
    """A changed pixel changes only the cell that contains it, in each stem map."""
    model = mini(**sizes)
    shape = (1, *model.config.image_shape)
    images = np.asarray(random_array(shape))
    pixels = [
        (0, 0),
        (5, shape[2] - 2),
        (shape[1] - 1, 9),
        (shape[1] - 6, shape[2] - 5),
    ]
    batch = [images]
    for image_index, (row, column) in enumerate(pixels):
        batch.append(images.copy())
        batch[-1][0, row, column, image_index % shape[3]] += 3
    batch = jnp.asarray(np.concatenate(batch))
    run = jit_model(model, lambda model, x: (model.encoder(x), model.features(x)))
    stages, features = run(batch)
    for level, x in enumerate(features[:-1]):
        x = np.asarray(x)
        cell = shape[1] // x.shape[1]
        for (row, column), changed in zip(pixels, x[1:], strict=True):
            differs = (np.abs(changed - x[0]) > 1e-6).any(-1)
            assert np.argwhere(differs).tolist() == [[row // cell, column // cell]], (
                level
            )
    main = np.asarray(stages[-1]).reshape(features[-1].shape)
    assert_array_equal(features[-1], main)


@pytest.mark.slow
def test_shifted_image_shifts_stem_features():
    model = mini(image_size=(64, 96))
    images = random_array((2, 64, 96, 3))
    run = jit_model(model, lambda model, images: model.features(images))
    # The images are shifted by one row and two columns of units.
    features, shifted = run(images), run(jnp.roll(images, (16, 32), (1, 2)))
    for cells, x, shifted_x in zip((4, 2), features, shifted, strict=False):
        assert_array_equal(shifted_x, jnp.roll(x, (cells, 2 * cells), (1, 2)))
    # The position table does not shift.
    assert np.abs(shifted[2] - jnp.roll(features[2], (1, 2), (1, 2))).max() > 0.1


@pytest.mark.parametrize("shape", [(64, 64, 1), (64, 96, 3), (32, 64, 3)])
@pytest.mark.parametrize("name", ["hivit_base", "mae_hivit_base"])
def test_images_of_another_size_are_refused(name, shape):
    model, images = abstract_model(name, **DEFAULTS[name]), jnp.zeros((2, *shape))
    arguments = dict(noise=jnp.zeros((2, 16))) if name.startswith("mae_") else {}
    message = re.escape(f"images are {shape} (height, width, channels)")
    with pytest.raises(ConfigError, match=message + r".* built for \(64, 64, 3\)"):
        model(images, **arguments)


def test_image_without_a_batch_axis_is_refused():
    model = abstract_model("hivit_base", **DEFAULTS["hivit_base"])
    message = r"images are \(64, 64, 3\); expected a batch, \(B, 64, 64, 3\)"
    with pytest.raises(ConfigError, match=message):
        model(jnp.zeros((64, 64, 3)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"image_size": 100}, "image_size=100 .*multiples of patch_size=16"),
        ({"image_size": (64, 72)}, r"image_size=\(64, 72\) .*patch_size=16"),
        ({"image_size": 8}, "image_size=8 "),
        ({"image_size": (64, 64, 3)}, r"image_size=\(64, 64, 3\)"),
        ({"num_heads": 3}, "num_heads=3; expected a divisor of embed_dim, which is 64"),
        ({"num_heads": 0}, "num_heads=0; expected at least 1"),
        ({"depths": (1, 1)}, r"depths=\(1, 1\) with inner_patches=4"),
        ({"depths": (1, 0, 1)}, r"depths=\(1, 0, 1\)"),
        ({"depths": (2,), "inner_patches": 1}, r"depths=\(2,\) with inner_patches=1"),
        ({"inner_patches": 8}, "inner_patches=8"),
        ({"patch_size": 2}, "patch_size=2 is not a multiple of inner_patches=4"),
        ({"embed_dim": 66, "num_heads": 3}, "embed_dim=66: expected a multiple of 4"),
        ({"window_size": -1}, "window_size=-1; expected at least 0"),
        ({"global_blocks": (0, 2)}, r"global_blocks=\(0, 2\); .*from 0 to 1 for the 2"),
        ({"global_blocks": (-1,)}, r"global_blocks=\(-1,\)"),
        (
            {"decoder_num_heads": 5},
            "decoder_num_heads=5; .* decoder_embed_dim, which is 32",
        ),
        (
            {"drop_path_rate": 1.0},
            "drop_path_rate=1.0; expected 0 <= drop_path_rate < 1",
        ),
        ({"dtype": "float16"}, "dtype='float16'; expected 'float32' or 'bfloat16'"),
        ({"decoder_embed_dim": 30}, "decoder_embed_dim=30: expected a multiple of 4"),
    ],
    ids=str,
)
def test_invalid_sizes_rates_and_dtypes_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        create_model("mae_hivit_base", **MINI | DECODER | overrides)
    if "decoder" not in message:
        with pytest.raises(ConfigError, match=message):
            create_model("hivit_base", **MINI | overrides)
