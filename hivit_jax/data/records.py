"""Records of a dataset as byte ranges of files, and saved indexes of such ranges."""

import hashlib
import io
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from hivit_jax.data import storage
from hivit_jax.data.shard_cache import ShardCache
from hivit_jax.errors import DataError
from hivit_jax.paths import cache_directory
from hivit_jax.progress import to_stderr

Index = dict[str, np.ndarray]


class Records:
    """Records that are byte ranges of files, local or in a bucket. Thread-safe.

    Args:
      files: paths or addresses of the files.
      file_indices: index in `files` for each record, int [n]; None: one record per
        file.
      starts, stops: byte range of each record, int64 [n]; None: whole files.
      cache: local copies of files in a bucket; None: no copies.
    """

    def __init__(
        self,
        files: Sequence[str],
        file_indices: np.ndarray | None = None,
        starts: np.ndarray | None = None,
        stops: np.ndarray | None = None,
        cache: ShardCache | None = None,
    ):
        self._files, self._file_indices = files, file_indices
        self._starts, self._stops, self._cache = starts, stops, cache
        self._asked: dict[int, storage.Waiter] = {}

    def file(self, i: int) -> str:
        """Return the path or address of the file that contains record i."""
        return self._files[i if self._file_indices is None else self._file_indices[i]]

    def ask(self, i: int) -> None:
        """Start reading record i, unless it is in a local file."""
        if i not in self._asked:
            path = self._locate(i)
            if storage.is_remote(path):
                self._asked[i] = self._start(path, i)

    def read(self, i: int) -> bytes:
        """Return record i.

        Raises:
          StorageError, OSError: as in `storage.read`.
        """
        wait = self._asked.pop(i, None) or self._start(self._locate(i), i)
        return wait()

    def forget(self) -> None:
        """Drop the records that were asked for but not read."""
        self._asked.clear()

    def _locate(self, i: int) -> str:
        path = self.file(i)
        return self._cache.locate(path) if self._cache else path

    def _start(self, path: str, i: int) -> storage.Waiter:
        if self._starts is None:
            return storage.read(path)
        return storage.read(path, int(self._starts[i]), int(self._stops[i]))


def load_index(
    directory: str, files: Sequence[str], make: Callable[[], Index], version: str = ""
) -> Index:
    """Return the saved index of a dataset's files; make and save it if there is none.

    For files in a bucket, the index is saved beside them if the bucket is writable.
    Otherwise, and for local files, it is saved in the user's cache directory. An index
    of local files is rebuilt after a file has changed.

    Args:
      directory: directory of the files.
      files: paths or addresses of the files.
      make: function that builds the index.
      version: version of `make`. An index of another version is not used.
    """
    stamps = [file if storage.is_remote(file) else _stamp(file) for file in files]
    stamps += [version] * bool(version)
    key = hashlib.sha256("\n".join(stamps).encode()).hexdigest()[:16]
    name = f"hivit_jax_index_{key}.npz"
    cached = str(cache_directory() / name)
    paths = [f"{directory.rstrip('/')}/{name}"] * storage.is_remote(directory)
    for path in (*paths, cached):
        try:
            with np.load(io.BytesIO(storage.read(path)())) as saved:
                return dict(saved)
        except (storage.MissingObject, OSError, ValueError, KeyError):
            pass  # missing or damaged
    start = time.perf_counter()
    index, buffer = make(), io.BytesIO()
    to_stderr(f"indexed {directory} in {time.perf_counter() - start:.1f} s")
    np.savez(buffer, **index)
    for path in (*paths, cached):
        try:
            storage.write(path, buffer.getvalue())
            break
        except (storage.StorageError, OSError):
            pass  # no permission; try the next path, because saving is optional
    return index


def _stamp(path: str) -> str:
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    return f"{Path(path).absolute()} {status.st_size} {status.st_mtime_ns}"


def log_indexing(directory: str, count: int) -> None:
    """Log to stderr that indexing starts, which can take minutes for a bucket."""
    text = f"indexing {count:,} files of {directory}; the index is saved for later runs"
    to_stderr(text)
