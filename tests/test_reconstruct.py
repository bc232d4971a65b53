"""Pictures of one's own images: the command, and the example of features."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
import reference
from networks import mini, pictures
from numpy.testing import assert_allclose
from PIL import Image

import hivit_jax
from examples import features as example
from hivit_jax import reconstruct as command
from hivit_jax.models.positions import patchify


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories of a small masked autoencoder and a classifier."""
    directory = tmp_path_factory.mktemp("saved")
    for name in ("mae_hivit_base", "hivit_base"):
        hivit_jax.save_pretrained(mini(name), directory / name)
    return directory


def picture(path, size=(120, 90)):
    noise = np.random.RandomState(0).randint(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(noise).resize(size).save(path)
    return path


def test_command(saved, tmp_path, capsys):
    images = [picture(tmp_path / name) for name in ("a.png", "b.jpg")]
    out = tmp_path / "out.png"
    flags = ["--checkpoint", saved / "mae_hivit_base", "--out", out, *images]
    flags = [str(flag) for flag in flags]
    assert command.main(flags) == 0
    told = capsys.readouterr().out
    assert "75.0% of every image removed" in told
    assert "contrast and brightness of each unit from the original, unseen" in told
    with Image.open(out) as drawn:
        assert drawn.width > drawn.height > 300  # two rows of four panels
    assert (
        command.main([str(x) for x in (*flags, *images, "--statistics=visible")]) == 0
    )
    assert "mean of the visible units" in capsys.readouterr().out


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
    picture(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("no image")
    flags = ["--checkpoint", str(saved / model), str(tmp_path / name)]
    assert command.main(flags) == code
    err = capsys.readouterr().err
    assert message in err
    assert 1 <= len(err.splitlines()) <= 3


def test_statistics():
    """A unit's own mean and deviation, or those of the visible ones on average."""
    model, images = mini("mae_hivit_base"), pictures((2, 64, 64, 3))
    own, removed = command.reconstruct(model, images)
    other, same = command.reconstruct(model, images, statistics="visible")
    assert (removed == same).all()
    assert removed.mean() == 0.75
    units = [np.asarray(patchify(jnp.asarray(x), 16)) for x in (images, own, other)]
    true, own, other = units
    seen = np.asarray(patchify(jnp.asarray(removed), 16))[..., 0] == 0
    mean, scale = true.mean(-1), true.std(-1, ddof=1)
    normalised = (own - mean[..., None]) / scale[..., None]
    for image in range(2):
        of_seen = [x[image][seen[image]].mean() for x in (mean, scale)]
        expected = normalised[image] * of_seen[1] + of_seen[0]
        assert_allclose(other[image], expected, atol=1e-4)


def test_pixels_as_predicted():
    model = mini("mae_hivit_base", norm_pix_loss=False)
    assert command.statistics_text(model, "unit") == "pixels as predicted"


def test_example(saved, tmp_path):
    out = tmp_path / "features.png"
    path = picture(tmp_path / "a.jpg")
    flags = ["--checkpoint", saved / "mae_hivit_base", "--out", out, path]
    example.main([str(flag) for flag in flags])
    with Image.open(out) as drawn:
        assert drawn.width > 5 * drawn.height


def test_principal_components():
    """A map of one direction in feature space comes back as its first component."""
    plane = np.linspace(0, 1, 48).reshape(6, 8)
    direction = reference.normal("direction", (5,))
    noise = 1e-3 * reference.normal("noise", (6, 8, 5))
    colours = example.principal_components(plane[..., None] * direction + noise)
    assert colours.shape == (6, 8, 3)
    assert abs(np.corrcoef(colours[..., 0].ravel(), plane.ravel())[0, 1]) > 0.99


def test_photograph():
    assert Image.open(io.BytesIO(example.photograph())).size == (512, 512)
