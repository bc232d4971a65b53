"""Facts about a run, read from the files of its workdir: summary and events."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from itertools import zip_longest
from typing import Any

from etils.epath import Path
from flax import nnx

from hivit_jax import config as configs
from hivit_jax import record, tasks
from hivit_jax.checkpoints import read
from hivit_jax.data.sources.base import DatasetInfo
from hivit_jax.errors import HivitError
from hivit_jax.progress import counted
from hivit_jax.reporting import metrics
from hivit_jax.tasks import Task

UNKNOWN = "unknown"
Lines = Sequence[Mapping[str, Any]]  # lines of metrics.jsonl
Starts = Sequence[tuple[str, Mapping[str, Any]]]  # (name of the config file, config)


def summary(
    workdir: Path,
    lines: Lines,
    starts: Starts,
    config: Mapping[str, Any],
) -> dict[str, str]:
    """Return the facts about a run, as text by label."""
    training_lines = [line for line in lines if "images_per_second" in line]
    step, total = max(line["step"] for line in lines), None
    if config and training_lines and "seconds_left" in (last := training_lines[-1]):
        images_left = last["seconds_left"] * last["images_per_second"]
        total = last["step"] + round(images_left / config["batch_size"])
    task, dataset = _task(workdir, config)
    facts = {
        "task": config.get("task", UNKNOWN),
        "model": config["model"]["name"] if config else UNKNOWN,
        "parameters": _parameters(task),
        "dataset": dataset,
        "steps": f"{step:,}" + (f" of {total:,}" if total else ""),
        "state": "finished" if step == total else "not finished" if total else UNKNOWN,
        "best evaluation": _best(lines, best_metric(config)),
    }
    if training_lines:
        speeds = [line["images_per_second"] for line in training_lines]
        facts["last training loss"] = f"{training_lines[-1]['loss']:.4g}"
        facts["median throughput"] = f"{statistics.median(speeds):,.0f} images/s"
    if config:
        facts["batch size"] = f"{config['batch_size']:,}"
        facts["starts"] = str(len(starts))
    return facts


def _task(workdir: Path, config: Mapping[str, Any]) -> tuple[Task | None, str]:
    """Return the task of a run, or None, and a description of its dataset.

    The description is from the newest checkpoint, so the dataset is not opened.
    """
    name = config["data"]["name"] if config else UNKNOWN
    try:
        info = read.load_dataset_info(read.find_checkpoints(workdir)[0])
        if not info:
            return None, name
        complete = configs.complete_saved(config, str(workdir))
        task = tasks.create(complete, DatasetInfo(**info))
    except (HivitError, KeyError):  # no checkpoint, or one of another version
        return None, name
    counts = ", ".join(f"{n:,} {split}" for split, n in info["counts"].items())
    classes = counted(len(info["classes"]), "class", "classes")
    return task, f"{name}: {counts}, {classes}"


def _parameters(task: Task | None) -> str:
    if task is None:
        return UNKNOWN
    return f"{nnx.eval_shape(task.build_model).parameter_count():,}"


def best_metric(config: Mapping[str, Any]) -> metrics.Criterion:
    """Return the metric that selects the best checkpoint, from a saved config."""
    try:
        return tasks.find(config["task"]).best_metric(config)
    except (HivitError, KeyError):
        return Task.best


def _best(lines: Lines, best: metrics.Criterion) -> str:
    """Return the best evaluation as text."""
    found = metrics.finite_evaluations(lines, best)
    if not found:
        return "none"
    line = metrics.best_evaluation(found, best)
    return f"{best[0]} {line[best[0]]:.4g} at step {line['step']:,}"


def events(workdir: Path, lines: Lines, starts: Starts) -> list[dict[str, Any]]:
    """Return the starts, interruptions and problems that a run's files record.

    If the number of early ends equals the number of later starts or of all starts, each
    early end follows its start. Otherwise the order is unknown, and all starts are
    first.

    Returns:
      Dicts of "text" and, where they are known, "step", "time" and "details" (lines).
    """
    start_events, previous = [], None
    for name, config in starts:
        event = {"text": "first start" if previous is None else "later start"}
        if previous is not None:
            event["time"] = f"{datetime.strptime(name, record.LATER_NAME)} UTC"
            event["details"] = record.differences(previous, config)
        start_events.append(event)
        previous = config
    saved_steps = _checkpoint_steps(workdir / "checkpoints")
    text = "interrupted, or ended by an error; this step was saved"
    steps = _early_ends(lines, [config for _, config in starts], saved_steps)
    end_events = [{"step": step, "text": text} for step in steps]
    if len(start_events) - len(end_events) in (0, 1):
        pairs = zip_longest(start_events, end_events)
        found = [event for pair in pairs for event in pair if event]
    else:
        found = start_events + end_events
    for step in _checkpoint_steps(workdir / "damaged"):
        found.append({"step": step, "text": "damaged checkpoint, moved to damaged/"})
    unreadable = sum(line.get("unreadable", 0) for line in lines)
    if unreadable:
        found.append({"text": f"images were unreadable {counted(unreadable, 'time')}"})
    if saved_steps:
        text = "checkpoints of steps " + ", ".join(f"{step:,}" for step in saved_steps)
        found.append({"text": text})
    return found


def _checkpoint_steps(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit())


def _early_ends(
    lines: Lines, start_configs: Sequence[Mapping[str, Any]], saved_steps: Iterable[int]
) -> list[int]:
    """Return the steps that a run logged or saved because it ended early.

    These steps are neither the last step of the run nor multiples of any interval of
    logging, evaluation or checkpoints in the configs.
    """
    names = ("log_every", "eval_every", "checkpoint_every")
    intervals = {c.get(name) for c in start_configs for name in names} - {None, 0}
    steps = {line["step"] for line in lines if "seconds_left" in line} | {*saved_steps}
    last_steps = {line["step"] for line in lines if line.get("seconds_left") == 0}
    steps = steps - last_steps - {0} if intervals else ()
    return sorted(step for step in steps if all(step % n for n in intervals))
