"""Classifier on an encoder: finetuning, supervised training, linear probe."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.models.base import Model, make_info
from hivit_jax.models.config import ClassifierConfig, EncoderConfig, RunOptions
from hivit_jax.models.encoder import Encoder
from hivit_jax.models.explicit_axes import accepts_explicit_axes
from hivit_jax.models.flops import encoder_cost, module_cost
from hivit_jax.models.hivit import HiViT
from hivit_jax.models.layers import Linear
from hivit_jax.models.norms import BatchNorm, LayerNorm


class Classifier(Model):
    """HiViT with mean pooling, LayerNorm and a linear head (official ``HiViT``)."""

    name, description = "hivit_base", "a classifier"
    # The initial weights of a new head on a pretrained encoder are multiplied by this
    # factor. Their standard deviation is then 2e-5 instead of 0.02, as in the official
    # ``main_finetune.py``.
    new_head_scale: float = 2e-5 / 0.02
    encoder_class: type[Encoder] = HiViT

    def __init__(
        self,
        config: ClassifierConfig,
        run_options: RunOptions = RunOptions(),  # noqa: B008
        *,
        rngs: nnx.Rngs,
    ):
        self.encoder = self.encoder_class(config, run_options, rngs=rngs)
        self._add_head(config, config.embed_dim, config.fc_norm, rngs)

    def _add_head(
        self, config: EncoderConfig, dim: int, fc_norm: bool, rngs: nnx.Rngs
    ) -> None:
        """Set `info`, `fc_norm` and `head`.

        Args:
          config: a config with `num_classes` and `running_norm`.
          dim: width of the head token; see `head_token`.
          fc_norm: normalize the head token with a LayerNorm; ignored if the config has
            `running_norm=True`.
        """
        self.info = make_info(config)
        # The head token, its norm and the logits are float32 for any compute dtype.
        if config.running_norm:
            self.fc_norm = BatchNorm(dim, epsilon=1e-6, affine=False)
        elif fc_norm:
            self.fc_norm = LayerNorm(dim, epsilon=config.layer_norm_eps, rngs=rngs)
        else:
            self.fc_norm = None
        num_classes = config.num_classes
        self.head = Linear(dim, num_classes, rngs=rngs) if num_classes else None

    @accepts_explicit_axes
    def __call__(
        self, images: jax.Array, *, drop_path_keys: jax.Array | None = None
    ) -> jax.Array:
        """Return logits, [B, H, W, C] -> [B, num_classes] float32.

        A model without a head returns the input of the head, [B, E] float32.

        Args:
          drop_path_keys: [B] PRNG keys for drop path; None (evaluation): no drop path.
        """
        pooled = self.pooled(images, drop_path_keys=drop_path_keys)
        return pooled if self.head is None else self.head(pooled)

    @accepts_explicit_axes
    def pooled(
        self, images: jax.Array, *, drop_path_keys: jax.Array | None = None
    ) -> jax.Array:
        """Return the head's input, after `fc_norm`: [B, H, W, C] -> [B, E] float32."""
        token = self.head_token(images, drop_path_keys=drop_path_keys)
        return token if self.fc_norm is None else self.fc_norm(token)

    @accepts_explicit_axes
    def head_token(
        self, images: jax.Array, *, drop_path_keys: jax.Array | None = None
    ) -> jax.Array:
        """Return the mean token, before `fc_norm`: [B, H, W, C] -> [B, E] float32."""
        return self.mean_token(images, drop_path_keys=drop_path_keys)

    @accepts_explicit_axes
    def mean_token(
        self, images: jax.Array, *, drop_path_keys: jax.Array | None = None
    ) -> jax.Array:
        """Return the mean of the output tokens, [B, H, W, C] -> [B, E] float32."""
        tokens = self.encoder(images, drop_path_keys=drop_path_keys)[-1]  # [B, N, E]
        return tokens.astype(jnp.float32).mean(1)

    def macs(
        self,
        image_size: int | Sequence[int] | None = None,
        *,
        layer_norm_cost: int = 5,
    ) -> int:
        """Return the multiply-adds of one image's forward pass.

        The result agrees with the published tables (15.85 G for hivit_base). It
        includes the convolution, all Linears, both attention products and the
        LayerNorms. It excludes activations, biases and softmax.

        Args:
          image_size: side or (height, width) in pixels; None: as in the config.
          layer_norm_cost: cost per LayerNorm output element. The published numbers
            use 5, fvcore's rule. 0: LayerNorms do not count.
        """
        grid = self._grid(image_size)
        cost = encoder_cost(self.encoder, grid, layer_norm_cost=layer_norm_cost)
        for part in (self.fc_norm, self.head):
            cost += module_cost(part, 1, layer_norm_cost)
        return cost
