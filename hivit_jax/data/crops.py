"""Crop images, and resize crops on the host."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hivit_jax.augment.resample import FILTER_RADIUS, MAXIMUM, crop_resize_matrix

# Along one axis: start and length of a box in an image, and length of the image. The
# array that holds the image may be longer.
Span = tuple[float, float, int]


class Box(NamedTuple):
    """A rectangle of an image, in pixels. Its coordinates may be fractions."""

    top: float
    left: float
    height: float
    width: float


class Crop(NamedTuple):
    """A crop of an image for the model.

    Attributes:
      box: rectangle to resize.
      bounds: rectangle that the resize filter may read; its edges are integers.
    """

    box: Box
    bounds: Box


def random_resized_crop(
    height: int,
    width: int,
    draws: Sequence[float],
    scale: Sequence[float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Crop:
    """Return a random crop with the distribution of torchvision's RandomResizedCrop.

    Each of ten tries draws an area from `scale` and a log-uniform aspect ratio from
    `ratio`. The first crop that fits inside the image is used, at a uniformly random
    position in whole pixels. If no crop fits, the largest central crop with an allowed
    aspect ratio is used. The resize filter does not read pixels outside the crop.

    Args:
      height, width: size of the image.
      draws: `transforms.DRAWS` numbers in [0, 1).
      scale: lowest and highest area, relative to the image.
      ratio: lowest and highest width / height.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for area_draw, aspect_draw in zip(draws[:10], draws[10:20], strict=True):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = math.exp(low + (high - low) * aspect_draw)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(draws[20] * (height - h + 1))
            left = int(draws[21] * (width - w + 1))
            break
    else:
        h = min(height, round(width / ratio[0]))
        w = min(width, round(height * ratio[1]))
        top, left = (height - h) // 2, (width - w) // 2
    box = Box(top, left, h, w)
    return Crop(box, box)


def center_crop(height: int, width: int, size: Sequence[int], crop_pct: float) -> Crop:
    """Return the central crop that timm and torchvision use for evaluation.

    The crop corresponds to two steps: resize the image so that it just covers
    ``size / crop_pct``, then crop `size` at the center. For a square `size`, the first
    step resizes the image's shorter side to ``size / crop_pct``.

    Args:
      height, width: size of the image.
      size: (height, width) of the model's image.
    """
    target = [math.floor(side / crop_pct) for side in size]
    if target[0] * width >= target[1] * height:  # the height determines the scale
        resized = (target[0], int(target[0] * width / height))
    else:
        resized = (int(target[1] * height / width), target[1])
    scales = height / resized[0], width / resized[1]
    corner = [round((r - s) / 2) for r, s in zip(resized, size, strict=True)]
    box = Box(
        *(c * k for c, k in zip(corner, scales, strict=True)),
        *(s * k for s, k in zip(size, scales, strict=True)),
    )
    return Crop(box, Box(0, 0, height, width))


def paste_crop(
    pixels: np.ndarray,
    crop: Crop,
    out: np.ndarray,
    size: Sequence[int],
    interpolation: str = "bicubic",
    antialias: bool = True,
) -> tuple[Span, Span]:
    """Write a crop into the top left of `out` and set the rest of `out` to 0.

    If `out` is larger than `size`, the crop keeps its resolution, and the pixels that
    the resize filter needs around the box are included. If `out` has exactly `size`, or
    has no room for these pixels, the box is resized to `size` on the host.

    Args:
      pixels: uint8, uint16 or float32 [h, w, C].
      out: array [H', W', C], at least as large as `size`, with the dtype of `pixels`.
      size: (height, width) of the model's image.

    Returns:
      Spans of the box in `out`, for rows and for columns.
    """
    row_range, column_range = (
        _filter_range(crop, axis, size[axis], FILTER_RADIUS[interpolation], antialias)
        for axis in (0, 1)
    )
    part = pixels[slice(*row_range), slice(*column_range)]
    height, width = part.shape[:2]
    spans = (
        (crop.box.top - row_range[0], crop.box.height, height),
        (crop.box.left - column_range[0], crop.box.width, width),
    )
    canvas = out.shape[:2]
    if canvas == tuple(size) or canvas[0] < height or canvas[1] < width:
        part = resize(part, spans, size, interpolation, antialias)
        height, width = size
        spans = (0, height, height), (0, width, width)
    out[:height, :width] = part
    out[:height, width:] = 0
    out[height:] = 0
    return spans


def _filter_range(
    crop: Crop, axis: int, size: int, radius: int, antialias: bool
) -> tuple[int, int]:
    """Return the half-open range of rows (or columns) that the resize filter reads."""
    start, length = crop.box[axis], crop.box[2 + axis]
    low, extent = crop.bounds[axis], crop.bounds[2 + axis]
    if antialias and length > size:
        radius = math.ceil(radius * length / size)
    return (
        max(low, math.floor(start) - radius),
        min(low + extent, math.ceil(start + length) + radius),
    )


def resize(
    pixels: np.ndarray,
    spans: tuple[Span, Span],
    size: Sequence[int],
    interpolation: str,
    antialias: bool,
) -> np.ndarray:
    """Resize a box of an image [h, w, C] to [*size, C] on the host.

    This is the counterpart of `augment.resample`. PIL resizes with antialiasing. NumPy
    resizes without antialiasing, which PIL does not support. uint8 is rounded after
    each axis, uint16 only at the end, and float32 never.
    """
    from PIL import Image

    dtype, limit = pixels.dtype, MAXIMUM[pixels.dtype.name]
    if antialias:
        (top, height, _), (left, width, _) = spans
        edges = (left, top, left + width, top + height)
        # PIL resizes 8-bit RGB images as a whole. Others are resized band by band,
        # because PIL does not support them or would treat their last band as alpha.
        is_rgb = dtype == np.uint8 and pixels.shape[-1] == 3
        parts = [pixels] if is_rgb else np.moveaxis(pixels, -1, 0)
        parts = [part if dtype == np.uint8 else part.astype("f4") for part in parts]
        pil_size, filter = tuple(size)[::-1], Image.Resampling[interpolation.upper()]
        parts = [
            np.asarray(Image.fromarray(part).resize(pil_size, filter, edges))
            for part in parts
        ]
        pixels = parts[0] if is_rgb else np.stack(parts, -1)
    else:
        for axis in (1, 0):
            matrix = crop_resize_matrix(
                np.array(spans[axis]),
                size[axis],
                pixels.shape[axis],
                interpolation,
                antialias,
            )
            pixels = np.moveaxis(np.tensordot(matrix, pixels, (1, axis)), 0, axis)
            if dtype == np.uint8:
                pixels = np.rint(pixels).clip(0, limit)
    if dtype == np.uint16:
        pixels = np.rint(pixels).clip(0, limit)
    return pixels.astype(dtype)
