"""Compare the speed of hivit_jax and PyTorch in pretraining, finetuning or inference.

    python -m benchmarks.peers [--task pretrain|classify|inference] \
        [--device cpu|gpu] [--rows hivit_jax torch ...] \
        [--batch 8] [--rounds 5] [--steps 2] [--threads 2]

Compares HiViT-B in hivit_jax with a PyTorch twin of the official code, eager and
compiled, and with ViT-B and Swin-B in PyTorch (benchmarks/torch_peers.py). The tasks
are:

- pretrain: the train step of mae_base. ViT-B is trained by MAE, Swin-B by SimMIM.
- classify: finetuning, the train step of finetune:base without drop path, Mixup,
  CutMix and random erasing.
- inference: the forward pass of the classifier.

The dtype is float32 on a CPU and bfloat16 (autocast) on a GPU. On a CPU, malloc keeps
freed memory in the hivit_jax process, as in training with hivit_jax. With
`--keep_memory`, malloc keeps freed memory in the PyTorch processes too. Every row of
the table is a separate process. In each of `--rounds` rounds, the processes take turns
on the same cores: each process runs `--steps` steps while the others sleep. The
benchmark needs torch in addition to the packages of benchmarks/train_step.py.

The first step of the PyTorch HiViT-B uses the weights, images, and masks or labels of
hivit_jax's first step. The losses of both first steps must match. The images are
already on the device. PyTorch receives normalized images. hivit_jax receives uint8
images, normalizes them in every step and, in training, flips them. The results are
written to results/peers_TASK_DEVICE.json.
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
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.machine import processor
from benchmarks.peer_rows import (
    OURS,
    RECIPES,
    TORCH,
    PreparedRow,
    start_ours,
    start_torch,
)

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DEFAULT_ROWS = (OURS, "torch", "torch, compiled", "ViT-B", "Swin-B")
GPU_BATCH = 256  # default number of images per step on a GPU
TOLERANCE = {"cpu": 1e-5, "gpu": 1e-2}  # relative difference of the first losses


def start_row(
    prepare_row: Callable[[], PreparedRow], keep_memory: bool, args: argparse.Namespace
) -> Any:
    """Start the process of a row and return the pipe to its `worker`.

    Args:
      prepare_row: function of `benchmarks.peer_rows` that prepares a program.
      keep_memory: make malloc keep freed memory, if the process runs on a CPU.
    """
    context = multiprocessing.get_context("spawn")
    pipe, worker_pipe = context.Pipe()
    arguments = prepare_row, keep_memory, args, worker_pipe
    context.Process(target=worker, args=arguments, daemon=True).start()
    worker_pipe.close()  # so that recv fails if the process ends
    return pipe


def worker(
    prepare_row: Callable[[], PreparedRow],
    keep_memory: bool,
    args: argparse.Namespace,
    pipe: Any,
) -> None:
    """Run the process of a row.

    The process first sends the facts about the row. For each number of steps that it
    receives, it runs the steps and sends the wall-clock seconds and the CPU-seconds of
    all threads. After the number 0, it sends the peak memory in bytes and ends.
    """
    if args.device == "cpu":
        from hivit_jax.xla.compile import keep_freed_memory

        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
        if keep_memory:
            keep_freed_memory()
    run, peak_memory, facts = prepare_row()
    pipe.send(facts)
    while count := pipe.recv():
        began, cpu_began = time.perf_counter(), time.process_time()
        run(count)
        pipe.send((time.perf_counter() - began, time.process_time() - cpu_began))
    pipe.send(peak_memory())


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Start all rows, check the first losses, and time the steps in interleaved rounds.

    Raises:
      HivitError: the process of a row ended, or the first loss of a twin differs.
    """
    pipes, facts = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        first_step = Path(folder) / "first_step.npz"
        for row in args.rows:  # sorted: if hivit_jax is selected, it is the first row
            if row == OURS:
                prepare_row = partial(start_ours, args, first_step)
            else:
                prepare_row = partial(start_torch, *TORCH[row], args, first_step)
            keep_memory = row == OURS or args.keep_memory
            pipes[row] = start_row(prepare_row, keep_memory, args)
            # On a CPU, the rows start one after another. On a GPU, the benchmark waits
            # only for the first row, because the others read the file that it writes.
            if args.device == "cpu" or row == args.rows[0]:
                facts[row] = wait_until_ready(pipes[row], row)
        facts |= {
            row: wait_until_ready(pipes[row], row)
            for row in args.rows
            if row not in facts
        }
    check_first_losses(facts, TOLERANCE[args.device])
    return {row: facts[row] | x for row, x in time_rows(pipes, args).items()}


def wait_until_ready(pipe: Any, row: str) -> dict[str, Any]:
    """Receive and return the facts about a row; print its first loss if known."""
    facts = receive(pipe, row)
    loss = "" if facts["loss"] is None else f"; first loss {facts['loss']}"
    print(f"{row}: ready{loss}", flush=True)
    return facts


