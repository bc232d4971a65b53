"""Tests of the output to TensorBoard and Weights & Biases."""

import struct
import sys
from types import SimpleNamespace

import mini_runs
import numpy as np
import pytest
from etils.epath import Path as EPath

from hivit_jax.errors import ConfigError, MissingPackage
from hivit_jax.main import main
from hivit_jax.reporting import metrics

SETTINGS = {"batch_size": 16, "data.flip": True, "model.depths": (1, 1, 2)}


def tensorboard_values(workdir):
    """Return the summary values of the only event file in a workdir."""
    from tensorboardX.proto.event_pb2 import Event

    [path] = workdir.glob("events.*")
    content, offset, values = path.read_bytes(), 0, []
    # An event has 8 bytes of length, 4 of checksum, its content, and 4 of checksum.
    while offset < len(content):
        size = struct.unpack_from("<Q", content, offset)[0]
        event = Event.FromString(content[offset + 12 : offset + 12 + size])
        offset += 16 + size
        values += [(event.step, value) for value in event.summary.value]
    return values


def test_tensorboard_file_contains_metrics_images_and_config(tmp_path):
    """Tags of metrics and images begin with train/ or eval/.

    The config is written twice: as text and as hyperparameters.
    """
    pytest.importorskip("tensorboardX")
    writer = metrics.Writer(tmp_path, 0, SETTINGS)
    writer.scalars(3, {"loss": 0.5})
    writer.scalars(3, {"eval/loss": 0.25})
    writer.images(3, {"reconstruction": np.zeros((2, 2, 3), np.uint8)})
    writer.close()
    values = tensorboard_values(tmp_path)
    found = {
        (step, value.tag): value.simple_value
        for step, value in values
        if value.HasField("simple_value")
    }
    assert found == {(3, "train/loss"): 0.5, (3, "eval/loss"): 0.25}
    by_tag = {value.tag: value for _, value in values}
    assert by_tag["train/reconstruction"].image.width == 2
    [text] = by_tag["config/text_summary"].tensor.string_val
    assert b'"batch_size": 16' in text
    hyperparameters = str(by_tag["_hparams_/session_start_info"].metadata)
    assert all(name in hyperparameters for name in SETTINGS)
    assert "(1, 1, 2)" in hyperparameters
    table_metrics = str(by_tag["_hparams_/experiment"].metadata)
    assert all(f"eval/{name}" in table_metrics for name in ("loss", "top1", "mAP"))


class StandIn:
    """Stand-in for wandb with the parts that `Writer` uses. Writes nothing.

    Args:
      problem: message of the error that `init` raises; "": no error.
    """

    Image = staticmethod(lambda pixels: ("image", pixels.shape))
    Settings = staticmethod(dict)

    class errors:
        class Error(Exception):
            pass

    def __init__(self, problem=""):
        self.logged, self.starts, self.problem = [], [], problem

    def init(self, **options):
        if self.problem:
            raise self.errors.Error(self.problem)
        self.starts.append(options)
        log = lambda values, step: self.logged.append((step, values))  # noqa: E731
        return SimpleNamespace(log=log, finish=lambda: self.logged.append("end"))


def test_wandb_receives_the_metrics(workdir, monkeypatch):
    """wandb receives all metrics; a resumed run continues the same wandb run."""
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for step in (1, 2):
        writer = metrics.Writer(EPath(workdir), step - 1, SETTINGS, "project")
        writer.scalars(step, {"loss": 0.5, "eval/loss": 2})
        writer.images(step, {"grid": np.zeros((2, 4, 3))})
        writer.close()
    values = {"train/loss": 0.5, "eval/loss": 2}
    image = {"train/grid": ("image", (2, 4, 3))}
    assert wandb.logged == [
        (1, values),
        (1, image),
        "end",
        (2, values),
        (2, image),
        "end",
    ]
    first, second = wandb.starts
    assert first == second
    assert (first["project"], first["name"]) == ("project", workdir.name)
    assert first["config"] == SETTINGS


def test_wandb_that_cannot_start_is_an_error(workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", StandIn("api_key not configured\nmore"))
    with pytest.raises(ConfigError, match="api_key not configured\nrun `wandb login`"):
        metrics.Writer(workdir, project="project")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingPackage, match=r"hivit-jax\[wandb\]"):
        metrics.Writer(workdir, project="project")


@pytest.mark.extras
@pytest.mark.slow
def test_offline_wandb_run_is_written_into_the_workdir(
    workdir, monkeypatch, minimal_output
):
    """A real run in wandb's offline mode writes its files into the workdir."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = mini_runs.arguments(wandb_project="hivit", total_steps=2)
    assert main([*flags, f"--workdir={workdir}"]) == 0
    [record] = workdir.glob("wandb/offline-run-*/run-*.wandb")
    assert record.stem == f"run-{(workdir / 'wandb.id').read_text()}"
    assert b"train/gradient_norm" in record.read_bytes()
