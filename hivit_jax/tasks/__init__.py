"""Tasks by name. Only modules of this package know which tasks there are."""

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
    """Class of a task: a registered name, or ``module:Class`` for a user's own.

    Raises:
      ConfigError: unknown name, or no such class.
    """
    if ":" in name:
        return import_class("task", name)
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]


def create(config: Any, data: DatasetInfo) -> Task:
    """The task of a config, for a dataset."""
    return find(config.task)(config, data)
