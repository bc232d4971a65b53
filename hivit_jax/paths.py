"""Paths in a config or on the command line, and the user's cache directory."""

import os
from pathlib import Path


def expand(path: str) -> str:
    """Return a path with a leading ``~`` or ``~user`` replaced by the home directory.

    Addresses such as ``gs://bucket/x`` and ``hf://name/x`` stay unchanged, and so does
    ``~user`` if there is no such user.
    """
    path = os.fspath(path)
    return path if "://" in path else os.path.expanduser(path)


def cache_directory() -> Path:
    """Return this package's directory in the user's cache directory."""
    return Path(expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "hivit_jax"
