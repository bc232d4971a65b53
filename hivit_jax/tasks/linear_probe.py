"""Linear probe: a linear head on frozen features, as in MAE's ``main_linprobe.py``."""

from typing import Any

import jax
import optax

from hivit_jax.errors import ConfigError
from hivit_jax.models.classifier import Classifier
from hivit_jax.rng import Keys
from hivit_jax.tasks.base import PerSample
from hivit_jax.tasks.classification import Classification, scores
from hivit_jax.tree import leaf_name, split_state


class LinearProbe(Classification):
    """The head learns from batch-normalized features; the encoder takes no gradient."""

    keys = {}
    unused = {
        "model.drop_path_rate": 0.0,
        "model.fc_norm": True,
        "optimizer.clip_norm": 0.0,
        "optimizer.first_moment_dtype": "float32",
        "optimizer.layer_decay": 1.0,
    }
    fresh = ("fc_norm/", "head/")
    head_scale = 0.01 / 0.02  # MAE's ``main_linprobe.py``

    @classmethod
    def check(cls, config: Any) -> None:
        """As `Task.check`; ConfigError also without `model.running_norm`."""
        super().check(config)
        if not config.model.running_norm:
            raise ConfigError(
                "task='linear_probe' needs config.model.running_norm=True"
            )

    def optimizer(
        self, model: Classifier, schedule: optax.Schedule
    ) -> optax.GradientTransformation:
        """LARS for the head, nothing for the rest.

        As in MAE's ``util/lars.py``, the trust ratio is taken of matrices only, before
        the momentum, and the learning rate after it.
        """
        o, params = self.config.optimizer, split_state(model)[1]
        matrices = jax.tree.map(lambda x: x.ndim > 1, params)
        ratio = optax.scale_by_trust_ratio(trust_coefficient=0.001)
        lars = optax.chain(
            optax.masked(optax.add_decayed_weights(o.weight_decay), matrices),
            optax.masked(ratio, matrices),
            optax.trace(o.betas[0]),
            optax.scale_by_learning_rate(schedule),
        )
        labels = jax.tree_util.tree_map_with_path(
            lambda path, _: "lars" if leaf_name(path).startswith("head/") else "frozen",
            params,
        )
        rules = {"lars": lars, "frozen": optax.set_to_zero()}
        return optax.multi_transform(rules, labels)

    def loss(
        self, model: Classifier, frozen: Any, batch: dict, keys: Keys
    ) -> PerSample:
        """Cross entropy and hits."""
        features = jax.lax.stop_gradient(model.encoded(self.augment_batch(batch, keys)))
        logits = model.head(model.fc_norm(features, weight=batch["weight"]))
        return scores(logits, batch["label"])

    def training_images(self, batch: dict, keys: Keys) -> jax.Array:
        """As in `Task`."""
        return self.augment_batch(batch, keys)
