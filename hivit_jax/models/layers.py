"""Layers of HiViT: linear, LayerNorm, GELU, drop path, MLP, attention, patch embedding
and merge.

Parameters are float32. `dtype` is the dtype of matrix products and of the outputs of
blocks; LayerNorm statistics and the softmax are always float32.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType

from hivit_jax import kernels
from hivit_jax.kernels.common import gelu_slope, normal_cdf, normalized_gradient
from hivit_jax.models import positions
from hivit_jax.models.positions import Grid
from hivit_jax.models.windows import Windows

# Official: trunc_normal_(std=.02) cut at +-2 absolute, that is at 100 sigma.
INIT = nnx.initializers.normal(0.02)


class ParameterKeys:
    """Keys to draw parameters from, those of ``nnx.Rngs(seed)``, counted on the host.

    `nnx.Rngs` counts in an array. Inside `jax.eval_shape` and `jax.jit` every count
    makes JAX search the program traced so far, 5 s for HiViT-B.

    Args:
      seed: integer or key.
    """

    def __init__(self, seed: int | jax.Array):
        self.key = jax.random.key(seed) if isinstance(seed, int) else seed
        self.drawn = 0

    def params(self) -> jax.Array:
        """The next key."""
        self.drawn += 1
        return jax.random.fold_in(self.key, self.drawn - 1)


class RowLinear(nnx.Linear):
    """[..., C] -> [..., D], as one product of all rows.

    With more than two axes XLA:CPU would transpose the operands of a weight's gradient
    one number at a time, and XLA:TPU would pad the tokens of every image to whole
    tiles.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        rows = super().__call__(x.reshape(-1, x.shape[-1]))
        return rows.reshape(*x.shape[:-1], self.out_features)


Linear = partial(RowLinear, kernel_init=INIT)


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


class FixedTable(nnx.Variable):
    """A table that is stored and counted with the parameters but never trained."""


