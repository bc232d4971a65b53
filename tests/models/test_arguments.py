"""Tests of model arguments: number types, ranges, seeds, array shapes, mask ratios."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import DECODER, MINI, abstract_model, abstract_outputs

from hivit_jax.errors import ConfigError
from hivit_jax.models import arguments_of, configure, create_model
from hivit_jax.models.arguments import make_key
from hivit_jax.models.masking import count_visible_units
from hivit_jax.models.norms import BatchNorm

MAE = MINI | DECODER
F32 = jnp.float32


def struct(*sizes, dtype=F32):
    """Return the shape and dtype of an array, without values."""
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize(
    ("name", "argument", "stored"),
    [
        ("image_size", np.int64(96), (96, 96)),
        ("image_size", np.array([64, 96]), (64, 96)),
        ("depths", np.array([1, 1, 2]), (1, 1, 2)),
        ("depths", [np.int8(1), jnp.int32(1), 2], (1, 1, 2)),
        ("drop_path_rate", np.float32(0.5), 0.5),
        ("mlp_ratio", jnp.float32(2.0), 2.0),
        ("mlp_ratio", np.int32(2), 2.0),
        ("relative_position", np.bool_(False), False),
        ("num_classes", np.uint16(7), 7),
        ("global_blocks", np.array([1]), (1,)),
    ],
)
def test_arguments_may_be_numbers_of_any_library(name, argument, stored):
    """Model arguments may be numbers, bools or sequences of Python, NumPy or JAX.

    The config stores them as Python numbers, so that JSON can represent the config.
    """
    _, config, _ = configure("hivit_base", **MINI | {name: argument})
    value = getattr(config, name)
    assert value == stored
    assert json.loads(json.dumps(value)) == (
        list(stored) if isinstance(stored, tuple) else stored
    )
    assert {type(x) for x in np.ravel(np.array(value, object))} <= {int, float, bool}


@pytest.mark.parametrize(
    "overrides",
    [
        dict(image_size="64"),
        dict(image_size=64.0),
        dict(image_size=None),
        dict(image_size=(64, 64, 64)),
        dict(depths=3),
        dict(depths=()),
        dict(depths=(1, 1.5, 2)),
        dict(num_heads=True),
        dict(num_heads=2.0),
        dict(in_channels=0),
        dict(patch_size=0),
        dict(num_classes=-1),
        dict(embed_dim=-64),
        dict(mlp_ratio=0.001),
        dict(stem_mlp_ratio=-1),
        dict(mlp_ratio=float("inf")),
        dict(drop_path_rate=float("nan")),
        dict(drop_path_rate="0.1"),
        dict(layer_norm_eps=-1e-6),
        dict(window_size=-1),
        dict(relative_position=1),
        dict(remat="yes"),
        dict(dtype="float16"),
        dict(dtype=None),
    ],
    ids=str,
)
def test_invalid_hivit_arguments_are_refused(overrides):
    """Arguments of a wrong type, out of range or not finite raise an error.

    A bool is not a number. The message names the argument.
    """
    with pytest.raises(ConfigError, match=next(iter(overrides))):
        create_model("hivit_base", **MINI | overrides)


@pytest.mark.parametrize(
    "overrides", [dict(decoder_depth=0), dict(decoder_num_heads=0)]
)
def test_decoder_sizes_of_zero_are_refused(overrides):
    with pytest.raises(ConfigError, match=next(iter(overrides))):
        create_model("mae_hivit_base", **MAE | overrides)


def test_numpy_depths_become_python_integers():
    sizes = MINI | dict(embed_dim=np.int64(64), depths=np.array(MINI["depths"]))
    model = abstract_model("hivit_base", **MINI)
    config = configure("hivit_base", **sizes)[1]
    assert json.dumps(arguments_of(model)["depths"]) == json.dumps(config.depths)


@pytest.mark.parametrize(
    "seed", [3, np.int64(3), np.uint8(3), jnp.int32(3), jax.random.key(3)]
)
def test_seed_may_be_an_integer_or_a_key(seed):
    """An integer of Python, NumPy or JAX gives the same key as `jax.random.key`."""
    assert jax.random.key_data(make_key(seed)).tolist() == [0, 3]


def test_seed_may_be_a_raw_key_or_a_traced_integer():
    raw_key = jax.random.PRNGKey(3)
    assert make_key(raw_key) is raw_key
    assert jax.jit(lambda seed: jax.random.key_data(make_key(seed)))(3).tolist() == [
        0,
        3,
    ]


@pytest.mark.parametrize("seed", [0.5, "3", None, True, 2**70, np.arange(2)])
def test_invalid_seeds_are_refused(seed):
    with pytest.raises(ConfigError, match="seed="):
        make_key(seed)


def test_several_keys_are_refused_as_a_seed():
    with pytest.raises(ConfigError, match="seed="):
        make_key(jax.random.split(jax.random.key(0), 2))


IMAGES = struct(4, 64, 64, 3)
KEYS = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 4))
RAW_KEYS = struct(4, 2, dtype=jnp.uint32)


def abstract_logits(images=IMAGES, **arrays):
    """Return the abstract logits of a small classifier."""
    model = abstract_model(
        "hivit_base", **MINI | dict(drop_path_rate=0.5, num_classes=5)
    )
    return abstract_outputs(lambda m: jax.eval_shape(m, images, **arrays), model)


def call_autoencoder(method="image_loss", *arrays, **named):
    """Return the abstract result of a method of a small masked autoencoder."""
    model = abstract_model("mae_hivit_base", **MAE)
    return abstract_outputs(
        lambda m: jax.eval_shape(getattr(m, method), *arrays, **named), model
    )


@pytest.mark.slow
def test_drop_path_requires_one_key_per_image():
    """Keys are typed (`jax.random.key`), [B], or raw (`PRNGKey`), [B, 2]."""
    assert abstract_logits(drop_path_keys=KEYS).shape == (4, 5)
    assert abstract_logits(drop_path_keys=RAW_KEYS).shape == (4, 5)
    for count in (1, 2, 3, 8):
        keys = jax.eval_shape(lambda n=count: jax.random.split(jax.random.key(0), n))
        with pytest.raises(ConfigError, match=rf"\[{count}\].*\[4\]"):
            abstract_logits(drop_path_keys=keys)
    single_key = jax.eval_shape(lambda: jax.random.key(0))
    with pytest.raises(ConfigError, match="drop_path_keys"):
        abstract_logits(drop_path_keys=single_key)


@pytest.mark.parametrize(
    "images",
    [
        struct(64, 64, 3),
        struct(4, 64, 64, 1),
        struct(4, 64, 64, 3, dtype=jnp.uint8),
    ],
)
def test_images_of_wrong_shape_or_dtype_are_refused(images):
    """Images must be [B, H, W, C] of the model's size, in floating point."""
    with pytest.raises(ConfigError, match="images are"):
        abstract_logits(images)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [(4, 15), (4, 17), (2, 16), (1, 16), (16,), (4, 16, 1)]
)
@pytest.mark.parametrize("method", ["image_loss", "__call__"])
def test_noise_of_wrong_shape_is_refused(method, shape):
    """Noise must have one number for each unit of each image."""
    with pytest.raises(ConfigError, match=r"noise has shape .* = \[4, 16\]"):
        call_autoencoder(method, IMAGES, noise=struct(*shape))


