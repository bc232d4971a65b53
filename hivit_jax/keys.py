"""`Key`: default, type, range and comment of one config key."""

import ast
import inspect
import os
import re
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from typing import Any, get_args, get_origin

from hivit_jax.errors import ConfigError

TYPE_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    tuple: "a tuple such as (1,2)",
    object: "an integer, or a tuple such as (224,192)",
}
# Limits of numbers, because jitted functions compute with int32 and normal float32.
INT_MAX = 2**31 - 1
FLOAT_MIN, FLOAT_MAX = 1.1754944e-38, 3.4028234e38


@dataclass(frozen=True)
class Key:
    """One config key.

    The range applies to a number and to every number of a tuple. Without `high`,
    integers are at most 2**31 - 1. Numbers must be finite, and either 0 or a normal
    float32.

    Attributes:
      default: value if neither recipe nor command line sets the key; None: the model's
        default.
      comment: meaning of the key, for ``docs/config.md``.
      low, high: smallest and largest allowed number; None: no limit.
      choices: all allowed values; (): every value in the range.
      length: required length of a tuple; 0: any.
      type: a key of `TYPE_NAMES`; None: the type of the default.
      above, below: limits that a number must not reach; None: no limit.
      also: allowed numbers outside of the range.
      item: required type of a tuple's elements: int, or float, which includes integers.
        None: float if the key has limits or if its default contains only numbers;
        otherwise, elements of any type are allowed.
      increasing: each number of a tuple must be at least as large as the previous one.
    """

    default: Any
    comment: str
    low: float | None = None
    high: float | None = None
    choices: tuple = ()
    length: int = 0
    type: Any = None
    above: float | None = None
    below: float | None = None
    also: tuple = ()
    item: Any = None
    increasing: bool = False

    @property
    def value_type(self) -> Any:
        """Type of the value, a key of `TYPE_NAMES`."""
        return self.type or type(self.default)

    def parse(self, text: str) -> Any:
        """Parse the text of a command line value.

        Raises:
          Exception: one of `config._PARSE_ERRORS`, if the text is invalid.
        """
        if self.value_type is str:
            return text
        if self.value_type is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return self.convert(ast.literal_eval(text))

    def convert(self, value: Any) -> Any:
        """Convert a value to the type of the key.

        NumPy numbers and arrays become Python numbers and tuples. Lists become tuples,
        and paths become text.

        Raises:
          TypeError: the value has another type.
        """
        if value is None and self.default is None:
            return None
        if self.value_type is str and isinstance(value, os.PathLike):
            value = os.fspath(value)
        value = _to_python(value)
        if self.value_type is float and type(value) is int:
            value = float(value)
        if isinstance(value, (list, tuple)):
            value = tuple(map(_to_python, value))
        types = (int, tuple) if self.value_type is object else self.value_type
        # Checked separately, because bool is a subclass of int.
        wrong_bool = isinstance(value, bool) and self.value_type is not bool
        if wrong_bool or not isinstance(value, types):
            raise TypeError(f"{short_repr(value)} is not {TYPE_NAMES[self.value_type]}")
        return value

    def check(self, name: str, value: Any) -> None:
        """Raise ConfigError if a converted value is out of range.

        Args:
          name: name of the key, for the message.
        """
        if value is None or self.value_type is bool:
            return
        if self.choices:
            ok = value in self.choices
        elif isinstance(value, tuple):
            ok = all(map(self._accepts, value))
            ok = ok and len(value) == (self.length or len(value))
            ok = ok and not (self.increasing and list(value) != sorted(value))
        else:
            ok = self.value_type is str or self._accepts(value)
        if not ok:
            expected = self._range_text(name.rpartition(".")[2])
            if self.choices:
                expected = " or ".join(map(repr, self.choices))
            elif limit := self._violated_type_limit(value):
                expected = limit
            raise ConfigError(f"{name}={short_repr(value)}; expected {expected}")

    @property
    def _is_integer(self) -> bool:
        return int in (self.value_type, self.item)

    def _violated_type_limit(self, value: Any) -> str:
        """Return text of the int32 or float32 limit that a value violates, or ""."""
        for x in value if isinstance(value, tuple) else (value,):
            if not isinstance(x, (int, float)):
                continue
            if self._is_integer and self.high is None and x > INT_MAX:
                return f"at most {_limit_text(INT_MAX)}"
            if not self._is_integer and not abs(x) <= FLOAT_MAX:
                return f"finite numbers, at most {FLOAT_MAX:.1e} (float32)"
            if not self._is_integer and 0 < abs(x) < FLOAT_MIN:
                return f"0 or at least {FLOAT_MIN:.1e} (float32)"
        return ""

    def _accepts(self, value: Any) -> bool:
        """Return True if a number, or an element of a tuple, is allowed."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return self._element_type is None
        if value in self.also:
            return True
        if self._is_integer and not isinstance(value, int):
            return False
        limit = FLOAT_MAX
        if self._is_integer:
            limit = INT_MAX if self.high is None else self.high
        return (
            abs(value) <= limit  # False for NaN
            and (value == 0 or abs(value) >= FLOAT_MIN)
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    @property
    def _element_type(self) -> Any:
        """Type of a tuple's elements, or of the value; None if anything is allowed."""
        if self.value_type not in (tuple, object):
            return self.value_type
        limits = self.low, self.high, self.above, self.below
        has_numbers = bool(self.default and isinstance(self.default, tuple)) and all(
            isinstance(x, (int, float)) for x in self.default
        )
        if any(limit is not None for limit in limits) or has_numbers:
            return self.item or float
        return self.item

    def _range_text(self, name: str) -> str:
        """Return the range and shape of the value as text, such as "at least 0".

        Args:
          name: name of the value in an inequality, such as "0 < name <= 1".
        """
        may_be_tuple = self.value_type in (tuple, object)
        low, high = (_limit_text(x) for x in (self.low, self.high))
        if self.above is not None or self.below is not None:
            left = f"{low} <= " if low else f"{_limit_text(self.above)} < "
            right = f" <= {high}" if high else f" < {_limit_text(self.below)}"
            left = left if low or self.above is not None else ""
            right = right if high or self.below is not None else ""
            text = f"{left}{'number' if may_be_tuple else name}{right}"
        elif low and high:
            huge = self.high > 1000
            text = f"at least {low}, at most {high}" if huge else f"{low} to {high}"
        elif low or high:
            text = f"at least {low}" if low else f"at most {high}"
        else:
            text = "" if may_be_tuple else "finite"
        text += "".join(f", or {x}" for x in self.also)
        if not may_be_tuple:
            return text
        kind = "integers" if self.item is int else "numbers"
        noun = f"{self.length or ''} {kind}".strip()
        noun = f"an integer or {noun}" if self.value_type is object else noun
        order = ", not decreasing" if self.increasing else ""
        return f"{noun}{text and ', '}{text}{order}"

    @property
    def allowed_text(self) -> str:
        """Description of the allowed values, for ``docs/config.md``."""
        if self.choices:
            return ", ".join(f"`{choice}`" for choice in self.choices)
        kind, type_name = self.value_type, TYPE_NAMES[self.value_type]
        if kind in (bool, str) or (kind is tuple and self._element_type is None):
            return type_name
        text = self._range_text("value")
        return text if kind in (tuple, object) else f"{type_name}, {text}"


