"""LayerNorm at the start of a residual branch as GPU kernels (Triton), one for each
pass.

Without the kernels, XLA reads x three times in the forward pass (mean, variance,
result) and four times in the backward pass. The kernels read every array once: the
forward pass moves 4 C bytes for each row of C bfloat16 elements, the backward pass 8 C
bytes. The backward kernel also adds the gradient that reaches x by the skip connection,
because a separate addition would move the gradient of x again.

Blocks of rows run concurrently and cannot share sums. Therefore each block writes its
share of the gradients of scale and bias, and XLA adds the shares up.
"""

import math
from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from hivit_jax.kernels.numerics import F32, Plan

TILE_ELEMENTS = 4096  # that a thread block processes at a time
BLOCK_ELEMENTS = 16384  # that a thread block processes in the backward pass, in tiles
MAX_PARTS = 4  # largest number of parts of a row; see `row_parts`


def row_parts(width: int) -> list:
    """Return slices that divide a row into parts.

    The parts have equal lengths. The length is a power of two, because Triton supports
    only arrays whose sides are powers of two.
    """
    size = math.gcd(width, TILE_ELEMENTS)
    return [pl.ds(start, size) for start in range(0, width, size)]


def supports(total: int, width: int) -> bool:
    """Return True if the kernels support arrays [total, width].

    Also returns False if JAX lacks the Triton backend of Pallas, which is deprecated.
    """
    fits = total % 8 == 0 and width % 32 == 0 and len(row_parts(width)) <= MAX_PARTS
    return fits and find_spec("jax.experimental.pallas.triton") is not None


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def skip_and_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, plan: Plan
) -> tuple[jax.Array, jax.Array]:
    """Return x and its LayerNorm.

    Args:
      x: [T, C]; ``supports(T, C)`` must be True.
      scale, bias: [C] float32.
    """
    return _forward(x, scale, bias, plan)[0]


def _forward(x, scale, bias, plan):
    total, width = x.shape
    parts = row_parts(width)

    def kernel(x_ref, scale_ref, bias_ref, y_ref, mean_ref, inverse_std_ref):
        x = [x_ref[:, part].astype(F32) for part in parts]
        mean = _mean(x, width)
        centered = [values - mean for values in x]
        inverse_std = jax.lax.rsqrt(_mean(map(jnp.square, centered), width) + plan.eps)
        for part, values in zip(parts, centered, strict=True):
            y = values * inverse_std * _row(scale_ref, part) + _row(bias_ref, part)
            y_ref[:, part] = y.astype(y_ref.dtype)
        mean_ref[...], inverse_std_ref[...] = mean, inverse_std

    block = _block_rows(total, width, TILE_ELEMENTS)
    statistics = jax.ShapeDtypeStruct((total, 1), F32)
    y, mean, inverse_std = pl.pallas_call(
        kernel,
        grid=(total // block,),
        in_specs=[_row_spec(block, width), _whole_spec(scale), _whole_spec(bias)],
        out_specs=[_row_spec(block, width), _row_spec(block, 1), _row_spec(block, 1)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), statistics, statistics],
        compiler_params=_compiler_params(),
        interpret=plan.interpret,
        name="layer_norm",
    )(x, scale, bias)
    return (x, y), (x, scale, mean, inverse_std)


def _backward(plan, saved, gradients):
    x, scale, mean, inverse_std = saved
    total, width = x.shape
    parts, block = row_parts(width), _block_rows(total, width, BLOCK_ELEMENTS)
    tile = _block_rows(block, width, TILE_ELEMENTS)

    def kernel(*refs):
        x_ref, dskip_ref, dy_ref, scale_ref, mean_ref, inverse_std_ref = refs[:6]
        dx_ref, dscale_ref, dbias_ref = refs[6:]

        def add_tile(i, sums):
            rows = pl.ds(i * tile, tile)
            mean, inverse_std = mean_ref[rows, :], inverse_std_ref[rows, :]
            x = [x_ref[rows, part].astype(F32) for part in parts]
            x_hat = [(values - mean) * inverse_std for values in x]
            dy = [dy_ref[rows, part].astype(F32) for part in parts]
            scale = [_row(scale_ref, part) for part in parts]
            dx_hat = [a * b for a, b in zip(dy, scale, strict=True)]
            products = [a * b for a, b in zip(dx_hat, x_hat, strict=True)]
            average, projection = _mean(dx_hat, width), _mean(products, width)
            for part, d, normalized in zip(parts, dx_hat, x_hat, strict=True):
                dx = inverse_std * (d - average - normalized * projection)
                dx = dskip_ref[rows, part].astype(F32) + dx
                dx_ref[rows, part] = dx.astype(dx_ref.dtype)
            return [
                (dscale + d * normalized, dbias + d)
                for (dscale, dbias), d, normalized in zip(sums, dy, x_hat, strict=True)
            ]

        zeros = [(jnp.zeros((tile, part.size), F32),) * 2 for part in parts]
        sums = jax.lax.fori_loop(0, block // tile, add_tile, zeros)
        for part, (dscale, dbias) in zip(parts, sums, strict=True):
            dscale_ref[0, part], dbias_ref[0, part] = dscale.sum(0), dbias.sum(0)

    row_spec, column_spec = _row_spec(block, width), _row_spec(block, 1)
    sum_spec = _row_spec(1, width)
    block_sums = jax.ShapeDtypeStruct((total // block, width), F32)
    dx, dscale, dbias = pl.pallas_call(
        kernel,
        grid=(total // block,),
        in_specs=[*[row_spec] * 3, _whole_spec(scale), *[column_spec] * 2],
        out_specs=[row_spec, sum_spec, sum_spec],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), block_sums, block_sums],
        compiler_params=_compiler_params(),
        interpret=plan.interpret,
        name="layer_norm_gradient",
    )(x, *gradients, scale, mean, inverse_std)
    return dx, dscale.sum(0), dbias.sum(0)


skip_and_norm.defvjp(_forward, _backward)


def _mean(values, width):
    """Return the mean of each row, [R, 1], given the values of its parts."""
    return sum(x.sum(1, keepdims=True) for x in values) / width


def _row(ref, columns):
    """Return some columns of a vector as one row of a matrix."""
    return jnp.expand_dims(ref[columns], 0)


def _block_rows(total, width, max_elements):
    """Return the number of rows of a block: a power of two that divides `total`.

    The block has at most `max_elements` elements, or one row.
    """
    return math.gcd(total, 2 ** int(math.log2(max(max_elements // width, 1))))


def _row_spec(count, width):
    """Return the spec of an array with `count` rows per block."""
    return pl.BlockSpec((count, width), lambda i: (i, 0))


def _whole_spec(x):
    """Return the spec of an array that every block reads whole."""
    return pl.BlockSpec(x.shape, lambda i: (0,) * x.ndim)


def _compiler_params():
    # Imported here, because later versions of JAX may lack this module.
    from jax.experimental.pallas.triton import CompilerParams

    return CompilerParams(num_warps=8, num_stages=2)
