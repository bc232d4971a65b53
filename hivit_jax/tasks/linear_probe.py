"""Linear probe: a linear head on frozen features, as in MAE's ``main_linprobe.py``."""

from typing import Any

import jax
import optax

from hivit_jax.errors import ConfigError
from hivit_jax.models.classifier import Classifier
from hivit_jax.rng import Keys
from hivit_jax.tasks.base import PerSample
from hivit_jax.tasks.classification import Classification
from hivit_jax.tasks.metrics import classification_metrics, multi_label_metrics
from hivit_jax.tasks.warnings import peak_text
from hivit_jax.training.schedule import peak_learning_rate
from hivit_jax.tree import leaf_name, split_params

TRUST = 0.001  # ratio of an update's norm to the weights' norm, at learning rate 1
# A warning is logged if the norms of all updates of a run, relative to the weights'
# norm, add up to less than this value. In MAE's probe of ImageNet the sum is about 200.
# With a sum of 1.5, the digits recipe loses 21 points of accuracy.
MIN_UPDATE_SUM = 5.0


class LinearProbe(Classification):
    """Task that trains a head on batch-normalized features of a frozen encoder."""

    keys = {}
    unused = {
        "model.drop_path_rate": 0.0,
        "model.fc_norm": True,
        "model.freeze": "",
        "optimizer.clip_norm": 0.0,
        "optimizer.first_moment_dtype": "float32",
        "optimizer.layer_decay": 1.0,
    }
    fresh = ("fc_norm/", "head/")
    head_scale = 0.01 / 0.02  # MAE's ``main_linprobe.py``
    passes = 1  # the encoder is frozen

    @classmethod
    def check(cls, config: Any) -> None:
        """Raise ConfigError for an invalid config, or without `model.running_norm`."""
        super().check(config)
        if not config.model.running_norm:
            raise ConfigError("task='linear_probe' requires model.running_norm=True")

    def warnings(self, steps_per_epoch: float, total_steps: int) -> list[str]:
        """Return one line about each setting that is probably not intended.

        These include a random encoder and a small learning rate.
        """
        config, found = self.config, super().warnings(steps_per_epoch, total_steps)
        if not config.init_from:
            found.append("init_from='': the frozen encoder has random parameters")
        peak = peak_learning_rate(config.optimizer, config.batch_size)
        # Sum of the updates' relative norms for a peak of 1. The sum is halved, because
        # the learning rate falls to 0, and divided by 1 - momentum, because momentum
        # adds past updates.
        per_peak = TRUST * total_steps / 2 / (1 - config.optimizer.betas[0])
        if 0 < peak < (smallest := MIN_UPDATE_SUM / per_peak):
            text = peak_text(config.optimizer, config.batch_size)
            found.append(
                f"the peak learning rate, {text}, is small for LARS in {total_steps:,} "
                f"steps; expected at least {smallest:.2g}; otherwise the accuracy may "
                "stay at chance level"
            )
        return found

    def optimizer(
        self, model: Classifier, schedule: optax.Schedule
    ) -> optax.GradientTransformation:
        """Return LARS for the head and zero updates for the other parameters.

        As in MAE's ``util/lars.py``, weight decay and trust ratio precede the momentum
        and apply to matrices only. The learning rate follows the momentum.
        """
        options, params = self.config.optimizer, split_params(model)[1]
        is_matrix = jax.tree.map(lambda x: x.ndim > 1, params)
        trust_ratio = optax.scale_by_trust_ratio(trust_coefficient=TRUST)
        lars = optax.chain(
            optax.masked(optax.add_decayed_weights(options.weight_decay), is_matrix),
            optax.masked(trust_ratio, is_matrix),
            optax.trace(options.betas[0]),
            optax.scale_by_learning_rate(schedule),
        )
        groups = jax.tree_util.tree_map_with_path(
            lambda path, _: "lars" if leaf_name(path).startswith("head/") else "frozen",
            params,
        )
        transforms = {"lars": lars, "frozen": optax.set_to_zero()}
        return optax.multi_transform(transforms, groups)

    def loss(
        self, model: Classifier, frozen: Any, batch: dict, keys: Keys
    ) -> PerSample:
        """Return the cross entropy and `topk_correct` of each image, [B].

        With several labels per image, returns only the binary cross entropy.
        """
        tokens = jax.lax.stop_gradient(
            model.head_token(self.augment_batch(batch, keys))
        )
        logits = model.head(model.fc_norm(tokens, weight=batch["weight"]))
        multi_label = self.config.data.multi_label
        metrics = multi_label_metrics if multi_label else classification_metrics
        return metrics(logits, batch["label"])

    def training_images(self, batch: dict, keys: Keys) -> jax.Array:
        """Return the flipped images of a training batch, for figures."""
        return self.augment_batch(batch, keys)
