"""HiViT in JAX: masked autoencoder pretraining, finetuning, evaluation."""

from importlib import import_module

from hivit_jax.models import create_model, list_models

__all__ = [
    "__version__",
    "create_model",
    "list_models",
    "load_pretrained",
    "save_pretrained",
]
__version__ = "0.1.0"

# Imported on first use, because they import orbax and safetensors.
_ROOMS = {"load_pretrained": "pretrained", "save_pretrained": "sharing"}


def __getattr__(name: str):
    if name in _ROOMS:
        return getattr(import_module(f"hivit_jax.{_ROOMS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
