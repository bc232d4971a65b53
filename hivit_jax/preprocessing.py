"""Convert image files, PIL images and arrays to the input of a model."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hivit_jax.augment import image as image_ops
from hivit_jax.data import crops
from hivit_jax.data.decoding import PIL_MODES, StoredValues, UnsuitableImageError
from hivit_jax.data.rasters import decode
from hivit_jax.errors import ConfigError, DataError, first_line
from hivit_jax.models import Model
from hivit_jax.models.base import ModelInfo
from hivit_jax.paths import expand

# dtype of an array -> values of black and white; see `StoredValues.limits`.
LIMITS = {"uint16": (0, 65535)}
DTYPES = ("uint8", "uint16", "uint32", "int8", "int16", "int32", "float32", "float64")


def preprocess(model: Model) -> Callable[[Any], np.ndarray]:
    """Return a function that converts images as the evaluation of a run does.

    The function accepts one image or a list of images: a path, the bytes of an image
    file, a PIL image, or an array [h, w], [h, w, C] or, for a batch, [B, h, w, C]. The
    images are decoded, cropped, resized and normalized by `model.info`. The function
    returns float32 [B, H, W, C]. With `model.info.dtype` "uint8", 16-bit values are
    divided by 257 or mapped by `model.info.value_range`, as in training.

    With `data.canvas=0`, the result is bit-identical to the input of the model in an
    evaluation. With a canvas, the evaluation resizes on the device. A value from 0
    to 255 may then differ by 1 where the exact result is halfway between two integers.

    The returned function raises:
      ConfigError: the shape or dtype of an array is not supported.
      DataError: a file cannot be read, or the channels or values of an image do not fit
        the model.
    """
    info = model.info

    def convert(images: Any) -> np.ndarray:
        is_batch = isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4
        resized = [
            _decode_and_resize(x, info) for x in (images if is_batch else [images])
        ]
        return np.concatenate([normalize(x[None]) for x in resized])

    # Constants of the jitted function, as in training, because XLA multiplies by the
    # reciprocal of a constant divisor, which may round differently from a division.
    mean, std = (np.divide(x, 255 * info.scale) for x in (info.mean, info.std))
    normalize = jax.jit(lambda images: image_ops.normalize(images, mean, std))
    return convert


def _decode_and_resize(image: Any, info: ModelInfo) -> np.ndarray:
    """Convert one image to [H, W, C] of the dtype `info.dtype`."""
    try:
        pixels, size = _pixels(image, info), info.image_size
    except UnsuitableImageError as error:
        raise DataError(error.after_training) from error
    resized = np.zeros((*size, info.channels), info.dtype)
    crop = crops.center_crop(*pixels.shape[:2], size, info.crop)
    crops.paste_crop(pixels, crop, resized, size, info.interpolation, info.antialias)
    return resized


def _pixels(image: Any, info: ModelInfo) -> np.ndarray:
    """Return the pixels of one image, [h, w, C] of the dtype `info.dtype`."""
    from PIL import Image

    channels, value_range = info.channels, info.value_range
    if not isinstance(image, (str, os.PathLike, bytes)) and (
        info.dtype != "uint8" or channels not in PIL_MODES
    ):
        buffer = io.BytesIO()
        np.save(buffer, np.asarray(image), allow_pickle=False)
        return decode(buffer.getvalue(), channels, value_range, info.dtype)
    if isinstance(image, (str, os.PathLike, bytes)):
        is_content = isinstance(image, bytes)
        name = "an image file's bytes" if is_content else expand(os.fspath(image))
        try:
            content = image if is_content else Path(name).read_bytes()
            return decode(content, channels, value_range, info.dtype)
        except UnsuitableImageError as error:
            raise DataError(f"cannot read {name}: {error.after_training}") from error
        except Exception as error:  # damaged files cause exceptions of many types
            raise DataError(f"cannot read {name}: {first_line(error)}") from error
    if isinstance(image, Image.Image) and not image.mode.startswith(("I", "F")):
        converted = image.convert(PIL_MODES[channels])
    else:
        converted = _from_array(np.asarray(image), info).convert(PIL_MODES[channels])
    pixels = np.asarray(converted)
    return pixels.reshape(*pixels.shape[:2], channels)


def _from_array(array: np.ndarray, info: ModelInfo) -> Any:
    """Return an array as a PIL image of 8 bits."""
    from PIL import Image

    bands = array.shape[2] if array.ndim == 3 else 1
    modes = {1: "L", 3: "RGB", 4: "RGBA"}
    if array.ndim not in (2, 3) or bands not in modes or str(array.dtype) not in DTYPES:
        raise ConfigError(
            "expected an image file, a PIL image or an array [h, w] or [h, w, 1, 3 or "
            f"4] of {', '.join(DTYPES)}; found {array.dtype} {list(array.shape)}"
        )
    array = array.reshape(*array.shape[:2], bands)
    if array.dtype != np.uint8:
        limits = LIMITS.get(str(array.dtype), ())
        return StoredValues(array, modes[bands], limits).to_image(info.value_range)
    return Image.frombytes(modes[bands], array.shape[1::-1], array.tobytes())
