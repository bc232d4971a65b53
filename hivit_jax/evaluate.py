"""Exact evaluation: every example of the test split once, on any number of devices and
in any batch; and panels of the same held-out images.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hivit_jax import inputs, rng, tasks
from hivit_jax.data.prefetch import to_devices
from hivit_jax.distributed.processes import gather_objects
from hivit_jax.distributed.sharding import (
    BATCH,
    check_batch,
    make_mesh,
    state_shardings,
)
from hivit_jax.errors import ConfigError, DataError
from hivit_jax.reporting import console
from hivit_jax.tree import leaf_name, split_state
from hivit_jax.weights import adapt, load

FIGURE_IMAGES = 6

# "params" and "model_state" of a model, and "frozen" of its task.
Variables = Mapping[str, Any]


def make_eval_step(
    config: Any, task: tasks.Task, graphdef: nnx.GraphDef, mesh: Mesh
) -> Callable:
    """Return (variables, batch, number of the first example) -> (sums, count,
    unreadable, rows), jitted: the first three over all examples that could be read.
    """
    check_batch(mesh, task.transform(train=False).batch_size)
    whole, rows = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), BATCH))

    def eval_step(variables, batch, first):
        model = nnx.merge(graphdef, variables["params"], variables["model_state"])
        keys = rng.step_keys(config.seed, "eval", first, len(batch["weight"]))
        sums, found = task.eval_step(model, variables["frozen"], batch, keys)
        found = found and found | {name: batch[name] for name in ("index", "weight")}
        return sums, batch["weight"].sum(), batch["unreadable"].sum(), found

    return jax.jit(eval_step, out_shardings=(whole, whole, whole, rows))


def evaluate(
    config: Any,
    task: tasks.Task,
    eval_step: Callable,
    variables: Variables,
    mesh: Mesh,
    heartbeat: Callable[[], None] = lambda: None,
) -> dict[str, float | int]:
    """Return the task's metrics of the test split; eval/count, the exact number of
    examples, and eval/unreadable, of those that had to be left out.

    Sums of a batch are added up on the host, in float64 or int64, because float32
    stops counting at 16.7 million.

    Args:
      heartbeat: called after every batch.

    Raises:
      DataError: the loader did not yield every example once, or too many cannot be
        read.
    """
    totals, counts, records, first = None, np.zeros(2), [], 0
    for batch in to_devices(inputs.eval_batches(config), mesh):
        *summed, rows = eval_step(variables, batch, jnp.uint32(first))
        sums, *counted = jax.device_get(summed)
        sums = jax.tree.map(_widened, sums)
        totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
        counts += counted
        records.append(task.records(local_rows(rows)) if rows else [])
        first += len(batch["weight"])
        heartbeat()
    count, unreadable = map(int, counts)
    expected = task.data.counts["test"]
    if count + unreadable != expected:
        raise DataError(
            f"evaluated {count} images and could not read {unreadable}; the "
            f"split has {expected}"
        )
    inputs.check_unreadable(unreadable, expected, config.data, "test")
    records = in_order(gather_objects(records))
    values = {}
    if jax.process_index() == 0:
        values = task.summarize(totals, count, records)
    values = gather_objects(values)[0]
    return values | {"eval/count": count, "eval/unreadable": unreadable}


def _widened(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64)


def local_rows(rows: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Rows [B, ...] of this process's examples that have a weight, on the host."""
    found = {}
    for name, array in rows.items():
        parts = {s.index[0].start or 0: s.data for s in array.addressable_shards}
        parts = [np.asarray(parts[start]) for start in sorted(parts)]
        found[name] = np.concatenate(parts)
    counted = found.pop("weight") > 0
    return {name: array[counted] for name, array in found.items()}


def in_order(records: list[list[list]]) -> list:
    """Records of all processes, by process and batch -> in the order of the split."""
    return [r for batch in zip(*records, strict=True) for part in batch for r in part]


def evaluate_checkpoint(
    config: Any,
    workdir: str | Path,
    checkpoint: str = "",
    heartbeat: Callable[[], None] = lambda: None,
) -> dict[str, float | int]:
    """Evaluate the workdir's newest checkpoint and log the result.

    Args:
      checkpoint: evaluated instead; any path that `weights.load.read` accepts.

    Raises:
      CheckpointError: there is no checkpoint.
      ConfigError: it is of another model.
    """
    start = load.read_for(config.model, checkpoint or workdir)
    task = inputs.make_task(config, "test")
    mesh = make_mesh(config.mesh, config.batch_size)
    graphdef, variables = restore(start, task, mesh)
    eval_step = make_eval_step(config, task, graphdef, mesh)
    values = evaluate(config, task, eval_step, variables, mesh, heartbeat)
    console.log(console.eval_line(start.label, values))
    return values


def restore(
    start: adapt.Pretrained, task: tasks.Task, mesh: Mesh
) -> tuple[nnx.GraphDef, Variables]:
    """Structure and variables of a task's model with all the arrays of a saved one.

    Raises:
      ConfigError: an array is missing or does not fit.
    """
    model = nnx.eval_shape(task.build_model)
    graphdef, params, model_state = split_state(model)
    arrays = adapt.adapt(start, model)
    shapes = {"params": params, "model_state": model_state}

    def put(path, sharding):
        name = leaf_name(path[1:])
        if name not in arrays:
            raise ConfigError(f"{start.path} has no {name} that fits this config")
        return jax.device_put(arrays[name], sharding)

    shardings = state_shardings(mesh, shapes)
    variables = jax.tree_util.tree_map_with_path(put, shardings)
    return graphdef, variables | {"frozen": put_frozen(task, mesh)}


def put_frozen(task: tasks.Task, mesh: Mesh) -> Any:
    """The frozen arrays of a task, sharded over the mesh."""
    frozen = task.frozen()
    return jax.device_put(frozen, state_shardings(mesh, frozen))


def make_panels(config: Any, task: tasks.Task, graphdef: nnx.GraphDef) -> Callable:
    """Return variables -> the task's panels of the first held-out images, on the host;
    always drawn from the same keys. Reads no images for a task without panels.
    """
    if type(task).panels is tasks.Task.panels:
        return lambda variables: {}
    batch = inputs.first_test_images(config, FIGURE_IMAGES)
    count = len(batch["weight"])

    @jax.jit
    def panels(variables, batch):
        model = nnx.merge(graphdef, variables["params"], variables["model_state"])
        keys = rng.step_keys(config.seed, "eval", jnp.uint32(0), count)
        return task.panels(model, variables["frozen"], batch, keys)

    return lambda variables: jax.device_get(panels(variables, batch))
