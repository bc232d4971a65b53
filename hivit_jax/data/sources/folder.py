"""Sources of image files: one directory per class, or images without labels."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hivit_jax.data import storage
from hivit_jax.data.records import Records
from hivit_jax.data.sources.base import Record, Source
from hivit_jax.data.sources.file_index import (
    ARRAY_SUFFIX,
    HIDDEN,
    OUTSIDE,
    SUFFIXES,
    SYSTEM_NAMES,
    forget_listings,
    ignored_reason,
    index_of,
    is_directory,
    is_hidden,
    subdirectories,
)
from hivit_jax.data.sources.layout import describe_content
from hivit_jax.data.sources.splits import NO_EVALUATION, FileSource, parse_slice
from hivit_jax.errors import ConfigError, DataError
from hivit_jax.paths import expand
from hivit_jax.progress import Progress

__all__ = ["HIDDEN", "OUTSIDE", "SYSTEM_NAMES", "Folder", "Images", "is_hidden"]
FOLDER_SPLITS = "train", "val"  # default names of the splits


class Images(Source):
    """Images without labels: one file, or all files below a directory, sorted.

    Hidden and system names (`is_hidden`) below the directory are ignored. NumPy files
    count as images only if there are no other images.

    Args:
      path: image file or directory.
      classes: class names of the model.

    Raises:
      DataError: there is no image.
    """

    def __init__(self, path: str | Path, classes: Sequence[str] = ()):
        path, self.classes = Path(expand(path)), classes
        files = [path]
        if not path.is_file():
            entries = Progress(f"listing {path}", 0, "files").track(path.rglob("*"))
            files = sorted(entry for entry in entries if entry.is_file())
        self._files, self.ignored = _select(path, files, SUFFIXES)
        if not self._files and ARRAY_SUFFIX in self.ignored:
            self._files, self.ignored = _select(path, files, (ARRAY_SUFFIX,))
        if not self._files:
            raise _no_images(path, self.ignored_text())

    def __len__(self) -> int:
        return len(self._files)

    def sample(self, index: int) -> dict[str, Any]:
        return {"image": self._files[index].read_bytes()}

    def name(self, index: int) -> str:
        return str(self._files[index])


def _select(
    root: Path, files: Sequence[Path], suffixes: Sequence[str]
) -> tuple[list[Path], Counter[str]]:
    """Return the images among the files below `root`, and counts of the other files."""
    images, ignored = [], Counter()
    for file in files:
        hidden = any(map(is_hidden, file.relative_to(root).parts))
        reason = HIDDEN if hidden else ignored_reason(file.name.lstrip("."), suffixes)
        if reason:
            ignored[reason] += 1
        else:
            images.append(file)
    return images, ignored


class Folder(FileSource):
    """Class folders ``ROOT/{train,val}/CLASS/*.JPEG``, as in torchvision's ImageFolder.

    The sorted class directories of the training split are the classes of every split.
    The images of a split are the sorted files below its class directories. Hidden and
    system names (`is_hidden`) are ignored at every level. The index of local files is
    cached on disk until a directory changes. A bucket is listed at every start.

    If the training split contains images but no directory, or with
    ``class_level="none"``, the images have no labels: `labeled` is False, and all
    images of a split are used.

    Args:
      directory: ROOT, a directory or its address in a bucket.
      split, train_split: names of directories in ROOT, or "." for ROOT itself.
      class_level: the classes. "top": the directories of a split; "leaf": every
        directory below a split that contains images, named by its path; "none": there
        are no classes.

    Raises:
      DataError: the split does not exist, a class has no images, or a class is not in
        the training split.
    """

    def __init__(
        self,
        directory: str,
        split: str,
        train_split: str = "train",
        class_level: str = "top",
    ):
        forget_listings()
        remote = storage.is_remote(directory)
        root = directory.rstrip("/") if remote else str(Path(expand(directory)))
        self.root, train_root = (
            root if name == "." else f"{root}/{name}" for name in (split, train_split)
        )
        for path in (train_root, self.root):
            if not is_directory(path):
                raise _no_directory(path, directory)
        if class_level == "top" and not subdirectories(train_root):
            class_level = "none"
        index = index_of(self.root, class_level)
        pairs = zip(index["reasons"].tolist(), index["ignored"].tolist(), strict=True)
        self.ignored = dict(pairs)
        self.loose = [os.fsdecode(name) for name in index["loose"].tolist()]
        self._files, names = index["files"], index["classes"].tolist()
        empty = [name for name, n in zip(names, index["counts"], strict=True) if not n]
        if class_level == "none":
            self.labeled, self.classes = False, names
        elif class_level == "leaf":
            self.classes = index_of(train_root, "leaf")["classes"].tolist()
        else:
            self.classes = subdirectories(train_root)
        unknown = sorted(set(names) - set(self.classes))
        if unknown:
            raise DataError(
                f"{self.root}/{unknown[0]}: expected one of the {len(self.classes)} "
                f"classes of {train_split}; found {len(unknown)} unknown in {split}"
            )
        if empty or not len(self._files):
            path = "/".join([self.root, *filter(None, empty[:1])])
            raise DataError(
                f"{_no_images(path, self.ignored_text())}\nExpected images in "
                f"data.dir={directory!r} as in docs/own_images.md, such as CLASS/1.jpg"
            )
        labels = np.array([self.classes.index(name) for name in names], np.int32)
        self.labels = np.repeat(labels, index["counts"])
        self.classes = self.classes if self.labeled else ()
        self._records = Records(_Paths(self.root, self._files))

    def __len__(self) -> int:
        return len(self._files)

    def ask(self, index: int) -> None:
        self._records.ask(index)

    def forget(self) -> None:
        self._records.forget()

    def sample(self, index: int) -> dict[str, Any]:
        return {"image": self._records.read(index), "label": int(self.labels[index])}

    def record(self, index: int) -> Record | None:
        if storage.is_remote(self.root):
            return None
        return Record(self._records.file(index), 0, -1, int(self.labels[index]))

    def _image_file(self, index: int) -> Any:
        if storage.is_remote(self.root):
            return super()._image_file(index)
        return self._records.file(index)

    def name(self, index: int) -> str:
        return self._records.file(index)

    def relative_paths(self) -> list[str]:
        return [os.fsdecode(file) for file in self._files.tolist()]


def folder_splits(
    directory: str, train_split: str, eval_split: str, has_eval_split: bool
) -> tuple[str, str]:
    """Return the names of the training and evaluation split of class folders.

    Args:
      has_eval_split: False if evaluation images are held out of the training split, or
        there are none. The default training split is then `directory` itself, unless
        `directory` contains a directory "train".
    """
    train_default, eval_default = FOLDER_SPLITS
    if not has_eval_split:
        eval_split = ""
        if not is_directory(f"{directory}/{train_default}"):
            train_default = "."
    return train_split or train_default, eval_split or eval_default


def check_workdir(workdir: str, data: Mapping[str, Any]) -> None:
    """Raise ConfigError if a run would write below a split of a folder dataset.

    Args:
      workdir: directory of the run.
      data: the `data` section of a config.
    """
    directory = expand(data["dir"])
    is_remote = any(map(storage.is_remote, (directory, workdir)))
    if data["name"] != "folder" or not directory or is_remote:
        return
    has_eval_split = data["eval_split"] != NO_EVALUATION and not data["eval_fraction"]
    options = data["train_split"], data["eval_split"], has_eval_split
    workdir = Path(workdir).resolve()
    for split in folder_splits(directory, *options):
        searched = Path(directory, parse_slice(split)[0]).resolve()
        if searched in (workdir, *workdir.parents):
            raise ConfigError(
                f"--workdir={workdir} is in the directory of images {searched}, where "
                "its subdirectories would count as classes; choose a --workdir outside"
            )


class _Paths:
    """Sequence of paths, which are stored as bytes relative to `root`."""

    def __init__(self, root: str, files: np.ndarray):
        self._root, self._files = root, files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> str:
        return f"{self._root}/{os.fsdecode(self._files[index])}"


def _no_directory(required: str, directory: str) -> DataError:
    return DataError(
        f"no directory {required}; {describe_content(directory)}\n"
        "Expected train/CLASS/1.jpg and val/CLASS/1.jpg, or other directories in "
        "data.train_split and data.eval_split. Or set\ndata.eval_fraction=0.1 to hold "
        "out images, or data.eval_split=none to train without evaluation; then "
        "data.dir itself may contain the classes or images."
    )


def _no_images(path: str | Path, ignored: str) -> DataError:
    expected = f"expected files that end in {', '.join(SUFFIXES)}"
    ignored = ignored and f"\nIgnored files: {ignored}"
    return DataError(f"{path}: {expected}; found none{ignored}")
