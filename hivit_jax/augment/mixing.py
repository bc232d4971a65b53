"""Label smoothing, Mixup and CutMix."""

import jax
import jax.numpy as jnp

from hivit_jax.augment.image import rectangle_mask


def smooth_labels(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """Return smoothed one-hot labels, int [B] -> float32 [B, num_classes].

    Args:
      smoothing: probability that is spread evenly over all classes.
    """
    one_hot = jax.nn.one_hot(labels, num_classes)
    return one_hot * (1 - smoothing) + smoothing / num_classes


def mix(
    images: jax.Array,
    targets: jax.Array,
    weight: jax.Array,
    key: jax.Array,
    mixup: float,
    cutmix: float,
) -> tuple[jax.Array, jax.Array]:
    """Apply Mixup or CutMix to a batch, with one ratio for all images.

    The ratio is the factor of an image's own pixels in its mixture. Follows timm's
    Mixup in batch mode with prob=1 and switch_prob=0.5. CutMix clips its rectangle at
    the border. The ratio of its targets is the fraction of the image outside the
    clipped rectangle. timm mixes image i with image B-1-i of the same device. This
    function mixes neighbors (0 with 1, 2 with 3, ...) instead, because neighbors are on
    the same device for any number of devices.

    Args:
      images: float32 [B, H, W, C], B even.
      targets: float32 [B, classes].
      weight: float32 [B]; a pair with an image of weight 0 is not mixed.
      key: one key for the batch.
      mixup, cutmix: alpha of the Beta distribution of the ratio; 0: never applied. At
        least one must be positive.

    Returns:
      Mixed images and mixed targets.
    """
    cutmix_key, ratio_key, area_key, center_key = jax.random.split(key, 4)
    use_cutmix = jax.random.bernoulli(cutmix_key) if mixup and cutmix else cutmix > 0
    mixup_ratio = jax.random.beta(ratio_key, mixup or 1.0, mixup or 1.0)
    side_scale = jnp.sqrt(1 - jax.random.beta(area_key, cutmix or 1.0, cutmix or 1.0))
    size = jnp.array(images.shape[1:3], jnp.float32)
    half = jnp.floor(size * side_scale) // 2
    center = jnp.floor(jax.random.uniform(center_key, (2,)) * size)
    low, high = jnp.maximum(center - half, 0), jnp.minimum(center + half, size)
    cut_out = rectangle_mask(low, high, images.shape[1:3])[None]  # [1, H, W, 1]
    kept_fraction = 1 - (high - low).prod() / size.prod()
    pixel_ratio = jnp.where(use_cutmix, 1.0 - cut_out, mixup_ratio)
    target_ratio = jnp.where(use_cutmix, kept_fraction, mixup_ratio)
    is_mixed = weight * _swap_neighbors(weight) > 0

    def blend(values, ratio):
        mask = is_mixed.reshape(-1, *[1] * (values.ndim - 1))
        ratio = jnp.where(mask, ratio, 1.0)
        return ratio * values + (1 - ratio) * _swap_neighbors(values)

    return blend(images, pixel_ratio), blend(targets, target_ratio)


def _swap_neighbors(values: jax.Array) -> jax.Array:
    """Swap the two values of each pair (0, 1), (2, 3), ... of [B, ...]."""
    return values.reshape(-1, 2, *values.shape[1:])[:, ::-1].reshape(values.shape)
