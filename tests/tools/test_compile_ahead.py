"""Tests of `--mode compile`: reports and errors."""

import importlib.util
import json

import jax
import mini_runs
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from hivit_jax import inputs
from hivit_jax.main import main
from hivit_jax.tools import compile_ahead
from hivit_jax.xla import ahead

pytestmark = pytest.mark.usefixtures("minimal_output")

REPORT = {
    "model": "mae_hivit_base",
    "topology": "v5e:2x4",
    "devices": 8,
    "flops_per_image": 2.5e9,
    "hbm_bytes_per_image": 7e6,
    "collectives": [{"kind": "all-reduce", "count": 2, "bytes_per_step": 3e6}],
    "roofline": {"images_per_second_per_chip": 123.4, "limited_by": "memory"},
}


def test_search_batch_adds_the_largest_batch_to_the_report(
    monkeypatch, tmp_path, capsys
):
    """compile.json and the printed text contain the report and the hours."""

    def step_report(config, devices, topology):
        size = config.batch_size // 8
        memory = dict(
            total=1000 + 100 * size, limit=5000, arguments=1000, temporaries=1
        )
        return REPORT | {
            "batch_size": config.batch_size,
            "batch_per_device": size,
            "fits": size <= 40,
            "hbm_bytes_per_device": memory,
        }

    monkeypatch.setattr(compile_ahead, "devices_of", lambda topology: jax.devices())
    monkeypatch.setattr(compile_ahead, "step_report", step_report)
    for search in (False, True):
        content = mini_runs.compile_report(tmp_path, *["--search_batch"] * search)
        assert ("largest_batch_per_device" in content) == search
        out = capsys.readouterr().out
        assert "fits: 0.00 GiB of 0.00 GiB per device (arguments 0.00, " in out
        assert "all-reduce x 2: 3.0 MB per step and device\n" in out
        assert "at most 123 images/s per chip, limited by memory\n" in out
        assert "2.5 GFLOP and 7 MB of HBM traffic per image\n" in out
        assert f"written: {tmp_path}/compile.json" in out
        # 8 steps of 64 images on 8 chips at 123.4 images/s each.
        hours = 8 * 64 / (8 * 123.4) / 3600
        assert content["run"]["hours_at_bound"] == pytest.approx(hours)
        assert content["run"]["hours_at_utilization"] == pytest.approx(hours / 0.4)
        assert [line.split() for line in out.splitlines() if "chip-hours" in line] == [
            [*label.split(), "0.00", "hours", "0.0", "chip-hours"]
            for label in (
                "at the bound, which no run reaches",
                "at 40% of it, assumed",
            )
        ]
        assert "512 images of the run on 8 chips:\n" in out
    assert (
        content["largest_batch_per_device"]
        <= 40
        < content["smallest_that_does_not_fit"]
    )
    assert f"per device: {content['largest_batch_per_device']} (" in out


def test_hours_use_the_measured_utilization_of_a_chip():
    config = mini_runs.mae(batch_size=64)
    memory = dict(total=1, limit=2, arguments=1, temporaries=1)
    report = REPORT | {
        "topology": "h100:8",
        "batch_per_device": 8,
        "fits": True,
        "hbm_bytes_per_device": memory,
    }
    report |= compile_ahead.run_cost(config, report)
    run = report["run"]
    assert run["hours_at_utilization"] == pytest.approx(run["hours_at_bound"] / 0.53)
    summary = compile_ahead.summary(report)
    assert "at 53% of it, measured" in summary
    assert "measured: HiViT-B, pretraining on one H100" in summary
    # Reports of earlier versions lack "utilization_basis", so their utilization counts
    # as assumed. They have the key "bound" in place of "limited_by".
    report["roofline"] = {"images_per_second_per_chip": 123.4, "bound": "network"}
    report["run"] = {
        name: value for name, value in run.items() if "utilization_" not in name
    }
    summary = compile_ahead.summary(report)
    assert "at 53% of it, assumed" in summary
    assert "limited by network" in summary


def test_earlier_summary_describes_the_report_in_compile_json(tmp_path):
    """The summary notes a differing config, and is "" for an unusable file."""
    config = mini_runs.mae(batch_size=64)
    report = REPORT | {
        "batch_per_device": 8,
        "fits": True,
        "hbm_bytes_per_device": dict(total=1, limit=2, arguments=1, temporaries=1),
        "config_sha256": compile_ahead._digest(config),
    }
    assert compile_ahead.earlier_summary(config, tmp_path) == ""
    for text in ("{", "{}"):
        (tmp_path / "compile.json").write_text(text)
        assert compile_ahead.earlier_summary(config, tmp_path) == ""
    (tmp_path / "compile.json").write_text(json.dumps(report))
    summary = compile_ahead.earlier_summary(config, tmp_path)
    assert "at most 123 " in summary
    assert "another config" not in summary
    other_config = mini_runs.mae(batch_size=32)
    assert "another config" in compile_ahead.earlier_summary(other_config, tmp_path)


