"""The lock of a workdir."""

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
    monkeypatch.setattr(lock, "INTERVAL", 0.1)


def files(workdir):
    return sorted(path.name for path in workdir.glob("*.lock"))


def write(workdir, number=1, **changes):
    """The lock of another run."""
    owner = lock.this_process() | changes
    (workdir / f"run-{number}.lock").write_text(json.dumps(owner))
    return owner


def refused(workdir, *fragments):
    before = files(workdir)
    with pytest.raises(ConfigError) as error, lock.hold(workdir):
        pass
    for fragment in (str(workdir), *fragments):
        assert fragment in str(error.value)
    assert len(str(error.value).splitlines()) <= 3
    assert files(workdir) == before


def test_one_run_at_a_time(tmp_path):
    """Refused while a run holds the lock, with its process, host and start time.
    Accepted after its end, planned or by an error; other workdirs are free.
    """
    with lock.hold(tmp_path / "new"):
        assert files(tmp_path / "new") == ["run-1.lock"]
        owner = json.loads((tmp_path / "new" / "run-1.lock").read_text())
        refused(
            tmp_path / "new", f"process {os.getpid()} on {owner['host']}", "since 20"
        )
        with lock.hold(tmp_path / "other"):
            pass
    with pytest.raises(ZeroDivisionError), lock.hold(tmp_path / "new"):
        raise ZeroDivisionError
    assert files(tmp_path / "new") == []


def test_decorated_function_has_its_arguments(tmp_path):
    @lock.exclusive
    def run(config, workdir, heartbeat=None):
        return config, files(workdir), heartbeat

    assert run(1, tmp_path, heartbeat=2) == (1, ["run-1.lock"], 2)
    assert run(workdir=tmp_path, config=1) == (1, ["run-1.lock"], None)


def ended_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("kind", ["ended", "not reaped", "number reused"])
def test_dead_owner_of_this_machine(kind, tmp_path, capsys):
    """Its lock is taken over at once: the process ended, is a zombie, or its number
    belongs to a process with another start time.
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
    write(tmp_path, 4, pid=process.pid, started=started)
    with lock.hold(tmp_path):
        assert files(tmp_path) == ["run-5.lock"]
    assert f"took over {tmp_path} from process {process.pid}" in capsys.readouterr().out
    process.kill()
    process.wait()


def test_living_owner_of_this_machine(tmp_path):
    pid = os.getppid()
    write(tmp_path, pid=pid, started=lock._start_time(pid), host="here")
    refused(tmp_path, f"process {pid} on here")


@pytest.mark.parametrize("alive", [True, False])
def test_owner_elsewhere(alive, tmp_path, capsys):
    """A heartbeat that changes refuses; one that stands still for two intervals does
    not, whatever its clock is.
    """
    owner = write(tmp_path, machine="other", host="far", since="2099-01-01")
    if alive:
        text = json.dumps(owner | {"beats": "0000000001"})
        path = tmp_path / "run-1.lock"
        threading.Timer(0.1, path.write_text, [text]).start()
        refused(tmp_path, "on far, running since 2099")
    else:
        with lock.hold(tmp_path):
            assert files(tmp_path) == ["run-2.lock"]
        assert "on far, running since 2099" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_damaged_lock(text, tmp_path):
    """As of an owner elsewhere: watched, then taken over."""
    (tmp_path / "run-1.lock").write_text(text)
    with lock.hold(tmp_path):
        assert files(tmp_path) == ["run-2.lock"]


def test_only_one_takes_over(tmp_path):
    """Of eight runs that find the same dead owner."""
    for attempt in range(5):
        workdir = tmp_path / str(attempt)
        workdir.mkdir()
        write(workdir, pid=ended_process() if attempt == 0 else 2**22 + 1)
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


def test_heartbeat_and_loss(tmp_path, monkeypatch):
    """The owner's count moves; a run whose lock was taken over ends itself."""
    ended = threading.Event()

    def exit_now(code, message):
        assert code == 2
        assert "was taken over by process 7 on far" in message
        ended.set()

    monkeypatch.setattr(lock, "exit_now", exit_now)
    with lock.hold(tmp_path):
        path = tmp_path / "run-1.lock"
        before = lock._read(path)
        assert not lock.is_dead(before | {"machine": "other"}, path)
        assert not ended.is_set()
        write(tmp_path, 2, pid=7, host="far", machine="other")
        assert ended.wait(5)
    assert files(tmp_path) == ["run-2.lock"]


def test_all_processes_of_a_run_refuse(tmp_path, monkeypatch):
    """Process 0 holds the lock for all; the others have its error."""
    monkeypatch.setattr(lock, "jax", SimpleNamespace(process_index=lambda: 1))
    monkeypatch.setattr(lock, "gather_objects", lambda mine: [None, mine])
    with lock.hold(tmp_path):
        assert files(tmp_path) == []
    monkeypatch.setattr(lock, "gather_objects", lambda mine: ["in use by x", mine])
    with pytest.raises(ConfigError, match="in use by x"), lock.hold(tmp_path):
        pass
