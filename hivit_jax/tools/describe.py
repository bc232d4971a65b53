"""Describe a recipe without running it: config, parameters, cost, schedule, hours."""

from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from hivit_jax import config as configs
from hivit_jax import inputs, rng, tasks
from hivit_jax.data.notes import dataset_warnings
from hivit_jax.errors import UNAVAILABLE
from hivit_jax.models import Model
from hivit_jax.paths import open_path
from hivit_jax.record import differences
from hivit_jax.reporting import figures
from hivit_jax.training.schedule import (
    make_schedule,
    peak_learning_rate,
    warmup_steps,
)
from hivit_jax.tree import named_leaves, split, split_params
from hivit_jax.xla.chips import CHIPS, utilization_notes

CHIP_COUNT = 8  # number of chips in the table of hours
HOURS = "hours", "chip-hours"  # column titles


def describe(config: Any) -> str:
    """Return the text of ``--mode describe``. Warnings come first."""
    task = inputs.task_of_recipe(config)
    model = nnx.eval_shape(task.build_model)
    images_per_epoch = inputs.images_per_epoch(config, task)
    splits = inputs.used_splits(config)
    warnings = dataset_warnings(config.data, splits, task.needs_labels)
    warnings += task.warnings(*inputs.count_steps(config, images_per_epoch))
    preface = ["\n".join(f"warning: {line}" for line in warnings)] if warnings else []
    tables = [
        parameter_table(model, task.frozen_parameters(model)),
        cost_table(task, model),
        schedule_table(config),
        hours_table(config, task, model),
    ]
    return "\n\n".join([*preface, key_table(config), *tables])


def key_table(config: Any) -> str:
    """Return a table of the config keys that differ from their defaults."""
    lines = [f"  {name:32} {v!r}" for name, v in configs.changed_keys(config).items()]
    return "\n".join(["keys that differ from the defaults in docs/config.md:", *lines])


def draw_figures(config: Any, workdir: str | Path) -> str:
    """Write figures of the schedule and of 16 augmented training images.

    If the dataset cannot be read, draws only the schedule.

    Returns:
      The paths of the figures, and the error of the dataset if there is one, as text.
    """
    directory = open_path(workdir) / "figures"
    _, total_steps, schedule = resolved_schedule(config)
    steps = np.unique(np.linspace(0, total_steps, 1000).astype(np.int32))
    curve = figures.schedule(steps, np.asarray(schedule(steps)))
    figures.write_png(directory / "schedule.png", curve)
    config = config.copy_and_resolve_references()
    config.batch_size = 16
    try:
        task = inputs.make_task(config, "train")
        batch = next(inputs.train_batches(config, 0, 1))
    except UNAVAILABLE as error:
        return f"{directory}/schedule.png; no images drawn: {error}"
    keys = rng.step_keys(config.seed, "train", jnp.uint32(0), 16)
    images = task.training_images(batch, keys)
    images = np.asarray(images) * config.data.std + config.data.mean
    grid = figures.image_grid(images.clip(0, 1))
    figures.write_png(directory / "augmented.png", grid)
    return f"{directory}/schedule.png, {directory}/augmented.png"


def recipe_diff(config: Any, path: str) -> str:
    """Return the differences from a recipe, one line per key.

    Args:
      path: file or name of the recipe.
    """
    lines = differences(configs.load(path).to_dict(), config.to_dict())
    text = "\n  ".join(["", *lines]) if lines else "none"
    return f"differences from {path}: {text}"


def parameter_table(model: Model, frozen: Collection[str] = ()) -> str:
    """Return a table: the number of parameters of each part of the model.

    Args:
      frozen: names of the parameters that `model.freeze` selects.
    """
    sizes: dict[str, int] = defaultdict(int)
    for name, leaf in named_leaves(split(model)[1]).items():
        path = name.split("/")
        if path[0] == "encoder":
            number = int(path[2]) + 1 if path[1] in ("stages", "merges") else ""
            part = f"encoder {path[1].removesuffix('s')} {number}".rstrip()
        else:
            part = path[0]
        sizes[part] += leaf.size
    lines = [f"{part:<30} {size:>12,}" for part, size in sizes.items()]
    total = model.parameter_count()
    lines.append(f"{'parameters':<30} {total:>12,}  = {total / 1e6:.4f} M")
    params = named_leaves(split_params(model)[1])
    num_trained = sum(leaf.size for name, leaf in params.items() if name not in frozen)
    if num_trained != total:
        lines[-1] += f" ({num_trained / 1e6:.4f} M trained)"
    return "\n".join(lines)


