"""Tests that class names of a dataset reach saved and exported models."""

import json

import mini_runs
import pytest
from datasets import digits_config

import hivit_jax
from hivit_jax import config as configs
from hivit_jax import inputs
from hivit_jax.data.sources.base import DatasetInfo
from hivit_jax.errors import ConfigError
from hivit_jax.tasks import create
from hivit_jax.tools import convert
from hivit_jax.train import train

DIGITS = tuple("0123456789")


@pytest.mark.extras
@pytest.mark.slow
def test_class_names_reach_the_run_and_saved_models(tmp_path, minimal_output, capsys):
    """A classifier of digits with num_classes=0 has 10 classes in all its files.

    A second start changes nothing. A model with another head has no class names.
    """
    run, shared = tmp_path / "run", tmp_path / "shared"
    config = mini_runs.classifier("digits", model__num_classes=0, total_steps=1)
    train(config, run)
    train(config, run)
    assert "changed" not in capsys.readouterr().out
    assert configs.load(str(run / "config.json")).model.num_classes == 10
    assert json.loads((run / "config.json").read_text())["model"]["num_classes"] == 10
    model = hivit_jax.load_pretrained(run)
    assert model.info.class_names == DIGITS
    assert model.head.bias.shape == (10,)
    convert.convert(str(run), shared)
    assert hivit_jax.load_pretrained(shared).info == model.info
    saved_config = json.loads((shared / "config.json").read_text())
    assert saved_config["info"]["class_names"] == [*DIGITS]
    card = (shared / "README.md").read_text()
    assert "- classes: 10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9\n" in card
    assert "hivit_jax.preprocess(model)" in card
    model_of_3_classes = hivit_jax.load_pretrained(run, num_classes=3)
    assert model_of_3_classes.info.class_names == ()


def test_num_classes_0_becomes_the_number_of_classes():
    """A task replaces num_classes=0 in a copy of the config.

    A dataset without classes is an error.
    """
    config = digits_config(model__num_classes=0)
    assert inputs.make_task(config).config.model.num_classes == 10
    assert config.model.num_classes == 0
    with pytest.raises(ConfigError, match=r"num_classes=0: .* of digits is unknown"):
        create(config, DatasetInfo({"train": 5}))
