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

from hivit_jax.kernels import attention_xla, dispatch
from hivit_jax.kernels.numerics import gelu_slope, normal_cdf
from hivit_jax.models import positions
from hivit_jax.models.norms import LayerNorm
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
          kernel: see `dispatch.mlp`.
        """
        q, k, v, bias, mask = self._heads(x, relative_index, key_mask)
        out = attention_xla.dot_product_attention(
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
        weights, sums = attention_xla.softmax(q, k, bias, mask)
        weights = weights / sums
        if self.windows is not None:
            weights = weights.reshape(len(x), -1, *weights.shape[1:])
        return weights

    def _projected(self, x):
        rows = x.reshape(-1, x.shape[-1])
        if dispatch.heads_split():
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
