"""Tests of decoding to 8 bits through Pillow: formats, bit depths, damaged files.

test_rasters.py tests other dtypes of the result and other numbers of channels.
"""

import io
import struct
import zlib

import numpy as np
import pytest
from datasets import encode, noise_image
from numpy.testing import assert_array_equal
from PIL import Image

from hivit_jax.data.decoding import decode, may_decode_crops
from hivit_jax.data.transforms import ImageTransform
from hivit_jax.errors import DataError

PIXELS = noise_image(90, 120, 3)
IMAGE = Image.fromarray(PIXELS)
ALPHA = IMAGE.convert("RGBA")
ALPHA.putalpha(Image.fromarray(PIXELS[..., 0]))
EXIF = Image.Exif()
EXIF[0x0112] = 6  # rotated by 90 degrees

# Kind of file -> encoded image
READABLE = {
    "jpeg": encode(IMAGE, "JPEG", quality=90),
    "jpeg, progressive": encode(IMAGE, "JPEG", progressive=True),
    "jpeg, 4:4:4": encode(IMAGE, "JPEG", subsampling=0),
    "jpeg, gray": encode(IMAGE.convert("L"), "JPEG"),
    "jpeg, CMYK": encode(IMAGE.convert("CMYK"), "JPEG"),
    "jpeg, RGB": encode(IMAGE, "JPEG", keep_rgb=True),
    "jpeg, EXIF rotation": encode(IMAGE, "JPEG", exif=EXIF),
    "jpeg, trailing junk": encode(IMAGE, "JPEG") + b"junk" * 100,
    "png": encode(IMAGE, "PNG"),
    "png, alpha": encode(ALPHA, "PNG"),
    "png, palette": encode(IMAGE.convert("P"), "PNG"),
    "png, one bit": encode(IMAGE.convert("1"), "PNG"),
    "png, gray and alpha": encode(ALPHA.convert("LA"), "PNG"),
    "tiff, CMYK": encode(IMAGE.convert("CMYK"), "TIFF"),
    "tiff, palette and alpha": encode(ALPHA.convert("PA"), "TIFF"),
    "gif": encode(IMAGE, "GIF"),
    "gif, animated": encode(
        IMAGE, "GIF", save_all=True, append_images=[IMAGE.rotate(90)]
    ),
    "webp": encode(IMAGE, "WEBP"),
    "webp, alpha": encode(ALPHA, "WEBP", lossless=True),
    "bmp": encode(IMAGE, "BMP"),
    "tiff": encode(IMAGE, "TIFF"),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", READABLE)
def test_decode_equals_pil(kind, channels):
    encoded = READABLE[kind]
    expected = Image.open(io.BytesIO(encoded)).convert("L" if channels == 1 else "RGB")
    decoded = decode(encoded, channels)
    assert decoded.shape == (90, 120, channels)
    assert decoded.dtype == np.uint8
    assert_array_equal(decoded.squeeze(), expected)


def test_complete_jpeg_with_wrong_bytes_decodes_as_with_pil():
    """400 wrong bytes in the compressed data are not an error."""
    encoded = bytearray(READABLE["jpeg"])
    middle = len(encoded) // 2
    # The bytes are below 128, because a byte of 255 might start a marker.
    encoded[middle : middle + 400] = (noise_image(400) // 2).tobytes()
    expected = Image.open(io.BytesIO(bytes(encoded))).convert("RGB")
    assert_array_equal(decode(bytes(encoded), 3), expected)


@pytest.mark.parametrize(
    "encoded",
    [
        READABLE["jpeg"][: len(READABLE["jpeg"]) // 2],
        READABLE["jpeg"][:-20],
        READABLE["jpeg"][:200],
        READABLE["png"][:-100],
        READABLE["webp"][:300],
        b"",
        b"\xff\xd8\xff\xe0",
        b"<html>404</html>",
        bytes(5000),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_undecodable_files_are_errors(encoded, channels):
    with pytest.raises((OSError, SyntaxError)):
        Image.open(io.BytesIO(encoded)).convert("RGB")
    with pytest.raises((OSError, SyntaxError)):
        decode(encoded, channels)


# Images whose values are not unsigned 8-bit integers

RAMP = np.linspace(0, 65535, 16 * 18 * 3).astype(np.uint16).reshape(16, 18, 3)
GRAY = RAMP[..., 1].copy()
# Kind of a NumPy dtype -> value of TIFF's SampleFormat
SAMPLE_FORMATS = {"u": 1, "i": 2, "f": 3}


def png(values):
    """Encode uint16 [h, w, bands] as a 16-bit PNG, which Pillow cannot write."""

    def chunk(name, content):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    h, w, bands = values.shape
    color = {2: 4, 3: 2, 4: 6}[bands]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", w, h, 16, color, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(rows), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*item) for item in chunks.items())


def tiff(values, order="<", photometric=None, planar=1, deflate=False, packed=None):
    """Encode [h, w] or [h, w, bands] of any dtype as TIFF.

    Args:
      order: "<" little-endian or ">" big-endian.
      photometric: TIFF's PhotometricInterpretation; None: by number of bands.
      planar: 1: interleaved bands; 2: one plane per band.
      packed: (bits per sample, content) of an image that NumPy cannot represent.
    """
    h, w, bands = (*values.shape, 1)[:3]
    planes = np.moveaxis(values, -1, 0) if planar == 2 else values[None]
    strips = [p.astype(values.dtype.newbyteorder(order)).tobytes() for p in planes]
    bits = values.dtype.itemsize * 8
    if packed:
        bits, strips = packed[0], [packed[1]]
    strips = [zlib.compress(strip) for strip in strips] if deflate else strips
    if photometric is None:
        photometric = {1: 1, 3: 2, 4: 5}[bands]
    starts = np.cumsum([8, *map(len, strips)])
    tags = {
        256: [w],
        257: [h],
        258: [bits] * bands,
        259: [8 if deflate else 1],
        262: [photometric],
        273: starts[:-1].tolist(),
        277: [bands],
        278: [h],
        279: [*map(len, strips)],
        284: [planar],
        339: [SAMPLE_FORMATS[values.dtype.kind]] * bands,
    }
    entries, extra = b"", b""
    first_extra = int(starts[-1]) + 2 + 12 * len(tags) + 4
    for tag, numbers in tags.items():
        field = struct.pack(f"{order}{len(numbers)}H", *numbers)
        if len(field) > 4:
            offset = struct.pack(f"{order}I", first_extra + len(extra))
            field, extra = offset, extra + field
        entries += struct.pack(f"{order}HHI", tag, 3, len(numbers)) + field.ljust(
            4, b"\0"
        )
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, starts[-1])
    count = struct.pack(f"{order}H", len(tags))
    return b"".join([head, *strips, count, entries, bytes(4), extra])


def sgi(values):
    """Encode uint16 [h, w] as SGI, which stores rows from bottom to top."""
    h, w = values.shape
    header = struct.pack(">HBBHHHH", 474, 0, 2, 2, w, h, 1)
    return header.ljust(512, b"\0") + values[::-1].astype(">u2").tobytes()


def tiff_12_bits(values):
    """Encode uint16 [h, w] as a 12-bit TIFF; values are below 4096 and w is even."""
    high, low = values.reshape(-1, 2).T.astype(int)
    triples = np.stack([high >> 4, (high & 15) << 4 | low >> 8, low & 255], 1)
    content = triples.astype(np.uint8).tobytes()
    return tiff(values, packed=(12, content))


# Kind of file -> (encoded image, its uint16 values). The values are None for files that
# contain `GRAY` reduced to 10 or 12 bits.
UP_TO_16_BITS = {
    "png": (encode(GRAY, "PNG"), GRAY),
    "png, color": (png(RAMP), RAMP),
    "png, color and alpha": (png(np.dstack([RAMP, GRAY])), RAMP),
    "png, gray and alpha": (png(RAMP[..., :2]), RAMP[..., 0]),
    "tiff": (tiff(GRAY), GRAY),
    "tiff, big-endian": (tiff(GRAY, ">"), GRAY),
    "tiff, deflate": (tiff(GRAY, ">", deflate=True), GRAY),
    "tiff, 0 is white": (tiff(GRAY, photometric=0), 65535 - GRAY),
    "tiff, color": (tiff(RAMP), RAMP),
    "tiff, color, big-endian": (tiff(RAMP, ">"), RAMP),
    "tiff, color, deflate": (tiff(RAMP, deflate=True), RAMP),
    "tiff, planes": (tiff(RAMP, planar=2), RAMP),
    "tiff, planes, big-endian": (tiff(RAMP, ">", planar=2), RAMP),
    "pgm": (b"P5 18 16 65535 " + GRAY.astype(">u2").tobytes(), GRAY),
    "pgm, 10 bit": (b"P5 18 16 1023 " + (GRAY // 64).astype(">u2").tobytes(), None),
    "ppm": (b"P6 18 16 65535 " + RAMP.astype(">u2").tobytes(), RAMP),
    "jpeg 2000": (encode(GRAY, "JPEG2000", irreversible=False), GRAY),
    "tiff, 12 bit": (tiff_12_bits(GRAY // 16), None),
}
# The decoded values have errors of up to one level, because Pillow drops low bytes.
WITHOUT_LOW_BYTES = {
    "tiff, planes, deflate": (tiff(RAMP, planar=2, deflate=True), RAMP),
    "sgi": (sgi(GRAY), GRAY),
}


@pytest.mark.parametrize("kind", [*UP_TO_16_BITS, *WITHOUT_LOW_BYTES])
def test_9_to_16_bits_are_scaled_to_8_bits(kind):
    """Unsigned integers of 9 to 16 bits become value / maximum * 255, rounded.

    The maximum of 16 bits is 65535 = 255 * 257. The result is exact, except where
    Pillow itself has reduced the values.
    """
    encoded, values = (UP_TO_16_BITS | WITHOUT_LOW_BYTES)[kind]
    if values is None:
        maximum = 1023 if "10 bit" in kind else 4095
        values = (GRAY // (65536 // (maximum + 1))) * (65535 / maximum)
    expected = np.rint(values / 257)
    color = decode(encoded, 3)
    assert color.dtype == np.uint8
    expected_color = np.broadcast_to(expected.reshape(16, 18, -1), (16, 18, 3))
    np.testing.assert_allclose(color, expected_color, atol=kind in WITHOUT_LOW_BYTES)
    gray = np.asarray(Image.fromarray(color).convert("L"))
    assert_array_equal(decode(encoded, 1)[..., 0], gray)
    assert len(np.unique(color)) > 200


def test_16_bit_cmyk_equals_8_bit_cmyk():
    values = np.dstack([RAMP, GRAY])
    values_8_bit = np.rint(values / 257).astype(np.uint8)
    expected = Image.frombytes("CMYK", (18, 16), values_8_bit.tobytes()).convert("RGB")
    assert_array_equal(decode(tiff(values, ">"), 3), expected)


UNIT = (GRAY / 65535).astype(np.float32)
SIGNED = GRAY.astype(np.int32) - 32768
# Kind of image whose format defines no black and white -> (encoded, (black, white))
NEEDS_RANGE = {
    "tiff, float": (encode(UNIT, "TIFF"), (0, 1)),
    "tiff, float, big-endian, deflate": (tiff(UNIT, ">", deflate=True), (0.0, 1.0)),
    "tiff, int32": (tiff(SIGNED * 65537), (-(2**31), 2**31)),
    "tiff, int32, big-endian, deflate": (
        tiff(SIGNED, ">", deflate=True),
        (-32768, 32767),
    ),
    "tiff, uint32": (tiff(GRAY.astype(np.uint32) * 65537), (0, 2**32 - 1)),
    "tiff, int16": (tiff(SIGNED.astype(np.int16)), (-32768, 32767)),
    "tiff, int8": (tiff((np.rint(GRAY / 257) - 128).astype(np.int8)), (-128, 127)),
    "pfm": (b"Pf\n18 16\n-1.0\n" + UNIT[::-1].astype("<f4").tobytes(), (0, 1)),
}


@pytest.mark.parametrize("kind", NEEDS_RANGE)
def test_floats_and_signed_or_32_bit_integers_require_a_range(kind):
    """Without `value_range`, decoding raises a DataError that names the config key."""
    encoded, value_range = NEEDS_RANGE[kind]
    with pytest.raises(DataError, match=r"found .* from .* data\.value_range="):
        decode(encoded, 3)
    expected = np.rint(GRAY / 257)
    assert_array_equal(decode(encoded, 1, value_range)[..., 0], expected)
    lower_half = value_range[0], value_range[0] + (value_range[1] - value_range[0]) / 2
    clipped = decode(encoded, 1, lower_half)[..., 0]
    np.testing.assert_allclose(clipped, np.minimum(GRAY / 257 * 2, 255), atol=1.1)


def test_range_applies_only_to_more_than_8_bits():
    """`value_range` rescales 12-bit values in 16-bit files, but not 8-bit images."""
    dark = GRAY // 16
    expected = np.rint(dark / 4095 * 255)
    for encoded in (encode(dark, "PNG"), tiff(dark), png(np.dstack([dark] * 3))):
        assert_array_equal(decode(encoded, 1, (0, 4095))[..., 0], expected)
    white_is_0 = decode(tiff(dark, photometric=0), 1, (0, 4095))[..., 0]
    assert_array_equal(white_is_0, np.rint(255 - dark / 4095 * 255))
    for kind in ("png", "jpeg", "tiff, CMYK", "bmp", "png, one bit"):
        encoded = READABLE[kind]
        assert_array_equal(decode(encoded, 3, (0, 4095)), decode(encoded, 3))


def test_values_that_are_not_finite_are_errors():
    """Decoding inf or NaN raises ValueError, which marks the image as unreadable.

    A missing `value_range` raises DataError, which ends the run.
    """
    for value in (np.nan, np.inf):
        values = UNIT.copy()
        values[3, 3] = value
        with pytest.raises(ValueError, match="expected finite values"):
            decode(tiff(values), 1, (0, 1))
    with pytest.raises(DataError, match="value_range"):
        decode(tiff(np.full((4, 4), np.nan, np.float32)), 1)


@pytest.mark.parametrize(
    "values", [UNIT.astype(np.float64), UNIT.astype(np.float16), np.dstack([UNIT] * 3)]
)
def test_tiff_that_pillow_cannot_read_is_an_error(values):
    with pytest.raises(OSError, match="TIFF that PIL cannot read"):
        decode(tiff(values), 3)


def test_transform_passes_value_range_to_the_decoder():
    options = dict(batch_size=1, size=(16, 18), channels=1, value_range=(0, 1))
    transform = ImageTransform(**options)
    out = {"image": np.zeros((16, 18, 1), np.uint8), "label": np.zeros((), np.int32)}
    draws = [0.5] * transform.draws
    transform({"image": encode(UNIT, "TIFF")}, draws, out)
    assert_array_equal(out["image"][..., 0], np.rint(GRAY / 257))


# Crops


def test_crops_may_be_decoded_from_complete_baseline_jpegs_only():
    """A crop of any other file requires decoding the whole image."""
    jpeg = encode(IMAGE, "JPEG", quality=90)
    # JPEG markers inside a metadata segment, as of a thumbnail
    exif_with_markers = Image.Exif()
    exif_with_markers[0x010E] = jpeg[:2000].decode("latin1")
    for good in (
        jpeg,
        encode(IMAGE.convert("L"), "JPEG"),
        encode(IMAGE, "JPEG", restart_marker_blocks=2),
        encode(IMAGE, "JPEG", exif=exif_with_markers),
    ):
        assert may_decode_crops(good)
    for bad in (
        encode(IMAGE, "JPEG", progressive=True),
        encode(IMAGE, "PNG"),
        jpeg[:-2],
        jpeg[: len(jpeg) // 2],
        jpeg[:30],
        jpeg[:2],
        b"",
        jpeg + b"\0",
        jpeg[:-500] + b"\xff\xc3" + jpeg[-498:],  # with a start-of-frame marker
    ):
        assert not may_decode_crops(bad)
