"""SimMIM on Swin (Xie et al., CVPR 2022).

All tokens are encoded. A learned token replaces each masked token after the patch
embedding. A linear layer on the tokens of the last stage predicts the pixels. A *unit*
is a square of ``mask_patch_size`` pixels per side, which is masked as a whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.errors import ConfigError
from hivit_jax.keys import setting
from hivit_jax.models import positions
from hivit_jax.models.arguments import check_shape
from hivit_jax.models.base import make_info
from hivit_jax.models.config import RunOptions
from hivit_jax.models.explicit_axes import accepts_explicit_axes
from hivit_jax.models.flops import module_cost
from hivit_jax.models.layers import PatchEmbed
from hivit_jax.models.masked import MAEOutput, MaskedModel
from hivit_jax.models.masking import count_simmim_visible_units, random_masking
from hivit_jax.models.norms import LayerNorm
from hivit_jax.models.swin import Swin, SwinConfig
from hivit_jax.models.swin_classifier import swin_cost


@dataclass(frozen=True, kw_only=True)
class SimMIMConfig(SwinConfig):
    """Sizes of Swin's encoder and of the masked units.

    mask_patch_size: side in pixels of the units that are masked.

    Raises:
      ConfigError: inconsistent sizes.
    """

    norm_pix_loss: ClassVar[bool] = False
    geometric_tables: ClassVar[bool] = True

    image_size: int | tuple[int, int] = setting(192, high=2**14, length=2)
    window_size: int = setting(6, low=1, high=2**14)
    mask_patch_size: int = setting(32, low=1, high=2**14)

    def __post_init__(self):
        super().__post_init__()
        if self.mask_patch_size % self.patch_size:
            raise ConfigError(
                f"mask_patch_size={self.mask_patch_size}; expected a multiple of "
                f"patch_size={self.patch_size}"
            )
        for side in (self.mask_patch_size, self.stride):
            positions.image_grid(self.image_size, side)  # raises ConfigError

    @property
    def unit_size(self) -> int:
        """Side in pixels of the units that are masked."""
        return self.mask_patch_size

    @property
    def stride(self) -> int:
        """Side in pixels of a token of the last stage."""
        return self.patch_size << (len(self.depths) - 1)


class SimMIM(MaskedModel):
    """Swin on all tokens, a linear layer as decoder, mean absolute error."""

    name, description = "simmim_swin_base", "a masked image model"
    architecture = "SimMIM (Xie et al., CVPR 2022) on Swin"
    encoder_class = Swin
    elementwise_error = staticmethod(jnp.abs)
    count_visible = staticmethod(count_simmim_visible_units)

    def __init__(
        self,
        config: SimMIMConfig,
        run_options: RunOptions = RunOptions(),  # noqa: B008
        *,
        rngs: nnx.Rngs,
    ):
        self.encoder = Swin(config, run_options, has_mask_token=True, rngs=rngs)
        self.info = make_info(config)
        common = dict(dtype=jnp.dtype(run_options.dtype), rngs=rngs)
        width, stride = config.widths[-1], config.stride
        self.norm = LayerNorm(width, epsilon=config.layer_norm_eps, **common)
        values_per_token = stride**2 * config.in_channels
        # A `PatchEmbed`, because it is initialized like the official 1x1 convolution.
        self.decoder = PatchEmbed(width, values_per_token, eps=None, **common)

    @accepts_explicit_axes
    def __call__(
        self,
        images: jax.Array,
        *,
        noise: jax.Array,
        mask_ratio: float = 0.6,
        drop_path_keys: jax.Array | None = None,
    ) -> MAEOutput:
        """Mask and reconstruct images, and compute the loss.

        Args:
          images: [B, H, W, C] float32, normalized.
          noise: [B, N]; the units with the lowest noise are masked.
          mask_ratio: fraction of units to mask, rounded up.
          drop_path_keys: [B] PRNG keys for drop path; None: no drop path.

        Raises:
          ConfigError: an array has another shape, or `mask_ratio` leaves no visible
            unit or is outside (0, 1).
        """
        mask = self.mask(images, noise, mask_ratio)
        latent = self.encode(images, mask, drop_path_keys)
        pred = self.decode(latent)
        return self.output(images, pred, mask, latent)

    @accepts_explicit_axes
    def image_loss(
        self,
        images: jax.Array,
        *,
        noise: jax.Array,
        mask_ratio: float = 0.6,
        drop_path_keys: jax.Array | None = None,
    ) -> jax.Array:
        """Return the mean absolute error over each image's masked pixels, [B] float32.

        For the arguments see `__call__`.
        """
        mask = self.mask(images, noise, mask_ratio)
        pred = self.decode(self.encode(images, mask, drop_path_keys))
        return (self.unit_loss(images, pred) * mask).sum(1) / mask.sum(1)

    @accepts_explicit_axes
    def mask(self, images: jax.Array, noise: jax.Array, mask_ratio: float) -> jax.Array:
        """Return the mask of the units, [B, N] float32: 0 visible, 1 masked."""
        num_visible = self.num_visible(images, noise, mask_ratio)
        # `random_masking` keeps the units with the lowest noise; SimMIM masks them.
        return 1 - random_masking(noise, noise.shape[1] - num_visible)[2]

    @accepts_explicit_axes
    def encode(
        self,
        images: jax.Array,
        mask: jax.Array,
        drop_path_keys: jax.Array | None = None,
    ) -> jax.Array:
        """Return the N' tokens of the last stage after `norm`, [B, N', width].

        Args:
          mask: [B, N], as returned by `mask`.
        """
        rows, columns = self.unit_grid
        check_shape("mask", mask, "[B, N]", images.shape[0], rows * columns)
        token_mask = mask.reshape(len(mask), rows, columns)
        repeats = self.unit_size // self.config.patch_size
        for axis in (1, 2):
            token_mask = jnp.repeat(token_mask, repeats, axis)
        token_mask = token_mask.reshape(len(mask), -1)
        stages = self.encoder(images, mask=token_mask, drop_path_keys=drop_path_keys)
        return self.norm(stages[-1])

    @accepts_explicit_axes
    def decode(self, latent: jax.Array) -> jax.Array:
        """Return the prediction of all units, float32 [B, N, P*P*C], P = `unit_size`.

        Args:
          latent: output of `encode`.
        """
        with jax.named_scope("decoder"):
            pred = self.decoder(latent).astype(jnp.float32)
        stride = self.config.stride
        if stride == self.unit_size:
            return pred
        grid = positions.image_grid(self.config.image_size, stride)
        return positions.patchify(
            positions.unpatchify(pred, grid, stride), self.unit_size
        )

    def macs(
        self,
        image_size: int | Sequence[int] | None = None,
        *,
        mask_ratio: float = 0.6,
        layer_norm_cost: int = 5,
    ) -> int:
        """Return the multiply-adds of one image's forward pass.

        Args:
          image_size: side or (height, width) in pixels; None: as in the config.
          mask_ratio: without effect, because all tokens are encoded.
          layer_norm_cost: as in `Classifier.macs`.
        """
        grid = self._grid(image_size)
        rows, columns = self.config.stage_grids(grid)[-1]
        cost = swin_cost(self, grid, layer_norm_cost)
        return cost + module_cost(self.decoder, rows * columns, layer_norm_cost)
