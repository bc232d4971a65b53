"""Tests of the watchdog, which ends a process that hangs."""

import mini_runs
import pytest

from hivit_jax.distributed.watchdog import Watchdog
from hivit_jax.errors import ConfigError

HANGING = """
import time
from hivit_jax.distributed.watchdog import Watchdog

def wait_for_the_end_of_time():
    time.sleep(1000)

with Watchdog(stall_timeout=1.0) as watchdog:
    for _ in range(4):
        time.sleep(0.5)
        watchdog.heartbeat()
    print("still here", flush=True)
    wait_for_the_end_of_time()
"""


@pytest.mark.processes
@pytest.mark.slow
def test_hanging_process_exits():
    code, out, error = mini_runs.run_process("-c", HANGING)
    assert code == 75
    assert "still here" in out
    assert "in wait_for_the_end_of_time" in error
    assert "has made no progress for" in error
    assert "(stall_timeout=1)" in error


def test_watchdog_passes_errors_on():
    with pytest.raises(ConfigError, match="x"), Watchdog(stall_timeout=60.0):
        raise ConfigError("x")
