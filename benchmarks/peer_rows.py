"""Rows of `benchmarks.peers`: programs of hivit_jax and PyTorch for a job.

jax and torch are imported inside functions, so that the process of a row imports only
the packages that it needs. `benchmarks.paper` uses this module too.
"""

import argparse
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.machine import peak_process_memory

OURS = "hivit_jax"
# Prepared program: a function that runs a number of steps, a function that returns the
# peak memory in bytes, and facts about the program.
PreparedRow = tuple[Callable[[int], Any], Callable[[], int], dict[str, Any]]
# Row -> (network, with torch.compile, with explicit softmax attention).
TORCH = {
    "torch": ("HiViT-B", False, False),
    "torch, compiled": ("HiViT-B", True, False),
    "torch, plain attention": ("HiViT-B", False, True),
    "ViT-B": ("ViT-B", False, False),
    "ViT-B, compiled": ("ViT-B", True, False),
    "Swin-B": ("Swin-B", False, False),
    "Swin-B, compiled": ("Swin-B", True, False),
}
# Network -> width, depths and heads of the encoder.
HIVIT = {
    "HiViT-T": (384, (1, 1, 10), 6),
    "HiViT-S": (384, (2, 2, 20), 6),
    "HiViT-B": (512, (2, 2, 20), 8),
}
RECIPES = {"pretrain": "mae_base", "classify": "finetune:base"}
RECIPES["inference"] = RECIPES["classify"]
CLASSES, SMOOTHING = 1000, 0.1
# Overrides in finetuning and inference: the label smoothing of the PyTorch twin, and no
# random draws, because the twin cannot repeat them.
NO_RANDOM_DRAWS = {
    "model.drop_path_rate": 0,
    "mixup": 0,
    "cutmix": 0,
    "random_erasing": 0,
    "label_smoothing": SMOOTHING,
}
WEIGHT_DECAY, BETAS, LEARNING_RATE = 0.05, (0.9, 0.95), 1e-6


def load_recipe(recipe: str, values: dict[str, Any], args: argparse.Namespace) -> Any:
    """Return a recipe's config with overrides.

    Without overrides, the batch size is `args.batch`, and the dtype is float32 on CPUs
    and bfloat16 on GPUs.
    """
    from benchmarks import plain_config  # noqa: F401  before hivit_jax
    from hivit_jax import config as configs

    dtype = "float32" if args.device == "cpu" else "bfloat16"
    values = {"batch_size": args.batch, "model.dtype": dtype} | values
    return configs.load(recipe, [f"--config.{key}={x}" for key, x in values.items()])


def start_recipe(
    recipe: str, values: dict[str, Any], args: argparse.Namespace
) -> PreparedRow:
    """Compile the step of a recipe with overrides, and run one step."""
    return row_after_first_step(
        compile_program(load_recipe(recipe, values, args), args), args
    )


def compile_program(config: Any, args: argparse.Namespace) -> Any:
    """Compile the train step of a config, or its evaluation step for inference."""
    from benchmarks.train_step import Evaluation, Training

    return (Evaluation if args.task == "inference" else Training)(config)


def row_after_first_step(program: Any, args: argparse.Namespace) -> PreparedRow:
    """Run the first step of a compiled program of hivit_jax; return the row."""
    import jax

    from benchmarks.train_step import peak_memory

    return (
        program.run,
        peak_memory,
        {
            "loss": program.run(1),
            "compile_seconds": program.compile_seconds,
            "versions": {name: metadata.version(name) for name in ("jax", "jaxlib")},
            "gpu": jax.devices()[0].device_kind if args.device == "gpu" else None,
        },
    )


