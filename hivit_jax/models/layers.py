"""Layers: linear, GELU, drop path, MLP, patch embedding and merge.

Parameters are float32. `dtype` is the dtype of matrix products and of block outputs.
LayerNorm statistics are always float32.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hivit_jax.kernels.numerics import (
    gelu_slope,
    normal_cdf,
    normal_cdf_by_exp,
    scale_branches,
)
from hivit_jax.models.arguments import make_key
from hivit_jax.models.norms import LayerNorm

# Not truncated, because the official trunc_normal_(std=.02) truncates at an absolute
# value of 2, which is 100 standard deviations.
INIT = nnx.initializers.normal(0.02)
# The fan-out of qkv counts q, k and v, as in the official MAE code, because
# `nnx.LinearGeneral` initializes the kernel as one matrix.
XAVIER = nnx.initializers.xavier_uniform()


class ParameterKeys:
    """PRNG keys for initialization, equal to the keys of ``nnx.Rngs(seed)``.

    The counter is a Python integer, whereas the counter of `nnx.Rngs` is an array.
    Inside `jax.eval_shape` and `jax.jit`, each increment of that array makes JAX search
    the program traced so far. All searches together take 5 s for HiViT-B.

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

    With more than two axes, XLA:CPU transposes the operands of the weight gradient
    element by element, and XLA:TPU pads the tokens of each image to whole tiles.
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
      drop_path_rate: probability of dropping a sample; kept samples are divided by
        ``1 - rate``. None: return x.
      drop_path_keys: [B] PRNG keys, one per sample. None: return x.
      branch_index: index of the branch in the model. It is folded into the keys, so
        that branches drop samples independently of each other.
    """
    scale = drop_path_scale(drop_path_rate, drop_path_keys, branch_index, x.dtype)
    return x if scale is None else scale_branches(x, scale)


def drop_path_scale(
    drop_path_rate: float | jax.Array | None,
    drop_path_keys: jax.Array | None,
    branch_index: int | jax.Array,
    dtype: Any,
) -> jax.Array | None:
    """Return each sample's factor in `drop_path`, [B], or None if all are 1.

    The factor is 0 for a dropped sample and 1 / (1 - rate) for a kept sample.
    """
    if drop_path_rate is None or drop_path_keys is None:
        return None
    keep_prob = 1 - jnp.float32(drop_path_rate)

    def is_kept(key):
        return jax.random.bernoulli(jax.random.fold_in(key, branch_index), keep_prob)

    return jax.vmap(is_kept)(drop_path_keys).astype(dtype) / keep_prob.astype(dtype)


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """GELU, exact for float32.

    Saves one array for the backward pass; `jax.nn.gelu` saves three. For bfloat16, the
    error before rounding is at most 3e-6.
    """
    x32 = x.astype(jnp.float32)
    return (x32 * _normal_cdf(x)).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    cdf, x32 = _normal_cdf(x), x.astype(jnp.float32)
    slope = gelu_slope(x32, cdf).astype(x.dtype)
    return (x32 * cdf).astype(x.dtype), tangent * slope


def _normal_cdf(x):
    x32 = x.astype(jnp.float32)
    return normal_cdf_by_exp(x32) if x.dtype == jnp.bfloat16 else normal_cdf(x32)


class Mlp(nnx.Module):
    """Two linear layers with `gelu` between them, [..., C] -> [..., C]."""

    def __init__(
        self, dim: int, ratio: float, *, dtype, rngs: nnx.Rngs, kernel_init=INIT
    ):
        hidden, common = int(dim * ratio), dict(kernel_init=kernel_init, dtype=dtype)
        self.fc1 = Linear(dim, hidden, rngs=rngs, **common)
        self.fc2 = Linear(hidden, dim, rngs=rngs, **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = self.fc1(x.reshape(-1, x.shape[-1]))
        return self.fc2(gelu(hidden)).reshape(x.shape)


class PatchEmbed(nnx.Module):
    """Linear and optional LayerNorm on squares of pixels, [T, fan_in] -> [T, dim].

    The squares are cells in HiViT, and units in ViT and Swin; see `positions`. The
    Linear is equivalent to the official strided convolution. The bias has PyTorch's
    default initialization, uniform in +-1/sqrt(fan_in).

    Args:
      eps: epsilon of the LayerNorm; None: no LayerNorm.
      kernel_init: initializer of the kernel; None: as for the bias.
    """

    def __init__(
        self,
        fan_in: int,
        dim: int,
        *,
        eps: float | None,
        dtype,
        rngs: nnx.Rngs,
        kernel_init=None,
    ):
        def uniform(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -1, 1) / np.sqrt(fan_in)

        self.proj = nnx.Linear(
            fan_in,
            dim,
            kernel_init=kernel_init or uniform,
            bias_init=uniform,
            dtype=dtype,
            rngs=rngs,
        )
        if eps is None:
            self.norm = None
        else:
            self.norm = LayerNorm(dim, epsilon=eps, dtype=dtype, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        return _recompute(_embed, self, pixels)


class PatchMerge(nnx.Module):
    """Merge of every four consecutive rows, [T, C] -> [T/4, 2C].

    In merge order, these rows are four neighboring cells or tokens; see `positions`.
    """

    def __init__(self, dim: int, *, eps: float, dtype, rngs: nnx.Rngs):
        self.norm = LayerNorm(4 * dim, epsilon=eps, dtype=dtype, rngs=rngs)
        self.reduction = Linear(
            4 * dim, 2 * dim, use_bias=False, dtype=dtype, rngs=rngs
        )

    @jax.named_scope("merge")
    def __call__(self, x: jax.Array) -> jax.Array:
        return _recompute(_merge, self, x.reshape(-1, 4 * x.shape[-1]))  # [T/4, 4C]


def _embed(embed, pixels):
    x = embed.proj(pixels)
    return x if embed.norm is None else embed.norm(x)


def _merge(merge, x):
    return merge.reduction(merge.norm(x))


def _recompute(function, module, x):
    """Return function(module, x), saving only parameters and x for the backward pass.

    The intermediate arrays of the patch embedding and of the merges are as large as the
    first feature maps, and cost little to recompute.
    """
    graphdef, params = nnx.split(module)

    def run(params, x):
        return function(nnx.merge(graphdef, params), x)

    return jax.checkpoint(run)(params, x)
