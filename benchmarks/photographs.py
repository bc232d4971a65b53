"""Write photographs from scikit-image and scikit-learn as class folders.

    python -m benchmarks.photographs DIR [--train 400] [--val 100]

There is one class per photograph. The images of a class are random crops of the
photograph with changed colors and noise. The images are JPEGs of 500x375 pixels and
about 85 KB, which is typical of ImageNet.
"""

import argparse
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image


@cache
def photographs() -> dict[str, np.ndarray]:
    """Return the photographs by name, uint8 [h, w, 3]."""
    import skimage.data
    from sklearn.datasets import load_sample_image

    return {
        "astronaut": skimage.data.astronaut(),
        "cat": skimage.data.chelsea(),
        "china": load_sample_image("china.jpg"),
        "coffee": skimage.data.coffee(),
        "flower": load_sample_image("flower.jpg"),
        "motorcycle": skimage.data.stereo_motorcycle()[0],
        "rocket": skimage.data.rocket(),
    }


def variant(photo: np.ndarray, seed: int, size: Sequence[int]) -> Image.Image:
    """Return a random crop of a photograph, with changed colors and noise.

    Args:
      photo: uint8 [h, w, 3].
      size: (width, height) of the result.
    """
    rng = np.random.RandomState(seed)
    height, width = photo.shape[:2]
    aspect = size[0] / size[1]
    h = min(height, width / aspect) * rng.uniform(0.6, 1)
    top, left = rng.uniform(0, height - h), rng.uniform(0, width - h * aspect)
    box = (left, top, left + h * aspect, top + h)
    image = Image.fromarray(photo).resize(tuple(size), Image.Resampling.BICUBIC, box)
    pixels = np.asarray(image) * rng.uniform(0.8, 1.2, 3)
    # Without noise, the files would be small.
    pixels += rng.normal(0, 9.5, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write(
    directory: str | Path,
    counts: dict[str, int],
    size: Sequence[int] = (500, 375),
    quality: int = 92,
) -> None:
    """Write images DIRECTORY/SPLIT/CLASS/NUMBER.JPEG.

    Args:
      counts: split -> number of images, which are distributed over the classes.
      size: (width, height) of the images.
    """
    seed = 0
    for split, count in counts.items():
        for index in range(count):
            name = sorted(photographs())[index % len(photographs())]
            path = Path(directory) / split / name / f"{index:05}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = variant(photographs()[name], seed, size)
            image.save(path, "JPEG", quality=quality)
            seed += 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("--train", type=int, default=400, help="number of images")
    parser.add_argument("--val", type=int, default=100, help="number of images")
    args = parser.parse_args()
    write(args.directory, {"train": args.train, "val": args.val})
