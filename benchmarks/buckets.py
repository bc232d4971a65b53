"""Compare reading from a local disk, from a bucket and from local copies of a bucket.

    python -m benchmarks.buckets [--rounds 4] [--batches 30] [--delay 0.03]

The benchmark writes 420 photographs of 500x375 pixels as class folders and as tar
files. A server on this machine stands in for the bucket and delays each answer. The CPU
time of the server is not counted. Batches are read with two threads. The first batches
of each round are not counted, because during these batches tf.data traces its
functions. The table contains medians over interleaved rounds. Its last column names
the components that read and decode the images. Without tensorflow, the tf.data rows are
skipped.
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
from importlib.util import find_spec
from pathlib import Path

from benchmarks import photographs
from benchmarks.input_pipeline import BATCH, ROOT, mae_config
from benchmarks.machine import processor
from hivit_jax import inputs
from hivit_jax.data.sources import registry
from hivit_jax.xla.compile import keep_freed_memory

RESULTS = ROOT / "benchmarks" / "results" / "buckets.json"
SHARDS = 8  # tar files per split
WARMUP = 3  # batches at the start of a round that are not counted


def write_tars(root: Path) -> None:
    """Write WebDataset tar files to `root`.

    Both splits contain the photographs in `root`/train.
    """
    paths = sorted(root.glob("train/*/*"))
    for split in ("train", "val"):
        for shard in range(SHARDS):
            with tarfile.open(root / f"x-{split}-{shard}.tar", "w") as archive:
                for path in paths[shard::SHARDS]:
                    archive.add(path, f"{path.stem}.jpg")
                    label = tarfile.TarInfo(f"{path.stem}.cls")
                    label.size = 1
                    archive.addfile(label, io.BytesIO(b"0"))


def row_configs(root: Path) -> dict[tuple[str, str, str], object]:
    """Return {(files, reader, components that read and decode): config}."""
    tars = {"name": "webdataset"}
    data_keys = {
        "class folders, local": ("file", {"dir": root}),
        "class folders, bucket": ("tensorstore", {"dir": "gs://bucket"}),
        "tar files, local": ("file", {"dir": root} | tars),
        "tar files, bucket": ("tensorstore", {"dir": "gs://bucket"} | tars),
        "tar files, bucket, copied": (
            "copy",
            {"dir": "gs://bucket", "cache": root / "copies"} | tars,
        ),
    }
    readers = ["threads"] + ["tf.data"] * (find_spec("tensorflow") is not None)
    configs = {}
    for files, (origin, data) in data_keys.items():
        for reader in readers:
            read_by = f"{origin} -> simplejpeg"
            if reader == "tf.data":
                read_by += " in tf.numpy_function"
                if files == "class folders, local":
                    read_by = "tensorflow reads and decodes"
            options = {k: v for k, v in data.items() if k != "dir"}
            options |= {"workers": 2, "reader": reader}
            configs[files, reader, read_by] = mae_config(data["dir"], **options)
    return configs


def measure(
    root: Path, rounds: int, num_batches: int
) -> dict[tuple[str, str, str], dict[str, float]]:
    """Return images per CPU-second and images per second of each row."""
    keep_freed_memory()  # as in training
    configs = row_configs(root)
    rates: dict[tuple, list[tuple[float, float]]] = {row: [] for row in configs}
    for _ in range(rounds + 1):  # the first round is a warmup, and makes the copies
        for row, config in configs.items():
            registry.open_source(config.data, "train")
            batches = inputs.train_batches(config, 0, WARMUP + num_batches)
            for _ in range(WARMUP):
                next(batches)
            cpu, wall = time.process_time(), time.perf_counter()
            images = BATCH * sum(1 for _ in batches)
            spent = time.process_time() - cpu, time.perf_counter() - wall
            rates[row].append((images / spent[0], images / spent[1]))
    return {
        row: {
            "images_per_cpu_second": statistics.median(x for x, _ in values[1:]),
            "images_per_second": statistics.median(x for _, x in values[1:]),
        }
        for row, values in rates.items()
    }


def main() -> None:
    """Write the photographs, start the server and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--batches", type=int, default=30, help="per round")
    parser.add_argument("--delay", type=float, default=0.03, help="seconds per answer")
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
            rates = measure(root, args.rounds, args.batches)
        finally:
            process.terminate()
    print(f"{'files':27}{'reader':9}images per CPU-second  per second  read by")
    for (files, reader, read_by), rate in rates.items():
        print(f"{files:27}{reader:9}{rate['images_per_cpu_second']:21,.0f}", end="")
        print(f"{rate['images_per_second']:12,.0f}  {read_by}")
    result = {
        "rows": [
            dict(zip(("files", "reader", "read_by"), row, strict=True)) | rate
            for row, rate in rates.items()
        ],
        "rounds": args.rounds,
        "batches": args.batches,
        "delay_seconds": args.delay,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result | {"cpu": processor()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
