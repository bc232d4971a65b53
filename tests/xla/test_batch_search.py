"""Tests of the search for the largest batch that fits."""

import mini_runs
import pytest

from hivit_jax.tools import compile_ahead

pytestmark = pytest.mark.usefixtures("minimal_output")


@pytest.mark.parametrize("start_size", [8, 39, 64])
@pytest.mark.parametrize("limit", [40, 100])
def test_search_finds_almost_the_largest_batch(monkeypatch, start_size, limit):
    """The result is at most an eighth too small, and no size is tried twice."""
    tried = []

    def report(config, devices, topology):
        tried.append(config.batch_size // 8)
        return {"fits": tried[-1] <= limit}

    monkeypatch.setattr(compile_ahead, "step_report", report)
    config = mini_runs.mae(batch_size=8 * start_size)
    start = {
        "batch_size": 8 * start_size,
        "batch_per_device": start_size,
        "fits": start_size <= limit,
    }
    start["topology"] = ""
    result = compile_ahead.largest_batch(config, [], start)
    low, high = (
        result[key]
        for key in ("largest_batch_per_device", "smallest_that_does_not_fit")
    )
    assert low <= limit < high <= low + max(1, low // 8)
    assert result["compiles_of_the_search"] == len(tried) <= 7
    assert len({*tried, start_size}) == len(tried) + 1
    assert config.batch_size == 8 * start_size


def test_search_tries_only_even_microbatches(monkeypatch):
    """A device's share of a microbatch is even, because Mixup pairs its images.

    The batch has three microbatches, so the size per device is a multiple of 6.
    """
    config = mini_runs.classifier(batch_size=96, optimizer__accumulate_steps=3)
    start = {"batch_size": 96, "batch_per_device": 12, "fits": False, "topology": ""}
    tried = []

    def report(config, devices, topology):
        tried.append(config.batch_size // 8)
        return {"fits": False}

    monkeypatch.setattr(compile_ahead, "step_report", report)
    compile_ahead.largest_batch(config, [], start)
    assert tried == [6]


def test_search_returns_0_if_no_batch_fits(monkeypatch):
    memory = {"total": None, "limit": 5000}
    report = {"fits": False, "hbm_bytes_per_device": memory}
    monkeypatch.setattr(compile_ahead, "step_report", lambda *_: report)
    start = {"batch_size": 32, "batch_per_device": 4, "topology": ""} | report
    result = compile_ahead.largest_batch(mini_runs.mae(batch_size=32), [], start)
    assert result["largest_batch_per_device"] == 0