def cost_table(task: tasks.Task, model: Model) -> str:
    """Return the multiply-adds of an image's forward pass, without and with norms."""
    macs = task.macs(model) / 1e9
    macs_with_norms = task.macs(model, layer_norm_cost=5) / 1e9
    return (
        f"multiply-adds per image        {macs:12.4f} G\n"
        f"counting LayerNorm as 5 per element {macs_with_norms:7.4f} G  "
        "(as in published tables)"
    )


def schedule_table(config: Any) -> str:
    """Return the number of steps and epochs, and the learning rate at a few steps."""
    images_per_epoch, total_steps, schedule = resolved_schedule(config)
    optimizer, batch_size = config.optimizer, config.batch_size
    steps_per_epoch = images_per_epoch / batch_size
    warmup = warmup_steps(optimizer, steps_per_epoch, total_steps)
    peak, lr_batch = peak_learning_rate(optimizer, batch_size), optimizer.lr_batch
    scale = f" x {batch_size:,} / {lr_batch}" if lr_batch else ""
    lines = [
        f"{total_steps:,} steps of {batch_size:,} images = "
        f"{total_steps / steps_per_epoch:,.1f} epochs; one epoch has "
        f"{images_per_epoch:,} images, {steps_per_epoch:,.1f} steps",
        f"learning rate {optimizer.base_learning_rate:g}{scale} = {peak:g}, "
        f"{optimizer.schedule}",
    ]
    half, three_quarters = total_steps // 2, total_steps * 3 // 4
    for step in sorted({0, warmup, half, three_quarters, total_steps}):
        lines.append(f"  step {step:>9,}  {float(schedule(step)):.3e}")
    return "\n".join(lines)


def hours_table(config: Any, task: tasks.Task, model: Model) -> str:
    """Return a table of a run's hours and chip-hours for each type of chip.

    The table contains the hours at the peak of a chip and at its utilization, both
    computed from the multiply-adds of `Task.passes` forward passes, without memory
    traffic, recomputation, evaluation and reading of images.
    """
    _, total_steps, _ = resolved_schedule(config)
    images = total_steps * config.batch_size
    flops = task.training_flops(model)
    if not flops:
        return "operations per training image: unknown, because the model has no `macs`"
    title = f"about {flops / 1e9:,.3g} GFLOP per training image; {images:,} images"
    lowest_rate = min(chip.flops * chip.utilization.of_peak for chip in CHIPS.values())
    if images * flops / lowest_rate < 36:  # chip-seconds
        return f"{title}; less than 0.01 chip-hours on every chip"
    lines = [
        title,
        "hours and chip-hours at the bfloat16 peak of a chip, which no run reaches,",
        "and at the part of the peak that is measured or assumed (docs/cost.md);",
        "on N chips, a run takes chip-hours / N hours:",
        f"{'':23}{'at the peak':>25}{'at a part of the peak':>38}",
        _row("", "chips", "images/s/chip", *HOURS, "part of peak", *HOURS),
    ]
    for name, chip in CHIPS.items():
        utilization, speed = chip.utilization, chip.flops / flops
        chip_hours = images / speed / 3600
        at_peak, at_part = (
            (f"{each / CHIP_COUNT:,.2f}", f"{each:,.2f}")
            for each in (chip_hours, chip_hours / utilization.of_peak)
        )
        part = f"{utilization.of_peak:.1%} {utilization.basis}"
        cells = str(CHIP_COUNT), f"{speed:,.0f}", *at_peak, part, *at_part
        lines.append(_row(name, *cells))
    lines += [
        *utilization_notes(),
        "--mode compile --topology=v5e:2x4 (or another) includes memory traffic",
    ]
    return "\n".join(lines)


def _row(name: str, *cells: str) -> str:
    widths = 6, 14, 11, 12, 15, 11, 12
    pairs = zip(cells, widths, strict=True)
    return f"{name:8}" + "".join(f"{cell:>{width}}" for cell, width in pairs)


def resolved_schedule(config: Any) -> tuple[int, int, optax.Schedule]:
    """Return images per epoch, total steps, and the learning rate schedule."""
    task = inputs.task_of_recipe(config)
    images_per_epoch = inputs.images_per_epoch(config, task)
    steps_per_epoch, total_steps = inputs.count_steps(config, images_per_epoch)
    schedule = make_schedule(
        config.optimizer, config.batch_size, steps_per_epoch, total_steps
    )
    return images_per_epoch, total_steps, schedule
