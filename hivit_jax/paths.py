"""Paths that a user wrote."""

import os


def expand(path: str) -> str:
    """Return a path with ``~`` and ``~user`` replaced by home directories.

    An address such as ``gs://bucket/x`` or ``hf://name/x`` stays as it is, and so does
    the ``~`` of an unknown user.
    """
    path = os.fspath(path)
    return path if "://" in path else os.path.expanduser(path)
