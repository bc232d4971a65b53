"""Masked autoencoder (He et al., CVPR 2022), by default with HiViT as encoder.

With HiViT, the model follows the official ``models_mae_hivit.py``: there is no class
token, and by default the latent comes from all stages. Only the visible units are
embedded, whereas the official code embeds all units and then drops the masked units.
For units and cells see `positions`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.models import positions
from hivit_jax.models.arguments import check_ids, check_shape
from hivit_jax.models.base import make_info
from hivit_jax.models.blocks import AttentionBlock, run_blocks
from hivit_jax.models.config import AutoencoderConfig, RunOptions
from hivit_jax.models.encoder import Encoder
from hivit_jax.models.explicit_axes import accepts_explicit_axes
from hivit_jax.models.flops import attention_block_cost, encoder_cost, module_cost
from hivit_jax.models.hivit import HiViT
from hivit_jax.models.layers import INIT, FixedTable, Linear
from hivit_jax.models.masked import MAEOutput, MaskedModel
from hivit_jax.models.masking import count_visible_units, random_masking
from hivit_jax.models.norms import LayerNorm


class MaskedAutoencoder(MaskedModel):
    """Encoder on visible units, transformer decoder on all units."""

    name, description = "mae_hivit_base", "a masked autoencoder"
    encoder_class: type[Encoder] = HiViT
    kernel_init = staticmethod(INIT)  # initializer of the decoder's kernels

    def __init__(
        self,
        config: AutoencoderConfig,
        run_options: RunOptions = RunOptions(),  # noqa: B008
        *,
        rngs: nnx.Rngs,
    ):
        self.encoder = self.encoder_class(
            config, run_options, sincos_position=True, rngs=rngs
        )
        self.info = make_info(config)
        common = dict(dtype=jnp.dtype(run_options.dtype), rngs=rngs)
        norm_options = dict(epsilon=config.layer_norm_eps, **common)
        options = dict(kernel_init=self.kernel_init, **common)
        width, dim = config.latent_dim, config.decoder_embed_dim
        self.norm = LayerNorm(width, **norm_options) if config.has_latent_norm else None
        self.decoder_embed = Linear(width, dim, **options)
        self.mask_token = nnx.Param(INIT(rngs.params(), (dim,), jnp.float32))
        table = positions.sincos_table(config.grid, dim, config.class_tokens)
        self.decoder_pos_embed = FixedTable(jnp.asarray(table))
        eps, heads = config.layer_norm_eps, config.decoder_num_heads
        self.decoder_blocks = nnx.List(
            AttentionBlock(dim, heads, 4.0, eps=eps, **options)
            for _ in range(config.decoder_depth)
        )
        self.decoder_norm = LayerNorm(dim, **norm_options)
        values_per_unit = config.patch_size**2 * config.in_channels
        self.decoder_pred = Linear(dim, values_per_unit, **options)

    @accepts_explicit_axes
    def __call__(
        self,
        images: jax.Array,
        *,
        noise: jax.Array,
        mask_ratio: float = 0.75,
        drop_path_keys: jax.Array | None = None,
    ) -> MAEOutput:
        """Mask and reconstruct images, and compute the loss.

        Args:
          images: [B, H, W, C] float32, normalized.
          noise: [B, N]; the units with the lowest noise stay visible.
          mask_ratio: fraction of units to mask.
          drop_path_keys: [B] PRNG keys for drop path in the encoder; None: no drop
            path.

        Raises:
          ConfigError: an array has another shape, or `mask_ratio` leaves no visible
            unit or is outside (0, 1).
        """
        num_visible = self.num_visible(images, noise, mask_ratio)
        ids_shuffle, ids_restore, mask = random_masking(noise, num_visible)
        latent = self.encode(images, ids_shuffle[:, :num_visible], drop_path_keys)
        pred = positions.gather_tokens(self.decode(latent, ids_shuffle), ids_restore)
        return self.output(images, pred, mask, latent)

    @accepts_explicit_axes
    def image_loss(
        self,
        images: jax.Array,
        *,
        noise: jax.Array,
        mask_ratio: float = 0.75,
        drop_path_keys: jax.Array | None = None,
    ) -> jax.Array:
        """Return the mean squared error over each image's masked units, [B] float32.

        For the arguments see `__call__`. Training uses this method, because it skips
        the visible units in the last MLP and in the output layer of the decoder.
        """
        num_visible = self.num_visible(images, noise, mask_ratio)
        ids_shuffle = random_masking(noise, num_visible)[0]
        latent = self.encode(images, ids_shuffle[:, :num_visible], drop_path_keys)
        # [B, N - K, P*P*C]
        pred = self.decode(latent, ids_shuffle, masked_only=True)
        return self.unit_loss(images, pred, ids_shuffle[:, num_visible:]).mean(1)

    @accepts_explicit_axes
    def encode(
        self,
        images: jax.Array,
        ids_keep: jax.Array,
        drop_path_keys: jax.Array | None = None,
    ) -> jax.Array:
        """Encode the units `ids_keep`, int [B, K], of images [B, H, W, C].

        Returns:
          Latent in compute dtype, [B, K, L], or [B, 1+K, L] with a class token, where L
          is `config.latent_dim`. The multi-scale latent concatenates the stages, with
          cells in merge order.
        """
        stages = self.encoder(images, ids_keep=ids_keep, drop_path_keys=drop_path_keys)
        latent = stages[-1]
        if self.norm is None:
            return latent
        with jax.named_scope("latent"):
            if self.config.multi_scale:
                width, inner = self.config.embed_dim, self.config.inner_patches
                # 4E, 2E and E with three stages.
                values_per_unit = [
                    width * inner >> level for level in range(len(stages))
                ]
                unit_latents = [
                    x.reshape(*ids_keep.shape, n)
                    for x, n in zip(stages, values_per_unit, strict=True)
                ]
                latent = jnp.concatenate(unit_latents, axis=-1)
            return self.norm(latent)

    @accepts_explicit_axes
    @jax.named_scope("latent")  # in `xla.cost`, the region before the blocks
    def decode(
        self, latent: jax.Array, ids: jax.Array, *, masked_only: bool = False
    ) -> jax.Array:
        """Return the prediction of all units, in the order of `ids`: `[B, N, P*P*C]`.

        Args:
          latent: output of `encode` for the K visible units.
          ids: int [B, N], indices of all units. The visible units come first, in the
            order of `latent`.
          masked_only: predict only the masked units, `[B, N - K, P*P*C]`.
        """
        class_tokens = self.config.class_tokens
        units = self.decoder_pos_embed[...].shape[0] - class_tokens
        check_ids("ids", ids, latent.shape[0], units)
        width = self.decoder_embed.in_features
        check_shape("latent", latent, "[B, K, width]", latent.shape[0], None, width)
        x = self.decoder_embed(latent)  # [B, K, D], or [B, 1+K, D] with a class token
        batch, num_encoded, dim = x.shape
        mask_tokens = jnp.broadcast_to(
            self.mask_token[...].astype(x.dtype),
            (batch, class_tokens + units - num_encoded, dim),
        )
        # The tokens stay in the order of `ids`, so that the masked tokens are a slice.
        # Any order gives the same prediction of a unit, because positions come only
        # from the table.
        table = jax.lax.stop_gradient(self.decoder_pos_embed[...]).astype(x.dtype)
        # Row 0 of the table belongs to the class token, if there is one.
        table_rows = ids
        if class_tokens:
            table_rows = jnp.pad(ids + class_tokens, ((0, 0), (class_tokens, 0)))
        # [B, N, D], or [B, 1+N, D] with a class token
        x = jnp.concatenate([x, mask_tokens], axis=1) + table[table_rows]
        start = num_encoded if masked_only else class_tokens  # first token to predict

        def run_last(block, x, **options):
            x = block.add_attention(x, **options)
            return block.add_mlp(x[:, start:] if start else x, **options)

        with jax.named_scope("decoder"):
            *blocks, last = self.decoder_blocks
            if blocks:
                x = run_blocks(blocks, x, self.run_options)
            x = run_blocks([last], x, self.run_options, apply=run_last)
        with jax.named_scope("loss"):  # region of the output layer in `xla.cost`
            return self.decoder_pred(self.decoder_norm(x)).astype(jnp.float32)

    def macs(
        self,
        image_size: int | Sequence[int] | None = None,
        *,
        mask_ratio: float = 0.75,
        layer_norm_cost: int = 5,
    ) -> int:
        """Return the multiply-adds of one image's forward pass.

        As in the published tables, all units are predicted. `image_loss` predicts only
        the masked units, which costs 1.5 % less for mae_hivit_base.

        Args:
          image_size: side or (height, width) in pixels; None: as in the config.
          mask_ratio: fraction of units to mask.
          layer_norm_cost: cost per LayerNorm output element. The published numbers
            use 5, fvcore's rule. 0: LayerNorms do not count.
        """
        grid = self._grid(image_size)
        units = grid[0] * grid[1]
        num_visible = count_visible_units(units, mask_ratio)
        cost = encoder_cost(
            self.encoder, grid, num_visible, layer_norm_cost=layer_norm_cost
        )
        num_encoded, tokens = (
            count + self.config.class_tokens for count in (num_visible, units)
        )
        for part in (self.norm, self.decoder_embed):
            cost += module_cost(part, num_encoded, layer_norm_cost)
        for block in self.decoder_blocks:
            cost += attention_block_cost(block, tokens, tokens**2, layer_norm_cost)
        for part in (self.decoder_norm, self.decoder_pred):
            cost += module_cost(part, tokens, layer_norm_cost)
        return cost
