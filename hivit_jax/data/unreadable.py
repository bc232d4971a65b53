"""Count of unreadable images, and the limit that ends a run."""

import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from hivit_jax.data.loader import Batch
from hivit_jax.data.sources.base import Source
from hivit_jax.data.sources.registry import open_source
from hivit_jax.distributed.processes import gather_objects
from hivit_jax.errors import DataError
from hivit_jax.progress import counted

CHECK_HINT = (
    "To exclude all unreadable images, run python -m hivit_jax.tools.check_data with "
    "the same --config flags and --list FILE, and set data.exclude=FILE"
)


def missing_files_hint(data: Any, source: Source) -> str:
    """Return a hint if most images listed in a CSV file or list do not exist, else "".

    At most 1,000 evenly spaced images are checked.

    Args:
      data: `config.data`.
    """
    if data.name != "csv" or not len(source):
        return ""
    indices = np.linspace(0, len(source) - 1, min(len(source), 1000)).astype(int)
    missing = [i for i in indices.tolist() if not os.path.exists(source.name(i))]
    if len(missing) * 2 <= len(indices):
        return ""
    return (
        f"Most of the listed files do not exist, such as {source.name(missing[0])}; "
        "correct the paths: relative paths start at the directory of the file that "
        "lists them"
    )


def unreadable_hint(data: Any, source: Source) -> str:
    """Return a line about what to do with the unreadable images of a source."""
    return missing_files_hint(data, source) or CHECK_HINT


class UnreadableImages:
    """Indices of the training images whose last read failed.

    An image counts once, even if several epochs and processes tried to read it.

    Args:
      data: `config.data`.
      total: number of training images.
    """

    def __init__(self, data: Any, total: int):
        self._data, self._total, self._announced = data, total, False
        self.indices: set[int] = set()  # on all processes, after `gather`
        self._failed: set[int] = set()  # on this process, since the last `gather`
        self._recovered: set[int] = set()  # of `indices`, now read by this process

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield this process's batches unchanged and note their unreadable images."""
        for batch in batches:
            is_bad = batch["unreadable"] > 0
            if self.indices or self._failed:
                readable = batch["index"][~is_bad].tolist()
                self._recovered |= self.indices.intersection(readable)
                self._failed.difference_update(readable)
            self._failed.update(batch["index"][is_bad].tolist())
            if is_bad.any():
                self._announce_end()
            yield batch

    def _announce_end(self) -> None:
        """Print a line once if the known unreadable images exceed the limit.

        These are the images that all processes gathered, and those that this process
        failed to read since then.
        """
        count = len(self.indices | self._failed)
        if not self._announced and count / self._total > self._data.max_unreadable:
            self._announced = True
            text = (
                f"{counted(count, 'unreadable image')}, more than data.max_unreadable="
                f"{self._data.max_unreadable:g} allows: the run ends at one of its "
                "next log lines"
            )
            print(text, file=sys.stderr, flush=True)

    def gather(self) -> int:
        """Update `indices` and return their number. Must run on all processes."""
        gathered = gather_objects((self._failed, self._recovered))
        for _, recovered in gathered:
            self.indices -= recovered
        for failed, _ in gathered:
            self.indices |= failed
        self._failed, self._recovered = set(), set()
        return len(self.indices)


def check_unreadable(count: int, total: int, data: Any, split: str = "train") -> None:
    """Raise DataError if more images are unreadable than `data.max_unreadable` allows.

    Args:
      count: number of distinct unreadable images of the split.
      total: number of images of the split.
      data: `config.data`.
    """
    if count / total > data.max_unreadable:
        hint = CHECK_HINT
        if split == "train":
            hint = unreadable_hint(data, open_source(data, split))
        raise DataError(
            f"{counted(count, 'image')} of {data.name} could not be read, "
            f"{count / total:.2%} of the {total:,} in the {split} split; "
            f"data.max_unreadable allows {data.max_unreadable:.2%}.\n"
            f"{hint}"
        )