def drop_path(
    x: jax.Array,
    drop_path_rate: float | jax.Array | None,
    drop_path_keys: jax.Array | None,
    branch_index: int | jax.Array,
) -> jax.Array:
    """Drop the residual branch of whole samples (stochastic depth).

    Args:
      x: [B*T, C] or [B, T, C], the branch.
      drop_path_rate: probability of dropping; a kept branch is divided by ``1 - rate``.
        None: nothing is dropped.
      drop_path_keys: [B] keys, one per sample, or None for no dropping.
      branch_index: number of the branch, so that no two branches share a draw.
    """
    if drop_path_rate is None or drop_path_keys is None:
        return x
    keep_prob = 1 - jnp.float32(drop_path_rate)

    def keep(key):
        return jax.random.bernoulli(jax.random.fold_in(key, branch_index), keep_prob)

    scale = jax.vmap(keep)(drop_path_keys).astype(x.dtype) / keep_prob.astype(x.dtype)
    per_sample = x.reshape(len(scale), -1, x.shape[-1])
    return (per_sample * scale[:, None, None]).reshape(x.shape)


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU. Saves one array for the backward pass; `jax.nn.gelu` saves three."""
    return x * normal_cdf(x)


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    cdf = normal_cdf(x)
    return x * cdf, tangent * gelu_slope(x, cdf)


class Mlp(nnx.Module):
    """fc1, exact (erf) GELU, fc2: [..., C] -> [..., C]."""

    def __init__(self, dim: int, ratio: float, *, dtype, rngs: nnx.Rngs):
        hidden = int(dim * ratio)
        self.fc1 = Linear(dim, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(hidden, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = self.fc1(x.reshape(-1, x.shape[-1]))
        return self.fc2(gelu(hidden)).reshape(x.shape)


class Attention(nnx.Module):
    """Multi-head self-attention over units, with optional relative position bias.

    Args:
      grid: the units that relative positions span, all or those of a window; None for
        no bias.
      windows: attend only inside these; None to all units.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Grid | None,
        windows: Windows | None = None,
        *,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.windows = windows
        # The kernel keeps its head axis, [C, 3, heads, C/heads], so that heads can be
        # sharded; flattened it is the official [q | k | v] matrix.
        self.qkv = nnx.LinearGeneral(
            dim,
            (3, num_heads, dim // num_heads),
            kernel_init=INIT,
            dtype=dtype,
            rngs=rngs,
        )
        self.proj = Linear(dim, dim, dtype=dtype, rngs=rngs)
        if grid is None:
            self.relative_position_bias_table = None
        else:
            rows = (2 * grid[0] - 1) * (2 * grid[1] - 1)
            table = INIT(rngs.params(), (rows, num_heads), jnp.float32)
            self.relative_position_bias_table = nnx.Param(table)

    def __call__(
        self,
        x: jax.Array,
        relative_index: jax.Array | None = None,
        key_mask: jax.Array | None = None,
        kernel: str = "plain",
    ) -> jax.Array:
        """[B, K, C] -> [B, K, C].

        Args:
          relative_index: int [K, K] or [B, K, K], rows of the table; windows have
            their own.
          key_mask: [B, K], nonzero = may be attended. A sample (or a window of it)
            with no key left gets a uniform softmax, never NaN.
          kernel: see `kernels.mlp`.
        """
        q, k, v, bias, mask = self._heads(x, relative_index, key_mask)
        out = kernels.dot_product_attention(
            q, k, v, bias=bias, mask=mask, choice=kernel
        )
        if self.windows is not None:
            out = self.windows.merge(out)
        return self.proj(out.reshape(x.shape))

    def probabilities(
        self,
        x: jax.Array,
        relative_index: jax.Array | None = None,
        key_mask: jax.Array | None = None,
    ) -> jax.Array:
        """Attention weights for the same arguments: [B, heads, K, K] float32.

        Query first; a row adds up to 1. With W windows of S units,
        [B, W, heads, S, S]; rows of padding have no meaning.
        """
        q, k, _, bias, mask = self._heads(x, relative_index, key_mask)
        weights, sums = kernels.softmax(q, k, bias, mask)
        weights = weights / sums
        if self.windows is not None:
            weights = weights.reshape(len(x), -1, *weights.shape[1:])
        return weights

    def _projected(self, x):
        rows = x.reshape(-1, x.shape[-1])
        if kernels.heads_split():
            rows = self.qkv(rows)
        else:  # as in `RowLinear`
            kernel = self.qkv.kernel[...].reshape(x.shape[-1], -1).astype(x.dtype)
            rows = rows @ kernel + self.qkv.bias[...].reshape(-1).astype(x.dtype)
        return rows.reshape(*x.shape[:2], *self.qkv.bias.shape)

    def _heads(self, x, relative_index, key_mask):
        """q, k, v, each [B, K, heads, C/heads]; bias and mask that broadcast over
        [B, heads, K, K], or None. With windows B*W for B, S for K (see `Windows`).
        """
        qkv = self._projected(x)  # [B, K, 3, heads, C/heads]
        if self.windows is not None:
            qkv = self.windows.partition(qkv)
            # Padding becomes keys that are not to be attended to.
            present = jnp.ones(x.shape[:2], bool) if key_mask is None else key_mask
            key_mask = self.windows.partition(present)
            units = jnp.arange(qkv.shape[1])
            relative_index = positions.relative_position_index(units, self.windows.size)
        q, k, v = (qkv[:, :, i] for i in range(3))
        bias = None
        if self.relative_position_bias_table is not None:
            bias = self.relative_position_bias_table[...][relative_index]
            bias = jnp.moveaxis(bias, -1, -3)  # [(B,) heads, K, K]
            bias = bias if bias.ndim == 4 else bias[None]
        mask = None if key_mask is None else (key_mask != 0)[:, None, None, :]
        return q, k, v, bias, mask


class PatchEmbed(nnx.Module):
    """Cells [T, cell*cell*in_channels] -> [T, dim]: Linear, LayerNorm.

    The official strided convolution is this Linear; its weight and bias keep PyTorch's
    default, uniform in +-1/sqrt(fan_in).
    """

    def __init__(self, fan_in: int, dim: int, *, eps: float, dtype, rngs: nnx.Rngs):
        def uniform(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -1, 1) / np.sqrt(fan_in)

        self.proj = nnx.Linear(
            fan_in,
            dim,
            kernel_init=uniform,
            bias_init=uniform,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = LayerNorm(dim, epsilon=eps, dtype=dtype, rngs=rngs)

    def __call__(self, cells: jax.Array) -> jax.Array:
        return self.norm(self.proj(cells))


class PatchMerge(nnx.Module):
    """Merge four neighboring cells into one: [T, C] -> [T/4, 2C], in merge order."""

    def __init__(self, dim: int, *, eps: float, dtype, rngs: nnx.Rngs):
        self.norm = LayerNorm(4 * dim, epsilon=eps, dtype=dtype, rngs=rngs)
        self.reduction = Linear(
            4 * dim, 2 * dim, use_bias=False, dtype=dtype, rngs=rngs
        )

    @jax.named_scope("merge")
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(-1, 4 * x.shape[-1])  # [T/4, 4C]
        return self.reduction(self.norm(x))
