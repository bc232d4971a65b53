"""Text of command line flags, ready to paste into a shell."""

import shlex
from typing import Any


def config_flag(key: str, value: Any) -> str:
    """Return ``--config.KEY=VALUE``, quoted where a shell requires it.

    For example ``--config.model.embed_dim=64`` and ``'--config.model.depths=(1,1,2)'``.
    """
    if isinstance(value, (list, tuple)):
        items = ",".join(map(repr, value)) + "," * (len(value) == 1)
        value = f"({items})"
    return shlex.quote(f"--config.{key}={value}")
