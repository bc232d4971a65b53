"""Tests of CRC-32C and the checksums of TFRecord files."""

import os

import pytest

from hivit_jax.data import crc32c, tfrecord


def test_checksums_equal_published_values():
    """All values but the last are in RFC 3720, section B.4."""
    compute = crc32c.numpy_crc32c
    assert compute(bytes(32)) == 0x8A9136AA
    assert compute(b"\xff" * 32) == 0x62A8AB43
    assert compute(bytes(range(32))) == 0x46DD794E
    assert compute(b"123456789") == 0xE3069283


@pytest.mark.parametrize("length", [0, 1, 3, 4, 63, 64, 65, 1023, 5000])
def test_checksum_equals_a_computation_byte_by_byte(length):
    data = os.urandom(length)
    assert crc32c.numpy_crc32c(data) == crc32c._bytewise(data)


def test_checksums_equal_those_of_a_tensorflow_record():
    """TensorFlow wrote the record. A wrong bit in any of its four parts is an error."""
    record = bytes.fromhex("0300000000000000b099490e6162636e57f121")
    tfrecord.verify(record)
    assert tfrecord.unpack(record) == b"abc"
    # (index of a byte, part named in the error). The length has 8 bytes and a checksum
    # of 4; the data have 3 bytes and a checksum of 4.
    for position, damaged_part in (
        (0, "length"),
        (9, "length"),
        (13, "data"),
        (16, "data"),
    ):
        damaged = bytearray(record)
        damaged[position] ^= 1
        with pytest.raises(tfrecord.DamagedRecord, match=damaged_part):
            tfrecord.verify(bytes(damaged))
