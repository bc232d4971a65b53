"""Selection of the fused kernels that run residual branches.

On TPUs, `mlp` and `attention` run a residual branch as one kernel. `long_attention`
runs only the attention itself (q k^T, softmax, product with v) as a kernel. On GPUs,
`layer_norm` runs the LayerNorm as a kernel. All four return None if no kernel supports
the arguments. The layers then use plain operations or cuDNN.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from hivit_jax.kernels import norm_triton
from hivit_jax.kernels.attention_groups import LANES, bias_bytes
from hivit_jax.kernels.attention_tpu import attention_block
from hivit_jax.kernels.flash_tpu import flash_attention, padded_tokens, vmem_bytes
from hivit_jax.kernels.mlp_tpu import mlp_block
from hivit_jax.kernels.numerics import TILE_ROWS, Plan, Weights
from hivit_jax.kernels.target import block_rows, find_target

CHOICES = ("auto", "fused", "plain")
# `long_attention` pads tokens to multiples of 128. With fewer tokens, too much of its
# work would be padding.
MIN_TOKENS = 256
# Function that takes one factor per image ([B] float32; None: 1) and returns
# x + factor * branch.
ResidualFn = Callable[[jax.Array | None], jax.Array]


def mlp(x: jax.Array, norm: Any, mlp: Any, choice: str) -> ResidualFn | None:
    """Return a function that runs the branch as one kernel, or None.

    The function returns ``x + factor * fc2(gelu(fc1(norm(x))))``. GPUs have no such
    kernel.

    Args:
      x: [..., C].
      norm, mlp: modules with the parameters.
      choice: backends whose kernels may run. "auto": TPUs and GPUs, in bfloat16.
        "fused": also CPUs, in any dtype, but slowly. "plain": none.
    """
    target = find_target(choice, x)
    width, hidden = mlp.fc1.kernel.shape
    if target is None or target.platform == "gpu" or x.size == 0:
        return None
    if width % LANES or hidden % LANES:
        return None
    total = x.size // width // target.shards
    plan = Plan(norm.epsilon, interpret=target.interpret)
    weights = _weights(x.dtype, norm, mlp.fc1, mlp.fc2)
    # Larger blocks take longer to compile, and smaller blocks need more steps.
    preferred = min(max(2**28 // (width * hidden), 128), 1024)
    # Bytes of VMEM in the backward pass. `fixed`: weights and weight gradients, in
    # float32 and in x's dtype. `per_row`: x and hidden activations.
    fixed, per_row = 24 * width * hidden, 24 * hidden + 40 * width
    max_rows = (target.vmem - fixed) // per_row
    rows = block_rows(total, TILE_ROWS, preferred, max_rows)
    # With blocks of fewer rows than a tile of the matrix unit, the products for the
    # weight gradients leave most of the unit idle, and plain operations are faster.
    if rows is None or max_rows < LANES:
        return None
    flops = 2 * width * hidden  # of a matrix product, per row
    num_saved = int(target.should_save(2 * flops, 5 * flops, flops, width, 2 * hidden))
    plan = replace(plan, rows=rows, num_saved=num_saved)
    return lambda branch_scale: target.run(
        mlp_block, x, (weights,), plan, (branch_scale,)
    )


def attention(
    x: jax.Array,
    norm: Any,
    attention: Any,
    relative_index: jax.Array | None,
    key_mask: jax.Array | None,
    choice: str,
) -> ResidualFn | None:
    """Return a function that runs the branch as one kernel, or None.

    The function returns ``x + factor * attention(norm(x))``. No kernel supports key
    masks, padded or shifted windows, or a bias that differs between images. GPUs have
    no such kernel. For the arguments see `mlp` and `Attention.__call__`.
    """
    target = find_target(choice, x)
    qkv, proj, windows = attention.qkv, attention.proj, attention.windows
    width, _, heads, head_width = qkv.kernel.shape
    if target is None or target.platform == "gpu" or x.size == 0:
        return None
    if key_mask is not None or width % LANES or LANES % head_width:
        return None
    if windows is not None and (windows.is_padded or windows.shift):
        return None
    bias = attention.position_bias(relative_index)
    if bias is not None and bias.ndim == 4:
        return None
    x = x if windows is None else windows.partition(x)
    tokens, heads_per_tile = x.shape[1], LANES // head_width
    # Bytes of VMEM in the backward pass. `fixed`: weights and their gradients, four
    # float32 score arrays [tokens, tokens] for each head of a tile, and the bias.
    # `per_row`: activations.
    fixed, per_row = 48 * width**2 + 16 * tokens**2 * heads_per_tile, 76 * width
    fixed += 0 if bias is None else bias_bytes(tokens, heads, head_width)
    total, min_rows = x.shape[0] * tokens // target.shards, math.lcm(tokens, TILE_ROWS)
    rows = block_rows(total, min_rows, 1024, (target.vmem - fixed) // per_row)
    if rows is None:
        return None
    # Operations per row: of a product with weights [C, C], and of one with the scores.
    projection_flops, score_flops = 2 * width**2, 2 * tokens * width * heads_per_tile
    forward = 4 * projection_flops + 2 * score_flops
    backward = 11 * projection_flops + 6 * score_flops
    num_saved, qkv_flops = 0, 3 * projection_flops
    if target.should_save(forward, backward, qkv_flops, width, 6 * width):
        # Also saves the outputs of the heads if recomputing them takes longer than
        # writing them. Otherwise, saving would only cost memory.
        num_saved = 1 + (score_flops > target.balance * 2 * width)
    weights = _weights(x.dtype, norm, qkv, proj)
    plan = Plan(norm.epsilon, rows, num_saved, target.interpret, heads, tokens)

    def run(branch_scale):
        if branch_scale is not None and windows is not None:
            branch_scale = jnp.repeat(branch_scale, len(x) // len(branch_scale))
        out = target.run(attention_block, x, (weights, bias), plan, (branch_scale,))
        return out if windows is None else windows.merge(out)

    return run


def long_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    choice: str,
) -> jax.Array | None:
    """Return the attention output for `MIN_TOKENS` or more tokens with a bias, or None.

    This kernel, for TPUs, needs less VMEM than `attention` and so supports more tokens.
    It supports neither masks nor a bias that differs between images. For the arguments
    see `attention_xla.dot_product_attention`.
    """
    target, (_, tokens, heads, head_width) = find_target(choice, q), q.shape
    width = heads * head_width
    if target is None or target.platform == "gpu" or q.size == 0:
        return None
    if tokens < MIN_TOKENS or width % LANES or LANES % head_width:
        return None
    if mask is not None or bias is None or len(bias) > 1:
        return None
    length = padded_tokens(tokens)
    rows = block_rows(length, LANES, 2 * LANES, length)
    if vmem_bytes(tokens, rows, head_width, q.dtype.itemsize) > target.vmem:
        return None
    plan = Plan(0.0, rows=rows, interpret=target.interpret, heads=heads, tokens=tokens)
    q, k, v = (x.reshape(*x.shape[:2], width) for x in (q, k, v))  # [B, N, C]
    out = target.run(flash_attention, q, (bias[0],), plan, (k, v))
    return out.reshape(*out.shape[:2], heads, head_width)


def layer_norm(x: jax.Array, norm: Any, choice: str) -> tuple | None:
    """Return x and ``norm(x)``, both from a GPU kernel, or None.

    The skip connection must use the returned x, because the backward kernel adds the
    gradients that reach x by the skip connection and by the norm. For the arguments see
    `mlp`.
    """
    target, width = find_target(choice, x), x.shape[-1]
    if target is None or target.platform != "gpu" or x.size == 0:
        return None
    if not norm_triton.supports(x.size // width // target.shards, width):
        return None
    weights, plan = (norm.scale[...], norm.bias[...]), Plan(norm.epsilon)
    return target.run(norm_triton.skip_and_norm, x, weights, plan)


def _weights(dtype, norm, *linear_layers):
    """Return the parameters of a branch, with the head axes of qkv flattened."""
    params = []
    for layer in linear_layers:
        kernel, bias = layer.kernel[...].astype(dtype), layer.bias[...].astype(dtype)
        params += [kernel.reshape(len(kernel), -1), bias.reshape(-1)]
    return Weights(norm.scale[...], norm.bias[...], *params)
