"""Benchmarks that have to run where little is installed."""

import json
import os

import recipes

from benchmarks import plain_config
from hivit_jax import config as configs

SMALL = {**recipes.SOURCES["synthetic"], "batch_size": 4}


def test_train_step_takes_nothing_but_jax_flax_optax_and_numpy(tmp_path):
    missing = recipes.not_installed(
        tmp_path / "missing",
        *("ml_collections", "orbax", "etils", "tensorflow", "tensorflow_datasets"),
        *("clu", "simplejpeg", "PIL", "matplotlib", "safetensors", "sklearn", "torch"),
    )
    out = tmp_path / "out.json"
    code, text, error = recipes.run(
        *("-m", "benchmarks.train_step", "--rounds", 2, "--steps", 1, "--out", out),
        *("--set", *(f"{key}={value}" for key, value in SMALL.items())),
        PYTHONPATH=os.pathsep.join([str(missing), str(recipes.ROOT)]),
    )
    assert code == 0, error
    found = json.loads(out.read_text())
    assert f"{found['images_per_second']:,.1f} images/s" in text
    assert found["batch_size"] == 4
    assert found["device"] == "cpu"
    assert found["model_flop_utilisation"] is None
    assert len(found["seconds_of_rounds"]) == 2
    assert 0 < found["loss"] < 10
    assert found["peak_memory_bytes"] > 2**25


def test_stand_in_reads_recipes_as_ml_collections_does(monkeypatch):
    paths = sorted(recipes.ROOT.glob("configs/*.py"))
    assert paths

    def read():
        flags = ["--config.model.depths=(1,1,2)", "--config.data.flip=false"]
        return [
            json.loads(configs.to_json(configs.load(path, flags))) for path in paths
        ]

    expected = read()
    monkeypatch.setitem(plain_config.sys.modules, "ml_collections", plain_config)
    for name in ("ConfigDict", "FieldReference", "placeholder"):
        monkeypatch.setattr(configs, name, getattr(plain_config, name))
    assert read() == expected
