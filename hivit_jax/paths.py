"""Expansion of the paths in a config or on the command line."""

import os


def expand(path: str) -> str:
    """Return a path with a leading ``~`` or ``~user`` replaced by the home directory.

    Addresses such as ``gs://bucket/x`` and ``hf://name/x`` stay unchanged, and so does
    ``~user`` if there is no such user.
    """
    path = os.fspath(path)
    return path if "://" in path else os.path.expanduser(path)
