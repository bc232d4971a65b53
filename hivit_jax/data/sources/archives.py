"""Sources of images in archives: WebDataset's tar files, and zip files.

Archives are not unpacked. An index of their members is made once.
"""

import fnmatch
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hivit_jax.data import storage, tar, zip
from hivit_jax.data.records import Index, Records, load_index
from hivit_jax.data.shard_cache import ShardCache
from hivit_jax.data.sources.archive_labels import (
    UNLABELED,
    check_labels,
    json_label,
    text_label,
    to_numbers,
    to_vectors,
)
from hivit_jax.data.sources.folder import SUFFIXES
from hivit_jax.data.sources.layout import describe_content
from hivit_jax.data.sources.splits import FileSource
from hivit_jax.errors import DataError

VERSION = "4"  # of saved indexes; earlier versions count other ignored members


class Archives(FileSource):
    """Images in archives, with integer labels or without labels.

    Subclasses implement `_files` and `_make_file_index`. The classes are "0", "1", ...
    up to the largest label of the training split. Several labels of an image are
    separated by ``;``. An image with the label ``;`` belongs to no class.

    Args:
      directory: directory of the archives, or its address in a bucket.
      split, train_split: see the subclasses.
      cache_dir: directory for local copies of archives in a bucket; "": no copies.
      multi_label: an image has any number of labels.

    Attributes:
      labels: int64 [n]; with `multi_label`, uint8 [n, classes] of 0 and 1.

    Raises:
      DataError: an archive is missing or damaged, or an image has no label although
        others have one, or the labels contradict `multi_label`.
    """

    def __init__(
        self,
        directory: str,
        split: str,
        train_split: str,
        cache_dir: str = "",
        multi_label: bool = False,
    ):
        self._multi_label = multi_label
        self.root = directory = directory.rstrip("/")
        files = self._files(directory, split)
        is_cached = cache_dir and storage.is_remote(directory)
        cache = ShardCache(cache_dir) if is_cached else None
        index = self._index(directory, files)
        train_index = index
        if split != train_split:
            train_index = self._index(directory, self._files(directory, train_split))
        if multi_label:
            self.labels = to_vectors(index["labels"], train_index["labels"])
            num_classes = self.labels.shape[1]
        else:
            self.labels = np.maximum(to_numbers(index["labels"]), 0)
            num_classes = to_numbers(train_index["labels"]).max() + 1
        self.classes = [*map(str, range(num_classes))]
        self.ignored = (
            {"without an image": n} if (n := int(index["ignored"][0])) else {}
        )
        if cache:
            total_bytes = int((index["stops"] - index["starts"]).sum())
            cache.start_progress(files, total_bytes)
        self.labeled = bool((index["labels"] != UNLABELED).all())
        self._names = index["names"]
        ranges = index["starts"], index["stops"]
        self._records = Records(files, index["files"], *ranges, cache)

    def __len__(self) -> int:
        return len(self.labels)

    def ask(self, index: int) -> None:
        self._records.ask(index)

    def forget(self) -> None:
        self._records.forget()

    def sample(self, index: int) -> dict[str, Any]:
        image = self._image(self._records.read(index))
        label = self.labels[index]
        return {"image": image, "label": label if label.ndim else int(label)}

    def name(self, index: int) -> str:
        return f"{self._records.file(index)}/{os.fsdecode(self._names[index])}"

    def relative_paths(self) -> list[str]:
        start = len(self.root) + 1
        return [self.name(index)[start:] for index in range(len(self))]

    def _image(self, record: bytes) -> bytes:
        """Return the image file from its byte range of an archive."""
        return record

    def _files(self, directory: str, split: str) -> list[str]:
        """Return the paths or addresses of a split's archives."""
        raise NotImplementedError

    def _index(self, directory: str, files: Sequence[str]) -> Index:
        """Return the index of a split's archives.

        Returns:
          files: archive of each image, int [n].
          starts, stops: byte range of each image, int64 [n].
          labels: numbers separated by ``;``, bytes [n]; `UNLABELED` if no image has a
            label.
          names: names in the archives, bytes [n].
          ignored: number of ignored files, int64 [1].
        """
        index = load_index(directory, files, self._make_file_index, _merge, VERSION)
        if not len(index["labels"]):
            expected = f"files that end in {', '.join(SUFFIXES)}"
            raise DataError(f"{files[0]} contains no images; expected {expected}")
        check_labels(index, files, self._multi_label)
        return index

    def _make_file_index(self, path: str) -> dict[str, Any]:
        """Return the `INDEX_ARRAYS`, and "ignored", the number of ignored members."""
        raise NotImplementedError


