"""Where the bytes and operations of pretraining go, read out of compiled programs.

    python -m benchmarks.compiled [--workdir runs/compiled] [--chip v5e:2x4 ...]
        [--set KEY=VALUE ...] [--variant NAME:KEY=VALUE,KEY=VALUE ...]

Compiles the step of mae_base for a slice of TPUs and a node of GPUs that are not at
hand, images arriving as 224x224 uint8; with --set otherwise, and once more for each
variant. Prints for every region of the program, forward and backward together, the
bytes of HBM and their share, the operations of matrix products, and the least time that
the chip's peaks allow for the one or the other. Writes results/compiled.json. Goes on
where it stopped (give another --workdir after changing the program); leaves out chips
whose compiler is not installed.

There are two totals of bytes. Those of the regions are read out of the program
(`bytes_by_region`): HBM alone, and all operands and results of custom calls. The TPU
compiler's own counts arrays in VMEM like those in HBM, and custom calls only as their
`cost_estimate` says; so it is larger, and neither is made to match the other. On GPUs,
where the compiler tells nothing, both are the first. Both have the padding of tiles.
"""

import argparse
import json
import re
from pathlib import Path

from hivit_jax import config as configs
from hivit_jax.errors import ConfigError, exit_code
from hivit_jax.tools.compile_ahead import compile_ahead
from hivit_jax.xla.chips import GIB

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "compiled.json"
CHIPS = {"v5e:2x4": 512, "h100:8": 2048}  # images a step: 64 and 256 a chip
ORDER = (
    *("input", "embedding", "stem1", "stem2", "merge", "main attention", "main mlp"),
    *("main", "latent", "decoder attention", "decoder mlp", "decoder", "loss"),
    *("optimizer", "exchange", "other"),
)


def examined(chip: str, settings: list[str], workdir: Path) -> dict:
    """The report on a chip with settings KEY=VALUE, compiled if there is none."""
    settings = [f"batch_size={CHIPS[chip]}", "data.canvas=0", *settings]
    directory = workdir / re.sub("[^A-Za-z0-9.=()-]+", "_", "_".join([chip, *settings]))
    if not (directory / "compile.json").exists():
        print(f"--- {directory}", flush=True)
        flags = [f"--config.{each}" for each in settings]
        config = configs.load(str(ROOT / "configs" / "mae_base.py"), flags)
        compile_ahead(config, directory, chip)
    return json.loads((directory / "compile.json").read_text())


def table(report: dict) -> str:
    """A row for each region, one for all of them, and a line on the whole program."""
    peaks, rows = report["roofline"]["peaks"], []
    for name in sorted(report["regions"], key=ORDER.index):
        moved, flops = report["regions"][name].values()
        bound = max(moved / peaks["bandwidth"], flops / peaks["flops"])
        rows.append((name, moved, flops, bound))
    _, moved, flops, seconds = zip(*rows, strict=True)
    rows.append(("all", sum(moved), sum(flops), sum(seconds)))
    lines = [
        "| | MB an image | % | GFLOP an image | us an image |\n" + "|---" * 5 + "|"
    ]
    lines += [
        f"| {name} | {size / 1e6:.1f} | {100 * size / sum(moved):.1f} "
        f"| {operations / 1e9:.2f} | {1e6 * bound:.1f} |"
        for name, size, operations, bound in rows
    ]
    temporaries = report["hbm_bytes_per_device"]["temporaries"] / GIB
    lines.append(
        f"\n{report['batch_per_device']} images a chip, {temporaries:.2f} GiB of "
        f"temporaries, at most {1 / sum(seconds):,.0f} images/s a chip"
    )
    if counted := report["bytes_accessed_per_image"]:
        lines[-1] += (
            f"; `compile.json` has {counted / 1e6:,.1f} MB and "
            f"{report['flops_per_image'] / 1e9:.1f} GFLOP an image"
        )
    return "\n".join(lines)


def compare(arguments: argparse.Namespace) -> None:
    """All compilations; each table as soon as there is one."""
    variants = {"": []}
    for text in arguments.variant:
        name, _, settings = text.partition(":")
        variants[name] = re.split(r",(?=[\w.]+=)", settings)  # a value may have commas
    found: dict[str, dict] = {}
    for chip in arguments.chip:
        for variant, settings in variants.items():
            name = f"{chip} {variant}".strip()
            try:
                report = examined(chip, [*arguments.set, *settings], arguments.workdir)
            except ConfigError as error:
                print(f"{name} left out: {error}")
                continue
            found[name] = report
            shown = table(report) if report["regions"] else "does not fit"
            print(f"\n{name}\n\n{shown}\n", flush=True)
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/compiled"))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--chip", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE"
    )
    parser.add_argument(
        "--variant", nargs="+", action="extend", default=[], metavar="NAME:KEY=VALUE"
    )
    arguments = parser.parse_args()
    return exit_code(lambda: compare(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
