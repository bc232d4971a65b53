"""What chips can do at most, as their makers publish it; devices of such chips that are
not at hand, to compile for.
"""

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from hivit_jax.errors import ConfigError


class Chip(NamedTuple):
    """What a chip has and can do at most.

    memory: bytes of HBM that a program may use.
    flops: bfloat16 operations a second.
    bandwidth: bytes a second between chip and HBM.
    network: bytes a second that it sends to chips of its slice or node, on all links.
    source: where the figures are published.
    """

    memory: int
    flops: float
    bandwidth: float
    network: float
    source: str


GIB = 2**30
TPU_DOCS = "cloud.google.com/tpu/docs/{}, half of the bidirectional interconnect"
NVIDIA = "NVIDIA {} SXM data sheet, dense, half of the bidirectional NVLink"
# Of a TPU's 32, 16, 95, 32 GiB what libtpu 0.0.52 leaves to programs.
CHIPS = {
    "v4": Chip(int(30.75 * GIB), 275e12, 1228e9, 300e9, TPU_DOCS.format("v4")),
    "v5e": Chip(int(15.75 * GIB), 197e12, 819e9, 200e9, TPU_DOCS.format("v5e")),
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 600e9, TPU_DOCS.format("v5p")),
    "v6e": Chip(int(31.24 * GIB), 918e12, 1640e9, 400e9, TPU_DOCS.format("v6e")),
    "h100": Chip(80 * 10**9, 989e12, 3350e9, 450e9, NVIDIA.format("H100")),
    "h200": Chip(141 * 10**9, 989e12, 4800e9, 450e9, NVIDIA.format("H200")),
}
# What `jax.Device.device_kind` and PyTorch call them.
KINDS = {
    r"TPU v4": "v4",
    r"TPU v5( lite|e)": "v5e",
    r"TPU v5p?": "v5p",
    r"TPU v6( lite|e)": "v6e",
    r"NVIDIA H100 80GB HBM3": "h100",
    r"NVIDIA H200": "h200",
}
# The package with the compiler.
PLUGINS = {
    name: "jax-cuda13-plugin" if name.startswith("h") else "libtpu" for name in CHIPS
}
EXAMPLES = "v5e:16x16, v5p:4x4x4, v6e:16x16, v4:4x4x4, h100:8, h200:8"
# What the TPU compiler would ask of the machine it is on, were that a TPU's.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it compiles in any number of processes
}
# Autotuning would need the GPU.
GPU_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
# XLA's description of a Hopper SXM; NVIDIA's Hopper tuning guide and device queries.
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
    """The chip of that name, such as "TPU v5 lite"; None where it is not known."""
    names = [name for kind, name in KINDS.items() if re.fullmatch(kind, device_kind)]
    return CHIPS[names[0]] if names else None


def devices_of(topology: str) -> Sequence[jax.Device]:
    """Devices to compile for, of a topology such as "v5e:16x16" or "h100:8".

    From here on the process computes on the CPU alone.

    Raises:
      ConfigError: an unknown chip or shape, or a compiler that is not installed.
    """
    name, _, shape = topology.partition(":")
    if name not in CHIPS:
        raise ConfigError(
            f"unknown topology {topology!r}; expected CHIP:SHAPE, CHIP one of "
            f"{', '.join(CHIPS)}, such as {EXAMPLES}"
        )
    gpu = PLUGINS[name] != "libtpu"
    if gpu and not re.fullmatch("[1-8]", shape):
        raise ConfigError(f"topology={topology!r}; expected {name}:1 to {name}:8")
    if importlib.util.find_spec(PLUGINS[name].replace("-", "_")) is None:
        raise ConfigError(
            f"topology={topology!r} needs the compiler in {PLUGINS[name]}, which is "
            f"not installed; pip install 'hivit-jax[{'cuda' if gpu else 'tpu'}]'"
        )
    jax.config.update("jax_platforms", "cpu")  # whatever else is here is left alone
    options: dict[str, Any] = {"platform": "cuda" if gpu else "tpu"}
    if gpu:
        target = HOPPER.format(name=name.upper(), **CHIPS[name]._asdict())
        options |= {"topology": f"1x1x{shape}", "target_config": target}
    else:
        options["topology_name"] = topology
        for variable, value in TPU_ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
    if name == "v4":
        options["chip_config_name"] = "megacore"  # a chip's two cores are one device
    try:
        return topologies.get_topology_desc(**options).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"topology={topology!r}: {reason}\nexpected a shape that {name} comes in; "
            f"known: {EXAMPLES} and the like"
        ) from error
