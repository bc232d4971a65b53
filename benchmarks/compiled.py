"""Print HBM bytes and FLOPs of a train step by region, without the hardware.

    python -m benchmarks.compiled [--config mae_base] [--workdir runs/compiled]
        [--chip v5e:2x4 ...] [--set KEY=VALUE ...]
        [--variant NAME:KEY=VALUE,KEY=VALUE ...]

The benchmark compiles the train step of a recipe for TPU and GPU topologies. Bytes are
counted in the compiled program, FLOPs in the jaxpr. The input images are uint8 and have
the model's size. --set overrides config keys. For each --variant, the step is compiled
once more with the overrides of the variant.

The table contains one row per region of the program, forward and backward together: HBM
bytes, their fraction of all bytes, FLOPs of matrix products, and the shortest time that
the chip's peaks of bandwidth and FLOP/s allow. All values are per image. Regions are
the named scopes of the step; `exchange` is the collectives. The results are written to
results/compiled.json, or to the file of --out. A rerun reuses existing reports; after a
change of the code, use another --workdir. Chips whose compiler is not installed are
skipped.

The results contain two totals of bytes, both including the padding of tiles:

- `hbm_bytes_per_image` is the sum over the regions. Only arrays in HBM count. Every HBM
  operand and result of a custom call counts in full.
- `bytes_accessed_per_image` is the TPU compiler's own total, which is larger. It also
  counts arrays in VMEM, and counts custom calls by their `cost_estimate`. XLA:GPU
  reports no total, so on GPUs both totals are equal.
"""

import argparse
import json
import re
from pathlib import Path

from hivit_jax import config as configs
from hivit_jax.errors import ConfigError, run_command
from hivit_jax.tools.compile_ahead import compile_ahead
from hivit_jax.xla.chips import GIB

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "compiled.json"
# Topology -> images per step: 64 per chip on v5e, 256 on all others.
BATCH_OF_TOPOLOGY = {"v5e:2x4": 512, "h100:8": 2048, "v5p:2x2x2": 2048, "v6e:2x4": 2048}
REGIONS = (
    *("input", "embedding", "stem1", "stem2"),
    *(f"stage{i}{part}" for i in range(1, 5) for part in (" attention", " mlp", "")),
    *("merge", "main attention", "main mlp"),
    *("main", "latent", "decoder attention", "decoder mlp", "decoder", "loss"),
    *("optimizer", "exchange", "other"),
)


def report_for(recipe: str, chip: str, overrides: list[str], workdir: Path) -> dict:
    """Return the compile report of a recipe for a chip and overrides KEY=VALUE.

    The step is compiled only if the workdir contains no report for these arguments.
    """
    overrides = [f"batch_size={BATCH_OF_TOPOLOGY[chip]}", "data.canvas=0", *overrides]
    name = "_".join([*[recipe] * (recipe != "mae_base"), chip, *overrides])
    directory = workdir / re.sub("[^A-Za-z0-9.=()-]+", "_", name)
    if not (directory / "compile.json").exists():
        print(f"--- {directory}", flush=True)
        flags = [f"--config.{override}" for override in overrides]
        config = configs.load(recipe, flags)
        compile_ahead(config, directory, chip)
    return json.loads((directory / "compile.json").read_text())


def table(report: dict) -> str:
    """Format a table of the regions and their total, and a line about the program."""
    peaks, rows = report["roofline"]["peaks"], []
    for name in sorted(report["regions"], key=REGIONS.index):
        hbm_bytes, flops = report["regions"][name].values()
        seconds = max(hbm_bytes / peaks["bandwidth"], flops / peaks["flops"])
        rows.append((name, hbm_bytes, flops, seconds))
    total_bytes, total_flops, total_seconds = (
        sum(row[column] for row in rows) for column in (1, 2, 3)
    )
    rows.append(("all", total_bytes, total_flops, total_seconds))
    lines = [
        "| | MB per image | % | GFLOP per image | us per image |\n" + "|---" * 5 + "|"
    ]
    lines += [
        f"| {name} | {hbm_bytes / 1e6:.1f} | {100 * hbm_bytes / total_bytes:.1f} "
        f"| {flops / 1e9:.2f} | {1e6 * seconds:.1f} |"
        for name, hbm_bytes, flops, seconds in rows
    ]
    temporaries = report["hbm_bytes_per_device"]["temporaries"] / GIB
    lines.append(
        f"\n{report['batch_per_device']} images per chip, {temporaries:.2f} GiB of "
        f"temporaries, at most {1 / total_seconds:,.0f} images/s per chip"
    )
    if accessed := report["bytes_accessed_per_image"]:
        lines[-1] += (
            f"; totals by the compiler: {accessed / 1e6:,.1f} MB and "
            f"{report['flops_per_image'] / 1e9:.1f} GFLOP per image"
        )
    return "\n".join(lines)


def compile_all(arguments: argparse.Namespace) -> None:
    """Compile the variants for each chip; print and write each result immediately."""
    variants = {"": []}
    for variant in arguments.variant:
        name, _, overrides = variant.partition(":")
        variants[name] = re.split(r",(?=[\w.]+=)", overrides)  # a value may have commas
    reports: dict[str, dict] = {}
    for chip in arguments.chip:
        for variant, overrides in variants.items():
            name = f"{chip} {variant}".strip()
            overrides = [*arguments.set, *overrides]
            try:
                report = report_for(
                    arguments.config, chip, overrides, arguments.workdir
                )
            except ConfigError as error:
                print(f"{name} skipped: {error}")
                continue
            reports[name] = report
            text = table(report) if report["regions"] else "does not fit"
            print(f"\n{name}\n\n{text}\n", flush=True)
            arguments.out.write_text(json.dumps(reports, indent=1) + "\n")


def main() -> int:
    """Entry point. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--config", default="mae_base", help="name of a recipe")
    text = "directory of the reports; existing reports are not compiled again"
    parser.add_argument(
        "--workdir", type=Path, default=Path("runs/compiled"), help=text
    )
    parser.add_argument(
        "--out", type=Path, default=RESULT, help="the JSON file to write"
    )
    parser.add_argument(
        "--chip",
        nargs="+",
        choices=BATCH_OF_TOPOLOGY,
        default=list(BATCH_OF_TOPOLOGY)[:2],
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE"
    )
    parser.add_argument(
        "--variant", nargs="+", action="extend", default=[], metavar="NAME:KEY=VALUE"
    )
    arguments = parser.parse_args()
    return run_command(lambda: compile_all(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