# Errors


def error_of(capsys, topology, tmp_path, *more):
    """Run ``--mode compile``, which must fail; return the error."""
    flags = [f"--topology={topology}", f"--workdir={tmp_path}", *more]
    assert main([*mini_runs.arguments(), "--mode=compile", *flags]) == 2
    message = capsys.readouterr().err
    assert 1 <= len(message.splitlines()) <= 3
    assert not (tmp_path / "compile.json").exists()
    return message


@pytest.mark.parametrize("topology", ["", "v9:2x2", "tpu", "h100x8"])
def test_unknown_topology_is_an_error(capsys, tmp_path, topology):
    message = error_of(capsys, topology, tmp_path)
    assert f"unknown topology {topology!r}" in message
    assert "v5e:16x16" in message


@pytest.mark.parametrize(
    ("topology", "plugin", "extra"),
    [("v5e:2x4", "libtpu", "tpu"), ("h100:8", "jax-cuda13-plugin", "cuda")],
)
def test_missing_compiler_error_names_the_extra(
    capsys, monkeypatch, tmp_path, topology, plugin, extra
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: (
            None if name == plugin.replace("-", "_") else find(name, *rest)
        ),
    )
    message = error_of(capsys, topology, tmp_path)
    assert plugin in message
    assert f"hivit-jax[{extra}]" in message


def test_more_gpus_than_one_node_has_are_an_error(capsys, tmp_path):
    assert "expected h100:1 to h100:8" in error_of(capsys, "h100:16", tmp_path)


@pytest.mark.extras
def test_invalid_slices_and_meshes_are_errors(capsys, tmp_path):
    pytest.importorskip("libtpu")
    assert "topology='v5e:3x5'" in error_of(capsys, "v5e:3x5", tmp_path)
    mesh = "--config.mesh.data=3"
    assert "does not fit 8 devices" in error_of(capsys, "v5e:2x4", tmp_path, mesh)
    mesh, batch = "--config.mesh.fsdp=2", "--config.batch_size=64"
    assert "cannot be laid out" in error_of(capsys, "v4:4x4x4", tmp_path, mesh, batch)
    message = error_of(capsys, "v5e:4x8", tmp_path)
    assert "batch_size=16 is not divisible by 32 devices" in message


BRANCHES = ("attention", "mlp")


@pytest.mark.extras
@pytest.mark.slow
def test_report_lists_memory_collectives_and_regions(tmp_path, monkeypatch):
    """The test compiles for eight CPU devices instead of a TPU v5e slice."""
    monkeypatch.setattr(compile_ahead, "devices_of", lambda topology: jax.devices())
    monkeypatch.setitem(ahead.PLUGINS, "v5e", "jaxlib")
    options = dict(data__name="imagenet2012", data__canvas=96)
    report = mini_runs.compile_report(tmp_path, **options)
    assert report["fits"]
    assert report["devices"] == report["batch_per_device"] == 8
    memory = report["hbm_bytes_per_device"]
    assert memory["limit"] == 15.75 * 2**30
    assert 0 < memory["aliased"] <= memory["arguments"] < memory["total"]
    model = nnx.eval_shape(inputs.task_of_recipe(mini_runs.mae()).build_model)
    [all_reduce] = report["collectives"]
    assert all_reduce["kind"] == "all-reduce"
    gradient_bytes = 4 * model.parameter_count()
    assert_allclose(all_reduce["bytes_per_step"], gradient_bytes, rtol=0.02)
    network_regions = {
        f"{part} {branch}" for part in ("main", "decoder") for branch in BRANCHES
    }
    network_regions |= {
        "input",
        "embedding",
        "stem1",
        "stem2",
        "merge",
        "latent",
        "loss",
    }
    regions = report["regions"]
    assert network_regions | {"optimizer", "exchange"} <= regions.keys()
    for name in network_regions:
        assert all(value > 0 for value in regions[name].values()), name
    assert regions["optimizer"]["flops_per_image"] == 0
    # Four microbatches, each as large as the batch above, exchange gradients once.
    accumulated = mini_runs.compile_report(
        tmp_path, optimizer__accumulate_steps=4, batch_size=256, **options
    )
    assert_allclose(
        accumulated["collectives"][0]["bytes_per_step"],
        all_reduce["bytes_per_step"],
        rtol=0.02,
    )
    assert_allclose(accumulated["flops_per_image"], report["flops_per_image"], rtol=0.1)
