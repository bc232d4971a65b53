"""The machine that was measured."""

import platform
from pathlib import Path

VECTORS = ("avx512f", "avx2", "avx")  # widest first


def processor() -> str:
    """Name, family and model of the CPU, and its widest vectors, where Linux tells:
    virtual machines often hide the name. Elsewhere what Python knows.
    """
    path = Path("/proc/cpuinfo")
    lines = path.read_text().partition("\n\n")[0].splitlines() if path.exists() else ()
    found = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    if "model name" not in found:
        return platform.processor() or platform.machine()
    flags = found.get("flags", "").split()
    vectors = next((f", {each}" for each in VECTORS if each in flags), "")
    family, model = found.get("cpu family"), found.get("model")
    return f"{found['model name']}, family {family}, model {model}{vectors}"
