"""Stand-in that is importable as ml_collections where that package is missing.

The stand-in is sufficient to load recipes. Import this module before hivit_jax. If
ml_collections is installed, the import has no effect.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any


class FieldReference:
    """Value and type of a config field."""

    def __init__(self, value: Any, field_type: type):
        self.value, self.field_type = value, field_type


class ConfigDict(dict):
    """Dictionary whose keys are also attributes."""

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
        """Do nothing; ml_collections would refuse new keys from now on."""

    def to_dict(self) -> dict:
        """Return the config itself, because it is a dictionary."""
        return self

    def to_json_best_effort(self) -> str:
        return json.dumps(self)


try:
    import ml_collections  # noqa: F401
except ImportError:
    for name in ("ml_collections", "ml_collections.config_dict"):
        sys.modules[name] = sys.modules[__name__]
