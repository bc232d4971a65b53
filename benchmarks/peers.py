"""Pretraining steps here and in PyTorch, in the same run, block by block in turn.

    python -m benchmarks.peers [--device cpu|gpu] [--rows hivit_jax torch ...] \
        [--batch 8] [--rounds 5] [--steps 2] [--threads 2]

configs/mae_base.py against a twin of the official PyTorch code, eager and compiled, and
against MAE on ViT-B and SimMIM on Swin-B (benchmarks/torch_peers.py). float32 on a CPU,
bfloat16 (autocast) on a GPU. On a CPU ours keeps the memory that it frees, as it does
in training; with --keep_memory PyTorch does so too, which is not its habit. Every row
is a process of its own; one runs a block of `--steps` steps while the others sleep,
`--rounds` times in turn, on the same cores. Needs torch beside what
benchmarks/train_step.py takes.

Our first loss has to be the twin's, of the same weights, images and masks. In PyTorch
images are normalised already and lie on the device; ours are uint8, flipped and
normalised in every step. Writes results/peers_{cpu,gpu}.json.
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

# jax and torch are imported late, each by the processes that need it.
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OURS = "hivit_jax"
# Row -> (network, compiled, scores written out).
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
TOLERANCE = {"cpu": 1e-5, "gpu": 1e-2}  # of the first loss, relative
DECAY, BETAS, RATE = 0.05, (0.9, 0.95), 1e-6  # as the recipe


def ours(args: argparse.Namespace, exchange: Path) -> tuple[Callable, dict[str, Any]]:
    """Our step, ready: (number of steps -> None, what is to be told of it).

    Leaves parameters, images and noise of the first step for the twin.
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
    params = jax.device_get(training.state["params"])
    keys = rng.step_keys(config.seed, "train", jnp.uint32(0), args.batch)
    images = training.task.training_images(training.batch, keys)
    masks = rng.split_keys(keys.samples, "mask")
    noise = jax.vmap(lambda key: jax.random.uniform(key, (196,)))(masks)
    model = nnx.eval_shape(training.task.build_model)
    state = to_official(params, model)
    np.savez(exchange, **state, images=images, noise=noise)
    loss = training.run(1)
    return training.run, {
        "loss": loss,
        "compile_seconds": training.compile_seconds,
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib")},
    }


