"""Residual attention branch ``x + proj(attention(LayerNorm(x)))`` as fused TPU kernels.

The forward and the backward pass are one kernel each.

Shapes: x is [B*N, C], with N tokens per image. Tokens attend to tokens of the same
image. C is a multiple of 128, and heads are 32, 64 or 128 wide. The forward pass saves
x and, depending on `Plan.num_saved`, also q, k and v, and the outputs of the heads. The
backward pass recomputes the arrays that were not saved.

An optional bias [heads, N, N] is added to the scores of every image. The bias and the
sum of its gradient stay in VMEM while a core processes its images.

A tile has 128 lanes. To select one of several narrower heads in a tile, the lanes of
the other heads are set to 0, which costs the matrix unit no more than padding would.
Images of few tokens share a score matrix, with a mask between images: two images of 49
tokens fill 98 of 128 lanes, whereas one image would fill 49.

The rows of the scores are queries in the forward pass. In the backward pass, the rows
are keys, and the scores of a tile's heads lie side by side. The products are therefore
fewer and larger, and keep four matrix units busy while the vector units compute the
softmax.

Roofline per row in bfloat16; the weights are read once, and only the operations of the
linear layers count:

| pass               | bytes | operations |
|--------------------|-------|------------|
| forward            | 4 C   | 8 C C      |
| forward, 1 saved   | 10 C  | 8 C C      |
| forward, 2 saved   | 12 C  | 8 C C      |
| backward           | 6 C   | 22 C C     |
| backward, 1 saved  | 12 C  | 16 C C     |
| backward, 2 saved  | 14 C  | 16 C C     |

The second saved array also avoids one product of the probabilities and v. A decoder
block of mae_hivit_base moves 1 MB per image, or 2.6 MB if two arrays are saved, and is
compute-bound in both cases. Without the kernel, the scores of the block's 16 heads
would move 55 MB.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hivit_jax.kernels.attention_groups import (
    LANES,
    Groups,
    head_lanes,
    merge_heads,
    stack_heads,
)
from hivit_jax.kernels.grid_tpu import over_rows
from hivit_jax.kernels.numerics import (
    F32,
    Plan,
    Weights,
    dot,
    layer_norm,
    normalize_vjp,
)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention_block(
    x: jax.Array,
    weights: Weights,
    bias: jax.Array | None,
    branch_scale: jax.Array | None,
    plan: Plan,
) -> jax.Array:
    """Run the attention branch, [B*N, C] -> [B*N, C].

    Args:
      bias: added to the scores of every image, [heads, N, N] float32; or None.
      branch_scale: [B] float32, factor of each image's branch; None: 1. The factors
        have no gradient.
      plan: `rows` must be a multiple of N, so that blocks hold whole images.
    """
    return _run(x, weights, bias, branch_scale, replace(plan, num_saved=0))[0]


def _run(x, weights, bias, branch_scale, plan):
    """Return (output [B*N, C], saved).

    saved: ``(qkv, outputs of the heads)[:plan.num_saved]``, [B*N, 3C] and [B*N, C].
    """
    tokens, rows = plan.tokens, plan.rows
    width, dtype = x.shape[1], x.dtype
    head_width = width // plan.heads
    heads_per_tile, factor = LANES // head_width, np.float32(head_width**-0.5)
    groups = Groups(rows, tokens)
    biases = [] if bias is None else [groups.bias_by_query(bias)]

    def kernel(row_refs, weights, out_refs, _, scratch, apply_branch_scale):
        qkv, heads_out = scratch
        weights, biases = weights[:6], weights[6:]
        x = row_refs[0][...]
        _project(x, weights, plan.eps, qkv)

        def attend(window, inside, score_mask, offset_index):
            # The mask is [W or 1, W]: queries are rows, keys are columns.
            mask = None if biases else score_mask(1)
            first_bias = offset_index() * plan.heads if biases else 0
            for tile in range(width // LANES):
                columns = pl.ds(tile * LANES, LANES)
                q, k, v = _load_tile(qkv, window, tile, width)
                k, v = k.astype(dtype), v.astype(dtype)
                tile_out, row_sums = heads_out[window, columns], jnp.ones(q.shape, F32)
                for index, lanes in enumerate(head_lanes(head_width)):
                    if biases:
                        mask = biases[0][first_bias + tile * heads_per_tile + index]
                    q_head = jnp.where(lanes, q, 0.0).astype(dtype)
                    scores = dot(q_head, k, (1, 1)) * factor + mask  # [W, W]
                    p = jnp.exp(scores - scores.max(-1, keepdims=True))
                    # The output is divided by the row sums below, after the heads are
                    # merged, because a tile then needs one division instead of one per
                    # head.
                    lanes = lanes & inside
                    tile_out = jnp.where(lanes, dot(p.astype(dtype), v), tile_out)
                    row_sums = jnp.where(lanes, p.sum(-1, keepdims=True), row_sums)
                heads_out[window, columns] = tile_out / row_sums

        groups.for_each(attend)
        y = dot(heads_out[...].astype(dtype), weights[4][...]) + weights[5][...]
        out_refs[0][...] = (x.astype(F32) + apply_branch_scale(y)).astype(dtype)
        for ref, array in zip(out_refs[1:], scratch, strict=False):
            ref[...] = array[...].astype(dtype)

    scratch = [pltpu.VMEM((rows, 3 * width), F32), pltpu.VMEM((rows, width), F32)]
    (out, *saved), _ = over_rows(
        kernel,
        plan,
        [x],
        [*weights, *biases],
        scratch=scratch,
        extra_widths=[3 * width, width][: plan.num_saved],
        branch_scale=branch_scale,
        flops=x.size * (8 * width + 4 * tokens),
        name="attention_block",
    )
    return out, tuple(saved)


def _forward(x, weights, bias, branch_scale, plan):
    out, saved = _run(x, weights, bias, branch_scale, plan)
    return out, (x, weights, bias, branch_scale, saved)


def _backward(plan, residuals, gradient):
    x, weights, bias, branch_scale, saved = residuals
    tokens, rows, num_saved = plan.tokens, plan.rows, plan.num_saved
    width, dtype = x.shape[1], x.dtype
    head_width, groups = width // plan.heads, Groups(rows, tokens)
    heads_per_tile, biases = LANES // head_width, []
    if bias is not None:
        copy_bias = partial(groups.bias_by_key, heads_per_tile=heads_per_tile)
        bias_copies, bias_vjp = jax.vjp(copy_bias, bias)
        biases = [bias_copies]

    def kernel(row_refs, weights, out_refs, sums, scratch, apply_branch_scale):
        qkv, heads_out, dheads_out = scratch  # qkv is overwritten by its gradient
        weights, biases = weights[:6], weights[6:]
        scale, _, qkv_w, _, proj_w, _ = weights
        x, dout = row_refs[0][...], row_refs[1][...]
        dy = apply_branch_scale(dout).astype(dtype)
        x_hat, inverse_std, n = _restore(x, row_refs[2:], weights, plan.eps, scratch)
        dheads_out[...] = dot(dy, proj_w[...], (1, 1))

        def attend(window, inside, score_mask, offset_index):
            # The mask is [W, heads * W or 1]: keys are rows.
            mask = None if biases else score_mask(0, heads_per_tile)
            first_bias = offset_index() * (width // LANES) if biases else 0
            for tile in range(width // LANES):
                if biases:
                    mask = biases[0][first_bias + tile]
                columns = pl.ds(tile * LANES, LANES)
                q, k, v = _load_tile(qkv, window, tile, width)
                k, v = k.astype(dtype), v.astype(dtype)
                arguments = q, k, v, dheads_out[window, columns], mask, inside
                p, dscores, *gradients = _tile_gradients(*arguments, head_width)
                if biases:
                    sums[6][first_bias + tile] += dscores
                if num_saved < 2:
                    tile_out = merge_heads(dot(p, v, (0, 0)), head_width)
                    tile_out = jnp.where(inside, tile_out, heads_out[window, columns])
                    heads_out[window, columns] = tile_out
                for part, new in enumerate(gradients):
                    columns = pl.ds(part * width + tile * LANES, LANES)
                    qkv[window, columns] = jnp.where(inside, new, qkv[window, columns])

        groups.for_each(attend)
        dn = dot(qkv[...].astype(dtype), qkv_w[...], (1, 1))
        _add_weight_gradients(sums[:6], n, x_hat, dn, qkv[...], heads_out[...], dy)
        dx = normalize_vjp(dn * scale[...], x_hat, inverse_std)
        out_refs[0][...] = (dx + dout.astype(F32)).astype(dtype)

    (dx,), sums = over_rows(
        kernel,
        plan,
        [x, gradient, *saved],
        [*weights, *biases],
        [*weights, *biases],
        [pltpu.VMEM((rows, count * width), F32) for count in (3, 1, 1)],
        branch_scale=branch_scale,
        flops=x.size * ((16 if num_saved else 22) * width + 12 * tokens),
        name="attention_block_gradient",
    )
    return dx, Weights(*sums[:6]), bias_vjp(sums[6])[0] if biases else None, None


def _tile_gradients(q, k, v, dheads, mask, inside, head_width):
    """Return probabilities and gradients of a tile of heads.

    Rows are keys, so that sums over keys add whole tiles and stay within lanes. The
    heads of a tile lie side by side.

    Args:
      q, k, v: queries, keys and values of the tile, [W, 128].
      dheads: gradients of the outputs of the tile's heads, [W, 128].
      mask: added to the scores; contains the bias, if there is one.
      inside: see `stack_heads`.

    Returns:
      Probabilities, [W, heads * W] in the dtype of k; float32 gradients of the scores,
      [W, heads * W], and of q, k and v, [W, 128].
    """
    factor, dtype = np.float32(head_width**-0.5), k.dtype
    q, dheads = (stack_heads(x, head_width, inside, dtype) for x in (q, dheads))
    scores = dot(k, q, (1, 1)) * factor + mask
    p = jnp.exp(scores - scores.max(0, keepdims=True))
    p = p * (1 / p.sum(0, keepdims=True))
    dp = dot(v, dheads, (1, 1))
    dscores = p * (dp - (dp * p).sum(0, keepdims=True))
    ds, p = dscores.astype(dtype), p.astype(dtype)
    dq = merge_heads(dot(ds, k, (0, 0)), head_width) * factor
    return p, dscores, dq, dot(ds, q) * factor, dot(p, dheads)


def _add_weight_gradients(sums, n, x_hat, dn, dqkv, heads_out, dy):
    """Add a block's gradients of scale, bias, qkv and proj to the sums."""
    dscale, dbias, dqkv_w, dqkv_b, dproj_w, dproj_b = sums
    dscale[...] += (dn * x_hat).sum(0, keepdims=True)
    dbias[...] += dn.sum(0, keepdims=True)
    dqkv_w[...] += dot(n, dqkv.astype(dy.dtype), (0, 0))
    dqkv_b[...] += dqkv.sum(0, keepdims=True)
    dproj_w[...] += dot(heads_out.astype(dy.dtype), dy, (0, 0))
    dproj_b[...] += dy.astype(F32).sum(0, keepdims=True)


attention_block.defvjp(_forward, _backward)


def _project(x, weights, eps, qkv):
    """Write q, k, v of x to `qkv` [rows, 3C]; return the results of `layer_norm`."""
    scale, bias = weights[:2]
    x_hat, inverse_std, n = layer_norm(x, scale[...], bias[...], eps)
    qkv[...] = dot(n, weights[2][...]) + weights[3][...]
    return x_hat, inverse_std, n


def _restore(x, saved, weights, eps, scratch):
    """Fill `scratch` from `saved` or by `_project`; return results of `layer_norm`."""
    if not saved:
        return _project(x, weights, eps, scratch[0])
    for ref, array in zip(scratch, saved, strict=False):
        ref[...] = array[...].astype(F32)
    return layer_norm(x, weights[0][...], weights[1][...], eps)


def _load_tile(qkv, window, tile, width):
    """Return q, k, v of the heads in a tile of lanes, each [W, 128] float32."""
    starts = (part * width + tile * LANES for part in range(3))
    return [qkv[window, pl.ds(start, LANES)] for start in starts]
