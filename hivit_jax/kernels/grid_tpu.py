"""Grid of a TPU kernel over blocks of rows.

A core processes its blocks one after another. Meanwhile the weights stay in VMEM, and
weight gradients accumulate there.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hivit_jax.kernels.numerics import F32, Plan

VMEM_SHARE = 0.9  # fraction of VMEM that a kernel may use


def over_rows(
    kernel: Callable,
    plan: Plan,
    arrays: Sequence[jax.Array],
    weights: Sequence[jax.Array],
    sums_like: Sequence[jax.Array] = (),
    scratch: Sequence[Any] = (),
    extra_widths: Sequence[int] = (),
    *,
    branch_scale: jax.Array | None,
    flops: int,
    name: str,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Run a kernel over blocks of rows.

    Args:
      kernel: (row refs, weight refs, output refs, refs of the sums in float32, scratch
        refs, apply_branch_scale) -> None; called for each block. Its last argument is a
        function that multiplies the output y of the residual branch by `branch_scale`.
      arrays: [T, width] each; a block gets `plan.rows` rows of each.
      weights: arrays that every block gets whole; vectors become [1, n].
      sums_like: one array per sum over all rows; only shape and dtype are used.
      scratch: scratch buffers of the kernel.
      extra_widths: widths of the outputs after the first, which is like arrays[0].
      branch_scale: [B] float32, a factor for the T / B rows of each image; None: 1.
      flops: operations of all blocks, for the compiler's estimates.

    Returns:
      (outputs [T, width] in the dtype of arrays[0], sums like `sums_like`).
    """
    total, width, dtype = *arrays[0].shape, arrays[0].dtype
    structs = [jax.ShapeDtypeStruct((total, w), dtype) for w in (width, *extra_widths)]
    cores = _cores(total // plan.rows)
    steps = total // plan.rows // cores
    weights = [jnp.atleast_2d(w) for w in weights]
    shapes = [(1, s.size) if s.ndim == 1 else s.shape for s in sums_like]
    pairs = zip(shapes, sums_like, strict=True)
    sum_structs = [jax.ShapeDtypeStruct((cores, *s), like.dtype) for s, like in pairs]
    scales = [] if branch_scale is None else [branch_scale]
    ref_groups = arrays, weights, scales, structs, sum_structs, sum_structs, scratch
    in_specs = [*_row_specs(plan.rows, steps, arrays), *map(_whole_spec, weights)]
    in_specs += [pl.BlockSpec(memory_space=pltpu.SMEM)] * len(scales)
    out_specs = _row_specs(plan.rows, steps, structs)
    results = pl.pallas_call(
        _body(kernel, ref_groups, steps, total),
        grid_spec=pl.GridSpec(
            grid=(cores, steps),
            in_specs=in_specs,
            out_specs=[*out_specs, *map(_per_core_spec, sum_structs)],
            scratch_shapes=[*(pltpu.VMEM(s, F32) for s in shapes), *scratch],
        ),
        out_shape=[*structs, *sum_structs],
        compiler_params=compiler_params(plan.interpret),
        cost_estimate=_cost(flops, (*arrays, *structs), (*weights, *sums_like), cores),
        interpret=plan.interpret,
        name=name,
    )(*arrays, *weights, *scales)
    pairs = zip(results[len(structs) :], sums_like, strict=True)
    sums = tuple(x.sum(0).reshape(like.shape) for x, like in pairs)
    return tuple(results[: len(structs)]), sums


def _row_specs(block_rows, steps, arrays):
    """Return specs of arrays [T, width]; a core gets `steps` adjacent blocks."""

    def index(core, step):
        return core * steps + step, 0

    return [pl.BlockSpec((block_rows, x.shape[1]), index) for x in arrays]


def _whole_spec(x):
    """Return the spec of an array that every block reads whole."""
    return pl.BlockSpec(x.shape, lambda core, step: (0,) * x.ndim)


def _per_core_spec(x):
    """Return the spec of an array [cores, ...]; each core writes one entry."""
    rest = (0,) * (x.ndim - 1)
    return pl.BlockSpec((1, *x.shape[1:]), lambda core, step: (core, *rest))


def compiler_params(interpret: bool) -> pltpu.CompilerParams:
    """Return options of the TPU compiler: a VMEM limit and the order of the grid.

    The first axis of the grid is split over cores, and the second axis runs in order.
    """
    capacity = 0 if interpret else pltpu.get_tpu_info().vmem_capacity_bytes
    vmem = int(VMEM_SHARE * capacity) or None
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem
    )


def _cost(flops, split_arrays, whole_arrays, cores):
    """Estimate the cost for the compiler.

    Args:
      split_arrays: arrays whose rows are split over the cores.
      whole_arrays: arrays that each core moves once.
    """
    bytes_moved = sum(x.size * x.dtype.itemsize for x in split_arrays)
    bytes_moved += cores * sum(x.size * x.dtype.itemsize for x in whole_arrays)
    return pl.CostEstimate(flops, 0, bytes_moved)


def _body(
    kernel: Callable, ref_groups: Sequence[Sequence], steps: int, total: int
) -> Callable:
    """Return the function that runs the kernel of `over_rows` on one block.

    The function zeroes the sums at the first block of a core, and writes the sums at
    the last block.

    Args:
      ref_groups: one sequence per group of refs; only its length is used. The sums
        occur twice, as outputs and as buffers in which a core adds them up.
      steps: blocks of a core.
      total: rows of all blocks.
    """

    def body(*refs):
        refs = list(refs)
        parts = [[refs.pop(0) for _ in group] for group in ref_groups]
        row_refs, weight_refs, scales, out_refs, out_sums, sum_refs, scratch = parts
        step = pl.program_id(1)
        block = pl.program_id(0) * steps + step
        apply_branch_scale = partial(_apply_branch_scale, scales, block, total)

        @pl.when(step == 0)
        def _():
            for ref in sum_refs:
                ref[...] = jnp.zeros_like(ref)

        kernel(row_refs, weight_refs, out_refs, sum_refs, scratch, apply_branch_scale)

        @pl.when(step == steps - 1)
        def _():
            for out, ref in zip(out_sums, sum_refs, strict=True):
                out[0] = ref[...].astype(out.dtype)

    return body


def _apply_branch_scale(
    scales: Sequence[Any], block: jax.Array, total: int, y: jax.Array
) -> jax.Array:
    """Multiply each row of a block by the factor of the row's image, [R, C] float32.

    Args:
      scales: [ref of `branch_scale`, [B] in SMEM], or [] for factors of 1.
      block: index of the block.
      total: rows of all blocks.
    """
    y = y.astype(F32)
    if not scales:
        return y
    (ref,), rows = scales, len(y)
    images = ref.shape[0]
    image_rows = total // images
    first_image = jax.lax.div(block * rows, image_rows)  # image of the first row
    # Index of each row of the block, counted from the first row of `first_image`.
    row = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    row += block * rows - first_image * image_rows
    factors = jnp.full((rows, 1), ref[first_image])
    for i in range(1, (rows - 1) // image_rows + 2):
        factor = ref[jnp.minimum(first_image + i, images - 1)]
        factors = jnp.where(row >= i * image_rows, factor, factors)
    return y * factors


def _cores(blocks: int) -> int:
    """Return the number of cores of a device that share the blocks, 1 or 2.

    Two cores get half of the blocks each. An odd number of blocks runs on one core.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device is not None and blocks % 2 == 0 and device.num_cores) or 1
