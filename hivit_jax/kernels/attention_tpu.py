"""``x + proj(attention(LayerNorm(x)))`` in one TPU kernel, forward and backward.

Shapes: x [B*N, C], N tokens of each of B images, which attend to each other; C a
multiple of 128, of which heads take 32, 64 or 128. Saved for the backward pass: x, and
with `Plan.keep` q, k, v and the heads' outputs, which are otherwise recomputed.

A tile has 128 lanes. A head narrower than that is cut out of its tile by zeros in the
other lanes, which costs the matrix unit nothing that padding would not. Images of few
tokens go through the softmax together, each masked from the others: 2 of 49 tokens fill
98 of 128 lanes, where one would fill 49.

Forward, queries are rows, and the division by the sums waits until the heads of a tile
are together. Backward, keys are rows and the heads of a tile lie side by side:
fewer, larger products keep four matrix units busy while vectors work on the softmax,
and only one of the three that follow it has to be given a transposed operand.

Roofline, for each row, bfloat16: 4 C bytes forward and 6 C backward, and another 8 C
each way for what may be kept; the weights once. A decoder block of hivit_base moves 1
MB an image, or 2.9, and not 55, the scores of 16 heads. Arithmetic is the limit either
way; keeping spares 6 C C operations of 30 C C, and a product of scores and v.
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

LANES, TILE = 128, 8  # of a float32 tile


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def attention_block(x: jax.Array, weights: Weights, plan: Plan) -> jax.Array:
    """[B*N, C] -> [B*N, C]; the plan's rows are whole images."""
    return _run(x, weights, replace(plan, keep=False))[0]


