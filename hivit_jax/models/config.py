"""Configs of models: sizes common to all, HiViT's sizes, and `RunOptions`."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hivit_jax.errors import ConfigError
from hivit_jax.kernels import dispatch
from hivit_jax.keys import check_fields, setting
from hivit_jax.models.arguments import check_heads
from hivit_jax.models.positions import Grid, image_grid
from hivit_jax.models.windows import Windows, make_windows


@dataclass(frozen=True)
class RunOptions:
    """Options that change how a model runs, but not its parameters.

    dtype: compute dtype, "float32" or "bfloat16"; parameters are always float32.
    remat: in training, save only each block's input and recompute the rest in the
      backward pass. This needs less memory and more time.
    scan_blocks: compile one block per stage and run it in a loop. This shortens
      compilation. The blocks of a stage must be alike: `global_blocks` must be (), and
      Swin does not support this option.
    kernels: devices that run fused kernels, "auto" (TPUs and GPUs, in bfloat16 only),
      "fused" (also CPUs, slowly but in any dtype) or "plain" (none). See
      `kernels.dispatch`. Forward-mode derivatives (`jax.jvp`, `jax.jacfwd`,
      `jax.linearize`) require "plain" where a fused kernel would run.
    """

    dtype: str = setting("float32", choices=("float32", "bfloat16"))
    remat: bool = False
    scan_blocks: bool = False
    kernels: str = setting("auto", choices=dispatch.CHOICES)

    def __post_init__(self):
        name = getattr(self.dtype, "__name__", str(self.dtype))  # jnp.bfloat16 too
        object.__setattr__(self, "dtype", name)
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Sizes that every encoder has. Subclasses add `depths`, the depth of each stage.

    image_size: side or (height, width), multiples of `patch_size`; stored as a pair.
    in_channels: channels of an image.
    embed_dim: width E of the blocks with attention. In Swin, of the first stage.
    num_heads: attention heads of a block.
    mlp_ratio: hidden width divided by width in the MLPs after attention.
    drop_path_rate: drop path rate of the last block. The rates of the blocks rise
      linearly from 0.
    patch_size: side in pixels of a unit (image area of a token of the last stage). In
      Swin, a unit is the image area of a first-stage token instead.
    layer_norm_eps: epsilon of every LayerNorm.

    Class attributes:
      class_tokens: number of class tokens, 0 or 1; they precede the units' tokens.

    Raises:
      ConfigError: inconsistent sizes.
    """

    class_tokens: ClassVar[int] = 0

    image_size: int | tuple[int, int] = setting(224, high=2**14, length=2)
    in_channels: int = setting(3, low=1, high=4096)
    embed_dim: int = setting(low=4, high=2**16)
    num_heads: int = setting(low=1, high=2**16)
    mlp_ratio: float = setting(4.0, above=0, high=1000)
    drop_path_rate: float = setting(0.0, low=0, below=1)
    patch_size: int = setting(16, low=1, high=2**14)
    layer_norm_eps: float = setting(1e-6, above=0, high=1)

    def __post_init__(self):
        check_fields(self)
        size = tuple(count * self.patch_size for count in self.grid)
        object.__setattr__(self, "image_size", size)

    def check_widths(self, mlp_widths: dict[str, int]) -> None:
        """Raise ConfigError for an invalid `embed_dim`, `num_heads` or MLP ratio.

        Args:
          mlp_widths: {name of an MLP ratio: input width of the MLPs with this ratio}.
        """
        dim, multiple = self.embed_dim, max(4, 2 ** (len(self.block_counts) - 1))
        check_heads("embed_dim", dim, "num_heads", self.num_heads)
        if dim % multiple:
            raise ConfigError(f"embed_dim={dim}: expected a multiple of {multiple}")
        self.check_mlps(mlp_widths)

    def check_mlps(self, mlp_widths: dict[str, int]) -> None:
        """Raise ConfigError for an MLP without hidden units; see `check_widths`."""
        for name, width in mlp_widths.items():
            if width * getattr(self, name) < 1:
                raise ConfigError(
                    f"{name}={getattr(self, name)} leaves no hidden unit in an MLP of "
                    f"width {width}; expected at least {1 / width:g}"
                )

    @property
    def grid(self) -> Grid:
        """Numbers of units along the height and the width of an image."""
        return image_grid(self.image_size, self.patch_size)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image."""
        return (*self.image_size, self.in_channels)

    @property
    def cell_size(self) -> int:
        """Side in pixels of a first-stage token's area: a unit, or in HiViT a cell."""
        return self.patch_size

    @property
    def block_counts(self) -> tuple[int, ...]:
        """Numbers of residual blocks per stage."""
        return self.depths

    @property
    def drop_path_rates(self) -> tuple[float, ...]:
        """Drop path rates of all residual blocks in order."""
        count = sum(self.block_counts)
        rates = np.linspace(0, self.drop_path_rate, count, dtype=np.float32)
        return tuple(map(float, rates))

    def windows(self, grid: Grid) -> list[Windows | None]:
        """Return the windows of each attention block; None: global attention."""
        return [None] * self.block_counts[-1]

    def table_grid(self, stage: int, block: int) -> Grid:
        """Return the grid that a block's relative position table spans."""
        windows = self.windows(self.grid)[block]
        return self.grid if windows is None else windows.size


