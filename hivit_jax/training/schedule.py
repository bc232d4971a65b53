"""Learning rate schedules. The argument `options` is ``config.optimizer``.

The key `schedule` selects the curve after the warmup.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def peak_learning_rate(options: Any, batch_size: int) -> float:
    """Return ``base_learning_rate * batch_size / lr_batch``.

    If `lr_batch` is 0, return `base_learning_rate`.
    """
    if not options.lr_batch:
        return options.base_learning_rate
    return options.base_learning_rate * batch_size / options.lr_batch


def warmup_steps(options: Any, steps_per_epoch: float, total_steps: int) -> int:
    """Return the number of steps in `options.warmup_epochs`, at most `total_steps`."""
    return min(round(options.warmup_epochs * steps_per_epoch), total_steps)


def make_schedule(
    options: Any, batch_size: int, steps_per_epoch: float, total_steps: int
) -> optax.Schedule:
    """Return a function (step) -> learning rate: linear warmup, then a curve.

    - cosine: a cosine from the peak at the end of the warmup down to the minimum.
    - cosine_from_start: as in the official ``supervised/lr_scheduler.py`` (timm). The
      cosine starts at step 0, so the learning rate jumps down at the end of the warmup.
      The whole schedule is delayed by one step.
    - multistep: the peak, multiplied by `gamma` at each of the `milestones`, in epochs
      (torch's ``MultiStepLR``).
    - polynomial: ``minimum + (peak - minimum) * (1 - step / total_steps) ** power``.
      During the warmup, this value is multiplied by the ratio of the linear warmup to
      the peak (mmcv's ``PolyLrUpdaterHook``).
    - constant: the peak.

    With `first_epoch=1`, epochs count from 1, as in the official
    ``self_supervised/util/lr_sched.py``. The learning rate is then that of one epoch
    later, and a cosine ends past its lowest point.
    """
    peak, minimum = peak_learning_rate(options, batch_size), options.min_learning_rate
    epochs, first_epoch = total_steps / steps_per_epoch, options.first_epoch
    warmup, initial = min(options.warmup_epochs, epochs), options.warmup_learning_rate
    from_start = options.schedule == "cosine_from_start"

    def cosine(step, epoch):
        begin = 0.0 if from_start else warmup
        progress = (epoch - begin) / max(epochs - begin, 1e-9)
        progress = progress if first_epoch else jnp.clip(progress, 0.0, 1.0)
        return minimum + (peak - minimum) * (0.5 * (1.0 + jnp.cos(jnp.pi * progress)))

    def multistep(step, epoch):
        passed = sum(
            step >= round((milestone - first_epoch) * steps_per_epoch)
            for milestone in options.milestones
        )
        return peak * jnp.float32(options.gamma) ** passed

    def polynomial(step, epoch):
        remaining = jnp.clip(1.0 - epoch / epochs, 0.0, 1.0)
        return minimum + (peak - minimum) * remaining**options.power

    after_warmup = {
        "cosine": cosine,
        "cosine_from_start": cosine,
        "multistep": multistep,
        "polynomial": polynomial,
        "constant": lambda step, epoch: peak,
    }[options.schedule]

    def schedule(step):
        step = jnp.maximum(step - int(from_start), 0)
        epoch = step / steps_per_epoch + first_epoch
        rate = after_warmup(step, epoch)
        warmup_rate = initial + (peak - initial) * epoch / max(warmup, 1e-9)
        if options.schedule == "polynomial" and peak:
            warmup_rate *= rate / peak
        return jnp.where(epoch < warmup, warmup_rate, rate)

    return schedule


def skip_steps(state: dict[str, Any], steps: int) -> dict[str, Any]:
    """Return a train state whose schedule and step count are `steps` steps further.

    The skipped steps do not count in Adam's bias correction.
    """

    def is_schedule_state(x):
        return isinstance(x, optax.ScaleByScheduleState)

    advance = jax.jit(lambda count: count + steps)
    opt_state = jax.tree.map(
        lambda x: x._replace(count=advance(x.count)) if is_schedule_state(x) else x,
        state["opt_state"],
        is_leaf=is_schedule_state,
    )
    return state | {"opt_state": opt_state, "step": advance(state["step"])}
