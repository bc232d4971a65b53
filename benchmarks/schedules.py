"""What the TPU compiler schedules for the blocks of pretraining, counted on a CPU.

    python -m benchmarks.schedules [--images 64]

A core issues a bundle of instructions a cycle, in an order that the compiler fixes.
Every kind of block of configs/mae_base.py is compiled for a v5e, with its gradient; of
its kernels the bundles are counted that go through a chip's images, which is their
time as long as they wait neither for memory nor for products that are not done yet.
Beside it: the cycles that the kernels' products keep all matrix units busy, and, for
the same block without kernels, the compiler's own estimate for all operations. Needs
libtpu. Writes results/schedules.json.
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
from hivit_jax.errors import exit_code
from hivit_jax.models.masking import visible_units
from hivit_jax.tree import split
from hivit_jax.xla.chips import CHIPS, devices_of
from hivit_jax.xla.cost import matmul_flops

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "schedules.json"
CLOCK = 1.5e9  # cycles a second of a v5e: 197 TFLOP/s of four units of 128 x 128
DUMP = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true"
DUMP += " --xla_jf_dump_llo_pass_label_regex=final_bundles"
# In the compiler's listing: a bundle, with a > for every loop that it is in; where
# something is skipped to a mark PF further down; where a loop ends.
BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(\w\w)?\s*: *([> ]*)\{")
SKIP = re.compile(r"sbr\.rel \(%\w+\) target")
LAST = re.compile(r"scmp\.ge\.s32\.totalorder %\w+, (\d+) /\* loop exit test")


def bundles(listing: str) -> int:
    """How many a kernel issues: one loop over its grid, perhaps another in it.

    The first goes around twice more than the grid is long, as blocks are fetched before
    and put away after. What is skipped but in one round, such as what sets sums to
    zero, is in a region inside the region that these rounds skip.
    """
    rounds, regions, found = {}, 0, Counter()
    for line in listing.splitlines():
        if match := BUNDLE.match(line):
            regions -= match[1] == "PF"
            depth = match[2].count(">")
            found[depth, regions > 1] += 1
            regions += bool(SKIP.search(line))
            if end := LAST.search(line):
                rounds[depth] = int(end[1])
    grid = rounds[1] - 2
    often = {0: 1, 1: grid, 2: grid * rounds.get(2, 1)}
    return sum(n * (1 if once else often[d]) for (d, once), n in found.items())


def blocks(config: Any, images: int) -> dict[str, tuple[int, nnx.Module, tuple]]:
    """Kind -> how many, one of them without arrays, the shape of what goes in."""
    model = nnx.eval_shape(task_of(config).build_model)
    encoder, decoder = model.encoder, model.decoder_blocks
    units, cells = encoder.absolute_pos_embed.shape[0], model.config.inner_patches**2
    kept, found = visible_units(units, config.mask_ratio), {}
    for number, stage in enumerate(encoder.stages[:-1], 1):
        found[f"stem {number}"] = stage, (images * kept * cells,)
        cells //= 4
    found["main stage"] = encoder.stages[-1], (images, kept)
    found["decoder"] = decoder, (images, units)
    return {
        kind: (len(stage), stage[0], (*rows, stage[0].mlp.fc1.in_features))
        for kind, (stage, rows) in found.items()
    }


def compiled(
    block: nnx.Module, shape: tuple, kernel: str, device: jax.Device
) -> tuple[str, int]:
    """A block and all of its gradients: text of the program, operations of products."""
    mesh = Mesh(np.array([device]), ("data",))
    place = NamedSharding(mesh, PartitionSpec())
    graphdef, params = split(block)

    def run(params, x, direction):
        def forward(params, x):
            return nnx.merge(graphdef, params)(x, kernel=kernel)

        y, pull = jax.vjp(forward, params, x)
        return y, pull(direction)

    x = jax.ShapeDtypeStruct(shape, "bfloat16")
    inputs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        (params, x, x),
    )
    with jax.set_mesh(mesh):
        operations = matmul_flops(jax.make_jaxpr(run)(*inputs).jaxpr, loops=True)
        return jax.jit(run).lower(*inputs).compile().as_text(), operations


def measure(images: int, dump: Path) -> dict[str, Any]:
    """All kinds of blocks, as JSON values, in cycles."""
    config = configs.load(str(ROOT / "configs" / "mae_base.py"), [])
    device, peak = devices_of("v5e:2x4")[0], CHIPS["v5e"].flops
    found = {}
    for kind, (count, block, shape) in blocks(config, images).items():
        plain, _ = compiled(block, shape, "plain", device)
        before = set(dump.iterdir())
        _, operations = compiled(block, shape, "auto", device)
        listed = Counter()
        for path in set(dump.glob("*-01-final_bundles.txt")) - before:
            if name := re.search("(attention|mlp)_block(_gradient)?", path.name):
                listed[name[0]] += bundles(path.read_text())
        estimates = re.findall(r'"estimated_cycles":"(\d+)"', plain)
        found[kind] = {
            "blocks": count,
            "bundles": dict(listed),
            "products": operations * CLOCK / peak,
            "plain": sum(map(int, estimates)),
        }
    return found


def table(found: dict[str, Any], images: int) -> str:
    """Rows of kinds, and what all blocks of the network take."""
    lines = [
        "| one block | forward | backward | products alone | plain |",
        "|" + 5 * "---|",
    ]
    total = np.zeros(3)
    for kind, each in found.items():
        back = sum(n for name, n in each["bundles"].items() if "gradient" in name)
        cycles = sum(each["bundles"].values()), each["products"], each["plain"]
        total += each["blocks"] * np.array(cycles)
        row = (cycles[0] - back, back, *cycles[1:])
        lines.append(f"| {kind} | " + " | ".join(f"{n:,.0f}" for n in row) + " |")
    ms, products, plain = 1e3 * total / CLOCK
    lines.append(
        f"\nAll blocks, {images} images: {ms:.1f} ms, products alone {products:.1f}, "
        f"plain {plain:.1f}; at most {1e3 * images / ms:,.0f} images/s"
    )
    return "\n".join(lines)


def run() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--images", type=int, default=64, help="of a chip")
    add("--out", type=Path, default=RESULTS, help="the JSON file to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as dump:
        os.environ["LIBTPU_INIT_ARGS"] = DUMP.format(dump)
        found = measure(args.images, Path(dump))
    result = {"images": args.images, "cycles": found}
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(found, args.images))


def main() -> int:
    """Counts and writes; returns the exit code."""
    return exit_code(run)


if __name__ == "__main__":
    raise SystemExit(main())
