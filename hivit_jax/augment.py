"""Augmentation on the device, inside the train step: one key per sample.

A sample's draws depend on its key alone, so neither the number of devices nor
gradient accumulation changes them.
"""

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Keys(NamedTuple):
    """What is drawn from in a step: a key for each sample, [B], and one for all."""

    samples: jax.Array
    step: jax.Array


def step_keys(seed: int, purpose: str, first: jax.Array, count: int) -> Keys:
    """Keys of the step whose samples are at positions first .. first+count-1 of a run.

    Args:
      seed: the run's.
      purpose: what is drawn for ("train", "eval"), so that no two uses share draws.
      first: uint32 scalar; wraps after 4.29e9 samples.
    """
    base = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
    positions = jnp.asarray(first, jnp.uint32) + jnp.arange(count, dtype=jnp.uint32)
    samples = jax.vmap(jax.random.fold_in, (None, 0))(base, positions)
    return Keys(samples, split_keys(samples[:1], "step")[0])


def split_keys(keys: jax.Array, purpose: str) -> jax.Array:
    """Keys [B] of the samples for one purpose among several ("mask", "flip")."""
    return jax.vmap(lambda key: jax.random.fold_in(key, zlib.crc32(purpose.encode())))(
        keys
    )


# Pixels to either side of a point that weigh in where nothing is made smaller.
REACH = {"bicubic": 2, "bilinear": 1}


def resample(
    images: jax.Array,
    boxes: jax.Array,
    size: Sequence[int],
    interpolation: str = "bicubic",
    antialias: bool = True,
) -> jax.Array:
    """A box of every image, resized as PIL does it: columns, then rows, each rounded.

    Two batched matrix products, about 0.5 GFLOP for 512x512 to 224x224.

    Args:
      images: uint8 [B, S, S', C].
      boxes: float32 [B, 2, 3]; for rows and columns the start and length of the box,
        and how many of the S are image: the rest is not looked at.
      size: (H, W) to resize to.
      interpolation: "bicubic" or "bilinear".
      antialias: whether every pixel counts where images are made smaller.

    Returns:
      float32 [B, H, W, C], whole numbers from 0 to 255.
    """
    for axis, letters in ((1, "bow,bhwc->bhoc"), (0, "boh,bhwc->bowc")):
        weights = jax.vmap(axis_weights, (0, None, None, None, None))(
            boxes[:, axis], size[axis], images.shape[1 + axis], interpolation, antialias
        )
        # Pixels are exact in bfloat16; weights are in two parts, 16 bits in all.
        high = weights.astype(jnp.bfloat16)
        low = (weights - high.astype(jnp.float32)).astype(jnp.bfloat16)
        images = sum(
            jnp.einsum(
                letters,
                part,
                images.astype(jnp.bfloat16),
                preferred_element_type=jnp.float32,
            )
            for part in (high, low)
        )
        images = jnp.clip(jnp.round(images), 0, 255)
    return images


def axis_weights(
    box: Any, size: int, extent: int, interpolation: str, antialias: bool
) -> Any:
    """Weights [size, extent] of the pixels of a row in each pixel of its resized box.

    Args:
      box: floats [3], start and length of the box and number of real pixels; a numpy
        or a jax array.
    """
    xp = box.__array_namespace__()
    start, length, real = box
    scale = length / size
    centers = start + (xp.arange(size) + 0.5) * scale
    stretch = xp.maximum(scale, 1.0) if antialias else 1.0
    x = xp.abs(xp.arange(extent) + 0.5 - centers[:, None]) / stretch
    if interpolation == "bilinear":
        weights = xp.maximum(1 - x, 0)
    else:  # Keys' cubic, a = -1/2
        near = (1.5 * x - 2.5) * x * x + 1
        far = ((2.5 - 0.5 * x) * x - 4) * x + 2
        weights = xp.where(x < 1, near, xp.where(x < 2, far, 0))
    weights = xp.where(xp.arange(extent) < real, weights, 0)
    total = weights.sum(-1, keepdims=True)
    # An unreadable example has an empty box; it must stay finite.
    return weights / xp.where(total == 0, 1, total)


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


def smooth_labels(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """int [B] -> float32 [B, num_classes]: ``smoothing`` is spread over all classes."""
    return (
        jax.nn.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes
    )


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


def mix(
    images: jax.Array,
    targets: jax.Array,
    weight: jax.Array,
    key: jax.Array,
    mixup: float,
    cutmix: float,
) -> tuple[jax.Array, jax.Array]:
    """Mixup or CutMix, one or the other for a whole batch, with one ratio.

    As timm's Mixup in batch mode, prob 1, switch_prob 0.5, with CutMix's ratio set to
    the area that is really cut out. There image i meets image B-1-i of its device; here
    its neighbour, i with i+1, which is on the same device however many there are.

    Args:
      images: float32 [B, H, W, C], B even.
      targets: float32 [B, classes].
      weight: float32 [B]; an image is not mixed with one of weight 0.
      key: one for the batch.
      mixup, cutmix: parameters of the Beta distributions of the ratio; 0: never.

    Returns:
      Mixed images and targets.
    """
    size = images.shape[1:3]
    which, ratio, area, place = jax.random.split(key, 4)
    by_area = jax.random.bernoulli(which) if mixup and cutmix else cutmix > 0
    blend = jax.random.beta(ratio, mixup or 1.0, mixup or 1.0)
    side = jnp.sqrt(1 - jax.random.beta(area, cutmix or 1.0, cutmix or 1.0))
    whole = jnp.array(size, jnp.float32)
    half = jnp.floor(whole * side) // 2
    center = jnp.floor(jax.random.uniform(place, (2,)) * whole)
    low, high = jnp.maximum(center - half, 0), jnp.minimum(center + half, whole)
    inside = _inside(low, high, size)
    own = jnp.where(by_area, 1 - (high - low).prod() / whole.prod(), blend)
    own_pixels = jnp.where(by_area, 1.0 - inside, blend)

    def mixed(values, own):
        own = jnp.where(_like(pairs, values) > 0, own, 1.0)
        return own * values + (1 - own) * _neighbours(values)

    pairs = weight * _neighbours(weight)
    return mixed(images, own_pixels), mixed(targets, own)


def _neighbours(values: jax.Array) -> jax.Array:
    """[B, ...] with each pair (0, 1), (2, 3), ... swapped."""
    return values.reshape(-1, 2, *values.shape[1:])[:, ::-1].reshape(values.shape)


def _like(values: jax.Array, other: jax.Array) -> jax.Array:
    """[B] -> [B, 1, ...], with as many axes as `other`."""
    return values.reshape(-1, *[1] * (other.ndim - 1))


def _inside(low: Sequence, high: Sequence, size: Sequence[int]) -> jax.Array:
    """Whether pixels are in a rectangle, bool [H, W, 1]."""
    rows, columns = jnp.arange(size[0])[:, None], jnp.arange(size[1])[None]
    inside = (rows >= low[0]) & (rows < high[0])
    return (inside & (columns >= low[1]) & (columns < high[1]))[..., None]
