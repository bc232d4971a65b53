"""Average precision of each class, for images with any number of labels."""

from collections.abc import Sequence

import numpy as np

from hivit_jax.reporting.classes import class_row


def average_precision(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the average precision of each class, float64 [classes].

    Every distinct score is a threshold. The average precision is the sum over the
    thresholds of precision times increase in recall, without interpolation, as in
    scikit-learn. Equal scores share a threshold, so the order of the images has no
    effect. For a class without images, the result is NaN.

    Args:
      scores: larger for a more probable class, [n, classes].
      labels: 0 and 1, [n, classes].
    """
    averages = np.full(labels.shape[1], np.nan)
    for k in np.flatnonzero(labels.any(0)):
        order = np.argsort(-scores[:, k], kind="stable")
        score, label = scores[order, k], labels[order, k]
        # Index of the last image at each threshold.
        last = np.flatnonzero(np.append(score[1:] != score[:-1], True))
        correct = np.cumsum(label, dtype=np.int64)[last]
        precision = correct / (last + 1)
        averages[k] = (np.diff(correct, prepend=0) * precision).sum() / correct[-1]
    return averages


def mean_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean average precision of classes with images; 0 if there are none."""
    averages = average_precision(scores, labels)
    return float(np.nanmean(averages)) if labels.any() else 0.0


def class_table(
    names: Sequence[str], logits: np.ndarray, labels: np.ndarray
) -> list[dict[str, str | int]]:
    """Return one row per class: counts, recall, precision and average precision.

    A class is predicted if its probability is at least 0.5. An undefined value is "".

    Args:
      logits, labels: [n, classes].
    """
    averages, rows = average_precision(logits, labels), []
    for k, name in enumerate(names):
        true, predicted = labels[:, k] > 0, logits[:, k] >= 0
        images, positive = int(true.sum()), int(predicted.sum())
        correct = int((true & predicted).sum())
        row = class_row(name, images, positive, correct)
        row["average_precision"] = f"{averages[k]:.6f}" if images else ""
        rows.append(row)
    return rows
