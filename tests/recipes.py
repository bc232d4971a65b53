"""Recipes of very small models that train in seconds, and ways to run them."""

from pathlib import Path

from ml_collections import ConfigDict

from hivit_jax import config as configs
from hivit_jax import metrics

CONFIGS = Path(__file__).parents[1] / "configs"

# 16 units of 64x64 pixels, or of 32x32 grey ones; a step counts 16 images.
MINI = {
    "batch_size": 16,
    "total_steps": 8,
    "log_every": 1,
    "eval_every": 1000,
    "checkpoint_every": 1000,
    "model.embed_dim": 64,
    "model.depths": (1, 1, 2),
    "model.num_heads": 2,
    "model.decoder_embed_dim": 32,
    "model.decoder_depth": 1,
    "model.decoder_num_heads": 2,
    "model.dtype": "float32",
    "optimizer.base_learning_rate": 0.016,  # 1e-3 for batches of 16
}
SYNTHETIC = MINI | {
    "data.name": "synthetic",
    "data.train_examples": 64,
    "model.image_size": 64,
    "optimizer.warmup_epochs": 0.5,  # 2 steps
}
DIGITS = MINI | {"optimizer.warmup_epochs": 0.02}  # 2 steps
CLASSIFIER = {
    "task": "classify",
    "model.name": "hivit_base",
    "model.num_classes": 10,
    "model.drop_path_rate": 0.3,
}


def arguments(source: str = "synthetic", **overrides) -> list[str]:
    """Command line of the mini masked autoencoder on "synthetic" or "digits".

    Args:
      overrides: config values; two underscores stand for a dot.
    """
    synthetic = source == "synthetic"
    path = CONFIGS / ("mae_base.py" if synthetic else "digits_mae.py")
    values = dict(SYNTHETIC if synthetic else DIGITS)
    values |= {key.replace("__", "."): value for key, value in overrides.items()}
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    return [f"--config={path}", *flags]


def mae(source: str = "synthetic", **overrides) -> ConfigDict:
    """The mini masked autoencoder's config."""
    path, *flags = arguments(source, **overrides)
    return configs.load(path.removeprefix("--config="), flags)


def classifier(source: str = "synthetic", **overrides) -> ConfigDict:
    """The mini classifier's config, with drop path and label smoothing."""
    as_keywords = {key.replace(".", "__"): value for key, value in CLASSIFIER.items()}
    config = mae(source, **as_keywords | overrides)
    for key in [key for key in config.model if key.startswith("decoder_")]:
        with config.unlocked():
            del config.model[key]
    with config.unlocked():
        del config.model["norm_pix_loss"]
        config.label_smoothing = 0.1
    return config


def lines(workdir: Path, name: str = "loss") -> dict[int, float]:
    """One of the numbers in metrics.jsonl by step; fails if a step has it twice."""
    found = [line for line in metrics.read(workdir / "metrics.jsonl") if name in line]
    steps = [line["step"] for line in found]
    assert steps == sorted(set(steps))
    return {line["step"]: line[name] for line in found}
