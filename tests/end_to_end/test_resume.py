"""Tests that killed and interrupted processes resume bit-identically."""

import re
import signal
import time

import mini_runs
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.processes]

STEPS, CHECKPOINT_EVERY = 44, 15


@pytest.fixture(scope="module")
def environment(without_tensorboard):
    """Return environment variables that disable TensorBoard and the session's cache.

    The runs use the compilation cache of `options` instead.
    """
    return without_tensorboard | {"JAX_COMPILATION_CACHE_DIR": ""}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Return overrides with a new compilation cache for the tests of this file."""
    return dict(
        total_steps=STEPS,
        checkpoint_every=CHECKPOINT_EVERY,
        optimizer__ema_decay=0.9,
        optimizer__clip_norm=1.0,
        compilation_cache=tmp_path_factory.mktemp("programs"),
    )


def command(workdir, source, **overrides):
    """Return the arguments of a run for `mini_runs.start_process`."""
    flags = mini_runs.arguments(source, **overrides)
    return ["-m", "hivit_jax.main", *flags, f"--workdir={workdir}"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, environment):
    """Return a function from a source to (workdir, stdout) of an uninterrupted run."""
    finished = {}

    def run(source, **overrides):
        if source not in finished:
            workdir = tmp_path_factory.mktemp(source)
            code, out, err = mini_runs.run_process(
                *command(workdir, source, **overrides), **environment
            )
            assert code == 0, err
            finished[source] = workdir, out
        return finished[source]

    return run


def interrupt(workdir, source, signal_number, after, environment, **overrides):
    """Start or resume a run, and send it a signal.

    Before the signal, the run must have logged `after` more steps, and the checkpoints
    that are due from step 1 to step `after` - 1 of the whole run must be saved.

    Returns:
      (exit code, stdout, stderr).
    """
    log = workdir.with_suffix(".log")
    steps_before = max(mini_runs.logged(workdir), default=0) if workdir.exists() else 0
    process = mini_runs.start_process(
        *command(workdir, source, **overrides), log=log, **environment
    )
    due_steps = [s for s in range(1, after) if s % overrides["checkpoint_every"] == 0]
    while not (
        workdir.exists()
        and max(mini_runs.logged(workdir), default=0) >= steps_before + after
        and set(due_steps) <= set(mini_runs.saved_steps(workdir))
    ):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(signal_number)
    _, err = process.communicate()
    return process.returncode, log.read_text(), err


def check_same_run(workdir, expected):
    """Check that last states and losses are identical and each step is logged once."""
    assert (
        mini_runs.saved_steps(workdir)[-1]
        == mini_runs.saved_steps(expected)[-1]
        == STEPS
    )
    state = mini_runs.saved_arrays(workdir, STEPS)
    assert int(state["optimizer"]["step"]) == STEPS
    mini_runs.assert_identical(state, mini_runs.saved_arrays(expected, STEPS))
    losses = mini_runs.logged(workdir)
    assert list(losses) == list(range(1, STEPS + 1))
    assert losses == mini_runs.logged(expected)
    for name in ("gradient_norm", "eval/loss"):
        assert mini_runs.logged(workdir, name) == mini_runs.logged(expected, name)


def test_interrupted_and_killed_run_resumes_bit_identically(
    uninterrupted, options, environment, tmp_path
):
    """SIGTERM saves one checkpoint, SIGKILL follows, and the third start finishes.

    test_imagenet.py kills runs that read files.
    """
    expected, _ = uninterrupted("synthetic", **options)
    assert "ema" in mini_runs.saved_arrays(expected, STEPS)
    workdir = tmp_path / "run"
    arguments = workdir, "synthetic"
    code, _, err = interrupt(*arguments, signal.SIGTERM, 5, environment, **options)
    assert code == 75
    message = rf"SIGTERM: step (\d+) of {STEPS} is saved in {workdir}; run"
    step = int(re.search(message, err)[1])
    assert "Traceback" not in err
    assert mini_runs.saved_steps(workdir) == [step]
    assert max(mini_runs.logged(workdir)) == step
    step_array = mini_runs.saved_arrays(workdir, step)["optimizer"]["step"]
    assert int(step_array) == step < CHECKPOINT_EVERY

    code, out, _ = interrupt(
        *arguments, signal.SIGKILL, CHECKPOINT_EVERY + 5, environment, **options
    )
    assert code == -signal.SIGKILL
    assert f"resuming at step {step} from" in out
    saved = mini_runs.saved_steps(workdir)[-1]
    assert CHECKPOINT_EVERY <= saved <= max(mini_runs.logged(workdir)) < STEPS

    code, out, err = mini_runs.run_process(
        *command(*arguments, **options), **environment
    )
    assert code == 0, err
    assert f"resuming at step {saved} from" in out
    assert re.findall(r"^step (\d+)/", out, re.M)[0] == str(saved + 1)
    assert "read from the cache in" in out
    assert list(options["compilation_cache"].iterdir())
    assert not (workdir / "compiled").exists()
    check_same_run(workdir, expected)
    assert (workdir / "figures" / f"reconstruction_{STEPS:07d}.png").is_file()


def test_finished_run_only_evaluates(uninterrupted, options, environment):
    workdir, first_out = uninterrupted("synthetic", **options)
    losses, state = (
        mini_runs.logged(workdir),
        mini_runs.saved_arrays(workdir, STEPS),
    )
    arguments = command(workdir, "synthetic", **options)
    code, out, err = mini_runs.run_process(*arguments, **environment)
    assert code == 0, err
    assert not re.search(rf"^step \d+/{STEPS}|compiling the train", out, re.M)
    assert f"the run in {workdir} is finished; another --workdir starts" in out
    evaluation = [line for line in first_out.splitlines() if "eval  loss" in line][-1]
    assert evaluation in out.splitlines()
    assert mini_runs.logged(workdir) == losses
    mini_runs.assert_identical(mini_runs.saved_arrays(workdir, STEPS), state)
