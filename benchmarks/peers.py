"""Time pretraining steps in hivit_jax and in PyTorch, in interleaved blocks of steps.

    python -m benchmarks.peers [--device cpu|gpu] [--rows hivit_jax torch ...] \
        [--batch 8] [--rounds 5] [--steps 2] [--threads 2]

The benchmark compares configs/mae_base.py with a twin of the official PyTorch code and
with MAE on ViT-B and SimMIM on Swin-B (benchmarks/torch_peers.py). The dtype is float32
on a CPU and bfloat16 (autocast) on a GPU. On a CPU, the process of hivit_jax keeps
freed memory, as in training. PyTorch does so only with --keep_memory. Every row of the
table is a separate process. In each of `--rounds` rounds, the rows run `--steps` steps
one after another on the same cores. The benchmark requires torch in addition to the
packages of benchmarks/train_step.py.

The first loss of the twin must match that of hivit_jax for the same weights, images and
masks. PyTorch steps use normalized images; hivit_jax steps flip and normalize uint8
images. The results are written to results/peers_{cpu,gpu}.json.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.machine import processor

# jax and torch are imported late, so that each process loads only what it needs.
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OURS = "hivit_jax"
# Function that runs a number of steps, and facts about the row.
Started = tuple[Callable[[int], Any], dict[str, Any]]
# Row -> (network, compiled, explicit softmax attention).
TORCH = {
    "torch": ("hivit", False, False),
    "torch, compiled": ("hivit", True, False),
    "torch, plain attention": ("hivit", False, True),
    "ViT-B MAE": ("vit", False, False),
    "ViT-B MAE, compiled": ("vit", True, False),
    "Swin-B SimMIM": ("swin", False, False),
    "Swin-B SimMIM, compiled": ("swin", True, False),
}
DEFAULT = ("hivit_jax", "torch", "torch, compiled", "ViT-B MAE", "Swin-B SimMIM")
TOLERANCE = {"cpu": 1e-5, "gpu": 1e-2}  # relative, of the first loss
WEIGHT_DECAY, BETAS, LEARNING_RATE = 0.05, (0.9, 0.95), 1e-6


def start_ours(args: argparse.Namespace, first_step: Path) -> Started:
    """Compile the step of hivit_jax and run it once.

    Parameters, images and noise of the first step are written to a file for the twin.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from benchmarks import plain_config  # noqa: F401  first
    from benchmarks.train_step import Training
    from hivit_jax import config as configs
    from hivit_jax import rng
    from hivit_jax.weights.names.official import to_official

    dtype = "float32" if args.device == "cpu" else "bfloat16"
    values = {"batch_size": args.batch, "data.name": "synthetic", "model.dtype": dtype}
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    config = configs.load(str(ROOT / "configs" / "mae_base.py"), flags)
    training = Training(config)
    state = jax.device_get(training.state)
    keys = rng.step_keys(config.seed, "train", jnp.uint32(0), args.batch)
    images = training.task.training_images(training.batch, keys)
    mask_keys = rng.split_keys(keys.samples, "mask")
    noise = jax.vmap(lambda key: jax.random.uniform(key, (196,)))(mask_keys)
    model = nnx.eval_shape(training.task.build_model)
    weights = to_official(state["params"] | state["model_state"], model)
    np.savez(first_step, **weights, images=images, noise=noise)
    return training.run, {
        "loss": training.run(1),
        "compile_seconds": training.compile_seconds,
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib")},
    }


