"""Use only the CPU, or hide the errors of accelerator runtimes that find no chip."""

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

# Device files in /dev: accel and vfio for TPUs, nvidia for NVIDIA GPUs, dxg for NVIDIA
# GPUs under Windows (WSL), kfd for AMD GPUs.
DEVICE_FILES = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "dxg", "kfd")
# PCI vendor id of Google, and PCI device id of its network card, which is not a TPU.
GOOGLE, NETWORK_CARD = "0x1ae0", "0x0042"


def use_cpu() -> None:
    """Restrict JAX to the CPU, so that it starts no accelerator runtime."""
    jax.config.update("jax_platforms", "cpu")


def start() -> None:
    """Start JAX without the errors of accelerator runtimes that find no chip.

    Without a chip, a runtime prints pages of errors when JAX starts. This function logs
    one line instead. The errors are printed if JAX fails or finds a chip that
    `has_chip` missed. The function does nothing if `jax_platforms` is set, no runtime
    is installed, or `has_chip` finds a chip.
    """
    runtimes = installed_runtimes()
    if jax.config.jax_platforms or not runtimes or has_chip():
        return
    with _captured_stderr() as captured:
        platform = jax.default_backend()
        if platform == "cpu":
            captured.truncate(0)  # drop the errors of the runtimes
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
    """Return True if this computer has an accelerator's device file or a TPU card."""
    if any(any((root / "dev").glob(pattern)) for pattern in DEVICE_FILES):
        return True
    for card in (root / "sys/bus/pci/devices").glob("*"):
        ids = [(card / name).read_text().strip() for name in ("vendor", "device")]
        if ids[0] == GOOGLE and ids[1] != NETWORK_CARD:
            return True
    return False


@contextmanager
def _captured_stderr() -> Iterator:
    """Context manager that captures stderr in a file and prints the file at the end.

    Redirects file descriptor 2, because libraries in C++ do not write to `sys.stderr`.
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
