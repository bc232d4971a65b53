"""Write a classifier's predictions; with known labels also its accuracy and errors."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hivit_jax.errors import ConfigError
from hivit_jax.reporting.classes import ClassCounts
from hivit_jax.reporting.console import log

SUFFIXES = (".csv", ".jsonl")
MAX_RANK = 5  # classes per image
NUM_WORST = 24  # images on the sheet of the worst ones
Rows = Mapping[str, np.ndarray]


def write(
    batches: Iterator[Rows],
    out: Path,
    names: Sequence[str],
    read: Callable[[int], np.ndarray],
) -> None:
    """Write the table of predictions and, if labels are known, an evaluation.

    The memory does not depend on the number of images.

    Args:
      batches: rows as in `Task.stream_predictions`, with "probabilities" float32
        [B, classes].
      out: file that ends in .csv or .jsonl, or a directory for predictions.csv.
      names: names of all classes.
      read: function from an index to the image, float [H, W, C] in 0..1.

    Raises:
      ConfigError: `out` has another ending.
      OSError: a file cannot be written.
    """
    if out.suffix not in SUFFIXES:
        if out.suffix and not out.is_dir():
            raise ConfigError(
                f"--out={out}: expected a name that ends in .csv or .jsonl, or a "
                "directory"
            )
        out = out / "predictions.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    counts, worst = ClassCounts(names), []
    part = out.with_name(f"{out.stem}.incomplete{out.suffix}")
    with open(
        part, "w", newline="", encoding="utf-8", errors="surrogateescape"
    ) as file:
        add = _row_writer(file, out.suffix, min(MAX_RANK, len(names)))
        for rows in batches:
            ranked = np.argsort(-rows["probabilities"], axis=1, kind="stable")
            for row in _table(rows, ranked[:, :MAX_RANK], names):
                add(row)
            known = (rows["label"] >= 0) & (rows["error"] == "")
            counts.add(rows["label"][known], ranked[known, :MAX_RANK])
            worst = sorted([*worst, *_mistakes(rows, ranked, known)])[:NUM_WORST]
    part.replace(out)
    if counts.images.sum():
        _write_evaluation(out, counts, worst, read)


def _row_writer(file: Any, suffix: str, ranks: int) -> Callable[[dict], None]:
    """Return a function that writes one row to a file."""
    if suffix == ".jsonl":

        def add(row: dict[str, Any]) -> None:
            present = {key: value for key, value in row.items() if value != ""}
            file.write(json.dumps(present, ensure_ascii=False) + "\n")

        return add
    pairs = [(_key("predicted", k), _key("probability", k)) for k in range(ranks)]
    columns = ["file", *(name for pair in pairs for name in pair), "label", "error"]
    writer = csv.DictWriter(file, columns, restval="")
    writer.writeheader()
    return writer.writerow


def _key(name: str, rank: int) -> str:
    return name if rank == 0 else f"{name}_{rank + 1}"


def _table(
    rows: Rows, ranked: np.ndarray, names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield the columns of each image; label and error are "" if there is none."""
    probabilities = np.take_along_axis(rows["probabilities"], ranked, 1).tolist()
    columns = [rows[key].tolist() for key in ("name", "label", "error")]
    for name, label, error, classes, values in zip(
        *columns, ranked.tolist(), probabilities, strict=True
    ):
        row = {"file": name}
        if not error:
            for k, (index, value) in enumerate(zip(classes, values, strict=True)):
                row[_key("predicted", k)] = names[index]
                row[_key("probability", k)] = round(value, 6)
        row["label"] = names[label] if label >= 0 else ""
        yield row | {"error": error}


def _mistakes(rows: Rows, ranked: np.ndarray, known: np.ndarray) -> Iterator[tuple]:
    """Yield (probability of the true class, index, true, predicted, its probability).

    Only images that are predicted wrong.
    """
    for i in np.flatnonzero(known & (ranked[:, 0] != rows["label"])).tolist():
        p, true, found = rows["probabilities"][i], rows["label"][i], ranked[i, 0]
        index = int(rows["index"][i])
        yield float(p[true]), index, int(true), int(found), float(p[found])


def _write_evaluation(
    out: Path,
    counts: ClassCounts,
    worst: Sequence[tuple],
    read: Callable[[int], np.ndarray],
) -> None:
    """Write metrics, class table, confusion matrix and worst images beside `out`."""
    # Here, because benchmarks import the tasks without Pillow and etils.
    from hivit_jax.reporting import figures

    def beside(name):
        return out.with_name(f"{out.stem}_{name}")

    metrics, names = counts.metrics(), counts.names
    beside("metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    counts.write_table(beside("classes.csv"))
    written = [beside("metrics.json"), beside("classes.csv")]
    if counts.matrix is not None:
        counts.write_matrix(beside("confusion.csv"))
        picture = figures.confusion_matrix(counts.matrix, names)
        figures.write_png(beside("confusion.png"), picture)
        written += [beside("confusion.csv"), beside("confusion.png")]
    images, titles = [], []
    for p_true, index, true, found, p_found in worst:
        images.append(read(index))
        titles.append(
            f"true: {names[true]}, {p_true:.0%}\n"
            f"predicted: {names[found]}, {p_found:.0%}"
        )
    if images:
        picture = figures.titled_images(np.stack(images), titles)
        figures.write_png(beside("worst.png"), picture)
        written.append(beside("worst.png"))
    parts = [f"{key.replace('_', ' ')} {value:.2%}" for key, value in metrics.items()
             if key != "images"]  # fmt: skip
    log(f"{'  '.join(parts)}  ({metrics['images']:,} labeled images)")
    log(f"written: {', '.join(map(str, written))}")
