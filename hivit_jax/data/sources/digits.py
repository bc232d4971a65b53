"""scikit-learn's handwritten digits."""

import io
from functools import cache
from typing import Any

import numpy as np

from hivit_jax.data.sources.base import Source
from hivit_jax.errors import ConfigError, require

NUM_TRAIN, NUM_TEST = 1437, 360


class Digits(Source):
    """scikit-learn's 1,797 handwritten digits, 8x8 grayscale, encoded as PNG.

    The test split is a fixed random sample of 360 images.

    Args:
      train_examples: size of a class-balanced subset of the training split; 0: all.
      subset_seed: seed that selects the subset.
    """

    classes = tuple("0123456789")

    def __init__(self, split: str, train_examples: int = 0, subset_seed: int = 0):
        images, labels = _digits()
        order = np.random.RandomState(0).permutation(len(images))
        test, train = order[:NUM_TEST], order[NUM_TEST:]
        if split == "train" and train_examples:
            if train_examples % 10 or train_examples > 1000:
                raise ConfigError(
                    f"data.train_examples={train_examples}: expected 0 (all) or a "
                    "multiple of 10 up to 1000, so that the 10 classes are balanced"
                )
            shuffled = np.random.RandomState(1 + subset_seed).permutation(train)
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
        """Return all images of the split, uint8 [n, 8, 8]."""
        return _digits()[0][self._indices]


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    digits = require("sklearn.datasets", "hivit-jax[data]").load_digits()
    # load_digits returns levels from 0 to 16.
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return images, digits.target.astype(np.int32)


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
