"""Count of unreadable images, and the limit that ends a run."""

from collections.abc import Iterable, Iterator
from typing import Any

from hivit_jax.data.loader import Batch
from hivit_jax.distributed.processes import gather_objects
from hivit_jax.errors import DataError
from hivit_jax.progress import counted

CHECK_HINT = (
    "To exclude all unreadable images, run python -m hivit_jax.tools.check_data with "
    "the same --config flags and --list FILE, and set data.exclude=FILE"
)


class UnreadableImages:
    """Indices of the training images whose last reading failed.

    An image counts once, even if several epochs and processes tried to read it.
    """

    def __init__(self):
        self.indices: set[int] = set()  # on all processes, after `gather`
        self._failed: set[int] = set()  # on this process, since the last `gather`
        self._recovered: set[int] = set()

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield this process's batches unchanged and note their unreadable images."""
        for batch in batches:
            is_bad = batch["unreadable"] > 0
            self._failed.update(batch["index"][is_bad].tolist())
            if self.indices:
                readable = batch["index"][~is_bad].tolist()
                self._recovered |= self.indices.intersection(readable)
            yield batch

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
        raise DataError(
            f"{counted(count, 'image')} of {data.name} could not be read, "
            f"{count / total:.2%} of the {total:,} in the {split} split; "
            f"data.max_unreadable allows {data.max_unreadable:.2%}.\n{CHECK_HINT}"
        )
