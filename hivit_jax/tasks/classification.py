"""Classification: finetuning from a pretrained encoder, or training from scratch."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from hivit_jax import rng
from hivit_jax.augment import image, mixing
from hivit_jax.errors import ConfigError
from hivit_jax.keys import Key
from hivit_jax.models.classifier import Classifier
from hivit_jax.rng import Keys
from hivit_jax.tasks.base import (
    PerSample,
    Rows,
    Sums,
    Task,
    topk_correct,
    weighted_sums,
)


class Classification(Task):
    """Cross entropy with label smoothing, random erasing, Mixup and CutMix."""

    keys = {
        "label_smoothing": Key(0.0, "probability spread over all classes", 0, 1),
        "mixup": Key(0.0, "alpha of Mixup; 0: none", 0),
        "cutmix": Key(0.0, "alpha of CutMix; 0: none", 0),
        "random_erasing": Key(0.0, "probability that a rectangle is erased", 0, 1),
    }
    best = ("eval/top1", "max")
    head_scale = 2e-5 / 0.02  # official ``main_finetune.py``
    # Official ``main_finetune.py`` spares both kinds of position table.
    decayed = ("kernel",)
    undecayed = (
        "bias",
        "scale",
        "absolute_pos_embed",
        "relative_position_bias_table",
    )
    model_class = Classifier

    @classmethod
    def check(cls, config: Any) -> None:
        """As `Task.check`; ConfigError also if batches cannot be mixed in pairs."""
        super().check(config)
        mixup, cutmix = config.get("mixup"), config.get("cutmix")
        part = config.batch_size // config.optimizer.accumulate_steps
        if part % cls.batch_multiple(config):
            raise ConfigError(
                f"mixup={mixup}, cutmix={cutmix} mix pairs of images; "
                f"batch_size / accumulate_steps is {part}, expected an even number"
            )

    @classmethod
    def batch_multiple(cls, config: Any) -> int:
        """2 if images are mixed in pairs."""
        return 2 if config.get("mixup") or config.get("cutmix") else 1

    def loss(
        self, model: Classifier, frozen: Any, batch: dict, keys: Keys
    ) -> PerSample:
        """Cross entropy with the mixed targets; hits of the true labels."""
        images, targets = self.augment_with_targets(batch, keys)
        drop_path_keys = rng.split_keys(keys.samples, "drop_path")
        logits = model(images, drop_path_keys=drop_path_keys)
        loss = optax.softmax_cross_entropy(logits, targets)
        return {"loss": loss, **topk_correct(logits, batch["label"])}

    def augment_with_targets(
        self, batch: dict, keys: Keys
    ) -> tuple[jax.Array, jax.Array]:
        """Images of a training batch, flipped, erased and mixed, float32 [B, H, W, C];
        and their smoothed, mixed targets, float32 [B, classes].
        """
        config, images = self.config, self.augment_batch(batch, keys)
        with jax.named_scope("input"):
            targets = mixing.smooth_labels(
                batch["label"], config.model.num_classes, config.label_smoothing
            )
            if config.random_erasing:
                erase_keys = rng.split_keys(keys.samples, "erase")
                images = image.random_erasing(images, erase_keys, config.random_erasing)
            if config.mixup or config.cutmix:
                images, targets = mixing.mix(
                    images,
                    targets,
                    batch["weight"],
                    keys.step,
                    mixup=config.mixup,
                    cutmix=config.cutmix,
                )
        return images, targets

    def training_images(self, batch: dict, keys: Keys) -> jax.Array:
        """As `Task.training_images`, erased and mixed too."""
        return self.augment_with_targets(batch, keys)[0]

    def eval_step(
        self, model: Classifier, frozen: Any, batch: dict, keys: Keys
    ) -> tuple[Sums, Rows]:
        """Sums of cross entropy and hits; no rows."""
        logits = model(self.preprocess(batch))
        return weighted_sums(scores(logits, batch["label"]), batch["weight"]), {}

    def predict_step(self, model: Classifier, batch: dict) -> Rows:
        """{"probabilities": float32 [B, classes]}."""
        return {"probabilities": jax.nn.softmax(model(self.preprocess(batch)))}

    def records(self, rows: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
        """Name and probability of the best class of each image."""
        if "probabilities" not in rows:
            return []
        best = rows["probabilities"].argmax(-1)
        found = zip(rows["name"], best, rows["probabilities"], strict=True)
        return [
            {
                "name": str(name),
                "class": self._class_name(k),
                "probability": float(p[k]),
            }
            for name, k, p in found
        ]

    def _class_name(self, number: int) -> str:
        classes = self.data.classes
        return classes[number] if number < len(classes) else str(number)

    def write_predictions(self, records: list[Any], out: Path) -> None:
        """Write predictions.csv: name, class, probability."""
        with open(out / "predictions.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, ("name", "class", "probability"))
            writer.writeheader()
            writer.writerows(records)


def scores(logits: jax.Array, labels: jax.Array) -> PerSample:
    """Cross entropy, top-1 and top-5 hits of logits [B, classes]."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return {"loss": loss, **topk_correct(logits, labels)}
