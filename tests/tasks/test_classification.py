"""Tests of the losses, metrics and class weights of classification."""

import jax.numpy as jnp
import mini_runs
import numpy as np
import pytest
from numpy.testing import assert_allclose

from hivit_jax import rng
from hivit_jax.data.sources.base import DatasetInfo
from hivit_jax.errors import ConfigError
from hivit_jax.reporting import multi_label
from hivit_jax.tasks.classification import Classification, class_weights
from hivit_jax.tasks.metrics import classification_metrics, multi_label_metrics


def metrics_of(logits, labels):
    """Return the metrics of each example as numpy arrays."""
    values = classification_metrics(
        jnp.asarray(logits, jnp.float32), jnp.asarray(labels)
    )
    return {name: np.asarray(value) for name, value in values.items()}


@pytest.mark.slow
def test_top1_and_top5():
    logits = np.tile(np.arange(8.0), (8, 1))  # class 7 has the largest logit
    values = metrics_of(logits, np.arange(8))
    assert values["top1"].tolist() == [0, 0, 0, 0, 0, 0, 0, 1]
    assert values["top5"].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    # With five classes, the top-5 accuracy would always be 1.
    for num_classes, names in ((5, {"loss", "top1"}), (6, {"loss", "top1", "top5"})):
        assert metrics_of(logits[:, :num_classes], [0] * 8).keys() == names


def test_equal_logits_rank_by_class_index():
    values = metrics_of(np.zeros((8, 8)), np.arange(8))
    assert values["top1"].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert values["top5"].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]


@pytest.mark.slow
def test_cross_entropy_is_not_smoothed_in_evaluation():
    logits = np.log([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])
    values = metrics_of(logits, [0, 1])
    assert_allclose(values["loss"], [-np.log(0.5), -np.log(0.2)], rtol=1e-6)


def test_average_precision_equals_scikit_learn():
    """The scores of some classes have ties.

    A class that contains all images has an average precision of 1, a class without
    images NaN. The order of the images has no effect.
    """
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
    reordered = multi_label.average_precision(scores[order], labels[order])
    assert_allclose(reordered, found, rtol=1e-15)
    mean = multi_label.mean_average_precision(scores, labels)
    assert mean == pytest.approx(expected.mean())
    assert multi_label.mean_average_precision(scores, np.zeros((300, 6))) == 0


def test_class_table_with_several_labels_per_image():
    logits = np.array([[2.0, -1.0, 3.0], [0.0, 1.0, -3.0], [-1.0, -2.0, -2.0]])
    labels = np.array([[1, 1, 0], [0, 1, 0], [1, 0, 0]])
    rows = multi_label.class_table("abc", logits, labels)
    assert [[*row.values()] for row in rows] == [
        ["a", 2, 2, 1, "0.500000", "0.500000", "0.833333"],
        ["b", 2, 1, 1, "0.500000", "1.000000", "1.000000"],
        ["c", 0, 1, 0, "", "0.000000", ""],
    ]


def test_binary_cross_entropy_is_averaged_over_classes():
    """The test includes soft targets, a logit of 200 and class weights."""
    logits = np.array([[0.0, 2.0], [-1.0, 200.0]])
    targets = np.array([[1.0, 0.0], [0.25, 1.0]])
    found = multi_label_metrics(jnp.float32(logits), jnp.float32(targets))["loss"]
    expected = np.logaddexp(0, logits) - targets * logits
    assert_allclose(found, expected.mean(1), rtol=1e-6)
    weights = np.float32([0.5, 3])
    found = multi_label_metrics(jnp.float32(logits), jnp.float32(targets), weights)
    assert_allclose(found["loss"], (expected * weights).mean(1), rtol=1e-6)


DATASET = DatasetInfo({"train": 60}, tuple("abc"), class_counts=(40, 15, 5))


def test_balanced_class_weights_are_inverse_to_the_counts():
    """A class with k of n training images has weight n / (k * classes).

    An output without training images has weight 0 and does not count as a class.
    """
    expected = [60 / (3 * 40), 60 / (3 * 15), 60 / (3 * 5)]
    found = class_weights("balanced", DATASET, 4)
    assert_allclose(found, [*expected, 0], rtol=1e-6)
    assert_allclose(found[:3] @ DATASET.class_counts, 60, rtol=1e-6)
    assert class_weights("balanced", DatasetInfo({"test": 5}), 4) is None


def test_class_weights_must_be_one_number_per_class():
    assert class_weights("1, 0,2.5", DATASET, 3).tolist() == [1, 0, 2.5]
    bad = "1,2", "1,2,x", "1,2,-1", "0,0,0", "1,2,nan", "1,2,inf", "1,2,1e39", "equal"
    for text in bad:
        with pytest.raises(ConfigError, match="expected 'balanced', or 3 numbers"):
            class_weights(text, DATASET, 3)
    with pytest.raises(ConfigError, match="one label per image before"):
        class_weights("balanced", DatasetInfo({"train": 5}), 3)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["", "1,0.5,3"])
def test_class_weights_scale_the_loss_of_each_target(text):
    """The loss of an example is -sum(weight * target * log probability)."""
    config = mini_runs.classifier(model__num_classes=3, class_weights=text)
    task = Classification(config, DATASET)
    logits = np.random.RandomState(0).randn(4, 3)
    targets = np.array([[1, 0, 0], [0, 0.7, 0.3], [0.1, 0.1, 0.8], [0, 1, 0]])
    task.augment_with_targets = lambda batch, keys: (None, jnp.asarray(targets))
    keys = rng.step_keys(0, "train", 0, 4)
    batch = {"label": jnp.array([0, 1, 2, 1])}
    values = task.loss(lambda x, drop_path_keys: jnp.asarray(logits), None, batch, keys)
    weights = np.array([1, 0.5, 3]) if text else np.ones(3)
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -(targets * weights * log_probabilities).sum(1)
    assert_allclose(values["loss"], expected, rtol=1e-5)
