"""Folders of images, with a directory for each class or without labels."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hivit_jax.data.sources.base import Source
from hivit_jax.errors import DataError

INDEX = ("classes", "counts", "files")  # of a class folder, cached
FORMATS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class Images(Source):
    """Images without labels: a file, or all files of a directory of any depth, sorted.

    Raises:
      DataError: no image there.
    """

    def __init__(self, path: str | Path, classes: Sequence[str] = ()):
        path, self.classes = Path(path).expanduser(), classes
        found = [path] if path.is_file() else sorted(path.rglob("*"))
        self._files = [f for f in found if f.suffix.lower() in FORMATS and f.is_file()]
        if not self._files:
            raise DataError(
                f"{path}: no image; expected files that end in {', '.join(FORMATS)}"
            )

    def __len__(self) -> int:
        return len(self._files)

    def sample(self, index: int) -> dict[str, Any]:
        return {"image": self._files[index].read_bytes()}

    def name(self, index: int) -> str:
        return str(self._files[index])


class Folder(Source):
    """Class folders, ``ROOT/{train,val}/CLASS/*.JPEG``, as torchvision reads them.

    Classes are the sorted directories of the train split, for every split; images the
    sorted files below them. The index is cached until a directory changes.

    Raises:
      DataError: no such split, a class without images, a class that is not in train.
    """

    def __init__(self, directory: str, split: str, train_split: str = "train"):
        root = Path(directory).expanduser()
        self._root = root / split
        for needed in (root / train_split, self._root):
            if not needed.is_dir():
                found = sorted(p.name for p in root.iterdir()) if root.is_dir() else []
                raise DataError(
                    f"no directory {needed}; in data.dir={str(root)!r} there is "
                    f"{', '.join(found[:8]) or 'nothing'}"
                )
        self.classes = _directories(root / train_split)
        index = _index(self._root)
        self._files, found = index["files"], index["classes"].tolist()
        strange = sorted(set(found) - set(self.classes))
        if strange:
            raise DataError(
                f"{self._root / strange[0]}: {len(strange)} of the classes of {split} "
                f"are not in {train_split}, which has {len(self.classes)}"
            )
        empty = [name for name, n in zip(found, index["counts"], strict=True) if not n]
        if empty or not found:
            raise DataError(
                f"{self._root.joinpath(*empty[:1])}: no image; expected files that end "
                f"in {', '.join(FORMATS)}"
            )
        numbers = np.array([self.classes.index(name) for name in found], np.int32)
        self.labels = np.repeat(numbers, index["counts"])

    def __len__(self) -> int:
        return len(self._files)

    def sample(self, index: int) -> dict[str, Any]:
        with open(self.name(index), "rb", buffering=0) as file:
            return {"image": file.read(), "label": int(self.labels[index])}

    def _open(self, index: int) -> str:
        return self.name(index)

    def name(self, index: int) -> str:
        return f"{self._root}/{os.fsdecode(self._files[index])}"


def _directories(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def _index(root: Path) -> dict[str, np.ndarray]:
    """What a split's directory holds, from the user's cache if nothing has changed.

    Returns:
      classes: names, str [k]; counts: images of each, int [k]; files: path of every
      image, bytes [n].
    """
    cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    key = hashlib.sha256(os.fsencode(root.absolute())).hexdigest()[:16]
    path = cache_dir / "hivit_jax" / f"{key}.npz"
    try:
        with np.load(path) as found:
            if (_times(found["directories"]) == found["times"]).all():
                return {name: found[name] for name in INDEX}
    except (OSError, ValueError, KeyError):
        pass  # none, of directories that are gone, of another version, or damaged
    classes, counts, files, directories = _directories(root), [], [], [root]
    for name in classes:
        before = len(files)
        for directory, _, names in sorted(os.walk(root / name, followlinks=True)):
            directories.append(directory)
            images = [n for n in sorted(names) if n.lower().endswith(FORMATS)]
            inside = os.path.relpath(directory, root)
            files += [os.fsencode(os.path.join(inside, n)) for n in images]
        counts.append(len(files) - before)
    directories = np.array([os.fsencode(d) for d in directories], "S")
    index = {
        "classes": np.array(classes, "U"),
        "counts": np.array(counts, np.int64),
        "files": np.array(files, "S"),
        "directories": directories,
        "times": _times(directories),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(temporary, **index)
        temporary.replace(path)
    except OSError:
        pass  # it is only slower next time
    return index


def _times(directories: np.ndarray) -> np.ndarray:
    return np.array([os.stat(d).st_mtime_ns for d in directories.tolist()])
