"""Residual blocks of HiViT, and how a sequence of them runs."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import AxisType

from hivit_jax.kernels import dispatch
from hivit_jax.models.config import RunOptions
from hivit_jax.models.layers import Attention, Mlp, drop_path
from hivit_jax.models.norms import LayerNorm
from hivit_jax.models.positions import Grid
from hivit_jax.models.windows import Windows


class MlpBlock(nnx.Module):
    """Stem block, ``x + MLP(LN(x))``: rows [T, C] never meet.

    Its only norm is called ``norm2`` as in the official code.
    """

    def __init__(
        self, dim: int, mlp_ratio: float, *, eps: float, dtype, rngs: nnx.Rngs
    ):
        self.norm2 = LayerNorm(dim, epsilon=eps, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(dim, mlp_ratio, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, **options: Any) -> jax.Array:
        """[T, C] -> [T, C]; options as in `add_mlp`."""
        return self.add_mlp(x, **options)

    def add_mlp(
        self,
        x: jax.Array,
        *,
        drop_path_keys: jax.Array | None = None,
        drop_path_rate: float | jax.Array | None = None,
        block_index: int | jax.Array = 0,
        kernel: str = "plain",
    ) -> jax.Array:
        """``x + drop_path(mlp(norm2(x)))``, [..., C] -> [..., C].

        Args:
          drop_path_keys, drop_path_rate: see `drop_path`.
          block_index: number of the block, so that no two drop the same samples.
          kernel: see `dispatch.mlp`.
        """
        with jax.named_scope("mlp"):
            drop = drop_path_rate, drop_path_keys, 2 * block_index
            fused = dispatch.mlp(x, self.norm2, self.mlp, kernel)
            return _add_branch(x, lambda: self.mlp(self.norm2(x)), fused, drop)


class AttentionBlock(MlpBlock):
    """Main-stage block: attention, then MLP, each behind a LayerNorm."""

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
    ):
        super().__init__(dim, mlp_ratio, eps=eps, dtype=dtype, rngs=rngs)
        self.norm1 = LayerNorm(dim, epsilon=eps, dtype=dtype, rngs=rngs)
        self.attn = Attention(dim, num_heads, grid, windows, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        *,
        relative_index: jax.Array | None = None,
        key_mask: jax.Array | None = None,
        **options: Any,
    ) -> jax.Array:
        """[B, K, C] -> [B, K, C]; arguments as in `add_attention`."""
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
        kernel: str = "plain",
    ) -> jax.Array:
        """``x + drop_path(attn(norm1(x)))``, [B, K, C] -> [B, K, C].

        Args:
          relative_index, key_mask: see `Attention`; the rest as in `add_mlp`.
        """
        with jax.named_scope("attention"):
            drop = drop_path_rate, drop_path_keys, 2 * block_index + 1
            fused = dispatch.attention(x, self.norm1, self.attn, key_mask, kernel)
            inputs = relative_index, key_mask, kernel
            return _add_branch(
                x, lambda: self.attn(self.norm1(x), *inputs), fused, drop
            )


def _add_branch(x, plain, fused, drop):
    """``x + drop_path(branch)``; the branch by the fused kernel if there is one, which
    then adds x itself where nothing is dropped.
    """
    drop_path_rate, drop_path_keys, _ = drop
    if fused and (drop_path_rate is None or drop_path_keys is None):
        return fused(True)
    return x + drop_path(fused(False) if fused else plain(), *drop)


def run_blocks(
    blocks: Sequence[MlpBlock],
    x: jax.Array,
    run_options: RunOptions,
    *,
    call: Callable | None = None,
    first: int = 0,
    drop_path_rates: Sequence[float] | None = None,
    **inputs: jax.Array | None,
) -> jax.Array:
    """Run blocks one after another, x -> x.

    Args:
      call: (block, x, **options) -> x runs a block; None: the block itself.
      first: number of the first block.
      drop_path_rates: one a block; None: nothing is dropped.
      inputs: arrays that every block takes beside x.
    """
    call = call or type(blocks[0]).__call__
    numbers, rates = range(first, first + len(blocks)), drop_path_rates
    if run_options.scan_blocks and len(blocks) > 1:
        return _scan_blocks(blocks, x, run_options, call, numbers, rates, inputs)
    run = _run_called if _compiled_apart(x) else _run_block
    for block, number, rate in zip(
        blocks, numbers, rates or [None] * len(blocks), strict=True
    ):
        graphdef, params = nnx.split(block)
        run_one = partial(run, graphdef, call, run_options.kernels)
        run_one = jax.checkpoint(run_one) if run_options.remat else run_one
        x = run_one(params, x, number, rate, inputs)
    return x


def _scan_blocks(blocks, x, run_options, call, numbers, rates, inputs):
    """The same by one compiled block, in a loop over stacked parameters."""
    run_one = partial(_run_block, nnx.graphdef(blocks[0]), call, run_options.kernels)
    if run_options.remat:  # a loop keeps recomputed values apart by itself
        run_one = jax.checkpoint(run_one, prevent_cse=False)

    def step(x, scanned):
        params, number, rate = scanned
        return run_one(params, x, number, rate, inputs), None

    states = [nnx.to_pure_dict(nnx.state(block)) for block in blocks]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    rates = None if rates is None else jnp.array(rates, jnp.float32)
    scanned = params, numbers[0] + jnp.arange(len(numbers)), rates
    return jax.lax.scan(step, x, scanned)[0]


def _run_block(graphdef, call, kernel, params, x, number, rate, inputs):
    return call(
        nnx.merge(graphdef, params),
        x,
        drop_path_rate=rate,
        block_index=number,
        kernel=kernel,
        **inputs,
    )


_jitted_block = jax.jit(_run_block, static_argnums=(0, 1, 2))


def _run_called(*arguments):
    with set_xla_metadata(inlineable="false"):  # XLA keeps the call
        return _jitted_block(*arguments)


def _compiled_apart(x: jax.Array) -> bool:
    """Whether a block is a program of its own, compiled once for all alike.

    Without this, XLA:CPU recomputes the sum of the residual branches before a block in
    every kernel that reads it, at a cost that grows with depth. Not in bfloat16, which
    a call rounds more often than a single program does. Not where axes of the mesh are
    manual already, because XLA cannot partition a call over the devices of the others.
    """
    manual = AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
    return dispatch.platform() == "cpu" and x.dtype == jnp.float32 and not manual