def _run(x, weights, plan):
    """The output, and a tuple of the kept arrays: [B*N, 3C] and [B*N, C]."""
    heads, tokens, rows = plan.heads, plan.tokens, plan.rows
    width, dtype = x.shape[1], x.dtype
    head = width // heads
    factor = np.float32(head**-0.5)

    def kernel(row_refs, weights, outs, _, room):
        qkvs, mixed = room
        x = row_refs[0][...]
        _project(x, weights, plan.eps, qkvs)

        def attend(at, inside, apart):
            others = apart(1)  # [W or 1, W]: queries are rows, keys columns
            for tile in range(width // LANES):
                here = pl.ds(tile * LANES, LANES)
                q, k, v = _tiles(qkvs, at, tile, width)
                k, v = k.astype(dtype), v.astype(dtype)
                o, total = mixed[at, here], jnp.ones(q.shape, F32)
                for lanes in _lanes(head):
                    qh = jnp.where(lanes, q, 0.0).astype(dtype)
                    p = dot(qh, k, (1, 1)) * factor + others  # [W, W]
                    p = jnp.exp(p - p.max(-1, keepdims=True))
                    # Divided by their sums when there is but one column for each lane.
                    lanes = lanes & inside
                    o = jnp.where(lanes, dot(p.astype(dtype), v), o)
                    total = jnp.where(lanes, p.sum(-1, keepdims=True), total)
                mixed[at, here] = o / total

        _each_group(rows, tokens, attend)
        y = dot(mixed[...].astype(dtype), weights[4][...]) + weights[5][...]
        outs[0][...] = (x.astype(F32) + y if plan.add else y).astype(dtype)
        for ref, kept in zip(outs[1:], room, strict=plan.keep):
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
    heads, tokens, rows, keep = plan.heads, plan.tokens, plan.rows, plan.keep
    width, dtype = x.shape[1], x.dtype
    head = width // heads

    def kernel(row_refs, weights, outs, sums, room):
        qkvs, mixed, dmixed = room  # the first becomes its gradient
        scale, bias, qkv, _, proj, _ = weights
        x, dy = row_refs[0][...], row_refs[1][...]
        if keep:
            x_hat, inverse, n = layer_norm(x, scale[...], bias[...], plan.eps)
            for ref, kept in zip(room[:2], row_refs[2:], strict=True):
                ref[...] = kept[...].astype(F32)
        else:
            x_hat, inverse, n = _project(x, weights, plan.eps, qkvs)
        dmixed[...] = dot(dy, proj[...], (1, 1))

        def attend(at, inside, apart):
            others = apart(0, LANES // head)  # [W, heads * W or 1]
            for tile in range(width // LANES):
                here = pl.ds(tile * LANES, LANES)
                q, k, v = _tiles(qkvs, at, tile, width)
                q, do = (_heads(x, head, inside, dtype) for x in (q, dmixed[at, here]))
                k, v = k.astype(dtype), v.astype(dtype)
                p, dq, dk, dv = _tile_gradients(q, k, v, do, others, head)
                if not keep:
                    o = _together(dot(p, v, (0, 0)), head)
                    mixed[at, here] = jnp.where(inside, o, mixed[at, here])
                for part, found in enumerate((dq, dk, dv)):
                    columns = pl.ds(part * width + tile * LANES, LANES)
                    qkvs[at, columns] = jnp.where(inside, found, qkvs[at, columns])

        _each_group(rows, tokens, attend)
        dn = dot(qkvs[...].astype(dtype), qkv[...], (1, 1))
        _add_weight_gradients(sums, n, x_hat, dn, qkvs[...], mixed[...], dy)
        dx = normalized_gradient(dn * scale[...], x_hat, inverse)
        dx = dx + dy.astype(F32) if plan.add else dx
        outs[0][...] = dx.astype(dtype)

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


def _tile_gradients(q, k, v, do, others, head):
    """Return probabilities [W, heads * W] and the gradients of q, k and v, [W, 128].

    Keys are rows and the heads of a tile lie side by side, because sums over keys then
    add whole tiles and stay within lanes, and because few large products keep all
    matrix units busy. q and do are `_heads` of a tile, k and v the tile itself; the
    gradients are float32.
    """
    factor = np.float32(head**-0.5)
    p = dot(k, q, (1, 1)) * factor + others
    p = jnp.exp(p - p.max(0, keepdims=True))
    p = p * (1 / p.sum(0, keepdims=True))
    dp = dot(v, do, (1, 1))
    ds = (p * (dp - (dp * p).sum(0, keepdims=True))).astype(q.dtype)
    p = p.astype(q.dtype)
    dq = _together(dot(ds, k, (0, 0)), head) * factor
    return p, dq, dot(ds, q) * factor, dot(p, do)


def _add_weight_gradients(sums, n, x_hat, dn, dqkv, mixed, dy):
    """Add a block's gradients of scale, bias, qkv and proj to the sums."""
    dscale, dbias, dqkv_w, dqkv_b, dproj_w, dproj_b = sums
    dscale[...] += (dn * x_hat).sum(0, keepdims=True)
    dbias[...] += dn.sum(0, keepdims=True)
    dqkv_w[...] += dot(n, dqkv.astype(dy.dtype), (0, 0))
    dqkv_b[...] += dqkv.sum(0, keepdims=True)
    dproj_w[...] += dot(mixed.astype(dy.dtype), dy, (0, 0))
    dproj_b[...] += dy.astype(F32).sum(0, keepdims=True)


attention_block.defvjp(_forward, _backward)


def _project(x, weights, eps, qkvs):
    """Writes q, k, v [rows, 3C]; returns normalized rows, 1/deviation, LayerNorm."""
    scale, bias = weights[:2]
    x_hat, inverse, n = layer_norm(x, scale[...], bias[...], eps)
    qkvs[...] = dot(n, weights[2][...]) + weights[3][...]
    return x_hat, inverse, n


def _each_group(rows, tokens, attend):
    """Calls attend(window, inside, apart) for each group of images.

    The window is the rows of the group and some of its neighbors', for it begins and
    ends where tiles do; inside [W, 1] tells which are the group's. apart(axis) is to be
    added to scores [W, W] whose keys are along that axis, -1e30 where a key is of
    another image than the query, or else 0; apart(axis, heads) if there are `heads` of
    these side by side. Of a group of one image it is the same for all queries: 1 long.
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

        def image(axis, heads=1):
            """The image of the group that a row is of, along an axis; or -1."""
            shape = [1, 1]
            shape[axis] = heads * window
            place = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
            place = (place % window if heads > 1 else place) + start - i * size
            found = jnp.full(shape, -1)
            for j in range(count):
                here = (place >= j * tokens) & (place < (j + 1) * tokens)
                found = jnp.where(here, j, found)
            return found

        def apart(axis, heads=1):
            keys = image(axis)
            same = keys >= 0 if count == 1 else keys == image(1 - axis, heads)
            return jnp.where(same, 0.0, -1e30)

        attend(pl.ds(start, window), image(0) >= 0, apart)

    jax.lax.fori_loop(0, rows // size, body, None)


def _tiles(qkvs, at, tile, width):
    """q, k, v of the heads in a tile of lanes, each [W, 128] float32."""
    return [qkvs[at, pl.ds(part * width + tile * LANES, LANES)] for part in range(3)]


def _lanes(head):
    """The lanes [1, 128] of each head in a tile, as masks."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    return [(lane // head) == i for i in range(LANES // head)]


def _heads(x, head, inside, dtype):
    """Heads of a tile below one another: [W, 128] -> [heads * W, 128], zeros in the
    lanes of others and in rows that are not inside.
    """
    parts = [jnp.where(lanes & inside, x, 0.0) for lanes in _lanes(head)]
    return jnp.concatenate(parts).astype(dtype)


def _together(x, head):
    """The other way round, [heads * W, 128] -> [W, 128]: of each head its lanes."""
    window = len(x) * head // LANES
    total = x[:window]
    for i, lanes in enumerate(_lanes(head)):
        total = jnp.where(lanes, x[i * window : (i + 1) * window], total)
    return total
