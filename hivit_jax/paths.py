"""Paths that a user passes."""

import os


def expand(path: str) -> str:
    """Return a local path with ``~`` expanded; addresses with ``://`` unchanged."""
    return path if "://" in path else os.path.expanduser(path)
