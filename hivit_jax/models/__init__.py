"""The networks by name."""

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from hivit_jax.errors import unknown
from hivit_jax.models.classifier import Classifier
from hivit_jax.models.hivit import HiViT
from hivit_jax.models.layers import ParameterKeys
from hivit_jax.models.mae import MaskedAutoencoder

Model = Classifier | MaskedAutoencoder

# Official T, S, B; Large and the 24-block Base are MMPretrain's.
SIZES: dict[str, dict[str, Any]] = {
    "hivit_tiny": dict(embed_dim=384, depths=(1, 1, 10), num_heads=6),
    "hivit_small": dict(embed_dim=384, depths=(2, 2, 20), num_heads=6),
    "hivit_base": dict(embed_dim=512, depths=(2, 2, 20), num_heads=8),
    "hivit_base_24": dict(embed_dim=512, depths=(2, 2, 24), num_heads=8),
    "hivit_large": dict(embed_dim=768, depths=(2, 2, 40), num_heads=12),
}
# MMPretrain's classifier: the 79.05 M of the second published table.
CLASSIFIER_EXTRAS = {"hivit_base_24": dict(fc_norm=False, layer_norm_eps=1e-5)}
NAMES = [*SIZES, *(f"mae_{name}" for name in SIZES)]


def override_parameters(*classes: type) -> dict[str, inspect.Parameter]:
    """What `create_model` takes as overrides, for these classes of model or for all."""
    found = {}
    for each in (HiViT, *(classes or (Classifier, MaskedAutoencoder))):
        found |= inspect.signature(each.__init__).parameters
    hidden = {"self", "rngs", "encoder", "sincos_position", "image_size", "in_channels"}
    return {name: p for name, p in found.items() if name not in hidden}


def create_model(
    name: str,
    *,
    image_size: int | Sequence[int] = 224,
    in_channels: int = 3,
    seed: int | jax.Array = 0,
    **overrides: Any,
) -> Model:
    """Builds a network with freshly drawn float32 parameters.

    Args:
      name: one of `NAMES`: hivit_{tiny,small,base,large,base_24}, or mae_ before it.
      image_size: side or (height, width) in pixels.
      in_channels: channels of an image.
      seed: integer or key that the parameters are drawn from.
      overrides: keyword arguments of `HiViT` and `Classifier` or `MaskedAutoencoder`,
        among them num_classes, embed_dim, depths, drop_path_rate, dtype.

    Returns:
      The model; its attribute `arguments` is JSON text of what it was made with.

    Raises:
      ConfigError: an unknown name or override, or sizes that do not fit each other.
    """
    kind = kind_of(name)
    known = override_parameters(kind)
    for key in overrides:
        if key not in known:
            raise unknown(f"override of {name}", key, known)
    size = name.removeprefix("mae_")
    arguments = SIZES[size] | dict(image_size=image_size, in_channels=in_channels)
    if kind is Classifier:
        arguments |= CLASSIFIER_EXTRAS.get(size, {})
    arguments |= overrides
    model = kind(rngs=ParameterKeys(seed), **arguments)
    arguments = dict(name=name) | arguments | dict(dtype=model.encoder.dtype.name)
    model.arguments = json.dumps(arguments)  # text: modules hold nothing mutable
    return model


def kind_of(name: str) -> type[Model]:
    """The class of a network; ConfigError for an unknown name."""
    if name not in NAMES:
        raise unknown("model name", name, NAMES)
    return MaskedAutoencoder if name.startswith("mae_") else Classifier


def image_shape(arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """(height, width, channels) of the images of a model with these arguments."""
    size = arguments["image_size"]
    sides = (size, size) if isinstance(size, int) else tuple(size)
    return (*sides, arguments["in_channels"])


def split(model: nnx.Module) -> tuple[nnx.GraphDef, dict]:
    """Module -> (structure, nested dicts of arrays); `nnx.merge` undoes it."""
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves of a pytree by path, such as ``encoder/stages/0/1/mlp/fc1/kernel``."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {leaf_name(path): leaf for path, leaf in leaves}


def leaf_name(path: tuple) -> str:
    """A key path of `jax.tree_util` as the name that `named_leaves` gives."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
