"""Save and restore the state of a run with Orbax.

``WORKDIR/checkpoints/STEP/`` contains a subdirectory for each item: *params*;
*model_state*, if the model has any; *ema*, if averaging is on; *optimizer*, with the
optimizer state and the step; *config*; *dataset*, with sizes and class names; and
*digests* of every array, because Orbax restores flipped bits without an error. Each
item can be restored alone. Orbax gives only complete checkpoints their final name, so
that incomplete checkpoints are never restored. In buckets, the file `read.COMMIT_FILE`
marks complete checkpoints instead.

Versions before 0.1 saved the model state inside *params*, and optimizer moments of the
model state inside *optimizer*. `restore` finds that model state by array name and drops
these moments. Names of optimizer arrays may also differ between versions; see
`checkpoints.names`.
"""

import json
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils.epath import Path
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import checkpoint_managers

from hivit_jax.checkpoints.best import KeepBest
from hivit_jax.checkpoints.digests import digests
from hivit_jax.checkpoints.names import match_names
from hivit_jax.checkpoints.read import (
    errors_as_damage,
    is_complete,
    item_metadata,
    preferred_params_item,
    verify_digests,
    verify_finite,
)
from hivit_jax.distributed.processes import all_processes
from hivit_jax.errors import CheckpointError, ConfigError, first_line
from hivit_jax.paths import absolute, is_bucket
from hivit_jax.reporting.console import log
from hivit_jax.reporting.metrics import Criterion, Scalars
from hivit_jax.resources import free_disk_text
from hivit_jax.tree import leaf_name, named_leaves

# The replicas of an array write slices of the array in parallel. Slices of less than
# 1 MiB would be slower than writing the whole array, because each slice needs its own
# compiled program.
ocp.type_handlers.register_type_handler(
    jax.Array,
    ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20),
    override=True,
)


class Checkpoints:
    """The checkpoints of one run, written in the background.

    Args:
      workdir: the run's directory.
      keep: number of newest checkpoints to keep. The checkpoint with the best
        evaluation is also kept.
      best: name of the metric that selects the best checkpoint, and "min" or "max".
      dataset: JSON-serializable facts about the dataset, saved with every checkpoint.
    """

    def __init__(
        self,
        workdir: str | Path,
        keep: int,
        best: Criterion = ("eval/loss", "min"),
        dataset: Mapping[str, Any] | None = None,
    ):
        self._dataset = dataset
        self.directory = absolute(workdir) / "checkpoints"
        newest = checkpoint_managers.LatestN(keep)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                [newest, KeepBest(self.directory.parent, best)]
            ),
            cleanup_tmp_directories=True,
        )
        unfinished = [*self.directory.glob("*.orbax-checkpoint-tmp*")]
        if is_bucket(self.directory):
            found = (path for path in self.directory.glob("*") if path.name.isdigit())
            unfinished = [path for path in found if not is_complete(path)]
        for path in unfinished:
            log(f"checkpoint {path.name.split('.')[0]} was not finished; removed")
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, including those still being written."""
        return list(self._manager.all_steps())

    def save(
        self, state: Mapping[str, Any], config: str, results: Scalars | None = None
    ) -> None:
        """Start writing a train state, its config (JSON text) and evaluation results.

        Does nothing if a checkpoint of this step already exists.

        Raises:
          ConfigError: this checkpoint or an earlier one cannot be written.
        """
        step = int(jax.device_get(state["step"]))
        if step in self.steps():
            return
        arrays = {
            "params": state["params"],
            "optimizer": {k: state[k] for k in ("opt_state", "step")},
        }
        for item in ("model_state", "ema"):
            if jax.tree.leaves(state.get(item)):
                arrays[item] = state[item]
        items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
        json_items = {"config": json.loads(config), "digests": digests(arrays)}
        json_items |= {"dataset": self._dataset} if self._dataset else {}
        items |= {name: ocp.args.JsonSave(x) for name, x in json_items.items()}
        with self._errors_as_config_error():
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=results)

    @contextmanager
    def _errors_as_config_error(self) -> Iterator[None]:
        """Context manager that converts any exception to ConfigError."""
        try:
            yield
        except Exception as error:  # because file systems cause many exception types
            reason = f"{free_disk_text(self.directory)}; {first_line(error)}"
            raise ConfigError(
                f"cannot write a checkpoint to {self.directory}; completed "
                f"checkpoints are intact.\n{reason[:250]}"
            ) from error

    def restore_newest(
        self, abstract_state: Mapping[str, Any]
    ) -> tuple[int, dict[str, Any]] | None:
        """Return step and state of the newest intact checkpoint; None if there is none.

        Damaged newer checkpoints are logged and moved to ``WORKDIR/damaged``.

        Args:
          abstract_state: shapes, dtypes and shardings of the state.

        Raises:
          ConfigError: the checkpoints are of a different model or optimizer.
          CheckpointError: all checkpoints are damaged.
        """
        # step -> error; all processes have the same keys
        errors: dict[int, CheckpointError] = {}
        for step in sorted(self._manager.all_steps(read=True), reverse=True):
            state = None
            log(f"restoring {self.directory / str(step)} ...")
            try:
                state = self.restore(step, abstract_state)
            except CheckpointError as error:
                errors[step] = error
            if all_processes(state is not None):
                for damaged_step, error in errors.items():
                    log(f"error: {error}")
                    self._move_to_damaged(damaged_step)
                return step, state
            path = self.directory / str(step)
            peer_error = CheckpointError(
                f"{path}: another process could not restore this checkpoint; the log "
                "of that process contains the error"
            )
            errors.setdefault(step, peer_error)
        if errors:  # no checkpoint is intact; raise the error of the newest
            raise next(iter(errors.values()))
        return None

    def _move_to_damaged(self, step: int) -> None:
        if jax.process_index() == 0:
            target = self.directory.parent / "damaged" / str(step)
            target.parent.mkdir(exist_ok=True)
            if is_bucket(target):  # because a bucket has no empty directories
                (target.parent / "README").write_text("Damaged checkpoints.\n")
            if target.exists():
                target.rmtree()
            (self.directory / str(step)).rename(target)
            log(f"checkpoint {step} was moved to {target}")
        all_processes(True)  # wait, because the move must precede the reload
        self._manager.reload()

    def restore(self, step: int, abstract_state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the train state of a step's checkpoint.

        Args:
          abstract_state: shapes, dtypes and shardings of the state; see
            `distributed.sharding.with_shardings`.

        Raises:
          ConfigError: the checkpoint is of a different model or optimizer.
          CheckpointError: the checkpoint is damaged.
        """
        path = self.directory / str(step)
        named = {item: named_leaves(tree) for item, tree in abstract_state.items()}
        model_state = named["model_state"]
        all_variables = named["params"] | model_state
        restore_item = partial(_restore_item, path, variables=all_variables)
        if (path / "model_state").is_dir():
            arrays = restore_item("params", named["params"])
            arrays |= restore_item("model_state", model_state)
        else:
            arrays = restore_item("params", all_variables)
        trees = {item: abstract_state[item] for item in ("params", "model_state")}
        state = {item: _rebuild(tree, arrays) for item, tree in trees.items()}
        optimizer = {item: abstract_state[item] for item in ("opt_state", "step")}
        expected = named_leaves(optimizer)
        arrays = restore_item("optimizer", expected, droppable=model_state)
        state |= _rebuild(optimizer, arrays)
        if "ema" in abstract_state:
            # If averaging was switched on after the checkpoint was written, the
            # checkpoint has no average. The average then starts from the parameters.
            item = preferred_params_item(path)
            arrays = restore_item(item, named["ema"], droppable=model_state)
            state["ema"] = _rebuild(abstract_state["ema"], arrays)
        return state

    def close(self) -> None:
        """Wait until all checkpoints are written.

        Raises:
          ConfigError: a write failed.
        """
        with self._errors_as_config_error():
            self._manager.wait_until_finished()
            self._manager.close()


