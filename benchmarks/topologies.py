"""Compile pretraining for TPU slices and a GPU node, without the hardware.

    python -m benchmarks.topologies [--workdir runs/topologies]

The table contains one row per model size and topology: memory, the largest batch that
fits, FLOPs, HBM traffic, collective bytes, and the bound on images per second. Four
rows for v5e:2x4 compare memory and compile time with and without remat and scan_blocks.
The first of these rows also shows that the collective bytes per step and device are
equal on 8, 64 and 256 chips.

The benchmark writes results/topologies.json and prints the table. It compiles about a
hundred programs, each in one to four minutes on two cores. An interrupted benchmark
resumes. Chips whose compiler is not installed are skipped.
"""

import argparse
import json
from pathlib import Path

from hivit_jax import config as configs
from hivit_jax.errors import ConfigError, run_command
from hivit_jax.tools.compile_ahead import compile_ahead, largest_batch
from hivit_jax.xla.chips import GIB, devices_of

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "topologies.json"
TOPOLOGIES = ("h100:8", "v5e:16x16", "v6e:16x16", "v5p:4x4x4")
SIZES = ("base", "tiny", "small", "large")
VARIANTS = {
    "default": {},
    "remat": {"model.remat": True},
    "scan_blocks": {"model.scan_blocks": True},
    "both": {"model.remat": True, "model.scan_blocks": True},
}
HEADER = (
    "| | fits | images per device | largest batch per device | GiB per device "
    "| of which temporaries | GFLOP per image | HBM MB per image "
    "| collective MB per step | bound: images/s per chip | CPU-seconds to compile |"
)


def prepare(
    size: str, topology: str, overrides: dict[str, object], workdir: Path
) -> tuple:
    """Return the config of a recipe with overrides, and the directory of results."""
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    config = configs.load(f"mae_{size}", flags)
    words = [size, f"topology={topology}"]
    words += [f"{key.split('.')[-1]}={value}" for key, value in overrides.items()]
    return config, workdir / "_".join(words).replace(":", "_")


def report_for(size: str, topology: str, workdir: Path, **overrides: object) -> dict:
    """Return the compile report of a recipe; compile unless the workdir has one."""
    config, directory = prepare(size, topology, overrides, workdir)
    if not (directory / "compile.json").exists():
        print(f"--- {directory}", flush=True)
        compile_ahead(config, directory, topology)
    return json.loads((directory / "compile.json").read_text())


def search_batch(size: str, topology: str, workdir: Path, **overrides: object) -> dict:
    """Return the largest batch of a recipe; search unless the workdir has a result."""
    config, directory = prepare(size, topology, overrides, workdir)
    path = directory / "largest_batch.json"
    if not path.exists():
        print(f"--- {path}", flush=True)
        report = report_for(size, topology, workdir, **overrides)
        path.write_text(json.dumps(largest_batch(config, devices_of(topology), report)))
    return json.loads(path.read_text())


def table_row(name: str, report: dict) -> str:
    """Format a report as a row of the table."""
    memory = report["hbm_bytes_per_device"]
    largest = report.get("largest_batch_per_device") or ""
    start = (
        f"| {name} | {'yes' if report['fits'] else 'no'} "
        f"| {report['batch_per_device']} | {largest} | {memory['total'] / GIB:.2f} |"
    )
    if not report["fits"]:
        return start + 6 * " |"
    roofline, collectives = report["roofline"], report["collectives"]
    collective_mb = sum(op["bytes_per_step"] for op in collectives) / 1e6
    hbm_mb = report["hbm_bytes_per_image"] / 1e6
    return (
        f"{start} {memory['temporaries'] / GIB:.2f} "
        f"| {report['flops_per_image'] / 1e9:.1f} | {hbm_mb:,.0f} "
        f"| {collective_mb:,.1f} "
        f"| {roofline['images_per_second_per_chip']:,.0f}, {roofline['limited_by']} "
        f"| {report['compile_cpu_seconds']:.0f} |"
    )


def compile_all(workdir: Path) -> None:
    """Compile all programs, write the results after each of them, print the table."""
    cases = [
        (f"{size} {topology}", size, topology, {})
        for size in SIZES
        for topology in TOPOLOGIES
    ]
    small_slice = "v5e:2x4"
    variants = [
        (
            f"base {small_slice}, {name}",
            "base",
            small_slice,
            {"batch_size": 512} | overrides,
        )
        for name, overrides in VARIANTS.items()
    ]
    results: dict[str, dict] = {}
    for compute, rows in ((report_for, cases + variants), (search_batch, cases)):
        for name, size, topology, overrides in rows:
            try:
                result = compute(size, topology, workdir, **overrides)
            except ConfigError as error:
                print(f"{name} skipped: {error}")
                continue
            results[name] = results.get(name, {}) | result
            RESULT.write_text(json.dumps(results, indent=1) + "\n")
    print(HEADER + "\n|" + 11 * "---|")
    print("\n".join(table_row(name, report) for name, report in results.items()))


def main() -> int:
    """Entry point. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/topologies"))
    workdir = parser.parse_args().workdir
    return run_command(lambda: compile_all(workdir))


if __name__ == "__main__":
    raise SystemExit(main())
