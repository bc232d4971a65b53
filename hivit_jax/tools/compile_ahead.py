"""Ahead-of-time compilation of the train step for TPUs or GPUs that are not attached.

``--mode compile`` reports memory, FLOPs, HBM and network traffic, and the roofline.
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
from hivit_jax.paths import open_path
from hivit_jax.progress import counted
from hivit_jax.reporting.console import log
from hivit_jax.reporting.metrics import prepare_workdir
from hivit_jax.tools.describe import resolved_schedule
from hivit_jax.training.step import Training, prepare
from hivit_jax.xla.ahead import compile_report
from hivit_jax.xla.chips import CHIPS, GIB, PLUGINS, devices_of

REPORT = "compile.json"  # in the workdir


def compile_ahead(
    config: Any, workdir: str | Path, topology: str, search_batch: bool = False
) -> dict[str, Any]:
    """Compile the config's train step for a topology; write WORKDIR/compile.json.

    Args:
      topology: CHIP:SHAPE, such as "v5e:16x16" or "h100:8".
      search_batch: also search for the largest batch that fits.

    Returns:
      The content of compile.json: the entries of `step_report`, `run_cost` and, with
      `search_batch`, `largest_batch`.

    Raises:
      HivitError: the topology is unknown, its compiler is not installed, or the mesh
        or batch does not fit it.
    """
    devices = devices_of(topology)
    workdir = open_path(workdir)
    prepare_workdir(workdir)
    report = step_report(config, devices, topology)
    report |= run_cost(config, report)
    if search_batch:
        report |= largest_batch(config, devices, report)
    path = workdir / REPORT
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    temporary.replace(path)
    log(summary(report))
    log(f"written: {path}")
    return report


def step_report(
    config: Any, devices: Sequence[jax.Device], topology: str
) -> dict[str, Any]:
    """Return the setup of a config's train step and its `compile_report`."""
    mesh = make_mesh(
        config.mesh, config.batch_size, config.optimizer.accumulate_steps, devices
    )
    num_shards = math.prod(mesh.shape[axis] for axis in BATCH[0])
    chip = topology.partition(":")[0]
    setup = {
        "topology": topology,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "model": config.model.name,
        "config_sha256": _digest(config),
        "batch_size": config.batch_size,
        "batch_per_device": config.batch_size // num_shards,
        "versions": {p: metadata.version(p) for p in ("jax", PLUGINS[chip])},
    }
    return setup | compile_report(prepare_training(config, mesh), chip)


def run_cost(config: Any, report: dict[str, Any]) -> dict[str, Any]:
    """Return {"run": images and hours of the whole run}, as JSON values.

    Hours are given at the roofline bound and at the chip's utilization of this bound,
    without evaluation and reading of images. Both are None if the step does not fit.
    """
    chip = CHIPS[report["topology"].partition(":")[0]]
    num_chips, utilization = report["devices"] // chip.devices, chip.utilization
    num_images = resolved_schedule(config)[1] * config.batch_size
    hours, roofline = None, report["roofline"]
    if roofline:
        hours = num_images / (num_chips * roofline["images_per_second_per_chip"]) / 3600
    return {
        "run": {
            "images": num_images,
            "chips": num_chips,
            "hours_at_bound": hours,
            "utilization": utilization.of_bound,
            "utilization_basis": utilization.basis,
            "utilization_measurement": utilization.measurement,
            "hours_at_utilization": hours and hours / utilization.of_bound,
        }
    }


def earlier_summary(config: Any, workdir: str | Path) -> str:
    """Return the `summary` of WORKDIR/compile.json; "" without a readable file.

    The text ends with a note if the file belongs to another config.
    """
    path = open_path(workdir) / REPORT
    try:
        report = json.loads(path.read_text())
        text = f"{path}:\n{summary(report)}"
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    same_config = report.get("config_sha256") == _digest(config)
    return text if same_config else f"{text}\nnote: compiled with another config"


def _digest(config: Any) -> str:
    return hashlib.sha256(to_json(config).encode()).hexdigest()


