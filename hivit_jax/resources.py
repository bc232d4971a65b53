"""Memory and disk space: checks before the first step, and errors that name them."""

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

GIB = 2**30
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
LESS_MEMORY = (
    "These keys need less memory: a smaller batch_size, or the same batch_size with a "
    "larger optimizer.accumulate_steps; model.remat=True; more devices in mesh.fsdp"
)
LESS_DISK = "Free some space, choose another --workdir, or lower keep_checkpoints"


@contextmanager
def exhaustion_reported() -> Iterator[None]:
    """Context, or decorator, that turns errors of full memory or disks into
    ResourceError.
    """
    try:
        yield
    except Exception as error:
        if found := exhausted(error):
            raise found from error
        raise


def exhausted(error: BaseException) -> ResourceError | None:
    """Return the error to report if memory or a disk was exhausted, else None."""
    text = first_line(error)
    disk = isinstance(error, OSError) and error.errno in DISK_FULL
    if disk or "No space left on device" in text or "Disk quota exceeded" in text:
        name = str(getattr(error, "filename", None) or ".")
        return ResourceError(
            f"the disk is full ({free_disk_text(name)}): {text[:200]}\n{LESS_DISK}"
        )
    raised_by_jax = isinstance(error, jax.errors.JaxRuntimeError)
    if isinstance(error, MemoryError) or (
        raised_by_jax and re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory", str(error))
    ):
        needed = _bytes_in(str(error))
        request = f"{needed / GIB:,.1f} GiB requested" if needed else text[:200]
        return ResourceError(
            f"out of memory: {request}; {device_memory_text()}.\n{LESS_MEMORY}"
        )
    return None


def check_memory(needed: int) -> None:
    """Check the memory that a program needs on each device.

    Args:
      needed: bytes of arguments, outputs, temporaries and code.

    Raises:
      ResourceError: the backend reports less memory than that.
    """
    limit = _device_limit()
    if limit and needed > limit:
        raise ResourceError(
            f"the train step needs {needed / GIB:,.1f} GiB on each device; "
            f"{device_memory_text()}.\n{LESS_MEMORY}"
        )


def check_disk(directory: str | Path, state: Any) -> None:
    """Check that a checkpoint of a train state fits into a directory's file system.

    Args:
      state: arrays or their shapes and dtypes.

    Raises:
      ResourceError: a process has less free space. Raised on every process.
    """
    needed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    free = _free_disk(directory)
    if not all_processes(free is None or free >= needed):
        raise ResourceError(
            f"a checkpoint needs {needed / GIB:,.2f} GiB in {directory}; "
            f"{free_disk_text(directory)}.\n{LESS_DISK}"
        )


def device_memory_text() -> str:
    """Return the memory of this process's devices as text."""
    kind = jax.local_devices()[0].device_kind
    if limit := _device_limit():
        return f"each device ({kind}) has {limit / GIB:,.1f} GiB"
    with suppress(ValueError, OSError):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return f"this machine has {total / GIB:,.1f} GiB for all its processes"
    return f"the device is a {kind}"


def free_disk_text(path: str | Path) -> str:
    """Return the free space of the file system of a path as text."""
    free = _free_disk(path)
    if free is None:
        return "the free space is unknown"
    return f"{free / 2**20:,.0f} MiB are free on this file system"


def _device_limit() -> int | None:
    """Return the bytes of memory of each device, if the backend reports them."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def _free_disk(path: str | Path) -> int | None:
    """Return the free bytes at a path or its nearest parent; None for buckets."""
    if "://" in str(path):
        return None
    path = Path(path).absolute()
    existing = next(each for each in (path, *path.parents) if each.exists())
    return shutil.disk_usage(existing).free


def _bytes_in(text: str) -> int | None:
    """Return the requested bytes in an error of XLA or numpy, such as 1.5GiB."""
    verb = r"(?:[Aa]llocat\w*|[Rr]eserve|Used)"
    if found := re.search(verb + r" (\d+(?:\.\d+)?) ?([KMGTPE]?)", text):
        return int(float(found[1]) * 2 ** (10 * " KMGTPE".index(found[2] or " ")))
    return None
