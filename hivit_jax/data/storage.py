"""Files on disk and in buckets (``gs://BUCKET/KEY``, ``s3://BUCKET/KEY``).

tensorstore accesses the objects in buckets, retries failed requests several times, and
uses the credentials of Google's or Amazon's tools. Public buckets need no credentials.
"""

import os
import re
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from hivit_jax.errors import ConfigError, ProcessDataError, require
from hivit_jax.progress import EVERY, to_stderr

DRIVERS = {"gs": "gcs", "s3": "s3"}  # scheme of an address -> driver of tensorstore
RETRIES = {"max_retries": 8, "initial_delay": "500ms", "max_delay": "30s"}
CONCURRENCY = 256  # requests in flight
TIMEOUT = 600.0  # seconds to wait for an answer before raising an error
PART_BYTES = 2**24  # `copy` reads parts of this size
LOGIN = {  # scheme of an address -> instructions
    "gs": "run gcloud auth application-default login, or grant the VM's service "
    "account the role Storage Object Viewer",
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}

Waiter = Callable[[], bytes]  # waits for a read and returns the bytes


class StorageError(ProcessDataError):
    """An object cannot be accessed, after all retries.

    This error ends the run, because the data are unreachable rather than damaged.
    """


class MissingObject(StorageError):
    """An object does not exist."""


def is_remote(path: str | os.PathLike) -> bool:
    """Return True for the address of an object in a bucket.

    Raises:
      ConfigError: the address has an unknown scheme.
    """
    scheme, separator, _ = os.fspath(path).partition("://")
    if separator and scheme not in DRIVERS:
        raise ConfigError(f"{path}: expected a local path, gs:// or s3://")
    return bool(separator)


def start_read(path: str, start: int = 0, stop: int | None = None) -> Waiter:
    """Start reading bytes `start` to `stop`; return a function that returns the bytes.

    A local file is not read until the returned function is called.

    Args:
      start: first byte; a negative number counts from the end and needs ``stop=None``.
        A file that is shorter than ``-start`` is returned whole.
      stop: byte after the last; None: the end.

    Raises:
      StorageError: (by the returned function) the object does not exist, is too short,
        or cannot be read.
      OSError: (by the returned function) a local file cannot be read or is too short.
    """
    if not is_remote(path):
        return lambda: _read_local(path, start, stop)
    future = _request(path, start, stop)

    def wait() -> bytes:
        try:
            return _result(path, future).value
        except _RangeError:
            if start >= 0:
                raise
            # The object is shorter than `-start`.
            return _result(path, _request(path, 0, None)).value

    return wait


def list_files(directory: str) -> list[str]:
    """Return the sorted names of all files below a directory, relative to it.

    Prints a line if a bucket does not answer within `EVERY` seconds.
    """
    directory = directory.rstrip("/")
    if not is_remote(directory):
        paths = Path(directory).rglob("*")
        return sorted(p.relative_to(directory).as_posix() for p in paths if p.is_file())
    import tensorstore

    store, key = _locate(f"{directory}/")
    successor = key[:-1] + chr(ord("/") + 1) if key else ""
    found = store.list(tensorstore.KvStore.KeyRange(key, successor), len(key.encode()))
    notice = threading.Timer(EVERY, to_stderr, [f"listing {directory} ..."])
    notice.start()
    try:
        names = sorted(os.fsdecode(name) for name in _result(directory, found))
    finally:
        notice.cancel()
    return [name for name in names if name and not name.endswith("/")]


def copy(path: str, file: BinaryIO, stopped: Callable[[], bool] = lambda: False) -> int:
    """Copy an object of a bucket into a local file and return its size.

    The size of an object is unknown, so parts are read until one is shorter than
    requested. The bytes are flushed to the disk before the function returns.

    Args:
      file: empty file, open for writing.
      stopped: called before each part; True ends the copy.

    Raises:
      StorageError: the object cannot be read, or was replaced during the copy.
      InterruptedError: `stopped` returned True.
      OSError: the file cannot be written.
    """
    position, generation = 0, None
    while True:
        if stopped():
            raise InterruptedError(f"the copy of {path} was stopped")
        part = _read_part(path, position, PART_BYTES)
        if part is not None:
            generation = generation or part.stamp.generation
            if part.stamp.generation != generation:
                raise StorageError(f"{path} was replaced while it was copied")
            file.write(part.value)
            position += len(part.value)
        if part is None or len(part.value) < PART_BYTES:
            break
    file.flush()
    os.fsync(file.fileno())
    return position


