"""Closed-form probe: ridge regression on the features of a pretrained encoder."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from hivit_jax import inputs
from hivit_jax.reporting import console
from hivit_jax.reporting.classes import MIN_TOP5_CLASSES
from hivit_jax.tasks import probing

# Candidate penalties. The same values suit all datasets, because the error is a mean
# over the images and features have variance 1.
PENALTIES = tuple(10.0 ** (k / 2) for k in range(-16, 7))
DEFAULT_PENALTY = 0.1  # used if no image can be held out
CHUNK_SIZE = 4096  # maximum number of images that are converted to float64 at a time


def closed_form_probe(
    config: Any, heartbeat: Callable[[], None] = lambda: None
) -> dict[str, float | int]:
    """Fit a linear classifier in closed form, evaluate it and log the accuracy.

    The features of an image are the tokens of the last stage of the encoder in
    `config.init_from`, averaged over the units. Every image of both splits is encoded
    once, transformed as in evaluation. The penalty is the value in `PENALTIES` with the
    best accuracy on held-out training images. The host computes the classifier from all
    training images in float64, without random numbers.

    Args:
      heartbeat: called after every encoded batch.

    Returns:
      Fractions eval/top1 and, with at least `MIN_TOP5_CLASSES` classes, eval/top5;
      numbers of test images eval/count and eval/unreadable; probe/penalty;
      probe/held_out_top1, NaN if no image could be held out.

    Raises:
      DataError: more images are unreadable than `data.max_unreadable` allows.
    """
    config, mesh = probing.fit_to_devices(config)
    task = inputs.make_task(config, "train", "test")
    encode = probing.make_encoder(config, task, mesh, normalize=False)
    train, test = (
        probing.encode_split(config, encode, mesh, split, heartbeat)
        for split in ("train", "test")
    )
    num_classes = max(len(task.data.classes), int(train[1].max()) + 1)
    console.log(f"fitting a linear classifier to {len(train[1]):,} images ...")
    penalty, held_out_top1 = select_penalty(*train, num_classes)
    top1, top5 = fit(*train, num_classes).accuracy(*test, penalty)
    count = len(test[1])
    values = {"eval/top1": top1, "eval/top5": top5, "eval/count": count}
    if num_classes < MIN_TOP5_CLASSES:
        del values["eval/top5"]
    values["eval/unreadable"] = task.data.counts["test"] - count
    console.log(console.eval_line(f"probe  penalty {penalty:g}", values))
    return values | {"probe/penalty": penalty, "probe/held_out_top1": held_out_top1}


class Ridge(NamedTuple):
    """Ridge regression from features to one-hot targets, fitted for any penalty.

    The eigenvectors of the features' correlation matrix are computed once. The weights
    for each penalty then need only one matrix product.

    Attributes:
      mean, scale: mean and standard deviation of each feature, float64 [D].
      eigenvalues, eigenvectors: of the correlation matrix, [D] and [D, D].
      projections: eigenvectors.T @ (standardized features.T @ one-hot targets / number
        of images), [D, classes].
      frequencies: fraction of the images in each class, [classes]; the intercepts of
        the regression.
    """

    mean: np.ndarray
    scale: np.ndarray
    eigenvalues: np.ndarray
    eigenvectors: np.ndarray
    projections: np.ndarray
    frequencies: np.ndarray

    def weights(self, penalty: float) -> np.ndarray:
        """Return the weights of standardized features, [D, classes].

        They minimize the mean squared error plus `penalty` times their squared norm.
        """
        shrunk = self.projections / (self.eigenvalues + penalty)[:, None]
        return self.eigenvectors @ shrunk

    def accuracy(
        self, features: np.ndarray, labels: np.ndarray, penalty: float
    ) -> tuple[float, float]:
        """Return the top-1 and top-5 accuracy.

        Among classes with equal scores, the one with the lowest index ranks first.
        """
        weights, correct = self.weights(penalty), np.zeros(2, np.int64)
        for part in _chunks(len(labels)):
            x, true = (features[part] - self.mean) / self.scale, labels[part, None]
            scores = x @ weights + self.frequencies
            true_scores = np.take_along_axis(scores, true, 1)
            ties = (scores == true_scores) & (np.arange(scores.shape[1]) < true)
            rank = ((scores > true_scores) | ties).sum(1)
            correct += [(rank < 1).sum(), (rank < 5).sum()]
        top1, top5 = (correct / max(len(labels), 1)).tolist()
        return top1, top5


def fit(features: np.ndarray, labels: np.ndarray, num_classes: int) -> Ridge:
    """Fit the regression to features, float32 [n, D], and labels, int [n]."""
    count, dim = features.shape
    mean = features.mean(0, dtype=np.float64)
    covariance, cross_covariance = np.zeros((dim, dim)), np.zeros((dim, num_classes))
    for part in _chunks(count):
        x = features[part] - mean
        covariance += x.T @ x / count
        cross_covariance += x.T @ np.eye(num_classes)[labels[part]] / count
    scale = np.sqrt(np.diag(covariance))
    scale[scale <= 1e-9 * np.abs(mean)] = 1.0  # constant features
    eigenvalues, vectors = np.linalg.eigh(covariance / np.outer(scale, scale))
    return Ridge(
        mean,
        scale,
        np.maximum(eigenvalues, 0),
        vectors,
        vectors.T @ (cross_covariance / scale[:, None]),
        np.bincount(labels, minlength=num_classes) / count,
    )


def select_penalty(
    features: np.ndarray, labels: np.ndarray, num_classes: int
) -> tuple[float, float]:
    """Return the best penalty, and its accuracy on the held-out images.

    Of equally good penalties, returns the largest. If no image can be held out, returns
    `DEFAULT_PENALTY` and NaN.
    """
    held_out = held_out_images(labels)
    if not held_out.any():
        return DEFAULT_PENALTY, float("nan")
    ridge = fit(features[~held_out], labels[~held_out], num_classes)
    held_out_set = features[held_out], labels[held_out]
    return max(
        ((penalty, ridge.accuracy(*held_out_set, penalty)[0]) for penalty in PENALTIES),
        key=lambda pair: (pair[1], pair[0]),
    )


def held_out_images(labels: np.ndarray) -> np.ndarray:
    """Return bool [n], True for every fifth image of each class.

    If no class has five images, holds out every second image of each class instead.
    """
    order = np.argsort(labels, kind="stable")
    first = np.searchsorted(labels[order], labels[order])
    position = np.empty(len(labels), np.int64)  # among the images of the same class
    position[order] = np.arange(len(labels)) - first
    period = 5 if (position >= 4).any() else 2
    return position % period == period - 1


def _chunks(count: int) -> Iterator[slice]:
    """Yield slices of up to `CHUNK_SIZE` images, because float64 copies need memory."""
    yield from (
        slice(first, first + CHUNK_SIZE) for first in range(0, count, CHUNK_SIZE)
    )
