"""The whole method on scikit-learn's 1,797 handwritten digits, on a CPU, in minutes.

    python launch/demo.py [--workdir runs/demo]

Pretrains a very small masked autoencoder, then trains a classifier on 100 labelled
digits, once from the pretrained encoder and once from scratch, for several draws of
the 100. Every run is one that the printed command would do; it goes on where it
stopped.
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
from hivit_jax.errors import exit_code
from hivit_jax.reporting.console import log
from hivit_jax.train import train

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SUBSETS = range(4)


def run(recipe: str, workdir: Path, stop: Callable, **overrides: object) -> dict:
    """One run of a recipe, as its printed command would do it; its last evaluation."""
    path = os.path.relpath(CONFIGS / recipe)
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    command = ["python -m hivit_jax.main", f"--config {path}", f"--workdir {workdir}"]
    log("\n$ " + " ".join(command + flags))
    return train(configs.load(path, flags), workdir, stop)


def baselines(config) -> tuple[float, float]:
    """Error of two predictions for held-out images that look at none of them.

    Returns:
      Mean squared errors, in the normalised pixels of the loss, of the mean training
      image and of the mean training pixel.
    """
    train_images, test_images = (whole_split(config, s) for s in ("train", "test"))
    return tuple(
        float(np.square((test_images - prediction) / config.data.std[0]).mean())
        for prediction in (train_images.mean(0), train_images.mean())
    )


def whole_split(config, split: str) -> np.ndarray:
    """All images of a split as the network gets them, float [n, H, W, C] in [0, 1]."""
    batches = inputs.eval_batches(config, split)
    return np.concatenate([b["image"][b["weight"] > 0] for b in batches]) / 255


def demo(workdir: Path, stop: Callable) -> None:
    """All runs, then the summary."""
    began = time.perf_counter()
    pretrain = workdir / "pretrain"
    loss = run("digits_mae.py", pretrain, stop)["eval/loss"]

    top1 = np.empty((len(SUBSETS), 2))
    for row, subset in enumerate(SUBSETS):
        for column, (name, start) in enumerate(
            [("finetune", pretrain), ("scratch", "")]
        ):
            values = run(
                "digits_finetune.py",
                workdir / f"{name}_{subset}",
                stop,
                **{"init_from": start, "data.subset": subset},
            )
            top1[row, column] = 100 * values["eval/top1"]

    mean_image, mean_pixel = baselines(configs.load(str(CONFIGS / "digits_mae.py")))
    log("\ntop-1 on 360 held-out digits, in %, after training on 100 labels")
    log(f"{'subset':<12}{'pretrained':>12}{'scratch':>12}")
    for subset, values in zip(SUBSETS, top1, strict=True):
        log(f"{subset:<12}" + "".join(f"{value:12.1f}" for value in values))
    cells = [f"{column.mean():.1f} +- {column.std(ddof=1):.1f}" for column in top1.T]
    log(f"{'mean +- std':<12}" + "".join(f"{cell:>12}" for cell in cells))
    log(
        f"\nmasked loss {loss / mean_image:.2f} of predicting the mean image of the "
        f"training split ({loss / mean_pixel:.2f} of predicting its mean pixel)"
    )
    newest = max((pretrain / "figures").glob("reconstruction_*.png"))
    log(f"figures: {newest}\n         {pretrain / 'figures' / 'curves.png'}")
    log(f"{time.perf_counter() - began:.0f} seconds")


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"))
    workdir = parser.parse_args().workdir
    # The classifiers differ in data alone: only the first has to be compiled.
    jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    return exit_code(lambda: demo(workdir, catch_signals()))


if __name__ == "__main__":
    sys.exit(main())
