"""Peak rates of chips, and devices to compile for without the hardware."""

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from hivit_jax.errors import ConfigError


class Utilization(NamedTuple):
    """Fractions of a chip's limits that a training run reaches.

    Attributes:
      of_peak: fraction of the bfloat16 peak, with operations as in
        `Task.training_flops`.
      of_bound: fraction of the bound that `--mode compile` computes.
      measurement: the measured run, and the document that describes it; "": the
        fractions are assumed.
    """

    of_peak: float
    of_bound: float
    measurement: str = ""

    @property
    def basis(self) -> str:
        """The word "measured" or "assumed"."""
        return "measured" if self.measurement else "assumed"


ASSUMED = Utilization(0.4, 0.4)  # for planning; see docs/cost.md
MEASURED_H100 = Utilization(
    0.2453, 0.53, "HiViT-B, pretraining on one H100, docs/performance.md"
)


# Memory traffic limits the step on an H100. The H200 has the same peak FLOP/s and 1.43
# times the bandwidth, so it is assumed to reach 1.43 times the fraction of the peak.
# The bound of `--mode compile` already includes the bandwidth.
DERIVED_H200 = Utilization(MEASURED_H100.of_peak * 4800 / 3350, MEASURED_H100.of_bound)


class Chip(NamedTuple):
    """Memory and peak rates of a chip.

    Attributes:
      memory: bytes of device memory; of a TPU, only those that a program may use.
      flops: bfloat16 operations per second, dense, with float32 accumulation.
      bandwidth: bytes per second between the chip and its memory.
      network: bytes per second that the chip sends to its slice or node on all links.
      source: publication of these numbers.
      devices: number of JAX devices per chip.
      utilization: fractions of the peak and of the bound that a run reaches.
    """

    memory: int
    flops: float
    bandwidth: float
    network: float
    source: str
    devices: int = 1
    utilization: Utilization = ASSUMED


GIB = 2**30
TPU_DOCS = "cloud.google.com/tpu/docs/{}, half of the bidirectional interconnect"
TPU7X_SOURCE = TPU_DOCS.format("tpu7x")
NVIDIA_SXM = "NVIDIA {} SXM data sheet, dense, half of the bidirectional NVLink"
NVIDIA_PCIE = "NVIDIA {}, dense, half of the bidirectional PCIe 4.0 x16"
A100_SOURCE = NVIDIA_SXM.format("A100")
L4_SOURCE = NVIDIA_PCIE.format("L4 data sheet")
RTX4090_SOURCE = NVIDIA_PCIE.format("Ada GPU architecture white paper")
B200_SOURCE = (
    "NVIDIA HGX B200 data sheet, per GPU, dense, half of the bidirectional NVLink"
)
# The memory of a TPU is the part that libtpu 0.0.52 (tpu7x: 0.0.42) leaves to programs.
# The chips have 32 (v4), 16 (v5e), 95 (v5p), 32 (v6e) and 192 GiB (tpu7x).
CHIPS = {
    "v4": Chip(int(30.75 * GIB), 275e12, 1228e9, 300e9, TPU_DOCS.format("v4")),
    "v5e": Chip(int(15.75 * GIB), 197e12, 819e9, 200e9, TPU_DOCS.format("v5e")),
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 600e9, TPU_DOCS.format("v5p")),
    "v6e": Chip(int(31.24 * GIB), 918e12, 1640e9, 400e9, TPU_DOCS.format("v6e")),
    "tpu7x": Chip(int(189.5 * GIB), 2307e12, 7380e9, 600e9, TPU7X_SOURCE, devices=2),
    "a100-40": Chip(40 * 10**9, 312e12, 1555e9, 300e9, A100_SOURCE),
    "a100-80": Chip(80 * 10**9, 312e12, 2039e9, 300e9, A100_SOURCE),
    "l4": Chip(24 * 10**9, 121e12, 300e9, 32e9, L4_SOURCE),
    "rtx4090": Chip(24 * 10**9, 165.2e12, 1008e9, 32e9, RTX4090_SOURCE),
    "h100": Chip(
        80 * 10**9,
        989e12,
        3350e9,
        450e9,
        NVIDIA_SXM.format("H100"),
        utilization=MEASURED_H100,
    ),
    "h200": Chip(
        141 * 10**9,
        989e12,
        4800e9,
        450e9,
        NVIDIA_SXM.format("H200"),
        utilization=DERIVED_H200,
    ),
    "b200": Chip(180 * 10**9, 2250e12, 8000e9, 900e9, B200_SOURCE),
}
# Pattern of a device's name in JAX (`device_kind`) and PyTorch -> key of `CHIPS`. The
# A100 with PCIe has the peak rate of the A100 SXM.
DEVICE_KINDS = {
    r"TPU v4": "v4",
    r"TPU v5( lite|e)": "v5e",
    r"TPU v5p?": "v5p",
    r"TPU v6( lite|e)": "v6e",
    r"TPU7x": "tpu7x",
    r"NVIDIA A100-(SXM4|PCIE)-40GB": "a100-40",
    r"NVIDIA A100(-SXM4-80GB| 80GB PCIe)": "a100-80",
    r"NVIDIA L4": "l4",
    r"NVIDIA GeForce RTX 4090": "rtx4090",
    r"NVIDIA H100 80GB HBM3": "h100",
    r"NVIDIA H200": "h200",
    r"NVIDIA B200": "b200",
}
# Chip -> package with the compiler for the chip. Other chips are missing, because their
# compilers need the hardware or were not tested without it.
PLUGINS = dict.fromkeys(("v4", "v5e", "v5p", "v6e", "tpu7x"), "libtpu")
PLUGINS |= dict.fromkeys(("h100", "h200"), "jax-cuda13-plugin")
# Chip -> number of dimensions of the shape of a slice, for the chips whose names in
# Google Cloud `suggested_topology` converts.
SLICE_NDIMS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}
EXAMPLES = "v5e:16x16, v5p:4x4x4, v6e:16x16, v4:4x4x4, tpu7x:4x4x4, h100:8, h200:8"
# Without these values, the TPU compiler queries the machine that it runs on, which need
# not be a TPU host.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # so that several processes can compile at once
}
# Autotuning is off, because it needs a GPU. Triton matrix products are off, because
# they need autotuning.
GPU_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
# XLA's description of a Hopper SXM GPU. The numbers are from NVIDIA's Hopper tuning
# guide and from device queries.
HOPPER = """\
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_core: 233472  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  memory_bandwidth: {bandwidth:.0f}  device_memory_size: {memory}
}}
platform_name: "CUDA"
device_description_str: "NVIDIA {name}"
dnn_version_info {{ major: 9  minor: 12 }}
runtime_version {{ major: 13 }}
"""


