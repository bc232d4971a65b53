"""``x + proj(attention(LayerNorm(x)))`` in one TPU kernel, forward and backward.

Shapes: x [B*N, C], N tokens of each of B images, which attend to each other; C a
multiple of 128, of which heads take 32, 64 or 128. Saved for the gradient: x, and where
told q, k, v and what the heads put out; or else these are computed again.

A tile has 128 lanes. A head narrower than that is cut out of its tile by zeros in the
other lanes, which costs the matrix unit nothing that padding would not. Images of few
tokens go through the softmax together, each masked from the others: 2 of 49 tokens fill
98 of 128 lanes, where one would fill 49.

Roofline, for each row, bfloat16: 4 C bytes forward and 6 C backward, and another 8 C
each way for what may be kept; the weights once. A decoder block of hivit_base moves 1
MB an image, or 2.9, and not 55, the scores of 16 heads. Arithmetic is the limit either
way; keeping spares 6 C C operations of 30 C C, and a product of scores and v.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hivit_jax.kernels.common import (
    F32,
    dot,
    layer_norm,
    normalized_gradient,
    over_rows,
)

LANES, TILE = 128, 8  # of a float32 tile


@partial(jax.custom_vjp, nondiff_argnums=tuple(range(7, 14)))
def attention_block(
    x,
    scale,
    bias,
    qkv,
    qkv_bias,
    proj,
    proj_bias,
    heads,
    tokens,
    add,
    eps,
    rows,
    keep,
    interpret,
):
    """[B*N, C] -> [B*N, C].

    Args:
      scale, bias: [C] float32, of the LayerNorm.
      qkv, qkv_bias, proj, proj_bias: [C, 3C], [3C], [C, C], [C], in x's dtype.
      heads: how many, C/heads wide each.
      tokens: N.
      add: x to the output; False: the branch alone.
      rows: that are in VMEM at a time, of whole images; divides B*N.
      keep: q, k, v and what the heads put out, for the gradient.
      interpret: run as plain JAX operations, wherever.
    """
    weights = scale, bias, qkv, qkv_bias, proj, proj_bias
    return _run(x, weights, heads, tokens, add, eps, rows, False, interpret)[0]


def _run(x, weights, heads, tokens, add, eps, rows, keep, interpret):
    """The output, and in a tuple what is to be kept: [B*N, 3C] and [B*N, C]."""
    width, dtype = x.shape[1], x.dtype

    def kernel(row_refs, weights, outs, _, room):
        qkvs, mixed = room
        x = row_refs[0][...]
        _project(x, weights, eps, qkvs)

        def attend(at, inside, pairs):
            for tile in range(width // LANES):
                here = pl.ds(tile * LANES, LANES)
                q, k, v = _tiles(qkvs, at, tile, width, dtype)
                o = mixed[at, here]
                for lanes in _lanes(q, width // heads):
                    p = _softmax(jnp.where(lanes, q, 0), k, pairs, width // heads)
                    o = jnp.where(lanes & inside, dot(p.astype(dtype), v), o)
                mixed[at, here] = o

        _each_group(rows, tokens, attend)
        y = dot(mixed[...].astype(dtype), weights[4][...]) + weights[5][...]
        outs[0][...] = (x.astype(F32) + y if add else y).astype(dtype)
        for ref, kept in zip(outs[1:], room, strict=keep):
            ref[...] = kept[...].astype(dtype)

    scratch = [pltpu.VMEM((rows, 3 * width), F32), pltpu.VMEM((rows, width), F32)]
    (out, *kept), _ = over_rows(
        kernel,
        rows,
        [x],
        weights,
        scratch=scratch,
        kept=[3 * width, width] if keep else [],
        flops=x.size * (8 * width + 4 * tokens),
        interpret=interpret,
        name="attention_block",
    )
    return out, tuple(kept)


def _forward(x, *arguments):
    weights, how = arguments[:6], arguments[6:]
    out, kept = _run(x, weights, *how)
    return out, (x, weights, kept)


def _backward(heads, tokens, add, eps, rows, keep, interpret, saved, gradient):
    x, weights, kept = saved
    width, dtype = x.shape[1], x.dtype
    factor = np.float32((width // heads) ** -0.5)

    def kernel(row_refs, weights, outs, sums, room):
        qkvs, mixed, dmixed = room  # the first becomes its gradient
        scale, bias, qkv, _, proj, _ = weights
        x, dy = row_refs[0][...], row_refs[1][...]
        if keep:
            x_hat, inverse, n = layer_norm(x, scale[...], bias[...], eps)
            for ref, kept in zip(room[:2], row_refs[2:], strict=True):
                ref[...] = kept[...].astype(F32)
        else:
            x_hat, inverse, n = _project(x, weights, eps, qkvs)
        dmixed[...] = dot(dy, proj[...], (1, 1))

        def attend(at, inside, pairs):
            for tile in range(width // LANES):
                here = pl.ds(tile * LANES, LANES)
                q, k, v = _tiles(qkvs, at, tile, width, dtype)
                do = dmixed[at, here].astype(dtype)
                o, zero = mixed[at, here], jnp.zeros(q.shape, F32)
                dq, dk, dv = zero, zero, zero
                for lanes in _lanes(q, width // heads):
                    lanes = lanes & inside
                    qh, doh = jnp.where(lanes, q, 0), jnp.where(lanes, do, 0)
                    p = _softmax(qh, k, pairs, width // heads)
                    p16 = p.astype(dtype)
                    o = o if keep else jnp.where(lanes, dot(p16, v), o)
                    dp = dot(doh, v, (1, 1))
                    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * factor
                    ds = ds.astype(dtype)
                    dq = jnp.where(lanes, dot(ds, k), dq)
                    dk += dot(ds, qh, (0, 0))  # zero but in this head's lanes
                    dv += dot(p16, doh, (0, 0))
                mixed[at, here] = o
                for part, found in enumerate((dq, dk, dv)):
                    place = pl.ds(part * width + tile * LANES, LANES)
                    qkvs[at, place] = jnp.where(inside, found, qkvs[at, place])

        _each_group(rows, tokens, attend)
        dqkv = qkvs[...]
        dqkv16 = dqkv.astype(dtype)
        dn = dot(dqkv16, qkv[...], (1, 1))
        dscale, dbias, dqkv_w, dqkv_b, dproj_w, dproj_b = sums
        dscale[...] += (dn * x_hat).sum(0, keepdims=True)
        dbias[...] += dn.sum(0, keepdims=True)
        dqkv_w[...] += dot(n, dqkv16, (0, 0))
        dqkv_b[...] += dqkv.sum(0, keepdims=True)
        dproj_w[...] += dot(mixed[...].astype(dtype), dy, (0, 0))
        dproj_b[...] += dy.astype(F32).sum(0, keepdims=True)
        dx = normalized_gradient(dn * scale[...], x_hat, inverse)
        dx = dx + dy.astype(F32) if add else dx
        outs[0][...] = dx.astype(dtype)

    (out,), sums = over_rows(
        kernel,
        rows,
        [x, gradient, *kept],
        weights,
        weights,
        [pltpu.VMEM((rows, n * width), F32) for n in (3, 1, 1)],
        flops=x.size * ((16 if keep else 22) * width + (12 if keep else 14) * tokens),
        interpret=interpret,
        name="attention_block_gradient",
    )
    return out, *sums


attention_block.defvjp(_forward, _backward)


def _project(x, weights, eps, qkvs):
    """Writes q, k, v [rows, 3C]; returns normalised rows, 1/deviation, LayerNorm."""
    scale, bias = weights[:2]
    x_hat, inverse, n = layer_norm(x, scale[...], bias[...], eps)
    qkvs[...] = dot(n, weights[2][...]) + weights[3][...]
    return x_hat, inverse, n


def _each_group(rows, tokens, attend):
    """Calls attend(window, inside, pairs) for each group of images.

    The window is the rows of the group and some of its neighbours', for it begins and
    ends where tiles do: inside [W, 1] tells which are the group's, pairs [W, W] which
    rows belong to the same image of the group.
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
        row = start + jax.lax.broadcasted_iota(jnp.int32, (window, 1), 0)
        column = start + jax.lax.broadcasted_iota(jnp.int32, (1, window), 1)
        inside = (row >= i * size) & (row < (i + 1) * size)
        pairs = False
        for first in (i * size + j * tokens for j in range(count)):
            rows_of = (row >= first) & (row < first + tokens)
            pairs |= rows_of & (column >= first) & (column < first + tokens)
        attend(pl.ds(start, window), inside, pairs)

    jax.lax.fori_loop(0, rows // size, body, None)


def _tiles(qkvs, at, tile, width, dtype):
    """q, k, v of the heads in a tile of lanes, each [rows of the group, 128]."""
    return [
        qkvs[at, pl.ds(part * width + tile * LANES, LANES)].astype(dtype)
        for part in range(3)
    ]


def _lanes(q, head):
    """The lanes of each head in a tile, as masks like q."""
    lane = jax.lax.broadcasted_iota(jnp.int32, q.shape, 1)
    return [(lane // head) == i for i in range(LANES // head)]


def _softmax(q, k, pairs, head):
    """What each row attends to, float32 [rows, rows]; others' rows to anything."""
    scores = dot(q, k, (1, 1)) * np.float32(head**-0.5)
    scores = jnp.where(pairs, scores, -1e30)
    scores = jnp.exp(scores - scores.max(-1, keepdims=True))
    return scores / scores.sum(-1, keepdims=True)
