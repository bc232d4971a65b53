"""Layers of HiViT: linear, LayerNorm, GELU, drop path, MLP, attention, patch merge.

Parameters are float32. `dtype` is what matrix products run in and what blocks hand on;
LayerNorm statistics and the softmax are float32 whatever it is.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax import kernels
from hivit_jax.errors import ConfigError
from hivit_jax.kernels.common import gelu_slope, normal_cdf, normalized_gradient
from hivit_jax.models import positions
from hivit_jax.models.positions import Grid, Windows

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

    Of more than two axes XLA for CPUs transposes what a weight's gradient takes, one
    number at a time; for TPUs it pads the tokens of every image to whole tiles.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        rows = super().__call__(x.reshape(-1, x.shape[-1]))
        return rows.reshape(*x.shape[:-1], self.out_features)


Linear = partial(RowLinear, kernel_init=INIT)


class LayerNorm(nnx.LayerNorm):
    """Of the last axis, [..., C] -> [..., C].

    In two passes: the one-pass variance loses the small ones that HiViT's eps of 1e-6
    is there for. For the gradient it keeps its input, and mean and deviation of rows;
    the library's own keeps three arrays.
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
    # Or XLA for GPUs computes mean and deviation again with every use, and keeps what
    # the gradient of the scale adds up in float32.
    x, scale, mean, inverse = jax.lax.optimization_barrier(saved)
    gradient = gradient.astype(jnp.float32)
    x_hat = (x.astype(jnp.float32) - mean) * inverse
    rows = tuple(range(x.ndim - 1))
    dx = normalized_gradient(gradient * scale, x_hat, inverse).astype(x.dtype)
    return dx, (gradient * x_hat).sum(rows), gradient.sum(rows)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def drop_path(
    x: jax.Array,
    rate: float | jax.Array | None,
    sample_keys: jax.Array | None,
    draw: int | jax.Array,
) -> jax.Array:
    """Drops the residual branch of whole samples (stochastic depth).

    Args:
      x: [B*T, C] or [B, T, C], the branch.
      rate: probability of dropping; a kept branch is divided by ``1 - rate``. None:
        nothing is dropped.
      sample_keys: [B] keys, one per sample, or None for no dropping.
      draw: number of this draw, so that no two branches share one.
    """
    if rate is None or sample_keys is None:
        return x
    share = 1 - jnp.float32(rate)

    def keep(key):
        return jax.random.bernoulli(jax.random.fold_in(key, draw), share)

    scale = jax.vmap(keep)(sample_keys).astype(x.dtype) / share.astype(x.dtype)
    per_sample = x.reshape(len(scale), -1, x.shape[-1])
    return (per_sample * scale[:, None, None]).reshape(x.shape)


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU. For the gradient it keeps one array; `jax.nn.gelu` keeps three."""
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
            out = self.windows.join(out)
        return self.proj(out.reshape(x.shape))

    def probabilities(
        self,
        x: jax.Array,
        relative_index: jax.Array | None = None,
        key_mask: jax.Array | None = None,
    ) -> jax.Array:
        """What each query attends to, of the same arguments: [B, heads, K, K] float32.

        Query first; a row adds up to 1. With W windows of S places,
        [B, W, heads, S, S]; what padding attends to means nothing.
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
            qkv = self.windows.split(qkv)
            # Padding becomes keys that are not to be attended to.
            present = jnp.ones(x.shape[:2], bool) if key_mask is None else key_mask
            key_mask = self.windows.split(present)
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


class PatchMerge(nnx.Module):
    """Four neighbouring cells become one: [T, C] -> [T/4, 2C], in merge order."""

    def __init__(self, dim: int, *, eps: float, dtype, rngs: nnx.Rngs):
        self.norm = LayerNorm(4 * dim, epsilon=eps, dtype=dtype, rngs=rngs)
        self.reduction = Linear(
            4 * dim, 2 * dim, use_bias=False, dtype=dtype, rngs=rngs
        )

    @jax.named_scope("merge")
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(-1, 4 * x.shape[-1])  # [T/4, 4C]
        return self.reduction(self.norm(x))


def parameter_count(module: nnx.Module) -> int:
    """Number of parameters, fixed position tables included (as published)."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def row_cost(module: nnx.Module, rows: int, layer_norm_cost: int) -> int:
    """Multiply-adds of all Linears of `module`, each applied to `rows` rows.

    Every element that a LayerNorm puts out counts `layer_norm_cost`.
    """
    cost = 0
    for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        if path[-1] == "kernel":
            cost += rows * leaf.size
        elif path[-1] == "scale":
            cost += rows * leaf.size * layer_norm_cost
    return cost


def check_heads(dim_name: str, dim: int, heads_name: str, heads: int) -> None:
    """ConfigError unless `heads` heads divide the width `dim`."""
    if heads < 1 or dim % heads:
        raise ConfigError(
            f"{heads_name}={heads} does not divide {dim_name}={dim}; "
            "expected a width that is a multiple of the number of heads"
        )
