"""As much of ml_collections as recipes need, where that is not installed.

Import it before anything of hivit_jax.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any


class FieldReference:
    """A value of a field together with its type."""

    def __init__(self, value: Any, field_type: type | None = None):
        self.value, self.kind = value, field_type or type(value)

    def get(self) -> Any:
        return self.value


class ConfigDict(dict):
    """A dictionary whose keys are attributes; every one keeps its first type."""

    def __init__(self, values: Mapping[str, Any] | None = None):
        super().__init__()
        object.__setattr__(self, "_kinds", {})
        for key, value in (values or {}).items():
            self[key] = value

    def __setitem__(self, key: str, value: Any) -> None:
        if not isinstance(value, FieldReference):
            value = FieldReference(value, self._kinds.get(key))
        self._kinds.setdefault(key, value.kind)
        super().__setitem__(key, value.value)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        del self._kinds[key]

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError as error:
            raise AttributeError(key) from error

    __setattr__, __delattr__ = __setitem__, __delitem__

    def get_ref(self, key: str) -> FieldReference:
        return FieldReference(self[key], self._kinds[key])

    def get_type(self, key: str) -> type:
        return self._kinds[key]

    def lock(self) -> None:
        """Does nothing: the one who sets a key looks whether it is known."""

    def to_json_best_effort(self) -> str:
        return json.dumps(self)


def placeholder(kind: type) -> FieldReference:
    """A field of that type without a value yet."""
    return FieldReference(None, kind)


try:
    import ml_collections  # noqa: F401
except ImportError:
    this = sys.modules[__name__]
    sys.modules["ml_collections"] = sys.modules["ml_collections.config_dict"] = this
