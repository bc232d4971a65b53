"""LayerNorm and batch normalization."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType

from hivit_jax.kernels.numerics import normalized_gradient


class LayerNorm(nnx.LayerNorm):
    """LayerNorm of the last axis, [..., C] -> [..., C].

    Computes the variance in two passes, because the one-pass formula loses the small
    variances that eps=1e-6 is meant for. Saves the input and each row's mean and
    inverse standard deviation for the backward pass; the library's saves three arrays.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        params = self.scale[...], self.bias[...]
        return layer_norm(x, *params, self.epsilon, self.dtype or x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float, dtype: jnp.dtype
) -> jax.Array:
    """`LayerNorm` of x [..., C] by scale and bias [C], in `dtype`."""
    return _layer_norm_forward(x, scale, bias, eps, dtype)[0]


def _layer_norm_forward(x, scale, bias, eps, dtype):
    x32 = x.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(x32 - mean).mean(-1, keepdims=True) + eps)
    y = (x32 - mean) * inverse * scale + bias
    return y.astype(dtype), (x, scale, mean, inverse)


def _layer_norm_backward(eps, dtype, saved, gradient):
    # Without this, XLA:GPU recomputes mean and deviation with every use, and saves the
    # addends of the scale's gradient in float32.
    x, scale, mean, inverse = jax.lax.optimization_barrier(saved)
    gradient = gradient.astype(jnp.float32)
    x_hat = (x.astype(jnp.float32) - mean) * inverse
    rows = tuple(range(x.ndim - 1))
    dx = normalized_gradient(gradient * scale, x_hat, inverse).astype(x.dtype)
    return dx, (gradient * x_hat).sum(rows), gradient.sum(rows)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class BatchNorm(nnx.Module):
    """Batch normalization of the last axis over all others, as PyTorch computes it.

    `nnx.BatchNorm` keeps the biased running variance, and counts every example.

    Args:
      epsilon: added to the variance.
      momentum: share of a batch in the running statistics.
      affine: learn a scale and a bias.
    """

    def __init__(
        self,
        dim: int,
        *,
        epsilon: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
    ):
        self.epsilon, self.momentum = epsilon, momentum
        self.mean = nnx.BatchStat(jnp.zeros(dim))
        self.var = nnx.BatchStat(jnp.ones(dim))
        self.scale = nnx.Param(jnp.ones(dim)) if affine else None
        self.bias = nnx.Param(jnp.zeros(dim)) if affine else None

    def __call__(self, x: jax.Array, weight: jax.Array | None = None) -> jax.Array:
        """Normalize, [B, ..., C] -> [B, ..., C] in the dtype of `x`.

        Args:
          weight: [B], of a training batch: normalize by the statistics of the global
            batch and move the running ones. Examples of weight 0 do not count. None:
            normalize by the running statistics.
        """
        x32 = x.astype(jnp.float32)
        if weight is None:
            mean, var = self.mean[...], self.var[...]
        else:
            mean, var, count = batch_statistics(x32, weight)
            unbiased = var * count / jnp.maximum(count - 1, 1.0)
            # A batch without examples leaves the running statistics as they are.
            share = self.momentum * (count > 0)
            for running, new in ((self.mean, mean), (self.var, unbiased)):
                old, new = running[...], jax.lax.stop_gradient(new)
                running[...] = old + share * (new - old)
        y = (x32 - mean) * jax.lax.rsqrt(var + self.epsilon)
        if self.scale is not None:
            y = y * self.scale[...] + self.bias[...]
        return y.astype(x.dtype)


def batch_statistics(
    x: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean [C], biased variance [C] and number of the weighted elements of a channel,
    over the batch of all devices.

    Args:
      x: float32 [B, ..., C].
      weight: [B].
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    manual = tuple(name for name, kind in kinds if kind == AxisType.Manual)

    def total(values):  # inside `shard_map` a device sees only its own examples
        return jax.lax.psum(values, manual) if manual else values

    axes = tuple(range(x.ndim - 1))
    weight = weight.reshape(-1, *[1] * (x.ndim - 1))
    count = total(weight.sum()) * (x.size // x.shape[0] // x.shape[-1])
    divisor = jnp.maximum(count, 1.0)
    mean = total((weight * x).sum(axes)) / divisor
    var = total((weight * jnp.square(x - mean)).sum(axes)) / divisor
    return mean, var, count
