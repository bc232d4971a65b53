"""Interface of a dataset source, and facts about a dataset."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hivit_jax.errors import DataError

# `data.name` may also be any other TFDS dataset, or ``module:Class`` for a user's
# subclass of `Source`. The class is called as Class(split, data.dir) with the split
# "train" or "test".
KNOWN_DATASETS = (
    "csv", "digits", "folder", "imagenet2012", "synthetic", "webdataset", "zip"
)  # fmt: skip
SEPARATOR = ";"  # between the labels of an image in a text


class LabelError(DataError):
    """An example has invalid labels."""


@dataclass(frozen=True)
class DatasetInfo:
    """Facts about a dataset that a task depends on.

    Attributes:
      counts: number of examples of each split, "train" and "test".
      classes: class names in the order of the labels.
      encoded: True if examples are read and decoded; False if batches are synthetic.
      class_counts: number of training examples of each class; () if unknown, or if
        the labels are vectors.
    """

    counts: Mapping[str, int]
    classes: tuple[str, ...] = ()
    encoded: bool = True
    class_counts: tuple[int, ...] = ()


class Record(NamedTuple):
    """Position of an example in a local file: a byte range.

    Attributes:
      file: path.
      start, stop: first byte, and byte after the last; stop=-1: the end of the file.
      label: label of an image file; not used if `Source.example_keys` is set.
    """

    file: str
    start: int
    stop: int
    label: int = 0


class Source:
    """One split of a dataset. Several threads call its methods concurrently.

    Attributes:
      classes: class names in the order of the labels.
      ignored: number of ignored files for each reason, such as a file name's ending.
      loose: names of the first ignored images outside of the class directories.
      unmatched: entries of `data.exclude` that match no file of the split.
      labeled: False if the images have no labels; all labels are then 0. With several
        labels per image, an image of no class counts as labeled; its vector is 0.
      labels: label of each example, int [n], or, with several labels per image, vectors
        of 0 and 1, [n, classes]; None: unknown until the examples are read.
      encoded: see `DatasetInfo`.
      example_keys: keys of the image and the label, if records are messages of type
        `tf.train.Example`; (): records are image files.
    """

    classes: Sequence[str] = ()
    ignored: Mapping[str, int] = {}
    loose: Sequence[str] = ()
    unmatched: Sequence[str] = ()
    labeled: bool = True
    labels: Any = None
    encoded: bool = True
    example_keys: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of examples."""
        raise NotImplementedError

    def sample(self, index: int) -> dict[str, Any]:
        """Return an example before decoding.

        An example of an image dataset is {"image": bytes of the file, "label": int}.
        With `data.multi_label`, the label is a vector as returned by `multi_hot`.

        Raises:
          Exception: an error of any type if the example cannot be read.
        """
        raise NotImplementedError

    def ask(self, index: int) -> None:
        """Start reading an example that `sample` will soon return.

        A subclass may leave this method empty.
        """

    def forget(self) -> None:
        """Drop the reads that `ask` started and that `sample` has not returned."""

    def checksum_error(self, index: int) -> str:
        """Return the error if an example does not match its stored checksum, else "".

        Sources without checksums return "".

        Raises:
          Exception: an error of any type if the example cannot be read.
        """
        return ""

    def record(self, index: int) -> Record | None:
        """Return the position of an example, so that TensorFlow can read it directly.

        Returns:
          A whole image file, or a record of a tfrecord file; None if only `sample`
          can read the example.
        """
        return None

    def size(self, index: int) -> tuple[int, int]:
        """Return (height, width) of an image. The result is cached.

        The image is not decoded. If `_image_file` returns a path, only the header of
        the file is read.
        """
        from PIL import Image

        # The cache is created here because a subclass need not call `__init__`.
        # `setdefault` is atomic, so two threads cannot each install their own cache.
        sizes = self.__dict__.setdefault("_sizes", {})
        if index not in sizes:
            with Image.open(self._image_file(index)) as image:
                sizes[index] = image.height, image.width
        return sizes[index]

    def _image_file(self, index: int) -> Any:
        """Return the path or file object from which PIL opens an image."""
        return io.BytesIO(self.sample(index)["image"])

    def name(self, index: int) -> str:
        """Return a name that identifies an example in messages, such as a path."""
        return f"example {index}"

    def class_counts(self) -> tuple[int, ...]:
        """Return the number of examples of each class.

        Returns () if the labels are missing, unknown or vectors. Labels below 0 are not
        counted; the loader raises an error when it reads one.
        """
        labels = np.asarray(self.labels)
        if not self.labeled or labels.ndim != 1 or labels.dtype.kind not in "iu":
            return ()
        labels = labels[labels >= 0]
        return tuple(np.bincount(labels, minlength=len(self.classes)).tolist())

    def ignored_text(self) -> str:
        """Return `ignored` as text, most frequent reason first; "" if it is empty."""
        ordered = sorted(self.ignored.items(), key=lambda item: (-item[1], item[0]))
        parts = [f"{count:,} {reason}" for reason, count in ordered[:8]]
        if others := sum(count for _, count in ordered[8:]):
            parts.append(f"{others:,} for other reasons")
        return ", ".join(parts)


