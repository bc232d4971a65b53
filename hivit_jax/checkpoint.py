"""What a checkpoint is, and orbax behind it.

``DIR/checkpoints/STEP/`` holds the items *params*, *ema* (if kept), *optimizer* (its
state and the step) and *config*. Each can be restored alone. A step that was not
written to the end has no final name and is never seen.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

from hivit_jax.errors import CheckpointError, ConfigError
from hivit_jax.metrics import Scalars, score
from hivit_jax.models import named_leaves

logging.set_verbosity(logging.ERROR)  # orbax narrates every save


class Checkpoints:
    """The checkpoints of one run, written in the background.

    Args:
      workdir: the run's directory.
      keep: how many of the newest to keep; the one that did best in evaluation stays
        beside them.
    """

    def __init__(self, workdir: str | Path, keep: int):
        best = checkpoint_managers.BestN(
            get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False
        )
        newest = checkpoint_managers.LatestN(keep)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                [newest, best]
            ),
            cleanup_tmp_directories=True,
        )
        self.directory = Path(workdir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest_step(self) -> int | None:
        """Newest complete step, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """All steps that are kept, those still being written too."""
        return list(self._manager.all_steps())

    def save(
        self, state: Mapping[str, Any], config: str, results: Scalars | None = None
    ) -> None:
        """Starts writing a train state, its config (JSON text) and its evaluation.

        Does nothing if that step is already there.
        """
        step = int(state["step"])
        if step in self.steps():
            return
        save = ocp.args.StandardSave
        items = {
            "params": save(state["params"]),
            "optimizer": save({k: state[k] for k in ("opt_state", "step")}),
            "config": ocp.args.JsonSave(json.loads(config)),
        }
        if "ema" in state:
            items["ema"] = save(state["ema"])
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=results)

    def restore(self, step: int, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """The train state of a step.

        Args:
          wanted: shapes, dtypes and shardings of the state (`sharding.placed`).

        Raises:
          ConfigError: the checkpoint is of another model or optimizer.
        """
        path = self.directory / str(step)
        state = {"params": _restore(path, "params", wanted["params"])}
        optimizer = {k: wanted[k] for k in ("opt_state", "step")}
        state |= _restore(path, "optimizer", optimizer)
        if "ema" in wanted:
            # Averaging switched on in the middle of a run starts from the parameters.
            state["ema"] = _restore(path, _averaged(path), wanted["ema"])
        return state

    def close(self) -> None:
        """Waits until everything is on disk; raises if a write failed."""
        self._manager.wait_until_finished()
        self._manager.close()


def find(path: str | Path) -> Path:
    """The newest step directory under a workdir, a checkpoints directory or a step.

    Raises:
      CheckpointError: there is none.
    """
    path = Path(path).absolute()
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    if (path / "params").is_dir():
        return path
    steps = [p for p in path.glob("*") if p.name.isdigit() and (p / "params").is_dir()]
    if not steps:
        raise CheckpointError(f"no checkpoint in {path}; expected a workdir or a step")
    return max(steps, key=lambda p: int(p.name))


def load_config(step_path: Path) -> dict[str, Any]:
    """The resolved config that a checkpoint was trained with."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        return checkpointer.restore(step_path / "config")


def load_arrays(
    step_path: Path, averaged: bool = True
) -> tuple[dict[str, np.ndarray], str]:
    """Parameters of a step by name, on the host, whatever model they are of.

    Args:
      averaged: the averaged ones where they were kept.

    Returns:
      The arrays, and the item they are of: "params" or "ema".
    """
    item = _averaged(step_path) if averaged else "params"
    shapes = _metadata(step_path, item)
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), shapes)
    with ocp.PyTreeCheckpointer() as checkpointer:
        args = ocp.args.PyTreeRestore(restore_args=restore_args)
        return named_leaves(checkpointer.restore(step_path / item, args=args)), item


def _averaged(step_path: Path) -> str:
    """The item with averaged parameters; the plain ones where no average was kept."""
    return "ema" if (step_path / "ema").is_dir() else "params"


def _restore(step_path: Path, item: str, abstract: Any) -> Any:
    _compare(
        step_path, named_leaves(_metadata(step_path, item)), named_leaves(abstract)
    )
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(step_path / item, abstract)


def _metadata(step_path: Path, item: str) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.metadata(step_path / item).item_metadata.tree


def _compare(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """ConfigError with the first difference of names, shapes or dtypes."""
    for name in [*expected, *found]:
        sides = [side.get(name) for side in (found, expected)]
        texts = ["nothing" if x is None else f"{x.dtype}{list(x.shape)}" for x in sides]
        if texts[0] != texts[1]:
            raise ConfigError(
                f"{path} is a checkpoint of another model or optimizer:\n"
                f"{name} is {texts[0]} there; this config makes it {texts[1]}"
            )
