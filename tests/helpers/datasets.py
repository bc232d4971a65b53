"""Configs of datasets, encoded images and comparison of batches."""

import io

import mini_runs
import numpy as np
from numpy.testing import assert_array_equal
from PIL import Image

from hivit_jax import config

RECIPE = mini_runs.ROOT / "configs" / "digits_finetune.py"


def digits_config(**overrides):
    """Return a config of the digits, with 16x16 pixels and without crops.

    Two underscores in the name of an override stand for a dot.
    """
    values = {
        "seed": 0,
        "batch_size": 96,
        "model.image_size": 16,
        "model.in_channels": 1,
        "model.num_classes": 10,
        "data.name": "digits",
        "data.train_examples": 0,
        "data.subset": 0,
        "data.crop_scale": (1.0, 1.0),
        "data.canvas": 0,
    } | {key.replace("__", "."): value for key, value in overrides.items()}
    return config.load(str(RECIPE), [f"--config.{k}={v}" for k, v in values.items()])


def folder_config(root, **overrides):
    """Return a config of class folders, with 24x24 pixels and random crops."""
    return digits_config(
        **{
            "data__name": "folder",
            "data__dir": root,
            "batch_size": 8,
            "model__image_size": 24,
            "model__in_channels": 3,
            "data__mean": (0.5, 0.5, 0.5),
            "data__std": (0.2, 0.2, 0.2),
            "data__crop_scale": (0.3, 1.0),
            "data__crop_pct": 0.75,
            "data__canvas": 64,
        }
        | overrides
    )


def noise_image(*shape):
    """Return uint8 noise that depends only on the shape."""
    return np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)


def encode(image, kind, **options):
    """Encode an image or array with Pillow.

    Args:
      kind: Pillow's name of the format.
      options: arguments of `Image.save`.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def assert_batches_equal(actual, expected):
    """Check that two sequences of batches have equal arrays and dtypes."""
    actual, expected = list(actual), list(expected)
    assert len(actual) == len(expected) > 0
    for batch, expected_batch in zip(actual, expected, strict=True):
        assert batch.keys() == expected_batch.keys()
        assert batch.keys() >= {"image", "label", "weight", "unreadable"}
        for key, array in batch.items():
            assert array.dtype == expected_batch[key].dtype
            assert_array_equal(array, expected_batch[key])
