"""Dot-product attention of q, k and v.

Layers call `dot_product_attention` if no kernel of `dispatch.attention` runs the whole
residual branch: norm, qkv, attention and output projection.
"""

import math

import jax
import jax.numpy as jnp

from hivit_jax.kernels import dispatch, target


def dot_product_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    bias: jax.Array | None,
    mask: jax.Array | None,
    choice: str,
) -> jax.Array:
    """Return the attention output, [B, N, heads, head_width], the shape of q, k and v.

    The kernel of `dispatch.long_attention` is used if it supports the arguments.
    Otherwise CPUs use `unnormalized_softmax`. GPUs use `cudnn_attention` if q is
    bfloat16, the head width is a multiple of 8 up to 128, all images share the bias,
    and there is no mask. cuDNN saves no scores for the backward pass. All other cases
    use `jax.nn.dot_product_attention`.

    Args:
      bias, mask: see `unnormalized_softmax`.
      choice: see `dispatch.mlp`; "plain" also excludes cuDNN.
    """
    out = dispatch.long_attention(q, k, v, bias, mask, choice)
    if out is not None:
        return out
    if target.platform() == "cpu":
        weights, sums = unnormalized_softmax(q, k, bias, mask)
        # Divides the output, not the weights, by the sums. The backward pass then gets
        # the gradient of a sum from head_width values instead of from N weights.
        arguments = "bhqk,bhkd->bhqd", weights.astype(v.dtype), jnp.swapaxes(v, 1, 2)
        out = jnp.einsum(*arguments, preferred_element_type=jnp.float32) / sums
        return jnp.swapaxes(out, 1, 2).astype(v.dtype)
    head_width = q.shape[-1]
    uses_cudnn = (
        target.platform() == "gpu"
        and choice != "plain"
        and (q.dtype == jnp.bfloat16 and head_width % 8 == 0 and head_width <= 128)
        and (bias is None or len(bias) == 1)
        and mask is None
    )
    if uses_cudnn:
        return cudnn_attention(q, k, v, bias)
    return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask)


def cudnn_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None
) -> jax.Array:
    """Compute `dot_product_attention` with cuDNN, for bfloat16 and without a mask.

    Odd numbers of tokens are padded, because JAX supports the backward pass of cuDNN
    only for even numbers.

    The bias, [1, heads, N, N], is rounded to bfloat16, like q and k. cuDNN sums the
    gradient of the bias over the images of a GPU and returns the sum in bfloat16. The
    all-reduce of these sums is in bfloat16 too, as for the gradients of weights.
    """
    batch, tokens = q.shape[:2]
    options = {} if bias is None else {"bias": bias.astype(q.dtype)}
    if tokens % 2:
        q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
        if bias is not None:
            padding = (0, 0), (0, 0), (0, 1), (0, 1)
            options["bias"] = jnp.pad(options["bias"], padding)
        names = "query_seq_lengths", "key_value_seq_lengths"
        options |= dict.fromkeys(names, jnp.full(batch, tokens, jnp.int32))
    out = jax.nn.dot_product_attention(q, k, v, **options, implementation="cudnn")
    return out[:, :tokens]


def unnormalized_softmax(
    q: jax.Array, k: jax.Array, bias: jax.Array | None, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Return attention weights before normalization, and the sums to divide them by.

    Args:
      q, k: [B, N, heads, head_width].
      bias: added to the scores, broadcasts over [B, heads, N, N]; or None.
      mask: bool, broadcasts over [B, heads, N, N], True where a key may be attended to;
        or None. A query without any such key attends to all keys equally.

    Returns:
      ``exp(scores - largest score of the query)``, float32 [B, heads, queries, keys],
      and its sums over keys, [B, heads, queries, 1].
    """
    # Without these transposes, XLA:CPU takes 1.5 times as long.
    q, k = jnp.swapaxes(q, 1, 2), jnp.swapaxes(k, 1, 2)
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
    scores = scores / math.sqrt(q.shape[-1])
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    largest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    return weights, weights.sum(-1, keepdims=True)
