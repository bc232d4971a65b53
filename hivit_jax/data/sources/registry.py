"""Open the source that `data.name` selects."""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from hivit_jax.data import storage
from hivit_jax.data.sources.archives import WebDataset, Zip
from hivit_jax.data.sources.base import DatasetInfo, Source
from hivit_jax.data.sources.digits import NUM_TEST, NUM_TRAIN, Digits
from hivit_jax.data.sources.folder import Folder
from hivit_jax.data.sources.synthetic import Synthetic
from hivit_jax.data.sources.tfds import Tfds
from hivit_jax.errors import ConfigError, import_class
from hivit_jax.paths import expand

# data.name -> default names of the training and evaluation split; "": any other name.
DEFAULT_SPLITS = {"": ("train", "validation")} | dict.fromkeys(
    ("folder", "webdataset", "zip"), ("train", "val")
)
ARCHIVES = {"webdataset": WebDataset, "zip": Zip}


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


def num_examples(data: Mapping[str, Any], split: str) -> int:
    """Return the number of examples of a split ("train" or "test")."""
    return len(open_source(data, split))


def open_source(data: Mapping[str, Any], split: str) -> Source:
    """Open a split ("train" or "test") of the dataset that the config names.

    Args:
      data: the `data` section of a config.

    Raises:
      ConfigError: the name is unknown, or the dataset does not support
        `train_examples`.
      DataError: the dataset cannot be read.
    """
    keys = ("train_split", "eval_split", "train_examples", "subset")
    values = [data[key] for key in keys]
    directories = expand(data["dir"]), expand(data.get("cache", ""))
    return _open(split, data["name"], *directories, *values)


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
) -> Source:
    if name == "synthetic":
        return Synthetic(split, train_examples)
    if name == "digits":
        return Digits(split, train_examples, subset_seed)
    # A user's module:Class. A TFDS name such as "mnist:3.0.1" does not match, because
    # its version starts with a digit.
    if re.fullmatch(r"[\w.]+:[A-Za-z_]\w*", name):
        return import_class("data.name", name)(split, directory)
    defaults = DEFAULT_SPLITS.get(name, DEFAULT_SPLITS[""])
    train_split, eval_split = train_split or defaults[0], eval_split or defaults[1]
    split_name = train_split if split == "train" else eval_split
    if name == "folder":
        if cache_dir and storage.is_remote(directory):
            raise ConfigError(
                f"data.cache={cache_dir!r} with data.name='folder'; expected '': only "
                "shards are copied, such as tfrecord or tar files"
            )
        source = Folder(directory, split_name, train_split)
    elif name in ARCHIVES:
        source = ARCHIVES[name](directory, split_name, train_split, cache_dir)
    else:
        source = Tfds(name, directory, split_name, cache_dir)
    if train_examples:
        raise ConfigError(
            f"data.train_examples={train_examples} with data.name={name!r}; expected "
            "0; only digits and synthetic support train_examples"
        )
    return source
