"""Tests of the lock of a workdir."""

import json
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from hivit_jax.checkpoints import lock
from hivit_jax.errors import ConfigError


@pytest.fixture(autouse=True)
def short_intervals(monkeypatch):
    """Shorten the interval of heartbeats."""
    monkeypatch.setattr(lock, "INTERVAL", 0.1)


def lock_files(workdir):
    """Return the names of the lock files in a workdir."""
    return sorted(path.name for path in workdir.glob("*.lock"))


def write_lock(workdir, number=1, **changes):
    """Write the lock of another run; return its owner.

    Args:
      changes: facts in which the owner differs from this process.
    """
    owner = lock.this_process() | changes
    (workdir / f"run-{number}.lock").write_text(json.dumps(owner))
    return owner


def check_refused(workdir, *fragments):
    """Check that the lock is refused with an error that contains all fragments."""
    before = lock_files(workdir)
    with pytest.raises(ConfigError) as error, lock.hold(workdir):
        pass
    for fragment in (str(workdir), *fragments):
        assert fragment in str(error.value)
    assert len(str(error.value).splitlines()) <= 3
    assert lock_files(workdir) == before


def test_lock_admits_one_run_at_a_time(tmp_path):
    """Other runs fail with an error that names the owner's process and host.

    A run releases the lock when it ends, even with an error. The lock of a workdir does
    not affect other workdirs.
    """
    with lock.hold(tmp_path / "new"):
        assert lock_files(tmp_path / "new") == ["run-1.lock"]
        owner = json.loads((tmp_path / "new" / "run-1.lock").read_text())
        facts = f"process {os.getpid()} on {owner['host']}, started {owner['since']}"
        check_refused(tmp_path / "new", facts)
        with lock.hold(tmp_path / "other"):
            pass
    with pytest.raises(ZeroDivisionError), lock.hold(tmp_path / "new"):
        raise ZeroDivisionError
    assert lock_files(tmp_path / "new") == []


def test_exclusive_function_holds_the_lock_and_receives_its_arguments(tmp_path):
    @lock.exclusive
    def run(config, workdir, option=None):
        return config, lock_files(workdir), option

    assert run(1, tmp_path, option=2) == (1, ["run-1.lock"], 2)
    assert run(workdir=tmp_path, config=1) == (1, ["run-1.lock"], None)


def ended_pid():
    """Return the ID of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("kind", ["ended", "not reaped", "ID reused"])
def test_lock_of_a_dead_process_is_taken_over(kind, tmp_path, capsys):
    """An owner on this machine is dead in three cases.

    The process has ended, is a zombie, or its ID belongs to a process with another
    start time.
    """
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = lock._start_time(process.pid)
    assert started
    if kind == "ended":
        process.communicate(b"\n")
    elif kind == "not reaped":
        process.stdin.close()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    else:
        started += "0"
    write_lock(tmp_path, 4, pid=process.pid, started=started)
    with lock.hold(tmp_path):
        assert lock_files(tmp_path) == ["run-5.lock"]
    assert f"took over {tmp_path} from process {process.pid}" in capsys.readouterr().out
    process.kill()
    process.wait()


def test_lock_of_a_living_process_is_refused(tmp_path):
    pid = os.getppid()
    write_lock(tmp_path, pid=pid, started=lock._start_time(pid), host="here")
    check_refused(tmp_path, f"process {pid} on here")


@pytest.mark.parametrize("alive", [True, False])
def test_lock_of_another_machine_is_taken_over_unless_it_changes(
    alive, tmp_path, capsys
):
    """An owner on another machine is alive only if its heartbeat changes.

    The new run waits for a heartbeat and ignores the owner's clock.
    """
    owner = write_lock(tmp_path, machine="other", host="far", since="2099-01-01")
    if alive:
        text = json.dumps(owner | {"beats": "0000000001"})
        path = tmp_path / "run-1.lock"
        threading.Timer(0.1, path.write_text, [text]).start()
        check_refused(tmp_path, "on far, started 2099")
    else:
        with lock.hold(tmp_path):
            assert lock_files(tmp_path) == ["run-2.lock"]
        assert "on far, started 2099" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_damaged_lock_is_taken_over(text, tmp_path):
    """A damaged file never changes, so its owner counts as dead."""
    (tmp_path / "run-1.lock").write_text(text)
    with lock.hold(tmp_path):
        assert lock_files(tmp_path) == ["run-2.lock"]


def test_one_of_eight_runs_takes_over_the_lock_of_a_dead_process(tmp_path):
    for attempt in range(5):
        workdir = tmp_path / str(attempt)
        workdir.mkdir()
        # Linux has no process IDs above 2**22.
        write_lock(workdir, pid=ended_pid() if attempt == 0 else 2**22 + 1)
        start, outcomes = threading.Barrier(8), []

        def contend(workdir=workdir, start=start, outcomes=outcomes):
            start.wait()
            try:
                with lock.hold(workdir):
                    outcomes.append("holds")
                    while len(outcomes) < 8:
                        time.sleep(0.01)
            except ConfigError:
                outcomes.append("refused")

        threads = [threading.Thread(target=contend) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["holds"] + ["refused"] * 7


def test_run_whose_lock_was_taken_over_ends_itself(tmp_path, monkeypatch):
    """Until the takeover, the run's heartbeats change its lock."""
    ended = threading.Event()

    def exit_together(code, message):
        assert code == 2
        assert "was taken over by process 7 on far" in message
        ended.set()

    monkeypatch.setattr(lock, "exit_together", exit_together)
    with lock.hold(tmp_path):
        path = tmp_path / "run-1.lock"
        before, end = lock._read_owner(path), time.monotonic() + 5
        while lock._read_owner(path) == before and time.monotonic() < end:
            time.sleep(0.01)
        assert lock._read_owner(path)["beats"] > before["beats"]
        assert not ended.is_set()
        write_lock(tmp_path, 2, pid=7, host="far", machine="other")
        assert ended.wait(5)
    assert lock_files(tmp_path) == ["run-2.lock"]


def test_other_processes_raise_the_error_of_process_0(tmp_path, monkeypatch):
    """Process 0 holds the lock for all processes of a run."""
    monkeypatch.setattr(lock, "jax", SimpleNamespace(process_index=lambda: 1))
    monkeypatch.setattr(lock, "gather_objects", lambda mine: [None, mine])
    with lock.hold(tmp_path):
        assert lock_files(tmp_path) == []
    monkeypatch.setattr(lock, "gather_objects", lambda mine: ["in use by x", mine])
    with pytest.raises(ConfigError, match="in use by x"), lock.hold(tmp_path):
        pass
