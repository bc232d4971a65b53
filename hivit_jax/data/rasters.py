"""Decode images to 8 or 16 bits or floats, with any number of channels."""

import io
import logging
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from hivit_jax.data import decoding
from hivit_jax.data.decoding import (
    PIL_MODES,
    StoredValues,
    UnsuitableImageError,
    stored_values,
)
from hivit_jax.progress import counted

DTYPES = ("uint8", "uint16", "float32")  # values of `data.dtype`
# First bytes of files.
NPY = b"\x93NUMPY"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
WHITE_IS_0, PALETTE, YCBCR = 0, 3, 6  # values of the tag PhotometricInterpretation
# Luminance of red, green and blue, as in PIL.
LUMINANCE = (0.299, 0.587, 0.114)
LIMITS = {"uint8": (0, 255), "uint16": (0, 65535)}  # (black, white)
INSTALL_CODECS = "run pip install imagecodecs"


class ChannelError(UnsuitableImageError):
    """A file and the model have different numbers of channels."""


def decode(
    encoded: bytes,
    channels: int,
    value_range: tuple[float, ...] = (),
    dtype: str = "uint8",
) -> np.ndarray:
    """Decode an image file or NumPy array to [h, w, channels].

    The result depends on `dtype`:

    - uint8: values of more than 8 bits are reduced, as in `decoding.decode`.
    - uint16: 16-bit values as stored, and 8-bit values times 257.
    - float32: values as stored, even if they are integers.

    For three channels, grayscale is repeated. For one channel, color is converted to
    luminance. For one or three channels, an alpha channel is dropped; in TIFF files
    only with uint8.

    Args:
      value_range: used only for uint8; see `decoding.decode`.

    Raises:
      ChannelError: the number of channels in the file is wrong.
      UnsuitableImageError: `dtype` cannot represent the values in the file.
      Exception: an error of any type if the image cannot be read.
    """
    if uses_pil(encoded, channels, dtype):
        try:
            return decoding.decode(encoded, channels, value_range)
        except OSError:
            if not encoded.startswith(TIFF):
                raise
    stored = read_values(encoded, channels)
    values = _match_channels(stored.array, channels)
    stored = StoredValues(values, "", stored.limits)
    if dtype == "uint8":
        is_uint8 = values.dtype == np.uint8 and stored.limits == LIMITS["uint8"]
        return values if is_uint8 else stored.to_uint8(value_range)
    if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
        raise ValueError("the image contains values that are not finite")
    if stored.limits and stored.limits[0]:  # 0 is white: invert
        values = (stored.limits[0] - values.astype(np.int64)).astype(values.dtype)
    if dtype == "float32":
        return values.astype(np.float32)
    if values.dtype == np.uint8:
        return values.astype(np.uint16) * 257
    if values.dtype != np.uint16:
        raise UnsuitableImageError(
            f"data.dtype='uint16': expected unsigned values of 8 or 16 bits, found "
            f"{values.dtype} from {values.min():g} to {values.max():g}",
            "set data.dtype=float32 and data.scale, the value that becomes 1",
        )
    return values


def uses_pil(encoded: bytes, channels: int, dtype: str) -> bool:
    """Return True if `decode` passes a file to `decoding.decode`, which uses PIL."""
    if dtype != "uint8" or channels not in PIL_MODES or encoded.startswith(NPY):
        return False
    return not has_other_bands(encoded)  # last, because parsing a TIFF header is slow


def num_frames_read(encoded: bytes, channels: int, dtype: str) -> int:
    """Return the number of frames of a file, such as TIFF pages, read by `decode`."""
    if uses_pil(encoded, channels, dtype):
        return 1
    return read_values(encoded, channels).num_frames


def has_other_bands(encoded: bytes) -> bool:
    """Return True for a TIFF with bands that are neither color nor alpha.

    PIL drops such bands, or cannot read them.
    """
    if not encoded.startswith(TIFF):
        return False
    tifffile = _tifffile()
    try:
        with tifffile.TiffFile(io.BytesIO(encoded)) as file:
            return tifffile.EXTRASAMPLE.UNSPECIFIED in file.pages[0].extrasamples
    except Exception:  # damaged files cause errors of many types; PIL reports them
        return False


@cache
def _tifffile() -> ModuleType:
    """Import tifffile and disable its log messages.

    The messages are about files that are decoded anyway, or that cause an error with
    its own text.
    """
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    return tifffile


def read_values(encoded: bytes, channels: int = 0) -> StoredValues:
    """Return the stored values of an image, as an array [h, w, bands] with limits.

    Args:
      channels: number of channels of the model. If it is 1 or 3, an alpha channel that
        PIL decodes is dropped. 0: all bands are returned.

    Raises:
      Exception: an error of any type if the image cannot be read.
    """
    from PIL import UnidentifiedImageError

    if encoded.startswith(NPY):
        array = np.load(io.BytesIO(encoded), allow_pickle=False)
        return _with_bands(array, "")
    try:
        if encoded.startswith(TIFF):
            return _read_tiff(encoded, channels)
        return _read_with_pil(encoded, channels)
    except UnidentifiedImageError as error:
        raise OSError(f"unknown image format ({len(encoded):,} bytes)") from error