def prepare_training(config: Any, mesh: Mesh) -> Training:
    """Return the train step that `train.train` compiles."""
    schedule = resolved_schedule(config)[2]
    return prepare(task_of_recipe(config), mesh, schedule, **step_options(config))


def largest_batch(
    config: Any, devices: Sequence[jax.Device], report: dict[str, Any]
) -> dict[str, Any]:
    """Search for the largest batch that fits, by doubling and bisection.

    Stops when the largest batch that fits and the smallest batch that does not fit
    differ by at most an eighth, or when no valid batch size lies between them.

    Args:
      report: `step_report` of the config's own batch size.

    Returns:
      "largest_batch_per_device": largest tried size that fits; 0: none.
      "smallest_that_does_not_fit": smallest tried size that does not fit.
      "compiles_of_the_search": number of compilations in addition to `report`.
    """
    config = config.copy_and_resolve_references()
    size, fits = report["batch_per_device"], report["fits"]
    num_shards, num_compilations = report["batch_size"] // size, 0
    multiple = tasks.find(config.task).batch_multiple(config)
    divisor = config.optimizer.accumulate_steps * multiple
    low, high = (size, None) if fits else (0, size)
    while high is None or high - low > max(divisor, low // 8):
        size = 2 * low if high is None else (low + high) // (2 * divisor) * divisor
        config.batch_size = num_shards * size
        log(f"trying {size} images per device ...")
        fits = step_report(config, devices, report["topology"])["fits"]
        num_compilations += 1
        low, high = (size, high) if fits else (low, size)
    return {
        "largest_batch_per_device": low,
        "smallest_that_does_not_fit": high,
        "compiles_of_the_search": num_compilations,
    }


def summary(report: dict[str, Any]) -> str:
    """Return the report as a few lines of text."""
    memory, roofline = report["hbm_bytes_per_device"], report["roofline"]
    total, limit = memory["total"], memory["limit"] / GIB
    needed = "more than" if total is None else f"{total / GIB:.2f} GiB of"
    lines = [
        f"{report['model']} on {report['topology']}: "
        f"{counted(report['devices'], 'device')}, "
        f"{counted(report['batch_per_device'], 'image')} per device",
        f"{'fits' if report['fits'] else 'does NOT fit'}: {needed} {limit:.2f} GiB "
        "per device",
    ]
    if roofline:
        lines[-1] += (
            f" (arguments {memory['arguments'] / GIB:.2f}, "
            f"temporaries {memory['temporaries'] / GIB:.2f})"
        )
        lines.append(
            f"{report['flops_per_image'] / 1e9:.1f} GFLOP and "
            f"{report['hbm_bytes_per_image'] / 1e6:,.0f} MB of HBM traffic per image"
        )
        lines += [
            f"{c['kind']} x {c['count']}: {c['bytes_per_step'] / 1e6:,.1f} MB per step "
            "and device"
            for c in report["collectives"]
        ]
        # Reports of earlier versions contain the key "bound" instead.
        limited_by = roofline.get("limited_by") or roofline["bound"]
        lines.append(
            f"at most {roofline['images_per_second_per_chip']:,.0f} images/s per chip, "
            f"limited by {limited_by}"
        )
    run = report.get("run", {})
    if run.get("hours_at_bound"):
        lines.append(
            f"time to train on all {run['images']:,} images of the run on "
            f"{counted(run['chips'], 'chip')}:"
        )
        # Earlier versions wrote no basis, because they assumed every utilization.
        basis = run.get("utilization_basis", "assumed")
        hours_at = {
            "at the bound, which no run reaches": run["hours_at_bound"],
            f"at {run['utilization']:.0%} of it, {basis}": run["hours_at_utilization"],
        }
        lines += [
            f"  {label:<36}{hours:12,.2f} hours{hours * run['chips']:14,.1f} chip-hours"
            for label, hours in hours_at.items()
        ]
        if measurement := run.get("utilization_measurement"):
            lines.append(f"  measured: {measurement}")
    if "largest_batch_per_device" in report:
        lines.append(
            f"largest batch per device: {report['largest_batch_per_device']} "
            f"({report['smallest_that_does_not_fit']} does not fit; "
            f"{report['compiles_of_the_search']} more compilations)"
        )
    return "\n".join(lines)
