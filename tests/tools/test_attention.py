"""Tests of the command that draws attention maps."""

import numpy as np
import pytest
from networks import mini, random_array
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

import hivit_jax
from hivit_jax.errors import ConfigError
from hivit_jax.tools import attention as command
from hivit_jax.tools import files
from hivit_jax.tools.attention import attention_maps

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("minimal_output", "single_device"),
]

VIT = dict(embed_dim=16, num_heads=2, depth=2, image_size=(32, 48), num_classes=3)


def test_maps_are_rows_of_the_attention():
    """Each map is the query unit's row of a head's attention matrix, as a grid."""
    model, images = mini(image_size=(48, 80)), random_array((2, 48, 80, 3))
    layers = model.layers(images, attention=True)
    for options, block, query in (
        ({}, 1, 1 * 5 + 2),
        ({"unit": (2, 4), "block": 0}, 0, 14),
        ({"unit": (0, 3), "block": -2}, 0, 3),
    ):
        maps = attention_maps(model, images, **options)
        assert maps.shape == (2, 2, 3, 5)
        expected = layers[block].attention[:, :, query].reshape(maps.shape)
        assert_allclose(maps, expected, atol=1e-5)
        assert_allclose(maps.sum((2, 3)), 1, rtol=1e-5)


def test_class_token_is_the_default_query():
    """The class token is the query unless a unit is selected."""
    model = hivit_jax.create_model("vit_base", **VIT)
    images = random_array((1, 32, 48, 3))
    weights = np.asarray(model.layers(images, attention=True)[-1].attention)
    maps = attention_maps(model, images)
    assert_allclose(maps.reshape(2, 6), weights[0, :, 0, 1:], atol=1e-5)
    maps = attention_maps(model, images, unit=(1, 2))
    assert_allclose(maps.reshape(2, 6), weights[0, :, 6, 1:], atol=1e-5)


def test_strongest_unit_is_brightest_and_selected_unit_has_a_red_frame():
    maps = np.full((1, 2, 3, 5), 0.01, np.float32)
    maps[0, 0, 2, 4] = maps[0, 1, 0, 0] = 0.5
    image = np.full((1, 48, 80, 1), 0.5, np.float32)
    pictures = command.panels(image, maps, (1, 2))
    assert [*pictures] == ["image", "mean", "head 0", "head 1"]
    for title, row, column in (("head 0", 2, 4), ("head 1", 0, 0)):
        brightness = pictures[title][0].sum(-1)
        inside = np.zeros((48, 80), bool)
        inside[16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = True
        assert brightness[inside].min() > brightness[~inside].max()
    red = (pictures["image"][0] == (1, 0, 0)).all(-1)
    assert_array_equal(np.argwhere(red)[[0, -1]], [[16, 32], [31, 47]])
    assert red.sum() == 16**2 - 12**2
    assert (pictures["image"][0][~red] == 0.5).all()
    unmarked = command.panels(image, maps, None)["image"]
    assert (unmarked == 0.5).all()
    bands = np.random.RandomState(0).rand(1, 48, 80, 4).astype(np.float32)
    unmarked = command.panels(bands, maps, None)["image"]
    assert_array_equal(unmarked, bands[..., :3])


def write_image(path):
    """Write an image of noise; return its path."""
    Image.fromarray(
        np.random.RandomState(0).randint(0, 256, (40, 60, 3), np.uint8)
    ).save(path)
    return path


@pytest.mark.parametrize("name", ["hivit_base", "mae_hivit_base"])
def test_attention_command_writes_the_figure(name, tmp_path, capsys):
    hivit_jax.save_pretrained(mini(name), tmp_path / "model")
    images = [write_image(tmp_path / each) for each in ("a.png", "b.png")]
    out = tmp_path / "attention.png"
    flags = ["--checkpoint", tmp_path / "model", "--out", out, *images]
    assert command.main([*map(str, flags)]) == 0
    assert f"written: {out} (attention of unit 2,2, 2 heads)" in capsys.readouterr().out
    with Image.open(out) as picture:
        assert picture.width > picture.height > 300  # two rows of four panels
    for option, fragment in (
        ("--unit=4,0", "unit 4,0 of"),
        ("--unit=1", "--unit=1; expected ROW,COLUMN"),
        ("--block=2", "has 2 blocks with attention"),
        (f"--out={images[0]}", "is an input of this command"),
        (f"--out={tmp_path}", "is a directory"),
        ("--out=at.txt", "--out=at.txt: expected a name that ends in .png"),
    ):
        assert command.main([*map(str, flags), option]) == 2
        assert fragment in capsys.readouterr().err
    (tmp_path / "broken.png").write_text("no image")
    for image, code, message in (
        ("no.png", 2, "no.png: no such file or directory"),
        ("broken.png", 4, "broken.png: no image can be read"),
    ):
        assert command.main([*map(str, flags[:-2]), str(tmp_path / image)]) == code
        assert message in capsys.readouterr().err


def test_unreadable_images_are_skipped(tmp_path, capsys):
    """The figure does not change, and one line on stderr names the broken image."""
    hivit_jax.save_pretrained(mini("hivit_base"), tmp_path / "model")
    (tmp_path / "photos").mkdir()
    for name in ("a.png", "c.png"):
        write_image(tmp_path / "photos" / name)
    flags = ["--checkpoint", tmp_path / "model", "--out", tmp_path / "attention.png"]
    flags = [*map(str, flags), str(tmp_path / "photos")]
    assert command.main(flags) == 0
    expected = (tmp_path / "attention.png").read_bytes()
    broken = tmp_path / "photos" / "b.png"
    broken.write_text("no image")
    capsys.readouterr()
    assert command.main(flags) == 0
    assert (tmp_path / "attention.png").read_bytes() == expected
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cannot read {broken}: ")
    assert line.endswith("; skipped")


def test_images_of_a_directory_are_drawn(tmp_path, capsys, monkeypatch):
    """Of a directory with too many images, evenly spaced images are drawn.

    A line states their number.
    """
    hivit_jax.save_pretrained(mini("hivit_base"), tmp_path / "model")
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for name in ("0.png", "1.png", "2.png", "3.png", "deep/4.png"):
        write_image(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("")
    monkeypatch.setattr(files, "MAX_DRAWN_PER_DIRECTORY", 3)
    single = write_image(tmp_path / "a.png")
    names = [path.name for path in files.images_to_draw([single, tmp_path / "photos"])]
    assert names == ["a.png", "0.png", "2.png", "4.png"]
    line = f"{tmp_path}/photos: drawing 3 of 5 images, evenly spaced\n"
    assert capsys.readouterr().out == line
    out, heights = tmp_path / "attention.png", []
    for images in (tmp_path / "photos", single):
        flags = ["--checkpoint", tmp_path / "model", "--out", out, images]
        assert command.main([*map(str, flags)]) == 0
        with Image.open(out) as picture:
            heights.append(picture.height)
    assert heights[0] > 2 * heights[1]
    (tmp_path / "empty").mkdir()
    assert command.main([*map(str, flags[:-1]), str(tmp_path / "empty")]) == 4
    assert "expected files that end in" in capsys.readouterr().err


def test_attention_of_a_block_with_windows_is_an_error():
    model = mini(window_size=2, global_blocks=(1,))
    images = random_array((1, 64, 64, 3))
    assert attention_maps(model, images).shape == (1, 2, 4, 4)
    with pytest.raises(ConfigError, match="block 0 of hivit_base computes .* windows"):
        attention_maps(model, images, block=0)
