"""Exact evaluation: every image of the test split once, whatever the batch or devices;
and the same held-out images, reconstructed.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hivit_jax import (
    augment,
    figures,
    metrics,
    models,
    pretrained,
    tasks,
)
from hivit_jax.data import pipeline, sources
from hivit_jax.errors import ConfigError, DataError
from hivit_jax.sharding import make_mesh, state_shardings, to_devices

FIGURE_IMAGES = 6


def make_eval_step(config: Any, graphdef: nnx.GraphDef) -> Callable:
    """Jitted (params, batch, first position) -> sums over the images that could be
    read, their count, and that of the others.
    """

    @jax.jit
    def eval_step(params, batch, first):
        keys = augment.step_keys(config.seed, "eval", first, config.batch_size)
        model = nnx.merge(graphdef, params)
        values = tasks.TASKS[config.task](model, batch, keys, config, train=False)
        values["count"] = jnp.ones_like(batch["weight"])
        sums = {name: (v * batch["weight"]).sum() for name, v in values.items()}
        return sums | {"unreadable": batch["unreadable"].sum()}

    return eval_step


def evaluate(
    config: Any,
    eval_step: Callable,
    params: Any,
    mesh: Mesh,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, float | int]:
    """Means over the test split: eval/loss, for classifiers eval/top1 and eval/top5 as
    fractions; eval/count, the exact number of images, and eval/unreadable, of those
    that had to be left out.

    Args:
      beat: called after every batch.

    Raises:
      DataError: the pipeline did not yield every image once, or too many cannot be
        read.
    """
    totals: dict[str, float] = defaultdict(float)
    for number, batch in enumerate(to_devices(pipeline.eval_batches(config), mesh)):
        first = jnp.uint32(number * config.batch_size)
        for name, value in jax.device_get(eval_step(params, batch, first)).items():
            totals[name] += float(value)
        beat()
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


def evaluate_checkpoint(
    config: Any, workdir: str | Path, beat: Callable[[], None] = lambda: None
) -> dict[str, float | int]:
    """Evaluates `config.checkpoint`, anything that `pretrained.find` reads, or the
    workdir's newest, and says the result.

    Raises:
      CheckpointError: there is no checkpoint.
      ConfigError: it is of another model.
    """
    start = pretrained.find_for(config, config.checkpoint or workdir)
    model = nnx.eval_shape(lambda: tasks.build_model(config))
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
    values = evaluate(config, make_eval_step(config, graphdef), params, mesh, beat)
    metrics.say(metrics.eval_line(start.label, values))
    return values


def nearest_neighbours(
    config: Any,
    neighbours: int = 20,
    temperature: float = 0.07,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, float | int]:
    """Classifies the test split by the nearest training images; trains nothing.

    Features are the mean of the last tokens of the encoder in `config.init_from`, of
    length 1; a neighbour votes with ``exp(cosine / temperature)``, as DINO's
    ``eval_knn.py`` has it.

    Args:
      beat: called after every batch.

    Returns:
      knn/top1 and knn/top5, fractions, and knn/count.
    """
    start = pretrained.find_for(config, config.init_from)
    model = nnx.eval_shape(lambda: tasks.build_model(config))
    graphdef, abstract = models.split(model)
    mesh = make_mesh(config.mesh, config.batch_size)
    everywhere = NamedSharding(mesh, PartitionSpec())
    draw = jax.jit(
        lambda: models.split(tasks.build_model(config))[1],
        out_shardings=state_shardings(mesh, abstract),
    )
    params = pretrained.start_from(start, config.task, model, draw())

    @partial(jax.jit, out_shardings=everywhere)
    def encode(params, batch):
        features = nnx.merge(graphdef, params).encoded(tasks.images_of(batch, config))
        length = jnp.linalg.norm(features, axis=-1, keepdims=True)
        return features / length, batch["label"], batch["weight"]

    def encoded(split):
        batches = to_devices(pipeline.eval_batches(config, split), mesh)
        parts = []
        for batch in batches:
            parts.append(jax.device_get(encode(params, batch)))
            beat()
        features, labels, weight = map(np.concatenate, zip(*parts, strict=True))
        return features[weight > 0], labels[weight > 0]

    @jax.jit
    def classify(queries, keys, labels):
        cosine, found = jax.lax.top_k(queries @ keys.T, min(neighbours, len(keys)))
        votes = jax.nn.one_hot(labels[found], config.model.num_classes)
        return (jnp.exp(cosine / temperature)[..., None] * votes).sum(1)

    keys, labels = jax.device_put(encoded("train"))
    queries, true = encoded("test")
    chunks = [
        tasks.hits(classify(queries[i : i + 256], keys, labels), true[i : i + 256])
        for i in range(0, len(queries), 256)
    ]
    means = {
        f"knn/{name}": float(np.concatenate([chunk[name] for chunk in chunks]).mean())
        for name in chunks[0]
    }
    return means | {"knn/count": len(queries)}


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
        keys = augment.step_keys(config.seed, "eval", jnp.uint32(0), count)
        out = tasks.reconstruct(model, batch, keys, config)
        images = tasks.images_of(batch, config)
        _, mean, scale = model.targets(images)
        return images, *model.pictures(out, mean, scale)

    def panels(params: Any) -> np.ndarray:
        arrays = jax.device_get(reconstruct(params, batch))
        return figures.reconstruction_panels(*arrays, config.data.mean, config.data.std)

    return panels
