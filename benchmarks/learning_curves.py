"""Compare loss curves of this library with those of a PyTorch twin, step by step.

    python -m benchmarks.learning_curves [--steps 200]

Both programs train a small network with equal initial weights, batches, masks and
schedule. There are four pairs of runs: pretraining and classification, on the digits
and on JPEG photographs. The benchmark requires torch (`pip install torch`). It writes
results/learning_curves.json and docs/learning_curves.png. The exit code is 1 if the
losses of a step differ by 1 % or more.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from matplotlib import pyplot as plt
from torch.nn import functional as F

from benchmarks import photographs
from benchmarks.torch_twin import HiViT
from hivit_jax import config as configs
from hivit_jax import inputs, rng
from hivit_jax.config import step_options
from hivit_jax.distributed.sharding import make_mesh
from hivit_jax.models import image_shape
from hivit_jax.tasks import Task
from hivit_jax.training.schedule import make_schedule
from hivit_jax.training.step import prepare
from hivit_jax.tree import named_leaves
from hivit_jax.weights.names.official import to_official

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "learning_curves.json"
FIGURE = ROOT / "docs" / "learning_curves.png"
SMALL = {
    "model.embed_dim": 64,
    "model.depths": (1, 1, 4),
    "model.num_heads": 2,
    "model.dtype": "float32",
    "optimizer.warmup_epochs": 1.0,
}
MAE = {"decoder_embed_dim": 64, "decoder_depth": 2, "decoder_num_heads": 2}
LEARNING_RATE = {"mae": 4e-3, "classify": 2e-3}  # for a batch of 256 images


def small_config(task: str, data: str, folder: str, steps: int) -> Any:
    """Return the config of a small run.

    Args:
      task: "mae" or "classify".
      data: "digits" or "photographs".
      folder: directory of the photographs.
    """
    values = SMALL | {"total_steps": steps, "batch_size": 64}
    values["optimizer.base_learning_rate"] = LEARNING_RATE[task]
    if task == "mae":
        values |= {f"model.{key}": value for key, value in MAE.items()}
    else:  # no random numbers on the device, because the twin cannot repeat them
        values |= {"model.drop_path_rate": 0.0, "mixup": 0.0, "cutmix": 0.0}
        values |= {"random_erasing": 0.0, "init_from": "", "data.flip": False}
        values["optimizer.layer_decay"] = 1.0
    if data == "photographs":
        name = "mae_base" if task == "mae" else "supervised"
        values |= {"data.name": "folder", "data.dir": folder, "data.canvas": 0}
        values |= {"model.image_size": 64, "data.flip": False, "batch_size": 32}
        if task == "classify":
            values["model.num_classes"] = len(photographs.photographs())
    else:
        name = "digits_mae" if task == "mae" else "digits_finetune"
        values["data.train_examples"] = 0
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    return configs.load(str(ROOT / "configs" / f"{name}.py"), flags)


def twin(config: Any, model: Any, arrays: Any) -> HiViT:
    """Return the PyTorch network with the arrays of a model of hivit_jax."""
    m = config.model
    mae = config.task == "mae"
    size, _, channels = image_shape(config.model)
    network = HiViT(
        *(size, model.config.patch_size, channels, m.embed_dim, m.depths, m.num_heads),
        relative_position=not mae,
        num_classes=0 if mae else m.num_classes,
        decoder=tuple(MAE.values()) if mae else (),
    )
    state = {
        name: torch.tensor(np.array(array))
        for name, array in to_official(arrays, model).items()
    }
    network.load_state_dict(state)
    return network


def torch_optimizer(
    config: Any, network: HiViT, is_decayed: Callable[[str], bool]
) -> torch.optim.AdamW:
    """Return the optimizer of the twin.

    Args:
      is_decayed: returns True if weight decay applies to the twin's parameter with a
        given name.
    """
    groups: dict[bool, list] = {True: [], False: []}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            groups[is_decayed(name)].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": config.optimizer.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        betas=config.optimizer.betas,
        eps=1e-8,
    )


def torch_loss(
    task: Task, network: HiViT, step: int, batch: dict[str, Any]
) -> torch.Tensor:
    """Return the loss of the twin on a batch; in pretraining, with hivit_jax's mask."""
    config = task.config
    images = torch.tensor(np.array(task.preprocess(batch)))
    images = images.permute(0, 3, 1, 2)
    if config.task == "classify":
        return F.cross_entropy(
            network.classify(images),
            torch.tensor(batch["label"]).long(),
            label_smoothing=config.label_smoothing,
        )
    position = jnp.uint32(step * config.batch_size)  # of the batch's first example
    keys = rng.step_keys(config.seed, "train", position, config.batch_size)
    keys = rng.derive_keys(keys.samples, "mask")
    num_units = network.absolute_pos_embed.shape[1]
    noise = jax.vmap(lambda key: jax.random.uniform(key, (num_units,)))(keys)
    return network.masked_loss(
        images,
        torch.tensor(np.array(noise)),
        config.mask_ratio,
        config.model.get("norm_pix_loss") is not False,
    )


