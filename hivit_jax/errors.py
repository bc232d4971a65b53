"""The ways a run can end badly, each with the exit code that the command line returns.

Every message is one to three lines: what was wrong, what was found, what was expected.
"""

import argparse
import difflib
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import NoReturn


class HivitError(Exception):
    """An error a user can cause or must know of; printed without a traceback."""

    exit_code = 1


class ConfigError(HivitError, ValueError):
    """A config value, flag or input path that cannot work."""

    exit_code = 2


class DivergedError(HivitError):
    """The loss or the gradient is no longer finite."""

    exit_code = 3


class DataError(HivitError):
    """The dataset cannot be read, or is not what it says it is."""

    exit_code = 4


class LocalDataError(DataError):
    """A data error that the other processes of the run do not know of."""


class CheckpointError(HivitError):
    """No checkpoint can be used where one is needed."""

    exit_code = 5


class Interrupted(HivitError):
    """SIGTERM or Ctrl-C arrived; the state is saved and the same command goes on."""

    exit_code = 75


def unknown(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that is not known, with the nearest one that is."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(known)
    return ConfigError(f"unknown {kind} {name!r}; {hint}")


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are ConfigErrors."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help shows the usage")


def import_class(key: str, name: str) -> type:
    """Class of a user's own, ``module:Class``, that a config key names.

    Raises:
      ConfigError: it cannot be imported.
    """
    module, _, class_name = name.partition(":")
    try:
        return getattr(import_module(module), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{key}={name!r} cannot be imported: {error}; expected module:Class"
        ) from error


def first_line(error: Exception) -> str:
    """The first line of what somebody else's error says, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def exit_code(action: Callable[[], object]) -> int:
    """Does something; prints the HivitError it may end with. Returns the exit code."""
    try:
        action()
    except HivitError as error:
        label = "" if isinstance(error, Interrupted) else "error: "
        print(f"{label}{error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0
