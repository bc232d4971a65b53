"""Classifier on Swin (Liu et al., ICCV 2021)."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.keys import setting
from hivit_jax.models.classifier import Classifier
from hivit_jax.models.config import RunOptions
from hivit_jax.models.explicit_axes import accepts_explicit_axes
from hivit_jax.models.flops import attention_block_cost, module_cost
from hivit_jax.models.norms import LayerNorm
from hivit_jax.models.positions import Grid
from hivit_jax.models.swin import Swin, SwinConfig


@dataclass(frozen=True, kw_only=True)
class SwinClassifierConfig(SwinConfig):
    """Sizes of Swin's encoder and of the head.

    num_classes: classes of the head; 0: no head. In a recipe, 0 stands for the
      dataset's number of classes.
    running_norm: a `BatchNorm` without scale and bias before the head, for a linear
      probe.
    """

    num_classes: int = setting(1000, low=0, high=10**7)
    running_norm: bool = False


class SwinClassifier(Classifier):
    """Swin with a LayerNorm, mean pooling and a linear head."""

    name, architecture = "swin_base", "Swin (Liu et al., ICCV 2021)"
    encoder_class = Swin
    new_head_scale = 1.0  # as in SimMIM's finetuning

    def __init__(
        self,
        config: SwinClassifierConfig,
        run_options: RunOptions = RunOptions(),  # noqa: B008
        *,
        rngs: nnx.Rngs,
    ):
        self.encoder = Swin(config, run_options, rngs=rngs)
        dim, eps = config.widths[-1], config.layer_norm_eps
        # `norm` is float32 for any compute dtype.
        self.norm = LayerNorm(dim, epsilon=eps, rngs=rngs)
        self._add_head(config, dim, fc_norm=False, rngs=rngs)

    @accepts_explicit_axes
    def mean_token(
        self, images: jax.Array, *, drop_path_keys: jax.Array | None = None
    ) -> jax.Array:
        """Return the mean of the tokens after `norm`, [B, width] float32."""
        tokens = self.encoder(images, drop_path_keys=drop_path_keys)[-1]
        return self.norm(tokens.astype(jnp.float32)).mean(1)

    def macs(
        self,
        image_size: int | Sequence[int] | None = None,
        *,
        layer_norm_cost: int = 5,
    ) -> int:
        """Return the multiply-adds of one image's forward pass.

        Args:
          image_size, layer_norm_cost: as in `Classifier.macs`.
        """
        cost = swin_cost(self, self._grid(image_size), layer_norm_cost)
        return cost + module_cost(self.head, 1, layer_norm_cost)


def swin_cost(model: nnx.Module, grid: Grid, layer_norm_cost: int) -> int:
    """Return the cost of `model.encoder` and `model.norm` for one image.

    Args:
      grid: tokens of the first stage along height and width.
    """
    encoder, config = model.encoder, model.encoder.config
    cost = module_cost(encoder.patch_embed, grid[0] * grid[1], layer_norm_cost)
    for stage, (rows, columns) in enumerate(config.stage_grids(grid)):
        tokens = rows * columns
        if stage:
            cost += module_cost(encoder.merges[stage - 1], tokens, layer_norm_cost)
        stage_windows = config.stage_windows(stage, (rows, columns))
        for block, windows in zip(encoder.stages[stage], stage_windows, strict=True):
            pairs = tokens**2 if windows is None else windows.pairs
            cost += attention_block_cost(block, tokens, pairs, layer_norm_cost)
    return cost + module_cost(model.norm, tokens, layer_norm_cost)
