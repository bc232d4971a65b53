"""Tests of the suggestions in errors about unknown keys."""

import pytest

from hivit_jax import config as configs
from hivit_jax import create_model
from hivit_jax.errors import ConfigError


def advice(key, recipe="digits_finetune"):
    """Return the advice in the error about an unknown key."""
    with pytest.raises(ConfigError) as error:
        configs.load(recipe, [f"--config.{key}=1"])
    message = str(error.value)
    assert message.startswith(f"unknown config key {key!r}; ")
    return message.partition("; ")[2]


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("model.batch_size", "batch_size"),
        ("optimizer.label_smoothing", "label_smoothing"),
        ("optimiser.weight_decay", "optimizer.weight_decay"),
        ("clip_norm", "optimizer.clip_norm"),
        ("optimizer.lr", "optimizer.base_learning_rate"),
        ("optimizer.max_learning_rate", "optimizer.base_learning_rate"),
        ("epochs", "total_epochs"),
        ("num_workers", "data.workers"),
        ("data.path", "data.dir"),
        ("bs", "batch_size"),
        ("wd", "optimizer.weight_decay"),
        ("img-size", "model.image_size"),
        ("momentum", "optimizer.betas"),
        ("patience", "early_stopping"),
        ("freeze", "model.freeze"),
        ("Model.Depths", "model.depths"),
        ("optimizer.warmup_epoch", "optimizer.warmup_epochs"),
        ("data.flp", "data.flip"),
        ("arch", "model.name"),
        ("model.type", "model.name"),
    ],
)
def test_unknown_key_suggests_a_valid_key(key, suggestion):
    """The advice covers misplaced keys, keys of other programs and typing errors."""
    assert advice(key) == f"did you mean {suggestion!r}?"


def test_advice_names_all_keys_with_the_same_last_component():
    assert advice("dataset.name") == "did you mean 'model.name' or 'data.name'?"


@pytest.mark.parametrize("key", ["optimizer.name", "optimizer.type", "optim", "opt"])
def test_advice_states_that_the_task_determines_the_optimizer(key):
    """For `optimizer.name`, the advice does not suggest `model.name`."""
    assert advice(key).startswith("the task determines the optimizer: LARS for ")


def test_advice_lists_keys_of_the_given_section():
    """The advice ignores other sections, although these have a `name` and a `dtype`."""
    assert advice("mesh.name").startswith("keys of mesh: replica, data, ")
    assert advice("optimizer.dtype").startswith("keys of optimizer: ")


@pytest.mark.parametrize("key", ["tempo", "foo.bar", "crop", "xyz"])
def test_dissimilar_key_lists_top_level_keys_and_sections(key):
    text = advice(key)
    assert text.startswith("known: task, seed, batch_size, ")
    assert text.endswith(
        "model.*, data.*, optimizer.*, mesh.*, label_smoothing, mixup, "
        "cutmix, random_erasing, class_weights"
    )


def test_advice_lists_the_keys_of_a_section_or_names_a_flag():
    assert advice("data.foo").startswith("keys of data: name, dir, cache, ")
    assert advice("mesh.pipeline") == "keys of mesh: replica, data, fsdp, tensor, zero"
    expected = "it is a section of the config with the keys replica, data, "
    assert advice("mesh").startswith(expected)
    assert advice("workdir") == "did you mean the flag --workdir=DIR?"
    assert advice("resume").startswith(
        "did you mean the flag --workdir=DIR, which resu"
    )
    assert advice("topology").startswith("did you mean the flag --topology=CHIP:SHAPE")


def test_keys_of_another_task_are_not_suggested():
    """A masked autoencoder has no `label_smoothing`."""
    assert advice("smoothing", "digits_mae").startswith("known: ")


def test_unknown_model_argument_is_an_error():
    with pytest.raises(ConfigError, match="hivit_tiny 'img_size'; .* 'image_size'"):
        create_model("hivit_tiny", img_size=32)
    with pytest.raises(ConfigError, match="'patience'; known: image_size, "):
        create_model("hivit_tiny", patience=3)
