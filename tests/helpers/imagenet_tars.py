"""ImageNet's tar files with a few small images."""

import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from hivit_jax.tools import prepare_data

# WordNet IDs of the classes, in the order of the tar file of training images
WNIDS = ("n15075141", "n01440764", "n01443537")
LABELS = {"n15075141": 999, "n01440764": 0, "n01443537": 1}
# Labels of ILSVRC2012's validation images 1 to 6
VALIDATION_LABELS = [65, 970, 230, 809, 516, 57]


def write_tars(
    directory: Path,
    wnids: Sequence[str] = WNIDS,
    per_class: int = 5,
    validation: Iterable[int] = range(1, 7),
    size: tuple[int, int] = (48, 64),
) -> dict[str, dict[str, bytes]]:
    """Write ImageNet's two tar files, with images of noise.

    Args:
      per_class: number of training images of each class.
      validation: numbers of the validation images, as in their file names.
      size: (height, width) of the images.

    Returns:
      {split: {file name: JPEG}}, in the order of the tar files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(0)

    def noise_jpeg():
        buffer = io.BytesIO()
        pixels = random.randint(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(buffer, "JPEG")
        return buffer.getvalue()

    classes = {
        wnid: {f"{wnid}_{i}.JPEG": noise_jpeg() for i in range(per_class)}
        for wnid in wnids
    }
    images = {f"ILSVRC2012_val_{i:08d}.JPEG": noise_jpeg() for i in validation}
    tars = {f"{wnid}.tar": pack_tar(files) for wnid, files in classes.items()}
    (directory / prepare_data.TRAIN).write_bytes(pack_tar(tars))
    (directory / prepare_data.VALIDATION).write_bytes(pack_tar(images))
    train = {name: jpeg for files in classes.values() for name, jpeg in files.items()}
    return {"train": train, "validation": images}


def pack_tar(files: dict[str, bytes]) -> bytes:
    """Return a tar file that contains the files {name: content}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()
