"""MLP branch ``x + fc2(gelu(fc1(LayerNorm(x))))`` as fused TPU kernels.

The forward and the backward pass are one kernel each.

Shapes: x [T, C]. C and the hidden width H are multiples of 128, and T is a multiple of
`Plan.rows`. The forward pass saves x. With ``Plan.num_saved=1``, it also saves the
output of fc1; otherwise the backward pass recomputes this output.

Roofline per row in bfloat16. The bytes exclude the weights, which a core reads once:

| pass               | bytes     | operations |
|--------------------|-----------|------------|
| forward            | 4 C       | 4 C H      |
| forward, saved     | 4 C + 2 H | 4 C H      |
| backward           | 6 C       | 10 C H     |
| backward, saved    | 6 C + 2 H | 8 C H      |

A v5e does 480 operations in the time in which it moves a byte at half of its peak
bandwidth. By this model, recomputing is faster in both stem stages of hivit_base
(C=128, H=384 and C=256, H=768), and saving is faster in the main stage (C=512, H=2048).
There the kernel is compute-bound even with the saved array: its forward pass does 683
operations per byte.
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
    x: jax.Array, weights: Weights, branch_scale: jax.Array | None, plan: Plan
) -> jax.Array:
    """Run the MLP branch, [T, C] -> [T, C].

    Args:
      branch_scale: [B] float32, factor of each image's branch; None: 1. An image is
        T / B consecutive rows. The factors have no gradient.
    """
    return _run(x, weights, branch_scale, replace(plan, num_saved=0))[0]


def _run(x, weights, branch_scale, plan):
    """Return (output [T, C], saved).

    saved: (output of fc1 [T, H],) if `plan.num_saved` is 1, else ().
    """
    hidden_width = weights.w1.shape[1]

    def kernel(row_refs, weights, out_refs, _sums, _scratch, apply_branch_scale):
        x = row_refs[0][...]
        scale, bias, w1, b1, w2, b2 = (weight[...] for weight in weights)
        hidden = dot(layer_norm(x, scale, bias, plan.eps)[2], w1) + b1
        g = hidden * normal_cdf(hidden, x.dtype)
        y = apply_branch_scale(dot(g.astype(x.dtype), w2) + b2)
        out_refs[0][...] = (x.astype(F32) + y).astype(x.dtype)
        if plan.num_saved:
            out_refs[1][...] = hidden.astype(x.dtype)

    (out, *saved), _ = over_rows(
        kernel,
        plan,
        [x],
        weights,
        extra_widths=[hidden_width] * plan.num_saved,
        branch_scale=branch_scale,
        flops=4 * x.size * hidden_width,
        name="mlp_block",
    )
    return out, tuple(saved)


def _forward(x, weights, branch_scale, plan):
    out, saved = _run(x, weights, branch_scale, plan)
    return out, (x, weights, branch_scale, saved)


def _backward(plan, residuals, gradient):
    x, weights, branch_scale, saved = residuals
    dtype = x.dtype

    def kernel(row_refs, weights, out_refs, sums, _scratch, apply_branch_scale):
        x, dout = row_refs[0][...], row_refs[1][...]
        dy32 = apply_branch_scale(dout)
        dy = dy32.astype(dtype)
        scale, bias, w1, b1, w2, _ = weights
        x_hat, inverse_std, normed = layer_norm(x, scale[...], bias[...], plan.eps)
        if plan.num_saved:
            hidden = row_refs[2][...].astype(F32)
        else:
            hidden = dot(normed, w1[...]) + b1[...]
        dg = dot(dy, w2[...], (1, 1))
        cdf = normal_cdf(hidden, dtype)
        g = (hidden * cdf).astype(dtype)
        dh = dg * gelu_slope(hidden, cdf)
        dh_cast = dh.astype(dtype)
        dn = dot(dh_cast, w1[...], (1, 1))
        dscale, dbias, dw1, db1, dw2, db2 = sums
        dscale[...] += (dn * x_hat).sum(0, keepdims=True)
        dbias[...] += dn.sum(0, keepdims=True)
        dw1[...] += dot(normed, dh_cast, (0, 0))
        db1[...] += dh.sum(0, keepdims=True)
        dw2[...] += dot(g, dy, (0, 0))
        db2[...] += dy32.sum(0, keepdims=True)
        dx = normalize_vjp(dn * scale[...], x_hat, inverse_std)
        out_refs[0][...] = (dx + dout.astype(F32)).astype(dtype)

    (dx,), sums = over_rows(
        kernel,
        plan,
        [x, gradient, *saved],
        weights,
        weights,
        branch_scale=branch_scale,
        flops=(8 if plan.num_saved else 10) * x.size * weights.w1.shape[1],
        name="mlp_block_gradient",
    )
    return dx, Weights(*sums), None


mlp_block.defvjp(_forward, _backward)
