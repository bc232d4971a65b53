"""What a checkpoint is, and orbax behind it.

``DIR/checkpoints/STEP/`` holds the items *params*, *ema* (if kept), *optimizer* (its
state and the step) and *config*. Each can be restored alone. A step that was not
written to the end has no final name and is never seen.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

from hivit_jax.errors import CheckpointError, ConfigError
from hivit_jax.metrics import Scalars, say, score
from hivit_jax.models import leaf_name, named_leaves

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


def load_params(step_path: Path, abstract_params: Any) -> Any:
    """Parameters of a step, averaged ones where kept, on the given shardings."""
    return _restore(step_path, _averaged(step_path), abstract_params)


def load_encoder(step_path: Path, abstract_encoder: Any) -> Any:
    """What a step of any model holds of this encoder, on the given shardings.

    Returns:
      The same nested dicts, without the entries that the checkpoint does not have.
    """
    item = _averaged(step_path)
    stored = _metadata(step_path, item).get("encoder", {})
    common = {"encoder": _common(abstract_encoder, stored)}
    shapes = {"encoder": _common(stored, abstract_encoder)}
    _compare(step_path, named_leaves(shapes), named_leaves(common))
    restore_args = ocp.checkpoint_utils.construct_restore_args(common)
    with ocp.PyTreeCheckpointer() as checkpointer:
        args = ocp.args.PyTreeRestore(
            item=common, restore_args=restore_args, partial_restore=True
        )
        return checkpointer.restore(step_path / item, args=args)["encoder"]


def load_pretrained_params(path: Path, task: str, params: Any) -> Any:
    """`params` of a model for `task` with what the checkpoint step `path` has of them.

    Pretraining goes on with everything. A classifier takes the encoder; relative
    position tables that pretraining did not have start from 0, and the head's std goes
    from 0.02 down to 2e-5 (official ``main_finetune.py``), for a linear probe to 0.01
    (MAE's ``main_linprobe.py``).

    Raises:
      ConfigError: the checkpoint is of another model.
    """
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    if task == "mae":
        say(f"starting from all parameters of {path}")
        return load_params(path, abstract)
    stored = named_leaves(_metadata(path, _averaged(path)))
    fates = loading_fates(stored, named_leaves(params))
    if fates["missing"]:
        raise ConfigError(
            f"init_from: {path} has no {fates['missing'][0]}; with "
            f"{len(fates['missing'])} arrays of the encoder left to chance this would "
            "not be finetuning"
        )
    loaded = named_leaves(load_encoder(path, abstract["encoder"]))
    encoder = jax.tree_util.tree_map_with_path(
        lambda key_path, leaf: loaded.get(leaf_name(key_path), jnp.zeros_like(leaf)),
        params["encoder"],
    )
    std = {"classify": 2e-5, "linear_probe": 0.01}[task]
    head = params["head"] | {"kernel": params["head"]["kernel"] * (std / 0.02)}
    say(f"starting from {path}")
    for fate, names in fates.items():
        parts = [name.split("/") for name in names]
        groups = Counter("/".join(p[: 1 + (p[0] == "encoder")]) for p in parts)
        listed = ", ".join(f"{group} {count}" for group, count in groups.items())
        if names:
            say(f"  {fate:<8} {len(names):>4}  {listed}")
    return params | {"encoder": encoder, "head": head}


def loading_fates(stored: Iterable[str], wanted: Iterable[str]) -> dict[str, list[str]]:
    """What becomes of parameters, by name, when a classifier starts from pretraining.

    Args:
      stored: names in the checkpoint.
      wanted: names of the classifier's parameters.

    Returns:
      used, dropped (of the checkpoint), zero (tables that pretraining had not), new
      (norm and head) and missing (of the encoder: it cannot do without).
    """
    stored, wanted = list(stored), list(wanted)
    used = [name for name in stored if name.startswith("encoder/") and name in wanted]
    absent = [name for name in wanted if name not in used]
    zero = [name for name in absent if name.endswith("relative_position_bias_table")]
    new = [name for name in absent if not name.startswith("encoder/")]
    return {
        "used": used,
        "dropped": [name for name in stored if name not in used],
        "zero": zero,
        "new": new,
        "missing": [name for name in absent if name not in zero + new],
    }


def _averaged(step_path: Path) -> str:
    """The item with averaged parameters; the plain ones where no average was kept."""
    return "ema" if (step_path / "ema").is_dir() else "params"


def _common(tree: Any, other: Any) -> Any:
    """The part of nested dicts that `other` has too; keys compare as strings."""
    if not isinstance(tree, Mapping):
        return tree
    other = {str(key): value for key, value in other.items()}
    return {k: _common(v, other[str(k)]) for k, v in tree.items() if str(k) in other}


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
