"""Tests of decoding and resizing rasters: any dtype, any number of channels.

test_decoding.py tests images of 1 or 3 channels that Pillow decodes to 8 bits.
"""

import io
from importlib.util import find_spec

import numpy as np
import pytest
import tifffile
from datasets import encode, folder_config, noise_image
from numpy.testing import assert_array_equal
from PIL import Image

from hivit_jax import inputs
from hivit_jax.augment import resample
from hivit_jax.data import crops, decoding, findings
from hivit_jax.data.crops import Box, Crop
from hivit_jax.data.rasters import ChannelError, decode
from hivit_jax.data.summary import Summary
from hivit_jax.data.transforms import ImageTransform
from hivit_jax.errors import ConfigError, DataError
from hivit_jax.tasks import defaults

NOISE = np.random.RandomState(0).randint(0, 65536, (18, 16, 5)).astype(np.uint16)


def npy(array):
    """Encode an array as NPY."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def tiff(array, **options):
    """Encode an array as TIFF."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def color_tiff(**options):
    """Encode three channels of `NOISE` as TIFF."""
    return tiff(NOISE[..., :3], photometric="rgb", **options)


# Kind of file -> (encoded file, pixel values).
KINDS = {
    "npy": (npy(NOISE), NOISE),
    "npy, big-endian": (npy(NOISE.astype(">u2")), NOISE),
    "npy, Fortran order": (npy(np.asfortranarray(NOISE)), NOISE),
    "npy, channels first": (npy(np.moveaxis(NOISE, -1, 0)), NOISE),
    "tiff": (tiff(NOISE, photometric="minisblack", planarconfig="contig"), NOISE),
    "tiff, planes": (
        tiff(
            np.ascontiguousarray(np.moveaxis(NOISE, -1, 0)),
            photometric="minisblack",
            planarconfig="separate",
        ),
        NOISE,
    ),
    "tiff, deflate": (
        tiff(NOISE, photometric="minisblack", planarconfig="contig", compression=8),
        NOISE,
    ),
    "tiff, pages": (
        tiff(np.ascontiguousarray(np.moveaxis(NOISE, -1, 0)), photometric="minisblack"),
        NOISE,
    ),
    "tiff, color": (color_tiff(), NOISE[..., :3]),
    "tiff, big-endian": (color_tiff(byteorder=">"), NOISE[..., :3]),
    "tiff, gray": (tiff(NOISE[..., 0]), NOISE[..., :1]),
    "tiff, white is 0": (
        tiff(NOISE[..., 0], photometric="miniswhite"),
        65535 - NOISE[..., :1],
    ),
    "png, gray": (encode(NOISE[..., 0], "PNG"), NOISE[..., :1]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_16_bit_files_keep_all_bits_unless_decoded_to_uint8(kind):
    """uint8 values are the stored values divided by 257, rounded."""
    encoded, values = KINDS[kind]
    channels = values.shape[-1]
    for dtype in ("uint16", "float32"):
        decoded = decode(encoded, channels, dtype=dtype)
        assert decoded.dtype == dtype
        assert_array_equal(decoded, values)
    reduced = decode(encoded, channels)
    assert reduced.dtype == np.uint8
    assert_array_equal(reduced, np.rint(values / 257))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_8_bit_files_are_multiplied_by_257_for_uint16(channels):
    """Decoding to uint8 or float32 keeps the values."""
    values = noise_image(18, 16, channels)
    options = dict(photometric="minisblack", planarconfig="contig")
    encoded_tiff = tiff(values, **options) if channels > 1 else tiff(values[..., 0])
    for encoded in (npy(values), encoded_tiff):
        assert_array_equal(decode(encoded, channels), values)
        assert_array_equal(decode(encoded, channels, dtype="float32"), values)
        wide = decode(encoded, channels, dtype="uint16")
        assert wide.dtype == np.uint16
        assert_array_equal(wide, values * np.uint16(257))


def test_alpha_is_decoded_if_the_model_has_a_channel_for_it():
    values = noise_image(18, 16, 4)
    encoded = encode(values, "PNG")
    assert_array_equal(decode(encoded, 4), values)
    assert_array_equal(decode(encoded, 3), values[..., :3])
    assert_array_equal(decode(encoded, 3, dtype="float32"), values[..., :3])
    gray = encode(Image.fromarray(values[..., :2], "LA"), "PNG")
    assert_array_equal(decode(gray, 2), values[..., :2])
    assert_array_equal(decode(gray, 1, dtype="uint16") // 257, values[..., :1])


def test_gray_and_color_are_converted_to_each_other():
    """Gray is repeated. Colors are averaged with the weights of PIL."""
    gray = decode(KINDS["png, gray"][0], 3, dtype="uint16")
    assert_array_equal(gray, np.repeat(NOISE[..., :1], 3, -1))
    color = KINDS["tiff, color"][0]
    expected = NOISE[..., :3] @ np.array([0.299, 0.587, 0.114])
    decoded = decode(color, 1, dtype="uint16")[..., 0]
    assert np.abs(decoded - expected).max() < 0.501
    jpeg = encode(noise_image(18, 16, 3), "JPEG")
    expected = decoding.decode(jpeg, 3)
    assert_array_equal(decode(jpeg, 3), expected)
    assert_array_equal(decode(jpeg, 3, dtype="float32"), expected)


def test_floats_require_float32_or_a_range():
    """All types of numbers can be decoded to float32. NaN is an error."""
    values = (NOISE / 100 - 300).astype(np.float32)
    encoded = npy(values)
    assert_array_equal(decode(encoded, 5, dtype="float32"), values)
    assert_array_equal(decode(npy(values.astype("f8")), 5, dtype="float32"), values)
    integers = npy(NOISE.astype(np.int32) - 9)
    assert_array_equal(decode(integers, 5, dtype="float32"), NOISE - 9.0)
    expected = np.rint((values.astype(float) + 300) / 400 * 255).clip(0, 255)
    assert_array_equal(decode(encoded, 5, (-300, 100)), expected)
    with pytest.raises(DataError, match="found float32 from .*; set data.dtype="):
        decode(encoded, 5, dtype="uint16")
    with pytest.raises(DataError, match="data.value_range"):
        decode(encoded, 5)
    values[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        decode(npy(values), 5, dtype="float32")


@pytest.mark.parametrize(
    ("encoded", "error", "message"),
    [
        (KINDS["npy"][0], DataError, "expected 4 channels, found 5; set model.in_cha"),
        (npy(np.zeros((2, 2, 2, 4))), ValueError, r"found \(2, 2, 2, 4\) of float64"),
        (npy(np.array(["x"])), ValueError, "of numbers, found"),
        (npy(NOISE)[:-9], ValueError, None),
        (b"no image", OSError, "unknown image format"),
        (KINDS["tiff"][0][:100], Exception, None),
        (b"II*\0\0\0\0\0", OSError, r"TIFF file contains no image \(8 bytes\)"),
    ],
)
def test_unsuitable_and_damaged_files_are_errors(encoded, error, message, caplog):
    """tifffile's own log messages are disabled."""
    with pytest.raises(error, match=message):
        decode(encoded, 4, dtype="uint16")
    assert not caplog.records


NO_CODECS = pytest.mark.skipif(
    find_spec("imagecodecs") is not None, reason="imagecodecs is installed"
)


def lzw_pages(*pages):
    """Encode 8-bit images as the pages of a TIFF file with LZW compression."""
    first, *others = map(Image.fromarray, pages)
    options = dict(compression="tiff_lzw", save_all=True, append_images=others)
    return encode(first, "TIFF", **options)


@NO_CODECS
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_error_for_a_missing_codec_names_the_compression_and_the_package(dtype):
    """Pillow cannot read the first file, and reads only one page of the second."""
    five_bands = io.BytesIO(KINDS["tiff"][0])
    with tifffile.TiffFile(five_bands, mode="r+") as file:
        file.pages[0].tags["Compression"].overwrite(tifffile.COMPRESSION.LZW)
    pages = lzw_pages(*noise_image(4, 9, 8))
    for encoded, channels, facts in (
        (five_bands.getvalue(), 5, "16 bits, 1 page"),
        (pages, 4, "8 bits, 4 pages"),
    ):
        message = f"LZW compression, {facts}: .* imagecodecs; run pip install imagecod"
        with pytest.raises(OSError, match=message):
            decode(encoded, channels, dtype=dtype)


@pytest.mark.parametrize("shape", [(9, 8), (9, 8, 3), (9, 8, 4)])
def test_single_lzw_page_is_read_without_imagecodecs(shape):
    pixels = noise_image(*shape)
    decoded = decode(lzw_pages(pixels), pixels[0, 0].size, dtype="float32")
    assert_array_equal(decoded, pixels.reshape(decoded.shape))


# Resizing


def resize_exactly(pixels, span, size, axis, radius, antialias=True):
    """Resize one axis in float64 with an independent implementation of the filters.

    Args:
      span: (start, length, number of pixels that the filter may read).
      radius: 1: bilinear filter; 2: bicubic filter.
    """
    start, length, extent = span
    scale = length / size
    stretch = max(scale, 1.0) if antialias else 1.0
    rows = []
    for i in range(size):
        center = start + (i + 0.5) * scale
        x = np.abs(np.arange(extent) + 0.5 - center) / stretch
        if radius == 1:
            weights = np.maximum(1 - x, 0)
        else:
            near, far = 1.5 * x**3 - 2.5 * x**2 + 1, 4 - 8 * x + 5 * x**2 - x**3
            weights = np.where(x < 1, near, np.where(x < 2, far / 2, 0))
        rows.append(weights / weights.sum())
    source = np.take(pixels, range(extent), axis).astype(np.float64)
    return np.moveaxis(np.tensordot(np.array(rows), source, (1, axis)), 0, axis)


# (crop, size of the result)
CROPS = [
    (Crop(Box(5, 3, 401, 307), Box(5, 3, 401, 307)), (64, 96)),
    (crops.center_crop(470, 503, (448, 416), 0.875), (448, 416)),
    (crops.center_crop(470, 503, (64, 64), 0.7), (64, 64)),
    (Crop(Box(0, 0, 40, 30), Box(0, 0, 40, 30)), (224, 200)),
]


@pytest.mark.slow
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_resizing_differs_from_float64_by_less_than_one_level(
    dtype, interpolation, antialias
):
    """Device and host differ from `resize_exactly` by less than 1/65535 of the range.

    Edges in the image span the whole range, because errors of position change values
    most at such edges.
    """
    edges = np.random.RandomState(1).randint(0, 2, (470, 503, 2)) * 65535
    pixels, options = edges.astype(dtype), (interpolation, antialias)
    radius = resample.FILTER_RADIUS[interpolation]
    for crop, size in CROPS:
        canvas = np.zeros((512, 512, 2), dtype)
        spans = crops.paste_crop(pixels, crop, canvas, size, *options)
        expected = canvas
        for axis in (1, 0):
            expected = resize_exactly(
                expected, spans[axis], size[axis], axis, radius, antialias
            )
        if dtype == "uint16":
            expected = expected.clip(0, 65535)
        precise = np.float32([[*map(resample.precise_span, spans, size)]])
        device = np.asarray(resample.resample(canvas[None], precise, size, *options))[0]
        assert device.dtype == np.float32
        # Rounding errors of float32 stay below 0.25. The documented limit is 1.
        assert np.abs(device - expected).max() < 0.25
        host = np.zeros((*size, 2), dtype)
        crops.paste_crop(pixels, crop, host, size, *options)
        assert np.abs(host - expected).max() < (0.75 if dtype == "uint16" else 0.25)


def test_channels_are_resized_independently():
    """Of four 8-bit channels, the fourth is not used as an alpha channel."""
    pixels = noise_image(60, 50, 4)
    spans = (2.5, 40, 60), (0, 50, 50)
    for antialias in (True, False):
        options = (24, 20), "bicubic", antialias
        resized = crops.resize(pixels, spans, *options)
        assert resized.dtype == np.uint8
        for k in range(4):
            resized_channel = crops.resize(pixels[..., k : k + 1], spans, *options)
            assert_array_equal(resized[..., k : k + 1], resized_channel)


# Configs


@pytest.fixture
def tiles(tmp_path, cache_directory):
    """Return (directory, values [16, 30, 26, 4]): eight 16-bit images per split."""
    values = np.random.RandomState(0).randint(0, 10000, (16, 30, 26, 4))
    for k, tile in enumerate(values.astype(np.uint16)):
        path = tmp_path / ("train" if k < 8 else "val") / f"c{k % 2}" / f"{k}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        options = dict(photometric="minisblack", planarconfig="contig")
        path.write_bytes(tiff(tile, **options))
    return tmp_path, values


FOUR_CHANNELS = dict(
    model__in_channels=4,
    model__image_size=16,
    data__mean=(0.1, 0.2, 0.3, 0.4),
    data__std=(0.5,) * 4,
)


@pytest.mark.slow
def test_dtypes_reach_the_batches(tiles):
    """Batches have data.dtype; `preprocess` divides them by data.scale.

    All dtypes, and resizing on device and host, give similar pixels.
    """
    root, _ = tiles
    options = FOUR_CHANNELS | dict(data__crop_pct=1.0, data__canvas=32)
    first_images, means = {}, np.array(FOUR_CHANNELS["data__mean"])
    # scale 0 is the default: the largest integer. white: the value that becomes 1.
    for dtype, scale, white in (
        ("uint8", 0, 65535),
        ("uint16", 0, 65535),
        ("uint16", 10000, 10000),
        ("float32", 10000, 10000),
    ):
        keys = options | dict(data__dtype=dtype, data__scale=scale)
        config = folder_config(root, **keys)
        task = inputs.make_task(config)
        batch = next(inputs.eval_batches(config))
        assert batch["image"].dtype == dtype
        images = np.asarray(task.preprocess(batch))
        assert images.shape == (8, 16, 16, 4)
        images = (images * 0.5 + means) * white
        reference = first_images.setdefault(white, images)
        # uint8 has steps of 257.
        assert np.abs(images - reference).max() < (400 if white == 65535 else 0.1)
        host_config = folder_config(root, **keys | dict(data__canvas=0))
        host_batch = next(inputs.eval_batches(host_config))
        host_images = (np.asarray(task.preprocess(host_batch)) * 0.5 + means) * white
        limit = 400 if dtype == "uint8" else 0.75
        assert np.abs(host_images - images).max() < limit
        notes = inputs.check_splits(config, task)
        assert len(notes) == (2 if dtype == "uint8" else 0)  # one per split
    config = folder_config(root, **options)
    assert (
        "8 of 8 checked images of the train split have 16 bits"
        in (inputs.check_splits(config, inputs.make_task(config))[0])
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(dtype="float32"), "data.scale=0; expected data.scale"),
        (
            dict(dtype="uint16", value_range=(0, 9)),
            r"value_range=\(0, 9\) with data.dty",
        ),
        (dict(dtype="uint16", randaugment=True), "randaugment=True with data.dtype"),
        (dict(dtype="uint16", mean=(2.0,) * 3), "expected 0 to 1, because pixels are"),
        (dict(dtype="int8"), "expected 'uint8' or 'uint16' or 'float32'"),
    ],
)
def test_contradictory_or_invalid_keys_are_an_error(keys, message):
    with pytest.raises(ConfigError, match=message):
        folder_config("x", **{f"data__{key}": value for key, value in keys.items()})


def test_pixel_scale_of_floats_is_data_scale():
    data = folder_config("x", data__dtype="float32", data__scale=8.0).data
    assert defaults.pixel_scale(data) == 8


def test_training_transform_writes_16_bit_crops_into_the_canvas():
    transform = ImageTransform(
        batch_size=1,
        size=(8, 8),
        channels=5,
        canvas=32,
        crop_scale=(0.3, 1.0),
        dtype="uint16",
    )
    shapes = transform.shapes[0]
    out = {name: np.zeros(s.shape, s.dtype) for name, s in shapes.items()}
    transform({"image": npy(NOISE)}, [0.4] * transform.draws, out)
    assert out["box"].shape == (2, 5)
    assert out["image"].dtype == np.uint16
    assert np.isin(out["image"], [*NOISE.flat, 0]).all()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("layout", ["planes", "pixels"])
def test_bands_that_are_neither_color_nor_alpha_are_never_dropped(bits, layout):
    """PIL drops the fourth band of interleaved pixels and cannot read planes."""
    random = np.random.RandomState(0)
    pixels = random.randint(0, 2**bits, (9, 8, 4)).astype(f"uint{bits}")
    file = io.BytesIO()
    if layout == "planes":
        options = dict(photometric="minisblack", planarconfig="separate")
        tifffile.imwrite(file, pixels.transpose(2, 0, 1), **options)
    else:
        options = dict(photometric="rgb", extrasamples=["unspecified"])
        tifffile.imwrite(file, pixels, **options)
    for dtype in ("uint8", "uint16"):
        with pytest.raises(ChannelError, match="expected 3 channels, found 4"):
            decode(file.getvalue(), 3, dtype=dtype)
    expected = pixels if bits == 8 else np.rint(pixels / 257)
    assert_array_equal(decode(file.getvalue(), 4), expected)
    found = findings.image_findings(
        file.getvalue(), lambda: "a.tif", expected.astype(np.uint8), (8, 8), 0, ()
    )
    assert findings.LOST not in found


ALPHA, FRAMES = "alpha channel, dropped", "several frames, one is read"
PAGES = tiff(noise_image(4, 9, 8), photometric="minisblack")


def append_page(encoded):
    """Append a page of another size to an encoded TIFF file."""
    buffer = io.BytesIO(encoded)
    tifffile.imwrite(buffer, noise_image(5, 6), append=True)
    return buffer.getvalue()


RGBA = noise_image(9, 8, 4)
GIF = encode(
    Image.fromarray(noise_image(9, 8)),
    "GIF",
    save_all=True,
    append_images=[Image.fromarray(255 - noise_image(9, 8))],
)


@pytest.mark.parametrize(
    ("encoded", "channels", "dtype", "expected"),
    [
        (encode(RGBA, "TIFF"), 4, "uint8", set()),
        (encode(RGBA, "TIFF"), 3, "uint8", {ALPHA}),
        (encode(RGBA, "PNG"), 4, "uint16", set()),
        (encode(RGBA, "PNG"), 3, "uint16", {ALPHA}),
        (PAGES, 4, "uint8", set()),
        (PAGES, 4, "uint16", set()),
        (PAGES, 3, "uint8", {FRAMES}),
        (append_page(PAGES), 4, "uint8", {"several frames, 4 are read"}),
        (GIF, 3, "uint8", {FRAMES}),
        (GIF, 3, "float32", {FRAMES}),
    ],
)
def test_findings_about_alpha_and_frames_agree_with_the_decoder(
    encoded, channels, dtype, expected
):
    """Only parts of the file that the decoder drops are reported."""
    pixels = decode(encoded, channels, dtype=dtype)
    found = findings.image_findings(encoded, lambda: "a", pixels, (8, 8), 0, ())
    assert {f for f in found if "alpha" in f or "frames" in f} == expected
    summary = Summary(channels)
    summary.add(0, encoded, pixels)
    is_rgba_tiff = encoded.startswith(b"II") and ALPHA in expected
    assert summary.dropped == ({0: "4 channels, 3 are used"} if is_rgba_tiff else {})


def test_levels_of_all_bands_are_compared():
    """The first page has one level; the levels of the other page are lost."""
    values = np.zeros((2, 48, 64), np.uint16)
    values[1] = np.arange(48 * 64).reshape(48, 64)
    encoded = tiff(values, photometric="minisblack")
    pixels = decode(encoded, 2)
    found = findings.image_findings(encoded, lambda: "a.tif", pixels, (8, 8), 0, ())
    assert found[findings.LOST].startswith("13 of 3072 levels remain")
