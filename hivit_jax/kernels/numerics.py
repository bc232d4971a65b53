"""Building blocks of the kernels: static arguments, LayerNorm, GELU and matrix
products.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

F32 = jnp.float32
TILE_ROWS = 8  # rows of a float32 tile; the blocks of a TPU consist of whole tiles
# Coefficients of a polynomial in x^2. Its product with x approximates
# artanh(2 cdf(x) - 1). The fit minimizes the largest error of x cdf(x).
ARTANH_FIT = (
    7.97827577e-01,
    3.64699309e-02,
    -1.25476268e-04,
    -3.04671864e-05,
    1.11263109e-06,
)


@dataclass(frozen=True)
class Plan:
    """Static arguments of a kernel.

    eps: epsilon of the LayerNorm.
    rows: rows of a block, the part of x that a kernel processes at a time; must divide
      the rows of x. TPU kernels only.
    num_saved: number of intermediate arrays that are saved for the backward pass, which
      recomputes the others; TPU kernels only. MLP: 1 saves the output of fc1.
      Attention: 1 saves q, k and v; 2 also saves the outputs of the heads.
    interpret: run as plain JAX operations, on any backend.
    heads, tokens: attention heads, and tokens of an image; attention only.
    """

    eps: float
    rows: int = 0
    num_saved: int = 0
    interpret: bool = False
    heads: int = 1
    tokens: int = 1


class Weights(NamedTuple):
    """Parameters of a residual branch: LayerNorm, then two linear layers.

    scale, bias: [C] float32.
    w1, b1, w2, b2: [C, H], [H], [H', C], [C], in x's dtype. MLP: fc1 and fc2, with
      H' = H. Attention: qkv and proj, with H = 3C and H' = C.
    """

    scale: jax.Array
    bias: jax.Array
    w1: jax.Array
    b1: jax.Array
    w2: jax.Array
    b2: jax.Array


def scale_branches(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Multiply the rows of each image by the image's factor.

    Args:
      x: [B*T, C] or [B, T, C].
      scale: [B].
    """
    rows_per_image = math.prod(x.shape[:-1]) // max(len(scale), 1)
    # x becomes a matrix, because XLA:TPU pads the tokens of [B, T, C] to whole tiles.
    matrix = x.reshape(-1, x.shape[-1]) * jnp.repeat(scale, rows_per_image)[:, None]
    return matrix.reshape(x.shape)


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """Contract axis contract[0] of a with axis contract[1] of b; return float32.

    For float32 inputs, the precision is the highest, whatever JAX's default is. For
    bfloat16 inputs there is only one precision.
    """
    dims = (((contract[0],), (contract[1],)), ((), ()))
    precision = "highest" if a.dtype == F32 else "default"
    return jax.lax.dot_general(a, b, dims, precision, preferred_element_type=F32)


def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """LayerNorm of x [T, C]; scale and bias are [1, C].

    Returns:
      x_hat: normalized rows before scale and bias, [T, C] float32.
      inverse_std: inverse standard deviation of each row, [T, 1] float32.
      n: ``x_hat * scale + bias``, [T, C] in x's dtype.
    """
    x32 = x.astype(F32)
    centered = x32 - x32.mean(-1, keepdims=True)
    inverse_std = jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + eps)
    x_hat = centered * inverse_std
    return x_hat, inverse_std, (x_hat * scale + bias).astype(x.dtype)


def normalize_vjp(
    gradient: jax.Array, x_hat: jax.Array, inverse_std: jax.Array
) -> jax.Array:
    """Return the gradient of x, given the gradient of x_hat; see `layer_norm`."""
    projection = (gradient * x_hat).mean(-1, keepdims=True)
    return inverse_std * (
        gradient - gradient.mean(-1, keepdims=True) - x_hat * projection
    )


def normalize_jvp(
    tangent: jax.Array, x_hat: jax.Array, inverse_std: jax.Array
) -> jax.Array:
    """Return the tangent of x_hat, given the tangent of x; see `layer_norm`.

    JAX transposes this function, which results in `normalize_vjp`. The transpose of
    ``a - mean`` would negate an array [T, C]. The transpose of ``a + (-mean)`` negates
    only the means, [T, 1].
    """
    tangent = inverse_std * tangent
    projection = -(tangent * x_hat).mean(-1, keepdims=True)
    return tangent + -tangent.mean(-1, keepdims=True) + x_hat * projection


def normal_cdf(x: jax.Array, dtype: Any = F32) -> jax.Array:
    """Cumulative distribution function of the standard normal distribution in float32.

    GELU(x) is x times this function, as in PyTorch.

    Args:
      dtype: dtype to which the caller rounds GELU. For float32, the function uses erf,
        which is exact. For bfloat16, it uses a fitted tanh, with which GELU is off by
        at most 3e-6. TPUs have a unit for tanh, whereas the many operations of erf
        would take longer than the matrix products of a narrow block.
    """
    if dtype == F32:
        return 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))
    return 0.5 + 0.5 * jnp.tanh(_artanh_of_cdf(x))


def normal_cdf_by_exp(x: jax.Array) -> jax.Array:
    """Compute `normal_cdf` for bfloat16 by operations that are fast on GPUs.

    The fitted tanh is computed by an exponential and a reciprocal square root. GPUs
    have units for these two, whereas XLA:GPU computes erf, tanh and divisions by many
    operations. `models.layers.gelu` uses this function.
    """
    return jnp.square(jax.lax.rsqrt(1.0 + jnp.exp(-2.0 * _artanh_of_cdf(x))))


def _artanh_of_cdf(x):
    """Approximate artanh(2 cdf(x) - 1), where cdf is `normal_cdf`."""
    square, y = jnp.square(x), ARTANH_FIT[-1]
    for coefficient in ARTANH_FIT[-2::-1]:
        y = y * square + coefficient
    return x * y


def gelu_slope(x: jax.Array, cdf: jax.Array) -> jax.Array:
    """Derivative of GELU at x, given ``cdf = normal_cdf(x)``."""
    return cdf + x * jnp.exp(-0.5 * jnp.square(x)) * math.sqrt(0.5 / math.pi)
