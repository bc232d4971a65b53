"""Compare the ImageNet recipes with the folder recipes on small datasets.

    python -m benchmarks.small_data [--workdir runs/small_data] [--only TEXT ...]

The benchmark trains a very small HiViT on grayscale images, resized to 32x32 pixels.
There are two datasets of ten classes: handwritten digits (scikit-learn), and tiles of
ten photographs (scikit-image and scikit-learn), where the class is the photograph. Each
random draw selects 40 training images and 20 test images per class. Finetuning and
linear probes take 60 epochs, pretraining 150 epochs. Each result is added to
results/small_data.json. An interrupted benchmark resumes.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from hivit_jax import config as configs
from hivit_jax.data.sources.digits import Digits
from hivit_jax.distributed.signals import catch_signals
from hivit_jax.errors import run_command
from hivit_jax.reporting.console import log
from hivit_jax.train import train

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "small_data.json"
SIDE = 32  # pixels
TRAIN, TEST = 40, 20  # images per class
DRAWS = 3
# Photographs in skimage.data; `tiles` adds three more.
PHOTOGRAPHS = ("astronaut", "brick", "camera", "chelsea", "coffee", "grass", "gravel")
EPOCHS, PRETRAINING_EPOCHS = 60, 150
NEVER = 10**6  # interval in steps, longer than any run; the last step is evaluated
COMMON = {
    "model.image_size": SIDE,
    "model.dtype": "float32",
    "data.name": "folder",
    "data.eval_fraction": 0,
    "data.crop_pct": 1.0,
    "data.canvas": 64,
    "data.flip": False,
    "log_every": 100,
    "eval_every": NEVER,
    "checkpoint_every": NEVER,
}
ENCODER = {
    "model.patch_size": 8,
    "model.embed_dim": 64,
    "model.depths": (1, 1, 2),
    "model.num_heads": 2,
}
DECODER = {
    "model.decoder_embed_dim": 64,
    "model.decoder_depth": 1,
    "model.decoder_num_heads": 2,
}
# Experiment -> (measured recipe, recipe of its pretraining; "": from scratch).
EXPERIMENTS = {
    "scratch: finetune": ("finetune:tiny", ""),
    "scratch: folder_finetune": ("folder_finetune", ""),
    "folder_mae: finetune": ("finetune:tiny", "folder_mae"),
    "folder_mae: folder_finetune": ("folder_finetune", "folder_mae"),
    "mae_tiny: folder_finetune": ("folder_finetune", "mae_tiny"),
    "folder_mae: linear": ("linear:tiny", "folder_mae"),
    "folder_mae: folder_linear": ("folder_linear", "folder_mae"),
}


def tiles() -> dict[str, np.ndarray]:
    """Return the disjoint tiles of each photograph, uint8 [n, 32, 32]."""
    import skimage.data
    from sklearn.datasets import load_sample_image

    photographs = {name: getattr(skimage.data, name)() for name in PHOTOGRAPHS}
    photographs["motorcycle"] = skimage.data.stereo_motorcycle()[0]
    for name in ("china", "flower"):
        photographs[name] = load_sample_image(f"{name}.jpg")
    tiles_of = {}
    for name, photo in photographs.items():
        gray = np.asarray(Image.fromarray(photo).convert("L"))
        rows, columns = (side // SIDE for side in gray.shape)
        cut = gray[: rows * SIDE, : columns * SIDE].reshape(rows, SIDE, columns, SIDE)
        tiles_of[name] = cut.swapaxes(1, 2).reshape(-1, SIDE, SIDE)
    return tiles_of


def digits() -> dict[str, np.ndarray]:
    """Return the training split of the digits by class, uint8 [n, 8, 8]."""
    source = Digits("train")
    return {str(k): source.pixels()[source.labels == k] for k in range(10)}


DATASETS = {"digits": digits, "tiles": tiles}


def permutation(count: int, draw: int) -> np.ndarray:
    """Return the order of a class's images in a random draw."""
    return np.random.RandomState(draw).permutation(count)


def write(root: Path, images: Mapping[str, np.ndarray], draw: int) -> None:
    """Write the images of a random draw to `root`/{train,val}/CLASS/NUMBER.png."""
    parts = {"train": slice(TRAIN), "val": slice(TRAIN, TRAIN + TEST)}
    for split, part in parts.items():
        drawn = {k: x[permutation(len(x), draw)[part]] for k, x in images.items()}
        write_png(root / split, drawn)


