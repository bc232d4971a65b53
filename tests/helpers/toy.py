"""A user's own task and dataset: images of two sizes with one label per cell.

The task overrides most methods of `Task`.
"""

import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from PIL import Image

from hivit_jax.augment import image
from hivit_jax.data.sources.base import Source
from hivit_jax.data.transforms import Transform
from hivit_jax.keys import Key
from hivit_jax.models.norms import BatchNorm
from hivit_jax.tasks.base import Task

CELL, CLASSES = 8, 3  # side of a cell in pixels, number of classes
SIZES = ((32, 32), (32, 48))  # (height, width) of images; each size is a bucket
BROKEN = "train/07"  # image whose label map cannot be read


def write_dataset(root):
    """Write images of the two `SIZES`, with a label for each cell.

    The training split has 40 and 11 images of the two sizes, the test split 9 and 8.
    The labels are 0 (dark), 1 (middle) and 2 (bright). One label map cannot be read.
    """
    random = np.random.RandomState(0)
    for split, counts in (("train", (40, 11)), ("test", (9, 8))):
        directory = root / split
        directory.mkdir(parents=True)
        buckets = random.permutation([0] * counts[0] + [1] * counts[1])
        for index, bucket in enumerate(buckets):
            rows, columns = (side // CELL for side in SIZES[bucket])
            labels = random.randint(0, CLASSES, (rows, columns)).astype(np.uint8)
            pixels = labels.repeat(CELL, 0).repeat(CELL, 1)[..., None] * 90
            pixels = pixels + random.randint(0, 60, (*pixels.shape[:2], 3))
            path = directory / f"{index:02}"
            Image.fromarray(pixels.astype(np.uint8)).save(f"{path}.png")
            Image.fromarray(labels).save(f"{path}.map.png")
    (root / f"{BROKEN}.map.png").write_bytes(b"no image")


class Maps(Source):
    """Source of images, each with a label map in the same directory."""

    classes = ("dark", "middle", "bright")

    def __init__(self, split, directory):
        self._map_paths = sorted(Path(directory, split).glob("*.map.png"))

    def __len__(self):
        return len(self._map_paths)

    def sample(self, index):
        return {
            "image": Path(self._image_path(index)).read_bytes(),
            "map": self._map_paths[index].read_bytes(),
        }

    def name(self, index):
        return self._image_path(index)

    def _image_path(self, index):
        return str(self._map_paths[index]).replace(".map.png", ".png")


class MapTransform(Transform):
    """Transform that decodes image and map, and mirrors half of the training images."""

    draws = 1

    def __init__(self, batch_size, train):
        self.batch_size, self._train = batch_size, train
        self.shapes = tuple(
            {
                "image": jax.ShapeDtypeStruct((*size, 3), np.uint8),
                "map": jax.ShapeDtypeStruct(
                    tuple(side // CELL for side in size), np.int32
                ),
            }
            for size in SIZES
        )

    def bucket(self, size):
        return SIZES.index(size)

    def __call__(self, sample, draws, out):
        step = -1 if self._train and draws[0] < 0.5 else 1
        for name in ("image", "map"):
            if name in sample:  # because images to predict have no map
                pixels = np.asarray(Image.open(io.BytesIO(sample[name])))
                out[name][:] = pixels[:, ::step]


class Network(nnx.Module):
    """Network from images [B, 8h, 8w, 3] to logits [B, h, w, 3], with batch norm."""

    def __init__(self, rngs):
        self.embed = nnx.Linear(CELL * CELL * 3, 16, rngs=rngs)
        self.norm = BatchNorm(16)
        self.head = nnx.Linear(16, CLASSES, rngs=rngs)

    def __call__(self, images, weight=None):
        batch, height, width, _ = images.shape
        cells = images.reshape(batch, height // CELL, CELL, width // CELL, CELL, 3)
        cells = jnp.moveaxis(cells, 2, 3).reshape(
            batch, height // CELL, width // CELL, -1
        )
        return self.head(nnx.relu(self.norm(self.embed(cells), weight)))

    def parameter_count(self):
        return sum(x.size for x in jax.tree.leaves(nnx.state(self, nnx.Param)))


class Segmentation(Task):
    """Task that predicts the label of every cell."""

    # Config keys. The argument `keys` of the methods below contains PRNG keys.
    keys = {"prior": Key((0.0,) * CLASSES, "added to the logits", length=CLASSES)}
    best = ("eval/accuracy", "max")

    def build_model(self, key=None):
        key = jax.random.key(self.config.seed) if key is None else key
        return Network(nnx.Rngs(key))

    def optimizer(self, model, schedule):
        return optax.sgd(schedule, 0.9)  # Adam would amplify rounding errors

    def macs(self, model, layer_norm_cost=0):
        return (SIZES[0][0] // CELL) ** 2 * model.parameter_count()

    def frozen(self):
        return {"prior": np.float32(self.config.prior)}

    def transform(self, train):
        return MapTransform(self.config.batch_size if train else 8, train)

    def preprocess(self, batch):
        data = self.config.data
        return image.normalize(batch["image"], data.mean, data.std)

    def training_images(self, batch, keys):
        return self.preprocess(batch)

    def loss(self, model, frozen, batch, keys):
        logits = model(self.preprocess(batch), batch["weight"]) + frozen["prior"]
        return {"loss": cross_entropy(logits, batch["map"])}

    def eval_step(self, model, frozen, batch, keys):
        logits = model(self.preprocess(batch)) + frozen["prior"]
        predicted = logits.argmax(-1)
        weight = batch["weight"].astype(jnp.int32)[:, None, None]
        confusion = jnp.zeros((CLASSES, CLASSES), jnp.int32)
        confusion = confusion.at[batch["map"], predicted].add(weight)
        loss = cross_entropy(logits, batch["map"]) * batch["weight"]
        accuracy = (predicted == batch["map"]).mean((1, 2))
        return {"confusion": confusion, "loss": loss.sum()}, {"accuracy": accuracy}

    def predict_step(self, model, batch):
        return {"map": model(self.preprocess(batch)).argmax(-1)}

    def panels(self, model, frozen, batch, keys):
        predicted = model(self.preprocess(batch)).argmax(-1)
        return {"images": batch["image"], "maps": predicted}

    def records(self, rows):
        if "map" in rows:
            return [
                {"name": Path(str(name)).name, "map": label_map.tolist()}
                for name, label_map in zip(rows["name"], rows["map"], strict=True)
            ]
        pairs = zip(rows["index"].tolist(), rows["accuracy"].tolist(), strict=True)
        return [{"index": index, "accuracy": accuracy} for index, accuracy in pairs]

    def summarize(self, sums, count, records):
        confusion = sums["confusion"]
        return {
            "eval/loss": float(sums["loss"]) / count,
            "eval/accuracy": float(np.trace(confusion) / confusion.sum()),
            "eval/cells": int(confusion.sum()),
            "eval/worst": min(record["accuracy"] for record in records),
            "eval/distinct_images": len({record["index"] for record in records}),
        }

    def figures(self, panels):
        maps = panels["maps"].astype(np.uint8).repeat(CELL, 1).repeat(CELL, 2) * 127
        pairs = np.concatenate([panels["images"], maps[..., None].repeat(3, -1)], 2)
        return {"maps": np.concatenate(pairs)}

    def write_predictions(self, records, out):
        (out / "maps.json").write_text(json.dumps(records))


def cross_entropy(logits, labels):
    """Return the mean cross-entropy of each image [B]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean((1, 2))