def read_at_most(path: str, start: int, size: int) -> bytes:
    """Return `size` bytes from `start` on, or fewer at the end of the file.

    Raises:
      StorageError, OSError: as in `start_read`.
    """
    if is_remote(path):
        part = _read_part(path, start, size)
        return b"" if part is None else part.value
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), size, start)


def write(path: str, data: bytes) -> None:
    """Write a file, local or in a bucket, so that readers never see a part of it.

    Raises:
      StorageError: the object cannot be written.
      OSError: the local file cannot be written.
    """
    if is_remote(path):
        store, key = _locate(path)
        _result(path, store.write(key, data))
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{os.getpid()}"
    Path(temporary).write_bytes(data)
    os.replace(temporary, path)


class _RangeError(StorageError):
    """An object ends before the end of the requested range."""


def _locate(path: str) -> tuple[Any, str]:
    """Return the key-value store of an address and the object's key."""
    scheme, _, rest = path.partition("://")
    bucket, _, key = rest.partition("/")
    return _open_store(scheme, bucket), key


@cache
def _open_store(scheme: str, bucket: str) -> Any:
    tensorstore = require("tensorstore", "tensorstore")
    driver = DRIVERS[scheme]
    spec = {"driver": driver, "bucket": bucket}
    context = {
        f"{driver}_request_retries": RETRIES,
        f"{driver}_request_concurrency": {"limit": CONCURRENCY},
    }
    if endpoint := scheme == "s3" and os.environ.get("AWS_ENDPOINT_URL"):
        spec |= {"endpoint": endpoint, "aws_region": "us-east-1"}
    opened = tensorstore.KvStore.open(spec | {"context": context})
    return _result(f"{scheme}://{bucket}", opened)


def _read_part(path: str, start: int, size: int) -> Any:
    """Return tensorstore's answer with up to `size` bytes, or None if none are left."""
    try:
        return _result(path, _request(path, start, start + size))
    except _RangeError:
        pass  # fewer than `size` bytes are left
    try:
        return _result(path, _request(path, start, None))
    except _RangeError:
        return None


def _request(path: str, start: int, stop: int | None) -> Any:
    """Request a byte range of an object; return tensorstore's future answer."""
    store, key = _locate(path)
    return store.read(key, byte_range=slice(start, stop) if start or stop else None)


def _result(path: str, future: Any) -> Any:
    """Wait for tensorstore's answer and return it.

    Raises:
      StorageError: the answer is an error.
      MissingObject: there is no such object.
    """
    try:
        result = future.result(timeout=TIMEOUT)
    except Exception as error:  # most errors of tensorstore are ValueErrors
        _fail(path, error)
    if getattr(result, "state", "value") == "missing":
        raise MissingObject(
            f"{path} does not exist (HTTP status 404)\n"
            "If the object was deleted, restore it. Or delete the dataset's index, so "
            "that the index is rebuilt."
        )
    return result


def _fail(path: str, error: Exception) -> NoReturn:
    """Raise a StorageError that explains an error of tensorstore."""
    text = " ".join(str(error).split()) or f"no answer within {TIMEOUT:.0f} s"
    if text.startswith("OUT_OF_RANGE"):
        raise _RangeError(
            f"{path} is shorter than expected: {text}\n"
            "Restore the object, or delete the dataset's index, so that the index is "
            "rebuilt."
        ) from error
    status = re.search(r"\[http_response_code='(\d+)'\]", text)
    reason = re.sub(r"\s*\[[^]]*\]", "", text)
    hint = "\nCheck the network and the address, then run the same command again."
    if status:
        reason = f"HTTP status {status[1]} ({reason})"
        if status[1] in ("401", "403"):
            hint = f"\nTo log in, {LOGIN[path.partition('://')[0]]}."
    raise StorageError(f"cannot access {path}: {reason}{hint}") from error


def _read_local(path: str, start: int, stop: int | None) -> bytes:
    with open(path, "rb", buffering=0) as file:
        if start < 0:
            start = max(os.fstat(file.fileno()).st_size + start, 0)
        if stop is None:
            file.seek(start)
            return file.read()
        data = os.pread(file.fileno(), stop - start, start)
        if len(data) < stop - start:
            raise OSError(f"{path} ends before byte {stop:,}")
        return data
