"""Find unusual properties of an image file, and values that decoding loses."""

import io
import os
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from hivit_jax.data.decoding import PIL_MODES, stored_values
from hivit_jax.data.rasters import num_frames_read, read_values, uses_pil

LOST, CLIPPED = "with lost values", "clipped to data.value_range"


def image_findings(
    encoded: bytes,
    get_name: Callable[[], str],
    pixels: np.ndarray,
    size: Sequence[int],
    canvas: int,
    value_range: Sequence[float],
) -> dict[str, str]:
    """Return {finding: detail} of an image; details may be "".

    For a YCbCr JPEG without EXIF, only the header is read. Any other image is opened
    with PIL, and its format is compared with the suffix of its name.

    Args:
      encoded: content of the file.
      get_name: returns the name of the file.
      pixels: the decoded image, [h, w, C]. Values are checked only if it is uint8.
      size: (height, width) of the model's image.
      canvas: side of the square array in which crops are sent to the device for
        resizing; 0: the device does not resize.
      value_range: see `decoding.decode`.
    """
    shape, channels = pixels.shape, pixels.shape[2]
    checks = {
        # The host may have to resize crops of an image with a side longer than canvas.
        f"over {canvas}, may be slower": 0 < canvas < max(shape),
        f"under {size[0]} x {size[1]}": shape[0] < size[0] or shape[1] < size[1],
    }
    value_findings: dict[str, str] = {}
    has_exif, color_space = encoded.find(b"Exif", 0, 65536) >= 0, ""
    with suppress(ValueError):  # from a file that is not a JPEG
        color_space = simplejpeg.decode_jpeg_header(encoded)[2]
    if has_exif or color_space != "YCbCr":
        with suppress(Exception), Image.open(io.BytesIO(encoded)) as image:
            suffix = os.path.splitext(get_name())[1].lower()
            expected = Image.registered_extensions().get(suffix, image.format)
            checks |= {
                f"{image.format} named {suffix}": image.format not in (expected, "MPO"),
                "CMYK": image.mode == "CMYK",
                "grayscale": image.mode in ("1", "L", "LA"),
                "palette": image.mode in ("P", "PA"),
                "alpha channel, dropped": channels in PIL_MODES
                and image.has_transparency_data,
            }
            rotated = has_exif and image.getexif().get(ExifTags.Base.Orientation, 1) > 1
            checks["EXIF rotation, not applied"] = rotated
            if (num_frames := getattr(image, "n_frames", 1)) > 1:
                num_read = num_frames_read(encoded, channels, pixels.dtype.name)
                verb = "one is" if num_read == 1 else f"{num_read} are"
                checks[f"several frames, {verb} read"] = num_read < num_frames
        if pixels.dtype == np.uint8:
            value_findings = _value_findings(encoded, pixels, value_range)
    return {finding: "" for finding, holds in checks.items() if holds} | value_findings


def _value_findings(
    encoded: bytes, pixels: np.ndarray, value_range: Sequence[float]
) -> dict[str, str]:
    """Return {finding: detail} for more than 8 bits, lost values and clipped values.

    Values count as lost in three cases:

    - the number of levels (distinct values) that remain is below 64 and below a quarter
      of the number of stored levels;
    - only one of several levels remains;
    - only the dropped alpha channel varies.

    If no values are lost, values that are not between black and white count as clipped.
    """
    channels = pixels.shape[2]
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if image.has_transparency_data and pixels.min() == pixels.max():
                low, high = image.convert("RGBA").getchannel("A").getextrema()
                if low < high:
                    reason = "because the alpha channel is dropped"
                    return {LOST: f"one level remains, {reason}"}
            read_as_raster = not uses_pil(encoded, channels, "uint8")
            # None: the file stores at most 8 bits.
            deep_values = None if read_as_raster else stored_values(image, encoded)
    except UnidentifiedImageError:  # NumPy arrays and TIFF with many bands
        read_as_raster = True
    if read_as_raster:
        deep_values = read_values(encoded, channels)
        deep_values = None if deep_values.array.dtype == np.uint8 else deep_values
    if deep_values is None:
        return {}
    drops_alpha = channels in PIL_MODES and deep_values.mode == "RGBA"
    values = deep_values.array[..., :3] if drops_alpha else deep_values.array
    low, high = sorted(deep_values.black_and_white(value_range))
    found = {f"{values.dtype}, reduced to 8 bits": ""}
    num_levels, num_remaining = len(np.unique(values)), len(np.unique(pixels))
    outside_fraction = np.mean((values < low) | (values > high))
    if num_remaining < min(num_levels, 256) / 4 or num_remaining == 1 < num_levels:
        found[LOST] = (
            f"{num_remaining} of {num_levels} levels remain; values are "
            f"{values.min():g} to {values.max():g}, black and white are {low:g} and "
            f"{high:g}"
        )
    elif outside_fraction:
        found[CLIPPED] = f"{outside_fraction:.2%} of the values"
    return found
