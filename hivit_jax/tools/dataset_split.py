"""The images of a split that check_data has read, and the findings about them."""

import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from hivit_jax.data.findings import CLIPPED, LOST, image_findings
from hivit_jax.data.loader import available_cores
from hivit_jax.data.order import permutation
from hivit_jax.data.rasters import ChannelError, decode
from hivit_jax.data.sources.base import LabelError, label_vector, single_label
from hivit_jax.data.sources.registry import open_source
from hivit_jax.data.summary import Summary
from hivit_jax.errors import DataError, ProcessDataError
from hivit_jax.models import image_shape

IMAGES_PER_JOB = 32
UNREADABLE, BAD_LABEL = "unreadable", "with an invalid label"
BAD_CHECKSUM = "with a wrong checksum"
OTHER_VALUES = "with values that data.dtype and data.value_range do not cover"
WRONG_CHANNELS, DROPPED = "with the wrong number of channels", "with dropped channels"
NO_IMAGE = "without an image"  # fault of a class, not of an image
FAULTS = (
    UNREADABLE,
    BAD_CHECKSUM,
    BAD_LABEL,
    OTHER_VALUES,
    WRONG_CHANNELS,
    LOST,
    CLIPPED,
    DROPPED,
)


class Split:
    """Images of a split that are checked: all, or a random selection.

    Args:
      split: "train" or "test".
      max_images: number of images to select; 0: all.

    Attributes:
      is_cut_evaluation: True for an evaluation split that is cut from another split, by
        data.eval_fraction or a slice such as train[80%:].
      indices: indices of the k images in the dataset's split, int64 [k].
      labels: int64 [k], or [k, classes] of 0 and 1 with several labels per image. -1
        marks an image that was not decoded, or an invalid label. Without labels, all
        decoded images have 0.
      sizes: height and width, int64 [k, 2]; 0 for an image that was not decoded.
      summary: facts about all decoded images.
      findings: finding, such as "unreadable" -> index of an image in the dataset's
        split -> detail as text.
    """

    def __init__(self, config: Any, split: str, max_images: int = 0):
        data = config.data
        configured_split = data.train_split if split == "train" else data.eval_split
        self.title = f"{split} ({configured_split})" if configured_split else split
        is_slice = data.eval_split.endswith("]")  # such as train[80%:]
        self.is_cut_evaluation = split == "test" and (
            data.eval_fraction > 0 or is_slice
        )
        self.config, self.channels = config, image_shape(config.model)[2]
        self.source = open_source(data, split)
        n = len(self.source)
        self.indices = np.sort(permutation(0, 0, n)[: max_images or n])
        has_vectors = data.multi_label and self.source.labeled
        shape = (len(self.source.classes),) if has_vectors else ()
        self.labels = np.full((len(self.indices), *shape), -1)
        self.sizes = np.zeros((len(self.indices), 2), np.int64)
        always_listed = {UNREADABLE: {}, BAD_LABEL: {}}
        self.summary = Summary(self.channels)
        self.findings: dict[str, dict[int, str]] = defaultdict(dict, always_listed)

    def read(self) -> None:
        """Read the images in threads and fill the attributes.

        Shows a progress bar.
        """
        starts = range(0, len(self.indices), IMAGES_PER_JOB)
        bar = tqdm(total=len(self.indices), desc=self.title, unit=" images")
        threads = self.config.data.workers or available_cores()
        with bar, ThreadPoolExecutor(threads) as pool:
            for count in pool.map(self._read_job, starts):
                bar.update(count)

    def _read_job(self, start: int) -> int:
        """Read up to `IMAGES_PER_JOB` images and return their number."""
        indices = self.indices[start : start + IMAGES_PER_JOB].tolist()
        data, size = self.config.data, image_shape(self.config.model)[:2]
        for position, index in enumerate(indices, start):
            try:
                if problem := self.source.checksum_error(index):
                    self.findings[BAD_CHECKSUM][index] = problem
                sample = self.source.sample(index)
                encoded, label = sample["image"], sample["label"]
                options = self.channels, data.value_range, data.dtype
                pixels = decode(encoded, *options)
            except ProcessDataError:
                raise
            except ChannelError as error:
                self.findings[WRONG_CHANNELS][index] = str(error)
                continue
            except LabelError as error:
                self.findings[BAD_LABEL][index] = str(error)
                continue
            except DataError as error:
                self.findings[OTHER_VALUES][index] = str(error)
                continue
            except Exception as error:  # damaged files cause exceptions of many types
                words = f"{type(error).__name__}: {error}".split()
                self.findings[UNREADABLE][index] = " ".join(words)
                continue
            self.sizes[position] = pixels.shape[:2]
            self.summary.add(index, encoded, pixels)
            try:
                self.labels[position] = self._valid_label(label)
            except LabelError as error:
                self.findings[BAD_LABEL][index] = str(error)
            get_name = partial(self.name, index)
            options = size, data.canvas, data.value_range
            found = image_findings(encoded, get_name, pixels, *options)
            for finding, detail in found.items():
                self.findings[finding][index] = detail
        return len(indices)

    def _valid_label(self, label: Any) -> int | np.ndarray:
        """Return the label of an image, or the vector of its labels.

        Returns 0 if the dataset has no labels.

        Raises:
          LabelError: the label is invalid.
        """
        num_classes = len(self.source.classes)
        if not self.source.labeled:
            return 0
        if self.labels.ndim == 2:
            return label_vector(label, num_classes)
        if not 0 <= single_label(label) < num_classes:
            raise LabelError(str(label))
        return label

    def write_unreadable(self, listing: BinaryIO, reasons: BinaryIO) -> None:
        """Write a line per unreadable image to each of two files.

        Args:
          listing: receives the names.
          reasons: receives each name, a tab and the reason.
        """
        for index, reason in sorted(self.findings[UNREADABLE].items()):
            listing.write(os.fsencode(f"{self._one_line_name(index)}\n"))
            reasons.write(f"{self.name(index)}\t{reason}\n".encode())

    def name(self, index: int) -> str:
        """Return an image's name, with newlines and invalid UTF-8 bytes escaped."""
        name = self._one_line_name(index)
        return name.encode(errors="backslashreplace").decode()

    def _one_line_name(self, index: int) -> str:
        """Return an image's name with newlines escaped."""
        return self.source.name(index).replace("\n", "\\n")

    def usable(self) -> np.ndarray:
        """Return True for decoded images with valid labels, bool [k]."""
        return (self.labels >= 0).reshape(len(self.labels), -1).all(1)

    def of_class(self, label: int) -> np.ndarray:
        """Return the indices of the usable images of a class, int64."""
        has_vectors = self.labels.ndim == 2
        mask = self.labels[:, label] > 0 if has_vectors else self.labels == label
        return self.indices[mask]

    def per_class(self) -> np.ndarray:
        """Return the number of usable images per class, int64 [classes]."""
        if self.labels.ndim == 2:
            return (self.labels > 0).sum(0)
        labels = self.labels[self.usable()]
        return np.bincount(labels, minlength=len(self.source.classes))

    def faults(self) -> dict[str, list[str]]:
        """Return {fault: lines}: one line per affected image or per empty class.

        Empty classes are reported only if the whole split was read. If no image is
        usable, they are not reported, because the other faults are the reason.
        """
        faults = {}
        self.findings |= {DROPPED: self.summary.dropped} if self.summary.dropped else {}
        for fault in FAULTS:
            details = sorted(self.findings.get(fault, {}).items())
            faults[fault] = [f"{self.name(i)}: {detail}" for i, detail in details]
        if len(self.indices) == len(self.source) and self.usable().any():
            empty = np.flatnonzero(self.per_class() == 0)
            noun = "class" if len(empty) == 1 else "classes"
            names = [self.source.classes[i] for i in empty]
            faults[f"{noun} {NO_IMAGE}"] = names
        return faults
