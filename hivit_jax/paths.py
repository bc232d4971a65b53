"""Paths in a config or on the command line, and the user's cache directory."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hivit_jax.errors import ConfigError, require

# Config keys that may contain local paths.
PATH_KEYS = "init_from", "compilation_cache", "data.dir", "data.cache", "data.exclude"


def expand(path: str) -> str:
    """Return a path with a leading ``~`` or ``~user`` replaced by the home directory.

    Addresses such as ``gs://bucket/x`` and ``hf://name/x`` stay unchanged, and so does
    ``~user`` if there is no such user.
    """
    path = os.fspath(path)
    return path if is_bucket(path) else os.path.expanduser(path)


def absolute(path: str | os.PathLike) -> Any:
    """Return `open_path(path)`, made absolute unless it is in a bucket."""
    path = open_path(path)
    return path if is_bucket(path) else path.absolute()


def open_path(path: str | os.PathLike) -> Any:
    """Return the `etils.epath.Path` of a workdir, checkpoint or model file.

    Files in Cloud Storage (``gs://``) are accessed with gcsfs.

    Raises:
      ConfigError: the address has another scheme.
      MissingPackage: gcsfs is not installed.
    """
    # Imported here, because compiling a step does not need etils.
    from etils.epath import Path

    path = expand(path)
    scheme, separator, _ = path.partition("://")
    if not separator:
        return Path(path)
    if scheme != "gs":
        raise ConfigError(
            f"{path}: expected a local path or gs://BUCKET/DIRECTORY, because Orbax "
            "supports only buckets of Cloud Storage\n"
            "Use a directory that all hosts share. Only data.dir may be in s3://"
        )
    require("gcsfs", "hivit-jax[gcs]")
    import fsspec

    # Without the first line, etils uses tensorflow if tensorflow is installed. Without
    # the second line, this process does not see files that other processes write later.
    os.environ["EPATH_USE_TF"] = "false"
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return Path(path)


def is_bucket(path: str | os.PathLike) -> bool:
    """Return True for an address with a scheme, such as ``gs://bucket/x``."""
    return "://" in os.fspath(path)


def cache_directory() -> Path:
    """Return this package's directory in the user's cache directory."""
    return Path(expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "hivit_jax"


def with_absolute_paths(values: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """Return a config that is valid in every directory of this machine.

    Relative paths of existing files and directories become absolute. All other values,
    such as addresses and paths that start with ``~``, stay unchanged.

    Args:
      values: the config, or a section of it, as nested dicts.
      section: name of the section and a dot; "": the whole config.
    """
    result = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            value = with_absolute_paths(value, f"{section}{name}.")
        elif section + name in PATH_KEYS and os.path.exists(value):
            value = os.path.abspath(value)
        result[name] = value
    return result
