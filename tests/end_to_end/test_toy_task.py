"""Tests of a user's own task, `toy.Segmentation`, from training to prediction."""

import json
import os
import time
from pathlib import Path

import mini_runs
import numpy as np
import pytest
import toy
from numpy.testing import assert_allclose
from PIL import Image

from hivit_jax.main import main
from hivit_jax.tools import predict

pytestmark = [pytest.mark.slow, pytest.mark.processes]

RECIPE = """
def get_config():
    every = dict(log_every=1, eval_every=1, checkpoint_every=1)
    data = dict(name="toy:Maps", dir={data!r}, max_unreadable=0.1)
    optimizer = dict(base_learning_rate=0.5, warmup_epochs=0.0, accumulate_steps=2)
    return dict(
        task="toy:Segmentation",
        prior=(0.0, 0.5, -0.5),
        batch_size=16,
        total_steps={steps},
        keep_checkpoints={steps},
        model=dict(name="cells"),
        data=data,
        optimizer=optimizer,
        **every,
    )
"""


# 1.5 epochs. An epoch has four steps: three with batches of the first bucket, and one
# with a batch of the second bucket.
STEPS = 6


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Write the dataset and a recipe of the toy task; return the recipe's path."""
    root = tmp_path_factory.mktemp("toy")
    toy.write_dataset(root / "data")
    text = RECIPE.format(data=str(root / "data"), steps=STEPS)
    (root / "toy_recipe.py").write_text(text)
    return root / "toy_recipe.py"


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    """Return the workdir of an uninterrupted run on eight devices."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    finish(start(recipe, workdir, devices=8))
    return workdir


def lines(workdir):
    """Return the lines of metrics.jsonl without times."""
    texts = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    timed = (
        "images_per_second",
        "images_per_second_per_chip",
        "seconds_left",
        "input_bound",
    )
    return [
        {key: value for key, value in json.loads(text).items() if key not in timed}
        for text in texts
    ]


def start(recipe, workdir, *flags, **options):
    """Start a process that can import the toy task."""
    path = os.pathsep.join(
        [str(mini_runs.ROOT / "tests" / "helpers"), str(mini_runs.ROOT)]
    )
    command = ["-m", "hivit_jax.main", f"--config={recipe}", f"--workdir={workdir}"]
    return mini_runs.start_process(*command, *flags, PYTHONPATH=path, **options)


def test_loss_falls_and_each_example_is_evaluated_once(run):
    """The unreadable training example is counted once in an epoch."""
    logged = lines(run)
    losses = [line["eval/loss"] for line in logged if "eval/loss" in line]
    assert len(losses) == STEPS
    assert losses[-1] < 0.8 * losses[0]
    for line in logged:
        if "eval/count" in line:
            assert (line["eval/count"], line["eval/distinct_images"]) == (17, 17)
            # 9 test images have 4x4 cells, 8 have 4x6.
            assert line["eval/cells"] == 9 * 16 + 8 * 24
            assert line["eval/worst"] <= line["eval/accuracy"] <= 1
    unreadable = [line["unreadable"] for line in logged if "unreadable" in line]
    assert sum(unreadable[:4]) == 1


def test_checkpoint_contains_statistics_but_no_frozen_weights(run):
    """Statistics are a separate item of a checkpoint."""
    items = mini_runs.saved_arrays(run, STEPS)
    assert items["model_state"].keys() == {"norm/mean", "norm/var"}
    assert np.abs(items["model_state"]["norm/mean"]).min() > 0
    names = [name for item in items.values() for name in item]
    assert "embed/kernel" in items["params"]
    assert not [name for name in names if "prior" in name]


def test_figure_shows_six_images_of_one_bucket(run):
    with Image.open(run / "figures" / f"maps_{STEPS:07}.png") as image:
        assert image.width in (64, 96)
        assert image.height == 6 * 32


def finish(*processes):
    """Wait until all processes exit with 0; return the stdout of each."""
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(outputs), outputs
    return [out for out, _ in outputs]


@pytest.mark.extras
def test_killed_run_resumes_bit_identically(recipe, run, tmp_path):
    process = start(recipe, tmp_path, devices=8)
    while 2 not in mini_runs.saved_steps(tmp_path) and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert STEPS not in mini_runs.saved_steps(tmp_path)
    [out] = finish(start(recipe, tmp_path, devices=8))
    assert "resuming at step" in out
    assert lines(tmp_path) == lines(run)
    mini_runs.assert_identical(
        mini_runs.saved_arrays(tmp_path, STEPS),
        mini_runs.saved_arrays(run, STEPS),
    )


@pytest.mark.extras
def test_one_device_equals_eight(recipe, run, tmp_path):
    """Results, including microbatch statistics, agree on one and eight devices."""
    finish(start(recipe, tmp_path))
    for line, expected_line in zip(lines(tmp_path), lines(run), strict=True):
        assert line == pytest.approx(expected_line, rel=2e-5)
    items, expected = (mini_runs.saved_arrays(w, STEPS) for w in (tmp_path, run))
    for item in ("params", "model_state"):
        for name, array in expected[item].items():
            assert_allclose(items[item][name], array, rtol=2e-5, atol=1e-6)


@pytest.mark.extras
def test_two_processes_equal_one(recipe, run, tmp_path):
    """Two processes gather their records, and both exit with 0."""
    address = mini_runs.free_address()
    flags = [f"--coordinator_address={address}", "--num_processes=2"]
    pair = [
        start(recipe, tmp_path, *flags, f"--process_id={index}", devices=2)
        for index in range(2)
    ]
    finish(*pair)
    for line, expected_line in zip(lines(tmp_path), lines(run), strict=True):
        assert line == pytest.approx(expected_line, rel=2e-5)


def test_eval_mode_prints_the_results(recipe, run, capsys):
    assert main([f"--config={recipe}", f"--workdir={run}", "--mode=eval"]) == 0
    out = capsys.readouterr().out
    last = lines(run)[-1]
    assert f"accuracy {last['eval/accuracy']:.4f}  " in out
    assert "(17 images)" in out


def test_describe_mode_counts_steps_of_both_buckets(recipe, capsys):
    assert main([f"--config={recipe}", "--mode=describe"]) == 0
    out = capsys.readouterr().out
    # 51 images. The incomplete last batch of each bucket counts as full.
    assert "64 images, 4.0 steps" in out


@pytest.mark.extras
def test_compile_mode_compiles_both_buckets(recipe, tmp_path, capsys):
    pytest.importorskip("libtpu")
    flags = ["--topology=v5e:2x4", "--mode=compile"]
    assert main([f"--config={recipe}", f"--workdir={tmp_path}", *flags]) == 0
    assert "bucket 2 of 2" in capsys.readouterr().out
    assert json.loads((tmp_path / "compile.json").read_text())["fits"]


def test_predict_writes_label_maps(recipe, run, tmp_path, capsys):
    """`predict` processes the test split, and a directory of images without maps."""
    flags = ["--checkpoint", str(run), "--out"]
    assert predict.main([*flags, str(tmp_path / "split")]) == 0
    assert "17 of 17 images predicted" in capsys.readouterr().out
    predictions = json.loads((tmp_path / "split" / "maps.json").read_text())
    data = recipe.parent / "data" / "test"
    accuracies = []
    for prediction in predictions:
        with Image.open(data / prediction["name"].replace(".png", ".map.png")) as image:
            accuracies.append((np.asarray(image) == prediction["map"]).mean())
    assert len(accuracies) == 17
    assert np.mean(accuracies) > 0.6
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.png").write_bytes((data / "03.png").read_bytes())
    own_image_flags = [*flags, str(tmp_path / "out"), "--images", str(tmp_path / "own")]
    assert predict.main(own_image_flags) == 0
    [record] = json.loads((tmp_path / "out" / "maps.json").read_text())
    assert record == {"name": "a.png"} | {
        "map": next(
            prediction["map"]
            for prediction in predictions
            if prediction["name"] == "03.png"
        )
    }
