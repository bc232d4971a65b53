"""Test of all steps from ImageNet's tar files to a classifier, with a killed run."""

import json
import signal

import mini_runs
import numpy as np
import pytest
from imagenet_tars import write_tars

from hivit_jax.reporting import console, metrics
from hivit_jax.tools import prepare_data

pytestmark = [pytest.mark.slow, pytest.mark.processes]

VAL = 6  # number of validation images


# This program sends itself SIGKILL after the first checkpoint.
KILL_SCRIPT = """
import os, signal, sys
from hivit_jax import main
from hivit_jax.checkpoints import manager
save = manager.Checkpoints.save
def save_and_kill(self, *arguments):
    save(self, *arguments)
    self.close()
    os.kill(os.getpid(), signal.SIGKILL)
manager.Checkpoints.save = save_and_kill
main.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return overrides that name a prepared dataset."""
    tars = tmp_path_factory.mktemp("tars")
    write_tars(tars, size=(70, 90))
    out = tmp_path_factory.mktemp("imagenet2012")
    assert prepare_data.main([f"--manual_dir={tars}", f"--data_dir={out}"]) == 0
    return {"data__name": "imagenet2012", "data__dir": out}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Return variables with which imports of tensorflow and tensorboardX fail."""
    directory = tmp_path_factory.mktemp("environment")
    blocked = mini_runs.block_imports(directory, "tensorflow", "tensorboardX")
    return {
        "XDG_CACHE_HOME": directory / "cache",
        "PYTHONPATH": blocked,
    }


@pytest.mark.extras
def test_killed_pretraining_resumes_and_initializes_a_classifier(
    data, environment, tmp_path
):
    """The resumed run ends bit-identical to an uninterrupted run.

    The classifier is trained and evaluated.
    """
    options = data | dict(batch_size=8, total_steps=4, checkpoint_every=2)
    options |= dict(model__image_size=64, data__canvas=96, eval_every=2)
    pretraining = mini_runs.arguments("photographs", **options)

    def run(workdir, *arguments):
        command = ["-m", "hivit_jax.main", *arguments, f"--workdir={workdir}"]
        code, out, err = mini_runs.run_process(*command, **environment)
        assert (code, err) == (0, "")
        return out

    run(tmp_path / "uninterrupted", *pretraining)
    workdir = tmp_path / "killed"
    code, _, _ = mini_runs.run_process(
        "-c", KILL_SCRIPT, *pretraining, f"--workdir={workdir}", **environment
    )
    assert code == -signal.SIGKILL
    assert "resuming at step 2 from" in run(workdir, *pretraining)
    for name in ("loss", "gradient_norm", "eval/loss"):
        numbers = mini_runs.logged(workdir, name)
        assert numbers == mini_runs.logged(tmp_path / "uninterrupted", name)
        assert np.isfinite(list(numbers.values())).all()
    mini_runs.assert_identical(
        mini_runs.saved_arrays(workdir, 4),
        mini_runs.saved_arrays(tmp_path / "uninterrupted", 4),
    )
    (line,) = [m for m in metrics.read(workdir / "metrics.jsonl") if m["step"] == 4][1:]
    assert (line["eval/count"], line["eval/unreadable"]) == (VAL, 0)

    overrides = options | {
        "model__in_channels": 3,
        "model__patch_size": 16,
        "model__num_classes": 1000,
        "model__depths": "(1,1,2)",
        "data__mean": (0.485, 0.456, 0.406),
        "data__std": (0.229, 0.224, 0.225),
        "data__crop_scale": (0.08, 1.0),
        "data__crop_pct": 0.875,
        "data__train_examples": 0,
        "optimizer__warmup_epochs": 0.5,
        "init_from": workdir,
    }
    flags = [f"--config.{k.replace('__', '.')}={v}" for k, v in overrides.items()]
    finetuning = [f"--config={mini_runs.ROOT / 'configs/digits_finetune.py'}", *flags]
    run(tmp_path / "finetuned", *finetuning)
    line = metrics.read(tmp_path / "finetuned/metrics.jsonl")[-1]
    assert (line["step"], line["eval/count"], line["eval/unreadable"]) == (4, VAL, 0)
    assert line["eval/top1"] * VAL == pytest.approx(round(line["eval/top1"] * VAL))
    out = run(tmp_path / "finetuned", *finetuning, "--mode=eval")
    assert out.splitlines()[-1] == console.eval_line("step 4", line)
    config = json.loads((tmp_path / "finetuned/config.json").read_text())
    assert config["data"]["name"] == data["data__name"]
