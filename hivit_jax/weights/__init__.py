"""Weights of models: reading, adapting and writing them."""

from hivit_jax.weights.names.official import to_state_dict

__all__ = ["to_state_dict"]
