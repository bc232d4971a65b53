"""What a recipe amounts to: config, parameters, cost, schedule. Runs nothing."""

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
from hivit_jax.reporting import figures
from hivit_jax.training.schedule import (
    make_schedule,
    peak_learning_rate,
    warmup_steps,
)
from hivit_jax.tree import named_leaves, split


def describe(config: Any) -> str:
    """The text of ``--mode describe``."""
    task = inputs.task_of_recipe(config)
    model = nnx.eval_shape(task.build_model)
    parts = [configs.to_json(config).rstrip(), parameter_table(model)]
    parts += [cost(task, model), schedule(config)]
    return "\n\n".join(parts)


def draw(config: Any, workdir: str | Path) -> str:
    """Draws the schedule and, where the dataset is at hand, 16 training images as the
    network gets them; returns where they are.
    """
    directory = Path(workdir) / "figures"
    _, total, rate = resolved_schedule(config)
    steps = np.unique(np.linspace(0, total, 1000).astype(np.int32))
    drawn = figures.schedule(steps, np.asarray(rate(steps)))
    figures.write_png(directory / "schedule.png", drawn)
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
    figures.write_png(directory / "augmented.png", figures.sheet(images.clip(0, 1)))
    return f"{directory}/schedule.png, {directory}/augmented.png"


def changes(config: Any, path: str) -> str:
    """What was changed of the recipe in the file `path`, a line for each key."""
    told, now = (named_leaves(c.to_dict()) for c in (configs.load(path), config))
    lines = [
        f"{name.replace('/', '.')}: {told.get(name)} -> {now.get(name)}"
        for name in sorted(told.keys() | now.keys())
        if told.get(name) != now.get(name)
    ]
    return f"changes of {path}: " + ("\n  ".join(["", *lines]) if lines else "none")


def parameter_table(model: Model) -> str:
    """Parameters by part of the model."""
    sizes: dict[str, int] = defaultdict(int)
    fixed = 0
    for name, leaf in named_leaves(split(model)[1]).items():
        parts = name.split("/")
        if parts[0] == "encoder":
            number = int(parts[2]) + 1 if parts[1] in ("stages", "merges") else ""
            part = f"encoder {parts[1].removesuffix('s')} {number}".rstrip()
        else:
            part = parts[0]
        sizes[part] += leaf.size
        fixed += leaf.size if parts[0] == "decoder_pos_embed" else 0
    lines = [f"{part:<30} {size:>12,}" for part, size in sizes.items()]
    total = model.parameter_count()
    lines.append(f"{'parameters':<30} {total:>12,}  = {total / 1e6:.4f} M")
    if fixed:
        lines[-1] += f" ({(total - fixed) / 1e6:.4f} M trained)"
    return "\n".join(lines)


def cost(task: tasks.Task, model: Model) -> str:
    """Multiply-adds of the forward pass for one image, counted as published."""
    alone = task.macs(model) / 1e9
    published = task.macs(model, layer_norm_cost=5) / 1e9
    return (
        f"multiply-adds per image        {alone:12.4f} G\n"
        f"with 5 per LayerNorm element   {published:12.4f} G  (as the published tables)"
    )


def schedule(config: Any) -> str:
    """Steps, epochs and the learning rate along the way."""
    images, total, rate = resolved_schedule(config)
    per_epoch = images / config.batch_size
    o, batch_size = config.optimizer, config.batch_size
    warmup = warmup_steps(o, per_epoch, total)
    scale = f" x {batch_size:,} / {o.lr_batch}" if o.lr_batch else ""
    lines = [
        f"{total:,} steps of {config.batch_size:,} images: {total / per_epoch:,.1f} "
        f"epochs of {images:,} images, {per_epoch:,.1f} steps each",
        f"learning rate {o.base_learning_rate:g}{scale} = "
        f"{peak_learning_rate(o, batch_size):g}, {o.schedule}",
    ]
    for step in sorted({0, warmup, total // 2, total * 3 // 4, total}):
        lines.append(f"  step {step:>9,}  {float(rate(step)):.3e}")
    return "\n".join(lines)


def resolved_schedule(config: Any) -> tuple[int, int, optax.Schedule]:
    """Images of an epoch, steps in all and the learning rate by step."""
    task = inputs.task_of_recipe(config)
    images = inputs.epoch_images(config, task)
    per_epoch, total = inputs.count_steps(config, images)
    rate = make_schedule(config.optimizer, config.batch_size, per_epoch, total)
    return images, total, rate
