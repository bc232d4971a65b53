"""Image folders, with one directory per class or without labels."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hivit_jax.data.sources.base import Source
from hivit_jax.errors import DataError
from hivit_jax.paths import expand

INDEX_KEYS = ("classes", "counts", "files")
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class Images(Source):
    """Images without labels: one file, or all files below a directory, sorted.

    Raises:
      DataError: there is no image.
    """

    def __init__(self, path: str | Path, classes: Sequence[str] = ()):
        path, self.classes = Path(expand(path)), classes
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        self._files = [f for f in files if f.suffix.lower() in SUFFIXES and f.is_file()]
        if not self._files:
            raise _no_images(path)

    def __len__(self) -> int:
        return len(self._files)

    def sample(self, index: int) -> dict[str, Any]:
        return {"image": self._files[index].read_bytes()}

    def name(self, index: int) -> str:
        return str(self._files[index])


class Folder(Source):
    """Class folders ``ROOT/{train,val}/CLASS/*.JPEG``, as in torchvision's ImageFolder.

    The classes of every split are the sorted directories of the training split. Images
    are the sorted files below them. The index of files is cached on disk until a
    directory changes.

    Args:
      directory: ROOT. `split` and `train_split` are directories in it.

    Raises:
      DataError: the split does not exist, a class has no images, or a class is not in
        the training split.
    """

    def __init__(self, directory: str, split: str, train_split: str = "train"):
        root = Path(expand(directory))
        self._root = root / split
        for needed in (root / train_split, self._root):
            if not needed.is_dir():
                names = sorted(p.name for p in root.iterdir()) if root.is_dir() else []
                raise DataError(
                    f"no directory {needed}; data.dir={str(root)!r} contains "
                    f"{', '.join(names[:8]) or 'nothing'}\n"
                    "Correct data.dir, data.train_split or data.eval_split."
                )
        self.classes = _subdirectories(root / train_split)
        index = _index(self._root)
        self._files, names = index["files"], index["classes"].tolist()
        unknown = sorted(set(names) - set(self.classes))
        if unknown:
            raise DataError(
                f"{self._root / unknown[0]}: expected one of the {len(self.classes)} "
                f"classes of {train_split}; found {len(unknown)} unknown in {split}"
            )
        empty = [name for name, n in zip(names, index["counts"], strict=True) if not n]
        if empty or not names:
            raise _no_images(self._root.joinpath(*empty[:1]))
        labels = np.array([self.classes.index(name) for name in names], np.int32)
        self.labels = np.repeat(labels, index["counts"])

    def __len__(self) -> int:
        return len(self._files)

    def sample(self, index: int) -> dict[str, Any]:
        with open(self.name(index), "rb", buffering=0) as file:
            return {"image": file.read(), "label": int(self.labels[index])}

    def _image_file(self, index: int) -> str:
        return self.name(index)

    def name(self, index: int) -> str:
        return f"{self._root}/{os.fsdecode(self._files[index])}"


def _no_images(path: Path) -> DataError:
    expected = f"expected files that end in {', '.join(SUFFIXES)}"
    return DataError(f"{path}: {expected}; found none")


def _subdirectories(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def _index(root: Path) -> dict[str, np.ndarray]:
    """Return the index of a split's directory, cached on disk per user.

    The cached index is used if no directory has a new modification time.

    Returns:
      Arrays by name. classes: class names, str [k]. counts: images per class, int [k].
      files: paths of all images relative to `root`, bytes [n].
    """
    cache_dir = Path(expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
    key = hashlib.sha256(os.fsencode(root.absolute())).hexdigest()[:16]
    path = cache_dir / "hivit_jax" / f"{key}.npz"
    try:
        with np.load(path) as cached:
            if (_mtimes(cached["directories"]) == cached["times"]).all():
                return {name: cached[name] for name in INDEX_KEYS}
    except (OSError, ValueError, KeyError):
        pass  # missing or damaged cache, deleted directory, or other cache version
    classes, counts, files, directories = _subdirectories(root), [], [], [root]
    for name in classes:
        before = len(files)
        for directory, _, names in sorted(os.walk(root / name, followlinks=True)):
            directories.append(directory)
            images = [n for n in sorted(names) if n.lower().endswith(SUFFIXES)]
            relative = os.path.relpath(directory, root)
            files += [os.fsencode(os.path.join(relative, n)) for n in images]
        counts.append(len(files) - before)
    directories = np.array([os.fsencode(d) for d in directories], "S")
    index = {
        "classes": np.array(classes, "U"),
        "counts": np.array(counts, np.int64),
        "files": np.array(files, "S"),
        "directories": directories,
        "times": _mtimes(directories),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(temporary, **index)
        temporary.replace(path)
    except OSError:
        pass  # the cache is optional
    return index


def _mtimes(directories: np.ndarray) -> np.ndarray:
    return np.array([os.stat(d).st_mtime_ns for d in directories.tolist()])
