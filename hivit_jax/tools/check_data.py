"""Check a dataset before training: ``python -m hivit_jax.tools.check_data --config F``.

Reads the images of both splits as training does. Prints their sizes, unusual formats
and unreadable files, and an estimate of the CPU cores that keep one accelerator busy.
"""

import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any, BinaryIO

import numpy as np
from flax import nnx
from tqdm import tqdm

from hivit_jax import config as configs
from hivit_jax import inputs, platforms, tasks
from hivit_jax.data.decoding import decode
from hivit_jax.data.findings import CLIPPED, LOST, image_findings
from hivit_jax.data.loader import Loader, available_cores
from hivit_jax.data.order import permutation, samples_at
from hivit_jax.data.sources.registry import open_source
from hivit_jax.data.transforms import Transform
from hivit_jax.errors import ConfigError, DataError, Parser, exit_code
from hivit_jax.models import Model, image_shape
from hivit_jax.tools.outputs import output_path

IMAGES_PER_JOB = 32
MAX_LISTED = 20  # names in the printed report
TIMING_SECONDS = 3.0  # CPU time spent on measuring the loader
UTILIZATION = 0.4  # assumed share of an accelerator's peak FLOP/s
PEAK_FLOPS = {"H100": 989e12, "TPU v5e": 197e12, "TPU v5p": 459e12}  # bfloat16
UNREADABLE, BAD_LABEL = "unreadable", "with an invalid label"
NEED_RANGE = "that require data.value_range"


class Split:
    """The images of "train" or "test": all of them, or a random sample.

    Args:
      sample: number of images to draw; 0: all.

    Attributes:
      indices: dataset indices of the k images, int64 [k].
      labels: int64 [k]; -1 for an unreadable image or an invalid label.
      sizes: height and width, int64 [k, 2]; 0 for an unreadable image.
      findings: finding, such as "unreadable", -> dataset index -> detail.
    """

    def __init__(self, config: Any, split: str, sample: int = 0):
        own = config.data.train_split if split == "train" else config.data.eval_split
        self.title = f"{split} ({own})" if own else split
        self.config, self.channels = config, image_shape(config.model)[2]
        self.source = open_source(config.data, split)
        n = len(self.source)
        self.indices = np.sort(permutation(0, 0, n)[: sample or n])
        self.labels = np.full(len(self.indices), -1)
        self.sizes = np.zeros((len(self.indices), 2), np.int64)
        empty = {UNREADABLE: {}, BAD_LABEL: {}}
        self.findings: dict[str, dict[int, str]] = defaultdict(dict, empty)

    def read(self) -> None:
        """Read the images in threads and fill the attributes; show a progress bar."""
        starts = range(0, len(self.indices), IMAGES_PER_JOB)
        bar = tqdm(total=len(self.indices), desc=self.title, unit=" images")
        threads = self.config.data.workers or available_cores()
        with bar, ThreadPoolExecutor(threads) as pool:
            for count in pool.map(self._read, starts):
                bar.update(count)

    def _read(self, start: int) -> int:
        indices = self.indices[start : start + IMAGES_PER_JOB].tolist()
        data, size = self.config.data, image_shape(self.config.model)[:2]
        for position, index in enumerate(indices, start):
            try:
                sample = self.source.sample(index)
                encoded, label = sample["image"], sample["label"]
                pixels = decode(encoded, self.channels, data.value_range)
            except DataError as error:
                self.findings[NEED_RANGE][index] = str(error)
                continue
            except Exception as error:  # a broken file can raise any type
                words = f"{type(error).__name__}: {error}".split()
                self.findings[UNREADABLE][index] = " ".join(words)
                continue
            self.sizes[position] = pixels.shape[:2]
            if 0 <= label < len(self.source.classes):
                self.labels[position] = label
            else:
                self.findings[BAD_LABEL][index] = str(label)
            name = partial(self.name, index)
            options = size, data.canvas, data.value_range
            found = image_findings(encoded, name, pixels, *options)
            for finding, detail in found.items():
                self.findings[finding][index] = detail
        return len(indices)

    def write_unreadable(self, listing: BinaryIO, reasons: BinaryIO) -> None:
        """Write a line per unreadable image: its name, and name, tab and reason."""
        for index, reason in sorted(self.findings[UNREADABLE].items()):
            name = self.source.name(index).replace("\n", "\\n")
            listing.write(os.fsencode(f"{name}\n"))
            reasons.write(f"{self.name(index)}\t{reason}\n".encode())

    def name(self, index: int) -> str:
        """Return an image's name; escape bytes that are not valid UTF-8."""
        return self.source.name(index).encode(errors="backslashreplace").decode()

    def per_class(self) -> np.ndarray:
        """Return the number of usable images per class, int64 [classes]."""
        labels = self.labels[self.labels >= 0]
        return np.bincount(labels, minlength=len(self.source.classes))

    def faults(self) -> dict[str, list[str]]:
        """Return fault -> the affected images, with details, or the affected classes.

        Clipped values are included. Empty classes are a fault only if the whole split
        was read.
        """
        faults = {}
        for fault in (UNREADABLE, BAD_LABEL, NEED_RANGE, LOST, CLIPPED):
            details = sorted(self.findings.get(fault, {}).items())
            faults[fault] = [f"{self.name(i)}: {detail}" for i, detail in details]
        if len(self.indices) == len(self.source):
            empty = np.flatnonzero(self.per_class() == 0)
            faults["classes without an image"] = [self.source.classes[i] for i in empty]
        return faults