def curves(config: Any) -> tuple[list[float], list[float]]:
    """Return the losses of all steps: with hivit_jax, and with the PyTorch twin."""
    steps = config.total_steps
    task = inputs.make_task(config)
    per_epoch, _ = inputs.count_steps(config, inputs.images_per_epoch(config, task))
    schedule = make_schedule(config.optimizer, config.batch_size, per_epoch, steps)
    model = task.build_model()
    mesh = make_mesh(config.mesh, config.batch_size)
    training = prepare(task, mesh, schedule, **step_options(config))
    state, train_step = jax.jit(training.init)(), jax.jit(training.step)

    arrays = jax.device_get(state["params"] | state["model_state"])
    network = twin(config, model, arrays)
    # Names can be paired, because to_official keeps the order of parameters.
    official = to_official(jax.device_get(state["params"]), model)
    names = dict(zip(official, named_leaves(state["params"]), strict=True))
    optimizer = torch_optimizer(
        config, network, lambda name: task.is_decayed(names[name])
    )
    losses: tuple[list[float], list[float]] = ([], [])
    for step, batch in enumerate(inputs.train_batches(config, 0, steps)):
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(step))
        loss = torch_loss(task, network, step, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state, metrics = train_step(state, {}, batch, np.int32(step))
        losses[0].append(float(metrics["loss"]))
        losses[1].append(loss.item())
    return losses


def main() -> int:
    """Run all four comparisons and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=200, help="steps per run")
    steps = parser.parse_args().steps
    results, figure = {}, plt.figure(figsize=(10, 6), layout="constrained")
    with tempfile.TemporaryDirectory() as folder:
        photographs.write(folder, {"train": 420, "val": 7}, (96, 72))
        for data in ("digits", "photographs"):
            for task in ("mae", "classify"):
                losses, twin_losses = curves(small_config(task, data, folder, steps))
                difference = np.abs(np.array(losses) / np.array(twin_losses) - 1).max()
                print(
                    f"{data:12} {task:9} loss {losses[0]:.4f} -> {losses[-1]:.4f}  "
                    f"largest difference {difference:.1e}"
                )
                results[f"{data} {task}"] = {
                    "hivit_jax": losses,
                    "torch": twin_losses,
                    "largest_relative_difference": float(difference),
                }
                axes = figure.add_subplot(2, 2, len(results))
                axes.plot(twin_losses, label="PyTorch", linewidth=3, color="silver")
                axes.plot(losses, label="hivit_jax", linewidth=1)
                axes.set_title(f"{data}, {task}: largest difference {difference:.1e}")
                axes.set_xlabel("step")
                axes.set_ylabel("loss")
                axes.legend()
    figure.savefig(FIGURE, dpi=90)
    result = {"torch": torch.__version__, "jax": jax.__version__, "curves": results}
    RESULT.write_text(json.dumps(result) + "\n")
    worst = max(run["largest_relative_difference"] for run in results.values())
    return 0 if worst < 0.01 else 1


if __name__ == "__main__":
    sys.exit(main())
