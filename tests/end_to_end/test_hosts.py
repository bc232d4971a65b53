"""Tests of batches and evaluations on several hosts, each a process."""

import json
from pathlib import Path

import hosts
import mini_runs
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from benchmarks import photographs
from hivit_jax import inputs
from hivit_jax.data import loader, order
from hivit_jax.train import train

pytestmark = [pytest.mark.slow, pytest.mark.processes]

VAL = 13  # number of held-out images, one of which cannot be read


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return (command line, root directory) of a run on photographs.

    Two of the photographs are damaged.
    """
    root = tmp_path_factory.mktemp("hosts")
    photographs.write(root / "data", {"train": 50, "val": VAL}, (80, 60))
    for split in ("train", "val"):
        sorted(root.glob(f"data/{split}/*/*"))[7].write_bytes(b"spoiled")
    overrides = {
        "data__name": "folder",
        "data__dir": root / "data",
        "data__canvas": 80,
        "data__max_unreadable": 0.1,
        "batch_size": 8,
        "total_steps": 1,
    }
    overrides["model__image_size"] = 64
    arguments = mini_runs.arguments("photographs", **overrides)
    with mini_runs.minimal_output(), mini_runs.visible_devices(1):
        train(mini_runs.mae("photographs", **overrides), root / "run")
    return arguments, root


def run_on_hosts(run, count):
    """Run `hosts.py` in `count` processes; return [(arrays, results, stderr)]."""
    arguments, root = run
    address = mini_runs.free_address()
    outs = [root / f"{index}of{count}" for index in range(count)]
    processes = [
        mini_runs.start_process(
            Path(hosts.__file__),
            *(address, count, index, out, root / "run", *arguments),
            XDG_CACHE_HOME=root / "cache",
        )
        for index, out in enumerate(outs)
    ]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, errors
    return [
        (
            dict(np.load(f"{out}.npz")),
            json.loads(Path(f"{out}.json").read_text()),
            error,
        )
        for out, error in zip(outs, errors, strict=True)
    ]


@pytest.fixture(scope="module")
def one_host(run):
    """Return (arrays, results, stderr) of a single host."""
    (result,) = run_on_hosts(run, 1)
    return result


@pytest.mark.extras
def test_one_host_evaluates_every_readable_image(one_host):
    arrays, results, error = one_host
    assert results["eval/count"] == VAL - 1
    assert results["eval/unreadable"] == 1
    assert error.count("cannot read") == 2
    weights = [v for k, v in arrays.items() if k.endswith(" weight")]
    assert len(weights) == hosts.STEPS[1] - hosts.STEPS[0] + 2


@pytest.mark.extras
@pytest.mark.parametrize("count", [2, 4])
def test_hosts_share_batches_and_results(count, run, one_host):
    """The concatenated batches and the results equal those of one host."""
    outputs_of_hosts = run_on_hosts(run, count)
    for key, batches in one_host[0].items():
        shares = [arrays[key] for arrays, _, _ in outputs_of_hosts]
        assert {len(share) for share in shares} == {len(batches) // count}
        assert_array_equal(np.concatenate(shares), batches)
    for _, results, _ in outputs_of_hosts:
        assert results["eval/count"] == VAL - 1
        assert results["eval/unreadable"] == 1
        assert results == pytest.approx(one_host[1], rel=1e-5)


@pytest.mark.extras
def test_batches_continue_after_a_kill(run, one_host):
    """After a process is killed, another process yields the batches that follow."""
    arguments, root = run
    first, end = hosts.STEPS
    code = (
        "import os, signal, sys\n"
        "from hivit_jax import config\n"
        "from hivit_jax import inputs\n"
        "path, *flags = sys.argv[1:]\n"
        "config = config.load(path.removeprefix('--config='), flags)\n"
        f"for index, _ in enumerate(inputs.train_batches(config, 0, {end})):\n"
        f"    if index == {first}:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert mini_runs.run_process("-c", code, *arguments)[0] == -9
    config = mini_runs.configs.load(
        arguments[0].removeprefix("--config="), arguments[1:]
    )
    for batch_index, batch in enumerate(inputs.train_batches(config, first, end)):
        for key, value in batch.items():
            assert_array_equal(value, one_host[0][f"{batch_index} {key}"])


def test_eight_hosts_evaluate_every_image_once(monkeypatch):
    """The split has 50,000 images, as in ImageNet-1k."""
    indices_of_hosts, buckets = [], np.zeros(50_000, np.int64)
    monkeypatch.setattr(loader.jax, "process_count", lambda: 8)
    for host in range(8):
        monkeypatch.setattr(loader.jax, "process_index", lambda host=host: host)
        positions = loader.local_positions(1024)
        assert len(positions) == 128
        indices_of_hosts.append(
            [share.indices for share in order.eval_plan(buckets, 1024, positions)]
        )
    assert {len(batches) for batches in indices_of_hosts} == {49}
    all_indices = np.concatenate(
        [indices for batches in indices_of_hosts for indices in batches]
    )
    assert_array_equal(np.sort(all_indices), np.arange(50_000))