def start_torch(row: str, args: argparse.Namespace, first_step: Path) -> Started:
    """Prepare a PyTorch step and run it once."""
    import numpy as np
    import torch

    from benchmarks import torch_peers
    from benchmarks.torch_twin import Attention, HiViT

    name, is_compiled, Attention.plain = TORCH[row]
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")
    device = "cpu" if args.device == "cpu" else "cuda"
    if name == "hivit":
        network_sizes = (224, 16, 3, 512, (2, 2, 20), 8)
        network = HiViT(*network_sizes, relative_position=False, decoder=(512, 6, 16))
        units = 196
    else:
        network = {"vit": torch_peers.ViTMAE, "swin": torch_peers.SwinSimMIM}[name]()
        units = network.units
    images, noise = torch.randn(args.batch, 3, 224, 224), None
    if name == "hivit" and first_step.exists():
        saved = {key: torch.tensor(x) for key, x in np.load(first_step).items()}
        images = saved.pop("images").permute(0, 3, 1, 2).contiguous()
        noise = saved.pop("noise").to(device)
        network.load_state_dict(saved)
    network, images = network.to(device), images.to(device)
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)
    masked_loss = network.masked_loss
    if is_compiled:
        masked_loss = torch.compile(masked_loss, mode=args.torch_mode)

    def step(noise):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = masked_loss(images, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss

    def run(count):
        for _ in range(count):
            loss = step(torch.rand(args.batch, units, device=device))
        return loss.item()  # waits for the device

    began = time.perf_counter()
    first = torch.rand(args.batch, units, device=device) if noise is None else noise
    loss = step(first).item()
    return run, {
        "loss": None if noise is None else loss,
        "compile_seconds": time.perf_counter() - began if is_compiled else None,
        "versions": {"torch": torch.__version__},
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }


def worker(row: str, args: argparse.Namespace, first_step: Path, pipe: Any) -> None:
    """Run the process of a row.

    The process sends the facts about the row. Until it receives 0, it receives a number
    of steps, runs them, and sends the seconds and the CPU-seconds of all threads.
    """
    if args.device == "cpu":
        from hivit_jax.xla.compile import keep_freed_memory

        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
        if row == OURS or args.keep_memory:
            keep_freed_memory()  # as training does
    if row == OURS:
        run, facts = start_ours(args, first_step)
    else:
        run, facts = start_torch(row, args, first_step)
    pipe.send(facts)
    while count := pipe.recv():
        began, cpu_began = time.perf_counter(), time.process_time()
        run(count)
        pipe.send((time.perf_counter() - began, time.process_time() - cpu_began))


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Start all rows, check the first losses, and time interleaved blocks of steps.

    Raises:
      HivitError: the process of a row ended, or the first loss of a twin differs.
    """
    context = multiprocessing.get_context("spawn")
    pipes, results = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        first_step = Path(folder) / "first_step.npz"
        for row in args.rows:  # hivit_jax is the first
            pipes[row], end = context.Pipe()
            arguments = row, args, first_step, end
            context.Process(target=worker, args=arguments, daemon=True).start()
            end.close()  # so that recv fails if the process ends
            results[row] = receive(pipes[row], row)
            print(f"{row}: ready; first loss {results[row]['loss']}", flush=True)
    check_first_losses(results, TOLERANCE[args.device])
    blocks: dict[str, list[tuple[float, float]]] = {row: [] for row in args.rows}
    for round_index in range(args.rounds + 1):  # the first round is a warmup
        for row, pipe in pipes.items():
            pipe.send(args.steps)
            blocks[row].append(receive(pipe, row))
            seconds, cpu = (total / args.steps for total in blocks[row][-1])
            text = f"{seconds:9.4f} s{cpu:9.4f} CPU-s per step"
            print(f"round {round_index}  {row:26}{text}", flush=True)
    for pipe in pipes.values():
        pipe.send(0)
    for row, timings in blocks.items():
        seconds, cpu = zip(*timings[1:], strict=True)
        median = statistics.median(seconds) / args.steps
        results[row] |= {
            "images_per_second": args.batch / median,
            "seconds_per_step": median,
            "cpu_seconds_per_step": statistics.median(cpu) / args.steps,
            "seconds_of_rounds": [total / args.steps for total in seconds],
        }
    return results


def receive(pipe: Any, row: str) -> Any:
    """Receive an object from a row's process; raise HivitError if the process ended."""
    from hivit_jax.errors import HivitError

    try:
        return pipe.recv()
    except EOFError as error:
        raise HivitError(f"the process of {row} ended; see its error above") from error


def check_first_losses(results: dict[str, dict[str, Any]], tolerance: float) -> None:
    """Raise HivitError if the first loss of a twin differs from that of hivit_jax."""
    from hivit_jax.errors import HivitError

    expected = results.get(OURS, {}).get("loss")
    for row, result in results.items():
        if expected is None or result["loss"] is None:
            continue
        difference = abs(result["loss"] / expected - 1)
        if not difference <= tolerance:  # also if it is NaN
            raise HivitError(
                f"first loss of {row}: expected {expected} as ours within "
                f"{tolerance} (relative), found {result['loss']}"
            )


def table(results: dict[str, dict[str, Any]], cpu: bool) -> str:
    """Format a table: images per second, relative throughput, CPU-seconds per step."""
    ours = results.get(OURS, {}).get("images_per_second")
    lines = [f"{'':26}{'images/s':>10}{'of ours':>10}{'CPU-s per step' * cpu:>16}"]
    for row, result in results.items():
        line = f"{row:26}{result['images_per_second']:10,.2f}"
        line += f"{result['images_per_second'] / ours:10.2f}" if ours else f"{'':10}"
        lines.append(line + (f"{result['cpu_seconds_per_step']:16.2f}" if cpu else ""))
    return "\n".join(lines)


def run(argv: list[str] | None) -> None:
    """Parse flags, run the benchmark, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "gpu"), default="cpu")
    add("--rows", nargs="+", choices=(OURS, *TORCH), default=DEFAULT)
    add("--batch", type=int, help="images per step; 8 on a CPU, 256 on a GPU")
    add("--rounds", type=int, default=5)
    add("--steps", type=int, help="steps per round; 2 on a CPU, 20 on a GPU")
    add("--threads", type=int, default=2, help="threads and cores, on a CPU")
    add("--keep_memory", action="store_true", help="keep freed memory in PyTorch too")
    add("--torch_mode", default="default", help="such as max-autotune")
    add("--out", type=Path, help="the JSON file to write")
    args = parser.parse_args(argv)
    cpu = args.device == "cpu"
    args.rows = sorted(args.rows, key=(OURS, *TORCH).index)
    args.batch = args.batch or (8 if cpu else 256)
    args.steps = args.steps or (2 if cpu else 20)
    if cpu:
        os.environ["JAX_PLATFORMS"] = "cpu"
    else:  # because the rows share the GPU's memory
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    results = compare(args)
    print(table(results, cpu))
    result = {
        "device": args.device,
        "cpu": processor(),
        "batch_size": args.batch,
        "dtype": "float32" if cpu else "bfloat16",
        "threads": args.threads if cpu else None,
        "rounds": args.rounds,
        "steps_of_a_round": args.steps,
        "torch_mode": args.torch_mode,
        "torch_keeps_memory": args.keep_memory,
        "rows": results,
    }
    out = args.out or RESULTS / f"peers_{args.device}.json"
    out.write_text(json.dumps(result, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Entry point. Return the exit code."""
    from hivit_jax.errors import run_command

    return run_command(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
