"""Write timm's results of all RandAugment operations as golden data.

    pip install --no-deps timm==1.0.31 pillow==12.3.0
    python -m benchmarks.golden_randaugment

The command writes tests/parity/golden/randaugment.npz, and was last run with these
versions. With Pillow 13, timm's PosterizeIncreasing fails at magnitude 10, because this
magnitude leaves 0 bits. All other results are equal with Pillow 13.
"""

import importlib.util
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from benchmarks.photographs import photographs

GOLDEN = Path(__file__).parents[1] / "tests/parity/golden/randaugment.npz"
MAGNITUDES = (0, 2.5, 5, 9, 10)
SIGNS = (1, -1)
# Settings that timm.data.create_transform derives from this policy, a 224x224 input,
# ImageNet's mean and bicubic interpolation.
POLICY = "rand-m9-mstd0.5-inc1"
SETTINGS = {
    "translate_const": 100,
    "img_mean": (124, 116, 104),
    "interpolation": Image.Resampling.BICUBIC,
}


def timm_auto_augment():
    """Import timm/data/auto_augment.py alone, because the rest of timm needs torch."""
    package = Path(importlib.util.find_spec("timm").origin).parent
    spec = importlib.util.spec_from_file_location(
        "auto_augment", package / "data" / "auto_augment.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def results(image: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Apply every operation to an image, uint8 [h, w, 3].

    Returns:
      Names of the operations, and images uint8 [names, MAGNITUDES, SIGNS, h, w, 3].
    """
    timm = timm_auto_augment()
    image = Image.fromarray(image)
    operations = timm.rand_augment_transform(POLICY, dict(SETTINGS)).ops
    images = []
    for operation in operations:
        operation.prob, operation.magnitude_std = 1.0, 0
        for operation.magnitude in MAGNITUDES:
            for sign in SIGNS:
                # timm negates the magnitude if a random number is above 0.5.
                with mock.patch.object(timm.random, "random", lambda s=sign: s < 0):
                    images.append(np.asarray(operation(image)))
    shape = (len(operations), len(MAGNITUDES), len(SIGNS), *images[0].shape)
    return [operation.name for operation in operations], np.reshape(images, shape)


if __name__ == "__main__":
    crops = {
        "wide": photographs()["coffee"][150:198, 200:264],
        "tall": photographs()["cat"][90:138, 150:190],
    }
    arrays = {"magnitudes": MAGNITUDES, "signs": SIGNS}
    for name, crop in crops.items():
        arrays[name] = crop
        arrays["names"], arrays[f"{name}_results"] = results(crop)
    np.savez_compressed(GOLDEN, **arrays)
