"""Tests that class names of a dataset reach saved and exported models."""

import json

import mini_runs
import pytest
from datasets import digits_config

import hivit_jax
from hivit_jax import config as configs
from hivit_jax import inputs
from hivit_jax.data.sources import registry
from hivit_jax.data.sources.base import DatasetInfo
from hivit_jax.errors import ConfigError
from hivit_jax.main import main
from hivit_jax.tasks import create
from hivit_jax.tools import convert
from hivit_jax.train import train
from tests.end_to_end import test_own_images as own_images

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


@pytest.fixture(scope="module")
def trained(tmp_path_factory, single_device):
    """Return the workdir of a classifier for blue, green and red images."""
    root = tmp_path_factory.mktemp("colors")
    with mini_runs.minimal_output():
        write_folders(root / "data" / "train", own_images.SPLITS["train"])
        write_folders(root / "data" / "val", own_images.SPLITS["val"])
        dataset = dict(data__name="folder", data__dir=root / "data")
        own_images.train(root / "run", **dataset)
    return root / "run"


def write_folders(root, pairs, rename=lambda name: name):
    """Write pairs of (encoded image, class name) as ROOT/CLASS/INDEX.png.

    Args:
      rename: function from a class name to the name of its directory.
    """
    for k, (image, name) in enumerate(pairs):
        path = root / rename(name) / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)


@pytest.mark.slow
@pytest.mark.usefixtures("minimal_output")
@pytest.mark.parametrize("reader", ["threads", "tf.data"])
def test_evaluation_matches_classes_by_name(trained, tmp_path, capsys, reader):
    """The evaluated directory has no training split and no green image."""
    if reader == "tf.data":
        pytest.importorskip("tensorflow")
    pairs = [pair for pair in own_images.examples(9, 70) if pair[1] != "green"]
    write_folders(tmp_path, pairs)
    command = [f"--workdir={trained}", "--mode=eval"]
    flags = [f"--config.data.dir={tmp_path}", f"--config.data.reader={reader}"]
    assert main([*command, *flags, "--config.data.eval_split=."]) == 0
    out = capsys.readouterr().out
    assert "warning: the evaluation has no image of 1 class: green" in out
    assert "top1 100.00 %" in out
    assert "(6 images)" in out


@pytest.mark.slow
@pytest.mark.usefixtures("minimal_output")
def test_evaluation_of_unknown_classes_is_an_error(trained, tmp_path, capsys):
    pairs = own_images.SPLITS["val"]
    write_folders(tmp_path, pairs, lambda name: name.replace("green", "lime"))
    command = [f"--workdir={trained}", "--mode=eval", f"--config.data.dir={tmp_path}"]
    assert main([*command, "--config.data.eval_split=."]) == 2
    mini_runs.check_message(
        capsys.readouterr().err,
        ["the model has no class 'lime'", "3 classes blue, green, red"],
    )


@pytest.mark.slow
@pytest.mark.usefixtures("minimal_output")
def test_predictions_without_images_of_a_class_have_correct_labels(trained, tmp_path):
    """The data directory loses its class blue in both splits after the training."""
    data = trained.parent / "data"
    moved = [data / split / "blue" for split in ("train", "val")]
    registry._open.cache_clear()
    for path in moved:
        path.rename(tmp_path / path.parent.name)
    try:
        rows = own_images.predict_rows(trained, tmp_path / "out.csv")
    finally:
        for path in moved:
            (tmp_path / path.parent.name).rename(path)
        registry._open.cache_clear()
    assert [row["predicted"] for row in rows] == ["green"] * 3 + ["red"] * 3
    assert [row["label"] for row in rows] == [row["predicted"] for row in rows]


@pytest.mark.slow
@pytest.mark.usefixtures("minimal_output")
def test_run_does_not_resume_with_a_renamed_class(trained, capsys):
    """A changed number of images is logged; a class of another name is an error."""
    data, command = trained.parent / "data", [f"--workdir={trained}"]
    image = next((data / "train" / "red").iterdir())
    content = image.read_bytes()
    image.unlink()
    for split in ("train", "val"):
        (data / split / "green").rename(data / split / "lime")
    registry._open.cache_clear()
    try:
        assert main([*command, "--config.total_steps=17"]) == 2
        error = capsys.readouterr().err
        for split in ("train", "val"):
            (data / split / "lime").rename(data / split / "green")
        registry._open.cache_clear()
        assert main(command) == 0
    finally:
        image.write_bytes(content)
        registry._open.cache_clear()
    mini_runs.check_message(error, [str(trained), "label 1 is 'green'; found 'lime'"])
    assert "dataset changed: train: 24 -> 23 examples" in capsys.readouterr().out
