"""Measure throughput, memory and compile time of the train step of a recipe.

    python -m benchmarks.train_step [--config mae_base] [--batch 256] [--forward] \
        [--rounds 5] [--steps 20] [--set model.dtype=float32 data.canvas=0 ...]

The benchmark runs the train step on all devices, repeatedly on one batch of synthetic
images that is already on the devices. --forward runs the evaluation step instead, which
has only a forward pass. Times are medians of `--rounds` rounds of `--steps` steps. The
results are written to results/train_step_RECIPE_PLATFORM.json (with --forward,
results/forward_RECIPE_PLATFORM.json) or to the file of `--out`. The benchmark needs
only jax, flax, optax and numpy.
"""

import json
import re
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from benchmarks import plain_config  # noqa: F401  first, because it replaces ml_collections
from benchmarks.machine import peak_process_memory, processor
from hivit_jax import config as configs
from hivit_jax import inputs, rng, tasks
from hivit_jax.config import step_options
from hivit_jax.data.shapes import batch_shapes
from hivit_jax.data.sources.base import DatasetInfo
from hivit_jax.distributed.sharding import (
    BATCH,
    make_mesh,
    on_mesh,
    shardings_of,
    state_shardings,
    with_shardings,
)
from hivit_jax.errors import HivitError, Parser, run_command
from hivit_jax.training import step as steps
from hivit_jax.training.schedule import make_schedule
from hivit_jax.tree import split_params
from hivit_jax.xla.chips import peak_flops
from hivit_jax.xla.compile import compile_step, keep_freed_memory

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SEED = 0


class Training:
    """Train state and batch on the devices, and the compiled step."""

    def __init__(self, config: Any):
        mesh = make_mesh(
            config.mesh, config.batch_size, config.optimizer.accumulate_steps
        )
        self.task = task_of(config)
        step_counts = inputs.count_steps(config, self.task.data.counts["train"])
        schedule = make_schedule(config.optimizer, config.batch_size, *step_counts)
        training = steps.prepare(self.task, mesh, schedule, **step_options(config))
        shardings = shardings_of(training.state)
        self.state = jax.jit(training.init, out_shardings=shardings)()
        self.batch = synthetic_batch(training.batches[0], config)
        jax.block_until_ready((self.state, self.batch))
        began, cpu_began = time.perf_counter(), time.process_time()
        self.step = compile_step(training)
        self.compile_seconds = time.perf_counter() - began
        self.compile_cpu_seconds = time.process_time() - cpu_began
        self.steps_done = 0

    def run(self, count: int) -> float:
        """Run steps, wait until they have finished, and return the last loss."""
        for _ in range(count):
            self.state, metrics = self.step(
                self.state, {}, self.batch, np.int32(self.steps_done)
            )
            self.steps_done += 1
        return float(jax.block_until_ready((self.state, metrics))[1]["loss"])


class Evaluation:
    """Variables and batch on the devices, and the compiled evaluation step."""

    def __init__(self, config: Any):
        mesh = make_mesh(config.mesh, config.batch_size)
        self.task = task_of(config)
        graphdef = split_params(nnx.eval_shape(self.task.build_model))[0]

        def init():
            _, params, model_state = split_params(self.task.build_model())
            return {"params": params, "model_state": model_state}

        def step(variables, batch):
            model = nnx.merge(graphdef, *variables.values())
            keys = rng.step_keys(config.seed, "eval", jnp.uint32(0), config.batch_size)
            return self.task.eval_step(model, {}, batch, keys)[0]

        shardings = state_shardings(mesh, jax.eval_shape(init))
        self.state = jax.jit(init, out_shardings=shardings)()
        shapes = batch_shapes(self.task.transform(train=False))[0]
        batch_sharding = dict.fromkeys(shapes, NamedSharding(mesh, BATCH))
        self.batch = synthetic_batch(with_shardings(shapes, batch_sharding), config)
        jax.block_until_ready((self.state, self.batch))
        self.step = on_mesh(mesh, jax.jit(step))
        began, cpu_began = time.perf_counter(), time.process_time()
        self.run(1)  # compiles; the seconds include this run
        self.compile_seconds = time.perf_counter() - began
        self.compile_cpu_seconds = time.process_time() - cpu_began

    def run(self, count: int) -> float:
        """Evaluate the batch `count` times, wait for the results, return the loss."""
        for _ in range(count):
            sums = self.step(self.state, self.batch)
        return float(sums["loss"]) / len(self.batch["weight"])


def task_of(config: Any) -> tasks.Task:
    """Return the task of a recipe for ImageNet or synthetic images; read no files."""
    encoded = config.data.name != "synthetic"
    counts = {"train": 1_281_167, "test": 50_000}
    return tasks.create(config, DatasetInfo(counts, encoded=encoded))


def synthetic_batch(shapes: dict[str, jax.ShapeDtypeStruct], config: Any) -> dict:
    """Return a batch of noise with weights 1 and boxes that cover the whole canvas.

    Args:
      shapes: shape, dtype and sharding of every array.
    """
    generator = np.random.default_rng(SEED)
    num_classes = config.model.get("num_classes") or 1
    values = {
        "image": generator.integers(0, 256, shapes["image"].shape),
        "label": generator.integers(0, num_classes, shapes["label"].shape),
        "weight": 1,
        "unreadable": 0,
        "index": 0,
        # The same start, length and number of real pixels for rows and columns
        "box": np.array([0, config.data.canvas, config.data.canvas]),
    }
    return {
        name: jax.device_put(
            np.broadcast_to(values[name], shape.shape).astype(shape.dtype),
            shape.sharding,
        )
        for name, shape in shapes.items()
    }


