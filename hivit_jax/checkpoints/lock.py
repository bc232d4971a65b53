"""Lock of a workdir, so that only one run at a time writes into it.

The lock is a file ``run-N.lock``. The file contains the host, process and start time of
the owner, and a heartbeat count that the owner increases every `INTERVAL` seconds. If
the owner is dead, the next run takes over the workdir by creating ``run-M.lock`` with
M = N + 1. If several runs try to take over, only one can create the file, unless the
storage cannot create files exclusively.
"""

import json
import os
import platform
import re
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from inspect import signature
from typing import Any

import jax
from etils.epath import Path

from hivit_jax.distributed.processes import exit_together, gather_objects
from hivit_jax.errors import ConfigError, first_line
from hivit_jax.paths import absolute, is_bucket
from hivit_jax.reporting.console import log
from hivit_jax.reporting.metrics import prepare_workdir

INTERVAL = 10.0  # seconds between two heartbeats of an owner
# Intervals without a heartbeat after which an owner that is not in the PID namespace of
# this process counts as dead.
WATCHED_INTERVALS = 2

Owner = dict[str, Any]


def exclusive(run: Callable) -> Callable:
    """Decorate a function so that each call holds the lock of its `workdir`."""

    @wraps(run)
    def locked(*args, **kwargs):
        with hold(signature(run).bind(*args, **kwargs).arguments["workdir"]):
            return run(*args, **kwargs)

    return locked


@contextmanager
def hold(workdir: str | Path) -> Iterator[None]:
    """Context manager that creates a workdir and holds its lock.

    Process 0 of a run holds the lock for all processes of the run.

    Raises:
      ConfigError: another run holds the lock, or the directory cannot be written to.
    """
    workdir, error, path = absolute(workdir), None, None
    prepare_workdir(workdir)
    owner = this_process()
    if jax.process_index() == 0:
        try:
            path = _acquire(workdir, owner)
        except (ConfigError, OSError) as caught:
            error = caught
    if message := gather_objects(error and str(error))[0]:
        raise error or ConfigError(message)
    released = threading.Event()
    if path:
        arguments = path, owner, released
        threading.Thread(target=_send_heartbeats, args=arguments, daemon=True).start()
    try:
        yield
    finally:
        released.set()
        if path and (_read_owner(path) or {}).get("token") == owner["token"]:
            path.unlink(missing_ok=True)


def this_process() -> Owner:
    """Return the content of a lock file that this process owns."""
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "started": _start_time(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "machine": _pid_namespace_id(),
        "token": uuid.uuid4().hex,
        "beats": f"{0:010d}",  # of fixed length, because it is overwritten in place
    }


def is_dead(owner: Owner, path: Path) -> bool:
    """Return True if the owner of a lock no longer runs.

    An owner in this PID namespace is alive if a process has the owner's process ID and
    start time. The ID alone is not enough, because a later process may have the same
    ID. Any other owner is alive if the content of the lock changes within
    `WATCHED_INTERVALS` intervals. Times are not compared, because the clocks of two
    machines may differ.
    """
    if owner.get("machine") == _pid_namespace_id():
        return owner.get("started") != _start_time(owner.get("pid", 0))
    log(
        f"{path} belongs to {_describe_owner(owner)}; waiting "
        f"{WATCHED_INTERVALS * INTERVAL:g} s for a heartbeat"
    )
    end = time.monotonic() + WATCHED_INTERVALS * INTERVAL
    while time.monotonic() < end:
        time.sleep(INTERVAL / 10)
        if _read_owner(path) != owner:
            return False
    return True


