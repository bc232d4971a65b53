"""Test of pretraining and finetuning Swin, from recipe to checkpoint."""

import mini_runs
import pytest

from hivit_jax import config as configs
from hivit_jax.train import train
from hivit_jax.weights.load import read

pytestmark = [
    pytest.mark.usefixtures("minimal_output", "single_device"),
    pytest.mark.slow,
]
SMALL_RUN = {
    "batch_size": 16,
    "total_epochs": 0.0,
    "total_steps": 2,
    "log_every": 1,
    "eval_every": 2,
    "checkpoint_every": 2,
    "data.name": "synthetic",
    "data.train_examples": 64,
    "optimizer.warmup_epochs": 0.0,
    "model.embed_dim": 16,
    "model.depths": "(2,2)",
    "model.num_heads": "(1,2)",
    "model.dtype": "float32",
}


def config_of(recipe, **overrides):
    """Return a recipe's config with SMALL_RUN and `overrides`.

    In the names of `overrides`, two underscores stand for a dot.
    """
    values = SMALL_RUN | {k.replace("__", "."): v for k, v in overrides.items()}
    return configs.load(recipe, [f"--config.{k}={v}" for k, v in values.items()])


@pytest.mark.extras
def test_finetuning_accepts_an_encoder_with_smaller_windows(tmp_path):
    """The encoder is pretrained with SimMIM."""
    small = dict(model__image_size=64, model__window_size=4)
    config = config_of("simmim_swin", **small, optimizer__milestones="(1.0,)")
    train(config, tmp_path / "simmim")
    (loss,) = mini_runs.logged(tmp_path / "simmim", "eval/loss").values()
    # Predictions start near 0, so the loss is close to the mean absolute value of the
    # normalized pixels.
    assert 0.3 < loss < 3
    large = dict(model__image_size=96, model__window_size=6, model__num_classes=10)
    config = config_of("finetune_swin", **large, init_from=tmp_path / "simmim")
    train(config, tmp_path / "finetuned")
    arguments = read(tmp_path / "finetuned").arguments
    assert arguments["name"] == "swin_base"
    assert arguments["window_size"] == 6
