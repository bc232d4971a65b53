"""The loader: threads that fill batches with the examples of a source, as planned."""

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
from hivit_jax.data.order import Share
from hivit_jax.data.shapes import batch_shapes
from hivit_jax.data.sources.base import Source
from hivit_jax.errors import DataError, LocalDataError

Batch = dict[str, np.ndarray]
IMAGES_PER_JOB = 8  # examples that a thread takes at a time
PREFETCH_BATCHES = 2  # batches in work beside the one that is waited for
REUSED = 2**20  # bytes from which an array's memory is used again


class Memory:
    """Memory for arrays, used again when the last view of an array is gone.

    For the system, clearing fresh pages takes up to as long as decoding what is to
    stand in them.
    """

    def __init__(self):
        self._free: dict[int, list[mmap.mmap]] = defaultdict(list)

    def array(self, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """Array with undefined content."""
        size = math.prod(shape) * dtype.itemsize
        if size < REUSED:
            return np.empty(shape, dtype)
        free = self._free[size]
        memory = free.pop() if free else mmap.mmap(-1, size)
        # Every view of this array, and of its views, keeps this very object alive.
        array = np.frombuffer(memory, np.uint8)
        weakref.finalize(array, free.append, memory)
        return array.view(dtype).reshape(shape)


class Loader:
    """Fills batches with the examples of a source. Its methods may run in many threads.

    Args:
      source: of one split.
      transform: of its examples.
      seed: of the transform's draws.
      share: examples of a batch that this process reads.
      threads: that read; 0: one for each core.
    """

    def __init__(
        self,
        source: Source,
        transform: transforms.Transform,
        seed: int,
        share: int,
        threads: int = 0,
    ):
        self.threads = threads or cores()
        self._source, self._transform = source, transform
        self._seed, self._share = seed, share
        self._shapes = batch_shapes(transform)
        self._memory = Memory()

    def batches(self, plan: Iterable[Share]) -> Iterator[Batch]:
        """Batches of a plan. Threads read, because decoding and copying release the
        interpreter's lock.
        """
        pool = ThreadPoolExecutor(self.threads, "read")
        queue: deque[tuple[Batch, list[Future]]] = deque()

        def finished():
            batch, jobs = queue.popleft()
            for job in jobs:
                job.result()
            return batch

        try:
            for bucket, indices, epochs in plan:
                for index in indices.tolist():
                    self._source.ask(index)
                batch, jobs = self.blank(bucket, len(indices)), []
                for first in range(0, len(indices), IMAGES_PER_JOB):
                    part = slice(first, first + IMAGES_PER_JOB)
                    job = batch, bucket, first, indices[part], epochs[part]
                    jobs.append(pool.submit(self.fill, *job))
                queue.append((batch, jobs))
                if len(queue) > PREFETCH_BATCHES:
                    yield finished()
            while queue:
                yield finished()
        finally:
            pool.shutdown(cancel_futures=True)

    def blank(self, bucket: int, count: int) -> Batch:
        """A batch of weight 0, whose first `count` examples are to be filled."""
        batch = {}
        for name, one in self._shapes[bucket].items():
            array = self._memory.array((self._share, *one.shape[1:]), one.dtype)
            array[count:] = 0
            batch[name] = array
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
        """Read examples, int64 [k], of epochs [k] into places first .. first+k-1."""
        names = self._transform.shapes[bucket]
        examples = zip(indices.tolist(), epochs.tolist(), strict=True)
        for place, (index, epoch) in enumerate(examples, first):
            out = {name: batch[name][place, ...] for name in names}
            readable = self._fill_one(out, index, epoch)
            batch["index"][place] = index
            batch["weight"][place] = readable
            batch["unreadable"][place] = not readable

    def _fill_one(self, out: Batch, index: int, epoch: int) -> bool:
        try:
            sample = self._source.sample(index)
            draws = transforms.uniforms(self._seed, epoch, index, self._transform.draws)
            self._transform(sample, draws, out)
        except DataError as error:
            raise LocalDataError(f"{self._source.name(index)} {error}") from error
        except Exception as error:  # of whatever kind a broken file provokes
            for array in out.values():
                array[...] = 0
            _report(self._source.name(index), error)
            return False
        return True


def made_up_batches(
    transform: transforms.Transform,
    plan: Iterable[Share],
    seed: int,
    share: int,
    classes: int,
) -> Iterator[Batch]:
    """Batches of noise, for benchmarks: costs a copy, reads nothing.

    Args:
      share: examples of a batch that this process takes.
      classes: integers are below this number.
    """
    rng = np.random.default_rng(seed)
    pools = [
        {
            name: rng.integers(0, 256, (64, *one.shape[1:]), np.uint8)
            for name, one in shapes.items()
            if one.dtype == np.uint8
        }
        for shapes in batch_shapes(transform)
    ]
    for bucket, indices, _ in plan:
        real = np.arange(share) < len(indices)
        indices = np.pad(indices, (0, share - len(indices)))
        batch = {}
        for name, one in transform.shapes[bucket].items():
            if name in pools[bucket]:
                batch[name] = pools[bucket][name][indices % 64]
            else:
                values = (indices % classes).reshape(-1, *[1] * len(one.shape))
                shape = share, *one.shape
                batch[name] = np.broadcast_to(values, shape).astype(one.dtype)
        yield batch | {
            "index": np.where(real, indices, -1).astype(np.int32),
            "weight": real.astype(np.float32),
            "unreadable": np.zeros(share, np.float32),
        }


def local_places(batch_size: int) -> np.ndarray:
    """Places of the global batch that this process fills, int64 [b]."""
    share = batch_size // jax.process_count()
    return np.arange(share) + jax.process_index() * share


_named: set[str] = set()


def _report(name: str, error: Exception) -> None:
    """Name an unreadable example, once in the life of a process."""
    if name not in _named:
        _named.add(name)
        reason = f"{type(error).__name__}: {error}"
        print(f"cannot read {name}: {reason}; left out", file=sys.stderr, flush=True)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
