"""Tests of checkpoints on other meshes, without optimizer state, and on full disks."""

import itertools
import json

import mini_runs
import pytest
from states import CONFIG, MESHES, make_state, save_states, state_on_mesh, to_host

from hivit_jax.checkpoints.manager import Checkpoints
from hivit_jax.distributed import sharding
from hivit_jax.errors import ConfigError
from hivit_jax.tree import named_leaves
from hivit_jax.weights.load import read

# Orbax leaves coroutines behind when it cannot read a file.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("shard_small_arrays"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return {mesh name: workdir with a checkpoint written on this mesh}."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
        workdirs = {name: tmp_path_factory.mktemp(name) for name in MESHES}
        for name, workdir in workdirs.items():
            save_states(workdir, state_on_mesh(name, seed=3)[0])
    return workdirs


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new"), list(itertools.permutations(MESHES, 2)))
def test_checkpoint_is_restored_on_any_other_mesh(saved, old, new):
    """Restored arrays are bit-identical and have the shardings of the new mesh."""
    expected, (_, target) = to_host(make_state(3)), state_on_mesh(new)
    step, state = Checkpoints(saved[old], 9).restore_newest(target)
    assert step == 3
    mini_runs.assert_identical(to_host(state), expected)
    for name, leaf in named_leaves(state).items():
        assert leaf.sharding == named_leaves(target)[name].sharding, name
    kernel = state["params"]["mlp"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.shape != kernel.shape or new == "data"


@pytest.mark.slow
def test_read_returns_parameters_or_averages(saved):
    """`read` needs neither the mesh nor the optimizer state of the checkpoint."""
    for averaged, name in ((True, "ema"), (False, "params")):
        checkpoint = read(saved["every"], averaged=averaged)
        expected = to_host(make_state(3)[name])
        mini_runs.assert_identical(checkpoint.params, expected)


@pytest.mark.slow
def test_full_disk_is_an_error_and_earlier_checkpoints_stay(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, 9)
    checkpoints.save(state_on_mesh("data", 1)[0], json.dumps(CONFIG))
    checkpoints._manager.wait_until_finished()

    def save(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nand much more")

    monkeypatch.setattr(checkpoints._manager, "save", save)
    message = r"cannot write a .*are intact.\n.* MiB are free on .*; RESOURCE_EXH"
    with pytest.raises(ConfigError, match=message):
        checkpoints.save(state_on_mesh("data", 2)[0], json.dumps(CONFIG))
    step, _ = Checkpoints(tmp_path, 9).restore_newest(state_on_mesh("data")[1])
    assert step == 1