def _with_bands(array: np.ndarray, axes: str, inverted: bool = False) -> StoredValues:
    """Return the values of an array as [h, w, bands], with the limits of its dtype.

    Args:
      axes: letter of each axis, with Y and X for rows and columns; "": rows and
        columns come first.
      inverted: True if 0 is white.
    """
    if axes:
        array = np.moveaxis(array, (axes.index("Y"), axes.index("X")), (0, 1))
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.dtype.kind not in "uif":
        raise ValueError(
            f"expected an array [h, w] or [h, w, channels] of numbers, found "
            f"{array.shape} of {array.dtype}"
        )
    limits = LIMITS.get(array.dtype.name, ())
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return StoredValues(array, "", limits[::-1] if inverted else limits)


def _read_tiff(encoded: bytes, channels: int) -> StoredValues:
    """Read the first series of a TIFF file, or its first page with PIL.

    PIL reads palettes and YCbCr. It also reads single pages with a compression that
    tifffile does not support without imagecodecs.

    Raises:
      OSError: the file has no page, or its compression requires imagecodecs.
    """
    from PIL import UnidentifiedImageError

    with _tifffile().TiffFile(io.BytesIO(encoded)) as file:
        if not len(file.pages):
            raise OSError(f"TIFF file contains no image ({len(encoded):,} bytes)")
        series, page = file.series[0], file.pages[0]
        photometric = int(page.photometric)
        if photometric in (PALETTE, YCBCR):
            return _read_with_pil(encoded, channels)
        try:
            array = series.asarray()
        except (ValueError, ImportError) as error:
            if isinstance(error, ValueError) and "imagecodecs" not in str(error):
                raise
            if len(series) > 1:  # PIL would read only the first page
                raise _missing_codec(page, len(series)) from error
            try:
                return _read_with_pil(encoded, channels)
            except UnidentifiedImageError:
                raise _missing_codec(page, len(series)) from error
        axes = "".join(series.axes)
        if "Y" not in axes or "X" not in axes:
            raise ValueError(f"expected a TIFF with rows and columns, found {axes}")
        stored = _with_bands(array, axes, inverted=photometric == WHITE_IS_0)
        return replace(stored, num_frames=len(series))


def _missing_codec(page: Any, num_pages: int) -> OSError:
    """Return the error for a TIFF file that only imagecodecs can decode.

    Args:
      page: tifffile's description of the first page.
    """
    compression = getattr(page.compression, "name", page.compression)
    predictor = f" and predictor {page.predictor}" if page.predictor != 1 else ""
    return OSError(
        f"TIFF file with {compression} compression{predictor}, {page.bitspersample} "
        f"bits, {counted(num_pages, 'page')}: decoding requires the package "
        f"imagecodecs; {INSTALL_CODECS}"
    )


def _read_with_pil(encoded: bytes, channels: int) -> StoredValues:
    """Read an image that PIL supports.

    Raises:
      UnidentifiedImageError: PIL does not support the file format.
    """
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        stored = stored_values(image, encoded)
        if stored is None:
            mode = image.mode
            if mode == "1":
                mode = "L"
            elif mode not in ("L", "LA", "RGB", "RGBA", "CMYK"):
                mode = "RGBA" if image.has_transparency_data else "RGB"
            array = np.asarray(image.convert(mode))
            stored = StoredValues(array, mode, LIMITS["uint8"])
    array = stored.array
    if array.dtype == np.int32 and stored.limits:
        array = array.astype(np.uint16)
    array = array.reshape(*array.shape[:2], -1)
    if channels in PIL_MODES and stored.mode in ("LA", "RGBA"):
        array = array[..., :-1]
    return StoredValues(array, stored.mode, stored.limits)


def _match_channels(array: np.ndarray, channels: int) -> np.ndarray:
    """Return an image [h, w, bands] as [h, w, channels].

    Raises:
      ChannelError: the bands cannot be converted to `channels` channels.
    """
    num_bands = array.shape[-1]
    if num_bands == channels:
        return array
    if array.shape[0] == channels:  # a NumPy array with channels first
        return np.moveaxis(array, 0, -1)
    if (num_bands, channels) == (1, 3):
        return np.repeat(array, 3, -1)
    if (num_bands, channels) == (3, 1):
        gray = array.astype(np.float64) @ np.array(LUMINANCE)
        gray = gray if array.dtype.kind == "f" else np.rint(gray)
        return gray[..., None].astype(array.dtype)
    raise ChannelError(
        f"expected {counted(channels, 'channel')}, found {num_bands}",
        f"set model.in_channels={num_bands}, or leave the file out with data.exclude",
    )
