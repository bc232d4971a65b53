"""Residual blocks, and functions that apply a sequence of them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import AxisType

from hivit_jax.kernels import dispatch, target
from hivit_jax.models.attention import Attention
from hivit_jax.models.config import RunOptions
from hivit_jax.models.layers import INIT, Mlp, drop_path, drop_path_scale
from hivit_jax.models.norms import LayerNorm
from hivit_jax.models.positions import Grid
from hivit_jax.models.windows import Windows


class MlpBlock(nnx.Module):
    """Stem block, ``x + MLP(LN(x))``, which does not mix the rows of x, [T, C].

    The only norm is named ``norm2``, as in the official code.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float,
        *,
        eps: float,
        dtype,
        rngs: nnx.Rngs,
        kernel_init=INIT,
    ):
        self.norm2 = LayerNorm(dim, epsilon=eps, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(dim, mlp_ratio, dtype=dtype, rngs=rngs, kernel_init=kernel_init)

    def __call__(self, x: jax.Array, **options: Any) -> jax.Array:
        """Return the block's output, [T, C] -> [T, C]; options as in `add_mlp`."""
        return self.add_mlp(x, **options)

    def add_mlp(
        self,
        x: jax.Array,
        *,
        drop_path_keys: jax.Array | None = None,
        drop_path_rate: float | jax.Array | None = None,
        block_index: int | jax.Array = 0,
        kernels: str = "plain",
    ) -> jax.Array:
        """Return ``x + drop_path(mlp(norm2(x)))``, [..., C] -> [..., C].

        Args:
          drop_path_keys, drop_path_rate: see `drop_path`.
          block_index: index of the block in the model. It is folded into the keys, so
            that blocks drop samples independently of each other.
          kernels: see `RunOptions`.
        """
        with jax.named_scope("mlp"):
            drop_args = drop_path_rate, drop_path_keys, 2 * block_index
            fused_residual = dispatch.mlp(x, self.norm2, self.mlp, kernels)
            return _add_branch(
                x, self.norm2, self.mlp, kernels, fused_residual, drop_args
            )


class AttentionBlock(MlpBlock):
    """Transformer block: attention, then MLP, each after a LayerNorm.

    HiViT's main stage, ViT, Swin and the decoder of a masked autoencoder consist of
    these blocks.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        eps: float,
        dtype,
        rngs: nnx.Rngs,
        grid: Grid | None = None,
        windows: Windows | None = None,
        kernel_init=INIT,
    ):
        common = dict(dtype=dtype, rngs=rngs)
        super().__init__(dim, mlp_ratio, eps=eps, kernel_init=kernel_init, **common)
        self.norm1 = LayerNorm(dim, epsilon=eps, **common)
        self.attn = Attention(
            dim, num_heads, grid, windows, kernel_init=kernel_init, **common
        )

    def __call__(
        self,
        x: jax.Array,
        *,
        relative_index: jax.Array | None = None,
        key_mask: jax.Array | None = None,
        **options: Any,
    ) -> jax.Array:
        """Return the block's output, [B, K, C]; arguments as in `add_attention`."""
        x = self.add_attention(x, relative_index, key_mask, **options)
        return self.add_mlp(x, **options)

    def add_attention(
        self,
        x: jax.Array,
        relative_index: jax.Array | None = None,
        key_mask: jax.Array | None = None,
        *,
        drop_path_keys: jax.Array | None = None,
        drop_path_rate: float | jax.Array | None = None,
        block_index: int | jax.Array = 0,
        kernels: str = "plain",
    ) -> jax.Array:
        """Return ``x + drop_path(attn(norm1(x)))``, [B, K, C] -> [B, K, C].

        `relative_index` and `key_mask` are as in `Attention.__call__`, the other
        arguments as in `add_mlp`.
        """
        with jax.named_scope("attention"):
            drop_args = drop_path_rate, drop_path_keys, 2 * block_index + 1
            arguments = relative_index, key_mask, kernels
            fused_residual = dispatch.attention(x, self.norm1, self.attn, *arguments)

            def attend(normalized):
                return self.attn(normalized, *arguments)

            return _add_branch(
                x, self.norm1, attend, kernels, fused_residual, drop_args
            )


def _add_branch(x, norm, branch, kernels, fused_residual, drop_args):
    """Return ``x + drop_path(branch(norm(x)))``.

    Args:
      fused_residual: result of `dispatch.mlp` or `dispatch.attention`: a function from
        the factor of each image to ``x + factor * branch(norm(x))``; None: no kernel.
      drop_args: arguments of `drop_path` after the first.
    """
    if fused_residual is None:
        x, normalized = dispatch.layer_norm(x, norm, kernels) or (x, norm(x))
        return x + drop_path(branch(normalized), *drop_args)
    branch_scale = drop_path_scale(*drop_args, x.dtype)
    return fused_residual(
        None if branch_scale is None else branch_scale.astype(jnp.float32)
    )


def run_blocks(
    blocks: Sequence[MlpBlock],
    x: jax.Array,
    run_options: RunOptions,
    *,
    apply: Callable | None = None,
    first_index: int = 0,
    drop_path_rates: Sequence[float] | None = None,
    **inputs: jax.Array | None,
) -> jax.Array:
    """Apply blocks one after another, x -> x.

    Args:
      apply: function (block, x, **options) -> x that applies a block; default: the
        block's ``__call__``.
      first_index: `block_index` of the first block.
      drop_path_rates: one per block; None: no drop path.
      inputs: further arguments, which every block receives.
    """
    apply = apply or type(blocks[0]).__call__
    indices = range(first_index, first_index + len(blocks))
    if run_options.scan_blocks and len(blocks) > 1:
        return _scan_blocks(
            blocks, x, run_options, apply, indices, drop_path_rates, inputs
        )
    run = _run_block_not_inlined if _should_prevent_inlining(x) else _run_block
    rates = drop_path_rates or [None] * len(blocks)
    for block, index, rate in zip(blocks, indices, rates, strict=True):
        graphdef, params = nnx.split(block)
        run_one = partial(run, graphdef, apply, run_options.kernels)
        run_one = jax.checkpoint(run_one) if run_options.remat else run_one
        x = run_one(params, x, dict(inputs, block_index=index, drop_path_rate=rate))
    return x


def _scan_blocks(blocks, x, run_options, apply, indices, drop_path_rates, inputs):
    """Apply blocks as one compiled block in a loop over stacked parameters."""
    run_one = partial(_run_block, nnx.graphdef(blocks[0]), apply, run_options.kernels)
    if run_options.remat:
        # prevent_cse=False, because XLA does not merge common subexpressions across the
        # boundary of a loop anyway.
        run_one = jax.checkpoint(run_one, prevent_cse=False)

    def step(x, scanned):
        params, index, rate = scanned
        options = dict(inputs, block_index=index, drop_path_rate=rate)
        return run_one(params, x, options), None

    states = [nnx.to_pure_dict(nnx.state(block)) for block in blocks]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    rates = None if drop_path_rates is None else jnp.array(drop_path_rates, jnp.float32)
    scanned = params, indices[0] + jnp.arange(len(indices)), rates
    return jax.lax.scan(step, x, scanned)[0]


def _run_block(graphdef, apply, kernels, params, x, options):
    return apply(nnx.merge(graphdef, params), x, kernels=kernels, **options)


_jitted_block = jax.jit(_run_block, static_argnums=(0, 1, 2))


def _run_block_not_inlined(*arguments):
    """Apply a block as a call that XLA does not inline; equal blocks share its code."""
    with set_xla_metadata(inlineable="false"):
        return _jitted_block(*arguments)


def _should_prevent_inlining(x: jax.Array) -> bool:
    """Return True if blocks should run as calls that XLA does not inline.

    In inlined blocks, every kernel of XLA:CPU that reads a block's input recomputes
    the sum of all earlier residual branches, at a cost that grows with depth. bfloat16
    is excluded, because each call rounds its output to bfloat16. Meshes with manual
    axes are excluded, because XLA cannot partition a call over the other axes.
    """
    manual = AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
    return target.platform() == "cpu" and x.dtype == jnp.float32 and not manual
