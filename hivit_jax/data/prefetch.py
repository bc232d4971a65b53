"""Batches on the host -> arrays on the devices, ahead of their use."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from hivit_jax.distributed.sharding import BATCH


def to_devices(
    batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh, ahead: int = 2
) -> Iterator[dict[str, jax.Array]]:
    """This process's shares of the batches -> global arrays, `ahead` of their use."""
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
