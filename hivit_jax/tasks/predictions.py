"""Write a classifier's predictions and, with known labels, its accuracy and errors."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hivit_jax.data.sources.tables import SEPARATOR
from hivit_jax.errors import ConfigError
from hivit_jax.reporting import multi_label
from hivit_jax.reporting.classes import ClassCounts, write_rows
from hivit_jax.reporting.console import log

SUFFIXES = (".csv", ".jsonl")
NUM_LISTED = 5  # maximum number of listed classes per image
NUM_WORST = 24  # images in worst.png, the mistakes with the least probable true class
Rows = Mapping[str, np.ndarray]


def write(
    batches: Iterator[Rows],
    out: Path,
    names: Sequence[str],
    read_image: Callable[[int], np.ndarray],
) -> None:
    """Write the table of predictions and, if labels are known, an evaluation.

    Memory use does not depend on the number of images.

    Args:
      batches: rows as in `Task.stream_predictions`, with "probabilities" float32
        [B, classes].
      out: result of `table_path`.
      names: names of all classes.
      read_image: function from an index to the image, float [H, W, C] in 0..1.

    Raises:
      OSError: a file cannot be written.
    """
    counts, worst = ClassCounts(names), []
    ranks = range(min(NUM_LISTED, len(names)))
    pairs = [(_column("predicted", k), _column("probability", k)) for k in ranks]
    columns = ["file", *(name for pair in pairs for name in pair), "label", "error"]
    with _table_writer(out, columns) as add_row:
        for rows in batches:
            ranked = np.argsort(-rows["probabilities"], axis=1, kind="stable")
            for row in _table_rows(rows, ranked[:, :NUM_LISTED], names):
                add_row(row)
            evaluated = (rows["label"] >= 0) & (rows["error"] == "")
            counts.add(rows["label"][evaluated], ranked[evaluated, :NUM_LISTED])
            worst = sorted([*worst, *_mistakes(rows, ranked, evaluated)])[:NUM_WORST]
    if counts.images.sum():
        _write_evaluation(out, counts, worst, read_image)


def write_multi_label(
    batches: Iterator[Rows], out: Path, names: Sequence[str], labeled: bool
) -> None:
    """Write the probability of each class and, if labels are known, an evaluation.

    The table has a column "label" only if labels are known. An image of no class has ""
    in this column. Memory must hold the logits and labels of all labeled images.

    Args:
      batches: rows as in `Task.stream_predictions`, with "probabilities" and "logits"
        float32 [B, classes] and, if `labeled`, "label" [B, classes].
      out: see `write`.
      names: names of all classes.
      labeled: True if the labels are known.

    Raises:
      OSError: a file cannot be written.
    """
    labeled_batches = []  # (logits, labels) of readable images
    columns = ["file", "predicted", *(f"probability_{name}" for name in names)]
    columns += [*["label"] * labeled, "error"]

    def join_names(mask: np.ndarray) -> str:
        return SEPARATOR.join(names[k] for k in np.flatnonzero(mask))

    with _table_writer(out, columns) as add_row:
        for rows in batches:
            for k, (file, error) in enumerate(
                zip(rows["name"], rows["error"], strict=True)
            ):
                if error:
                    add_row({"file": file, "error": error})
                    continue
                values = rows["probabilities"][k]
                row = {"file": file, "predicted": join_names(values >= 0.5)}
                pairs = zip(columns[2:], values.tolist(), strict=False)
                row |= {column: round(value, 6) for column, value in pairs}
                if labeled:
                    row["label"] = join_names(rows["label"][k])
                add_row(row)
            if labeled:
                readable = rows["error"] == ""
                logits, labels = rows["logits"][readable], rows["label"][readable]
                labeled_batches.append((logits, labels))
    if not sum(len(labels) for _, labels in labeled_batches):
        return
    logits, labels = map(np.concatenate, zip(*labeled_batches, strict=True))
    metrics = {
        "images": len(labels),
        "images_of_no_class": int((labels == 0).all(1).sum()),
        "mAP": multi_label.mean_average_precision(logits, labels),
    }
    paths = [out.with_name(f"{out.stem}_{x}") for x in ("metrics.json", "classes.csv")]
    paths[0].write_text(json.dumps(metrics, indent=2) + "\n")
    write_rows(paths[1], multi_label.class_table(names, logits, labels))
    log(f"mAP {metrics['mAP']:.2%}  ({len(labels):,} labeled images)")
    log(f"written: {paths[0]}, {paths[1]}")


def table_path(out: Path) -> Path:
    """Return the path of the table: `out`, or a file in the directory `out`.

    Raises:
      ConfigError: `out` has an ending that is not in `SUFFIXES`.
    """
    if out.suffix in SUFFIXES:
        return out
    if out.suffix and not out.is_dir():
        raise ConfigError(
            f"--out={out}: expected a name that ends in .csv or .jsonl, or a directory"
        )
    return out / "predictions.csv"


@contextmanager
def _table_writer(
    out: Path, columns: Sequence[str]
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Context manager that provides a function that writes one row of the table.

    The file gets its final name when the context ends.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.stem}.incomplete{out.suffix}")
    with open(
        part, "w", newline="", encoding="utf-8", errors="surrogateescape"
    ) as file:
        if out.suffix == ".jsonl":

            def add(row: dict[str, Any]) -> None:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

            yield add
        else:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            yield writer.writerow
    part.replace(out)


def _column(name: str, rank: int) -> str:
    return name if rank == 0 else f"{name}_{rank + 1}"


def _table_rows(
    rows: Rows, ranked: np.ndarray, names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield a row {column: value} for each image; empty columns are left out."""
    probabilities = np.take_along_axis(rows["probabilities"], ranked, 1).tolist()
    columns = [rows[key].tolist() for key in ("name", "label", "error")]
    for file, label, error, classes, values in zip(
        *columns, ranked.tolist(), probabilities, strict=True
    ):
        row = {"file": file}
        if not error:
            for k, (index, value) in enumerate(zip(classes, values, strict=True)):
                row[_column("predicted", k)] = names[index]
                row[_column("probability", k)] = round(value, 6)
        if label >= 0:
            row["label"] = names[label]
        yield row | ({"error": error} if error else {})


