"""Checks of labels, and labels in the order of a trained model's class names."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hivit_jax.data.sources.base import (
    DerivedSource,
    LabelError,
    Record,
    Source,
    label_vector,
)
from hivit_jax.errors import ConfigError
from hivit_jax.progress import listed

MAX_LISTED_CLASSES = 5  # class names that an error or a note lists


class Relabeled(DerivedSource):
    """The examples of another source with the labels of another list of classes.

    Args:
      source: the other source.
      classes: class names in the order of the new labels.
      new_labels: new label of each class of `source`, int64 [k]; -1: none, which
        requires that the class has no image.
    """

    def __init__(self, source: Source, classes: Sequence[str], new_labels: np.ndarray):
        super().__init__(source)
        self.classes, self._new_labels = tuple(classes), new_labels
        # Empty, because `record` returns no tf.train.Example records: they contain the
        # old labels.
        self.example_keys = ()
        if self.labels is not None:
            labels = np.asarray(self.labels)
            if labels.ndim == 2:
                self.labels = self._relabel_vectors(labels)
            else:  # an invalid label becomes -1; `sample` raises an error for it
                valid = (labels >= 0) & (labels < len(new_labels))
                self.labels = np.where(valid, new_labels[labels * valid], -1)

    def sample(self, index: int) -> dict[str, Any]:
        sample = super().sample(index)
        if "label" not in sample:
            return sample
        label, count = np.asarray(sample["label"]), len(self._new_labels)
        if label.ndim:
            vector = label_vector(label, count)
            return sample | {"label": self._relabel_vectors(vector)}
        if not 0 <= label < count:
            raise LabelError(f"expected a label from 0 to {count - 1}, found {label}")
        return sample | {"label": int(self._new_labels[label])}

    def _relabel_vectors(self, vectors: np.ndarray) -> np.ndarray:
        """Move the columns of labels [..., k] to their new places: [..., classes]."""
        new = np.zeros((*vectors.shape[:-1], len(self.classes)), np.uint8)
        used = self._new_labels >= 0
        new[..., self._new_labels[used]] = vectors[..., used]
        return new

    def record(self, index: int) -> Record | None:
        record = super().record(index)
        if record is None or self._source.example_keys:
            return None
        return record._replace(label=int(self._new_labels[record.label]))


def require_labels(data: Any, source: Source) -> None:
    """Raise ConfigError if the images of a source have no labels.

    Args:
      data: the `data` section of a config.
    """
    if not source.labeled:
        raise ConfigError(
            f"data.name={data.name!r}, data.dir={data.dir!r}: the images have no "
            "labels; expected a directory per class, or one label per image, for "
            "classification\n"
            "Pretraining uses images without labels; see docs/own_images.md"
        )


def match_classes(source: Source, classes: Sequence[str], directory: str) -> Source:
    """Return a source whose labels refer to the class names of a trained model.

    Classes are matched by name. If the model lacks the name of a class with images, the
    labels stay unchanged in two cases: if the source's class names are numbers, or if
    the model's class names are numbers and both have the same number of classes. A
    source without labels is returned unchanged.

    Args:
      classes: class names of the model.
      directory: `data.dir`, for the error.

    Raises:
      ConfigError: images belong to a class that the model does not have, and neither
        of the two cases applies.
    """
    names = [*source.classes]
    if not names or not source.labeled or names == [*classes]:
        return source
    label_of = {name: label for label, name in enumerate(classes)}
    new_labels = np.array([label_of.get(name, -1) for name in names])
    unknown = [names[k] for k in np.flatnonzero(_occurs(source) & (new_labels < 0))]
    if unknown:
        same_count = len(names) == len(classes)
        if not is_numbered(names) and not (is_numbered(classes) and same_count):
            raise ConfigError(
                f"data.dir={directory!r}: the model has no class {unknown[0]!r}; "
                f"expected its {len(classes)} classes "
                f"{listed(classes, MAX_LISTED_CLASSES)}; found {len(unknown)} unknown\n"
                "Rename the class as in the training's dataset, or leave its images out"
            )
        new_labels = np.arange(len(names))
        if len(names) > len(classes):
            return source  # the task refuses datasets with more classes than the model
    return Relabeled(source, classes, new_labels)


def is_numbered(classes: Sequence[str]) -> bool:
    """Return True if the class names are "0", "1", ..., the labels themselves."""
    return all(name == str(label) for label, name in enumerate(classes))


def _occurs(source: Source) -> np.ndarray:
    """Return True for the classes of a source that have images, bool [classes].

    Without known labels, every class counts.
    """
    labels, count = np.asarray(source.labels), len(source.classes)
    if source.labels is None:
        return np.ones(count, bool)
    if labels.ndim == 2:
        return labels.any(0)
    return np.isin(np.arange(count), labels)
