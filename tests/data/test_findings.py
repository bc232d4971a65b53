"""Tests of findings about pixel values that decoding to 8 bits loses or clips."""

import io

import numpy as np
import pytest
from PIL import Image

from benchmarks.photographs import photographs
from hivit_jax.data.decoding import decode
from hivit_jax.data.findings import CLIPPED, LOST, image_findings

RAMP = np.arange(48 * 64).reshape(48, 64)
UNIT = np.float32(RAMP / RAMP.max())
PHOTO = photographs()["cat"][80:128, 150:214]


def findings(values, value_range=(), channels=1, kind="TIFF"):
    """Return the findings of an image file as {finding: detail}."""
    image = values if isinstance(values, Image.Image) else Image.fromarray(values)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    encoded = buffer.getvalue()
    pixels = decode(encoded, channels, value_range)
    name = f"a.{kind.lower()}"
    return image_findings(encoded, lambda: name, pixels, (48, 64), 64, value_range)


@pytest.mark.parametrize(
    ("values", "value_range", "detail"),
    [
        (RAMP.astype(np.uint16), (), "13 of 3072 levels remain; values are 0 to 3071"),
        (RAMP.astype(np.uint16) % 2, (), "1 of 2 levels remain; values are 0 to 1"),
        # 8-bit values in a 16-bit file are divided by 257 and become 0 or 1.
        (PHOTO[..., 0].astype(np.uint16), (), "2 of "),
        (UNIT, (0, 100), "4 of 3072 levels remain"),
        (UNIT + 2, (0, 1), "1 of 3072 levels remain; values are 2 to 3"),
        (PHOTO[..., 0].astype(np.int32), (-(2**31), 2**31), "1 of "),
    ],
)
def test_images_that_lose_levels_are_reported(values, value_range, detail):
    """An image is reported if few of its levels remain.

    Either only one of several levels remains, or the remaining levels are fewer than 64
    and less than a quarter of all levels.
    """
    reported = findings(values, value_range)
    assert reported[LOST].startswith(detail)
    assert f"{values.dtype}, reduced to 8 bits" in reported


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_image_in_the_alpha_channel_only_is_reported(mode):
    """Decoding drops the alpha channel, so that one level remains."""
    image = Image.new("RGBA", (64, 48))
    image.putalpha(Image.fromarray(PHOTO[..., 0]))
    image = image.convert("LA") if mode == "LA" else image
    if mode == "P":
        image = Image.fromarray((RAMP % 2).astype(np.uint8))
        image.putpalette([0] * 6)
        image.info["transparency"] = 1
    reported = findings(image, channels=3, kind="PNG")
    assert reported["alpha channel, dropped"] == ""
    assert "alpha" in reported[LOST]
    photo = Image.fromarray(PHOTO)
    photo.putalpha(Image.fromarray(PHOTO[..., 0]))
    assert LOST not in findings(photo, channels=3, kind="PNG")


@pytest.mark.parametrize(
    ("values", "value_range"),
    [
        (PHOTO[..., 0].astype(np.uint16) * 257, ()),
        (PHOTO[..., 0].astype(np.uint16) * 16, (0, 4095)),
        (PHOTO[..., 1].astype(np.float32) / 255, (0, 1)),
        (np.zeros((48, 64), np.uint16), ()),  # has one level already
        (PHOTO, ()),
        (PHOTO[..., 0] // 86 * 86, ()),
    ],
)
def test_kept_values_are_not_reported_as_lost_or_clipped(values, value_range):
    reported = findings(values, value_range, channels=3)
    assert {LOST, CLIPPED}.isdisjoint(reported)


def test_values_outside_value_range_are_clipped_but_not_lost():
    reported = findings(UNIT, (0.25, 1))
    assert reported[CLIPPED] == "25.00% of the values"
    assert LOST not in reported
    assert CLIPPED not in findings(UNIT, (0, 1))
