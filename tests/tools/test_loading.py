"""Tests of the log line about the model that a command uses."""

import json

import pytest
from mini_runs import ROOT

from hivit_jax.tools import loading
from hivit_jax.weights.load import Pretrained

CLASSIFY = {"task": "classify", "data": {}}
ACCURACY = {10: 0.9, 20: 0.9, 30: float("nan"), 40: 0.5, 50: 1.0}  # step -> eval/top1


@pytest.mark.parametrize(
    ("step", "recipe", "expected"),
    [
        (20, CLASSIFY, "step 20, the best; the newest is step 40"),
        (30, CLASSIFY, "step 30; the newest is step 40; the best is "),
        (40, CLASSIFY, "step 40, the newest; the best is step 20"),
        # Pretraining has no accuracy; the best evaluation has the smallest loss.
        (40, {"task": "mae"}, "step 40, the newest and best"),
    ],
)
def test_checkpoint_rank_contains_the_newest_and_best_step(
    step, recipe, expected, tmp_path
):
    """Of equal accuracies, the lowest loss is the best. Step 50 has no checkpoint."""
    for saved_step in (10, 20, 30, 40):
        (tmp_path / "checkpoints" / str(saved_step) / "params").mkdir(parents=True)
    lines = [
        {"step": k, "eval/count": 9, "eval/top1": value, "eval/loss": 1 / k}
        for k, value in ACCURACY.items()
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + "\n")
    pretrained = pretrained_stub(tmp_path / "checkpoints" / str(step), recipe)
    assert loading.checkpoint_rank(pretrained).startswith(expected)
    (tmp_path / "metrics.jsonl").unlink()
    rank = "the newest" if step == 40 else "the newest is step 40"
    assert loading.checkpoint_rank(pretrained).endswith(rank)


def pretrained_stub(path, recipe):
    """Return a pretrained model without arrays, as if read from a checkpoint."""
    empty = dict(
        arguments={}, params={}, notes=[], guesses=[], unused=[], results={}, info={}
    )
    return Pretrained(str(path), f"step {path.name}", recipe=recipe, **empty)


@pytest.mark.parametrize(
    ("name", "info", "expected"),
    [
        (
            "hivit_tiny",
            {"std": (0.2,) * 3},
            "note: assumed, as not in the file: mean (0.485, 0.456, 0.406), crop 0.875"
            "; the names of the classes are unknown",
        ),
        (
            "mae_hivit_base",
            {"mean": (0.5,) * 3, "crop": 1.0},
            "note: assumed, as not in the file: std (0.229, 0.224, 0.225)",
        ),
        ("hivit_tiny", {"mean": (), "std": (), "crop": 1.0}, ""),
    ],
)
def test_assumed_preprocessing_is_noted(name, info, expected, tmp_path):
    params = {} if name.startswith("mae") else {"head/kernel": None}
    pretrained = pretrained_stub(tmp_path, {})._replace(
        arguments={"name": name}, info=info, params=params
    )
    assert loading.preprocessing_note(pretrained) == expected


def test_line_about_a_weight_file_contains_no_rank(capsys):
    path = ROOT / "tests/parity/golden/official_mae.pth"
    loading.read_model(path)
    assert f"model: {path}\n" in capsys.readouterr().out
