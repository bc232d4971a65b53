"""Scanned digits of scikit-learn."""

import io
from functools import cache
from typing import Any

import numpy as np

from hivit_jax.data.sources.base import Source
from hivit_jax.errors import ConfigError

DIGITS_TEST = 360


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
