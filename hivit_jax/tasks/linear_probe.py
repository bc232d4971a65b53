"""Linear probe: a linear head on frozen features, as in MAE's ``main_linprobe.py``."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from hivit_jax.augment import Keys
from hivit_jax.errors import ConfigError
from hivit_jax.models import leaf_name
from hivit_jax.models.classifier import Classifier
from hivit_jax.tasks.base import PerSample, Task, weighted_sums
from hivit_jax.tasks.classification import scores


class LinearProbe(Task):
    """Features are normalized by the batch in training, by running statistics in
    evaluation. The encoder and the statistics take no gradient.
    """

    unused = {
        "model.drop_path_rate": 0.0,
        "model.fc_norm": True,
        "optimizer.clip_norm": 0.0,
        "optimizer.first_moment_dtype": "float32",
        "optimizer.layer_decay": 1.0,
    }
    best = ("eval/top1", "max")
    fresh = ("fc_norm/", "head/")
    head_scale = 0.01 / 0.02  # MAE's ``main_linprobe.py``
    model_class = Classifier

    def build_model(self, key: jax.Array | int | None = None) -> Classifier:
        """As `Task.build_model`; ConfigError also without `model.running_norm`."""
        if not self.config.model.get("running_norm"):
            raise ConfigError(
                "task='linear_probe' needs config.model.running_norm=True"
            )
        return super().build_model(key)

    def optimizer(
        self, params: Any, schedule: optax.Schedule
    ) -> optax.GradientTransformation:
        """LARS for the head, momentum 0.1 for the statistics, nothing for the rest.

        As in MAE's ``util/lars.py``, the trust ratio is taken of matrices only, before
        the momentum, and the learning rate after it.
        """
        o = self.config.optimizer
        matrices = jax.tree.map(lambda x: x.ndim > 1, params)
        ratio = optax.scale_by_trust_ratio(trust_coefficient=0.001)
        lars = optax.chain(
            optax.masked(optax.add_decayed_weights(o.weight_decay), matrices),
            optax.masked(ratio, matrices),
            optax.trace(o.betas[0]),
            optax.scale_by_learning_rate(schedule),
        )
        kinds = {"head": "lars", "fc_norm": "statistics"}
        labels = jax.tree_util.tree_map_with_path(
            lambda path, _: kinds.get(leaf_name(path).split("/")[0], "frozen"), params
        )
        rules = {
            "lars": lars,
            "statistics": optax.sgd(0.1),
            "frozen": optax.set_to_zero(),
        }
        return optax.multi_transform(rules, labels)

    def loss(self, model: Classifier, batch: dict, keys: Keys) -> PerSample:
        """Cross entropy and hits. "objective" pulls the running statistics towards
        those of the batch: a gradient step with rate 0.1 is BatchNorm's update.
        """
        features = jax.lax.stop_gradient(model.encoded(self.augment_batch(batch, keys)))
        norm, weight = model.fc_norm, batch["weight"][:, None]
        count = jnp.maximum(weight.sum(), 2.0)
        mean = (weight * features).sum(0) / count
        squares = jnp.square(features - mean)
        var = (weight * squares).sum(0) / count
        logits = model.head((features - mean) * jax.lax.rsqrt(var + norm.epsilon))
        values = scores(logits, batch["label"])
        pull = jnp.square(norm.mean - features)
        pull += jnp.square(norm.var - squares * count / (count - 1))
        return values | {"objective": values["loss"] + 0.5 * pull.sum(-1)}

    def eval_step(
        self, model: Classifier, batch: dict, keys: Keys
    ) -> dict[str, jax.Array]:
        """Sums of cross entropy and hits."""
        logits = model(self.preprocess(batch))
        return weighted_sums(scores(logits, batch["label"]), batch["weight"])
