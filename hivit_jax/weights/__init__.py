"""Reading, adapting and writing the weights of models."""

from hivit_jax.weights.names.official import to_state_dict

__all__ = ["to_state_dict"]
