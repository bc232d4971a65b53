"""Check numerics on a GPU or TPU, then measure speed, in one command.

    python -m benchmarks.accelerator [--platform cuda] [--only numbers fused ...]

The command runs these parts:

- numbers: the tests `TESTS` compare the networks with the golden data, and kernels and
  bfloat16 with float32. This part requires pytest.
- one part per entry of `STEPS`: benchmarks.train_step on configs/mae_base.py.
- peers: benchmarks.peers, on a GPU only. This part requires torch.

Every part is a separate process. A part that fails, or takes longer than `--limit`
seconds, is reported, and the next part starts. After each part the results are written
to results/accelerator_PLATFORM.json. Results of parts that `--only` excludes are kept.
The exit code is 1 if a part failed.
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
TESTS = "tests/parity/test_official.py", "tests/kernels/test_accelerator.py"
TAIL = 30  # the last lines of output of a failed part are saved


class Step(NamedTuple):
    """Variant of the train step: config overrides ("KEY=VALUE") and XLA flags."""

    overrides: tuple[str, ...] = ()
    xla_flags: str = ""


STEPS = {
    "plain": Step(("model.kernels=plain",)),
    "auto": Step(),
    "fused": Step(("model.kernels=fused",)),
    "bfloat16 moments": Step(("optimizer.first_moment_dtype=bfloat16",)),
    "remat": Step(("model.remat=True",)),
    "scan": Step(("model.scan_blocks=True",)),
}
# Variants on GPUs only. Each flag is the opposite of XLA's default.
FLAGS = {
    "no command buffers": "--xla_gpu_enable_command_buffer=",
    "no Triton products": "--xla_gpu_enable_triton_gemm=false",
    "deterministic": "--xla_gpu_deterministic_ops=true",
    "latency hiding": "--xla_gpu_enable_latency_hiding_scheduler=true",
}


def parts_for(platform: str, batch: int, rounds: int, steps: int) -> dict[str, Any]:
    """Return {name: (command, environment variables)} of all parts."""
    variants, python = dict(STEPS), (sys.executable, "-m")
    if platform == "cuda":
        variants |= {name: Step(xla_flags=flags) for name, flags in FLAGS.items()}
    # The CPU backend stays enabled because tests compute references on it.
    base = {"JAX_PLATFORMS": "cpu" if platform == "cpu" else f"{platform},cpu"}
    tests = (*python, "pytest", "-q", "-p", "no:xdist", *TESTS)
    counts = f"--rounds={rounds}", f"--steps={steps}", f"--batch={batch}"
    # Without this flag, XLA:GPU times several algorithms for every matrix product, and
    # the tests compile many small programs.
    quick = {"XLA_FLAGS": "--xla_gpu_autotune_level=0"} if platform == "cuda" else {}
    parts = {"numbers": (tests, base | quick)}
    for name, step in variants.items():
        overrides = ("--set", *step.overrides) if step.overrides else ()
        flags = f"{os.environ.get('XLA_FLAGS', '')} {step.xla_flags}".strip()
        command = (*python, "benchmarks.train_step", *counts, *overrides)
        parts[name] = command, base | {"XLA_FLAGS": flags}
    if platform != "tpu":
        device = "gpu" if platform == "cuda" else "cpu"
        rows = "hivit_jax", "torch", "torch, compiled"
        rows += "ViT-B MAE, compiled", "Swin-B SimMIM, compiled"
        options = (*counts, "--device", device, "--rows", *rows)
        parts["peers"] = (*python, "benchmarks.peers", *options), {}
    return parts


def run_part(
    command: tuple[str, ...], environment: dict[str, str], limit: float
) -> dict[str, Any]:
    """Run a part and return its result as JSON values.

    This function adds the flag ``--out`` to the command of a benchmark, and returns the
    content of that file.
    """
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
        result = json.loads(out.read_text()) if out.exists() else None
    return {
        "exit_code": code,  # None: timeout
        "seconds": time.perf_counter() - began,
        "output": lines[-TAIL:] if code != 0 else lines[-1:],
        "result": result,
    }


def row(name: str, part: dict[str, Any]) -> str:
    """Summarize a part in one line."""
    line, result = f"{name:20}", part["result"] or {}
    if part["exit_code"] != 0:
        return line + ("took too long" if part["exit_code"] is None else "failed")
    if "images_per_second" not in result:
        return line + " ".join(part["output"])
    line += f"{result['images_per_second']:10,.1f} images/s"
    line += f"{1e3 * result['seconds_per_step']:9,.1f} ms"
    line += f"{result['peak_memory_bytes'] / 2**30:8.2f} GiB"
    line += f"{result['compile_seconds']:7.1f} s to compile"
    if result["model_flop_utilisation"] is not None:
        line += f"{result['model_flop_utilisation']:8.1%} of the peak"
    return line


def main(argv: list[str] | None = None) -> int:
    """Run all parts and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--platform", choices=("cuda", "tpu", "cpu"), default="cuda")
    add("--only", nargs="+", metavar="PART", help="default: all parts")
    add("--batch", type=int, default=256, help="images per step")
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=20, help="steps per round")
    add("--limit", type=float, default=600, help="time limit of a part in seconds")
    add("--out", type=Path, help="the JSON file to write")
    args = parser.parse_args(argv)
    parts = parts_for(args.platform, args.batch, args.rounds, args.steps)
    if unknown := set(args.only or ()) - set(parts):
        parser.error(f"--only {' '.join(unknown)}; expected some of {', '.join(parts)}")
    out = args.out or RESULTS / f"accelerator_{args.platform}.json"
    results = json.loads(out.read_text()) if out.exists() else {}
    selected = args.only or parts
    for name in selected:
        results[name] = run_part(*parts[name], args.limit)
        if results[name]["exit_code"] != 0:
            print("".join(f"{line}\n" for line in results[name]["output"]), end="")
        print(row(name, results[name]), flush=True)
        out.write_text(json.dumps(results, indent=2) + "\n")
    return int(any(results[name]["exit_code"] != 0 for name in selected))


if __name__ == "__main__":
    sys.exit(main())
