"""Tests of the command `reconstruct`, and of examples/features.py."""

import io

import jax.numpy as jnp
import mini_runs
import numpy as np
import pytest
import reference
from networks import mini, random_array
from numpy.testing import assert_allclose
from PIL import Image

import hivit_jax
from examples import features as example
from hivit_jax import inputs
from hivit_jax.models.positions import patchify
from hivit_jax.reporting import figures
from hivit_jax.tools import reconstruct as command

pytestmark = pytest.mark.usefixtures("minimal_output", "single_device")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the directory of a saved masked autoencoder and a saved classifier."""
    directory = tmp_path_factory.mktemp("saved")
    for name in ("mae_hivit_base", "hivit_base"):
        hivit_jax.save_pretrained(mini(name), directory / name)
    return directory


def write_noise(path, size=(120, 90)):
    """Write an image of noise; return its path.

    Args:
      size: (width, height).
    """
    noise = np.random.RandomState(0).randint(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(noise).resize(size).save(path)
    return path


@pytest.mark.slow
def test_command_draws_a_row_of_panels_per_image(saved, tmp_path, capsys):
    images = [write_noise(tmp_path / name) for name in ("a.png", "b.jpg")]
    out = tmp_path / "out.png"
    flags = ["--checkpoint", str(saved / "mae_hivit_base"), "--out", str(out)]
    assert command.main([*flags, *map(str, images)]) == 0
    expected = out.read_bytes()
    (tmp_path / "photos").mkdir()
    for path in images:
        (tmp_path / "photos" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "photos" / "aa.png").write_text("no image")  # is skipped
    assert command.main([*flags, str(tmp_path / "photos")]) == 0
    assert out.read_bytes() == expected
    printed, err = capsys.readouterr()
    assert err.startswith(f"cannot read {tmp_path / 'photos' / 'aa.png'}: ")
    assert err.endswith("; skipped\n")
    assert "75.0% of each image masked" in printed
    text = "brightness and contrast of each unit are those of the original"
    assert text in printed
    with Image.open(out) as image:
        # Two rows of four panels are wider than high, and higher than one row.
        assert image.width > image.height > 300
    flags.append("--statistics=visible")
    assert command.main([*flags, *map(str, images)]) == 0
    assert "of the visible units" in capsys.readouterr().out


MEAN, STD = (0.8, 0.2, 0.4), (0.1, 0.3, 0.2)


RECIPE = {"task": "mae", "mask_ratio": 0.375, "data": {"mean": MEAN, "std": STD}}


def draw_panels(directory, *options):
    """Return the four panels, uint8, that the command draws of DIRECTORY/image.png."""
    out = directory / "out.png"
    flags = ["--checkpoint", directory, "--out", out, directory / "image.png"]
    assert command.main([*map(str, flags), *options]) == 0
    with Image.open(out) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] == 704
    panels = []
    for quarter in np.split(pixels, 4, axis=1):
        colored = (quarter != 255).any(-1)
        # The panel has more consecutive colored rows than a line of text.
        rows = np.flatnonzero(colored.mean(1) > 0.6)
        blocks = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
        # The edges are excluded, because they are blurred.
        rows = max(blocks, key=len)[4:-4]
        columns = np.flatnonzero(colored[rows].all(0))[4:-4]
        panels.append(quarter[np.ix_(rows, columns)])
    return panels


def save_constant_model(directory, recipe, **overrides):
    """Save a model of 2 x 4 units that predicts 0.5, 1, -1 everywhere."""
    overrides |= dict(image_size=(32, 64), depths=(1, 1), inner_patches=2)
    model = mini("mae_hivit_base", **overrides)
    kernel, bias = model.decoder_pred.kernel, model.decoder_pred.bias
    kernel[...] = jnp.zeros_like(kernel[...])
    bias[...] = jnp.tile(jnp.float32([0.5, 1.0, -1.0]), 16 * 16)  # pixels of a unit
    hivit_jax.save_pretrained(model, directory, recipe)


def is_close(panel, color):
    """Return True for each pixel that differs from a color by at most one level."""
    return (np.abs(panel.astype(int) - color) <= 1).all(-1)


@pytest.mark.slow
def test_panels_use_mean_std_and_mask_ratio_of_the_recipe(tmp_path):
    """Predicted pixels are mean + prediction * std.

    The original is drawn unchanged. Flags replace the mask ratio and the seed.
    """
    save_constant_model(tmp_path, RECIPE, norm_pix_loss=False)
    color, gray = (200, 100, 50), 128
    Image.new("RGB", (64, 32), color).save(tmp_path / "image.png")
    expected = 255 * (np.array(MEAN) + np.array([0.5, 1, -1]) * STD)
    masks = []
    # (flags, masked fraction of the eight units)
    for options, ratio in (
        ((), 3 / 8),
        (("--seed=1", "--mask_ratio=0.75"), 6 / 8),
    ):
        original, masked, predicted, pasted = draw_panels(tmp_path, *options)
        assert is_close(original, color).all()
        assert is_close(predicted, expected).all()
        assert 1.8 < original.shape[1] / original.shape[0] < 2.2
        for panel, hidden in ((masked, (gray,) * 3), (pasted, expected)):
            # Edges of units are blurred.
            assert is_close(panel, hidden).mean() == pytest.approx(ratio, abs=0.05)
            assert is_close(panel, color).mean() == pytest.approx(1 - ratio, abs=0.05)
        masks.append(is_close(masked, gray))
    # More units are masked, but with the other seed, some units become visible.
    assert not masks[1][masks[0]].all()


@pytest.mark.slow
def test_visible_statistics_predict_the_mean_of_the_visible_units(tmp_path):
    """The predicted pixels are the average of the visible units' means.

    Each unit is flat. Its standard deviation is 0, so the model's output has no effect.
    """
    save_constant_model(
        tmp_path, RECIPE | {"data": {"mean": (0.0,) * 3, "std": (1.0,) * 3}}
    )
    levels = np.arange(40, 200, 20, np.uint8).reshape(2, 4)
    image = np.repeat(np.repeat(levels, 16, 0), 16, 1)
    Image.fromarray(image).convert("RGB").save(tmp_path / "image.png")
    _, masked, predicted, _ = draw_panels(tmp_path, "--statistics=visible")
    height, width = masked.shape[0] // 2, masked.shape[1] // 4
    middles = masked[height // 2 :: height, width // 2 :: width][:2, :4, 0]
    visible = levels[np.abs(middles.astype(int) - levels) <= 1]
    assert len(visible) == 5  # of 8 units, with mask_ratio=0.375
    assert is_close(predicted, (visible.mean(),) * 3).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "name", "code", "message"),
    [
        ("hivit_base", "a.png", 2, "is a hivit_base, which has no decoder"),
        ("mae_hivit_base", "nowhere.png", 2, "no such file or directory"),
        ("mae_hivit_base", "text.png", 4, "text.png: no image can be read"),
        ("nothing", "a.png", 5, "does not exist"),
    ],
)
def test_unsuitable_model_or_image_is_an_error(
    saved, tmp_path, capsys, model, name, code, message
):
    write_noise(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("no image")
    flags = ["--checkpoint", str(saved / model), str(tmp_path / name)]
    assert command.main(flags) == code
    err = capsys.readouterr().err
    assert message in err
    assert 1 <= len(err.splitlines()) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("ratio", ["0", "0.0", "1", "-0.5", "nan"])
def test_mask_ratio_out_of_range_is_an_error(ratio, saved, tmp_path, capsys):
    """A mask ratio must be above 0 and below 1; 0 does not select the default."""
    image, out = write_noise(tmp_path / "a.png"), tmp_path / "out.png"
    flags = ["--checkpoint", saved / "mae_hivit_base", "--out", out, image]
    assert command.main([*map(str, flags), f"--mask_ratio={ratio}"]) == 2
    assert f"mask_ratio={float(ratio)}" in capsys.readouterr().err
    assert not out.exists()


def test_unsuitable_output_path_is_an_error(saved, tmp_path, capsys):
    image = write_noise(tmp_path / "a.png")
    before, directory = image.read_bytes(), saved / "mae_hivit_base"
    for out in (image, directory / "model.safetensors", directory, tmp_path):
        flags = ["--checkpoint", directory, "--out", out, image]
        assert command.main([*map(str, flags)]) == 2
        assert f"--out={out} is " in capsys.readouterr().err
    assert image.read_bytes() == before
    flags = ["--checkpoint", directory, "--out", tmp_path / "out.jpg", image]
    assert command.main([*map(str, flags)]) == 2
    assert "out.jpg: expected a name that ends in .png" in capsys.readouterr().err


@pytest.mark.slow
def test_predictions_are_scaled_by_statistics_of_units():
    """Statistics are from each unit, or averages over the visible units."""
    model, images = mini("mae_hivit_base"), random_array((2, 64, 64, 3))
    with_own, is_masked = command.reconstruct(model, images)
    with_visible, same_mask = command.reconstruct(model, images, statistics="visible")
    assert (is_masked == same_mask).all()
    assert is_masked.mean() == 0.75
    originals, with_own, with_visible = (
        np.asarray(patchify(jnp.asarray(x), 16))
        for x in (images, with_own, with_visible)
    )
    is_visible = np.asarray(patchify(jnp.asarray(is_masked), 16))[..., 0] == 0
    mean, scale = originals.mean(-1), originals.std(-1, ddof=1)
    normalized = (with_own - mean[..., None]) / scale[..., None]
    for i in range(2):
        visible_mean, visible_scale = (
            x[i][is_visible[i]].mean() for x in (mean, scale)
        )
        expected = normalized[i] * visible_scale + visible_mean
        assert_allclose(with_visible[i], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("normalized", "note"),
    [
        (True, "brightness and contrast of each unit are those of the original"),
        (False, "pixels as predicted"),
    ],
)
def test_titles_name_the_source_of_brightness(normalized, note, monkeypatch):
    """The title of a run's figure depends on `norm_pix_loss`."""
    titles = []
    monkeypatch.setattr(
        figures, "reconstructions", lambda _, title: titles.append(title)
    )
    task = inputs.task_of_recipe(mini_runs.mae(model__norm_pix_loss=normalized))
    images = np.zeros((1, 64, 64, 3), np.float32)
    task.figures({"images": images, "predicted": images, "masked": images[..., :1]})
    assert titles == [f"held-out images; {note}"]


@pytest.mark.slow
def test_example_draws_the_feature_maps(saved, tmp_path):
    out = tmp_path / "features.png"
    path = write_noise(tmp_path / "a.jpg")
    flags = ["--checkpoint", saved / "mae_hivit_base", "--out", out, path]
    example.main([str(flag) for flag in flags])
    with Image.open(out) as image:
        assert image.width > 5 * image.height


def test_first_principal_component_is_the_direction_of_variation():
    """The features are a linear ramp along one direction, plus little noise."""
    ramp = np.linspace(0, 1, 48).reshape(6, 8)
    direction = reference.normal("direction", (5,))
    noise = 1e-3 * reference.normal("noise", (6, 8, 5))
    colors = example.principal_components(ramp[..., None] * direction + noise)
    assert colors.shape == (6, 8, 3)
    assert abs(np.corrcoef(colors[..., 0].ravel(), ramp.ravel())[0, 1]) > 0.99


def test_example_photograph_has_512x512_pixels():
    assert Image.open(io.BytesIO(example.photograph())).size == (512, 512)
