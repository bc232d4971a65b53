"""Metrics of a run: metrics.jsonl, boards, throughput, best evaluation."""

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hivit_jax.errors import ConfigError, DivergedError, first_line
from hivit_jax.paths import is_bucket
from hivit_jax.reporting import boards
from hivit_jax.xla.chips import chip_of

Scalars = Mapping[str, float | int]


class Writer:
    """Writer of the scalars and images of one run; only process 0 may create one.

    Args:
      workdir: directory of ``metrics.jsonl``, one JSON object per line, and of
        TensorBoard files; see `boards.open_boards`.
      first_step: step that the run starts or resumes at. Lines of later steps are
        deleted, because the resumed run writes them again.
      settings: the run's config by dotted key, for TensorBoard and wandb.
      project: project of Weights & Biases; "": do not use it.
    """

    def __init__(
        self,
        workdir: str | Path,
        first_step: int = 0,
        settings: Mapping[str, Any] | None = None,
        project: str = "",
    ):
        from etils import epath  # late, because compiling a step does not need etils

        self._path = path = epath.Path(workdir) / "metrics.jsonl"
        kept = [line for line in read(path) if line["step"] <= first_step]
        self._text = "".join(json.dumps(line) + "\n" for line in kept)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(self._text)
        temporary.replace(path)
        # (step, sorted names) of each line.
        self._written = {(line["step"], *sorted(line)) for line in kept}
        # Objects in a bucket cannot be appended to, so `scalars` writes the whole text.
        remote = is_bucket(path)
        self._file = None if remote else open(path, "a", buffering=1)  # noqa: SIM115
        self._boards = boards.open_boards(path.parent, settings or {}, project)

    def scalars(self, step: int, values: Scalars) -> None:
        """Append a line to metrics.jsonl and a point to the curves of every board.

        Does nothing without values, or if metrics.jsonl already contained a line with
        this step and these names when the run resumed.
        """
        line = {"step": step, **values}
        if not values or (step, *sorted(line)) in self._written:
            return
        text = json.dumps(line) + "\n"
        if self._file:
            self._file.write(text)
        else:
            self._text += text
            self._path.write_text(self._text)
        for board in self._boards:
            board.scalars(step, values)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Write images by name, uint8 [H, W, 3], to every board."""
        for board in self._boards:
            board.images(step, images)

    def close(self) -> None:
        """Flush and close all files."""
        if self._file:
            self._file.close()
        for board in self._boards:
            board.close()


def prepare_workdir(workdir: Path) -> None:
    """Create a workdir and check that files can be written to it.

    Raises:
      ConfigError: the directory cannot be created or written to.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".writable-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except Exception as error:
        if is_bucket(workdir):  # buckets cause exceptions of many types
            raise ConfigError(
                f"workdir {workdir} cannot be written to: {first_line(error)[:200]}\n"
                "To log in, run gcloud auth application-default login, or grant the "
                "VM's service account the roles Storage Object User and Storage Legacy "
                "Bucket Reader"
            ) from error
        if not isinstance(error, OSError):
            raise
        raise ConfigError(
            f"workdir {workdir} cannot be written to: {error.strerror}"
        ) from error


