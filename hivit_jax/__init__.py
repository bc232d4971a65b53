"""HiViT in JAX: masked autoencoder pretraining, finetuning, evaluation."""

from importlib import import_module

from hivit_jax.models import create_model, list_models

__all__ = [
    "__version__",
    "create_model",
    "list_models",
    "load_pretrained",
    "preprocess",
    "save_pretrained",
    "tf_dataset",
    "train_batches",
]
__version__ = "0.1.0"

# Public name -> module that is imported on first use, because `weights.load` imports
# large packages, such as orbax.
_MODULES = {
    "load_pretrained": "weights.load",
    "preprocess": "preprocessing",
    "save_pretrained": "weights.save",
    "tf_dataset": "inputs",
    "train_batches": "inputs",
}


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(import_module(f"hivit_jax.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
