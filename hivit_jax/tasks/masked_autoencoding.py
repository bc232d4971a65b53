"""Masked autoencoding: predict the pixels of masked units (He et al., CVPR 2022)."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from hivit_jax import rng
from hivit_jax.data.sources.splits import NO_EVALUATION
from hivit_jax.errors import ConfigError
from hivit_jax.keys import Key
from hivit_jax.models import configure
from hivit_jax.models.masked import MaskedModel
from hivit_jax.models.positions import image_grid
from hivit_jax.rng import Keys
from hivit_jax.tasks.base import PerSample, Rows, Sums, Task, weighted_sums
from hivit_jax.tasks.defaults import model_arguments


class MaskedAutoencoding(Task):
    """Pretraining task; the loss of an image is the mean over its masked units."""

    keys = {"mask_ratio": Key(0.75, "fraction of units to mask", above=0, below=1)}
    unused = {"optimizer.layer_decay": 1.0}
    # As in the official code (timm's rule), every parameter with two or more axes
    # decays, including mask token, class token and the encoder's position tables. Fixed
    # tables, such as `decoder_pos_embed`, are not trained.
    decayed = (
        "kernel",
        "mask_token",
        "cls_token",
        "absolute_pos_embed",
        "relative_position_bias_table",
    )
    undecayed = ("bias", "scale", "decoder_pos_embed")
    model_class = MaskedModel

    @classmethod
    def check(cls, config: Any) -> None:
        """Raise ConfigError for an invalid config, such as an invalid `mask_ratio`."""
        super().check(config)
        model_class, model_config, _ = configure(**model_arguments(config))
        num_units = math.prod(
            image_grid(model_config.image_size, model_config.unit_size)
        )
        # `count_visible` raises ConfigError for a ratio that masks all units.
        if model_class.count_visible(num_units, config.mask_ratio) == num_units:
            raise ConfigError(
                f"mask_ratio={config.mask_ratio} masks none of {num_units} units; "
                f"expected at least {1 / num_units:.4f}"
            )

    def is_decayed(self, name: str) -> bool:
        """Return True if weight decay applies to a parameter.

        SimMIM's mask token, a parameter of the encoder, does not decay, as in SimMIM's
        official code.
        """
        return name != "encoder/mask_token" and super().is_decayed(name)

    def macs(self, model: MaskedModel, layer_norm_cost: int = 0) -> int:
        """Return the multiply-adds of one image's forward pass at the mask ratio."""
        return model.macs(
            mask_ratio=self.config.mask_ratio, layer_norm_cost=layer_norm_cost
        )

    def loss(
        self, model: MaskedModel, frozen: Any, batch: dict, keys: Keys
    ) -> PerSample:
        """Return {"loss": [B]}."""
        images = self.augment_batch(batch, keys)
        drop_path_keys = rng.derive_keys(keys.samples, "drop_path")
        masking = self._masking(model, keys)
        loss = model.image_loss(images, drop_path_keys=drop_path_keys, **masking)
        return {"loss": loss}

    def eval_step(
        self, model: MaskedModel, frozen: Any, batch: dict, keys: Keys
    ) -> tuple[Sums, Rows]:
        """Return {"loss": sum} and no rows.

        The masks depend only on the PRNG keys.
        """
        images = self.preprocess(batch)
        loss = model.image_loss(images, **self._masking(model, keys))
        return weighted_sums({"loss": loss}, batch["weight"]), {}

    def panels(self, model: MaskedModel, frozen: Any, batch: dict, keys: Keys) -> Rows:
        """Return the arrays that `figures` draws.

        With `norm_pix_loss`, each prediction is converted back to pixels with the mean
        and standard deviation of the true unit, which the model does not receive.

        Returns:
          "images", "predicted": normalized images [B, H, W, C].
          "masked": [B, H, W, 1], 1 at masked pixels, else 0.
        """
        images = self.preprocess(batch)
        out = model(images, **self._masking(model, keys))
        _, mean, scale = model.targets(images)
        predicted, masked = model.to_images(out, mean, scale)
        return {"images": images, "predicted": predicted, "masked": masked}

    def figures(self, panels: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Draw the arrays of `panels`: {"reconstruction": uint8 [H, W, 3]}."""
        from hivit_jax.reporting import figures as drawing

        data = self.config.data
        drawn = drawing.reconstruction_panels(**panels, mean=data.mean, std=data.std)
        held_out = data.eval_split not in (NO_EVALUATION, data.train_split or "train")
        title = "held-out images" if held_out else "training images"
        model_config = configure(**model_arguments(self.config))[1]
        title += f"; {drawing.statistics_text(model_config.norm_pix_loss)}"
        return {"reconstruction": drawing.reconstructions(drawn, title)}

    def _masking(self, model: MaskedModel, keys: Keys) -> dict[str, Any]:
        """Return the model arguments noise, [B, N], and mask_ratio."""
        num_units = math.prod(model.unit_grid)
        with jax.named_scope("input"):
            mask_keys = rng.derive_keys(keys.samples, "mask")
            noise = jax.vmap(lambda key: jax.random.uniform(key, (num_units,)))(
                mask_keys
            )
        return {"noise": noise, "mask_ratio": self.config.mask_ratio}
