"""Datasets of TensorFlow Datasets (TFDS).

They are read with tensorflow_datasets but without tensorflow.
"""

import os
import resource
import struct
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from typing import Any

import numpy as np

from hivit_jax.data.sources.base import KNOWN_DATASETS, Record, Source
from hivit_jax.errors import DataError, require, unknown
from hivit_jax.paths import expand


class Tfds(Source):
    """A classification dataset prepared by TFDS, in array_record or tfrecord format.

    Args:
      name: TFDS name of the dataset ("imagenet2012", "name/config:1.0.0").
      directory: TFDS data directory; "": TFDS's default.
      split: TFDS split ("train", "validation", "train[:10%]").

    Raises:
      DataError: the dataset is not prepared, is not an image classification dataset,
        has an unsupported file format, or does not have the split.
      MissingPackage: tensorflow-datasets or array_record is not installed.
    """

    def __init__(self, name: str, directory: str, split: str):
        tfds = require("tensorflow_datasets", "tensorflow-datasets")
        path = _prepared_path(name, directory)
        try:
            info = tfds.builder_from_directory(path).info
        except Exception as error:
            raise DataError(
                f"{path} cannot be read by tensorflow-datasets {tfds.__version__}: "
                f"{type(error).__name__}: {error}"
            ) from error
        types = supervised_feature_types(info)
        if types != ["Image", "ClassLabel"]:
            raise DataError(
                f"{name}: expected a dataset with supervised features (Image, "
                f"ClassLabel), found ({', '.join(types)})"
            )
        self._image_key, self._label_key = info.supervised_keys
        self._split, self._features = split, info.features
        self._decoders = {self._image_key: tfds.decode.SkipDecoding()}
        self.classes = info.features[self._label_key].names
        try:
            files = info.splits[split].file_instructions
        except (KeyError, ValueError) as error:
            raise DataError(
                f"{name} has no split {split!r}; available: {', '.join(info.splits)}"
            ) from error
        file_format = info.file_format.value
        if file_format not in OPENERS:
            expected = " or ".join(OPENERS)
            raise DataError(f"{name}: expected {expected} files, found {file_format}")
        _increase_open_file_limit(len(files))
        if file_format == "array_record":  # here, because threads open the files later
            require("array_record.python.array_record_module", "array_record")
        self._open_file = OPENERS[file_format]
        if file_format == "tfrecord":
            self.example_keys = self._image_key, self._label_key
        self._paths = [str(file.filename) for file in files]
        # Per example: the index of its file, and of its record in the file.
        self._file_indices = np.repeat(
            np.arange(len(files)), [file.take for file in files]
        )
        self._record_indices = np.concatenate(
            [np.arange(file.skip, file.skip + file.take) for file in files]
        )

    def __len__(self) -> int:
        return len(self._record_indices)

    def sample(self, index: int) -> dict[str, Any]:
        example = self._example(index)
        label = int(example[self._label_key])
        return {"image": example[self._image_key], "label": label}

    def record(self, index: int) -> Record | None:
        if not self.example_keys:
            return None
        path = self._paths[self._file_indices[index]]
        file, position = _tfrecord(path), self._record_indices[index]
        return Record(path, int(file.starts[position]), int(file.ends[position]))

    def name(self, index: int) -> str:
        try:
            origin = self._example(index).get("file_name", b"").decode()
        except Exception:  # damaged files cause exceptions of many types
            origin = f"in {self._paths[self._file_indices[index]]}"
        return f"{self._split}[{index}] {origin}".rstrip()

    def _example(self, index: int) -> dict[str, Any]:
        read_record = self._open_file(self._paths[self._file_indices[index]])
        record = read_record(int(self._record_indices[index]))
        return self._features.deserialize_example_np(record, decoders=self._decoders)


@cache
def _array_record(path: str) -> Callable[[int], bytes]:
    """Return a function that reads the record at an index of a file.

    Each file is opened once. Records are read one by one, because that is four times as
    fast as in batches.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(path)
    return lambda record_index: reader.read([record_index])[0]


class _TfrecordFile:
    """An open tfrecord file. Calling it with a record's index returns its data.

    The header of every record is read once. A record consists of the length of its data
    (8 bytes), a CRC (4 bytes), the data, and another CRC (4 bytes).

    Attributes:
      starts, ends: first byte of each record's data and byte after it, int64 [n].
    """

    def __init__(self, path: str):
        self._file, size = os.open(path, os.O_RDONLY), os.path.getsize(path)
        starts, offset = [], 0
        while offset < size:
            starts.append(offset + 12)
            offset += struct.unpack("<Q", os.pread(self._file, 8, offset))[0] + 16
        if offset != size:
            raise OSError(f"{path} ends inside a record, at byte {size:,}")
        self.starts = np.array(starts)
        self.ends = np.array([*starts[1:], size + 12]) - 16

    def __call__(self, i: int) -> bytes:
        return os.pread(self._file, self.ends[i] - self.starts[i], self.starts[i])


@cache
def _tfrecord(path: str) -> _TfrecordFile:
    """Open a file; each file is opened once."""
    return _TfrecordFile(path)


def _increase_open_file_limit(count: int) -> None:
    """Allow the process `count` more open files, up to the system's hard limit.

    Every file of a split stays open, and the usual limit is 1,024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        limit = soft + count
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


OPENERS = {"array_record": _array_record, "tfrecord": _tfrecord}


def supervised_feature_types(info: Any) -> list[str]:
    """Return the feature types of a TFDS dataset's supervised input and target."""
    keys = [key for key in info.supervised_keys or () if isinstance(key, str)]
    return [type(info.features[key]).__name__ for key in keys]


def _prepared_path(name: str, directory: str) -> str:
    """Return the path NAME/[CONFIG/]VERSION of the prepared dataset.

    It is the newest version unless `name` gives one.
    """
    from etils import epath

    tfds = require("tensorflow_datasets", "tensorflow-datasets")
    base, _, version = name.partition(":")
    root = epath.Path(expand(directory or tfds.core.constants.DATA_DIR)) / base
    names = [p.name for p in root.iterdir()] if root.is_dir() else []
    versions = [
        candidate
        for candidate in names
        if tfds.core.Version.is_valid(candidate)
        and candidate == (version or candidate)
        and (root / candidate / "dataset_info.json").exists()
    ]
    if versions:
        return str(root / max(versions, key=tfds.core.Version))
    near = get_close_matches(base, KNOWN_DATASETS, cutoff=0.8)
    if near and base not in near:
        raise unknown("data.name", base, KNOWN_DATASETS)
    raise DataError(
        f"{name} is not prepared in {root}: expected VERSION/dataset_info.json, found "
        f"{', '.join(sorted(names)[:5]) or 'nothing'}\n"
        f"Set --config.data.dir=DIR to the directory that contains {base}/, or prepare "
        f"it with python -m hivit_jax.tools.prepare_data --name {base}"
    )
