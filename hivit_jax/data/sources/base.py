"""Interface of a source, and facts about a dataset."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Or another dataset of TFDS, or ``module:Class``: a `Source` of a user's own, which is
# called with "train" or "test" and `data.dir`.
NAMES = ("digits", "folder", "imagenet2012", "synthetic")


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
