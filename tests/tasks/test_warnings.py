"""Tests of warnings about configs that probably do not train as intended."""

import pytest
from flax.nnx import Module

from hivit_jax import config as configs
from hivit_jax import inputs, recipes
from hivit_jax.data.sources.base import DatasetInfo
from hivit_jax.tasks import Task, create
from hivit_jax.tools.describe import describe

NAMES = tuple("abcdefghi")


def warnings(recipe, *overrides, images=291, classes=NAMES, steps=1000):
    """Return the task's warnings about a recipe on a dataset of `images` images."""
    flags = [
        f"--config.{override}" for override in (f"total_steps={steps}", *overrides)
    ]
    config = configs.load(recipe, flags)
    task = create(config, DatasetInfo({"train": images, "test": 9}, classes))
    return task.warnings(*inputs.count_steps(config, images))


@pytest.mark.parametrize("name", recipes.names())
def test_recipes_give_no_warnings(name):
    config = configs.load(name)
    # Recipes for a user's folder have no published dataset.
    user_data = DatasetInfo({"train": 400, "test": 40}, NAMES)
    task = create(config, inputs.published_info(config.data) or user_data)
    assert task.warnings(*inputs.count_steps(config, task.data.counts["train"])) == []


@pytest.mark.parametrize("images", [10, 20, 50, 100, 200])
@pytest.mark.parametrize("name", ["folder_mae", "folder_finetune", "folder_linear"])
def test_small_folders_give_only_warnings_about_curves(name, images):
    """Datasets may be smaller than the batch.

    With the flags that the warnings suggest, there are no warnings.
    """
    if name == "folder_linear" and images < 50:
        pytest.skip("the warning about the learning rate of short probes is justified")
    config = configs.load(name)
    task = create(config, DatasetInfo({"train": images, "test": 9}, NAMES))
    lines = task.warnings(*inputs.count_steps(config, images))
    assert all(line.startswith(("eval_every=", "log_every=")) for line in lines)
    assert lines or images == 200
    config = configs.load(name, [line.partition("; try ")[2] for line in lines])
    task = create(config, task.data)
    assert task.warnings(*inputs.count_steps(config, images)) == []


RECIPE = "digits_finetune"
USUAL = ["model.num_classes=9", "batch_size=50", "data.train_examples=0"]


def test_usual_settings_give_no_warnings():
    """A batch may contain all images; a run may save a checkpoint only at its end."""
    limits = ["batch_size=291", "eval_every=499", "checkpoint_every=1000"]
    assert warnings(RECIPE, *USUAL) == []
    assert warnings(RECIPE, *USUAL, *limits) == []
    assert warnings(RECIPE, *USUAL, "optimizer.ema_decay=0.99") == []


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (["optimizer.warmup_epochs=200"], ["warmup_epochs=200", "172 epochs"]),
        (["batch_size=1024"], ["batch_size=1024 exceeds the 291 training images"]),
        (["eval_every=1251"], ["eval_every=1251 exceeds the 1,000 steps"]),
        (["eval_every=1251"], ["which is evaluated only at its end"]),
        (
            ["eval_every=1251", "data.eval_split=none"],
            ["eval_every=1251", "draws its curves and figures only at its end; try"],
        ),
        (
            ["eval_every=500"],
            ["is long for the 1,000 steps of the run, which is evaluated only once"],
        ),
        (["eval_every=1000"], ["evaluated only at its end; try --config.eval_every=1"]),
        (["log_every=500"], ["log_every=500", "logs only once before its end; try "]),
        (["checkpoint_every=1251"], ["checkpoint_every=1251", "killed run is lost"]),
        (["log_every=2000"], ["log_every=2000"]),
        (["model.num_classes=1000"], ["num_classes=1000 exceeds the 9 classes"]),
        (["optimizer.ema_decay=0.9999"], ["ema_decay=0.9999", "weight of 90%"]),
        (["optimizer.min_learning_rate=1"], ["min_learning_rate=1 exceeds the peak"]),
        (["optimizer.warmup_learning_rate=1"], ["warmup_learning_rate=1 exceeds"]),
        (["optimizer.base_learning_rate=0"], ["changes no parameter"]),
        (
            ["optimizer.base_learning_rate=5"],
            ["5 x batch_size 50 / 256 = 0.97", "Adam"],
        ),
        (["optimizer.betas=(0.99,0.9)"], ["betas=(0.99, 0.9)", "the first is usually"]),
        (
            ["optimizer.schedule=multistep", "optimizer.milestones=(100,300,400)"],
            ["milestones", "before epoch 300, 400"],
        ),
        (
            ["data.balance=1", "class_weights=1,1,1,1,1,1,1,1,2"],
            ["data.balance=1: both give rare classes more weight"],
        ),
        (["data.train_split=x", "data.eval_split=x"], ["'x' is the training split"]),
    ],
)
def test_unusual_setting_gives_one_line(overrides, fragments):
    [line] = warnings(RECIPE, *USUAL, *overrides)
    assert "\n" not in line
    for fragment in fragments:
        assert fragment in line


