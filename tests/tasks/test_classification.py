"""Tests of the metrics of classification."""

import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose

from hivit_jax.tasks.classification import classification_metrics


def classify(logits, labels):
    """Return the metrics of each example as numpy arrays."""
    values = classification_metrics(
        jnp.asarray(logits, jnp.float32), jnp.asarray(labels)
    )
    return {name: np.asarray(value) for name, value in values.items()}


def test_top1_and_top5():
    logits = np.tile(np.arange(8.0), (8, 1))  # class 7 scores best
    values = classify(logits, np.arange(8))
    assert values["top1"].tolist() == [0, 0, 0, 0, 0, 0, 0, 1]
    assert values["top5"].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]


def test_equal_scores_go_by_class_number():
    values = classify(np.zeros((8, 8)), np.arange(8))
    assert values["top1"].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert values["top5"].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]


def test_cross_entropy_is_not_smoothed_in_evaluation():
    logits = np.log([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])
    values = classify(logits, [0, 1])
    assert_allclose(values["loss"], [-np.log(0.5), -np.log(0.2)], rtol=1e-6)
