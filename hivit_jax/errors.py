"""Errors of a run, each with the exit code of the command line.

A message has one to three lines: the cause, the expected value and what to do.
"""

import argparse
import difflib
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from types import ModuleType
from typing import NoReturn

STDOUT_CLOSED = 128 + signal.SIGPIPE  # exit code of programs that SIGPIPE kills


class HivitError(Exception):
    """Expected error. The command line prints it without a traceback."""

    exit_code = 1


class ConfigError(HivitError, ValueError):
    """Invalid config value, flag or input path."""

    exit_code = 2


class MissingPackage(ConfigError):
    """A package that a config or command needs cannot be imported."""


class MissingDirectory(ConfigError):
    """`data.dir` is not set, or does not exist."""


class ChannelsError(ConfigError):
    """`data.mean` or `data.std` does not have one number per channel."""

    def __init__(self, key: str, values: tuple, channels: int):
        super().__init__(
            f"{key}={values}; expected one number per channel "
            f"(model.in_channels={channels})\npython -m hivit_jax.tools.check_data "
            "with the same flags prints data.mean and data.std; with init_from, use "
            "those of the pretraining"
        )
        self.channels = channels


class ResourceError(ConfigError):
    """There is too little memory or disk space."""


class DivergedError(HivitError):
    """The loss, the gradient or the updated state is no longer finite."""

    exit_code = 3


class DataError(HivitError):
    """The dataset is unreadable or inconsistent, or contradicts the config."""

    exit_code = 4


class ProcessDataError(DataError):
    """A data error that may occur on only some of a run's processes."""


# Errors that may mean that a dataset is not on this machine.
UNAVAILABLE = (DataError, MissingPackage, MissingDirectory)


class CheckpointError(HivitError):
    """A required checkpoint is missing or unusable."""

    exit_code = 5


class Interrupted(HivitError):
    """SIGTERM or Ctrl-C. The state is saved, and the same command resumes the run."""

    exit_code = 75


def unknown(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """Return an error for an unknown name that suggests a similar name or lists all."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(known)
    return ConfigError(f"unknown {kind} {name!r}; {hint}")


class Parser(argparse.ArgumentParser):
    """Argument parser that raises ConfigError for bad arguments; --help still exits."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help shows the usage")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        # Flush now, because `run_command` can still catch the error of a broken pipe. A
        # flush that fails at the interpreter's exit prints a traceback.
        print(end="", flush=True)
        super().exit(status, message)


def import_class(key: str, name: str) -> type:
    """Import the user-defined class ``module:Class`` that a config key contains.

    Raises:
      ConfigError: the class cannot be imported.
    """
    module, _, class_name = name.partition(":")
    try:
        return getattr(import_module(module), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{key}={name!r} cannot be imported: {error}; expected module:Class"
        ) from error


def require(module: str, requirement: str) -> ModuleType:
    """Import and return a module of an optional package.

    Args:
      requirement: argument of ``pip install`` that installs the module: an extra such
        as ``hivit-jax[data]``, or a package.

    Raises:
      MissingPackage: the module cannot be imported.
    """
    try:
        return import_module(module)
    except Exception as error:  # incompatible packages raise exceptions of any type
        reason = "is not installed"
        name = module.partition(".")[0]
        if not isinstance(error, ModuleNotFoundError) or error.name != name:
            reason = f"cannot be imported ({type(error).__name__}: {first_line(error)})"
        raise MissingPackage(
            f"{name} {reason}; run pip install '{requirement}'"
        ) from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message; if empty, the name of its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def run_command(action: Callable[[], object]) -> int:
    """Run a command, print a HivitError to stderr, and return the exit code.

    If the reader of stdout has exited, as `head` does, the command ends without a
    message, and further output is discarded.
    """
    # Imported here, because `resources` imports JAX.
    from hivit_jax.resources import raise_resource_errors

    try:
        with raise_resource_errors():
            action()
        print(end="", flush=True)
    except HivitError as error:
        _discard_if_reader_exited()
        label = "" if isinstance(error, Interrupted) else "error: "
        print(f"{label}{error}", file=sys.stderr, flush=True)
        return error.exit_code
    except BrokenPipeError:
        if not _discard_if_reader_exited():
            raise
        return STDOUT_CLOSED
    return 0


def _discard_if_reader_exited() -> bool:
    """If the reader of stdout has exited, discard all output and return True.

    Output that is not discarded would cause a traceback when the interpreter flushes
    stdout at exit.
    """
    try:
        stdout = sys.stdout.fileno()
    except (AttributeError, OSError):  # stdout is closed, or is not a file
        return False
    poll = select.poll()
    poll.register(stdout, 0)  # 0: only errors
    if not poll.poll(0):
        return False
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stdout)
    os.close(null)
    return True
