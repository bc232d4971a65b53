"""Accuracy of each class, and the confusion matrix."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

MAX_MATRIX_CLASSES = 1000  # largest number of classes with a confusion matrix
MIN_TOP5_CLASSES = 6  # smallest number of classes with a top-5 accuracy


class ClassCounts:
    """Counts of labeled images by true and predicted class.

    Args:
      names: names of all classes.

    Attributes:
      images: number of images of each true class, int64 [classes].
      predicted: number of images predicted as each class, int64 [classes].
      correct: number of correctly predicted images of each class, int64 [classes].
      matrix: int64 [classes, classes], true x predicted; None for more than
        `MAX_MATRIX_CLASSES` classes.
      in_top5: number of images whose true class is among the five most probable.
    """

    def __init__(self, names: Sequence[str]):
        self.names, count = tuple(names), len(names)
        self.images, self.predicted, self.correct = np.zeros((3, count), np.int64)
        has_matrix = count <= MAX_MATRIX_CLASSES
        self.matrix = np.zeros((count, count), np.int64) if has_matrix else None
        self.in_top5 = 0

    def add(self, labels: np.ndarray, ranked: np.ndarray) -> None:
        """Count images.

        Args:
          labels: true classes, int [n].
          ranked: the k most probable classes in order, int [n, k]; k is at least 5, or
            the number of classes if there are fewer.
        """
        top1 = ranked[:, 0]
        np.add.at(self.images, labels, 1)
        np.add.at(self.predicted, top1, 1)
        np.add.at(self.correct, labels[labels == top1], 1)
        self.in_top5 += int((ranked[:, :5] == labels[:, None]).any(1).sum())
        if self.matrix is not None:
            np.add.at(self.matrix, (labels, top1), 1)

    def metrics(self) -> dict[str, float | int]:
        """Return images, accuracy, balanced_accuracy and, if available, top5.

        The balanced accuracy is the mean recall of the classes that have images. The
        top-5 accuracy requires at least `MIN_TOP5_CLASSES` classes.
        """
        total, present = int(self.images.sum()), self.images > 0
        recalls = self.correct[present] / self.images[present]
        metrics = {
            "images": total,
            "accuracy": float(self.correct.sum()) / total,
            "balanced_accuracy": float(recalls.mean()),
        }
        if len(self.names) >= MIN_TOP5_CLASSES:
            metrics["top5"] = self.in_top5 / total
        return metrics

    def table(self) -> Iterator[dict[str, str | int]]:
        """Yield the `class_row` of each class."""
        columns = zip(
            self.names,
            self.images.tolist(),
            self.predicted.tolist(),
            self.correct.tolist(),
            strict=True,
        )
        yield from (class_row(*values) for values in columns)

    def write_table(self, path: Path) -> None:
        """Write `table` as CSV."""
        write_rows(path, list(self.table()))

    def write_matrix(self, path: Path) -> None:
        """Write the confusion matrix as CSV: a row per true class."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["true class", *self.names])
            for name, row in zip(self.names, self.matrix.tolist(), strict=True):
                writer.writerow([name, *row])


def class_row(
    name: str, images: int, predicted: int, correct: int
) -> dict[str, str | int]:
    """Return the row of a class: counts, recall and precision; "" if undefined."""
    return {
        "class": name,
        "images": images,
        "predicted": predicted,
        "correct": correct,
        "recall": f"{correct / images:.6f}" if images else "",
        "precision": f"{correct / predicted:.6f}" if predicted else "",
    }


def write_rows(path: Path, rows: Sequence[dict[str, str | int]]) -> None:
    """Write rows, which must have equal keys, as a CSV file."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