def start_ours(args: argparse.Namespace, first_step: Path) -> PreparedRow:
    """Compile the step of hivit_jax and run one step.

    Writes the weights, images, and noise (pretraining) or labels of the first step to a
    file. The first step of the PyTorch twin reads this file.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from hivit_jax import rng
    from hivit_jax.weights.names.official import to_official

    values = {"data.name": "synthetic"}
    values |= {} if args.task == "pretrain" else NO_RANDOM_DRAWS
    config = load_recipe(RECIPES[args.task], values, args)
    program, is_inference = compile_program(config, args), args.task == "inference"
    task, batch, state = program.task, program.batch, jax.device_get(program.state)
    keys = rng.step_keys(config.seed, "train", jnp.uint32(0), args.batch)
    images = (
        task.preprocess(batch) if is_inference else task.training_images(batch, keys)
    )
    if args.task == "pretrain":
        mask_keys, num_units = rng.derive_keys(keys.samples, "mask"), (224 // 16) ** 2
        uniform = jax.vmap(lambda key: jax.random.uniform(key, (num_units,)))
        noise_or_labels = uniform(mask_keys)
    else:
        noise_or_labels = np.asarray(batch["label"], np.int64)
    model = nnx.eval_shape(task.build_model)
    weights = to_official(state["params"] | state["model_state"], model)
    np.savez(first_step, **weights, images=images, noise_or_labels=noise_or_labels)
    return row_after_first_step(program, args)


def build_network(name: str, task: str) -> Any:
    """Return a PyTorch network: ViT-B, Swin-B, Swin-B 192, or a key of `HIVIT`.

    Args:
      task: "pretrain" for a masked autoencoder or SimMIM; otherwise a classifier.
    """
    from benchmarks import torch_peers
    from benchmarks.torch_twin import HiViT

    num_classes = 0 if task == "pretrain" else CLASSES
    if name == "ViT-B":
        return torch_peers.ViT(num_classes)
    if name not in HIVIT:
        return torch_peers.Swin(num_classes, window=6 if name.endswith("192") else 7)
    sizes, decoder = (224, 16, 3, *HIVIT[name]), () if num_classes else (512, 6, 16)
    return HiViT(*sizes, bool(num_classes), num_classes=num_classes, decoder=decoder)


def start_torch(
    name: str,
    compiled: bool,
    plain: bool,
    args: argparse.Namespace,
    first_step: Path | None = None,
) -> PreparedRow:
    """Prepare a PyTorch program and run one step.

    Args:
      name: network; see `build_network`.
      compiled: use torch.compile.
      plain: compute the softmax of attention explicitly, without fused attention.
      first_step: file of `start_ours` with the weights and inputs of the first step,
        for HiViT-B. None, or no such file: random weights and inputs.
    """
    import torch

    from benchmarks.torch_twin import Attention

    Attention.plain = plain
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")
    device = "cpu" if args.device == "cpu" else "cuda"
    network, pretrain = build_network(name, args.task), args.task == "pretrain"
    side = network.image_size
    images, noise_or_labels = torch.randn(args.batch, 3, side, side), None
    if name == "HiViT-B" and first_step and first_step.exists():
        images, noise_or_labels = load_first_step(network, first_step)
    network, images = network.to(device), images.to(device)
    loss_of = torch_loss(network, args.task)
    if compiled:
        loss_of = torch.compile(loss_of, mode=args.torch_mode)
    make_step = inference_step if args.task == "inference" else training_step
    step = make_step(network, loss_of, device)

    def random_noise_or_labels():
        if pretrain:
            return torch.rand(args.batch, network.num_units, device=device)
        return torch.randint(CLASSES, (args.batch,), device=device)

    def run(count):
        for _ in range(count):
            loss = step(images, random_noise_or_labels())
        return loss.item()  # waits for the device

    is_random = noise_or_labels is None
    first = random_noise_or_labels() if is_random else noise_or_labels.to(device)
    began = time.perf_counter()
    loss = step(images, first).item()
    on_gpu = device == "cuda"
    memory = torch.cuda.max_memory_allocated if on_gpu else peak_process_memory
    facts = {
        "loss": None if is_random else loss,
        "compile_seconds": time.perf_counter() - began if compiled else None,
        "versions": {"torch": torch.__version__},
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
    }
    return run, memory, facts


def load_first_step(network: Any, first_step: Path) -> tuple[Any, Any]:
    """Load the weights of `start_ours`; return its images, and noise or labels."""
    import numpy as np
    import torch

    saved = {key: torch.tensor(x) for key, x in np.load(first_step).items()}
    images = saved.pop("images").permute(0, 3, 1, 2).contiguous()
    noise_or_labels = saved.pop("noise_or_labels")
    network.load_state_dict(saved)
    return images, noise_or_labels


def torch_loss(network: Any, task: str) -> Callable:
    """Return a function (images, noise or labels) -> loss of a network.

    Args:
      task: see `build_network`.
    """
    from torch.nn import functional as F

    smoothing = SMOOTHING if task == "classify" else 0.0

    def loss_of(images, noise_or_labels):
        if task == "pretrain":
            return network.masked_loss(images, noise_or_labels)
        logits = network.classify(images)
        return F.cross_entropy(logits, noise_or_labels, label_smoothing=smoothing)

    return loss_of


def training_step(network: Any, loss_of: Callable, device: str) -> Callable:
    """Return a function (images, noise or labels) -> loss that updates the network."""
    import torch

    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)

    def step(images, noise_or_labels):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = loss_of(images, noise_or_labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss

    return step


def inference_step(network: Any, loss_of: Callable, device: str) -> Callable:
    """Return a function (images, noise or labels) -> loss without gradients."""
    import torch

    network.eval()

    def step(images, noise_or_labels):
        autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
        with torch.no_grad(), autocast:
            return loss_of(images, noise_or_labels)

    return step
