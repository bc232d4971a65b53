"""Tests of ranges of config keys in recipes, tasks and models."""

import math
from pathlib import Path

import numpy as np
import pytest

from hivit_jax import config as configs
from hivit_jax import create_model, tasks
from hivit_jax.errors import ConfigError
from hivit_jax.keys import INT_MAX, Key

CLASSIFY = "digits_finetune"


def load(*overrides, recipe=CLASSIFY):
    """Return the config of a recipe with overrides."""
    return configs.load(recipe, [f"--config.{override}" for override in overrides])


def test_every_numeric_key_has_a_range():
    """Each numeric key of each task rejects NaN, infinity and +-1e40.

    Only `data.mean` and `data.value_range` have no narrower limits, because the task
    checks them.
    """
    unlimited = set()
    for task in tasks.TASKS.values():
        for name, key in configs.all_keys(task).items():
            if key.value_type in (bool, str) or key.choices:
                continue
            for number in (math.nan, math.inf, -math.inf, 10**40, -(10**40)):
                is_tuple = key.value_type is tuple
                value = (number,) * (key.length or 1) if is_tuple else number
                with pytest.raises(ConfigError, match=name):
                    key.check(name, value)
            limits = key.low, key.high, key.above, key.below
            if all(limit is None for limit in limits):
                unlimited.add(name)
    assert unlimited == {"data.mean", "data.value_range"}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.clip_norm=-1.0", "at least 0"),
        ("mixup=-1.0", "0 to 1000"),
        ("label_smoothing=1.5", "0 <= label_smoothing < 1"),
        ("data.crop_scale=(1.5,2.0)", "2 numbers, 0 < number <= 1"),
        ("data.crop_scale=(1.0,0.5)", "not decreasing"),
        ("data.crop_scale=(0.5,)", "2 numbers"),
        ("data.std=(0.0,)", "0 < number"),
        ("data.mean=(123.7,)", "divide these values by 255"),
        ("data.std=(58.4,)", "divide these values by 255"),
        ("data.mean=(-0.5,)", "0 to 1"),
        ("data.mean=('a',)", "numbers"),
        ("seed=99999999999999999999999", "at most 2\\*\\*63 - 1"),
        ("seed=1e23", "an integer"),
        ("total_steps=4294967296", "at most 2\\*\\*31 - 1"),
        ("optimizer.base_learning_rate=1e999", "finite"),
        ("optimizer.base_learning_rate=-1e999", "finite"),
        ("optimizer.clip_norm=1e-45", "0 or at least 1.2e-38"),
        ("optimizer.clip_norm=1e39", "at most 3.4e\\+38"),
        ("optimizer.betas=(0.9,1.0)", "0 <= number < 1"),
        ("optimizer.betas=(True,0.9)", "2 numbers"),
        ("optimizer.ema_decay=1", "0 <= ema_decay < 1"),
        ("optimizer.weight_decay=" + "(" * 3000, "a number"),
        ("total_epochs=" + "9" * 400, "a number"),
        ("mesh.tensor=-2", "at least 1, or -1"),
        ("data.workers=1000000", "at least 0, at most 1024"),
        ("model.num_classes=-1", "at least 0"),
        ("model.depths=()", "two depths"),
        ("model.depths=(1,1.5,2)", "integers, 1 to 1000"),
        ("model.depths=(1,1,0)", "integers, 1 to 1000"),
        ("model.image_size=(16,)", "2 integers"),
        ("model.image_size=16.0", "an integer"),
        ("model.layer_norm_eps=0.0", "0 < layer_norm_eps <= 1"),
        ("model.mlp_ratio=0.001", "no hidden unit"),
        ("model.stem_mlp_ratio=0.05", "no hidden unit"),
    ],
)
def test_invalid_value_is_an_error(override, expected):
    """The message is one short line with the key and its allowed values."""
    name = override.partition("=")[0].rpartition(".")[2]
    with pytest.raises(ConfigError, match=f"{name}.*{expected}") as error:
        load(override)
    assert len(str(error.value)) < 250
    assert "\n" not in str(error.value)


def test_range_limits_are_accepted():
    """Limits of closed ranges and equal numbers in ordered tuples are accepted."""
    config = load(
        "data.crop_scale=(0.5,0.5)",
        "data.std=(1,)",
        "data.mean=(0,)",
        "seed=9223372036854775807",
        "optimizer.betas=(0,0.9)",
        "optimizer.base_learning_rate=0",
        "optimizer.schedule=multistep",
        "optimizer.milestones=(30,30,60)",
        "model.global_blocks=(0,3)",
        "random_erasing=1",
    )
    assert config.data.crop_scale == (0.5, 0.5)
    assert config.seed == 2**63 - 1
    assert config.optimizer.milestones == (30, 30, 60)
    assert load(f"total_steps={INT_MAX}").total_steps == INT_MAX


def test_infinite_peak_learning_rate_is_an_error():
    """The peak is base_learning_rate * batch_size / lr_batch."""
    with pytest.raises(
        ConfigError, match=r"batch_size / optimizer.lr_batch\)=2.5.*; expected finite"
    ):
        load("optimizer.base_learning_rate=3e38", "batch_size=2147483646")
    assert load("optimizer.base_learning_rate=1e37").optimizer.lr_batch == 256


def test_mask_ratio_must_mask_and_keep_at_least_one_unit():
    for ratio in (1e-17, 0.0, 1.0, 0.99):
        with pytest.raises(ConfigError, match=f"mask_ratio={ratio}"):
            load(f"mask_ratio={ratio}", recipe="digits_mae")
    assert load("mask_ratio=0.01", recipe="digits_mae").mask_ratio == 0.01


SMALL = dict(image_size=32, embed_dim=16, depths=(1, 1, 1), num_heads=1)


@pytest.mark.parametrize(
    "bad",
    [
        {"num_classes": -1},
        {"num_classes": "10"},
        {"in_channels": 0},
        {"mlp_ratio": math.nan},
        {"drop_path_rate": -0.1},
        {"depths": (1, 1, 10**6)},
        {"layer_norm_eps": None},
        {"window_size": 1.5},
        {"patch_size": 10**5000},
        {"fc_norm": 3},
    ],
)
def test_create_model_checks_the_ranges_of_the_keys(bad):
    [(name, _)] = bad.items()
    with pytest.raises(ConfigError, match=f"^{name}=.*expected"):
        create_model("hivit_tiny", **SMALL | bad)


def test_values_are_converted_to_the_type_of_the_key():
    """NumPy numbers, arrays and paths are converted.

    A bool or float for an integer key is an error, and so is a number for a text key.
    """
    assert Key(1, "").convert(np.int64(3)) == 3
    assert type(Key(1.0, "").convert(np.float32(0.5))) is float
    assert Key((), "").convert(np.array([1, 2])) == (1, 2)
    assert Key("", "").convert(Path("/data")) == "/data"
    for key, value in ((Key(1, ""), True), (Key(1, ""), 1.0), (Key("", ""), 1)):
        with pytest.raises(TypeError):
            key.convert(value)


def test_default_of_a_tuple_key_without_limits_determines_its_elements():
    """If the default is a non-empty tuple of numbers, elements must be finite numbers.

    Otherwise, any elements are accepted.
    """
    Key(("a",), "names").check("names", ("b", "c"))
    Key((), "anything").check("anything", ("b", 3))
    with pytest.raises(ConfigError, match="prior=.*finite"):
        Key((0.0, 0.0), "prior").check("prior", (math.nan, 0.0))
