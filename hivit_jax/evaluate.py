"""Exact evaluation: every image of the test split once, whatever the batch or devices;
and the same held-out images, reconstructed.
"""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hivit_jax import augment, checkpoint, figures, metrics, models, tasks
from hivit_jax.data import pipeline, sources
from hivit_jax.errors import DataError
from hivit_jax.models.positions import unpatchify
from hivit_jax.sharding import make_mesh, placed, state_shardings, to_devices

FIGURE_IMAGES = 6


def make_eval_step(config: Any, graphdef: nnx.GraphDef) -> Callable:
    """Jitted (params, batch, first position) -> sums over the images that could be
    read, their count, and that of the others.
    """

    @jax.jit
    def eval_step(params, batch, first):
        keys = augment.sample_keys(config.seed, "eval", first, config.batch_size)
        model = nnx.merge(graphdef, params)
        values = tasks.TASKS[config.task](model, batch, keys, config, train=False)
        values["count"] = jnp.ones_like(batch["weight"])
        sums = {name: (v * batch["weight"]).sum() for name, v in values.items()}
        return sums | {"unreadable": batch["unreadable"].sum()}

    return eval_step


def evaluate(
    config: Any, eval_step: Callable, params: Any, mesh: Mesh
) -> dict[str, float | int]:
    """Means over the test split: eval/loss, for classifiers eval/top1 and eval/top5 as
    fractions; eval/count, the exact number of images, and eval/unreadable, of those
    that had to be left out.

    Raises:
      DataError: the pipeline did not yield every image once, or too many cannot be
        read.
    """
    totals: dict[str, float] = defaultdict(float)
    for number, batch in enumerate(to_devices(pipeline.eval_batches(config), mesh)):
        first = jnp.uint32(number * config.batch_size)
        for name, value in jax.device_get(eval_step(params, batch, first)).items():
            totals[name] += float(value)
    count, unreadable = totals.pop("count"), totals.pop("unreadable")
    expected = sources.num_examples(config.data, "test")
    if count + unreadable != expected:
        raise DataError(
            f"evaluated {count:.0f} images and could not read {unreadable:.0f}; the "
            f"split has {expected}"
        )
    pipeline.check_unreadable(unreadable, expected, config.data, "test")
    means = {f"eval/{name}": total / count for name, total in totals.items()}
    return means | {"eval/count": int(count), "eval/unreadable": int(unreadable)}


def evaluate_checkpoint(config: Any, workdir: str | Path) -> dict[str, float | int]:
    """Evaluates `config.checkpoint`, or the workdir's newest, and says the result.

    Raises:
      CheckpointError: there is no checkpoint.
      ConfigError: it is of another model.
    """
    path = checkpoint.find(config.checkpoint or workdir)
    graphdef, abstract = models.split(nnx.eval_shape(lambda: tasks.build_model(config)))
    mesh = make_mesh(config.mesh, config.batch_size)
    wanted = placed(abstract, state_shardings(mesh, abstract))
    params = checkpoint.load_params(path, wanted)
    values = evaluate(config, make_eval_step(config, graphdef), params, mesh)
    metrics.say(metrics.eval_line(int(path.name), values))
    return values


def make_reconstruct(config: Any, graphdef: nnx.GraphDef) -> Callable:
    """params -> panels of the first held-out images, always behind the same masks.

    Where the loss is on normalised pixels, predictions are put back with the mean and
    variance of the true unit, which a model that had not seen it could not know.
    """
    batch = pipeline.first_test_images(config, FIGURE_IMAGES)
    count = len(batch["image"])

    @jax.jit
    def reconstruct(params, batch):
        model = nnx.merge(graphdef, params)
        keys = augment.sample_keys(config.seed, "eval", jnp.uint32(0), count)
        out = tasks.reconstruct(model, batch, keys, config, train=False)
        images = tasks.images_of(batch, config)
        _, mean, scale = model.targets(images)
        grid, patch_size = model.encoder.grid, model.encoder.patch_size
        pred = unpatchify(out.pred * scale + mean, grid, patch_size)
        removed = jnp.repeat(out.mask[..., None], patch_size**2, -1)
        return images, pred, unpatchify(removed, grid, patch_size)

    def panels(params: Any) -> np.ndarray:
        arrays = jax.device_get(reconstruct(params, batch))
        return figures.reconstruction_panels(*arrays, config.data.mean, config.data.std)

    return panels
