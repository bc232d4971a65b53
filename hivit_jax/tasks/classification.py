"""Classification: finetuning from a pretrained encoder, or training from scratch."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from hivit_jax import rng
from hivit_jax.augment import image as image_ops
from hivit_jax.augment import mixing
from hivit_jax.data.sources.base import DatasetInfo, Source
from hivit_jax.data.transforms import evaluation_image
from hivit_jax.errors import ConfigError
from hivit_jax.keys import Key
from hivit_jax.models import configure, variant
from hivit_jax.models.classifier import Classifier
from hivit_jax.reporting.multi_label import mean_average_precision
from hivit_jax.rng import Keys
from hivit_jax.tasks import predictions
from hivit_jax.tasks.base import PerSample, Rows, Sums, Task, weighted_sums
from hivit_jax.tasks.defaults import model_arguments, pixel_scale
from hivit_jax.tasks.metrics import (
    classification_metrics,
    multi_label_metrics,
    topk_correct,
)


class Classification(Task):
    """Task with cross entropy, label smoothing, random erasing, Mixup and CutMix.

    With `data.multi_label`, the loss is the binary cross entropy, averaged over all
    classes, and the best checkpoint has the largest mean average precision.
    """

    keys = {
        "label_smoothing": Key(
            0.0,
            "target probability that is spread over all classes, or with "
            "`data.multi_label` over both outcomes of each class",
            0,
            below=1,
        ),
        "mixup": Key(0.0, "alpha of Mixup; 0: off", 0, 1000),
        "cutmix": Key(0.0, "alpha of CutMix; 0: off", 0, 1000),
        "random_erasing": Key(
            0.0, "probability of erasing a rectangle of an image", 0, 1
        ),
        "class_weights": Key(
            "",
            "weights of the classes in the training loss: `balanced` (inversely "
            "proportional to the number of training images of a class), or one number "
            "per class, separated by commas; empty: none",
        ),
    }
    best = ("eval/top1", "max")
    # As in the official ``main_finetune.py``, position tables and class token do not
    # decay.
    decayed = ("kernel",)
    undecayed = (
        "bias",
        "scale",
        "cls_token",
        "absolute_pos_embed",
        "relative_position_bias_table",
    )
    model_class = Classifier
    needs_labels = True

    @classmethod
    def check(cls, config: Any) -> None:
        """Raise ConfigError for an invalid config.

        Mixup and CutMix require an even microbatch size.
        """
        super().check(config)
        microbatch = config.batch_size // config.optimizer.accumulate_steps
        if microbatch % cls.batch_multiple(config):
            raise ConfigError(
                f"mixup={config.mixup}, cutmix={config.cutmix} mix pairs of images; "
                "expected an even number for batch_size / accumulate_steps, found "
                f"{microbatch}"
            )

    @property
    def head_scale(self) -> float:
        """With `init_from`, factor on the kernel of a new head; see `Task`."""
        return variant(self.config.model.name)[0].new_head_scale

    @classmethod
    def best_metric(cls, config: Mapping[str, Any]) -> tuple[str, str]:
        """Return mAP with `data.multi_label`, else the top-1 accuracy."""
        return ("eval/mAP", "max") if config["data"].get("multi_label") else cls.best

    @classmethod
    def batch_multiple(cls, config: Any) -> int:
        """Return 2 for Mixup or CutMix, which mix pairs of images; else 1."""
        return 2 if config.get("mixup") or config.get("cutmix") else 1

    def __init__(self, config: Any, data: DatasetInfo):
        super().__init__(config, data)
        text, num_classes = config.get("class_weights"), self.config.model.num_classes
        self.class_weights = class_weights(text, data, num_classes) if text else None

    def loss(
        self, model: Classifier, frozen: Any, batch: dict, keys: Keys
    ) -> PerSample:
        """Return the cross entropy with mixed targets, and `topk_correct`.

        `topk_correct` uses the label of each image before mixing. With several labels
        per image, returns only the binary cross entropy.
        """
        images, targets = self.augment_with_targets(batch, keys)
        drop_path_keys = rng.derive_keys(keys.samples, "drop_path")
        logits = model(images, drop_path_keys=drop_path_keys)
        if self.config.data.multi_label:
            return multi_label_metrics(logits, targets, self.class_weights)
        if self.class_weights is not None:
            targets = targets * self.class_weights
        loss = optax.softmax_cross_entropy(logits, targets)
        return {"loss": loss, **topk_correct(logits, batch["label"])}

    def augment_with_targets(
        self, batch: dict, keys: Keys
    ) -> tuple[jax.Array, jax.Array]:
        """Augment a training batch and return (images, targets).

        Returns:
          images: float32 [B, H, W, C]; flipped, erased and mixed.
          targets: float32 [B, classes]; smoothed and mixed.
        """
        config, images = self.config, self.augment_batch(batch, keys)
        with jax.named_scope("input"):
            if config.data.multi_label:
                smoothing, label = config.label_smoothing, batch["label"]
                targets = label * (1 - smoothing) + smoothing / 2
            else:
                targets = mixing.smooth_labels(
                    batch["label"], config.model.num_classes, config.label_smoothing
                )
            if config.random_erasing:
                erase_keys = rng.derive_keys(keys.samples, "erase")
                images = image_ops.random_erasing(
                    images, erase_keys, config.random_erasing
                )
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
        """Return the flipped, erased and mixed images of a batch, for figures."""
        return self.augment_with_targets(batch, keys)[0]

    def eval_step(
        self, model: Classifier, frozen: Any, batch: dict, keys: Keys
    ) -> tuple[Sums, Rows]:
        """Return the sums of `classification_metrics` and no rows.

        With several labels per image, returns the sums of `multi_label_metrics` and the
        rows "logits" and "label", [B, classes].
        """
        logits, label = model(self.preprocess(batch)), batch["label"]
        if self.config.data.multi_label:
            metrics = multi_label_metrics(logits, label)
            rows = {"logits": logits, "label": label}
        else:
            metrics, rows = classification_metrics(logits, label), {}
        return weighted_sums(metrics, batch["weight"]), rows

    def records(self, rows: Mapping[str, np.ndarray]) -> list[Any]:
        """Return (logits, labels) of each image, both [classes], for `eval/mAP`."""
        return [*zip(rows["logits"], rows["label"], strict=True)]

    def summarize(
        self, sums: Mapping[str, np.ndarray], count: int, records: list[Any]
    ) -> dict[str, float]:
        """Return the mean of each metric over the images.

        With several labels per image, also returns "eval/mAP", the mean of the average
        precisions of all classes that occur.
        """
        values = super().summarize(sums, count, records)
        if self.config.data.multi_label:
            logits, labels = map(np.array, zip(*records, strict=True))
            values["eval/mAP"] = mean_average_precision(logits, labels)
        return values

    def predict_step(self, model: Classifier, batch: dict) -> Rows:
        """Return {"probabilities": float32 [B, classes]}.

        With several labels per image, also returns the "logits".
        """
        logits = model(self.preprocess(batch))
        if self.config.data.multi_label:
            return {"probabilities": jax.nn.sigmoid(logits), "logits": logits}
        return {"probabilities": jax.nn.softmax(logits)}

    def stream_predictions(
        self, batches: Iterator[Mapping[str, np.ndarray]], out: Path, source: Source
    ) -> Path:
        """Write a table of the most probable classes; see `predictions.write`.

        With several labels per image, see `predictions.write_multi_label`.
        """
        data, classes, out = (
            self.config.data,
            self.data.classes,
            predictions.table_path(out),
        )
        model_config = configure(**model_arguments(self.config))[1]
        num_classes = model_config.num_classes
        names = [*classes, *map(str, range(len(classes), num_classes))]
        if data.multi_label:
            labeled = source.labeled and len(source.classes) > 0
            predictions.write_multi_label(batches, out, names, labeled)
            return out

        def read_image(index):
            shape = model_config.image_shape
            options = shape, data.crop_pct, data.value_range, data.dtype
            pixels = evaluation_image(source.sample(index)["image"], *options)
            return np.clip(pixels / pixel_scale(data), 0, 1)

        predictions.write(batches, out, names, read_image)
        return out


def class_weights(text: str, data: DatasetInfo, num_classes: int) -> np.ndarray | None:
    """Return the loss weights that the key `class_weights` sets, float32 [classes].

    With "balanced", a class with k of n training images has the weight ``n / (k *
    classes)``, so the mean weight of the training images is 1. ``classes`` excludes
    classes without training images, which have the weight 0.

    Returns:
      The weights; None for "balanced" if `data` has no training split.

    Raises:
      ConfigError: the text is neither "balanced" nor one number of at least 0 per
        class, or the number of training images in each class is unknown.
    """
    if text == "balanced":
        if "train" not in data.counts:
            return None
        if not data.class_counts:
            raise ConfigError(
                "class_weights='balanced' requires a dataset that lists one label per "
                "image before the images are read; set one number per class instead"
            )
        counts = np.zeros(num_classes)
        counts[: len(data.class_counts)] = data.class_counts
        present = counts > 0
        weights = counts.sum() / present.sum() / np.where(present, counts, np.inf)
        return weights.astype(np.float32)
    try:
        values = np.array([float(part) for part in text.split(",")])
    except ValueError:
        values = np.array(np.nan)
    valid = (values >= 0) & (values <= np.finfo(np.float32).max)
    if values.shape != (num_classes,) or not valid.all() or not values.any():
        raise ConfigError(
            f"class_weights={text!r}; expected 'balanced', or {num_classes} numbers, "
            "one per class, finite, at least 0, not all 0 and separated by commas"
        )
    return values.astype(np.float32)
