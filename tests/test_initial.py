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


def load(recipe, *overrides):
    return configs.load(recipe, [f"--config.{override}" for override in overrides])


def pretrained_by(config):
    """Return a description, without arrays, of a model trained with a config."""
    model_arguments = {"in_channels": config.model.in_channels}
    saved = Pretrained("runs/mae", "", model_arguments, {}, [], [], [], {}, {}, {})
    return saved._replace(recipe=config.to_dict())


def model_overrides(*settings):
    return [f"model.{setting}" for setting in settings]


@pytest.fixture(scope="module")
def pretrained_dir(tmp_path_factory):
    """Return a directory with a model that was pretrained on tiles of 4 bands."""
    directory = tmp_path_factory.mktemp("mae4")
    config = load("folder_mae", *model_overrides(*SIZES, *DECODER), *PIXELS)
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
def test_successive_recipes_have_equal_pixel_settings(pretraining, recipe):
    assert pixel_flags(pretrained_by(load(pretraining)), load(recipe)) == []


def test_pixel_flags_contain_the_keys_that_differ():
    saved = pretrained_by(load("folder_mae", *PIXELS))
    assert pixel_flags(saved, load("folder_finetune", *PIXELS)) == []
    without_scale = [override for override in PIXELS if "scale" not in override]
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


def test_equal_pixel_settings_of_other_spelling_are_not_reported():
    """The scale 0 stands for the dtype's maximum, and printed numbers are rounded."""
    saved = pretrained_by(load("folder_mae", "data.scale=255", "data.mean=.5,.5,.5"))
    config = load("folder_finetune", "data.mean=0.50001,0.5,0.5")
    assert pixel_flags(saved, config) == []
    del saved.recipe["data"]["dtype"], saved.recipe["data"]["scale"]  # earlier versions
    assert pixel_flags(saved, config) == []


def test_settings_that_other_images_require_are_not_reported():
    """A model for RGB images of 8 bits has no range, and no mean of 4 bands."""
    saved = pretrained_by(load("folder_mae"))
    assert pixel_flags(saved, load("folder_finetune", *PIXELS)) == []
    ranged = load("folder_finetune", "data.value_range=(0,10000)")
    assert pixel_flags(saved, ranged) == []


def test_only_the_values_in_a_foreign_file_are_compared():
    """A file of another program contains no recipe, but may contain an `info`."""
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


def test_first_error_contains_all_flags(pretrained_dir, tmp_path):
    """The error is not about the images, whose 4 bands do not fit the config either."""
    for k in range(4):
        path = tmp_path / "images" / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((20, 20, 4), np.uint8)).save(path)
    overrides = [f"data.dir={tmp_path}/images", f"init_from={pretrained_dir}"]
    with pytest.raises(ConfigError) as error:
        train(load("folder_finetune", *overrides), tmp_path / "run")
    text = str(error.value)
    assert text.count("\n") == 1
    assert "other sizes and pixel values; its flags are " in text
    flags = shlex.split(text.partition("its flags are ")[2])
    overrides = [*model_overrides(*SIZES), *PIXELS]
    expected = {override.split("=")[0] for override in overrides}
    assert {f.removeprefix("--config.").split("=")[0] for f in flags} == expected
    # With these flags, there is neither an error nor a warning.
    config = configs.load("folder_finetune", flags)
    check_initial(read(pretrained_dir), config)
    assert pixel_flags(read(pretrained_dir), config) == []


def test_forgotten_scale_gives_a_warning(pretrained_dir, tmp_path, capsys):
    without_scale = [override for override in PIXELS if "scale" not in override]
    overrides = [*model_overrides(*SIZES), *without_scale]
    overrides.append(f"init_from={pretrained_dir}")
    assert read_pretrained(load("folder_finetune", *overrides), tmp_path)
    _, line = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: {pretrained_dir}/")
    assert line.endswith("its flags are --config.data.scale=10000")
    assert read_pretrained(load("folder_finetune"), tmp_path) is None
