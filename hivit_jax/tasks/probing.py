"""Features of a pretrained encoder, and their k-nearest-neighbor classification."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hivit_jax import inputs
from hivit_jax.data.notes import unmatched_exclusions
from hivit_jax.data.prefetch import prefetch_to_device
from hivit_jax.data.sources.registry import open_source
from hivit_jax.data.sources.relabel import require_labels
from hivit_jax.data.unreadable import check_unreadable
from hivit_jax.distributed.sharding import BATCH, make_mesh, on_mesh, state_shardings
from hivit_jax.errors import ConfigError
from hivit_jax.initial import check_initial
from hivit_jax.progress import Progress, counted
from hivit_jax.reporting.console import log
from hivit_jax.tasks.base import Task
from hivit_jax.tasks.metrics import topk_correct
from hivit_jax.tree import split_params
from hivit_jax.weights import adapt, load
from hivit_jax.xla.compile import with_compilation_log

CHUNK_SIZE = 256  # maximum number of test images that are classified at a time


def nearest_neighbors(
    config: Any,
    neighbors: int = 20,
    temperature: float = 0.07,
    heartbeat: Callable[[], None] = lambda: None,
) -> dict[str, float | int]:
    """Classify each test image by its nearest training images, and log the accuracy.

    The features of an image are the tokens of the last stage of the encoder in
    `config.init_from`, averaged over the units and divided by their norm. A neighbor
    votes for its class with weight ``exp(cosine / temperature)``, as in DINO's
    ``eval_knn.py``.

    Args:
      neighbors: number of neighbors that vote.
      heartbeat: called after every encoded batch.

    Returns:
      Fractions knn/top1 and, with at least `MIN_TOP5_CLASSES` classes, knn/top5; and
      knn/count, the number of readable test images.

    Raises:
      DataError: more images are unreadable than `data.max_unreadable` allows.
    """
    config, mesh = fit_to_devices(config)
    task = inputs.make_task(config, "train", "test")
    encode = make_encoder(config, task, mesh, normalize=True)
    num_classes = max(len(task.data.classes), config.model.get("num_classes") or 0)

    @jax.jit
    def correct_by_neighbors(features, labels, train_features, train_labels):
        cosine, indices = jax.lax.top_k(
            features @ train_features.T, min(neighbors, len(train_features))
        )
        votes = jax.nn.one_hot(train_labels[indices], num_classes)
        scores = (jnp.exp(cosine / temperature)[..., None] * votes).sum(1)
        return topk_correct(scores, labels)

    train, (features, labels) = (
        encode_split(config, encode, mesh, split, heartbeat)
        for split in ("train", "test")
    )
    train_set = jax.device_put(train)
    count = len(features)
    chunks, progress = [], Progress("nearest neighbors", count, write=log)
    for i in range(0, count, CHUNK_SIZE):
        part = jax.device_put(
            (features[i : i + CHUNK_SIZE], labels[i : i + CHUNK_SIZE])
        )
        chunks.append(jax.device_get(correct_by_neighbors(*part, *train_set)))
        progress.update(len(part[1]))
    accuracies = {
        name: float(np.concatenate([chunk[name] for chunk in chunks]).mean())
        for name in chunks[0]
    }
    text = "  ".join(f"{name} {value:.2%}" for name, value in accuracies.items())
    log(f"nearest neighbors  {text}  ({counted(count, 'image')})")
    values = {f"knn/{name}": value for name, value in accuracies.items()}
    return values | {"knn/count": count}


def fit_to_devices(config: Any) -> tuple[Any, Mesh]:
    """Return the config with a batch size that its mesh can split, and the mesh.

    The batch size is rounded up, because it has no effect on the result of a probe.
    """
    # `make_mesh` rejects a batch size that its mesh cannot split, but rounding up the
    # batch size requires the mesh. `make_mesh` therefore receives a multiple of the
    # number of devices, which every valid mesh can split.
    mesh = make_mesh(config.mesh, config.batch_size * jax.device_count())
    num_shards = math.prod(mesh.shape[axis] for axis in BATCH[0])
    config = config.copy_and_resolve_references()
    config.batch_size = -(-config.batch_size // num_shards) * num_shards
    return config, mesh


def encode_split(
    config: Any,
    encode: Callable,
    mesh: Mesh,
    split: str,
    heartbeat: Callable[[], None],
) -> tuple[np.ndarray, np.ndarray]:
    """Encode every readable image of a split once: features [n, E] and labels [n].

    Args:
      encode: result of `make_encoder`.
      heartbeat: called after every encoded batch.

    Raises:
      DataError: more images are unreadable than `data.max_unreadable` allows.
    """
    parts = []
    size = len(open_source(config.data, split))
    progress = Progress(f"features of the {split} split", size, write=log)
    for batch in prefetch_to_device(inputs.eval_batches(config, split), mesh):
        parts.append(jax.device_get(encode(batch)))
        progress.update(len(batch["weight"]))
        heartbeat()
    columns = map(np.concatenate, zip(*parts, strict=True))
    features, labels, weight, unreadable = columns
    check_unreadable(int(unreadable.sum()), size, config.data, split)
    return features[weight > 0], labels[weight > 0]


def make_encoder(config: Any, task: Task, mesh: Mesh, normalize: bool) -> Callable:
    """Return a function from a batch to (features, labels, weights, unreadable).

    Features are float32 [B, E]. The other arrays, [B], are those of the batch. All
    arrays are replicated.

    Args:
      normalize: divide the features of each image by their L2 norm.

    Raises:
      ConfigError: the images have no labels, or `data.multi_label` is set.
    """
    if config.data.multi_label:
        raise ConfigError(
            "data.multi_label=True: the modes knn and probe expect one label per image"
        )
    require_labels(config.data, open_source(config.data, "train"))
    for warning in unmatched_exclusions(config.data, inputs.used_splits(config)):
        log(f"warning: {warning}")
    pretrained = load.read_for(config.model, config.init_from)
    check_initial(pretrained, config)
    model = nnx.eval_shape(task.build_model)
    graphdef = split_params(model)[0]

    def init_variables():
        _, params, model_state = split_params(task.build_model())
        return {"params": params, "model_state": model_state}

    shardings = state_shardings(mesh, jax.eval_shape(init_variables))
    variables = jax.jit(init_variables, out_shardings=shardings)()
    variables = adapt.initialize_from(pretrained, model, variables, fresh=task.fresh)

    @partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def encode(variables, batch):
        model = nnx.merge(graphdef, *variables.values())
        tokens = model.encoder(task.preprocess(batch))[-1]
        if num_class_tokens := model.config.class_tokens:
            tokens = tokens[:, num_class_tokens:]  # [B, N, E]
        features = tokens.astype(jnp.float32).mean(1)
        if normalize:
            features /= jnp.linalg.norm(features, axis=-1, keepdims=True)
        return features, batch["label"], batch["weight"], batch["unreadable"]

    return partial(
        with_compilation_log(on_mesh(mesh, encode), "the encoder"), variables
    )
