"""The runtime's service for all processes of a run, in a process of its own.

Process 0 starts it (see `hosts.start`) and says on stdin when to end. Where process 0
is lost, the others' runtime would abort with the service; so it stays until they have
noticed the loss by themselves.
"""

import os
import signal
import socket
import sys
import time

from jaxlib import _jax

GRACE = 1.0  # seconds that the others have to leave, too


def wait_for_port(port: int, seconds: float) -> None:
    """Until the service of a run before, whose process 0 was lost, has ended."""
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_server(("", port)).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise RuntimeError(f"port {port}: {error}") from error
        time.sleep(0.1)


def serve(
    address: str, count: int, heartbeat: int, shutdown: int, outlive: float
) -> None:
    """Serves `count` processes; `outlive`: seconds to stay without process 0."""
    for each in (signal.SIGINT, signal.SIGTERM):  # are for process 0 to act upon
        signal.signal(each, signal.SIG_IGN)
    try:
        wait_for_port(int(address.rsplit(":", 1)[1]), outlive + GRACE)
        service = _jax.get_distributed_runtime_service(
            address, count, heartbeat_timeout=heartbeat, shutdown_timeout=shutdown
        )
    except RuntimeError as error:
        print(str(error).splitlines()[0], flush=True)
        os._exit(1)
    print("ready", flush=True)
    told = sys.stdin.read()  # until process 0 closes it, or is gone
    time.sleep(GRACE if told else outlive)
    service.shutdown()
    os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1], *map(int, sys.argv[2:5]), float(sys.argv[5]))
