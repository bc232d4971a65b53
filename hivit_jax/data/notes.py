"""Notes at the start of a run about ignored, reduced or missing data.

Each function returns lines of text, or [] if there is nothing to note.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from hivit_jax.data.rasters import read_values
from hivit_jax.data.sources.base import Source
from hivit_jax.data.sources.file_index import OUTSIDE
from hivit_jax.data.sources.registry import open_source
from hivit_jax.data.sources.relabel import MAX_LISTED_CLASSES, is_numbered
from hivit_jax.errors import UNAVAILABLE
from hivit_jax.progress import counted, listed


def dataset_warnings(data: Any, splits: Sequence[str], needs_labels: bool) -> list[str]:
    """Return lines about unmatched exclusions and classes without images.

    Args:
      data, splits: see `unmatched_exclusions`.
      needs_labels: True: include the lines about classes.
    """
    found = unmatched_exclusions(data, splits)
    sources = _open(data, splits) if needs_labels else []
    if sources:
        found += _classes_without_training_images(sources[0])
    counts = [*map(_class_counts, sources)]
    if len(counts) == 2 and all(map(len, counts)):
        found += uncovered_classes(sources[0].classes, *counts)
    return found


def unmatched_exclusions(data: Any, splits: Sequence[str]) -> list[str]:
    """Return a line about the entries of `data.exclude` that match no image.

    Args:
      data: `config.data`.
      splits: all splits of the config, because an entry may name an image of any split.
    """
    return exclusion_notes(data.exclude, _open(data, splits)) if data.exclude else []


def _open(data: Any, splits: Sequence[str]) -> list[Source]:
    """Open the splits; return [] if one is missing.

    A missing split is an error only where its images are needed.
    """
    try:
        return [open_source(data, split) for split in splits]
    except UNAVAILABLE:
        return []


def exclusion_notes(exclude: str, sources: Sequence[Source]) -> list[str]:
    """Return a line about the entries of `exclude` that match no image of the sources.

    Args:
      exclude: `data.exclude`.
    """
    first, *others = [source.unmatched for source in sources] or [()]
    in_all = {*first}.intersection(*others)
    entries = [entry for entry in first if entry in in_all]
    if not entries:
        return []
    count = counted(len(entries), "entry matches", "entries match")
    return [
        f"data.exclude={exclude}: {count} no image, the first is {entries[0]!r}; "
        "expected paths as check_data --list writes them"
    ]


def uncovered_classes(
    names: Sequence[str], train_counts: Sequence[int], test_counts: Sequence[int]
) -> list[str]:
    """Return a line about the classes that have training but no evaluation images.

    Args:
      names: names of all classes.
      train_counts, test_counts: number of images per class in each split.
    """
    rows = zip(names, train_counts, test_counts, strict=True)
    found = [name for name, in_train, in_test in rows if in_train and not in_test]
    return _without_images("evaluation", found)


def classes_without_images(source: Source, split: str = "evaluation") -> list[str]:
    """Return a line about the classes of a source that have no images.

    Args:
      split: name of the source's split in the line.
    """
    counts = zip(source.classes, _class_counts(source), strict=False)
    return _without_images(split, [name for name, count in counts if not count])


def _classes_without_training_images(source: Source) -> list[str]:
    """Return a line about classes of the training split that have no images.

    If only the numbered class "0" has none, the line explains that labels start at 0.
    """
    lines = classes_without_images(source, "training")
    is_empty = [not count for count in _class_counts(source)]
    if is_numbered(source.classes) and is_empty[:1] == [True] and sum(is_empty) == 1:
        lines[0] += "; labels start at 0: subtract 1 from labels that start at 1"
    return lines


def _without_images(split: str, names: Sequence[str]) -> list[str]:
    """Return a line about the classes `names` of a split, which have no images."""
    if not names:
        return []
    return [
        f"the {split} has no image of {counted(len(names), 'class', 'classes')}: "
        f"{listed(names, MAX_LISTED_CLASSES)}"
    ]


def _class_counts(source: Source) -> Sequence[int]:
    """Return the number of images of each class; () if the labels are unknown."""
    labels = np.asarray(source.labels)
    return labels.sum(0, dtype=np.int64) if labels.ndim == 2 else source.class_counts()


def split_notes(
    source: Source, indices: np.ndarray, split: str, dtype: str
) -> list[str]:
    """Return lines about ignored images, images of no class, and 16-bit images.

    Args:
      indices: indices of the examples that are read to find 16-bit values.
      dtype: `data.dtype`; 16-bit images are reported only for uint8.
    """
    notes = []
    if source.loose:
        count = source.ignored[OUTSIDE]
        more = count - len(source.loose)
        notes.append(
            f"{split} split: ignored {counted(count, 'image')} outside of the class "
            f"directories: {', '.join(source.loose)}"
            f"{f', ... and {more:,} more' if more else ''}"
        )
    labels = np.asarray(source.labels)
    if labels.ndim == 2 and (count := int((~labels.any(1)).sum())):
        notes.append(
            f"{count:,} of {len(labels):,} images of the {split} split have no label; "
            "each counts as negative for every class"
        )
    checked, num_16_bit = set(indices.tolist()), 0
    for index in checked if dtype == "uint8" else ():
        with suppress(Exception):  # damaged files cause exceptions of many types
            values = read_values(source.sample(index)["image"]).array
            num_16_bit += values.dtype == np.uint16
    if num_16_bit:
        notes.append(
            f"{num_16_bit} of {len(checked)} checked images of the {split} split have "
            "16 bits, which are reduced to 8 bits; data.dtype=uint16 keeps all 16"
        )
    return notes
