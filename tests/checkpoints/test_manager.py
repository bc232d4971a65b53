"""Tests of `Checkpoints` on other meshes and full disks, and of the best checkpoint."""

import itertools
import json

import mini_runs
import numpy as np
import pytest
from states import CONFIG, MESHES, make_state, save_states, state_on_mesh, to_host

from hivit_jax.checkpoints.manager import Checkpoints
from hivit_jax.distributed import sharding
from hivit_jax.errors import ConfigError
from hivit_jax.reporting import console, metrics
from hivit_jax.tools import run_facts
from hivit_jax.tree import named_leaves
from hivit_jax.weights.load import read

# Orbax leaves coroutines behind when it cannot read a file.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("shard_small_arrays"),
]


@pytest.fixture(scope="module")
def saved_workdirs(tmp_path_factory):
    """Return {mesh name: workdir with a checkpoint written on this mesh}."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
        workdirs = {name: tmp_path_factory.mktemp(name) for name in MESHES}
        for name, workdir in workdirs.items():
            save_states(workdir, state_on_mesh(name, seed=3)[0])
    return workdirs


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new"), list(itertools.permutations(MESHES, 2)))
def test_checkpoint_is_restored_on_any_other_mesh(saved_workdirs, old, new):
    """Restored arrays are bit-identical and have the shardings of the new mesh."""
    expected, (_, target) = to_host(make_state(3)), state_on_mesh(new)
    step, state = Checkpoints(saved_workdirs[old], 9).restore_newest(target)
    assert step == 3
    mini_runs.assert_identical(to_host(state), expected)
    for name, leaf in named_leaves(state).items():
        assert leaf.sharding == named_leaves(target)[name].sharding, name
    kernel = state["params"]["mlp"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.shape != kernel.shape or new == "data"


@pytest.mark.slow
def test_read_returns_parameters_or_averages(saved_workdirs):
    """`read` needs no mesh, although a mesh of eight devices wrote the checkpoint."""
    for averaged, name in ((True, "ema"), (False, "params")):
        checkpoint = read(saved_workdirs["replica_fsdp_tensor"], averaged=averaged)
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


# Evaluations of steps 1 to 6. Steps 2, 4 and 5 share the best accuracy; of these, steps
# 4 and 5 share the lowest loss, so step 4 is the best.
ACCURACIES = (0.3, 0.5, 0.4, 0.5, 0.5, 0.1)
LOSSES = (0.7, 0.6, 0.1, 0.4, 0.4, 0.3)
STALLED = (0, 0, 1, 2, 3, 4)  # evaluations without a better accuracy
# Equal accuracies are decided by the loss.
IS_BEST = (True, True, False, True, False, False)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["min", "max"])
def test_of_equal_accuracies_the_lowest_loss_is_the_best(tmp_path, direction):
    """The kept checkpoint, early stopping, the last log line and the report agree."""
    best, sign = ("eval/top1", direction), 1 if direction == "max" else -1
    writer = metrics.Writer(tmp_path)
    checkpoints = Checkpoints(tmp_path, keep=1, best=best)
    found = []
    for step, (top1, loss) in enumerate(zip(ACCURACIES, LOSSES, strict=True), 1):
        if step == 5:  # a resumed run still keeps the best checkpoint
            checkpoints.close()
            checkpoints = Checkpoints(tmp_path, keep=1, best=best)
        values = {"eval/top1": sign * top1, "eval/loss": loss}
        values |= {"eval/count": 8, "eval/unreadable": 0}
        writer.scalars(step, values)
        state = {"params": {"x": np.zeros(1)}, "opt_state": {}, "step": np.int32(step)}
        checkpoints.save(state, "{}", values)
        found.append(metrics.evaluation_progress(tmp_path, step, best))
    writer.close()
    checkpoints.close()
    assert mini_runs.saved_steps(tmp_path) == [4, 6]
    assert found == list(zip(STALLED, IS_BEST, strict=True))
    line = console.best_line(tmp_path, [4, 6], best)
    assert line.startswith("best checkpoint  step 4 ")
    lines = metrics.evaluations(tmp_path)
    assert run_facts._best(lines, best).endswith(" at step 4")
