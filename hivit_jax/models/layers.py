"""Layers of HiViT: linear, GELU, drop path, MLP, attention, patch embedding and merge.

Parameters are float32. `dtype` is the dtype of matrix products and of block outputs.
LayerNorm statistics and the softmax are always float32.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hivit_jax.kernels import attention_xla, dispatch
from hivit_jax.kernels.numerics import gelu_slope, normal_cdf, scale_images
from hivit_jax.models import positions
from hivit_jax.models.arguments import make_key
from hivit_jax.models.norms import LayerNorm
from hivit_jax.models.positions import Grid
from hivit_jax.models.windows import Windows

# Not truncated, because the official trunc_normal_(std=.02) truncates at an absolute
# value of 2, which is 100 standard deviations.
INIT = nnx.initializers.normal(0.02)


class ParameterKeys:
    """PRNG keys for initialization, equal to those of ``nnx.Rngs(seed)``.

    The counter is a Python integer. The counter of `nnx.Rngs` is an array. Inside
    `jax.eval_shape` and `jax.jit`, each increment of the array makes JAX search the
    program traced so far, which takes 5 s for HiViT-B.

    Args:
      seed: integer or PRNG key.
    """

    def __init__(self, seed: int | jax.Array):
        self.key = make_key(seed)
        self.count = 0

    def params(self) -> jax.Array:
        """Return the next key."""
        self.count += 1
        return jax.random.fold_in(self.key, self.count - 1)


class RowLinear(nnx.Linear):
    """Linear layer, [..., C] -> [..., D], that flattens its input to a matrix.

    Without this, XLA:CPU transposes the operands of the weight gradient element by
    element, and XLA:TPU pads the tokens of each image to whole tiles.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        rows = super().__call__(x.reshape(-1, x.shape[-1]))
        return rows.reshape(*x.shape[:-1], self.out_features)


Linear = partial(RowLinear, kernel_init=INIT)


class FixedTable(nnx.Variable):
    """Table that is stored and counted with the parameters, but not trained."""


def drop_path(
    x: jax.Array,
    drop_path_rate: float | jax.Array | None,
    drop_path_keys: jax.Array | None,
    branch_index: int | jax.Array,
) -> jax.Array:
    """Drop the residual branch of whole samples (stochastic depth).

    Args:
      x: [B*T, C] or [B, T, C], output of the branch.
      drop_path_rate: probability of dropping; kept samples are divided by ``1 - rate``.
        None: return x.
      drop_path_keys: [B] PRNG keys, one per sample. None: return x.
      branch_index: index of the branch in the model, because each branch draws its own
        samples to drop.
    """
    scale = drop_path_scale(drop_path_rate, drop_path_keys, branch_index, x.dtype)
    return x if scale is None else scale_images(x, scale)


