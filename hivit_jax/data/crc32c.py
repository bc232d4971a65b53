"""CRC-32C, the checksum of tfrecord files."""

from functools import cache
from importlib.util import find_spec

import numpy as np

POLYNOMIAL = 0x82F63B78  # bits reversed
# google_crc32c processes gigabytes per second, NumPy only 50 megabytes per second.
HAS_GOOGLE_CRC32C = find_spec("google_crc32c") is not None


def crc32c(data: bytes) -> int:
    """Return the CRC-32C of bytes."""
    if HAS_GOOGLE_CRC32C:
        import google_crc32c

        return google_crc32c.value(data)
    return numpy_crc32c(data)


def masked_crc32c(data: bytes) -> int:
    """Return the checksum that tfrecords contain: a rotated CRC-32C plus a constant."""
    value = crc32c(data)
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


def numpy_crc32c(data: bytes) -> int:
    """Return the CRC-32C of bytes, computed with NumPy.

    The bytes are split into lanes of equal length that are processed in parallel, each
    with its own register. Neighboring registers are then merged until one is left.
    Merging is cheap, because appending n zero bytes is a linear function of a register.
    """
    num_lanes = 1 << max(len(data) // 64, 1).bit_length() - 1
    # The length of a lane is rounded up to a multiple of 8, because fewer different
    # lengths cause fewer entries in the cache of `_appending_matrix`.
    length = -(-len(data) // (num_lanes * 8)) * 8
    padded = np.zeros(num_lanes * length, np.uint8)
    # Leading zeros do not change a register that starts at 0. The register of CRC-32C
    # starts at all ones; to start at 0 and invert the first four bytes is equivalent.
    start = len(padded) - len(data)
    padded[start:] = np.frombuffer(data, np.uint8)
    if len(data) < 4:
        return _bytewise(data)
    padded[start : start + 4] ^= 0xFF
    table, registers = _table(), np.zeros(num_lanes, np.uint32)
    for column in padded.reshape(num_lanes, length).T.copy():
        registers = table[(registers ^ column) & 0xFF] ^ registers >> 8
    while len(registers) > 1:
        registers = _append_zeros(registers[::2], length) ^ registers[1::2]
        length *= 2
    return int(registers[0]) ^ 0xFFFFFFFF


def _bytewise(data: bytes) -> int:
    register, table = 0xFFFFFFFF, _table()
    for byte in data:
        register = int(table[(register ^ byte) & 0xFF]) ^ register >> 8
    return register ^ 0xFFFFFFFF


@cache
def _table() -> np.ndarray:
    """Return the values to XOR into a shifted register, uint32 [256].

    The index is the byte that was shifted out, XORed with the next byte of the data.
    """
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(POLYNOMIAL), table >> 1)
    return table


def _append_zeros(registers: np.ndarray, count: int) -> np.ndarray:
    """Return the registers, uint32 [n], after `count` more zero bytes."""
    result = np.zeros_like(registers)
    for bit, column in enumerate(_appending_matrix(count)):
        result ^= np.where(registers >> np.uint32(bit) & 1, column, np.uint32(0))
    return result


@cache
def _appending_matrix(count: int) -> np.ndarray:
    """Return the matrix that appends `count` zero bytes to a register, uint32 [32].

    Column i is the result for a register in which only bit i is set.
    """
    columns = np.uint32(1) << np.arange(32, dtype=np.uint32)
    if count % 2 == 0:
        return _append_zeros(_append_zeros(columns, count // 2), count // 2)
    table = _table()
    for _ in range(count):
        columns = table[columns & 0xFF] ^ columns >> 8
    return columns
