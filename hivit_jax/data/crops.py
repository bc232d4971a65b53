"""Crops of an image and how they are resized, on the host."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hivit_jax.augment.resample import REACH, axis_weights

Span = tuple[float, float, int]  # start and length of a box, pixels there are


class Box(NamedTuple):
    """A rectangle of an image in pixels; an edge may lie between two of them."""

    top: float
    left: float
    height: float
    width: float


class Crop(NamedTuple):
    """What of an image the model sees: `box`, made of pixels of `bounds` alone, whose
    edges are whole numbers.
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
    """A random part of an image, torchvision's rule: ten tries at an area in `scale`
    and a log-uniform aspect in `ratio`; the first that fits inside is taken, else the
    largest centred part whose aspect is allowed. Pixels beside it play no role.

    Args:
      draws: DRAWS numbers in [0, 1).
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for size, shape in zip(draws[:10], draws[10:20], strict=True):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * size)
        aspect = math.exp(low + (high - low) * shape)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            # A whole pixel from 0 to what is left over, each as likely.
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
    """The middle, as after resizing to ``size / crop_pct`` (the short side, where the
    model's image is square) and cutting out `size`; timm's and torchvision's rule.
    """
    wanted = [math.floor(side / crop_pct) for side in size]
    if wanted[0] * width >= wanted[1] * height:  # the height decides
        full = (wanted[0], int(wanted[0] * width / height))
    else:
        full = (int(wanted[1] * height / width), wanted[1])
    scales = height / full[0], width / full[1]
    corner = [round((f - s) / 2) for f, s in zip(full, size, strict=True)]
    box = Box(
        *(c * k for c, k in zip(corner, scales, strict=True)),
        *(s * k for s, k in zip(size, scales, strict=True)),
    )
    return Crop(box, Box(0, 0, height, width))


def place(
    pixels: np.ndarray,
    crop: Crop,
    out: np.ndarray,
    size: Sequence[int],
    interpolation: str = "bicubic",
    antialias: bool = True,
) -> tuple[Span, Span]:
    """Writes what the model needs of an image into the top left of `out`, beside zeros.

    That is the box and the pixels around it that weigh in, if `out` is larger than
    `size` and has room for them; else the box resized to `size`, as PIL does it.

    Args:
      pixels: uint8 [h, w, C].
      out: uint8 [H', W', C]; at least `size`.
      size: (height, width) of the model's image.

    Returns:
      Where it lies, as `augment.resample` wants it.
    """
    rows, columns = (
        _span(crop, axis, size[axis], REACH[interpolation], antialias)
        for axis in (0, 1)
    )
    part = pixels[slice(*rows), slice(*columns)]
    height, width = part.shape[:2]
    box = (
        (crop.box.top - rows[0], crop.box.height, height),
        (crop.box.left - columns[0], crop.box.width, width),
    )
    room = out.shape[:2]
    if room == tuple(size) or room[0] < height or room[1] < width:
        part = resize(part, box, size, interpolation, antialias)
        height, width = size
        box = (0, height, height), (0, width, width)
    out[:height, :width] = part
    out[:height, width:] = 0
    out[height:] = 0
    return box


def _span(
    crop: Crop, axis: int, size: int, reach: int, antialias: bool
) -> tuple[int, int]:
    """First row (or column) that weighs in, and the one behind the last."""
    start, length = crop.box[axis], crop.box[2 + axis]
    low, extent = crop.bounds[axis], crop.bounds[2 + axis]
    if antialias and length > size:
        reach = math.ceil(reach * length / size)
    return (
        max(low, math.floor(start) - reach),
        min(low + extent, math.ceil(start + length) + reach),
    )


def resize(
    pixels: np.ndarray,
    box: tuple[Span, Span],
    size: Sequence[int],
    interpolation: str,
    antialias: bool,
) -> np.ndarray:
    """A box of an image [h, w, C] -> uint8 [*size, C]: `augment.resample` on the host,
    through PIL, which knows no plain (not antialiased) resize.
    """
    from PIL import Image

    if antialias:
        (top, height, _), (left, width, _) = box
        edges = (left, top, left + width, top + height)
        grey = pixels.shape[-1] == 1
        image = Image.fromarray(pixels[..., 0] if grey else pixels)
        image = image.resize(
            tuple(size)[::-1], Image.Resampling[interpolation.upper()], edges
        )
        return np.asarray(image).reshape(*size, -1)
    for axis in (1, 0):
        weights = axis_weights(
            np.array(box[axis]),
            size[axis],
            pixels.shape[axis],
            interpolation,
            antialias,
        )
        pixels = np.moveaxis(np.tensordot(weights, pixels, (1, axis)), 0, axis)
        pixels = np.rint(pixels).clip(0, 255)
    return pixels.astype(np.uint8)
