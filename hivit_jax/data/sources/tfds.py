"""Datasets of TensorFlow Datasets (TFDS), on disk or in a bucket.

The datasets are read with tensorflow_datasets but without tensorflow.
"""

import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from hivit_jax.data import storage, tfrecord
from hivit_jax.data.crc32c import HAS_GOOGLE_CRC32C
from hivit_jax.data.records import Records, load_index
from hivit_jax.data.shard_cache import ShardCache
from hivit_jax.data.sources.base import KNOWN_DATASETS, Record, Source, multi_hot
from hivit_jax.data.sources.layout import describe_content
from hivit_jax.errors import DataError, first_line, require, unknown
from hivit_jax.paths import expand
from hivit_jax.progress import listed

SEVERAL_LABELS = "Sequence of ClassLabel"
FEATURES = (["Image", "ClassLabel"], ["Image", SEVERAL_LABELS])  # supported types


class Tfds(Source):
    """A classification dataset prepared by TFDS, in array_record or tfrecord format.

    Args:
      name: TFDS name of the dataset ("imagenet2012", "name/config:1.0.0").
      directory: TFDS data directory or address; "": TFDS's default.
      split: TFDS split ("train", "validation", "train[:10%]").
      cache_dir: directory for local copies of files in a bucket; "": no copies.
      multi_label: an image has any number of labels.

    Raises:
      DataError: the dataset is not prepared, is not for image classification, has no
        such split, has an unsupported file format, or needs `multi_label`.
      MissingPackage: tensorflow-datasets or array_record is not installed.
    """

    def __init__(
        self,
        name: str,
        directory: str,
        split: str,
        cache_dir: str = "",
        multi_label: bool = False,
    ):
        tfds = require("tensorflow_datasets", "tensorflow-datasets")
        path = _prepared_path(name, directory)
        with _local_metadata(path) as metadata:
            try:
                info = tfds.builder_from_directory(metadata).info
            except Exception as error:
                raise DataError(
                    f"{path} cannot be read by tensorflow-datasets {tfds.__version__}: "
                    f"{type(error).__name__}: {error}"
                ) from error
            _check_features(name, supervised_feature_types(info), multi_label)
            self._image_key, self._label_key = info.supervised_keys
            self._split, self._multi_label = split, multi_label
            self._features, feature = info.features, info.features[self._label_key]
            self._decoders = {self._image_key: tfds.decode.SkipDecoding()}
            self.classes = getattr(feature, "feature", feature).names
            try:
                files = info.splits[split].file_instructions
            except (KeyError, ValueError) as error:
                raise DataError(
                    f"{name} has no split {split!r}; available: "
                    f"{', '.join(info.splits)}"
                ) from error
        self._format = file_format = info.file_format.value
        if file_format not in OPENERS:
            expected = " or ".join(OPENERS)
            raise DataError(f"{name}: expected {expected} files, found {file_format}")
        if file_format == "tfrecord":
            self.example_keys = self._image_key, self._label_key
        # For each example: the index of its file, and its index in that file.
        self._file_indices = np.repeat(np.arange(len(files)), [f.take for f in files])
        self._record_indices = np.concatenate(
            [np.arange(file.skip, file.skip + file.take) for file in files]
        )
        self._remote_records, self._cache = None, None
        self._paths = [str(file.filename) for file in files]
        if storage.is_remote(path):
            self._paths = [f"{path}/{os.path.basename(p)}" for p in self._paths]
            if cache_dir:
                is_checked = file_format == "tfrecord" and HAS_GOOGLE_CRC32C
                check = tfrecord.check_file if is_checked else None
                self._cache = ShardCache(cache_dir, check)
                self._cache.start_progress(self._paths, info.splits[split].num_bytes)
        if file_format == "tfrecord" and storage.is_remote(path):
            counts = [file.examples_in_shard for file in files]
            self._remote_records = self._index_records(path, counts)
            return
        _increase_open_file_limit(len(files))
        if file_format == "array_record":  # checked here, not later in a thread
            require("array_record.python.array_record_module", "array_record")
        self._open_file = OPENERS[file_format]

    def _index_records(self, path: str, counts: list[int]) -> Records:
        """Return the records of tfrecord files in a bucket.

        Args:
          path: address of the directory.
          counts: number of records of each file. A file of n records has n + 1 offsets:
            the start of each record, and the end of the last.
        """
        cache, counts_by_path = self._cache, dict(zip(self._paths, counts, strict=True))

        def offsets_of(file):
            return tfrecord.offsets(file, counts_by_path[file], cache)

        offsets = load_index(path, self._paths, offsets_of, tfrecord.merge)["offsets"]
        first = np.cumsum([0, *counts])[:-1] + np.arange(len(counts))
        positions = first[self._file_indices] + self._record_indices
        ranges = offsets[positions], offsets[positions + 1]
        return Records(self._paths, self._file_indices, *ranges, cache)

    def __len__(self) -> int:
        return len(self._record_indices)

    def sample(self, index: int) -> dict[str, Any]:
        example = self._example(index)
        label = np.array(example[self._label_key])
        label = multi_hot(label, len(self.classes)) if self._multi_label else int(label)
        return {"image": example[self._image_key], "label": label}

    def record(self, index: int) -> Record | None:
        if self._format != "tfrecord" or self._remote_records or self._multi_label:
            return None
        path = self._paths[self._file_indices[index]]
        return Record(path, *self._open_file(path).span(self._record_indices[index]))

    def name(self, index: int) -> str:
        try:
            origin = self._example(index).get("file_name", b"").decode()
        except Exception:  # damaged files cause exceptions of many types
            origin = f"in {self._paths[self._file_indices[index]]}"
        return f"{self._split}[{index}] {origin}".rstrip()

    def ask(self, index: int) -> None:
        if self._remote_records:
            self._remote_records.ask(index)

    def forget(self) -> None:
        if self._remote_records:
            self._remote_records.forget()

    def checksum_error(self, index: int) -> str:
        if self._format != "tfrecord":  # other formats are checked when they are read
            return ""
        try:
            tfrecord.verify(self._framed_record(index))
        except tfrecord.DamagedRecord as error:
            return str(error)
        return ""

    def _example(self, index: int) -> dict[str, Any]:
        if self._format == "tfrecord":
            framed = self._framed_record(index)
            if HAS_GOOGLE_CRC32C:  # costs about 1% of decoding the image
                tfrecord.verify(framed)
            record = tfrecord.unpack(framed)
        else:
            record = self._array_record(index)
        return self._features.deserialize_example_np(record, decoders=self._decoders)

    def _framed_record(self, index: int) -> bytes:
        """Return a record of a tfrecord file with its length and checksums."""
        if self._remote_records:
            return self._remote_records.read(index)
        file = self._open_file(self._paths[self._file_indices[index]])
        return file.framed(int(self._record_indices[index]))

    def _array_record(self, index: int) -> bytes:
        """Return a record of an array_record file.

        Raises:
          StorageError: the file is in a bucket and cannot be read.
        """
        path = self._paths[self._file_indices[index]]
        path = self._cache.locate_or_request(path) if self._cache else path
        try:
            return self._open_file(path)(int(self._record_indices[index]))
        except Exception as error:
            if storage.is_remote(path):
                raise storage.StorageError(
                    f"cannot access {path}: {first_line(error)}\n"
                    "Set --config.data.cache=DIR to read local copies of the files."
                ) from error
            raise


