"""Nearest neighbors: how well an encoder's features tell classes apart, untrained."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from hivit_jax import inputs
from hivit_jax.data.prefetch import to_devices
from hivit_jax.distributed.sharding import make_mesh, state_shardings
from hivit_jax.tasks.base import topk_correct
from hivit_jax.tree import split_state
from hivit_jax.weights import adapt, load


def nearest_neighbours(
    config: Any,
    neighbours: int = 20,
    temperature: float = 0.07,
    heartbeat: Callable[[], None] = lambda: None,
) -> dict[str, float | int]:
    """Classifies the test split by the nearest training images; trains nothing.

    Features are the mean of the last tokens of the encoder in `config.init_from`, of
    length 1; a neighbour votes with ``exp(cosine / temperature)``, as DINO's
    ``eval_knn.py`` has it.

    Args:
      heartbeat: called after every batch.

    Returns:
      knn/top1 and knn/top5, fractions, and knn/count.

    Raises:
      DataError: more images cannot be read than `data.max_unreadable` allows.
    """
    start = load.read_for(config.model, config.init_from)
    task = inputs.make_task(config)
    model = nnx.eval_shape(task.build_model)
    graphdef = split_state(model)[0]
    mesh = make_mesh(config.mesh, config.batch_size)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def variables():
        _, params, model_state = split_state(task.build_model())
        return {"params": params, "model_state": model_state}

    shardings = state_shardings(mesh, jax.eval_shape(variables))
    drawn = jax.jit(variables, out_shardings=shardings)()
    drawn = adapt.initialize_from(start, model, drawn, fresh=task.fresh)

    @partial(jax.jit, out_shardings=everywhere)
    def encode(variables, batch):
        model = nnx.merge(graphdef, *variables.values())
        features = model.encoded(task.preprocess(batch))
        length = jnp.linalg.norm(features, axis=-1, keepdims=True)
        return features / length, batch["label"], batch["weight"], batch["unreadable"]

    def encoded(split):
        batches = to_devices(inputs.eval_batches(config, split), mesh)
        parts = []
        for batch in batches:
            parts.append(jax.device_get(encode(drawn, batch)))
            heartbeat()
        features, labels, weight, unreadable = map(
            np.concatenate, zip(*parts, strict=True)
        )
        inputs.check_unreadable(unreadable.sum(), 0, config.data, split)
        return features[weight > 0], labels[weight > 0]

    @jax.jit
    def classify(queries, keys, labels):
        cosine, found = jax.lax.top_k(queries @ keys.T, min(neighbours, len(keys)))
        votes = jax.nn.one_hot(labels[found], config.model.num_classes)
        return (jnp.exp(cosine / temperature)[..., None] * votes).sum(1)

    keys, labels = jax.device_put(encoded("train"))
    queries, true = encoded("test")
    chunks = [
        topk_correct(classify(queries[i : i + 256], keys, labels), true[i : i + 256])
        for i in range(0, len(queries), 256)
    ]
    means = {
        f"knn/{name}": float(np.concatenate([chunk[name] for chunk in chunks]).mean())
        for name in chunks[0]
    }
    return means | {"knn/count": len(queries)}
