"""Tests of errors about missing packages, and of commands with a closed stdout pipe."""

import os
import sys
from contextlib import contextmanager, redirect_stdout

import pytest

import hivit_jax
from hivit_jax import config as configs
from hivit_jax import inputs
from hivit_jax.data import tf_data
from hivit_jax.data.sources import digits, registry
from hivit_jax.errors import (
    ConfigError,
    MissingPackage,
    Parser,
    require,
    run_command,
)


def test_require_names_the_package_to_install(tmp_path, monkeypatch):
    """A missing package, a missing dependency and a failing import are errors."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "needs_another.py").write_text("import missing_one_7")
    (tmp_path / "does_not_fit.py").write_text("raise TypeError('descriptors')")
    for name, reason in (
        ("missing_one_7.part", r"is not installed"),
        ("needs_another", r"cannot be imported \(ModuleNotFoundError: .*one_7"),
        ("does_not_fit", r"cannot be imported \(TypeError: descriptors\)"),
    ):
        match = rf"{name.partition('.')[0]} {reason}.*; run pip install 'x\[y\]'"
        with pytest.raises(MissingPackage, match=match):
            require(name, "x[y]")
    assert require("math", "x").pi > 3


@pytest.mark.parametrize(
    ("recipe", "package", "images", "requirement"),
    [
        ("mae_base", "tensorflow_datasets", 1_281_167, "tensorflow-datasets"),
        ("digits_mae", "sklearn.datasets", 1437, r"hivit-jax\[data\]"),
        ("digits_finetune", "sklearn.datasets", 100, r"hivit-jax\[data\]"),
    ],
)
def test_size_of_a_known_dataset_requires_no_package(
    recipe, package, images, requirement, monkeypatch
):
    """Only opening the dataset requires the package."""
    monkeypatch.setitem(sys.modules, package, None)
    registry._open.cache_clear()
    digits._digits.cache_clear()
    config = configs.load(recipe)
    task = inputs.task_of_recipe(config)
    assert inputs.images_per_epoch(config, task) == images
    with pytest.raises(MissingPackage, match=rf"pip install '{requirement}'"):
        inputs.make_task(config)


def test_task_of_another_dataset_requires_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    flags = ["--config.data.name=cifar10"]
    with pytest.raises(MissingPackage, match="tensorflow_datasets is not installed"):
        inputs.task_of_recipe(configs.load("mae_base", flags))


def test_tf_data_requires_tensorflow(monkeypatch):
    """`check_splits`, which runs before training, and `tf_dataset` raise the error.

    A misspelled reader is an error when the config is loaded.
    """
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    tf_data.tensorflow.cache_clear()
    config = configs.load("digits_mae", ["--config.data.reader=tf.data"])
    message = r"tensorflow is not installed; run pip install 'hivit-jax\[tf\]'"
    with pytest.raises(MissingPackage, match=message):
        inputs.check_splits(config, inputs.make_task(config))
    with pytest.raises(MissingPackage, match=message):
        hivit_jax.tf_dataset(config, 0, 1)
    with pytest.raises(ConfigError, match="reader='tfdata'; expected 'threads' or 'tf"):
        configs.load("digits_mae", ["--config.data.reader=tfdata"])


@contextmanager
def unread_stdout():
    """Replace stdout by a pipe whose reader has exited."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout, redirect_stdout(stdout):
        yield


@pytest.mark.parametrize(
    "action",
    [
        lambda: print("line", flush=True),
        lambda: print("line"),
        lambda: os.write(sys.stdout.fileno(), b"line"),  # as with PYTHONUNBUFFERED=1
        lambda: Parser(prog="command").parse_args(["--help"]),
    ],
)
def test_command_ends_quietly_if_stdout_is_not_read(action, capsys):
    """The exit code is 128 + SIGPIPE. Later output is discarded without an error."""
    with unread_stdout():
        assert run_command(action) == 141
        print("more", flush=True)
    assert capsys.readouterr().err == ""


def test_errors_are_printed_if_stdout_is_not_read(capsys):
    def fail():
        print("line")
        raise ConfigError("bad flag")

    with unread_stdout():
        assert run_command(fail) == 2
        print("more", flush=True)
    assert capsys.readouterr().err == "error: bad flag\n"


def test_other_broken_pipes_are_errors():
    def fail():
        raise BrokenPipeError("of a socket")

    with pytest.raises(BrokenPipeError, match="of a socket"):
        run_command(fail)
