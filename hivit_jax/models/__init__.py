"""Registry of models, and `create_model`."""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from fnmatch import fnmatchcase
from typing import Any

import jax

from hivit_jax.aliases import unknown_key
from hivit_jax.errors import ConfigError, unknown
from hivit_jax.models.base import Model
from hivit_jax.models.classifier import Classifier
from hivit_jax.models.config import (
    ClassifierConfig,
    EncoderConfig,
    MAEConfig,
    RunOptions,
)
from hivit_jax.models.layers import ParameterKeys
from hivit_jax.models.mae import MaskedAutoencoder
from hivit_jax.models.simmim import SimMIM, SimMIMConfig
from hivit_jax.models.swin_classifier import SwinClassifier, SwinClassifierConfig
from hivit_jax.models.vit import (
    ViTClassifier,
    ViTClassifierConfig,
    ViTMAEConfig,
    ViTMaskedAutoencoder,
)

# Tiny, Small and Base have the official sizes. Large and the 24-block Base have
# MMPretrain's sizes.
HIVIT_SIZES: dict[str, dict[str, Any]] = {
    "hivit_tiny": dict(embed_dim=384, depths=(1, 1, 10), num_heads=6),
    "hivit_small": dict(embed_dim=384, depths=(2, 2, 20), num_heads=6),
    "hivit_base": dict(embed_dim=512, depths=(2, 2, 20), num_heads=8),
    "hivit_base_24": dict(embed_dim=512, depths=(2, 2, 24), num_heads=8),
    "hivit_large": dict(embed_dim=768, depths=(2, 2, 40), num_heads=12),
}
Variant = tuple[type[Model], EncoderConfig]
VARIANTS: dict[str, Variant] = {
    name: (Classifier, ClassifierConfig(**size)) for name, size in HIVIT_SIZES.items()
}
# MMPretrain's classifier, published with 79.05 M parameters.
VARIANTS["hivit_base_24"] = (
    Classifier,
    ClassifierConfig(
        **HIVIT_SIZES["hivit_base_24"], fc_norm=False, layer_norm_eps=1e-5
    ),
)
VARIANTS |= {
    f"mae_{name}": (MaskedAutoencoder, MAEConfig(**size))
    for name, size in HIVIT_SIZES.items()
}
# Base, Large and Huge have the sizes of MAE's code. Tiny and Small have DeiT's sizes.
VIT_SIZES: dict[str, dict[str, Any]] = {
    "vit_tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "vit_small": dict(embed_dim=384, depth=12, num_heads=6),
    "vit_base": dict(embed_dim=768, depth=12, num_heads=12),
    "vit_large": dict(embed_dim=1024, depth=24, num_heads=16),
    "vit_huge": dict(embed_dim=1280, depth=32, num_heads=16, patch_size=14),
}
VARIANTS |= {
    name: (ViTClassifier, ViTClassifierConfig(**size))
    for name, size in VIT_SIZES.items()
}
VARIANTS |= {
    f"mae_{name}": (ViTMaskedAutoencoder, ViTMAEConfig(**size))
    for name, size in VIT_SIZES.items()
}
SWIN_SIZES: dict[str, dict[str, Any]] = {
    "swin_tiny": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "swin_small": dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "swin_base": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    "swin_large": dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
}
VARIANTS |= {
    name: (SwinClassifier, SwinClassifierConfig(**size))
    for name, size in SWIN_SIZES.items()
}
VARIANTS |= {
    f"simmim_{name}": (SimMIM, SimMIMConfig(**size))
    for name, size in SWIN_SIZES.items()
}
# SimMIM pretrains Swin-L with windows of 12x12 tokens.
VARIANTS["simmim_swin_large"] = (
    SimMIM,
    SimMIMConfig(**SWIN_SIZES["swin_large"], window_size=12),
)


def list_models(pattern: str = "*") -> list[str]:
    """Return the model names that match a pattern such as ``mae_*``."""
    return [name for name in VARIANTS if fnmatchcase(name, pattern)]


def variant(name: str) -> Variant:
    """Return a model's class and default config.

    Raises:
      ConfigError: the name is unknown.
    """
    if name not in VARIANTS:
        raise unknown("model name", name, VARIANTS)
    return VARIANTS[name]


