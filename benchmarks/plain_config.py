"""As much of ml_collections as recipes need, where that is not installed.

Import it before anything of hivit_jax.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any


class FieldReference:
    """A value of a field together with its type."""

    def __init__(self, value: Any, field_type: type):
        self.value, self.field_type = value, field_type


class ConfigDict(dict):
    """A dictionary whose keys are attributes."""

    def __init__(self, values: Mapping[str, Any] | None = None):
        super().__init__()
        for key, value in (values or {}).items():
            self[key] = value

    def __setitem__(self, key: str, value: Any) -> None:
        value = value.value if isinstance(value, FieldReference) else value
        super().__setitem__(key, value)

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError as error:
            raise AttributeError(key) from error

    __setattr__ = __setitem__

    def lock(self) -> None:
        """Does nothing."""

    def to_dict(self) -> dict:
        """Itself, because it is a dictionary."""
        return self

    def to_json_best_effort(self) -> str:
        return json.dumps(self)


try:
    import ml_collections  # noqa: F401
except ImportError:
    this = sys.modules[__name__]
    sys.modules["ml_collections"] = sys.modules["ml_collections.config_dict"] = this
