"""Tests of the figures of a run."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from PIL import Image

from hivit_jax.reporting import figures, metrics


def test_reconstruction_panels_undo_the_normalization():
    """The image has 1x4 pixels and two channels. Its two middle pixels are masked."""
    mean, std = (0.5, 0.25), (0.5, 0.25)
    original = np.array([0.0, 0.25, 0.75, 1.0])[None, None, :, None] * [1, 0.5]
    predicted = np.array([0.25, 0.5, 1.5, -1.0])[None, None, :, None] * [1, 0.5]
    is_masked = np.array([0, 1, 1, 0])[None, None, :, None]
    panels = figures.reconstruction_panels(
        (original - mean) / std, (predicted - mean) / std, is_masked, mean, std
    )
    assert panels.shape == (1, 4, 1, 4, 2)
    clipped = np.clip(predicted, 0, 1)
    expected = [
        original,
        np.where([[[[0], [1], [1], [0]]]], 0.5, original),
        clipped,
        np.stack(
            [original[0, 0, 0], clipped[0, 0, 1], clipped[0, 0, 2], original[0, 0, 3]]
        )[None, None],
    ]
    assert_allclose(panels[0], np.concatenate(expected), atol=1e-12)
    assert panels.min() == 0
    assert panels.max() == 1


def test_reconstruction_panels_clip_values():
    images = np.full((1, 2, 2, 1), 3.0)
    is_masked = np.ones((1, 2, 2, 1))
    panels = figures.reconstruction_panels(images, -images, is_masked, (0.5,), (0.5,))
    assert panels[0, :, 0, 0, 0].tolist() == [1, 0.5, 0, 0]


def pixels_of(path):
    """Return the pixels of an image file."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("channels", [1, 3])
def test_draw_run_writes_curves_and_images(workdir, channels):
    writer = metrics.Writer(workdir)
    for step in (10, 20):
        writer.scalars(step, {"loss": 1 / step})
        writer.scalars(step, {"eval/loss": 2 / step, "eval/top1": step / 40})
    writer.close()
    panels = np.random.RandomState(0).rand(2, 4, 16, 16, channels)
    images = {"reconstruction": figures.reconstructions(panels, "title")}
    figures.draw_run(workdir, 20, images)
    paths = {
        "curves": workdir / "figures" / "curves.png",
        "reconstruction": workdir / "figures" / "reconstruction_0000020.png",
    }
    # (height, width) at 110 dots per inch
    sizes = {"curves": (440, 704), "reconstruction": (407, 704)}
    for name, path in paths.items():
        pixels = pixels_of(path)
        assert pixels.shape == (*sizes[name], 3)
        assert pixels.std() > 10  # The figure is not blank.


def test_draw_run_without_images_writes_only_curves(tmp_path):
    figures.draw_run(tmp_path, 0, {})
    assert [p.name for p in (tmp_path / "figures").iterdir()] == ["curves.png"]


def test_figures_show_the_panels(tmp_path):
    """A figure shows black, gray and white panels at their positions."""
    panels = np.stack([np.full((8, 8, 1), level) for level in (0, 0.5, 1, 0)])[None]
    pixels = figures.reconstructions(panels, "title")
    row = pixels[pixels.shape[0] * 2 // 3].mean(-1)
    middles = row[[len(row) * (2 * k + 1) // 8 for k in range(4)]]
    assert_allclose(middles, [0, 127.5, 255, 0], atol=1)


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (3, 3), (7, 4)])
def test_size_of_the_grid_fits_the_number_of_titled_images(count, columns):
    """Titles are not cut at the margins, and cells without an image are white."""
    title = f"true: {'long name ' * 20}, 1%\npredicted: $x, 99%"
    pixels = figures.titled_images(np.zeros((count, 8, 8, 3)), [title] * count)
    rows = -(-count // columns)
    height, width = pixels.shape[0] // rows, pixels.shape[1] // columns
    assert height > width > 200
    assert (pixels[:, [0, 1, -2, -1]] == 255).all()
    for row, column in np.ndindex(rows, columns):
        cell = pixels[row * height :, column * width :][:height, :width]
        is_used = row * columns + column < count
        assert ((cell < 128).mean() > 0.5) == is_used
        assert is_used or (cell == 255).all()


def test_shorten_keeps_both_ends_of_a_text():
    assert figures.shorten("true: cat, 1%", 2.0, 7) == "true: cat, 1%"
    text = figures.shorten(f"true: {'x' * 200}, 1%", 2.0, 7)
    assert text.startswith("true: xxx")
    assert text.endswith("xxx, 1%")
    assert text.count("…") == 1
    wide, narrow = (figures.shorten(letter * 200, 2.0, 7) for letter in "Wi")
    assert len(wide) < len(narrow) / 2
