"""What a checkpoint is, and orbax behind it.

``DIR/checkpoints/STEP/`` holds the items *params*, *ema* (if kept), *optimizer* (its
state and the step), *config*, and *digests* of every array, which orbax alone would
restore with flipped bits in it. Each can be restored alone. A step that was not written
to the end has no final name and is never seen.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils.epath import Path
from orbax.checkpoint import checkpoint_managers

from hivit_jax.distributed.processes import all_processes
from hivit_jax.errors import CheckpointError, ConfigError, first_line
from hivit_jax.metrics import Best, Scalars, say, score
from hivit_jax.models import named_leaves

logging.set_verbosity(logging.ERROR)  # orbax narrates every save
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
            say(f"checkpoint {path.name.split('.')[0]} was not finished; removed")
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
        if "ema" in state:
            arrays["ema"] = state["ema"]
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
                say(f"error: {error}")
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
            say(f"checkpoint {step} was moved to {target}")
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
        state = {"params": _restore(path, "params", wanted["params"])}
        optimizer = {k: wanted[k] for k in ("opt_state", "step")}
        state |= _restore(path, "optimizer", optimizer)
        if "ema" in wanted:
            # Averaging switched on in the middle of a run starts from the parameters.
            state["ema"] = _restore(path, _averaged(path), wanted["ema"])
        return state

    def close(self) -> None:
        """Waits until everything is on disk; ConfigError if a write failed."""
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.close()


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
    """Parameters of a step by name, on the host, whatever model they are of.

    Args:
      averaged: the averaged ones where they were kept.

    Returns:
      The arrays, and the item they are of: "params" or "ema".

    Raises:
      CheckpointError: the step is damaged.
    """
    item = _averaged(step_path) if averaged else "params"
    with _reading(step_path):
        tree = load_item(step_path / item)
    _verify(step_path, item, tree)
    return named_leaves(tree), item


def load_item(path: Path) -> Any:
    """Arrays of one item of a step on the host, wherever they lay when saved."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        shapes = checkpointer.metadata(path).item_metadata.tree
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), shapes)
        args = ocp.args.PyTreeRestore(restore_args=restore_args)
        return checkpointer.restore(path, args=args)


def digests(trees: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """64 bits of every array, by item and name, however it is sharded.

    Any change of a single number changes them.
    """
    alike: dict[Any, list] = defaultdict(list)
    for item, tree in trees.items():
        for name, x in named_leaves(tree).items():
            kind = x.shape, str(x.dtype), getattr(x, "sharding", None)
            alike[kind].append((item, name, x))
    found: dict[str, dict[str, str]] = {item: {} for item in trees}
    for members in alike.values():
        # As many at once as take little memory; one program after another, because a
        # CPU aborts if too many small exchanges are under way.
        count = max(1, 2**26 // max(1, members[0][2].nbytes))
        for start in range(0, len(members), count):
            part = members[start : start + count]
            sums = np.asarray(_digest([x for _, _, x in part]))
            for (item, name, _), (high, low) in zip(part, sums, strict=True):
                found[item][name] = f"{high:08x}{low:08x}"
    return found


@jax.jit
def _digest(arrays: list[jax.Array]) -> jax.Array:
    """Arrays alike -> uint32 [arrays, 2]: sums, modulo 2**32, of every number's bits
    mixed with its position.

    The mixing is the end of MurmurHash3, one to one for a given position.
    """
    x = jnp.stack(arrays)
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    bits, position, stride = bits.astype(jnp.uint32), jnp.uint32(0), 1
    for axis in reversed(range(1, x.ndim)):
        position += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * stride
        stride = stride * x.shape[axis] % 2**32

    def mix(h):
        h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
        h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
        return h ^ (h >> 16)

    def total(seed):
        mixed = mix(bits ^ mix(position + jnp.uint32(seed)))
        return mixed.sum(tuple(range(1, mixed.ndim)), dtype=jnp.uint32)

    return jnp.stack([total(seed) for seed in (0x9E3779B9, 0x7F4A7C15)], axis=1)


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


def _restore(step_path: Path, item: str, abstract: Any) -> Any:
    with _reading(step_path):
        shapes = _metadata(step_path, item)
    _compare(step_path, named_leaves(shapes), named_leaves(abstract))
    with _reading(step_path), ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(step_path / item, abstract)
    _verify(step_path, item, tree)
    return tree


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
