"""Default `Task` methods, for a registered model and one image per example."""

import math
from collections.abc import Mapping
from typing import Any

import jax

from hivit_jax import rng
from hivit_jax.augment import image as image_ops
from hivit_jax.augment import resample
from hivit_jax.augment.resample import MAXIMUM
from hivit_jax.data.sources.base import DatasetInfo
from hivit_jax.data.transforms import ImageTransform
from hivit_jax.errors import ConfigError
from hivit_jax.models import (
    Model,
    configure,
    create_arguments,
    image_shape,
    variant,
)
from hivit_jax.rng import Keys


def model_arguments(config: Any) -> dict[str, Any]:
    """Return the arguments of `create_model` that a config contains."""
    return create_arguments(config.model)


def check_model(config: Any, model_class: type[Model]) -> None:
    """Raise ConfigError unless the config's model is a valid `model_class`."""
    name = config.model.name
    actual = variant(name)[0]
    if not issubclass(actual, model_class):
        raise ConfigError(
            f"task={config.task!r} with model.name={name!r}, which is a "
            f"{actual.__name__}; expected a {model_class.__name__}"
        )
    configure(**model_arguments(config))  # raises ConfigError for invalid values


def pixel_scale(data: Any) -> float:
    """Return the pixel value that becomes 1: `data.scale`, or the dtype's maximum."""
    return data.scale or float(MAXIMUM[data.dtype])


def check_pixels(data: Any) -> None:
    """Raise ConfigError for pixel keys that contradict each other.

    Args:
      data: `config.data`; its mean and std refer to pixels divided by `pixel_scale`.
    """
    if data.dtype == "float32" and not data.scale:
        raise ConfigError(
            "data.dtype='float32' with data.scale=0; expected data.scale, the pixel "
            "value that becomes 1"
        )
    for name in ("value_range", "randaugment"):
        if data.dtype != "uint8" and data[name]:
            raise ConfigError(
                f"data.{name}={data[name]} with data.dtype={data.dtype!r}; expected "
                "data.dtype='uint8'"
            )
    limit, divisor = MAXIMUM[data.dtype] / pixel_scale(data), f"{pixel_scale(data):g}"
    pixels = "8-bit pixels" if data.dtype == "uint8" else "pixels"
    for name in ("mean", "std"):
        if data.dtype != "float32" and not all(0 <= x <= limit for x in data[name]):
            raise ConfigError(
                f"data.{name}={tuple(data[name])}; expected 0 to {limit:g}, because "
                f"{pixels} are divided by {divisor}; divide these values by {divisor} "
                "too"
            )


def check_value_range(value_range: tuple) -> None:
    """Raise ConfigError unless `data.value_range` is () or an increasing pair."""
    finite = [x for x in value_range if type(x) in (int, float) and math.isfinite(x)]
    is_pair = len(finite) == len(value_range) == 2
    if value_range and not (is_pair and finite[0] < finite[1]):
        raise ConfigError(
            f"data.value_range={value_range}; expected (LOW, HIGH), the values of "
            "black and white in images with more than 8 bits, or () for 0 and the "
            "largest value of the image's type"
        )


def image_transform(config: Any, dataset: DatasetInfo, train: bool) -> ImageTransform:
    """Return the image transform for training or evaluation.

    Raises:
      ConfigError: the number of channels does not suit RandAugment, or `data.canvas`
        is smaller than the model's image.
    """
    data, model = config.data, config.model
    *size, channels = image_shape(model)
    is_synthetic = not dataset.encoded
    randaugment = train and data.randaugment and not is_synthetic
    if randaugment and channels != 3:
        raise ConfigError(
            f"data.randaugment with model.in_channels={channels}; expected 3 (RGB)"
        )
    if not is_synthetic and data.canvas and data.canvas < max(size):
        raise ConfigError(
            f"data.canvas={data.canvas} with model.image_size={model.image_size}; "
            f"expected data.canvas=0 or at least {max(size)}"
        )
    # With canvas 0, the device does not resize: RandAugment runs on images that the
    # host has already resized, and synthetic images are generated at their final size.
    canvas = 0 if randaugment or is_synthetic else data.canvas
    num_classes = model.get("num_classes") or 0
    random_crop = train and tuple(data.crop_scale) != (1.0, 1.0)
    return ImageTransform(
        batch_size=config.batch_size,
        size=size,
        channels=channels,
        canvas=canvas,
        crop_scale=tuple(data.crop_scale) if random_crop else None,
        crop_pct=data.crop_pct,
        interpolation=data.interpolation,
        antialias=data.antialias,
        randaugment=randaugment,
        num_classes=num_classes,
        num_labels=(num_classes or len(dataset.classes)) if data.multi_label else 0,
        value_range=data.value_range,
        dtype=data.dtype,
    )


def preprocess(config: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Resize and normalize the images of a batch: float32 [B, H, W, C]."""
    images, data = batch["image"], config.data
    if "box" in batch:
        size = image_shape(config.model)[:2]
        images = resample.resample(
            images, batch["box"], size, data.interpolation, data.antialias
        )
    return image_ops.normalize(images, data.mean, data.std, pixel_scale(data))


def random_flip(config: Any, images: jax.Array, keys: Keys) -> jax.Array:
    """Flip each image [B, H, W, C] left to right with probability 1/2.

    Returns the images unchanged if `data.flip` is not set.
    """
    if not config.data.flip:
        return images
    return image_ops.random_flip(images, rng.derive_keys(keys.samples, "flip"))
