"""Loss curves of this library and of a PyTorch twin, step by step, in one figure.

    python -m benchmarks.learning_curves [--steps 200]

The same small network, initial weights, batches, masks and schedule, here and there:
pretraining and classification, on the digits and on photographs read as JPEG. Needs
torch (`pip install torch`). Writes results/learning_curves.{json,png}; fails if a step
differs by more than 1 %.
"""

import argparse
import json
import sys
import tempfile
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
from hivit_jax.training.schedule import make_schedule
from hivit_jax.training.step import prepare
from hivit_jax.tree import named_leaves, split
from hivit_jax.weights.names.official import to_official

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "learning_curves"
SMALL = {
    "model.embed_dim": 64,
    "model.depths": (1, 1, 4),
    "model.num_heads": 2,
    "model.dtype": "float32",
    "optimizer.warmup_epochs": 1.0,
}
MAE = {"decoder_embed_dim": 64, "decoder_depth": 2, "decoder_num_heads": 2}
RATE = {"mae": 4e-3, "classify": 2e-3}  # for 256 images


def recipe(task: str, data: str, folder: str, steps: int) -> Any:
    """A small run of a task ("mae", "classify") on "digits" or "photographs"."""
    values = SMALL | {"total_steps": steps, "batch_size": 64}
    values["optimizer.base_learning_rate"] = RATE[task]
    if task == "mae":
        values |= {f"model.{key}": value for key, value in MAE.items()}
    else:  # what is drawn on the device has no twin
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


def twin(config: Any, model: Any, params: Any) -> HiViT:
    """The PyTorch network with the same weights."""
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
        for name, array in to_official(params, model).items()
    }
    network.load_state_dict(state)
    return network


def curves(config: Any) -> tuple[list[float], list[float]]:
    """Losses of every step, here and in PyTorch."""
    steps = config.total_steps
    task = inputs.make_task(config)
    per_epoch, _ = inputs.count_steps(config, inputs.epoch_images(config, task))
    schedule = make_schedule(config.optimizer, config.batch_size, per_epoch, steps)
    model = task.build_model()
    abstract = split(model)[1]
    mesh = make_mesh(config.mesh, config.batch_size)
    training = prepare(task, mesh, schedule, **step_options(config))
    state, step_here = jax.jit(training.init)(), jax.jit(training.step)

    network = twin(config, model, jax.device_get(state["params"]))
    # One official name for each of ours, in the same order.
    official = to_official(jax.device_get(state["params"]), model)
    names = dict(zip(official, named_leaves(abstract), strict=True))
    groups: dict[bool, list] = {True: [], False: []}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            groups[task.is_decayed(names[name])].append(parameter)
    there = torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": config.optimizer.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        betas=config.optimizer.betas,
        eps=1e-8,
    )

    def loss_there(step, batch):
        images = torch.tensor(np.array(task.preprocess(batch)))
        images = images.permute(0, 3, 1, 2)
        if config.task == "classify":
            return F.cross_entropy(
                network.classify(images),
                torch.tensor(batch["label"]).long(),
                label_smoothing=config.label_smoothing,
            )
        first = jnp.uint32(step * config.batch_size)
        keys = rng.step_keys(config.seed, "train", first, config.batch_size)
        keys = rng.split_keys(keys.samples, "mask")
        units = network.absolute_pos_embed.shape[1]
        noise = jax.vmap(lambda key: jax.random.uniform(key, (units,)))(keys)
        return network.masked_loss(
            images,
            torch.tensor(np.array(noise)),
            config.mask_ratio,
            config.model.get("norm_pix_loss") is not False,
        )

    losses: tuple[list[float], list[float]] = ([], [])
    for step, batch in enumerate(inputs.train_batches(config, 0, steps)):
        for group in there.param_groups:
            group["lr"] = float(schedule(step))
        loss = loss_there(step, batch)
        there.zero_grad()
        loss.backward()
        there.step()
        state, values = step_here(state, {}, batch, np.int32(step))
        losses[0].append(float(values["loss"]))
        losses[1].append(loss.item())
    return losses


def main() -> int:
    """Runs all four comparisons; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    found, figure = {}, plt.figure(figsize=(10, 6), layout="constrained")
    with tempfile.TemporaryDirectory() as folder:
        photographs.write(folder, {"train": 420, "val": 7}, (96, 72))
        for data in ("digits", "photographs"):
            for task in ("mae", "classify"):
                here, there = curves(recipe(task, data, folder, steps))
                apart = np.abs(np.array(here) / np.array(there) - 1)
                print(
                    f"{data:12} {task:9} loss {here[0]:.4f} -> {here[-1]:.4f}  "
                    f"largest difference {apart.max():.1e}"
                )
                found[f"{data} {task}"] = {
                    "hivit_jax": here,
                    "torch": there,
                    "largest_relative_difference": float(apart.max()),
                }
                axes = figure.add_subplot(2, 2, len(found))
                axes.plot(there, label="PyTorch", linewidth=3, color="silver")
                axes.plot(here, label="hivit_jax", linewidth=1)
                axes.set_title(f"{data}, {task}: apart by {apart.max():.1e} at most")
                axes.set_xlabel("step")
                axes.set_ylabel("loss")
                axes.legend()
    figure.savefig(OUT.with_suffix(".png"), dpi=90)
    result = {"torch": torch.__version__, "jax": jax.__version__, "curves": found}
    OUT.with_suffix(".json").write_text(json.dumps(result) + "\n")
    worst = max(each["largest_relative_difference"] for each in found.values())
    return 0 if worst < 0.01 else 1


if __name__ == "__main__":
    sys.exit(main())
