"""Rows of `benchmarks.peers`: our program and PyTorch programs for the same job.

A row is a function that runs a number of steps. jax and torch are imported late, so
that each process loads only what it needs.
"""

import argparse
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

OURS = "hivit_jax"
# A function that runs a number of steps, and facts about the row.
Started = tuple[Callable[[int], Any], dict[str, Any]]
# Row -> (network, compiled, explicit softmax attention).
TORCH = {
    "torch": ("hivit", False, False),
    "torch, compiled": ("hivit", True, False),
    "torch, plain attention": ("hivit", False, True),
    "ViT-B": ("vit", False, False),
    "ViT-B, compiled": ("vit", True, False),
    "Swin-B": ("swin", False, False),
    "Swin-B, compiled": ("swin", True, False),
}
RECIPES = {"pretrain": "mae_base", "classify": "finetune:base"}
RECIPES["inference"] = RECIPES["classify"]
CLASSES, SMOOTHING = 1000, 0.1
# Overrides of finetuning without random draws, which a twin could not repeat.
UNRANDOM = {
    "model.drop_path_rate": 0,
    "mixup": 0,
    "cutmix": 0,
    "random_erasing": 0,
    "label_smoothing": SMOOTHING,
}
WEIGHT_DECAY, BETAS, LEARNING_RATE = 0.05, (0.9, 0.95), 1e-6


def start_ours(args: argparse.Namespace, first_step: Path) -> Started:
    """Compile our step and run it once.

    Writes the model, images and noise or labels of the first step to a file for the
    twin.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from benchmarks import plain_config  # noqa: F401  first
    from benchmarks.train_step import Evaluation, Training
    from hivit_jax import config as configs
    from hivit_jax import rng
    from hivit_jax.weights.names.official import to_official

    dtype = "float32" if args.device == "cpu" else "bfloat16"
    values = {"batch_size": args.batch, "data.name": "synthetic", "model.dtype": dtype}
    values |= {} if args.task == "pretrain" else UNRANDOM
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    config = configs.load(RECIPES[args.task], flags)
    forward = args.task == "inference"
    program = Evaluation(config) if forward else Training(config)
    task, batch, state = program.task, program.batch, jax.device_get(program.state)
    keys = rng.step_keys(config.seed, "train", jnp.uint32(0), args.batch)
    images = task.preprocess(batch) if forward else task.training_images(batch, keys)
    if args.task == "pretrain":
        mask_keys = rng.split_keys(keys.samples, "mask")
        target = jax.vmap(lambda key: jax.random.uniform(key, (196,)))(mask_keys)
    else:
        target = np.asarray(batch["label"], np.int64)
    model = nnx.eval_shape(task.build_model)
    weights = to_official(state["params"] | state["model_state"], model)
    np.savez(first_step, **weights, images=images, target=target)
    return program.run, {
        "loss": program.run(1),
        "compile_seconds": program.compile_seconds,
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib")},
    }


def build_network(name: str, task: str) -> Any:
    """Return a PyTorch network, "hivit", "vit" or "swin", for a job."""
    from benchmarks import torch_peers
    from benchmarks.torch_twin import HiViT

    classes = 0 if task == "pretrain" else CLASSES
    if name != "hivit":
        return {"vit": torch_peers.ViT, "swin": torch_peers.Swin}[name](classes)
    sizes, decoder = (224, 16, 3, 512, (2, 2, 20), 8), () if classes else (512, 6, 16)
    return HiViT(*sizes, bool(classes), num_classes=classes, decoder=decoder)


def start_torch(row: str, args: argparse.Namespace, first_step: Path) -> Started:
    """Prepare a PyTorch step and run it once."""
    import numpy as np
    import torch
    from torch.nn import functional as F

    from benchmarks.torch_twin import Attention

    name, compiled, Attention.plain = TORCH[row]
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")
    device = "cpu" if args.device == "cpu" else "cuda"
    network, pretrain = build_network(name, args.task), args.task == "pretrain"
    images, target = torch.randn(args.batch, 3, 224, 224), None
    if name == "hivit" and first_step.exists():
        saved = {key: torch.tensor(x) for key, x in np.load(first_step).items()}
        images = saved.pop("images").permute(0, 3, 1, 2).contiguous()
        target = saved.pop("target").to(device)
        network.load_state_dict(saved)
    network, images = network.to(device), images.to(device)
    smoothing = SMOOTHING if args.task == "classify" else 0.0

    def loss_of(images, target):
        if pretrain:
            return network.masked_loss(images, target)
        logits = network.classify(images)
        return F.cross_entropy(logits, target, label_smoothing=smoothing)

    if compiled:
        loss_of = torch.compile(loss_of, mode=args.torch_mode)
    run_step = inference_step if args.task == "inference" else training_step
    step = run_step(network, loss_of, device)

    def random_target():
        if pretrain:
            return torch.rand(args.batch, network.units, device=device)
        return torch.randint(CLASSES, (args.batch,), device=device)

    def run(count):
        for _ in range(count):
            loss = step(images, random_target())
        return loss.item()  # waits for the device

    began = time.perf_counter()
    loss = step(images, random_target() if target is None else target).item()
    return run, {
        "loss": None if target is None else loss,
        "compile_seconds": time.perf_counter() - began if compiled else None,
        "versions": {"torch": torch.__version__},
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }


def training_step(network: Any, loss_of: Callable, device: str) -> Callable:
    """Return a function (images, target) -> loss that also updates the network."""
    import torch

    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)

    def step(images, target):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = loss_of(images, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss

    return step


def inference_step(network: Any, loss_of: Callable, device: str) -> Callable:
    """Return a function (images, target) -> loss without gradients."""
    import torch

    network.eval()

    def step(images, target):
        autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
        with torch.no_grad(), autocast:
            return loss_of(images, target)

    return step
