"""Members of tar files, found from the headers without reading every member's data."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from hivit_jax.data import storage
from hivit_jax.errors import DataError

BLOCK = 512  # bytes; headers and data start at multiples of this size
# Least number of bytes per read, so that one read usually covers several small members,
# such as the label and the JSON file that follow an image.
READ_AHEAD = 4096
REGULAR = b"0\0"  # types of regular files


class Member(NamedTuple):
    """File in a tar file; its data are bytes `start` to `stop`."""

    name: str
    start: int
    stop: int


def members(path: str) -> Iterator[tuple[Member, Callable[[], bytes]]]:
    """Yield the regular files of a tar file, each with a function that reads it.

    Raises:
      DataError: the file is not a tar file, or is truncated.
      StorageError, OSError: the file cannot be read.
    """
    read, position, name, pax_size, stop = _reader(path), 0, "", -1, 0
    while True:
        header = read(position, BLOCK)
        if len(header) < BLOCK or not any(header):
            break
        kind = header[156:157]
        size = _number(path, header[124:136]) if pax_size < 0 else pax_size
        start = position + BLOCK
        stop = start + size
        position = start + -(-size // BLOCK) * BLOCK
        if kind == b"L":  # GNU: name of the next member
            name = _text(read(start, size))
        elif kind == b"x":  # pax: attributes of the next member
            attributes = _parse_pax(read(start, size))
            name = attributes.get("path", name)
            pax_size = int(attributes.get("size", -1))
        else:
            if kind in REGULAR:
                member = Member(name or _name(header), start, stop)
                yield (
                    member,
                    lambda member=member: read(
                        member.start, member.stop - member.start
                    ),
                )
            name, pax_size = "", -1
    if not stop or len(read(stop - 1, 1)) < 1:
        raise DataError(f"{path} is not a valid tar file (empty or truncated?)")


def _reader(path: str) -> Callable[[int, int], bytes]:
    """Return a function (position, size) -> bytes that reads ahead.

    Beyond the end of the file, it returns fewer bytes.
    """
    data_start, data = 0, b""  # the last read: position in the file, bytes

    def read(position: int, size: int) -> bytes:
        nonlocal data_start, data
        offset = position - data_start
        if not 0 <= offset <= offset + size <= len(data):
            data_start, offset = position, 0
            data = storage.read_at_most(path, position, max(size, READ_AHEAD))
        return data[offset : offset + size]

    return read


def _number(path: str, field: bytes) -> int:
    """Parse a number of a header: octal digits, or binary if the highest bit is set."""
    try:
        if field[0] & 0x80:
            return int.from_bytes(field[1:], "big")
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError as error:
        raise DataError(f"{path} is not a valid tar file (compressed?)") from error


def _name(header: bytes) -> str:
    prefix = header[345:500] if header[257:263] == b"ustar\0" else b""
    name = _text(header[:100])
    return f"{_text(prefix)}/{name}" if prefix.strip(b"\0") else name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(errors="surrogateescape")


def _parse_pax(data: bytes) -> dict[str, str]:
    """Return {key: value} of records "LENGTH KEY=VALUE"."""
    found = {}
    while data:
        length, _, rest = data.partition(b" ")
        size = int(length)
        key, _, value = rest[: size - len(length) - 2].partition(b"=")
        found[key.decode()] = value.decode(errors="surrogateescape")
        data = data[size:]
    return found
