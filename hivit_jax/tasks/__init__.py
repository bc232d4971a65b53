"""Registry of tasks. Only this package refers to tasks by name."""

from typing import Any

from hivit_jax.data.sources.base import DatasetInfo
from hivit_jax.errors import import_class, unknown
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
    """Return the class of a task.

    Args:
      name: a key of `TASKS`, or ``module:Class`` for a user-defined task.

    Raises:
      ConfigError: the name is unknown or the class cannot be imported.
    """
    if ":" in name:
        return import_class("task", name)
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]


def create(config: Any, data: DatasetInfo) -> Task:
    """Create the task of a config for a dataset."""
    return find(config.task)(config, data)
