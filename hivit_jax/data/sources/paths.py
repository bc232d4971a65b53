"""Source of image files that a user names on the command line."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hivit_jax.data.sources.base import Source
from hivit_jax.data.sources.folder import Images
from hivit_jax.errors import ConfigError
from hivit_jax.paths import expand


class Paths(Source):
    """Image files, and the images below directories (`folder.Images`).

    Images are in the order of the paths, and sorted within a directory. An image is
    labeled if one of its directories has the name of a class. Only the given directory
    and those below it count; for a given file, only its own directory.

    Args:
      paths: files and directories.
      classes: class names of the model.
      directory_classes: if no image is labeled by `classes`, the classes are instead
        the immediate subdirectories of the given directories, if they contain images.

    Attributes:
      labels: int32 [n], -1 where the class is unknown. Samples contain no labels,
        because the classes may differ from those of the model.

    Raises:
      ConfigError: a path does not exist.
      DataError: a directory contains no image.
    """

    def __init__(
        self,
        paths: Iterable[str | Path],
        classes: Sequence[str] = (),
        directory_classes: bool = False,
    ):
        self.classes, ignored = tuple(classes), Counter()
        self._files: list[str] = []
        label_of, labels = {name: k for k, name in enumerate(self.classes)}, []
        directories: list[str] = []
        for path in (Path(expand(str(each))) for each in paths):
            files = [str(path)]
            if path.is_dir():
                images = Images(path)
                files = [images.name(index) for index in range(len(images))]
                ignored.update(images.ignored)
            elif not path.exists():
                raise ConfigError(f"{path}: no such file or directory")
            self._files += files
            labels += [_label(file, path, label_of) for file in files]
            if directory_classes:
                directories += [_directory_below(path, file) for file in files]
        if any(directories) and max(labels) < 0:
            self.classes = tuple(sorted({*directories} - {""}))
            label_of = {name: k for k, name in enumerate(self.classes)}
            labels = [label_of.get(name, -1) for name in directories]
        self.labels, self.ignored = np.array(labels, np.int32), ignored

    def __len__(self) -> int:
        return len(self._files)

    def sample(self, index: int) -> dict[str, Any]:
        return {"image": Path(self._files[index]).read_bytes()}

    def _image_file(self, index: int) -> str:
        return self._files[index]

    def name(self, index: int) -> str:
        return self._files[index]


def _label(file: str, path: Path, label_of: dict[str, int]) -> int:
    """Return the label of a file by the names of its directories, nearest first.

    The name of a class may consist of several directories, such as ``animals/cat``. The
    label is -1 if no directory has the name of a class.

    Args:
      path: the given file, or the given directory that contains the file.
    """
    top = path.parent if str(path) == file else path
    names = (top.absolute().name, *Path(file).relative_to(top).parts[:-1])
    for end in range(len(names), 0, -1):
        for start in range(end):
            if (label := label_of.get("/".join(names[start:end]))) is not None:
                return label
    return -1


def _directory_below(path: Path, file: str) -> str:
    """Return the immediate subdirectory of `path` that contains a file; "" if none.

    Args:
      path: the given file, or the given directory that contains the file.
    """
    return "".join(Path(file).relative_to(path).parts[:-1][:1])
