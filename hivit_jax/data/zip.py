"""Members of zip files whose data are stored, not compressed."""

import struct
from typing import NamedTuple

from hivit_jax.data import storage
from hivit_jax.errors import DataError

END, END_64, LOCATOR_64 = b"PK\5\6", b"PK\6\6", b"PK\6\7"
MAX_END = 22 + 2**16 + 20 + 56  # largest number of bytes after the central directory
NONE_32 = 2**32 - 1  # means that the number is in the zip64 field


class Member(NamedTuple):
    """File in a zip file.

    Bytes `start` to `stop` begin with the member's local header and data.
    """

    name: str
    start: int
    stop: int


def members(path: str) -> list[Member]:
    """Return the members of a zip file that are not directories.

    Raises:
      DataError: the file is not a zip file, or a member is compressed or was streamed.
      StorageError, OSError: the file cannot be read.
    """
    directory_start, size = _central_directory(path)
    directory = storage.start_read(path, directory_start, directory_start + size)()
    position = 0
    found = []
    while position < size:
        fields = struct.unpack_from("<4s6H3I5H2I", directory, position)
        method, compressed_size = fields[4], fields[8]
        lengths = fields[10:13]  # of name, extra field and comment
        start = position + 46
        name = directory[start : start + lengths[0]].decode(errors="surrogateescape")
        extra = directory[start + lengths[0] : start + lengths[0] + lengths[1]]
        position = start + sum(lengths)
        if name.endswith("/"):
            continue
        if method or fields[3] & 8:  # compressed, or its size follows the data
            raise DataError(
                f"{path}: {name} is compressed or was streamed; expected members that "
                "are stored, as zip -0 writes them"
            )
        offset = fields[16]
        if offset == NONE_32:
            # The zip64 field contains the sizes that are NONE_32, then the offset.
            offset = _extra_64(extra)[[fields[9], compressed_size].count(NONE_32)]
        found.append((offset, name))
    offsets = sorted(offset for offset, _ in found)
    ends = dict(zip(offsets, [*offsets[1:], directory_start], strict=True))
    return [Member(name, offset, ends[offset]) for offset, name in found]


def data_of(encoded: bytes) -> bytes:
    """Return the data of a member from its byte range.

    Raises:
      ValueError: the range does not begin with a local header, or is too short.
    """
    if encoded[:4] != b"PK\3\4":
        raise ValueError("expected a local header of a zip file")
    (size,) = struct.unpack_from("<I", encoded, 18)
    name_length, extra_length = struct.unpack_from("<2H", encoded, 26)
    start = 30 + name_length + extra_length
    if size == NONE_32:
        size = _extra_64(encoded[30 + name_length : start])[1]
    if start + size > len(encoded):
        raise ValueError("the member overlaps the next one")
    return encoded[start : start + size]


def _central_directory(path: str) -> tuple[int, int]:
    """Return the start and size of the central directory."""
    tail = storage.start_read(path, -MAX_END)()
    end = tail.rfind(END)
    if end < 0:
        raise DataError(f"{path} is not a valid zip file (truncated?)")
    size, start = struct.unpack_from("<2I", tail, end + 12)
    if NONE_32 in (size, start) or tail[end - 20 : end - 16] == LOCATOR_64:
        end = tail.rfind(END_64, 0, end)
        size, start = struct.unpack_from("<2Q", tail, end + 40)
    return start, size


def _extra_64(extra: bytes) -> tuple[int, ...]:
    """Return the 8-byte numbers of the zip64 extra field."""
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            return struct.unpack_from(f"<{size // 8}Q", extra, position + 4)
        position += 4 + size
    raise ValueError("expected a zip64 extra field")
