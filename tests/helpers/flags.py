"""XLA flags of the tests."""

from importlib.metadata import version


def virtual_devices(count: int) -> str:
    """Return the flag for `count` virtual CPU devices."""
    return f"--xla_force_host_platform_device_count={count}"


def quick_to_compile() -> str:
    """Return the flag for XLA:CPU's older code generator, which compiles twice as fast.

    JAX 0.11 and later no longer contain it.
    """
    major, minor, *_ = map(int, version("jaxlib").split("."))
    return "--xla_cpu_use_fusion_emitters=false" if (major, minor) < (0, 11) else ""
