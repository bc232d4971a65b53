"""Transforms: convert encoded examples to arrays of a batch, on the host.

The host decodes and crops an image. The device resizes the crop (`augment.resample`) if
it fits into the canvas; otherwise the host resizes it. Flips and normalization also run
on the device. All random numbers of a transform depend only on the seed, epoch and
example.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hivit_jax.augment.resample import precise_span
from hivit_jax.data.crops import Box, center_crop, paste_crop, random_resized_crop
from hivit_jax.data.rasters import decode
from hivit_jax.data.sources.base import label_vector, single_label
from hivit_jax.errors import DataError

DRAWS = 22  # random numbers of a random crop: ten areas, ten aspect ratios, top, left


class Transform:
    """Converts an encoded example to its arrays in a batch.

    A task builds it from plain values. Several threads call it concurrently.

    Attributes:
      batch_size: size of the global batch.
      draws: number of random numbers per example.
      shapes: shapes and dtypes of the arrays of one example by name, without the batch
        axis; one dict per bucket. The loader, synthetic batches, the train step and
        ahead-of-time compilation all use this description. The loader adds
        `LOADER_ARRAYS` of data/shapes.py.
    """

    batch_size: int
    draws: int = 0
    shapes: tuple[dict[str, jax.ShapeDtypeStruct], ...]

    def bucket(self, size: tuple[int, int]) -> int:
        """Return the bucket of an image from the (height, width) of its file."""
        return 0

    def __call__(
        self,
        sample: Mapping[str, Any],
        draws: Sequence[float],
        out: Mapping[str, np.ndarray],
    ) -> None:
        """Write the arrays of one example.

        Args:
          sample: the encoded example from `Source.sample`.
          draws: `self.draws` numbers in [0, 1), a function of (seed, epoch, example).
          out: arrays with the shapes of one bucket and undefined content, to be
            overwritten.

        Raises:
          DataError: an error that ends the run.
          Exception: any other error. The loader then sets the example's arrays to 0 and
            marks it as unreadable.
        """
        raise NotImplementedError


class ImageTransform(Transform):
    """Converts an image and its label to arrays.

    The arrays are "image" [H, W, C], "label" and, with a canvas, "box" float32 (see
    `augment.resample`). The label is int32 [], or uint8 [num_labels] if `num_labels` is
    positive. The box is [2, 3] if the image is uint8, and [2, 5] otherwise.

    Args:
      size: (height, width) of the model's image.
      channels: number of channels.
      canvas: side of the square array that the device resizes from; 0: resize on the
        host.
      crop_scale: lowest and highest area of random crops, relative to the image; None:
        `center_crop` with `crop_pct`.
      randaugment: apply RandAugment to the resized image; requires canvas=0.
      num_classes: labels must be smaller than this number; 0: no check.
      num_labels: length of an image's label vector of zeros and ones. Shorter vectors
        from the source are extended with zeros. 0: the label is a number.
      value_range: see `decode`.
      dtype: dtype of the image, one of `rasters.DTYPES`.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        size: Sequence[int],
        channels: int,
        canvas: int = 0,
        crop_scale: Sequence[float] | None = None,
        crop_pct: float = 1.0,
        interpolation: str = "bicubic",
        antialias: bool = True,
        randaugment: bool = False,
        num_classes: int = 0,
        num_labels: int = 0,
        value_range: Sequence[float] = (),
        dtype: str = "uint8",
    ):
        self.batch_size, self._size, self._channels = batch_size, tuple(size), channels
        self._crop_scale, self._crop_pct = crop_scale, crop_pct
        self._interpolation, self._antialias = interpolation, antialias
        self._randaugment, self._num_classes, self.draws = None, num_classes, DRAWS
        self._value_range, self._dtype = tuple(value_range), dtype
        if randaugment:
            from hivit_jax.data import randaugment as policy

            self._randaugment = policy.randaugment
            self.draws += policy.DRAWS
        self._num_labels = num_labels
        array_size = (canvas, canvas) if canvas else self._size
        shapes = {
            "image": jax.ShapeDtypeStruct((*array_size, channels), np.dtype(dtype)),
            "label": jax.ShapeDtypeStruct(
                (num_labels,) if num_labels else (),
                np.uint8 if num_labels else np.int32,
            ),
        }
        if canvas:
            span_length = 3 if dtype == "uint8" else 5
            shapes["box"] = jax.ShapeDtypeStruct((2, span_length), np.float32)
        self.shapes = (shapes,)

    def __call__(
        self,
        sample: Mapping[str, Any],
        draws: Sequence[float],
        out: Mapping[str, np.ndarray],
    ) -> None:
        """See `Transform.__call__`.

        Raises:
          DataError: the label or the image does not fit the config.
        """
        options = self._channels, self._value_range, self._dtype
        pixels = decode(sample["image"], *options)
        out["label"][...] = self._label(sample)
        height, width = pixels.shape[:2]
        if self._crop_scale is None:
            crop = center_crop(height, width, self._size, self._crop_pct)
        else:
            crop = random_resized_crop(height, width, draws, self._crop_scale)
        image = out["image"]
        spans = paste_crop(
            pixels, crop, image, self._size, self._interpolation, self._antialias
        )
        if self._randaugment:
            image[:] = self._randaugment(image, draws[DRAWS:])
        if "box" in out:
            if self._dtype != "uint8":
                spans = [*map(precise_span, spans, self._size)]
            out["box"][:] = spans

    @property
    def copies_crops(self) -> bool:
        """True if `copied_box` is available: random crops of uint8 RGB on a canvas."""
        array_size = self.shapes[0]["image"].shape[:2]
        always_resizes = self._randaugment or array_size == self._size
        is_uint8_rgb = self._channels == 3 and self._dtype == "uint8"
        return bool(self._crop_scale) and is_uint8_rgb and not always_resizes

    def copied_box(
        self, height: int, width: int, label: int, draws: Sequence[float]
    ) -> Box | None:
        """Return the crop of a JPEG that `__call__` copies into the canvas unchanged.

        `__call__` then sets the array "box" to ((0, h, h), (0, w, w)); h and w are the
        height and the width of the crop. Requires `copies_crops`.

        Args:
          height, width: size of the image.

        Returns:
          None if `__call__` resizes the crop or raises an error.
        """
        canvas = self.shapes[0]["image"].shape[:2]
        crop = random_resized_crop(height, width, draws, self._crop_scale).box
        fits = crop.height <= canvas[0] and crop.width <= canvas[1]
        return crop if fits and self._is_valid(label) else None

    def _label(self, sample: Mapping[str, Any]) -> int | np.ndarray:
        """Return the label of an example, or the vector of its labels.

        An example without a label gets the label 0, or a vector of zeros.

        Raises:
          DataError: the label is invalid.
        """
        label = sample.get("label", () if self._num_labels else 0)
        if self._num_labels:
            return label_vector(label, self._num_labels)
        if self._is_valid(single_label(label)):
            return label
        raise DataError(
            f"expected a label from 0 to {self._num_classes - 1}, found {label}; "
            f"correct the label or model.num_classes={self._num_classes}"
        )

    def _is_valid(self, label: int) -> bool:
        return not self._num_classes or 0 <= label < self._num_classes


def uniforms(seed: int, epoch: int, index: int, count: int = DRAWS) -> list[float]:
    """Return `count` random numbers in [0, 1) for one example in one epoch.

    A larger `count` only appends numbers. Philox is a function of its key and counter,
    so the numbers are the same in every version of NumPy.
    """
    philox = np.random.Philox(key=seed, counter=[0, 0, index, epoch])
    return [(word >> 11) * 2.0**-53 for word in philox.random_raw(count).tolist()]


def evaluation_image(
    encoded: bytes,
    shape: Sequence[int],
    crop_pct: float = 1.0,
    value_range: Sequence[float] = (),
    dtype: str = "uint8",
) -> np.ndarray:
    """Decode an image and resize its `center_crop` bicubically on the host.

    Args:
      shape: (height, width, channels) of the model's image.
      value_range, dtype: see `decode`.

    Raises:
      DataError: the image does not fit the config.
      Exception: an error of any type if the image cannot be read.
    """
    pixels = decode(encoded, shape[2], value_range, dtype)
    out = np.zeros(shape, pixels.dtype)
    crop = center_crop(*pixels.shape[:2], shape[:2], crop_pct)
    paste_crop(pixels, crop, out, shape[:2])
    return out
