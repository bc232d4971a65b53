"""Description of the CPU, and peak memory of the process, for results of benchmarks."""

import platform
import resource
from pathlib import Path

VECTOR_EXTENSIONS = ("avx512f", "avx2", "avx")  # widest first


def processor() -> str:
    """Return name, family, model and widest vector extension of the CPU.

    Family and model are included because virtual machines often hide the name. If
    /proc/cpuinfo contains no model name, the result is `platform.processor()` or, if
    that is empty, `platform.machine()`.
    """
    path = Path("/proc/cpuinfo")
    lines = path.read_text().partition("\n\n")[0].splitlines() if path.exists() else ()
    info = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    if "model name" not in info:
        return platform.processor() or platform.machine()
    flags = info.get("flags", "").split()
    vectors = next((f", {name}" for name in VECTOR_EXTENSIONS if name in flags), "")
    family, model = info.get("cpu family"), info.get("model")
    return f"{info['model name']}, family {family}, model {model}{vectors}"


def peak_process_memory() -> int:
    """Return the peak memory of this process in bytes."""
    # Times 1024, because ru_maxrss is in KiB on Linux.
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
