"""Where numbers go: the terminal, metrics.jsonl, TensorBoard."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hivit_jax.errors import ConfigError

Scalars = Mapping[str, float | int]


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
