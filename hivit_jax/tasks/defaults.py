"""Default `Task` methods, for a registered model and one image per example."""

import math
from collections.abc import Mapping
from typing import Any

import jax

from hivit_jax import rng
from hivit_jax.augment import image as image_ops
from hivit_jax.augment import resample
from hivit_jax.data.decoding import PIL_MODES
from hivit_jax.data.sources.base import DatasetInfo
from hivit_jax.data.transforms import ImageTransform
from hivit_jax.errors import ConfigError
from hivit_jax.models import Model, configure, image_shape, variant
from hivit_jax.rng import Keys


def model_arguments(config: Any) -> dict[str, Any]:
    """Return the arguments of `create_model` that a config contains."""
    return {key: value for key, value in config.model.items() if value is not None}


def check_model(config: Any, model_class: type[Model]) -> None:
    """Raise ConfigError unless the config's model is a valid `model_class`."""
    name = config.model.name
    actual = variant(name)[0]
    if not issubclass(actual, model_class):
        raise ConfigError(
            f"task={config.task!r} with model.name={name!r}, which is a "
            f"{actual.__name__}; expected a {model_class.__name__}"
        )
    model_config = configure(**model_arguments(config))[1]
    if getattr(model_config, "num_classes", 1) == 0:
        raise ConfigError("model.num_classes=0 (no head); expected 1 or more")


def check_pixels(data: Any) -> None:
    """Raise ConfigError for a mean or std that 8-bit images cannot have.

    Args:
      data: `config.data`; its mean and std refer to pixels divided by 255.
    """
    for name in ("mean", "std"):
        if not all(0 <= x <= 1 for x in data[name]):
            raise ConfigError(
                f"data.{name}={tuple(data[name])}; expected 0 to 1, because 8-bit "
                "pixels are divided by 255; divide these values by 255 too"
            )


def check_value_range(value_range: tuple) -> None:
    """Raise ConfigError unless `data.value_range` is () or an increasing pair."""
    finite = [x for x in value_range if type(x) in (int, float) and math.isfinite(x)]
    is_pair = len(finite) == len(value_range) == 2
    if value_range and not (is_pair and finite[0] < finite[1]):
        raise ConfigError(
            f"data.value_range={value_range}; expected (LOW, HIGH), the values of "
            "black and white in images with more than 8 bits, or () for 0 to 65535"
        )


def image_transform(config: Any, dataset: DatasetInfo, train: bool) -> ImageTransform:
    """Return the image transform for training or evaluation.

    Raises:
      ConfigError: the number of channels does not suit the data or RandAugment, or
        `data.canvas` is smaller than the model's image.
    """
    data, model = config.data, config.model
    *size, channels = image_shape(model)
    randaugment = train and data.randaugment and dataset.encoded
    if dataset.encoded and channels not in PIL_MODES:
        raise ConfigError(
            f"model.in_channels={channels} with data.name={data.name!r}; "
            "expected 3 (color) or 1 (grayscale)"
        )
    if randaugment and channels != 3:
        raise ConfigError(
            f"data.randaugment with model.in_channels={channels}; expected 3"
        )
    if dataset.encoded and data.canvas and data.canvas < max(size):
        raise ConfigError(
            f"data.canvas={data.canvas} with model.image_size={model.image_size}; "
            f"expected data.canvas=0 or at least {max(size)}"
        )
    # No canvas: RandAugment needs images that the host has already resized, and
    # synthetic images are generated at their final size.
    final_size_on_host = randaugment or not dataset.encoded
    random_crop = train and tuple(data.crop_scale) != (1.0, 1.0)
    return ImageTransform(
        batch_size=config.batch_size,
        size=size,
        channels=channels,
        canvas=0 if final_size_on_host else data.canvas,
        crop_scale=tuple(data.crop_scale) if random_crop else None,
        crop_pct=data.crop_pct,
        interpolation=data.interpolation,
        antialias=data.antialias,
        randaugment=randaugment,
        num_classes=model.get("num_classes") or 0,
        value_range=data.value_range,
    )


def preprocess(config: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Resize and normalize the images of a batch: float32 [B, H, W, C]."""
    images, data = batch["image"], config.data
    if "box" in batch:
        size = image_shape(config.model)[:2]
        images = resample.resample(
            images, batch["box"], size, data.interpolation, data.antialias
        )
    return image_ops.normalize(images, data.mean, data.std)


def random_flip(config: Any, images: jax.Array, keys: Keys) -> jax.Array:
    """Flip each image [B, H, W, C] left to right with probability 1/2.

    Returns the images unchanged if `data.flip` is not set.
    """
    if not config.data.flip:
        return images
    return image_ops.random_flip(images, rng.split_keys(keys.samples, "flip"))
