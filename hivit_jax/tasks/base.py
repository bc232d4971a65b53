"""Interface of a task: model, optimizer, loss, evaluation, figures and predictions.

The rest of the package uses a task only through this interface. `docs/own_task.md`
explains how to write a task.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from hivit_jax.data.sources.base import DatasetInfo, Source
from hivit_jax.data.sources.splits import NO_EVALUATION
from hivit_jax.data.transforms import Transform
from hivit_jax.errors import ConfigError
from hivit_jax.models import Model, create_model
from hivit_jax.rng import Keys
from hivit_jax.tasks import defaults
from hivit_jax.tasks.warnings import adam_warnings, common_warnings
from hivit_jax.training.freezing import frozen_parameters
from hivit_jax.training.optimizer import make_optimizer
from hivit_jax.tree import named_leaves, split_params

PerSample = dict[str, jax.Array]  # name -> float32 [B]
Rows = dict[str, jax.Array]  # name -> [B, ...]
Sums = dict[str, jax.Array]  # name -> scalar or matrix, int32 or float32


class Task:
    """Base class of tasks. A subclass overrides the methods that differ.

    Attributes:
      keys: config keys of this task, nested as in a recipe.
      unused: config key without effect on this task -> its only accepted value.
      best: metric that selects the best checkpoint, and "max" or "min". `__init__`
        replaces this value with the result of `best_metric`.
      fresh: name prefixes of parameters that are always newly initialized, even if the
        pretrained model contains them.
      head_scale: with `init_from`, factor on the newly initialized kernel of a head,
        whose standard deviation is 0.02 before the multiplication.
      passes: cost of a training step in forward passes; 3, because the backward pass
        costs two.
      decayed, undecayed: last components of the names of the parameters with and
        without weight decay.
      model_class: required class of the registered model; None: any model.
      config: the config, in which the dataset's number of classes replaces
        `model.num_classes=0`.
      data: description of the dataset.
      needs_labels: True if the images must have labels.
    """

    keys: Mapping[str, Any] = {}
    unused: Mapping[str, Any] = {}
    best: tuple[str, str] = ("eval/loss", "min")
    fresh: tuple[str, ...] = ()
    head_scale: float = 1.0
    passes: int = 3
    decayed: tuple[str, ...] = ()
    undecayed: tuple[str, ...] = ()
    model_class: type[Model] | None = None
    needs_labels: bool = False

    @classmethod
    def check(cls, config: Any) -> None:
        """Raise ConfigError for an invalid config. `config.load` calls this method."""
        if config.early_stopping and config.data.eval_split == NO_EVALUATION:
            raise ConfigError(
                f"early_stopping={config.early_stopping} with data.eval_split="
                f"{NO_EVALUATION!r}; expected 0, because the run has no evaluations"
            )
        defaults.check_value_range(config.data.value_range)
        if cls.model_class is not None:
            defaults.check_model(config, cls.model_class)
        if cls.transform is Task.transform:
            defaults.check_pixels(config.data)

    @classmethod
    def batch_multiple(cls, config: Any) -> int:
        """Return a number that must divide the size of every microbatch."""
        return 1

    @classmethod
    def best_metric(cls, config: Mapping[str, Any]) -> tuple[str, str]:
        """Return `best` for a config, which may be incomplete."""
        return cls.best

    def __init__(self, config: Any, data: DatasetInfo):
        num_classes = config.model.get("num_classes")
        if num_classes == 0:  # use the dataset's number of classes
            num_classes = len(data.classes)
            config = config.copy_and_resolve_references()
            config.model.num_classes = num_classes
            if not num_classes:
                raise ConfigError(
                    "model.num_classes=0: the number of classes of "
                    f"{config.data.name} is unknown; set model.num_classes"
                )
        self.config, self.data = config, data
        self.best = self.best_metric(config)
        if num_classes and num_classes < len(data.classes):
            raise ConfigError(
                f"model.num_classes={num_classes}; expected at least "
                f"{len(data.classes)}, the number of classes of {config.data.name}"
            )

    def warnings(self, steps_per_epoch: float, total_steps: int) -> list[str]:
        """Return one line about each setting that is valid but probably not intended.

        Args:
          total_steps: length of the run in steps.
        """
        config, optimizer = self.config, self.config.optimizer
        found = common_warnings(config, self.data, steps_per_epoch, total_steps)
        if type(self).optimizer is Task.optimizer:
            found += adam_warnings(optimizer, config.batch_size)
        return found

    # --- Model and optimizer ----------------------------------------------------------

    def build_model(self, key: jax.Array | int | None = None) -> Model:
        """Build the model of the config; also called under `jax.eval_shape`.

        Args:
          key: PRNG key for the initialization; None: derived from the config's seed.
        """
        key = jax.random.key(self.config.seed) if key is None else key
        return create_model(seed=key, **defaults.model_arguments(self.config))

    def is_decayed(self, name: str) -> bool:
        """Return True if weight decay applies to a parameter."""
        leaf = name.rsplit("/", 1)[-1]
        if leaf not in (*self.decayed, *self.undecayed):
            raise ValueError(
                f"no weight decay rule for parameter {name!r}; expected its last "
                "component in `decayed` or `undecayed` of the task"
            )
        return leaf in self.decayed

    def optimizer(
        self, model: Model, schedule: optax.Schedule
    ) -> optax.GradientTransformation:
        """Return the optimizer for a model's parameters. The model may be abstract."""
        options = self.config.optimizer
        layer_ids = model.layer_ids() if options.layer_decay != 1.0 else {}
        return make_optimizer(options, schedule, self.is_decayed, layer_ids)

    def frozen_parameters(self, model: Model) -> frozenset[str]:
        """Return the names of the parameters that the key `model.freeze` selects."""
        names = named_leaves(split_params(model)[1])
        return frozen_parameters(self.config.model.freeze, names)

    def frozen(self) -> Any:
        """Return constants of the task, such as a teacher model, as a pytree of arrays.

        Every step receives this pytree as `frozen`. Its arrays are neither trained nor
        saved. They are not the parameters that the key `model.freeze` selects.
        """
        return {}

    def macs(self, model: Model, layer_norm_cost: int = 0) -> int:
        """Return the multiply-adds of one image's forward pass.

        Returns 0, which means unknown, if the model has no method `macs`.

        Args:
          layer_norm_cost: multiply-adds per LayerNorm element; 5 in published tables.
        """
        if not hasattr(model, "macs"):
            return 0
        return model.macs(layer_norm_cost=layer_norm_cost)

    def training_flops(self, model: Model) -> int:
        """Return the floating-point operations of one image in a training step.

        Counts a multiply-add as two operations. Excludes norms and recomputation.
        """
        return 2 * self.passes * self.macs(model)

    # --- On the host, in threads ------------------------------------------------------

    def transform(self, train: bool) -> Transform:
        """Return the transform of encoded examples, for training or evaluation."""
        return defaults.image_transform(self.config, self.data, train)

    # --- On the device: pure functions of one batch, jitted ---------------------------

    def preprocess(self, batch: dict) -> jax.Array:
        """Resize and normalize the images of a batch: float32 [B, H, W, C]."""
        return defaults.preprocess(self.config, batch)

    def augment_batch(self, batch: dict, keys: Keys) -> jax.Array:
        """Preprocess and randomly flip the images of a training batch: [B, H, W, C]."""
        with jax.named_scope("input"):
            return defaults.random_flip(self.config, self.preprocess(batch), keys)

    def training_images(self, batch: dict, keys: Keys) -> jax.Array:
        """Return the augmented images of a training batch, for figures."""
        return self.augment_batch(batch, keys)

    def loss(self, model: Model, frozen: Any, batch: dict, keys: Keys) -> PerSample:
        """Return the loss and other metrics of each example of a training batch.

        The train step differentiates the weighted mean of "loss". This method may
        modify variables of the model that are not an `nnx.Param`.
        """
        raise NotImplementedError

    def eval_step(
        self, model: Model, frozen: Any, batch: dict, keys: Keys
    ) -> tuple[Sums, Rows]:
        """Return (sums over the examples of a batch, rows for `records`).

        The sums omit padding and unreadable images, whose `batch["weight"]` is 0.
        """
        raise NotImplementedError

    def predict_step(self, model: Model, batch: dict) -> Rows:
        """Return the rows for `records`, computed without labels.

        A task that does not override this method has no predictions.
        """
        raise NotImplementedError

    def panels(self, model: Model, frozen: Any, batch: dict, keys: Keys) -> Rows:
        """Return the arrays for `figures`, computed from one small fixed batch."""
        return {}

    # --- On the host, after a batch or an evaluation ----------------------------------

    def records(self, rows: Mapping[str, np.ndarray]) -> list[Any]:
        """Convert rows to small picklable objects. Runs on every process.

        Args:
          rows: rows of `eval_step` or `predict_step` for this process's examples of
            weight 1; "index", their indices in the split; and, with `predict_step`,
            "name".
        """
        return []

    def summarize(
        self, sums: Mapping[str, np.ndarray], count: int, records: list[Any]
    ) -> dict[str, float]:
        """Return the evaluation's metrics, {"eval/NAME": value}. Runs on process 0.

        Args:
          sums: totals over all batches, float64 or int64.
          count: number of examples of weight 1.
          records: records of all processes, in the order of the evaluated batches.
        """
        return {f"eval/{name}": float(total) / count for name, total in sums.items()}

    def figures(self, panels: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Draw the arrays of `panels` as {name: uint8 [H, W, 3]}. Runs on process 0."""
        return {}

    def write_predictions(self, records: list[Any], out: Path) -> None:
        """Write the records of `predict_step` into the directory `out`."""
        raise NotImplementedError

    def stream_predictions(
        self, batches: Iterator[Mapping[str, np.ndarray]], out: Path, source: Source
    ) -> Path | None:
        """Write predictions to `out`, and return the main file (None: `out` itself).

        By default, collects the records of all readable images and passes them to
        `write_predictions`. A subclass may instead write each batch at once.

        Args:
          batches: rows of `predict_step`, and "index", "name", "label" (-1: unknown)
            and "error" ("": the image is readable; otherwise the rows of
            `predict_step` have no meaning).
          out: file or directory from the command line.
          source: the images.

        Raises:
          ConfigError: `out` does not suit the task.
          OSError: a file cannot be written.
        """
        records = []
        for rows in batches:
            readable = rows["error"] == ""
            rows = {k: v for k, v in rows.items() if k not in ("error", "label")}
            records += self.records({k: v[readable] for k, v in rows.items()})
        out.mkdir(parents=True, exist_ok=True)
        self.write_predictions(records, out)


def weighted_sums(values: PerSample, weight: jax.Array) -> Sums:
    """Return {name: sum of value * weight over the batch}; both factors are [B]."""
    return {name: (value * weight).sum() for name, value in values.items()}
