"""What chips can do at most, as their makers publish it."""

import re
from typing import NamedTuple


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


def chip_of(device_kind: str) -> Chip | None:
    """The chip of that name, such as "TPU v5 lite"; None where it is not known."""
    names = [name for kind, name in KINDS.items() if re.fullmatch(kind, device_kind)]
    return CHIPS[names[0]] if names else None
