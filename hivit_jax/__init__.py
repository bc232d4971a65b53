"""HiViT in JAX: masked autoencoder pretraining, finetuning, evaluation."""

from hivit_jax.models import create_model

__all__ = ["__version__", "create_model", "load_pretrained"]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "load_pretrained":  # late: it brings orbax along
        from hivit_jax.weights import load_pretrained

        return load_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
