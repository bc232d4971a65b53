"""Plans: which examples stand in each batch of a run.

A plan is a function of (seed, epoch) and, with several buckets, of the sizes of the
files. So a run can start at any step, on any number of hosts, and read what it would
have read; only the step is saved.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Share(NamedTuple):
    """One process's part of a batch of one bucket.

    indices, epochs: int64 [k]; k is smaller than the share where the batch is filled
    up with examples of weight 0.
    """

    bucket: int
    indices: np.ndarray
    epochs: np.ndarray


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """Order of the n examples in an epoch, int64 [n].

    RandomState's streams are frozen, so the order outlives numpy versions.
    """
    bits = np.random.MT19937(np.random.SeedSequence([seed, epoch]))
    return np.random.RandomState(bits).permutation(n)


def samples_at(
    positions: np.ndarray, n: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of a run, int [b] -> (example index [b], epoch [b])."""
    epochs, places = np.divmod(positions, n)
    indices = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = permutation(seed, int(epoch), n)[places[here]]
    return indices, epochs


def train_plan(
    n: int, seed: int, batch_size: int, places: np.ndarray, first: int, last: int
) -> Iterator[Share]:
    """Batches of the steps first .. last-1, in one bucket.

    Position ``p = step * batch_size + place`` holds example
    ``permutation(seed, epoch)[p % n]`` with ``epoch = p // n``.

    Args:
      places: places of the batch that this process fills, int [b].
    """
    for step in range(first, last):
        yield Share(0, *samples_at(step * batch_size + places, n, seed))


def bucketed_plan(
    buckets: np.ndarray,
    seed: int,
    batch_size: int,
    places: np.ndarray,
    first: int,
    last: int,
) -> Iterator[Share]:
    """As `train_plan`, for several buckets: an epoch's permutation is split by bucket,
    and the last batch of each bucket is filled up.

    Args:
      buckets: bucket of every example, int [n].
    """
    per_epoch = bucketed_steps(buckets, batch_size)
    for epoch in range(first // per_epoch, math.ceil(last / per_epoch)):
        start = epoch * per_epoch
        batches = split_by_bucket(
            permutation(seed, epoch, len(buckets)), buckets, batch_size
        )
        for bucket, indices in batches[max(first - start, 0) : last - start]:
            mine = indices[places[places < len(indices)]]
            yield Share(bucket, mine, np.full_like(mine, epoch))


def bucketed_steps(buckets: np.ndarray, batch_size: int) -> int:
    """Steps of an epoch in which the last batch of each bucket is filled up."""
    return int(np.ceil(np.bincount(buckets) / batch_size).sum())


def split_by_bucket(
    order: np.ndarray, buckets: np.ndarray, batch_size: int
) -> list[tuple[int, np.ndarray]]:
    """Batches (bucket, example indices) of examples in an order, int64 [n]. A batch
    comes where its first example stands in the order.
    """
    batches = []
    for bucket in np.unique(buckets):
        positions = np.flatnonzero(buckets[order] == bucket)
        for start in range(0, len(positions), batch_size):
            batch = positions[start : start + batch_size]
            batches.append((batch[0], int(bucket), order[batch]))
    return [(bucket, batch) for _, bucket, batch in sorted(batches, key=lambda b: b[0])]


def eval_plan(
    buckets: np.ndarray, batch_size: int, places: np.ndarray
) -> Iterator[Share]:
    """Every example once, in the order of the split; the last batch of each bucket is
    filled up. Arguments as in `bucketed_plan`.
    """
    for bucket, indices in split_by_bucket(
        np.arange(len(buckets)), buckets, batch_size
    ):
        mine = indices[places[places < len(indices)]]
        yield Share(bucket, mine, np.zeros_like(mine))


def buckets_of(
    n: int, size: Callable[[int], tuple[int, int]], bucket: Callable, threads: int
) -> np.ndarray:
    """Bucket of every example, int [n]; 0 where the size cannot be read.

    Args:
      size: example index -> (height, width).
      bucket: (height, width) -> bucket.
    """

    def one(index):
        try:
            shape = size(index)
        except Exception:  # any error of a damaged file, which decoding reports
            return 0
        return bucket(shape)

    with ThreadPoolExecutor(threads) as pool:
        return np.fromiter(pool.map(one, range(n)), np.int64, n)