def _to_python(value: Any) -> Any:
    """Return numbers and arrays of NumPy and JAX as Python numbers and lists."""
    return getattr(value, "tolist", lambda: value)()


def setting(default: Any = MISSING, **limits: Any) -> Any:
    """Return a dataclass field with the limits of a `Key`.

    Args:
      limits: arguments of `Key`, such as `low` and `high`.
    """
    return field(default=default, metadata=limits)


@cache
def field_keys(cls: type) -> dict[str, Key]:
    """Return {field: key} of a dataclass.

    Limits come from `setting`. The comment of a key is the docstring's text about its
    field up to the first ".", ":" or ";". Docstrings of base classes count too.
    """
    comments = {}
    for base in reversed(cls.__mro__):
        docstring = inspect.cleandoc(base.__doc__ or "")
        for names, text in re.findall(r"(?m)^(\w.*?): (.*(?:\n  .*)*)", docstring):
            sentence = re.split(r"[.;:](?:\s|$)", " ".join(text.split()))[0]
            comments |= dict.fromkeys(names.split(", "), sentence)
    keys = {}
    for each in fields(cls):
        limits, kind = dict(each.metadata), each.type
        if get_origin(kind) is tuple:
            limits["item"], kind = get_args(kind)[0], tuple
        elif kind not in TYPE_NAMES:  # int | tuple[int, int]
            limits["item"], kind = int, object
        comment = comments.get(each.name, "")
        keys[each.name] = Key(None, comment, type=kind, **limits)
    return keys


def check_fields(instance: Any) -> None:
    """Convert and check the fields of a frozen dataclass, in place; see `field_keys`.

    Raises:
      ConfigError: a value has the wrong type or is out of range.
    """
    for name, key in field_keys(type(instance)).items():
        value = getattr(instance, name)
        try:
            if value is None:
                raise TypeError
            value = key.convert(value)
        except (TypeError, OverflowError) as error:
            expected = TYPE_NAMES[key.value_type]
            raise ConfigError(
                f"{name}={short_repr(value)}; expected {expected}"
            ) from error
        key.check(name, value)
        object.__setattr__(instance, name, value)


def short_repr(value: Any) -> str:
    """Return a value as text of at most 60 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of more than 4,300 digits
        text = f"{type(value).__name__} of many digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _limit_text(limit: float | None) -> str:
    """Return a limit as text, or "" without a limit."""
    if limit is None:
        return ""
    if isinstance(limit, int) and limit > 10**6 and (limit + 1) & limit == 0:
        return f"2**{limit.bit_length()} - 1"
    return f"{limit:g}" if abs(limit) < 10**5 else f"{limit:,}"
