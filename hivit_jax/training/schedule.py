"""Steps of a run and the learning rate of every step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def peak_learning_rate(o: Any, batch_size: int) -> float:
    """``base_learning_rate * batch_size / lr_batch``; unscaled if `lr_batch` is 0.

    Args:
      o: `config.optimizer`, here and below.
    """
    if not o.lr_batch:
        return o.base_learning_rate
    return o.base_learning_rate * batch_size / o.lr_batch


def warmup_steps(o: Any, steps_per_epoch: float, total_steps: int) -> int:
    """Steps until the learning rate is at its peak."""
    return min(round(o.warmup_epochs * steps_per_epoch), total_steps)


def make_schedule(
    o: Any, batch_size: int, steps_per_epoch: float, total_steps: int
) -> optax.Schedule:
    """Return the learning rate by step: linear warmup, then `optimizer.schedule`.

    - cosine: from the end of the warmup down to the minimum.
    - cosine_from_start: official ``supervised/lr_scheduler.py`` (timm). The cosine
      starts at step 0, so the rate drops at the end of the warmup; a step has the rate
      of the step before it.
    - multistep: times `gamma` at each of the `milestones`, in epochs (torch
      ``MultiStepLR``).
    - polynomial: ``minimum + (peak - minimum) * (1 - step / total_steps) ** power``,
      times the warmup's fraction of the peak (mmcv ``PolyLrUpdaterHook``).
    - constant.

    With `first_epoch=1` epochs count from 1, as in official
    ``self_supervised/util/lr_sched.py``: the first epoch is left out, and a cosine ends
    past its lowest point.
    """
    peak, low = peak_learning_rate(o, batch_size), o.min_learning_rate
    epochs, first = total_steps / steps_per_epoch, o.first_epoch
    warmup, start = min(o.warmup_epochs, epochs), o.warmup_learning_rate
    from_start = o.schedule == "cosine_from_start"

    def cosine(step, epoch):
        begin = 0.0 if from_start else warmup
        done = (epoch - begin) / max(epochs - begin, 1e-9)
        done = done if first else jnp.clip(done, 0.0, 1.0)
        return low + (peak - low) * (0.5 * (1.0 + jnp.cos(jnp.pi * done)))

    def multistep(step, epoch):
        passed = sum(
            step >= round((milestone - first) * steps_per_epoch)
            for milestone in o.milestones
        )
        return peak * jnp.float32(o.gamma) ** passed

    def polynomial(step, epoch):
        rest = jnp.clip(1.0 - epoch / epochs, 0.0, 1.0)
        return low + (peak - low) * rest**o.power

    rate_of = {
        "cosine": cosine,
        "cosine_from_start": cosine,
        "multistep": multistep,
        "polynomial": polynomial,
        "constant": lambda step, epoch: peak,
    }[o.schedule]

    def schedule(step):
        step = jnp.maximum(step - int(from_start), 0)
        epoch = step / steps_per_epoch + first
        rate = rate_of(step, epoch)
        rise = start + (peak - start) * epoch / max(warmup, 1e-9)
        if o.schedule == "polynomial":
            rise *= rate / peak
        return jnp.where(epoch < warmup, rise, rate)

    return schedule


def skip_steps(state: dict[str, Any], steps: int) -> dict[str, Any]:
    """Advance the schedule and the step count of a train state without learning.

    Adam's bias correction does not count the skipped steps.
    """
    schedules = optax.ScaleByScheduleState
    opt_state = jax.tree.map(
        lambda x: x._replace(count=x.count + steps) if isinstance(x, schedules) else x,
        state["opt_state"],
        is_leaf=lambda x: isinstance(x, schedules),
    )
    return state | {"opt_state": opt_state, "step": state["step"] + steps}
