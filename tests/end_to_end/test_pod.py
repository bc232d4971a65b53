"""Tests of runs of several processes: equal results, coordinated exits, no hanging."""

import os
import re
import signal
import time

import mini_runs
import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.processes]

STEPS = 24


TIMEOUT = 900  # seconds; the machine may be busy


RUN = dict(
    total_steps=STEPS,
    checkpoint_every=1000,
    peer_timeout=10,
    optimizer__ema_decay=0.9,
    mesh__data=-1,
    data__eval_split="none",
    model__depths="(1,1,1)",  # compiles faster
)


# For runs in which one process fails. The failing process waits 2 x peer_timeout for
# the other process, see `exit_together`. stall_timeout is longer, so that the watchdog
# does not end the other process first.
ONE_FAILS = RUN | dict(stall_timeout=60)


class Pod:
    """Run with `count` processes on loopback.

    Args:
      environment: additional environment variables.
      flags: one list for all processes, or one list for each process.
    """

    def __init__(self, workdir, count, environment, *flags):
        address = mini_runs.free_address()
        workdir.mkdir(exist_ok=True)
        self.logs = [workdir.parent / f"{workdir.name}.{i}.log" for i in range(count)]
        flags = flags * count if len(flags) == 1 else flags
        pod_flags = [f"--coordinator_address={address}", f"--num_processes={count}"]
        self.processes = [
            mini_runs.start_process(
                *("-u", mini_runs.MINIMAL_MAIN, f"--workdir={workdir}", *flags[index]),
                *([*pod_flags, f"--process_id={index}"] if count > 1 else []),
                log=self.logs[index],
                **environment,
            )
            for index in range(count)
        ]

    def wait_for_step(self, step):
        """Wait until process 0 has logged this step or a later one."""
        for _ in range(20 * TIMEOUT):
            found = re.findall(r"step (\d+)/", self.logs[0].read_text())
            if found and int(found[-1]) >= step:
                return
            assert self.processes[0].poll() is None, self.wait_for_stderr()
            time.sleep(0.05)
        raise AssertionError(f"step {step} was not logged within {TIMEOUT} s")

    def wait_for_stderr(self):
        """Wait until all processes end; return the stderr of each."""
        return [process.communicate(timeout=TIMEOUT)[1] for process in self.processes]

    def exit_codes(self):
        return [process.returncode for process in self.processes]

    def first_stdout(self):
        return self.logs[0].read_text()


@pytest.fixture(scope="module")
def single_process_run(tmp_path_factory, without_tensorboard):
    """Return the workdir of an uninterrupted run in one process."""
    workdir = tmp_path_factory.mktemp("single") / "run"
    pod = Pod(workdir, 1, without_tensorboard, mini_runs.arguments(**RUN))
    errors = pod.wait_for_stderr()
    assert pod.exit_codes() == [0], errors
    return workdir


def test_a_signal_stops_all_processes_and_one_resumes(
    single_process_run, without_tensorboard, tmp_path
):
    """SIGINT to one of two processes stops both; a single process resumes the run."""
    run, flags = tmp_path / "run", mini_runs.arguments(**RUN)
    pod = Pod(run, 2, without_tensorboard, flags)
    pod.wait_for_step(2)
    pod.processes[1].send_signal(signal.SIGINT)
    errors = pod.wait_for_stderr()
    assert pod.exit_codes() == [75] * 2, errors
    (saved,) = mini_runs.saved_steps(run)
    assert 2 <= saved < STEPS
    # Runs of several processes convert SIGINT to SIGTERM, see distributed/signals.py.
    for error in errors:
        assert f"SIGTERM to one of the processes: step {saved} of {STEPS}" in error

    pod = Pod(run, 1, without_tensorboard, flags)
    errors = pod.wait_for_stderr()
    assert pod.exit_codes() == [0], errors
    assert f"resuming at step {saved} from" in pod.first_stdout()
    losses = mini_runs.logged(run)
    expected_losses = mini_runs.logged(single_process_run)
    assert list(losses) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(
        list(losses.values()), list(expected_losses.values()), rtol=1e-5
    )
    arrays = mini_runs.saved_arrays(run, STEPS)
    expected_arrays = mini_runs.saved_arrays(single_process_run, STEPS)
    for item in ("params", "ema"):
        for name, array in arrays[item].items():
            difference = np.abs(array - expected_arrays[item][name])
            # Key biases are not compared. Their exact gradient is zero, and Adam scales
            # up the rounding errors of the computed gradient.
            if name.endswith("qkv/bias"):
                difference = difference[[0, 2]]
            assert difference.max() < 1e-4, name


