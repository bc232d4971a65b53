"""Check numerics on a GPU or TPU, then measure speed, in one command.

    python -m benchmarks.accelerator [--platform cuda] [--only numbers fused ...]

The command runs these parts, most important first:

- "numbers" and "official": the tests in `TESTS`, which need pytest. "numbers" measures
  the errors of kernels and of bfloat16. "official" compares the networks in float32
  with the golden data of the official code.
- "peers JOB" and "peers JOB, others", not on a TPU: benchmarks.peers for each job.
  "peers JOB" compares with the official network, "peers JOB, others" with ViT-B and
  Swin-B. These parts need torch.
- one part for each entry of `VARIANTS` and, on a GPU, of `FLAGS`: benchmarks.train_step
  for pretraining, finetuning ("classify ...") or inference.

Every part is a separate process. A part that fails, or takes longer than `--limit`
seconds, is reported, and the next part starts. After each part, the results are written
to results/accelerator_PLATFORM.json. Results of parts that `--only` excludes are kept.
The exit code is 1 if a selected part failed.
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
TESTS = {
    "numbers": "tests/kernels/test_accelerator.py",
    "official": "tests/parity/test_official.py",
}
TAIL = 30  # number of last lines of a failed part's output in the results


class Variant(NamedTuple):
    """Variant of a step: overrides KEY=VALUE, XLA flags, flags of `train_step`."""

    overrides: tuple[str, ...] = ()
    xla_flags: str = ""
    options: tuple[str, ...] = ()


CLASSIFY = ("--config=finetune:base",)
INFERENCE = (*CLASSIFY, "--forward")
PLAIN, FUSED = ("model.kernels=plain",), ("model.kernels=fused",)
RESIZED = ("data.canvas=0",)  # images arrive in the model's size
VARIANTS = {
    "auto": Variant(),
    "classify auto": Variant(RESIZED, options=CLASSIFY),
    "classify plain": Variant(RESIZED + PLAIN, options=CLASSIFY),
    "inference auto": Variant(RESIZED, options=INFERENCE),
    "inference plain": Variant(RESIZED + PLAIN, options=INFERENCE),
    "fused": Variant(FUSED),
    "plain": Variant(PLAIN),
    "bfloat16 moments": Variant(("optimizer.first_moment_dtype=bfloat16",)),
    "remat": Variant(("model.remat=True",)),
    "scan": Variant(("model.scan_blocks=True",)),
}
# Suffix of a part's name -> rows of `benchmarks.peers`. There are two parts per job,
# because one part with all rows would exceed the time limit.
PEERS = {
    "": ("hivit_jax", "torch", "torch, compiled"),
    ", others": ("hivit_jax", "ViT-B, compiled", "Swin-B, compiled"),
}
# On GPUs only. Each flag is the opposite of XLA's default.
FLAGS = {
    "no command buffers": "--xla_gpu_enable_command_buffer=",
    "no Triton products": "--xla_gpu_enable_triton_gemm=false",
    "deterministic": "--xla_gpu_deterministic_ops=true",
    "latency hiding": "--xla_gpu_enable_latency_hiding_scheduler=true",
}


def parts_for(platform: str, batch: int, rounds: int, steps: int) -> dict[str, Any]:
    """Return {name: (command, environment variables)} of all parts."""
    variants, run_module = dict(VARIANTS), (sys.executable, "-m")
    if platform == "cuda":
        variants |= {name: Variant(xla_flags=flags) for name, flags in FLAGS.items()}
    # The CPU backend stays enabled because tests compute references on it.
    environment = {"JAX_PLATFORMS": "cpu" if platform == "cpu" else f"{platform},cpu"}
    pytest = (*run_module, "pytest", "-q", "-p", "no:xdist")
    counts = f"--rounds={rounds}", f"--steps={steps}", f"--batch={batch}"
    test_environment = dict(environment)
    if platform == "cuda":
        # Without this flag, XLA:GPU times several algorithms for every matrix product
        # in the many small programs that the tests compile.
        test_environment["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"
    parts = {name: ((*pytest, path), test_environment) for name, path in TESTS.items()}
    if platform != "tpu":
        device = "gpu" if platform == "cuda" else "cpu"
        for group, rows in PEERS.items():
            for job in ("pretrain", "classify", "inference"):
                options = (*counts, "--task", job, "--device", device, "--rows", *rows)
                command = (*run_module, "benchmarks.peers", *options)
                parts[f"peers {job}{group}"] = command, {}
    for name, variant in variants.items():
        overrides = ("--set", *variant.overrides) if variant.overrides else ()
        flags = f"{os.environ.get('XLA_FLAGS', '')} {variant.xla_flags}".strip()
        options = (*counts, *variant.options, *overrides)
        command = (*run_module, "benchmarks.train_step", *options)
        parts[name] = command, environment | {"XLA_FLAGS": flags}
    return parts


def run_part(
    command: tuple[str, ...], environment: dict[str, str], limit: float
) -> dict[str, Any]:
    """Run a part; return its exit code, seconds, output and result as JSON values.

    The flag ``--out FILE`` is added to the command of a benchmark. The result is the
    content of FILE, or None if there is no file.
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
    if result["model_flop_utilization"] is not None:
        line += f"{result['model_flop_utilization']:8.1%} of the peak"
    return line


def main(argv: list[str] | None = None) -> int:
    """Run the selected parts and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--platform", choices=("cuda", "tpu", "cpu"), default="cuda")
    text = "default: all parts; see --list. A word such as peers selects all parts "
    text += "whose names begin with it"
    add("--only", nargs="+", metavar="PART", help=text)
    add("--list", action="store_true", help="print the names of all parts and exit")
    add("--batch", type=int, default=256, help="images per step")
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=20, help="steps per round")
    add("--limit", type=float, default=420, help="time limit of a part, in seconds")
    add("--out", type=Path, help="the JSON file to write")
    args = parser.parse_args(argv)
    parts = parts_for(args.platform, args.batch, args.rounds, args.steps)
    if args.list:
        print("\n".join(parts))
        return 0
    selected = list(parts) if args.only is None else []
    for choice in args.only or ():
        begin_with_choice = [name for name in parts if name.startswith(f"{choice} ")]
        names = [choice] if choice in parts else begin_with_choice
        if not names:
            expected = ", ".join(parts)
            parser.error(f"--only: unknown {choice}; expected some of {expected}")
        selected += names
    out = args.out or RESULTS / f"accelerator_{args.platform}.json"
    results = json.loads(out.read_text()) if out.exists() else {}
    for name in selected:
        results[name] = run_part(*parts[name], args.limit)
        if results[name]["exit_code"] != 0:
            print("".join(f"{line}\n" for line in results[name]["output"]), end="")
        print(row(name, results[name]), flush=True)
        out.write_text(json.dumps(results, indent=2) + "\n")
    return int(any(results[name]["exit_code"] != 0 for name in selected))


if __name__ == "__main__":
    sys.exit(main())
