"""Read the arrays and the config of a checkpoint.

A checkpoint is a directory named by its step. Each subdirectory is an Orbax item, such
as "params" or "config".
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils.epath import Path

from hivit_jax.checkpoints.digests import digests, nonfinite_names
from hivit_jax.errors import CheckpointError, first_line
from hivit_jax.paths import absolute, is_bucket
from hivit_jax.progress import listed
from hivit_jax.tree import named_leaves

COMMIT_FILE = "commit_success.txt"
MAX_STEPS_LISTED = 8  # in an error

logging.set_verbosity(logging.FATAL)  # because Orbax logs an error before raising it


def find_checkpoints(path: str | Path) -> list[Path]:
    """Return the directories of all checkpoints, newest first.

    Args:
      path: a workdir, its checkpoints directory, or the directory of one checkpoint.

    Raises:
      CheckpointError: there is no complete checkpoint.
    """
    path = absolute(path)
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    if is_complete(path):
        return [path]
    if (path / "params").is_dir():
        raise CheckpointError(
            f"{path}: expected {COMMIT_FILE}, the file that is written last to a "
            "checkpoint in a bucket, found none\nIf the directory is a complete copy "
            "of a local checkpoint, add an empty file of this name"
        )
    found = _complete_checkpoints(path)
    if not found:
        problem = f"no checkpoint in {path}"
        if not is_bucket(path) and not path.exists():
            problem = f"{path} does not exist"
        expected = "a workdir or the directory of one checkpoint"
        if path.name.isdigit() and (others := _complete_checkpoints(path.parent)):
            names = [step.name for step in reversed(others)]
            expected = f"one of the steps {listed(names, MAX_STEPS_LISTED)}"
        raise CheckpointError(f"{problem}; expected {expected}")
    return found


def has_checkpoint(path: str | Path) -> bool:
    """Return True if `find_checkpoints` finds a checkpoint."""
    try:
        return bool(find_checkpoints(path))
    except CheckpointError:
        return False


def _complete_checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints in a directory, newest first."""
    steps = [p for p in directory.glob("*") if p.name.isdigit() and is_complete(p)]
    return sorted(steps, key=lambda p: -int(p.name))


def is_complete(step_path: Path) -> bool:
    """Return True if a checkpoint has been written completely.

    In a bucket, where directories cannot be renamed atomically, Orbax writes
    `COMMIT_FILE` after all other files.
    """
    if is_bucket(step_path):
        return (step_path / COMMIT_FILE).exists()
    return (step_path / "params").is_dir()


def load_config(step_path: Path) -> dict[str, Any]:
    """Return the complete config that is saved in a checkpoint.

    Raises:
      CheckpointError: the item is damaged.
    """
    return _load_json(step_path, "config")


def load_dataset_info(step_path: Path) -> dict[str, Any] | None:
    """Return the fields of the saved `DatasetInfo`; None if the item is missing.

    Raises:
      CheckpointError: the item is damaged.
    """
    if not (step_path / "dataset").is_dir():
        return None  # an older version saved the checkpoint
    return _load_json(step_path, "dataset")


def load_arrays(
    step_path: Path, averaged: bool = True
) -> tuple[dict[str, np.ndarray], str]:
    """Load a checkpoint's parameters and model state to the host, as {name: array}.

    Works for checkpoints of any model.

    Args:
      averaged: prefer averaged parameters (EMA) if the checkpoint contains them.

    Returns:
      The arrays, and the item that the parameters come from: "params" or "ema".

    Raises:
      CheckpointError: the checkpoint is damaged, or an array contains inf or NaN.
    """
    params_item = preferred_params_item(step_path) if averaged else "params"
    items = [params_item]
    if (step_path / "model_state").is_dir():
        items.append("model_state")
    arrays = {}
    for item in items:
        with errors_as_damage(step_path):
            tree = load_item(step_path / item)
        verify_digests(step_path, item, tree)
        verify_finite(step_path, item, tree)
        arrays |= named_leaves(tree)
    return arrays, params_item


def load_item(path: Path) -> Any:
    """Load the arrays of one item to the host, regardless of their saved sharding."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path).item_metadata.tree
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), metadata)
        args = ocp.args.PyTreeRestore(restore_args=restore_args)
        return checkpointer.restore(path, args=args)


def verify_digests(step_path: Path, item: str, tree: Any) -> None:
    """Raise CheckpointError if an array of an item does not match its saved digest."""
    if not (step_path / "digests").is_dir():
        return  # an older version saved the checkpoint
    saved = _load_json(step_path, "digests").get(item, {})
    restored = digests({item: tree})[item]
    wrong = [name for name in restored if restored[name] != saved.get(name)]
    if wrong:
        raise CheckpointError(
            f"{step_path} is damaged: {len(wrong)} of {len(restored)} arrays of {item} "
            f"do not match their digests, the first is {wrong[0]}"
        )


def verify_finite(step_path: Path, item: str, tree: Any) -> None:
    """Raise CheckpointError if an array of an item contains inf or NaN."""
    if wrong := nonfinite_names(tree):
        raise CheckpointError(
            f"{step_path} is not usable: {len(wrong)} of {len(named_leaves(tree))} "
            f"arrays of {item} contain inf or NaN, the first is {wrong[0]}"
        )


def _load_json(step_path: Path, item: str) -> dict[str, Any]:
    handler = ocp.JsonCheckpointHandler()
    with errors_as_damage(step_path), ocp.Checkpointer(handler) as checkpointer:
        return checkpointer.restore(step_path / item)


@contextmanager
def errors_as_damage(step_path: Path) -> Iterator[None]:
    """Context manager that reports any exception as damage of a checkpoint.

    Raises:
      CheckpointError: an exception was raised inside the context.
    """
    try:
        yield
    except Exception as error:  # because damaged files cause exceptions of many types
        reason = first_line(error)[:200]
        raise CheckpointError(f"{step_path} is damaged: {reason}") from error


def preferred_params_item(step_path: Path) -> str:
    """Return "ema" if a checkpoint contains averaged parameters, else "params"."""
    return "ema" if (step_path / "ema").is_dir() else "params"


def item_metadata(step_path: Path, item: str) -> Any:
    """Return a pytree with the shape and dtype of each array of an item."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.metadata(step_path / item).item_metadata.tree
