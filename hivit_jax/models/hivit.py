"""HiViT: the encoder (Zhang et al., ICLR 2023).

Before the main stage no two units ever meet. So the units that are not wanted are
dropped as pixels, before anything is computed, and the stem is a row-wise network on
one flat matrix of cells.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hivit_jax.errors import ConfigError
from hivit_jax.models import positions
from hivit_jax.models.blocks import AttentionBlock, MlpBlock, attention_cost, run_blocks
from hivit_jax.models.layers import (
    INIT,
    LayerNorm,
    PatchMerge,
    check_heads,
    row_cost,
)
from hivit_jax.models.positions import Grid, Windows


class PatchEmbed(nnx.Module):
    """Cells [T, cell*cell*in_channels] -> [T, dim]: Linear, LayerNorm.

    The official strided convolution is this Linear; its weight and bias keep PyTorch's
    default, uniform in +-1/sqrt(fan_in).
    """

    def __init__(self, fan_in: int, dim: int, *, eps: float, dtype, rngs: nnx.Rngs):
        def uniform(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -1, 1) / np.sqrt(fan_in)

        self.proj = nnx.Linear(
            fan_in,
            dim,
            kernel_init=uniform,
            bias_init=uniform,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = LayerNorm(dim, epsilon=eps, dtype=dtype, rngs=rngs)

    def __call__(self, cells: jax.Array) -> jax.Array:
        return self.norm(self.proj(cells))


class Layer(NamedTuple):
    """What a main-stage block gives.

    tokens: [B, N, E] in compute dtype, its output, units row-major.
    attention: float32 [B, heads, N, N], query first, rows adding up to 1; or None. Of a
      block with windows [B, W, heads, S, S], see `positions.Windows`.
    """

    tokens: jax.Array
    attention: jax.Array | None


class HiViT(nnx.Module):
    """The encoder, without head: the one that pretraining and every other task calls.

    Args:
      image_size: side, or (height, width), in pixels; a multiple of `patch_size`.
      in_channels: channels of an image.
      embed_dim: width E of the main stage; stem stages have E/4, E/2.
      depths: blocks per stage. A stem stage has two MLP blocks for each one named.
      num_heads: heads of the main stage.
      mlp_ratio, stem_mlp_ratio: hidden width over width, main stage and stem.
      drop_path_rate: of the last block; earlier ones rise linearly from 0.
      patch_size: side of a unit in pixels.
      inner_patches: cells per unit side, ``2 ** (len(depths) - 1)``.
      relative_position: relative position bias in the main stage.
      window_size: units per side of the windows that main-stage blocks attend in; 0:
        all units. A smaller image is one window. The bias of a windowed block spans
        the window, so a table of a 14x14 grid fits windows of 14 in any larger image.
      global_blocks: main-stage blocks, counted from 0, that attend to all units
        nonetheless. Official detection: windows of 14 and blocks 4, 9, 14, 19; a
        forward pass of hivit_base on one image of 1024x1024 then needs 3.1 GiB of
        temporaries instead of 11.1 (XLA for CPU, float32).
      layer_norm_eps: of every LayerNorm.
      sincos_position: start `absolute_pos_embed` as the sine-cosine table instead of
        normal(0.02). It is trained either way (official: pretraining does so too,
        although a comment there says frozen).
      dtype: compute dtype, "float32" or "bfloat16"; parameters are float32.
      remat: in training, keep only what goes into each block and compute the rest
        again for the gradient: less memory, more time.
      scan_blocks: compile the blocks of a stage as one, run in a loop: shorter
        compilation. The blocks must be alike, so not with `global_blocks`.
      kernels: run residual branches as single kernels, "auto": on TPUs, in bfloat16;
        "fused": wherever shapes allow; "plain": never. See `hivit_jax.kernels`.

    Raises:
      ConfigError: sizes that do not fit each other.
    """

    def __init__(
        self,
        *,
        image_size: int | Sequence[int] = 224,
        in_channels: int = 3,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: int,
        mlp_ratio: float = 4.0,
        stem_mlp_ratio: float = 3.0,
        drop_path_rate: float = 0.0,
        patch_size: int = 16,
        inner_patches: int = 4,
        relative_position: bool = True,
        window_size: int = 0,
        global_blocks: Sequence[int] = (),
        layer_norm_eps: float = 1e-6,
        sincos_position: bool = False,
        dtype: str = "float32",
        remat: bool = False,
        scan_blocks: bool = False,
        kernels: str = "auto",
        rngs: nnx.Rngs,
    ):
        self.grid = positions.check_grid(image_size, patch_size)
        stems = len(depths) - 1
        if stems < 1 or inner_patches != 2**stems or min(depths) < 1:
            raise ConfigError(
                f"depths={tuple(depths)} with inner_patches={inner_patches}: expected "
                "positive depths and inner_patches = 2 ** (number of stages - 1)"
            )
        if patch_size % inner_patches:
            raise ConfigError(
                f"patch_size={patch_size} is not a multiple of "
                f"inner_patches={inner_patches}"
            )
        check_heads("embed_dim", embed_dim, "num_heads", num_heads)
        if embed_dim < 1 or embed_dim % (2**stems) or embed_dim % 4:
            raise ConfigError(
                f"embed_dim={embed_dim}: expected a multiple of {max(4, 2**stems)}"
            )
        if not 0 <= drop_path_rate < 1:
            raise ConfigError(
                f"drop_path_rate={drop_path_rate}; expected 0 <= drop_path_rate < 1"
            )
        if window_size < 0:
            raise ConfigError(f"window_size={window_size}; expected 0 or more units")
        if any(not 0 <= number < depths[-1] for number in global_blocks):
            raise ConfigError(
                f"global_blocks={tuple(global_blocks)}; expected numbers from 0 to "
                f"{depths[-1] - 1} for the {depths[-1]} blocks of the main stage"
            )
        if scan_blocks and global_blocks:
            raise ConfigError(
                f"scan_blocks=True with global_blocks={tuple(global_blocks)}; expected "
                "blocks that are alike"
            )
        if dtype not in ("float32", "bfloat16", jnp.float32, jnp.bfloat16):
            raise ConfigError(f"dtype={dtype!r}; expected 'float32' or 'bfloat16'")
        if kernels not in ("auto", "fused", "plain"):
            raise ConfigError(
                f"kernels={kernels!r}; expected 'auto', 'fused' or 'plain'"
            )

        self.image_size = tuple(side * patch_size for side in self.grid)
        self.in_channels, self.embed_dim = in_channels, embed_dim
        self.patch_size, self.inner_patches = patch_size, inner_patches
        self.window_size, self.global_blocks = window_size, tuple(global_blocks)
        self.main_depth, self.dtype = depths[-1], jnp.dtype(dtype)
        self.remat, self.scan_blocks, self.kernels = remat, scan_blocks, kernels
        common = dict(eps=layer_norm_eps, dtype=self.dtype, rngs=rngs)
        blocks = [2 * depth for depth in depths[:-1]] + [depths[-1]]
        # One rate per residual block in order; PatchMerge takes none.
        rates = np.linspace(0, drop_path_rate, sum(blocks), dtype=np.float32)
        self.drop_rates = tuple(map(float, rates))

        width = embed_dim // 2**stems
        fan_in = (patch_size // inner_patches) ** 2 * in_channels
        self.patch_embed = PatchEmbed(fan_in, width, **common)
        stages, merges = [], []
        for count in blocks[:-1]:
            stages.append(
                nnx.List(
                    MlpBlock(width, stem_mlp_ratio, **common) for _ in range(count)
                )
            )
            merges.append(PatchMerge(width, **common))
            width *= 2
        stages.append(nnx.List())
        for windows in self._windows(self.grid):
            span = self.grid if windows is None else windows.size
            stages[-1].append(
                AttentionBlock(
                    width,
                    num_heads,
                    mlp_ratio,
                    grid=span if relative_position else None,
                    windows=windows,
                    **common,
                )
            )
        self.stages, self.merges = nnx.List(stages), nnx.List(merges)
        units = self.grid[0] * self.grid[1]
        table = (
            positions.sincos_table(self.grid, embed_dim)
            if sincos_position
            else INIT(rngs.params(), (units, embed_dim), jnp.float32)
        )
        self.absolute_pos_embed = nnx.Param(jnp.asarray(table))

    @property
    def how(self) -> dict[str, bool | str]:
        """How to run blocks, for `run_blocks`."""
        return dict(remat=self.remat, scan=self.scan_blocks, kernel=self.kernels)

    def _run_stage(self, stage: int, x: jax.Array, **inputs: jax.Array | None):
        first = sum(map(len, self.stages[:stage]))
        rates = self.drop_rates[first:] if any(self.drop_rates) else None
        return run_blocks(
            self.stages[stage], x, **self.how, first=first, rates=rates, **inputs
        )

    def _windows(self, grid: Grid) -> list[Windows | None]:
        """The windows of each main-stage block in a grid; None: all of it."""
        windows = Windows.over(grid, self.window_size)
        return [
            None if number in self.global_blocks else windows
            for number in range(self.main_depth)
        ]

    def __call__(
        self,
        images: jax.Array,
        *,
        ids_keep: jax.Array | None = None,
        key_mask: jax.Array | None = None,
        sample_keys: jax.Array | None = None,
    ) -> list[jax.Array]:
        """Output of every stage, for all units or for the kept ones.

        Args:
          images: [B, H, W, C] float, normalised.
          ids_keep: int [B, K], the units to keep, in the order wanted; None for all.
          key_mask: [B, K], nonzero = the unit may be attended to.
          sample_keys: [B] keys for drop path; None (evaluation) drops nothing.

        Returns:
          In merge order and compute dtype: [B*K*16, E/4], [B*K*4, E/2], [B, K, E].

        Raises:
          ConfigError: images of another size or channel count than built for; kept
            units for blocks with windows.
        """
        *outputs, x, relative_index = self._stem(images, ids_keep, sample_keys)
        with jax.named_scope("main"):
            x = self._run_stage(
                len(self.stages) - 1,
                x,
                relative_index=relative_index,
                key_mask=key_mask,
                sample_keys=sample_keys,
            )
        return [*outputs, x]

    @jax.named_scope("embedding")
    def _stem(self, images, ids_keep=None, sample_keys=None):
        """Outputs of the stem stages, main stage input [B, K, E], relative index."""
        expected = (*self.image_size, self.in_channels)
        if images.shape[1:] != expected:
            raise ConfigError(
                f"images are {images.shape[1:]} (height, width, channels); "
                f"this model was built for {expected}"
            )
        if ids_keep is not None and any(self._windows(self.grid)):
            raise ConfigError(
                f"window_size={self.window_size} with some of the units only: windows "
                "need them all; expected window_size=0"
            )
        units = positions.patchify(images, self.patch_size)  # [B, N, P*P*C]
        position = self.absolute_pos_embed[...]  # [N, E]
        ids = jnp.arange(len(position))  # [N]
        if ids_keep is not None:
            units = positions.rows_at(units, ids_keep)  # [B, K, P*P*C]
            # A product, and so is its gradient: scattered additions are slow on TPUs,
            # in no fixed order on GPUs, and exchanged between devices as they are.
            chosen = jax.nn.one_hot(ids_keep, len(position), dtype=self.dtype)
            position = jnp.matmul(
                chosen, position.astype(self.dtype), precision="highest"
            )  # [B, K, E]
            ids = ids_keep
        cells = positions.units_to_cells(
            units.astype(self.dtype), self.patch_size, self.inner_patches
        )
        x = self.patch_embed(cells)  # [B*K*16, E/4]
        outputs = []
        for stage, merge in enumerate(self.merges):
            with jax.named_scope(f"stem{stage + 1}"):
                x = self._run_stage(stage, x, sample_keys=sample_keys)
            outputs.append(x)
            x = merge(x)  # a quarter of the rows, twice as wide
        x = x.reshape(images.shape[0], -1, self.embed_dim)  # [B, K, E]
        x = x + position.astype(self.dtype)
        return *outputs, x, positions.relative_position_index(ids, self.grid)

    def features(
        self,
        images: jax.Array,
        ids_keep: jax.Array | None = None,
        stride_32: bool = False,
    ) -> list[jax.Array]:
        """Feature pyramid in raster order, from the end of every stage.

        Args:
          images: [B, H, W, C] float, normalised.
          ids_keep: int [B, K], the units to keep, in the order wanted; None for all.
          stride_32: add the last map, its maximum over 2x2 (official detection code;
            as there an odd last row or column is left out).

        Returns:
          In compute dtype [B, H/4, W/4, E/4], [B, H/8, W/8, E/2], [B, H/16, W/16, E]
          and, if asked for, [B, H/32, W/32, E]. Of kept units their cells:
          [B, K, 4, 4, E/4], [B, K, 2, 2, E/2], [B, K, 1, 1, E].

        Raises:
          ConfigError: as `__call__`; stride_32 of kept units or of a single row.
        """
        # A kept unit is an image of its own.
        grid = self.grid if ids_keep is None else (1, 1)
        if stride_32 and min(grid) < 2:
            found = f"a {grid[0]}x{grid[1]} grid" if ids_keep is None else "kept units"
            raise ConfigError(
                f"stride_32 of {found}; expected all of a grid of at least 2x2 units"
            )
        maps = [
            positions.tokens_to_map(x, grid, self.inner_patches >> level)
            for level, x in enumerate(self(images, ids_keep=ids_keep))
        ]
        if stride_32:
            rows, columns = grid[0] // 2, grid[1] // 2
            x = maps[-1][:, : 2 * rows, : 2 * columns]
            maps.append(x.reshape(-1, rows, 2, columns, 2, x.shape[-1]).max((2, 4)))
        if ids_keep is not None:
            maps = [x.reshape(*ids_keep.shape, *x.shape[1:]) for x in maps]
        return maps

    def layers(self, images: jax.Array, attention: bool = False) -> list[Layer]:
        """Output of every main-stage block, [B, H, W, C] -> one `Layer` each.

        Args:
          attention: also what it attended to, which takes [B, heads, N, N] each.
        """
        *_, x, index = self._stem(images)
        layers = []
        for block in self.stages[-1]:
            weights = None
            if attention:
                weights = block.attn.probabilities(block.norm1(x), index)
            x = run_blocks([block], x, **self.how, relative_index=index)
            layers.append(Layer(x, weights))
        return layers

    def macs(
        self, grid: Grid, kept: int | None = None, *, layer_norm_cost: int = 5
    ) -> int:
        """Cost of one image of a grid of units of which `kept` are encoded.

        Counts as the published tables do, see `Classifier.macs`; there the patch
        convolution runs on all units (here it runs on the kept ones). In windows
        products with padding count, as they are computed.
        """
        units = grid[0] * grid[1]
        kept = units if kept is None else kept
        cells = self.inner_patches**2
        cost = row_cost(self.patch_embed.proj, units * cells, layer_norm_cost)
        cost += row_cost(self.patch_embed.norm, units * cells, layer_norm_cost)
        for blocks, merge in zip(self.stages, self.merges, strict=False):
            cost += row_cost(blocks, kept * cells, layer_norm_cost)
            cells //= 4
            cost += row_cost(merge, kept * cells, layer_norm_cost)
        for block, windows in zip(self.stages[-1], self._windows(grid), strict=True):
            pairs = kept**2 if windows is None else windows.pairs
            cost += attention_cost(block, kept, pairs, layer_norm_cost)
        return cost


class Features(nnx.Module):
    """A network on an encoder, with the encoder's features and layers."""

    encoder: HiViT

    def features(
        self,
        images: jax.Array,
        ids_keep: jax.Array | None = None,
        stride_32: bool = False,
    ) -> list[jax.Array]:
        """The encoder's feature pyramid, see `HiViT.features`."""
        return self.encoder.features(images, ids_keep, stride_32)

    def layers(self, images: jax.Array, attention: bool = False) -> list[Layer]:
        """Output of each of the encoder's main-stage blocks, see `HiViT.layers`."""
        return self.encoder.layers(images, attention)


def image_grid(encoder: HiViT, image_size: int | Sequence[int] | None) -> Grid:
    """Units per column and row of an image of this size (None: the encoder's own)."""
    return positions.check_grid(image_size or encoder.image_size, encoder.patch_size)
