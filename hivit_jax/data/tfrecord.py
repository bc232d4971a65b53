"""Format of tfrecord files.

A record consists of the length of its data (8 bytes), a checksum of the length (4
bytes), the data, and a checksum of the data (4 bytes).
"""

import os
import struct
from collections.abc import Sequence

import numpy as np

from hivit_jax.data import storage
from hivit_jax.data.crc32c import masked_crc32c
from hivit_jax.data.shard_cache import ShardCache

HEADER, FOOTER = 12, 4  # bytes before and after the data


class DamagedRecord(ValueError):
    """A record's length or checksum is wrong."""


class LocalFile:
    """Local tfrecord file, which stays open. The headers of its records are read once.

    Calling the object with the index of a record returns the record's data.
    """

    def __init__(self, path: str):
        self._file, size = os.open(path, os.O_RDONLY), os.path.getsize(path)
        starts, offset = [], 0
        while offset < size:
            starts.append(offset)
            header = os.pread(self._file, 8, offset)
            offset += struct.unpack("<Q", header)[0] + HEADER + FOOTER
        if offset != size:
            raise OSError(f"{path} ends inside a record, at byte {size:,}")
        self._offsets = np.array([*starts, size])

    def __call__(self, i: int) -> bytes:
        return unpack(self.framed(i))

    def span(self, i: int) -> tuple[int, int]:
        """Return the first byte of a record's data and the byte after it."""
        start, stop = self._offsets[i], self._offsets[i + 1]
        return int(start) + HEADER, int(stop) - FOOTER

    def framed(self, i: int) -> bytes:
        """Return a record with its length and checksums."""
        start, stop = self._offsets[i], self._offsets[i + 1]
        return os.pread(self._file, stop - start, start)


def offsets(path: str, count: int, cache: ShardCache | None) -> np.ndarray:
    """Return the start of each record and the end of the last one, int64 [count + 1].

    The headers of the records are read one after the other. If there is a cache, the
    file is copied into it first, because that takes fewer requests.

    Raises:
      StorageError, OSError: the file cannot be read, or has fewer records than `count`.
    """
    path, found = cache.fetch(path) if cache else path, [0]
    for _ in range(count):
        header = storage.start_read(path, found[-1], found[-1] + HEADER)()
        found.append(found[-1] + HEADER + FOOTER + struct.unpack("<Q", header[:8])[0])
    storage.start_read(path, found[-1] - FOOTER, found[-1])()
    return np.array(found)


def merge(parts: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Return the index of several files: the concatenated results of `offsets`."""
    return {"offsets": np.concatenate(parts)}


def unpack(record: bytes) -> bytes:
    """Return the data of a record.

    Raises:
      DamagedRecord: the stored length is wrong.
    """
    length = int.from_bytes(record[:8], "little")
    if length != len(record) - HEADER - FOOTER:
        raise DamagedRecord(
            f"expected a record of {len(record) - HEADER - FOOTER:,} bytes, found "
            f"length {length:,}"
        )
    return record[HEADER:-FOOTER]


def check_file(path: str) -> None:
    """Check all records of a local file.

    Raises:
      StorageError: a record is damaged.
    """
    position, data = 0, np.memmap(path, np.uint8, "r")
    while position < len(data):
        length = int.from_bytes(data[position : position + 8], "little")
        stop = position + HEADER + length + FOOTER
        try:
            verify(data[position:stop].tobytes())
        except DamagedRecord as error:
            raise storage.StorageError(f"{path}, byte {position:,}: {error}") from error
        position = stop


def verify(record: bytes) -> None:
    """Check a record's length and both checksums.

    Raises:
      DamagedRecord: the length or a checksum is wrong.
    """
    for name, data, checksum in (
        ("length", record[:8], record[8:HEADER]),
        ("data", unpack(record), record[-FOOTER:]),
    ):
        if masked_crc32c(data) != int.from_bytes(checksum, "little"):
            raise DamagedRecord(f"the checksum of the record's {name} is wrong")
