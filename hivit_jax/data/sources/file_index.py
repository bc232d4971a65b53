"""Index of the image files below a directory; cached on disk for local files."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from hivit_jax.data import storage
from hivit_jax.paths import cache_directory
from hivit_jax.progress import Progress

INDEX_KEYS = ("classes", "counts", "files", "reasons", "ignored", "loose")
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Names that operating systems, file servers and Python create, in lower case.
SYSTEM_NAMES = {
    "__macosx", "network trash folder", "temporary items",  # macOS
    "$recycle.bin", "system volume information",  # Windows
    "desktop.ini", "thumbs.db", "ehthumbs.db",
    "lost+found", "cachedir.tag", "__pycache__",
    "@eadir", "@recycle", "@__thumb", "#recycle", "#snapshot", "~snapshot",
}  # fmt: skip
ARRAY_SUFFIX = ".npy"
HIDDEN, OUTSIDE = "hidden or system", "outside the class directories"
MAX_LOOSE = 8  # recorded names of images outside of the class directories


def is_hidden(name: str) -> bool:
    """Return True for the name of a hidden or system file or directory."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def ignored_reason(name: str, suffixes: Sequence[str] = SUFFIXES) -> str:
    """Return the reason for ignoring a file, such as its ending; "" for an image."""
    ending = os.path.splitext(name)[1].lower()
    if is_hidden(name):
        return HIDDEN
    # Escapes bytes that are not valid UTF-8, so that the ending can be printed.
    ending = ending.encode(errors="backslashreplace").decode()
    return "" if ending in suffixes else ending or "without an ending"


def subdirectories(root: str | Path) -> list[str]:
    """Return the sorted names of the directories in `root` that are not `is_hidden`.

    Args:
      root: directory, or its address in a bucket.
    """
    if storage.is_remote(root):
        return _bucket_index(str(root), "top", SUFFIXES)["classes"].tolist()
    with os.scandir(root) as entries:
        names = [entry.name for entry in entries if entry.is_dir()]
    return sorted(name for name in names if not is_hidden(name))


def _walk(root: Path, progress: Progress) -> list[tuple[str, list[str]]]:
    """Return (directory, sorted names of its files) for `root` and below, sorted.

    Hidden directories are not entered. Their names are listed with the files.

    Args:
      progress: counter of files.
    """
    found = []
    for directory, children, names in os.walk(root, followlinks=True):
        progress.update(len(names))
        names += filter(is_hidden, children)
        children[:] = [name for name in children if not is_hidden(name)]
        found.append((directory, sorted(names)))
    return sorted(found)


def index_of(root: str, class_level: str) -> dict[str, np.ndarray]:
    """Return the index of a split's directory, cached on disk per user.

    The cached index is used unless the modification time of a directory has changed.
    The index of a bucket is not cached. NumPy files count as images only if there are
    no other images.

    Args:
      root: directory, or its address in a bucket.
      class_level: see `Folder`.

    Returns:
      classes: class names, str [k]; [""] without classes.
      counts: number of images per class, int [k].
      files: paths of all images relative to `root`, bytes [n].
      reasons: reasons for ignoring files, str [m].
      ignored: number of ignored files per reason, int [m].
      loose: names of the first images outside of the class directories, bytes.
    """
    if storage.is_remote(root):
        return _scan_images(partial(_bucket_index, root, class_level))
    root = Path(root)
    identity = os.fsencode(root.absolute())
    identity += b"" if class_level == "top" else b"\0" + class_level.encode()
    key = hashlib.sha256(identity).hexdigest()[:16]
    path = cache_directory() / f"{key}.npz"
    try:
        with np.load(path) as cached:
            if (_mtimes(cached["directories"]) == cached["times"]).all():
                return {name: cached[name] for name in INDEX_KEYS}
    except (OSError, ValueError, KeyError):
        pass  # the cache is missing, damaged or old, or a directory was deleted
    index = _scan_images(partial(_scan, root, class_level))
    index["times"] = _mtimes(index["directories"])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(temporary, **index)
        temporary.replace(path)
    except OSError:
        pass  # the cache is optional
    return index


