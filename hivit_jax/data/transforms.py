"""Encoded image -> uint8 pixels, on the host; flip and normalisation come later, on the
device. Every random draw is stateless: a function of the seed that is handed in.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tensorflow as tf


def decode(encoded: "tf.Tensor", channels: int) -> "tf.Tensor":
    """Encoded image, a string scalar -> uint8 [h, w, channels]."""
    import tensorflow as tf

    image = tf.io.decode_image(encoded, channels=channels, expand_animations=False)
    return tf.ensure_shape(image, [None, None, channels])


def resize(image: "tf.Tensor", size: Sequence[int]) -> "tf.Tensor":
    """Antialiased bicubic: [h, w, C] -> uint8 [*size, C]."""
    import tensorflow as tf

    pixels = tf.image.resize(image, size, method="bicubic", antialias=True)
    return tf.saturate_cast(tf.round(pixels), tf.uint8)


def random_resized_crop(
    image: "tf.Tensor",
    size: Sequence[int],
    scale: Sequence[float],
    seed: "tf.Tensor",
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> "tf.Tensor":
    """A random part of the image, resized: [h, w, C] -> uint8 [*size, C].

    torchvision's rule: ten tries at an area in `scale` and a log-uniform aspect in
    `ratio`; the first that fits inside is taken, else the largest centred crop whose
    aspect is allowed.

    Args:
      seed: int [2], as TensorFlow's stateless random functions take it.
    """
    import tensorflow as tf

    height, width = tf.shape(image)[0], tf.shape(image)[1]
    h, w = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
    draws = tf.random.stateless_uniform([4, 10], seed)
    area = h * w * (scale[0] + (scale[1] - scale[0]) * draws[0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = tf.exp(low + (high - low) * draws[1])
    tries_w, tries_h = (
        tf.round(tf.sqrt(area * aspect)),
        tf.round(tf.sqrt(area / aspect)),
    )
    fits = (tries_w > 0) & (tries_h > 0) & (tries_w <= w) & (tries_h <= h)
    first = tf.argmax(fits)  # 0 where none fits

    fallback_w = tf.minimum(w, tf.round(h * ratio[1]))
    fallback_h = tf.minimum(h, tf.round(w / ratio[0]))
    any_fits = tf.reduce_any(fits)
    crop_w = tf.where(any_fits, tries_w[first], fallback_w)
    crop_h = tf.where(any_fits, tries_h[first], fallback_h)
    # The corner is a whole pixel from 0 to what is left over, each as likely.
    left_over = tf.stack([h - crop_h, w - crop_w])
    corner = tf.minimum(tf.floor(draws[2:, first] * (left_over + 1)), left_over)
    top, left = tf.unstack(tf.where(any_fits, corner, tf.floor(left_over / 2)))
    box = [tf.cast(x, tf.int32) for x in (top, left, crop_h, crop_w)]
    return resize(tf.image.crop_to_bounding_box(image, *box), size)
