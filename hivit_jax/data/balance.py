"""Balanced order: examples of rare classes occur more often."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from hivit_jax.data.order import permutation, shuffled
from hivit_jax.data.sources.splits import by_label
from hivit_jax.errors import ConfigError


class BalancedOrder:
    """Order of the examples of a run; its `samples_at` replaces `order.samples_at`.

    An epoch has as many examples as the dataset. Each class has an endless sequence of
    permutations of its examples. An epoch with m positions for the class uses the next
    m examples of this sequence. After any number of epochs, the use counts of two
    examples of a class therefore differ by at most 1. Like `order.permutation`, the
    order is a function of seed and epoch.

    Args:
      labels: class of each example, int [n].
      balance: with 1, all classes occur equally often; between 0 and 1, a class of k
        examples occurs in proportion to ``k ** (1 - balance)``.
      seed: seed of the permutations.
    """

    def __init__(self, labels: np.ndarray, balance: float, seed: int):
        labels = np.asarray(labels)
        self._seed, self._n = seed, len(labels)
        self._members = by_label(labels)
        self._counts = balanced_counts([*map(len, self._members)], balance)
        self._cached_epoch = lru_cache(maxsize=2)(self._compute_epoch)

    def samples_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the examples at positions of the endless sequence of all epochs.

        Returns (example indices [b], passes [b]). A pass is the serial number, from 0,
        of this use of the example. It replaces the epoch as key of the transform's
        random numbers, so that an example that occurs twice in an epoch is augmented
        differently.

        Args:
          positions: int [b]; position p is in epoch ``p // n``.
        """
        epochs, offsets = np.divmod(positions, self._n)
        indices, passes = np.empty_like(offsets), np.empty_like(offsets)
        for epoch in np.unique(epochs):
            selected = epochs == epoch
            found = self._cached_epoch(int(epoch))[:, offsets[selected]]
            indices[selected], passes[selected] = found
        return indices, passes

    def _compute_epoch(self, epoch: int) -> np.ndarray:
        """Return the example indices and passes of an epoch, int64 [2, n]."""
        parts = []
        for class_index, members in enumerate(self._members):
            count = self._counts[class_index]
            sequence_positions = np.arange(epoch * count, (epoch + 1) * count)
            passes, offsets = np.divmod(sequence_positions, len(members))
            indices = np.empty_like(offsets)
            for k in np.unique(passes):
                selected = passes == k
                # SeedSequence ignores a trailing 0: without `1 +`, the key of class 0
                # would equal the key of `permutation`.
                key = [self._seed, int(k), 1 + class_index]
                class_order = shuffled(key, len(members))
                indices[selected] = members[class_order[offsets[selected]]]
            parts.append(np.stack([indices, passes]))
        epoch_order = permutation(self._seed, epoch, self._n)
        return np.concatenate(parts, axis=1)[:, epoch_order]


def check_balance(class_counts: Sequence[int], data: Mapping[str, Any]) -> None:
    """Raise ConfigError unless every training image has one known class.

    Args:
      class_counts: result of `Source.class_counts`.
      data: the `data` section of a config.
    """
    if not class_counts:
        raise ConfigError(
            f"data.balance={data['balance']:g} with data.name={data['name']!r}; "
            "expected one label per image, known before the images are read, as in "
            "class folders, CSV files, tar and zip archives"
        )


def balanced_counts(sizes: list[int], balance: float) -> np.ndarray:
    """Return the number of positions of each class in an epoch, int64 [classes].

    The numbers add up to the number of examples. Fractions are rounded by the largest
    remainder method.

    Args:
      sizes: number of examples of each class, at least 1.
      balance: see `BalancedOrder`.
    """
    total, weights = sum(sizes), np.array(sizes) ** (1.0 - balance)
    # Rounded to 6 digits, so that all machines compute the same numbers.
    fractional = np.round(total * weights / weights.sum(), 6)
    counts = np.floor(fractional).astype(np.int64)
    by_remainder = np.argsort(counts - fractional, kind="stable")  # largest first
    counts[by_remainder[: total - counts.sum()]] += 1
    return counts
