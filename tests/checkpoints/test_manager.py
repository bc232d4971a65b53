"""Checkpoints: restoring on another mesh, reading parameters, a full disk."""

import itertools
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import recipes
from networks import fast_jit, pictures

from hivit_jax.checkpoints.manager import Checkpoints
from hivit_jax.distributed import sharding
from hivit_jax.distributed.sharding import make_mesh, state_shardings, with_shardings
from hivit_jax.errors import CheckpointError, ConfigError
from hivit_jax.tree import named_leaves
from hivit_jax.weights.load import read

# Orbax leaves coroutines behind when it cannot read a file.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


CONFIG = {"model": {"name": "hivit_base"}, "seed": 0}


MESHES = {
    "data": dict(replica=1, data=8, fsdp=1, tensor=1),
    "fsdp": dict(replica=1, data=1, fsdp=8, tensor=1),
    "both": dict(replica=1, data=2, fsdp=4, tensor=1),
    "every": dict(replica=2, data=1, fsdp=2, tensor=2),
}


def init(seed=0):
    """A small train state whose every number is another one."""
    params = {
        "attn": {
            "qkv": {
                "kernel": pictures((64, 3, 4, 16), f"k{seed}"),
                "bias": pictures((3, 4, 16), f"b{seed}"),
            }
        },
        "mlp": {"fc1": {"kernel": pictures((64, 256), f"m{seed}")}},
        "scale": pictures((64,), f"s{seed}"),
    }
    moments = optax.adamw(1.0).init(params)
    moments = jax.tree.map(
        lambda x: x if x.ndim == 0 else pictures(x.shape, "moment"), moments
    )
    return {
        "step": jnp.int32(seed),
        "params": params,
        "model_state": {},
        "opt_state": moments,
        "ema": jax.tree.map(lambda x: 2 * x, params),
    }


@pytest.fixture(autouse=True)
def shard_small_arrays(monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)


def on_mesh(name, seed=0):
    """(the state on a mesh, what to ask for when restoring it)."""
    shardings = state_shardings(make_mesh(MESHES[name], 8), jax.eval_shape(init))
    state = fast_jit(lambda: init(seed), out_shardings=shardings)()
    return state, with_shardings(jax.eval_shape(init), shardings)


def save(workdir, *states, keep=9, results=None):
    checkpoints = Checkpoints(workdir, keep)
    for state in states:
        checkpoints.save(state, json.dumps(CONFIG), results)
    checkpoints.close()


def host(state):
    return jax.device_get(named_leaves(state))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return mesh name -> workdir with a checkpoint that this mesh wrote."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
        found = {name: tmp_path_factory.mktemp(name) for name in MESHES}
        for name, workdir in found.items():
            save(workdir, on_mesh(name, seed=3)[0])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new"), list(itertools.permutations(MESHES, 2)))
