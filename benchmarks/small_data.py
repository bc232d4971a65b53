"""Small datasets: the ImageNet recipes against the folder recipes.

    python -m benchmarks.small_data [--workdir runs/small_data] [--only NAME ...]

Trains a very small HiViT on two datasets of 32x32 grayscale images that packages ship:
400 handwritten digits (scikit-learn), and 400 tiles of ten photographs (scikit-image and
scikit-learn), whose class is the photograph. Each cell of the table is one run per seed
with the same number of epochs. A cell that results/small_data.json contains is not
measured again.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

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
SEEDS = (0, 1, 2)
SIDE, TRAIN, TEST = 32, 40, 20  # pixels, and images per class
PHOTOGRAPHS = "astronaut brick camera chelsea coffee grass gravel".split()
DATASETS = ("digits", "tiles")
# A unit of 8x8 pixels; 0.3 M parameters.
ENCODER = {
    "model.image_size": SIDE,
    "model.patch_size": 8,
    "model.embed_dim": 64,
    "model.depths": (1, 1, 4),
    "model.num_heads": 2,
    "model.dtype": "float32",
}
DECODER = {
    "model.decoder_embed_dim": 64,
    "model.decoder_depth": 2,
    "model.decoder_num_heads": 2,
}
# Pretraining: name -> recipe.
PRETRAINING = {"imagenet": "mae_tiny", "folder": "folder_mae"}
# Cell -> recipe, name of the pretraining ("": from scratch).
CELLS = {
    "finetune, from scratch": ("finetune:tiny", ""),
    "folder_finetune, from scratch": ("folder_finetune", ""),
    "finetune after folder_mae": ("finetune:tiny", "folder"),
    "folder_finetune after folder_mae": ("folder_finetune", "folder"),
    "folder_finetune after mae_tiny": ("folder_finetune", "imagenet"),
    "linear after folder_mae": ("linear:tiny", "folder"),
    "folder_linear after folder_mae": ("folder_linear", "folder"),
}
EPOCHS, MAE_EPOCHS = 50, 200


def tiles() -> dict[str, list[np.ndarray]]:
    """Return disjoint tiles of photographs by name, uint8 [32, 32], shuffled."""
    import skimage.data
    from sklearn.datasets import load_sample_image

    photographs = {name: getattr(skimage.data, name)() for name in PHOTOGRAPHS}
    photographs["motorcycle"] = skimage.data.stereo_motorcycle()[0]
    for name in ("china", "flower"):
        photographs[name] = load_sample_image(f"{name}.jpg")
    found = {}
    for name, photo in photographs.items():
        gray = np.asarray(Image.fromarray(photo).convert("L"))
        rows, columns = (side // SIDE for side in gray.shape)
        gray = gray[: rows * SIDE, : columns * SIDE]
        cut = gray.reshape(rows, SIDE, columns, SIDE).swapaxes(1, 2)
        order = np.random.RandomState(0).permutation(rows * columns)
        found[name] = [*cut.reshape(-1, SIDE, SIDE)[order]]
    return found


def digits() -> dict[str, list[np.ndarray]]:
    """Return scikit-learn's digits by class, uint8 [8, 8]."""
    source = Digits("train", 10 * (TRAIN + TEST))
    pixels = source.pixels()
    return {str(k): [*pixels[source.labels == k]] for k in range(10)}


def write(root: Path, images: dict[str, list[np.ndarray]]) -> None:
    """Write class folders ROOT/{train,val}/CLASS/NUMBER.png."""
    splits = {"train": slice(TRAIN), "val": slice(TRAIN, TRAIN + TEST)}
    for name, pixels in images.items():
        for split, part in splits.items():
            directory = root / split / name
            directory.mkdir(parents=True, exist_ok=True)
            for number, each in enumerate(pixels[part]):
                Image.fromarray(each).save(directory / f"{number:03}.png")


def run(
    recipe: str, dataset: Path, workdir: Path, stop: Callable, **overrides: object
) -> dict:
    """Run a recipe on class folders and return its last evaluation."""
    never = 10**6  # the last step is always evaluated and saved
    values = ENCODER | {"eval_every": never, "checkpoint_every": never}
    values |= {"data.name": "folder", "data.dir": dataset, "data.eval_fraction": 0}
    values |= {"data.crop_pct": 1.0, "data.canvas": 64, "log_every": 100}
    values |= {key.replace("__", "."): value for key, value in overrides.items()}
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    return train(configs.load(recipe, flags), workdir, stop)


def measure(workdir: Path, stop: Callable, only: list[str]) -> None:
    """Measure all missing cells and print the table."""
    rows = json.loads(RESULT.read_text()) if RESULT.exists() else []
    for name, make in (("digits", digits), ("tiles", tiles)):
        if not (workdir / name).exists():
            write(workdir / name, make())
    for dataset in DATASETS:
        data = workdir / dataset
        flip = {"data__flip": dataset != "digits"}
        for cell, (recipe, pretraining) in CELLS.items():
            for seed in SEEDS:
                found = [(r["dataset"], r["cell"], r["seed"]) for r in rows]
                if (dataset, cell, seed) in found or (only and cell not in only):
                    continue
                start = {}
                if pretraining:
                    pretrained = workdir / f"{dataset}_mae_{pretraining}"
                    options = flip | {
                        f"{k}".replace(".", "__"): v for k, v in DECODER.items()
                    }
                    run(
                        PRETRAINING[pretraining],
                        data,
                        pretrained,
                        stop,
                        total_epochs=MAE_EPOCHS,
                        **options,
                    )
                    start = {"init_from": pretrained}
                else:
                    start = {"init_from": ""}
                target = workdir / f"{dataset} {cell} {seed}".replace(" ", "_")
                results = run(
                    recipe,
                    data,
                    target,
                    stop,
                    seed=seed,
                    total_epochs=EPOCHS,
                    model__num_classes=10,
                    **start,
                    **flip,
                )
                rows.append(
                    dict(
                        dataset=dataset, cell=cell, seed=seed, top1=results["eval/top1"]
                    )
                )
                RESULT.write_text(json.dumps(rows, indent=1) + "\n")
    log(table(rows))


def table(rows: list[dict]) -> str:
    """Return the mean and deviation of each cell as text."""
    lines = [f"{'top-1 in %':<36}" + "".join(f"{d:>16}" for d in DATASETS)]
    for cell in CELLS:
        texts = []
        for dataset in DATASETS:
            own = [
                100 * r["top1"]
                for r in rows
                if (r["dataset"], r["cell"]) == (dataset, cell)
            ]
            spread = f" +- {np.std(own, ddof=1):.1f}" if len(own) > 1 else ""
            texts.append(f"{np.mean(own):.1f}{spread}" if own else "")
        lines.append(f"{cell:<36}" + "".join(f"{text:>16}" for text in texts))
    return "\n".join(lines)


def main() -> int:
    """Entry point. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/small_data"))
    parser.add_argument("--only", nargs="*", default=[])
    args = parser.parse_args()
    workdir = args.workdir.absolute()
    jax.config.update("jax_compilation_cache_dir", str(workdir / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    return run_command(lambda: measure(workdir, catch_signals(), args.only))


if __name__ == "__main__":
    raise SystemExit(main())
