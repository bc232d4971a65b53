"""Building blocks of the kernels: static arguments, the grid over blocks of rows,
LayerNorm, GELU and matrix products.

The grid is written for TPUs. A core processes its blocks one after another. Meanwhile
the weights stay in VMEM, and weight gradients accumulate there.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

F32 = jnp.float32
ROWS = 8  # rows of a float32 tile; the rows of a block are a multiple of it
VMEM_SHARE = 0.9  # fraction of VMEM that a kernel may use
# x times this polynomial in x^2 approximates artanh(2 cdf(x) - 1). The fit minimizes
# the largest error of x cdf(x).
TANH_FIT = (
    7.97827577e-01,
    3.64699309e-02,
    -1.25476268e-04,
    -3.04671864e-05,
    1.11263109e-06,
)


@dataclass(frozen=True)
class Plan:
    """Static arguments of a fused residual branch.

    eps: epsilon of the LayerNorm.
    add: add x to the branch; False: return the branch alone.
    rows: rows of a block, the part of x that is in VMEM at a time; must divide the
      rows of x. TPU kernels only.
    keep: save intermediate arrays for the backward pass, which otherwise recomputes
      them; TPU kernels only.
    interpret: run as plain JAX operations, on any backend.
    heads, tokens: attention heads, and tokens of an image; attention only.
    """

    eps: float
    add: bool = True
    rows: int = 0
    keep: bool = False
    interpret: bool = False
    heads: int = 1
    tokens: int = 1


class Weights(NamedTuple):
    """Parameters of a residual branch: LayerNorm, then two linear layers.

    scale, bias: [C] float32.
    w1, b1, w2, b2: [C, H], [H], [H', C], [C], in x's dtype. MLP: fc1 and fc2, with
      H' = H. Attention: qkv and proj, with H = 3C and H' = C.
    """

    scale: jax.Array
    bias: jax.Array
    w1: jax.Array
    b1: jax.Array
    w2: jax.Array
    b2: jax.Array


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """Matrix product over axis contract[0] of a and axis contract[1] of b, float32.

    Float32 inputs use the highest precision, whatever JAX's default precision is.
    Products of bfloat16 have only one precision.
    """
    dims = (((contract[0],), (contract[1],)), ((), ()))
    precision = "highest" if a.dtype == F32 else "default"
    return jax.lax.dot_general(a, b, dims, precision, preferred_element_type=F32)


def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """LayerNorm of x [T, C].

    Returns:
      x_hat: normalized rows before scale and bias, [T, C] float32.
      inverse: inverse standard deviation of each row, [T, 1] float32.
      n: ``x_hat * scale + bias``, [T, C] in x's dtype.
    """
    x32 = x.astype(F32)
    centered = x32 - x32.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + eps)
    x_hat = centered * inverse
    # GPU kernels have vectors [C], TPU kernels rows [1, C].
    scale, bias = (w if w.ndim == 2 else jnp.expand_dims(w, 0) for w in (scale, bias))
    return x_hat, inverse, (x_hat * scale + bias).astype(x.dtype)


def normalize_vjp(
    gradient: jax.Array, x_hat: jax.Array, inverse: jax.Array
) -> jax.Array:
    """Return the gradient of x, given the gradient of x_hat; see `layer_norm`."""
    projection = (gradient * x_hat).mean(-1, keepdims=True)
    return inverse * (gradient - gradient.mean(-1, keepdims=True) - x_hat * projection)


def normalize_jvp(
    tangent: jax.Array, x_hat: jax.Array, inverse: jax.Array
) -> jax.Array:
    """Return the tangent of x_hat, given the tangent of x; see `layer_norm`.

    Its transpose is `normalize_vjp`. Adds negated row averages instead of subtracting
    the averages, because the transpose of a subtraction negates a [T, C] array. The
    transpose of this form negates only [T, 1].
    """
    tangent = inverse * tangent
    projection = -(tangent * x_hat).mean(-1, keepdims=True)
    return tangent + -tangent.mean(-1, keepdims=True) + x_hat * projection


def normal_cdf(x: jax.Array, dtype: Any = F32) -> jax.Array:
    """Cumulative distribution function of the standard normal distribution, float32.

    GELU(x) is x times this, as in PyTorch.

    Args:
      dtype: dtype that GELU is rounded to. With float32 the function is exact (erf).
        With bfloat16 GELU is off by 3e-6 at most, because the function is a fitted
        tanh. TPUs have a unit for tanh. The many operations of an erf would take
        longer than the matrix products of a narrow block.
    """
    if dtype == F32:
        return 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))
    square, y = jnp.square(x), TANH_FIT[-1]
    for coefficient in TANH_FIT[-2::-1]:
        y = y * square + coefficient
    return 0.5 + 0.5 * jnp.tanh(x * y)


def gelu_slope(x: jax.Array, cdf: jax.Array) -> jax.Array:
    """Derivative of GELU at x, given ``cdf = normal_cdf(x)``."""
    return cdf + x * jnp.exp(-0.5 * jnp.square(x)) * math.sqrt(0.5 / math.pi)


def over_rows(
    kernel: Callable,
    plan: Plan,
    rows: Sequence[jax.Array],
    weights: Sequence[jax.Array],
    sums_like: Sequence[jax.Array] = (),
    scratch: Sequence[Any] = (),
    extra_widths: Sequence[int] = (),
    *,
    flops: int,
    name: str,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Run a kernel over blocks of rows.

    Args:
      kernel: (row refs, weight refs, output refs, refs of the sums in float32, scratch
        refs) -> None, called for each block.
      rows: arrays [T, C]; a block gets `plan.rows` rows of each.
      weights: every block gets each array whole; vectors become [1, n].
      sums_like: one array per sum over all rows, with the sum's shape and dtype; its
        values are not used.
      scratch: scratch buffers of the kernel.
      extra_widths: widths of the outputs [T, width] after the first.
      flops: operations of all blocks, for the compiler's estimates.

    Returns:
      (outputs, sums). outputs: an array like rows[0], then one [T, width] per width in
      `extra_widths`, in the dtype of rows[0]. sums: one array per entry of `sums_like`.
    """
    total, width = rows[0].shape
    widths, dtype = (width, *extra_widths), rows[0].dtype
    outputs = [jax.ShapeDtypeStruct((total, w), dtype) for w in widths]
    cores = _cores(total // plan.rows)
    steps = total // plan.rows // cores
    weights = [jnp.atleast_2d(w) for w in weights]
    shapes = [(1, s.size) if s.ndim == 1 else s.shape for s in sums_like]
    pairs = zip(shapes, sums_like, strict=True)
    core_sums = [jax.ShapeDtypeStruct((cores, *x), s.dtype) for x, s in pairs]
    bytes_moved = sum(x.size * x.dtype.itemsize for x in (*rows, *outputs))
    bytes_moved += cores * sum(x.nbytes for x in (*weights, *sums_like))
    results = pl.pallas_call(
        _body(kernel, (rows, weights, outputs, core_sums, core_sums, scratch), steps),
        grid_spec=pl.GridSpec(
            grid=(cores, steps),
            in_specs=[*_blocks(plan.rows, steps, rows), *map(_whole, weights)],
            out_specs=[*_blocks(plan.rows, steps, outputs), *map(_of_core, core_sums)],
            scratch_shapes=[*(pltpu.VMEM(s, F32) for s in shapes), *scratch],
        ),
        out_shape=[*outputs, *core_sums],
        compiler_params=_compiler_params(plan.interpret),
        cost_estimate=pl.CostEstimate(
            flops=flops, transcendentals=0, bytes_accessed=bytes_moved
        ),
        interpret=plan.interpret,
        name=name,
    )(*rows, *weights)
    parts = results[len(outputs) :]
    return tuple(results[: len(outputs)]), tuple(
        x.sum(0).reshape(like.shape) for x, like in zip(parts, sums_like, strict=True)
    )


def _blocks(block_rows, steps, arrays):
    """Specs of arrays [T, C] in blocks of rows; a core gets `steps` adjacent blocks."""

    def index(core, step):
        return core * steps + step, 0

    return [pl.BlockSpec((block_rows, x.shape[1]), index) for x in arrays]


def _whole(x):
    """Spec of an array that every block reads whole."""
    return pl.BlockSpec(x.shape, lambda core, step: (0,) * x.ndim)


def _of_core(x):
    """Spec of an array [cores, ...] of which each core writes its part."""
    rest = (0,) * (x.ndim - 1)
    return pl.BlockSpec((1, *x.shape[1:]), lambda core, step: (core, *rest))


def _compiler_params(interpret: bool) -> pltpu.CompilerParams:
    """Options of the TPU compiler: a VMEM limit and the order of the grid.

    The first axis is split over cores, and the second axis runs in order.
    """
    capacity = 0 if interpret else pltpu.get_tpu_info().vmem_capacity_bytes
    vmem = int(VMEM_SHARE * capacity) or None
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem
    )


def _body(kernel: Callable, groups: Sequence[Sequence], steps: int) -> Callable:
    """Return the function that runs the kernel of `over_rows` on one block.

    The function zeroes the sums at a core's first block and writes them at its last.

    Args:
      groups: one sequence per group of refs; only its length is used. The sums occur
        twice, as outputs and as buffers in which a core adds them up.
    """

    def body(*refs):
        refs = list(refs)
        parts = [[refs.pop(0) for _ in group] for group in groups]
        row_refs, weight_refs, out_refs, out_sums, sum_refs, scratch = parts
        step = pl.program_id(1)

        @pl.when(step == 0)
        def _():
            for ref in sum_refs:
                ref[...] = jnp.zeros_like(ref)

        kernel(row_refs, weight_refs, out_refs, sum_refs, scratch)

        @pl.when(step == steps - 1)
        def _():
            for out, total in zip(out_sums, sum_refs, strict=True):
                out[0] = total[...].astype(out.dtype)

    return body


def _cores(blocks: int) -> int:
    """Return the number of cores of a device that share the blocks.

    Two cores get half of the blocks each. An odd number of blocks runs on one core.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device is not None and blocks % 2 == 0 and device.num_cores) or 1
