"""Metrics of a run: metrics.jsonl, TensorBoard, throughput, best evaluation."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hivit_jax.errors import ConfigError, first_line
from hivit_jax.paths import is_bucket

Scalars = Mapping[str, float | int]


class Writer:
    """Writer of the scalars and images of one run; only process 0 may create one.

    Args:
      workdir: directory of ``metrics.jsonl``, one JSON object per line. TensorBoard
        files are also written if tensorboardX is installed and `workdir` is not in a
        bucket.
      first_step: step that the run starts or resumes at. Lines of later steps are
        deleted, because the resumed run writes them again.
    """

    def __init__(self, workdir: str | Path, first_step: int = 0):
        from etils import epath  # late, because compiling a step does not need it

        self._path = path = epath.Path(workdir) / "metrics.jsonl"
        kept = [line for line in read(path) if line["step"] <= first_step]
        self._text = "".join(json.dumps(line) + "\n" for line in kept)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(self._text)
        temporary.replace(path)
        self._written = {(line["step"], *sorted(line)) for line in kept}
        # Objects in a bucket cannot be appended to, so `scalars` writes the whole text.
        remote = is_bucket(path)
        self._file = None if remote else open(path, "a", buffering=1)  # noqa: SIM115
        self._board = None if remote else _tensorboard(workdir)

    def scalars(self, step: int, values: Scalars) -> None:
        """Append a line to metrics.jsonl and a point to every TensorBoard curve.

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
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Write images by name, uint8 [H, W, 3], to TensorBoard."""
        if self._board:
            for name, pixels in images.items():
                self._board.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close all files."""
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()


def prepare_workdir(workdir: Path) -> None:
    """Create a workdir.

    Raises:
      ConfigError: the directory cannot be created or written to.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".writable-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except Exception as error:
        if is_bucket(workdir):  # where errors have many types
            raise ConfigError(
                f"workdir {workdir} cannot be written to: {first_line(error)[:200]}\n"
                "To log in, run gcloud auth application-default login, or grant the "
                "VM's service account the role Storage Object User"
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


def _tensorboard(workdir: str | Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(workdir))


class Throughput:
    """Measures images per second between two calls of `read`.

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
          starved: the devices were idle before the step, because they waited for
            images.
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


def read_evaluation(workdir: Path, step: int) -> dict[str, float]:
    """Return the last evaluation of a step in metrics.jsonl, or {}."""
    for line in reversed(read(workdir / "metrics.jsonl")):
        if line["step"] == step and "eval/count" in line:
            return line
    return {}


Best = tuple[str, str]  # name of a metric, and its direction: "max" or "min"


def score(results: Scalars, best: Best) -> float:
    """Return a number that is larger for a better evaluation."""
    name, direction = best
    return results[name] if direction == "max" else -results[name]
