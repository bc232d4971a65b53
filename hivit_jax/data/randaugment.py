"""RandAugment with the policy `rand-m9-mstd0.5-inc1`, as timm reads that name.

An image meets two of fifteen operations, each half of the time, at magnitudes around 9
of 10. It is a function of the numbers drawn, and may run in many threads.
"""

from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

DRAWS = 8  # of an image; for each of two operations: which, whether, magnitude, sign
FILL = (124, 116, 104)  # beside the image: ImageNet's mean colour

# On a level: magnitude / 10 with a sign, which the tables of values below do without.
Operation = Callable[[Image.Image, float], Image.Image]


def _posterize(image: Image.Image, level: float) -> Image.Image:
    """Keeps the four highest bits of a value, or fewer, down to none: black."""
    # Not ImageOps.posterize, which from Pillow 13 on refuses to keep none.
    lost = 4 + int(4 * abs(level))
    return image.point([value >> lost << lost for value in range(256)] * 3)


def _solarize(image: Image.Image, level: float) -> Image.Image:
    """Inverts the values from a threshold on, which falls from 256 to 0."""
    return ImageOps.solarize(image, 256 - int(256 * abs(level)))


def _solarize_add(image: Image.Image, level: float) -> Image.Image:
    """Adds up to 110 to the values below 128."""
    added = int(110 * abs(level))
    values = [value + added if value < 128 else value for value in range(256)]
    return image.point(values * 3)


def _enhance(kind: type) -> Operation:
    """0.1 to 1.9 times of what `kind` measures."""
    return lambda image, level: kind(image).enhance(1 + 0.9 * level)


def _rotate(image: Image.Image, level: float) -> Image.Image:
    """Up to 30 degrees, counterclockwise where positive."""
    return image.rotate(30 * level, Image.Resampling.BICUBIC, fillcolor=FILL)


def _affine(
    image: Image.Image,
    x: Sequence[float] = (1, 0, 0),
    y: Sequence[float] = (0, 1, 0),
) -> Image.Image:
    """What lies at (`x`, `y`), each given as its weights of x, of y and of 1."""
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
    """RGB image -> RGB image of the same size, by one operation; timm auto_augment.py.

    Args:
      magnitude: 0 to 10.
      sign: 1 or -1, the direction of an operation that has two.
    """
    return OPERATIONS[name](image, sign * magnitude / 10)


def choose(
    draws: Sequence[float],
    magnitude: float = 9.0,
    std: float = 0.5,
    num_ops: int = 2,
    probability: float = 0.5,
) -> list[tuple[str, float, int]]:
    """Numbers in [0, 1) -> names, magnitudes and signs of the operations to apply.

    Drawn with replacement, each by itself left out or not; timm auto_augment.py. Takes
    four numbers for each of `num_ops`.
    """
    names, chosen = list(OPERATIONS), []
    for k in range(0, 4 * num_ops, 4):
        which, whether, normal, side = draws[k : k + 4]
        if whether < probability:
            # A draw can be 0, where a normal number would be minus infinity.
            noise = std * NormalDist().inv_cdf(max(normal, 2.0**-54))
            drawn = min(max(magnitude + noise, 0.0), 10.0)
            sign = -1 if side < 0.5 else 1
            chosen.append((names[int(which * len(names))], drawn, sign))
    return chosen


def randaugment(
    pixels: np.ndarray,
    draws: Sequence[float],
    magnitude: float = 9.0,
    std: float = 0.5,
    num_ops: int = 2,
    probability: float = 0.5,
) -> np.ndarray:
    """uint8 [h, w, 3] -> uint8 [h, w, 3]: timm auto_augment.py, as the official
    main_finetune.py has it; `pixels` itself where nothing is to be applied.

    Args:
      draws: DRAWS numbers in [0, 1), four for each of `num_ops`.
      magnitude: mean of the operations' magnitudes, before they are cut to 0 .. 10.
      std: their standard deviation.
      num_ops: how many operations an image meets.
      probability: of applying one that it meets.
    """
    chosen = choose(draws, magnitude, std, num_ops, probability)
    if not chosen:
        return pixels
    image = Image.fromarray(pixels)
    for operation, at, sign in chosen:
        image = apply(operation, image, at, sign)
    return np.asarray(image)
