"""The train step, compiled for TPUs or GPUs that are not available: does it fit, what
does it compute, move and exchange, how fast could it be. ``--mode compile``.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from hivit_jax import tasks
from hivit_jax.config import step_options, to_json
from hivit_jax.distributed.sharding import BATCH, make_mesh
from hivit_jax.inputs import task_of_recipe
from hivit_jax.reporting.console import log
from hivit_jax.reporting.metrics import prepare_workdir
from hivit_jax.tools.describe import resolved_schedule
from hivit_jax.training.step import Training, prepare
from hivit_jax.xla.ahead import compile_report
from hivit_jax.xla.chips import GIB, PLUGINS, devices_of


def compile_ahead(
    config: Any, workdir: str | Path, topology: str, search_batch: bool = False
) -> dict[str, Any]:
    """Compiles the config's train step for a topology, and reports on it.

    Args:
      topology: CHIP:SHAPE, such as "v5e:16x16" or "h100:8".
      search_batch: also search the largest batch that fits.

    Returns:
      The content of DIR/compile.json: `examine` and, with `search_batch`,
      `largest_batch`.

    Raises:
      HivitError: an unknown topology, a compiler that is not installed, a mesh or batch
        that does not fit the topology.
    """
    devices = devices_of(topology)
    prepare_workdir(Path(workdir))
    report = examine(config, devices, topology)
    if search_batch:
        report |= largest_batch(config, devices, report)
    path = Path(workdir) / "compile.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    temporary.replace(path)
    log(summary(report))
    log(f"written: {path}")
    return report


def examine(
    config: Any, devices: Sequence[jax.Device], topology: str
) -> dict[str, Any]:
    """Return facts about the train step of a config on these devices and the
    `compile_report`, as JSON values.
    """
    mesh = make_mesh(
        config.mesh, config.batch_size, config.optimizer.accumulate_steps, devices
    )
    shards = math.prod(mesh.shape[axis] for axis in BATCH[0])
    name = topology.partition(":")[0]
    facts = {
        "topology": topology,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "model": config.model.name,
        "config_sha256": hashlib.sha256(to_json(config).encode()).hexdigest(),
        "batch_size": config.batch_size,
        "batch_per_device": config.batch_size // shards,
        "versions": {each: metadata.version(each) for each in ("jax", PLUGINS[name])},
    }
    return facts | compile_report(train_step(config, mesh), name)


def train_step(config: Any, mesh: Mesh) -> Training:
    """The step that `train.train` compiles."""
    schedule = resolved_schedule(config)[2]
    task = task_of_recipe(config)
    return prepare(task, mesh, schedule, **step_options(config))


def largest_batch(
    config: Any, devices: Sequence[jax.Device], report: dict[str, Any]
) -> dict[str, Any]:
    """Search the largest batch that fits, by doubling and bisection.

    Stops where the smallest batch that does not fit is within an eighth, or is the next
    size that divides.

    Args:
      report: of `examine`, for the config's own batch.
    """
    config = config.copy_and_resolve_references()
    size, fits = report["batch_per_device"], report["fits"]
    shards, tried = report["batch_size"] // size, 0
    multiple = tasks.find(config.task).batch_multiple(config)
    unit = config.optimizer.accumulate_steps * multiple
    low, high = (size, None) if fits else (0, size)
    while high is None or high - low > max(unit, low // 8):
        size = 2 * low if high is None else (low + high) // (2 * unit) * unit
        config.batch_size = shards * size
        log(f"trying {size} images a device ...")
        fits = examine(config, devices, report["topology"])["fits"]
        tried += 1
        low, high = (size, high) if fits else (low, size)
    return {
        "largest_batch_per_device": low,
        "smallest_that_does_not_fit": high,
        "compiles_of_the_search": tried,
    }


def summary(report: dict[str, Any]) -> str:
    """The report as a few lines of text."""
    memory, cost = report["hbm_bytes_per_device"], report["roofline"]
    total = "more" if memory["total"] is None else f"{memory['total'] / GIB:.2f} GiB"
    lines = [
        f"{report['model']} on {report['topology']}: {report['devices']} devices, "
        f"{report['batch_per_device']} images each",
        f"{'fits' if report['fits'] else 'does NOT fit'}: {total} of "
        f"{memory['limit'] / GIB:.2f} GiB a device",
    ]
    if cost:
        lines[-1] += (
            f", {memory['arguments'] / GIB:.2f} of them arguments, "
            f"{memory['temporaries'] / GIB:.2f} temporaries"
        )
        lines.append(
            f"{report['flops_per_image'] / 1e9:.1f} GFLOP and "
            f"{report['hbm_bytes_per_image'] / 1e6:,.0f} MB of HBM an image"
        )
        lines += [
            f"{each['kind']}: {each['bytes_per_step'] / 1e6:,.1f} MB a step and "
            f"device, in {each['count']}"
            for each in report["collectives"]
        ]
        lines.append(
            f"at most {cost['images_per_second_per_chip']:,.0f} images/s a chip, "
            f"bound by {cost['bound']}"
        )
    if "largest_batch_per_device" in report:
        lines.append(
            f"largest batch a device: {report['largest_batch_per_device']} "
            f"({report['smallest_that_does_not_fit']} does not fit; "
            f"{report['compiles_of_the_search']} more compilations)"
        )
    return "\n".join(lines)
