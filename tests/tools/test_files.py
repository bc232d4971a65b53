"""Tests of models saved without a training config: config, `predict`, `features`."""

from dataclasses import replace

import numpy as np
import pytest
from datasets import noise_image
from networks import abstract_model, mini
from PIL import Image

import hivit_jax
from hivit_jax import models
from hivit_jax.tools import features, files, predict
from hivit_jax.weights import load


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "task", "num_classes"),
    [
        (dict(num_classes=2), "classify", 2),
        (dict(num_classes=0), "classify", 1),
        (dict(name="mae_hivit_base", in_channels=1, image_size=(32, 64)), "mae", None),
    ],
)
def test_config_without_a_recipe_contains_the_arguments_of_the_model(
    overrides, task, num_classes, tmp_path
):
    """`config_of` makes a config from a model's arguments and its `info`.

    Values that `info` lacks have defaults.
    """
    model = mini(depths=(1, 1, 1), **overrides)
    channels = model.config.in_channels
    model.info = replace(model.info, crop=0.9, std=(0.1,) * channels)
    hivit_jax.save_pretrained(model, tmp_path)
    pretrained = load.read(tmp_path)
    config = files.config_of(pretrained)
    assert (config.task, config.model.num_classes) == (task, num_classes)
    assert config.model.image_size == model.config.image_size
    assert (config.data.crop_pct, config.data.std) == (0.9, (0.1,) * channels)
    assert config.batch_size == files.MAX_BATCH
    without_info = files.config_of(pretrained._replace(info={}), batch_size=7)
    assert len(without_info.data.mean) == channels
    assert without_info.batch_size == 7


@pytest.mark.parametrize(
    ("name", "task"),
    [("vit_tiny", "classify"), ("swin_tiny", "classify"), ("simmim_swin_tiny", "mae")],
)
def test_config_of_finds_the_task_of_other_families(name, task):
    arguments = models.arguments_of(abstract_model(name))
    empty = dict(
        params={}, notes=[], guesses=[], unused=[], recipe={}, results={}, info={}
    )
    pretrained = load.Pretrained(path="x", label="x", arguments=arguments, **empty)
    assert files.config_of(pretrained).task == task


@pytest.mark.slow
def test_model_without_a_recipe_predicts_the_argmax_and_softmax(tmp_path, capsys):
    """`predict` writes the most probable class and its probability.

    It rejects a model without a head, and a masked autoencoder before it compiles a
    program. `features` accepts the model without a head.
    """
    model = mini(depths=(1, 1, 1), num_classes=2)
    model.info = replace(model.info, class_names=("cat", "dog"))
    hivit_jax.save_pretrained(model, tmp_path / "model")
    hivit_jax.save_pretrained(mini(depths=(1, 1, 1), num_classes=0), tmp_path / "bare")
    Image.fromarray(noise_image(90, 70, 3)).save(tmp_path / "a.png")
    image, out = str(tmp_path / "a.png"), tmp_path / "a.csv"
    flags = ["--batch_size=1", f"--out={out}", image]
    assert predict.main([f"--checkpoint={tmp_path / 'model'}", *flags]) == 0
    logits = np.asarray(model(hivit_jax.preprocess(model)(image)))[0]
    expected = ("cat", "dog")[logits.argmax()]
    probability = 1 / np.exp(logits - logits.max()).sum()
    _, name, written, *_ = out.read_text().splitlines()[1].split(",")
    assert name == expected
    assert float(written) == pytest.approx(probability, abs=1e-5)
    bare = f"--checkpoint={tmp_path / 'bare'}"
    assert predict.main([bare, *flags]) == 2
    assert "has no head" in capsys.readouterr().err
    hivit_jax.save_pretrained(mini("mae_hivit_base"), tmp_path / "mae")
    assert predict.main([f"--checkpoint={tmp_path / 'mae'}", *flags]) == 2
    printed = capsys.readouterr()
    assert "task='mae' has no predictions; expected a classifier" in printed.err
    assert "compiling" not in printed.out
    flags = ["--batch_size=1", f"--out={tmp_path / 'a.npz'}", image]
    assert features.main([bare, *flags]) == 0
    assert np.load(tmp_path / "a.npz")["features"].shape == (1, 64)
    assert "labels" not in np.load(tmp_path / "a.npz")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("no labels; to include labels, pass a directory ")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hivit_base", "mae_hivit_base"])
def test_class_folders_label_the_features_of_an_encoder(name, tmp_path, capsys):
    """Directories are classes. An image outside of them has the label -1."""
    model = mini(name, **({} if "mae" in name else dict(depths=(1, 1, 1))))
    hivit_jax.save_pretrained(model, tmp_path / "model")
    images = ["ant/0.png", "bee/0.png", "bee/1.png", "c/0.png", "d/0.png", "e/0.png"]
    for image in [*images, "loose.png"]:
        path = tmp_path / "photos" / image
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise_image(40, 40, 3)).save(path)
    flags = [f"--checkpoint={tmp_path / 'model'}", f"--out={tmp_path / 'a.npz'}"]
    assert features.main([*flags, str(tmp_path / "photos")]) == 0
    arrays = np.load(tmp_path / "a.npz")
    assert arrays["class_names"].tolist() == ["ant", "bee", "c", "d", "e"]
    assert arrays["labels"].tolist() == [0, 1, 1, 2, 3, 4, -1]
    assert arrays["files"][-1].endswith("photos/loose.png")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "labels: 5 classes, ant, bee, c, d, e"