@pytest.mark.extras
@pytest.mark.parametrize(("lost", "signal_name"), [(1, "SIGSTOP"), (0, "SIGKILL")])
def test_a_lost_process_ends_the_others(
    lost, signal_name, without_tensorboard, tmp_path
):
    """JAX aborts the other process; the last checkpoint is complete."""
    flags = mini_runs.arguments(**RUN | dict(total_steps=100_000, checkpoint_every=5))
    pod = Pod(tmp_path / "run", 2, without_tensorboard, flags)
    pod.wait_for_step(8)
    while (
        not mini_runs.saved_steps(tmp_path / "run") and pod.processes[0].poll() is None
    ):
        time.sleep(0.1)
    os.kill(pod.processes[lost].pid, signal.Signals[signal_name])
    error = pod.processes[1 - lost].communicate(timeout=TIMEOUT)[1]
    pod.processes[lost].kill()
    assert pod.processes[1 - lost].returncode == -signal.SIGABRT, error
    assert "another task died" in error
    assert "Traceback" not in error
    steps = mini_runs.saved_steps(tmp_path / "run")
    assert steps
    assert all(step % 5 == 0 for step in steps)


@pytest.mark.extras
def test_divergence_ends_all_processes_with_code_3(without_tensorboard, tmp_path):
    """Both processes exit with 3; JAX does not abort the process that exits last."""
    flags = mini_runs.arguments(**RUN, optimizer__base_learning_rate=1e30)
    pod = Pod(tmp_path / "run", 2, without_tensorboard, flags)
    errors = pod.wait_for_stderr()
    assert pod.exit_codes() == [3] * 2, errors
    assert all("expected finite numbers" in error for error in errors)
    assert mini_runs.saved_steps(tmp_path / "run")


EXIT_SCRIPT = """
import sys, time
from hivit_jax import main, train
from hivit_jax.distributed.processes import all_processes
from hivit_jax.errors import CheckpointError, DataError, DivergedError

def diverge_late():
    time.sleep(12 * INDEX)  # process 1: longer than peer_timeout
    raise DivergedError("diverged")

def raise_data_error():
    raise DataError("no image")

def raise_checkpoint_error():
    raise CheckpointError("no checkpoint")

def hang():
    time.sleep(1000)

def fail():
    raise ValueError("a bug")

def wait():
    all_processes(True)

def train_together(*_):
    # The first collective connects the processes and fails after a timeout. Without
    # this call, the collective in `wait`, which must wait forever, would be the first.
    all_processes(True)
    ACTION()

train.train = train_together
sys.exit(main.main())
"""


@pytest.mark.parametrize(
    ("actions", "codes", "messages"),
    [
        (
            ("diverge_late", "diverge_late"),
            (3, 3),
            ("error: diverged", "error: diverged"),
        ),
        pytest.param(
            *(("raise_data_error",) * 2, (4, 4), ("error: no image",) * 2),
            marks=pytest.mark.extras,
        ),
        pytest.param(
            *(("raise_checkpoint_error",) * 2, (5, 5), ("error: no checkpoint",) * 2),
            marks=pytest.mark.extras,
        ),
        (("wait", "hang"), (75, 75), ("in all_processes", "in hang")),
        (("wait", "fail"), (-signal.SIGABRT, 1), ("task died", "Error: a bug")),
        (("fail", "wait"), (1, -signal.SIGABRT), ("Error: a bug", "task died")),
    ],
)
def test_two_processes_exit_with_the_documented_codes(
    actions, codes, messages, without_tensorboard, tmp_path
):
    """The processes end because of errors, stalls and crashes."""
    address = mini_runs.free_address()
    processes = [
        mini_runs.start_process(
            "-c",
            EXIT_SCRIPT.replace("INDEX", str(index)).replace("ACTION", action),
            *mini_runs.arguments(**ONE_FAILS),
            *(f"--workdir={tmp_path}", f"--coordinator_address={address}"),
            *("--num_processes=2", f"--process_id={index}"),
            **without_tensorboard,
        )
        for index, action in enumerate(actions)
    ]
    errors = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
    assert tuple(process.returncode for process in processes) == codes, errors
    for error, message in zip(errors, messages, strict=True):
        assert message in error


