"""Evaluate a model: every example counts exactly once, on any number of devices."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hivit_jax import inputs, rng, tasks
from hivit_jax.config import due_after
from hivit_jax.data.notes import classes_without_images, unmatched_exclusions
from hivit_jax.data.prefetch import prefetch_to_device
from hivit_jax.data.sources.base import Source
from hivit_jax.data.sources.registry import open_source
from hivit_jax.data.unreadable import check_unreadable
from hivit_jax.distributed.processes import gather_objects
from hivit_jax.distributed.sharding import (
    BATCH,
    check_batch,
    make_mesh,
    on_mesh,
    replicate,
    state_shardings,
)
from hivit_jax.errors import ConfigError, DataError
from hivit_jax.initial import warn_of_pixels
from hivit_jax.progress import Progress, counted
from hivit_jax.reporting import console, metrics
from hivit_jax.tree import leaf_name, split_params
from hivit_jax.weights import adapt, load
from hivit_jax.xla.compile import with_compilation_log

NUM_FIGURE_IMAGES = 6

# Variables have the keys "params", "model_state" and "frozen" (see `Task.frozen`).
Variables = Mapping[str, Any]


def make_eval_step(
    config: Any, task: tasks.Task, graphdef: nnx.GraphDef, mesh: Mesh
) -> Callable:
    """Return a jitted function that evaluates one batch.

    The function's arguments are the variables, the batch, and the total size of all
    earlier batches, from which the PRNG keys are derived. The function returns (sums,
    count, unreadable, rows). Sums and rows are the result of `Task.eval_step`. Unless
    the rows are {}, the batch's "index" and "weight" are added to them. The count of
    examples of weight 1 and the number of unreadable examples are scalars.
    """
    check_batch(mesh, task.transform(train=False).batch_size)
    replicated, sharded = (NamedSharding(mesh, s) for s in (PartitionSpec(), BATCH))

    def eval_step(variables, batch, first):
        model = nnx.merge(graphdef, variables["params"], variables["model_state"])
        keys = rng.step_keys(config.seed, "eval", first, len(batch["weight"]))
        sums, rows = task.eval_step(model, variables["frozen"], batch, keys)
        rows = rows and rows | {name: batch[name] for name in ("index", "weight")}
        return sums, batch["weight"].sum(), batch["unreadable"].sum(), rows

    shardings = replicated, replicated, replicated, sharded
    jitted = on_mesh(mesh, jax.jit(eval_step, out_shardings=shardings))
    return with_compilation_log(jitted, "the evaluation step")


def evaluate(
    config: Any,
    task: tasks.Task,
    eval_step: Callable,
    variables: Variables,
    mesh: Mesh,
    heartbeat: Callable[[], None] = lambda: None,
    source: Source | None = None,
) -> dict[str, float | int]:
    """Evaluate the test split.

    The host adds up the sums of all batches in float64 or int64, because float32
    cannot count beyond 16.7 million.

    Args:
      heartbeat: called after every batch.
      source: the test split; None: open the config's test split.

    Returns:
      The metrics of `Task.summarize`; eval/count, the number of evaluated examples; and
      eval/unreadable, the number of unreadable examples. {} without a test split.

    Raises:
      DataError: the loader did not yield every example once, or too many examples are
        unreadable.
    """
    if "test" not in task.data.counts:
        return {}
    totals, counts, records, first = None, np.zeros(2), [], 0
    progress = Progress("eval", task.data.counts["test"], write=console.log)
    source = open_source(config.data, "test") if source is None else source
    batches = inputs.source_batches(config, task, source)
    for batch in prefetch_to_device(batches, mesh):
        *device_sums, rows = eval_step(
            variables, batch, replicate(mesh, np.uint32(first))
        )
        sums, *batch_counts = jax.device_get(device_sums)
        sums = jax.tree.map(_widen, sums)
        totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
        counts += batch_counts
        records.append(task.records(local_rows(rows)) if rows else [])
        first += len(batch["weight"])
        progress.update(len(batch["weight"]))
        heartbeat()
    count, unreadable = map(int, counts)
    expected = task.data.counts["test"]
    if count + unreadable != expected:
        raise DataError(
            f"evaluated {counted(count, 'image')} and could not read {unreadable}; "
            f"expected {expected} in total, the size of the test split"
        )
    check_unreadable(unreadable, expected, config.data, "test")
    records = _merge_records(gather_objects(records))
    values = {}
    if jax.process_index() == 0:
        values = task.summarize(totals, count, records)
    values = gather_objects(values)[0]
    return values | {"eval/count": count, "eval/unreadable": unreadable}


def _widen(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64)


def local_rows(rows: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Fetch this process's part of rows [B, ...], without examples of weight 0."""
    local = {}
    for name, array in rows.items():
        # First row -> shard; replicas of a shard have the same first row.
        shards = {s.index[0].start or 0: s.data for s in array.addressable_shards}
        ordered = [shards[k] for k in sorted(shards)]
        local[name] = np.concatenate(jax.device_get(ordered))
    valid = local.pop("weight") > 0
    return {name: array[valid] for name, array in local.items()}


