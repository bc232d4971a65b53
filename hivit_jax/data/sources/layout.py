"""Describe the content of `data.dir` in errors about missing files."""

import os
from collections.abc import Iterable

from hivit_jax.data import storage
from hivit_jax.data.sources.file_index import is_hidden
from hivit_jax.paths import expand
from hivit_jax.progress import listed

MAX_NAMES = 8  # listed files and directories


def describe_content(directory: str, names: Iterable[str] = ()) -> str:
    """Return a clause for an error, such as ``data.dir='x' contains a, b``.

    Args:
      directory: `data.dir`.
      names: names in a bucket; not used for a local directory, which is listed.
    """
    text, path = f"data.dir={directory!r}", expand(directory)
    if not storage.is_remote(path):
        if not os.path.exists(path):
            return f"{text} does not exist"
        if not os.path.isdir(path):
            return f"{text} is a file"
        names = os.listdir(path)
    visible = sorted(name for name in names if not is_hidden(name))
    return f"{text} contains {listed(visible, MAX_NAMES)}"
