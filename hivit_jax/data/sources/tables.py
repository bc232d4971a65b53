"""Source of images that are listed in a CSV file or in a list of paths."""

import csv
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hivit_jax.data.sources.base import SEPARATOR, multi_hot, split_labels
from hivit_jax.data.sources.file_index import SUFFIXES
from hivit_jax.data.sources.layout import describe_content
from hivit_jax.data.sources.splits import FileSource
from hivit_jax.errors import DataError
from hivit_jax.paths import expand
from hivit_jax.progress import listed

PATH_COLUMNS = ("path", "file_name", "filename", "file", "image")
LABEL_COLUMNS = ("label", "class", "class_name", "category")
HINT = (
    "Correct data.dir: expected a CSV file, a list of paths, or a directory with "
    "train.csv and val.csv"
)
# Split -> values of the column "split" that are tried if the config specifies none.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "test": ("val", "valid", "validation", "dev", "eval", "test"),
}


class Columns(NamedTuple):
    """Columns of a table.

    Attributes:
      paths: paths as written.
      labels: names or numbers as written; None: there is no such column.
      splits: names of splits; None: there is no such column.
    """

    paths: list[str]
    labels: list[str] | None
    splits: list[str] | None


class Table(FileSource):
    """Images listed in a file, with or without labels.

    A file that ends in .csv or .tsv has a header. Paths are in a column `path`,
    `file_name`, `filename`, `file` or `image`. Labels may be in a column `label`,
    `class`, `class_name` or `category`, and splits in a column `split`. Any other file
    is a list with a line ``PATH LABEL`` or ``PATH`` per image. Relative paths refer to
    the directory of the file.

    If all labels are non-negative integers, they are class indices, and the class names
    are the numbers up to the largest. Otherwise, the classes are the sorted names. All
    rows of `train_file` determine the classes, whatever their value in the column
    `split`.

    With `multi_label`, the column of labels contains any number of names or numbers per
    image, separated by ``;``. An empty cell means that the image belongs to no class.

    Args:
      file: the file that contains the split.
      train_file: the file of the training split; may be `file`.
      split: "train" or "test"; selects rows if there is a column `split`.
      split_name: value of the column `split` to select; "": one of `SPLIT_NAMES`.
      multi_label: an image has any number of labels.

    Attributes:
      has_splits: True if there is a column `split`.
      labels: int32 [n]; with `multi_label`, uint8 [n, classes] of 0 and 1.

    Raises:
      DataError: a file cannot be read or has no suitable column, no row is selected,
        or a label is not valid.
    """

    def __init__(
        self,
        file: Path,
        train_file: Path,
        split: str,
        split_name: str = "",
        multi_label: bool = False,
    ):
        columns = _read(file)
        train_columns = columns if file == train_file else _read(train_file)
        self.root, self.has_splits = str(file.parent), columns.splits is not None
        self.labeled = train_columns.labels is not None
        chosen = np.arange(len(columns.paths))
        if self.has_splits:
            chosen = _rows_of_split(file, columns.splits, split, split_name)
            others = Counter(columns.splits)
            del others[columns.splits[chosen[0]]]
            self.ignored = {f"of split {name!r}": n for name, n in others.items()}
        if not len(chosen):
            raise DataError(f"{file}: expected at least one image, found none\n{HINT}")
        self._paths = [columns.paths[i] for i in chosen]
        self.labels = np.zeros(len(chosen), np.int32)
        if not self.labeled:
            return
        if columns.labels is None:
            raise DataError(f"{file}: expected labels as in {train_file}, found none")
        train_labels = _labels_of_rows(train_file, train_columns, multi_label)
        self.classes, index_of = _classes(train_file, train_labels)
        texts = [columns.labels[i] for i in chosen]
        if columns is train_columns:
            labels = [train_labels[i] for i in chosen]
        else:
            chosen_columns = Columns(self._paths, texts, None)
            labels = _labels_of_rows(file, chosen_columns, multi_label)
        for path, text, names in zip(self._paths, texts, labels, strict=True):
            if any(name not in index_of for name in names):
                raise DataError(
                    f"{file}: {path} has the label {text!r}; expected one of the "
                    f"{len(self.classes)} classes of {train_file}"
                )
        indices = [[index_of[name] for name in names] for names in labels]
        if multi_label:
            self.labels = np.stack([multi_hot(k, len(self.classes)) for k in indices])
        else:
            self.labels = np.array(indices, np.int32)[:, 0]

    def __len__(self) -> int:
        return len(self._paths)

    def sample(self, index: int) -> dict[str, Any]:
        with open(self._path(index), "rb", buffering=0) as file:
            label = self.labels[index]
            return {"image": file.read(), "label": label if label.ndim else int(label)}

    def _path(self, index: int) -> str:
        return os.path.join(self.root, self._paths[index])

    def _image_file(self, index: int) -> str:
        return self._path(index)

    def name(self, index: int) -> str:
        return self._path(index)

    def relative_paths(self) -> list[str]:
        """Return the normalized paths of the rows. Absolute paths stay absolute."""
        return [os.path.normpath(path) for path in self._paths]


