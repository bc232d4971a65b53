"""Masked autoencoding: predict the pixels of removed units (He et al., CVPR 2022)."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from hivit_jax import rng
from hivit_jax.keys import Key
from hivit_jax.models import configure
from hivit_jax.models.mae import MaskedAutoencoder
from hivit_jax.models.masking import visible_units
from hivit_jax.rng import Keys
from hivit_jax.tasks.base import PerSample, Rows, Sums, Task, arguments, weighted_sums


class MaskedAutoencoding(Task):
    """Pretraining; the loss of an image is the mean over its removed units."""

    keys = {"mask_ratio": Key(0.75, "share of units that are removed, in (0, 1)")}
    unused = {"optimizer.layer_decay": 1.0}
    # Official: timm's 1-D rule; position tables and the mask token are decayed.
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
        """As `Task.check`; ConfigError also for a mask ratio that cannot work."""
        super().check(config)
        rows, columns = configure(**arguments(config))[1].grid
        visible_units(rows * columns, config.mask_ratio)

    def macs(self, model: MaskedAutoencoder, layer_norm_cost: int = 0) -> int:
        """As `Task.macs`, with the recipe's mask ratio."""
        mask_ratio = self.config.mask_ratio
        return model.macs(mask_ratio=mask_ratio, layer_norm_cost=layer_norm_cost)

    def loss(
        self, model: MaskedAutoencoder, frozen: Any, batch: dict, keys: Keys
    ) -> PerSample:
        """{"loss": [B]}."""
        images = self.augment_batch(batch, keys)
        drop_path_keys = rng.split_keys(keys.samples, "drop_path")
        masking = self._masking(model, keys)
        loss = model.image_loss(images, drop_path_keys=drop_path_keys, **masking)
        return {"loss": loss}

    def eval_step(
        self, model: MaskedAutoencoder, frozen: Any, batch: dict, keys: Keys
    ) -> tuple[Sums, Rows]:
        """{"loss": sum} and no rows; the masks are a function of the keys."""
        images = self.preprocess(batch)
        loss = model.image_loss(images, **self._masking(model, keys))
        return weighted_sums({"loss": loss}, batch["weight"]), {}

    def panels(
        self, model: MaskedAutoencoder, frozen: Any, batch: dict, keys: Keys
    ) -> Rows:
        """Images and predictions [B, H, W, C], normalized, and removed [B, H, W, 1].

        Where the loss is on normalized pixels, predictions are put back with the mean
        and variance of the true unit, which the model has not seen.
        """
        images = self.preprocess(batch)
        out = model(images, **self._masking(model, keys))
        _, mean, scale = model.targets(images)
        predicted, removed = model.to_images(out, mean, scale)
        return {"images": images, "predicted": predicted, "removed": removed}

    def figures(self, panels: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """{"reconstruction": uint8 [H, W, 3]}, four panels an image."""
        from hivit_jax.reporting import figures

        data = self.config.data
        drawn = figures.reconstruction_panels(**panels, mean=data.mean, std=data.std)
        return {"reconstruction": figures.reconstructions(drawn, "held-out images")}

    def _masking(self, model: MaskedAutoencoder, keys: Keys) -> dict[str, Any]:
        """Noise [B, N] and mask ratio, as the model takes them."""
        units = _units(model)
        with jax.named_scope("input"):
            mask_keys = rng.split_keys(keys.samples, "mask")
            noise = jax.vmap(lambda key: jax.random.uniform(key, (units,)))(mask_keys)
        return {"noise": noise, "mask_ratio": self.config.mask_ratio}


def _units(model: MaskedAutoencoder) -> int:
    return model.encoder.grid[0] * model.encoder.grid[1]
