"""Pretraining compiled for slices of TPUs and a node of GPUs that are not at hand.

    python -m benchmarks.topologies [--workdir runs/topologies]

What fits, what is computed, moved and exchanged, the bound on images a second; whether
what is exchanged stays the same from 8 chips to 256; what rematerialisation and scanned
blocks do to memory and compile time. Writes results/topologies.json and prints its
tables. Goes on where it stopped; leaves out chips whose compiler is not installed.
"""

import argparse
import json
from pathlib import Path

from hivit_jax import config as configs
from hivit_jax.compile_ahead import GIB, compile_ahead
from hivit_jax.errors import ConfigError, exit_code

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "topologies.json"
TOPOLOGIES = ("h100:8", "v5e:16x16", "v6e:16x16", "v5p:4x4x4")
SIZES = ("base", "tiny", "small", "large")
SEARCHED = ("base", "h100:8")  # where a compilation takes a minute, not several
WAYS = {
    "as it is": {},
    "remat": {"model.remat": True},
    "scan_blocks": {"model.scan_blocks": True},
    "both": {"model.remat": True, "model.scan_blocks": True},
}
HEADER = (
    "| | fits | GiB a device | images a device | GFLOP an image | MB of HBM an image "
    "| MB exchanged | at most images/s a chip | compiled in CPU-seconds |"
)


def examined(size: str, topology: str, workdir: Path, **overrides: object) -> dict:
    """The report on a recipe, compiled unless the workdir has it."""
    settings = {"topology": topology} | overrides
    words = [size] + [f"{key.split('.')[-1]}={v}" for key, v in settings.items()]
    directory = workdir / "_".join(words).replace(":", "_")
    if not (directory / "compile.json").exists():
        print(f"--- {directory}", flush=True)
        flags = [f"--config.{key}={value}" for key, value in settings.items()]
        config = configs.load(str(ROOT / "configs" / f"mae_{size}.py"), flags)
        compile_ahead(config, directory)
    return json.loads((directory / "compile.json").read_text())


def line(name: str, report: dict) -> str:
    """A line of a table."""
    total = report["hbm_bytes_per_device"]["total"] / GIB
    if not report["fits"]:
        return (
            f"| {name} | no | {total:.2f} | {report['batch_per_device']} |" + 5 * " |"
        )
    bound, exchanged = report["roofline"], report["collectives"]
    sent = sum(each["bytes_per_step"] for each in exchanged) / 1e6
    moved = report["hbm_bytes_per_image"] / 1e6
    return (
        f"| {name} | yes | {total:.2f} | {report['batch_per_device']} "
        f"| {report['flops_per_image'] / 1e9:.1f} | {moved:,.0f} | {sent:,.1f} "
        f"| {bound['images_per_second_per_chip']:,.0f}, {bound['bound']} "
        f"| {report['compile_cpu_seconds']:.0f} |"
    )


def compare(workdir: Path) -> None:
    """All compilations, the tables after each."""
    found: dict[str, dict] = {}
    cases = {f"{size} {where}": (size, where) for size in SIZES for where in TOPOLOGIES}
    ways = {f"base v5e:2x4, {way}": overrides for way, overrides in WAYS.items()}
    for name in [*cases, *ways]:
        try:
            if name in ways:
                options = {"batch_size": 512} | ways[name]
                found[name] = examined("base", "v5e:2x4", workdir, **options)
            else:
                found[name] = examined(*cases[name], workdir)
        except ConfigError as error:
            print(f"{name} left out: {error}")
            continue
        RESULT.write_text(json.dumps(found, indent=1) + "\n")
    found["search"] = examined(*SEARCHED, workdir, search_batch=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(HEADER + "\n|" + 9 * "---|")
    print("\n".join(line(name, report) for name, report in found.items()))
    print(f"largest batch a device: {found['search']['largest_batch_per_device']}")


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/topologies"))
    workdir = parser.parse_args().workdir
    return exit_code(lambda: compare(workdir))


if __name__ == "__main__":
    raise SystemExit(main())
