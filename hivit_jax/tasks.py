"""What a task is: per-sample loss and metrics of a batch. Training and evaluation both
call it; the one averages the loss, the other adds up everything.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hivit_jax import augment
from hivit_jax.augment import Keys
from hivit_jax.config import image_shape
from hivit_jax.errors import ConfigError, unknown
from hivit_jax.models import NAMES, Model, create_model
from hivit_jax.models.classifier import Classifier
from hivit_jax.models.mae import MAEOutput, MaskedAutoencoder, visible_units

Values = dict[str, jax.Array]  # each float32 [B]; always with "loss"


def masked_autoencoding(
    model: MaskedAutoencoder, batch: dict, keys: Keys, config: Any, train: bool
) -> Values:
    """Loss over the removed units of every image (`MaskedAutoencoder`)."""
    return {"loss": model.image_loss(**_masked(model, batch, keys, config, train))}


def reconstruct(
    model: MaskedAutoencoder, batch: dict, keys: Keys, config: Any
) -> MAEOutput:
    """The masked autoencoder's output for a batch, masked as in evaluation."""
    return model(**_masked(model, batch, keys, config, train=False))


def _masked(model, batch, keys, config, train) -> dict[str, Any]:
    """Arguments of the masked autoencoder; the samples' keys tell what is masked."""
    images, _ = inputs(batch, keys, config, train)
    units = model.encoder.grid[0] * model.encoder.grid[1]
    with jax.named_scope("input"):
        mask_keys = augment.split_keys(keys.samples, "mask")
        noise = jax.vmap(lambda key: jax.random.uniform(key, (units,)))(mask_keys)
    return {
        "images": images,
        "noise": noise,
        "mask_ratio": config.mask_ratio,
        "sample_keys": augment.split_keys(keys.samples, "drop_path") if train else None,
    }


def classification(
    model: Classifier, batch: dict, keys: Keys, config: Any, train: bool
) -> Values:
    """Cross entropy, top-1 and top-5 hits."""
    images, targets = inputs(batch, keys, config, train)
    drop_keys = augment.split_keys(keys.samples, "drop_path") if train else None
    logits = model(images, sample_keys=drop_keys)
    return {
        "loss": optax.softmax_cross_entropy(logits, targets),
        **hits(logits, batch["label"]),
    }


def hits(logits: jax.Array, labels: jax.Array) -> Values:
    """Whether the true class is among the first one and five of [B, classes]."""
    # Classes that score above the true one; of equal scores the lower number counts.
    true = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    earlier = jnp.arange(logits.shape[-1]) < labels[:, None]
    rank = ((logits > true) | ((logits == true) & earlier)).sum(-1)
    return {
        "top1": (rank < 1).astype(jnp.float32),
        "top5": (rank < 5).astype(jnp.float32),
    }


def linear_probe(
    model: Classifier, batch: dict, keys: Keys, config: Any, train: bool
) -> Values:
    """Classification by a linear head on frozen features, normalised by the batch in
    training, by running statistics in evaluation (MAE's ``main_linprobe.py``).

    "objective", whose gradient is taken, pulls the running statistics towards those of
    the batch: a step of gradient descent with rate 0.1 is BatchNorm's update.
    """
    (images, _), labels = inputs(batch, keys, config, train), batch["label"]
    features = jax.lax.stop_gradient(model.encoded(images))
    norm = model.fc_norm
    if not train:
        logits = model.head(norm(features))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return {"loss": loss, **hits(logits, labels)}
    weight = batch["weight"][:, None]
    count = jnp.maximum(weight.sum(), 2.0)
    mean = (weight * features).sum(0) / count
    squares = jnp.square(features - mean)
    var = (weight * squares).sum(0) / count
    logits = model.head((features - mean) * jax.lax.rsqrt(var + norm.epsilon))
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    pull = jnp.square(norm.mean - features)
    pull += jnp.square(norm.var - squares * count / (count - 1))
    objective = loss + 0.5 * pull.sum(-1)
    return {"loss": loss, "objective": objective, **hits(logits, labels)}


def images_of(batch: dict, config: Any) -> jax.Array:
    """The batch's images, resized and normalised: float32 [B, H, W, C]."""
    images, data = batch["image"], config.data
    if "box" in batch:
        images = augment.resample(
            images,
            batch["box"],
            image_shape(config)[:2],
            data.interpolation,
            data.antialias,
        )
    return augment.normalize(images, data.mean, data.std)


@jax.named_scope("input")
def inputs(
    batch: dict, keys: Keys, config: Any, train: bool
) -> tuple[jax.Array, jax.Array | None]:
    """What the network gets, float32 [B, H, W, C], and for classification its targets,
    [B, classes]; in training flipped, erased, mixed and smoothed.
    """
    images = images_of(batch, config)
    if train and config.data.flip:
        images = augment.random_flip(images, augment.split_keys(keys.samples, "flip"))
    if config.task != "classify":
        return images, None
    smoothing = config.label_smoothing if train else 0.0
    targets = augment.smooth_labels(batch["label"], config.model.num_classes, smoothing)
    if train and config.random_erasing:
        erase_keys = augment.split_keys(keys.samples, "erase")
        images = augment.random_erasing(images, erase_keys, config.random_erasing)
    if train and (config.mixup or config.cutmix):
        images, targets = augment.mix(
            *(images, targets, batch["weight"], keys.step),
            *(config.mixup, config.cutmix),
        )
    return images, targets


TASKS: dict[str, Callable[..., Values]] = {
    "mae": masked_autoencoding,
    "classify": classification,
    "linear_probe": linear_probe,
}


def build_model(config: Any) -> Model:
    """The model of a config, checked against its task.

    Raises:
      ConfigError: an unknown task, a model of another task, sizes or a mask ratio that
        cannot work.
    """
    if config.task not in TASKS:
        raise unknown("task", config.task, TASKS)
    overrides = {k: v for k, v in config.model.items() if v is not None}
    name = overrides.pop("name")
    if name in NAMES and name.startswith("mae_") != (config.task == "mae"):
        expected = "a mae_ model" if config.task == "mae" else "a model without mae_"
        raise ConfigError(
            f"task={config.task!r} with model.name={name!r}; expected {expected}"
        )
    model = create_model(name, seed=jax.random.key(config.seed), **overrides)
    if config.task == "linear_probe" and not overrides.get("running_norm"):
        raise ConfigError("task='linear_probe' needs config.model.running_norm=True")
    if config.task == "mae":
        visible_units(model.encoder.grid[0] * model.encoder.grid[1], config.mask_ratio)
    return model


def macs(config: Any, model: Model, layer_norm_cost: int = 0) -> int:
    """Multiply-adds of the forward pass for one image of the task.

    Args:
      layer_norm_cost: counted for every element of a LayerNorm; 5 in published tables.
    """
    how = {"mask_ratio": config.mask_ratio} if config.task == "mae" else {}
    return model.macs(layer_norm_cost=layer_norm_cost, **how)