def table_path(location: str, name: str) -> Path:
    """Return the path of the file of a table.

    Args:
      location: `data.dir`: a directory, or the file itself if `name` is "".
      name: path of the file in the directory, or "".

    Raises:
      DataError: there is no such file.
    """
    path = Path(expand(location)) / name
    if not path.is_file():
        raise DataError(
            f"{path}: expected a CSV file or a list of paths; "
            f"{describe_content(location)}\n"
            "Set data.dir=FILE, or data.dir=DIRECTORY with data.train_split=FILE and "
            "data.eval_split=FILE"
        )
    return path


def _read(file: Path) -> Columns:
    """Read a CSV file or a list of paths.

    Raises:
      DataError: the file cannot be read, has no column of paths, or has a row that is
        longer or shorter than the header.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: expected UTF-8 text; {error}\n{HINT}") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if file.suffix.lower() not in (".csv", ".tsv"):
        return _parse_list(lines)
    header = lines[0] if lines else ""
    delimiter = max(",\t;", key=header.count)
    header, *rows = csv.reader(lines, delimiter=delimiter) if lines else [[]]
    index_of = {name.strip().lower(): k for k, name in enumerate(header)}
    for row_number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise DataError(
                f"{file}: expected {len(header)} columns, found {len(row)} in row "
                f"{row_number}"
            )

    def column(names: Sequence[str]) -> list[str] | None:
        found = [index_of[name] for name in names if name in index_of]
        return [row[found[0]].strip() for row in rows] if found else None

    paths = column(PATH_COLUMNS)
    if paths is None:
        raise DataError(
            f"{file}: expected a header with one of the columns "
            f"{', '.join(PATH_COLUMNS)}; found {', '.join(index_of) or 'nothing'}"
        )
    return Columns(paths, column(LABEL_COLUMNS), column(("split",)))


def _parse_list(lines: Sequence[str]) -> Columns:
    """Parse lines ``PATH LABEL``, or ``PATH`` if every line ends in an image suffix."""
    lines = [line.strip() for line in lines]
    if all(line.lower().endswith((*SUFFIXES, ".npy")) for line in lines):
        return Columns(lines, None, None)
    parts = [line.rsplit(None, 1) for line in lines]
    return Columns([p[0] for p in parts], [p[1] if p[1:] else "" for p in parts], None)


def _labels_of_rows(file: Path, columns: Columns, multi_label: bool) -> list[list[str]]:
    """Split each text in the column of labels into the labels of one image.

    Raises:
      DataError: without `multi_label`, a label is empty or contains `SEPARATOR`.
    """
    if multi_label:
        return [split_labels(text) for text in columns.labels]
    for path, text in zip(columns.paths, columns.labels, strict=True):
        if not text:
            raise DataError(
                f"{file}: {path} has no label; expected a label in every row, or no "
                "column of labels; data.multi_label=True allows images of no class"
            )
        if SEPARATOR in text:
            raise DataError(
                f"{file}: {path} has the label {text!r}; set data.multi_label=True "
                f"for several labels, separated by {SEPARATOR!r}"
            )
    return [[text] for text in columns.labels]


def _classes(
    file: Path, labels: Sequence[Sequence[str]]
) -> tuple[list[str], dict[str, int]]:
    """Return the class names, and a dict from a label as written to its class index.

    Raises:
      DataError: no row has a label.
    """
    distinct = {name for image_labels in labels for name in image_labels}
    if not distinct:
        raise DataError(f"{file}: expected a label in at least one row, found none")
    if all(name.isascii() and name.isdigit() for name in distinct):
        numbers = {name: int(name) for name in distinct}
        return [*map(str, range(1 + max(numbers.values())))], numbers
    classes = sorted(distinct)
    return classes, {name: k for k, name in enumerate(classes)}


def _rows_of_split(
    file: Path, splits: Sequence[str], split: str, split_name: str
) -> np.ndarray:
    """Return the indices of the rows of a split, int64 [k].

    Raises:
      DataError: no row has this split.
    """
    names = (split_name,) if split_name else SPLIT_NAMES[split]
    present = [name for name in names if name in splits]
    if not present:
        raise DataError(
            f"{file}: expected rows with the split {' or '.join(names)}; found "
            f"{listed(sorted({*splits}), 8)}"
        )
    return np.flatnonzero(np.array(splits) == present[0])
