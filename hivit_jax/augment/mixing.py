"""Smoothed labels, Mixup and CutMix."""

import jax
import jax.numpy as jnp

from hivit_jax.augment.image import _inside


def smooth_labels(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """int [B] -> float32 [B, num_classes]: ``smoothing`` is spread over all classes."""
    return (
        jax.nn.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes
    )


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
