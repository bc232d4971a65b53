"""Create the task and the batches that a config describes."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from hivit_jax import tasks
from hivit_jax.data import order, tf_data
from hivit_jax.data.balance import BalancedOrder, check_balance
from hivit_jax.data.loader import (
    Batch,
    Loader,
    available_cores,
    local_positions,
    synthetic_batches,
)
from hivit_jax.data.notes import dataset_warnings, split_notes
from hivit_jax.data.sources.base import DatasetInfo, Source
from hivit_jax.data.sources.registry import open_source, published_info
from hivit_jax.data.sources.relabel import require_labels
from hivit_jax.data.sources.splits import NO_EVALUATION
from hivit_jax.data.tf_data import Plan
from hivit_jax.data.transforms import Transform
from hivit_jax.data.unreadable import unreadable_hint
from hivit_jax.errors import UNAVAILABLE, ConfigError, DataError
from hivit_jax.keys import INT_MAX

NUM_CHECKED = 8  # examples of each split that are read before the first step


def make_task(config: Any, *splits: str) -> tasks.Task:
    """Create the task of a config for its dataset.

    Args:
      splits: splits to open, "train" or "test"; default: `used_splits`.

    Raises:
      HivitError: the config is invalid or the dataset cannot be read.
    """
    splits = splits or used_splits(config)
    return task_of({split: open_source(config.data, split) for split in splits}, config)


def task_of(sources: Mapping[str, Source], config: Any) -> tasks.Task:
    """Create the task of a config for opened splits; see `make_task`."""
    first_split, source = next(iter(sources.items()))
    for split, opened in sources.items():
        if not len(opened):
            raise DataError(
                f"the {split} split of {config.data.name} is empty; expected at least "
                "one image"
            )
        if [*opened.classes] != [*source.classes]:
            raise DataError(
                f"{config.data.name}: expected the same classes in both splits, found "
                f"{len(source.classes)} in {first_split} and {len(opened.classes)} in "
                f"{split}, with different names or order"
            )
    if tasks.find(config.task).needs_labels:
        require_labels(config.data, source)
    classes = source.classes
    if not source.encoded:  # a synthetic dataset has as many classes as the model
        classes = map(str, range(config.model.get("num_classes") or 1))
    counts = {split: len(source) for split, source in sources.items()}
    class_counts = sources["train"].class_counts() if "train" in sources else ()
    if config.data.balance and "train" in sources:
        check_balance(class_counts, config.data)
    info = DatasetInfo(counts, tuple(classes), source.encoded, class_counts)
    return tasks.create(config, info)


def used_splits(config: Any) -> tuple[str, ...]:
    """Return ("train", "test"), or ("train",) if `data.eval_split` is "none"."""
    has_evaluation = config.data.eval_split != NO_EVALUATION
    return ("train", "test") if has_evaluation else ("train",)


def task_of_recipe(config: Any) -> tasks.Task:
    """Create the task of a config from the training split only; see `make_task`.

    If the dataset cannot be read, uses its published sizes and classes, if known. A
    recipe for ImageNet therefore works without the files of ImageNet.
    """
    try:
        return make_task(config, "train")
    except UNAVAILABLE:
        info = published_info(config.data)
        if info is None:
            raise
        return tasks.create(config, info)


def images_per_epoch(config: Any, task: tasks.Task) -> int:
    """Return the number of images in an epoch of training.

    With several buckets, the number includes the padding of each bucket's last batch.
    """
    transform = task.transform(train=True)
    if len(transform.shapes) == 1:
        return task.data.counts["train"]
    buckets = _buckets(config, transform, open_source(config.data, "train"))
    return order.steps_per_epoch(buckets, transform.batch_size) * transform.batch_size


def count_steps(config: Any, images_per_epoch: float) -> tuple[float, int]:
    """Return (steps per epoch, total steps).

    The key `total_steps` takes precedence over `total_epochs`.
    """
    steps_per_epoch = images_per_epoch / config.batch_size
    total_steps = config.total_steps or round(config.total_epochs * steps_per_epoch)
    if not 1 <= total_steps <= INT_MAX:
        raise ConfigError(
            f"total_steps={config.total_steps}, total_epochs={config.total_epochs}; "
            f"expected 1 to {INT_MAX:,} steps, found {total_steps:,}"
        )
    return steps_per_epoch, total_steps


def train_batches(config: Any, first_step: int, last_step: int) -> Iterator[Batch]:
    """Iterate over the training batches of steps first_step to last_step - 1.

    Yields:
      This process's b examples of a batch: the arrays of the task's transform,
      [b, ...]; "index" int32 [b]; "weight" float32 [b], 1 for valid examples;
      "unreadable" float32 [b], 1 for examples that could not be read.

    Raises:
      HivitError: as in `make_task`.
    """
    return _load(config, *_plan_training(config, first_step, last_step))


def tf_dataset(config: Any, first_step: int, last_step: int) -> Any:
    """Return a `tf.data.Dataset` of the same batches as `train_batches`.

    Ignores `data.reader`. If an error ends the iteration, tensorflow raises a
    `tf.errors.OpError` that contains the message of the error.

    Raises:
      HivitError: as in `make_task`; or tensorflow is not installed, or the dataset is
        synthetic.
    """
    task, transform, source, plan = _plan_training(config, first_step, last_step)
    if not source.encoded:
        raise ConfigError(
            f"data.name={config.data.name!r}: expected a dataset of files; use "
            "train_batches for synthetic batches"
        )
    return _tf_reader(config, transform, source, plan).dataset()


def _plan_training(
    config: Any, first_step: int, last_step: int
) -> tuple[tasks.Task, Transform, Source, Plan]:
    """Return task, transform, source and plan of a range of training steps."""
    task, source = make_task(config, "train"), open_source(config.data, "train")
    transform = task.transform(train=True)
    batch_size = transform.batch_size
    positions = local_positions(batch_size)
    arguments = config.seed, batch_size, positions, first_step, last_step
    if len(transform.shapes) == 1:
        plan = partial(order.train_plan, len(source), *arguments)
        if config.data.balance:
            balanced = BalancedOrder(source.labels, config.data.balance, config.seed)
            plan = partial(plan, find=balanced.samples_at)
    elif config.data.balance:
        raise ConfigError("data.balance: expected 0 for images in several buckets")
    else:
        buckets = _buckets(config, transform, source)
        plan = partial(order.bucketed_plan, buckets, *arguments)
    return task, transform, source, plan


def eval_batches(config: Any, split: str = "test") -> Iterator[Batch]:
    """Iterate once over the examples of a split; see `source_batches`."""
    task, source = make_task(config, split), open_source(config.data, split)
    return source_batches(config, task, source)


def source_batches(
    config: Any,
    task: tasks.Task,
    source: Source,
    transform: Transform | None = None,
) -> Iterator[Batch]:
    """Iterate once over the examples of a source, transformed for evaluation.

    The examples of each bucket are in the order of the source.

    Args:
      transform: replaces the task's transform for evaluation.

    Yields:
      Batches as in `train_batches`. The last batch of each bucket is padded with
      examples of weight 0.
    """
    transform = transform or task.transform(train=False)
    buckets, batch_size = _buckets(config, transform, source), transform.batch_size
    positions = local_positions(batch_size)
    plan = partial(order.eval_plan, buckets, batch_size, positions)
    return _load(config, task, transform, source, plan)


def some_test_examples(config: Any, count: int) -> Batch:
    """Return up to `count` test examples, evenly spaced among those of one bucket.

    Every process returns the same batch. Without evaluation in the config, these are
    training examples, transformed for evaluation.
    """
    split = used_splits(config)[-1]
    task, source = make_task(config, split), open_source(config.data, split)
    transform = task.transform(train=False)
    buckets = _buckets(config, transform, source)
    candidates = np.flatnonzero(buckets == buckets[0])
    count = min(count, len(candidates))
    indices = candidates[np.linspace(0, len(candidates) - 1, count, dtype=np.int64)]
    batches = [order.PlannedBatch(int(buckets[0]), indices, np.zeros_like(indices))]
    return next(_load(config, task, transform, source, lambda: batches, len(indices)))


def check_splits(config: Any, task: tasks.Task) -> list[str]:
    """Read a few evenly spaced examples of each split.

    Uses the training transform for "train" and the evaluation transform for "test".

    Returns:
      Lines about ignored, reduced or missing data.

    Raises:
      DataError: none of a split's checked examples can be read, or one of them
        contradicts the config.
    """
    if config.data.reader == tf_data.READER:
        tf_data.tensorflow()  # raises MissingPackage before the run starts
    notes = dataset_warnings(config.data, used_splits(config), task.needs_labels)
    for split in used_splits(config):
        source = open_source(config.data, split)
        transform = task.transform(train=split == "train")
        if not source.encoded:
            continue
        indices = np.unique(np.linspace(0, len(source) - 1, NUM_CHECKED, dtype=int))
        buckets, readable = _buckets(config, transform, source)[indices], 0
        loader = Loader(source, transform, config.seed, NUM_CHECKED)
        for bucket in np.unique(buckets).tolist():
            part = indices[buckets == bucket]
            batch = loader.empty_batch(bucket, len(part))
            loader.fill(batch, bucket, 0, part, np.zeros_like(part))
            readable += batch["weight"].sum()
        notes += split_notes(source, indices, split, config.data.dtype)
        if not readable:
            raise DataError(
                f"the {split} split of {config.data.name} has no readable image among "
                f"the {len(indices)} checked\n{unreadable_hint(config.data, source)}"
            )
    return notes


def _buckets(config: Any, transform: Transform, source: Source) -> np.ndarray:
    """Return the bucket of each example of a source, int64 [n]."""
    if len(transform.shapes) == 1:
        return np.zeros(len(source), np.int64)
    threads = config.data.workers or available_cores()
    return order.assign_buckets(len(source), source.size, transform.bucket, threads)


def _load(
    config: Any,
    task: tasks.Task,
    transform: Transform,
    source: Source,
    plan: Plan,
    local_size: int = 0,
) -> Iterator[Batch]:
    """Load the batches of a plan with the reader that the config selects.

    Args:
      local_size: examples per batch on this process; 0: this process's share of the
        batch size.
    """
    local_size = local_size or len(local_positions(transform.batch_size))
    if not source.encoded:
        num_classes = len(task.data.classes)
        return synthetic_batches(
            transform, plan(), config.seed, local_size, num_classes
        )
    if config.data.reader == tf_data.READER:
        return _tf_reader(config, transform, source, plan, local_size).batches()
    loader = Loader(source, transform, config.seed, local_size, config.data.workers)
    return loader.batches(plan())


def _tf_reader(
    config: Any, transform: Transform, source: Source, plan: Plan, local_size: int = 0
) -> tf_data.TfReader:
    local_size = local_size or len(local_positions(transform.batch_size))
    options = config.seed, local_size, config.data.workers
    return tf_data.TfReader(source, transform, *options, plan)
