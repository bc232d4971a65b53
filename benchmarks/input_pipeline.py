"""Compare input pipelines on ImageNet-like JPEGs, in images per CPU-second.

    python -m benchmarks.input_pipeline [--rounds 5] [--only readers] [--memory 10000]

The benchmark writes 420 photographs of 500x375 pixels (benchmarks/photographs.py) into
a temporary directory. In each of `--rounds` rounds, every pipeline processes 2,560
images, so that each photograph is used about six times. CPU-seconds are summed over all
threads. The table contains the medians. Without tensorflow, the rows with tf.data are
skipped.

`--only readers` compares only the two values of `data.reader` and writes no results.
`--memory N` only prints the memory of the process during N batches.
"""

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from benchmarks import photographs
from benchmarks.machine import processor
from hivit_jax import config as configs
from hivit_jax import inputs
from hivit_jax.data import crops, order, transforms
from hivit_jax.data.sources import registry
from hivit_jax.tools.record_shards import shrink
from hivit_jax.xla.compile import keep_freed_memory

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "input_pipeline.json"
BATCH, STEPS = 64, 40  # images per batch, batches per round
SIZE, SCALE, CANVAS = (224, 224), (0.2, 1.0), 512
# Rows of the table for the two values of `data.reader`, with equal batches.
THREADS = "hivit_jax, resized on the device"
TF_DATA = "tf.data, exact: data.reader=tf.data"


def mae_config(directory: Path, **data):
    """Return the config of mae_base; by default, one thread reads class folders."""
    options = {"name": "folder", "dir": directory, "workers": 1} | data
    flags = [f"--config.data.{key}={value}" for key, value in options.items()]
    path = ROOT / "configs" / "mae_base.py"
    return configs.load(str(path), [*flags, f"--config.batch_size={BATCH}"])


def pipeline(directory: Path, **data) -> Callable[[], Iterator]:
    """Return a function that starts a round of hivit_jax, from files to batches."""
    config = mae_config(directory, **data)
    return lambda: inputs.train_batches(config, 0, STEPS)


def per_image(directory: Path, process: Callable) -> Callable[[], Iterator]:
    """Return a function that starts a round, which calls `process` for each image.

    The files are read before the measurement.

    Args:
      process: function of the encoded image and its index.
    """
    source = registry.open_source(mae_config(directory).data, "train")
    indices = [i % len(source) for i in range(BATCH * STEPS)]
    encoded = [source.sample(index)["image"] for index in indices]

    def run():
        for index, image in zip(indices, encoded, strict=True):
            process(image, index)
            yield

    return run


