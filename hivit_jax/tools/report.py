"""Write a report on runs: `python -m hivit_jax.tools.report RUN [RUN ...] --out FILE`.

The report is one HTML file that refers to no other file. It contains a summary and the
curves of all runs, their figures step by step, the config keys that differ, and events.
"""

import base64
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

from etils.epath import Path

from hivit_jax import config as configs
from hivit_jax import platforms, record
from hivit_jax.errors import ConfigError, HivitError, Parser, run_command
from hivit_jax.paths import absolute, expand
from hivit_jax.progress import listed
from hivit_jax.reporting import metrics
from hivit_jax.reporting.console import log
from hivit_jax.tools.outputs import output_path
from hivit_jax.tools.run_facts import Lines, events, summary

MAX_IMAGES = 24  # per figure and run in a report
METRICS = "metrics.jsonl"
NOT_DRAWN = {"step", "epoch", "seconds_left", "eval/count"}
# Titles of the first and last charts, in order. Charts of other metrics are in between.
FIRST_CHARTS = {"loss": "training loss", "eval/loss": "evaluation loss"}
LAST_CHARTS = {
    "learning_rate": "learning rate",
    "gradient_norm": "gradient norm",
    "images_per_second": "throughput, images/s",
    "images_per_second_per_chip": "throughput per chip, images/s",
    "mfu": "model FLOP utilization: fraction of the bfloat16 peak",
    "device_memory": "peak memory of a device, bytes",
    "input_bound": "fraction of steps that waited for images",
    "unreadable": "unreadable training images",
}


def make_report(workdirs: Iterable[str]) -> str:
    """Return the HTML text of a report.

    Args:
      workdirs: the runs. A run that is given twice is included once.

    Raises:
      ConfigError: a directory is not the workdir of a run with metrics.
    """
    paths = list(dict.fromkeys(absolute(workdir) for workdir in workdirs))
    # Names are ends of the paths, with the fewest parts that make all names different.
    names, num_parts = [], 0
    while len(set(names)) < len(paths):
        num_parts += 1
        names = ["/".join(path.parts[-num_parts:]) for path in paths]
    runs = [read_run(path, name) for path, name in zip(paths, names, strict=True)]
    run_configs = [run.pop("config") for run in runs]
    data = {"runs": runs, "charts": charts(runs), "config": config_table(run_configs)}
    # Otherwise, a "<" could end the script element that contains the text.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    page = resources.files("hivit_jax.tools") / "report.html"
    return page.read_text(encoding="utf-8").replace("{{DATA}}", text)


def read_run(workdir: Path, name: str) -> dict[str, Any]:
    """Return a run's part of a report, JSON-serializable.

    Returns:
      "name"; "summary" {label: text}; "series" {metric: {"step", "value"}}; "seconds",
      the result of `training_seconds`; "batch_size"; "events"; "figures" {figure:
      images}; "left_out" {figure: number of omitted images}; "config" {key: value}.
      Without a config, "seconds" and "batch_size" are None.

    Raises:
      ConfigError: `workdir` contains no metrics, or a config file is damaged.
    """
    lines = read_metrics(workdir)
    starts = [(path.name, _read_config(path)) for path in record.config_files(workdir)]
    config = starts[-1][1] if starts else {}
    batch_size, (images, left_out) = config.get("batch_size"), figures(workdir)
    return {
        "name": name,
        "summary": summary(workdir, lines, starts, config),
        "series": series(lines),
        "seconds": training_seconds(lines, batch_size) if batch_size else None,
        "batch_size": batch_size,
        "events": events(workdir, lines, starts),
        "figures": images,
        "left_out": left_out,
        "config": record.flatten(config),
    }


def read_metrics(workdir: Path) -> Lines:
    """Return the lines of a run's metrics.jsonl.

    Raises:
      ConfigError: there is no such file, or it contains no complete line.
    """
    path = workdir / METRICS
    if not path.exists():
        found = "no directory"
        if workdir.is_dir():
            runs = sorted(p.parent.name for p in workdir.glob(f"*/{METRICS}"))
            found = "no file"
            if runs:
                found += f"; subdirectories with metrics: {listed(runs, 5)}"
        raise ConfigError(
            f"{path}: expected the metrics of a run, found {found}.\n"
            "Pass the --workdir of a run that has logged at least one step"
        )
    lines = [
        line for line in metrics.read(path) if isinstance(line, dict) and "step" in line
    ]
    if not lines:
        raise ConfigError(
            f"{path}: expected at least one line with a step, found none; the first "
            "line is written after log_every steps"
        )
    return lines