def _restore_item(
    step_path: Path,
    item: str,
    expected: Mapping[str, jax.ShapeDtypeStruct],
    variables: Container[str],
    droppable: Iterable[str] = (),
) -> dict[str, jax.Array]:
    """Return {expected name: array} of an item, verified against the digests.

    Args:
      expected: shapes, dtypes and shardings by name.
      variables: names of the model's parameters and model state.
      droppable: names of variables. An unexpected array is dropped if its name is one
        of these, or ends with one of them, as in ``opt_state/0/mu/NAME``.
    """
    with errors_as_damage(step_path):
        metadata = item_metadata(step_path, item)
    suffixes = tuple(f"/{name}" for name in droppable)
    renamed = match_names(named_leaves(metadata), expected, variables)
    saved = {
        renamed[name]: leaf
        for name, leaf in named_leaves(metadata).items()
        if renamed[name] in expected or not f"/{name}".endswith(suffixes)
    }
    _check_arrays(step_path, saved, expected)
    mesh = next(iter(expected.values())).sharding.mesh
    replicated = NamedSharding(mesh, PartitionSpec())

    def with_sharding(path, leaf):
        default = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)
        return expected.get(renamed[leaf_name(path)], default)

    abstract = jax.tree_util.tree_map_with_path(with_sharding, metadata)
    with errors_as_damage(step_path), ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(step_path / item, abstract)
    verify_digests(step_path, item, tree)
    verify_finite(step_path, item, tree)
    arrays = {renamed[name]: x for name, x in named_leaves(tree).items()}
    return {name: arrays[name] for name in expected}


def _rebuild(tree: Any, arrays: Mapping[str, jax.Array]) -> Any:
    """Return a pytree with each leaf replaced by the array of its name."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: arrays[leaf_name(path)], tree
    )


def _check_arrays(
    path: Path, saved: Mapping[str, Any], expected: Mapping[str, Any]
) -> None:
    """Raise ConfigError for the first array whose name, shape or dtype differs."""
    for name in [*expected, *saved]:
        found, needed = (
            f"{leaves[name].dtype}{list(leaves[name].shape)}"
            if name in leaves
            else "no array"
            for leaves in (saved, expected)
        )
        if found != needed:
            raise ConfigError(
                f"{path} is a checkpoint of a different model or optimizer.\n"
                f"{name}: this config expects {needed}, the checkpoint contains {found}"
            )
