"""Start, consistency checks and end of the processes of a run.

JAX watches the processes: each one aborts (SIGABRT, exit code 134) at most
2 x peer_timeout after another one is lost, also inside a collective.
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

_exit_timeout = 0.0  # seconds, set by `start`
_exiting = threading.Lock()


def start(address: str, count: int, index: int, peer_timeout: float) -> None:
    """Connect this process to the others of its run.

    Without an address, TPU metadata or SLURM's variables name the others. Where
    neither exists, the process runs alone.

    Args:
      address: HOST:PORT of process 0, or "".
      count, index: number of processes and index of this one, ignored without an
        address.
      peer_timeout: seconds without a heartbeat after which a process counts as lost.

    Raises:
      ConfigError: incomplete cluster variables, or process 0 does not answer.
    """
    global _exit_timeout
    _exit_timeout = 2 * peer_timeout
    given = (address, count, index) if address else ()
    try:
        jax.distributed.initialize(
            *given,
            heartbeat_timeout_seconds=math.ceil(peer_timeout),
            # Longer than `exit_now` waits, because JAX then aborts every process.
            shutdown_timeout_seconds=math.ceil(_exit_timeout) + 30,
        )
    except ValueError as error:
        if "coordinator_address should be defined" not in str(error):  # found nothing
            raise ConfigError(
                f"the processes cannot start together: {error}"
            ) from error
    except RuntimeError as error:
        raise ConfigError(
            f"process {index} of {count} does not reach {address}: {error}"
        ) from error


def joined() -> bool:
    """Return True from `start` to the end of a process that has joined others."""
    return jax.distributed.is_initialized() or _exiting.locked()


def exit_now(code: int, message: str = "", peer_lost: bool = False) -> NoReturn:
    """End this process without exit handlers, together with the others of its run.

    Each process waits until all call this function. Therefore each returns its own
    code, although the others abort when process 0 ends. A process that fails alone
    waits 2 x peer_timeout and returns its code; then JAX aborts the others.

    Args:
      code: exit code.
      message: printed to stderr unless JAX aborts this process, too.
      peer_lost: an error that a lost process may have caused: wait for JAX's abort,
        and do not meet the others, because the lost one may have been on its way out.
    """
    _exiting.acquire()  # never released: the first of two threads sets the exit code
    sys.stdout.flush()
    if peer_lost:
        time.sleep(2 * _exit_timeout)
    elif jax.distributed.is_initialized():
        # In a thread, because another process may hang and never reach this barrier.
        barrier = threading.Thread(target=_shutdown, daemon=True)
        barrier.start()
        barrier.join(_exit_timeout)
    print(message, end="", file=sys.stderr, flush=True)
    os._exit(code)


def _shutdown() -> None:
    with suppress(Exception):  # for example not connected
        jax.distributed.shutdown()


def check_same_on_all_processes(facts: Mapping[str, Any]) -> None:
    """Check that all processes are about to do the same.

    Args:
      facts: by name, values with the same text on every process, such as a config.

    Raises:
      ConfigError: on every process, with the indices that differ from process 0.
    """
    if jax.process_count() == 1:
        return
    digests = np.array([zlib.crc32(str(v).encode()) for v in facts.values()], np.uint32)
    every = multihost_utils.process_allgather(digests)  # [processes, facts]
    for name, column in zip(facts, every.T, strict=True):
        others = [str(index) for index in np.flatnonzero(column != column[0])]
        if others:
            raise ConfigError(
                f"processes do not agree on the {name}: {', '.join(others)} of "
                f"{len(column)} differ from process 0.\nHere, on process "
                f"{jax.process_index()}, it is {str(facts[name])[:200]}"
            )


def all_processes(ok: bool) -> bool:
    """Return True if `ok` is true on every process; waits for all of them."""
    if jax.process_count() == 1:
        return ok
    return bool(multihost_utils.process_allgather(np.array([ok])).all())


def gather_objects(thing: Any) -> list[Any]:
    """The objects of all processes, in their order, on every process.

    Args:
      thing: anything that pickle writes; it is read only by the processes of this run.
    """
    if jax.process_count() == 1:
        return [thing]
    content = np.frombuffer(pickle.dumps(thing), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([content.size])).reshape(-1)
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: content.size] = content
    every = multihost_utils.process_allgather(padded)
    return [
        pickle.loads(part[:size].tobytes())
        for part, size in zip(every, sizes, strict=True)
    ]
