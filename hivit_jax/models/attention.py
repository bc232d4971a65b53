"""Multi-head self-attention, with a float32 softmax for any compute dtype."""

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.kernels import attention_xla, target
from hivit_jax.models import positions
from hivit_jax.models.layers import INIT, Linear
from hivit_jax.models.positions import Grid
from hivit_jax.models.windows import Windows


class Attention(nnx.Module):
    """Multi-head self-attention over tokens, with optional relative position bias.

    Args:
      grid: tokens along height and width of the image, or of a window if `windows` is
        not None; None: no relative position bias.
      windows: windows that attention is limited to; None: global attention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Grid | None,
        windows: Windows | None = None,
        *,
        dtype,
        rngs: nnx.Rngs,
        kernel_init=INIT,
    ):
        self.grid, self.windows = grid, windows
        # The kernel has a head axis, [C, 3, heads, C/heads], so that heads can be
        # sharded. Flattened, the kernel is the official [q | k | v] matrix.
        self.qkv = nnx.LinearGeneral(
            dim,
            (3, num_heads, dim // num_heads),
            kernel_init=kernel_init,
            dtype=dtype,
            rngs=rngs,
        )
        self.proj = Linear(dim, dim, kernel_init=kernel_init, dtype=dtype, rngs=rngs)
        if grid is None:
            self.relative_position_bias_table = None
        else:
            table_rows = (2 * grid[0] - 1) * (2 * grid[1] - 1)
            table = INIT(rngs.params(), (table_rows, num_heads), jnp.float32)
            self.relative_position_bias_table = nnx.Param(table)

    def __call__(
        self,
        x: jax.Array,
        relative_index: jax.Array | None = None,
        key_mask: jax.Array | None = None,
        kernels: str = "plain",
    ) -> jax.Array:
        """Return the attention output, [B, K, C] -> [B, K, C].

        Args:
          relative_index: int [K, K] or [B, K, K], rows of the relative position table;
            None: x holds all tokens in row-major order. Ignored with windows.
          key_mask: [B, K], nonzero for keys that may be attended to; None: all keys. A
            sample or window without such keys has a uniform softmax, not NaN. Windows
            with `attend_padding` do not support masks.
          kernels: see `RunOptions`.
        """
        q, k, v, bias, mask = self._softmax_inputs(x, relative_index, key_mask)
        out = attention_xla.dot_product_attention(
            q, k, v, bias=bias, mask=mask, choice=kernels
        )
        if self.windows is not None:
            out = self.windows.merge(out)
        return self.proj(out.reshape(x.shape))

    def probabilities(
        self,
        x: jax.Array,
        relative_index: jax.Array | None = None,
        key_mask: jax.Array | None = None,
    ) -> jax.Array:
        """Return the attention weights, float32 [B, heads, K, K].

        The query axis is before the key axis, and each row sums to 1. With W windows of
        S tokens, the shape is [B, W, heads, S, S]; rows of padding have no meaning.
        For the arguments see `__call__`.
        """
        q, k, _, bias, mask = self._softmax_inputs(x, relative_index, key_mask)
        weights, sums = attention_xla.unnormalized_softmax(q, k, bias, mask)
        weights = weights / sums
        if self.windows is not None:
            rows, columns = self.windows.counts
            weights = weights.reshape(len(x), rows * columns, *weights.shape[1:])
        return weights

    def position_bias(self, relative_index: jax.Array | None) -> jax.Array | None:
        """Return the relative position bias, float32; None if `grid` is None.

        The shape is [heads, K, K], or [B, heads, K, K] for an index [B, K, K]. For the
        argument see `__call__`.
        """
        if self.relative_position_bias_table is None:
            return None
        table = self.relative_position_bias_table[...]
        if relative_index is None or self.windows is not None:
            return positions.relative_position_bias(table, self.grid)
        return jnp.moveaxis(table[relative_index], -1, -3)

    def _project_qkv(self, x):
        """Return q, k, v as one array, [B, K, C] -> [B, K, 3, heads, C/heads]."""
        matrix = x.reshape(-1, x.shape[-1])
        if target.heads_are_sharded():
            qkv = self.qkv(matrix)
        else:  # as one matrix product, for the reasons stated in `RowLinear`
            kernel = self.qkv.kernel[...].reshape(x.shape[-1], -1).astype(x.dtype)
            qkv = matrix @ kernel + self.qkv.bias[...].reshape(1, -1).astype(x.dtype)
        return qkv.reshape(*x.shape[:2], *self.qkv.bias.shape)

    def _softmax_inputs(self, x, relative_index, key_mask):
        """Return q, k, v, each [B, K, heads, C/heads], then bias and mask.

        Bias and mask broadcast over [B, heads, K, K], or are None. With windows, B*W
        replaces B, and S replaces K (see `Windows`).
        """
        windows = self.windows
        if windows is not None and windows.attend_padding:
            qkv = self._project_qkv(windows.partition(x))  # [B*W, S, 3, heads, C/heads]
        else:
            qkv = self._project_qkv(x)  # [B, K, 3, heads, C/heads]
            if windows is not None:
                qkv = windows.partition(qkv)
                if key_mask is None and windows.is_padded:
                    key_mask = jnp.ones(x.shape[:2], bool)
                if key_mask is not None:
                    # Pads the mask with zeros, so that no query attends to padding.
                    key_mask = windows.partition(key_mask)
        q, k, v = (qkv[:, :, i] for i in range(3))
        bias = self.position_bias(relative_index)
        bias = bias[None] if bias is not None and bias.ndim == 3 else bias
        if windows is not None and windows.shift:
            bias = bias + windows.shift_mask()[:, None]  # [W, heads, S, S]
            bias = jnp.broadcast_to(bias, (len(x), *bias.shape))
            bias = bias.reshape(-1, *bias.shape[2:])
        mask = None if key_mask is None else (key_mask != 0)[:, None, None, :]
        return q, k, v, bias, mask
