"""Warnings about valid configs that probably do not train as intended."""

from typing import Any

from hivit_jax.data.sources.base import DatasetInfo
from hivit_jax.data.sources.splits import NO_EVALUATION
from hivit_jax.flags import config_flag
from hivit_jax.progress import counted
from hivit_jax.training.schedule import peak_learning_rate

# Usual range of AdamW's peak learning rate. With a smaller peak the weights hardly
# change; with a larger peak the loss usually diverges.
ADAM_PEAKS = (1e-6, 0.05)
# A run of fewer steps is a trial, whose curves need no points before its end.
TRIAL_STEPS = 20
MIN_POINTS = 2  # of a curve, before the end of the run
# Checkpoint intervals (in steps) and batches of up to these sizes cause no warning: a
# killed run loses little, and repeated images in a batch get different crops.
HARMLESS_CHECKPOINT_INTERVAL = 500
HARMLESS_BATCH_SIZE = 64


def common_warnings(
    config: Any, data: DatasetInfo, steps_per_epoch: float, total_steps: int
) -> list[str]:
    """Return the warnings that apply to every task, one line each.

    Args:
      total_steps: length of the run in steps.
    """
    return [
        *_length_warnings(config, data, steps_per_epoch, total_steps),
        *_learning_rate_warnings(config.optimizer, config.batch_size),
        *_class_warnings(config, data),
    ]


def _length_warnings(
    config: Any, data: DatasetInfo, steps_per_epoch: float, total_steps: int
) -> list[str]:
    """Return warnings about settings that do not fit the length of the run."""
    optimizer, epochs = config.optimizer, total_steps / steps_per_epoch
    end = f"the run ends after {total_steps:,} steps, {epochs:,.3g} epochs"
    found, num_images = [], data.counts.get("train", config.batch_size)
    in_epochs = not config.total_steps or optimizer.warmup_epochs > 0
    is_synthetic = not data.encoded
    if in_epochs and is_synthetic and not config.data.train_examples:
        found.append(
            f"data.name={config.data.name} has {num_images:,} images, which determine "
            "the steps of an epoch; data.train_examples=N sets another number"
        )
    if optimizer.warmup_epochs >= epochs:
        found.append(
            f"optimizer.warmup_epochs={optimizer.warmup_epochs:g}: {end}, before the "
            "learning rate reaches its peak"
        )
    if unreached := [f"{x:g}" for x in optimizer.milestones if x >= epochs]:
        found.append(
            f"optimizer.milestones: {end}, before epoch {', '.join(unreached)}"
        )
    if config.batch_size > max(num_images, HARMLESS_BATCH_SIZE):
        found.append(
            f"batch_size={config.batch_size} exceeds the {num_images:,} training "
            "images: a batch contains some images several times"
        )
    found += _interval_warnings(config, total_steps)
    decay = optimizer.ema_decay
    initial_weight = decay**total_steps
    if decay and initial_weight > 0.5:
        found.append(
            f"optimizer.ema_decay={decay:g}: after {counted(total_steps, 'step')}, the "
            f"initial parameters still have a weight of {initial_weight:.0%} in the "
            "averaged parameters, which evaluation uses"
        )
    return found


def _interval_warnings(config: Any, total_steps: int) -> list[str]:
    """Return warnings about intervals that are too long for the length of the run."""
    evaluated = config.data.eval_split != NO_EVALUATION
    eval_action = "is evaluated" if evaluated else "draws its curves and figures"
    steps, found = counted(total_steps, "step"), []
    for name, action in (("log_every", "logs"), ("eval_every", eval_action)):
        points = (total_steps - 1) // config[name]  # before the end
        if total_steps < TRIAL_STEPS or points >= MIN_POINTS:
            continue
        problem, when = f"exceeds the {steps} of the run, which", "only at its end"
        if config[name] <= total_steps:
            problem = f"is long for the {steps} of the run, which"
            when = "only once before its end" if points else when
        flag = config_flag(name, total_steps // 10)
        found.append(f"{name}={config[name]} {problem} {action} {when}; try {flag}")
    interval = config.checkpoint_every
    if interval > max(total_steps, HARMLESS_CHECKPOINT_INTERVAL):
        found.append(
            f"checkpoint_every={interval} exceeds the {steps} of the run, which saves "
            "only its last step, so a killed run is lost"
        )
    return found


def _learning_rate_warnings(optimizer: Any, batch_size: int) -> list[str]:
    """Return warnings about a peak of 0, and about other rates that exceed the peak."""
    peak, found = peak_learning_rate(optimizer, batch_size), []
    if peak == 0:
        return ["optimizer.base_learning_rate=0: the run changes no parameter"]
    for name in ("warmup_learning_rate", "min_learning_rate"):
        if optimizer[name] > peak:
            found.append(
                f"optimizer.{name}={optimizer[name]:g} exceeds the peak learning rate, "
                f"{peak_text(optimizer, batch_size)}"
            )
    return found


def _class_warnings(config: Any, data: DatasetInfo) -> list[str]:
    """Return warnings about classes, and about evaluation on training images."""
    found, num_dataset_classes = [], len(data.classes)
    num_classes = config.model.get("num_classes") or 0
    is_synthetic = not data.encoded  # a synthetic dataset has the model's classes
    if not is_synthetic and 0 < num_dataset_classes < num_classes:
        found.append(
            f"model.num_classes={num_classes} exceeds the {num_dataset_classes:,} "
            f"classes of {config.data.name}: the additional outputs are never correct"
        )
    weights, balance = config.get("class_weights"), config.data.balance
    if weights and balance:
        found.append(
            f"class_weights={weights!r} with data.balance={balance:g}: both give rare "
            "classes more weight"
        )
    found += one_class_warnings(config)
    splits = config.data.train_split, config.data.eval_split
    if splits[0] and splits[0] == splits[1]:
        found.append(
            f"data.eval_split={splits[1]!r} is the training split: the evaluation uses "
            "the training images"
        )
    return found


def one_class_warnings(config: Any) -> list[str]:
    """Return a warning if a classifier of one label per image has only one class."""
    if config.model.get("num_classes") != 1 or config.data.multi_label:
        return []
    return ["model.num_classes=1: with one class the loss is always 0"]


def adam_warnings(optimizer: Any, batch_size: int) -> list[str]:
    """Return the warnings about the settings of AdamW, one line each."""
    peak, (low, high), found = peak_learning_rate(optimizer, batch_size), ADAM_PEAKS, []
    if peak and not low <= peak <= high:
        found.append(
            f"the peak learning rate, {peak_text(optimizer, batch_size)}, is unusual "
            f"for AdamW; expected {low:g} to {high:g}"
        )
    if optimizer.betas[0] > optimizer.betas[1]:
        found.append(
            f"optimizer.betas={tuple(optimizer.betas)}: the first is usually smaller "
            "than the second, as in (0.9, 0.999)"
        )
    return found


def peak_text(optimizer: Any, batch_size: int) -> str:
    """Return the peak learning rate and its computation as text."""
    peak = peak_learning_rate(optimizer, batch_size)
    if not optimizer.lr_batch:
        return f"{peak:g}"
    base = f"{optimizer.base_learning_rate:g}"
    return f"{base} x batch_size {batch_size} / {optimizer.lr_batch} = {peak:g}"
