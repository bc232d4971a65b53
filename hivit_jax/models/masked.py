"""Base class of masked models, and their output.

A *unit* is a square of an image that is masked as a whole.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hivit_jax.models import positions
from hivit_jax.models.arguments import check_ids, check_shape
from hivit_jax.models.base import Model
from hivit_jax.models.explicit_axes import accepts_explicit_axes
from hivit_jax.models.masking import count_visible_units


class MAEOutput(NamedTuple):
    """Output of a masked model for N units of P x P pixels, K of them visible.

    loss: float32 scalar, mean error over the masked units of the batch; NaN for an
      empty batch.
    pred: [B, N, P*P*C] float32, predictions of the (possibly normalized) targets.
    mask: [B, N] float32, 0 visible, 1 masked.
    latent: input of the decoder, [B, K, L], or [B, 1+K, L] with a class token, where L
      is `config.latent_dim`. SimMIM: all tokens of the last stage.
    unit_loss: [B, N] float32, mean error of each unit, visible or masked.
    """

    loss: jax.Array
    pred: jax.Array
    mask: jax.Array
    latent: jax.Array
    unit_loss: jax.Array


class MaskedModel(Model):
    """Base class of models that predict the pixels of masked units.

    Attributes:
      elementwise_error: function of prediction minus target.
      count_visible: function (units, mask_ratio) that returns the number of visible
        units, or raises ConfigError for an invalid ratio.
    """

    elementwise_error: Callable[[jax.Array], jax.Array] = staticmethod(jnp.square)
    count_visible: Callable[[int, float], int] = staticmethod(count_visible_units)

    @property
    def unit_size(self) -> int:
        """Side in pixels of the units that are masked."""
        return self.config.unit_size

    @property
    def unit_grid(self) -> positions.Grid:
        """Numbers of units along the height and the width of an image."""
        return positions.image_grid(self.config.image_size, self.unit_size)

    def num_visible(
        self, images: jax.Array, noise: jax.Array, mask_ratio: float
    ) -> int:
        """Return the number of visible units of an image.

        Raises:
          ConfigError: the noise has another shape than [B, N], or the ratio is invalid.
        """
        rows, columns = self.unit_grid
        check_shape("noise", noise, "[B, N]", images.shape[0], rows * columns)
        return self.count_visible(rows * columns, mask_ratio)

    @accepts_explicit_axes
    def targets(
        self, images: jax.Array, ids: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return targets [B, N, P*P*C], and mean and scale of each unit [B, N, 1].

        P is `unit_size`.

        The pixels of the units are ``targets * scale + mean``. With `norm_pix_loss`,
        scale is ``sqrt(unbiased variance + 1e-6)``. Otherwise, mean is 0 and scale is
        1.

        Args:
          ids: int [B, M], indices of the units to return. The results then have M in
            place of N. None: all units, in row-major order.
        """
        if ids is not None:
            check_ids("ids", ids, images.shape[0])
        units = positions.patchify(images.astype(jnp.float32), self.unit_size)
        units = units if ids is None else positions.gather_tokens(units, ids)
        if not self.config.norm_pix_loss:
            return units, jnp.zeros_like(units[..., :1]), jnp.ones_like(units[..., :1])
        mean = units.mean(-1, keepdims=True)
        scale = jnp.sqrt(units.var(-1, keepdims=True, ddof=1) + 1e-6)
        return (units - mean) / scale, mean, scale

    @accepts_explicit_axes
    @jax.named_scope("loss")
    def unit_loss(
        self, images: jax.Array, pred: jax.Array, ids: jax.Array | None = None
    ) -> jax.Array:
        """Return the mean error of each unit, [B, N] float32.

        Args:
          pred: [B, N, P*P*C], prediction of the units `ids`.
          ids: see `targets`.
        """
        targets = self.targets(images, ids)[0]
        check_shape("pred", pred, "[B, N, P*P*C]", *targets.shape)
        return self.elementwise_error(pred - targets).mean(-1)

    def output(
        self, images: jax.Array, pred: jax.Array, mask: jax.Array, latent: jax.Array
    ) -> MAEOutput:
        """Compute the losses and return all outputs; see `MAEOutput`."""
        unit_loss = self.unit_loss(images, pred)
        loss = (unit_loss * mask).sum() / mask.sum()
        return MAEOutput(loss, pred, mask, latent, unit_loss)

    @accepts_explicit_axes
    def to_images(
        self, out: MAEOutput, mean: jax.Array, scale: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Return the prediction [B, H, W, C] and the mask [B, H, W, 1] as images.

        The unit normalization of the prediction is undone, so that its pixels have the
        scale of the input images. The mask is 1 for masked pixels, 0 for visible ones.

        Args:
          mean, scale: [B, N, 1], statistics of each unit, from `targets` or estimated
            without the masked pixels.
        """
        grid, unit_size = self.unit_grid, self.unit_size
        mask = jnp.repeat(out.mask[..., None], unit_size**2, -1)
        return (
            positions.unpatchify(out.pred * scale + mean, grid, unit_size),
            positions.unpatchify(mask, grid, unit_size),
        )
