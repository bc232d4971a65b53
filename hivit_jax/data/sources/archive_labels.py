"""Labels of images in archives: read, check, and convert to numbers or vectors.

An index of an archive contains each image's class indices as text, separated by ``;``.
The text ``;`` stands for an image that is labeled with no class, and the empty text for
an image without a label.
"""

import json
import os
from collections.abc import Sequence
from itertools import chain

import numpy as np

from hivit_jax.data.records import Index
from hivit_jax.data.sources.base import SEPARATOR, multi_hot, split_labels
from hivit_jax.errors import DataError

UNLABELED = b""


def text_label(text: str) -> bytes | None:
    """Return the label in a text such as ``3`` or ``0;2``; None for other texts."""
    return _join(split_labels(text)) if text.strip() else None


def json_label(data: bytes) -> bytes | None:
    """Return the label of a JSON object; None if it has no valid label.

    The label is the value of the key "label", a class index or a list of class indices.
    """
    try:
        label = json.loads(data)["label"]
    except (ValueError, TypeError, LookupError):
        return None
    numbers = label if isinstance(label, list) else [label]
    if not all(type(number) is int for number in numbers):
        return None
    return _join([*map(str, numbers)])


def _join(texts: Sequence[str]) -> bytes | None:
    """Join class indices, or return None if one of the texts is not a class index."""
    if not all(text.isdecimal() for text in texts):
        return None
    return (SEPARATOR.join(str(int(text)) for text in texts) or SEPARATOR).encode()


def check_labels(index: Index, files: Sequence[str], multi_label: bool) -> None:
    """Check the labels of an index; see `Archives._index`.

    Raises:
      DataError: some images have no label although others have one, or the labels
        contradict `multi_label`.
    """

    def name(i):
        return f"{files[index['files'][i]]}: {os.fsdecode(index['names'][i])}"

    labels = index["labels"]
    unlabeled = labels == UNLABELED
    if unlabeled.any() and not unlabeled.all():
        first = np.argmax(unlabeled)
        raise DataError(
            f"{name(first)} has no label, but other images have labels; add the label, "
            "or remove all labels"
        )
    if multi_label and unlabeled.all():
        raise DataError(
            f"data.multi_label=True: expected class indices as labels in {files[0]}, "
            "found none\n"
            "If the labels are class names, unpack the images and list them with their "
            "class names in a CSV file for data.name=csv"
        )
    has_separator = np.char.find(labels, SEPARATOR.encode()) >= 0
    if has_separator.any() and not multi_label:
        first = np.argmax(has_separator)
        raise DataError(
            f"{name(first)} has the label {labels[first].decode()!r}; set "
            f"data.multi_label=True for several labels, separated by {SEPARATOR!r}"
        )


def to_numbers(labels: np.ndarray) -> np.ndarray:
    """Return the class index of each image, int64 [n]; -1 if it has no label."""
    return np.where(labels == UNLABELED, b"-1", labels).astype(np.int64)


def to_vectors(labels: np.ndarray, train_labels: np.ndarray) -> np.ndarray:
    """Return vectors of 0 and 1 for images with several labels, uint8 [n, classes].

    Args:
      labels: labels of a split.
      train_labels: labels of the training split; the largest is the last class.

    Raises:
      LabelError: a label is larger than all labels of the training split.
    """
    indices, train_indices = (
        [[*map(int, split_labels(text.decode()))] for text in texts]
        for texts in (labels, train_labels)
    )
    num_classes = 1 + max(chain.from_iterable(train_indices), default=-1)
    return np.stack([multi_hot(numbers, num_classes) for numbers in indices])
