"""Several processes as one run: the same numbers, one end for all, and no hanging."""

import os
import re
import signal
import socket
import time

import numpy as np
import pytest
import recipes

from hivit_jax import hosts
from hivit_jax.errors import ConfigError

STEPS = 40
RUN = dict(
    total_steps=STEPS,
    checkpoint_every=1000,
    peer_timeout=4,
    optimizer__ema_decay=0.9,
    mesh__data=-1,
)


def free_address():
    """HOST:PORT that no other process uses."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


class Pod:
    """A run as `count` processes on loopback.

    Args:
      flags: one list for all, or one for each process.
    """

    def __init__(self, workdir, count, environment, *flags):
        address = free_address()
        workdir.mkdir(exist_ok=True)
        self.logs = [workdir.parent / f"{workdir.name}.{i}.log" for i in range(count)]
        flags = flags * count if len(flags) == 1 else flags
        several = [f"--coordinator_address={address}", f"--num_processes={count}"]
        self.processes = [
            recipes.start(
                *("-u", "-m", "hivit_jax.main", f"--workdir={workdir}", *flags[index]),
                *([*several, f"--process_id={index}"] if count > 1 else []),
                log=self.logs[index],
                **environment,
            )
            for index in range(count)
        ]

    def wait_for_step(self, step):
        """Until process 0 has told of this many steps."""
        for _ in range(4800):
            found = re.findall(r"step (\d+)/", self.logs[0].read_text())
            if found and int(found[-1]) >= step:
                return
            assert self.processes[0].poll() is None, self.errors()
            time.sleep(0.05)
        raise AssertionError("no steps")

    def errors(self):
        """What every process said on stderr; waits for its end."""
        return [process.communicate(timeout=240)[1] for process in self.processes]

    def codes(self):
        return [process.returncode for process in self.processes]

    def output(self):
        return self.logs[0].read_text()


@pytest.fixture(scope="module")
def alone(tmp_path_factory, environment):
    """Workdir of a run in one process that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    pod = Pod(workdir, 1, environment, recipes.arguments(**RUN))
    errors = pod.errors()
    assert pod.codes() == [0], errors
    return workdir


def test_a_signal_stops_all_and_another_number_goes_on(alone, environment, tmp_path):
    """Two processes, Ctrl-C to one; four, SIGTERM to one; and one, to the end of one
    that nothing disturbed.
    """
    run, flags = tmp_path / "run", recipes.arguments(**RUN)
    stopped = []
    for count, number in ((2, signal.SIGINT), (4, signal.SIGTERM)):
        pod = Pod(run, count, environment, flags)
        pod.wait_for_step(max(recipes.saved(run), default=0) + 2)
        pod.processes[1].send_signal(number)
        errors = pod.errors()
        assert pod.codes() == [75] * count, errors
        *before, saved = recipes.saved(run)
        assert before == stopped
        assert len(stopped) * 2 + 2 <= saved < STEPS
        for error in errors:
            assert f"SIGTERM to one of the processes: step {saved} of {STEPS}" in error
        for step in before:
            assert f"going on at step {step} from" in pod.output()
        stopped.append(saved)

    pod = Pod(run, 1, environment, flags)
    errors = pod.errors()
    assert pod.codes() == [0], errors
    assert f"going on at step {stopped[-1]} from" in pod.output()
    expected, found = recipes.lines(alone), recipes.lines(run)
    assert list(found) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
    ours, theirs = recipes.stored(run, STEPS), recipes.stored(alone, STEPS)
    for item in ("params", "ema"):
        for name, array in ours[item].items():
            difference = np.abs(array - theirs[item][name])
            if name.endswith("qkv/bias"):  # Adam moves keys' biases by rounding alone
                difference = difference[[0, 2]]
            assert difference.max() < 1e-4, name


@pytest.mark.parametrize(("lost", "how"), [(1, "SIGSTOP"), (0, "SIGKILL")])
def test_a_lost_process_ends_the_others(lost, how, environment, tmp_path):
    """By name and in time; the checkpoint before it is whole."""
    flags = recipes.arguments(**RUN | dict(total_steps=100_000, checkpoint_every=5))
    pod = Pod(tmp_path / "run", 2, environment, flags)
    pod.wait_for_step(8)
    os.kill(pod.processes[lost].pid, signal.Signals[how])
    began = time.monotonic()
    error = pod.processes[1 - lost].communicate(timeout=240)[1]
    assert time.monotonic() - began < 60
    pod.processes[lost].kill()
    assert pod.processes[1 - lost].returncode == 75, error
    assert f"process {lost} of 2 gives no sign of life, for" in error
    assert "(peer_timeout=4)" in error
    steps = recipes.saved(tmp_path / "run")
    assert steps
    assert all(step % 5 == 0 for step in steps)


