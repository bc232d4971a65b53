"""Sources of image files: one directory per class, or images without labels."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hivit_jax.data.sources.base import Record, Source
from hivit_jax.errors import DataError
from hivit_jax.paths import expand

INDEX_KEYS = ("classes", "counts", "files", "reasons", "ignored")  # see `_index`
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Files and directories of operating systems, file servers and Python, in lower case.
SYSTEM_NAMES = {
    "__macosx", "network trash folder", "temporary items",  # macOS
    "$recycle.bin", "system volume information",  # Windows
    "desktop.ini", "thumbs.db", "ehthumbs.db",
    "lost+found", "cachedir.tag", "__pycache__",
    "@eadir", "@recycle", "@__thumb", "#recycle", "#snapshot", "~snapshot",
}  # fmt: skip
HIDDEN, OUTSIDE = "hidden or system", "outside the class directories"


def is_hidden(name: str) -> bool:
    """Return True for a file or directory that is neither an image nor a class."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def ignored_reason(name: str) -> str:
    """Return why a file is ignored: its ending, or `HIDDEN`; "" for an image."""
    ending = os.path.splitext(name)[1].lower()
    if is_hidden(name):
        return HIDDEN
    ending = ending.encode(errors="backslashreplace").decode()  # for the terminal
    return "" if ending in SUFFIXES else ending or "without an ending"


class Images(Source):
    """Images without labels: one file, or all files below a directory, sorted.

    Hidden and system names (`is_hidden`) below the directory are ignored.

    Args:
      path: image file or directory.
      classes: class names of the model.

    Raises:
      DataError: there is no image.
    """

    def __init__(self, path: str | Path, classes: Sequence[str] = ()):
        path, self.classes = Path(expand(path)), classes
        files, self._files, ignored = [path], [], Counter()
        if not path.is_file():
            files = sorted(f for f in path.rglob("*") if f.is_file())
        for file in files:
            parts = file.relative_to(path).parts
            hidden = any(map(is_hidden, parts))
            reason = HIDDEN if hidden else ignored_reason(file.name.lstrip("."))
            if reason:
                ignored[reason] += 1
            else:
                self._files.append(file)
        self.ignored = ignored
        if not self._files:
            raise _no_images(path, self.ignored_text())

    def __len__(self) -> int:
        return len(self._files)

    def sample(self, index: int) -> dict[str, Any]:
        return {"image": self._files[index].read_bytes()}

    def name(self, index: int) -> str:
        return str(self._files[index])


class Folder(Source):
    """Class folders ``ROOT/{train,val}/CLASS/*.JPEG``, as in torchvision's ImageFolder.

    The classes of every split are the sorted directories of the training split. The
    images of a split are the sorted files below its class directories. Hidden and
    system names (`is_hidden`) are ignored at every level. The index of files is cached
    on disk until a directory changes.

    Args:
      directory: ROOT.
      split, train_split: names of directories in ROOT.

    Raises:
      DataError: the split does not exist, a class has no images, or a class is not in
        the training split.
    """

    def __init__(self, directory: str, split: str, train_split: str = "train"):
        root = Path(expand(directory))
        self._root = root / split
        for required in (root / train_split, self._root):
            if not required.is_dir():
                names = sorted(os.listdir(root)) if root.is_dir() else []
                names = [name for name in names if not is_hidden(name)]
                raise DataError(
                    f"no directory {required}; data.dir={str(root)!r} contains "
                    f"{', '.join(names[:8]) or 'nothing'}\n"
                    "Correct data.dir, data.train_split or data.eval_split."
                )
        self.classes = _subdirectories(root / train_split)
        index = _index(self._root)
        pairs = zip(index["reasons"].tolist(), index["ignored"].tolist(), strict=True)
        self.ignored = dict(pairs)
        self._files, names = index["files"], index["classes"].tolist()
        unknown = sorted(set(names) - set(self.classes))
        if unknown:
            raise DataError(
                f"{self._root / unknown[0]}: expected one of the {len(self.classes)} "
                f"classes of {train_split}; found {len(unknown)} unknown in {split}"
            )
        empty = [name for name, n in zip(names, index["counts"], strict=True) if not n]
        if empty or not names:
            raise _no_images(self._root.joinpath(*empty[:1]), self.ignored_text())
        labels = np.array([self.classes.index(name) for name in names], np.int32)
        self.labels = np.repeat(labels, index["counts"])

    def __len__(self) -> int:
        return len(self._files)

    def sample(self, index: int) -> dict[str, Any]:
        with open(self.name(index), "rb", buffering=0) as file:
            return {"image": file.read(), "label": int(self.labels[index])}

    def record(self, index: int) -> Record:
        return Record(self.name(index), 0, -1, int(self.labels[index]))

    def _image_file(self, index: int) -> str:
        return self.name(index)

    def name(self, index: int) -> str:
        return f"{self._root}/{os.fsdecode(self._files[index])}"


def _no_images(path: Path, ignored: str) -> DataError:
    expected = f"expected files that end in {', '.join(SUFFIXES)}"
    ignored = ignored and f"\nIgnored files: {ignored}"
    return DataError(f"{path}: {expected}; found none{ignored}")


def _subdirectories(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        names = [entry.name for entry in entries if entry.is_dir()]
    return sorted(name for name in names if not is_hidden(name))


def _walk(root: Path) -> list[tuple[str, list[str]]]:
    """Return (directory, sorted names of its files) for `root` and below, sorted.

    Hidden directories are not entered but returned as files.
    """
    found = []
    for directory, subdirectories, names in os.walk(root, followlinks=True):
        names += filter(is_hidden, subdirectories)
        subdirectories[:] = [name for name in subdirectories if not is_hidden(name)]
        found.append((directory, sorted(names)))
    return sorted(found)


def _index(root: Path) -> dict[str, np.ndarray]:
    """Return the index of a split's directory, cached on disk per user.

    The cached index is used unless the modification time of a directory has changed.

    Returns:
      classes: class names, str [k].
      counts: number of images per class, int [k].
      files: paths of all images relative to `root`, bytes [n].
      reasons: reasons for ignoring files, str [m].
      ignored: number of ignored files per reason, int [m].
    """
    cache_dir = Path(expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
    key = hashlib.sha256(os.fsencode(root.absolute())).hexdigest()[:16]
    path = cache_dir / "hivit_jax" / f"{key}.npz"
    try:
        with np.load(path) as cached:
            if (_mtimes(cached["directories"]) == cached["times"]).all():
                return {name: cached[name] for name in INDEX_KEYS}
    except (OSError, ValueError, KeyError):
        pass  # no cache, damaged or of another version; or a directory was deleted
    classes, counts, files, directories = _subdirectories(root), [], [], [root]
    outside = sorted({*os.listdir(root)} - {*classes})
    ignored = Counter(ignored_reason(name) or OUTSIDE for name in outside)
    for name in classes:
        before = len(files)
        for directory, names in _walk(root / name):
            directories.append(directory)
            relative = os.path.relpath(directory, root)
            for file_name in names:
                if reason := ignored_reason(file_name):
                    ignored[reason] += 1
                else:
                    files.append(os.fsencode(os.path.join(relative, file_name)))
        counts.append(len(files) - before)
    directories = np.array([os.fsencode(d) for d in directories], "S")
    index = {
        "classes": np.array(classes, "U"),
        "counts": np.array(counts, np.int64),
        "files": np.array(files, "S"),
        "reasons": np.array([*ignored], "U"),
        "ignored": np.array([*ignored.values()], np.int64),
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
