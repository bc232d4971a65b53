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
from networks import abstract_model, fast_jit, random_weight

from hivit_jax.tree import split

# Blocks with and without a property that excludes the attention kernel

# The grid has an odd number of tokens, and 2x2 windows do not fill it.
BLOCK_GRID, WINDOW = (3, 5), 2
# Property that excludes a kernel -> arguments of the model
SPECIAL = {
    "nothing": {},
    "key mask": {},
    "windows": {"window_size": WINDOW},
    "relative bias": {"relative_position": True},
}


def main_stage_block(special: str, batch: int, mlp_ratio: float = 4.0, **options):
    """Return (graphdef, parameters, inputs besides x) of a main-stage block."""
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
        inputs["key_mask"] = hidden_keys(batch)
    if special == "relative bias":
        inputs["relative_index"] = relative_index()
    return graphdef, jax.tree_util.tree_map_with_path(random_weight, params), inputs


def assert_block_equals_plain(block, x, cotangent, kernels, **inputs):
    """Check the kernels of a block, and compare it with the block without kernels.

    The output and the gradients of x and all parameters are compared.

    Args:
      block: (graphdef, parameters).
      kernels: names of the kernels that must run.
      inputs: arguments of the block besides x.
    """
    graphdef, params = block
    leaves, tree = jax.tree.flatten(params)

    def run(choice, x, *leaves):
        block = nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))
        return block(x, kernels=choice, **inputs)

    arrays = [x, *leaves]
    assert kernels_in(jax.make_jaxpr(partial(run, "fused"))(*arrays).jaxpr) == kernels
    assert_close(
        *(
            fast_jit(partial(output_and_gradients, partial(run, choice)))(
                arrays, cotangent
            )
            for choice in ("fused", "plain")
        )
    )


def unit_coordinates():
    """Return row and column of every unit, row-major."""
    return np.divmod(np.arange(math.prod(BLOCK_GRID)), BLOCK_GRID[1])


def hidden_keys(batch: int) -> np.ndarray:
    """Return a key mask [B, N] that hides every third unit, shifted for each image."""
    units = np.arange(math.prod(BLOCK_GRID))
    return ((units + np.arange(batch)[:, None]) % 3 > 0).astype(np.int32)


def relative_index() -> np.ndarray:
    """Return the row index in the bias table for each query and key, [N, N]."""
    (rows, columns), (height, width) = unit_coordinates(), BLOCK_GRID
    row_distance = rows[:, None] - rows + height - 1
    column_distance = columns[:, None] - columns + width - 1
    return row_distance * (2 * width - 1) + column_distance


def plain_block(special: str, params: dict, x: jax.Array) -> jax.Array:
    """Compute the block of `main_stage_block` in plain JAX.

    Units are not split into windows. A mask restricts attention to each window.
    """
    batch, tokens, width = x.shape
    bias, mask = None, None
    if special == "key mask":
        mask = jnp.asarray(hidden_keys(batch) > 0)[:, None, None, :]
    if special == "windows":
        window = np.stack(
            [coordinate // WINDOW for coordinate in unit_coordinates()], -1
        )
        mask = jnp.asarray((window[:, None] == window).all(-1))[None, None]
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
