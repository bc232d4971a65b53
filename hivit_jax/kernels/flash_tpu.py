"""Attention of many tokens as a TPU kernel, without scores in HBM.

`attention_tpu` keeps the bias of all heads and the weights of the whole residual branch
(normalization, qkv and output projection) in VMEM, which limits it to about 600 tokens
with a bias. This kernel computes only ``softmax(q k^T / sqrt(head_width) + bias) v``,
for one tile of 128 lanes at a time, which contains one head or several narrower heads.
The bias of these heads and the sum of its gradient stay in VMEM while a core processes
all images. So HBM traffic for the bias does not depend on the number of images.

VMEM holds, for one head, the scores between a block of queries and all keys. Therefore
the softmax needs no running maximum, and the backward pass can recompute the softmax
without saved maxima or sums. Only q, k, v and the bias are saved.

The N tokens of an image are padded to N', a multiple of 128. Queries, keys and values
are tiles [N', 128] of arrays [B, N', C], so that no array is transposed. To compute one
head of a tile, the lanes of the tile's other heads are set to 0 in q and in the
gradient of the output, as in `attention_tpu`.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hivit_jax.kernels.attention_groups import LANES, MASKED, head_lanes
from hivit_jax.kernels.grid_tpu import compiler_params
from hivit_jax.kernels.numerics import F32, Plan, dot


def flash_attention(
    q: jax.Array, bias: jax.Array, k: jax.Array, v: jax.Array, plan: Plan
) -> jax.Array:
    """Return ``softmax(q k^T / sqrt(head_width) + bias) v``, [B*N, C].

    Images and heads are computed independently.

    Args:
      q: [B*N, C].
      bias: added to the scores of every image, [heads, N, N] float32.
      k, v: [B, N, C].
      plan: `rows` is the number of queries of a block. It must divide
        `padded_tokens(N)`.
    """
    tokens = plan.tokens
    padding, unpadded = (0, padded_tokens(tokens) - tokens), (0, 0)
    token_padding = unpadded, padding, unpadded
    # [B, N', C] each
    arrays = [jnp.pad(x.reshape(k.shape), token_padding) for x in (q, k, v)]
    # Without this bias, queries would attend to the padding.
    bias = jnp.pad(bias, (unpadded, unpadded, padding), constant_values=MASKED)
    bias = jnp.pad(bias, token_padding)  # [heads, N', N']
    return _attend(*arrays, bias, plan)[:, :tokens].reshape(q.shape)


def padded_tokens(tokens: int) -> int:
    """Return a number of tokens rounded up to a multiple of 128."""
    return -(-tokens // LANES) * LANES


def vmem_bytes(tokens: int, rows: int, head_width: int, itemsize: int) -> int:
    """Return the bytes of VMEM for the backward pass.

    Args:
      rows: queries of a block.
      itemsize: bytes of an element of q.
    """
    length = padded_tokens(tokens)
    # Two buffers each: the bias and its gradient; q, k, v, their gradients, and the
    # gradient of the output.
    bias_bytes = 2 * 2 * 4 * (LANES // head_width) * length**2
    tile_bytes = 2 * 7 * itemsize * length * LANES
    sum_bytes = 2 * 4 * length * LANES  # gradients of k and v in float32
    score_bytes = 6 * 4 * rows * length  # six float32 arrays like a block's scores
    return bias_bytes + tile_bytes + sum_bytes + score_bytes


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, bias, plan):
    """Run the forward pass, [B, N', C] -> [B, N', C]."""
    head_width, dtype = _head_width(q, plan), q.dtype

    def kernel(q_ref, k_ref, v_ref, bias_ref, out_ref):
        k, v = k_ref[0], v_ref[0]

        @partial(_for_each_block, q_ref, plan.rows)
        def _(block):
            q = q_ref[0, block, :]
            out = row_sums = jnp.ones(q.shape, F32)
            for index, lanes in enumerate(head_lanes(head_width)):
                q_head = jnp.where(lanes, q, 0)
                p = _exponentials(q_head, k, bias_ref[index, block, :], head_width)
                # The output is divided by the row sums below, after the heads are
                # merged, because a tile then needs one division instead of one per
                # head.
                out = jnp.where(lanes, dot(p.astype(dtype), v), out)
                row_sums = jnp.where(lanes, p.sum(-1, keepdims=True), row_sums)
            out_ref[0, block, :] = (out / row_sums).astype(dtype)

    return _call(kernel, plan, [q, k, v], bias)[0]


def _forward(q, k, v, bias, plan):
    return _attend(q, k, v, bias, plan), (q, k, v, bias)


def _backward(plan, saved, gradient):
    q, k, v, bias = saved
    head_width, dtype = _head_width(q, plan), q.dtype
    factor = np.float32(head_width**-0.5)

    def kernel(q_ref, k_ref, v_ref, dout_ref, bias_ref, *refs):
        dq_ref, dk_ref, dv_ref, dbias_ref, dk_sum, dv_sum = refs
        k, v = k_ref[0], v_ref[0]
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

        @pl.when(pl.program_id(1) == 0)
        def _():
            dbias_ref[...] = jnp.zeros_like(dbias_ref)

        @partial(_for_each_block, q_ref, plan.rows)
        def _(block):
            q, dout = q_ref[0, block, :], dout_ref[0, block, :]
            dq = jnp.zeros(q.shape, F32)
            for index, lanes in enumerate(head_lanes(head_width)):
                q_head, dout_head = (jnp.where(lanes, x, 0) for x in (q, dout))
                p = _exponentials(q_head, k, bias_ref[index, block, :], head_width)
                p = p * (1 / p.sum(-1, keepdims=True))
                dp = dot(dout_head, v, (1, 1))
                ds = p * (dp - (dp * p).sum(-1, keepdims=True))
                dbias_ref[index, block, :] += ds
                ds, p = ds.astype(dtype), p.astype(dtype)
                dq = jnp.where(lanes, dot(ds, k) * factor, dq)
                dk_sum[...] += dot(ds, q_head, (0, 0)) * factor
                dv_sum[...] += dot(p, dout_head, (0, 0))
            dq_ref[0, block, :] = dq.astype(dtype)

        dk_ref[0] = dk_sum[...].astype(dtype)
        dv_ref[0] = dv_sum[...].astype(dtype)

    scratch = [pltpu.VMEM((q.shape[1], LANES), F32)] * 2
    arrays = [q, k, v, gradient]
    return _call(kernel, plan, arrays, bias, scratch, backward=True)


_attend.defvjp(_forward, _backward)


def _head_width(q, plan):
    """Return the width of a head."""
    return q.shape[2] // plan.heads


def _exponentials(q, k, bias, head_width):
    """Return the exponentials of the scores, [rows, N']; the largest of a row is 1."""
    scores = dot(q, k, (1, 1)) * np.float32(head_width**-0.5) + bias
    return jnp.exp(scores - scores.max(-1, keepdims=True))


def _for_each_block(ref: jax.Array, block_size: int, run: Callable) -> None:
    """Call run(slice of rows) for each block of rows of a ref [1, N', 128]."""

    def body(i, _):
        run(pl.ds(pl.multiple_of(i * block_size, block_size), block_size))

    jax.lax.fori_loop(0, ref.shape[1] // block_size, body, None)


def _call(
    kernel: Callable,
    plan: Plan,
    arrays: Sequence[jax.Array],
    bias: jax.Array,
    scratch: Sequence = (),
    backward: bool = False,
) -> list[jax.Array]:
    """Run a kernel for each tile of heads and, within a tile, for each image.

    Args:
      kernel: called with the refs of the arrays, the bias, the outputs and scratch.
      arrays: [B, N', C] each; a call receives [1, N', 128] of each.
      bias: [heads, N', N']; a call receives the bias of the tile's heads.
      backward: return the gradients of q, k, v and the bias. False: return one array
        [B, N', C].
    """
    images, length, width = arrays[0].shape
    heads_per_tile = LANES // _head_width(arrays[0], plan)
    array_spec = pl.BlockSpec((1, length, LANES), lambda tile, image: (image, 0, tile))
    bias_spec = pl.BlockSpec(
        (heads_per_tile, length, length), lambda tile, image: (tile, 0, 0)
    )
    struct = jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)
    out_structs, out_specs, num_products = [struct], [array_spec], 2
    if backward:
        out_structs = [*3 * [struct], jax.ShapeDtypeStruct(bias.shape, bias.dtype)]
        out_specs, num_products = [*3 * [array_spec], bias_spec], 5
    return pl.pallas_call(
        kernel,
        grid=(width // LANES, images),
        in_specs=[array_spec] * len(arrays) + [bias_spec],
        out_specs=out_specs,
        out_shape=out_structs,
        scratch_shapes=scratch,
        compiler_params=compiler_params(plan.interpret),
        cost_estimate=pl.CostEstimate(
            # For each head, the kernel computes `num_products` matrix products with an
            # operand or a result [N', N'].
            flops=2 * num_products * images * length**2 * width * heads_per_tile,
            transcendentals=images * plan.heads * length**2,
            bytes_accessed=sum(
                x.size * x.dtype.itemsize for x in (*arrays, bias, *out_structs)
            ),
        ),
        interpret=plan.interpret,
        name="flash_attention_gradient" if backward else "flash_attention",
    )(*arrays, bias)
