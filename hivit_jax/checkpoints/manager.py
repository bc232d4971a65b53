"""What a checkpoint is, and orbax behind it.

``DIR/checkpoints/STEP/`` holds the items *params*, *model_state* (if there is any),
*ema* (if kept), *optimizer* (its state and the step), *config*, and *digests* of every
array, which orbax alone would restore with flipped bits in it. Each can be restored
alone. A step that was not written to the end has no final name and is never seen.

Until 0.1 the model state stood in *params*, and had moments in *optimizer*. Such
checkpoints are restored by name, and the moments are dropped.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils.epath import Path
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import checkpoint_managers

from hivit_jax.checkpoints.digests import digests
from hivit_jax.checkpoints.read import _averaged, _metadata, _reading, _verify, absolute
from hivit_jax.distributed.processes import all_processes
from hivit_jax.errors import CheckpointError, ConfigError, first_line
from hivit_jax.reporting.console import log
from hivit_jax.reporting.metrics import Best, Scalars, score
from hivit_jax.tree import leaf_name, named_leaves

# Devices that hold the same array share its writing in pieces of a megabyte or more:
# every piece takes a program to cut it out, and a small array is written sooner whole.
ocp.type_handlers.register_type_handler(
    jax.Array,
    ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20),
    override=True,
)


class Checkpoints:
    """The checkpoints of one run, written in the background.

    Args:
      workdir: the run's directory.
      keep: how many of the newest to keep; the one that did best in evaluation stays
        beside them.
      best: metric of an evaluation that says which did best.
    """

    def __init__(
        self, workdir: str | Path, keep: int, best: Best = ("eval/loss", "min")
    ):
        best_of_all = checkpoint_managers.BestN(
            get_metric_fn=partial(score, best=best),
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        newest = checkpoint_managers.LatestN(keep)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                [newest, best_of_all]
            ),
            cleanup_tmp_directories=True,
        )
        self.directory = absolute(workdir) / "checkpoints"
        for path in self.directory.glob("*.orbax-checkpoint-tmp*"):
            log(f"checkpoint {path.name.split('.')[0]} was not finished; removed")
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """All steps that are kept, those still being written too."""
        return list(self._manager.all_steps())

    def save(
        self, state: Mapping[str, Any], config: str, results: Scalars | None = None
    ) -> None:
        """Starts writing a train state, its config (JSON text) and its evaluation.

        Does nothing if that step is already there.

        Raises:
          ConfigError: this checkpoint, or the one before it, cannot be written.
        """
        step = int(state["step"])
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
        texts = {"config": json.loads(config), "digests": digests(arrays)}
        items |= {name: ocp.args.JsonSave(text) for name, text in texts.items()}
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=results)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of whatever kind the file system provokes
            reason = first_line(error)
            with suppress(OSError):  # a bucket has no such thing
                free = shutil.disk_usage(self.directory).free / 2**20
                reason = f"{free:,.0f} MiB are free there; {reason}"
            raise ConfigError(
                f"a checkpoint cannot be written to {self.directory}; those before it "
                f"are whole.\n{reason[:250]}"
            ) from error

    def restore_newest(
        self, wanted: Mapping[str, Any]
    ) -> tuple[int, dict[str, Any]] | None:
        """The newest step that is whole, and its state; None where there is no step.
        Damaged ones are reported, and moved to ``DIR/damaged``.

        Args:
          wanted: as for `restore`.

        Raises:
          ConfigError: the checkpoints are of another model or optimizer.
          CheckpointError: all are damaged.
        """
        steps, errors = sorted(self._manager.all_steps(read=True), reverse=True), {}
        for step in steps:
            state = None
            try:
                state = self.restore(step, wanted)
            except (ConfigError, CheckpointError) as error:
                errors[step] = error
            if not all_processes(state is not None):
                continue
            for damaged, error in errors.items():
                log(f"error: {error}")
                self._set_aside(damaged)
            return step, state
        for error in errors.values():  # of the newest; or all would be damaged
            raise error
        return None

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            target = self.directory.parent / "damaged" / str(step)
            target.parent.mkdir(exist_ok=True)
            if target.exists():
                target.rmtree()
            (self.directory / str(step)).rename(target)
            log(f"checkpoint {step} was moved to {target}")
        all_processes(True)  # that is, wait
        self._manager.reload()

    def restore(self, step: int, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """The train state of a step.

        Args:
          wanted: shapes, dtypes and shardings of the state (`sharding.placed`).

        Raises:
          ConfigError: the checkpoint is of another model or optimizer.
          CheckpointError: it is damaged.
        """
        path = self.directory / str(step)
        named = {item: named_leaves(tree) for item, tree in wanted.items()}
        fixed = named["model_state"]
        if (path / "model_state").is_dir():
            arrays = _restore(path, "params", named["params"])
            arrays |= _restore(path, "model_state", fixed)
        else:
            arrays = _restore(path, "params", named["params"] | fixed)
        state = {
            item: _rebuild(wanted[item], arrays) for item in ("params", "model_state")
        }
        optimizer = {item: wanted[item] for item in ("opt_state", "step")}
        arrays = _restore(path, "optimizer", named_leaves(optimizer), dropped=fixed)
        state |= _rebuild(optimizer, arrays)
        if "ema" in wanted:
            # Averaging switched on in the middle of a run starts from the parameters.
            arrays = _restore(path, _averaged(path), named["ema"], dropped=fixed)
            state["ema"] = _rebuild(wanted["ema"], arrays)
        return state

    def close(self) -> None:
        """Waits until everything is on disk; ConfigError if a write failed."""
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.close()


def _restore(
    step_path: Path,
    item: str,
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    dropped: Iterable[str] = (),
) -> dict[str, jax.Array]:
    """Arrays of an item by name.

    Args:
      wanted: shapes, dtypes and shardings by name.
      dropped: ends of the names of arrays that may be there and are not wanted.
    """
    with _reading(step_path):
        shapes = _metadata(step_path, item)
    ends = tuple(f"/{name}" for name in dropped)
    found = named_leaves(shapes)
    kept = {n: x for n, x in found.items() if n in wanted or not f"/{n}".endswith(ends)}
    _compare(step_path, kept, wanted)
    mesh = next(iter(wanted.values())).sharding.mesh

    def place(path, leaf):
        whole = NamedSharding(mesh, PartitionSpec())
        other = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)
        return wanted.get(leaf_name(path), other)

    abstract = jax.tree_util.tree_map_with_path(place, shapes)
    with _reading(step_path), ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(step_path / item, abstract)
    _verify(step_path, item, tree)
    arrays = named_leaves(tree)
    return {name: arrays[name] for name in wanted}


def _rebuild(tree: Any, arrays: Mapping[str, jax.Array]) -> Any:
    """The arrays of a pytree by their names."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: arrays[leaf_name(path)], tree
    )


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
