"""Losses and accuracies of classifiers, one value per image."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hivit_jax.reporting.classes import MIN_TOP5_CLASSES
from hivit_jax.tasks.base import PerSample


def classification_metrics(logits: jax.Array, labels: jax.Array) -> PerSample:
    """Return the cross entropy and `topk_correct` of logits [B, classes]."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return {"loss": loss, **topk_correct(logits, labels)}


def topk_correct(logits: jax.Array, labels: jax.Array) -> PerSample:
    """Return {"top1", "top5": [B]}: 1.0 if the true class has one of the top k logits.

    Among classes with equal logits, the one with the lowest index ranks first. With
    fewer than `MIN_TOP5_CLASSES` classes, "top5" is missing, because it would always be
    1.

    Args:
      logits, labels: [B, classes] and [B].
    """
    true = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    lower_index = jnp.arange(logits.shape[-1])[None] < labels[:, None]
    rank = ((logits > true) | ((logits == true) & lower_index)).sum(-1)
    ks = [1, *[5] * (logits.shape[-1] >= MIN_TOP5_CLASSES)]
    return {f"top{k}": (rank < k).astype(jnp.float32) for k in ks}


def multi_label_metrics(
    logits: jax.Array, targets: jax.Array, weights: np.ndarray | None = None
) -> PerSample:
    """Return {"loss": [B]}, the binary cross entropy averaged over all classes.

    Args:
      logits: [B, classes].
      targets: probabilities, [B, classes].
      weights: factor of each class's cross entropy, [classes]; None: 1.
    """
    loss = optax.sigmoid_binary_cross_entropy(logits, targets)
    loss = loss if weights is None else loss * weights
    return {"loss": loss.mean(-1)}
