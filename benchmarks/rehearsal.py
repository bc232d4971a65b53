"""Rehearse the comparison of accuracies in the HiViT paper, with very small models.

    python -m benchmarks.rehearsal [--workdir runs/rehearsal] [--only TEXT ...]

Three methods pretrain an encoder without labels and finetune it on 40 labeled images
per class: HiViT and plain ViT as masked autoencoders, and Swin with SimMIM. As a
control, each classifier is also trained from scratch. All methods have the same images,
number of images seen, batch size, optimizer and augmentation (the recipes folder_mae
and folder_finetune), and classifiers of about equal cost. No value is tuned for a
method. The datasets are those of benchmarks/small_data.py. Pretraining uses all images
except the test images.

The results show that the three methods work, and how much the results of small runs
vary. They do not predict accuracies on ImageNet. Each result is added to
results/rehearsal.json. An interrupted benchmark resumes.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

import hivit_jax
from benchmarks.small_data import (
    DATASETS,
    DECODER,
    DRAWS,
    SIDE,
    TEST,
    TRAIN,
    mean_and_deviation,
    permutation,
    run,
    run_measurements,
    write,
    write_png,
    write_rows,
)
from hivit_jax.reporting.console import log

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "rehearsal.json"
EPOCHS, PRETRAINING_EPOCHS = 60, 100
HIVIT_AND_VIT = {"model.patch_size": 8, "model.embed_dim": 64, "model.num_heads": 2}
SWIN = {
    "model.patch_size": 2,
    "model.embed_dim": 16,
    "model.depths": (2, 2, 2),
    "model.num_heads": (1, 2, 4),
    "model.window_size": 4,
}
# Method -> (names of the pretraining model and the classifier, overrides of both,
# further overrides of the pretraining)
METHODS = {
    "HiViT, MAE": (
        ("mae_hivit_tiny", "hivit_tiny"),
        HIVIT_AND_VIT | {"model.depths": (1, 1, 4)},
        DECODER | {"mask_ratio": 0.75},
    ),
    "ViT, MAE": (
        ("mae_vit_tiny", "vit_tiny"),
        HIVIT_AND_VIT | {"model.depth": 6},
        DECODER | {"mask_ratio": 0.75},
    ),
    "Swin, SimMIM": (
        ("simmim_swin_tiny", "swin_tiny"),
        SWIN,
        {"model.mask_patch_size": 8, "mask_ratio": 0.6},
    ),
}
STARTS = ("scratch", "pretrained")
KEYS = ("draw", "dataset", "method", "start")  # of a result


def pretraining_images(
    images: Mapping[str, np.ndarray], draw: int
) -> dict[str, np.ndarray]:
    """Return the images of each class that are not test images of a random draw."""
    held_out = slice(TRAIN, TRAIN + TEST)  # as in `small_data.write`
    return {
        name: pixels[np.delete(permutation(len(pixels), draw), held_out)]
        for name, pixels in images.items()
    }


def measure(workdir: Path, stop: Callable, only: Sequence[str]) -> None:
    """Measure the experiments that are not in the result file and print the tables.

    Args:
      only: measure only methods whose names contain one of these texts.
    """
    rows = json.loads(RESULT.read_text()) if RESULT.exists() else []
    measured = {tuple(row[key] for key in KEYS) for row in rows}
    for draw, dataset, method, start in product(
        range(DRAWS), DATASETS, METHODS, STARTS
    ):
        is_selected = any(text in method for text in only)
        if (draw, dataset, method, start) in measured or not is_selected:
            continue
        directory = workdir / f"{dataset}_{draw}"
        labeled_dir = directory / "labeled"
        if not labeled_dir.exists():
            images = DATASETS[dataset]()
            write_png(directory / "unlabeled", pretraining_images(images, draw))
            write(labeled_dir, images, draw)
        (pretraining_model, classifier), common, pretraining = METHODS[method]
        name = method.replace(", ", "_")
        values = common | {"model.name": classifier, "model.num_classes": 10}
        values |= {"data.dir": labeled_dir, "total_epochs": EPOCHS, "init_from": ""}
        if start == "pretrained":
            values["init_from"] = directory / f"{name}_pretraining"
            options = common | pretraining | {"model.name": pretraining_model}
            options |= {"data.dir": directory / "unlabeled", "data.eval_split": "none"}
            options["total_epochs"] = PRETRAINING_EPOCHS
            run("folder_mae", values["init_from"], stop, options)
        metrics = run("folder_finetune", directory / f"{name}_{start}", stop, values)
        row = dict(zip(KEYS, (draw, dataset, method, start), strict=True))
        rows.append(row | {"top1": metrics["eval/top1"]})
        write_rows(RESULT, rows)
    log(f"{costs()}\n\n{table(rows)}")


def costs() -> str:
    """Format a table of parameters and multiply-adds (MACs) per image, forward pass."""
    lines = [f"{'':<16}{'parameters':>12}{'MACs':>12}{'MACs, pretraining':>20}"]
    for method, ((pretraining_model, classifier), *overrides) in METHODS.items():
        common, pretraining = (
            {k[len("model.") :]: v for k, v in x.items() if k.startswith("model.")}
            for x in overrides
        )
        common["image_size"] = SIDE
        models = [
            hivit_jax.create_model(classifier, num_classes=10, **common),
            hivit_jax.create_model(pretraining_model, **common, **pretraining),
        ]
        macs = [model.macs(SIDE) for model in models]
        lines.append(
            f"{method:<16}{models[0].parameter_count():>12,}{macs[0]:>12,}{macs[1]:>20,}"
        )
    return "\n".join(lines)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format a table of top-1: mean and standard deviation over the draws."""
    lines = [f"{'top-1 in %':<28}" + "".join(f"{name:>16}" for name in DATASETS)]
    for method, start in product(METHODS, STARTS):
        line = f"{f'{method}, {start}':<28}"
        for dataset in DATASETS:
            cell = dataset, method, start
            top1 = [
                100 * r["top1"] for r in rows if tuple(r[k] for k in KEYS[1:]) == cell
            ]
            line += f"{mean_and_deviation(top1):>16}"
        lines.append(line)
    return "\n".join(lines)


def main() -> int:
    """Entry point. Return the exit code."""
    return run_measurements(__doc__, "rehearsal", measure)


if __name__ == "__main__":
    raise SystemExit(main())
