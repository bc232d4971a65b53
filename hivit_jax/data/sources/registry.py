"""Open the source that `data.name` selects."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from hivit_jax.data import storage
from hivit_jax.data.sources.archives import WebDataset, Zip
from hivit_jax.data.sources.base import DatasetInfo, Source
from hivit_jax.data.sources.digits import NUM_TEST, NUM_TRAIN, Digits
from hivit_jax.data.sources.folder import FOLDER_SPLITS, Folder, folder_splits
from hivit_jax.data.sources.relabel import match_classes
from hivit_jax.data.sources.splits import (
    NO_EVALUATION,
    Selection,
    parse_slice,
    select,
)
from hivit_jax.data.sources.synthetic import Synthetic
from hivit_jax.data.sources.tables import Table, table_path
from hivit_jax.data.sources.tfds import Tfds
from hivit_jax.errors import ConfigError, DataError, MissingDirectory, import_class
from hivit_jax.paths import expand

# Datasets whose images `Selection` can select by path.
SELECTABLE = ("folder", "csv", "webdataset", "zip")
# data.name -> default names of the training and evaluation split; "": any other name.
DEFAULT_SPLITS = {
    "": ("train", "validation"),
    "folder": FOLDER_SPLITS,
    "webdataset": ("train", "val"),
    "zip": ("train", "val"),
    "csv": ("train.csv", "val.csv"),
}
ARCHIVES = {"webdataset": WebDataset, "zip": Zip}
SINGLE_LABEL = ("folder", "digits", "synthetic")


def published_info(data: Mapping[str, Any]) -> DatasetInfo | None:
    """Return facts about ImageNet or the digits without opening them.

    Args:
      data: the `data` section of a config.

    Returns:
      None for any other dataset.
    """
    if data["name"] == "imagenet2012":
        return DatasetInfo({"train": 1_281_167, "test": 50_000})
    if data["name"] == "digits":
        counts = {"train": data["train_examples"] or NUM_TRAIN, "test": NUM_TEST}
        return DatasetInfo(counts, Digits.classes)
    return None


def open_source(
    data: Mapping[str, Any], split: str, classes: Sequence[str] = ()
) -> Source:
    """Open a split ("train" or "test") of the dataset that the config selects.

    Args:
      data: the `data` section of a config.
      classes: class names of a trained model, used only for the test split. Its labels
        then refer to these names (`match_classes`), and its files or archives can be
        opened without the training split. (): the training split determines the
        classes.

    Raises:
      ConfigError: the name is unknown, the dataset does not support `train_examples`,
        or it has other classes than the model.
      DataError: the dataset cannot be read.
    """
    keys = ("train_split", "eval_split", "train_examples", "subset")
    values = {key: data[key] for key in keys}
    # Configs of earlier versions and of other programs may lack the following keys.
    optional = ("eval_fraction", "eval_group", "exclude")
    selection = Selection(**{key: data[key] for key in optional if key in data})
    label_options = data.get("class_level", "top"), data.get("multi_label", False)
    directories = expand(data["dir"]), expand(data.get("cache", ""))
    classes_known, name = bool(classes) and split == "test", data["name"]
    if classes_known and not selection.eval_fraction and name in SELECTABLE:
        # The split's own classes suffice, so that no training split is needed.
        values["train_split"] = values["eval_split"] or DEFAULT_SPLITS[name][1]
    options = *values.values(), selection, *label_options, classes_known
    source = _open(split, name, *directories, *options)
    return match_classes(source, classes, data["dir"]) if classes_known else source


@lru_cache(maxsize=8)
def _open(
    split: str,
    name: str,
    directory: str,
    cache_dir: str,
    train_split: str,
    eval_split: str,
    train_examples: int,
    subset_seed: int,
    selection: Selection,
    class_level: str,
    multi_label: bool,
    classes_known: bool,
) -> Source:
    if split == "test" and eval_split == NO_EVALUATION:
        raise ConfigError(
            "data.eval_split='none': the config has no evaluation images; set "
            "data.eval_split or data.eval_fraction"
        )
    _check_selection(name, selection, class_level, eval_split)
    if multi_label and name in SINGLE_LABEL:
        raise ConfigError(
            f"data.multi_label=True with data.name={name!r}; expected 'csv', "
            "'webdataset', 'zip', a TFDS name or your own module:Class"
        )
    if name == "synthetic":
        return Synthetic(split, train_examples)
    if name == "digits":
        return Digits(split, train_examples, subset_seed)
    # This matches a user's module:Class, but not a TFDS name such as "mnist:3.0.1",
    # because the version starts with a digit.
    if re.fullmatch(r"[\w.]+:[A-Za-z_]\w*", name):
        return import_class("data.name", name)(split, directory)
    _check_directory(name, directory)
    splits = train_split, eval_split
    if name == "folder":
        if cache_dir and storage.is_remote(directory):
            raise ConfigError(
                f"data.cache={cache_dir!r} with data.name='folder'; expected '': only "
                "shards are copied, such as tfrecord or tar files"
            )
        source = _open_folder(directory, split, *splits, selection, class_level)
    elif name in ARCHIVES:
        options = *splits, selection, multi_label
        source = _open_archives(name, directory, cache_dir, split, *options)
    elif name == "csv":
        options = *splits, selection, multi_label, classes_known
        source = _open_table(directory, split, *options)
    else:
        index = ("train", "test").index(split)
        split_name = splits[index] or DEFAULT_SPLITS[""][index]
        source = Tfds(name, directory, split_name, cache_dir, multi_label)
    if train_examples:
        raise ConfigError(
            f"data.train_examples={train_examples} with data.name={name!r}; expected "
            "0; only digits and synthetic support train_examples"
        )
    return source


def _check_selection(
    name: str, selection: Selection, class_level: str, eval_split: str
) -> None:
    """Raise ConfigError for keys that contradict each other or have no effect."""
    selection.check(eval_split)
    changed = {key: value for key, value in asdict(selection).items() if value}
    if class_level != "top":
        changed["class_level"] = class_level
    for key, value in changed.items():
        supported = ("folder",) if key == "class_level" else SELECTABLE
        if name not in supported:
            raise ConfigError(
                f"data.{key}={value!r} has no effect with data.name={name!r}; expected "
                f"data.name to be one of: {', '.join(supported)}"
            )


def _check_directory(name: str, directory: str) -> None:
    """Raise MissingDirectory if `data.dir` is required but empty, or does not exist."""
    if name in SELECTABLE and not directory:
        raise MissingDirectory(
            f"data.name={name!r} requires data.dir=DIR; data.dir=. is the current "
            "directory"
        )
    is_local = directory and not storage.is_remote(directory)
    if is_local and not os.path.exists(directory):
        relative = "" if os.path.isabs(directory) else f", relative to {os.getcwd()}"
        raise MissingDirectory(
            f"data.dir={directory!r} does not exist{relative}; set "
            "--config.data.dir=PATH to the dataset"
        )


def _open_folder(
    directory: str,
    split: str,
    train_split: str,
    eval_split: str,
    selection: Selection,
    class_level: str,
) -> Source:
    """Open a split of class folders or unlabeled images."""
    has_eval_split = eval_split != NO_EVALUATION and not selection.eval_fraction
    splits = folder_splits(directory, train_split, eval_split, has_eval_split)
    chosen, train, percent = _parse_splits(split, *splits, selection)
    source = Folder(directory, chosen, train, class_level)
    return select(source, selection, split == "test", percent)


def _parse_splits(
    split: str, train_split: str, eval_split: str, selection: Selection
) -> tuple[str, str, tuple[int, int]]:
    """Return the names of a split and of the training split, and the split's slice.

    With `eval_fraction`, the evaluation images are held out of the training split.
    """
    train, percent = parse_slice(train_split)
    if split == "train" or selection.eval_fraction:
        return train, train, percent
    chosen, percent = parse_slice(eval_split)
    return chosen, train, percent


def _open_archives(
    name: str,
    directory: str,
    cache_dir: str,
    split: str,
    train_split: str,
    eval_split: str,
    selection: Selection,
    multi_label: bool,
) -> Source:
    """Open a split of the images in tar or zip files."""
    defaults = DEFAULT_SPLITS[name]
    splits = train_split or defaults[0], eval_split or defaults[1]
    chosen, train, percent = _parse_splits(split, *splits, selection)
    source = ARCHIVES[name](directory, chosen, train, cache_dir, multi_label)
    return select(source, selection, split == "test", percent)


def _open_table(
    directory: str,
    split: str,
    train_split: str,
    eval_split: str,
    selection: Selection,
    multi_label: bool,
    classes_known: bool,
) -> Source:
    """Open a split of the images that are listed in a CSV file or a list of paths.

    If `directory` is a directory, it contains the files `train_split` and `eval_split`.
    If it is a file, the two names are values of the file's column "split". This column
    takes precedence over `eval_fraction`. With `classes_known`, the test split of a
    file without this column is the whole file.
    """
    if Path(directory).is_file():
        train_file = file = table_path(directory, "")
        split_name = train_split if split == "train" else eval_split
    else:
        train_default, eval_default = DEFAULT_SPLITS["csv"]
        train_file = file = table_path(directory, train_split or train_default)
        split_name = ""
        if split == "test" and not selection.eval_fraction:
            file = table_path(directory, eval_split or eval_default)
    source = Table(file, train_file, split, split_name, multi_label)
    if source.has_splits:
        return select(source, replace(selection, eval_fraction=0.0), False)
    is_unsplit = file == train_file and not selection.eval_fraction
    needs_column = split == "test" and not classes_known
    if is_unsplit and (needs_column or split_name):
        raise DataError(
            f"{file} has no column 'split'; set data.eval_fraction=0.1 to hold out "
            "images, or data.eval_split=none to train without evaluation"
        )
    return select(source, selection, split == "test")
