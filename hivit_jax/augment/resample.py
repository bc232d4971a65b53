"""Cropping and resizing on the device, with PIL's filters."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Radius in source pixels. Downscaling with antialiasing widens the filters.
FILTER_RADIUS = {"bicubic": 2, "bilinear": 1}
# Largest value of each dtype. Results are clipped, because the filters may overshoot.
MAXIMUM = {"uint8": 255, "uint16": 65535, "float32": math.inf}


def resample(
    images: jax.Array,
    boxes: jax.Array,
    size: Sequence[int],
    interpolation: str = "bicubic",
    antialias: bool = True,
) -> jax.Array:
    """Resize a box of every image as PIL does: the width first, then the height.

    Computes two batched matrix products, 0.5 GFLOP per RGB image for 512x512 to
    224x224. For uint8, each product is computed as the sum of two bfloat16 products,
    which doubles the operations, and the sum is rounded to integers. For uint16 and
    float32, nothing is rounded; the errors of float32 arithmetic are below 1/65535 of
    the value range.

    Args:
      images: uint8, uint16 or float32 [B, S, S', C].
      boxes: float32 [B, 2, 3]; for rows, then for columns: start and length of the box,
        and number of real pixels. Pixels after the real pixels are padding and are
        ignored. For uint16 and float32: [B, 2, 5], see `precise_span`.
      size: (H, W) of the result.
      interpolation: "bicubic" or "bilinear".
      antialias: widen the filter when downscaling, so that every pixel contributes.

    Returns:
      float32 [B, H, W, C]; for uint8 images, integers from 0 to 255.
    """
    is_8_bit, limit = images.dtype == jnp.uint8, MAXIMUM[images.dtype.name]
    for axis, subscripts in ((1, "bow,bhwc->bhoc"), (0, "boh,bhwc->bowc")):
        weights = jax.vmap(crop_resize_matrix, (0, None, None, None, None))(
            boxes[:, axis], size[axis], images.shape[1 + axis], interpolation, antialias
        )
        if not is_8_bit:
            images = jnp.einsum(
                subscripts,
                weights,
                images.astype(jnp.float32),
                precision=jax.lax.Precision.HIGHEST,
            )
            continue
        # Two bfloat16 products are precise enough, because pixels are exact in
        # bfloat16, and the sum of two bfloat16 numbers holds 16 bits of a weight.
        high = weights.astype(jnp.bfloat16)
        low = (weights - high.astype(jnp.float32)).astype(jnp.bfloat16)
        images = sum(
            jnp.einsum(
                subscripts,
                part,
                images.astype(jnp.bfloat16),
                preferred_element_type=jnp.float32,
            )
            for part in (high, low)
        )
        images = jnp.clip(jnp.round(images), 0, 255)
    return images if is_8_bit or limit == math.inf else jnp.clip(images, 0, limit)


def crop_resize_matrix(
    box: Any, output_size: int, source_size: int, interpolation: str, antialias: bool
) -> Any:
    """Return the matrix [output_size, source_size] that crops and resizes an axis.

    The matrix is a NumPy or JAX array, like the box.

    Args:
      box: floats [3], start and length of the box and number of real pixels; or [5],
        see `precise_span`.
      output_size: pixels of the resized box.
      source_size: pixels of the source, padding included.
    """
    xp = box.__array_namespace__()
    source_index = xp.arange(source_size)[None]
    output_centers = (xp.arange(output_size) + 0.5)[:, None]
    if len(box) == 3:
        start, length, num_real = box
        scale = length / output_size
        distances = source_index + 0.5 - (start + output_centers * scale)
    else:
        start, scale, num_real, start_low, scale_low = box
        distances = source_index + 0.5 - output_centers * scale - start
        distances = distances - (output_centers * scale_low + start_low)
        scale = scale + scale_low
    stretch = xp.maximum(scale, 1.0) if antialias else 1.0
    x = xp.abs(distances) / stretch
    if interpolation == "bilinear":
        weights = xp.maximum(1 - x, 0)
    else:  # cubic convolution (Keys, 1981) with a = -1/2
        near = (1.5 * x - 2.5) * x * x + 1
        far = ((2.5 - 0.5 * x) * x - 4) * x + 2
        weights = xp.where(x < 1, near, xp.where(x < 2, far, 0))
    weights = xp.where(source_index < num_real, weights, 0)
    total = weights.sum(-1, keepdims=True)
    # Without `where`, the empty box of an unreadable example would give NaN.
    return weights / xp.where(total == 0, 1, total)


def precise_span(span: Sequence[float], output_size: int) -> tuple[float, ...]:
    """Return (start, scale, number of real pixels, start_low, scale_low).

    `start` and `scale` have 12 significant bits, so that float32 computes distances of
    pixels from `start + (i + 0.5) * scale` exactly, up to canvases of 4096 pixels. The
    exact values are `start + start_low` and `scale + scale_low`. With float32 alone,
    positions would have errors of 3e-5 pixels, and pixels at a sharp edge would have
    errors above 1/65535 of the range.

    Args:
      span: start and length of a box, and number of real pixels.
      output_size: pixels of the resized box.
    """
    start, length, num_real = span
    scale = length / output_size
    start_high, scale_high = (_round_to_12_bits(x) for x in (start, scale))
    return start_high, scale_high, num_real, start - start_high, scale - scale_high


def _round_to_12_bits(x: float) -> float:
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(mantissa * 4096), exponent - 12)