def _scan_images(
    scan: Callable[[Sequence[str]], dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """Return the index of images or, if there are none, of NumPy arrays.

    Args:
      scan: function from the endings of images to the index.
    """
    index = scan(SUFFIXES)
    if not len(index["files"]) and ARRAY_SUFFIX in index["reasons"]:
        index = scan((ARRAY_SUFFIX,))
    return index


@lru_cache(maxsize=4)
def _list_bucket(root: str) -> list[str]:
    return storage.list_files(root)


def forget_listings() -> None:
    """Drop the cached listings of buckets, so that the buckets are listed again."""
    _list_bucket.cache_clear()


def is_directory(path: str) -> bool:
    """Return True for a directory, or for an address below which there are files."""
    return bool(_list_bucket(path)) if storage.is_remote(path) else Path(path).is_dir()


def _bucket_index(
    root: str, class_level: str, suffixes: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return the index of a split in a bucket; see `index_of` and `_scan`."""
    ignored: Counter[str] = Counter()
    found: dict[str, list[tuple[str, str]]] = {}  # class -> (directory, file name)
    loose = []
    for path in _list_bucket(root):
        directory, _, name = path.rpartition("/")
        parts = directory.split("/")
        if any(map(is_hidden, parts)):
            ignored[HIDDEN] += 1
            continue
        reason = ignored_reason(name, suffixes)
        class_name = {"top": parts[0], "leaf": directory, "none": ""}[class_level]
        if not class_name and class_level != "none":
            ignored[reason or OUTSIDE] += 1
            loose += [] if reason else [name]
        elif reason:
            ignored[reason] += 1
            if class_level == "top":
                # Empty classes are listed, so that the caller can report them.
                found.setdefault(class_name, [])
        else:
            found.setdefault(class_name, []).append((directory, name))
    classes = sorted(found)
    files = [f"{d}/{name}".lstrip("/") for c in classes for d, name in sorted(found[c])]
    return {
        "classes": np.array(classes, "U"),
        "counts": np.array([len(found[name]) for name in classes], np.int64),
        "files": np.array([*map(os.fsencode, files)], "S"),
        "reasons": np.array([*ignored], "U"),
        "ignored": np.array([*ignored.values()], np.int64),
        "loose": np.array([os.fsencode(name) for name in loose[:MAX_LOOSE]], "S"),
    }


def _scan(
    root: Path, class_level: str, suffixes: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return the index of a split's directory, read from the file system.

    Args:
      suffixes: endings of images, in lower case.

    Returns:
      Keys as in `index_of`, and directories: paths of all directories read, bytes.
    """
    classes, counts, files, directories, loose = [], [], [], [root], []
    ignored: Counter[str] = Counter()
    if class_level == "top":
        classes = subdirectories(root)
        outside = sorted({*os.listdir(root)} - {*classes})
        loose = [name for name in outside if not ignored_reason(name, suffixes)]
        ignored.update(ignored_reason(name, suffixes) or OUTSIDE for name in outside)
    tops = [root / name for name in classes] if class_level == "top" else [root]
    progress = Progress(f"listing {root}", 0, "files")
    for top in tops:
        num_before = len(files)
        for directory, names in _walk(top, progress):
            directories.append(directory)
            found = _image_files(root, directory, names, ignored, suffixes)
            if class_level == "leaf" and directory == str(root):
                loose = [os.fsdecode(name) for name in found]
                ignored.update([OUTSIDE] * len(found))
                continue
            files += found
            if class_level == "leaf" and found:
                classes.append(os.path.relpath(directory, root))
                counts.append(len(found))
        if class_level != "leaf":
            counts.append(len(files) - num_before)
    if class_level == "none":
        classes = [""]
    return {
        "classes": np.array(classes, "U"),
        "counts": np.array(counts, np.int64),
        "files": np.array(files, "S"),
        "reasons": np.array([*ignored], "U"),
        "ignored": np.array([*ignored.values()], np.int64),
        "loose": np.array([os.fsencode(name) for name in loose[:MAX_LOOSE]], "S"),
        "directories": np.array([os.fsencode(d) for d in directories], "S"),
    }


def _image_files(
    root: Path,
    directory: str,
    names: list[str],
    ignored: Counter[str],
    suffixes: Sequence[str],
) -> list[bytes]:
    """Return a directory's images relative to `root`; add other files to `ignored`."""
    relative, files = os.path.relpath(directory, root), []
    for name in names:
        if reason := ignored_reason(name, suffixes):
            ignored[reason] += 1
        else:
            path = name if relative == "." else os.path.join(relative, name)
            files.append(os.fsencode(path))
    return files


def _mtimes(directories: np.ndarray) -> np.ndarray:
    return np.array([os.stat(d).st_mtime_ns for d in directories.tolist()])
