"""Interface of a dataset source, and facts about a dataset."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# `data.name` may also be another TFDS dataset or ``module:Class``, a user's `Source`
# that is called with "train" or "test" and `data.dir`.
KNOWN_DATASETS = ("digits", "folder", "imagenet2012", "synthetic")


@dataclass(frozen=True)
class DatasetInfo:
    """Facts about a dataset that a task depends on.

    Attributes:
      counts: number of examples by split, "train" or "test".
      classes: class names in the order of the labels.
      encoded: True if examples are read and decoded, False if batches are synthetic.
    """

    counts: Mapping[str, int]
    classes: tuple[str, ...] = ()
    encoded: bool = True


class Source:
    """One split of a dataset. Several threads call its methods at once.

    Attributes:
      classes: class names in the order of the labels.
      ignored: number of files of the split's directories that are not examples, by
        ending or other reason.
      encoded: see `DatasetInfo`.
    """

    classes: Sequence[str] = ()
    ignored: Mapping[str, int] = {}
    encoded: bool = True

    def __len__(self) -> int:
        """Return the number of examples."""
        raise NotImplementedError

    def sample(self, index: int) -> dict[str, Any]:
        """Return the encoded parts of an example, such as "image" bytes, "label" int.

        Raises:
          Exception: an error of any type if the example cannot be read.
        """
        raise NotImplementedError

    def ask(self, index: int) -> None:
        """Start to read an example for a later call of `sample`. Optional."""

    def size(self, index: int) -> tuple[int, int]:
        """Return (height, width) of an image from its file header, cached."""
        from PIL import Image

        # Created here, because subclasses need not call __init__; `setdefault` does not
        # replace the cache that another thread creates at the same time.
        sizes = self.__dict__.setdefault("_sizes", {})
        if index not in sizes:
            with Image.open(self._image_file(index)) as image:
                sizes[index] = image.height, image.width
        return sizes[index]

    def _image_file(self, index: int) -> Any:
        """Return the path or file object from which PIL opens an image."""
        return io.BytesIO(self.sample(index)["image"])

    def name(self, index: int) -> str:
        """Return a name that identifies an example in messages, such as its path."""
        return f"example {index}"

    def ignored_text(self) -> str:
        """Describe `ignored`, most frequent first; "" if there is none."""
        ordered = sorted(self.ignored.items(), key=lambda item: (-item[1], item[0]))
        parts = [f"{count:,} {reason}" for reason, count in ordered[:8]]
        if others := sum(count for _, count in ordered[8:]):
            parts.append(f"{others:,} with other endings")
        return ", ".join(parts)
