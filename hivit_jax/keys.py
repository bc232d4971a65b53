"""A config key: its default, type, range and a comment."""

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
      default: value if neither recipe nor command line sets the key. None: the default
        depends on the model.
      comment: meaning, for the page of all keys.
      low, high: smallest and largest value; None: no limit.
      choices: all values; (): any.
      length: length of a tuple; 0: any.
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
    def kind(self) -> Any:
        """Type of the value, a key of `TYPE_NAMES`."""
        return self.type or type(self.default)

    def parse(self, text: str) -> Any:
        """Value from the command line; ValueError and the like for another type."""
        if self.kind is str:
            return text
        if self.kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return self.convert(ast.literal_eval(text))

    def convert(self, value: Any) -> Any:
        """Value in the type of the key; TypeError for another type."""
        if value is None and self.default is None:
            return None
        if self.kind is float and isinstance(value, int):
            value = value if isinstance(value, bool) else float(value)
        if isinstance(value, list):
            value = tuple(value)
        allowed = (int, tuple) if self.kind is object else self.kind
        misused = isinstance(value, bool) and self.kind is not bool
        if misused or not isinstance(value, allowed):
            raise TypeError(f"{value!r} is not {TYPE_NAMES[self.kind]}")
        return value

    def check(self, name: str, value: Any) -> None:
        """ConfigError for a value out of range."""
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
    def values(self) -> str:
        """Allowed values in words."""
        if self.choices:
            return ", ".join(f"`{choice}`" for choice in self.choices)
        if self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        if self.low is not None:
            return f"{TYPE_NAMES[self.kind]}, at least {self.low:g}"
        return f"{self.length} numbers" if self.length else TYPE_NAMES[self.kind]
