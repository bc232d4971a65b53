"""A watchdog that ends a hanging process."""

import faulthandler
import socket
import sys
import threading
import time

import jax

from hivit_jax.distributed.processes import exit_together
from hivit_jax.errors import Interrupted


class Watchdog:
    """Context manager that ends a hanging process with exit code 75.

    The watchdog runs in a thread, because the main thread may wait forever for a
    collective. The user can resume the run with the same command, because a checkpoint
    is either complete or not visible.

    Args:
      stall_timeout: seconds allowed between two heartbeats; 0: unlimited.
    """

    def __init__(self, stall_timeout: float):
        self._stall_timeout = stall_timeout
        self._last_heartbeat = time.monotonic()
        self._closed = threading.Event()

    def heartbeat(self) -> None:
        """Report progress: a finished step, or a finished batch of an evaluation."""
        self._last_heartbeat = time.monotonic()

    def __enter__(self) -> "Watchdog":
        if self._stall_timeout:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()

    def _watch(self) -> None:
        stalled = 0.0
        while stalled <= self._stall_timeout:
            if self._closed.wait(min(1.0, self._stall_timeout / 4)):
                return
            stalled = time.monotonic() - self._last_heartbeat
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        print(
            f"process {jax.process_index()} on {socket.gethostname()} has made no "
            f"progress for {stalled:.0f} s (stall_timeout={self._stall_timeout:g}); "
            "the stacks of its threads are above.\n"
            "The saved checkpoints are complete: run the same command to resume",
            file=sys.stderr,
            flush=True,
        )
        exit_together(Interrupted.exit_code)
