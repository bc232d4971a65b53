"""Tests of the command `reconstruct`, and of examples/features.py."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
import reference
from networks import mini, random_array
from numpy.testing import assert_allclose
from PIL import Image

import hivit_jax
from examples import features as example
from hivit_jax.models.positions import patchify
from hivit_jax.tools import reconstruct as command

pytestmark = pytest.mark.usefixtures("minimal_output")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the directory of a saved masked autoencoder and a saved classifier."""
    directory = tmp_path_factory.mktemp("saved")
    for name in ("mae_hivit_base", "hivit_base"):
        hivit_jax.save_pretrained(mini(name), directory / name)
    return directory


def write_noise(path, size=(120, 90)):
    """Write an image of noise."""
    noise = np.random.RandomState(0).randint(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(noise).resize(size).save(path)
    return path


@pytest.mark.slow
def test_command(saved, tmp_path, capsys):
    images = [write_noise(tmp_path / name) for name in ("a.png", "b.jpg")]
    out = tmp_path / "out.png"
    flags = ["--checkpoint", saved / "mae_hivit_base", "--out", out, *images]
    flags = [str(flag) for flag in flags]
    assert command.main(flags) == 0
    out_text = capsys.readouterr().out
    assert "75.0% of each image masked" in out_text
    text = "brightness and contrast of each true unit, unknown to the model"
    assert text in out_text
    with Image.open(out) as image:
        assert image.width > image.height > 300  # two rows of four panels
    assert (
        command.main([str(x) for x in (*flags, *images, "--statistics=visible")]) == 0
    )
    assert "of the visible units" in capsys.readouterr().out


MEAN, STD = (0.8, 0.2, 0.4), (0.1, 0.3, 0.2)


RECIPE = {"task": "mae", "mask_ratio": 0.375, "data": {"mean": MEAN, "std": STD}}


def panels(directory, *options):
    """Return the four panels, uint8, that the command draws of DIRECTORY/image.png."""
    out = directory / "out.png"
    flags = ["--checkpoint", directory, "--out", out, directory / "image.png"]
    assert command.main([*map(str, flags), *options]) == 0
    with Image.open(out) as image:
        pixels = np.asarray(image.convert("RGB"))
    squares = []
    for quarter in np.split(pixels, range(176, 704, 176), axis=1):  # of 704 columns
        colored = (quarter != 255).any(-1)
        # A line of text has fewer rows than the panel.
        rows = np.flatnonzero(colored.mean(1) > 0.6)
        runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
        rows = max(runs, key=len)[4:-4]  # edges are blurred
        columns = np.flatnonzero(colored[rows].all(0))[4:-4]
        squares.append(quarter[np.ix_(rows, columns)])
    return squares


def save_constant_model(directory, recipe, **overrides):
    """Save a model of 2 x 4 units that predicts 0.5, 1, -1 everywhere."""
    overrides |= dict(image_size=(32, 64), depths=(1, 1), inner_patches=2)
    model = mini("mae_hivit_base", **overrides)
    kernel, bias = model.decoder_pred.kernel, model.decoder_pred.bias
    kernel[...] = jnp.zeros_like(kernel[...])
    bias[...] = jnp.tile(jnp.float32([0.5, 1.0, -1.0]), 256)
    hivit_jax.save_pretrained(model, directory, recipe)


def close(panel, color):
    """Return True for each pixel that differs from a color by at most one level."""
    return (np.abs(panel.astype(int) - color) <= 1).all(-1)


@pytest.mark.slow
def test_mean_std_and_mask_ratio_of_the_recipe(tmp_path):
    """Predicted pixels are mean + prediction * std of the run's recipe.

    The original is drawn unchanged. Flags select other ratios and masks.
    """
    save_constant_model(tmp_path, RECIPE, norm_pix_loss=False)
    color, gray = (200, 100, 50), 128
    Image.new("RGB", (64, 32), color).save(tmp_path / "image.png")
    expected = 255 * (np.array(MEAN) + np.array([0.5, 1, -1]) * STD)
    masks = []
    for options, ratio in (
        ((), 3 / 8),
        (("--seed=1", "--mask_ratio=0.75"), 6 / 8),
    ):
        original, masked, predicted, pasted = panels(tmp_path, *options)
        assert close(original, color).all()
        assert close(predicted, expected).all()
        assert 1.8 < original.shape[1] / original.shape[0] < 2.2
        for panel, hidden in ((masked, (gray,) * 3), (pasted, expected)):
            # Edges of units are blurred.
            assert close(panel, hidden).mean() == pytest.approx(ratio, abs=0.05)
            assert close(panel, color).mean() == pytest.approx(1 - ratio, abs=0.05)
        masks.append(close(masked, gray))
    assert not masks[1][masks[0]].all()  # another seed masks other units


@pytest.mark.slow
def test_statistics_flag(tmp_path):
    """--statistics=visible predicts flat units as the mean of the visible units."""
    save_constant_model(
        tmp_path, RECIPE | {"data": {"mean": (0.0,) * 3, "std": (1.0,) * 3}}
    )
    levels = np.arange(40, 200, 20, np.uint8).reshape(2, 4)
    image = np.repeat(np.repeat(levels, 16, 0), 16, 1)
    Image.fromarray(image).convert("RGB").save(tmp_path / "image.png")
    _, masked, predicted, _ = panels(tmp_path, "--statistics=visible")
    height, width = masked.shape[0] // 2, masked.shape[1] // 4
    middles = masked[height // 2 :: height, width // 2 :: width][:2, :4, 0]
    visible = levels[np.abs(middles.astype(int) - levels) <= 1]
    assert len(visible) == 5
    assert close(predicted, (visible.mean(),) * 3).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "name", "code", "message"),
    [
        ("hivit_base", "a.png", 2, "is a hivit_base, which has no decoder"),
        ("mae_hivit_base", "nowhere.png", 4, "cannot read"),
        ("mae_hivit_base", "text.png", 4, "cannot read"),
        ("nothing", "a.png", 5, "no checkpoint in"),
    ],
)
def test_bad_input(saved, tmp_path, capsys, model, name, code, message):
    write_noise(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("no image")
    flags = ["--checkpoint", str(saved / model), str(tmp_path / name)]
    assert command.main(flags) == code
    err = capsys.readouterr().err
    assert message in err
    assert 1 <= len(err.splitlines()) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("ratio", ["0", "0.0", "1", "-0.5", "nan"])
def test_mask_ratios_out_of_range(ratio, saved, tmp_path, capsys):
    """Mask ratios must be above 0 and below 1; 0 does not mean the default."""
    image, out = write_noise(tmp_path / "a.png"), tmp_path / "out.png"
    flags = ["--checkpoint", saved / "mae_hivit_base", "--out", out, image]
    assert command.main([*map(str, flags), f"--mask_ratio={ratio}"]) == 2
    assert f"mask_ratio={float(ratio)}" in capsys.readouterr().err
    assert not out.exists()


def test_inputs_are_not_overwritten(saved, tmp_path, capsys):
    image = write_noise(tmp_path / "a.png")
    before, directory = image.read_bytes(), saved / "mae_hivit_base"
    for out in (image, directory / "model.safetensors", directory, tmp_path):
        flags = ["--checkpoint", directory, "--out", out, image]
        assert command.main([*map(str, flags)]) == 2
        assert f"--out={out} is " in capsys.readouterr().err
    assert image.read_bytes() == before


@pytest.mark.slow
def test_statistics():
    """Predictions use each unit's mean and deviation, or the visible units' average."""
    model, images = mini("mae_hivit_base"), random_array((2, 64, 64, 3))
    by_own_statistics, is_masked = command.reconstruct(model, images)
    by_unit, by_visible_units = command.reconstruct(model, images, statistics="visible")
    assert (is_masked == by_visible_units).all()
    assert is_masked.mean() == 0.75
    units = [
        np.asarray(patchify(jnp.asarray(x), 16))
        for x in (images, by_own_statistics, by_unit)
    ]
    originals, by_own_statistics, by_unit = units
    is_visible = np.asarray(patchify(jnp.asarray(is_masked), 16))[..., 0] == 0
    mean, scale = originals.mean(-1), originals.std(-1, ddof=1)
    normalized = (by_own_statistics - mean[..., None]) / scale[..., None]
    for image in range(2):
        of_visible = [x[image][is_visible[image]].mean() for x in (mean, scale)]
        expected = normalized[image] * of_visible[1] + of_visible[0]
        assert_allclose(by_unit[image], expected, atol=1e-4)


def test_pixels_as_predicted():
    model = mini("mae_hivit_base", norm_pix_loss=False)
    assert command.statistics_text(model, "unit") == "pixels as predicted"


@pytest.mark.slow
def test_example(saved, tmp_path):
    out = tmp_path / "features.png"
    path = write_noise(tmp_path / "a.jpg")
    flags = ["--checkpoint", saved / "mae_hivit_base", "--out", out, path]
    example.main([str(flag) for flag in flags])
    with Image.open(out) as image:
        assert image.width > 5 * image.height


def test_principal_components():
    """If features vary along one direction, the first component is their variation."""
    plane = np.linspace(0, 1, 48).reshape(6, 8)
    direction = reference.normal("direction", (5,))
    noise = 1e-3 * reference.normal("noise", (6, 8, 5))
    colors = example.principal_components(plane[..., None] * direction + noise)
    assert colors.shape == (6, 8, 3)
    assert abs(np.corrcoef(colors[..., 0].ravel(), plane.ravel())[0, 1]) > 0.99


def test_photograph():
    assert Image.open(io.BytesIO(example.photograph())).size == (512, 512)