def write_png(root: Path, images: Mapping[str, np.ndarray]) -> None:
    """Write images by class, uint8 [n, H, W], to `root`/CLASS/NUMBER.png."""
    for name, pixels in images.items():
        (root / name).mkdir(parents=True)
        for number, image in enumerate(pixels):
            Image.fromarray(image).save(root / name / f"{number:03}.png")


def run(
    recipe: str, workdir: Path, stop: Callable, values: Mapping[str, Any]
) -> dict[str, float]:
    """Train a recipe with the overrides COMMON and `values`; return the metrics."""
    flags = [f"--config.{key}={value}" for key, value in (COMMON | values).items()]
    return train(configs.load(recipe, flags), workdir, stop)


def measure(workdir: Path, stop: Callable, only: Sequence[str]) -> None:
    """Measure the experiments that are not in the result file and print the table.

    Args:
      only: measure only experiments whose names contain one of these texts.
    """
    rows = json.loads(RESULT.read_text()) if RESULT.exists() else []
    measured = {(row["draw"], row["dataset"], row["experiment"]) for row in rows}
    planned = product(range(DRAWS), DATASETS, EXPERIMENTS)
    for draw, dataset, experiment in planned:
        is_selected = any(text in experiment for text in only)
        if (draw, dataset, experiment) in measured or not is_selected:
            continue
        directory = workdir / f"{dataset}_{draw}"
        image_dir = directory / "images"
        if not image_dir.exists():
            write(image_dir, DATASETS[dataset](), draw)
        recipe, pretraining = EXPERIMENTS[experiment]
        values = ENCODER | {"data.dir": image_dir, "init_from": ""}
        if pretraining:
            values["init_from"] = directory / pretraining
            # If this run is already finished, `run` only evaluates it, so that several
            # experiments share it.
            options = {"total_epochs": PRETRAINING_EPOCHS, "data.dir": image_dir}
            options |= ENCODER | DECODER
            run(pretraining, directory / pretraining, stop, options)
        values |= {"total_epochs": EPOCHS, "model.num_classes": 10}
        name = experiment.replace(": ", "_").replace(":", "_")
        top1 = run(recipe, directory / name, stop, values)["eval/top1"]
        row = {"draw": draw, "dataset": dataset, "experiment": experiment}
        rows.append(row | {"top1": top1})
        write_rows(RESULT, rows)
    log(table(rows))


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write results as JSON, one row per line."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f"[\n{lines}\n]\n")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format a table of mean and standard deviation over the draws."""
    lines = [f"{'top-1 in %':<30}" + "".join(f"{name:>16}" for name in DATASETS)]
    for experiment in EXPERIMENTS:
        line = f"{experiment:<30}"
        for name in DATASETS:
            top1 = [
                100 * row["top1"]
                for row in rows
                if (row["dataset"], row["experiment"]) == (name, experiment)
            ]
            line += f"{mean_and_deviation(top1):>16}"
        lines.append(line)
    return "\n".join(lines)


def mean_and_deviation(values: Sequence[float]) -> str:
    """Format the mean and the standard deviation of values; "" if there are none."""
    spread = f" +- {np.std(values, ddof=1):.1f}" if values[1:] else ""
    return f"{np.mean(values):.1f}{spread}" if values else ""


def run_measurements(description: str, name: str, measure: Callable) -> int:
    """Run measure(workdir, stop, only) with the command line of a benchmark.

    Args:
      description: docstring of the benchmark.
      name: directory in runs/, the default workdir.

    Returns:
      The exit code.
    """
    parser = argparse.ArgumentParser(description=description.split("\n", 1)[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs") / name)
    text = "select only names that contain one of these texts"
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help=text)
    args = parser.parse_args()
    workdir = args.workdir.absolute()
    cache_programs(workdir)
    return run_command(lambda: measure(workdir, catch_signals(), args.only))


def cache_programs(workdir: Path) -> None:
    """Cache compiled programs in a workdir, because many runs use equal programs."""
    jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def main() -> int:
    """Entry point. Return the exit code."""
    return run_measurements(__doc__, "small_data", measure)


if __name__ == "__main__":
    raise SystemExit(main())