def torchvision_like(encoded: bytes, index: int) -> None:
    """Decode, crop and resize as torchvision's ImageFolder and RandomResizedCrop do."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    draws = transforms.uniforms(0, 0, index)
    crop = crops.random_resized_crop(image.height, image.width, draws, SCALE)
    top, left, height, width = crop.box
    image = image.crop((left, top, left + width, top + height))
    np.asarray(image.resize(SIZE, Image.Resampling.BICUBIC))


def tf_data(directory: Path, method: str) -> Callable[[], Iterator]:
    """Return a function that starts a round of a tf.data pipeline with two threads.

    The crops equal those of hivit_jax.

    Args:
      method: "bicubic", "bilinear", "antialiased bicubic", or "canvas": the device
        resizes the crops later, as in hivit_jax.
    """
    import tensorflow as tf

    source = registry.open_source(mae_config(directory).data, "train")
    positions = np.arange(BATCH * STEPS)
    indices = order.samples_at(positions, len(source), 0)[0].tolist()
    boxes = []
    for index in indices:
        draws = transforms.uniforms(0, 0, index)
        boxes.append(crops.random_resized_crop(375, 500, draws, SCALE).box)

    def load(path, box):
        image = tf.image.decode_and_crop_jpeg(
            tf.io.read_file(path), box, channels=3, dct_method="INTEGER_ACCURATE"
        )
        if method == "canvas":
            return image
        kernel, antialias = method.split()[-1], method.startswith("antialiased")
        pixels = tf.image.resize(image, SIZE, kernel, antialias=antialias)
        return tf.saturate_cast(tf.round(pixels), tf.uint8)

    def run():
        dataset = tf.data.Dataset.from_tensor_slices(
            ([source.name(i) for i in indices], np.array(boxes, np.int32))
        ).map(load, num_parallel_calls=2, deterministic=True)
        if method == "canvas":
            dataset = dataset.padded_batch(BATCH, (CANVAS, CANVAS, 3))
        else:
            dataset = dataset.batch(BATCH)
        return dataset.prefetch(2).as_numpy_iterator()

    return run


def variants(root: Path) -> dict[str, Callable[[], Iterator]]:
    """Return {row of the table: function that starts a round}."""
    starts = {
        "decoding only, simplejpeg": per_image(
            root, lambda encoded, _: simplejpeg.decode_jpeg(encoded)
        ),
        "decoding only, PIL": per_image(
            root, lambda encoded, _: Image.open(io.BytesIO(encoded)).convert("RGB")
        ),
        "PIL, as torchvision": per_image(root, torchvision_like),
        THREADS: pipeline(root),
        "hivit_jax, on the device, bilinear, not antialiased": pipeline(
            root, interpolation="bilinear", antialias=False
        ),
        "hivit_jax, on the host": pipeline(root, canvas=0),
        "hivit_jax, on the host, bilinear": pipeline(
            root, canvas=0, interpolation="bilinear"
        ),
        "hivit_jax, on the host, with RandAugment": pipeline(
            root, canvas=0, randaugment=True
        ),
        "hivit_jax, on the device, short side 320": pipeline(root / "320"),
        "hivit_jax, on the device, short side 256": pipeline(root / "256"),
    }
    try:
        import tensorflow  # noqa: F401
    except ImportError:
        return starts
    starts[TF_DATA] = pipeline(root, reader="tf.data")
    for method in ("antialiased bicubic", "bicubic", "bilinear", "canvas"):
        starts[f"tf.data, {method}"] = tf_data(root, method)
    return starts


def write_reduced(root: Path, short_side: int) -> None:
    """Write reduced training images, as `prepare_data --short_side` stores them."""
    for path in sorted(root.glob("train/*/*")):
        target = root / str(short_side) / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(shrink(path.read_bytes(), short_side))


def seconds_to_jump() -> float:
    """Return the seconds to compute the 4,096 crops of step 100,000 on ImageNet.

    No image is read or decoded.
    """
    began = time.perf_counter()
    positions = 100_000 * 4096 + np.arange(4096)
    indices, epochs = order.samples_at(positions, 1_281_167, seed=0)
    for index, epoch in zip(indices.tolist(), epochs.tolist(), strict=True):
        draws = transforms.uniforms(0, epoch, index)
        crops.random_resized_crop(375, 500, draws, SCALE)
    return time.perf_counter() - began


def print_memory(root: Path, num_batches: int) -> None:
    """Print the memory of this process about ten times while it reads batches."""
    config = mae_config(root, workers=2)
    interval = max(num_batches // 10, 1)
    for count, _ in enumerate(inputs.train_batches(config, 0, num_batches), 1):
        if count == min(100, interval) or count % interval == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            print(f"batch {count:>7,}  {resident:7,.0f} MiB", flush=True)


def compare(starts: dict[str, Callable[[], Iterator]], rounds: int) -> dict[str, float]:
    """Return images per CPU-second by row: medians of interleaved rounds."""
    throughputs: dict[str, list[float]] = {name: [] for name in starts}
    for _ in range(rounds + 1):  # the first round is a warmup
        for name, start in starts.items():
            batches, began = start(), time.process_time()
            for _ in batches:
                pass
            throughputs[name].append(BATCH * STEPS / (time.process_time() - began))
    return {name: statistics.median(values[1:]) for name, values in throughputs.items()}


def report(root: Path, rounds: int) -> None:
    """Measure all pipelines, print the table and write the results."""
    for short_side in (320, 256):
        write_reduced(root, short_side)
    throughputs = compare(variants(root), rounds)
    decoding = throughputs["decoding only, simplejpeg"]
    print(f"{'':52}images per CPU-second  relative to decoding")
    for name, throughput in throughputs.items():
        print(f"{name:52}{throughput:21,.0f}{throughput / decoding:22.0%}")
    seconds = seconds_to_jump()
    print(f"computing the 4,096 crops of step 100,000: {seconds:.2f} s")
    packages = ["numpy", "pillow", "simplejpeg"]
    packages += ["tensorflow-cpu"] * (TF_DATA in throughputs)
    result = {
        "images_per_cpu_second": throughputs,
        "jump_seconds": seconds,
        "rounds": rounds,
        "cpu": processor(),
        "versions": {name: version(name) for name in packages},
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


def report_readers(root: Path, rounds: int) -> None:
    """Print images per CPU-second of both values of `data.reader`, and their ratio.

    malloc keeps freed memory, as in training with tf.data.
    """
    keep_freed_memory()
    starts = {
        THREADS: pipeline(root),
        TF_DATA: pipeline(root, reader="tf.data"),
    }
    throughputs = compare(starts, rounds)
    for name, throughput in throughputs.items():
        ratio = throughput / throughputs[THREADS]
        print(f"{name:44}{throughput:9,.0f} images per CPU-second{ratio:8.0%}")


def main() -> None:
    """Write the photographs and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--rounds", type=int, default=5)
    add("--only", choices=("readers",), help="compare only the values of data.reader")
    text = "only print the memory of the process during this number of batches"
    add("--memory", type=int, default=0, metavar="BATCHES", help=text)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        photographs.write(root, {"train": 420})
        if args.memory:
            print_memory(root, args.memory)
        elif args.only:
            report_readers(root, args.rounds)
        else:
            report(root, args.rounds)


if __name__ == "__main__":
    main()