def test_trials_of_a_few_steps_give_no_warnings():
    """A run of 19 steps is a trial, a run of 20 steps is not."""
    usual = [*USUAL, "eval_every=200", "optimizer.warmup_epochs=1"]
    assert warnings(RECIPE, *usual, steps=19) == []
    assert "eval_every=200 exceeds" in "".join(warnings(RECIPE, *usual, steps=20))


def test_single_class_gives_a_warning():
    messages = warnings(RECIPE, *USUAL[1:], "model.num_classes=1", classes=("a",))
    assert messages == ["model.num_classes=1: with one class the loss is always 0"]


def test_default_size_of_the_synthetic_dataset_gives_a_warning():
    """An epoch has 1,024 images unless data.train_examples sets another number."""

    def lines(*overrides):
        flags = [f"--config.{x}" for x in ("data.name=synthetic", *overrides)]
        config = configs.load("mae_base", flags)
        task = inputs.task_of_recipe(config)
        images = task.data.counts["train"]
        return task.warnings(*inputs.count_steps(config, images))

    expected = "data.name=synthetic has 1,024 images"
    assert lines("total_epochs=100")[0].startswith(expected)
    # The length of this run is in steps, but its warmup is in epochs.
    assert lines("total_steps=10000", "total_epochs=0")[0].startswith(expected)
    assert lines("data.train_examples=1281167") == []
    steps = ["total_steps=10000", "total_epochs=0", "optimizer.warmup_epochs=0"]
    assert not any(expected in line for line in lines(*steps))


def test_linear_probe_warns_of_small_rates_and_random_encoders():
    """The smallest usual learning rate depends on the number of steps.

    An encoder has random parameters if init_from is empty.
    """
    usual = [*USUAL, "batch_size=32"]
    learning_rate = "optimizer.base_learning_rate=0.1"
    [line] = warnings("digits_linear", *usual, learning_rate)
    assert "0.1 x batch_size 32 / 256 = 0.0125, is small for LARS in 1,000" in line
    assert "expected at least 1;" in line
    # The shorter the run, the larger the learning rate must be.
    learning_rate = "optimizer.base_learning_rate=10"
    assert warnings("digits_linear", *usual, learning_rate) == []
    [line] = warnings(
        "digits_linear",
        *usual,
        learning_rate,
        "log_every=9",
        "eval_every=9",
        "checkpoint_every=9",
        steps=100,
    )
    assert "= 1.25, is small for LARS in 100 steps; expected at least 10;" in line
    [line] = warnings("digits_linear", *usual, "init_from=")
    assert "random parameters" in line
    assert warnings("digits_linear", *usual) == []


def test_describe_prints_warnings_first(monkeypatch):
    for name in ("parameter_table", "cost_table", "schedule_table", "hours_table"):
        monkeypatch.setattr(f"hivit_jax.tools.describe.{name}", lambda *_: "")
    monkeypatch.setattr(Task, "build_model", lambda self: Module())
    flags = ["--config.total_steps=400", "--config.mesh.data=1"]
    flags.append("--config.eval_every=501")
    first, second, *_ = describe(configs.load("digits_mae", flags)).splitlines()
    assert first.startswith("warning: eval_every=501 exceeds the 400 steps")
    assert second == ""
