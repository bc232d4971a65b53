"""RandAugment with timm's policy `rand-m9-mstd0.5-inc1`.

Draws two of fifteen operations for each image, with replacement. Each drawn operation
is applied with probability 0.5, at a magnitude around 9 on a scale of 0 to 10. The
result depends only on the image and the given random numbers. All functions are
thread-safe.
"""

from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

# Random numbers per image. Each of the two operations uses four: one each for its
# choice, its application, its magnitude and its sign.
DRAWS = 8
FILL = (124, 116, 104)  # color outside the image: ImageNet's mean

# Function (image, level) -> image. The level is sign * magnitude / 10.
Operation = Callable[[Image.Image, float], Image.Image]


def _posterize(image: Image.Image, level: float) -> Image.Image:
    """Keep only the highest bits of each value: 4 at level 0, none (black) at 1."""
    # ImageOps.posterize is not used, because Pillow >= 13 rejects 0 bits.
    cleared_bits = 4 + int(4 * abs(level))
    table = [value >> cleared_bits << cleared_bits for value in range(256)]
    return image.point(table * 3)


def _solarize(image: Image.Image, level: float) -> Image.Image:
    """Invert values at or above a threshold: 256 at level 0, 0 at level 1."""
    return ImageOps.solarize(image, 256 - int(256 * abs(level)))


def _solarize_add(image: Image.Image, level: float) -> Image.Image:
    """Brighten values below 128 by 110 * |level|."""
    added = int(110 * abs(level))
    table = [value + added if value < 128 else value for value in range(256)]
    return image.point(table * 3)


def _enhance(enhancer: type) -> Operation:
    """Return an operation that applies a PIL enhancer with a factor of 0.1 to 1.9."""
    return lambda image, level: enhancer(image).enhance(1 + 0.9 * level)


def _rotate(image: Image.Image, level: float) -> Image.Image:
    """Rotate by up to 30 degrees; positive levels rotate counterclockwise."""
    return image.rotate(30 * level, Image.Resampling.BICUBIC, fillcolor=FILL)


def _affine(
    image: Image.Image,
    x: Sequence[float] = (1, 0, 0),
    y: Sequence[float] = (0, 1, 0),
) -> Image.Image:
    """Apply an affine map from output to input coordinates.

    Args:
      x, y: coefficients (a, b, c) of the x (or y) input coordinate, which is
        a * u + b * v + c for an output pixel (u, v).
    """
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        (*x, *y),
        Image.Resampling.BICUBIC,
        fillcolor=FILL,
    )


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": lambda image, _: ImageOps.autocontrast(image),
    "Equalize": lambda image, _: ImageOps.equalize(image),
    "Invert": lambda image, _: ImageOps.invert(image),
    "Rotate": _rotate,
    "PosterizeIncreasing": _posterize,
    "SolarizeIncreasing": _solarize,
    "SolarizeAdd": _solarize_add,
    "ColorIncreasing": _enhance(ImageEnhance.Color),
    "ContrastIncreasing": _enhance(ImageEnhance.Contrast),
    "BrightnessIncreasing": _enhance(ImageEnhance.Brightness),
    "SharpnessIncreasing": _enhance(ImageEnhance.Sharpness),
    "ShearX": lambda image, level: _affine(image, x=(1, 0.3 * level, 0)),
    "ShearY": lambda image, level: _affine(image, y=(0.3 * level, 1, 0)),
    "TranslateXRel": lambda image, level: _affine(
        image, x=(1, 0, 0.45 * level * image.width)
    ),
    "TranslateYRel": lambda image, level: _affine(
        image, y=(0, 1, 0.45 * level * image.height)
    ),
}


def apply(name: str, image: Image.Image, magnitude: float, sign: int) -> Image.Image:
    """Apply one of `OPERATIONS` to an RGB image, as in timm's auto_augment.py.

    Args:
      magnitude: 0 to 10.
      sign: 1 or -1, the direction of an operation that can go both ways, such as a
        rotation.
    """
    return OPERATIONS[name](image, sign * magnitude / 10)


def choose(
    draws: Sequence[float],
    mean_magnitude: float = 9.0,
    std: float = 0.5,
    num_ops: int = 2,
    probability: float = 0.5,
) -> list[tuple[str, float, int]]:
    """Return (name, magnitude, sign) of each operation to apply to an image.

    Operations are drawn with replacement. Each is selected independently of the others,
    as in timm's auto_augment.py. For the arguments see `randaugment`.
    """
    names, chosen = list(OPERATIONS), []
    for k in range(0, 4 * num_ops, 4):
        name_draw, apply_draw, magnitude_draw, sign_draw = draws[k : k + 4]
        if apply_draw < probability:
            # Draws are bounded away from 0, because inv_cdf does not accept 0.
            noise = std * NormalDist().inv_cdf(max(magnitude_draw, 2.0**-54))
            magnitude = min(max(mean_magnitude + noise, 0.0), 10.0)
            name = names[int(name_draw * len(names))]
            sign = -1 if sign_draw < 0.5 else 1
            chosen.append((name, magnitude, sign))
    return chosen


def randaugment(
    pixels: np.ndarray,
    draws: Sequence[float],
    mean_magnitude: float = 9.0,
    std: float = 0.5,
    num_ops: int = 2,
    probability: float = 0.5,
) -> np.ndarray:
    """Apply RandAugment as in timm's auto_augment.py and HiViT's main_finetune.py.

    Args:
      pixels: uint8 [h, w, 3].
      draws: random numbers in [0, 1), four for each of `num_ops` operations.
      mean_magnitude: mean magnitude of an operation, before clipping to 0 .. 10.
      std: standard deviation of the magnitude, before clipping.
      num_ops: number of operations to draw.
      probability: probability of applying a drawn operation.

    Returns:
      uint8 [h, w, 3]; `pixels` itself if no operation is applied.
    """
    chosen = choose(draws, mean_magnitude, std, num_ops, probability)
    if not chosen:
        return pixels
    image = Image.fromarray(pixels)
    for name, magnitude, sign in chosen:
        image = apply(name, image, magnitude, sign)
    return np.asarray(image)
