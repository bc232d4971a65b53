"""Attention without a kernel of our own."""

import math

import jax
import jax.numpy as jnp

from hivit_jax.kernels import dispatch


def dot_product_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    bias: jax.Array | None,
    mask: jax.Array | None,
    choice: str,
) -> jax.Array:
    """Attention of q, k, v, each [B, N, heads, head] like the result.

    On GPUs, without bias and mask, by cuDNN, which saves no scores; on CPUs by
    `softmax`; elsewhere by JAX's own function.

    Args:
      bias, mask: see `softmax`.
      choice: as in `mlp`.
    """
    if dispatch.platform() == "cpu":
        weights, sums = softmax(q, k, bias, mask)
        # Normalised after the product: then the gradient sums up rows of the output,
        # not rows of scores.
        product = "bhqk,bhkd->bhqd", weights.astype(v.dtype), jnp.swapaxes(v, 1, 2)
        out = jnp.einsum(*product, preferred_element_type=jnp.float32) / sums
        return jnp.swapaxes(out, 1, 2).astype(v.dtype)
    batch, tokens, _, head = q.shape
    serves = q.dtype == jnp.bfloat16 and head % 8 == 0 and head <= 128
    special = bias is not None or mask is not None
    if dispatch.platform() != "gpu" or not serves or special or choice == "plain":
        return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask)
    # JAX has cuDNN's gradient for even numbers of tokens alone.
    padding, lengths = ((0, 0), (0, tokens % 2), (0, 0), (0, 0)), {}
    if tokens % 2:
        q, k, v = (jnp.pad(x, padding) for x in (q, k, v))
        names = "query_seq_lengths", "key_value_seq_lengths"
        lengths = dict.fromkeys(names, jnp.full(batch, tokens, jnp.int32))
    out = jax.nn.dot_product_attention(q, k, v, **lengths, implementation="cudnn")
    return out[:, :tokens]


def softmax(
    q: jax.Array, k: jax.Array, bias: jax.Array | None, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Unnormalized attention weights: exp(scores - the largest of a row),
    [B, heads, N, N] float32, query first, and the sums of its rows, [B, heads, N, 1].

    Args:
      q, k: [B, N, heads, head].
      bias: to add to the scores, broadcasts over [B, heads, N, N]; or None.
      mask: bool, the same, which keys may be attended to; or None. A row that may
        attend to none attends to all alike.
    """
    # Transposed by hand: with [B, N, heads] XLA for CPUs takes half as long again.
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
