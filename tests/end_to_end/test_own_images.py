"""Tests of the command line with users' own images."""

import json

import mini_runs
import numpy as np
import pytest
from datasets import noise_image
from PIL import Image

from hivit_jax.main import main

pytestmark = pytest.mark.usefixtures("cache_directory")


def lines_of(workdir):
    """Return the lines of metrics.jsonl."""
    return [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def tiles(tmp_path):
    """Return a directory of twenty nested unlabeled images and a stray file."""
    root = tmp_path / "tiles"
    for k in range(20):
        path = root / f"scene{k % 3}" / "deeper" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(noise_image(40, 36, 3), k, 0)).save(path)
    (root / "notes.txt").touch()
    return root


FLAGS = dict(data__name="folder", model__image_size=32, batch_size=8, total_steps=2)


@pytest.mark.slow
def test_pretraining_without_labels_and_evaluation(tiles, tmp_path, capsys):
    """Without evaluation images, figures show training images."""
    flags = FLAGS | dict(data__dir=tiles, data__eval_split="none", eval_every=1)
    flags |= dict(data__class_level="none", checkpoint_every=1)
    arguments = mini_runs.arguments("photographs", **flags)
    workdir = tmp_path / "run"
    assert main([*arguments, f"--workdir={workdir}"]) == 0
    out = capsys.readouterr().out
    assert "eval" not in out
    assert not [key for line in lines_of(workdir) for key in line if "eval" in key]
    figures = {path.name for path in (workdir / "figures").iterdir()}
    assert figures == {
        "curves.png",
        "reconstruction_0000001.png",
        "reconstruction_0000002.png",
    }
    assert main([*arguments, f"--workdir={workdir}", "--mode=eval"]) == 2
    assert "the config has no evaluation images" in capsys.readouterr().err


def test_classification_needs_labels(tiles, tmp_path, capsys):
    flags = mini_runs.arguments("photographs", **FLAGS, data__dir=tiles)
    flags = [f for f in flags if "decoder" not in f] + [
        "--config.task=classify",
        "--config.model.name=hivit_tiny",
        "--config.data.eval_fraction=0.2",
        "--config.data.class_level=none",
    ]
    assert main([*flags, f"--workdir={tmp_path / 'run'}"]) == 2
    assert "the images have no labels; expected" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("minimal_output")
def test_tiles_of_16_bits_and_4_bands(tmp_path, capsys):
    """A model trains on NumPy arrays of 16 bits and 4 bands, with held-out images."""
    values = np.random.RandomState(0).randint(0, 10000, (24, 34, 36, 4))
    for k, tile in enumerate(values.astype(np.uint16)):
        (tmp_path / "tiles" / f"c{k % 2}").mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "tiles" / f"c{k % 2}" / f"{k}.npy", tile)
    flags = FLAGS | dict(data__dir=tmp_path / "tiles", data__eval_fraction=0.3)
    flags |= dict(data__dtype="uint16", data__scale=10000, model__in_channels=4)
    flags |= dict(data__mean=(0.5,) * 4, data__std=(0.3,) * 4)
    arguments = mini_runs.arguments("photographs", **flags)
    assert main([*arguments, f"--workdir={tmp_path / 'run'}"]) == 0
    (line,) = (x for x in lines_of(tmp_path / "run") if "eval/loss" in x)
    assert 0 < line["eval/count"] < 12
    assert "16 bits" not in capsys.readouterr().out