def test_processes_that_do_not_agree(environment, tmp_path):
    flags = [recipes.arguments(**RUN, seed=seed) for seed in (0, 1)]
    pod = Pod(tmp_path / "run", 2, environment, *flags)
    errors = pod.errors()
    assert pod.codes() == [2, 2], errors
    for index, error in enumerate(errors):
        assert "processes do not agree on the config: 1 of 2 differ from proc" in error
        assert f"Here, on process {index}, it is" in error
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


DIFFERING = """
import os, sys
from hivit_jax import config, errors, hosts, main, train

address, index, directory, path, *flags = sys.argv[1:]
hosts.start(address, 2, int(index), 60.0)
os.chdir(directory)
flags = [*flags, "--config.data.name=folder", "--config.data.train_examples=0"]
try:
    train.train(config.load(path[9:], [*flags, "--config.data.dir=differing"]), "run")
except errors.ConfigError as error:
    print(error, file=sys.stderr)
sys.exit(main.main([path, *flags, "--config.data.dir=same", "--workdir=run"]))
"""


def test_processes_with_other_files(environment, tmp_path):
    """Of the same names, for one command: a dataset, then a workdir's checkpoints."""
    address = free_address()
    for index in range(2):
        for dataset, count in (("differing", 20 + index), ("same", 20)):
            for split in ("train", "val"):
                directory = tmp_path / str(index) / dataset / split / "class"
                directory.mkdir(parents=True)
                for image in range(count if split == "train" else 2):
                    (directory / f"{image}.png").touch()
        (tmp_path / str(index) / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "1" / "run" / "checkpoints" / "7" / "params").mkdir(parents=True)
    processes = [
        recipes.start(
            *("-c", DIFFERING, address, index, tmp_path / str(index)),
            *recipes.arguments(**RUN),
            **environment,
            XDG_CACHE_HOME=tmp_path / "cache",
        )
        for index in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:  # one may wait for the other
            process.kill()
    assert [process.returncode for process in processes] == [2, 2], errors
    differ = "1 of 2 differ from process 0.\nHere, on process"
    for index, error in enumerate(errors):
        of_dataset, of_checkpoints = error.split("error: ")
        assert f"the dataset's size: {differ} {index}, it is {20 + index}" in of_dataset
        found = "[7]" if index else "[]"
        assert f"the checkpoints: {differ} {index}, it is {found}" in of_checkpoints


HANGING = """
import time
from hivit_jax import hosts

def wait_for_the_end_of_time():
    time.sleep(1000)

with hosts.Guard(stall_timeout=1.0, peer_timeout=4.0) as guard:
    for _ in range(4):
        time.sleep(0.5)
        guard.beat()
    print("still here", flush=True)
    wait_for_the_end_of_time()
"""


def test_a_run_that_stands_still_ends_itself():
    code, out, error = recipes.run("-c", HANGING)
    assert code == 75
    assert "still here" in out
    assert "in wait_for_the_end_of_time" in error
    assert "has stood still for" in error
    assert "(stall_timeout=1)" in error


def test_an_error_passes_the_guard():
    with (
        pytest.raises(ConfigError, match="x"),
        hosts.Guard(stall_timeout=60.0, peer_timeout=60.0),
    ):
        raise ConfigError("x")


def test_no_cluster_is_one_process(monkeypatch):
    """Nothing is started where nothing is found; half a cluster is an error."""
    asked = []

    def initialize(*args, **options):
        asked.append((args, options))
        raise ValueError(problem)

    monkeypatch.setattr(hosts.jax.distributed, "initialize", initialize)
    problem = "coordinator_address should be defined."
    hosts.start("", -1, -1, 60.0)
    limit = dict(heartbeat_timeout_seconds=130, shutdown_timeout_seconds=130)
    assert asked == [((), limit)]
    problem = "Number of processes must be defined."
    with pytest.raises(ConfigError, match="cannot start together: Number of processes"):
        hosts.start("", -1, -1, 60.0)
