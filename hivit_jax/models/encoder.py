"""Base class of encoders: stages of residual blocks on the units of images.

For units and cells see `positions`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.errors import ConfigError
from hivit_jax.models import positions
from hivit_jax.models.arguments import check_drop_path_keys, check_ids, check_shape
from hivit_jax.models.blocks import run_blocks
from hivit_jax.models.config import EncoderConfig, RunOptions
from hivit_jax.models.explicit_axes import accepts_explicit_axes
from hivit_jax.models.layers import FixedTable
from hivit_jax.models.positions import Grid


class BlockOutput(NamedTuple):
    """Output of a block with attention.

    tokens: [B, N, E] in compute dtype. A class token, if there is one, comes first; the
      units follow in row-major order.
    attention: None, or attention weights, float32 [B, heads, N, N], query axis before
      key axis. With windows, [B, W, heads, S, S], see `windows.Windows`.
    """

    tokens: jax.Array
    attention: jax.Array | None


class Encoder(nnx.Module):
    """Encoder without a head.

    A subclass builds the parts and defines `_stem`. Swin overrides `__call__`,
    `features` and `layers` instead.

    Attributes:
      config, run_options: sizes, and options that change how the encoder runs.
      patch_embed: embedding of the pixels.
      stages: residual blocks per stage. Only the blocks of the last stage have
        attention; in Swin, all blocks do.
      merges: one merge after each stage except the last.
      absolute_pos_embed: position table with one row per class token and unit. Swin
        has no such table.
    """

    config: EncoderConfig
    run_options: RunOptions
    patch_embed: nnx.Module
    stages: nnx.List
    merges: nnx.List
    absolute_pos_embed: nnx.Param | FixedTable

    @property
    def grid(self) -> Grid:
        """Numbers of units along the height and the width of an image."""
        return self.config.grid

    def _run_stage(self, stage: int, x: jax.Array, **inputs: jax.Array | None):
        first_index, blocks = sum(map(len, self.stages[:stage])), self.stages[stage]
        rates = self.config.drop_path_rates[first_index : first_index + len(blocks)]
        return run_blocks(
            blocks,
            x,
            self.run_options,
            first_index=first_index,
            drop_path_rates=rates if self.config.drop_path_rate else None,
            **inputs,
        )

    @accepts_explicit_axes
    def __call__(
        self,
        images: jax.Array,
        *,
        ids_keep: jax.Array | None = None,
        key_mask: jax.Array | None = None,
        drop_path_keys: jax.Array | None = None,
    ) -> list[jax.Array]:
        """Return the output of each stage, for all units or for those in `ids_keep`.

        Args:
          images: [B, H, W, C] float, normalized.
          ids_keep: int [B, K], indices of the units to keep, in the order of the
            output; None: all N units, K = N.
          key_mask: [B, K], or [B, 1+K] with a class token; nonzero for tokens that may
            be attended to. None: all tokens.
          drop_path_keys: [B] PRNG keys for drop path; None (evaluation): no drop path.

        Returns:
          Stage outputs in compute dtype. HiViT: [B*K*16, E/4], [B*K*4, E/2] and
          [B, K, E]; the cells of each unit are in merge order, see `positions`. ViT:
          [B, 1+K, E], the class token first.

        Raises:
          ConfigError: image size, channels or dtype do not fit the model; another
            argument does not have the shape above; `ids_keep` with attention windows.
        """
        *outputs, x = self._stem(images, ids_keep, drop_path_keys)
        if key_mask is not None:
            check_shape("key_mask", key_mask, "[B, K]", *x.shape[:2])
        relative_index = None
        if ids_keep is not None and self.config.relative_position:
            relative_index = positions.relative_position_index(ids_keep, self.grid)
        with jax.named_scope("main"):
            x = self._run_stage(
                len(self.stages) - 1,
                x,
                relative_index=relative_index,
                key_mask=key_mask,
                drop_path_keys=drop_path_keys,
            )
        return [*outputs, x]

    def _stem(self, images, ids_keep=None, drop_path_keys=None):
        """Return the outputs of all stages except the last, and the last stage's input.

        The input has the shape [B, K, E]; [B, 1+K, E] with a class token.
        """
        raise NotImplementedError

    def _check_arguments(self, images, ids_keep, drop_path_keys):
        """Raise ConfigError unless these arguments of `__call__` fit the model."""
        config = self.config
        expected = config.image_shape
        if images.ndim != 4:
            raise ConfigError(
                f"images are {images.shape}; expected a batch, (B, "
                f"{', '.join(map(str, expected))})"
            )
        if images.shape[1:] != expected:
            raise ConfigError(
                f"images are {images.shape[1:]} (height, width, channels); "
                f"this model was built for {expected}"
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ConfigError(
                f"images are {images.dtype}; expected normalized floating-point images"
            )
        check_drop_path_keys(drop_path_keys, images.shape[0])
        if ids_keep is not None:
            check_ids("ids_keep", ids_keep, images.shape[0])
        if ids_keep is not None and any(config.windows(self.grid)):
            raise ConfigError(
                f"window_size={config.window_size} with ids_keep: attention windows "
                "need all units; expected window_size=0 or ids_keep=None"
            )

    def _select_units(self, images, ids_keep):
        """Return pixels and position embeddings of all units or of those in `ids_keep`.

        Returns:
          units: [B, K, P*P*C], pixels.
          position: embedding of each unit's position, [K, E] float32 without
            `ids_keep`, else [B, K, E] in compute dtype.
        """
        dtype = jnp.dtype(self.run_options.dtype)
        units = positions.patchify(images, self.config.patch_size)  # [B, N, P*P*C]
        position = self._position_table()  # [N, E]
        if count := self.config.class_tokens:
            position = position[count:]
        if ids_keep is not None:
            units = positions.gather_tokens(units, ids_keep)  # [B, K, P*P*C]
            # A matrix product, because the gradient of a gather is a scatter-add.
            # Scatter-adds are slow on TPUs and have no fixed order on GPUs. In a gather
            # from a sharded table, XLA may also exchange the gradients of all samples,
            # [B, K, E], instead of their sum, [N, E].
            one_hot = jax.nn.one_hot(ids_keep, len(position), dtype=dtype)
            position = jnp.matmul(
                one_hot, position.astype(dtype), precision="highest"
            )  # [B, K, E]
        return units, position

    def _position_table(self):
        """Return the position table; a fixed table has no gradient."""
        table = self.absolute_pos_embed[...]
        is_fixed = isinstance(self.absolute_pos_embed, FixedTable)
        return jax.lax.stop_gradient(table) if is_fixed else table

    @accepts_explicit_axes
    def features(
        self,
        images: jax.Array,
        ids_keep: jax.Array | None = None,
        stride_32: bool = False,
    ) -> list[jax.Array]:
        """Return the outputs of all stages as feature maps in raster order.

        Args:
          images, ids_keep: see `__call__`.
          stride_32: add a map at stride 32, a 2x2 max pooling of the last map. As in
            the official detection code, an odd last row or column is dropped.

        Returns:
          Maps in compute dtype, for patch_size=16. HiViT: [B, H/4, W/4, E/4],
          [B, H/8, W/8, E/2] and [B, H/16, W/16, E]; ViT: only the last of these maps.
          With `stride_32`, also [B, H/32, W/32, E]. With `ids_keep`, one map per unit:
          [B, K, 4, 4, E/4], [B, K, 2, 2, E/2] and [B, K, 1, 1, E].

        Raises:
          ConfigError: as in `__call__`; or `stride_32` with `ids_keep` or with fewer
            than 2x2 units.
        """
        # With `ids_keep`, each unit is treated as an image of its own.
        grid = self.grid if ids_keep is None else (1, 1)
        if stride_32 and min(grid) < 2:
            found = f"a {grid[0]}x{grid[1]} grid" if ids_keep is None else "ids_keep"
            raise ConfigError(
                f"stride_32=True with {found}; expected ids_keep=None and a grid of at "
                "least 2x2 units"
            )
        *outputs, x = self(images, ids_keep=ids_keep)
        if count := self.config.class_tokens:
            x = x[:, count:]
        maps = [
            positions.tokens_to_map(x, grid, self.config.inner_patches >> stage)
            for stage, x in enumerate([*outputs, x])
        ]
        if stride_32:
            rows, columns = grid[0] // 2, grid[1] // 2
            x = maps[-1][:, : 2 * rows, : 2 * columns]
            maps.append(x.reshape(-1, rows, 2, columns, 2, x.shape[-1]).max((2, 4)))
        if ids_keep is not None:
            maps = [x.reshape(*ids_keep.shape, *x.shape[1:]) for x in maps]
        return maps

    @accepts_explicit_axes
    def layers(self, images: jax.Array, attention: bool = False) -> list[BlockOutput]:
        """Return one `BlockOutput` for each block of the last stage, in order.

        Args:
          images: [B, H, W, C] float, normalized.
          attention: also return the attention weights.
        """
        *_, x = self._stem(images)
        return self._block_outputs(self.stages[-1], x, attention)

    def _block_outputs(self, blocks, x, attention):
        """Apply blocks that have attention, and return one `BlockOutput` for each."""
        outputs = []
        for block in blocks:
            weights = None
            if attention:
                weights = block.attn.probabilities(block.norm1(x))
            x = run_blocks([block], x, self.run_options)
            outputs.append(BlockOutput(x, weights))
        return outputs
