"""Masked autoencoding: predict the pixels of masked units (He et al., CVPR 2022)."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from hivit_jax import rng
from hivit_jax.errors import ConfigError
from hivit_jax.keys import Key
from hivit_jax.models import configure
from hivit_jax.models.mae import MaskedAutoencoder
from hivit_jax.models.masking import visible_units
from hivit_jax.rng import Keys
from hivit_jax.tasks.base import PerSample, Rows, Sums, Task, weighted_sums
from hivit_jax.tasks.defaults import model_arguments


class MaskedAutoencoding(Task):
    """Pretraining. The loss of an image is the mean over its masked units."""

    keys = {"mask_ratio": Key(0.75, "fraction of units to mask", above=0, below=1)}
    unused = {"optimizer.layer_decay": 1.0}
    # The official code uses timm's rule, which exempts 1-D parameters: it decays the
    # position tables and the mask token.
    decayed = (
        "kernel",
        "mask_token",
        "absolute_pos_embed",
        "relative_position_bias_table",
    )
    undecayed = ("bias", "scale", "decoder_pos_embed")
    model_class = MaskedAutoencoder

    @classmethod
    def check(cls, config: Any) -> None:
        """As `Task.check`; also checks `mask_ratio`."""
        super().check(config)
        rows, columns = configure(**model_arguments(config))[1].grid
        units = rows * columns
        if visible_units(units, config.mask_ratio) == units:
            raise ConfigError(
                f"mask_ratio={config.mask_ratio} masks none of {units} units; "
                f"expected at least {1 / units:.4f}"
            )

    def macs(self, model: MaskedAutoencoder, layer_norm_cost: int = 0) -> int:
        """As `Task.macs`, with the config's mask ratio."""
        return model.macs(
            mask_ratio=self.config.mask_ratio, layer_norm_cost=layer_norm_cost
        )

    def loss(
        self, model: MaskedAutoencoder, frozen: Any, batch: dict, keys: Keys
    ) -> PerSample:
        """Return {"loss": [B]}."""
        images = self.augment_batch(batch, keys)
        drop_path_keys = rng.split_keys(keys.samples, "drop_path")
        masking = self._masking(model, keys)
        loss = model.image_loss(images, drop_path_keys=drop_path_keys, **masking)
        return {"loss": loss}

    def eval_step(
        self, model: MaskedAutoencoder, frozen: Any, batch: dict, keys: Keys
    ) -> tuple[Sums, Rows]:
        """Return {"loss": sum} and no rows. The masks depend only on the keys."""
        images = self.preprocess(batch)
        loss = model.image_loss(images, **self._masking(model, keys))
        return weighted_sums({"loss": loss}, batch["weight"]), {}

    def panels(
        self, model: MaskedAutoencoder, frozen: Any, batch: dict, keys: Keys
    ) -> Rows:
        """Return normalized images, predictions and masks for `figures`.

        With `norm_pix_loss`, predictions are rescaled by the mean and standard
        deviation of the true unit, which the model does not see.

        Returns:
          "images", "predicted" [B, H, W, C]; "removed" [B, H, W, 1], 1 where masked.
        """
        images = self.preprocess(batch)
        out = model(images, **self._masking(model, keys))
        _, mean, scale = model.targets(images)
        predicted, removed = model.to_images(out, mean, scale)
        return {"images": images, "predicted": predicted, "removed": removed}

    def figures(self, panels: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return {"reconstruction": uint8 [H, W, 3]} with four panels per image."""
        from hivit_jax.reporting import figures

        data = self.config.data
        pixels = figures.reconstruction_panels(**panels, mean=data.mean, std=data.std)
        return {"reconstruction": figures.reconstructions(pixels, "held-out images")}

    def _masking(self, model: MaskedAutoencoder, keys: Keys) -> dict[str, Any]:
        """Return the model arguments for masking: noise [B, N] and mask ratio."""
        rows, columns = model.encoder.grid
        units = rows * columns
        with jax.named_scope("input"):
            mask_keys = rng.split_keys(keys.samples, "mask")
            noise = jax.vmap(lambda key: jax.random.uniform(key, (units,)))(mask_keys)
        return {"noise": noise, "mask_ratio": self.config.mask_ratio}
