"""Swin: encoder with attention in shifted windows (Liu et al., ICCV 2021).

As in the official code, tokens are in row-major order and every stage has attention.
Where the official programs differ, a field or class attribute of `SwinConfig` selects
the behavior.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.errors import ConfigError
from hivit_jax.keys import setting
from hivit_jax.models import positions
from hivit_jax.models.arguments import check_heads, check_shape
from hivit_jax.models.blocks import AttentionBlock
from hivit_jax.models.config import EncoderConfig, RunOptions
from hivit_jax.models.encoder import BlockOutput, Encoder
from hivit_jax.models.explicit_axes import accepts_explicit_axes
from hivit_jax.models.layers import INIT, PatchEmbed, PatchMerge
from hivit_jax.models.positions import Grid
from hivit_jax.models.windows import Windows


@dataclass(frozen=True, kw_only=True)
class SwinConfig(EncoderConfig):
    """Sizes of Swin's encoder.

    embed_dim: width E of the first stage. Each merge doubles the width.
    depths: blocks per stage.
    num_heads: attention heads per stage.
    patch_size: side in pixels of a token of the first stage.
    window_size: side of the attention windows in tokens. Every second block shifts its
      windows by half a side.
    shrink_windows: in stages whose shorter side is at most `window_size`, use windows
      of this shorter side, without shift. This is the rule of the official
      classification code. False: pad these stages to whole windows, as in official
      detection.

    Class attributes:
      geometric_tables: resize relative position tables with geometric distances, as in
        SimMIM's finetuning, see `resize.resize_table_geometrically`. False: resize them
        bicubically, as in official Swin.

    Raises:
      ConfigError: inconsistent sizes.
    """

    geometric_tables: ClassVar[bool] = False

    depths: tuple[int, ...] = setting(low=1, high=1000)
    num_heads: tuple[int, ...] = setting(low=1, high=2**16)
    patch_size: int = setting(4, low=1, high=2**14)
    layer_norm_eps: float = setting(1e-5, above=0, high=1)
    window_size: int = setting(7, low=1, high=2**14)
    shrink_windows: bool = True

    def __post_init__(self):
        super().__post_init__()
        if not self.depths or len(self.depths) != len(self.num_heads):
            raise ConfigError(
                f"depths={self.depths} with num_heads={self.num_heads}; expected one "
                "number per stage in both"
            )
        for width, heads in zip(self.widths, self.num_heads, strict=True):
            check_heads("the width of a stage", width, "num_heads", heads)
        self.check_mlps({"mlp_ratio": self.embed_dim})

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each stage."""
        return tuple(self.embed_dim << stage for stage in range(len(self.depths)))

    def stage_grids(self, grid: Grid) -> list[Grid]:
        """Return the token grids of all stages, given the grid of the first stage."""
        grids = [grid]
        for _ in self.depths[1:]:
            rows, columns = grids[-1]
            grids.append((-(-rows // 2), -(-columns // 2)))
        return grids

    def window_side(self, grid: Grid) -> int:
        """Return the side of the windows in a stage with this grid."""
        side = self.window_size
        return min(side, *grid) if self.shrink_windows else side

    def stage_windows(self, stage: int, grid: Grid) -> list[Windows | None]:
        """Return the windows of each block of a stage.

        None stands for a single window that is neither padded nor shifted.

        Args:
          grid: tokens along height and width of this stage.
        """
        side = self.window_side(grid)
        spans_shorter_side = self.shrink_windows and min(grid) <= self.window_size
        shifts = 0, 0 if spans_shorter_side else side // 2
        windows = [
            None
            if grid == (side, side) and not shift
            else Windows(grid, (side, side), shift, attend_padding=True)
            for shift in shifts
        ]
        return [windows[block % 2] for block in range(self.depths[stage])]

    def table_grid(self, stage: int, block: int) -> Grid:
        """Return the grid that a block's relative position table spans."""
        return (self.window_side(self.stage_grids(self.grid)[stage]),) * 2


class Swin(Encoder):
    """Swin without the final norm and without a head.

    Args:
      has_mask_token: add the parameter `mask_token`, [E], for SimMIM.

    Raises:
      ConfigError: `scan_blocks`.
    """

    def __init__(
        self,
        config: SwinConfig,
        run_options: RunOptions = RunOptions(),  # noqa: B008
        *,
        has_mask_token: bool = False,
        rngs: nnx.Rngs,
    ):
        if run_options.scan_blocks:
            raise ConfigError(
                "scan_blocks=True with Swin; expected False, because scanned blocks "
                "must be alike, but every second block shifts its windows"
            )
        self.config, self.run_options = config, run_options
        dtype = jnp.dtype(run_options.dtype)
        common = dict(eps=config.layer_norm_eps, dtype=dtype, rngs=rngs)
        fan_in = config.patch_size**2 * config.in_channels
        self.patch_embed = PatchEmbed(fan_in, config.embed_dim, **common)
        if has_mask_token:
            token = INIT(rngs.params(), (config.embed_dim,), jnp.float32)
            self.mask_token = nnx.Param(token)
        else:
            self.mask_token = None
        stages, merges = [], []
        for stage, grid in enumerate(config.stage_grids(self.grid)):
            width, heads = config.widths[stage], config.num_heads[stage]
            side = config.window_side(grid)
            stages.append(
                nnx.List(
                    AttentionBlock(
                        width,
                        heads,
                        config.mlp_ratio,
                        grid=(side, side),
                        windows=windows,
                        **common,
                    )
                    for windows in config.stage_windows(stage, grid)
                )
            )
            if stage < len(config.depths) - 1:
                merges.append(PatchMerge(width, **common))
        self.stages, self.merges = nnx.List(stages), nnx.List(merges)

    @accepts_explicit_axes
    def __call__(
        self,
        images: jax.Array,
        *,
        mask: jax.Array | None = None,
        drop_path_keys: jax.Array | None = None,
    ) -> list[jax.Array]:
        """Return each stage's output before the merge, row-major [B, tokens, width].

        Args:
          images: [B, H, W, C] float, normalized.
          mask: [B, N], nonzero for first-stage tokens that `mask_token` replaces; None:
            no mask.
          drop_path_keys: [B] PRNG keys for drop path; None (evaluation): no drop path.

        Raises:
          ConfigError: image size, channels or dtype do not fit the model; another
            argument does not have the shape above.
        """
        self._check_arguments(images, None, drop_path_keys)
        x, outputs = self._embed(images, mask), []
        for stage in range(len(self.stages)):
            with jax.named_scope(f"stage{stage + 1}"):
                x = self._merge(stage, x) if stage else x
                x = self._run_stage(stage, x, drop_path_keys=drop_path_keys)
            outputs.append(x)
        return outputs

    @jax.named_scope("embedding")
    def _embed(self, images, mask=None):
        """Return the tokens of the first stage, [B, N, E]."""
        dtype = jnp.dtype(self.run_options.dtype)
        units = positions.patchify(images, self.config.patch_size).astype(dtype)
        x = self.patch_embed(units.reshape(-1, units.shape[-1]))
        x = x.reshape(*units.shape[:2], -1)
        if mask is None:
            return x
        check_shape("mask", mask, "[B, N]", *x.shape[:2])
        return jnp.where(mask[..., None] != 0, self.mask_token[...].astype(dtype), x)

    def _merge(self, stage, x):
        """Return the input of `stage`, [B, N, C], from the previous stage's output."""
        grid = self.config.stage_grids(self.grid)[stage - 1]
        merged = self.merges[stage - 1](positions.merge_neighbors(x, grid))
        return merged.reshape(len(x), -1, merged.shape[-1])

    @accepts_explicit_axes
    def features(
        self,
        images: jax.Array,
        ids_keep: jax.Array | None = None,
        stride_32: bool = False,
    ) -> list[jax.Array]:
        """Return the outputs of all stages as feature maps, in compute dtype.

        Returns:
          For patch_size=4: [B, H/4, W/4, E], [B, H/8, W/8, 2E] and so on. Half of an
          odd side is rounded up.

        Raises:
          ConfigError: as in `__call__`; `ids_keep`, because windows need all tokens; or
            `stride_32`, because the last map already has this stride.
        """
        if ids_keep is not None or stride_32:
            found = "ids_keep" if ids_keep is not None else "stride_32=True"
            raise ConfigError(
                f"{found} with Swin; expected ids_keep=None and stride_32=False, "
                "because windows need all tokens and the last map has stride 32"
            )
        return [
            x.reshape(len(x), *grid, x.shape[-1])
            for x, grid in zip(
                self(images), self.config.stage_grids(self.grid), strict=True
            )
        ]

    @accepts_explicit_axes
    def layers(self, images: jax.Array, attention: bool = False) -> list[BlockOutput]:
        """Return one `BlockOutput` for each block of all stages, in order.

        Args:
          images: [B, H, W, C] float, normalized.
          attention: also return the attention weights.
        """
        self._check_arguments(images, None, None)
        x, outputs = self._embed(images), []
        for stage, blocks in enumerate(self.stages):
            x = self._merge(stage, x) if stage else x
            outputs += self._block_outputs(blocks, x, attention)
            x = outputs[-1].tokens
        return outputs
