"""Encoder of HiViT (Zhang et al., ICLR 2023).

The stem stages do not mix units. Masked units are therefore dropped from the patchified
image, before the patch embedding. The cells of all remaining units of the batch are the
rows of one matrix, which the stem processes. For units and cells see `positions`.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.errors import ConfigError
from hivit_jax.models import positions
from hivit_jax.models.blocks import AttentionBlock, MlpBlock
from hivit_jax.models.config import HiViTConfig, RunOptions
from hivit_jax.models.encoder import Encoder
from hivit_jax.models.layers import INIT, PatchEmbed, PatchMerge


class HiViT(Encoder):
    """HiViT without a head.

    Args:
      sincos_position: initialize `absolute_pos_embed` with the sine-cosine table
        instead of normal(0.02). The table is trained in both cases. The official
        pretraining code also trains the table, although a comment in that code calls
        the table frozen.

    Raises:
      ConfigError: `scan_blocks` with `global_blocks`.
    """

    def __init__(
        self,
        config: HiViTConfig,
        run_options: RunOptions = RunOptions(),  # noqa: B008
        *,
        sincos_position: bool = False,
        rngs: nnx.Rngs,
    ):
        if run_options.scan_blocks and config.global_blocks:
            raise ConfigError(
                f"scan_blocks=True with global_blocks={config.global_blocks}; expected "
                "global_blocks=(), because scanned blocks must be alike"
            )
        self.config, self.run_options = config, run_options
        dtype = jnp.dtype(run_options.dtype)
        common = dict(eps=config.layer_norm_eps, dtype=dtype, rngs=rngs)
        *stem_counts, _ = config.block_counts
        width = config.embed_dim // 2 ** len(stem_counts)
        fan_in = config.cell_size**2 * config.in_channels
        self.patch_embed = PatchEmbed(fan_in, width, **common)
        stages, merges = [], []
        for count in stem_counts:
            stages.append(
                nnx.List(
                    MlpBlock(width, config.stem_mlp_ratio, **common)
                    for _ in range(count)
                )
            )
            merges.append(PatchMerge(width, **common))
            width *= 2
        stages.append(nnx.List())
        for windows in config.windows(self.grid):
            grid = self.grid if windows is None else windows.size
            stages[-1].append(
                AttentionBlock(
                    width,
                    config.num_heads,
                    config.mlp_ratio,
                    grid=grid if config.relative_position else None,
                    windows=windows,
                    **common,
                )
            )
        self.stages, self.merges = nnx.List(stages), nnx.List(merges)
        units = self.grid[0] * self.grid[1]
        table = (
            positions.sincos_table(self.grid, config.embed_dim)
            if sincos_position
            else INIT(rngs.params(), (units, config.embed_dim), jnp.float32)
        )
        self.absolute_pos_embed = nnx.Param(jnp.asarray(table))

    @jax.named_scope("embedding")
    def _stem(self, images, ids_keep=None, drop_path_keys=None):
        """Return the stem stages' outputs and the main stage's input [B, K, E]."""
        self._check_arguments(images, ids_keep, drop_path_keys)
        config, dtype = self.config, jnp.dtype(self.run_options.dtype)
        units, position = self._select_units(images, ids_keep)
        cells = positions.units_to_cells(
            units.astype(dtype), config.patch_size, config.inner_patches
        )
        x = self.patch_embed(cells)  # [B*K*16, E/4]
        outputs = []
        for stage, merge in enumerate(self.merges):
            with jax.named_scope(f"stem{stage + 1}"):
                x = self._run_stage(stage, x, drop_path_keys=drop_path_keys)
            outputs.append(x)
            x = merge(x)
        x = x.reshape(*units.shape[:2], config.embed_dim)  # [B, K, E]
        x = x + position.reshape(-1, *x.shape[1:]).astype(dtype)
        return *outputs, x
