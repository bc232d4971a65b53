"""MLP branch ``x + fc2(gelu(fc1(LayerNorm(x))))`` as one GPU kernel (Triton), forward
and backward.

The kernel is for narrow blocks such as the stem's: x is [T, C] bfloat16, and C is one
of WIDTHS, so that the branch of a block of rows stays in registers. T is a multiple of
ROWS, the hidden width H a multiple of COLUMNS. The forward pass saves only x. Blocks of
rows run concurrently and cannot share sums. Therefore the backward kernel writes the
operands of the weight gradients, and cuBLAS multiplies them.

Roofline for each row: the forward pass moves 4 C bytes for 4 C H operations. In the
backward pass, the kernel moves 8 C + 4 H bytes and cuBLAS 4 C + 4 H, for 10 C H
operations. In pretraining (49 visible units), a block of hivit_base's stem (H = 3 C)
thus moves 4 MB an image in the first stage and 2 MB in the second. Without the kernel,
it moves 10.5 and 5.2 MB.

On an H100, ptxas keeps everything in registers with C=128. With C=256 it spills 36
bytes a thread in the forward kernel and 8 in the backward kernel.
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
    normalize_vjp,
)

ROWS = 64  # rows of x that a thread block processes
COLUMNS = 32  # hidden units that it processes at a time
WIDTHS = 128, 256


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def mlp_block(x: jax.Array, weights: Weights, plan: Plan) -> jax.Array:
    """Run the MLP branch, [T, C] -> [T, C]."""

    def kernel(x, scale, bias, w1, b1, w2, b2, out):
        x_hat, _, n = layer_norm(x[...], scale[...], bias[...], plan.eps)

        def add_hidden_units(i, y):
            units = pl.ds(i * COLUMNS, COLUMNS)
            g, _ = _gelu(dot(n, w1[:, units]) + _row(b1, units))
            return y + dot(g.astype(n.dtype), w2[units, :])

        steps = w1.shape[1] // COLUMNS
        y = jax.lax.fori_loop(0, steps, add_hidden_units, jnp.zeros_like(x_hat))
        y = y + _row(b2)
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

        def add_hidden_units(i, dn):
            units = pl.ds(i * COLUMNS, COLUMNS)
            w1_ = w1[:, units]
            g, slope = _gelu(dot(n, w1_) + _row(b1, units))
            g_out[:, units] = g.astype(dtype)
            dh = dot(dy, w2[units, :], (1, 1)) * slope
            dh_out[:, units] = dh.astype(dtype)
            db1[0, units] = dh.sum(0)
            return dn + dot(dh.astype(dtype), w1_, (1, 1))

        steps = hidden // COLUMNS
        dn = jax.lax.fori_loop(0, steps, add_hidden_units, jnp.zeros_like(x_hat))
        # Recomputed, because x_hat would otherwise occupy registers during the loop.
        x_hat, inverse, _ = layer_norm(x[...], scale[...], bias[...], plan.eps)
        dscale[0, :] = (dn * x_hat).sum(0)
        dbias[0, :] = dn.sum(0)
        dy = dy.astype(F32)
        db2[0, :] = dy.sum(0)
        branch = normalize_vjp(dn * _row(scale), x_hat, inverse)
        dx[...] = (branch + dy if plan.add else branch).astype(dtype)

    widths = [width, width, hidden, hidden], [width, width, hidden, width]
    outputs = _over_rows(kernel, [x, gradient], weights, *widths, plan.interpret)
    dx, n, g, dh, *sums = outputs
    dscale, dbias, db1, db2 = (block_sums.sum(0) for block_sums in sums)
    dw1, dw2 = dot(n, dh, (0, 0)), dot(g, gradient, (0, 0))
    gradients = Weights(dscale, dbias, dw1, db1, dw2, db2)
    return dx, jax.tree.map(lambda g, w: g.astype(w.dtype), gradients, weights)


mlp_block.defvjp(_forward, _backward)


def _row(ref, columns=...):
    """Return a vector, or some columns of it, as one row of a matrix."""
    return jnp.expand_dims(ref[columns], 0)


def _gelu(x):
    """Return GELU of x and its derivative, float32.

    Triton has no erf. This one is formula 7.1.26 of Abramowitz and Stegun, Handbook of
    Mathematical Functions; its error is below 1.5e-7.
    """
    a = 0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429
    t = 1 / (1 + 0.3275911 * math.sqrt(0.5) * jnp.abs(x))
    density = jnp.exp(-0.5 * jnp.square(x))
    tail = 0.5 * density * t * (a[0] + t * (a[1] + t * (a[2] + t * (a[3] + t * a[4]))))
    cdf = jnp.where(x < 0, tail, 1 - tail)
    return x * cdf, cdf + x * density * math.sqrt(0.5 / math.pi)


def _over_rows(kernel, rows, weights, row_widths, sum_widths, interpret):
    """Run a kernel over blocks of ROWS rows.

    Args:
      kernel: (*row refs, *weight refs, *output refs) -> None.
      rows: arrays [T, C]; a block gets [ROWS, C] of each.
      weights: every block gets each array whole.
      row_widths: widths of outputs [T, width] in the dtype of x.
      sum_widths: widths of outputs [T / ROWS, width] float32, one row for each block.
    """
    # Imported here, because later versions of JAX may not have this module.
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
