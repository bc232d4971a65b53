"""Preemption: turn signals into requests to save and exit.

All processes of a run stop at the same step.
"""

import os
import signal
from collections.abc import Callable
from types import FrameType

import jax
from jax.experimental import multihost_utils

from hivit_jax.reporting.console import log


def catch_signals() -> Callable[[int], str | None]:
    """Turn SIGTERM and Ctrl-C into requests to save and exit.

    Returns:
      A function (number of completed steps) -> description of the signal, or None
      without a signal. Every process must call the function after every step. The
      result is the same on all processes. In a run of one process, a second signal
      kills the process.
    """
    if jax.process_count() > 1:
        # `processes.connect` made JAX handle SIGTERM and notify the other processes.
        signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))

        def stop_reason(step: int) -> str | None:
            stop = multihost_utils.reached_preemption_sync_point(step)
            return "SIGTERM to one of the processes" if stop else None

        return stop_reason

    caught: list[str] = []

    def remember(signum: int, frame: FrameType | None) -> None:
        caught.append(signal.Signals(signum).name)
        log(
            f"{caught[0]}: finishing the step and saving; a second signal kills the run"
        )
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, remember)
    return lambda step: caught[0] if caught else None