def split_report(split: Split, faults: dict[str, list[str]]) -> str:
    """Return the report on a split: sizes, findings and the first names per fault."""
    n, k, classes = len(split.source), len(split.indices), len(split.source.classes)
    lines = [f"{split.title}: {n:,} images, {classes:,} classes"]
    lines[0] += f"; {k:,} images checked" * (k < n)
    lines += ["", _row("", "min", "median", "max")]
    heights, widths = split.sizes[split.sizes.all(1)].T
    rows = {"images per class": split.per_class(), "height": heights, "width": widths}
    for label, values in rows.items():
        quantiles = np.quantile(values, (0, 0.5, 1)) if values.size else ()
        lines.append(_row(label, *(f"{value:,.0f}" for value in quantiles)))
    lines += ["", _row("", "images", "share")]
    for finding, images in sorted(split.findings.items()):
        row = _row(finding, f"{len(images):,}", f"{len(images) / max(k, 1):.3%}")
        lines.append(row + (f"   e.g. {split.name(min(images))}" if images else ""))
    if ignored := split.source.ignored_text():
        lines += ["", f"  ignored files: {ignored}"]
    for fault, names in faults.items():
        if names:
            lines += ["", f"  {len(names):,} {fault}"]
            lines += [f"    {name}" for name in names[:MAX_LISTED]]
        if len(names) > MAX_LISTED:
            lines.append(f"    ... and {len(names) - MAX_LISTED:,} more")
    return "\n".join(lines)


def _row(label: str, *cells: str) -> str:
    return f"  {label:<28}" + "".join(f"{cell:>12}" for cell in cells)


def images_per_second(split: Split, transform: Transform) -> float:
    """Return how many usable images the training loader reads per CPU-second."""
    indices = split.indices[split.labels >= 0]
    loader = Loader(split.source, transform, split.config.seed, IMAGES_PER_JOB)
    done, start = 0, time.process_time()
    while (spent := time.process_time() - start) < TIMING_SECONDS:
        positions = np.arange(done, done + IMAGES_PER_JOB)
        samples, epochs = samples_at(positions, len(indices), split.config.seed)
        batch = loader.empty_batch(0, IMAGES_PER_JOB)
        loader.fill(batch, 0, 0, indices[samples], epochs)
        done += IMAGES_PER_JOB
    return done / spent


