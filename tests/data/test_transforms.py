"""Decoding: every format that Pillow reads, and damaged files."""

import io

import numpy as np
import pytest
from datasets import encode, noise_image
from numpy.testing import assert_array_equal
from PIL import Image

from benchmarks.photographs import photographs
from hivit_jax.data import transforms

PHOTO = photographs()["coffee"][:90, :120]


IMAGE = Image.fromarray(PHOTO)


ALPHA = IMAGE.convert("RGBA")


ALPHA.putalpha(Image.fromarray(PHOTO[..., 0]))


EXIF = Image.Exif()


EXIF[0x0112] = 6  # rotated by 90 degrees


READABLE = {
    "jpeg": encode(IMAGE, "JPEG", quality=90),
    "jpeg, progressive": encode(IMAGE, "JPEG", progressive=True),
    "jpeg, 4:4:4": encode(IMAGE, "JPEG", subsampling=0),
    "jpeg, grey": encode(IMAGE.convert("L"), "JPEG"),
    "jpeg, CMYK": encode(IMAGE.convert("CMYK"), "JPEG"),
    "jpeg, RGB": encode(IMAGE, "JPEG", keep_rgb=True),
    "jpeg, EXIF rotation": encode(IMAGE, "JPEG", exif=EXIF),
    "jpeg, junk behind": encode(IMAGE, "JPEG") + b"junk" * 100,
    "png": encode(IMAGE, "PNG"),
    "png, alpha": encode(ALPHA, "PNG"),
    "png, palette": encode(IMAGE.convert("P"), "PNG"),
    "png, one bit": encode(IMAGE.convert("1"), "PNG"),
    "png, 16 bit": encode(PHOTO[..., 0].astype(np.uint16) * 257, "PNG"),
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
    decoded = transforms.decode(encoded, channels)
    assert decoded.shape == (90, 120, channels)
    assert decoded.dtype == np.uint8
    assert_array_equal(decoded.squeeze(), expected)


def test_damaged_but_complete_file():
    """400 wrong bytes in the middle decode as with PIL, without an error."""
    encoded = bytearray(READABLE["jpeg"])
    middle = len(encoded) // 2
    encoded[middle : middle + 400] = (noise_image(400) // 2).tobytes()  # no marker
    expected = Image.open(io.BytesIO(bytes(encoded))).convert("RGB")
    assert_array_equal(transforms.decode(bytes(encoded), 3), expected)


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
        transforms.decode(encoded, channels)