def read(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a metrics.jsonl file.

    If the run was killed, the last line may be incomplete.
    """
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


class Throughput:
    """Meter of the images per second between two calls of `read`.

    The time inside `pause` does not count.
    """

    def __init__(self):
        self._restart()

    def _restart(self):
        self._images, self._steps, self._starved = 0, 0, 0
        self._start = time.perf_counter()

    def add(self, images: int, starved: bool = False) -> None:
        """Count the images of a step.

        Args:
          images: number of images.
          starved: the devices finished the step before the images of the next step
            arrived.
        """
        self._images += images
        self._steps += 1
        self._starved += starved

    def read(self) -> tuple[float, float]:
        """Return images per second and the fraction of starved steps; then restart."""
        rate = self._images / max(time.perf_counter() - self._start, 1e-9)
        starved = self._starved / max(self._steps, 1)
        self._restart()
        return rate, starved

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Context manager whose time does not count."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start


def device_metrics(
    images_per_second: float, devices: Sequence[jax.Device], flops: float
) -> dict[str, float]:
    """Return the throughput and memory of the chips that a run uses.

    Args:
      images_per_second: throughput of all devices.
      devices: the run's devices; at least one belongs to this process.
      flops: operations per image; 0: unknown.

    Returns:
      "images_per_second" and "images_per_second_per_chip"; "mfu" (model FLOP
      utilization), the operations per second as a fraction of the bfloat16 peak, if
      `flops` and the peak are known; "device_memory", the most bytes that the first
      device of this process has used, if the backend reports them.
    """
    chip = chip_of(devices[0].device_kind)
    num_chips = len(devices) / (chip.devices if chip else 1)
    per_chip = images_per_second / num_chips
    found = {
        "images_per_second": images_per_second,
        "images_per_second_per_chip": per_chip,
    }
    if chip and flops:
        found["mfu"] = per_chip * flops / chip.flops
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        found["device_memory"] = stats["peak_bytes_in_use"]
    return found


def fetch(pending: list, state: Mapping[str, Any]) -> dict[str, float]:
    """Fetch and clear the pending metrics, a list of (step, metrics on the devices).

    Args:
      state: train state after the pending steps; its "step" is the last good step.

    Returns:
      The metrics of the newest step as floats; "unreadable" is summed over all pending
      steps.

    Raises:
      DivergedError: the loss, gradient or updated state of a step is not finite.
    """
    fetched = jax.device_get(pending)
    pending.clear()
    for step, values in fetched:
        if not values.pop("finite"):
            good_step = jax.device_get(state["step"])
            raise DivergedError(
                f"step {step}: loss {values['loss']}, gradient norm "
                f"{values['gradient_norm']}, learning rate {values['learning_rate']}; "
                "expected finite numbers, also in the updated parameters, statistics "
                "and optimizer state.\n"
                f"The last good state, of step {good_step}, is saved."
            )
    newest = {name: float(value) for name, value in fetched[-1][1].items()}
    return newest | {"unreadable": int(sum(v["unreadable"] for _, v in fetched))}


def evaluations(workdir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl that contain an evaluation."""
    return [line for line in read(workdir / "metrics.jsonl") if "eval/count" in line]


def read_evaluation(workdir: Path, step: int) -> dict[str, float]:
    """Return the last evaluation of a step in metrics.jsonl, or {}."""
    lines = [line for line in evaluations(workdir) if line["step"] == step]
    return lines[-1] if lines else {}


Criterion = tuple[str, str]  # name of a metric, and its direction: "max" or "min"


def score(results: Scalars, criterion: Criterion) -> float:
    """Return a number that is larger for a better evaluation."""
    name, direction = criterion
    return results[name] if direction == "max" else -results[name]


def finite_evaluations(lines: Iterable[Scalars], criterion: Criterion) -> list[Scalars]:
    """Return the evaluations with a finite value of the criterion's metric."""
    return [line for line in lines if math.isfinite(line.get(criterion[0], math.nan))]


def best_evaluation(lines: Sequence[Scalars], criterion: Criterion) -> Scalars:
    """Return the best of the evaluations in `lines`.

    Of evaluations with the same value, the one with the lowest eval/loss is the best;
    of those, the first. The best checkpoint and every report use this rule.
    """

    def rank(line):
        loss = line.get("eval/loss", math.nan)
        return score(line, criterion), -loss if math.isfinite(loss) else -math.inf

    return max(lines, key=rank)


def evaluation_progress(
    workdir: Path, step: int, criterion: Criterion
) -> tuple[int, bool]:
    """Return two facts about the evaluations up to `step`: (since_best, improved).

    Reads metrics.jsonl, so that the facts survive an interruption.

    Returns:
      since_best: number of evaluations after the first one with the best value. A lower
        eval/loss at the same value has no effect. If no value is finite, the number of
        all evaluations.
      improved: the newest evaluation is the best (`best_evaluation`), or there is none.
    """
    lines = [line for line in evaluations(workdir) if line["step"] <= step]
    if not (finite := finite_evaluations(lines, criterion)):
        return len(lines), not lines
    first = max(finite, key=lambda line: score(line, criterion))
    since_best = len(lines) - 1 - lines.index(first)
    return since_best, best_evaluation(finite, criterion) is lines[-1]
