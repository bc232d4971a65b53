"""Plain ViT: encoder, classifier and masked autoencoder as in the official MAE code.

The units are the patches of the image. A class token, which is never masked, precedes
their tokens. Papers: Dosovitskiy et al. (ICLR 2021) for ViT, He et al. (CVPR 2022) for
the masked autoencoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.keys import setting
from hivit_jax.models import positions
from hivit_jax.models.blocks import AttentionBlock
from hivit_jax.models.classifier import Classifier
from hivit_jax.models.config import AutoencoderConfig, EncoderConfig, RunOptions
from hivit_jax.models.encoder import Encoder
from hivit_jax.models.explicit_axes import accepts_explicit_axes
from hivit_jax.models.flops import module_cost
from hivit_jax.models.layers import INIT, XAVIER, FixedTable, PatchEmbed
from hivit_jax.models.mae import MaskedAutoencoder
from hivit_jax.models.norms import LayerNorm

POOLINGS = ("mean", "token")


@dataclass(frozen=True, kw_only=True)
class ViTConfig(EncoderConfig):
    """Sizes of ViT's encoder, whose only stage has attention. A unit is one cell.

    depth: blocks of the encoder.
    """

    class_tokens: ClassVar[int] = 1
    inner_patches: ClassVar[int] = 1
    relative_position: ClassVar[bool] = False
    multi_scale: ClassVar[bool] = False

    depth: int = setting(low=1, high=1000)

    def __post_init__(self):
        super().__post_init__()
        self.check_widths({"mlp_ratio": self.embed_dim})

    @property
    def depths(self) -> tuple[int]:
        """Blocks per stage."""
        return (self.depth,)


@dataclass(frozen=True, kw_only=True)
class ViTClassifierConfig(ViTConfig):
    """Sizes of ViT's encoder and of the head.

    num_classes: classes of the head; 0: no head. In a recipe, 0 stands for the
      dataset's number of classes.
    pooling: input of the head. "mean": mean of the units' tokens, then `fc_norm`, as in
      MAE's finetuning (official ``global_pool``). "token": the class token after
      `norm`, as in MAE's linear probe.
    running_norm: a `BatchNorm` without scale and bias before the head, for a linear
      probe. With mean pooling it replaces `fc_norm`. The norm and its eps of 1e-6
      follow MAE's ``main_linprobe.py``.
    """

    num_classes: int = setting(1000, low=0, high=10**7)
    pooling: str = setting("mean", choices=POOLINGS)
    running_norm: bool = False


@dataclass(frozen=True, kw_only=True)
class ViTMAEConfig(AutoencoderConfig, ViTConfig):
    """Sizes of a masked autoencoder on ViT.

    norm_pix_loss: normalize the targets of each unit. The official default is False,
      but all published accuracies use True.
    """

    decoder_depth: int = setting(8, low=1, high=1000)


class ViT(Encoder):
    """ViT without a head.

    Args:
      sincos_position: `absolute_pos_embed` is the sine-cosine table and is not trained.
        Kernels are initialized by `XAVIER`, as in a masked autoencoder. False:
        `absolute_pos_embed` is trained. It and the kernels are initialized by
        normal(0.02), and `patch_embed` as in PyTorch.
    """

    def __init__(
        self,
        config: ViTConfig,
        run_options: RunOptions = RunOptions(),  # noqa: B008
        *,
        sincos_position: bool = False,
        rngs: nnx.Rngs,
    ):
        self.config, self.run_options = config, run_options
        common = dict(dtype=jnp.dtype(run_options.dtype), rngs=rngs)
        dim, kernel_init = config.embed_dim, XAVIER if sincos_position else INIT
        self.patch_embed = PatchEmbed(
            config.patch_size**2 * config.in_channels,
            dim,
            eps=None,
            kernel_init=XAVIER if sincos_position else None,
            **common,
        )
        self.cls_token = nnx.Param(INIT(rngs.params(), (dim,), jnp.float32))
        self.stages = nnx.List(
            [
                nnx.List(
                    AttentionBlock(
                        dim,
                        config.num_heads,
                        config.mlp_ratio,
                        eps=config.layer_norm_eps,
                        kernel_init=kernel_init,
                        **common,
                    )
                    for _ in range(config.depth)
                )
            ]
        )
        self.merges = nnx.List([])
        class_tokens, (rows, columns) = config.class_tokens, config.grid
        if sincos_position:
            table = positions.sincos_table(config.grid, dim, class_tokens)
            self.absolute_pos_embed = FixedTable(jnp.asarray(table))
        else:
            tokens = class_tokens + rows * columns
            table = INIT(rngs.params(), (tokens, dim), jnp.float32)
            self.absolute_pos_embed = nnx.Param(table)

    @jax.named_scope("embedding")
    def _stem(self, images, ids_keep=None, drop_path_keys=None):
        """Return a tuple of one array: tokens [B, 1+K, E], the class token first."""
        self._check_arguments(images, ids_keep, drop_path_keys)
        dtype = jnp.dtype(self.run_options.dtype)
        units, position = self._select_units(images, ids_keep)
        x = self.patch_embed(units.astype(dtype).reshape(-1, units.shape[-1]))
        x = x.reshape(*units.shape[:2], -1) + position.astype(dtype)  # [B, K, E]
        token = self.cls_token[...] + self._position_table()[0]
        token = jnp.broadcast_to(token.astype(dtype), (len(x), 1, x.shape[-1]))
        return (jnp.concatenate([token, x], axis=1),)


class ViTClassifier(Classifier):
    """ViT with a linear head on the mean token or on the class token."""

    name, architecture = "vit_base", "ViT (Dosovitskiy et al., ICLR 2021)"
    encoder_class = ViT

    def __init__(
        self,
        config: ViTClassifierConfig,
        run_options: RunOptions = RunOptions(),  # noqa: B008
        *,
        rngs: nnx.Rngs,
    ):
        self.encoder = ViT(config, run_options, rngs=rngs)
        dim, eps = config.embed_dim, config.layer_norm_eps
        pools_mean = config.pooling == "mean"
        # `norm` is float32 for any compute dtype.
        self.norm = None if pools_mean else LayerNorm(dim, epsilon=eps, rngs=rngs)
        self._add_head(config, dim, fc_norm=pools_mean, rngs=rngs)

    @accepts_explicit_axes
    def head_token(
        self, images: jax.Array, *, drop_path_keys: jax.Array | None = None
    ) -> jax.Array:
        """Return the mean token, or the class token after `norm`: [B, E] float32."""
        if self.norm is None:
            return self.mean_token(images, drop_path_keys=drop_path_keys)
        tokens = self.encoder(images, drop_path_keys=drop_path_keys)[-1]
        return self.norm(tokens[:, 0].astype(jnp.float32))

    @accepts_explicit_axes
    def mean_token(
        self, images: jax.Array, *, drop_path_keys: jax.Array | None = None
    ) -> jax.Array:
        """Return the mean of the units' tokens after the last block, [B, E] float32."""
        tokens = self.encoder(images, drop_path_keys=drop_path_keys)[-1]
        return tokens[:, self.config.class_tokens :].astype(jnp.float32).mean(1)

    def macs(
        self,
        image_size: int | Sequence[int] | None = None,
        *,
        layer_norm_cost: int = 5,
    ) -> int:
        """Return the multiply-adds of one image's forward pass.

        The official code normalizes all tokens before it selects the class token, so
        `norm` counts for all tokens.

        Args:
          image_size, layer_norm_cost: as in `Classifier.macs`.
        """
        cost = super().macs(image_size, layer_norm_cost=layer_norm_cost)
        rows, columns = self._grid(image_size)
        return cost + module_cost(self.norm, 1 + rows * columns, layer_norm_cost)


class ViTMaskedAutoencoder(MaskedAutoencoder):
    """ViT on visible units, transformer decoder on all units (official MAE)."""

    name, architecture = "mae_vit_base", "MAE (He et al., CVPR 2022) on plain ViT"
    encoder_class = ViT
    kernel_init = staticmethod(XAVIER)