@contextmanager
def _local_metadata(path: str) -> Iterator[str]:
    """Context manager that provides a local directory with a dataset's metadata.

    Provides `path` itself if it is local. Metadata in a bucket are copied, because TFDS
    needs tensorflow or gcsfs to read them there.
    """
    if not storage.is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as directory:
        copied = Path(directory).joinpath(*path.rsplit("/", 2)[1:])
        copied.mkdir(parents=True)
        for name in storage.list_files(path):
            if name.endswith((".json", ".txt")) and "/" not in name:
                (copied / name).write_bytes(storage.start_read(f"{path}/{name}")())
        yield str(copied)


@cache
def _open_array_record(path: str) -> Callable[[int], bytes]:
    """Return a function that reads the record with a given index from a file.

    Each file is opened once. Reading single records is four times as fast as batches.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(path)
    return lambda record_index: reader.read([record_index])[0]


def _increase_open_file_limit(count: int) -> None:
    """Allow the process `count` more open files, up to the system's hard limit.

    Every file of a split stays open, and the usual limit is 1,024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        limit = soft + count
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


OPENERS = {"array_record": _open_array_record, "tfrecord": cache(tfrecord.LocalFile)}


def _check_features(name: str, types: list[str], multi_label: bool) -> None:
    """Raise DataError unless a dataset has supported images and labels."""
    if types not in FEATURES:
        raise DataError(
            f"{name}: expected supervised features (Image, ClassLabel) or (Image, "
            f"{SEVERAL_LABELS}); found ({', '.join(types)})"
        )
    if types[1] == SEVERAL_LABELS and not multi_label:
        raise DataError(
            f"{name}: images have several labels; set data.multi_label=True"
        )


def supervised_feature_types(info: Any) -> list[str]:
    """Return the feature types of a TFDS dataset's supervised input and target."""
    keys = [key for key in info.supervised_keys or () if isinstance(key, str)]
    features = [info.features[key] for key in keys]
    several = [hasattr(getattr(f, "feature", None), "names") for f in features]
    pairs = zip(features, several, strict=True)
    return [SEVERAL_LABELS if s else type(f).__name__ for f, s in pairs]


def _prepared_path(name: str, directory: str) -> str:
    """Return the path NAME/[CONFIG/]VERSION of the prepared dataset.

    VERSION is the newest version unless `name` specifies a version.
    """
    tfds = require("tensorflow_datasets", "tensorflow-datasets")
    base, _, version = name.partition(":")
    directory = directory or str(tfds.core.constants.DATA_DIR)
    root = f"{expand(directory)}/{base}"
    if storage.is_remote(root):
        files = set(storage.list_files(root))
        names = sorted({file.partition("/")[0] for file in files})
        prepared = [n for n in names if f"{n}/dataset_info.json" in files]
    else:
        names = sorted(os.listdir(root)) if os.path.isdir(root) else []
        prepared = [n for n in names if os.path.exists(f"{root}/{n}/dataset_info.json")]
    is_valid = tfds.core.Version.is_valid
    versions = [n for n in prepared if is_valid(n) and n == (version or n)]
    if versions:
        return f"{root}/{max(versions, key=tfds.core.Version)}"
    near = get_close_matches(base, KNOWN_DATASETS, cutoff=0.8)
    if near and base not in near:
        raise unknown("data.name", base, KNOWN_DATASETS)
    # In a bucket, only `base` is reported, because `directory` may be very large.
    found = describe_content(directory, [base] * bool(names))
    raise DataError(
        f"{name} is not prepared in {root}: expected VERSION/dataset_info.json, found "
        f"{listed(names, 5)}; {found}\n"
        f"Set --config.data.dir=DIR to the directory that contains {base}/, or prepare "
        f"it with python -m hivit_jax.tools.prepare_data --name {base}"
    )
