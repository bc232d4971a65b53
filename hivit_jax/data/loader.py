"""Loader that reads planned examples of a source into batches, in threads."""

import math
import mmap
import os
import sys
import weakref
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np

from hivit_jax.data import transforms
from hivit_jax.data.order import PlannedBatch
from hivit_jax.data.shapes import batch_shapes
from hivit_jax.data.sources.base import Source
from hivit_jax.data.storage import StorageError
from hivit_jax.errors import DataError, ProcessDataError

Batch = dict[str, np.ndarray]
IMAGES_PER_JOB = 8  # examples that a thread reads in one job
PREFETCH_BATCHES = 2  # batches that threads fill ahead of the batch in use
MIN_POOLED_BYTES = 2**20  # the memory of arrays of at least this size is reused


class BufferPool:
    """Allocator that reuses the memory of an array after its last view is deleted.

    Without reuse, the operating system zeroes fresh pages for every batch, which can
    take as long as decoding the images.
    """

    def __init__(self):
        self._free: dict[int, list[mmap.mmap]] = defaultdict(list)

    def array(self, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """Return an array with undefined content."""
        size = math.prod(shape) * dtype.itemsize
        if size < MIN_POOLED_BYTES:
            return np.empty(shape, dtype)
        free = self._free[size]
        memory = free.pop() if free else mmap.mmap(-1, size)
        # The finalizer is on this array, because every view keeps this array alive.
        array = np.frombuffer(memory, np.uint8)
        weakref.finalize(array, free.append, memory)
        return array.view(dtype).reshape(shape)


class Loader:
    """Fills batches with the examples of a source. Its methods are thread-safe.

    Args:
      source: one split of a dataset.
      transform: converts each example to arrays.
      seed: seed of the transform's random numbers.
      local_batch_size: examples that this process reads per batch.
      threads: number of reading threads; 0: one per core.
    """

    def __init__(
        self,
        source: Source,
        transform: transforms.Transform,
        seed: int,
        local_batch_size: int,
        threads: int = 0,
    ):
        self.threads = threads or available_cores()
        self._source, self._transform = source, transform
        self._seed, self._local_batch_size = seed, local_batch_size
        self._shapes = batch_shapes(transform)
        self._buffers = BufferPool()

    def batches(self, plan: Iterable[PlannedBatch]) -> Iterator[Batch]:
        """Yield the batches of a plan. Threads fill them before they are needed.

        Threads suffice, because decoding and copying release Python's global
        interpreter lock.
        """
        pool = ThreadPoolExecutor(self.threads, "read")
        queue: deque[tuple[Batch, list[Future]]] = deque()

        def wait_for_first():
            batch, futures = queue.popleft()
            for future in futures:
                future.result()
            return batch

        try:
            for bucket, indices, epochs in plan:
                for index in indices.tolist():
                    self._source.ask(index)
                batch, futures = self.empty_batch(bucket, len(indices)), []
                for first in range(0, len(indices), IMAGES_PER_JOB):
                    part = slice(first, first + IMAGES_PER_JOB)
                    arguments = batch, bucket, first, indices[part], epochs[part]
                    futures.append(pool.submit(self.fill, *arguments))
                queue.append((batch, futures))
                if len(queue) > PREFETCH_BATCHES:
                    yield wait_for_first()
            while queue:
                yield wait_for_first()
        finally:
            pool.shutdown(cancel_futures=True)
            self._source.forget()

    def empty_batch(self, bucket: int, count: int) -> Batch:
        """Return a batch whose examples after the first `count` are padding.

        The arrays of the first `count` examples are undefined until `fill` writes them.
        """
        batch = {}
        for name, struct in self._shapes[bucket].items():
            local_shape = self._local_batch_size, *struct.shape[1:]
            batch[name] = self._buffers.array(local_shape, struct.dtype)
            batch[name][count:] = 0
        batch["index"][count:] = -1
        return batch

    def fill(
        self,
        batch: Batch,
        bucket: int,
        first: int,
        indices: np.ndarray,
        epochs: np.ndarray,
    ) -> None:
        """Read k examples into positions first .. first+k-1 of this process's batch.

        Args:
          indices: example indices, int64 [k].
          epochs: epoch of each example, int64 [k].
        """
        names = self._transform.shapes[bucket]
        examples = zip(indices.tolist(), epochs.tolist(), strict=True)
        for position, (index, epoch) in enumerate(examples, first):
            out = {name: batch[name][position, ...] for name in names}
            readable = self._fill_one(out, index, epoch)
            batch["index"][position] = index
            batch["weight"][position] = readable
            batch["unreadable"][position] = not readable

    def _fill_one(self, out: dict[str, np.ndarray], index: int, epoch: int) -> bool:
        """Read one example into its arrays; return False if it is unreadable."""
        try:
            sample = self._source.sample(index)
            draws = transforms.uniforms(self._seed, epoch, index, self._transform.draws)
            self._transform(sample, draws, out)
        except StorageError:
            raise
        except DataError as error:
            raise ProcessDataError(f"{self._source.name(index)}: {error}") from error
        except Exception as error:  # damaged files cause exceptions of many types
            for array in out.values():
                array[...] = 0
            _log_unreadable(self._source.name(index), error)
            return False
        return True


def synthetic_batches(
    transform: transforms.Transform,
    plan: Iterable[PlannedBatch],
    seed: int,
    local_batch_size: int,
    num_classes: int,
) -> Iterator[Batch]:
    """Yield batches of noise for benchmarks. A batch costs one copy and no reads.

    uint8 arrays contain noise. The transform's other arrays contain
    ``index % num_classes``.

    Args:
      local_batch_size: examples of a batch on this process.
    """
    rng = np.random.default_rng(seed)
    num_noise = 64  # different examples of noise per bucket
    noise = [
        {
            name: rng.integers(0, 256, (num_noise, *struct.shape[1:]), np.uint8)
            for name, struct in shapes.items()
            if struct.dtype == np.uint8
        }
        for shapes in batch_shapes(transform)
    ]
    for bucket, indices, _ in plan:
        is_real = np.arange(local_batch_size) < len(indices)
        indices = np.pad(indices, (0, local_batch_size - len(indices)))
        batch = {}
        for name, struct in transform.shapes[bucket].items():
            if name in noise[bucket]:
                batch[name] = noise[bucket][name][indices % num_noise]
            else:
                values = (indices % num_classes).reshape(-1, *[1] * len(struct.shape))
                values = np.broadcast_to(values, (local_batch_size, *struct.shape))
                batch[name] = values.astype(struct.dtype)
        yield batch | {
            "index": np.where(is_real, indices, -1).astype(np.int32),
            "weight": is_real.astype(np.float32),
            "unreadable": np.zeros(local_batch_size, np.float32),
        }


def local_positions(batch_size: int) -> np.ndarray:
    """Return the positions of the global batch that this process fills, int64 [b]."""
    local_batch_size = batch_size // jax.process_count()
    return np.arange(local_batch_size) + jax.process_index() * local_batch_size


_logged: set[str] = set()


def _log_unreadable(name: str, error: Exception) -> None:
    """Log an unreadable example to stderr; each process logs it only once."""
    if name not in _logged:
        _logged.add(name)
        reason = f"{type(error).__name__}: {error}"
        print(f"cannot read {name}: {reason}; skipped", file=sys.stderr, flush=True)


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