class WebDataset(Archives):
    """Tar files in the format of WebDataset, with members KEY.jpg and KEY.cls.

    KEY.cls contains the label in digits. Without KEY.cls, the label is the value of
    "label" in KEY.json, an integer or a list of integers.

    A split is a pattern of file names relative to the directory, such as
    ``imagenet1k-train-{0000..1023}.tar``. A split without ``*`` and ``{`` selects the
    tar file of this name, and all tar files whose names contain the split.
    """

    def _files(self, directory: str, split: str) -> list[str]:
        names = storage.list_files(directory)
        patterns = _expand_braces(split)
        if patterns == [split] and "*" not in split:
            patterns = [f"*{split}*.tar", split]
        found = [n for n in names if any(fnmatch.fnmatch(n, p) for p in patterns)]
        if not found:
            raise DataError(
                f"no tar file {split!r}; {describe_content(directory, names)}\n"
                "Set data.dir to a directory of tar files, and data.train_split and "
                "data.eval_split\nto parts of their names or patterns such as '*.tar'; "
                "the defaults are 'train' and 'val'"
            )
        return [f"{directory}/{name}" for name in found]

    def _make_file_index(self, path: str) -> dict[str, Any]:
        return _tar_index(path)


class Zip(Archives):
    """Uncompressed zip files SPLIT.zip with SPLIT_map.txt, as in Swin Transformer.

    The lines of SPLIT_map.txt are "name<tab>label".
    """

    def _files(self, directory: str, split: str) -> list[str]:
        path = f"{directory}/{split}.zip"
        for file in () if storage.is_remote(path) else (path, _map_path(path)):
            if not os.path.isfile(file):
                raise DataError(
                    f"{file} does not exist; {describe_content(directory)}\n"
                    "Set data.dir to a directory with train.zip, train_map.txt, "
                    "val.zip and val_map.txt,\nor data.train_split and "
                    "data.eval_split to other names than 'train' and 'val'"
                )
        return [path]

    def _image(self, record: bytes) -> bytes:
        return zip.data_of(record)

    def _make_file_index(self, path: str) -> dict[str, Any]:
        map_path = _map_path(path)
        found = {member.name: member for member in zip.members(path)}
        lines = storage.start_read(map_path)().decode().splitlines()
        chosen, labels = [], []
        for line_number, line in enumerate(lines, 1):
            name, _, text = line.rstrip().rpartition("\t")
            name = name.rpartition("zip@/")[2].lstrip("/")
            label = text_label(text)
            if name not in found or label is None:
                raise DataError(
                    f"{map_path}, line {line_number}: expected the name of a member of "
                    f"{path}, a tab and a label in digits; found {line!r}"
                )
            chosen.append(found[name])
            labels.append(label)
        return _arrays(chosen, labels) | {"ignored": len(found) - len(chosen)}


def _map_path(path: str) -> str:
    """Return the path of the text file with the labels of a zip file."""
    return f"{path.removesuffix('.zip')}_map.txt"


INDEX_ARRAYS = ("starts", "stops", "labels", "names")  # see `Archives._index`


def _merge(parts: Sequence[dict[str, Any]]) -> Index:
    """Return the index of several archives from the results of `_make_file_index`."""
    index = {k: np.concatenate([part[k] for part in parts]) for k in INDEX_ARRAYS}
    counts = [len(part["names"]) for part in parts]
    index["files"] = np.repeat(np.arange(len(parts)), counts)
    index["ignored"] = np.array([sum(part["ignored"] for part in parts)])
    return index


def _tar_index(path: str) -> dict[str, Any]:
    """Return the index of a tar file; see `Archives._make_file_index`."""
    images: list[tar.Member] = []
    labels: list[bytes] = []
    image_key, current_key, label, has_cls = "", "", UNLABELED, False
    ignored, unused = 0, 0  # members of samples without an image; of this sample so far
    for member, read in tar.members(path):
        directory, _, name = member.name.rpartition("/")
        key, _, extension = name.partition(".")
        key, extension = f"{directory}/{key}", f".{extension.lower()}"
        if key != current_key:
            ignored += unused
            current_key, label, has_cls, unused = key, UNLABELED, False, 0
        if extension in SUFFIXES:
            images.append(member)
            labels.append(label)
            image_key, unused = key, 0
        elif extension == ".cls":
            label, has_cls = _read_label(path, member.name, read), True
        elif extension == ".json" and not has_cls:
            label = json_label(read()) or UNLABELED
        if image_key == key:  # a label may follow its image
            labels[-1] = label
        else:
            unused += 1
    return _arrays(images, labels) | {"ignored": ignored + unused}


def _read_label(path: str, name: str, read: Callable[[], bytes]) -> bytes:
    text = read().decode(errors="replace").strip()
    label = text_label(text)
    if label is None:
        raise DataError(
            f"{path}: {name}: expected a class index, or several separated by ';', "
            f"found {text[:40]!r}"
        )
    return label


def _arrays(members: Sequence[Any], labels: Sequence[bytes]) -> Index:
    """Return the `INDEX_ARRAYS` of members of an archive and their labels."""
    return {
        "starts": np.array([member.start for member in members], np.int64),
        "stops": np.array([member.stop for member in members], np.int64),
        "labels": np.array(labels, "S"),
        "names": np.array([os.fsencode(member.name) for member in members], "S"),
    }


def _expand_braces(pattern: str) -> list[str]:
    """Return a pattern for each number in ``{0000..1023}``, or the pattern itself."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    numbers = range(int(first), int(last) + 1)
    before, after = pattern[: found.start()], pattern[found.end() :]
    expanded = (f"{before}{n:0{len(first)}}{after}" for n in numbers)
    return [each for pattern in expanded for each in _expand_braces(pattern)]
