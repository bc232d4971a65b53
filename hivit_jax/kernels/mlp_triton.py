"""``x + fc2(gelu(fc1(LayerNorm(x))))`` in one GPU kernel (Triton), there and back.

For narrow blocks, the stem's: x [T, C] bfloat16, C one of WIDTHS, so that the branch of
a block of rows stays in registers; T a multiple of ROWS, the hidden width H of COLUMNS.
Saved for the gradient: x alone. Backward writes what cuBLAS takes for the gradients of
weights: blocks of rows run at once, in no order, and share no sums.

Roofline, for each row: 4 C bytes forward, 8 C + 4 H backward and 4 C + 4 H by cuBLAS,
against 4 C H and 12 C H operations. A block of hivit_base's stem (H 3 C) thus moves 4
and 2 MB an image in the first and second stage, instead of 10.5 and 5.2.

Sizes are such that for an H100 ptxas keeps all in registers with C 128, and spills 36
and 8 bytes a thread, forward and backward, with C 256.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from hivit_jax.kernels.numerics import (
    F32,
    Plan,
    Weights,
    dot,
    layer_norm,
    normalized_gradient,
)

ROWS = 64  # of x that a block of threads works on
COLUMNS = 32  # of the hidden activations at a time
WIDTHS = 128, 256


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def mlp_block(x: jax.Array, weights: Weights, plan: Plan) -> jax.Array:
    """[T, C] -> [T, C]."""

    def kernel(x, scale, bias, w1, b1, w2, b2, out):
        x_hat, _, n = layer_norm(x[...], scale[...], bias[...], plan.eps)

        def some(i, y):
            at = pl.ds(i * COLUMNS, COLUMNS)
            hidden = dot(n, w1[:, at]) + b1[at]
            g, _ = _gelu(hidden)
            return y + dot(g.astype(n.dtype), w2[at, :])

        y = jax.lax.fori_loop(0, w1.shape[1] // COLUMNS, some, jnp.zeros_like(x_hat))
        y = y + b2[...]
        out[...] = (x[...].astype(F32) + y if plan.add else y).astype(out.dtype)

    return _over_rows(kernel, [x], weights, [x.shape[1]], [], plan.interpret)[0]


def _forward(x, weights, plan):
    return mlp_block(x, weights, plan), (x, weights)


def _backward(plan, saved, gradient):
    x, weights = saved
    dtype, (width, hidden) = x.dtype, weights.w1.shape

    def kernel(x, dy, scale, bias, w1, b1, w2, _, dx, n_out, g_out, dh_out, *sums):
        dscale, dbias, db1, db2 = sums
        dy = dy[...]
        x_hat, _, n = layer_norm(x[...], scale[...], bias[...], plan.eps)
        n_out[...] = n

        def some(i, dn):
            at = pl.ds(i * COLUMNS, COLUMNS)
            w1_ = w1[:, at]
            g, slope = _gelu(dot(n, w1_) + b1[at])
            g_out[:, at] = g.astype(dtype)
            dh = dot(dy, w2[at, :], (1, 1)) * slope
            dh_out[:, at] = dh.astype(dtype)
            db1[0, at] = dh.sum(0)
            return dn + dot(dh.astype(dtype), w1_, (1, 1))

        dn = jax.lax.fori_loop(0, hidden // COLUMNS, some, jnp.zeros_like(x_hat))
        # Again, or registers would have to hold it through the loop.
        x_hat, inverse, _ = layer_norm(x[...], scale[...], bias[...], plan.eps)
        dscale[0, :] = (dn * x_hat).sum(0)
        dbias[0, :] = dn.sum(0)
        dy = dy.astype(F32)
        db2[0, :] = dy.sum(0)
        branch = normalized_gradient(dn * scale[...], x_hat, inverse)
        dx[...] = (branch + dy if plan.add else branch).astype(dtype)

    widths = [width, width, hidden, hidden], [width, width, hidden, width]
    found = _over_rows(kernel, [x, gradient], weights, *widths, plan.interpret)
    dx, n, g, dh, *sums = found
    dscale, dbias, db1, db2 = (each.sum(0) for each in sums)
    dw1, dw2 = dot(n, dh, (0, 0)), dot(g, gradient, (0, 0))
    found = Weights(dscale, dbias, dw1, db1, dw2, db2)
    return dx, jax.tree.map(lambda sums, like: sums.astype(like.dtype), found, weights)


mlp_block.defvjp(_forward, _backward)


def _gelu(x):
    """GELU of x and its derivative, float32.

    Triton has no erf: this one is formula 7.1.26 of Abramowitz and Stegun, Handbook of
    Mathematical Functions; error below 1.5e-7.
    """
    a = 0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429
    t = 1 / (1 + 0.3275911 * math.sqrt(0.5) * jnp.abs(x))
    density = jnp.exp(-0.5 * jnp.square(x))
    tail = 0.5 * density * t * (a[0] + t * (a[1] + t * (a[2] + t * (a[3] + t * a[4]))))
    cdf = jnp.where(x < 0, tail, 1 - tail)
    return x * cdf, cdf + x * density * math.sqrt(0.5 / math.pi)


def _over_rows(kernel, rows, weights, row_widths, sum_widths, interpret):
    """Runs a kernel over blocks of ROWS: (rows, weights, outputs) -> None, all refs.

    Args:
      rows: each [T, C]; a kernel has [ROWS, C] of it.
      weights: a kernel has all of them.
      row_widths: of outputs [T, width] like the first rows.
      sum_widths: of outputs [T / ROWS, width] float32, a row for each block.
    """
    # Here, for later versions of JAX may be without it.
    from jax.experimental.pallas.triton import CompilerParams

    total, dtype = rows[0].shape[0], rows[0].dtype

    def part(count, width):
        return pl.BlockSpec((count, width), lambda i: (i, 0))

    def whole(x):
        return pl.BlockSpec(x.shape, lambda i: (0,) * x.ndim)

    outputs = [jax.ShapeDtypeStruct((total, width), dtype) for width in row_widths]
    blocks = total // ROWS
    outputs += [jax.ShapeDtypeStruct((blocks, width), F32) for width in sum_widths]
    return pl.pallas_call(
        kernel,
        grid=(blocks,),
        in_specs=[*(part(ROWS, x.shape[1]) for x in rows), *map(whole, weights)],
        out_specs=[
            *(part(ROWS, width) for width in row_widths),
            *(part(1, width) for width in sum_widths),
        ],
        out_shape=outputs,
        compiler_params=CompilerParams(num_warps=8, num_stages=2),
        interpret=interpret,
        name="mlp_block" if len(rows) == 1 else "mlp_block_gradient",
    )(*rows, *weights)
