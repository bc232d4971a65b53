"""Exact evaluation: every image of the test split once, on any number of devices and
in any batch; and panels of the same held-out images.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hivit_jax import augment, metrics, models, pretrained, tasks
from hivit_jax.data import pipeline, sources
from hivit_jax.errors import ConfigError, DataError
from hivit_jax.sharding import make_mesh, state_shardings, to_devices

FIGURE_IMAGES = 6


def make_eval_step(config: Any, task: tasks.Task, graphdef: nnx.GraphDef) -> Callable:
    """Jitted (params, batch, first position) -> the task's sums over the images that
    could be read, by name; their count; and that of the others.
    """

    @jax.jit
    def eval_step(params, batch, first):
        keys = augment.step_keys(config.seed, "eval", first, config.batch_size)
        sums = task.eval_step(nnx.merge(graphdef, params), batch, keys)
        return sums, batch["weight"].sum(), batch["unreadable"].sum()

    return eval_step


def evaluate(
    config: Any,
    task: tasks.Task,
    eval_step: Callable,
    params: Any,
    mesh: Mesh,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, float | int]:
    """The task's metrics of the test split; eval/count, the exact number of images, and
    eval/unreadable, of those that had to be left out.

    Sums of a batch are added up on the host, in float64 or int64, because float32
    stops counting at 16.7 million.

    Args:
      beat: called after every batch.

    Raises:
      DataError: the pipeline did not yield every image once, or too many cannot be
        read.
    """
    totals, counts = None, np.zeros(2)
    for number, batch in enumerate(to_devices(pipeline.eval_batches(config), mesh)):
        first = jnp.uint32(number * config.batch_size)
        sums, *counted = jax.device_get(eval_step(params, batch, first))
        sums = jax.tree.map(_widened, sums)
        totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
        counts += counted
        beat()
    count, unreadable = map(int, counts)
    expected = sources.num_examples(config.data, "test")
    if count + unreadable != expected:
        raise DataError(
            f"evaluated {count} images and could not read {unreadable}; the "
            f"split has {expected}"
        )
    pipeline.check_unreadable(unreadable, expected, config.data, "test")
    return task.summarize(totals, count) | {
        "eval/count": count,
        "eval/unreadable": unreadable,
    }


def _widened(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64)


def evaluate_checkpoint(
    config: Any,
    workdir: str | Path,
    checkpoint: str = "",
    beat: Callable[[], None] = lambda: None,
) -> dict[str, float | int]:
    """Evaluates the workdir's newest checkpoint and logs the result.

    Args:
      checkpoint: evaluated instead; any path that `pretrained.find` reads.

    Raises:
      CheckpointError: there is no checkpoint.
      ConfigError: it is of another model.
    """
    start = pretrained.find_for(config, checkpoint or workdir)
    task = tasks.create(config)
    model = nnx.eval_shape(task.build_model)
    graphdef, abstract = models.split(model)
    arrays = pretrained.fit(start, model)
    for name in models.named_leaves(abstract):
        if name not in arrays:
            raise ConfigError(f"{start.path} has no {name} that fits this config")
    mesh = make_mesh(config.mesh, config.batch_size)
    params = jax.tree_util.tree_map_with_path(
        lambda path, to: jax.device_put(arrays[models.leaf_name(path)], to),
        state_shardings(mesh, abstract),
    )
    eval_step = make_eval_step(config, task, graphdef)
    values = evaluate(config, task, eval_step, params, mesh, beat)
    metrics.say(metrics.eval_line(start.label, values))
    return values


def make_panels(config: Any, task: tasks.Task, graphdef: nnx.GraphDef) -> Callable:
    """params -> the task's panels of the first held-out images, on the host; always
    drawn from the same keys. Reads no images for a task without panels.
    """
    if type(task).panels is tasks.Task.panels:
        return lambda params: {}
    batch = pipeline.first_test_images(config, FIGURE_IMAGES)
    count = len(batch["image"])

    @jax.jit
    def panels(params, batch):
        keys = augment.step_keys(config.seed, "eval", jnp.uint32(0), count)
        return task.panels(nnx.merge(graphdef, params), batch, keys)

    return lambda params: jax.device_get(panels(params, batch))
