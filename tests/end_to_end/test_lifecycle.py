"""Tests of a run in one process: intervals, heartbeats, signals, exit codes."""

import signal
from contextlib import contextmanager
from types import SimpleNamespace

import mini_runs
import numpy as np
import pytest

from hivit_jax import evaluate, inputs, main, train
from hivit_jax.errors import DataError, Interrupted

STEPS = 11  # four epochs of 65 images, 24 per step, are 10.8 steps, rounded


EVAL_BATCHES = 3  # The 64 held-out images are three batches of 24.


RUN = dict(
    batch_size=24,
    data__train_examples=65,
    total_steps=0,
    total_epochs=4,
    log_every=4,
    eval_every=5,
    checkpoint_every=7,
    keep_checkpoints=1,
    stall_timeout=123,
    peer_timeout=45,
    model__embed_dim=32,
    model__depths="(1,1,1)",
)


COMMAND = mini_runs.arguments(**RUN)


# Every fourth step is logged, and every evaluated or saved step.
LOGGED = [4, 5, 7, 8, 10, 11]


EVALUATED = [5, 10, 11]


pytestmark = [
    pytest.mark.usefixtures("minimal_output", "single_device"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def watch():
    """Replace the watchdog, which would end the tests, with a heartbeat counter.

    Attributes:
      limit: argument of the watchdog.
      beats: number of heartbeats since the watchdog started.
      signals: {number of a heartbeat: signal to raise}.
    """
    watch = SimpleNamespace(limit=None, beats=0, signals={})

    def heartbeat():
        watch.beats += 1
        if signal_number := watch.signals.pop(watch.beats, None):
            signal.raise_signal(signal_number)

    @contextmanager
    def watchdog(stall_timeout):
        watch.limit, watch.beats = stall_timeout, 0
        yield SimpleNamespace(heartbeat=heartbeat)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "Watchdog", watchdog)
        yield watch


@pytest.fixture(autouse=True)
def signals_must_be_caught():
    """Fail the test if the command does not catch a signal."""

    def not_caught(signal_number, frame):
        raise AssertionError(f"{signal.Signals(signal_number).name} was not caught")

    signal_numbers = signal.SIGTERM, signal.SIGINT
    before = {
        signal_number: signal.signal(signal_number, not_caught)
        for signal_number in signal_numbers
    }
    yield
    for signal_number, handler in before.items():
        signal.signal(signal_number, handler)


@pytest.fixture(scope="module")
def finished(watch, tmp_path_factory):
    """Return (workdir, number of heartbeats) of a finished run."""
    workdir = tmp_path_factory.mktemp("finished")
    assert main.main([*COMMAND, f"--workdir={workdir}"]) == 0
    return workdir, watch.beats


def test_each_interval_key_is_followed(finished):
    """The last step is also logged, evaluated and saved."""
    workdir, _ = finished
    assert list(mini_runs.logged(workdir)) == LOGGED
    assert list(mini_runs.logged(workdir, "eval/loss")) == EVALUATED
    assert mini_runs.saved_steps(workdir) == [11]


def test_each_step_and_batch_sends_a_heartbeat(finished, watch, tmp_path, capsys):
    """Training, eval and knn send a heartbeat after each step and each batch."""
    workdir, beats = finished
    assert beats == STEPS + len(EVALUATED) * EVAL_BATCHES
    assert watch.limit == 123

    capsys.readouterr()
    assert main.main([*COMMAND, f"--workdir={workdir}", "--mode=eval"]) == 0
    assert watch.beats == EVAL_BATCHES
    loss = mini_runs.logged(workdir, "eval/loss")[STEPS]
    assert f"step 11  eval  loss {loss:.4f}" in capsys.readouterr().out

    knn = ["--mode=knn", f"--config.init_from={workdir}"]
    assert main.main([*classifier(), *knn]) == 0
    # 65 training images are three batches of 24.
    assert watch.beats == 3 + EVAL_BATCHES
    assert "(64 images)" in capsys.readouterr().out


def classifier():
    """Return the flags of a classifier with the encoder sizes of `RUN`."""
    encoder_keys = ("model.embed_dim", "model.depths", "model.num_heads", "model.dtype")
    flags = [f for f in COMMAND[1:] if "decoder" not in f and "total" not in f]
    assert all(any(key in flag for flag in flags) for key in encoder_keys)
    return ["--config=finetune", *flags, "--config.model.num_classes=10"]


def poisoned(batches, steps_done, nan_step):
    """Yield the batches after `steps_done` steps; the weights of `nan_step` are NaN."""
    for step, batch in enumerate(batches, steps_done + 1):
        weight = batch["weight"] * np.float32(np.nan if step == nan_step else 1)
        yield batch | {"weight": weight}


def test_interrupted_and_diverging_run_resumes_bit_identically(
    finished, watch, tmp_path, capsys, monkeypatch
):
    """The run is interrupted twice and diverges once."""
    command = [*COMMAND, f"--workdir={tmp_path}"]
    steps = []
    with pytest.raises(Interrupted, match=f"^why: step 0 of {STEPS} is saved in "):
        train.train(mini_runs.mae(**RUN), tmp_path, lambda s: steps.append(s) or "why")
    assert steps == [0]
    assert mini_runs.saved_steps(tmp_path) == [0]
    assert mini_runs.logged(tmp_path) == {}

    # The heartbeat after five training steps and two evaluation batches
    watch.signals[5 + 2] = signal.SIGTERM
    assert main.main(command) == 75
    out, err = capsys.readouterr()
    assert "resuming at step 0 from" in out
    assert "SIGTERM: finishing the step and saving; a second signal kills" in out
    assert f"SIGTERM: step 6 of {STEPS} is saved in {tmp_path}; run" in err
    assert not watch.signals
    # The first signal sets both handlers to the system's default, so that a second
    # signal kills the process.
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        assert signal.getsignal(signal_number) is signal.SIG_DFL
    assert mini_runs.saved_steps(tmp_path) == [5, 6]  # step 5 is the best
    assert list(mini_runs.logged(tmp_path)) == [4, 5, 6]
    assert watch.beats == 6 + EVAL_BATCHES

    train_batches = inputs.train_batches
    with monkeypatch.context() as patch:
        patch.setattr(
            inputs,
            "train_batches",
            lambda config, first, last: poisoned(
                train_batches(config, first, last), first, 9
            ),
        )
        assert main.main(command) == 3
    err = capsys.readouterr().err
    assert err.startswith("error: step 9: loss nan")
    assert mini_runs.saved_steps(tmp_path) == [5, 8]
    assert list(mini_runs.logged(tmp_path)) == [4, 5, 6, 7, 8]

    assert main.main(command) == 0
    assert "resuming at step 8 from" in capsys.readouterr().out
    workdir, _ = finished
    for name in ("loss", "gradient_norm", "learning_rate", "eval/loss"):
        values = mini_runs.logged(tmp_path, name)
        values.pop(6, None)  # logged only here, because this run stopped there
        assert values == mini_runs.logged(workdir, name)
    assert mini_runs.saved_steps(tmp_path) == [STEPS]
    resumed, expected = (mini_runs.saved_arrays(w, STEPS) for w in (tmp_path, workdir))
    mini_runs.assert_identical(resumed, expected)


def test_resumed_run_repeats_failed_evaluations(finished, watch, tmp_path, monkeypatch):
    """Metrics contain the result of each evaluation once."""
    command, metrics = [*COMMAND, f"--workdir={tmp_path}"], tmp_path / "metrics.jsonl"
    # True: the evaluation succeeds.
    original_evaluate, outcomes = evaluate.evaluate, [True, False, True, False]

    def failing(*arguments):
        if outcomes and not outcomes.pop(0):
            raise DataError("cannot access the images")
        return original_evaluate(*arguments)

    monkeypatch.setattr(evaluate, "evaluate", failing)
    # The evaluated step 5 is saved as the best.
    for step, recorded in ((10, [5]), (STEPS, [5, 10])):
        assert main.main(command) == 4
        assert mini_runs.saved_steps(tmp_path) == [5, step]
        assert list(mini_runs.logged(tmp_path, "eval/loss")) == recorded
    assert not outcomes
    expected = mini_runs.logged(finished[0], "eval/loss")
    for lost_bytes in (0, 40):  # a kill may also truncate the last line
        metrics.write_bytes(metrics.read_bytes()[: -lost_bytes or None])
        assert main.main(command) == 0
        assert mini_runs.logged(tmp_path, "eval/loss") == expected
    files = {path: path.read_bytes() for path in tmp_path.glob("*.json*")}
    assert main.main(command) == 0
    assert {path: path.read_bytes() for path in tmp_path.glob("*.json*")} == files
    resumed, uninterrupted = (
        mini_runs.saved_arrays(w, STEPS) for w in (tmp_path, finished[0])
    )
    mini_runs.assert_identical(resumed, uninterrupted)


@pytest.mark.parametrize("mode", ["train", "describe", "knn"])
def test_missing_data_directory_exits_with_code_2(watch, tmp_path, capsys, mode):
    flags = ["--config.data.name=folder", "--config.data.train_examples=0"]
    flags += [f"--workdir={tmp_path}/run", f"--mode={mode}"]
    for directory, error in (
        (f"{tmp_path}/none", "none' does not exist; set --config.data.dir=PATH"),
        ("", "data.name='folder' requires data.dir=DIR"),
    ):
        command = [*COMMAND, *flags, f"--config.data.dir={directory}"]
        assert main.main(command) == 2
        mini_runs.check_message(capsys.readouterr().err, [error])
