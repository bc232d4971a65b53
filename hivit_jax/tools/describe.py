"""Summary of a recipe: config, parameters, cost, schedule. Does not run the model."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from hivit_jax import config as configs
from hivit_jax import inputs, rng, tasks
from hivit_jax.errors import DataError
from hivit_jax.models import Model
from hivit_jax.paths import expand
from hivit_jax.reporting import figures
from hivit_jax.training.schedule import (
    make_schedule,
    peak_learning_rate,
    warmup_steps,
)
from hivit_jax.tree import named_leaves, split


def describe(config: Any) -> str:
    """Return the text of ``--mode describe``."""
    task = inputs.task_of_recipe(config)
    model = nnx.eval_shape(task.build_model)
    tables = [parameter_table(model), cost_table(task, model), schedule_table(config)]
    return "\n\n".join([configs.to_json(config).rstrip(), *tables])


def draw_figures(config: Any, workdir: str | Path) -> str:
    """Write figures of the schedule and of 16 augmented training images.

    Writes no image figure if the dataset cannot be read.

    Returns:
      The paths of the figures, as text.
    """
    directory = Path(expand(str(workdir))) / "figures"
    _, total, learning_rate = resolved_schedule(config)
    steps = np.unique(np.linspace(0, total, 1000).astype(np.int32))
    curve = figures.schedule(steps, np.asarray(learning_rate(steps)))
    figures.write_png(directory / "schedule.png", curve)
    config = config.copy_and_resolve_references()
    config.batch_size = 16
    try:
        task = inputs.make_task(config, "train")
        batch = next(inputs.train_batches(config, 0, 1))
    except DataError as error:
        return f"{directory}/schedule.png; no images drawn: {error}"
    keys = rng.step_keys(config.seed, "train", jnp.uint32(0), 16)
    images = task.training_images(batch, keys)
    images = np.asarray(images) * config.data.std + config.data.mean
    grid = figures.image_grid(images.clip(0, 1))
    figures.write_png(directory / "augmented.png", grid)
    return f"{directory}/schedule.png, {directory}/augmented.png"


def recipe_diff(config: Any, path: str) -> str:
    """Return the differences from the recipe in the file `path`, one line per key."""
    old, new = (named_leaves(c.to_dict()) for c in (configs.load(path), config))
    lines = [
        f"{name.replace('/', '.')}: {old.get(name)} -> {new.get(name)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    return f"changes to {path}: " + ("\n  ".join(["", *lines]) if lines else "none")


def parameter_table(model: Model) -> str:
    """Return the number of parameters of each part of the model."""
    sizes: dict[str, int] = defaultdict(int)
    for name, leaf in named_leaves(split(model)[1]).items():
        parts = name.split("/")
        if parts[0] == "encoder":
            index = int(parts[2]) + 1 if parts[1] in ("stages", "merges") else ""
            part = f"encoder {parts[1].removesuffix('s')} {index}".rstrip()
        else:
            part = parts[0]
        sizes[part] += leaf.size
    lines = [f"{part:<30} {size:>12,}" for part, size in sizes.items()]
    total = model.parameter_count()
    lines.append(f"{'parameters':<30} {total:>12,}  = {total / 1e6:.4f} M")
    if fixed := sizes.get("decoder_pos_embed"):
        lines[-1] += f" ({(total - fixed) / 1e6:.4f} M trained)"
    return "\n".join(lines)


def cost_table(task: tasks.Task, model: Model) -> str:
    """Return the multiply-adds of one image's forward pass, without and with norms."""
    macs = task.macs(model) / 1e9
    published = task.macs(model, layer_norm_cost=5) / 1e9
    return (
        f"multiply-adds per image        {macs:12.4f} G\n"
        f"with 5 per LayerNorm element   {published:12.4f} G  (as in published tables)"
    )


def schedule_table(config: Any) -> str:
    """Return the number of steps and epochs, and the learning rate at a few steps."""
    images, total, learning_rate = resolved_schedule(config)
    optimizer, batch_size = config.optimizer, config.batch_size
    per_epoch = images / batch_size
    warmup = warmup_steps(optimizer, per_epoch, total)
    peak, lr_batch = peak_learning_rate(optimizer, batch_size), optimizer.lr_batch
    scale = f" x {batch_size:,} / {lr_batch}" if lr_batch else ""
    lines = [
        f"{total:,} steps of {batch_size:,} images: {total / per_epoch:,.1f} "
        f"epochs of {images:,} images, {per_epoch:,.1f} steps each",
        f"learning rate {optimizer.base_learning_rate:g}{scale} = {peak:g}, "
        f"{optimizer.schedule}",
    ]
    for step in sorted({0, warmup, total // 2, total * 3 // 4, total}):
        lines.append(f"  step {step:>9,}  {float(learning_rate(step)):.3e}")
    return "\n".join(lines)


def resolved_schedule(config: Any) -> tuple[int, int, optax.Schedule]:
    """Return images per epoch, total steps, and the learning rate as a schedule."""
    task = inputs.task_of_recipe(config)
    images = inputs.images_per_epoch(config, task)
    per_epoch, total = inputs.count_steps(config, images)
    schedule = make_schedule(config.optimizer, config.batch_size, per_epoch, total)
    return images, total, schedule
