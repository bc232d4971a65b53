"""XLA's flags for tests."""

from importlib.metadata import version


def virtual_devices(count: int) -> str:
    """That many CPU devices."""
    return f"--xla_force_host_platform_device_count={count}"


def quick_to_compile() -> str:
    """The older code generator, in half the time; newer versions are without it."""
    major, minor, *_ = map(int, version("jaxlib").split("."))
    return "--xla_cpu_use_fusion_emitters=false" if (major, minor) < (0, 11) else ""