def theirs(
    row: str, args: argparse.Namespace, exchange: Path
) -> tuple[Callable, dict[str, Any]]:
    """A step in PyTorch, ready, as `ours`."""
    import numpy as np
    import torch

    from benchmarks import torch_peers
    from benchmarks.torch_twin import Attention, HiViT

    name, compiled, Attention.plain = TORCH[row]
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")
    device = "cpu" if args.device == "cpu" else "cuda"
    if name == "hivit":
        sizes = (224, 16, 3, 512, (2, 2, 20), 8)
        network = HiViT(*sizes, relative_position=False, decoder=(512, 6, 16))
        units = 196
    else:
        peers = {"vit": torch_peers.ViTMAE, "swin": torch_peers.SwinSimMIM}
        network = peers[name]()
        units = network.units
    images, noise = torch.randn(args.batch, 3, 224, 224), None
    if name == "hivit" and exchange.exists():
        saved = {key: torch.tensor(each) for key, each in np.load(exchange).items()}
        images = saved.pop("images").permute(0, 3, 1, 2).contiguous()
        noise = saved.pop("noise").to(device)
        network.load_state_dict(saved)
    network, images = network.to(device), images.to(device)
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, fused=True)
    measured = network.masked_loss
    if compiled:
        measured = torch.compile(measured, mode=args.torch_mode)

    def step(noise):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = measured(images, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss

    def run(count):
        for _ in range(count):
            loss = step(torch.rand(args.batch, units, device=device))
        return loss.item()  # waits for the device

    began = time.perf_counter()
    first = noise if noise is not None else torch.rand(args.batch, units, device=device)
    loss = step(first).item()
    return run, {
        "loss": None if noise is None else loss,
        "compile_seconds": time.perf_counter() - began if compiled else None,
        "versions": {"torch": torch.__version__},
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }


def work(row: str, args: argparse.Namespace, exchange: Path, pipe: Any) -> None:
    """A row's process: makes ready, then runs as many steps as the pipe asks for, and
    tells seconds and CPU-seconds (of all threads); ends at 0.
    """
    if args.device == "cpu":
        from hivit_jax.xla.compile import keep_memory

        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
        if row == OURS or args.keep_memory:
            keep_memory()  # as training does
    start = ours if row == OURS else lambda *rest: theirs(row, *rest)
    run, about = start(args, exchange)
    pipe.send(about)
    while count := pipe.recv():
        began, busy = time.perf_counter(), time.process_time()
        run(count)
        pipe.send((time.perf_counter() - began, time.process_time() - busy))


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Starts the rows one after another, checks the twins, and runs blocks in turn.

    Raises:
      HivitError: a row's process ended, or a twin's first loss is not ours.
    """
    context = multiprocessing.get_context("spawn")
    pipes, found = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        exchange = Path(folder) / "first_step.npz"
        for row in args.rows:  # ours first
            pipes[row], end = context.Pipe()
            process = context.Process(
                target=work, args=(row, args, exchange, end), daemon=True
            )
            process.start()
            end.close()  # so that its death ends recv
            found[row] = told(pipes[row], row)
            print(f"{row}: ready; first loss {found[row]['loss']}", flush=True)
    check(found, TOLERANCE[args.device])
    blocks: dict[str, list[tuple[float, float]]] = {row: [] for row in args.rows}
    for number in range(args.rounds + 1):  # the first one warms up
        for row, pipe in pipes.items():
            pipe.send(args.steps)
            blocks[row].append(told(pipe, row))
            seconds, busy = (each / args.steps for each in blocks[row][-1])
            text = f"round {number}  {row:26}{seconds:9.4f} s{busy:9.4f} CPU-s a step"
            print(text, flush=True)
    for pipe in pipes.values():
        pipe.send(0)
    for row, each in blocks.items():
        seconds, busy = zip(*each[1:], strict=True)
        median = statistics.median(seconds) / args.steps
        found[row] |= {
            "images_per_second": args.batch / median,
            "seconds_per_step": median,
            "cpu_seconds_per_step": statistics.median(busy) / args.steps,
            "seconds_of_rounds": [each / args.steps for each in seconds],
        }
    return found


def told(pipe: Any, row: str) -> Any:
    """What a row's process sends; HivitError if it ended instead."""
    from hivit_jax.errors import HivitError

    try:
        return pipe.recv()
    except EOFError as error:
        raise HivitError(f"the process of {row} ended; see above") from error


def check(found: dict[str, dict[str, Any]], tolerance: float) -> None:
    """HivitError unless the twins' first losses are ours."""
    from hivit_jax.errors import HivitError

    if OURS not in found:
        return
    expected = found[OURS]["loss"]
    for row, each in found.items():
        if each["loss"] is not None:
            apart = abs(each["loss"] / expected - 1)
            if not apart <= tolerance:
                raise HivitError(
                    f"first loss of {row}: {each['loss']}; ours is {expected}, "
                    f"expected a relative difference of at most {tolerance}"
                )


def table(found: dict[str, dict[str, Any]], cpu: bool) -> str:
    """Images a second, times ours, and on a CPU CPU-seconds a step."""
    rate = found.get(OURS, {}).get("images_per_second")
    lines = [f"{'':26}{'images/s':>10}{'of ours':>10}{'CPU-s a step' * cpu:>14}"]
    for row, each in found.items():
        line = f"{row:26}{each['images_per_second']:10,.2f}"
        line += f"{each['images_per_second'] / rate:10.2f}" if rate else f"{'':10}"
        lines.append(line + (f"{each['cpu_seconds_per_step']:14.2f}" if cpu else ""))
    return "\n".join(lines)


def run(argv: list[str] | None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "gpu"), default="cpu")
    add("--rows", nargs="+", choices=(OURS, *TORCH), default=DEFAULT)
    add("--batch", type=int, help="images a step; 8 on a CPU, 256 on a GPU")
    add("--rounds", type=int, default=5)
    add("--steps", type=int, help="of a round; 2 on a CPU, 20 on a GPU")
    add("--threads", type=int, default=2, help="and cores, on a CPU")
    add("--keep_memory", action="store_true", help="in PyTorch too, as here on a CPU")
    add("--torch_mode", default="default", help="such as max-autotune")
    add("--out", type=Path, help="the JSON file to write")
    args = parser.parse_args(argv)
    cpu = args.device == "cpu"
    args.rows = sorted(args.rows, key=(OURS, *TORCH).index)
    args.batch, args.steps = (
        args.batch or (8, 256)[not cpu],
        args.steps or (2, 20)[not cpu],
    )
    if cpu:
        os.environ["JAX_PLATFORMS"] = "cpu"
    else:  # they share it
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    found = compare(args)
    print(table(found, cpu))
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
        "rows": found,
    }
    out = args.out or RESULTS / f"peers_{args.device}.json"
    out.write_text(json.dumps(result, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Runs all rows; returns the exit code."""
    from hivit_jax.errors import exit_code

    return exit_code(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
