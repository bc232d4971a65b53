"""What the compiler reports of a train step for chips that are not available."""

import math
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from hivit_jax.training.step import Training
from hivit_jax.xla.chips import CHIPS, GPU_OPTIONS, PLUGINS, Chip
from hivit_jax.xla.compile import compile_step
from hivit_jax.xla.cost import (
    bytes_by_region,
    collectives,
    matmul_flops,
    matmul_flops_by_region,
)
from hivit_jax.xla.roofline import roofline


def compile_report(training: Training, name: str) -> dict[str, Any]:
    """Compile a train step and return the compiler's report, as JSON values.


    Operations and bytes accessed are the TPU compiler's counts. It counts the body of a
    loop once; they are multiplied by what loops make of the matrix products. For GPUs,
    where there are no such counts, operations are those of the matrix products and
    bytes those of `bytes_by_region`.

    ``regions`` has for each part of the step the bytes that `bytes_by_region` reads out
    of the program, and the operations of its matrix products. Their sums,
    ``hbm_bytes_per_image`` the one, are not the two totals: the TPU compiler counts
    what stays in VMEM like what comes from HBM, and operations that are no matrix
    products. The roofline takes the bytes of HBM.

    ``hbm_bytes_per_device`` has but total and limit, and what follows is None, if the
    compiler says that the program does not fit.

    Args:
      name: of the chip, a key of `CHIPS`.
    """
    # Without this a cached program is read, which contains no text.
    jax.config.update("jax_enable_compilation_cache", False)
    # Of several buckets the one with the most bytes decides what fits.
    sizes = [sum(map(_bytes, batch.values())) for batch in training.batches]
    bucket = sizes.index(max(sizes))
    began, busy = time.perf_counter(), time.process_time()
    compiled, hlo, memory = _compile(training, bucket, name)
    report = {
        "compile_seconds": round(time.perf_counter() - began, 1),
        "compile_cpu_seconds": round(time.process_time() - busy, 1),
        "fits": bool(hlo) and memory["total"] <= memory["limit"],
        "hbm_bytes_per_device": memory,
        "flops_per_image": None,
        "bytes_accessed_per_image": None,
        "hbm_bytes_per_image": None,
        "regions": None,
        "collectives": None,
        "roofline": None,
    }
    return report | _costs(training, bucket, compiled, hlo, name) if hlo else report


def _compile(
    training: Training, bucket: int, name: str
) -> tuple[jax.stages.Compiled | None, str, dict[str, int | None]]:
    """The program, its text and its memory; None and "" if it does not fit."""
    chip = CHIPS[name]
    try:
        with tempfile.TemporaryDirectory() as dump:
            # The compiler's own text, because JAX cannot read all of libtpu's.
            options = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
            options |= GPU_OPTIONS if PLUGINS[name] != "libtpu" else {}
            compiled = compile_step(training, bucket, options)
            [text] = Path(dump).glob("*after_optimizations.txt")
            return compiled, text.read_text(), memory_of(compiled, chip)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        memory = {"total": None, "limit": chip.memory}
        if needed := re.search(r"\(([\d.]+)([KMGT])\) exceeds", str(error)):
            unit = 2 ** (10 * " KMGT".index(needed[2]))
            memory["total"] = int(float(needed[1]) * unit)
        return None, "", memory


def _costs(
    training: Training, bucket: int, compiled: jax.stages.Compiled, hlo: str, name: str
) -> dict[str, Any]:
    """Operations, bytes, collectives and the roofline of a compiled step."""
    batch = training.batches[bucket]["weight"]
    mesh, batch_size = batch.sharding.mesh, len(batch)
    with jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(training.step)(*training.arguments(bucket)).jaxpr
    computed, read = matmul_flops_by_region(jaxpr, loops=True), bytes_by_region(hlo)
    matmuls, once = computed.total(), matmul_flops(jaxpr, loops=False)
    images = batch_size / mesh.size
    if cost := compiled.cost_analysis():
        flops = cost["flops"] * matmuls / once / images
        moved = cost["bytes accessed"] * matmuls / once / images
    else:
        flops = matmuls / batch_size
        moved = read.total() / images
    exchanged, hbm = collectives(hlo), read.total() / images
    return {
        "flops_per_image": flops,
        "bytes_accessed_per_image": moved,
        "hbm_bytes_per_image": hbm,
        "regions": {
            region: {
                "bytes_per_image": read[region] / images,
                "flops_per_image": computed[region] / batch_size,
            }
            for region in sorted(read | computed)
        },
        "collectives": exchanged,
        "roofline": roofline(CHIPS[name], images, flops, hbm, exchanged),
    }


def _bytes(array: jax.ShapeDtypeStruct) -> int:
    return math.prod(array.shape) * array.dtype.itemsize


def memory_of(compiled: jax.stages.Compiled, chip: Chip) -> dict[str, int]:
    """Bytes on each device; outputs that take the place of arguments are aliased."""
    found = compiled.memory_analysis()
    parts = {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "program": found.generated_code_size_in_bytes,
        "aliased": found.alias_size_in_bytes,
    }
    total = sum(parts.values()) - 2 * parts["aliased"]
    return parts | {"total": total, "limit": chip.memory}