def speed_report(task: tasks.Task, model: Model, rate: float) -> str:
    """Return a table of the CPU cores that keep one accelerator of each type busy.

    Args:
      rate: images per second that one core reads.
    """
    flops = 3 * 2 * task.macs(model)  # the backward pass costs twice the forward pass
    title = f"estimate at {UTILIZATION:.0%} of peak"
    cores = available_cores()
    lines = [f"speed: {rate:,.0f} training images/s per core, {cores} cores here"]
    lines += ["", _row(title, "images/s", "cores")]
    for chip, peak in PEAK_FLOPS.items():
        needed = UTILIZATION * peak / flops
        lines.append(_row(f"one {chip}", f"{needed:,.0f}", f"{needed / rate:,.1f}"))
    return "\n".join(lines)


def check_dataset(
    config: Any, sample: int, listing: BinaryIO, reasons: BinaryIO
) -> None:
    """Check both splits of a dataset and print the report.

    Args:
      sample: images to read per split; 0: all.
      listing: file to write the name of every unreadable image to.
      reasons: file to write names and reasons to.

    Raises:
      ConfigError: the dataset is synthetic.
      DataError: the dataset cannot be opened; images have invalid labels or require a
        `data.value_range`; classes are empty; or more than `data.max_unreadable` of the
        images are unreadable or lose values.
    """
    data, problems, remarks = config.data, [], []
    if data.name == "synthetic":
        raise ConfigError("data.name='synthetic' has no files; nothing to check")
    task = inputs.make_task(config)
    model = nnx.eval_shape(task.build_model)
    splits = [Split(config, split, sample) for split in ("train", "test")]
    print(f"{data.name} {data.dir}".rstrip())
    for split in splits:
        split.read()
        faults = split.faults()
        print(f"\n{split_report(split, faults)}", flush=True)
        split.write_unreadable(listing, reasons)
        tolerated = data.max_unreadable * len(split.indices)
        allowed = {UNREADABLE: tolerated, LOST: tolerated, CLIPPED: np.inf}
        for fault, names in faults.items():
            text = f"{split.title}: {len(names):,} {fault}"
            if len(names) > allowed.get(fault, 0):
                problems.append(text)
            elif names and fault in (LOST, CLIPPED):
                remarks.append(text)
    if (splits[0].labels >= 0).any():
        rate = images_per_second(splits[0], task.transform(train=True))
        print(f"\n{speed_report(task, model, rate)}")
    print(f"\n{'; '.join(problems + remarks) or 'healthy'}")
    if problems:
        raise DataError(f"{data.name} failed the dataset check\n{problems[0]}")


def run(argv: Sequence[str] | None) -> None:
    """Check the dataset of the recipe on the command line."""
    parser = Parser("python -m hivit_jax.tools.check_data", allow_abbrev=False)
    parser.add_argument("--config", required=True, help="then --config.KEY=VALUE ...")
    parser.add_argument("--sample", type=int, default=0, help="images a split; 0: all")
    parser.add_argument("--list", help="write names of unreadable images to")
    parser.add_argument("--list_reasons", help="write names, tab and reason to")
    flags, overrides = parser.parse_known_args(argv)
    config = configs.load(flags.config, overrides)
    if flags.sample < 0:
        raise ConfigError(f"--sample={flags.sample}; expected at least 0")
    with ExitStack() as stack:
        files = []
        for name in ("list", "list_reasons"):
            path = getattr(flags, name) or os.devnull
            path = output_path(f"--{name}", path, [flags.config.partition(":")[0]])
            try:
                files.append(stack.enter_context(path.open("wb")))
            except OSError as error:
                raise ConfigError(f"--{name}={path}: {error.strerror}") from error
        check_dataset(config, flags.sample, *files)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    if argv is None:
        platforms.use_cpu()
    return exit_code(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
