"""Blocks of the main stage, with kernels and in plain JAX."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from kernel_cases import (
    assert_close,
    kernels_in,
    layer_norm,
    library_attention,
    output_and_gradients,
    plain_mlp,
)
from networks import abstract_model, random_weight, unoptimized_jit

from hivit_jax.tree import split

# The grid has an odd number of tokens, and 2x2 windows do not fill it.
BLOCK_GRID, WINDOW = (3, 5), 2
# Special property of a block, or "ordinary" -> arguments of the model. A key mask and
# padded windows exclude the TPU kernel for attention.
SPECIAL = {
    "ordinary": {},
    "key mask": {},
    "windows": {"window_size": WINDOW},
    "relative bias": {"relative_position": True},
}


def main_stage_block(special: str, batch: int, mlp_ratio: float = 4.0, **options):
    """Return (graphdef, parameters, inputs besides x) of a main-stage block.

    Args:
      special: key of `SPECIAL`.
      options: arguments of the model, or the grid of units as `grid`.
    """
    options = {"relative_position": False} | SPECIAL[special] | options
    sizes = {"embed_dim": 128, "depths": (1, 1, 1), "num_heads": 2}
    grid = options.pop("grid", BLOCK_GRID)
    model = abstract_model(
        "hivit_base",
        image_size=tuple(16 * side for side in grid),
        mlp_ratio=mlp_ratio,
        num_classes=2,
        **sizes,
        **options,
    )
    graphdef, params = split(model.encoder.stages[-1][0])
    inputs = {}
    if special == "key mask":
        inputs["key_mask"] = make_key_mask(batch)
    if special == "relative bias":
        inputs["relative_index"] = relative_index()
    return graphdef, jax.tree_util.tree_map_with_path(random_weight, params), inputs


def assert_fused_equals_unfused(block, x, cotangent, kernel_names, **inputs):
    """Compare a block with kernels="fused" with the same block with kernels="plain".

    The output and the gradients of x and all parameters must be close.

    Args:
      block: (graphdef, parameters).
      kernel_names: names of the kernels that must run, in order.
      inputs: arguments of the block besides x.
    """
    graphdef, params = block
    leaves, tree = jax.tree.flatten(params)

    def run(choice, x, *leaves):
        block = nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))
        return block(x, kernels=choice, **inputs)

    arrays = [x, *leaves]
    jaxpr = jax.make_jaxpr(partial(run, "fused"))(*arrays).jaxpr
    assert kernels_in(jaxpr) == kernel_names
    assert_close(
        *(
            unoptimized_jit(partial(output_and_gradients, partial(run, choice)))(
                arrays, cotangent
            )
            for choice in ("fused", "plain")
        )
    )


def unit_coordinates():
    """Return the rows and the columns of all units, in row-major order."""
    return np.divmod(np.arange(math.prod(BLOCK_GRID)), BLOCK_GRID[1])


def make_key_mask(batch: int) -> np.ndarray:
    """Return a key mask [B, N]: 0 for every third unit, shifted by 1 per image."""
    units = np.arange(math.prod(BLOCK_GRID))
    return ((units + np.arange(batch)[:, None]) % 3 > 0).astype(np.int32)


def relative_index() -> np.ndarray:
    """Return the index into the bias table for each query and key, [N, N]."""
    (rows, columns), (height, width) = unit_coordinates(), BLOCK_GRID
    row_distance = rows[:, None] - rows + height - 1
    column_distance = columns[:, None] - columns + width - 1
    return row_distance * (2 * width - 1) + column_distance


def plain_block(special: str, params: dict, x: jax.Array) -> jax.Array:
    """Compute the block of `main_stage_block` in plain JAX.

    A mask restricts attention to windows; the units are not partitioned.
    """
    batch, tokens, width = x.shape
    bias, mask = None, None
    if special == "key mask":
        mask = jnp.asarray(make_key_mask(batch) > 0)[:, None, None, :]
    if special == "windows":
        window_of_unit = np.stack(
            [coordinate // WINDOW for coordinate in unit_coordinates()], -1
        )
        same_window = (window_of_unit[:, None] == window_of_unit).all(-1)
        mask = jnp.asarray(same_window)[None, None]
    if special == "relative bias":
        table = params["attn/relative_position_bias_table"]
        bias = jnp.moveaxis(table[relative_index()], -1, 0)[None]
    y = layer_norm(x, params["norm1/scale"], params["norm1/bias"])
    qkv = jnp.einsum("bnc,cshd->sbnhd", y, params["attn/qkv/kernel"])
    q, k, v = qkv + params["attn/qkv/bias"][:, None, None]
    y = library_attention(q, k, v, bias=bias, mask=mask).reshape(x.shape)
    x = x + y @ params["attn/proj/kernel"] + params["attn/proj/bias"]
    mlp_params = [params[f"norm2/{name}"] for name in ("scale", "bias")]
    mlp_params += [params[f"mlp/fc{i}/{k}"] for i in (1, 2) for k in ("kernel", "bias")]
    return plain_mlp(x.reshape(-1, width), *mlp_params).reshape(x.shape)
