"""Reading the arrays and config of a checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils.epath import Path

from hivit_jax.checkpoints.digests import digests
from hivit_jax.errors import CheckpointError, first_line
from hivit_jax.tree import named_leaves

logging.set_verbosity(logging.FATAL)  # what orbax logs is raised, too


def absolute(path: str | Path) -> Path:
    """A path that does not depend on where the process is; ``gs://`` ones never do."""
    return Path(path) if "://" in str(path) else Path(path).absolute()


def find(path: str | Path) -> list[Path]:
    """Steps under a workdir, a checkpoints directory or a step itself, newest first.

    Raises:
      CheckpointError: there is none.
    """
    path = absolute(path)
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    if (path / "params").is_dir():
        return [path]
    steps = [p for p in path.glob("*") if p.name.isdigit() and (p / "params").is_dir()]
    if not steps:
        raise CheckpointError(f"no checkpoint in {path}; expected a workdir or a step")
    return sorted(steps, key=lambda p: -int(p.name))


def load_config(step_path: Path) -> dict[str, Any]:
    """The resolved config that a checkpoint was trained with, or CheckpointError."""
    return _load_json(step_path, "config")


def load_arrays(
    step_path: Path, averaged: bool = True
) -> tuple[dict[str, np.ndarray], str]:
    """Parameters and model state of a step by name, on the host, whatever model they
    are of.

    Args:
      averaged: the averaged ones where they were kept.

    Returns:
      The arrays, and the item they are of: "params" or "ema".

    Raises:
      CheckpointError: the step is damaged.
    """
    item = _averaged(step_path) if averaged else "params"
    arrays = {}
    for each in (item, "model_state"):
        if each == item or (step_path / each).is_dir():
            with _reading(step_path):
                tree = load_item(step_path / each)
            _verify(step_path, each, tree)
            arrays |= named_leaves(tree)
    return arrays, item


def load_item(path: Path) -> Any:
    """Arrays of one item of a step on the host, wherever they lay when saved."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        shapes = checkpointer.metadata(path).item_metadata.tree
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), shapes)
        args = ocp.args.PyTreeRestore(restore_args=restore_args)
        return checkpointer.restore(path, args=args)


def _verify(step_path: Path, item: str, tree: Any) -> None:
    """CheckpointError if an array is not what was saved."""
    if not (step_path / "digests").is_dir():
        return  # written before there were digests
    stored = _load_json(step_path, "digests").get(item, {})
    found = digests({item: tree})[item]
    wrong = [name for name in found if found[name] != stored.get(name)]
    if wrong:
        raise CheckpointError(
            f"{step_path} is damaged: {len(wrong)} of {len(found)} arrays of {item} "
            f"are not what was saved, {wrong[0]} first"
        )


def _load_json(step_path: Path, item: str) -> dict[str, Any]:
    with _reading(step_path), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(step_path / item)


@contextmanager
def _reading(step_path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of whatever kind a damaged file provokes
        reason = first_line(error)[:200]
        raise CheckpointError(f"{step_path} is damaged: {reason}") from error


def _averaged(step_path: Path) -> str:
    """The item with averaged parameters; the plain ones where no average was kept."""
    return "ema" if (step_path / "ema").is_dir() else "params"


def _metadata(step_path: Path, item: str) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.metadata(step_path / item).item_metadata.tree