def family_configs(name: str) -> list[type[EncoderConfig]]:
    """Return the config classes of all models with the encoder class of model `name`.

    For an unknown name, return the config classes of the HiViT models.
    """
    encoder_class = VARIANTS.get(name, VARIANTS["hivit_base"])[0].encoder_class
    variants = VARIANTS.values()
    classes = [type(c) for model, c in variants if model.encoder_class is encoder_class]
    return [*dict.fromkeys(classes)]


def override_types(*config_classes: type[EncoderConfig]) -> dict[str, Any]:
    """Return {name: type} of the overrides that `create_model` accepts.

    Args:
      config_classes: config classes of the models; none: those of all models.
    """
    classes = config_classes or dict.fromkeys(type(c) for _, c in VARIANTS.values())
    return {f.name: f.type for cls in (*classes, RunOptions) for f in fields(cls)}


def configure(
    name: str, **overrides: Any
) -> tuple[type[Model], EncoderConfig, RunOptions]:
    """Return class, config and run options for the arguments of `create_model`.

    Raises:
      ConfigError: unknown name or override, or inconsistent sizes.
    """
    model_class, config = variant(name)
    known = override_types(type(config))
    for key in overrides:
        if key in ("pretrained", "checkpoint_path", "weights"):
            raise ConfigError(
                f"{key}={overrides[key]!r}: create_model initializes new parameters; "
                "to load saved ones, use hivit_jax.load_pretrained(PATH).\n"
                "PATH: a .pth or .safetensors file, a workdir, a saved directory or "
                "hf://ORGANIZATION/NAME (docs/weights.md)"
            )
        if key not in known:
            raise unknown_key(f"override of {name}", key, known)
    run_keys = {f.name for f in fields(RunOptions)} & overrides.keys()
    run_options = RunOptions(**{key: overrides.pop(key) for key in run_keys})
    return model_class, replace(config, **overrides), run_options


def create_model(name: str, seed: int | jax.Array = 0, **overrides: Any) -> Model:
    """Build a model with newly initialized float32 parameters.

    Args:
      name: one of `list_models()`: hivit_{tiny,small,base,large,base_24} and
        vit_{tiny,small,base,large,huge}, also with the prefix ``mae_``;
        swin_{tiny,small,base,large}, also with the prefix ``simmim_``.
      seed: integer or PRNG key for the initialization.
      overrides: fields of the model's config (such as `ClassifierConfig`) and of
        `RunOptions`, for example image_size, num_classes (0: no head), embed_dim,
        drop_path_rate and dtype.

    Raises:
      ConfigError: unknown name or override, or inconsistent sizes.
    """
    model_class, config, run_options = configure(name, **overrides)
    model = model_class(config, run_options, rngs=ParameterKeys(seed))
    model.name = name
    return model


def create_arguments(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `create_model` that a config's section `model` sets.

    Drops keys whose value is None, and `freeze`, which only training uses.
    """
    return {k: v for k, v in section.items() if v is not None and k != "freeze"}


def arguments_of(model: Model) -> dict[str, Any]:
    """Return the arguments of `create_model` that rebuild a model, as JSON values."""
    return {"name": model.name, **asdict(model.config), **asdict(model.run_options)}


def merge_arguments(
    arguments: dict[str, Any], overrides: dict[str, Any]
) -> dict[str, Any]:
    """Merge the arguments of a saved model with overrides.

    A model of another name inherits the run options. It inherits those sizes that it
    accepts and that differ from the defaults of the saved model's config class. It
    inherits embed_dim, depths (for a ViT, depth) and num_heads only if the two names
    have the same defaults for all three.
    """
    if overrides.get("name", arguments["name"]) == arguments["name"]:
        return arguments | overrides
    _, config, _ = configure(**arguments)
    old, new = (variant(args["name"])[1] for args in (arguments, overrides))
    accepted, excluded = override_types(type(new)), {"name"}
    sizes = ("embed_dim", "depths", "num_heads")
    if any(getattr(old, key) != getattr(new, key) for key in sizes):
        excluded |= {*sizes, "depth"}
    excluded |= {f.name for f in fields(config) if getattr(config, f.name) == f.default}
    kept = {k: v for k, v in arguments.items() if k in accepted and k not in excluded}
    return kept | overrides


def image_shape(arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return (height, width, channels) of the images of `create_model(**arguments)`."""
    size = arguments["image_size"]
    sides = (size, size) if isinstance(size, int) else tuple(size)
    return (*sides, arguments["in_channels"])
