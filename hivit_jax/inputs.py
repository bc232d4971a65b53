"""Batches of a config: its task's transform, its dataset and the plan of its steps."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from hivit_jax import tasks
from hivit_jax.data import order
from hivit_jax.data.loader import Batch, Loader, cores, local_places, made_up_batches
from hivit_jax.data.sources.base import IMAGENET, DatasetInfo, Source
from hivit_jax.data.sources.registry import num_examples, open_source
from hivit_jax.data.transforms import Transform
from hivit_jax.errors import ConfigError, DataError


def make_task(config: Any, *splits: str) -> tasks.Task:
    """Return the task of a config, for the dataset that the config names.

    Args:
      splits: that are opened; both by default. "train", "test".

    Raises:
      HivitError: a bad config, or a dataset that cannot be read.
    """
    splits = splits or ("train", "test")
    sources = {split: open_source(config.data, split) for split in splits}
    first = sources[splits[0]]
    classes = first.classes
    if not first.encoded:  # a made-up dataset has as many classes as the model
        classes = [
            str(number) for number in range(config.model.get("num_classes") or 1)
        ]
    info = DatasetInfo(
        counts={split: len(source) for split, source in sources.items()},
        classes=tuple(classes),
        encoded=first.encoded,
    )
    return tasks.create(config, info)


def task_of_recipe(config: Any) -> tasks.Task:
    """As `make_task`, for the training split; for ImageNet also where it is not
    available.
    """
    try:
        return make_task(config, "train")
    except DataError:
        if config.data.name != "imagenet2012":
            raise
        return tasks.create(config, IMAGENET)


def epoch_images(config: Any, task: tasks.Task) -> int:
    """Images of an epoch of training; with several buckets, the places that fill up
    their last batches count too.
    """
    transform = task.transform(train=True)
    if len(transform.shapes) == 1:
        return task.data.counts["train"]
    source = open_source(config.data, "train")
    buckets = buckets_of(config, transform, source)
    return order.bucketed_steps(buckets, transform.batch_size) * transform.batch_size


def count_steps(config: Any, images: float) -> tuple[float, int]:
    """(steps per epoch, steps in all) for the images of an epoch; `total_steps` wins
    over `total_epochs`.
    """
    per_epoch = images / config.batch_size
    total = config.total_steps or round(config.total_epochs * per_epoch)
    if total < 1:
        raise ConfigError(
            f"total_steps={config.total_steps}, total_epochs={config.total_epochs}; "
            "expected at least one step"
        )
    return per_epoch, total


def train_batches(config: Any, first_step: int, last_step: int) -> Iterator[Batch]:
    """This process's share of the batches of steps first_step .. last_step-1.

    Yields:
      The arrays of the task's transform, [b, ...]; and index int32 [b], weight float32
      [b] (1: an example that counts), unreadable float32 [b] (1: an example that could
      not be read).

    Raises:
      HivitError: as for `make_task`.
    """
    task, source = make_task(config, "train"), open_source(config.data, "train")
    transform = task.transform(train=True)
    size = transform.batch_size
    steps = config.seed, size, local_places(size), first_step, last_step
    if len(transform.shapes) == 1:
        plan = order.train_plan(len(source), *steps)
    else:
        plan = order.bucketed_plan(buckets_of(config, transform, source), *steps)
    return load(config, task, transform, source, plan)


def eval_batches(config: Any, split: str = "test") -> Iterator[Batch]:
    """Batches, as in `train_batches`, that hold every example of a split once, in order
    and as for evaluation. The last one is filled up with examples of weight 0.
    """
    return every_example(
        config, make_task(config, split), open_source(config.data, split)
    )


def every_example(config: Any, task: tasks.Task, source: Source) -> Iterator[Batch]:
    """As `eval_batches`, of any source."""
    transform = task.transform(train=False)
    buckets, size = buckets_of(config, transform, source), transform.batch_size
    plan = order.eval_plan(buckets, size, local_places(size))
    return load(config, task, transform, source, plan)


def first_test_images(config: Any, count: int) -> Batch:
    """The first `count` examples of the test split that share the bucket of the first
    one, the same on every process.
    """
    task, source = make_task(config, "test"), open_source(config.data, "test")
    transform = task.transform(train=False)
    buckets = buckets_of(config, transform, source)
    indices = np.flatnonzero(buckets == buckets[0])[:count]
    plan = [order.Share(int(buckets[0]), indices, np.zeros_like(indices))]
    return next(load(config, task, transform, source, plan, len(indices)))


def check_unreadable(count: float, seen: float, data: Any, split: str) -> None:
    """DataError if more than `data.max_unreadable` of the images cannot be read.

    Args:
      count: unreadable images so far.
      seen: images so far; a split's size counts where that is more.
    """
    share = count / max(seen, num_examples(data, split))
    if share > data.max_unreadable:
        raise DataError(
            f"{count:.0f} images of {data.name} could not be read, {share:.2%}; "
            f"data.max_unreadable allows {data.max_unreadable:.2%}.\n"
            "python -m hivit_jax.tools.check_data names them all"
        )


def buckets_of(config: Any, transform: Transform, source: Source) -> np.ndarray:
    """Bucket of every example of a source, int64 [n]."""
    if len(transform.shapes) == 1:
        return np.zeros(len(source), np.int64)
    threads = config.data.workers or cores()
    return order.buckets_of(len(source), source.size, transform.bucket, threads)


def load(
    config: Any,
    task: tasks.Task,
    transform: Transform,
    source: Source,
    plan: Iterable[order.Share],
    share: int = 0,
) -> Iterator[Batch]:
    """Batches of a plan.

    Args:
      share: examples of a batch that this process reads; 0: its part of the
        transform's batch.
    """
    share = share or len(local_places(transform.batch_size))
    if not source.encoded:
        classes = len(task.data.classes)
        return made_up_batches(transform, plan, config.seed, share, classes)
    loader = Loader(source, transform, config.seed, share, config.data.workers)
    return loader.batches(plan)
