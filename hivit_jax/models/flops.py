"""Numbers of parameters and multiply-adds, counted as in the published tables.

For units and cells see `positions`.
"""

import jax
from flax import nnx

from hivit_jax.models.blocks import AttentionBlock
from hivit_jax.models.encoder import Encoder
from hivit_jax.models.layers import FixedTable
from hivit_jax.models.positions import Grid


def parameter_count(module: nnx.Module) -> int:
    """Return the number of parameters; fixed tables count, as in published numbers."""
    counted = nnx.state(module, nnx.Any(nnx.Param, FixedTable))
    return sum(leaf.size for leaf in jax.tree.leaves(counted))


def module_cost(module: nnx.Module | None, rows: int, layer_norm_cost: int) -> int:
    """Return the cost of a module's Linears and LayerNorms, each on `rows` rows.

    A Linear costs its multiply-adds. A LayerNorm costs `layer_norm_cost` per output
    element. None costs 0.
    """
    if module is None:
        return 0
    cost = 0
    for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        if path[-1] == "kernel":
            cost += rows * leaf.size
        elif path[-1] == "scale":
            cost += rows * leaf.size * layer_norm_cost
    return cost


def attention_block_cost(
    block: AttentionBlock, tokens: int, pairs: int, layer_norm_cost: int
) -> int:
    """Return the cost of an attention block on `tokens` tokens.

    Args:
      pairs: number of query-key pairs.
    """
    products_cost = 2 * pairs * block.attn.proj.in_features
    return module_cost(block, tokens, layer_norm_cost) + products_cost


def encoder_cost(
    encoder: Encoder,
    grid: Grid,
    num_visible: int | None = None,
    *,
    layer_norm_cost: int = 5,
) -> int:
    """Return the cost of encoding `num_visible` units of one image; None: all units.

    As in the published tables, the patch convolution counts for all units, although it
    runs only on the visible units. Attention products of the padding of windows count
    too, because they are computed.
    """
    config, units = encoder.config, grid[0] * grid[1]
    num_visible = units if num_visible is None else num_visible
    cells_per_unit = config.inner_patches**2
    cost = module_cost(encoder.patch_embed, units * cells_per_unit, layer_norm_cost)
    for blocks, merge in zip(encoder.stages, encoder.merges, strict=False):
        cost += module_cost(blocks, num_visible * cells_per_unit, layer_norm_cost)
        cells_per_unit //= 4
        cost += module_cost(merge, num_visible * cells_per_unit, layer_norm_cost)
    tokens = config.class_tokens + num_visible
    for block, windows in zip(encoder.stages[-1], config.windows(grid), strict=True):
        pairs = tokens**2 if windows is None else windows.pairs
        cost += attention_block_cost(block, tokens, pairs, layer_norm_cost)
    return cost
