"""MLP branch ``x + fc2(gelu(fc1(LayerNorm(x))))`` as one TPU kernel, forward and
backward.

Shapes: x [T, C]. C and the hidden width H are multiples of 128, and T is a multiple of
the rows of a block. The forward pass saves x, and with `Plan.keep` the output of fc1,
which is otherwise recomputed.

Roofline for each row in bfloat16: the forward pass moves 4 C bytes for 4 C H
operations, the backward pass 6 C bytes for 10 C H operations. Weights are read once.
Saving fc1's output moves 2 H more bytes in each pass and reduces the backward pass to
8 C H operations.

A v5e does 240 operations in the time it takes to move a byte. On it, recomputing is
faster in the first stage of hivit_base (C=128, H=384), and saving is faster in the
other stages. In the main stage (C=512, H=2048) the kernel is compute-bound even when it
saves: the forward pass does 683 operations a byte.
"""

from dataclasses import replace
from functools import partial

import jax

from hivit_jax.kernels.grid_tpu import over_rows
from hivit_jax.kernels.numerics import (
    F32,
    Plan,
    Weights,
    dot,
    gelu_slope,
    layer_norm,
    normal_cdf,
    normalize_vjp,
)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def mlp_block(
    x: jax.Array, weights: Weights, image_scale: jax.Array | None, plan: Plan
) -> jax.Array:
    """Run the MLP branch, [T, C] -> [T, C].

    Args:
      image_scale: [B] float32, factor of the branch of each image, which is T / B rows;
        None: 1. It has no gradient.
    """
    return _run(x, weights, image_scale, replace(plan, keep=False))[0]


def _run(x, weights, image_scale, plan):
    """Return the output, and a tuple with the output of fc1 if `plan.keep`."""
    hidden_width = weights.w1.shape[1]

    def kernel(row_refs, weights, out_refs, _, __, scaled):
        x = row_refs[0][...]
        scale, bias, w1, b1, w2, b2 = (weight[...] for weight in weights)
        hidden = dot(layer_norm(x, scale, bias, plan.eps)[2], w1) + b1
        g = hidden * normal_cdf(hidden, x.dtype)
        y = scaled(dot(g.astype(x.dtype), w2) + b2)
        out_refs[0][...] = (x.astype(F32) + y).astype(x.dtype)
        if plan.keep:
            out_refs[1][...] = hidden.astype(x.dtype)

    (out, *kept), _ = over_rows(
        kernel,
        plan,
        [x],
        weights,
        extra_widths=[hidden_width] if plan.keep else [],
        image_scale=image_scale,
        flops=4 * x.size * hidden_width,
        name="mlp_block",
    )
    return out, tuple(kept)


def _forward(x, weights, image_scale, plan):
    out, kept = _run(x, weights, image_scale, plan)
    return out, (x, weights, image_scale, kept)


def _backward(plan, saved, gradient):
    x, weights, image_scale, kept = saved
    dtype = x.dtype

    def kernel(row_refs, weights, out_refs, sums, _, scaled):
        x, dout = row_refs[0][...], row_refs[1][...]
        dy32 = scaled(dout)
        dy = dy32.astype(dtype)
        scale, bias, w1, b1, w2, _ = weights
        x_hat, inverse, n = layer_norm(x, scale[...], bias[...], plan.eps)
        if plan.keep:
            hidden = row_refs[2][...].astype(F32)
        else:
            hidden = dot(n, w1[...]) + b1[...]
        dg = dot(dy, w2[...], (1, 1))
        cdf = normal_cdf(hidden, dtype)
        g = (hidden * cdf).astype(dtype)
        dh = dg * gelu_slope(hidden, cdf)
        dh16 = dh.astype(dtype)
        dn = dot(dh16, w1[...], (1, 1))
        dscale, dbias, dw1, db1, dw2, db2 = sums
        dscale[...] += (dn * x_hat).sum(0, keepdims=True)
        dbias[...] += dn.sum(0, keepdims=True)
        dw1[...] += dot(n, dh16, (0, 0))
        db1[...] += dh.sum(0, keepdims=True)
        dw2[...] += dot(g, dy, (0, 0))
        db2[...] += dy32.sum(0, keepdims=True)
        dx = normalize_vjp(dn * scale[...], x_hat, inverse)
        out_refs[0][...] = (dx + dout.astype(F32)).astype(dtype)

    (out,), sums = over_rows(
        kernel,
        plan,
        [x, gradient, *kept],
        weights,
        weights,
        image_scale=image_scale,
        flops=(8 if plan.keep else 10) * x.size * weights.w1.shape[1],
        name="mlp_block_gradient",
    )
    return out, Weights(*sums), None


mlp_block.defvjp(_forward, _backward)
