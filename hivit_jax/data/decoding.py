"""Decode image files to 8 bits per channel.

Pillow converts images with more bits by clipping or truncation. This module maps values
linearly instead, so that black becomes 0 and white becomes 255. For unsigned integers
of n <= 16 bits, black is 0 and white is 2**n - 1, or the reverse in TIFF files in which
0 is white. For other types, the user sets black and white (`data.value_range`).
"""

import io
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from hivit_jax.errors import DataError

# PIL and simplejpeg are imported inside functions, so that a train step can be built
# without them.

PIL_MODES = {1: "L", 3: "RGB"}  # by number of channels
# Second bytes of JPEG markers. FRAMES are the starts of a frame, one for each coding.
START_OF_SCAN, BASELINE, FRAMES = 0xDA, 0xC0, {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
END_OF_IMAGE = b"\xff\xd9"
# A JPEG marker after the start of a scan, except restart markers.
MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
# TIFF tags.
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339
SIGNED = (2,)  # value of SAMPLE_FORMAT for signed integers
# Byte order in a raw mode -> opposite byte order. B: big-endian, L: little, N: native.
OPPOSITE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
# Big-endian raw mode -> native raw mode. libtiff returns values in native byte order,
# but Pillow would decode them with these big-endian raw modes.
NATIVE = {"F;32BF": "F;32NF", "I;32BS": "I;32NS", "I;16BS": "I;16NS"}


class UnsuitableImageError(DataError):
    """Error for an image whose channels or values do not fit the config.

    The message contains the config keys to change before training.

    Attributes:
      after_training: a message for a trained model, whose config is fixed.
    """

    def __init__(self, problem: str, advice: str):
        super().__init__(f"{problem}; {advice}")
        self.after_training = f"{problem}; convert the image to match the trained model"


@dataclass(frozen=True)
class StoredValues:
    """Values of an image as stored in its file, before conversion to 8 bits.

    Attributes:
      array: integers or floats, [h, w] or [h, w, bands].
      mode: PIL mode of the image after conversion to 8 bits; "" if PIL is not used.
      limits: (black, white), the values that become 0 and 255; (): the file format does
        not define them.
      num_frames: number of the file's frames, such as TIFF pages, in `array`.
    """

    array: np.ndarray
    mode: str
    limits: tuple[float, ...]
    num_frames: int = 1

    def black_and_white(self, value_range: Sequence[float]) -> tuple[float, float]:
        """Return the values of black and white, which become 0 and 255.

        Args:
          value_range: (low, high), used instead of `limits`; if `limits` descend, black
            is `high`. (): use `limits`.

        Raises:
          UnsuitableImageError: both `value_range` and `limits` are ().
        """
        if value_range:
            is_inverted = self.limits and self.limits[0] > self.limits[1]
            low, high = value_range
            return (high, low) if is_inverted else (low, high)
        if not self.limits:
            finite = self.array[np.isfinite(self.array)]
            found = f" from {finite.min():g} to {finite.max():g}" if finite.size else ""
            raise UnsuitableImageError(
                f"expected 8 or 16 bits, found {self.array.dtype} values{found}",
                "set data.value_range=(LOW, HIGH), the values of black and white",
            )
        return self.limits

    def to_image(self, value_range: Sequence[float]) -> Any:
        """Convert to a PIL image with values scaled to 0 .. 255, rounded and clipped.

        Raises:
          UnsuitableImageError: see `black_and_white`.
          ValueError: a value is not finite.
        """
        from PIL import Image

        size = self.array.shape[1], self.array.shape[0]
        return Image.frombytes(self.mode, size, self.to_uint8(value_range).tobytes())

    def to_uint8(self, value_range: Sequence[float]) -> np.ndarray:
        """Return the values converted to uint8; see `to_image`."""
        black, white = self.black_and_white(value_range)
        if not np.isfinite(self.array).all():
            raise ValueError("expected finite values, found NaN or infinity")
        scaled = (self.array.astype(np.float64) - black) * (255 / (white - black))
        return np.rint(scaled).clip(0, 255).astype(np.uint8)


def decode(
    encoded: bytes, channels: int, value_range: Sequence[float] = ()
) -> np.ndarray:
    """Decode an image of any format that PIL supports to uint8 [h, w, channels].

    For images of up to 8 bits, the result is identical to PIL's. 16-bit values are
    divided by 257. Pillow itself reduces some 16-bit images to 8 bits: color JPEG 2000,
    color SGI, color PPM, and images with premultiplied alpha. For these images, the
    result differs from a division by 257 by at most one level.

    Args:
      value_range: (low, high), the values of black and white in images with more than 8
        bits. (): 0 and the largest value, for unsigned integers of up to 16 bits.

    Raises:
      DataError: the image contains floats, signed integers or 32-bit integers, and
        `value_range` is ().
      Exception: an error of any type if PIL cannot read the image.
    """
    import simplejpeg
    from PIL import Image, UnidentifiedImageError

    if channels == 3 and ordinary_jpeg_size(encoded):
        # simplejpeg is faster than PIL and decodes to the same pixels, because both use
        # libjpeg-turbo.
        with suppress(ValueError):  # from a damaged JPEG that PIL may still decode
            return simplejpeg.decode_jpeg(encoded)
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            stored = stored_values(image, encoded)
            image = stored.to_image(value_range) if stored else image
            pixels = np.asarray(image.convert(PIL_MODES[channels]))
    except UnidentifiedImageError as error:
        is_tiff = encoded[:4] in (b"II*\0", b"MM\0*")
        kind = "TIFF that PIL cannot read" if is_tiff else "unknown image format"
        raise OSError(f"{kind} ({len(encoded):,} bytes)") from error
    return pixels.reshape(*pixels.shape[:2], channels)


def ordinary_jpeg_size(encoded: bytes) -> tuple[int, int] | None:
    """Return (height, width) of a color or gray JPEG, from its header.

    Returns:
      None for another format, for other color spaces such as CMYK, and for images with
      so many pixels that PIL warns or raises an error.
    """
    import simplejpeg
    from PIL import Image

    try:
        height, width, color_space, _ = simplejpeg.decode_jpeg_header(encoded)
    except ValueError:
        return None
    is_small = height * width < Image.MAX_IMAGE_PIXELS
    return (height, width) if color_space in ("YCbCr", "Gray") and is_small else None


def may_decode_crops(encoded: bytes) -> bool:
    """Return True if a crop of a JPEG can be decoded alone, without the rows below it.

    Such a JPEG is baseline and has a single scan, which extends to the end of the file.
    In other JPEGs, later data may change the pixels of the crop or make the image
    unreadable.
    """
    position, frame = 2, None
    try:
        while (marker := encoded[position + 1]) != START_OF_SCAN:
            frame = marker if marker in FRAMES else frame
            position += 2 + int.from_bytes(encoded[position + 2 : position + 4], "big")
    except IndexError:
        return False
    position += 2 + int.from_bytes(encoded[position + 2 : position + 4], "big")
    found = MARKER.search(encoded, position)
    is_last = found is not None and found.start() == len(encoded) - 2
    return frame == BASELINE and is_last and encoded.endswith(END_OF_IMAGE)


def stored_values(image: Any, encoded: bytes) -> StoredValues | None:
    """Return an image's values, or None if PIL's own conversion to 8 bits is used.

    Args:
      image: PIL image that is opened but not yet loaded.
      encoded: content of the image file.

    Raises:
      Exception: an error of any type if PIL cannot read the image.
    """
    tags = image.tag_v2 if image.format == "TIFF" else {}
    bits, signed = tags.get(BITS_PER_SAMPLE, (8,)), tags.get(SAMPLE_FORMAT) == SIGNED
    if image.mode.startswith("I;16"):
        depth = bits[0] if tags else 16  # TIFF files may have 12 bits
        array, limits = np.asarray(image), (0, 2**depth - 1)
    elif image.mode == "I" and image.format in ("PPM", "PNG"):
        array, limits = np.asarray(image), (0, 65535)  # PIL scales PPM to 16 bits
    elif image.mode in ("I", "F"):
        raw_modes = _raw_modes(image)
        if image.tile[0].codec_name == "libtiff":
            raw_modes = [NATIVE.get(raw_mode, raw_mode) for raw_mode in raw_modes]
        array, limits = _load(image, raw_modes), ()
        if raw_modes[0] == "I;32N":
            array = array.view(np.uint32)
    elif image.mode == "L" and signed:
        array, limits = np.asarray(image).view(np.int8), ()
    else:
        return _multiband_values(image, encoded, bits[0])
    if image.format == "FITS":  # PIL ignores the offset and scale in FITS files
        raise OSError(
            f"expected FITS with 8-bit values, found PIL mode {image.mode!r}; convert "
            "the file to TIFF"
        )
    if tags.get(PHOTOMETRIC) == 0:  # the value 0 is white
        limits = limits[::-1]
    return StoredValues(array, "L", limits)


def _multiband_values(image: Any, encoded: bytes, bits: int) -> StoredValues | None:
    """Return the values of a 16-bit image with several bands; None for other images.

    PIL decodes only the high byte of each value. Decoding the file again in the
    opposite byte order yields the low byte.
    """
    from PIL import Image

    mode, high_modes = image.mode, _raw_modes(image)
    if high_modes[:1] == ["LA;16B"]:
        # RGBA yields four 8-bit bands: both bytes of L and both bytes of A.
        array = _load(image, ["RGBA"]).astype(np.uint16)
        return StoredValues(array[..., 0] * 256 + array[..., 1], "L", (0, 65535))
    if bits == 16 and high_modes[0] in (*"RGBA", *"CMYK"):
        # PIL would otherwise decode each byte of uncompressed planes as a pixel.
        order = "B" if image.tag_v2.prefix == b"MM" else "L"
        high_modes = [f"{raw_mode};16{order}" for raw_mode in high_modes]
    if not high_modes or not re.fullmatch(r"[A-Z]+;16[BLN]", high_modes[0]):
        return None
    low_modes = [raw_mode[:-1] + OPPOSITE[raw_mode[-1]] for raw_mode in high_modes]
    high = _load(image, high_modes).astype(np.uint16)
    try:
        with Image.open(io.BytesIO(encoded)) as copy:
            low = _load(copy, low_modes)
    except ValueError:  # PIL does not support this raw mode in the opposite byte order
        low = high
    return StoredValues(high * 256 + low, mode, (0, 65535))


def _raw_modes(image: Any) -> list[str]:
    """Return each tile's raw mode, which is PIL's name of the tile's stored format."""
    arguments = [tile.args for tile in image.tile]
    return [str(a[0] if isinstance(a, tuple) and a else a) for a in arguments]


def _load(image: Any, raw_modes: Sequence[str]) -> np.ndarray:
    """Load an image, [h, w] or [h, w, bands], with the given raw modes of its tiles."""
    image.tile = [
        tile._replace(args=(raw_mode, *tile.args[1:]))
        if isinstance(tile.args, tuple)
        else tile._replace(args=raw_mode)
        for tile, raw_mode in zip(image.tile, raw_modes, strict=True)
    ]
    return np.asarray(image)