def _read_config(path: Path) -> dict[str, Any]:
    """Return the config of a start; keys that the file lacks have their defaults."""
    try:
        saved = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(
            f"{path}: expected JSON, found {error}; move the file out of the workdir"
        ) from error
    try:
        return configs.complete_saved(saved, str(path)).to_dict()
    except HivitError:  # such as a user-defined task that cannot be imported here
        return saved


def series(lines: Lines) -> dict[str, dict[str, list]]:
    """Return {metric: {"step", "value"}}; values that are not finite are None.

    Leaves out the metrics `NOT_DRAWN` and values that are not numbers.
    """
    columns: dict[str, dict[str, list]] = {}
    for line in lines:
        for name in line.keys() - NOT_DRAWN:
            value = line[name]
            if not isinstance(value, (int, float)):
                continue
            column = columns.setdefault(name, {"step": [], "value": []})
            column["step"].append(line["step"])
            column["value"].append(value if math.isfinite(value) else None)
    return columns


def training_seconds(lines: Lines, batch_size: int) -> dict[str, list]:
    """Return {"step", "seconds"}: the training time until each step.

    The time follows from the logged throughput. It excludes evaluations, checkpoints
    and repeated steps.
    """
    steps, seconds = [0], [0.0]
    for line in lines:
        if line.get("images_per_second", 0) > 0:
            images = (line["step"] - steps[-1]) * batch_size
            seconds.append(seconds[-1] + images / line["images_per_second"])
            steps.append(line["step"])
    return {"step": steps, "seconds": seconds}


def charts(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the name and title of each chart: one per metric that is not always 0."""
    names = {
        name
        for run in runs
        for name, column in run["series"].items()
        if any(column["value"])
    }
    names = sorted(names, key=lambda name: (not name.startswith("eval/"), name))
    others = [name for name in names if name not in FIRST_CHARTS | LAST_CHARTS]
    titles = dict(FIRST_CHARTS)
    for name in others:
        group, _, metric = name.rpartition("/")
        titles[name] = f"{'evaluation' if group == 'eval' else 'training'} {metric}"
    titles |= LAST_CHARTS
    return [{"name": n, "title": title} for n, title in titles.items() if n in names]


def config_table(run_configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per config key: "key", "values" as text or None, and "differs"."""
    rows = []
    for key in dict.fromkeys(key for config in run_configs for key in config):
        values = [
            json.dumps(config[key]) if key in config else None for config in run_configs
        ]
        rows.append({"key": key, "values": values, "differs": len(set(values)) > 1})
    return rows


def figures(workdir: Path) -> tuple[dict[str, list[dict[str, Any]]], dict[str, int]]:
    """Return the images of each figure in the order of their steps, as data URIs.

    If a figure has more than `MAX_IMAGES` images, returns evenly spaced images that
    include the first and the last. The figure of the curves is not included.

    Returns:
      The images by figure, and the number of omitted images by figure.
    """
    paths: dict[str, list[tuple[int, Path]]] = {}
    for path in (workdir / "figures").glob("*.png"):
        name, step = re.fullmatch(r"(.+?)(?:_(\d{7,}))?", path.stem).groups()
        if path.stem != "curves":
            paths.setdefault(name, []).append((int(step or 0), path))
    images, left_out = {}, {}
    for name, pairs in sorted(paths.items()):
        pairs, n = sorted(pairs), min(len(pairs), MAX_IMAGES)
        chosen = [pairs[k * (len(pairs) - 1) // max(n - 1, 1)] for k in range(n)]
        images[name] = [{"step": step, "src": _data_uri(p)} for step, p in chosen]
        left_out[name] = len(pairs) - n
    return images, left_out


def _data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def run(argv: Sequence[str] | None) -> None:
    """Parse the arguments and write the report."""
    parser = Parser(
        "python -m hivit_jax.tools.report",
        description="Write one HTML page on runs: curves, figures, config keys that "
        "differ, events.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="workdir of a run")
    parser.add_argument("--out", required=True, help="HTML file to write")
    flags = parser.parse_args(argv)
    inputs = [f"{expand(run)}/{METRICS}" for run in flags.runs]
    out = output_path("--out", flags.out, inputs)
    text = make_report(flags.runs)
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out={out}: {error.strerror}") from error
    log(f"written: {out} ({len(text) / 1e6:.1f} MB); open it in a browser")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    if argv is None:
        platforms.use_cpu()
    return run_command(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