@dataclass(frozen=True, kw_only=True)
class HiViTConfig(EncoderConfig):
    """Sizes of HiViT's encoder.

    embed_dim: width E of the main stage. The stem stages have widths E/4 and E/2.
    depths: depth d of each stage, which has d attention blocks, or 2d MLP blocks in the
      stem.
    num_heads: attention heads of the main stage.
    mlp_ratio: hidden width divided by width in the MLPs of the main stage.
    stem_mlp_ratio: hidden width divided by width in the MLPs of the stem.
    inner_patches: cells (image areas of first-stage tokens) per unit side, required to
      be ``2 ** (len(depths) - 1)``.
    relative_position: relative position bias in the main stage.
    window_size: side of the attention windows of the main stage in units, or 0 for
      global attention. An image with at most this many units per side is one window.
      The bias table of a windowed block spans one window. A table trained on a 14x14
      grid can therefore be used with windows of 14 in larger images.
    global_blocks: main-stage blocks, counted from 0, that use global attention despite
      `window_size`. Official detection uses windows of 14 and global blocks 4, 9, 14,
      19. docs/weights.md shows how much memory the windows save.

    Raises:
      ConfigError: inconsistent sizes.
    """

    depths: tuple[int, ...] = setting(low=1, high=1000)
    stem_mlp_ratio: float = setting(3.0, above=0, high=1000)
    inner_patches: int = setting(4, low=1, high=2**14)
    relative_position: bool = True
    window_size: int = setting(0, low=0, high=2**14)
    global_blocks: tuple[int, ...] = setting((), low=0, high=1000)

    def __post_init__(self):
        super().__post_init__()
        num_stems, inner = len(self.depths) - 1, self.inner_patches
        if num_stems < 1 or inner != 2**num_stems:
            raise ConfigError(
                f"depths={self.depths} with inner_patches={inner}: expected at least "
                "two depths and inner_patches = 2 ** (number of stages - 1)"
            )
        if self.patch_size % inner:
            raise ConfigError(
                f"patch_size={self.patch_size} is not a multiple of "
                f"inner_patches={inner}"
            )
        dim, depth = self.embed_dim, self.depths[-1]
        self.check_widths({"mlp_ratio": dim, "stem_mlp_ratio": dim >> num_stems})
        if any(index >= depth for index in self.global_blocks):
            raise ConfigError(
                f"global_blocks={self.global_blocks}; expected indices from 0 to "
                f"{depth - 1} for the {depth} blocks of the main stage"
            )

    @property
    def cell_size(self) -> int:
        """Side of a cell in pixels."""
        return self.patch_size // self.inner_patches

    @property
    def block_counts(self) -> tuple[int, ...]:
        """Numbers of residual blocks per stage."""
        return (*(2 * depth for depth in self.depths[:-1]), self.depths[-1])

    def windows(self, grid: Grid) -> list[Windows | None]:
        """Return the windows of each main-stage block; None: global attention."""
        windows = make_windows(grid, self.window_size)
        return [
            None if index in self.global_blocks else windows
            for index in range(self.depths[-1])
        ]


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(HiViTConfig):
    """Sizes of HiViT's encoder and of the head.

    num_classes: classes of the head; 0: no head. In a recipe, 0 stands for the
      dataset's number of classes.
    fc_norm: LayerNorm between pooling and head. MMPretrain's HiViT has none.
    running_norm: a `BatchNorm` without scale and bias, in place of `fc_norm`, for a
      linear probe. The norm and its eps of 1e-6 follow MAE's ``main_linprobe.py``.
    """

    num_classes: int = setting(1000, low=0, high=10**7)
    fc_norm: bool = True
    running_norm: bool = False


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(EncoderConfig):
    """Sizes of a masked autoencoder on HiViT or ViT: encoder and decoder.

    The decoder has an MLP ratio of 4, no relative positions and no drop path.

    decoder_embed_dim: width of the decoder.
    decoder_depth: blocks of the decoder.
    decoder_num_heads: attention heads of the decoder.
    norm_pix_loss: normalize the targets of each unit. The official HiViT constructor
      ignores this argument and always normalizes.
    """

    decoder_embed_dim: int = setting(512, low=4, high=2**16)
    decoder_depth: int = setting(low=1, high=1000)
    decoder_num_heads: int = setting(16, low=1, high=2**16)
    norm_pix_loss: bool = True

    def __post_init__(self):
        super().__post_init__()
        dim, heads = self.decoder_embed_dim, self.decoder_num_heads
        check_heads("decoder_embed_dim", dim, "decoder_num_heads", heads)
        if dim % 4:
            raise ConfigError(f"decoder_embed_dim={dim}: expected a multiple of 4")

    @property
    def unit_size(self) -> int:
        """Side in pixels of the units that are masked."""
        return self.patch_size

    @property
    def latent_dim(self) -> int:
        """Width of each token of the latent."""
        return self.embed_dim

    @property
    def has_latent_norm(self) -> bool:
        """True if a LayerNorm precedes the decoder's embedding of the latent."""
        return True


@dataclass(frozen=True, kw_only=True)
class MAEConfig(AutoencoderConfig, HiViTConfig):
    """Sizes of a masked autoencoder on HiViT; `window_size` must be 0.

    multi_scale: decode the outputs of all stages, concatenated (to width 7E with three
      stages) and normalized (official ``hifeat``). False: decode the main stage's
      output, without a norm. The official module has an unused norm in this case.
    """

    decoder_depth: int = setting(6, low=1, high=1000)
    relative_position: bool = False
    multi_scale: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.window_size > 0:
            raise ConfigError(
                f"window_size={self.window_size}: masked pretraining drops units, but "
                "attention windows need all units; expected window_size=0"
            )

    @property
    def latent_dim(self) -> int:
        """Width of the latent of a unit.

        With `multi_scale`, each stage contributes (its tokens per unit) x (its width).
        """
        return self.embed_dim * (2 * self.inner_patches - 1 if self.multi_scale else 1)

    @property
    def has_latent_norm(self) -> bool:
        """True if a LayerNorm precedes the decoder's embedding of the latent."""
        return self.multi_scale
