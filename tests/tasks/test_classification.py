"""Metrics of classification."""

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from hivit_jax.reporting import multi_label
from hivit_jax.tasks.classification import classification_metrics, multi_label_metrics


def classify(logits, labels):
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


def test_average_precision_of_scikit_learn():
    """Also with equal scores, in any order of the images, and of a class of all."""
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.RandomState(0)
    scores = random.randint(-4, 5, (300, 6)).astype(np.float32)
    scores[:, 0] = random.randn(300)
    labels = (random.rand(300, 6) < [0.3, 0.5, 0.02, 0.9, 0.3, 0]).astype(np.uint8)
    labels[:, 4] = 1
    found = multi_label.average_precision(scores, labels)
    expected = sklearn_metrics.average_precision_score(
        labels[:, :5], scores[:, :5], average=None
    )
    assert_allclose(found[:5], expected, rtol=1e-12)
    assert np.isnan(found[5])
    order = random.permutation(300)
    again = multi_label.average_precision(scores[order], labels[order])
    assert_allclose(again, found, rtol=1e-15)
    mean = multi_label.mean_average_precision(scores, labels)
    assert mean == pytest.approx(expected.mean())
    assert multi_label.mean_average_precision(scores, np.zeros((300, 6))) == 0


def test_class_table_of_several_labels():
    logits = np.array([[2.0, -1.0, 3.0], [0.0, 1.0, -3.0], [-1.0, -2.0, -2.0]])
    labels = np.array([[1, 1, 0], [0, 1, 0], [1, 0, 0]])
    rows = multi_label.class_table("abc", logits, labels)
    assert [[*row.values()] for row in rows] == [
        ["a", 2, 2, 1, "0.500000", "0.500000", "0.833333"],
        ["b", 2, 1, 1, "0.500000", "1.000000", "1.000000"],
        ["c", 0, 1, 0, "", "0.000000", ""],
    ]


def test_binary_cross_entropy():
    """The mean over all classes, also for soft targets and large logits."""
    logits = np.array([[0.0, 2.0], [-1.0, 200.0]])
    targets = np.array([[1.0, 0.0], [0.25, 1.0]])
    found = multi_label_metrics(jnp.float32(logits), jnp.float32(targets))["loss"]
    expected = np.logaddexp(0, logits) - targets * logits
    assert_allclose(found, expected.mean(1), rtol=1e-6)
