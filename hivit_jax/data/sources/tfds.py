"""Datasets prepared by TensorFlow Datasets (TFDS), read without tensorflow."""

import os
import resource
import struct
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from typing import Any

import numpy as np

from hivit_jax.data.sources.base import KNOWN_DATASETS, Source
from hivit_jax.errors import DataError, require, unknown
from hivit_jax.paths import expand


class Tfds(Source):
    """A classification dataset prepared by TFDS, in array_record or tfrecord format.

    Args:
      name: TFDS name of the dataset ("imagenet2012", "name/config:1.0.0").
      directory: TFDS data directory; "": the default of TFDS.
      split: TFDS split ("train", "validation", "train[:10%]").

    Raises:
      DataError: the dataset is not prepared, is not an image classification dataset,
        has another file format, or has no such split.
      MissingPackage: tensorflow-datasets or array_record is not installed.
    """

    def __init__(self, name: str, directory: str, split: str):
        tfds = require("tensorflow_datasets", "tensorflow-datasets")
        path = _prepared(name, directory)
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
        self._image, self._label = info.supervised_keys
        self._split, self._features = split, info.features
        self._decoders = {self._image: tfds.decode.SkipDecoding()}
        self.classes = info.features[self._label].names
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
        _raise_open_file_limit(len(files))
        if file_format == "array_record":  # here, because threads read the files
            require("array_record.python.array_record_module", "array_record")
        self._open_file = OPENERS[file_format]
        self._paths = [str(file.filename) for file in files]
        self._files = np.repeat(np.arange(len(files)), [file.take for file in files])
        self._record_indices = np.concatenate(
            [np.arange(file.skip, file.skip + file.take) for file in files]
        )

    def __len__(self) -> int:
        return len(self._record_indices)

    def sample(self, index: int) -> dict[str, Any]:
        example = self._example(index)
        return {"image": example[self._image], "label": int(example[self._label])}

    def name(self, index: int) -> str:
        try:
            origin = self._example(index).get("file_name", b"").decode()
        except Exception:  # damaged files cause exceptions of many types
            origin = f"in {self._paths[self._files[index]]}"
        return f"{self._split}[{index}] {origin}".rstrip()

    def _example(self, index: int) -> dict[str, Any]:
        read = self._open_file(self._paths[self._files[index]])
        record = read(int(self._record_indices[index]))
        return self._features.deserialize_example_np(record, decoders=self._decoders)


@cache
def _array_record(path: str) -> Callable[[int], bytes]:
    """Open a file and return the function from record index to record.

    Records are read one by one, because that is four times as fast as in batches.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(path)
    return lambda record_index: reader.read([record_index])[0]


@cache
def _tfrecord(path: str) -> Callable[[int], bytes]:
    """Open a file and return the function from record index to record.

    Reads the header of every record once to find the offsets. A record consists of its
    length (8 bytes), a CRC (4), the data and another CRC (4).
    """
    file, size = os.open(path, os.O_RDONLY), os.path.getsize(path)
    starts, offset = [], 0
    while offset < size:
        starts.append(offset + 12)
        offset += struct.unpack("<Q", os.pread(file, 8, offset))[0] + 16
    if offset != size:
        raise OSError(f"{path} ends inside a record, at byte {size:,}")
    ends = np.array([*starts[1:], size + 12]) - 16

    return lambda i: os.pread(file, ends[i] - starts[i], starts[i])


def _raise_open_file_limit(count: int) -> None:
    """Raise the process's limit of open files by `count`, if possible.

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


def _prepared(name: str, directory: str) -> str:
    """Return the path of a dataset's newest prepared version, NAME/[CONFIG/]VERSION."""
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
        "Set --config.data.dir=DIR to its directory, or prepare it with python -m "
        f"hivit_jax.tools.prepare_data --name {base}"
    )
