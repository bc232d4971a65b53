"""Count the cycles that the TPU compiler schedules for a recipe's residual blocks.

    python -m benchmarks.tpu_cycles [--config mae_base] [--images 64]

The benchmark runs on a CPU and requires libtpu. A TPU core issues one bundle of
instructions per cycle, in an order that the compiler fixes. The benchmark compiles the
forward and backward pass of each kind of block for a v5e. The table contains these
numbers of cycles for one block and all images of a chip:

- forward, backward: bundles that the fused kernels issue. The kernels take this number
  of cycles if they wait neither for memory nor for the results of matrix products.
- products only: the cycles of the kernels' matrix products, if these products keep all
  matrix units busy.
- plain: the compiler's own estimate for the block without fused kernels, including
  waiting.

The results are written to results/tpu_cycles.json, or tpu_cycles_NAME.json for another
recipe.
"""

import argparse
import json
import os
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.train_step import task_of
from hivit_jax import config as configs
from hivit_jax.errors import run_command
from hivit_jax.models.masking import count_visible_units
from hivit_jax.tree import split
from hivit_jax.xla.chips import CHIPS, devices_of
from hivit_jax.xla.cost import matmul_flops

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CLOCK = 1.5e9  # Hz, v5e: 197 TFLOP/s with four matrix units of 128 x 128
DUMP = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true"
DUMP += " --xla_jf_dump_llo_pass_label_regex=final_bundles"
# Patterns for lines of the compiler's listing:
# - a bundle, with one ">" for each loop around it;
# - a forward branch that can skip a region, which ends at a bundle with the label PF;
# - the comparison at the end of a loop, which contains the number of iterations.
BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(\w\w)?\s*: *([> ]*)\{")
SKIP = re.compile(r"sbr\.rel \(%\w+\) target")
LOOP_END = re.compile(r"scmp\.ge\.s32\.totalorder %\w+, (\d+) /\* loop exit test")


def count_bundles(listing: str) -> int:
    """Return the number of bundles that a kernel issues.

    A kernel has one loop over its grid, and may have an inner loop. The grid loop has
    two more iterations than the grid, because tiles are fetched one iteration ahead
    and stored one iteration later. The two extra iterations are not counted, because
    they skip the region that computes. Regions nested in this region, such as the
    initialization of sums, run only once.
    """
    iterations, open_regions, counts = {}, 0, Counter()
    for line in listing.splitlines():
        if match := BUNDLE.match(line):
            open_regions -= match[1] == "PF"
            depth = match[2].count(">")
            runs_once = open_regions > 1
            counts[depth, runs_once] += 1
            open_regions += bool(SKIP.search(line))
            if end := LOOP_END.search(line):
                iterations[depth] = int(end[1])
    grid = iterations[1] - 2
    repeats = {0: 1, 1: grid, 2: grid * iterations.get(2, 1)}
    return sum(n * (1 if once else repeats[d]) for (d, once), n in counts.items())


def blocks(config: Any, num_images: int) -> dict[str, tuple[int, nnx.Module, tuple]]:
    """Return {kind: (number of blocks, one abstract block, shape of its input)}."""
    model = nnx.eval_shape(task_of(config).build_model)
    encoder, decoder = model.encoder, getattr(model, "decoder_blocks", None)
    num_units = num_visible = encoder.absolute_pos_embed.shape[0]
    if decoder:
        num_visible = count_visible_units(num_units, config.mask_ratio)
    num_cells = model.config.inner_patches**2
    stages = {}
    for stage_index, stage in enumerate(encoder.stages[:-1], 1):
        stages[f"stem {stage_index}"] = stage, (num_images * num_visible * num_cells,)
        num_cells //= 4  # the merge after the stage joins 2x2 cells
    stages["main stage"] = encoder.stages[-1], (num_images, num_visible)
    if decoder:
        stages["decoder"] = decoder, (num_images, num_units)
    return {
        kind: (len(stage), stage[0], (*rows, stage[0].mlp.fc1.in_features))
        for kind, (stage, rows) in stages.items()
    }


def compile_block(
    block: nnx.Module, shape: tuple, kernels: str, device: jax.Device
) -> tuple[str, int]:
    """Compile the forward and backward pass of a block.

    Returns:
      The text of the program, and the FLOPs of its matrix products.
    """
    mesh = Mesh(np.array([device]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec())
    graphdef, params = split(block)

    def forward_and_backward(params, x, cotangent):
        def forward(params, x):
            return nnx.merge(graphdef, params)(x, kernels=kernels)

        y, backward = jax.vjp(forward, params, x)
        return y, backward(cotangent)

    x = jax.ShapeDtypeStruct(shape, "bfloat16")
    inputs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        (params, x, x),
    )
    with jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(forward_and_backward)(*inputs).jaxpr
        program = jax.jit(forward_and_backward).lower(*inputs).compile()
        return program.as_text(), matmul_flops(jaxpr, count_iterations=True)


def measure(config: Any, num_images: int, dump: Path) -> dict[str, Any]:
    """Return the cycles of every kind of block of a recipe, as JSON values.

    Args:
      num_images: images per chip.
      dump: directory into which the compiler writes its listings.
    """
    device, peak = devices_of("v5e:2x4")[0], CHIPS["v5e"].flops
    results = {}
    for kind, (count, block, shape) in blocks(config, num_images).items():
        plain_program, _ = compile_block(block, shape, "plain", device)
        before = set(dump.iterdir())
        _, flops = compile_block(block, shape, "auto", device)
        counts = Counter()
        for path in set(dump.glob("*-01-final_bundles.txt")) - before:
            if name := re.search("(attention|mlp)_block(_gradient)?", path.name):
                counts[name[0]] += count_bundles(path.read_text())
        estimates = re.findall(r'"estimated_cycles":"(\d+)"', plain_program)
        results[kind] = {
            "blocks": count,
            "bundles": dict(counts),
            "products": flops * CLOCK / peak,
            "plain": sum(map(int, estimates)),
        }
    return results


def table(results: dict[str, Any], num_images: int) -> str:
    """Format a table with a row per kind of block, and a line about all blocks."""
    lines = [
        "| one block | forward | backward | products only | plain |",
        "|" + 5 * "---|",
    ]
    total = np.zeros(3)
    for kind, result in results.items():
        counts = result["bundles"]
        backward = sum(n for name, n in counts.items() if "gradient" in name)
        cycles = sum(counts.values()), result["products"], result["plain"]
        total += result["blocks"] * np.array(cycles)
        row = (cycles[0] - backward, backward, *cycles[1:])
        lines.append(f"| {kind} | " + " | ".join(f"{n:,.0f}" for n in row) + " |")
    fused, products, plain = 1e3 * total / CLOCK  # milliseconds
    lines.append(
        f"\nAll blocks, {num_images} images: {fused:.1f} ms, products only "
        f"{products:.1f} ms, plain {plain:.1f} ms; at most "
        f"{1e3 * num_images / fused:,.0f} images/s"
    )
    return "\n".join(lines)


def run() -> None:
    """Parse flags, run the benchmark, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--config", default="mae_base", help="name or file of a recipe")
    add("--images", type=int, default=64, help="images per chip")
    add("--out", type=Path, help="the JSON file to write")
    args = parser.parse_args()
    config = configs.load(args.config, [])
    with tempfile.TemporaryDirectory() as dump:
        os.environ["LIBTPU_INIT_ARGS"] = DUMP.format(dump)
        results = measure(config, args.images, Path(dump))
    result = {"images": args.images, "cycles": results}
    suffix = "" if args.config == "mae_base" else "_" + re.sub(r"\W", "_", args.config)
    out = args.out or RESULTS / f"tpu_cycles{suffix}.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(results, args.images))


def main() -> int:
    """Entry point. Return the exit code."""
    return run_command(run)


if __name__ == "__main__":
    raise SystemExit(main())