class DerivedSource(Source):
    """Source that reads its examples from another source.

    A subclass overrides `source_index` if its examples have other indices. Its
    `__init__` calls `super().__init__` first and then changes attributes.
    """

    def __init__(self, source: Source):
        self._source = source
        self.classes, self.labels = source.classes, source.labels
        self.labeled, self.encoded = source.labeled, source.encoded
        self.ignored, self.loose = source.ignored, source.loose
        self.unmatched, self.example_keys = source.unmatched, source.example_keys

    def source_index(self, index: int) -> int:
        """Return the index of an example in the other source."""
        return index

    def __len__(self) -> int:
        return len(self._source)

    def sample(self, index: int) -> dict[str, Any]:
        return self._source.sample(self.source_index(index))

    def ask(self, index: int) -> None:
        self._source.ask(self.source_index(index))

    def forget(self) -> None:
        self._source.forget()

    def record(self, index: int) -> Record | None:
        return self._source.record(self.source_index(index))

    def checksum_error(self, index: int) -> str:
        return self._source.checksum_error(self.source_index(index))

    def size(self, index: int) -> tuple[int, int]:
        return self._source.size(self.source_index(index))

    def name(self, index: int) -> str:
        return self._source.name(self.source_index(index))


def split_labels(text: str) -> list[str]:
    """Return the labels in a text such as ``dog;cat``; [] if the text has none."""
    return [name for part in text.split(SEPARATOR) if (name := part.strip())]


def single_label(label: Any) -> int:
    """Return the label of an image unchanged if it is a single number.

    Raises:
      LabelError: the label is a sequence of labels.
    """
    if np.ndim(label):
        raise LabelError(
            f"expected one label per image, found {np.array(label).tolist()}; set "
            "data.multi_label=True for several labels"
        )
    return label


def multi_hot(labels: Sequence[int] | int, num_classes: int) -> np.ndarray:
    """Return a vector, uint8 [num_classes], that is 1 at each label of an image.

    Raises:
      LabelError: a label is out of range.
    """
    given, vector = np.asarray(labels, np.int64), np.zeros(num_classes, np.uint8)
    if ((given < 0) | (given >= num_classes)).any():
        raise LabelError(
            f"expected labels from 0 to {num_classes - 1}, found {given.tolist()}"
        )
    vector[given] = 1
    return vector


def label_vector(label: Any, num_classes: int) -> np.ndarray:
    """Return the vector of an image's labels, extended with 0 to uint8 [num_classes].

    Raises:
      LabelError: the vector is too long, or contains a value other than 0 and 1.
    """
    given = np.array(label)
    if given.ndim != 1 or len(given) > num_classes or not np.isin(given, (0, 1)).all():
        raise LabelError(
            "data.multi_label=True: expected a label vector of zeros and ones, of "
            f"length at most {num_classes}, found {given.tolist()}; multi_hot in "
            "hivit_jax.data.sources.base converts class indices"
        )
    return np.pad(given.astype(np.uint8), (0, num_classes - len(given)))
