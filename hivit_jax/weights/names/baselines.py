"""Conversion of state dicts of ViT and Swin to the layouts of other programs."""

from collections.abc import Mapping

import numpy as np

from hivit_jax.errors import ConfigError
from hivit_jax.models import Model
from hivit_jax.models.masked import MaskedModel
from hivit_jax.models.simmim import SimMIM
from hivit_jax.models.swin import SwinConfig
from hivit_jax.weights.names import swin
from hivit_jax.weights.names.transformers import to_transformers

LAYOUTS = ("official", "timm", "transformers")


def to_layout(
    state: Mapping[str, np.ndarray], model: Model, layout: str
) -> dict[str, np.ndarray]:
    """Convert a state dict with official names to the layout of another program.

    For timm, a ViT's masked autoencoder is reduced to its encoder, because timm has no
    decoders.

    Args:
      state: parameters of `model`, a ViT or Swin, by official name; without buffers.
      layout: one of `LAYOUTS`.

    Raises:
      ConfigError: `layout` is unknown, or the program does not have this model.
    """
    is_swin = isinstance(model.config, SwinConfig)
    is_simmim = isinstance(model, SimMIM)
    if layout not in LAYOUTS:
        raise ConfigError(
            f"layout={layout!r} (--format={layout}) with {model.name}, which is "
            f"not a HiViT; expected one of {', '.join(LAYOUTS)}"
        )
    if layout == "timm" and is_simmim:
        raise ConfigError(
            f"layout='timm' (--format=timm) with {model.name}, which timm "
            "does not have; expected layout='official' or 'transformers'"
        )
    if layout == "transformers" and getattr(model, "fc_norm", None) is not None:
        raise ConfigError(
            f"layout='transformers' (--format=transformers) with {model.name}: "
            "transformers' classifiers have no fc_norm; expected running_norm=False "
            "and, for a ViT, pooling='token'"
        )
    if is_swin and layout != "timm":
        state = state | swin.buffers(model.config, "encoder." if is_simmim else "")
    if layout == "transformers":
        return to_transformers(state, "swin" if is_swin else "vit")
    if layout == "timm" and is_swin:
        return swin.to_timm(state)
    if layout == "timm" and isinstance(model, MaskedModel):
        return {
            name: array
            for name, array in state.items()
            if not name.startswith(("decoder_", "mask_token"))
        }
    return dict(state)
