"""Tasks by name. The only place that knows which tasks there are."""

from importlib import import_module
from typing import Any

from hivit_jax.errors import ConfigError, unknown
from hivit_jax.tasks.base import Task
from hivit_jax.tasks.classification import Classification
from hivit_jax.tasks.linear_probe import LinearProbe
from hivit_jax.tasks.masked_autoencoding import MaskedAutoencoding

TASKS: dict[str, type[Task]] = {
    "mae": MaskedAutoencoding,
    "classify": Classification,
    "linear_probe": LinearProbe,
}


def find(name: str) -> type[Task]:
    """Class of a task: a registered name, or ``module:Class`` for a user's own.

    Raises:
      ConfigError: unknown name, or no such class.
    """
    module, colon, class_name = name.partition(":")
    if not colon:
        if name not in TASKS:
            raise unknown("task", name, TASKS)
        return TASKS[name]
    try:
        return getattr(import_module(module), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"task={name!r} cannot be imported: {error}; expected module:Class"
        ) from error


def create(config: Any) -> Task:
    """The task of a config."""
    return find(config.task)(config)