def test_restore_on_any_other_mesh(saved, old, new):
    """Restored arrays are bit-identical and have the shardings of the new mesh."""
    expected, (_, target) = host(init(3)), on_mesh(new)
    step, state = Checkpoints(saved[old], 9).restore_newest(target)
    assert step == 3
    recipes.assert_identical(host(state), expected)
    for name, leaf in named_leaves(state).items():
        assert leaf.sharding == named_leaves(target)[name].sharding, name
    kernel = state["params"]["mlp"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.shape != kernel.shape or new == "data"


@pytest.mark.slow
def test_read_parameters_on_one_device(saved):
    """`read` returns averaged or plain parameters without the optimizer state."""
    for averaged, name in ((True, "ema"), (False, "params")):
        found = read(saved["every"], averaged=averaged)
        expected = host(init(3)[name])
        recipes.assert_identical(found.params, expected)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """Return the files of a workdir with checkpoints 1 and 2: path -> content."""
    workdir = tmp_path_factory.mktemp("two")
    save(workdir, *(on_mesh("data", seed)[0] for seed in (1, 2)))
    return {
        path.relative_to(workdir): path.read_bytes()
        for path in sorted(workdir.rglob("*"))
        if path.is_file()
    }


def written(workdir, files):
    """Write files into a workdir."""
    for path, content in files.items():
        (workdir / path).parent.mkdir(parents=True, exist_ok=True)
        (workdir / path).write_bytes(content)
    return workdir


def damages(files, count):
    """Yield (file of step 2, damaged content): a flipped bit, truncated, or None."""
    rng = random.Random(0)
    paths = [path for path in files if path.parts[:2] == ("checkpoints", "2")]
    weights = [len(files[path]) for path in paths]
    for number in range(count):
        path = rng.choices(paths, weights if number % 2 else None)[0]
        content = bytearray(files[path])
        kind = number % 5
        if kind < 3 and content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        elif kind == 3:
            content = content[: len(content) // 2]
        yield path, None if kind == 4 else bytes(content)


@pytest.mark.slow
def test_damage_is_never_silent(two_steps, tmp_path, capsys):
    """With step 2 damaged, restoring returns its exact arrays, or those of step 1.

    Falling back to step 1 is reported.
    """
    _, target = on_mesh("data")
    expected = {seed: host(init(seed)) for seed in (1, 2)}
    restored = {1: 0, 2: 0}
    for number, (path, content) in enumerate(damages(two_steps, 30)):
        workdir = written(tmp_path / str(number), two_steps)
        if content is None:
            (workdir / path).unlink()
        else:
            (workdir / path).write_bytes(content)
        capsys.readouterr()
        step, state = Checkpoints(workdir, 9).restore_newest(target)
        recipes.assert_identical(host(state), expected[step])
        restored[step] += 1
        if step == 1:
            out = capsys.readouterr().out
            if (workdir / "damaged").exists():
                assert "checkpoint 2 was moved to" in out
                assert "checkpoints/2" in out
            assert {p.name for p in (workdir / "checkpoints").iterdir()} == {"1"}
    assert restored[1] > 10


def test_all_checkpoints_are_damaged(two_steps, tmp_path):
    workdir = written(tmp_path, two_steps)
    for path in workdir.rglob("checkpoints/*/*/d/*"):
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"checkpoints/2 is damaged: "):
        Checkpoints(workdir, 9).restore_newest(on_mesh("data")[1])
    with pytest.raises(CheckpointError, match=r"checkpoints/1 is damaged: "):
        read(workdir)
    assert {p.name for p in (workdir / "checkpoints").iterdir()} == {"1", "2"}


def test_evaluation_reads_the_newest_intact_checkpoint(two_steps, tmp_path, capsys):
    workdir = written(tmp_path, two_steps)
    for path in workdir.rglob("checkpoints/2/ema/d/*"):
        path.unlink()
    found = read(workdir)
    assert found.path.endswith("checkpoints/1")
    recipes.assert_identical(found.params, host(init(1)["ema"]))
    assert "checkpoints/2 is damaged" in capsys.readouterr().out


def test_checkpoint_of_another_model_is_not_damage(two_steps, tmp_path):
    """Checkpoints of another model raise ConfigError and are not moved."""
    workdir = written(tmp_path, two_steps)
    _, target = on_mesh("data")
    wide = jax.ShapeDtypeStruct((65,), np.float32)
    target["params"] = target["params"] | {"scale": wide}
    with pytest.raises(ConfigError, match=r"checkpoints/2 is a checkpoint of a d"):
        Checkpoints(workdir, 9).restore_newest(target)
    target["params"]["scale"] = jax.ShapeDtypeStruct((64,), jnp.bfloat16)
    with pytest.raises(ConfigError, match=r"scale: .* bfloat16.* float32\[64\]"):
        Checkpoints(workdir, 9).restore_newest(target)
    assert not (workdir / "damaged").exists()


def test_unfinished_checkpoints_are_reported(two_steps, tmp_path, capsys):
    workdir = written(tmp_path, two_steps)
    (workdir / "checkpoints" / "3.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    checkpoints = Checkpoints(workdir, 9)
    assert "checkpoint 3 was not finished; removed" in capsys.readouterr().out
    assert checkpoints.restore_newest(on_mesh("data")[1])[0] == 2
    assert Checkpoints(tmp_path / "empty", 9).restore_newest({}) is None


def test_full_disk(tmp_path, monkeypatch):
    """A full disk raises one clear error; the earlier checkpoint stays."""
    checkpoints = Checkpoints(tmp_path, 9)
    checkpoints.save(on_mesh("data", 1)[0], json.dumps(CONFIG))
    checkpoints._manager.wait_until_finished()

    def save(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nand much more")

    monkeypatch.setattr(checkpoints._manager, "save", save)
    message = r"cannot write a .*are intact.\n.* MiB are free on .*; RESOURCE_EXH"
    with pytest.raises(ConfigError, match=message):
        checkpoints.save(on_mesh("data", 2)[0], json.dumps(CONFIG))
    step, _ = Checkpoints(tmp_path, 9).restore_newest(on_mesh("data")[1])
    assert step == 1