@pytest.mark.parametrize(
    ("method", "arrays", "name"),
    [
        ("encode", (IMAGES, struct(2, 4, dtype=jnp.int32)), "ids_keep"),
        ("encode", (IMAGES, struct(4, 4)), "ids_keep"),
        ("decode", (struct(4, 4, 448), struct(4, 15, dtype=jnp.int32)), "ids"),
        ("decode", (struct(4, 4, 64), struct(4, 16, dtype=jnp.int32)), "latent"),
        ("targets", (IMAGES, struct(1, 4, dtype=jnp.int32)), "ids"),
        ("unit_loss", (IMAGES, struct(4, 1, 768)), "pred"),
        ("unit_loss", (IMAGES, struct(1, 16, 768)), "pred"),
        ("features", (IMAGES, struct(4, dtype=jnp.int32)), "ids_keep"),
    ],
)
def test_methods_refuse_arrays_of_wrong_shape_or_dtype(method, arrays, name):
    with pytest.raises(ConfigError, match=name):
        call_autoencoder(method, *arrays)


def test_batch_norm_refuses_example_weights_of_wrong_shape():
    norm, x = BatchNorm(3), jnp.ones((4, 3))
    for weight in (jnp.ones(1), jnp.ones(2), jnp.ones((4, 1))):
        with pytest.raises(ConfigError, match="weight"):
            norm(x, weight)


@pytest.mark.slow
def test_models_accept_an_empty_batch():
    """Models and BatchNorm accept 0 images, with and without windows and keys."""
    no_images, keys = (
        struct(0, 64, 64, 3),
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 0)),
    )
    assert abstract_logits(no_images).shape == (0, 5)
    assert abstract_logits(no_images, drop_path_keys=keys).shape == (0, 5)
    windowed_model = abstract_model("hivit_base", **MINI | dict(window_size=3))
    maps = abstract_outputs(
        lambda m: m.features(jnp.zeros((0, 64, 64, 3)), stride_32=True), windowed_model
    )
    assert [x.shape[:3] for x in maps] == [(0, 16, 16), (0, 8, 8), (0, 4, 4), (0, 2, 2)]
    layers = abstract_outputs(
        lambda m: m.layers(jnp.zeros((0, 64, 64, 3)), True), windowed_model
    )
    assert layers[0].attention.shape == (0, 4, 2, 9, 9)
    noise = struct(0, 16)
    assert call_autoencoder("image_loss", no_images, noise=noise).shape == (0,)
    out = call_autoencoder("__call__", no_images, noise=noise)
    assert out.pred.shape == (0, 16, 768)
    assert BatchNorm(3)(jnp.zeros((0, 3))).shape == (0, 3)
    norm = BatchNorm(3)
    assert norm(jnp.zeros((0, 3)), jnp.zeros(0)).shape == (0, 3)
    assert norm.var[...].tolist() == [1, 1, 1]


@pytest.mark.parametrize("units", [2, 3, 10, 49, 196, 1234])
def test_mask_ratio_that_the_error_suggests_is_valid(units):
    """The suggested ratio keeps at least one unit."""
    with pytest.raises(ConfigError, match="at most ") as error:
        count_visible_units(units, 0.99999)
    suggested = float(str(error.value).rsplit(" ", 1)[1])
    assert count_visible_units(units, suggested) >= 1
    assert count_visible_units(units, np.float64(suggested)) >= 1


def test_mask_ratio_without_visible_units_is_refused():
    with pytest.raises(ConfigError, match="a mask_ratio of at most 0.89"):
        count_visible_units(10, 0.9)
    with pytest.raises(ConfigError, match="at least 2 units"):
        count_visible_units(1, 0.5)
