"""Small dataset that TFDS prepares."""

import io
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


class NoiseImages(tfds.core.GeneratorBasedBuilder):
    """Dataset of noise JPEGs in two classes: 24 for training and 6 for validation."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        image = tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
        label = tfds.features.ClassLabel(names=["even", "odd"])
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({"image": image, "label": label}),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, manager):
        return {
            "train": self._generate_examples(0, 24),
            "validation": self._generate_examples(24, 30),
        }

    def _generate_examples(self, start, stop):
        random = np.random.RandomState(start)
        for i in range(start, stop):
            buffer = io.BytesIO()
            pixels = random.randint(0, 256, (40, 30 + i, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(buffer, "JPEG")
            buffer.seek(0)
            yield i, {"image": buffer, "label": i % 2}


def prepare(directory: Path, file_format: str) -> Path:
    """Prepare the dataset in four shards per split; return its directory."""
    config = tfds.download.DownloadConfig(num_shards=4)
    builder = NoiseImages(data_dir=directory, file_format=file_format)
    builder.download_and_prepare(download_config=config)
    return directory / "noise_images" / "1.0.0"
