"""Send the metrics and figures of a run to TensorBoard and Weights & Biases."""

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hivit_jax.errors import ConfigError, first_line, require
from hivit_jax.paths import is_bucket

# File in the workdir with the id of the Weights & Biases run, for a resumed run.
ID_FILE = "wandb.id"


class Board(Protocol):
    """Destination of scalars and images, by name and step."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...
    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None: ...
    def close(self) -> None: ...


def open_boards(workdir: Any, settings: Mapping[str, Any], project: str) -> list[Board]:
    """Open the boards of a run.

    Opens TensorBoard only if tensorboardX is installed and the workdir is local.

    Args:
      workdir: `etils.epath.Path`.
      settings: the run's config by dotted key.
      project: name of a project of Weights & Biases; "": do not use it.

    Raises:
      ConfigError: wandb is not installed, or cannot start.
    """
    boards = [] if is_bucket(workdir) else tensorboards(workdir, settings)
    if project:
        boards.append(Wandb(workdir, settings, project))
    return boards


def tensorboards(workdir: Any, settings: Mapping[str, Any]) -> list[Board]:
    """Return [TensorBoard]; [] if tensorboardX is not installed."""
    try:
        import tensorboardX  # noqa: F401
    except ImportError:
        return []
    return [TensorBoard(workdir, settings)]


def tag(name: str) -> str:
    """Add the group "train" to a name without a group: ``loss`` -> ``train/loss``."""
    return name if "/" in name else f"train/{name}"


class TensorBoard:
    """TensorBoard files in the workdir: scalars, images, config and hyperparameters."""

    def __init__(self, workdir: str | Path, settings: Mapping[str, Any]):
        from tensorboardX import SummaryWriter
        from tensorboardX.summary import hparams

        self._writer = SummaryWriter(str(workdir))
        if settings:
            text = json.dumps(settings, indent=2, default=str)
            self._writer.add_text("config", f"```json\n{text}\n```")
            types = (bool, int, float, str)
            values = {
                name: value if isinstance(value, types) else str(value)
                for name, value in settings.items()
            }
            names = "train/loss", "eval/loss", "eval/top1", "eval/mAP"
            metrics = dict.fromkeys(names, 0.0)  # `hparams` uses only the names
            # `add_hparams` would write a second file.
            for summary in hparams(values, metrics):
                self._writer.file_writer.add_summary(summary)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(tag(name), value, step)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        for name, pixels in images.items():
            self._writer.add_image(tag(name), pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run at Weights & Biases.

    Training that resumes in the same workdir continues the same Weights & Biases run.
    The environment variables of wandb apply, such as WANDB_MODE=offline.
    """

    def __init__(self, workdir: Any, settings: Mapping[str, Any], project: str):
        wandb = require("wandb", "hivit-jax[wandb]")
        id_file = workdir / ID_FILE
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex)
        self._image = wandb.Image
        try:
            self._run = wandb.init(
                project=project,
                name=workdir.name,
                id=id_file.read_text(),
                resume="allow",
                dir=None if is_bucket(workdir) else str(workdir),
                config=dict(settings),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"wandb_project={project!r}: wandb cannot start: {first_line(error)}\n"
                "run `wandb login`, or set the environment variable WANDB_MODE=offline"
            ) from error

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({tag(name): value for name, value in values.items()}, step=step)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        tagged = {tag(name): self._image(pixels) for name, pixels in images.items()}
        self._run.log(tagged, step=step)

    def close(self) -> None:
        self._run.finish()
