"""Notes at the start of a run: ignored images, images of no class, 16-bit values."""

from contextlib import suppress

import numpy as np

from hivit_jax.data.rasters import read_values
from hivit_jax.data.sources.base import Source
from hivit_jax.data.sources.file_index import OUTSIDE
from hivit_jax.progress import counted


def split_notes(
    source: Source, indices: np.ndarray, split: str, dtype: str
) -> list[str]:
    """Return lines about ignored images, images of no class, and 16-bit images.

    Args:
      indices: indices of the examples that are read to find 16-bit values.
      dtype: `data.dtype`; 16-bit images are reported only for uint8.
    """
    notes = []
    if source.loose:
        count = source.ignored[OUTSIDE]
        more = count - len(source.loose)
        notes.append(
            f"{split} split: ignored {counted(count, 'image')} outside of the class "
            f"directories: {', '.join(source.loose)}"
            f"{f', ... and {more:,} more' if more else ''}"
        )
    labels = np.asarray(source.labels)
    if labels.ndim == 2 and (count := int((~labels.any(1)).sum())):
        notes.append(
            f"{count:,} of {len(labels):,} images of the {split} split have no label; "
            "they count as images of no class"
        )
    checked, num_16_bit = set(indices.tolist()), 0
    for index in checked if dtype == "uint8" else ():
        with suppress(Exception):  # damaged files cause exceptions of many types
            values = read_values(source.sample(index)["image"]).array
            num_16_bit += values.dtype == np.uint16
    if num_16_bit:
        notes.append(
            f"{num_16_bit} of {len(checked)} checked images of the {split} split have "
            "16 bits, which are reduced to 8 bits; data.dtype=uint16 keeps all 16"
        )
    return notes
