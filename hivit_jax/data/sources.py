"""Where images come from: a length, labels, and encoded images by index."""

import io
from collections.abc import Mapping
from functools import cache
from typing import Any, Protocol

import numpy as np

from hivit_jax.errors import ConfigError, DataError, unknown

# Images per split of datasets whose size is known without opening them.
SIZES = {"imagenet2012": {"train": 1_281_167, "test": 50_000}}
DIGITS_TEST = 360


class Source(Protocol):
    """One split of a dataset.

    labels: int32 [n], the class of every image.
    """

    labels: np.ndarray

    def __len__(self) -> int:
        """Number of images n."""

    def fetch(self, indices: np.ndarray) -> list[bytes]:
        """Encoded images (JPEG, PNG, ...) at these indices."""


class Digits:
    """scikit-learn's 1,797 scanned handwritten digits, 8x8 grey, as PNG.

    A fixed draw of 360 is the test split. `train_examples` > 0 keeps that many
    training images, equally many of each class, chosen by the number `subset`.
    """

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

    def fetch(self, indices: np.ndarray) -> list[bytes]:
        images = _digits()[0]
        return [_png(images[self._indices[i]]) for i in indices]

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


def num_examples(data: Mapping[str, Any], split: str) -> int:
    """Images in a split ("train" or "test"), without opening a large dataset."""
    if data["name"] in SIZES:
        return SIZES[data["name"]][split]
    if data["name"] == "synthetic":
        return (data["train_examples"] or 1024) if split == "train" else 64
    return len(open_source(data, split))


def open_source(data: Mapping[str, Any], split: str) -> Source:
    """Opens a split ("train" or "test") of the dataset that the config names.

    Raises:
      ConfigError: a name that is not known.
      DataError: a known dataset that cannot be read.
    """
    if data["name"] == "digits":
        return Digits(split, data["train_examples"], data["subset"])
    if data["name"] in SIZES:
        raise DataError(
            f"data.name={data['name']!r}: reading it is not part of this version; "
            "--config.data.name=synthetic runs the recipe on made-up images"
        )
    raise unknown("data.name", data["name"], ["digits", "synthetic", *SIZES])
