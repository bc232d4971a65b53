"""Prefetching of batches from the host to the devices."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from hivit_jax.distributed.sharding import BATCH
from hivit_jax.errors import DataError


def prefetch_to_device(
    batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh, ahead: int = 2
) -> Iterator[dict[str, jax.Array]]:
    """Yield batches as global arrays that are sharded over the mesh.

    Args:
      batches: this process's part of each batch.
      ahead: number of later batches whose transfer starts before a batch is yielded.
    """
    sharding, queue = NamedSharding(mesh, BATCH), deque()
    for batch in batches:
        queue.append(
            {
                key: jax.make_array_from_process_local_data(sharding, array)
                for key, array in batch.items()
            }
        )
        if len(queue) > ahead:
            yield queue.popleft()
    yield from queue


def defer_error(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches; yield a DataError as the last element instead of raising it.

    The caller can then log and evaluate the last computed step before
    `batch_or_raise` raises the error of the next batch.
    """
    try:
        yield from batches
    except DataError as error:
        yield error


def batch_or_raise(batch: Any) -> Any:
    """Return a batch, or raise the error that `defer_error` yielded in its place."""
    if isinstance(batch, DataError):
        raise batch
    return batch
