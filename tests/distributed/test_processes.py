"""Tests of process start-up: flags, addresses, one process without a cluster."""

import pytest

from hivit_jax.distributed import processes
from hivit_jax.errors import ConfigError

pytestmark = pytest.mark.usefixtures("minimal_output")


def test_process_without_a_cluster_runs_alone(monkeypatch):
    """If JAX finds no cluster, the process runs alone; other problems are errors."""
    calls, message = [], "coordinator_address should be defined."

    def initialize(*args, **options):
        calls.append((args, options))
        raise ValueError(message)

    monkeypatch.setattr(processes.jax.distributed, "initialize", initialize)
    processes.connect("", -1, -1, 60.0)
    timeouts = dict(heartbeat_timeout_seconds=60, shutdown_timeout_seconds=2 * 60 + 30)
    assert calls == [((), timeouts)]
    message = "Number of processes must be defined."
    with pytest.raises(ConfigError, match="cannot start together: Number of processes"):
        processes.connect("", -1, -1, 60.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", 4, 3), "process 3 of 4 cannot reach process 0 at host:1"),
        (("", -1, -1), "this process cannot reach the other processes of the run"),
    ],
)
def test_unreachable_process_is_a_config_error(arguments, message, monkeypatch):
    """With an address, the message names the address and the index of the process."""

    def initialize(*args, **options):
        raise RuntimeError("no answer")

    monkeypatch.setattr(processes.jax.distributed, "initialize", initialize)
    with pytest.raises(ConfigError, match=f"^{message}: no answer"):
        processes.connect(*arguments, 60.0)


def test_process_flags_reach_jax_or_are_refused(run_main, tmp_path, capsys):
    """JAX's shutdown waits longer than `exit_together`. Invalid flags are an error."""
    address = "--coordinator_address=host:1234"
    flags = [address, "--num_processes=4", "--process_id=3", f"--workdir={tmp_path}"]
    code, calls = run_main(*flags, problem="refused")
    timeouts = dict(heartbeat_timeout_seconds=45, shutdown_timeout_seconds=2 * 45 + 30)
    assert (code, calls) == (2, [(("host:1234", 4, 3), timeouts)])
    assert "the processes cannot start together: refused" in capsys.readouterr().err

    wrong_flags = {
        "no process_id": flags[:2],
        "no address": flags[1:],
        "process_id out of range": [*flags, "--process_id=4"],
        "no number of processes": flags[::2],
    }
    for wrong in wrong_flags.values():
        assert run_main(*wrong, f"--workdir={tmp_path}") == (2, [])
        assert "expected all or none of" in capsys.readouterr().err
