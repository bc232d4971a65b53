"""XLA flags of the tests, and a digest of the processor."""

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path


def processor_digest() -> str:
    """Return a digest of the CPU's instruction set."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else [platform.processor()]
    flags = [line for line in lines if line.startswith(("flags", "Features"))] or lines
    return hashlib.sha256(flags[0].encode()).hexdigest()[:12]


def virtual_devices_flag(count: int) -> str:
    """Return the XLA flag for `count` virtual CPU devices."""
    return f"--xla_force_host_platform_device_count={count}"


def fast_compile_flag() -> str:
    """Return the XLA flag for XLA:CPU's older code generator, or "".

    The older generator compiles twice as fast. The function returns "" for jaxlib 0.11
    and later, which do not contain this generator.
    """
    major, minor, *_ = map(int, version("jaxlib").split("."))
    return "--xla_cpu_use_fusion_emitters=false" if (major, minor) < (0, 11) else ""
