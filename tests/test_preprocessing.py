"""Tests that `preprocess` equals the evaluation transform of training."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from datasets import digits_config, encode, folder_config, noise_image
from networks import mini
from numpy.testing import assert_array_equal
from PIL import Image

import hivit_jax
from hivit_jax import inputs
from hivit_jax.errors import ConfigError, DataError
from hivit_jax.models.base import make_info
from hivit_jax.weights.load import _info_arguments


def evaluation_images(config):
    """Return the images of a config's test split after the evaluation transform."""
    task, images = inputs.make_task(config, "test"), []
    step = jax.jit(task.preprocess)
    for batch in inputs.eval_batches(config):
        images.append(np.asarray(step(batch))[batch["weight"] > 0])
    return np.concatenate(images)


def model_of(config, **overrides):
    """Return a small model whose `info` contains the preprocessing of a config."""
    shape = dict(image_size=64, in_channels=config.model.in_channels)
    model = mini(depths=(1, 1, 1), **shape)
    info = make_info(model.config, **_info_arguments(config.to_dict()))
    size = (config.model.image_size,) * 2
    model.info = replace(info, image_size=size, **overrides)
    return model


OPTIONS = [
    dict(data__canvas=0),
    dict(data__canvas=0, data__crop_pct=0.875, data__interpolation="bilinear"),
    dict(data__canvas=0, data__antialias=False),
    dict(data__canvas=0, model__in_channels=1, data__mean=(0.4,), data__std=(0.3,)),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_preprocess_equals_the_evaluation_transform(options, folder, cache_directory):
    """Paths, bytes, PIL images and arrays give the same bits as the evaluation."""
    config = folder_config(folder, **options)
    source = inputs.open_source(config.data, "test")
    preprocess = hivit_jax.preprocess(model_of(config))
    paths = [source.name(index) for index in range(len(source))]
    expected = evaluation_images(config)
    actual = preprocess(paths)
    assert actual.dtype == np.float32
    assert_array_equal(actual, expected)
    samples = [source.sample(index)["image"] for index in range(len(source))]
    assert_array_equal(preprocess(samples), expected)
    opened = [Image.open(path) for path in paths]
    assert_array_equal(preprocess(opened), expected)
    arrays = [np.asarray(image.convert("RGB")) for image in opened]
    if config.model.in_channels == 3:
        assert_array_equal(preprocess(arrays), expected)
    assert_array_equal(preprocess(opened[0]), expected[:1])


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_four_channel_rasters_equal_the_evaluation_transform(
    dtype, tmp_path, cache_directory
):
    """Rasters of 16 bits or floats are not rounded to 8 bits."""
    largest = {"uint16": 65535, "float32": 1000}[dtype]
    for split in ("train", "val"):
        for k in range(3):
            pixels = np.random.default_rng(k).uniform(0, largest, (40, 50, 4))
            path = tmp_path / split / "field" / f"{k}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, pixels.astype(dtype))
    config = folder_config(
        tmp_path,
        model__in_channels=4,
        data__canvas=0,
        data__dtype=dtype,
        data__scale=0.0 if dtype == "uint16" else 500.0,
        data__mean=(0.4,) * 4,
        data__std=(0.3,) * 4,
    )
    preprocess = hivit_jax.preprocess(model_of(config))
    paths = sorted(tmp_path.glob("val/field/*.npy"))
    expected = evaluation_images(config)
    assert_array_equal(preprocess(paths), expected)
    assert_array_equal(preprocess([np.load(path) for path in paths]), expected)
    with pytest.raises(DataError, match="4 channels"):
        preprocess(np.zeros((40, 50, 3), dtype))


def test_canvas_changes_pixels_by_one_level_at_most(folder, cache_directory):
    config = folder_config(folder, data__canvas=64)
    source = inputs.open_source(config.data, "test")
    preprocess = hivit_jax.preprocess(model_of(config))
    actual = preprocess([source.name(index) for index in range(len(source))])
    levels = (
        np.abs(actual - evaluation_images(config)) * 255 * np.float32(config.data.std)
    )
    assert levels.max() < 1.001
    assert (levels > 0.5).mean() < 2e-3


def test_16_bit_images_and_rgb_images_with_equal_channels_equal_gray_images():
    """16-bit values are divided by 257. An RGB image with equal channels is gray."""
    config = digits_config()
    preprocess = hivit_jax.preprocess(model_of(config))
    pixels = noise_image(16, 16)
    expected = preprocess(pixels)
    assert expected.shape == (1, 16, 16, 1)
    pixels_16_bit = pixels.astype(np.uint16) * 257
    for image in (
        pixels_16_bit,
        Image.fromarray(pixels_16_bit),
        encode(pixels_16_bit, "PNG"),
        pixels_16_bit[None, ..., None],
    ):
        assert_array_equal(preprocess(image), expected)
    assert_array_equal(preprocess(pixels.repeat(3).reshape(16, 16, 3)), expected)


def test_images_that_do_not_fit_the_model_are_refused(tmp_path):
    """The error advises converting the image instead of changing a config key.

    The config of a trained model is fixed.
    """
    preprocess = hivit_jax.preprocess(model_of(digits_config(), dtype="uint16"))
    np.save(path := tmp_path / "five.npy", bands := np.zeros((16, 16, 5), np.uint16))
    for image, found in (
        (bands, "expected 1 channel, found 5"),
        (path, "five.npy: expected 1 channel, found 5"),
        (np.zeros((16, 16), np.float32), "found float32 from 0 to 0"),
    ):
        with pytest.raises(DataError) as raised:
            preprocess(image)
        assert found in str(raised.value)
        assert str(raised.value).endswith(
            "; convert the image to match the trained model"
        )


def test_floats_require_a_value_range():
    config, pixels = digits_config(), np.float32(noise_image(16, 16)) * 3 - 100
    with pytest.raises(DataError, match="found float32 values from -100 .*; convert"):
        hivit_jax.preprocess(model_of(config))(pixels)
    preprocess = hivit_jax.preprocess(model_of(config, value_range=(-100.0, 665.0)))
    assert_array_equal(preprocess(pixels), preprocess(noise_image(16, 16)))


def test_unreadable_and_unsupported_images_are_errors(tmp_path):
    preprocess = hivit_jax.preprocess(model_of(digits_config()))
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a\.png: unknown image format"):
        preprocess(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"b\.png: .*No such file"):
        preprocess([str(tmp_path / "b.png")])
    for array in (np.zeros((8, 8, 2), np.uint8), np.zeros((8, 8), np.complex64)):
        with pytest.raises(ConfigError, match="an array .*found"):
            preprocess(array)
