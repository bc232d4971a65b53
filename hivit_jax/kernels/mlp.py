"""``x + fc2(gelu(fc1(LayerNorm(x))))`` in one TPU kernel, forward and backward.

Shapes: x [T, C]; C and the hidden width H multiples of 128, T of the rows of a block.
Saved for the gradient: x alone; hidden activations are computed again.

Roofline, for each row, bfloat16: 4 C bytes forward and 6 C backward, against 4 C H and
12 C H operations (8 C H without computing again); the weights once. The stem of
hivit_base (C 128 and 256, H 3 C) thus does 77 and 154 operations a byte forward, and 1
MB an image and block moves instead of 18.
"""

from functools import partial

import jax
import jax.numpy as jnp

from hivit_jax.kernels.common import (
    dot,
    gelu_slope,
    normal_cdf,
    normalized,
    normalized_gradient,
    over_rows,
)


@partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9, 10))
def mlp_block(x, scale, bias, w1, b1, w2, b2, add, eps, rows, interpret):
    """[T, C] -> [T, C].

    Args:
      scale, bias: [C] float32, of the LayerNorm.
      w1, b1, w2, b2: [C, H], [H], [H, C], [C], in x's dtype.
      add: x to the output; False: the branch alone.
      rows: that are in VMEM at a time; divide T.
      interpret: run as plain JAX operations, wherever.
    """
    weights = scale, bias, w1, b1, w2, b2

    def kernel(blocks, weights, out, _, __):
        x = blocks[0][...].astype(jnp.float32)
        _, _, hidden = _hidden(x, weights, eps)
        g = (hidden * normal_cdf(hidden)).astype(w2.dtype)
        y = dot(g, weights[4][...]) + weights[5][...]
        out[...] = (x + y if add else y).astype(out.dtype)

    out, _ = over_rows(
        kernel,
        rows,
        [x],
        weights,
        flops=4 * x.size * w1.shape[1],
        interpret=interpret,
        name="mlp_block",
    )
    return out


def _forward(x, scale, bias, w1, b1, w2, b2, add, eps, rows, interpret):
    weights = scale, bias, w1, b1, w2, b2
    return mlp_block(x, *weights, add, eps, rows, interpret), (x, *weights)


def _backward(add, eps, rows, interpret, saved, gradient):
    x, *weights = saved
    dtype = x.dtype

    def kernel(blocks, weights, out, sums, _):
        x, dy = blocks[0][...].astype(jnp.float32), blocks[1][...]
        scale, bias, w1, b1, w2, _ = weights
        x_hat, inverse, hidden = _hidden(x, weights, eps)
        n = (x_hat * scale[...] + bias[...]).astype(dtype)
        dg = dot(dy, w2[...], (1, 1))
        cdf = normal_cdf(hidden)
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
        db2[...] += dy.astype(jnp.float32).sum(0, keepdims=True)
        dx = normalized_gradient(dn * scale[...], x_hat, inverse)
        dx = dx + dy.astype(jnp.float32) if add else dx
        out[...] = dx.astype(dtype)

    out, sums = over_rows(
        kernel,
        rows,
        [x, gradient],
        weights,
        weights,
        flops=10 * x.size * weights[2].shape[1],
        interpret=interpret,
        name="mlp_block_gradient",
    )
    return out, *sums


mlp_block.defvjp(_forward, _backward)


def _hidden(x, weights, eps):
    """Normalised rows, 1 / deviation, fc1's output; float32."""
    scale, bias, w1, b1 = weights[:4]
    x_hat, inverse = normalized(x, eps)
    n = (x_hat * scale[...] + bias[...]).astype(w1.dtype)
    return x_hat, inverse, dot(n, w1[...]) + b1[...]