BAD_LABEL_SCRIPT = """
import sys
from hivit_jax import main, train
from hivit_jax.errors import ProcessDataError

def batches_of(source, mesh, prefetch_to_device=train.prefetch_to_device):
    for batch_index, batch in enumerate(prefetch_to_device(source, mesh)):
        if batch_index == 7:
            raise ProcessDataError("label 10")
        yield batch

train.prefetch_to_device = batches_of
sys.exit(main.main())
"""


@pytest.mark.extras
def test_data_error_of_one_process_ends_both(without_tensorboard, tmp_path):
    """The failing process prints its error immediately; nothing is saved."""
    address = mini_runs.free_address()
    options = ONE_FAILS | dict(stall_timeout=600)
    flags = [*mini_runs.arguments(**options), f"--workdir={tmp_path}/run"]
    pod_flags = [f"--coordinator_address={address}", "--num_processes=2"]
    processes = [
        mini_runs.start_process(
            *script, *flags, *pod_flags, f"--process_id={i}", **without_tensorboard
        )
        for i, script in enumerate([("-m", "hivit_jax.main"), ("-c", BAD_LABEL_SCRIPT)])
    ]
    errors = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert codes == [-signal.SIGABRT, 4], errors
    assert "error: label 10" in errors[1]
    assert mini_runs.saved_steps(tmp_path / "run") == []


def test_processes_with_different_configs_are_refused(without_tensorboard, tmp_path):
    flags = [mini_runs.arguments(**RUN, seed=seed) for seed in (0, 1)]
    pod = Pod(tmp_path / "run", 2, without_tensorboard, *flags)
    errors = pod.wait_for_stderr()
    assert pod.exit_codes() == [2, 2], errors
    for index, error in enumerate(errors):
        assert "processes differ in the config: expected the value of proc" in error
        assert "found another value on process 1 of 2." in error
        assert f"Process {index} has" in error
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


DIFFERING_SCRIPT = """
import os, sys
from hivit_jax import config, errors, main, train
from hivit_jax.distributed import processes

address, index, directory, config_flag, *flags = sys.argv[1:]
processes.connect(address, 2, int(index), 60.0)
os.chdir(directory)
flags = [*flags, "--config.data.name=folder", "--config.data.train_examples=0"]
try:
    path = config_flag.removeprefix("--config=")
    train.train(config.load(path, [*flags, "--config.data.dir=differing"]), "run")
except errors.ConfigError as error:
    print(error, file=sys.stderr)
sys.exit(main.main([config_flag, *flags, "--config.data.dir=same", "--workdir=run"]))
"""


def test_processes_with_different_files_are_refused(without_tensorboard, tmp_path):
    """Two runs fail: first because datasets differ, then because checkpoints differ."""
    address = mini_runs.free_address()
    for index in range(2):
        for dataset, count in (("differing", 20 + index), ("same", 20)):
            for split in ("train", "val"):
                directory = tmp_path / str(index) / dataset / split / "class"
                directory.mkdir(parents=True)
                for image in range(count if split == "train" else 2):
                    Image.new("RGB", (70, 70)).save(directory / f"{image}.png")
        (tmp_path / str(index) / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "1" / "run" / "checkpoints" / "7" / "params").mkdir(parents=True)
    processes = [
        mini_runs.start_process(
            *("-c", DIFFERING_SCRIPT, address, index, tmp_path / str(index)),
            *mini_runs.arguments(**RUN),
            **without_tensorboard,
            XDG_CACHE_HOME=tmp_path / "cache",
        )
        for index in range(2)
    ]
    try:
        errors = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
    finally:
        for process in processes:  # one process may still wait for the other
            process.kill()
    assert [process.returncode for process in processes] == [2, 2], errors
    difference = (
        "expected the value of process 0, found another value on process 1 of 2."
    )
    for index, error in enumerate(errors):
        dataset_error, checkpoint_error = error.split("error: ")
        message = f"{difference}\nProcess {index} has {20 + index}"
        assert f"the dataset's size: {message}" in dataset_error
        found = "[7]" if index else "[]"
        message = f"{difference}\nProcess {index} has {found}"
        assert f"the checkpoints: {message}" in checkpoint_error