def time_rows(
    pipes: dict[str, Any], args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Time interleaved rounds of steps, end the processes, and return the results.

    In the results, `seconds_of_rounds` contains the seconds per step of each round.

    Args:
      pipes: row -> pipe of `start_row`, after the facts about the row were received.
    """
    timings: dict[str, list[tuple[float, float]]] = {row: [] for row in pipes}
    for round_index in range(args.rounds + 1):  # the first round is a warmup
        for row, pipe in pipes.items():
            pipe.send(args.steps)
            timings[row].append(receive(pipe, row))
            seconds, cpu = (total / args.steps for total in timings[row][-1])
            text = f"{seconds:9.4f} s{cpu:9.4f} CPU-s per step"
            print(f"round {round_index}  {row:28}{text}", flush=True)
    results = {}
    for row, row_timings in timings.items():
        pipes[row].send(0)
        seconds, cpu = zip(*row_timings[1:], strict=True)
        median = statistics.median(seconds) / args.steps
        results[row] = {
            "images_per_second": args.batch / median,
            "seconds_per_step": median,
            "cpu_seconds_per_step": statistics.median(cpu) / args.steps,
            "seconds_of_rounds": [total / args.steps for total in seconds],
            "peak_memory_bytes": receive(pipes[row], row),
        }
    return results


def receive(pipe: Any, row: str) -> Any:
    """Receive an object from a row's process; raise HivitError if the process ended."""
    from hivit_jax.errors import HivitError

    try:
        return pipe.recv()
    except EOFError as error:
        raise HivitError(f"the process of {row} ended; see its error above") from error


def check_first_losses(facts: dict[str, dict[str, Any]], tolerance: float) -> None:
    """Raise HivitError if the first losses of hivit_jax and a twin differ."""
    from hivit_jax.errors import HivitError

    expected = facts.get(OURS, {}).get("loss")
    for row, row_facts in facts.items():
        if expected is None or row_facts["loss"] is None:
            continue
        difference = abs(row_facts["loss"] / expected - 1)
        if not difference <= tolerance:  # true for NaN too
            raise HivitError(
                f"first loss of {row}: expected {expected} (the loss of {OURS}) up to "
                f"a relative difference of {tolerance}, found {row_facts['loss']}.\n"
                "Compare benchmarks/torch_twin.py with the model of hivit_jax"
            )


def table(results: dict[str, dict[str, Any]], on_cpu: bool) -> str:
    """Format a table: images per second, relative throughput, CPU-seconds on a CPU."""
    our_throughput = results.get(OURS, {}).get("images_per_second")
    lines = [f"{'':26}{'images/s':>10}{'relative':>10}{'CPU-s per step' * on_cpu:>16}"]
    for row, result in results.items():
        line = f"{row:26}{result['images_per_second']:10,.2f}"
        line += (
            f"{result['images_per_second'] / our_throughput:10.2f}"
            if our_throughput
            else f"{'':10}"
        )
        line += f"{result['cpu_seconds_per_step']:16.2f}" if on_cpu else ""
        lines.append(line)
    return "\n".join(lines)


def add_flags(add: Callable, gpu_batch: int) -> None:
    """Add the flags that `benchmarks.peers` and `benchmarks.paper` share.

    Args:
      add: the parser's `add_argument`.
      gpu_batch: default number of images per step on a GPU.
    """
    add("--device", choices=("cpu", "gpu"), default="cpu")
    add("--batch", type=int, help=f"images per step; 8 on a CPU, {gpu_batch} on a GPU")
    add("--rounds", type=int, default=5)
    add("--steps", type=int, help="steps per round; 2 on a CPU, 20 on a GPU")
    add("--threads", type=int, default=2, help="CPU threads and cores per process")
    add("--torch_mode", default="default", help="mode of torch.compile")


def set_defaults(args: argparse.Namespace, gpu_batch: int) -> None:
    """Set defaults of batch and steps, and the environment variables of the rows."""
    cpu = args.device == "cpu"
    args.batch = args.batch or (8 if cpu else gpu_batch)
    args.steps = args.steps or (2 if cpu else 20)
    if cpu:
        os.environ["JAX_PLATFORMS"] = "cpu"
    else:  # because the rows share the GPU's memory
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"


def shared_facts(args: argparse.Namespace) -> dict[str, Any]:
    """Return the facts that all rows of a run share."""
    cpu = args.device == "cpu"
    return {
        "cpu": processor(),
        "batch_size": args.batch,
        "dtype": "float32" if cpu else "bfloat16",
        "threads": args.threads if cpu else None,
        "rounds": args.rounds,
        "steps_of_a_round": args.steps,
    }


def run(argv: list[str] | None) -> None:
    """Parse flags, run the benchmark, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--task", choices=RECIPES, default="pretrain")
    text = "programs to compare"
    add("--rows", nargs="+", choices=(OURS, *TORCH), default=DEFAULT_ROWS, help=text)
    text = "keep freed memory in the PyTorch processes too"
    add("--keep_memory", action="store_true", help=text)
    add("--out", type=Path, help="the JSON file to write")
    add_flags(add, GPU_BATCH)
    args = parser.parse_args(argv)
    args.rows = sorted(args.rows, key=(OURS, *TORCH).index)
    set_defaults(args, GPU_BATCH)
    results = compare(args)
    print(table(results, args.device == "cpu"))
    result = {
        "task": args.task,
        "device": args.device,
        **shared_facts(args),
        "torch_mode": args.torch_mode,
        "torch_keeps_memory": args.keep_memory,
        "rows": results,
    }
    out = args.out or RESULTS / f"peers_{args.task}_{args.device}.json"
    out.write_text(json.dumps(result, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Entry point. Return the exit code."""
    from hivit_jax.errors import run_command

    return run_command(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
