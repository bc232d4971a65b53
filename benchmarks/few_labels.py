"""Digits from few labels: finetuning and linear probe of a pretrained encoder, scratch.

    python -m benchmarks.few_labels [--workdir runs/few_labels]

Held-out top-1 after 50, 100 and 500 labels, five draws of each, and after 100 labels
that were shuffled, which must give chance. Writes results/few_labels.json. Goes on
where it stopped.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from hivit_jax import config as configs
from hivit_jax.data.sources import digits, registry
from hivit_jax.distributed.signals import catch_signals
from hivit_jax.errors import exit_code
from hivit_jax.reporting.console import log
from hivit_jax.train import train

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "few_labels.json"
LABELS, DRAWS = (50, 100, 500), range(5)
# Recipe, whether it starts from pretraining, warmup in images (40 and 10 steps).
WAYS = {
    "finetuned": ("digits_finetune", True, 1000),
    "linear probe": ("digits_linear", True, 500),
    "scratch": ("digits_finetune", False, 1000),
}


def run(recipe: str, workdir: Path, stop: Callable, **overrides: object) -> float:
    """Top-1 in % (loss of a masked autoencoder) at the end of a run of a recipe."""
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    config = configs.load(str(ROOT / "configs" / f"{recipe}.py"), flags)
    values = train(config, workdir, stop)
    return 100 * values["eval/top1"] if "eval/top1" in values else values["eval/loss"]


def compare(workdir: Path, stop: Callable) -> None:
    """All runs, then the table."""
    pretrained = workdir / "pretrained"
    run("digits_mae", pretrained, stop)
    found: dict[str, dict[str, list[float]]] = {way: {} for way in WAYS}

    def measure(way, labels, draw, title):
        recipe, start, warmup = WAYS[way]
        name = f"{way}_{title}_{draw}".replace(" ", "_")
        top1 = run(
            *(recipe, workdir / name, stop),
            **{
                "init_from": pretrained if start else "",
                "data.train_examples": labels,
                "data.subset": draw,
                "optimizer.warmup_epochs": warmup / labels,
            },
        )
        found[way].setdefault(title, []).append(top1)

    for way in WAYS:
        for labels in LABELS:
            for draw in DRAWS:
                measure(way, labels, draw, str(labels))
    for draw in DRAWS:
        source = digits.Digits("train", 100, draw)
        data = configs.load(str(ROOT / "configs" / "digits_finetune.py")).data
        opened = registry.open_source({**data, "subset": draw}, "train")
        opened.labels = np.random.RandomState(draw).permutation(source.labels)
        measure("finetuned", 100, draw, "100 shuffled")

    log(f"\n{'top-1 in %':<16}" + "".join(f"{way:>18}" for way in WAYS))
    for title in (*map(str, LABELS), "100 shuffled"):
        cells = []
        for way in WAYS:
            values = found[way].get(title)
            cells.append(
                f"{np.mean(values):.1f} +- {np.std(values, ddof=1):.1f}"
                if values
                else ""
            )
        log(f"{title + ' labels':<16}" + "".join(f"{cell:>18}" for cell in cells))
    RESULT.write_text(json.dumps(found, indent=2) + "\n")


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/few_labels"))
    workdir = parser.parse_args().workdir
    # Runs of a way differ in data alone: only the first has to be compiled.
    jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    return exit_code(lambda: compare(workdir, catch_signals()))


if __name__ == "__main__":
    raise SystemExit(main())
