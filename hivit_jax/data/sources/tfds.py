"""Datasets that TFDS has prepared, without tensorflow."""

import os
import resource
import struct
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from typing import Any

import numpy as np

from hivit_jax.data.sources.base import NAMES, Source
from hivit_jax.errors import DataError, unknown


class Tfds(Source):
    """A classification dataset that TFDS has prepared, in array_record or tfrecord.

    Args:
      name: of the dataset, as TFDS has it ("imagenet2012", "name/config:1.0.0").
      directory: that holds it; "" for TFDS's own.
      split: as TFDS has it ("train", "validation", "train[:10%]").

    Raises:
      DataError: not prepared there, another kind of dataset, no such split.
    """

    def __init__(self, name: str, directory: str, split: str):
        import tensorflow_datasets as tfds

        path = _prepared(name, directory)
        try:
            info = tfds.builder_from_directory(path).info
        except Exception as error:
            raise DataError(
                f"{path} cannot be read by tensorflow-datasets {tfds.__version__}: "
                f"{type(error).__name__}: {error}"
            ) from error
        kinds = supervised_kinds(info)
        if kinds != ["Image", "ClassLabel"]:
            raise DataError(
                f"{name} gives ({', '.join(kinds)}); expected (Image, ClassLabel)"
            )
        self._image, self._label = info.supervised_keys
        self._split, self._features = split, info.features
        self._decoders = {self._image: tfds.decode.SkipDecoding()}
        self.classes = info.features[self._label].names
        try:
            files = info.splits[split].file_instructions
        except (KeyError, ValueError) as error:
            raise DataError(
                f"{name} has no split {split!r}; it has {', '.join(info.splits)}"
            ) from error
        kind = info.file_format.value
        if kind not in OPENERS:
            raise DataError(
                f"{name} is prepared as {kind}; expected {' or '.join(OPENERS)}"
            )
        _allow_open_files(len(files))
        self._open = OPENERS[kind]
        self._paths = [str(file.filename) for file in files]
        self._files = np.repeat(np.arange(len(files)), [file.take for file in files])
        self._places = np.concatenate(
            [np.arange(file.skip, file.skip + file.take) for file in files]
        )

    def __len__(self) -> int:
        return len(self._places)

    def sample(self, index: int) -> dict[str, Any]:
        example = self._example(index)
        return {"image": example[self._image], "label": int(example[self._label])}

    def name(self, index: int) -> str:
        try:
            inside = self._example(index).get("file_name", b"").decode()
        except Exception:  # of whatever kind a broken file provokes
            inside = f"in {self._paths[self._files[index]]}"
        return f"{self._split}[{index}] {inside}".rstrip()

    def _example(self, index: int) -> dict[str, Any]:
        read = self._open(self._paths[self._files[index]])
        record = read(int(self._places[index]))
        return self._features.deserialize_example_np(record, decoders=self._decoders)


@cache
def _array_record(path: str) -> Callable[[int], bytes]:
    """Opens a file: place -> record. One by one is four times as fast as in batches."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(path)
    return lambda place: reader.read([place])[0]


@cache
def _tfrecord(path: str) -> Callable[[int], bytes]:
    """Opens a file: place -> record. Hops once from header to header.

    A record is its length (8 bytes), a CRC (4), the data and another CRC (4).
    """
    file, size = os.open(path, os.O_RDONLY), os.path.getsize(path)
    starts, at = [], 0
    while at < size:
        starts.append(at + 12)
        at += struct.unpack("<Q", os.pread(file, 8, at))[0] + 16
    if at != size:
        raise OSError(f"{path} ends inside a record, at byte {size:,}")
    ends = np.array([*starts[1:], size + 12]) - 16

    return lambda place: os.pread(file, ends[place] - starts[place], starts[place])


def _allow_open_files(count: int) -> None:
    """Every file of a split stays open; the usual limit is 1,024 for a process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        more = soft + count
        more = more if hard == resource.RLIM_INFINITY else min(more, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))


OPENERS = {"array_record": _array_record, "tfrecord": _tfrecord}


def supervised_kinds(info: Any) -> list[str]:
    """Kinds of features that a TFDS dataset is to learn from and to learn."""
    keys = [key for key in info.supervised_keys or () if isinstance(key, str)]
    return [type(info.features[key]).__name__ for key in keys]


def _prepared(name: str, directory: str) -> str:
    """The directory NAME/[CONFIG/]VERSION of the newest prepared version."""
    import tensorflow_datasets as tfds
    from etils import epath

    base, _, version = name.partition(":")
    root = epath.Path(directory or tfds.core.constants.DATA_DIR).expanduser() / base
    names = [p.name for p in root.iterdir()] if root.is_dir() else []
    ready = [
        each
        for each in names
        if tfds.core.Version.is_valid(each)
        and each == (version or each)
        and (root / each / "dataset_info.json").exists()
    ]
    if ready:
        return str(root / max(ready, key=tfds.core.Version))
    if get_close_matches(base, NAMES, cutoff=0.8) and base not in NAMES:
        raise unknown("data.name", base, NAMES)
    raise DataError(
        f"no prepared {name} in {root}, where there is "
        f"{', '.join(sorted(names)[:5]) or 'nothing'}; expected VERSION/"
        "dataset_info.json.\n--config.data.dir=DIR says where to look; python -m "
        f"hivit_jax.tools.prepare_data --name {base} prepares it"
    )
