"""Connection, consistency checks and exit of the processes of a run.

JAX monitors the processes. When one is lost, every other process aborts (SIGABRT, exit
code 134) within 2 x peer_timeout, even inside a collective.
"""

import math
import os
import pickle
import sys
import threading
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from hivit_jax.errors import ConfigError

_exit_timeout = 0.0  # seconds, set by `connect`
_exiting = threading.Lock()


def connect(address: str, count: int, index: int, peer_timeout: float) -> None:
    """Connect this process to the other processes of its run.

    Without an address, JAX infers the other processes from TPU metadata or SLURM
    variables. If it finds neither, the process runs alone.

    Args:
      address: HOST:PORT of process 0, or "".
      count: number of processes; ignored without an address.
      index: index of this process; ignored without an address.
      peer_timeout: seconds without a heartbeat after which a process counts as lost.

    Raises:
      ConfigError: cluster variables are incomplete, or process 0 does not answer.
    """
    global _exit_timeout
    _exit_timeout = 2 * peer_timeout
    arguments = (address, count, index) if address else ()
    try:
        jax.distributed.initialize(
            *arguments,
            heartbeat_timeout_seconds=math.ceil(peer_timeout),
            # Longer than the barrier wait in `exit_together`, because JAX aborts all
            # processes when this timeout expires.
            shutdown_timeout_seconds=math.ceil(_exit_timeout) + 30,
        )
    except ValueError as error:
        # JAX raises this message if it finds no cluster. This process then runs alone.
        if "coordinator_address should be defined" not in str(error):
            raise ConfigError(
                f"the processes cannot start together: {error}"
            ) from error
    except RuntimeError as error:
        problem = "this process cannot reach the other processes of the run"
        if address:
            problem = f"process {index} of {count} cannot reach process 0 at {address}"
        raise ConfigError(f"{problem}: {error}") from error


def joined() -> bool:
    """Return True if this process has connected to the other processes of its run.

    The result stays True inside `exit_together`, which closes the connection.
    """
    return jax.distributed.is_initialized() or _exiting.locked()


def exit_together(code: int, message: str = "", peer_lost: bool = False) -> NoReturn:
    """End this process once all processes of its run have called this function.

    Exit handlers do not run. The other processes abort when process 0 ends. Each
    process therefore waits at a barrier until all processes have called this function,
    so that each process exits with its own code. A process that fails alone waits
    2 x peer_timeout and exits with its code; then JAX aborts the other processes.

    Args:
      code: exit code.
      message: printed to stderr after the wait; not printed if JAX aborts this process
        first.
      peer_lost: True if a lost process may have caused the error. This process then
        skips the barrier and waits for JAX to abort it. If the lost process had reached
        the barrier earlier, the barrier would let this process pass, and the exit code
        would be `code` instead of 134.
    """
    _exiting.acquire()  # never released: the first of two threads sets the exit code
    sys.stdout.flush()
    if peer_lost:
        time.sleep(2 * _exit_timeout)
    elif jax.distributed.is_initialized():
        # In a thread, because another process may hang and never reach the barrier.
        barrier = threading.Thread(target=_shutdown, daemon=True)
        barrier.start()
        barrier.join(_exit_timeout)
    print(message, end="", file=sys.stderr, flush=True)
    os._exit(code)


def _shutdown() -> None:
    with suppress(Exception):  # for example, the process is not connected
        jax.distributed.shutdown()


def check_same_on_all_processes(values: Mapping[str, Any]) -> None:
    """Check that named values, such as the config, are the same on all processes.

    Args:
      values: values by name; they are compared as text.

    Raises:
      ConfigError: a value differs. Raised on every process, with the indices of the
        processes that differ from process 0.
    """
    if jax.process_count() == 1:
        return
    digests = [zlib.crc32(str(value).encode()) for value in values.values()]
    digests = np.array(digests, np.uint32)
    gathered = multihost_utils.process_allgather(digests)  # [processes, values]
    for name, column in zip(values, gathered.T, strict=True):
        others = [str(index) for index in np.flatnonzero(column != column[0])]
        if others:
            raise ConfigError(
                f"processes differ in the {name}: expected the value of process 0, "
                f"found another value on process {', '.join(others)} of "
                f"{len(column)}.\n"
                f"Process {jax.process_index()} has {str(values[name])[:200]}"
            )


def all_processes(ok: bool) -> bool:
    """Wait for all processes, and return True if `ok` is true on each of them."""
    if jax.process_count() == 1:
        return ok
    return bool(multihost_utils.process_allgather(np.array([ok])).all())


def gather_objects(value: Any) -> list[Any]:
    """Return the objects of all processes, by process index, on every process.

    Args:
      value: an object that pickle can write. Only processes of this run read the
        pickled bytes.
    """
    if jax.process_count() == 1:
        return [value]
    content = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([content.size])).reshape(-1)
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: content.size] = content
    gathered = multihost_utils.process_allgather(padded)
    return [
        pickle.loads(row[:size].tobytes())
        for row, size in zip(gathered, sizes, strict=True)
    ]
