"""Local copies of files in a bucket, made in the background."""

import atexit
import fcntl
import os
import queue
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from hivit_jax.data import storage
from hivit_jax.errors import HivitError
from hivit_jax.progress import Progress, to_stderr

THREADS = 4  # number of concurrent copies
EXIT_SECONDS = 10.0  # longest wait at exit for the threads of aborted copies


class ShardCache:
    """Directory with whole copies of files in buckets.

    The methods are thread-safe. Files are copied in the order of their first use.
    Processes of one host may share the directory: an unfinished copy has the suffix
    ``.part`` and is locked, so that only one process writes it and no process reads it.
    Complete copies are never deleted.

    Args:
      directory: the cache directory.
      check: function that is called with the path of a complete copy and raises an
        error if the copy is damaged; None: copies are not checked.
    """

    def __init__(self, directory: str, check: Callable[[str], None] | None = None):
        self._root, self._check = Path(directory), check
        self._copies: dict[str, str] = {}  # address of a file -> path of its copy
        self._requested: set[str] = set()  # queued, in progress, copied or failed
        self._queue: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._progress: Progress | None = None

    def target(self, address: str) -> Path:
        """Return the path of a file's copy, whether it exists or not."""
        scheme, _, rest = address.partition("://")
        return self._root / scheme / rest

    def locate_or_request(self, address: str) -> str:
        """Return the path of a file's copy if it exists, otherwise the file's address.

        A file without a copy is queued for copying.
        """
        if address in self._copies:
            return self._copies[address]
        if self.target(address).exists():
            self._copies[address] = str(self.target(address))
            return self._copies[address]
        if address not in self._requested and not self._stopped.is_set():
            self._request(address)
        return address

    def fetch(self, address: str) -> str:
        """Return the path of a file's copy, or the file's address on failure.

        If there is no copy, this method makes it, or waits for a thread or process that
        is making it. After `stop` or a failed write, nothing is copied.
        """
        if self.locate_or_request(address) == address and not self._stopped.is_set():
            self._copy(address, wait=True)
        return self.locate_or_request(address)

    def start_progress(self, files: Sequence[str], total_bytes: int) -> None:
        """Create the directory, and log to stderr the needed and the free space.

        From now on, the progress of copying is logged too.

        Args:
          files: addresses of the split's files.
          total_bytes: approximate size of these files.
        """
        num_present = sum(self.target(file).exists() for file in files)
        self._root.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(self._root).free
        title, total = f"data.cache={self._root}: copied", len(files) - num_present
        self._progress = Progress(title, total, "files", every=60.0)
        self._log(
            f"{len(files):,} files are needed, {total_bytes / 1e9:,.1f} GB in total; "
            f"{num_present:,} are present; {free_bytes / 1e9:,.1f} GB are free"
        )

    def _request(self, address: str) -> None:
        with self._lock:
            if not self._threads:
                atexit.register(self.stop)
                for _ in range(THREADS):
                    thread = threading.Thread(target=self._work, daemon=True)
                    thread.start()
                    self._threads.append(thread)
            if address not in self._requested:
                self._requested.add(address)
                self._queue.put(address)

    def stop(self) -> None:
        """Abort unfinished copies, and wait up to `EXIT_SECONDS` for their threads."""
        self._stopped.set()
        for _ in self._threads:
            self._queue.put("")
        for thread in self._threads:
            thread.join(EXIT_SECONDS / THREADS)

    def _work(self) -> None:
        while (address := self._queue.get()) and not self._stopped.is_set():
            self._copy(address, wait=False)

    def _copy(self, address: str, wait: bool) -> None:
        """Copy a file. Errors are logged, not raised.

        Args:
          wait: if another process or thread is copying the file, wait for it; False:
            return immediately.
        """
        try:
            target = self.target(address)
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(f"{target}.part", "ab") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                except BlockingIOError:
                    self._requested.discard(address)  # so that it can be queued again
                    return
                self._copy_locked(address, target, file)
        except InterruptedError:
            pass  # `stop` was called
        except HivitError as error:
            self._log(f"not copied: {error}")
        except OSError as error:  # such as a full disk
            self._stopped.set()  # from now on, nothing is copied
            self._log(
                f"{error.strerror or error}; files without a copy are read from the "
                "bucket"
            )

    def _copy_locked(self, address: str, target: Path, file) -> None:
        """Copy a file into the locked ``.part`` file, check and rename the copy."""
        if target.exists():
            # Another process or thread has finished the copy. If it finished before
            # `_copy` opened the ``.part`` file, the opening created a new, empty file.
            _remove_if_empty(f"{target}.part")
            return
        file.truncate(0)
        size = storage.copy(address, file, self._stopped.is_set)
        found = os.path.getsize(file.name)
        if found != size:
            raise storage.StorageError(
                f"{file.name}: expected {size:,} bytes, found {found:,}"
            )
        if self._check:
            self._check(file.name)
        os.rename(file.name, target)
        with self._lock:
            if self._progress:
                self._progress.update(1)

    def _log(self, text: str) -> None:
        to_stderr(f"data.cache={self._root}: {text}")


def _remove_if_empty(path: str) -> None:
    if os.path.exists(path) and not os.path.getsize(path):
        os.remove(path)
