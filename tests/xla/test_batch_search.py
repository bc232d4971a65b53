"""Search for the largest batch."""

import json

import pytest
import recipes

from hivit_jax.main import main
from hivit_jax.tools import compile_ahead

pytestmark = pytest.mark.usefixtures("quick")


# --- The command ---------------------------------------------------------------------


def report(tmp_path, *more, topology="v5e:2x4", **overrides):
    flags = recipes.arguments(**{"batch_size": 64} | overrides)
    flags += [f"--topology={topology}", f"--workdir={tmp_path}", *more]
    assert main([*flags, "--mode=compile"]) == 0
    return json.loads((tmp_path / "compile.json").read_text())


@pytest.mark.parametrize("own", [8, 39, 64])
@pytest.mark.parametrize("most", [40, 100])
def test_search_for_the_largest_batch(monkeypatch, own, most):
    """To an eighth, by doubling and bisection."""
    tried = []

    def examine(config, devices, topology):
        tried.append(config.batch_size // 8)
        return {"fits": tried[-1] <= most}

    monkeypatch.setattr(compile_ahead, "step_report", examine)
    config = recipes.mae(batch_size=8 * own)
    start = {"batch_size": 8 * own, "batch_per_device": own, "fits": own <= most}
    start["topology"] = ""
    found = compile_ahead.largest_batch(config, [], start)
    low, high = (
        found[key] for key in ("largest_batch_per_device", "smallest_that_does_not_fit")
    )
    assert low <= most < high <= low + max(1, low // 8)
    assert found["compiles_of_the_search"] == len(tried) <= 7
    assert len({*tried, own}) == len(tried) + 1  # none twice
    assert config.batch_size == 8 * own


def test_sizes_of_the_search_divide(monkeypatch):
    """Into pairs that mix, in each of the parts of a step."""
    config = recipes.classifier(batch_size=96, optimizer__accumulate_steps=3)
    start = {"batch_size": 96, "batch_per_device": 12, "fits": False, "topology": ""}
    tried = []

    def examine(config, devices, topology):
        tried.append(config.batch_size // 8)
        return {"fits": False}

    monkeypatch.setattr(compile_ahead, "step_report", examine)
    compile_ahead.largest_batch(config, [], start)
    assert tried == [6]


def test_search_where_nothing_fits(monkeypatch):
    memory = {"total": None, "limit": 5000}
    report = {"fits": False, "hbm_bytes_per_device": memory}
    monkeypatch.setattr(compile_ahead, "step_report", lambda *_: report)
    start = {"batch_size": 32, "batch_per_device": 4, "topology": ""} | report
    found = compile_ahead.largest_batch(recipes.mae(batch_size=32), [], start)
    assert found["largest_batch_per_device"] == 0
