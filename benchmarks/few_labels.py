"""Train on few labeled digits: finetuning, linear probe, and from scratch.

    python -m benchmarks.few_labels [--workdir runs/few_labels]

The benchmark measures top-1 on the test images after training on 50, 100 and 500
labels, with five random subsets per number of labels. As a control, training on 100
shuffled labels must give chance accuracy. The results are written to
results/few_labels.json. An interrupted benchmark resumes.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.small_data import cache_programs, mean_and_deviation
from hivit_jax import config as configs
from hivit_jax.data.sources import digits, registry
from hivit_jax.distributed.signals import catch_signals
from hivit_jax.errors import run_command
from hivit_jax.reporting.console import log
from hivit_jax.train import train

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "few_labels.json"
LABEL_COUNTS, SUBSETS = (50, 100, 500), range(5)
# Method -> (recipe, True to start from the pretrained encoder, warmup in images). The
# warmup is 40 steps of 25 images, or 10 steps of 50 images in the linear probe.
METHODS = {
    "finetuned": ("digits_finetune", True, 1000),
    "linear probe": ("digits_linear", True, 500),
    "scratch": ("digits_finetune", False, 1000),
}


def run(recipe: str, workdir: Path, stop: Callable, **overrides: object) -> dict:
    """Run a recipe and return its last evaluation."""
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    config = configs.load(str(ROOT / "configs" / f"{recipe}.py"), flags)
    return train(config, workdir, stop)


def compare(workdir: Path, stop: Callable) -> None:
    """Train all classifiers, print the table and write the results."""
    pretrained = workdir / "pretrained"
    run("digits_mae", pretrained, stop)
    results: dict[str, dict[str, list[float]]] = {method: {} for method in METHODS}

    def measure(method, num_labels, subset, title):
        recipe, from_pretrained, warmup = METHODS[method]
        name = f"{method}_{title}_{subset}".replace(" ", "_")
        metrics = run(
            *(recipe, workdir / name, stop),
            **{
                "init_from": pretrained if from_pretrained else "",
                "data.train_examples": num_labels,
                "data.subset": subset,
                "optimizer.warmup_epochs": warmup / num_labels,
            },
        )
        results[method].setdefault(title, []).append(100 * metrics["eval/top1"])

    for method in METHODS:
        for num_labels in LABEL_COUNTS:
            for subset in SUBSETS:
                measure(method, num_labels, subset, str(num_labels))
    for subset in SUBSETS:
        source = digits.Digits("train", 100, subset)
        data = configs.load(str(ROOT / "configs" / "digits_finetune.py")).data
        # `open_source` caches its sources, so `measure` trains on this source with the
        # shuffled labels.
        cached = registry.open_source({**data, "subset": subset}, "train")
        cached.labels = np.random.RandomState(subset).permutation(source.labels)
        measure("finetuned", 100, subset, "100 shuffled")

    log(f"\n{'top-1 in %':<16}" + "".join(f"{method:>18}" for method in METHODS))
    for title in (*map(str, LABEL_COUNTS), "100 shuffled"):
        cells = [mean_and_deviation(results[m].get(title, [])) for m in METHODS]
        log(f"{title + ' labels':<16}" + "".join(f"{cell:>18}" for cell in cells))
    RESULT.write_text(json.dumps(results, indent=2) + "\n")


def main() -> int:
    """Entry point. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/few_labels"))
    workdir = parser.parse_args().workdir
    cache_programs(workdir)
    return run_command(lambda: compare(workdir, catch_signals()))


if __name__ == "__main__":
    raise SystemExit(main())
