"""Tests of the watchdog, which ends a process that hangs."""

import mini_runs
import pytest

from hivit_jax.distributed.watchdog import Watchdog
from hivit_jax.errors import ConfigError

HANGING = """
import time
from hivit_jax.distributed.watchdog import Watchdog

def hang():
    time.sleep(1000)

with Watchdog(stall_timeout=1.0) as watchdog:
    for _ in range(4):  # 2 s, longer than stall_timeout
        time.sleep(0.5)
        watchdog.heartbeat()
    print("still here", flush=True)
    hang()
"""


@pytest.mark.processes
@pytest.mark.slow
def test_hanging_process_exits():
    code, out, error = mini_runs.run_process("-c", HANGING)
    assert code == 75
    assert "still here" in out
    assert "in hang" in error
    assert "has made no progress for" in error
    assert "(stall_timeout=1)" in error


def test_watchdog_propagates_errors():
    with pytest.raises(ConfigError, match="x"), Watchdog(stall_timeout=60.0):
        raise ConfigError("x")
