"""Pretraining and finetuning on scikit-learn's 1,797 handwritten digits, on a CPU.

    python launch/demo.py [--workdir runs/demo]

Pretrains a very small masked autoencoder. Then trains classifiers on four subsets of
100 labeled digits, from the pretrained encoder and from scratch. Prints an equivalent
command before each run. An interrupted demo resumes.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from hivit_jax import config as configs
from hivit_jax import inputs
from hivit_jax.distributed.signals import catch_signals
from hivit_jax.errors import run_command
from hivit_jax.reporting.console import log
from hivit_jax.train import train

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SUBSETS = range(4)


def run(recipe: str, workdir: Path, stop: Callable, **overrides: object) -> dict:
    """Run a recipe, print the equivalent command, and return the last evaluation."""
    path = os.path.relpath(CONFIGS / recipe)
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    command = ["python -m hivit_jax.main", f"--config {path}", f"--workdir {workdir}"]
    log("\n$ " + " ".join(command + flags))
    return train(configs.load(path, flags), workdir, stop)


def baseline_losses(config) -> tuple[float, float]:
    """Return the losses of two predictions that do not depend on the image.

    Returns:
      Mean squared errors of predicting the mean training image, and of predicting the
      mean training pixel everywhere. Pixels are normalized, as in the loss.
    """
    train_images, test_images = (load_split(config, s) for s in ("train", "test"))
    return tuple(
        float(np.square((test_images - prediction) / config.data.std[0]).mean())
        for prediction in (train_images.mean(0), train_images.mean())
    )


def load_split(config, split: str) -> np.ndarray:
    """Return all images of a split, float [n, H, W, C] in [0, 1]."""
    batches = inputs.eval_batches(config, split)
    return np.concatenate([b["image"][b["weight"] > 0] for b in batches]) / 255


def demo(workdir: Path, stop: Callable) -> None:
    """Pretrain, train the classifiers, and print accuracies and relative losses."""
    began = time.perf_counter()
    pretrain_dir = workdir / "pretrain"
    loss = run("digits_mae.py", pretrain_dir, stop)["eval/loss"]

    top1 = np.empty((len(SUBSETS), 2))
    for row, subset in enumerate(SUBSETS):
        starts = {"finetune": pretrain_dir, "scratch": ""}
        for column, (name, init_from) in enumerate(starts.items()):
            overrides = {"init_from": init_from, "data.subset": subset}
            path = workdir / f"{name}_{subset}"
            metrics = run("digits_finetune.py", path, stop, **overrides)
            top1[row, column] = 100 * metrics["eval/top1"]

    mean_image_loss, mean_pixel_loss = baseline_losses(
        configs.load(str(CONFIGS / "digits_mae.py"))
    )
    log("\ntop-1 on 360 held-out digits, in %, after training on 100 labels")
    log(f"{'subset':<12}{'pretrained':>12}{'scratch':>12}")
    for subset, values in zip(SUBSETS, top1, strict=True):
        log(f"{subset:<12}" + "".join(f"{value:12.1f}" for value in values))
    cells = [f"{each.mean():.1f} +- {each.std(ddof=1):.1f}" for each in top1.T]
    log(f"{'mean +- std':<12}" + "".join(f"{cell:>12}" for cell in cells))
    log(
        "\nreconstruction loss, divided by the loss of predicting the mean training "
        f"image: {loss / mean_image_loss:.2f}; the mean training pixel: "
        f"{loss / mean_pixel_loss:.2f}"
    )
    newest = max((pretrain_dir / "figures").glob("reconstruction_*.png"))
    log(f"figures: {newest}\n         {pretrain_dir / 'figures' / 'curves.png'}")
    log(f"{time.perf_counter() - began:.0f} seconds")


def main() -> int:
    """Entry point. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"))
    workdir = parser.parse_args().workdir
    # The classifiers differ only in their data, so the cache saves compilations.
    jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    return run_command(lambda: demo(workdir, catch_signals()))


if __name__ == "__main__":
    sys.exit(main())
