"""``x + fc2(gelu(fc1(LayerNorm(x))))`` in one TPU kernel, forward and backward.

Shapes: x [T, C]; C and the hidden width H multiples of 128, T of the rows of a block.
Saved for the backward pass: x, and with `Plan.keep` the output of fc1, which is
otherwise recomputed.

Roofline, for each row, bfloat16: 4 C bytes forward and 6 C backward, against 4 C H and
10 C H operations, the weights once; keeping fc1's output 2 H bytes more each way, and
8 C H operations. On a v5e, which does 240 operations in the time of a byte, computing
again is the quicker in the first stage of hivit_base (C 128, H 384), keeping elsewhere
(512, 2048): with 683 operations a byte the kernel waits for arithmetic even so.
"""

from dataclasses import replace
from functools import partial

import jax

from hivit_jax.kernels.numerics import (
    F32,
    Plan,
    Weights,
    dot,
    gelu_slope,
    layer_norm,
    normal_cdf,
    normalized_gradient,
    over_rows,
)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def mlp_block(x: jax.Array, weights: Weights, plan: Plan) -> jax.Array:
    """[T, C] -> [T, C]."""
    return _run(x, weights, replace(plan, keep=False))[0]


def _run(x, weights, plan):
    """The output, and a tuple that holds fc1's output if the plan keeps it."""
    hidden_width = weights.w1.shape[1]

    def kernel(blocks, weights, outs, _, __):
        x = blocks[0][...]
        scale, bias, w1, b1, w2, b2 = (weight[...] for weight in weights)
        hidden = dot(layer_norm(x, scale, bias, plan.eps)[2], w1) + b1
        g = hidden * normal_cdf(hidden, x.dtype)
        y = dot(g.astype(x.dtype), w2) + b2
        outs[0][...] = (x.astype(F32) + y if plan.add else y).astype(x.dtype)
        if plan.keep:
            outs[1][...] = hidden.astype(x.dtype)

    (out, *kept), _ = over_rows(
        kernel,
        plan,
        [x],
        weights,
        kept=[hidden_width] if plan.keep else [],
        flops=4 * x.size * hidden_width,
        name="mlp_block",
    )
    return out, tuple(kept)


def _forward(x, weights, plan):
    out, kept = _run(x, weights, plan)
    return out, (x, weights, kept)


def _backward(plan, saved, gradient):
    x, weights, kept = saved
    dtype = x.dtype

    def kernel(blocks, weights, outs, sums, _):
        x, dy = blocks[0][...], blocks[1][...]
        scale, bias, w1, b1, w2, _ = weights
        x_hat, inverse, n = layer_norm(x, scale[...], bias[...], plan.eps)
        kept = plan.keep
        hidden = blocks[2][...].astype(F32) if kept else dot(n, w1[...]) + b1[...]
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
        db2[...] += dy.astype(F32).sum(0, keepdims=True)
        dx = normalized_gradient(dn * scale[...], x_hat, inverse)
        dx = dx + dy.astype(F32) if plan.add else dx
        outs[0][...] = dx.astype(dtype)

    (out,), sums = over_rows(
        kernel,
        plan,
        [x, gradient, *kept],
        weights,
        weights,
        flops=(8 if plan.keep else 10) * x.size * weights.w1.shape[1],
        name="mlp_block_gradient",
    )
    return out, Weights(*sums)


mlp_block.defvjp(_forward, _backward)
