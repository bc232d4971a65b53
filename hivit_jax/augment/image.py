"""Normalization, flips and random erasing."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def normalize(
    images: jax.Array,
    mean: Sequence[float],
    std: Sequence[float],
    scale: float = 255.0,
) -> jax.Array:
    """Normalize pixels x [B, H, W, C] to float32 ``(x / scale - mean) / std``."""
    mean, std = (jnp.asarray(x, jnp.float32).reshape(1, 1, 1, -1) for x in (mean, std))
    return (images.astype(jnp.float32) - scale * mean) / (scale * std)


def random_flip(images: jax.Array, keys: jax.Array) -> jax.Array:
    """Flip each image of [B, H, W, C] left to right with probability 1/2; keys: [B]."""
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def random_erasing(images: jax.Array, keys: jax.Array, probability: float) -> jax.Array:
    """Replace a random rectangle of some images with standard normal noise.

    Follows timm's RandomErasing in pixel mode. A rectangle covers 2 to 33 % of the area
    and has an aspect ratio of 0.3 to 3.3. Ten sizes are drawn, and the first size that
    fits inside the image is used. If no size fits, the image is unchanged.

    Args:
      images: float32 [B, H, W, C], normalized.
      keys: [B], one per image.
      probability: probability of erasing, for each image.
    """
    height, width, channels = images.shape[1:]

    def erase(image, key):
        erase_key, size_key, corner_key, noise_key = jax.random.split(key, 4)
        area_draws, aspect_draws = jax.random.uniform(size_key, (2, 10))
        area = (0.02 + (1 / 3 - 0.02) * area_draws) * height * width
        aspect = jnp.exp((2 * aspect_draws - 1) * jnp.log(1 / 0.3))
        h = jnp.round(jnp.sqrt(area * aspect))
        w = jnp.round(jnp.sqrt(area / aspect))
        fits = (h < height) & (w < width)
        h, w = h[fits.argmax()], w[fits.argmax()]
        margin = jnp.stack([height - h, width - w])
        top, left = jnp.floor(jax.random.uniform(corner_key, (2,)) * (margin + 1))
        in_rectangle = rectangle_mask((top, left), (top + h, left + w), (height, width))
        is_erased = fits.any() & jax.random.bernoulli(erase_key, probability)
        noise = jax.random.normal(noise_key, (height, width, channels), images.dtype)
        return jnp.where(in_rectangle & is_erased, noise, image)

    return jax.vmap(erase)(images, keys)


def rectangle_mask(low: Sequence, high: Sequence, size: Sequence[int]) -> jax.Array:
    """Return bool [H, W, 1], True for pixels inside a rectangle.

    Args:
      low: (row, column) of the first pixel.
      high: (row, column) after the last pixel.
      size: (H, W).
    """
    rows, columns = jnp.arange(size[0])[:, None], jnp.arange(size[1])[None]
    in_rows = (rows >= low[0]) & (rows < high[0])
    in_columns = (columns >= low[1]) & (columns < high[1])
    return (in_rows & in_columns)[..., None]
