"""Normalization, flips and random erasing."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def normalize(
    images: jax.Array, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
    """0..255 [B, H, W, C] -> float32, ``(x / 255 - mean) / std`` per channel."""
    scale = 255.0 * jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) - 255.0 * jnp.asarray(mean, jnp.float32)) / scale


def random_flip(images: jax.Array, keys: jax.Array) -> jax.Array:
    """Mirrors each image [B, H, W, C] left to right with probability one half."""
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def random_erasing(images: jax.Array, keys: jax.Array, probability: float) -> jax.Array:
    """Puts noise into a rectangle of some images, float32 [B, H, W, C], normalised.

    timm's RandomErasing in pixel mode: 2 to 33 % of the area, an aspect of 0.3 to 3.3,
    standard normal values; the first of ten tries that fits inside.
    """
    height, width, channels = images.shape[1:]

    def erase(image, key):
        chosen, sizes, places, values = jax.random.split(key, 4)
        area, aspect = jax.random.uniform(sizes, (2, 10))
        area = (0.02 + (1 / 3 - 0.02) * area) * height * width
        aspect = jnp.exp((2 * aspect - 1) * jnp.log(1 / 0.3))
        h = jnp.round(jnp.sqrt(area * aspect))
        w = jnp.round(jnp.sqrt(area / aspect))
        fits = (h < height) & (w < width)
        h, w = h[fits.argmax()], w[fits.argmax()]
        left_over = jnp.stack([height - h, width - w])
        top, left = jnp.floor(jax.random.uniform(places, (2,)) * (left_over + 1))
        inside = _inside((top, left), (top + h, left + w), (height, width))
        erased = fits.any() & jax.random.bernoulli(chosen, probability)
        noise = jax.random.normal(values, (height, width, channels), images.dtype)
        return jnp.where(inside & erased, noise, image)

    return jax.vmap(erase)(images, keys)


def _inside(low: Sequence, high: Sequence, size: Sequence[int]) -> jax.Array:
    """Whether pixels are in a rectangle, bool [H, W, 1]."""
    rows, columns = jnp.arange(size[0])[:, None], jnp.arange(size[1])[None]
    inside = (rows >= low[0]) & (rows < high[0])
    return (inside & (columns >= low[1]) & (columns < high[1]))[..., None]
