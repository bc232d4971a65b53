"""Pretraining compiled for slices of TPUs and a node of GPUs that are not at hand.

    python -m benchmarks.topologies [--workdir runs/topologies]

What fits and up to what batch, what is computed, moved and exchanged, the bound on
images a second; whether what is exchanged stays the same from 8 chips to 256; what
rematerialisation and scanned blocks do to memory and compile time. Writes
results/topologies.json and prints its table. Takes some hundred compilations, of one
to four minutes on two cores; goes on where it stopped; leaves out chips whose compiler
is not installed.
"""

import argparse
import json
from pathlib import Path

from hivit_jax import config as configs
from hivit_jax.errors import ConfigError, exit_code
from hivit_jax.tools.compile_ahead import compile_ahead, largest_batch
from hivit_jax.xla.chips import GIB, devices_of

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "topologies.json"
TOPOLOGIES = ("h100:8", "v5e:16x16", "v6e:16x16", "v5p:4x4x4")
SIZES = ("base", "tiny", "small", "large")
WAYS = {
    "as it is": {},
    "remat": {"model.remat": True},
    "scan_blocks": {"model.scan_blocks": True},
    "both": {"model.remat": True, "model.scan_blocks": True},
}
HEADER = (
    "| | fits | images a device | at most | GiB a device | of them temporaries "
    "| GFLOP an image | MB of HBM an image | MB exchanged | at most images/s a chip "
    "| compiled in CPU-seconds |"
)


def prepare(
    size: str, topology: str, settings: dict[str, object], workdir: Path
) -> tuple:
    """A recipe with its settings, and the directory of its results."""
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    config = configs.load(f"mae_{size}", flags)
    words = [size, f"topology={topology}"]
    words += [f"{key.split('.')[-1]}={v}" for key, v in settings.items()]
    return config, workdir / "_".join(words).replace(":", "_")


def examined(size: str, topology: str, workdir: Path, **settings: object) -> dict:
    """The report on a recipe, compiled unless the workdir has it."""
    config, directory = prepare(size, topology, settings, workdir)
    if not (directory / "compile.json").exists():
        print(f"--- {directory}", flush=True)
        compile_ahead(config, directory, topology)
    return json.loads((directory / "compile.json").read_text())


def searched(size: str, topology: str, workdir: Path, **settings: object) -> dict:
    """The largest batch of a recipe that was examined."""
    config, directory = prepare(size, topology, settings, workdir)
    path = directory / "largest_batch.json"
    if not path.exists():
        print(f"--- {path}", flush=True)
        report = examined(size, topology, workdir, **settings)
        found = largest_batch(config, devices_of(topology), report)
        path.write_text(json.dumps(found))
    return json.loads(path.read_text())


def line(name: str, report: dict) -> str:
    """A line of a table."""
    memory = report["hbm_bytes_per_device"]
    most = report.get("largest_batch_per_device")
    begin = (
        f"| {name} | {'yes' if report['fits'] else 'no'} "
        f"| {report['batch_per_device']} | {most or ''} | {memory['total'] / GIB:.2f} |"
    )
    if not report["fits"]:
        return begin + 6 * " |"
    bound, exchanged = report["roofline"], report["collectives"]
    sent = sum(each["bytes_per_step"] for each in exchanged) / 1e6
    moved = report["hbm_bytes_per_image"] / 1e6
    return (
        f"{begin} {memory['temporaries'] / GIB:.2f} "
        f"| {report['flops_per_image'] / 1e9:.1f} | {moved:,.0f} | {sent:,.1f} "
        f"| {bound['images_per_second_per_chip']:,.0f}, {bound['bound']} "
        f"| {report['compile_cpu_seconds']:.0f} |"
    )


def compare(workdir: Path) -> None:
    """All compilations; what was found is written after each."""
    cases = [
        (f"{size} {where}", size, where, {}) for size in SIZES for where in TOPOLOGIES
    ]
    chips, small = "v5e:2x4", {"batch_size": 512}
    ways = [(f"base {chips}, {w}", "base", chips, small | WAYS[w]) for w in WAYS]
    found: dict[str, dict] = {}
    for ask, rows in ((examined, cases + ways), (searched, cases)):
        for name, size, topology, settings in rows:
            try:
                more = ask(size, topology, workdir, **settings)
            except ConfigError as error:
                print(f"{name} left out: {error}")
                continue
            found[name] = found.get(name, {}) | more
            RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(HEADER + "\n|" + 11 * "---|")
    print("\n".join(line(name, report) for name, report in found.items()))


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/topologies"))
    workdir = parser.parse_args().workdir
    return exit_code(lambda: compare(workdir))


if __name__ == "__main__":
    raise SystemExit(main())
