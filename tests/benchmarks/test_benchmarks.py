"""Tests of benchmarks, and of imports of all programs outside the package."""

import argparse
import importlib
import importlib.util
import json
import os
import sys

import mini_runs
import pytest

from benchmarks import (
    accelerator,
    compiled,
    paper,
    peer_rows,
    plain_config,
    small_data,
    tpu_cycles,
)
from hivit_jax import config as configs
from hivit_jax import recipes
from hivit_jax.kernels import dispatch

# Overrides for a small model, synthetic images and batches of 4
SMALL = {**mini_runs.SOURCES["synthetic"], "batch_size": 4}


PROGRAMS = [
    path
    for folder in ("benchmarks", "examples", "launch")
    for path in sorted(mini_runs.ROOT.glob(f"{folder}/*.py"))
]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_programs_can_be_imported(path):
    if "\nimport torch" in path.read_text():
        pytest.skip("imports torch")
    name = ".".join(path.relative_to(mini_runs.ROOT).with_suffix("").parts)
    assert importlib.import_module(name).__doc__


@pytest.mark.extras
@pytest.mark.processes
@pytest.mark.slow
def test_train_step_needs_only_jax_flax_optax_and_numpy(tmp_path):
    blocked = mini_runs.block_imports(
        tmp_path / "blocked",
        *("ml_collections", "orbax", "etils", "tensorflow", "tensorflow_datasets"),
        *("clu", "simplejpeg", "PIL", "matplotlib", "safetensors", "sklearn", "torch"),
    )
    out = tmp_path / "out.json"
    code, text, error = mini_runs.run_process(
        *("-m", "benchmarks.train_step", "--rounds", 2, "--steps", 1, "--out", out),
        *("--set", *(f"{key}={value}" for key, value in SMALL.items())),
        PYTHONPATH=os.pathsep.join([str(blocked), str(mini_runs.ROOT)]),
    )
    assert code == 0, error
    result = json.loads(out.read_text())
    assert f"{result['images_per_second']:,.1f} images/s" in text
    assert result["batch_size"] == 4
    assert result["device"] == "cpu"
    assert result["model_flop_utilization"] is None
    assert len(result["seconds_of_rounds"]) == 2
    assert 0 < result["loss"] < 10
    assert result["peak_memory_bytes"] > 32 * 2**20


def test_plain_config_reads_recipes_as_ml_collections_does(monkeypatch):
    """A copy of `hivit_jax.config` that imports `plain_config` loads equal configs."""

    def read(module):
        flags = ["--config.optimizer.betas=(0.9,0.99)", "--config.data.flip=false"]
        loaded = [module.load(name, flags) for name in recipes.names()]
        return [json.loads(module.to_json(config)) for config in loaded]

    for name in ("ml_collections", "ml_collections.config_dict"):
        monkeypatch.setitem(sys.modules, name, plain_config)
    spec = importlib.util.find_spec("hivit_jax.config")
    on_plain_config = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(on_plain_config)
    expected = read(configs)
    assert expected
    assert read(on_plain_config) == expected


def test_accelerator_reports_failed_and_hanging_parts(tmp_path, monkeypatch, capsys):
    """benchmarks.accelerator runs each part in a process and ends a part that hangs.

    Later runs keep the results of earlier runs. An unknown part is an error.
    """
    program = "import json, sys; json.dump(dict(images_per_second=8, "
    program += "seconds_per_step=.5, peak_memory_bytes=2**30, compile_seconds=3, "
    program += "model_flop_utilization=.25), open(sys.argv[-1], 'w'))"
    programs = {
        "plain": program,
        "auto": "print('no such kernel'); raise SystemExit(3)",
        "fused": "import time; time.sleep(60)",
    }
    parts = {name: ((sys.executable, "-c", p), {}) for name, p in programs.items()}
    monkeypatch.setattr(accelerator, "parts_for", lambda *_: parts)
    out = tmp_path / "out.json"
    for name, limit in (("plain", 60), ("auto", 60), ("fused", 0.2)):
        argv = [f"--out={out}", "--only", name, f"--limit={limit}"]
        assert accelerator.main(argv) == (name != "plain")
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert printed == [
        "plain 8.0 images/s 500.0 ms 1.00 GiB 3.0 s to compile 25.0% of the peak",
        "no such kernel",
        "auto failed",
        "fused took too long",
    ]
    results = json.loads(out.read_text())
    assert [results[name]["exit_code"] for name in parts] == [0, 3, None]
    assert results["plain"]["result"]["images_per_second"] == 8
    with pytest.raises(SystemExit):
        accelerator.main(["--only", "quick"])
    assert "expected some of plain, auto, fused" in capsys.readouterr().err


