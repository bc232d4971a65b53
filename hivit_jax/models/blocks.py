"""Residual blocks of HiViT: MLP block and attention block; how many of them run."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import AxisType

from hivit_jax import kernels
from hivit_jax.models.layers import Attention, LayerNorm, Mlp, drop_path, row_cost
from hivit_jax.models.positions import Grid, Windows


class MlpBlock(nnx.Module):
    """Stem block, ``x + MLP(LN(x))``: rows [T, C] never meet.

    Its only norm is called ``norm2`` as in the official code.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float,
        *,
        eps: float,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.norm2 = LayerNorm(dim, epsilon=eps, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(dim, mlp_ratio, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        *,
        sample_keys: jax.Array | None = None,
        rate: float | jax.Array | None = None,
        number: int | jax.Array = 0,
        kernel: str = "plain",
    ) -> jax.Array:
        """[T, C] -> [T, C].

        Args:
          sample_keys, rate: of `drop_path`.
          number: of the block, so that no two drop the same samples.
          kernel: see `kernels.mlp`.
        """
        with jax.named_scope("mlp"):
            fused = kernels.mlp(x, self.norm2, self.mlp, kernel)
            dropping = rate, sample_keys, 2 * number
            return self._residual(x, dropping, fused, lambda: self.mlp(self.norm2(x)))

    def _residual(self, x, dropping, fused, branch):
        """x and its branch, of a fused kernel if there is one; see `drop_path`."""
        if fused and (dropping[0] is None or dropping[1] is None):
            return fused(True)
        return x + drop_path(fused(False) if fused else branch(), *dropping)


class AttentionBlock(MlpBlock):
    """Main-stage block: attention, then MLP, each behind a LayerNorm. [B, K, C]."""

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
        super().__init__(
            dim,
            mlp_ratio,
            eps=eps,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm1 = LayerNorm(dim, epsilon=eps, dtype=dtype, rngs=rngs)
        self.attn = Attention(dim, num_heads, grid, windows, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        *,
        relative_index: jax.Array | None = None,
        key_mask: jax.Array | None = None,
        sample_keys: jax.Array | None = None,
        rate: float | jax.Array | None = None,
        number: int | jax.Array = 0,
        kernel: str = "plain",
        skip: int = 0,
    ) -> jax.Array:
        """[B, K, C] -> [B, K - skip, C]: after attention the first `skip` tokens are
        left out. Other arguments of `MlpBlock` and `Attention`.
        """
        with jax.named_scope("attention"):
            fused = kernels.attention(x, self.norm1, self.attn, key_mask, kernel)
            x = self._residual(
                *(x, (rate, sample_keys, 2 * number + 1), fused),
                lambda: self.attn(self.norm1(x), relative_index, key_mask, kernel),
            )[:, skip:]
        return super().__call__(
            x, sample_keys=sample_keys, rate=rate, number=number, kernel=kernel
        )


def run_blocks(
    blocks: Sequence[MlpBlock],
    x: jax.Array,
    *,
    remat: bool,
    scan: bool,
    kernel: str,
    first: int = 0,
    rates: Sequence[float] | None = None,
    skip: int = 0,
    **inputs: jax.Array | None,
) -> jax.Array:
    """Blocks one after another, x -> x.

    Args:
      remat: keep for the gradient but what goes into each block, and compute the rest
        again.
      scan: compile one block for all, which must differ in nothing but parameters and
        rate; a loop over their stacked parameters runs it.
      kernel: see `kernels.mlp`.
      first: number of the first block.
      rates: of drop path; None: nothing is dropped.
      skip: see `AttentionBlock`; of a single block.
      inputs: what every block takes beside x.
    """

    def run(block, x, number, rate):
        graphdef, params = nnx.split(block)
        call = partial(_call(x.dtype), graphdef, kernel, skip)
        return (jax.checkpoint(call) if remat else call)(
            params, x, number, rate, inputs
        )

    def run_scanned(x, scanned):
        params, number, rate = scanned
        call = partial(_run_block, graphdef, kernel, 0)
        if remat:  # a loop keeps what is computed again apart by itself
            call = jax.checkpoint(call, prevent_cse=False)
        return call(params, x, number, rate, inputs), None

    if not scan or len(blocks) < 2:
        for i, block in enumerate(blocks):
            x = run(block, x, first + i, None if rates is None else rates[i])
        return x
    graphdef = nnx.graphdef(blocks[0])
    states = [nnx.to_pure_dict(nnx.state(block)) for block in blocks]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    numbers = first + jnp.arange(len(blocks))
    rates = None if rates is None else jnp.array(rates[: len(blocks)], jnp.float32)
    return jax.lax.scan(run_scanned, x, (params, numbers, rates))[0]


def _run_block(graphdef, kernel, skip, params, x, number, rate, inputs):
    block = nnx.merge(graphdef, params)
    inputs = inputs | ({"skip": skip} if skip else {})  # which MLP blocks do not know
    return block(x, number=number, rate=rate, kernel=kernel, **inputs)


_jitted_block = jax.jit(_run_block, static_argnums=(0, 1, 2))


def _call(dtype):
    """`_run_block`, which on CPUs is a program of its own, compiled once for all alike.

    In a single program XLA for CPUs adds up the residual branches before a block again
    in every kernel that takes the sum, the more the deeper. Not in bfloat16, which a
    call rounds more often than a single program does; nor where axes of the mesh are
    divided by hand already: XLA cannot divide a call over the devices of the others.
    """
    single = kernels.platform() != "cpu" or dtype != jnp.float32
    manual = AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
    return _run_block if single or manual else _run_called


def _run_called(*arguments):
    with set_xla_metadata(inlineable="false"):  # XLA keeps the call
        return _jitted_block(*arguments)


def attention_cost(
    block: AttentionBlock, tokens: int, pairs: int, layer_norm_cost: int
) -> int:
    """`row_cost` of an attention block plus its two products over `pairs` of tokens."""
    products = 2 * pairs * block.attn.proj.in_features
    return row_cost(block, tokens, layer_norm_cost) + products
