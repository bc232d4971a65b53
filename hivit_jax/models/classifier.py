"""The classifier on HiViT's encoder: finetuning, supervised training, linear probe."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.models.hivit import Features, HiViT, image_grid
from hivit_jax.models.layers import (
    BatchNorm,
    LayerNorm,
    Linear,
    parameter_count,
    row_cost,
)


class Classifier(Features):
    """HiViT with mean pooling, LayerNorm and a linear head (official ``HiViT``).

    Args:
      num_classes: classes of the head.
      fc_norm: LayerNorm between pooling and head; MMPretrain's HiViT has none.
      running_norm: instead of it `BatchNorm` without scale and bias, for a linear probe
        (MAE's ``main_linprobe.py``: eps 1e-6).
      encoder: arguments of `HiViT`.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        fc_norm: bool = True,
        running_norm: bool = False,
        rngs: nnx.Rngs,
        **encoder,
    ):
        self.encoder = HiViT(rngs=rngs, **encoder)
        dim, eps = self.encoder.embed_dim, self.encoder.patch_embed.norm.epsilon
        # Pooled features, their norm and the logits are float32 in any compute dtype.
        if running_norm:
            self.fc_norm = BatchNorm(dim, epsilon=1e-6, affine=False)
        else:
            self.fc_norm = LayerNorm(dim, epsilon=eps, rngs=rngs) if fc_norm else None
        self.head = Linear(dim, num_classes, rngs=rngs)

    def __call__(
        self, images: jax.Array, *, sample_keys: jax.Array | None = None
    ) -> jax.Array:
        """[B, H, W, C] -> logits [B, num_classes] float32; keys as in `HiViT`."""
        return self.head(self.pooled(images, sample_keys=sample_keys))

    def pooled(
        self, images: jax.Array, *, sample_keys: jax.Array | None = None
    ) -> jax.Array:
        """[B, H, W, C] -> what the head sees, [B, E] float32."""
        pooled = self.encoded(images, sample_keys=sample_keys)
        return pooled if self.fc_norm is None else self.fc_norm(pooled)

    def encoded(
        self, images: jax.Array, *, sample_keys: jax.Array | None = None
    ) -> jax.Array:
        """[B, H, W, C] -> mean of the encoder's last tokens, [B, E] float32."""
        tokens = self.encoder(images, sample_keys=sample_keys)[-1]  # [B, N, E]
        return tokens.astype(jnp.float32).mean(1)

    def parameter_count(self) -> int:
        """Parameters, head included: 66.42 M for hivit_base."""
        return parameter_count(self)

    def macs(
        self,
        image_size: int | Sequence[int] | None = None,
        *,
        layer_norm_cost: int = 5,
    ) -> int:
        """What one image costs, counted as in the published tables: 15.85 G for base.

        Multiply-adds of convolution, Linears and both attention products, plus
        `layer_norm_cost` per LayerNorm output (5: the fvcore rule behind the published
        figures; 0: multiply-adds alone). Activations, biases and softmax count 0.
        """
        grid = image_grid(self.encoder, image_size)
        cost = self.encoder.macs(grid, layer_norm_cost=layer_norm_cost)
        if self.fc_norm is not None:
            cost += row_cost(self.fc_norm, 1, layer_norm_cost)
        return cost + row_cost(self.head, 1, layer_norm_cost)
