"""Tests of errors about full memory and full disks."""

import errno
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from hivit_jax import errors, resources
from hivit_jax.errors import ResourceError

# (message of JAX or XLA, text that our message must contain: the needed memory, or part
# of the original message if it states no amount)
OUT_OF_MEMORY = [
    ("RESOURCE_EXHAUSTED: Out of memory allocating 549755813888 bytes.", "512.0 GiB"),
    (
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 25.50GiB.\n[x]",
        "25.5 GiB",
    ),
    (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
        "memory space hbm. Used 20.93G of 15.48G hbm. Exceeded hbm capacity by 5.45G.",
        "20.9 GiB",
    ),
    ("RESOURCE_EXHAUSTED: Attempting to reserve 512.00M at the bottom", "0.5 GiB"),
    ("INTERNAL: Failed to launch: CUDA_ERROR_OUT_OF_MEMORY: out of memory", "INTERNAL"),
]


def code_and_message(error, capsys):
    """Return exit code and message of a command that fails with an error."""

    def fail():
        raise error

    code = errors.run_command(fail)
    err = capsys.readouterr().err
    assert 1 <= len(err.splitlines()) <= 3
    return code, err


@pytest.mark.parametrize(("text", "expected"), OUT_OF_MEMORY)
def test_out_of_memory_error_suggests_keys(text, expected, capsys):
    """The error contains the available memory, and keys that reduce memory.

    JAX raises some of these errors at compile time, others at run time.
    """
    code, err = code_and_message(jax.errors.JaxRuntimeError(text), capsys)
    assert code == 2
    assert err.startswith("error: out of memory: ")
    assert expected in err
    assert "GiB for all its processes" in err
    for key in ("batch_size", "optimizer.accumulate_steps", "model.remat"):
        assert key in err


def test_host_out_of_memory_error_contains_the_requested_memory(capsys):
    try:
        np.empty(2**50)
    except MemoryError as error:
        code, err = code_and_message(error, capsys)
    assert code == 2
    assert "out of memory: 8,388,608.0 GiB requested" in err


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/"),
        OSError(errno.EDQUOT, "Disk quota exceeded", "/tmp/x/metrics.jsonl"),
        ValueError("RESOURCE_EXHAUSTED: write: No space left on device\nmore"),
    ],
)
def test_full_disk_error_contains_the_free_space(error, capsys):
    code, err = code_and_message(error, capsys)
    assert code == 2
    assert "the disk is full (" in err
    assert "MiB are free" in err
    assert "keep_checkpoints" in err


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        OSError(errno.EACCES, "Permission denied", "/"),
        jax.errors.JaxRuntimeError("INVALID_ARGUMENT: x"),
    ],
)
def test_other_errors_are_unchanged(error):
    with pytest.raises(type(error)) as raised, resources.raise_resource_errors():
        raise error
    assert raised.value is error


def test_program_larger_than_a_device_is_an_error(monkeypatch):
    """If the backend does not report its memory, `check_memory` accepts any program."""
    resources.check_memory(2**60)  # XLA:CPU reports no memory
    device = SimpleNamespace(
        device_kind="chip", memory_stats=lambda: {"bytes_limit": 2 * 2**30}
    )
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    resources.check_memory(2 * 2**30)
    with pytest.raises(ResourceError) as error:
        resources.check_memory(3 * 2**30)
    text = str(error.value)
    assert "needs 3.0 GiB on each device; each device (chip) has 2.0 GiB" in text
    assert "optimizer.accumulate_steps" in text


def test_checkpoint_must_fit_on_the_disk(tmp_path, monkeypatch):
    """`check_disk` compares the bytes of all arrays with the disk of the workdir.

    The workdir need not exist. Buckets report no free space.
    """
    state = {
        "a": jax.ShapeDtypeStruct((1000, 3), np.float32),
        "b": np.zeros(500, np.float16),
    }
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    free = 13_000  # 3000 float32 and 500 float16 numbers
    resources.check_disk(tmp_path / "new" / "run", state)
    free = 12_999
    with pytest.raises(ResourceError, match="a checkpoint needs .* are free"):
        resources.check_disk(tmp_path, state)
    resources.check_disk("gs://bucket/run", state)
