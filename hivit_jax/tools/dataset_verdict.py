"""Verdict of check_data: the faults that fail the check, and their remedies."""

import os
from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np

from hivit_jax.data.findings import CLIPPED, LOST
from hivit_jax.data.notes import exclusion_notes, uncovered_classes
from hivit_jax.data.rasters import INSTALL_CODECS
from hivit_jax.data.sources.registry import SELECTABLE
from hivit_jax.data.unreadable import missing_files_hint
from hivit_jax.errors import DataError
from hivit_jax.progress import counted
from hivit_jax.tools.dataset_split import (
    BAD_CHECKSUM,
    BAD_LABEL,
    DROPPED,
    NO_IMAGE,
    OTHER_VALUES,
    UNREADABLE,
    WRONG_CHANNELS,
    Split,
)

# Fault -> remedy. `Verdict` adds the remedy of unreadable images.
REMEDIES = {
    BAD_CHECKSUM: "restore the files with a wrong checksum",
    BAD_LABEL: "correct the invalid labels",
    OTHER_VALUES: "set data.dtype and data.value_range as described in the report",
    WRONG_CHANNELS: "set model.in_channels to the number of channels of the files",
    LOST: "set data.value_range to the range of the values, or data.dtype",
    NO_IMAGE: "add images of every class, or remove the classes without an image",
}
LIMITED = (UNREADABLE, BAD_CHECKSUM, LOST)  # faults that data.max_unreadable limits


def nested_class_notes(split: Split) -> list[str]:
    """Return a line about checked images in subdirectories of a class, or []."""
    source, data = split.source, split.config.data
    if data.name != "folder" or data.class_level != "top" or not source.labeled:
        return []
    nested = []
    for index in split.indices:
        name, label = source.name(index), source.labels[index]
        if os.path.basename(os.path.dirname(name)) != source.classes[label]:
            nested.append(name)
    if not nested:
        return []
    return [
        f"{split.title}: {counted(len(nested), 'image')} in subdirectories of the "
        f"classes, e.g. {nested[0]}; data.class_level=leaf makes each subdirectory a "
        "class"
    ]


class Verdict:
    """Failures of a dataset, and notes about other unusual properties.

    A dataset fails the check in the following cases. Other faults are noted or
    tolerated.

    - For one of the faults `LIMITED`, the fraction of images with this fault exceeds
      `data.max_unreadable`.
    - An image has an invalid label, the wrong number of channels, or values that
      `data.dtype` and `data.value_range` do not cover.
    - A class has no image in a split. For an evaluation split that is cut from another
      split, this is only noted, because a small class may then have no image in it.

    Args:
      splits: the training split and, if there is one, the evaluation split.

    Attributes:
      failures: one text per failure.
      notes: one text per note.
    """

    def __init__(self, splits: Sequence[Split]):
        self._splits, self._data = splits, splits[0].config.data
        self._failed_kinds: dict[str, None] = {}  # keys in order of occurrence
        self.failures: list[str] = []
        self._errors: list[str] = []  # the failures, with the number of allowed images
        sources = [split.source for split in splits]
        self.notes = exclusion_notes(self._data.exclude, sources)

    def add(self, split: Split, faults: Mapping[str, list[str]]) -> None:
        """Sort the faults of a split into failures and notes.

        Args:
          split: a split that has been read. The training split must be added first.
          faults: result of `Split.faults`.
        """
        max_unreadable = self._data.max_unreadable
        allowed = dict.fromkeys(LIMITED, max_unreadable * len(split.indices))
        allowed |= {CLIPPED: np.inf, DROPPED: np.inf}
        for fault, fault_lines in faults.items():
            text = f"{split.title}: {len(fault_lines):,} {fault}"
            kind = NO_IMAGE if fault.endswith(NO_IMAGE) else fault
            if kind == NO_IMAGE and split.is_cut_evaluation:
                if split.source.classes:
                    counts = [each.per_class() for each in self._splits]
                    self.notes += uncovered_classes(split.source.classes, *counts)
            elif len(fault_lines) > allowed.get(kind, 0):
                self._failed_kinds[kind] = None
                self.failures.append(text)
                if kind in LIMITED:
                    text += (
                        f", data.max_unreadable={max_unreadable:g} allows "
                        f"{int(allowed[kind]):,} of {len(split.indices):,}"
                    )
                self._errors.append(text)
            elif fault_lines and kind in (LOST, CLIPPED, DROPPED):
                self.notes.append(text)
        if split.source.loose:
            self.notes.append(f"{split.title}: images outside the class directories")

    def text(self) -> str:
        """Return all failures and notes in one line; "healthy" if there are none."""
        return "; ".join(self.failures + self.notes) or "healthy"

    def error(self, listing: str) -> DataError:
        """Return the error that contains all failures and their remedies.

        Args:
          listing: file with the names of the unreadable images; "": not written.
        """
        remedies = REMEDIES | {UNREADABLE: self._unreadable_remedy(listing)}
        return DataError(
            f"{self._data.name} failed the dataset check\n{'; '.join(self._errors)}\n"
            f"{'; '.join(remedies[kind] for kind in self._failed_kinds)}"
        )

    def _unreadable_remedy(self, listing: str) -> str:
        data, file = self._data, listing or "FILE"
        for split in self._splits:
            if hint := missing_files_hint(data, split.source):
                return hint
        reasons = [s.findings[UNREADABLE].values() for s in self._splits]
        if any(INSTALL_CODECS in reason for reason in chain(*reasons)):
            return f"{INSTALL_CODECS} to read the compressed TIFF files"
        action = f"leave the unreadable images out with data.exclude={file}"
        if data.exclude:
            action = f"add the unreadable images to {data.exclude}"
        if not listing:
            action += " (--list FILE writes their names)"
        if data.name not in SELECTABLE:
            action = "restore the unreadable images"
        return f"{action}, or set a larger data.max_unreadable"
