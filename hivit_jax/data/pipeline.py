"""Order and batches: which image stands at which position of a run.

Position ``p = step * batch_size + place`` holds image
``permutation(seed, epoch)[p % n]`` with ``epoch = p // n``. So a run can start at any
step, on any number of hosts, and see what it would have seen; nothing but the step
needs saving.
"""

import math
import mmap
import os
import sys
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np

from hivit_jax.data import randaugment, transforms
from hivit_jax.data.sources import num_examples, open_source
from hivit_jax.errors import ConfigError, DataError, LocalDataError
from hivit_jax.models import image_shape

Batch = dict[str, np.ndarray]
CHUNK = 8  # images that a thread takes at a time
AHEAD = 2  # batches in work beside the one that is waited for


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
      image uint8 [b, H, W, C], label int32 [b], weight float32 [b] (1: an image to
      count), unreadable float32 [b] (1: an image that could not be read). Where the
      device resizes (`data.canvas`), H = W = canvas and box float32 [b, 2, 3] tells
      `augment.resample` what to do.
    """
    places = local_places(config.batch_size)
    n = num_examples(config.data, "train")
    plan = (
        samples_at(step * config.batch_size + places, n, config.seed)
        for step in range(first_step, last_step)
    )
    return _batches(config, "train", plan, len(places), augmented=True)


def eval_batches(config: Any, split: str = "test") -> Iterator[Batch]:
    """Batches, as in `train_batches`, that hold every image of a split once, in order
    and as for evaluation.

    The last one is filled up with empty images of weight 0.
    """
    places = local_places(config.batch_size)
    n = num_examples(config.data, split)
    starts = range(0, n, config.batch_size)
    shares = (start + places[start + places < n] for start in starts)
    plan = ((share, np.zeros_like(share)) for share in shares)
    return _batches(config, split, plan, len(places), augmented=False)


def first_test_images(config: Any, count: int) -> Batch:
    """The first `count` images of the test split, the same on every process."""
    indices = np.arange(min(count, num_examples(config.data, "test")))
    plan = iter([(indices, np.zeros_like(indices))])
    return next(_batches(config, "test", plan, len(indices), augmented=False))


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
            "python -m hivit_jax.data.doctor names them all"
        )


def _batches(
    config: Any, split: str, plan: Iterator, size: int, augmented: bool
) -> Iterator[Batch]:
    """Batches of `size` images for a plan of (image indices, epochs), each [size] or
    less.
    """
    if config.data.name == "synthetic":
        return _synthetic_batches(config, plan, size)
    return _read_batches(Loader(config, split, augmented), plan, size)


def _synthetic_batches(config: Any, plan: Iterator, size: int) -> Iterator[Batch]:
    """Noise images, for benchmarks: costs a copy, reads nothing."""
    shape = image_shape(config.model)
    pool = np.random.default_rng(config.seed).integers(
        0, 256, (64, *shape), dtype=np.uint8
    )
    classes = config.model.get("num_classes") or 1
    for indices, _ in plan:
        weight = (np.arange(size) < len(indices)).astype(np.float32)
        indices = np.pad(indices, (0, size - len(indices)))
        yield {
            "image": pool[indices % len(pool)],
            "label": (indices % classes).astype(np.int32),
            "weight": weight,
            "unreadable": np.zeros(size, np.float32),
        }


class Sample(NamedTuple):
    """An image of a dataset; `pixels` are uint8 [h, w, C]."""

    encoded: bytes
    label: int
    pixels: np.ndarray


class Memory:
    """Memory for arrays, used again when the last view of an array is gone.

    For the system, clearing fresh pages takes up to as long as decoding what is to
    stand in them.
    """

    def __init__(self):
        self._free: list[mmap.mmap] = []

    def array(self, shape: Sequence[int]) -> np.ndarray:
        """uint8 array with undefined content."""
        size = math.prod(shape)
        memory = self._free.pop() if self._free else None
        if memory is None or len(memory) != size:
            memory = mmap.mmap(-1, size)
        # Every view of this array, and of its views, keeps this very object alive.
        array = np.frombuffer(memory, np.uint8)
        weakref.finalize(array, self._free.append, memory)
        return array.reshape(shape)


class Loader:
    """Fills batches with the images of a split. Its methods may run in many threads.

    Args:
      augmented: whether as for training, else as for evaluation.

    Raises:
      ConfigError: more classes than the model has, channels no image has, a canvas
        smaller than the model's image.
    """

    def __init__(self, config: Any, split: str, augmented: bool):
        data = config.data
        self.threads = data.workers or cores()
        *self._size, self._channels = image_shape(config.model)
        self._source = open_source(data, split)
        # A ConfigDict's attributes take microseconds, several times an image.
        self._data, self._seed = SimpleNamespace(**data), config.seed
        self._classes = config.model.get("num_classes")
        self._memory = Memory()
        self._crop_randomly = augmented and tuple(data.crop_scale) != (1.0, 1.0)
        self._randaugment = augmented and data.randaugment
        # RandAugment works on images of their final size.
        self._canvas = 0 if self._randaugment else data.canvas
        self._draws = transforms.DRAWS + self._randaugment * randaugment.DRAWS
        if self._channels not in transforms.MODES:
            raise ConfigError(
                f"model.in_channels={self._channels} with data.name={data.name!r}; "
                "expected 3 (colour) or 1 (grey)"
            )
        if self._randaugment and self._channels != 3:
            raise ConfigError(
                f"data.randaugment with model.in_channels={self._channels}; expected 3"
            )
        if data.canvas and data.canvas < max(self._size):
            raise ConfigError(
                f"data.canvas={data.canvas} is smaller than model.image_size="
                f"{config.model.image_size}; expected 0 or more than that"
            )
        if self._classes and len(self._source.classes) > self._classes:
            raise ConfigError(
                f"model.num_classes={self._classes}, but {data.name} has "
                f"{len(self._source.classes)} classes"
            )

    def batch(self, count: int) -> Batch:
        """A batch to be filled: of weight 0, and with whatever for pixels."""
        room = [self._canvas] * 2 if self._canvas else self._size
        batch = {
            "image": self._memory.array((count, *room, self._channels)),
            "label": np.zeros(count, np.int32),
            "weight": np.zeros(count, np.float32),
            "unreadable": np.zeros(count, np.float32),
        }
        if self._canvas:
            whole = [[0, side, side] for side in self._size]
            batch["box"] = np.full((count, 2, 3), whole, np.float32)
        return batch

    def fill(
        self, batch: Batch, first: int, indices: np.ndarray, epochs: np.ndarray
    ) -> None:
        """Reads images, int64 [k], of epochs [k] into places first .. first+k-1."""
        samples = zip(indices.tolist(), epochs.tolist(), strict=True)
        for place, (index, epoch) in enumerate(samples, first):
            self._fill_place(batch, place, index, epoch)

    def _fill_place(self, batch: Batch, place: int, index: int, epoch: int) -> None:
        try:
            _, label, pixels = self.read(index)
        except Exception as error:  # of whatever kind a broken file provokes
            batch["image"][place] = 0
            batch["unreadable"][place] = 1
            _report(self._source.name(index), error)
            return
        if self._classes and not 0 <= label < self._classes:
            raise LocalDataError(
                f"{self._source.name(index)} has label {label}; expected 0 to "
                f"{self._classes - 1}, of model.num_classes={self._classes}"
            )
        draws = transforms.uniforms(self._seed, epoch, index, self._draws)
        out = batch["image"][place]
        box = transforms.place(
            pixels,
            self._crop(*pixels.shape[:2], draws),
            out,
            self._size,
            self._data.interpolation,
            self._data.antialias,
        )
        if self._randaugment:
            out[:] = randaugment.randaugment(out, draws[transforms.DRAWS :])
        if "box" in batch:
            batch["box"][place] = box
        batch["label"][place] = label
        batch["weight"][place] = 1

    def read(self, index: int) -> Sample:
        """An image of the split; an exception of any kind where it cannot be read."""
        encoded, label = self._source.fetch(index)
        return Sample(encoded, label, transforms.decode(encoded, self._channels))

    def _crop(self, height: int, width: int, draws: Sequence[float]) -> transforms.Crop:
        if not self._crop_randomly:
            return transforms.center_crop(
                height, width, self._size, self._data.crop_pct
            )
        return transforms.random_resized_crop(
            height, width, draws, self._data.crop_scale
        )


_named: set[str] = set()


def _report(name: str, error: Exception) -> None:
    """Names an unreadable image, once in the life of a process."""
    if name not in _named:
        _named.add(name)
        reason = f"{type(error).__name__}: {error}"
        print(f"cannot read {name}: {reason}; left out", file=sys.stderr, flush=True)


def _read_batches(loader: Loader, plan: Iterator, size: int) -> Iterator[Batch]:
    """Batches read by threads: decoding and copying leave the interpreter to others."""
    pool = ThreadPoolExecutor(loader.threads, "read")
    queue: deque[tuple[Batch, list[Future]]] = deque()

    def finished():
        batch, jobs = queue.popleft()
        for job in jobs:
            job.result()
        return batch

    try:
        for indices, epochs in plan:
            batch, jobs = loader.batch(size), []
            batch["image"][len(indices) :] = 0
            for first in range(0, len(indices), CHUNK):
                part = slice(first, first + CHUNK)
                jobs.append(
                    pool.submit(loader.fill, batch, first, indices[part], epochs[part])
                )
            queue.append((batch, jobs))
            if len(queue) > AHEAD:
                yield finished()
        while queue:
            yield finished()
    finally:
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
