"""Interface of a task: its model, optimizer, loss, evaluation and figures.

Training, evaluation and checkpoints call a task through this interface and know no task
by name.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hivit_jax import augment
from hivit_jax.augment import Keys
from hivit_jax.errors import ConfigError
from hivit_jax.models import Model, create_model, image_shape, kind_of
from hivit_jax.optimizer import make_optimizer

PerSample = dict[str, jax.Array]  # each float32 [B]


class Task:
    """One task. Subclasses override what differs.

    Attributes:
      keys: config keys of this task, nested as in a recipe.
      unused: config keys that have no effect on this task, with the only value that is
        accepted.
      best: metric that picks the best checkpoint, and "max" or "min".
      fresh: prefixes of parameters that are newly initialized even where the pretrained
        model has them.
      head_scale: factor on the standard deviation, 0.02, of a newly initialized head.
      decayed, undecayed: last parts of the names of parameters, with and without weight
        decay.
      model_class: class of the models of this task.
    """

    keys: Mapping[str, Any] = {}
    unused: Mapping[str, Any] = {}
    best: tuple[str, str] = ("eval/loss", "min")
    fresh: tuple[str, ...] = ()
    head_scale: float = 1.0
    decayed: tuple[str, ...] = ()
    undecayed: tuple[str, ...] = ()
    model_class: type[Model]

    def __init__(self, config: Any):
        self.config = config

    # --- Model and optimizer ----------------------------------------------------------

    def build_model(self, key: jax.Array | int | None = None) -> Model:
        """Model of the config, drawn from a key; None: from the config's seed.

        Raises:
          ConfigError: a model of another task, or sizes that do not fit each other.
        """
        overrides = {k: v for k, v in self.config.model.items() if v is not None}
        name = overrides.pop("name")
        if kind_of(name) is not self.model_class:
            raise ConfigError(
                f"task={self.config.task!r} with model.name={name!r}, which is a "
                f"{kind_of(name).__name__}; expected a {self.model_class.__name__}"
            )
        key = jax.random.key(self.config.seed) if key is None else key
        return create_model(name, seed=key, **overrides)

    def is_decayed(self, name: str) -> bool:
        """Whether weight decay applies to a parameter; ValueError without a rule."""
        leaf = name.rsplit("/", 1)[-1]
        if leaf not in (*self.decayed, *self.undecayed):
            raise ValueError(f"no rule of weight decay is known for parameter {name!r}")
        return leaf in self.decayed

    def optimizer(
        self, params: Any, schedule: optax.Schedule
    ) -> optax.GradientTransformation:
        """Optimizer of parameters, or of their shapes."""
        return make_optimizer(self.config.optimizer, schedule, params, self.is_decayed)

    def macs(self, model: Model, layer_norm_cost: int = 0) -> int:
        """Multiply-adds of one image's forward pass.

        Args:
          layer_norm_cost: counted for every element of a LayerNorm; 5 in published
            tables.
        """
        return model.macs(layer_norm_cost=layer_norm_cost)

    # --- One batch: pure functions, jitted --------------------------------------------

    def preprocess(self, batch: dict) -> jax.Array:
        """Images of a batch, resized and normalized: float32 [B, H, W, C]."""
        images, data = batch["image"], self.config.data
        if "box" in batch:
            images = augment.resample(
                images,
                batch["box"],
                image_shape(self.config.model)[:2],
                data.interpolation,
                data.antialias,
            )
        return augment.normalize(images, data.mean, data.std)

    def augment_batch(self, batch: dict, keys: Keys) -> jax.Array:
        """Images of a training batch, flipped too: float32 [B, H, W, C]."""
        with jax.named_scope("input"):
            images = self.preprocess(batch)
            if self.config.data.flip:
                flip_keys = augment.split_keys(keys.samples, "flip")
                images = augment.random_flip(images, flip_keys)
        return images

    def training_images(self, batch: dict, keys: Keys) -> jax.Array:
        """Images of a training batch as the model gets them: float32 [B, H, W, C]."""
        return self.augment_batch(batch, keys)

    def loss(self, model: Model, batch: dict, keys: Keys) -> PerSample:
        """Loss and metrics of a training batch, by name, each [B].

        The gradient of the weighted mean of "objective" is taken; of "loss" where there
        is no objective.
        """
        raise NotImplementedError

    def eval_step(self, model: Model, batch: dict, keys: Keys) -> dict[str, jax.Array]:
        """Sums over the images of a batch of weight 1, by name."""
        raise NotImplementedError

    def panels(self, model: Model, batch: dict, keys: Keys) -> dict[str, jax.Array]:
        """Arrays that `figures` draws, of the first held-out images; {}: none."""
        return {}

    # --- On the host, process 0 -------------------------------------------------------

    def summarize(self, sums: Mapping[str, Any], count: int) -> dict[str, float]:
        """Metrics of a split of `count` images: sums -> {"eval/NAME": mean}."""
        return {f"eval/{name}": float(total) / count for name, total in sums.items()}

    def figures(self, panels: Mapping[str, np.ndarray], title: str) -> dict:
        """Panels -> pictures by name, uint8 [H, W, 3]."""
        return {}


def weighted_sums(values: PerSample, weight: jax.Array) -> dict[str, jax.Array]:
    """Sums over a batch of values [B] times weights [B]."""
    return {name: (value * weight).sum() for name, value in values.items()}


def topk_correct(logits: jax.Array, labels: jax.Array) -> PerSample:
    """Whether the true class is among the best one and five of [B, classes]; of equal
    scores the lower class number counts.
    """
    true = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    earlier = jnp.arange(logits.shape[-1]) < labels[:, None]
    rank = ((logits > true) | ((logits == true) & earlier)).sum(-1)
    return {
        "top1": (rank < 1).astype(jnp.float32),
        "top5": (rank < 5).astype(jnp.float32),
    }