def _merge_records(records: list[list[list]]) -> list:
    """Flatten records[process][batch][i] in the order of the global batches."""
    return [r for batch in zip(*records, strict=True) for part in batch for r in part]


def is_evaluation_missing(
    config: Any, task: tasks.Task, workdir: Path, step: int, total_steps: int
) -> bool:
    """Return True if the evaluation after a step was due but is not recorded.

    An error in an evaluation ends the run with a checkpoint but without a result.
    Process 0 reads metrics.jsonl for all processes.
    """
    due = step > 0 and due_after(config, step, total_steps)["eval"]
    if not due or "test" not in task.data.counts:
        return False
    recorded = jax.process_index() == 0 and metrics.read_evaluation(workdir, step)
    return not gather_objects(bool(recorded))[0]


def evaluate_checkpoint(
    config: Any,
    workdir: str | Path,
    checkpoint: str = "",
    heartbeat: Callable[[], None] = lambda: None,
) -> dict[str, float | int]:
    """Evaluate the newest checkpoint of a workdir and log the result.

    If the task needs labels, the dataset's classes are matched by name to the classes
    of the checkpoint. The training split need not exist.

    Args:
      checkpoint: any path that `weights.load.read` accepts; "": the workdir.

    Raises:
      CheckpointError: there is no checkpoint.
      ConfigError: the checkpoint contains another model, or a model of other classes.
    """
    pretrained = load.read_for(config.model, checkpoint or workdir)
    warn_of_pixels(pretrained, config)
    needs_labels = tasks.find(config.task).needs_labels
    classes = pretrained.info.get("class_names", ()) if needs_labels else ()
    source = open_source(config.data, "test", classes)
    task = inputs.task_of({"test": source}, config)
    warnings = unmatched_exclusions(config.data, inputs.used_splits(config))
    if classes:
        warnings += classes_without_images(source)
    for warning in warnings:
        console.log(f"warning: {warning}")
    mesh = make_mesh(config.mesh, config.batch_size)
    graphdef, variables = restore(pretrained, task, mesh)
    eval_step = make_eval_step(config, task, graphdef, mesh)
    values = evaluate(config, task, eval_step, variables, mesh, heartbeat, source)
    console.log(console.eval_line(pretrained.label, values))
    return values


def restore(
    pretrained: adapt.Pretrained, task: tasks.Task, mesh: Mesh
) -> tuple[nnx.GraphDef, Variables]:
    """Return (graphdef, variables) of a task's model with pretrained arrays.

    Raises:
      ConfigError: an array is missing or has another shape.
    """
    model = nnx.eval_shape(task.build_model)
    graphdef, params, model_state = split_params(model)
    arrays = adapt.adapt(pretrained, model)
    shapes = {"params": params, "model_state": model_state}

    def put(path, sharding):
        name = leaf_name(path[1:])
        if name not in arrays:
            raise ConfigError(f"{pretrained.path} has no {name} that fits this config")
        return jax.device_put(arrays[name], sharding)

    shardings = state_shardings(mesh, shapes)
    variables = jax.tree_util.tree_map_with_path(put, shardings)
    return graphdef, variables | {"frozen": put_frozen(task, mesh)}


def put_frozen(task: tasks.Task, mesh: Mesh) -> Any:
    """Place the frozen arrays of a task on the mesh, sharded."""
    frozen = task.frozen()
    return jax.device_put(frozen, state_shardings(mesh, frozen))


def make_panels(
    config: Any, task: tasks.Task, graphdef: nnx.GraphDef, mesh: Mesh
) -> Callable:
    """Return a function from variables to the NumPy arrays of `task.panels`.

    The arrays are computed from `inputs.some_test_examples`. Every call uses the same
    PRNG keys. Images are read only if the task overrides `panels`.
    """
    if type(task).panels is tasks.Task.panels:
        return lambda variables: {}
    batch = inputs.some_test_examples(config, NUM_FIGURE_IMAGES)
    count = len(batch["weight"])
    batch = {name: replicate(mesh, array) for name, array in batch.items()}

    @jax.jit
    def panels(variables, batch):
        model = nnx.merge(graphdef, variables["params"], variables["model_state"])
        keys = rng.step_keys(config.seed, "eval", jnp.uint32(0), count)
        return task.panels(model, variables["frozen"], batch, keys)

    panels = with_compilation_log(panels, "the figures")
    return lambda variables: jax.device_get(panels(variables, batch))
