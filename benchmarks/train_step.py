"""Images per second, memory and compile time of the train step of a recipe.

    python -m benchmarks.train_step [--config configs/mae_base.py] [--batch 256] \
        [--rounds 5] [--steps 20] [--set model.dtype=float32 data.canvas=0 ...]

Runs what training runs, on all devices there are, over and over on one batch of made-up
images that lies on them. Takes jax, flax, optax and numpy, nothing else. Times are
medians of `--rounds` blocks of `--steps` steps. Writes
results/train_step_RECIPE_PLATFORM.json, or what `--out` names.
"""

import json
import resource
import statistics
import sys
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks import plain_config  # noqa: F401  first: it may be ml_collections
from benchmarks.machine import processor
from hivit_jax import config as configs
from hivit_jax import inputs, tasks
from hivit_jax.config import step_options
from hivit_jax.data.sources.base import IMAGENET
from hivit_jax.distributed.sharding import make_mesh, shardings_of
from hivit_jax.errors import HivitError, Parser, exit_code
from hivit_jax.training import step as steps
from hivit_jax.training.schedule import make_schedule
from hivit_jax.xla.chips import chip_of
from hivit_jax.xla.compile import compile_step, keep_memory

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SEED = 0


class Training:
    """A train state on the devices, a batch, and the compiled step.

    Args:
      config: a recipe.
    """

    def __init__(self, config: Any):
        self.config = config
        mesh = make_mesh(
            config.mesh, config.batch_size, config.optimizer.accumulate_steps
        )
        self.task = task_of(config)
        counts = inputs.count_steps(config, self.task.data.counts["train"])
        schedule = make_schedule(config.optimizer, config.batch_size, *counts)
        training = steps.prepare(self.task, mesh, schedule, **step_options(config))
        shardings = shardings_of(training.state)
        self.state = jax.jit(training.init, out_shardings=shardings)()
        self.batch = made_up(training.batches[0], config)
        jax.block_until_ready((self.state, self.batch))
        began, busy = time.perf_counter(), time.process_time()
        self.step = compile_step(training)
        self.compile_seconds = time.perf_counter() - began
        self.compile_cpu_seconds = time.process_time() - busy
        self.done = 0

    def run(self, count: int) -> float:
        """Steps, all of them finished; returns the loss of the last."""
        for _ in range(count):
            self.state, values = self.step(
                self.state, {}, self.batch, np.int32(self.done)
            )
            self.done += 1
        return float(jax.block_until_ready((self.state, values))[1]["loss"])


def task_of(config: Any) -> tasks.Task:
    """The task of a recipe for ImageNet, which is not opened, or for made-up images."""
    encoded = config.data.name != "synthetic"
    return tasks.create(config, replace(IMAGENET, encoded=encoded))


def made_up(shapes: dict[str, jax.ShapeDtypeStruct], config: Any) -> dict:
    """A batch of noise, weights 1, where the shapes say; boxes hold all of an image."""
    rng = np.random.default_rng(SEED)
    classes = config.model.get("num_classes") or 1
    values = {
        "image": rng.integers(0, 256, shapes["image"].shape),
        "label": rng.integers(0, classes, shapes["label"].shape),
        "weight": 1,
        "unreadable": 0,
        "index": 0,
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
    """Bytes: the most that was in use on the first device; on a CPU, of the process."""
    found = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    # Linux tells kilobytes.
    return found or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(config: Any, rounds: int, count: int) -> dict[str, Any]:
    """What a recipe's train step takes, as JSON values.

    Utilisation is that of the model: three times the matrix products of a forward pass
    (once for a linear probe), recomputation and resizing not counted, over the peak of
    bfloat16; None where that is not known. So are CPU-seconds where the devices are not
    the CPU.

    Raises:
      HivitError: a loss that is not finite.
    """
    devices = jax.devices()
    training = Training(config)
    losses = [training.run(2)]  # warms up
    seconds, busy = [], []
    for _ in range(rounds):
        began, cpu = time.perf_counter(), time.process_time()
        losses.append(training.run(count))
        seconds.append((time.perf_counter() - began) / count)
        busy.append((time.process_time() - cpu) / count)
    if not np.isfinite(losses).all():
        raise HivitError(f"losses {losses}; expected finite numbers")
    median = statistics.median(seconds)
    rate = config.batch_size / median
    task = training.task
    model = nnx.eval_shape(task.build_model)
    # Two operations each; twice as many again for the gradient, where there is one.
    flops = (2 if config.task == "linear_probe" else 6) * task.macs(model)
    chip = chip_of(devices[0].device_kind)
    return {
        "model": config.model.name,
        "dtype": config.model.dtype or "float32",
        "image_size": config.model.image_size,
        "batch_size": config.batch_size,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "cpu": processor(),
        "images_per_second": rate,
        "seconds_per_step": median,
        "seconds_of_rounds": seconds,
        "cpu_seconds_per_step": (
            statistics.median(busy) if devices[0].platform == "cpu" else None
        ),
        "model_flops_per_image": flops,
        "model_flop_utilisation": (chip and rate * flops / (chip.flops * len(devices))),
        "peak_memory_bytes": peak_memory(),
        "compile_seconds": training.compile_seconds,
        "compile_cpu_seconds": training.compile_cpu_seconds,
        "rounds": rounds,
        "steps_of_a_round": count,
        "loss": losses[-1],
        "versions": {
            name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")
        },
    }


def summary(found: dict[str, Any]) -> str:
    """The figures as two lines of text."""
    lines = [
        f"{found['model']}, {found['dtype']}, batch {found['batch_size']} on "
        f"{found['devices']} x {found['device']}: {found['images_per_second']:,.1f} "
        f"images/s, {found['seconds_per_step'] * 1e3:,.1f} ms a step",
        f"peak memory {found['peak_memory_bytes'] / 2**30:.2f} GiB, compiled in "
        f"{found['compile_seconds']:.1f} s",
    ]
    if found["cpu_seconds_per_step"] is not None:
        lines[0] += f", {found['cpu_seconds_per_step']:.3f} CPU-seconds"
    if found["model_flop_utilisation"] is not None:
        lines[0] += f", {found['model_flop_utilisation']:.1%} of the peak"
    return "\n".join(lines)


def run(argv: list[str] | None) -> None:
    """The command line."""
    parser = Parser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--config", default=str(ROOT / "configs" / "mae_base.py"))
    add("--batch", type=int, help="images a step; default: the recipe's")
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=20, help="of a round")
    add("--set", nargs="+", default=[], action="extend", metavar="KEY=VALUE")
    add("--out", type=Path, help="the JSON file to write")
    args = parser.parse_args(argv)
    values = args.set + ([f"batch_size={args.batch}"] if args.batch else [])
    config = configs.load(args.config, [f"--config.{value}" for value in values])
    jax.config.update("jax_enable_compilation_cache", False)  # it is to be timed
    if jax.default_backend() == "cpu":
        keep_memory()  # as training does
    found = measure(config, args.rounds, args.steps)
    print(summary(found))
    name = f"train_step_{Path(args.config).stem}_{jax.default_backend()}.json"
    out = args.out or RESULTS / name
    out.write_text(json.dumps(found | {"set": args.set}, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Measures and writes; returns the exit code."""
    return exit_code(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
