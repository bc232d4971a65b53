"""Records of a dataset as byte ranges of files, and saved indexes of such ranges."""

import hashlib
import io
import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hivit_jax.data import storage
from hivit_jax.data.shard_cache import ShardCache
from hivit_jax.distributed import processes
from hivit_jax.errors import DataError, HivitError
from hivit_jax.paths import cache_directory
from hivit_jax.progress import Progress, to_stderr

Index = dict[str, np.ndarray]

THREADS = 64  # files that a process indexes concurrently


class Records:
    """Records that are byte ranges of files, local or in a bucket.

    The methods are thread-safe.

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
        # Queues, because the next epoch may ask for a record before the current epoch
        # has read it.
        self._asked: defaultdict[int, deque[storage.Waiter]] = defaultdict(deque)
        self._lock = threading.Lock()

    def file(self, i: int) -> str:
        """Return the path or address of the file that contains record i."""
        return self._files[i if self._file_indices is None else self._file_indices[i]]

    def ask(self, i: int) -> None:
        """Start reading record i, unless it is in a local file."""
        path = self._locate(i)
        if storage.is_remote(path):
            wait = self._start_reading(path, i)
            with self._lock:
                self._asked[i].append(wait)

    def read(self, i: int) -> bytes:
        """Return record i.

        Raises:
          StorageError, OSError: as in `storage.start_read`.
        """
        with self._lock:
            asked = self._asked.get(i)
            wait = asked.popleft() if asked else None
            if not asked:
                self._asked.pop(i, None)
        return wait() if wait else self._start_reading(self._locate(i), i)()

    def forget(self) -> None:
        """Drop the records that were asked for but not read."""
        self._asked.clear()

    def _locate(self, i: int) -> str:
        path = self.file(i)
        return self._cache.locate_or_request(path) if self._cache else path

    def _start_reading(self, path: str, i: int) -> storage.Waiter:
        if self._starts is None:
            return storage.start_read(path)
        return storage.start_read(path, int(self._starts[i]), int(self._stops[i]))


def load_index(
    directory: str,
    files: Sequence[str],
    make_file_index: Callable[[str], Any],
    merge: Callable[[list[Any]], Index],
    version: str = "",
) -> Index:
    """Return the saved index of a dataset's files; make and save it if there is none.

    For files in a bucket, the index is saved beside them if the bucket is writable.
    Otherwise, and for local files, it is saved in the user's cache directory. An index
    of local files is rebuilt after a file has changed.

    The processes of a run share the indexing of a bucket, so all of them must call this
    function together.

    Args:
      directory: directory of the files.
      files: paths or addresses of the files.
      make_file_index: function that indexes a file. Threads call it concurrently.
      merge: function that builds the index from the results of `make_file_index`, which
        are in the order of the files.
      version: version of the index. An index of another version is not used.
    """
    remote = storage.is_remote(directory)
    stamps = [file if storage.is_remote(file) else _stamp(file) for file in files]
    stamps += [version] * bool(version)
    key = hashlib.sha256("\n".join(stamps).encode()).hexdigest()[:16]
    name = f"hivit_jax_index_{key}.npz"
    paths = [f"{directory.rstrip('/')}/{name}"] * remote
    paths.append(str(cache_directory() / name))
    # `all_processes` initializes the accelerator, so it is called only if `joined`
    # reports that the run has several processes.
    shared = remote and processes.joined()
    index = _read_index(paths)
    if shared and not processes.all_processes(index is not None):
        index = None  # a process lacks the index, so all processes must build it
    if index is None:
        start = time.perf_counter()
        index = merge(_make_file_indexes(directory, files, make_file_index, shared))
        to_stderr(f"indexed {directory} in {time.perf_counter() - start:.1f} s")
        _save_index(paths, index, shared)
    return index


def _read_index(paths: Sequence[str]) -> Index | None:
    """Return the first index that can be read, or None."""
    for path in paths:
        try:
            with np.load(io.BytesIO(storage.start_read(path)())) as saved:
                return dict(saved)
        except (storage.MissingObject, OSError, ValueError, KeyError):
            pass  # missing or damaged
    return None


def _make_file_indexes(
    directory: str,
    files: Sequence[str],
    make_file_index: Callable[[str], Any],
    shared: bool,
) -> list[Any]:
    """Return the result of `make_file_index` for each file.

    Args:
      shared: each process indexes an equal share of the files, and all processes
        exchange their results and errors.
    """
    own, found, error = files, {}, None
    if shared:
        own = files[jax.process_index() :: jax.process_count()]
    to_stderr(
        f"indexing {len(own):,} of {len(files):,} files of {directory}; the index is "
        "saved for later runs"
    )
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            results = pool.map(make_file_index, own)
            results = Progress("indexing", len(own), "files").track(results)
            found = dict(zip(own, results, strict=True))
    except HivitError as caught:
        error = caught  # all processes raise it
    parts = processes.gather_objects((found, error)) if shared else [(found, error)]
    for part, error in parts:
        if error:
            raise error
        found |= part
    return [found[file] for file in files]


def _save_index(paths: Sequence[str], index: Index, shared: bool) -> None:
    """Write an index to the first path that is writable, if there is one.

    Args:
      shared: only process 0 writes to the first path, which is in the bucket.
    """
    buffer = io.BytesIO()
    np.savez(buffer, **index)

    def write(path):
        try:
            storage.write(path, buffer.getvalue())
        except (storage.StorageError, OSError):
            return False  # no permission
        return True

    if shared:
        first, *paths = paths
        written = jax.process_index() == 0 and write(first)
        if processes.gather_objects(written)[0]:
            return
    any(map(write, paths))  # stops after the first success


def _stamp(path: str) -> str:
    """Return a text that differs after a local file has changed."""
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    return f"{Path(path).absolute()} {status.st_size} {status.st_mtime_ns}"
