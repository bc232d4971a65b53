"""Tests of process start-up: flags, addresses, one process without a cluster."""

import pytest

from hivit_jax.distributed import processes
from hivit_jax.errors import ConfigError


def test_no_cluster_is_one_process(monkeypatch):
    """Without a cluster, a process runs alone; an incomplete cluster is an error."""
    calls = []

    def initialize(*args, **options):
        calls.append((args, options))
        raise ValueError(problem)

    monkeypatch.setattr(processes.jax.distributed, "initialize", initialize)
    problem = "coordinator_address should be defined."
    processes.start("", -1, -1, 60.0)
    limits = dict(heartbeat_timeout_seconds=60, shutdown_timeout_seconds=150)
    assert calls == [((), limits)]
    problem = "Number of processes must be defined."
    with pytest.raises(ConfigError, match="cannot start together: Number of processes"):
        processes.start("", -1, -1, 60.0)


pytestmark = pytest.mark.usefixtures("minimal_output")


def test_flags_of_one_process_of_several(run_main, tmp_path, capsys):
    """Flags and timeouts reach JAX; JAX's shutdown waits longer than `exit_now`."""
    address = "--coordinator_address=host:1234"
    flags = [address, "--num_processes=4", "--process_id=3", f"--workdir={tmp_path}"]
    code, calls = run_main(*flags, problem="no")
    limits = dict(heartbeat_timeout_seconds=45, shutdown_timeout_seconds=2 * 45 + 30)
    assert (code, calls) == (2, [(("host:1234", 4, 3), limits)])
    assert "the processes cannot start together: no" in capsys.readouterr().err

    for wrong in (flags[:2], flags[1:], [*flags, "--process_id=4"], flags[::2]):
        assert run_main(*wrong, f"--workdir={tmp_path}") == (2, [])
        assert "expected all or none of" in capsys.readouterr().err