def chip_of(device_kind: str) -> Chip | None:
    """Return the chip of a device name such as "TPU v5 lite"; None if unknown."""
    for pattern, name in DEVICE_KINDS.items():
        if re.fullmatch(pattern, device_kind):
            return CHIPS[name]
    return None


def utilization_notes() -> list[str]:
    """Return lines that explain the words "measured" and "assumed" in a table."""
    notes = [
        f"measured on {name}: {chip.utilization.measurement}"
        for name, chip in CHIPS.items()
        if chip.utilization.measurement
    ]
    return [
        *notes,
        "assumed: no measurement; a chip with little bandwidth per FLOP/s is likely to "
        "reach less than the assumed fraction",
    ]


def peak_flops(device_kind: str) -> float | None:
    """Return the bfloat16 operations per second of a JAX device; None if unknown."""
    chip = chip_of(device_kind)
    return chip and chip.flops / chip.devices


def suggested_topology(text: str) -> str:
    """Return the topology that `text` probably means, or "" if this is unknown.

    For example, "v5e:8x8 (64 chips)" for "v5e-64" and "v5litepod-64". In such names
    of Google Cloud, the number counts the chips of v5e and v6e, but the cores of v4 and
    v5p, which have two cores per chip.
    """
    match = re.fullmatch(r"(\w+)([-:])(\d+)(x[\dx]+)?", text.lower())
    if not match:
        return ""
    name, separator, number, more_dims = match.groups()
    name, chips = name.replace("v5litepod", "v5e"), int(number)
    if more_dims or PLUGINS.get(name, "libtpu") != "libtpu":
        return f"{name}:{number}{more_dims or ''}" if name in PLUGINS else ""
    if name not in SLICE_NDIMS:
        return ""
    if SLICE_NDIMS[name] == 3 and separator == "-":
        chips //= 2
    doublings, ndim = chips.bit_length() - 1, SLICE_NDIMS[name]
    if chips != 2**doublings or doublings < ndim:
        return ""
    exponents = [(doublings + dim) // ndim for dim in range(ndim)]
    return f"{name}:{'x'.join(str(2**each) for each in exponents)} ({chips} chips)"


def devices_of(topology: str) -> Sequence[jax.Device]:
    """Return devices to compile for, from a topology such as "v5e:16x16" or "h100:8".

    After this call the process computes on the CPU only.

    Raises:
      ConfigError: the chip or shape is unknown, or the compiler is not installed.
    """
    name, _, shape = topology.partition(":")
    suggestion = suggested_topology(topology)
    # A well-formed topology that XLA rejects, such as "v5e:3x3", is its own suggestion.
    hint = "" if suggestion in ("", topology) else f"did you mean {suggestion}? "
    if name not in PLUGINS:
        problem = "no compiler for" if name in CHIPS else "unknown"
        raise ConfigError(
            f"{problem} topology {topology!r}; "
            f"{hint}expected CHIP:SHAPE with CHIP one of "
            f"{', '.join(PLUGINS)}; examples: {EXAMPLES}\n"
            "--mode describe prints the hours of training at the peak rate of "
            f"{', '.join(CHIPS)}"
        )
    is_gpu = PLUGINS[name] != "libtpu"
    remedy = f"{hint}expected a shape that exists for {name}; examples: {EXAMPLES}"
    if not is_gpu and not re.fullmatch(r"\d+(x\d+)+", shape):
        raise ConfigError(f"topology={topology!r} is not valid\n{remedy}")
    if is_gpu and not re.fullmatch("[1-8]", shape):
        raise ConfigError(
            f"topology={topology!r} is not one node of GPUs; expected {name}:1 to "
            f"{name}:8"
        )
    if importlib.util.find_spec(PLUGINS[name].replace("-", "_")) is None:
        extra = "cuda" if is_gpu else "tpu"
        raise ConfigError(
            f"topology={topology!r} needs the compiler in {PLUGINS[name]}, which is "
            f"not installed; run pip install 'hivit-jax[{extra}]'\n"
            "--mode describe estimates the hours of a run without the compiler"
        )
    # Only the CPU, because JAX would otherwise initialize this machine's accelerators.
    jax.config.update("jax_platforms", "cpu")
    options: dict[str, Any] = {"platform": "cuda" if is_gpu else "tpu"}
    if is_gpu:
        target = HOPPER.format(name=name.upper(), **CHIPS[name]._asdict())
        options |= {"topology": f"1x1x{shape}", "target_config": target}
    else:
        options["topology_name"] = topology
        for variable, value in TPU_ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
    if name == "v4":
        options["chip_config_name"] = "megacore"  # one device for both cores of a chip
    try:
        return topologies.get_topology_desc(**options).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"topology={topology!r} is not valid: {reason}\n{remedy}"
        ) from error
