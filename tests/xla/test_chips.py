"""Tests of finding chips by device name, and of metrics that use their peaks."""

import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from hivit_jax.errors import ConfigError
from hivit_jax.reporting import metrics
from hivit_jax.xla import chips


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("cpu", None),
        # The peaks of these devices differ from those of chips with similar names.
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA L40S", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_device_name_determines_the_chip(kind, name):
    assert chips.chip_of(kind) == (name and chips.CHIPS[name])


def test_peak_of_a_device_is_its_fraction_of_the_chip():
    """A TPU7x chip consists of two devices, a v5e of one."""
    assert chips.peak_flops("TPU7x") == 2307e12 / 2
    assert chips.peak_flops("TPU v5 lite") == 197e12
    assert chips.peak_flops("cpu") is None


@pytest.mark.parametrize(("kind", "count"), [("TPU v5 lite", 4), ("TPU7x", 8)])
def test_metrics_of_four_chips_include_utilization_and_memory(kind, count, monkeypatch):
    """Each chip of one or two devices reaches half of its peak FLOP/s."""
    devices = [SimpleNamespace(device_kind=kind)] * count
    local = SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 7})
    monkeypatch.setattr(jax, "local_devices", lambda: [local])
    flops = chips.chip_of(kind).flops / 2 / 100  # so that 100 images/s are half a peak
    assert metrics.device_metrics(400.0, devices, flops) == {
        "images_per_second": 400,
        "images_per_second_per_chip": 100,
        "mfu": pytest.approx(0.5),
        "device_memory": 7,
    }


def test_metrics_of_unknown_cost_have_no_utilization():
    devices = [SimpleNamespace(device_kind="TPU v5 lite")]
    assert "mfu" not in metrics.device_metrics(400.0, devices, 0)


def test_metrics_of_a_cpu_contain_only_throughput():
    found = metrics.device_metrics(400.0, jax.devices()[:4], 1e9)
    assert found == {"images_per_second": 400, "images_per_second_per_chip": 100}


@pytest.mark.parametrize(
    ("text", "topology"),
    [
        ("v5e-64", "v5e:8x8 (64 chips)"),
        ("v5litepod-64", "v5e:8x8 (64 chips)"),
        ("v6e-8", "v6e:2x4 (8 chips)"),
        ("v5e:256", "v5e:16x16 (256 chips)"),
        ("v5p-128", "v5p:4x4x4 (64 chips)"),  # 128 cores
        ("v4-64", "v4:2x4x4 (32 chips)"),
        ("v5e-4x4", "v5e:4x4"),
        ("h100-8", "h100:8"),
        ("v5e-60", ""),
        ("tpu7x-64", ""),
        ("a100-8", ""),
        ("v5e", ""),
    ],
)
def test_error_suggests_the_shape_of_a_slice(text, topology):
    """Names of Google Cloud contain the number of chips or cores, not the shape."""
    assert chips.suggested_topology(text) == topology
    if "-" in text:
        with pytest.raises(ConfigError) as error:
            chips.devices_of(text)
        assert (f"did you mean {topology}?" in str(error.value)) == bool(topology)


@pytest.mark.parametrize("topology", ["v5e:8by8", "v5e:64", "v5p:", "tpu7x:4x"])
def test_malformed_shape_is_an_error_without_the_compiler(topology, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="is not valid\n.*expected a shape"):
        chips.devices_of(topology)


def test_rejected_shape_is_not_suggested_again(monkeypatch):
    """The shape is well-formed, but no slice has it."""

    def reject(**options):
        raise ValueError("no such slice")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(chips, "TPU_ENVIRONMENT", {})
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    monkeypatch.setattr(chips.topologies, "get_topology_desc", reject)
    with pytest.raises(ConfigError, match="no such slice\nexpected a shape"):
        chips.devices_of("v5e:3x3")


ROOT = Path(__file__).parents[2]


def test_utilization_of_an_h100_is_the_one_in_the_benchmark():
    """The throughput is measured; docs/cost.md contains the bound of `compile`."""
    results = ROOT / "benchmarks" / "results"
    rows = json.loads((results / "peers_pretrain_gpu.json").read_text())["rows"]
    speed = rows["hivit_jax"]["images_per_second"]
    accelerator = json.loads((results / "accelerator_cuda.json").read_text())
    flops = accelerator["auto"]["result"]["model_flops_per_image"]
    chip = chips.CHIPS["h100"]
    assert chip.utilization.basis == "measured"
    assert chip.utilization.of_peak == pytest.approx(
        speed * flops / chip.flops, rel=1e-3
    )
    table = (ROOT / "docs" / "cost.md").read_text()
    bound = re.search(r"`compile`, h100:8, .* \| ([\d,]+) \|", table)[1]
    fraction_of_bound = speed / float(bound.replace(",", ""))
    assert chip.utilization.of_bound == pytest.approx(fraction_of_bound, abs=0.005)
    others = [c.utilization for name, c in chips.CHIPS.items() if name != "h100"]
    assert {utilization.basis for utilization in others} == {"assumed"}


def test_h200_is_faster_than_an_h100_in_proportion_to_bandwidth():
    """docs/cost.md contains the derived utilization of an H200."""
    h100, h200 = (chips.CHIPS[name] for name in ("h100", "h200"))
    speedup = (
        h200.utilization.of_peak * h200.flops / (h100.utilization.of_peak * h100.flops)
    )
    assert speedup == pytest.approx(h200.bandwidth / h100.bandwidth)
    row = (
        f"| `h200` | {h200.utilization.of_peak:.1%} | {h200.utilization.of_bound:.0%} |"
    )
    assert row.replace("%", " %") in (ROOT / "docs" / "cost.md").read_text()


def test_table_of_chips_in_the_docs_is_complete():
    """docs/cost.md lists the peaks of all chips, and which of them have a compiler."""
    text = (ROOT / "docs" / "cost.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    rows = {row[0].strip("| `"): row[1:] for row in rows if len(row) == 6}
    assert rows.keys() == chips.CHIPS.keys()
    for name, (memory, flops, bandwidth, _, compiles) in rows.items():
        chip = chips.CHIPS[name]
        assert memory == f"{chip.memory / 1e9:,.1f}", name
        assert float(flops.replace(",", "")) == chip.flops / 1e12, name
        assert bandwidth == f"{chip.bandwidth / 1e9:,.0f}", name
        assert compiles.startswith("yes") == (name in chips.PLUGINS), name
