"""Config key: default, type, range and comment."""

import ast
from dataclasses import dataclass
from typing import Any

from hivit_jax.errors import ConfigError

TYPE_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    tuple: "a tuple such as (1,2)",
    object: "an integer, or a tuple such as (224,192)",
}


@dataclass(frozen=True)
class Key:
    """One config key.

    Attributes:
      default: value if neither recipe nor command line sets the key; None: the
        default of the model.
      comment: meaning, for ``docs/config.md``.
      low, high: smallest and largest allowed value; None: unlimited.
      choices: all allowed values; (): unlimited.
      length: required length of a tuple; 0: any.
      type: a key of `TYPE_NAMES`; None: the type of the default.
    """

    default: Any
    comment: str
    low: float | None = None
    high: float | None = None
    choices: tuple = ()
    length: int = 0
    type: Any = None

    @property
    def value_type(self) -> Any:
        """Type of the value, a key of `TYPE_NAMES`."""
        return self.type or type(self.default)

    def parse(self, text: str) -> Any:
        """Parse a command line value; raises ValueError or similar for a wrong type."""
        if self.value_type is str:
            return text
        if self.value_type is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return self.convert(ast.literal_eval(text))

    def convert(self, value: Any) -> Any:
        """Convert a value to the type of the key; raises TypeError if not possible."""
        if value is None and self.default is None:
            return None
        if self.value_type is float and type(value) is int:
            value = float(value)
        if isinstance(value, list):
            value = tuple(value)
        allowed = (int, tuple) if self.value_type is object else self.value_type
        # bool is a subclass of int.
        wrong_bool = isinstance(value, bool) and self.value_type is not bool
        if wrong_bool or not isinstance(value, allowed):
            raise TypeError(f"{value!r} is not {TYPE_NAMES[self.value_type]}")
        return value

    def check(self, name: str, value: Any) -> None:
        """Raise ConfigError for a value out of range."""
        expected = ""
        if self.choices and value not in self.choices:
            expected = " or ".join(map(repr, self.choices))
        elif self.length and len(value) != self.length:
            expected = f"{self.length} numbers"
        elif self.high is not None and not self.low <= value <= self.high:
            expected = f"{self.low:g} to {self.high:g}"
        elif self.low is not None and not value >= self.low:
            expected = f"at least {self.low:g}"
        if expected:
            raise ConfigError(f"{name}={value!r}; expected {expected}")

    @property
    def allowed(self) -> str:
        """Description of the allowed values."""
        if self.choices:
            return ", ".join(f"`{choice}`" for choice in self.choices)
        if self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        if self.low is not None:
            return f"{TYPE_NAMES[self.value_type]}, at least {self.low:g}"
        return f"{self.length} numbers" if self.length else TYPE_NAMES[self.value_type]
