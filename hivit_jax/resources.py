"""Memory and disk space: checks before the first step, and errors when they run out."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax

from hivit_jax.distributed.processes import all_processes
from hivit_jax.errors import ResourceError, first_line
from hivit_jax.paths import is_bucket

GIB = 2**30
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
MEMORY_ADVICE = (
    "These settings need less memory: a smaller batch_size; the same batch_size with a "
    "larger optimizer.accumulate_steps; model.remat=True; more devices in mesh.fsdp"
)
DISK_ADVICE = "Free some space, choose another --workdir, or lower keep_checkpoints"


@contextmanager
def raise_resource_errors() -> Iterator[None]:
    """Context manager and decorator for errors of exhausted memory and full disks.

    Raises:
      ResourceError: replaces an exception that was caused by exhausted memory or a full
        disk.
    """
    try:
        yield
    except Exception as error:
        if resource_error := as_resource_error(error):
            raise resource_error from error
        raise


def as_resource_error(error: BaseException) -> ResourceError | None:
    """Return the ResourceError that replaces an exception; None for other causes."""
    text = first_line(error)
    disk_full = isinstance(error, OSError) and error.errno in DISK_FULL
    if disk_full or "No space left on device" in text or "Disk quota exceeded" in text:
        path = str(getattr(error, "filename", None) or ".")
        return ResourceError(
            f"the disk is full ({free_disk_text(path)}): {text[:200]}\n{DISK_ADVICE}"
        )
    raised_by_jax = isinstance(error, jax.errors.JaxRuntimeError)
    if isinstance(error, MemoryError) or (
        raised_by_jax and re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory", str(error))
    ):
        requested = _requested_bytes(str(error))
        cause = f"{requested / GIB:,.1f} GiB requested" if requested else text[:200]
        return ResourceError(
            f"out of memory: {cause}; {device_memory_text()}.\n{MEMORY_ADVICE}"
        )
    return None


def check_memory(needed: int) -> None:
    """Check that a program fits into the memory of each device.

    Args:
      needed: bytes of the program's arguments, outputs, temporaries and code.

    Raises:
      ResourceError: the backend reports less than `needed` bytes of memory.
    """
    limit = _device_limit()
    if limit and needed > limit:
        raise ResourceError(
            f"the train step needs {needed / GIB:,.1f} GiB on each device; "
            f"{device_memory_text()}.\n{MEMORY_ADVICE}"
        )


def check_disk(directory: str | Path, state: Any) -> None:
    """Check that a checkpoint of a train state fits into a directory's file system.

    Args:
      state: pytree of arrays or of their shapes and dtypes.

    Raises:
      ResourceError: any process finds too little free space. Raised on every process.
    """
    needed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    free = _free_disk(directory)
    if not all_processes(free is None or free >= needed):
        raise ResourceError(
            f"a checkpoint needs {needed / GIB:,.2f} GiB in {directory}; "
            f"{free_disk_text(directory)}.\n{DISK_ADVICE}"
        )


def device_memory_text() -> str:
    """Return the memory of each device, or of the machine for a CPU, as text."""
    kind = jax.local_devices()[0].device_kind
    if limit := _device_limit():
        return f"each device ({kind}) has {limit / GIB:,.1f} GiB"
    with suppress(ValueError, OSError):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return f"this machine has {total / GIB:,.1f} GiB for all its processes"
    return f"the device is a {kind}"


def free_disk_text(path: str | Path) -> str:
    """Return the free space of a path's file system as text."""
    free = _free_disk(path)
    if free is None:
        return "the free space is unknown"
    return f"{free / 2**20:,.0f} MiB are free on this file system"


def _device_limit() -> int | None:
    """Return each device's memory in bytes; None if the backend does not report it."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def _free_disk(path: str | Path) -> int | None:
    """Return the free bytes of a path's file system; None for buckets.

    The path need not exist. Its nearest existing parent determines the file system.
    """
    if is_bucket(path):
        return None
    path = Path(path).absolute()
    existing = next(each for each in (path, *path.parents) if each.exists())
    return shutil.disk_usage(existing).free


def _requested_bytes(text: str) -> int | None:
    """Return the bytes that an XLA or NumPy error reports as requested, or None."""
    verb = r"(?:[Aa]llocat\w*|[Rr]eserve|Used)"
    if found := re.search(verb + r" (\d+(?:\.\d+)?) ?([KMGTPE]?)", text):
        return int(float(found[1]) * 2 ** (10 * " KMGTPE".index(found[2] or " ")))
    return None
