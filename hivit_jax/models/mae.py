"""Masked autoencoder over HiViT: only the visible units are embedded and encoded.

He et al., CVPR 2022, as the official HiViT code has it (``masked_autoencoder.py``,
``models_mae_hivit.py``): no class token, a latent of all three stages, a plain decoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.errors import ConfigError
from hivit_jax.models import positions
from hivit_jax.models.base import Model, make_info
from hivit_jax.models.blocks import AttentionBlock, run_blocks
from hivit_jax.models.config import HiViTConfig, RunOptions, check_heads
from hivit_jax.models.flops import attention_cost, encoder_cost, row_cost
from hivit_jax.models.hivit import HiViT
from hivit_jax.models.layers import INIT, FixedTable, Linear
from hivit_jax.models.masking import random_masking, visible_units
from hivit_jax.models.norms import LayerNorm


@dataclass(frozen=True, kw_only=True)
class MAEConfig(HiViTConfig):
    """Sizes of encoder and decoder; `window_size` must be 0.

    decoder_embed_dim, decoder_depth, decoder_num_heads: the decoder's size; its MLP
      ratio is 4, it has neither relative positions nor drop path.
    multi_scale: decode all three stages, 7E wide behind a LayerNorm (official
      ``hifeat``). False: the main stage alone, with no norm (the official module holds
      an unused one then).
    norm_pix_loss: targets normalized per unit. The official constructor ignores False;
      here it counts.
    """

    relative_position: bool = False
    decoder_embed_dim: int = 512
    decoder_depth: int = 6
    decoder_num_heads: int = 16
    multi_scale: bool = True
    norm_pix_loss: bool = True

    def __post_init__(self):
        dim, heads = self.decoder_embed_dim, self.decoder_num_heads
        check_heads("decoder_embed_dim", dim, "decoder_num_heads", heads)
        if self.decoder_depth < 1:
            raise ConfigError(
                f"decoder_depth={self.decoder_depth}: expected at least 1"
            )
        if dim % 4:
            raise ConfigError(f"decoder_embed_dim={dim}: expected a multiple of 4")
        if self.window_size > 0:
            raise ConfigError(
                f"window_size={self.window_size}: masked pretraining drops units, and "
                "windows need them all; expected window_size=0"
            )
        super().__post_init__()


class MAEOutput(NamedTuple):
    """Output of the masked autoencoder; N units, K of them visible.

    loss: float32 scalar, mean squared error over the removed units of the batch.
    pred: [B, N, P*P*C] float32, in the target's (perhaps normalized) pixels.
    mask: [B, N] float32, 0 keep, 1 removed.
    latent: [B, K, 7E] (multi-scale) or [B, K, E], input of the decoder embedding.
    unit_loss: [B, N] float32, mean squared error of each unit, visible ones too.
    """

    loss: jax.Array
    pred: jax.Array
    mask: jax.Array
    latent: jax.Array
    unit_loss: jax.Array


class MaskedAutoencoder(Model):
    """HiViT encoder on visible units, transformer decoder on all of them."""

    name, kind = "mae_hivit_base", "a masked autoencoder"

    def __init__(
        self,
        config: MAEConfig,
        run_options: RunOptions = RunOptions(),  # noqa: B008
        *,
        rngs: nnx.Rngs,
    ):
        self.encoder = HiViT(config, run_options, sincos_position=True, rngs=rngs)
        self.info = make_info(config)
        common = dict(dtype=jnp.dtype(run_options.dtype), rngs=rngs)
        norm = dict(epsilon=config.layer_norm_eps, **common)
        multi_scale, dim = config.multi_scale, config.decoder_embed_dim
        # A stage adds its cells times its width: 4E + 2E + E for three stages.
        scales = 2 * config.inner_patches - 1 if multi_scale else 1
        width = config.embed_dim * scales
        self.norm = LayerNorm(width, **norm) if multi_scale else None
        self.decoder_embed = Linear(width, dim, **common)
        self.mask_token = nnx.Param(INIT(rngs.params(), (dim,), jnp.float32))
        self.decoder_pos_embed = FixedTable(
            jnp.asarray(positions.sincos_table(config.grid, dim))
        )
        eps, heads = config.layer_norm_eps, config.decoder_num_heads
        self.decoder_blocks = nnx.List(
            AttentionBlock(dim, heads, 4.0, eps=eps, **common)
            for _ in range(config.decoder_depth)
        )
        self.decoder_norm = LayerNorm(dim, **norm)
        pixels = config.patch_size**2 * config.in_channels
        self.decoder_pred = Linear(dim, pixels, **common)

    def __call__(
        self,
        images: jax.Array,
        *,
        noise: jax.Array,
        mask_ratio: float = 0.75,
        drop_path_keys: jax.Array | None = None,
    ) -> MAEOutput:
        """Masks, encodes, decodes and scores a batch.

        Args:
          images: [B, H, W, C] float32, normalized.
          noise: [B, N]; the units with the lowest stay visible.
          mask_ratio: share of units to remove.
          drop_path_keys: [B] keys for drop path in the encoder, or None.
        """
        kept = visible_units(noise.shape[1], mask_ratio)
        ids_shuffle, ids_restore, mask = random_masking(noise, kept)
        latent = self.encode(images, ids_shuffle[:, :kept], drop_path_keys)
        pred = positions.gather_tokens(self.decode(latent, ids_shuffle), ids_restore)
        unit_loss = self.unit_loss(images, pred)
        loss = (unit_loss * mask).sum() / mask.sum()
        return MAEOutput(loss, pred, mask, latent, unit_loss)

    def image_loss(
        self,
        images: jax.Array,
        *,
        noise: jax.Array,
        mask_ratio: float = 0.75,
        drop_path_keys: jax.Array | None = None,
    ) -> jax.Array:
        """Mean squared error over each image's removed units, [B] float32.

        Arguments as above. Training uses it: visible units are not predicted, and the
        decoder's last MLP leaves them out.
        """
        kept = visible_units(noise.shape[1], mask_ratio)
        ids_shuffle = random_masking(noise, kept)[0]
        latent = self.encode(images, ids_shuffle[:, :kept], drop_path_keys)
        # [B, N - K, P*P*C]
        pred = self.decode(latent, ids_shuffle, masked_only=True)
        return self.unit_loss(images, pred, ids_shuffle[:, kept:]).mean(1)

    def encode(
        self,
        images: jax.Array,
        ids_keep: jax.Array,
        drop_path_keys: jax.Array | None = None,
    ) -> jax.Array:
        """Images [B, H, W, C], kept units int [B, K] -> latent [B, K, 7E or E].

        The multi-scale latent holds the stages' cells in merge order.
        """
        stages = self.encoder(images, ids_keep=ids_keep, drop_path_keys=drop_path_keys)
        if not self.config.multi_scale:
            return stages[-1]
        with jax.named_scope("latent"):
            per_unit = [x.reshape(*ids_keep.shape, -1) for x in stages]  # 4E, 2E, E
            return self.norm(jnp.concatenate(per_unit, axis=-1))

    @jax.named_scope("latent")
    def decode(
        self, latent: jax.Array, ids: jax.Array, *, masked_only: bool = False
    ) -> jax.Array:
        """Latent [B, K, 7E or E] of K visible units -> pred [B, N, P*P*C] float32.

        Args:
          ids: int [B, N], all units, those of the latent first. The prediction is in
            their order.
          masked_only: predict only the other units, [B, N - K, P*P*C].
        """
        x = self.decoder_embed(latent)  # [B, K, D]
        batch, kept, dim = x.shape
        tokens = jnp.broadcast_to(
            self.mask_token[...].astype(x.dtype), (batch, ids.shape[1] - kept, dim)
        )
        # Tokens stay in this order, so that the removed ones are a slice; the decoder
        # sees a unit's position in the table only, and the table takes no gradient.
        table = jax.lax.stop_gradient(self.decoder_pos_embed[...]).astype(x.dtype)
        x = jnp.concatenate([x, tokens], axis=1) + table[ids]  # [B, N, D]

        def run_last(block, x, **options):
            x = block.add_attention(x, **options)
            return block.add_mlp(x[:, kept:] if masked_only else x, **options)

        with jax.named_scope("decoder"):
            *blocks, last = self.decoder_blocks
            if blocks:
                x = run_blocks(blocks, x, self.run_options)
            x = run_blocks([last], x, self.run_options, call=run_last)
        with jax.named_scope("loss"):
            return self.decoder_pred(self.decoder_norm(x)).astype(jnp.float32)

    def targets(
        self, images: jax.Array, ids: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Targets of the prediction: units [B, N, P*P*C], and their mean and scale.

        The units' pixels are ``targets * scale + mean`` with mean, scale [B, N, 1];
        without pixel normalization these are 0 and 1. The variance is the unbiased one.

        Args:
          ids: int [B, M], which units; None: all, in image order.
        """
        units = positions.patchify(images.astype(jnp.float32), self.config.patch_size)
        units = units if ids is None else positions.gather_tokens(units, ids)
        if not self.config.norm_pix_loss:
            return units, jnp.zeros_like(units[..., :1]), jnp.ones_like(units[..., :1])
        mean = units.mean(-1, keepdims=True)
        scale = jnp.sqrt(units.var(-1, keepdims=True, ddof=1) + 1e-6)
        return (units - mean) / scale, mean, scale

    @jax.named_scope("loss")
    def unit_loss(
        self, images: jax.Array, pred: jax.Array, ids: jax.Array | None = None
    ) -> jax.Array:
        """Mean squared error of every unit, [B, N] float32; ids as in `targets`."""
        return jnp.square(pred - self.targets(images, ids)[0]).mean(-1)

    def to_images(
        self, out: MAEOutput, mean: jax.Array, scale: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """An output as images: the prediction [B, H, W, C], in the pixels of the input,
        and the removed pixels [B, H, W, 1], 1 or 0.

        Args:
          mean, scale: [B, N, 1], of the units' pixels, as `targets` returns them; or
            others, which do not reveal the removed pixels.
        """
        grid, patch_size = self.config.grid, self.config.patch_size
        removed = jnp.repeat(out.mask[..., None], patch_size**2, -1)
        return (
            positions.unpatchify(out.pred * scale + mean, grid, patch_size),
            positions.unpatchify(removed, grid, patch_size),
        )

    def macs(
        self,
        image_size: int | Sequence[int] | None = None,
        *,
        mask_ratio: float = 0.75,
        layer_norm_cost: int = 5,
    ) -> int:
        """Cost of one image's forward pass, counted as in `Classifier.macs`.

        As published, of all outputs; `image_loss` takes some 1.5 % less.
        """
        grid = self._grid(image_size)
        units = grid[0] * grid[1]
        kept = visible_units(units, mask_ratio)
        cost = encoder_cost(self.encoder, grid, kept, layer_norm_cost=layer_norm_cost)
        for part in (self.norm, self.decoder_embed):
            cost += row_cost(part, kept, layer_norm_cost)
        for block in self.decoder_blocks:
            cost += attention_cost(block, units, units**2, layer_norm_cost)
        for part in (self.decoder_norm, self.decoder_pred):
            cost += row_cost(part, units, layer_norm_cost)
        return cost