def drop_path_scale(
    drop_path_rate: float | jax.Array | None,
    drop_path_keys: jax.Array | None,
    branch_index: int | jax.Array,
    dtype: Any,
) -> jax.Array | None:
    """Return the factors of `drop_path`, [B]: 0 or 1 / (1 - rate); or None for 1."""
    if drop_path_rate is None or drop_path_keys is None:
        return None
    keep_prob = 1 - jnp.float32(drop_path_rate)

    def keep(key):
        return jax.random.bernoulli(jax.random.fold_in(key, branch_index), keep_prob)

    return jax.vmap(keep)(drop_path_keys).astype(dtype) / keep_prob.astype(dtype)


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
    """MLP with exact (erf) GELU, [..., C] -> [..., C]."""

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
      grid: grid of units of the image, or of a window if there are windows; None: no
        relative position bias.
      windows: windows that attention is limited to; None: global attention.
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
        self.grid, self.windows = grid, windows
        # The kernel has a head axis, [C, 3, heads, C/heads], so that heads can be
        # sharded. Flattened, it is the official [q | k | v] matrix.
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
        kernels: str = "plain",
    ) -> jax.Array:
        """Return the attention output, [B, K, C] -> [B, K, C].

        Args:
          relative_index: int [K, K] or [B, K, K], rows of the relative position table;
            None: x are all units in row-major order. Ignored with windows.
          key_mask: [B, K], nonzero for keys that may be attended to. If a sample or a
            window has no such key, its softmax is uniform and not NaN.
          kernels: see `RunOptions`.
        """
        q, k, v, bias, mask = self._softmax_inputs(x, relative_index, key_mask)
        out = attention_xla.dot_product_attention(
            q, k, v, bias=bias, mask=mask, choice=kernels
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
        """Return the attention weights, float32 [B, heads, K, K].

        The query axis is before the key axis, and each row sums to 1. With W windows of
        S units, the shape is [B, W, heads, S, S]; rows of padding have no meaning.
        Arguments are those of `__call__`.
        """
        q, k, _, bias, mask = self._softmax_inputs(x, relative_index, key_mask)
        weights, sums = attention_xla.unnormalized_softmax(q, k, bias, mask)
        weights = weights / sums
        if self.windows is not None:
            rows, columns = self.windows.counts
            weights = weights.reshape(len(x), rows * columns, *weights.shape[1:])
        return weights

    def position_bias(self, relative_index: jax.Array | None) -> jax.Array | None:
        """Return the relative position bias, float32, or None.

        The shape is [heads, K, K], or [B, heads, K, K] for an index [B, K, K]. For the
        argument see `__call__`.
        """
        if self.relative_position_bias_table is None:
            return None
        table = self.relative_position_bias_table[...]
        if relative_index is None or self.windows is not None:
            return positions.relative_position_bias(table, self.grid)
        return jnp.moveaxis(table[relative_index], -1, -3)

    def _project_qkv(self, x):
        """Return q, k, v as one array, [B, K, C] -> [B, K, 3, heads, C/heads]."""
        rows = x.reshape(-1, x.shape[-1])
        if dispatch.heads_are_sharded():
            rows = self.qkv(rows)
        else:  # one product of matrices, for the reasons given in `RowLinear`
            kernel = self.qkv.kernel[...].reshape(x.shape[-1], -1).astype(x.dtype)
            rows = rows @ kernel + self.qkv.bias[...].reshape(1, -1).astype(x.dtype)
        return rows.reshape(*x.shape[:2], *self.qkv.bias.shape)

    def _softmax_inputs(self, x, relative_index, key_mask):
        """Return q, k, v, [B, K, heads, C/heads] each, and bias and mask.

        Bias and mask broadcast over [B, heads, K, K], or are None. With windows, B*W
        takes the place of B, and S that of K (see `Windows`).
        """
        qkv = self._project_qkv(x)  # [B, K, 3, heads, C/heads]
        if self.windows is not None:
            qkv = self.windows.partition(qkv)
            if key_mask is None and self.windows.is_padded:
                key_mask = jnp.ones(x.shape[:2], bool)
            if key_mask is not None:
                # Pads the mask with zeros, so that padding is not attended to.
                key_mask = self.windows.partition(key_mask)
        q, k, v = (qkv[:, :, i] for i in range(3))
        bias = self.position_bias(relative_index)
        bias = bias[None] if bias is not None and bias.ndim == 3 else bias
        mask = None if key_mask is None else (key_mask != 0)[:, None, None, :]
        return q, k, v, bias, mask


class PatchEmbed(nnx.Module):
    """Linear and LayerNorm on cells, [T, cell*cell*in_channels] -> [T, dim].

    The Linear is equivalent to the official strided convolution. Weight and bias have
    PyTorch's default initialization, uniform in +-1/sqrt(fan_in).
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
    """Merge of four neighboring cells, [T, C] -> [T/4, 2C] in merge order."""

    def __init__(self, dim: int, *, eps: float, dtype, rngs: nnx.Rngs):
        self.norm = LayerNorm(4 * dim, epsilon=eps, dtype=dtype, rngs=rngs)
        self.reduction = Linear(
            4 * dim, 2 * dim, use_bias=False, dtype=dtype, rngs=rngs
        )

    @jax.named_scope("merge")
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(-1, 4 * x.shape[-1])  # [T/4, 4C]
        return self.reduction(self.norm(x))