@pytest.mark.torch
@pytest.mark.parametrize("task", ["pretrain", "classify", "inference"])
def test_pytorch_copy_has_the_same_loss_before_training(task, tmp_path, monkeypatch):
    """The copy receives all arrays of our model, here with one block per stage."""
    sizes = {"model.embed_dim": 64, "model.depths": "(1,1,1)", "model.num_heads": 2}
    load = peer_rows.load_recipe
    monkeypatch.setattr(
        peer_rows, "load_recipe", lambda name, x, args: load(name, x | sizes, args)
    )
    monkeypatch.setitem(peer_rows.HIVIT, "HiViT-B", (64, (1, 1, 1), 2))
    args = argparse.Namespace(task=task, batch=8, device="cpu", threads=1)
    args.torch_mode, inputs = "default", tmp_path / "first_step.npz"
    _, _, ours = peer_rows.start_ours(args, inputs)
    copy = peer_rows.start_torch("HiViT-B", False, False, args, inputs)[2]
    assert ours["loss"] == pytest.approx(copy["loss"], rel=1e-5)


def test_accelerator_parts_cover_every_choice_of_kernels(capsys):
    """The parts use the requested platform. --list prints the names of the parts."""
    parts = accelerator.parts_for("cuda", 256, 5, 20)
    jobs = "pretrain", "classify", "inference"
    peers = {f"peers {job}{group}" for job in jobs for group in accelerator.PEERS}
    assert {*accelerator.TESTS, *dispatch.CHOICES, *peers} < set(parts)
    platforms = {
        environment.get("JAX_PLATFORMS", "cuda,cpu")
        for _, environment in parts.values()
    }
    assert platforms == {"cuda,cpu"}
    assert "model.kernels=fused" in parts["fused"][0]
    assert "--forward" in parts["inference auto"][0]
    paths = accelerator.TESTS.values()
    assert all((accelerator.ROOT / path).exists() for path in paths)
    assert set(parts) - set(accelerator.parts_for("tpu", 256, 5, 20)) == {
        *accelerator.FLAGS,
        *peers,
    }
    assert accelerator.main(["--list"]) == 0
    assert capsys.readouterr().out.splitlines() == list(parts)


@pytest.mark.slow
def test_paper_measures_only_missing_cells(tmp_path, monkeypatch, capsys):
    """--again measures all selected cells again.

    A ratio is printed only if one run measured both cells.
    """
    measured = []

    def measure(names, args):
        measured.append((args.task, names))
        speeds = [4.0 if "HiViT" in name else 2.0 for name in names]
        return {
            name: {"run": len(measured), "images_per_second": speed}
            for name, speed in zip(names, speeds, strict=True)
        }

    monkeypatch.setattr(paper, "measure", measure)
    monkeypatch.setattr(paper.importlib.util, "find_spec", lambda name: None)
    hivit, swin, vit = (
        f"pretrain {model} hivit_jax" for model in ("HiViT-B", "Swin-B", "ViT-B")
    )
    for only in ([hivit, swin], [swin, vit], [swin, vit, "--again"]):
        assert paper.main([f"--out={tmp_path}", "--only", *only]) == 0
    groups = [hivit, swin], [vit], [vit, swin]
    assert measured == [("pretrain", names) for names in groups]
    lines = capsys.readouterr().out.splitlines()
    ratio_line = "hivit_jax: HiViT-B / Swin-B, pretraining: 2.00 (the paper: 1.9)"
    # The third command measures Swin-B again without HiViT-B, and prints no ratio.
    assert lines.count(ratio_line) == 2
    assert not any("HiViT-B / ViT-B" in line for line in lines)
    assert (tmp_path / "cpu.png").stat().st_size > 1000
    assert paper.main([f"--out={tmp_path}", "--only", "HiViT-H"]) == 2


