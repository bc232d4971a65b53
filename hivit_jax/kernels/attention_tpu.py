"""Attention branch ``x + proj(attention(LayerNorm(x)))`` as one TPU kernel, forward and
backward.

Shapes: x is [B*N, C], with N tokens of each of B images. Tokens attend to the tokens of
their image. C is a multiple of 128, and heads are 32, 64 or 128 wide. The forward pass
saves x, and with `Plan.keep` also q, k, v and the outputs of the heads, which are
otherwise recomputed.

A tile has 128 lanes. A narrower head is cut out of its tile by zeros in the lanes of
the other heads, which costs the matrix unit no more than padding would. Images of few
tokens share a softmax, in which they are masked from each other. Two images of 49
tokens fill 98 of 128 lanes; one would fill 49.

In the forward pass queries are rows. In the backward pass keys are rows and the heads
of a tile lie side by side. The products are then fewer and larger and keep four matrix
units busy while the vector units compute the softmax. Only one of the three products
after the softmax needs a transposed operand.

Roofline for each row in bfloat16: 4 C bytes forward and 6 C backward, and 8 C more in
each pass with `Plan.keep`. Weights are read once. A decoder block of hivit_base moves 1
MB an image, or 2.9 MB with `Plan.keep`. The scores of its 16 heads would move 55 MB.
The kernel is compute-bound either way. `Plan.keep` saves 6 C C of 30 C C operations,
and one product of scores and v.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hivit_jax.kernels.numerics import (
    F32,
    Plan,
    Weights,
    dot,
    layer_norm,
    normalized_gradient,
    over_rows,
)

LANES, TILE = 128, 8  # columns and rows of a float32 tile


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def attention_block(x: jax.Array, weights: Weights, plan: Plan) -> jax.Array:
    """Run the attention branch, [B*N, C] -> [B*N, C].

    `plan.rows` must be a multiple of N, so that blocks hold whole images.
    """
    return _run(x, weights, replace(plan, keep=False))[0]


def _run(x, weights, plan):
    """Return the output and a tuple of the saved arrays.

    With `plan.keep` these are q, k and v, [B*N, 3C], and the heads' outputs, [B*N, C].
    """
    tokens, rows = plan.tokens, plan.rows
    width, dtype = x.shape[1], x.dtype
    head = width // plan.heads
    factor = np.float32(head**-0.5)

    def kernel(row_refs, weights, out_refs, _, scratch):
        qkv, heads_out = scratch
        x = row_refs[0][...]
        _project(x, weights, plan.eps, qkv)

        def attend(window, inside, score_mask):
            mask = score_mask(1)  # [W or 1, W]: queries are rows, keys columns
            for tile in range(width // LANES):
                columns = pl.ds(tile * LANES, LANES)
                q, k, v = _load_tile(qkv, window, tile, width)
                k, v = k.astype(dtype), v.astype(dtype)
                o, total = heads_out[window, columns], jnp.ones(q.shape, F32)
                for lanes in _head_lanes(head):
                    qh = jnp.where(lanes, q, 0.0).astype(dtype)
                    p = dot(qh, k, (1, 1)) * factor + mask  # [W, W]
                    p = jnp.exp(p - p.max(-1, keepdims=True))
                    # The merged heads are divided by the sums below, because this is
                    # one division for a tile instead of one for each head.
                    lanes = lanes & inside
                    o = jnp.where(lanes, dot(p.astype(dtype), v), o)
                    total = jnp.where(lanes, p.sum(-1, keepdims=True), total)
                heads_out[window, columns] = o / total

        _for_each_group(rows, tokens, attend)
        y = dot(heads_out[...].astype(dtype), weights[4][...]) + weights[5][...]
        out_refs[0][...] = (x.astype(F32) + y if plan.add else y).astype(dtype)
        for ref, kept in zip(out_refs[1:], scratch, strict=plan.keep):
            ref[...] = kept[...].astype(dtype)

    scratch = [pltpu.VMEM((rows, 3 * width), F32), pltpu.VMEM((rows, width), F32)]
    (out, *kept), _ = over_rows(
        kernel,
        plan,
        [x],
        weights,
        scratch=scratch,
        kept=[3 * width, width] if plan.keep else [],
        flops=x.size * (8 * width + 4 * tokens),
        name="attention_block",
    )
    return out, tuple(kept)


def _forward(x, weights, plan):
    out, kept = _run(x, weights, plan)
    return out, (x, weights, kept)


def _backward(plan, saved, gradient):
    x, weights, kept = saved
    tokens, rows, keep = plan.tokens, plan.rows, plan.keep
    width, dtype = x.shape[1], x.dtype
    head = width // plan.heads

    def kernel(row_refs, weights, out_refs, sums, scratch):
        qkv, heads_out, dheads_out = scratch  # qkv is overwritten by its gradient
        scale, bias, qkv_w, _, proj_w, _ = weights
        x, dy = row_refs[0][...], row_refs[1][...]
        if keep:
            x_hat, inverse, n = layer_norm(x, scale[...], bias[...], plan.eps)
            for ref, kept in zip(scratch[:2], row_refs[2:], strict=True):
                ref[...] = kept[...].astype(F32)
        else:
            x_hat, inverse, n = _project(x, weights, plan.eps, qkv)
        dheads_out[...] = dot(dy, proj_w[...], (1, 1))

        def attend(window, inside, score_mask):
            mask = score_mask(0, LANES // head)  # [W, heads * W or 1]: keys are rows
            for tile in range(width // LANES):
                columns = pl.ds(tile * LANES, LANES)
                q, k, v = _load_tile(qkv, window, tile, width)
                do = dheads_out[window, columns]
                q, do = (_stack_heads(x, head, inside, dtype) for x in (q, do))
                k, v = k.astype(dtype), v.astype(dtype)
                p, *gradients = _tile_gradients(q, k, v, do, mask, head)
                if not keep:
                    o = _merge_heads(dot(p, v, (0, 0)), head)
                    o = jnp.where(inside, o, heads_out[window, columns])
                    heads_out[window, columns] = o
                for part, new in enumerate(gradients):
                    columns = pl.ds(part * width + tile * LANES, LANES)
                    qkv[window, columns] = jnp.where(inside, new, qkv[window, columns])

        _for_each_group(rows, tokens, attend)
        dn = dot(qkv[...].astype(dtype), qkv_w[...], (1, 1))
        _add_weight_gradients(sums, n, x_hat, dn, qkv[...], heads_out[...], dy)
        dx = normalized_gradient(dn * scale[...], x_hat, inverse)
        dx = dx + dy.astype(F32) if plan.add else dx
        out_refs[0][...] = dx.astype(dtype)

    (out,), sums = over_rows(
        kernel,
        plan,
        [x, gradient, *kept],
        weights,
        weights,
        [pltpu.VMEM((rows, n * width), F32) for n in (3, 1, 1)],
        flops=x.size * ((16 if keep else 22) * width + (12 if keep else 14) * tokens),
        name="attention_block_gradient",
    )
    return out, Weights(*sums)


def _tile_gradients(q, k, v, do, mask, head):
    """Return probabilities [W, heads * W] and the gradients of q, k and v, [W, 128].

    Keys are rows and the heads of a tile lie side by side, because sums over keys then
    add whole tiles and stay within lanes.

    Args:
      q, do: queries and gradients of the outputs, from `_stack_heads`.
      k, v: keys and values of the tile, [W, 128].
      mask: added to the scores.
    """
    factor = np.float32(head**-0.5)
    p = dot(k, q, (1, 1)) * factor + mask
    p = jnp.exp(p - p.max(0, keepdims=True))
    p = p * (1 / p.sum(0, keepdims=True))
    dp = dot(v, do, (1, 1))
    ds = (p * (dp - (dp * p).sum(0, keepdims=True))).astype(q.dtype)
    p = p.astype(q.dtype)
    dq = _merge_heads(dot(ds, k, (0, 0)), head) * factor
    return p, dq, dot(ds, q) * factor, dot(p, do)


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
    x_hat, inverse, n = layer_norm(x, scale[...], bias[...], eps)
    qkv[...] = dot(n, weights[2][...]) + weights[3][...]
    return x_hat, inverse, n


def _for_each_group(rows, tokens, attend):
    """Call attend(window, inside, score_mask) for each group of images in a block.

    The images of a group share a softmax. The arguments of `attend` are:

    - window: slice of W rows that contains the group. It starts and ends at a tile, and
      so may contain rows of neighboring groups.
    - inside: bool [W, 1], True for rows of the group.
    - score_mask(axis, heads=1): returns the float32 mask to add to scores [W, W] with
      keys along `axis`: 0 if key and query are of the same image, else -1e30. With
      `heads` > 1 the scores of so many heads lie side by side. For a group of one image
      the mask is the same for all queries and has length 1 along their axis.
    """
    images = rows // tokens
    count = max(1, LANES // tokens)
    while images % count:
        count -= 1
    size = count * tokens
    window = min(rows, -(-(size + TILE - 1) // TILE) * TILE)

    def body(i, _):
        start = jnp.minimum(i * size // TILE * TILE, rows - window)
        start = pl.multiple_of(start, TILE)

        def image_index(axis, heads=1):
            """Return the index of each row's image in the group; -1 outside of it."""
            shape = [1, 1]
            shape[axis] = heads * window
            row = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
            row = (row % window if heads > 1 else row) + start - i * size
            index = jnp.full(shape, -1)
            for j in range(count):
                in_image = (row >= j * tokens) & (row < (j + 1) * tokens)
                index = jnp.where(in_image, j, index)
            return index

        def score_mask(axis, heads=1):
            keys = image_index(axis)
            same = keys >= 0 if count == 1 else keys == image_index(1 - axis, heads)
            return jnp.where(same, 0.0, -1e30)

        attend(pl.ds(start, window), image_index(0) >= 0, score_mask)

    jax.lax.fori_loop(0, rows // size, body, None)


def _load_tile(qkv, window, tile, width):
    """Return q, k, v of the heads in a tile of lanes, each [W, 128] float32."""
    starts = (part * width + tile * LANES for part in range(3))
    return [qkv[window, pl.ds(start, LANES)] for start in starts]


def _head_lanes(head):
    """Return masks [1, 128] of the lanes of a tile, one for each head."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    return [(lane // head) == i for i in range(LANES // head)]


def _stack_heads(x, head, inside, dtype):
    """Stack the heads of a tile, [W, 128] -> [heads * W, 128].

    Lanes of other heads and rows that are not inside are zero.
    """
    parts = [jnp.where(lanes & inside, x, 0.0) for lanes in _head_lanes(head)]
    return jnp.concatenate(parts).astype(dtype)


def _merge_heads(x, head):
    """Undo `_stack_heads`, [heads * W, 128] -> [W, 128], with each head's own lanes."""
    window = len(x) * head // LANES
    merged = x[:window]
    for i, lanes in enumerate(_head_lanes(head)):
        merged = jnp.where(lanes, x[i * window : (i + 1) * window], merged)
    return merged
