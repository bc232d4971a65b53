"""LayerNorm and batch normalization."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType

from hivit_jax.kernels.numerics import normalize_jvp
from hivit_jax.models.arguments import check_shape


class LayerNorm(nnx.LayerNorm):
    """LayerNorm of the last axis, [..., C] -> [..., C].

    Computes the variance in two passes, because the one-pass formula loses the small
    variances that eps=1e-6 is meant for. Saves the input and each row's mean and
    inverse standard deviation for the backward pass. `nnx.LayerNorm` saves three
    float32 arrays of the input's shape.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        params = self.scale[...], self.bias[...]
        return layer_norm(x, *params, self.epsilon, self.dtype or x.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float, dtype: jnp.dtype
) -> jax.Array:
    """Return the LayerNorm of x, [..., C] -> [..., C] in `dtype`; scale, bias: [C]."""
    return _layer_norm(x, scale, bias, eps, dtype)[0]


def _layer_norm(x, scale, bias, eps, dtype):
    """Return the LayerNorm, and mean and inverse standard deviation of each row."""
    scale, bias = (_like_rows(w, x) for w in (scale, bias))
    x32 = x.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True)
    inverse_std = jax.lax.rsqrt(jnp.square(x32 - mean).mean(-1, keepdims=True) + eps)
    y = (x32 - mean) * inverse_std * scale + bias
    return y.astype(dtype), mean, inverse_std


@layer_norm.defjvp
def _layer_norm_jvp(eps, dtype, primals, tangents):
    y, mean, inverse_std = _layer_norm(*primals, eps, dtype)

    # The backward pass transposes `output_tangent`. Because of `jax.checkpoint`, the
    # normalized rows are recomputed from the arguments instead of saved.
    @partial(jax.checkpoint, prevent_cse=False)
    def output_tangent(residuals, dx, dscale, dbias):
        # Without the barrier, XLA:GPU recomputes mean and inverse_std at every use, and
        # writes the summands of the scale's gradient to memory in float32.
        x, scale, mean, inverse_std = jax.lax.optimization_barrier(residuals)
        x_hat = (x.astype(jnp.float32) - mean) * inverse_std
        dx_hat = normalize_jvp(dx.astype(jnp.float32), x_hat, inverse_std)
        scale, dscale, dbias = (_like_rows(w, x) for w in (scale, dscale, dbias))
        return (dx_hat * scale + x_hat * dscale + dbias).astype(dtype)

    x, scale, _ = primals
    return y, output_tangent((x, scale, mean, inverse_std), *tangents)


def _like_rows(vector, x):
    """Reshape a vector [C] to [1, ..., 1, C], with as many axes as x."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


class BatchNorm(nnx.Module):
    """Batch normalization of the last axis, as in PyTorch.

    The running variance is unbiased, and examples can have weight 0. In contrast,
    `nnx.BatchNorm` stores the biased variance and counts every example.

    Args:
      epsilon: added to the variance.
      momentum: weight of the current batch in the running statistics.
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
        """Return normalized x, [B, ..., C] -> [B, ..., C] in the dtype of x.

        Args:
          weight: [B], weights of the examples of a training batch. Examples of weight 0
            do not count. x is normalized by the statistics of the global batch, and the
            running statistics are updated. None (evaluation): x is normalized by the
            running statistics.
        """
        x32 = x.astype(jnp.float32)
        if weight is None:
            # Without stop_gradient, a user who differentiates with respect to all
            # variables would train the running statistics.
            mean, var = jax.lax.stop_gradient((self.mean[...], self.var[...]))
        else:
            mean, var, count = batch_statistics(x32, weight)
            unbiased_var = var * count / jnp.maximum(count - 1, 1.0)
            # A batch without examples changes no running statistics.
            momentum = self.momentum * (count > 0)
            for running, new in ((self.mean, mean), (self.var, unbiased_var)):
                old, new = running[...], jax.lax.stop_gradient(new)
                running[...] = old + momentum * (new - old)
        mean, var = (_like_rows(v, x) for v in (mean, var))
        y = (x32 - mean) * jax.lax.rsqrt(var + self.epsilon)
        if self.scale is not None:
            y = y * _like_rows(self.scale[...], x) + _like_rows(self.bias[...], x)
        return y.astype(x.dtype)


def batch_statistics(
    x: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return weighted statistics of each channel over the global batch.

    Args:
      x: float32 [B, ..., C].
      weight: [B].

    Returns:
      Mean [C], biased variance [C], and the weighted number of elements per channel:
      sum(weight) times the positions per example, a scalar.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axis_types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    manual = tuple(name for name, type_ in axis_types if type_ == AxisType.Manual)

    def global_sum(values):
        # Inside `shard_map` a device has only its own examples.
        return jax.lax.psum(values, manual) if manual else values

    check_shape("weight", weight, "[B]", len(x))
    axes = tuple(range(x.ndim - 1))
    weight = weight.reshape(-1, *[1] * (x.ndim - 1))
    count = global_sum(weight.sum()) * math.prod(x.shape[1:-1])
    divisor = jnp.maximum(count, 1.0)
    mean = global_sum((weight * x).sum(axes)) / divisor
    var = global_sum((weight * jnp.square(x - _like_rows(mean, x))).sum(axes)) / divisor
    return mean, var, count