def test_paper_compiles_only_missing_cells(tmp_path, monkeypatch, capsys):
    """--again compiles all selected cells again."""
    compilations = []

    def report_for(recipe, chip, flags, workdir):
        compilations.append((recipe, chip))
        memory = {"total": 2**30}
        facts = dict(batch_per_device=64, fits=True, roofline=None)
        return facts | {"hbm_bytes_per_device": memory}

    monkeypatch.setattr(compiled, "report_for", report_for)
    flags = ["--topologies", "--chip", "h100:8", f"--out={tmp_path}"]
    flags += ["--only", "pretrain HiViT-B", "classify Swin-B"]
    expected = [("mae_base", "h100:8"), ("finetune_swin:base", "h100:8")]
    for more, count in (([], 1), ([], 1), (["--again"], 2)):
        assert paper.main([*flags, *more]) == 0
        assert compilations == expected * count
    assert "| HiViT-B, pretrain, h100:8 | 64 | yes | 1.00 |" in capsys.readouterr().out


def test_small_data_runs_selected_experiments(tmp_path, monkeypatch, capsys):
    """An experiment runs if its name contains one of the selected texts."""
    recipes_run = []

    def run(recipe, *_):
        recipes_run.append(recipe)
        return {"eval/top1": 0.5}

    for name, value in {
        "RESULT": tmp_path / "small_data.json",
        "DRAWS": 1,
        "DATASETS": {"digits": dict},
        "write": lambda *_: None,
        "run": run,
    }.items():
        monkeypatch.setattr(small_data, name, value)
    small_data.measure(tmp_path, None, ["scratch: finetune", "linear"])
    pretrained_and_probed = ["folder_mae", "linear:tiny", "folder_mae", "folder_linear"]
    assert recipes_run == ["finetune:tiny", *pretrained_and_probed]
    assert capsys.readouterr().out.count("50.0") == 3


@pytest.mark.torch
@pytest.mark.parametrize("job", ["pretrain", "classify"])
def test_networks_of_the_paper_have_equal_parameter_counts(job):
    """The PyTorch networks have as many parameters as our models."""
    torch = pytest.importorskip("torch")
    from flax import nnx

    from benchmarks import train_step

    args = argparse.Namespace(batch=8, device="cpu", task=job)
    for cell_job, model, program in paper.CELLS.values():
        if (cell_job, program) != (job, "torch"):
            continue
        config = peer_rows.load_recipe(*paper.recipe_of(job, model), args)
        ours = nnx.eval_shape(train_step.task_of(config).build_model)
        with torch.device("meta"):
            network = peer_rows.build_network(model, job)
        count = sum(parameter.numel() for parameter in network.parameters())
        assert count == ours.parameter_count(), model


# Shortened listing of the TPU compiler: 4 tiles of rows, 3 images in each.
LISTING = """\
= control target key start
LH: loop header
= control target key end

     0   :  { %s1_s0 = inlined_call_operand.vmem [shape: bf16[8,128], index: 0] }
   0x1   :  { %5 = vsyncpa [#allocation4], 0 }
   0x2 LB: > { %s2_s1 = sadd.s32 1, %s3_s2 }
   0x3   : > { %9 = sbr.rel (%p1_p2) target = $region60  ;;  %v1_v0 = vmov 0 }
   0x4   : > { %8 = sbr.rel (%p2_p3) target = $region68 }
   0x5   : > { %v2_v0 = vld [vmem:[%s2_s1] sm:$0xff] }
   0x6   : > { %v3_v0 = vmov 0.0 }
   0x7 PF: > { %v4_v0 = vld [vmem:[%s2_s1] sm:$0xff] }
   0x8 LB: >> { %v5_v0 = vld [vmem:[%s2_s1] sm:$0xff] }
   0x9   : >> { %p3_p7 = scmp.ge.s32.totalorder %s4_s9, 3 /* loop exit test */ }
   0xa   : >> { %7 = sbr.rel (!%p3_p7) target = $region194 }
   0xb   : > { %v6_v0 = vld [vmem:[%s2_s1] sm:$0xff] }
   0xc PF: > { %v7_v0 = vld [vmem:[%s2_s1] sm:$0xff] }
   0xd   : > { %p4_p7 = scmp.ge.s32.totalorder %s5_s4, 6 /* loop exit test */ }
   0xe   :  { %6 = vsyncpa [#allocation4], 1 }
"""


def test_bundles_of_loops_count_once_per_iteration():
    """Two of the six iterations over tiles compute nothing and are not counted.

    The inner loop is over images.
    """
    # 3 bundles outside the loops, 7 per tile, 3 per image of a tile, and 2 in a nested
    # region, which runs only once
    assert tpu_cycles.count_bundles(LISTING) == 3 + 4 * 7 + 4 * 3 * 3 + 2
