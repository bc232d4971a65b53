"""Where images come from: how many, their classes, and encoded images by index."""

import hashlib
import io
import os
import re
import resource
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from hivit_jax.errors import ConfigError, DataError, import_class, unknown

# Or another dataset of TFDS, or ``module:Class``: a `Source` of a user's own, which is
# called with "train" or "test" and `data.dir`.
NAMES = ("digits", "folder", "imagenet2012", "synthetic")
NAMED_SPLITS = {"folder": ("train", "val"), "": ("train", "validation")}
INDEX = ("classes", "counts", "files")  # of a class folder, cached
DIGITS_TEST = 360
SYNTHETIC = {"train": 1024, "test": 64}
FORMATS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class DatasetInfo:
    """What a task needs to know of a dataset.

    Attributes:
      counts: examples of each split that is used, "train" or "test".
      classes: name of every class, in the order of the labels.
      encoded: whether examples are read and decoded; made-up ones have the shapes of
        the transform.
    """

    counts: Mapping[str, int]
    classes: tuple[str, ...] = ()
    encoded: bool = True


# For where the dataset is not available.
IMAGENET = DatasetInfo({"train": 1_281_167, "test": 50_000})


class Source:
    """One split of a dataset. Its methods may run in many threads.

    Attributes:
      classes: name of every class, in the order of the labels.
      encoded: see `DatasetInfo`.
    """

    classes: Sequence[str] = ()
    encoded: bool = True

    def __len__(self) -> int:
        """Number of examples n."""
        raise NotImplementedError

    def sample(self, index: int) -> dict[str, Any]:
        """Encoded parts of an example by name, such as "image" bytes and "label" int.

        Raises:
          Exception: of any kind, if it cannot be read.
        """
        raise NotImplementedError

    def ask(self, index: int) -> None:
        """Start reading an example that `sample` will soon be called for."""

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of the image, from the header of its file; cached."""
        from PIL import Image

        if not hasattr(self, "_sizes"):
            self._sizes: dict[int, tuple[int, int]] = {}
        if index not in self._sizes:
            with Image.open(self._open(index)) as image:
                self._sizes[index] = image.height, image.width
        return self._sizes[index]

    def _open(self, index: int) -> Any:
        """The image as a path or file for PIL."""
        return io.BytesIO(self.sample(index)["image"])

    def name(self, index: int) -> str:
        """Name by which a person finds the example."""
        return f"example {index}"


class Synthetic(Source):
    """Noise of the shapes that a transform asks for; reads nothing."""

    encoded = False

    def __init__(self, split: str, train_examples: int = 0):
        self._count = split == "train" and train_examples or SYNTHETIC[split]

    def __len__(self) -> int:
        return self._count


class Images(Source):
    """Images without labels: a file, or all files of a directory of any depth, sorted.

    Raises:
      DataError: no image there.
    """

    def __init__(self, path: str | Path, classes: Sequence[str] = ()):
        path, self.classes = Path(path).expanduser(), classes
        found = [path] if path.is_file() else sorted(path.rglob("*"))
        self._files = [f for f in found if f.suffix.lower() in FORMATS and f.is_file()]
        if not self._files:
            raise DataError(
                f"{path}: no image; expected files that end in {', '.join(FORMATS)}"
            )

    def __len__(self) -> int:
        return len(self._files)

    def sample(self, index: int) -> dict[str, Any]:
        return {"image": self._files[index].read_bytes()}

    def name(self, index: int) -> str:
        return str(self._files[index])


class Digits(Source):
    """scikit-learn's 1,797 scanned handwritten digits, 8x8 grey, as PNG.

    A fixed draw of 360 is the test split. `train_examples` > 0 keeps that many
    training images, equally many of each class, chosen by the number `subset`.
    """

    classes = tuple("0123456789")

    def __init__(self, split: str, train_examples: int = 0, subset: int = 0):
        images, labels = _digits()
        order = np.random.RandomState(0).permutation(len(images))
        test, train = order[:DIGITS_TEST], order[DIGITS_TEST:]
        if split == "train" and train_examples:
            if train_examples % 10 or train_examples > 1000:
                raise ConfigError(
                    f"data.train_examples={train_examples}: expected 0 for all, or a "
                    "multiple of the 10 classes up to 1000"
                )
            shuffled = np.random.RandomState(1 + subset).permutation(train)
            per_class = train_examples // 10
            train = np.concatenate(
                [shuffled[labels[shuffled] == k][:per_class] for k in range(10)]
            )
        self._indices = train if split == "train" else test
        self.labels = labels[self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def sample(self, index: int) -> dict[str, Any]:
        image = _png(_digits()[0][self._indices[index]])
        return {"image": image, "label": int(self.labels[index])}

    def name(self, index: int) -> str:
        return f"digit {self._indices[index]}"

    def pixels(self) -> np.ndarray:
        """All images of the split as they were scanned, uint8 [n, 8, 8]."""
        return _digits()[0][self._indices]


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 17 grey levels
    return images, digits.target.astype(np.int32)


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


class Folder(Source):
    """Class folders, ``ROOT/{train,val}/CLASS/*.JPEG``, as torchvision reads them.

    Classes are the sorted directories of the train split, for every split; images the
    sorted files below them. The index is cached until a directory changes.

    Raises:
      DataError: no such split, a class without images, a class that is not in train.
    """

    def __init__(self, directory: str, split: str, train_split: str = "train"):
        root = Path(directory).expanduser()
        self._root = root / split
        for needed in (root / train_split, self._root):
            if not needed.is_dir():
                found = sorted(p.name for p in root.iterdir()) if root.is_dir() else []
                raise DataError(
                    f"no directory {needed}; in data.dir={str(root)!r} there is "
                    f"{', '.join(found[:8]) or 'nothing'}"
                )
        self.classes = _directories(root / train_split)
        index = _index(self._root)
        self._files, found = index["files"], index["classes"].tolist()
        strange = sorted(set(found) - set(self.classes))
        if strange:
            raise DataError(
                f"{self._root / strange[0]}: {len(strange)} of the classes of {split} "
                f"are not in {train_split}, which has {len(self.classes)}"
            )
        empty = [name for name, n in zip(found, index["counts"], strict=True) if not n]
        if empty or not found:
            raise DataError(
                f"{self._root.joinpath(*empty[:1])}: no image; expected files that end "
                f"in {', '.join(FORMATS)}"
            )
        numbers = np.array([self.classes.index(name) for name in found], np.int32)
        self.labels = np.repeat(numbers, index["counts"])

    def __len__(self) -> int:
        return len(self._files)

    def sample(self, index: int) -> dict[str, Any]:
        with open(self.name(index), "rb", buffering=0) as file:
            return {"image": file.read(), "label": int(self.labels[index])}

    def _open(self, index: int) -> str:
        return self.name(index)

    def name(self, index: int) -> str:
        return f"{self._root}/{os.fsdecode(self._files[index])}"


def _directories(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def _index(root: Path) -> dict[str, np.ndarray]:
    """What a split's directory holds, from the user's cache if nothing has changed.

    Returns:
      classes: names, str [k]; counts: images of each, int [k]; files: path of every
      image, bytes [n].
    """
    cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    key = hashlib.sha256(os.fsencode(root.absolute())).hexdigest()[:16]
    path = cache_dir / "hivit_jax" / f"{key}.npz"
    try:
        with np.load(path) as found:
            if (_times(found["directories"]) == found["times"]).all():
                return {name: found[name] for name in INDEX}
    except (OSError, ValueError, KeyError):
        pass  # none, of directories that are gone, of another version, or damaged
    classes, counts, files, directories = _directories(root), [], [], [root]
    for name in classes:
        before = len(files)
        for directory, _, names in sorted(os.walk(root / name, followlinks=True)):
            directories.append(directory)
            images = [n for n in sorted(names) if n.lower().endswith(FORMATS)]
            inside = os.path.relpath(directory, root)
            files += [os.fsencode(os.path.join(inside, n)) for n in images]
        counts.append(len(files) - before)
    directories = np.array([os.fsencode(d) for d in directories], "S")
    index = {
        "classes": np.array(classes, "U"),
        "counts": np.array(counts, np.int64),
        "files": np.array(files, "S"),
        "directories": directories,
        "times": _times(directories),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(temporary, **index)
        temporary.replace(path)
    except OSError:
        pass  # it is only slower next time
    return index


def _times(directories: np.ndarray) -> np.ndarray:
    return np.array([os.stat(d).st_mtime_ns for d in directories.tolist()])


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
        f"hivit_jax.data.prepare --name {base} prepares it"
    )


def num_examples(data: Mapping[str, Any], split: str) -> int:
    """Images in a split ("train" or "test")."""
    return len(open_source(data, split))


def open_source(data: Mapping[str, Any], split: str) -> Source:
    """Opens a split ("train" or "test") of the dataset that the config names.

    Raises:
      ConfigError: a name that is not known, or a subset of a dataset that has none.
      DataError: a known dataset that cannot be read.
    """
    keys = ("name", "dir", "train_split", "eval_split", "train_examples", "subset")
    return _open(split, *(data[key] for key in keys))


@lru_cache(maxsize=8)
def _open(
    split: str,
    name: str,
    directory: str,
    train_split: str,
    eval_split: str,
    train_examples: int,
    subset: int,
) -> Source:
    if name == "synthetic":
        return Synthetic(split, train_examples)
    if name == "digits":
        return Digits(split, train_examples, subset)
    if re.fullmatch(r"[\w.]+:[A-Za-z_]\w*", name):  # TFDS has a version there
        return import_class("data.name", name)(split, directory)
    ours = NAMED_SPLITS.get(name, NAMED_SPLITS[""])
    train_split, eval_split = train_split or ours[0], eval_split or ours[1]
    wanted = train_split if split == "train" else eval_split
    if name == "folder":
        source = Folder(directory, wanted, train_split)
    else:
        source = Tfds(name, directory, wanted)
    if train_examples:
        raise ConfigError(
            f"data.train_examples={train_examples} with data.name={name!r}; expected "
            "0: only digits has subsets"
        )
    return source
