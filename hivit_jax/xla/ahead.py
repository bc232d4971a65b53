"""Compile a train step for chips that are not available, and report its costs."""

import math
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from hivit_jax.training.step import Training
from hivit_jax.xla.chips import CHIPS, GPU_OPTIONS, PLUGINS
from hivit_jax.xla.compile import compile_step, memory_of
from hivit_jax.xla.cost import (
    bytes_by_region,
    collectives,
    matmul_flops,
    matmul_flops_by_region,
)
from hivit_jax.xla.roofline import roofline


def compile_report(training: Training, chip_name: str) -> dict[str, Any]:
    """Compile a train step and return a report on its costs, as JSON values.

    With several buckets, the report is on the bucket whose batches have the most bytes,
    because this bucket determines whether training fits.

    - ``hbm_bytes_per_device`` is the compiler's memory analysis. If the compiler
      rejects the program as too large, the analysis contains only ``total`` and
      ``limit``, and all costs are None.
    - ``flops_per_image`` and ``bytes_accessed_per_image`` are the counts of the TPU
      compiler, which counts the body of a loop once. Both counts are therefore
      multiplied by a ratio: the operations of matrix products with every iteration
      counted, divided by these operations with each loop body counted once. The GPU
      compiler provides no counts. For GPUs the two values are the operations of the
      matrix products and the total of `bytes_by_region`.
    - ``regions`` contains the bytes of `bytes_by_region` and the operations of matrix
      products, per image, for each region of the step. ``hbm_bytes_per_image`` is the
      sum of these bytes. The sums differ from the TPU compiler's counts, because the
      compiler also counts bytes in VMEM and operations other than matrix products.
    - ``roofline`` uses ``hbm_bytes_per_image``.

    Args:
      chip_name: a key of `CHIPS`.
    """
    # Compile anew, because a program that is read from the cache contains no text.
    jax.config.update("jax_enable_compilation_cache", False)
    sizes = [
        sum(math.prod(x.shape) * x.dtype.itemsize for x in batch.values())
        for batch in training.batches
    ]
    bucket = sizes.index(max(sizes))
    start, cpu_start = time.perf_counter(), time.process_time()
    compiled, text, memory = _compile(training, bucket, chip_name)
    report = {
        "compile_seconds": round(time.perf_counter() - start, 1),
        "compile_cpu_seconds": round(time.process_time() - cpu_start, 1),
        "fits": bool(text) and memory["total"] <= memory["limit"],
        "hbm_bytes_per_device": memory,
        "flops_per_image": None,
        "bytes_accessed_per_image": None,
        "hbm_bytes_per_image": None,
        "regions": None,
        "collectives": None,
        "roofline": None,
    }
    if text:
        report |= _costs(training, bucket, compiled, text, chip_name)
    return report


def _compile(
    training: Training, bucket: int, chip_name: str
) -> tuple[jax.stages.Compiled | None, str, dict[str, int | None]]:
    """Return the compiled step of a bucket, its HLO text, and {kind: bytes of memory}.

    If the compiler rejects the step as too large, returns (None, "", memory).
    """
    limit = CHIPS[chip_name].memory // CHIPS[chip_name].devices
    try:
        with tempfile.TemporaryDirectory() as dump:
            # Read the compiler's own dump, because JAX cannot parse all HLO of libtpu.
            options = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
            options |= GPU_OPTIONS if PLUGINS[chip_name] != "libtpu" else {}
            compiled = compile_step(training, bucket, options)
            [text] = Path(dump).glob("*after_optimizations.txt")
            memory = memory_of(compiled) | {"limit": limit}
            return compiled, text.read_text(), memory
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        memory = {"total": None, "limit": limit}
        if needed := re.search(r"\(([\d.]+)([KMGT])\) exceeds", str(error)):
            unit = 2 ** (10 * " KMGT".index(needed[2]))
            memory["total"] = int(float(needed[1]) * unit)
        return None, "", memory


def _costs(
    training: Training,
    bucket: int,
    compiled: jax.stages.Compiled,
    text: str,
    chip_name: str,
) -> dict[str, Any]:
    """Return operations, bytes, collectives and the roofline of a compiled step."""
    sample_weights = training.batches[bucket]["weight"]
    mesh, batch_size = sample_weights.sharding.mesh, len(sample_weights)
    images_per_device = batch_size / mesh.size
    with jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(training.step)(*training.arguments(bucket)).jaxpr
    region_flops = matmul_flops_by_region(jaxpr, count_iterations=True)
    region_bytes = bytes_by_region(text)
    product_flops = region_flops.total()
    flops = product_flops / batch_size
    bytes_accessed = hbm_bytes = region_bytes.total() / images_per_device
    if cost := compiled.cost_analysis():
        ratio = product_flops / matmul_flops(jaxpr, count_iterations=False)
        flops = cost["flops"] * ratio / images_per_device
        bytes_accessed = cost["bytes accessed"] * ratio / images_per_device
    communication = collectives(text)
    return {
        "flops_per_image": flops,
        "bytes_accessed_per_image": bytes_accessed,
        "hbm_bytes_per_image": hbm_bytes,
        "regions": {
            region: {
                "bytes_per_image": region_bytes[region] / images_per_device,
                "flops_per_image": region_flops[region] / batch_size,
            }
            for region in sorted(region_bytes | region_flops)
        },
        "collectives": communication,
        "roofline": roofline(
            CHIPS[chip_name], images_per_device, flops, hbm_bytes, communication
        ),
    }
