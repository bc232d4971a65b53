"""Compare reading from local disk, a bucket and local copies of its files.

    python -m benchmarks.buckets [--rounds 4] [--delay 0.03]

The benchmark writes 420 photographs of 500x375 as class folders and as tar files. A
server on this machine stands in for the bucket and delays each answer. The CPU time of
the server is not counted. Two threads read the batches. The table contains medians of
interleaved rounds.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from benchmarks import photographs
from benchmarks.input_pipeline import BATCH, ROOT, recipe
from benchmarks.machine import processor
from hivit_jax import inputs
from hivit_jax.data.sources import registry

RESULTS = ROOT / "benchmarks" / "results" / "buckets.json"
SHARDS, STEPS = 8, 15


def write_tars(root: Path) -> None:
    """Write the photographs of ROOT/train as WebDataset tar files."""
    paths = sorted(root.glob("train/*/*"))
    for split in ("train", "val"):
        for shard in range(SHARDS):
            with tarfile.open(root / f"x-{split}-{shard}.tar", "w") as archive:
                for path in paths[shard::SHARDS]:
                    archive.add(path, f"{path.stem}.jpg")
                    label = tarfile.TarInfo(f"{path.stem}.cls")
                    label.size = 1
                    archive.addfile(label, io.BytesIO(b"0"))


def sources(root: Path) -> dict[str, object]:
    """Return {row of the table: config}."""
    options = {
        "class folders, local": {"dir": root},
        "class folders, bucket": {"dir": "gs://bucket"},
        "tar files, local": {"dir": root, "name": "webdataset"},
        "tar files, bucket": {"dir": "gs://bucket", "name": "webdataset"},
        "tar files, bucket, copied": {
            "dir": "gs://bucket",
            "name": "webdataset",
            "cache": root / "copies",
        },
    }
    return {row: recipe(root, workers=2, **data) for row, data in options.items()}


def measure(root: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Return images per CPU-second and images per second of each row."""
    configs = sources(root)
    throughputs: dict[str, list[tuple[float, float]]] = {row: [] for row in configs}
    for _ in range(rounds + 1):  # the first round is a warmup, and makes the copies
        for row, config in configs.items():
            registry.open_source(config.data, "train")
            cpu_began, began = time.process_time(), time.perf_counter()
            for _ in inputs.train_batches(config, 0, STEPS):
                pass
            seconds, images = time.perf_counter() - began, BATCH * STEPS
            cpu_seconds = time.process_time() - cpu_began
            throughputs[row].append((images / cpu_seconds, images / seconds))
    return {
        row: {
            "images_per_cpu_second": statistics.median(x for x, _ in values[1:]),
            "images_per_second": statistics.median(x for _, x in values[1:]),
        }
        for row, values in throughputs.items()
    }


def main() -> None:
    """Write the photographs, start the server and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--delay", type=float, default=0.03, help="seconds")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        photographs.write(root, {"train": 420, "val": 7})
        write_tars(root)
        server = ROOT / "tests" / "helpers" / "buckets.py"
        command = [sys.executable, server, root, str(args.delay)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            os.environ |= json.loads(process.stdout.readline())
            results = measure(root, args.rounds)
        finally:
            process.terminate()
    print(f"{'':28}images per CPU-second   images per second")
    for row, result in results.items():
        print(f"{row:28}{result['images_per_cpu_second']:21,.0f}", end="")
        print(f"{result['images_per_second']:20,.0f}")
    content = {"rows": results, "rounds": args.rounds, "delay_seconds": args.delay}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(content | {"cpu": processor()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
