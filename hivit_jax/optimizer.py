"""AdamW with layer-wise decay, and its learning rate."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hivit_jax.errors import ConfigError
from hivit_jax.models import leaf_name


def learning_rate_scales(
    params: Any, layer_ids: Mapping[str, int], layer_decay: float
) -> Any:
    """Factor on every parameter's learning rate, ``layer_decay ** (last - layer)``.

    Args:
      layer_ids: layer of every parameter by name, see `Model.layer_ids`.
    """
    last = max(layer_ids.values())
    return jax.tree_util.tree_map_with_path(
        lambda path, _: layer_decay ** (last - layer_ids[leaf_name(path)]), params
    )


def peak_learning_rate(config: Any) -> float:
    """``base_learning_rate * batch_size / 256``."""
    return config.optimizer.base_learning_rate * config.batch_size / 256


def count_steps(config: Any, num_images: int) -> tuple[float, int]:
    """(steps per epoch, steps in all); `total_steps` wins over `total_epochs`."""
    per_epoch = num_images / config.batch_size
    total = config.total_steps or round(config.total_epochs * per_epoch)
    if total < 1:
        raise ConfigError(
            f"total_steps={config.total_steps}, total_epochs={config.total_epochs}; "
            "expected at least one step"
        )
    return per_epoch, total


def warmup_steps(config: Any, steps_per_epoch: float, total_steps: int) -> int:
    """Steps until the learning rate is at its peak."""
    return min(round(config.optimizer.warmup_epochs * steps_per_epoch), total_steps)


def make_schedule(
    config: Any,
    steps_per_epoch: float,
    total_steps: int,
    starts_at_epoch_one: bool = False,
) -> optax.Schedule:
    """Learning rate by step: linear warmup, then a cosine down to the minimum.

    With `optimizer.official_quirks` as the official programs have it. Pretraining and
    finetuning (``self_supervised/util/lr_sched.py``) count epochs from 1: the first of
    them is left out, and the end is past the lowest point. Training from scratch
    (``supervised/lr_scheduler.py``) starts its cosine at 0, not at the end of the
    warmup, which leaves a step down between the two, and is one step late.

    Args:
      starts_at_epoch_one: which of the two quirks; see `Task.starts_at_epoch_one`.
    """
    o, peak = config.optimizer, peak_learning_rate(config)
    epochs = total_steps / steps_per_epoch
    warmup, start = min(o.warmup_epochs, epochs), o.warmup_learning_rate
    skips = starts_at_epoch_one
    late = o.official_quirks and not skips

    def schedule(step):
        epoch = jnp.maximum(step - late, 0) / steps_per_epoch + skips
        rise = start + (peak - start) * epoch / max(warmup, 1e-9)
        begin = 0.0 if late else warmup
        done = (epoch - begin) / max(epochs - begin, 1e-9)
        done = done if skips else jnp.clip(done, 0.0, 1.0)
        cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        fall = o.min_learning_rate + (peak - o.min_learning_rate) * cosine
        return jnp.where(epoch < warmup, rise, fall)

    return schedule


def skip_steps(state: dict[str, Any], steps: int) -> dict[str, Any]:
    """A train state as if `steps` more had been done without learning anything.

    The schedule goes on where they end; Adam's bias correction knows nothing of them.
    """
    schedules = optax.ScaleByScheduleState
    opt_state = jax.tree.map(
        lambda x: x._replace(count=x.count + steps) if isinstance(x, schedules) else x,
        state["opt_state"],
        is_leaf=lambda x: isinstance(x, schedules),
    )
    return state | {"opt_state": opt_state, "step": state["step"] + steps}


def make_optimizer(
    o: Any,
    schedule: optax.Schedule,
    params: Any,
    is_decayed: Callable[[str], bool],
    layer_ids: Mapping[str, int],
) -> optax.GradientTransformation:
    """One optax chain: [clip,] Adam, decoupled decay, [layer decay,] learning rate.

    Args:
      o: ``config.optimizer``.
      schedule: learning rate by step.
      params: parameters or their shapes; only names are read.
      is_decayed: whether weight decay applies to the parameter of a name.
      layer_ids: layer of every parameter by name; read if `o.layer_decay` is not 1.
    """
    mask = jax.tree_util.tree_map_with_path(
        lambda path, _: is_decayed(leaf_name(path)), params
    )
    chain = [optax.clip_by_global_norm(o.clip_norm)] if o.clip_norm else []
    chain += [
        optax.scale_by_adam(*o.betas, eps=1e-8, mu_dtype=o.first_moment_dtype),
        optax.add_decayed_weights(o.weight_decay, mask),
    ]
    if o.layer_decay != 1.0:
        scales = learning_rate_scales(params, layer_ids, o.layer_decay)
        chain.append(
            optax.stateless(
                lambda updates, _: jax.tree.map(jnp.multiply, updates, scales)
            )
        )
    return optax.chain(*chain, optax.scale_by_learning_rate(schedule))