def peak_memory() -> int:
    """Return the peak memory in bytes of the first device; on a CPU, of the process."""
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return peak or peak_process_memory()


def flops_per_image(task: tasks.Task, forward: bool) -> int:
    """Return the FLOPs per image of the train step, or of the forward pass.

    Counts matrix products, but neither recomputation nor resizing; see
    `Task.training_flops`.
    """
    model = nnx.eval_shape(task.build_model)
    return 2 * task.macs(model) if forward else task.training_flops(model)


def measure(
    config: Any, rounds: int, steps_per_round: int, forward: bool = False
) -> dict[str, Any]:
    """Measure the train step of a recipe, or its evaluation step. Return JSON values.

    The model FLOP utilization is the throughput times `flops_per_image`, divided by the
    bfloat16 peak, or None if the peak is unknown. `seconds_of_rounds` contains the
    seconds per step of each round. `cpu_seconds_per_step` is None unless the devices
    are CPUs.

    Raises:
      HivitError: a loss is not finite.
    """
    devices = jax.devices()
    program = Evaluation(config) if forward else Training(config)
    losses = [program.run(2)]  # warmup steps
    seconds, cpu_seconds = [], []
    for _ in range(rounds):
        began, cpu_began = time.perf_counter(), time.process_time()
        losses.append(program.run(steps_per_round))
        seconds.append((time.perf_counter() - began) / steps_per_round)
        cpu_seconds.append((time.process_time() - cpu_began) / steps_per_round)
    if not np.isfinite(losses).all():
        raise HivitError(f"losses: expected finite numbers, found {losses}")
    median = statistics.median(seconds)
    throughput = config.batch_size / median
    flops = flops_per_image(program.task, forward)
    peak = peak_flops(devices[0].device_kind)
    return {
        "model": config.model.name,
        "forward_only": forward,
        "dtype": config.model.dtype or "float32",
        "image_size": config.model.image_size,
        "batch_size": config.batch_size,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "cpu": processor(),
        "images_per_second": throughput,
        "seconds_per_step": median,
        "seconds_of_rounds": seconds,
        "cpu_seconds_per_step": (
            statistics.median(cpu_seconds) if devices[0].platform == "cpu" else None
        ),
        "model_flops_per_image": flops,
        "model_flop_utilization": (peak and throughput * flops / (peak * len(devices))),
        "peak_memory_bytes": peak_memory(),
        "compile_seconds": program.compile_seconds,
        "compile_cpu_seconds": program.compile_cpu_seconds,
        "rounds": rounds,
        "steps_of_a_round": steps_per_round,
        "loss": losses[-1],
        "versions": {
            name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")
        },
    }


def summary(result: dict[str, Any]) -> str:
    """Format speed, memory and compile time as two lines of text."""
    lines = [
        f"{result['model']}, {result['dtype']}, batch {result['batch_size']} on "
        f"{result['devices']} x {result['device']}: {result['images_per_second']:,.1f} "
        f"images/s, {result['seconds_per_step'] * 1e3:,.1f} ms per step",
        f"peak memory {result['peak_memory_bytes'] / 2**30:.2f} GiB, compiled in "
        f"{result['compile_seconds']:.1f} s",
    ]
    if result["cpu_seconds_per_step"] is not None:
        lines[0] += f", {result['cpu_seconds_per_step']:.3f} CPU-seconds"
    if result["model_flop_utilization"] is not None:
        lines[0] += f", {result['model_flop_utilization']:.1%} of the peak"
    return "\n".join(lines)


def run(argv: list[str] | None) -> None:
    """Parse flags, measure, print a summary and write the results."""
    parser = Parser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--config", default="mae_base", help="name or file of a recipe")
    add("--batch", type=int, help="images per step; default: batch_size of the recipe")
    add("--forward", action="store_true", help="run only the forward pass")
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=20, help="steps per round")
    text = "config keys to override"
    add("--set", nargs="+", default=[], action="extend", metavar="KEY=VALUE", help=text)
    add("--out", type=Path, help="the JSON file to write")
    args = parser.parse_args(argv)
    overrides = args.set + ([f"batch_size={args.batch}"] if args.batch else [])
    config = configs.load(args.config, [f"--config.{item}" for item in overrides])
    # With the cache, the compile time would be the time to read a cached program.
    jax.config.update("jax_enable_compilation_cache", False)
    if jax.default_backend() == "cpu":
        keep_freed_memory()  # as training does
    result = measure(config, args.rounds, args.steps, args.forward)
    print(summary(result))
    recipe = re.sub(r"\W", "_", Path(args.config).stem)
    name = f"{'forward' if args.forward else 'train_step'}_{recipe}"
    out = args.out or RESULTS / f"{name}_{jax.default_backend()}.json"
    out.write_text(json.dumps(result | {"set": args.set}, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Entry point. Return the exit code."""
    return run_command(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
