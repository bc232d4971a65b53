"""Order and batches: which image stands at which position of a run.

Position ``p = step * batch_size + place`` holds image
``permutation(seed, epoch)[p % n]`` with ``epoch = p // n``. So a run can start at any
step, on any number of hosts, and see what it would have seen; nothing but the step
needs saving.
"""

import itertools
from collections.abc import Iterator
from functools import lru_cache
from types import ModuleType
from typing import Any

import jax
import numpy as np

from hivit_jax.data import transforms
from hivit_jax.data.sources import Source, num_examples, open_source
from hivit_jax.errors import ConfigError

Batch = dict[str, np.ndarray]


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """Order of the n images in an epoch, int64 [n].

    RandomState's streams are frozen, so the order outlives numpy versions.
    """
    bits = np.random.MT19937(np.random.SeedSequence([seed, epoch]))
    return np.random.RandomState(bits).permutation(n)


def samples_at(
    positions: np.ndarray, n: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of a run, int [b] -> (image index [b], epoch [b])."""
    epochs, places = np.divmod(positions, n)
    indices = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = permutation(seed, int(epoch), n)[places[here]]
    return indices, epochs


def local_places(batch_size: int) -> np.ndarray:
    """Places of the global batch that this process fills, int64 [b]."""
    share = batch_size // jax.process_count()
    return np.arange(share) + jax.process_index() * share


def train_batches(config: Any, first_step: int, last_step: int) -> Iterator[Batch]:
    """This process's share of the batches of steps first_step .. last_step-1.

    Yields:
      image uint8 [b, H, W, C], label int32 [b], weight float32 [b] (1: a real image).
    """
    places = local_places(config.batch_size)
    positions = (
        step * config.batch_size + places for step in range(first_step, last_step)
    )
    n = num_examples(config.data, "train")
    plan = ((*samples_at(p, n, config.seed), np.ones(len(p))) for p in positions)
    return _batches(config, "train", plan)


def eval_batches(config: Any) -> Iterator[Batch]:
    """Batches, as in `train_batches`, that hold every image of the test split once.

    The last one is filled up with copies of image 0 of weight 0.
    """
    n = num_examples(config.data, "test")
    places = local_places(config.batch_size)
    starts = range(0, n, config.batch_size)

    def fill(positions):
        real = positions < n
        return np.where(real, positions, 0), np.zeros_like(positions), real

    return _batches(config, "test", (fill(start + places) for start in starts))


def first_test_images(config: Any, count: int) -> Batch:
    """The first `count` images of the test split, the same on every process."""
    count = min(count, num_examples(config.data, "test"))
    indices = np.arange(count)
    plan = iter([(indices, np.zeros_like(indices), np.ones(count))])
    return next(_batches(config, "test", plan))


def _batches(config: Any, split: str, plan: Iterator) -> Iterator[Batch]:
    """Batches for a plan of (image index, epoch, weight), each [b], one a step."""
    plan = ((index, epoch, weight.astype(np.float32)) for index, epoch, weight in plan)
    if config.data.name == "synthetic":
        return _synthetic_batches(config, plan)
    return _decoded_batches(config, split, open_source(config.data, split), plan)


def image_shape(config: Any) -> tuple[int, int, int]:
    """(height, width, channels) that the model wants."""
    size = config.model.image_size
    sides = (size, size) if isinstance(size, int) else tuple(size)
    return (*sides, config.model.in_channels)


def _synthetic_batches(config: Any, plan: Iterator) -> Iterator[Batch]:
    """Noise images, for benchmarks: costs a copy, needs no tensorflow."""
    shape = image_shape(config)
    pool = np.random.default_rng(config.seed).integers(
        0, 256, (64, *shape), dtype=np.uint8
    )
    classes = config.model.get("num_classes") or 1
    for indices, _, weight in plan:
        yield {
            "image": pool[indices % len(pool)],
            "label": (indices % classes).astype(np.int32),
            "weight": weight,
        }


def _tensorflow() -> ModuleType:
    """tensorflow, kept off the GPUs; takes many seconds the first time."""
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    return tf


def _decoded_batches(
    config: Any, split: str, source: Source, plan: Iterator
) -> Iterator[Batch]:
    tf = _tensorflow()
    *size, channels = image_shape(config)
    classes = config.model.get("num_classes")
    if classes and source.labels.max() >= classes:
        raise ConfigError(
            f"model.num_classes={classes}, but {config.data.name} has labels up to "
            f"{source.labels.max()}"
        )
    crop = split == "train" and tuple(config.data.crop_scale) != (1.0, 1.0)

    def fetch(indices):
        return np.array(source.fetch(indices), object), source.labels[indices]

    def read(indices, epochs, weights):
        encoded, labels = tf.numpy_function(fetch, [indices], [tf.string, tf.int32])
        return tf.data.Dataset.from_tensor_slices(
            (encoded, labels, indices, epochs, weights)
        )

    def decode(encoded, label, index, epoch, weight):
        image = transforms.decode(encoded, channels)
        if crop:
            seed = tf.random.experimental.stateless_fold_in([config.seed, epoch], index)
            image = transforms.random_resized_crop(
                image, size, config.data.crop_scale, seed
            )
        else:
            image = transforms.resize(image, size)
        return {"image": image, "label": label, "weight": weight}

    first = next(plan)  # tells how many images a batch has
    plan = itertools.chain([first], plan)
    size_of_batch = len(first[0])
    spec = [tf.TensorSpec([size_of_batch], t) for t in (tf.int64, tf.int64, tf.float32)]
    dataset = (
        tf.data.Dataset.from_generator(lambda: plan, output_signature=tuple(spec))
        .flat_map(read)
        .map(decode, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        .batch(size_of_batch, drop_remainder=True)
        .prefetch(2)
    )
    return dataset.as_numpy_iterator()
