"""Transforms: encoded examples -> arrays of a batch, on the host.

What is cut out here is resized on the device (`augment.resample`) where it fits the
canvas, else here; flip and normalisation come later, on the device. Every draw is a
function of (seed, epoch, image).
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hivit_jax.data.crops import center_crop, place, random_resized_crop
from hivit_jax.errors import DataError

# PIL and simplejpeg are imported late, so that a train step can be built without them.

DRAWS = 22  # of a random crop: ten areas, ten aspects, top, left
MODES = {1: "L", 3: "RGB"}  # PIL's, by number of channels


class Transform:
    """Encoded parts of an example -> its arrays in a batch. Built by a task from plain
    values; called by many threads at once.

    Attributes:
      batch_size: examples of the batch of all processes.
      draws: random numbers of an example.
      shapes: arrays of one example by name, without the batch axis; one dict a bucket.
        This is the description of a batch: loader, made-up batches, train step and
        compilation ahead of time all read it. The loader adds `shapes.ADDED`.
    """

    batch_size: int
    draws: int = 0
    shapes: tuple[dict[str, jax.ShapeDtypeStruct], ...]

    def bucket(self, size: tuple[int, int]) -> int:
        """Return the bucket of an image, from (height, width) of its file."""
        return 0

    def __call__(
        self,
        sample: Mapping[str, Any],
        draws: Sequence[float],
        out: Mapping[str, np.ndarray],
    ) -> None:
        """Fill the arrays of one example.

        Args:
          sample: encoded parts by name, from `Source.sample`.
          draws: `draws` numbers in [0, 1), a function of (seed, epoch, example).
          out: arrays of the shapes of a bucket, to write into; their content is
            undefined.

        Raises:
          DataError: ends the run.
          Exception: of any other kind: the example is unreadable, and its arrays are
            set to 0.
        """
        raise NotImplementedError


class ImageTransform(Transform):
    """An image and its label -> "image" uint8 [H, W, C], "label" int32 and, with a
    canvas, "box" float32 [2, 3] (see `augment.resample`).

    Args:
      size: (height, width) of the model's image.
      channels: of an image, 3 or 1.
      canvas: side of the square that the device resizes from; 0: resize on the host.
      crop_scale: area of random crops; None: the middle, by `crop_pct`.
      classes: number of classes that labels are checked against; 0: no check.
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
        classes: int = 0,
    ):
        self.batch_size, self._size, self._channels = batch_size, tuple(size), channels
        self._crop_scale, self._crop_pct = crop_scale, crop_pct
        self._interpolation, self._antialias = interpolation, antialias
        self._randaugment, self._classes, self.draws = None, classes, DRAWS
        if randaugment:
            from hivit_jax.data import randaugment as policy

            self._randaugment = policy.randaugment
            self.draws += policy.DRAWS
        room = (canvas, canvas) if canvas else self._size
        shapes = {
            "image": jax.ShapeDtypeStruct((*room, channels), np.uint8),
            "label": jax.ShapeDtypeStruct((), np.int32),
        }
        if canvas:
            shapes["box"] = jax.ShapeDtypeStruct((2, 3), np.float32)
        self.shapes = (shapes,)

    def __call__(
        self,
        sample: Mapping[str, Any],
        draws: Sequence[float],
        out: Mapping[str, np.ndarray],
    ) -> None:
        """As `Transform.__call__`; DataError for a label of no class."""
        pixels, label = decode(sample["image"], self._channels), sample.get("label", 0)
        if self._classes and not 0 <= label < self._classes:
            raise DataError(
                f"has label {label}; expected 0 to {self._classes - 1}, of "
                f"model.num_classes={self._classes}"
            )
        height, width = pixels.shape[:2]
        if self._crop_scale is None:
            crop = center_crop(height, width, self._size, self._crop_pct)
        else:
            crop = random_resized_crop(height, width, draws, self._crop_scale)
        image = out["image"]
        box = place(
            pixels, crop, image, self._size, self._interpolation, self._antialias
        )
        if self._randaugment:
            image[:] = self._randaugment(image, draws[DRAWS:])
        if "box" in out:
            out["box"][:] = box
        out["label"][...] = label


def decode(encoded: bytes, channels: int) -> np.ndarray:
    """Encoded image of any format -> uint8 [h, w, channels], exactly as PIL reads it.

    Raises:
      Exception: of many kinds, where PIL cannot read it.
    """
    import simplejpeg
    from PIL import Image, UnidentifiedImageError

    if channels == 3:
        try:  # the quick way; the same libjpeg-turbo, and the same pixels
            height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
            if colours in ("YCbCr", "Gray") and height * width < Image.MAX_IMAGE_PIXELS:
                return simplejpeg.decode_jpeg(encoded)
        except ValueError:
            pass  # no JPEG, or a damaged one, of which PIL may make something
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            pixels = np.asarray(image.convert(MODES[channels]))
    except UnidentifiedImageError as error:
        raise OSError(f"{len(encoded):,} bytes that are no image") from error
    return pixels.reshape(*pixels.shape[:2], channels)


def uniforms(seed: int, epoch: int, index: int, count: int = DRAWS) -> list[float]:
    """Numbers in [0, 1) for one image in one epoch; more of them begin the same.

    Philox is a function of key and counter, the same in every version of numpy.
    """
    philox = np.random.Philox(key=seed, counter=[0, 0, index, epoch])
    return [(word >> 11) * 2.0**-53 for word in philox.random_raw(count).tolist()]


def evaluation_image(
    encoded: bytes, shape: Sequence[int], crop_pct: float = 1.0
) -> np.ndarray:
    """Encoded image -> its middle as the model of a (height, width, channels) sees it,
    uint8; bicubic, resized on the host.

    Raises:
      Exception: of many kinds, where it cannot be read.
    """
    pixels, out = decode(encoded, shape[2]), np.zeros(shape, np.uint8)
    crop = center_crop(*pixels.shape[:2], shape[:2], crop_pct)
    place(pixels, crop, out, shape[:2])
    return out