def _mistakes(rows: Rows, ranked: np.ndarray, evaluated: np.ndarray) -> Iterator[tuple]:
    """Yield a tuple for each misclassified image among the `evaluated` images.

    The tuple is (probability of the true class, index of the image, true class,
    predicted class, probability of the predicted class).
    """
    for i in np.flatnonzero(evaluated & (ranked[:, 0] != rows["label"])).tolist():
        p, true, predicted = rows["probabilities"][i], rows["label"][i], ranked[i, 0]
        index = int(rows["index"][i])
        yield float(p[true]), index, int(true), int(predicted), float(p[predicted])


def _write_evaluation(
    out: Path,
    counts: ClassCounts,
    worst: Sequence[tuple],
    read_image: Callable[[int], np.ndarray],
) -> None:
    """Write metrics, class table, confusion matrix and worst images beside `out`."""
    # Imported here, because benchmarks import the tasks without Pillow and etils.
    from hivit_jax.reporting import figures

    def beside(name):
        return out.with_name(f"{out.stem}_{name}")

    metrics, names = counts.metrics(), counts.names
    beside("metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    counts.write_table(beside("classes.csv"))
    written = [beside("metrics.json"), beside("classes.csv")]
    if counts.matrix is not None:
        counts.write_matrix(beside("confusion.csv"))
        pixels = figures.confusion_matrix(counts.matrix, names)
        figures.write_png(beside("confusion.png"), pixels)
        written += [beside("confusion.csv"), beside("confusion.png")]
    images, titles = [], []
    for p_true, index, true, predicted, p_predicted in worst:
        images.append(read_image(index))
        titles.append(
            f"true: {names[true]}, {p_true:.0%}\n"
            f"predicted: {names[predicted]}, {p_predicted:.0%}"
        )
    if images:
        pixels = figures.titled_images(np.stack(images), titles)
        figures.write_png(beside("worst.png"), pixels)
        written.append(beside("worst.png"))
    parts = [f"{key.replace('_', ' ')} {value:.2%}" for key, value in metrics.items()
             if key != "images"]  # fmt: skip
    log(f"{'  '.join(parts)}  ({metrics['images']:,} labeled images)")
    log(f"written: {', '.join(map(str, written))}")
