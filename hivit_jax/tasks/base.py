"""Interface of a task: its model, optimizer, loss, evaluation and figures.

Training, evaluation and checkpoints call a task through this interface and know no task
by name.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hivit_jax import rng
from hivit_jax.augment import image, resample
from hivit_jax.data.sources.base import DatasetInfo
from hivit_jax.data.transforms import MODES, ImageTransform, Transform
from hivit_jax.errors import ConfigError
from hivit_jax.models import Model, configure, create_model, image_shape, variant
from hivit_jax.rng import Keys
from hivit_jax.training.optimizer import make_optimizer
from hivit_jax.tree import split_state

PerSample = dict[str, jax.Array]  # each float32 [B]
Rows = dict[str, jax.Array]  # each [B, ...]
Sums = dict[str, jax.Array]


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
      model_class: class of the models of this task; None: a user's own.
    """

    keys: Mapping[str, Any] = {}
    unused: Mapping[str, Any] = {}
    best: tuple[str, str] = ("eval/loss", "min")
    fresh: tuple[str, ...] = ()
    head_scale: float = 1.0
    decayed: tuple[str, ...] = ()
    undecayed: tuple[str, ...] = ()
    model_class: type[Model] | None = None

    @classmethod
    def check(cls, config: Any) -> None:
        """ConfigError for a model of another task, or values that do not fit each
        other. Called when a config is loaded, before anything is opened.
        """
        if cls.model_class is None:
            return
        name = config.model.name
        found = variant(name)[0]
        if found is not cls.model_class:
            raise ConfigError(
                f"task={config.task!r} with model.name={name!r}, which is a "
                f"{found.__name__}; expected a {cls.model_class.__name__}"
            )
        shape = configure(**arguments(config))[1]
        if getattr(shape, "num_classes", 1) == 0:
            raise ConfigError("model.num_classes=0 has no head; expected 1 or more")

    @classmethod
    def batch_multiple(cls, config: Any) -> int:
        """Number that the examples of a microbatch must be a multiple of."""
        return 1

    def __init__(self, config: Any, data: DatasetInfo):
        self.config, self.data = config, data
        found, known = len(data.classes), config.model.get("num_classes")
        if known and found > known:
            raise ConfigError(
                f"model.num_classes={known}, but {config.data.name} has {found} classes"
            )

    # --- Model and optimizer ----------------------------------------------------------

    def build_model(self, key: jax.Array | int | None = None) -> Model:
        """Model of the config, drawn from a key; None: from the config's seed.

        Also under `jax.eval_shape`.
        """
        key = jax.random.key(self.config.seed) if key is None else key
        return create_model(seed=key, **arguments(self.config))

    def is_decayed(self, name: str) -> bool:
        """Whether weight decay applies to a parameter; ValueError without a rule."""
        leaf = name.rsplit("/", 1)[-1]
        if leaf not in (*self.decayed, *self.undecayed):
            raise ValueError(f"no rule of weight decay is known for parameter {name!r}")
        return leaf in self.decayed

    def optimizer(
        self, model: Model, schedule: optax.Schedule
    ) -> optax.GradientTransformation:
        """Optimizer of the parameters of a model, which may be abstract."""
        o, params = self.config.optimizer, split_state(model)[1]
        layer_ids = model.layer_ids() if o.layer_decay != 1.0 else {}
        return make_optimizer(o, schedule, params, self.is_decayed, layer_ids)

    def frozen(self) -> Any:
        """Pytree of arrays that every step gets: never trained, never saved."""
        return {}

    def macs(self, model: Model, layer_norm_cost: int = 0) -> int:
        """Multiply-adds of one image's forward pass.

        Args:
          layer_norm_cost: counted for every element of a LayerNorm; 5 in published
            tables.
        """
        return model.macs(layer_norm_cost=layer_norm_cost)

    # --- On the host, in threads ------------------------------------------------------

    def transform(self, train: bool) -> Transform:
        """Transform of the examples of a split, for training or evaluation.

        Raises:
          ConfigError: sizes or channels that do not fit each other.
        """
        data, model = self.config.data, self.config.model
        *size, channels = image_shape(model)
        randaugment = train and data.randaugment and self.data.encoded
        if self.data.encoded and channels not in MODES:
            raise ConfigError(
                f"model.in_channels={channels} with data.name={data.name!r}; "
                "expected 3 (colour) or 1 (grey)"
            )
        if randaugment and channels != 3:
            raise ConfigError(
                f"data.randaugment with model.in_channels={channels}; expected 3"
            )
        if self.data.encoded and data.canvas and data.canvas < max(size):
            raise ConfigError(
                f"data.canvas={data.canvas} is smaller than model.image_size="
                f"{model.image_size}; expected 0 or more than that"
            )
        # RandAugment works on images of their final size, which made-up ones have.
        on_host = randaugment or not self.data.encoded
        whole = not train or tuple(data.crop_scale) == (1.0, 1.0)
        return ImageTransform(
            batch_size=self.config.batch_size,
            size=size,
            channels=channels,
            canvas=0 if on_host else data.canvas,
            crop_scale=None if whole else tuple(data.crop_scale),
            crop_pct=data.crop_pct,
            interpolation=data.interpolation,
            antialias=data.antialias,
            randaugment=randaugment,
            classes=model.get("num_classes") or 0,
        )

    # --- One batch: pure functions, jitted --------------------------------------------

    def preprocess(self, batch: dict) -> jax.Array:
        """Images of a batch, resized and normalized: float32 [B, H, W, C]."""
        images, data = batch["image"], self.config.data
        if "box" in batch:
            images = resample.resample(
                images,
                batch["box"],
                image_shape(self.config.model)[:2],
                data.interpolation,
                data.antialias,
            )
        return image.normalize(images, data.mean, data.std)

    def augment_batch(self, batch: dict, keys: Keys) -> jax.Array:
        """Images of a training batch, flipped too: float32 [B, H, W, C]."""
        with jax.named_scope("input"):
            images = self.preprocess(batch)
            if self.config.data.flip:
                flip_keys = rng.split_keys(keys.samples, "flip")
                images = image.random_flip(images, flip_keys)
        return images

    def training_images(self, batch: dict, keys: Keys) -> jax.Array:
        """Images of a training batch as the model gets them: float32 [B, H, W, C]."""
        return self.augment_batch(batch, keys)

    def loss(self, model: Model, frozen: Any, batch: dict, keys: Keys) -> PerSample:
        """Loss and metrics of a training batch, by name, each [B].

        The gradient of the weighted mean of "loss" is taken. The model's variables that
        are no parameters may be changed in place.
        """
        raise NotImplementedError

    def eval_step(
        self, model: Model, frozen: Any, batch: dict, keys: Keys
    ) -> tuple[Sums, Rows]:
        """Evaluate a batch.

        Returns:
          Sums over the examples of weight 1: scalars or matrices by name, int32 or
          float32; and rows [B, ...] by name, from which `records` are made.
        """
        raise NotImplementedError

    def predict_step(self, model: Model, batch: dict) -> Rows:
        """Rows [B, ...] by name, from which `records` are made; no labels are used."""
        raise ConfigError(f"task={self.config.task!r} makes no predictions")

    def panels(self, model: Model, frozen: Any, batch: dict, keys: Keys) -> Rows:
        """Arrays that `figures` draws, of the first held-out images; {}: none."""
        return {}

    # --- On the host again ------------------------------------------------------------

    def records(self, rows: Mapping[str, np.ndarray]) -> list[Any]:
        """Small objects that can be pickled, made of the rows of one process's own
        examples.

        Args:
          rows: of `eval_step` or `predict_step`, without those of weight 0; and
            "index" of the examples in their split, for predictions "name" too.
        """
        return []

    def summarize(
        self, sums: Mapping[str, np.ndarray], count: int, records: list[Any]
    ) -> dict[str, float]:
        """Metrics of a split, on process 0: {"eval/NAME": value}.

        Args:
          sums: of all batches, float64 or int64.
          count: examples that count.
          records: of all processes, in the order of the split.
        """
        return {f"eval/{name}": float(total) / count for name, total in sums.items()}

    def figures(self, panels: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Panels -> pictures by name, uint8 [H, W, 3], on process 0."""
        return {}

    def write_predictions(self, records: list[Any], out: Path) -> None:
        """Write the records of `predict_step` into a directory."""
        raise NotImplementedError


def arguments(config: Any) -> dict[str, Any]:
    """Arguments of `create_model` in a config."""
    return {k: v for k, v in config.model.items() if v is not None}


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
