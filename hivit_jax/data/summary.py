"""Facts about the images of splits: pixel statistics, file kinds, shared images."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from threading import Lock

import numpy as np
import simplejpeg

from hivit_jax.augment.resample import MAXIMUM
from hivit_jax.data.rasters import read_values


class Summary:
    """Facts about decoded images. Several threads call `add` concurrently.

    Args:
      channels: number of channels of the decoded images.

    Attributes:
      digests: index of an example -> digest of its file.
      kinds: "CHANNELS x DTYPE" of the files -> number of files.
      dropped: index of an example whose channels are partly dropped -> detail as text.
      num_reduced: number of 16-bit files that are reduced to 8 bits.
    """

    def __init__(self, channels: int):
        self.digests: dict[int, bytes] = {}
        self.kinds: Counter[str] = Counter()
        self.dropped: dict[int, str] = {}
        self.num_reduced = 0
        self._lock, self._channels = Lock(), channels
        self._num_pixels = self._black = self._white = 0
        self._sums, self._squares = np.zeros((2, channels))

    def add(self, index: int, encoded: bytes, pixels: np.ndarray) -> None:
        """Add an example.

        Args:
          encoded: content of the file.
          pixels: the decoded image, [h, w, C].
        """
        digest = blake2b(encoded, digest_size=16).digest()
        num_bands, dtype, drops = _stored_kind(encoded, self._channels)
        flat = pixels.reshape(-1, self._channels)
        sums, squares, (black, white) = _moments(flat)
        with self._lock:
            self.digests[index] = digest
            self.kinds[f"{num_bands} x {dtype}"] += 1
            self.num_reduced += dtype == "uint16" and pixels.dtype == np.uint8
            if drops:
                self.dropped[index] = f"{num_bands} channels, {self._channels} are used"
            self._num_pixels += len(flat)
            self._sums += sums
            self._squares += squares
            self._black += black
            self._white += white

    def mean_and_std(self, scale: float) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation per channel, of pixels / `scale`."""
        mean = self._sums / max(self._num_pixels, 1)
        variance = self._squares / max(self._num_pixels, 1) - mean**2
        return mean / scale, np.sqrt(np.maximum(variance, 0)) / scale

    def extreme_fractions(self) -> tuple[float, float]:
        """Return the fractions of values at both ends of the dtype's range.

        They are 0 for float32, which has no such range.
        """
        num_values = max(self._num_pixels * self._channels, 1)
        return self._black / num_values, self._white / num_values


def _moments(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Return sums and sums of squares [C], and numbers of black and white values."""
    white = MAXIMUM[flat.dtype.name]
    if flat.dtype == np.uint8:
        counts = np.array([np.bincount(column, minlength=256) for column in flat.T])
        levels = np.arange(256.0)
        extremes = int(counts[:, 0].sum()), int(counts[:, 255].sum())
        return counts @ levels, counts @ levels**2, extremes
    values = flat.astype(np.float64)
    extremes = int((flat == 0).sum()), int((flat == white).sum())
    extremes = (0, 0) if flat.dtype == np.float32 else extremes
    return values.sum(0), (values**2).sum(0), extremes


def _stored_kind(encoded: bytes, channels: int) -> tuple[int, str, bool]:
    """Return number of channels and dtype of a file, and True if some are dropped."""
    try:
        space = simplejpeg.decode_jpeg_header(encoded)[2]
        return {"Gray": 1, "CMYK": 4, "YCCK": 4}.get(space, 3), "uint8", False
    except ValueError:
        pass  # another format
    try:
        stored = read_values(encoded)
    except Exception:  # formats that only PIL supports fully
        return channels, "unknown", False
    num_bands = stored.array.shape[-1]
    # `image_findings` reports the other drops: alpha channels read by PIL, and pages.
    may_drop = not stored.mode and stored.num_frames == 1
    return num_bands, stored.array.dtype.name, may_drop and num_bands > channels > 1


def equal_files(splits: Sequence[Mapping[int, bytes]]) -> list[tuple[int, int]]:
    """Return indices (train, test) for each evaluation file equal to a training file.

    Args:
      splits: {index: digest} of the training split and of the evaluation split.
    """
    train_index = {digest: index for index, digest in reversed([*splits[0].items()])}
    test = sorted(splits[1].items())
    pairs = ((train_index.get(digest), index) for index, digest in test)
    return [(train, index) for train, index in pairs if train is not None]


def shared_groups(pattern: str, splits: Sequence[Iterable[str]]) -> list[str]:
    """Return the values of a pattern's first group that both splits contain, sorted.

    Args:
      splits: names of the images of the two splits.
    """
    found = []
    for names in splits:
        matches = (re.search(pattern, name) for name in names)
        # match[1] is None if the group is optional in the pattern and did not match.
        found.append({match[1] for match in matches if match and match[1]})
    return sorted(found[0] & found[1])
