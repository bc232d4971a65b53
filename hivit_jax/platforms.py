"""The CPU for commands that compute nothing, and one line where a chip is missing."""

import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import jax

from hivit_jax.reporting.console import log

# Device files of TPUs, NVIDIA GPUs (also under Windows) and AMD GPUs.
DEVICE_FILES = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "dxg", "kfd")
GOOGLE, NETWORK_CARD = "0x1ae0", "0x0042"  # PCI vendor of TPUs, and its other card


def use_cpu() -> None:
    """Keep JAX from starting an accelerator runtime in this process."""
    jax.config.update("jax_platforms", "cpu")


def start() -> None:
    """Start JAX's runtimes. If a runtime finds no chip, log one line.

    Without this, a runtime that is installed on a computer without its chip prints
    pages of errors. They are printed only if JAX fails or finds the chip nevertheless.
    """
    runtimes = installed_runtimes()
    if jax.config.jax_platforms or not runtimes or has_chip():
        return
    with _captured_stderr() as captured:
        platform = jax.default_backend()
        if platform == "cpu":
            captured.truncate(0)
    if platform == "cpu":
        log(
            f"{' and '.join(runtimes)} found no chip; computing on the CPU. "
            "JAX_PLATFORMS=cpu skips the search"
        )


def installed_runtimes() -> list[str]:
    """Return the names of the installed accelerator runtimes of JAX."""
    plugins = [entry.name for entry in metadata.entry_points(group="jax_plugins")]
    tpu = ["libtpu"] if importlib.util.find_spec("libtpu") else []
    return [*tpu, *sorted(set(plugins))]


def has_chip(root: Path = Path("/")) -> bool:
    """Return True if this computer has device files or a PCI card of an accelerator."""
    if any(any((root / "dev").glob(pattern)) for pattern in DEVICE_FILES):
        return True
    for card in (root / "sys/bus/pci/devices").glob("*"):
        ids = [(card / name).read_text().strip() for name in ("vendor", "device")]
        if ids[0] == GOOGLE and ids[1] != NETWORK_CARD:
            return True
    return False


@contextmanager
def _captured_stderr() -> Iterator:
    """Redirect file descriptor 2 to a file; print its content at the end.

    Libraries in C++ write to the descriptor, not to `sys.stderr`.
    """
    sys.stderr.flush()
    original = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield file
        finally:
            sys.stderr.flush()
            os.dup2(original, 2)
            os.close(original)
            file.seek(0)
            os.write(2, file.read())
