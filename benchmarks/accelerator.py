"""All that only a GPU or TPU can tell, in one command: first numbers, then times.

    python -m benchmarks.accelerator [--platform cuda] [--only numbers fused ...]

- numbers: on the device, the networks against the golden data (tests/test_parity.py),
  and kernels and bfloat16 against float32 (tests/test_accelerator.py). Needs pytest.
- one part for each of `STEPS`: benchmarks.train_step of configs/mae_base.py.
- peers: benchmarks.peers, on a GPU. Needs torch.

Every part is a process of its own. One that fails, or takes longer than `--limit`
seconds, is told of, and the next one starts. After each part results are written to
results/accelerator_PLATFORM.json, where parts that `--only` leaves out are kept. Exits
with 1 if a part failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TESTS = "tests/test_parity.py", "tests/test_accelerator.py"
TAIL = 30  # lines of a part's output that are kept if it fails


class Step(NamedTuple):
    """A variant of the train step: config values on top of the recipe, flags of XLA."""

    values: tuple[str, ...] = ()
    flags: str = ""


STEPS = {
    "plain": Step(("model.kernels=plain",)),
    "auto": Step(),
    "fused": Step(("model.kernels=fused",)),
    "bfloat16 moments": Step(("optimizer.first_moment_dtype=bfloat16",)),
    "remat": Step(("model.remat=True",)),
    "scan": Step(("model.scan_blocks=True",)),
}
# On GPUs; what XLA does by itself is the other way round.
FLAGS = {
    "no command buffers": "--xla_gpu_enable_command_buffer=",
    "no Triton products": "--xla_gpu_enable_triton_gemm=false",
    "deterministic": "--xla_gpu_deterministic_ops=true",
    "latency hiding": "--xla_gpu_enable_latency_hiding_scheduler=true",
}


def parts_for(platform: str, batch: int, rounds: int, count: int) -> dict[str, Any]:
    """Name -> (command, environment) of every part; the command takes ``--out FILE``
    if it is a benchmark.
    """
    steps, python = dict(STEPS), (sys.executable, "-m")
    if platform == "cuda":
        steps |= {name: Step(flags=flags) for name, flags in FLAGS.items()}
    # The host's CPU is there for what tests compute on the side.
    base = {"JAX_PLATFORMS": "cpu" if platform == "cpu" else f"{platform},cpu"}
    tests = (*python, "pytest", "-q", "-p", "no:xdist", *TESTS)
    sizes = f"--rounds={rounds}", f"--steps={count}", f"--batch={batch}"
    parts = {"numbers": (tests, base)}
    for name, step in steps.items():
        values = ("--set", *step.values) if step.values else ()
        flags = f"{os.environ.get('XLA_FLAGS', '')} {step.flags}".strip()
        command = (*python, "benchmarks.train_step", *sizes, *values)
        parts[name] = command, base | {"XLA_FLAGS": flags}
    if platform != "tpu":
        device = "gpu" if platform == "cuda" else "cpu"
        rows = "hivit_jax", "torch", "torch, compiled"
        rows += "ViT-B MAE, compiled", "Swin-B SimMIM, compiled"
        options = (*sizes, "--device", device, "--rows", *rows)
        parts["peers"] = (*python, "benchmarks.peers", *options), {}
    return parts


def run_part(
    command: tuple[str, ...], environment: dict[str, str], limit: float
) -> dict[str, Any]:
    """Runs a part to its end; what came of it, as JSON values."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "out.json", Path(folder) / "log"
        if "pytest" not in command:
            command = (*command, "--out", str(out))
        try:
            with log.open("wb") as file:
                code = subprocess.run(
                    command,
                    cwd=ROOT,
                    env=os.environ | environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=limit,
                ).returncode
        except subprocess.TimeoutExpired:
            code = None
        lines = log.read_text(errors="replace").splitlines()
        found = json.loads(out.read_text()) if out.exists() else None
    return {
        "exit_code": code,  # None: it took too long
        "seconds": time.perf_counter() - began,
        "said": lines[-TAIL:] if code != 0 else lines[-1:],
        "result": found,
    }


def row(name: str, part: dict[str, Any]) -> str:
    """A line on a part."""
    line, found = f"{name:20}", part["result"] or {}
    if part["exit_code"] != 0:
        return line + ("took too long" if part["exit_code"] is None else "failed")
    if "images_per_second" not in found:
        return line + " ".join(part["said"])
    line += f"{found['images_per_second']:10,.1f} images/s"
    line += f"{1e3 * found['seconds_per_step']:9,.1f} ms"
    line += f"{found['peak_memory_bytes'] / 2**30:8.2f} GiB"
    line += f"{found['compile_seconds']:7.1f} s to compile"
    if found["model_flop_utilisation"] is not None:
        line += f"{found['model_flop_utilisation']:8.1%} of the peak"
    return line


def main(argv: list[str] | None = None) -> int:
    """Runs all parts; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--platform", choices=("cuda", "tpu", "cpu"), default="cuda")
    add("--only", nargs="+", metavar="PART", help="see the docstring; default: all")
    add("--batch", type=int, default=256, help="images a step")
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=20, help="of a round")
    add("--limit", type=float, default=300, help="seconds of a part")
    add("--out", type=Path, help="the JSON file to write")
    args = parser.parse_args(argv)
    parts = parts_for(args.platform, args.batch, args.rounds, args.steps)
    if unknown := set(args.only or ()) - set(parts):
        parser.error(f"--only {' '.join(unknown)}; expected some of {', '.join(parts)}")
    out = args.out or RESULTS / f"accelerator_{args.platform}.json"
    found = json.loads(out.read_text()) if out.exists() else {}
    for name in args.only or parts:
        found[name] = run_part(*parts[name], args.limit)
        for line in found[name]["said"] if found[name]["exit_code"] != 0 else ():
            print(line)
        print(row(name, found[name]), flush=True)
        out.write_text(json.dumps(found, indent=2) + "\n")
    return int(any(found[name]["exit_code"] != 0 for name in args.only or parts))


if __name__ == "__main__":
    sys.exit(main())
