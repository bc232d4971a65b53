"""Where numbers go: the terminal, metrics.jsonl, TensorBoard."""

import json
import os
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hivit_jax.errors import ConfigError

Scalars = Mapping[str, float | int]


def say(text: str) -> None:
    """Prints a line, on process 0 alone."""
    if jax.process_index() == 0:
        print(text, flush=True)


class Writer:
    """Writes scalars and pictures of one run; process 0 alone should make one.

    Args:
      workdir: gets ``metrics.jsonl``, one JSON object a line, and TensorBoard files
        where tensorboardX is installed and it is not in a bucket.
      first_step: lines of later steps, left by a run that was killed after its last
        checkpoint, are dropped, so that no step is told twice.
    """

    def __init__(self, workdir: str | Path, first_step: int = 0):
        from etils import epath  # late: a train step can do without

        self._path = path = epath.Path(workdir) / "metrics.jsonl"
        kept = [line for line in read(path) if line["step"] <= first_step]
        self._text = "".join(json.dumps(line) + "\n" for line in kept)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(self._text)
        temporary.replace(path)
        self._written = {(line["step"], *sorted(line)) for line in kept}
        # Objects of a bucket cannot grow, they are written anew.
        remote = "://" in str(path)
        self._file = None if remote else open(path, "a", buffering=1)  # noqa: SIM115
        self._board = None if remote else _tensorboard(workdir)

    def scalars(self, step: int, values: Scalars) -> None:
        """One line of metrics.jsonl and one point of every curve.

        Does nothing if the same line was there when the run was taken up again.
        """
        line = {"step": step, **values}
        if (step, *sorted(line)) in self._written:
            return
        text = json.dumps(line) + "\n"
        if self._file:
            self._file.write(text)
        else:
            self._text += text
            self._path.write_text(self._text)
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def images(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Pictures by name, uint8 [H, W, 3], for TensorBoard."""
        if self._board:
            for name, pixels in pictures.items():
                self._board.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Flushes both."""
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()


def prepare_workdir(workdir: Path) -> None:
    """Creates the directory; ConfigError where that or writing is not permitted."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".writable-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"workdir {workdir} cannot be written to: {error.strerror}"
        ) from error


def read(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl; one that a kill cut short is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def _tensorboard(workdir: str | Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(workdir))


class Throughput:
    """Images a second between two readings, less the time taken out in between."""

    def __init__(self):
        self._restart()

    def _restart(self):
        self._images, self._steps, self._starved = 0, 0, 0
        self._start = time.perf_counter()

    def add(self, images: int, starved: bool = False) -> None:
        """Counts the images of a step; `starved` if devices stood still before it."""
        self._images += images
        self._steps += 1
        self._starved += starved

    def read(self) -> tuple[float, float]:
        """Images a second, and the share of steps before which devices stood still
        for want of images; starts a new reading.
        """
        rate = self._images / max(time.perf_counter() - self._start, 1e-9)
        starved = self._starved / max(self._steps, 1)
        self._restart()
        return rate, starved

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time in this context does not count."""
        began = time.perf_counter()
        yield
        self._start += time.perf_counter() - began


def step_line(step: int, total: int, values: Scalars) -> str:
    """``step 120/1000  loss 0.5432  lr 1.20e-03  3,210 images/s  1:23 left``."""
    notes = ""
    if values["input_bound"] > 0.1:
        notes += f"  (waiting for images in {values['input_bound']:.0%} of steps)"
    if values["unreadable"]:
        notes += f"  ({values['unreadable']:,} unreadable images)"
    return (
        f"step {step}/{total}  loss {values['loss']:.4f}  "
        f"lr {values['learning_rate']:.2e}  {values['images_per_second']:,.0f} images/s"
        f"  {duration(values['seconds_left'])} left{notes}"
    )


def eval_line(what: str, values: Scalars) -> str:
    """``step 120  eval  loss 0.5400  top1 87.50 %  (360 images)``: accuracies in
    percent, other metrics as they are.
    """
    parts = []
    for key, value in values.items():
        group, _, name = key.partition("/")
        if group == "eval" and name not in ("count", "unreadable"):
            text = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
            if name.startswith("top"):
                text = f"{100 * value:.2f} %"
            parts.append(f"{name} {text}")
    images = f"{values['eval/count']:,} images"
    if values["eval/unreadable"]:
        images += f", {values['eval/unreadable']:,} unreadable"
    return f"{what}  eval  {'  '.join(parts)}  ({images})"


def results(workdir: Path, step: int) -> dict[str, float]:
    """The evaluation of a step in a run's metrics.jsonl, {} where there is none."""
    lines = [line for line in read(workdir / "metrics.jsonl") if line["step"] == step]
    found = [line for line in lines if "eval/count" in line]
    return found[-1] if found else {}


Best = tuple[str, str]  # name of a metric, and "max" or "min"


def score(results: Scalars, best: Best) -> float:
    """Number that is larger for a better evaluation."""
    name, direction = best
    return results[name] if direction == "max" else -results[name]


def best_line(workdir: Path, steps: Collection[int], best: Best) -> str:
    """``best checkpoint  step 360  top1 93.33 %  top5 ...  DIR/checkpoints/360``.

    Args:
      steps: of the checkpoints that are kept; the others cannot be the best.
      best: metric that picks the best.
    """
    lines = read(workdir / "metrics.jsonl")
    lines = [line for line in lines if "eval/count" in line and line["step"] in steps]
    if not lines:
        return "no checkpoint of an evaluated step is kept"
    newest = max(lines, key=lambda line: (score(line, best), line["step"]))
    where = workdir / "checkpoints" / str(newest["step"])
    line = eval_line(f"step {newest['step']}", newest)
    return f"best checkpoint  {line}  {where}"


def duration(seconds: float) -> str:
    """3725 -> ``1:02:05``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
