"""Parts that the kernels share: plan, grid over blocks of rows, LayerNorm, GELU, matrix
products.

Written for TPUs: a core works through its blocks one after another, weights stay in
VMEM meanwhile, and their gradients are added up there.
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
ROWS = 8  # of a tile; blocks are multiples
VMEM_SHARE = 0.9  # that a kernel may take
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

    eps: of the LayerNorm.
    add: add x to the branch; False: return the branch alone.
    rows: rows of x that are in VMEM at a time, a divisor of all rows; TPU kernels only.
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
    """Matrix product over dimension contract[0] of a and contract[1] of b, float32.

    Exact to its inputs' dtype, whatever JAX's default is: bfloat16 knows but one way.
    """
    dims = (((contract[0],), (contract[1],)), ((), ()))
    exact = "highest" if a.dtype == F32 else "default"
    return jax.lax.dot_general(a, b, dims, exact, preferred_element_type=F32)


def normalized(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """Rows [T, C] float32, less their mean and over their deviation; 1 / deviation."""
    centred = x - x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    return centred * inverse, inverse


def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`normalized` rows of x [T, C] and 1 / deviation, and LayerNorm of x like x."""
    x_hat, inverse = normalized(x.astype(F32), eps)
    return x_hat, inverse, (x_hat * scale + bias).astype(x.dtype)


def normalized_gradient(
    gradient: jax.Array, x_hat: jax.Array, inverse: jax.Array
) -> jax.Array:
    """Of x, from that of `normalized`(x)."""
    along = (gradient * x_hat).mean(-1, keepdims=True)
    return inverse * (gradient - gradient.mean(-1, keepdims=True) - x_hat * along)


def normal_cdf(x: jax.Array, dtype: Any = F32) -> jax.Array:
    """Normal distribution up to x, float32; GELU is x times this, as in PyTorch.

    Args:
      dtype: that GELU is rounded to. For bfloat16 GELU is off by 3e-6 at most: by a
        tanh, for which TPUs have a unit. The many operations of an erf would take
        longer than the matrix products of a narrow block.
    """
    if dtype == F32:
        return 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))
    # Fitted: x times this polynomial in x^2 is artanh(2 cdf - 1), the error of x cdf
    # least at its largest.
    square, y = jnp.square(x), TANH_FIT[-1]
    for coefficient in TANH_FIT[-2::-1]:
        y = y * square + coefficient
    return 0.5 + 0.5 * jnp.tanh(x * y)


def gelu_slope(x: jax.Array, cdf: jax.Array) -> jax.Array:
    """Derivative of GELU, given `normal_cdf`(x)."""
    return cdf + x * jnp.exp(-0.5 * jnp.square(x)) * math.sqrt(0.5 / math.pi)


def over_rows(
    kernel: Callable,
    plan: Plan,
    rows: Sequence[jax.Array],
    weights: Sequence[jax.Array],
    sums: Sequence[jax.Array] = (),
    scratch: Sequence[Any] = (),
    kept: Sequence[int] = (),
    *,
    flops: int,
    name: str,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Runs a kernel over blocks of rows.

    Args:
      kernel: (row refs, weight refs, output refs, refs of the sums float32, scratch
        refs) -> None, called for each block.
      rows: each [T, C].
      weights: each whole at every block; vectors come as [1, n].
      sums: arrays with the shape and dtype of each sum over all rows.
      kept: widths of outputs [T, width] beside the first.
      flops: of all blocks, for the compiler's estimates.

    Returns:
      An array like rows[0] and the kept ones; the sums.
    """
    total, width = rows[0].shape
    outputs = [
        jax.ShapeDtypeStruct((total, each), rows[0].dtype) for each in (width, *kept)
    ]
    cores = _cores(total // plan.rows)
    steps = total // plan.rows // cores
    weights = [jnp.atleast_2d(w) for w in weights]
    shapes = [(1, s.size) if s.ndim == 1 else s.shape for s in sums]
    added = [
        jax.ShapeDtypeStruct((cores, *shape), s.dtype)
        for shape, s in zip(shapes, sums, strict=True)
    ]
    bytes_moved = sum(x.size * x.dtype.itemsize for x in (*rows, *outputs))
    bytes_moved += cores * sum(x.nbytes for x in (*weights, *sums))
    found = pl.pallas_call(
        _body(kernel, (rows, weights, outputs, sums, sums, scratch), steps),
        grid_spec=pl.GridSpec(
            grid=(cores, steps),
            in_specs=[*_blocks(plan.rows, steps, rows), *map(_whole, weights)],
            out_specs=[*_blocks(plan.rows, steps, outputs), *map(_of_core, added)],
            scratch_shapes=[*(pltpu.VMEM(s, F32) for s in shapes), *scratch],
        ),
        out_shape=[*outputs, *added],
        compiler_params=_compiler_params(plan.interpret),
        cost_estimate=pl.CostEstimate(
            flops=flops, transcendentals=0, bytes_accessed=bytes_moved
        ),
        interpret=plan.interpret,
        name=name,
    )(*rows, *weights)
    found, parts = found[: len(outputs)], found[len(outputs) :]
    return tuple(found), tuple(
        x.sum(0).reshape(like.shape) for x, like in zip(parts, sums, strict=True)
    )


def _blocks(block_rows, steps, arrays):
    """Specs of arrays [T, C] in blocks of rows: steps consecutive blocks a core."""

    def index(core, step):
        return core * steps + step, 0

    return [pl.BlockSpec((block_rows, x.shape[1]), index) for x in arrays]


def _whole(x):
    """Spec of an array that every block reads whole."""
    return pl.BlockSpec(x.shape, lambda core, step: (0,) * x.ndim)


def _of_core(x):
    """Spec of an array [cores, ...] of which each core writes its part."""
    return pl.BlockSpec((1, *x.shape[1:]), lambda core, step: (core, 0, 0))


def _compiler_params(interpret: bool) -> pltpu.CompilerParams:
    """Blocks of a core in order, within the share of VMEM that a kernel may take."""
    capacity = 0 if interpret else pltpu.get_tpu_info().vmem_capacity_bytes
    vmem = int(VMEM_SHARE * capacity) or None
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem
    )


def _body(kernel: Callable, groups: Sequence[Sequence], steps: int) -> Callable:
    """The kernel of `over_rows` on one block; it adds sums up over the steps."""

    def body(*refs):
        refs = list(refs)
        parts = [[refs.pop(0) for _ in group] for group in groups]
        row_refs, weight_refs, outs, out_sums, added, room = parts
        step = pl.program_id(1)

        @pl.when(step == 0)
        def _():
            for ref in added:
                ref[...] = jnp.zeros_like(ref)

        kernel(row_refs, weight_refs, outs, added, room)

        @pl.when(step == steps - 1)
        def _():
            for ref, total in zip(out_sums, added, strict=True):
                ref[0] = total[...].astype(ref.dtype)

    return body


def _cores(blocks: int) -> int:
    """Cores of a device; each of two gets half of the blocks, if these are even."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device is not None and blocks % 2 == 0 and device.num_cores) or 1
