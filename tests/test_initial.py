"""Tests of reading a pretrained model and comparing it with a config."""

import shlex

import numpy as np
import pytest
from PIL import Image

from hivit_jax import config as configs
from hivit_jax import create_model, save_pretrained
from hivit_jax.errors import ConfigError
from hivit_jax.initial import check_initial, pixel_flags, read_pretrained
from hivit_jax.models import create_arguments
from hivit_jax.train import train
from hivit_jax.weights.adapt import Pretrained
from hivit_jax.weights.load import read

SIZES = ["image_size=64", "depths=(1,1,2)", "embed_dim=64", "num_heads=2"]
DECODER = ["decoder_embed_dim=32", "decoder_depth=1", "decoder_num_heads=2"]
PIXELS = [
    "model.in_channels=4",
    "data.dtype=uint16",
    "data.scale=10000",
    "data.mean=(0.1,0.2,0.3,0.4)",
    "data.std=(0.1,0.1,0.1,0.2)",
]


def load(recipe, *keys):
    return configs.load(recipe, [f"--config.{key}" for key in keys])


def pretrained_by(config):
    """Return a description, without arrays, of a model trained with a config."""
    channels = {"in_channels": config.model.in_channels}
    saved = Pretrained("runs/mae", "", channels, {}, [], [], [], {}, {}, {})
    return saved._replace(recipe=config.to_dict())


def model_keys(*keys):
    return [f"model.{key}" for key in keys]


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """Return a directory with a model that was pretrained on tiles of 4 bands."""
    directory = tmp_path_factory.mktemp("mae4")
    config = load("folder_mae", *model_keys(*SIZES, *DECODER), *PIXELS)
    model = create_model(**create_arguments(config.model))
    save_pretrained(model, directory, config.to_dict())
    return directory


@pytest.mark.parametrize(
    ("pretraining", "recipe"),
    [
        ("mae_base", "finetune:base"),
        ("mae_base", "linear"),
        ("mae_vit", "finetune_vit"),
        ("simmim_swin", "finetune_swin"),
        ("folder_mae", "folder_finetune"),
        ("mae_base", "folder_finetune:base"),
        ("folder_mae", "folder_linear"),
        ("digits_mae", "digits_finetune"),
        ("digits_mae", "digits_linear"),
    ],
)
def test_sequences_of_recipes_have_equal_pixels(pretraining, recipe):
    assert pixel_flags(pretrained_by(load(pretraining)), load(recipe)) == []


def test_pixel_flags_contain_the_keys_that_differ():
    saved = pretrained_by(load("folder_mae", *PIXELS))
    assert pixel_flags(saved, load("folder_finetune", *PIXELS)) == []
    without_scale = [key for key in PIXELS if "scale" not in key]
    config = load("folder_finetune", *without_scale)
    assert pixel_flags(saved, config) == ["--config.data.scale=10000"]
    assert pixel_flags(saved, load("folder_finetune")) == [
        "--config.model.in_channels=4",
        "--config.data.dtype=uint16",
        "--config.data.scale=10000",
        "'--config.data.mean=(0.1,0.2,0.3,0.4)'",
        "'--config.data.std=(0.1,0.1,0.1,0.2)'",
    ]
    ranged = pretrained_by(load("folder_mae", "data.value_range=(0,10000)"))
    expected = ["'--config.data.value_range=(0,10000)'"]
    assert pixel_flags(ranged, load("folder_finetune")) == expected


def test_equal_pixels_of_other_spelling_are_not_reported():
    """The scale 0 stands for the dtype's maximum, and printed numbers are rounded."""
    saved = pretrained_by(load("folder_mae", "data.scale=255", "data.mean=.5,.5,.5"))
    config = load("folder_finetune", "data.mean=0.50001,0.5,0.5")
    assert pixel_flags(saved, config) == []
    del saved.recipe["data"]["dtype"], saved.recipe["data"]["scale"]  # earlier versions
    assert pixel_flags(saved, config) == []


def test_settings_of_other_images_are_intended():
    """A model for RGB images of 8 bits has no range, and no mean of 4 bands."""
    saved = pretrained_by(load("folder_mae"))
    assert pixel_flags(saved, load("folder_finetune", *PIXELS)) == []
    ranged = load("folder_finetune", "data.value_range=(0,10000)")
    assert pixel_flags(saved, ranged) == []


def test_pixels_of_files_of_other_programs():
    """Only known values are compared."""
    saved = pretrained_by(load("folder_mae"))._replace(recipe={})
    config = load("folder_finetune", "data.dtype=uint16", "data.scale=10000")
    assert pixel_flags(saved, config) == []
    half = saved._replace(info={"mean": (0.5,) * 3, "std": (0.5,) * 3})
    assert pixel_flags(half, config) == [
        "'--config.data.mean=(0.5,0.5,0.5)'",
        "'--config.data.std=(0.5,0.5,0.5)'",
    ]
    info = {"dtype": "uint16", "scale": 1 / 9000}
    flags = pixel_flags(saved._replace(info=info), config)
    assert flags == ["--config.data.scale=9000"]


def test_first_error_contains_all_flags(tiles, tmp_path):
    """The error precedes the images, whose 4 bands do not fit the config either."""
    for k in range(4):
        path = tmp_path / "images" / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((20, 20, 4), np.uint8)).save(path)
    keys = [f"data.dir={tmp_path}/images", f"init_from={tiles}"]
    with pytest.raises(ConfigError) as error:
        train(load("folder_finetune", *keys), tmp_path / "run")
    text = str(error.value)
    assert text.count("\n") == 1
    assert "other sizes and pixel values; its flags are " in text
    flags = shlex.split(text.partition("its flags are ")[2])
    expected = {key.split("=")[0] for key in [*model_keys(*SIZES), *PIXELS]}
    assert {f.removeprefix("--config.").split("=")[0] for f in flags} == expected
    # With these flags, there is neither an error nor a warning.
    config = configs.load("folder_finetune", flags)
    check_initial(read(tiles), config)
    assert pixel_flags(read(tiles), config) == []


def test_forgotten_scale_gives_a_warning(tiles, tmp_path, capsys):
    pixels = [key for key in PIXELS if "scale" not in key]
    keys = [*model_keys(*SIZES), *pixels, f"init_from={tiles}"]
    assert read_pretrained(load("folder_finetune", *keys), tmp_path)
    _, line = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: {tiles}/")
    assert line.endswith("its flags are --config.data.scale=10000")
    assert read_pretrained(load("folder_finetune"), tmp_path) is None
