"""Networks by name."""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from fnmatch import fnmatchcase
from typing import Any

import jax

from hivit_jax.errors import unknown
from hivit_jax.models.base import Model
from hivit_jax.models.classifier import Classifier, ClassifierConfig
from hivit_jax.models.config import HiViTConfig, RunOptions
from hivit_jax.models.layers import ParameterKeys
from hivit_jax.models.mae import MAEConfig, MaskedAutoencoder

# Official T, S, B; Large and the 24-block Base are MMPretrain's.
SIZES: dict[str, dict[str, Any]] = {
    "hivit_tiny": dict(embed_dim=384, depths=(1, 1, 10), num_heads=6),
    "hivit_small": dict(embed_dim=384, depths=(2, 2, 20), num_heads=6),
    "hivit_base": dict(embed_dim=512, depths=(2, 2, 20), num_heads=8),
    "hivit_base_24": dict(embed_dim=512, depths=(2, 2, 24), num_heads=8),
    "hivit_large": dict(embed_dim=768, depths=(2, 2, 40), num_heads=12),
}
Variant = tuple[type[Model], HiViTConfig]
VARIANTS: dict[str, Variant] = {
    name: (Classifier, ClassifierConfig(**size)) for name, size in SIZES.items()
}
# MMPretrain's classifier: the 79.05 M of the second published table.
VARIANTS["hivit_base_24"] = (
    Classifier,
    ClassifierConfig(**SIZES["hivit_base_24"], fc_norm=False, layer_norm_eps=1e-5),
)
VARIANTS |= {
    f"mae_{name}": (MaskedAutoencoder, MAEConfig(**size))
    for name, size in SIZES.items()
}


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` accepts and that match a pattern such as ``mae_*``."""
    return [name for name in VARIANTS if fnmatchcase(name, pattern)]


def variant(name: str) -> Variant:
    """Class and config of a network; ConfigError for an unknown name."""
    if name not in VARIANTS:
        raise unknown("model name", name, VARIANTS)
    return VARIANTS[name]


def model_keys(*configs: type[HiViTConfig]) -> dict[str, Any]:
    """Overrides that `create_model` accepts for models of these configs, or of any:
    name -> type.
    """
    configs = configs or tuple({type(config): 0 for _, config in VARIANTS.values()})
    return {f.name: f.type for each in (*configs, RunOptions) for f in fields(each)}


def configure(
    name: str, **overrides: Any
) -> tuple[type[Model], HiViTConfig, RunOptions]:
    """Class, config and run options of a network; arguments and errors of
    `create_model`.
    """
    model_class, config = variant(name)
    known = model_keys(type(config))
    for key in overrides:
        if key not in known:
            raise unknown(f"override of {name}", key, known)
    running = {f.name for f in fields(RunOptions)} & overrides.keys()
    run_options = RunOptions(**{key: overrides.pop(key) for key in running})
    return model_class, replace(config, **overrides), run_options


def create_model(name: str, seed: int | jax.Array = 0, **overrides: Any) -> Model:
    """Build a network with freshly drawn float32 parameters.

    Args:
      name: one of `list_models()`: hivit_{tiny,small,base,large,base_24}, or these
        with mae_ before them.
      seed: integer or key that the parameters are drawn from.
      overrides: fields of the network's config, `ClassifierConfig` or `MAEConfig`, and
        of `RunOptions`, among them image_size, num_classes (0: no head), embed_dim,
        drop_path_rate, dtype.

    Raises:
      ConfigError: an unknown name or override, or sizes that do not fit each other.
    """
    model_class, config, run_options = configure(name, **overrides)
    model = model_class(config, run_options, rngs=ParameterKeys(seed))
    model.name = name
    return model


def arguments_of(model: Model) -> dict[str, Any]:
    """Arguments of `create_model` that build this model, as values for JSON."""
    return {"name": model.name, **asdict(model.config), **asdict(model.run_options)}


def image_shape(arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """(height, width, channels) of the images of a model with these arguments."""
    size = arguments["image_size"]
    sides = (size, size) if isinstance(size, int) else tuple(size)
    return (*sides, arguments["in_channels"])
