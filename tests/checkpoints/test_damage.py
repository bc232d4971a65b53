"""Tests of damaged or unfinished checkpoints, and of checkpoints of another model."""

import random

import jax
import jax.numpy as jnp
import mini_runs
import numpy as np
import pytest
from states import make_state, save_states, state_on_mesh, to_host

from hivit_jax.checkpoints.manager import Checkpoints
from hivit_jax.errors import CheckpointError, ConfigError
from hivit_jax.weights.load import read

# Orbax leaves coroutines behind when it cannot read a file.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("shard_small_arrays"),
]


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """Return {path: content} of a workdir with checkpoints 1 and 2."""
    workdir = tmp_path_factory.mktemp("two")
    save_states(workdir, *(state_on_mesh("data", seed)[0] for seed in (1, 2)))
    return {
        path.relative_to(workdir): path.read_bytes()
        for path in sorted(workdir.rglob("*"))
        if path.is_file()
    }


def write_files(workdir, files):
    """Write {path: content} into a workdir; return the workdir."""
    for path, content in files.items():
        (workdir / path).parent.mkdir(parents=True, exist_ok=True)
        (workdir / path).write_bytes(content)
    return workdir


def damaged_contents(files, count):
    """Yield `count` pairs (path, damaged content) for files of checkpoint 2.

    The content has a flipped bit, is truncated, or is None for a deleted file. An empty
    file stays empty or is deleted.
    """
    rng = random.Random(0)
    paths = [path for path in files if path.parts[:2] == ("checkpoints", "2")]
    weights = [len(files[path]) for path in paths]
    for index in range(count):
        # Large files are more probable for every second choice.
        path = rng.choices(paths, weights if index % 2 else None)[0]
        content = bytearray(files[path])
        kind = index % 5
        if kind < 3 and content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        elif kind == 3:
            content = content[: len(content) // 2]
        yield path, None if kind == 4 else bytes(content)


@pytest.mark.slow
def test_damage_never_changes_restored_arrays(two_steps, tmp_path, capsys):
    """Restoring a damaged step 2 returns its exact arrays, or the arrays of step 1.

    If step 2 is moved to damaged/, the log contains its path. If step 2 looks
    unfinished, it is removed.
    """
    _, target = state_on_mesh("data")
    expected = {seed: to_host(make_state(seed)) for seed in (1, 2)}
    times_restored = {1: 0, 2: 0}
    for index, (path, content) in enumerate(damaged_contents(two_steps, 30)):
        workdir = write_files(tmp_path / str(index), two_steps)
        if content is None:
            (workdir / path).unlink()
        else:
            (workdir / path).write_bytes(content)
        capsys.readouterr()
        step, state = Checkpoints(workdir, 9).restore_newest(target)
        mini_runs.assert_identical(to_host(state), expected[step])
        times_restored[step] += 1
        if step == 1:
            out = capsys.readouterr().out
            if (workdir / "damaged").exists():
                assert "checkpoint 2 was moved to" in out
                assert "checkpoints/2" in out
            assert {p.name for p in (workdir / "checkpoints").iterdir()} == {"1"}
    assert times_restored[1] > 10


@pytest.mark.slow
def test_no_checkpoint_is_moved_if_all_are_damaged(two_steps, tmp_path):
    workdir = write_files(tmp_path, two_steps)
    for path in workdir.rglob("checkpoints/*/*/d/*"):
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"checkpoints/2 is damaged: "):
        Checkpoints(workdir, 9).restore_newest(state_on_mesh("data")[1])
    with pytest.raises(CheckpointError, match=r"checkpoints/1 is damaged: "):
        read(workdir)
    assert {p.name for p in (workdir / "checkpoints").iterdir()} == {"1", "2"}


def test_read_returns_the_newest_intact_checkpoint(two_steps, tmp_path, capsys):
    workdir = write_files(tmp_path, two_steps)
    for path in workdir.rglob("checkpoints/2/ema/d/*"):
        path.unlink()
    checkpoint = read(workdir)
    assert checkpoint.path.endswith("checkpoints/1")
    mini_runs.assert_identical(checkpoint.params, to_host(make_state(1)["ema"]))
    assert "checkpoints/2 is damaged" in capsys.readouterr().out


def test_checkpoint_of_another_model_is_not_damage(two_steps, tmp_path):
    """Restoring another model's checkpoint raises ConfigError and moves no files."""
    workdir = write_files(tmp_path, two_steps)
    _, target = state_on_mesh("data")
    wide = jax.ShapeDtypeStruct((65,), np.float32)
    target["params"] = target["params"] | {"scale": wide}
    with pytest.raises(ConfigError, match=r"checkpoints/2 is a checkpoint of a d"):
        Checkpoints(workdir, 9).restore_newest(target)
    target["params"]["scale"] = jax.ShapeDtypeStruct((64,), jnp.bfloat16)
    with pytest.raises(ConfigError, match=r"scale: .* bfloat16.* float32\[64\]"):
        Checkpoints(workdir, 9).restore_newest(target)
    assert not (workdir / "damaged").exists()


def test_unfinished_checkpoint_is_removed_and_reported(two_steps, tmp_path, capsys):
    workdir = write_files(tmp_path, two_steps)
    (workdir / "checkpoints" / "3.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    checkpoints = Checkpoints(workdir, 9)
    assert "checkpoint 3 was not finished; removed" in capsys.readouterr().out
    assert checkpoints.restore_newest(state_on_mesh("data")[1])[0] == 2
    assert Checkpoints(tmp_path / "empty", 9).restore_newest({}) is None
