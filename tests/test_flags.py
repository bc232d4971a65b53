"""Tests of the flags that commands print."""

import shlex

import pytest

from hivit_jax import config as configs
from hivit_jax.flags import config_flag


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("model.embed_dim", 384, "--config.model.embed_dim=384"),
        ("model.depths", [1, 1, 2], "'--config.model.depths=(1,1,2)'"),
        ("model.image_size", (64, 48), "'--config.model.image_size=(64,48)'"),
        ("optimizer.milestones", (), "'--config.optimizer.milestones=()'"),
        ("data.dir", "my images", "'--config.data.dir=my images'"),
    ],
)
def test_printed_flags_are_read_back(key, value, text):
    """A shell splits the text into one flag, and the flag sets the value."""
    assert config_flag(key, value) == text
    (flag,) = shlex.split(text)
    config = configs.load("folder_finetune", [flag])
    expected = tuple(value) if isinstance(value, list) else value
    actual = config
    for name in key.split("."):
        actual = actual[name]
    assert actual == expected
