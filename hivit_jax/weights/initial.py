"""Read the model that a run is initialized from."""

from collections.abc import Mapping
from typing import Any

from hivit_jax.errors import CheckpointError
from hivit_jax.weights.adapt import Pretrained
from hivit_jax.weights.load import locate, read_for


def read_initial(model: Mapping[str, Any], init_from: str) -> Pretrained:
    """Read the model at `init_from`.

    Args:
      model: the `model` section of a config.

    Raises:
      CheckpointError: there is no model. If the path does not exist, the message
        contains the flags that set `init_from`.
    """
    try:
        return read_for(model, init_from)
    except CheckpointError as error:
        if init_from.startswith("hf://") or locate(init_from).exists():
            raise
        raise CheckpointError(
            f"{error}\nSet --config.init_from=PATH, or --config.init_from= to start "
            "from random parameters"
        ) from error
