"""Several processes as one run: they start together, agree on what they do, stop at the
same step, and none waits for ever for another.
"""

import faulthandler
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax._src.distributed import global_state
from jax._src.lib import _jax
from jax.experimental import multihost_utils

from hivit_jax.errors import ConfigError, HivitError, Interrupted
from hivit_jax.reporting.console import say

SIGNS, DONE = "hivit/signs", "done"  # of life, in the runtime's key-value store


def start(address: str, count: int, index: int, peer_timeout: float) -> None:
    """Joins the other processes: those of the flags, else those that TPU metadata or
    SLURM's variables tell of; alone where there is nothing of the kind.

    Args:
      address: HOST:PORT of process 0, "" to find out.
      count, index: of the processes, and of this one; ignored without an address.
      peer_timeout: seconds without a sign of life after which a process counts as dead.
    """
    given = (address, count, index) if address else ()
    # The runtime's own verdict, which aborts with a stack trace, comes after ours.
    limit = int(2 * peer_timeout) + 10
    try:
        with service_apart(outlive=peer_timeout + 3):
            jax.distributed.initialize(
                *given, heartbeat_timeout_seconds=limit, shutdown_timeout_seconds=limit
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


class Service:
    """The runtime's service for all processes, in a process of its own: `coordinator`.

    Args:
      options: its arguments, texts.

    Raises:
      RuntimeError: it does not start.
    """

    def __init__(self, *options: str):
        script = Path(__file__).with_name("coordinator.py")
        self._process = subprocess.Popen(
            [sys.executable, "-P", script, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what it outlives may be waited for there
            text=True,
            start_new_session=True,
        )
        answer = self._process.stdout.readline().strip()
        if answer != "ready":
            raise RuntimeError(answer or "the service does not start")

    def shutdown(self) -> None:
        """Lets it end by itself, soon."""
        self._process.stdin.write("end")
        self._process.stdin.close()


@contextmanager
def service_apart(outlive: float) -> Iterator[None]:
    """Within, process 0 of several starts the runtime's service as a `Service`, for
    JAX, which has it in process 0, aborts the others when that is lost.

    Args:
      outlive: seconds that it stays when process 0 is lost.
    """
    inside = _jax.get_distributed_runtime_service

    def apart(address, count, *, heartbeat_timeout, shutdown_timeout, **options):
        limits = dict(
            heartbeat_timeout=heartbeat_timeout, shutdown_timeout=shutdown_timeout
        )
        if count == 1:
            return inside(address, count, **limits, **options)
        return Service(address, *map(str, (count, *limits.values(), outlive)))

    _jax.get_distributed_runtime_service = apart
    try:
        yield
    finally:
        _jax.get_distributed_runtime_service = inside


def leave(code: int) -> None:
    """Ends this process at once; the runtime would wait for the others."""
    sys.stdout.flush()
    if global_state.service:
        global_state.service.shutdown()
    os._exit(code)


def agree(facts: Mapping[str, Any]) -> None:
    """Makes sure that all processes are about to do the same.

    Args:
      facts: by name, anything with the same text everywhere, such as a config.

    Raises:
      ConfigError: on every process, naming those that differ from process 0.
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


def all_agree(well: bool) -> bool:
    """Whether all is well on every process; waits for all to say so."""
    if jax.process_count() == 1:
        return well
    return bool(multihost_utils.process_allgather(np.array([well])).all())


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


def catch_signals() -> Callable[[int], str | None]:
    """From here on SIGTERM and Ctrl-C are requests to save and leave.

    Returns:
      A function of the number of steps done, to be asked after every step by every
      process: the signal that came, the same answer on all. In a single process a
      second signal kills.
    """
    if jax.process_count() > 1:
        # The runtime has caught SIGTERM since `start`, and spreads the word.
        signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))

        def reached(step: int) -> str | None:
            stop = multihost_utils.reached_preemption_sync_point(step)
            return "SIGTERM to one of the processes" if stop else None

        return reached

    caught: list[str] = []

    def remember(number: int, frame: FrameType | None) -> None:
        caught.append(signal.Signals(number).name)
        say(f"{caught[0]}: finishing the step and saving; once more to kill")
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, remember)
    return lambda step: caught[0] if caught else None


class Guard:
    """Ends this process if it stands still, or if another one of the run is gone; from
    outside, for the main thread may wait for ever for a collective.

    Processes give signs of life through the runtime's key-value store, which process 0
    keeps. Whatever ends this way can be run again: a checkpoint is whole or invisible.

    Args:
      stall_timeout: seconds that may pass between two calls of `beat`; 0: any number.
      peer_timeout: seconds that a process may give no sign of life.
    """

    def __init__(self, stall_timeout: float, peer_timeout: float):
        self._stall_timeout, self._peer_timeout = stall_timeout, peer_timeout
        self._me, self._count = jax.process_index(), jax.process_count()
        self._interval = min(1.0, peer_timeout / 4)
        self._closed, self._lock = threading.Event(), threading.Lock()
        self._last_sign = ""  # of this process: that it has ended, and how
        now = time.monotonic()
        self._beaten = self._heard = now
        # Newest sign of every other process, and when it came.
        self._signs = {i: ("", now) for i in range(self._count) if i != self._me}
        for work in [self._watch] + [self._exchange] * bool(self._signs):
            threading.Thread(target=work, daemon=True).start()

    def beat(self) -> None:
        """Something was done: a step, or a batch of an evaluation."""
        self._beaten = time.monotonic()

    def __enter__(self) -> "Guard":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _) -> None:
        """The end of the watch. An error that another process's death may have caused
        is given the time to turn out to be that.
        """
        self._stall_timeout = 0.0
        if self._signs:
            if error is not None and not isinstance(error, HivitError):
                time.sleep(self._peer_timeout + 2 * self._interval)
            self._last_sign = f"ended with {kind.__name__}" if kind else DONE
            with suppress(Exception):  # of whatever kind, where process 0 is gone
                self._tell()
            until = time.monotonic() + self._peer_timeout
            while self._me == 0 and time.monotonic() < until:  # the others need it
                if all(sign[:5] in (DONE, "ended") for sign, _ in self._signs.values()):
                    break
                time.sleep(self._interval / 4)
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(self._interval):
            now = time.monotonic()
            if self._stall_timeout and now - self._beaten > self._stall_timeout:
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
                self._end(
                    f"process {self._me} on {socket.gethostname()} has stood still for "
                    f"{now - self._beaten:.0f} s (stall_timeout="
                    f"{self._stall_timeout:g}); above is where its threads are"
                )
            if self._signs and now - self._heard > self._peer_timeout:
                self._end("process 0, which coordinates, does not answer")
            for index, (sign, since) in self._signs.items():
                if now - since > self._peer_timeout and sign != DONE:
                    what = sign if sign.startswith("ended") else "gives no sign of life"
                    self._end(
                        f"process {index} of {self._count} {what}, for "
                        f"{now - since:.0f} s (peer_timeout={self._peer_timeout:g})"
                    )

    def _exchange(self) -> None:
        while not self._closed.is_set():
            with suppress(Exception):  # of whatever kind; `_watch` sees the silence
                self._tell()
                signs = dict(global_state.client.key_value_dir_get(SIGNS))
                self._heard = now = time.monotonic()
                for index, (old, _) in self._signs.items():
                    if (sign := signs.get(f"{SIGNS}/{index}", "")) != old:
                        self._signs[index] = sign, now
            time.sleep(self._interval)

    def _tell(self) -> None:
        with self._lock:  # so that the last sign stays
            sign = self._last_sign or str(time.monotonic())
            name = f"{SIGNS}/{self._me}"
            global_state.client.key_value_set(name, sign, allow_overwrite=True)

    def _end(self, message: str) -> None:
        """The end of the process; its other threads may hang."""
        text = f"{message}.\nCheckpoints are whole: run the same command to go on"
        print(text, file=sys.stderr, flush=True)
        os._exit(Interrupted.exit_code)
