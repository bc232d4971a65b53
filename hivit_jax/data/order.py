"""Plans: the examples of every batch of a run.

The examples of a step are a function of the config, the dataset and the step. A run can
therefore resume at any step and on any number of hosts with the same examples.
Checkpoints contain no state of the loader.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np

from hivit_jax.errors import ProcessDataError


class PlannedBatch(NamedTuple):
    """Examples that one process reads for a batch; indices and epochs are int64 [k].

    With `data.balance`, `epochs` instead contains the serial number, from 0, of each
    use of an example. The loader pads the process's part of the batch with examples of
    weight 0.
    """

    bucket: int
    indices: np.ndarray
    epochs: np.ndarray


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """Return the order of the n examples in an epoch, int64 [n]."""
    return shuffled([seed, epoch], n)


def shuffled(key: Sequence[int], n: int) -> np.ndarray:
    """Return a permutation, int64 [n], that is a function of a list of integers.

    Uses RandomState, because its streams are the same in every version of NumPy.
    """
    bits = np.random.MT19937(np.random.SeedSequence(key))
    return np.random.RandomState(bits).permutation(n)


def samples_at(
    positions: np.ndarray, n: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the examples at positions of the endless sequence of all epochs.

    Returns (example indices [b], epochs [b]).

    Args:
      positions: int [b]; position p is in epoch ``p // n``.
      n: number of examples in an epoch.
    """
    epochs, offsets = np.divmod(positions, n)
    indices = np.empty_like(offsets)
    for epoch in np.unique(epochs):
        selected = epochs == epoch
        indices[selected] = permutation(seed, int(epoch), n)[offsets[selected]]
    return indices, epochs


def train_plan(
    n: int,
    seed: int,
    batch_size: int,
    positions_in_batch: np.ndarray,
    first_step: int,
    end_step: int,
    find: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None,
) -> Iterator[PlannedBatch]:
    """Yield the batches of steps first_step .. end_step-1 of a dataset with one bucket.

    Position i of a batch is position ``step * batch_size + i`` of the run.

    Args:
      n: number of training examples.
      batch_size: size of the global batch.
      positions_in_batch: positions of the batch that this process fills, int [b].
      find: function from positions of the run to (example indices, epochs); None:
        `samples_at`.
    """
    find = find or partial(samples_at, n=n, seed=seed)
    for step in range(first_step, end_step):
        yield PlannedBatch(0, *find(step * batch_size + positions_in_batch))


def bucketed_plan(
    buckets: np.ndarray,
    seed: int,
    batch_size: int,
    positions_in_batch: np.ndarray,
    first_step: int,
    end_step: int,
) -> Iterator[PlannedBatch]:
    """Yield the batches of a range of steps of a dataset with several buckets.

    Each epoch's permutation is split by bucket. The last batch of each bucket may have
    fewer examples. For the other arguments see `train_plan`.

    Args:
      buckets: bucket of every example, int [n].
    """
    per_epoch = steps_per_epoch(buckets, batch_size)
    for epoch in range(first_step // per_epoch, math.ceil(end_step / per_epoch)):
        start = epoch * per_epoch
        order = permutation(seed, epoch, len(buckets))
        batches = split_by_bucket(order, buckets, batch_size)
        for bucket, indices in batches[max(first_step - start, 0) : end_step - start]:
            local = indices[positions_in_batch[positions_in_batch < len(indices)]]
            yield PlannedBatch(bucket, local, np.full_like(local, epoch))


def steps_per_epoch(buckets: np.ndarray, batch_size: int) -> int:
    """Return the number of steps per epoch of `bucketed_plan`."""
    return int(np.ceil(np.bincount(buckets) / batch_size).sum())


def split_by_bucket(
    order: np.ndarray, buckets: np.ndarray, batch_size: int
) -> list[tuple[int, np.ndarray]]:
    """Split the examples of a dataset into batches (bucket, example indices).

    Batches are sorted by the position of their first example in `order`.

    Args:
      order: example indices, int64 [n].
      buckets: bucket of every example, int [n].
    """
    batches = []
    for bucket in np.unique(buckets):
        positions_in_order = np.flatnonzero(buckets[order] == bucket)
        for start in range(0, len(positions_in_order), batch_size):
            part = positions_in_order[start : start + batch_size]
            batches.append((part[0], int(bucket), order[part]))
    batches.sort(key=lambda batch: batch[0])
    return [(bucket, indices) for _, bucket, indices in batches]


def eval_plan(
    buckets: np.ndarray, batch_size: int, positions_in_batch: np.ndarray
) -> Iterator[PlannedBatch]:
    """Yield batches that contain each example of a split once.

    Each bucket's examples are in order. For the arguments see `bucketed_plan`.
    """
    order = np.arange(len(buckets))
    for bucket, indices in split_by_bucket(order, buckets, batch_size):
        local = indices[positions_in_batch[positions_in_batch < len(indices)]]
        yield PlannedBatch(bucket, local, np.zeros_like(local))


def assign_buckets(
    n: int,
    get_size: Callable[[int], tuple[int, int]],
    get_bucket: Callable[[tuple[int, int]], int],
    threads: int,
) -> np.ndarray:
    """Return the bucket of each example, int64 [n]; 0 if the size cannot be read.

    Args:
      get_size: function from example index to (height, width).
      get_bucket: function from (height, width) to bucket.

    Raises:
      ProcessDataError: from `get_size`, for example because the storage is unreachable.
    """

    def bucket_of(index):
        try:
            size = get_size(index)
        except ProcessDataError:
            raise
        except Exception:  # from a damaged file; the loader reports it later
            return 0
        return get_bucket(size)

    with ThreadPoolExecutor(threads) as pool:
        return np.fromiter(pool.map(bucket_of, range(n)), np.int64, n)
