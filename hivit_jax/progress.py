"""Progress lines of long operations; text of counts and durations."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from time import monotonic
from typing import TypeVar

Item = TypeVar("Item")

EVERY = 10.0  # seconds between two lines


def to_stderr(line: str) -> None:
    """Print a line to stderr, on every process."""
    print(line, file=sys.stderr, flush=True)


class Progress:
    """Counter of items that writes at most one line in `every` seconds.

    A line is, for example, ``eval  12,800/50,000 images  1:02 left``, or ``listing
    photos  120,000 files`` if the total is unknown. An operation shorter than `every`
    seconds writes no line. The time left assumes that all items take equally long.

    Args:
      title: name of the operation.
      total: number of items; 0: unknown.
      unit: name of the items, in the plural.
      write: function that writes a line, such as `console.log`.
      every: seconds between two lines.
    """

    def __init__(
        self,
        title: str,
        total: int,
        unit: str = "images",
        write: Callable[[str], None] = to_stderr,
        every: float = EVERY,
    ):
        self._title, self._total, self._unit, self._write = title, total, unit, write
        self._done, self._every, self._start = 0, every, monotonic()
        self._last = self._start

    def update(self, count: int) -> None:
        """Add completed items; padding beyond the total is not counted."""
        self._done = min(self._done + count, self._total or sys.maxsize)
        now = monotonic()
        if now - self._last < self._every or not self._done:
            return
        self._last = now
        if not self._total:
            self._write(f"{self._title}  {self._done:,} {self._unit}")
            return
        left = (now - self._start) / self._done * (self._total - self._done)
        self._write(
            f"{self._title}  {self._done:,}/{self._total:,} {self._unit}  "
            f"{duration(left)} left"
        )

    def track(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items and count each as completed when it arrives."""
        for item in items:
            self.update(1)
            yield item


def counted(count: int, noun: str, plural: str = "") -> str:
    """Format a count and its noun: ``1 image``, ``1,234 images``.

    Args:
      plural: "": the noun followed by an s.
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def listed(names: Sequence[str], limit: int) -> str:
    """Join names with commas: ``a, b, ... and 3 more``; "nothing" without names.

    Args:
      limit: number of names; the others are only counted.
    """
    more = [f"... and {len(names) - limit:,} more"] if len(names) > limit else []
    return ", ".join([*names[:limit], *more]) or "nothing"


def duration(seconds: float) -> str:
    """Format seconds as hours, minutes and seconds: 3725 -> ``1:02:05``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