def _acquire(workdir: Path, owner: Owner) -> Path:
    """Create the next lock file and return its path.

    Raises:
      ConfigError: the owner of an existing lock file is alive.
    """
    while True:
        dead = {}
        for path in _lock_files(workdir):
            other = _read_owner(path)
            alive = other is not None and not is_dead(other, path)
            # An alive owner whose file is gone has just ended its run.
            if alive and path.exists():
                raise ConfigError(
                    f"{workdir} is in use by {_describe_owner(other)}.\n"
                    "Wait for that run, or choose another --workdir"
                )
            if not alive and other is not None:
                dead[path] = other
        number = 1 + max([_lock_number(path) for path in dead], default=0)
        path = workdir / f"run-{number}.lock"
        if not _create_exclusively(path, json.dumps(owner)):
            continue  # another run was faster
        if {*_lock_files(workdir)} - {*dead} == {path}:
            break
        # Another run created a file after the files were listed. Each of the two runs
        # deletes its own file and tries again after a different delay.
        path.unlink()
        time.sleep(int(owner["token"], 16) % 100 / 100)
    for stale, other in dead.items():
        log(f"took over {workdir} from {_describe_owner(other)}, which no longer runs")
        stale.unlink(missing_ok=True)
    return path


def _create_exclusively(path: Path, text: str) -> bool:
    """Create a file and return True; return False if it already exists."""
    try:
        if not is_bucket(path):
            with open(path, "x") as file:
                file.write(text)
            return True
        # In a bucket, fsspec's mode "x" creates the file only if it does not exist yet.
        import fsspec

        with fsspec.open(str(path), "xb") as file:
            file.write(text.encode())
    except FileExistsError:
        return False
    except Exception as error:
        if not is_bucket(path):
            raise
        log(
            f"note: the storage of {path} cannot create a file exclusively "
            f"({first_line(error)[:80]}); two runs that start at the same moment would "
            "not notice each other"
        )
        if path.exists():
            return False
        path.write_text(text)
    return True


def _send_heartbeats(path: Path, owner: Owner, released: threading.Event) -> None:
    """Increase the heartbeat count of a lock until the lock is released.

    Ends this process without saving if another run has taken over the workdir, which
    can happen while this process is suspended.
    """
    beats, previous_others = 0, set()
    while not released.wait(INTERVAL):
        beats += 1
        text = json.dumps(owner | {"beats": f"{beats:010d}"})
        with suppress(Exception):  # because buckets cause exceptions of many types
            others = {*_lock_files(path.parent)} - {path}
            # End only if two heartbeats in a row find the same file of another run,
            # because `_acquire` may create a file and delete it again immediately.
            if others & previous_others:
                new_owner = _read_owner(max(others, key=_lock_number)) or {}
                exit_together(
                    ConfigError.exit_code,
                    f"error: {path.parent} was taken over by "
                    f"{_describe_owner(new_owner)} while this process was suspended; "
                    "ending without saving\n",
                )
            previous_others = others
            if is_bucket(path):
                path.write_text(text)
            else:  # overwritten in place, so that no reader finds an incomplete file
                with open(path, "r+") as file:
                    file.write(text)


def _lock_files(workdir: Path) -> list[Path]:
    """Return all lock files of a workdir, in order of their numbers."""
    found = [p for p in workdir.glob("run-*.lock") if re.search(r"-\d+\.", p.name)]
    return sorted(found, key=_lock_number)


def _lock_number(path: Path) -> int:
    return int(re.search(r"run-(\d+)\.", path.name)[1])


def _read_owner(path: Path) -> Owner | None:
    """Return the owner of a lock; {} for a damaged file, None for a deleted file."""
    for _ in range(5):  # because a new file may not have its content yet
        with suppress(OSError, ValueError, TypeError):
            return {**json.loads(path.read_text())}
        if not path.exists():
            return None
        time.sleep(0.05)
    return {}


def _describe_owner(owner: Owner) -> str:
    if "pid" not in owner:
        return "a run whose lock file is damaged"
    return f"process {owner['pid']} on {owner['host']}, started {owner['since']}"


def _pid_namespace_id() -> str:
    """Return a text that identifies the PID namespace of this process.

    It differs between machines, boots of a machine and containers.
    """
    name = platform.node()
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        name += f" {file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    return name


def _start_time(pid: int) -> str:
    """Return the start time of a process on this machine, or "" if it has ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]  # Z: ended, not yet reaped
    except OSError:
        if os.path.isdir("/proc/self"):
            return ""
    command = ["ps", "-o", "lstart=", "-p", str(pid)]  # macOS
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
