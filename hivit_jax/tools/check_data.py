"""Check a dataset before training: ``python -m hivit_jax.tools.check_data --config F``.

Reads the images of both splits as training does. Prints image sizes, unusual formats
and unreadable files, and estimates how many CPU cores keep one accelerator busy.

A *finding* is an unusual property of an image. A *fault* is a finding, or a class
without images, that `check_dataset` judges: it either fails the check or is only noted.
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
from hivit_jax.errors import (
    ConfigError,
    DataError,
    LocalDataError,
    Parser,
    run_command,
)
from hivit_jax.models import Model, image_shape
from hivit_jax.tools.outputs import output_path

IMAGES_PER_JOB = 32
MAX_LISTED = 20  # lines per fault in the printed report
TIMING_SECONDS = 3.0  # CPU time in which the loader's speed is measured
UTILIZATION = 0.4  # assumed share of an accelerator's peak FLOP/s
PEAK_FLOPS = {"H100": 989e12, "TPU v5e": 197e12, "TPU v5p": 459e12}  # bfloat16
UNREADABLE, BAD_LABEL = "unreadable", "with an invalid label"
BAD_CHECKSUM = "with a wrong checksum"
NEED_RANGE = "that require data.value_range"
FAULTS = (UNREADABLE, BAD_CHECKSUM, BAD_LABEL, NEED_RANGE, LOST, CLIPPED)


class Split:
    """The images to check of "train" or "test": all, or a random selection.

    Args:
      max_images: number of images to select; 0: all.

    Attributes:
      indices: indices in the dataset's split of the k images, int64 [k].
      labels: int64 [k]; -1 for an unreadable image or an invalid label.
      sizes: height and width, int64 [k, 2]; 0 for an unreadable image.
      findings: findings[finding][index] is the detail, text, about the image at an
        index of the split. An example of a finding is "unreadable".
    """

    def __init__(self, config: Any, split: str, max_images: int = 0):
        data = config.data
        configured_split = data.train_split if split == "train" else data.eval_split
        self.title = f"{split} ({configured_split})" if configured_split else split
        self.config, self.channels = config, image_shape(config.model)[2]
        self.source = open_source(data, split)
        n = len(self.source)
        self.indices = np.sort(permutation(0, 0, n)[: max_images or n])
        self.labels = np.full(len(self.indices), -1)
        self.sizes = np.zeros((len(self.indices), 2), np.int64)
        empty = {UNREADABLE: {}, BAD_LABEL: {}}
        self.findings: dict[str, dict[int, str]] = defaultdict(dict, empty)

    def read(self) -> None:
        """Read the images in threads and fill the attributes.

        Shows a progress bar.
        """
        starts = range(0, len(self.indices), IMAGES_PER_JOB)
        bar = tqdm(total=len(self.indices), desc=self.title, unit=" images")
        threads = self.config.data.workers or available_cores()
        with bar, ThreadPoolExecutor(threads) as pool:
            for count in pool.map(self._read_job, starts):
                bar.update(count)

    def _read_job(self, start: int) -> int:
        """Read up to `IMAGES_PER_JOB` images and return their number."""
        indices = self.indices[start : start + IMAGES_PER_JOB].tolist()
        data, size = self.config.data, image_shape(self.config.model)[:2]
        for position, index in enumerate(indices, start):
            try:
                if problem := self.source.checksum_error(index):
                    self.findings[BAD_CHECKSUM][index] = problem
                sample = self.source.sample(index)
                encoded, label = sample["image"], sample["label"]
                pixels = decode(encoded, self.channels, data.value_range)
            except LocalDataError:
                raise
            except DataError as error:
                self.findings[NEED_RANGE][index] = str(error)
                continue
            except Exception as error:  # damaged files cause exceptions of many types
                words = f"{type(error).__name__}: {error}".split()
                self.findings[UNREADABLE][index] = " ".join(words)
                continue
            self.sizes[position] = pixels.shape[:2]
            if 0 <= label < len(self.source.classes):
                self.labels[position] = label
            else:
                self.findings[BAD_LABEL][index] = str(label)
            get_name = partial(self.name, index)
            options = size, data.canvas, data.value_range
            found = image_findings(encoded, get_name, pixels, *options)
            for finding, detail in found.items():
                self.findings[finding][index] = detail
        return len(indices)

    def write_unreadable(self, listing: BinaryIO, reasons: BinaryIO) -> None:
        """Write a line per unreadable image to each of two files.

        Args:
          listing: receives the names.
          reasons: receives each name, a tab and the reason.
        """
        for index, reason in sorted(self.findings[UNREADABLE].items()):
            name = self.source.name(index).replace("\n", "\\n")
            listing.write(os.fsencode(f"{name}\n"))
            reasons.write(f"{self.name(index)}\t{reason}\n".encode())

    def name(self, index: int) -> str:
        """Return an image's name, with bytes that are not valid UTF-8 escaped."""
        return self.source.name(index).encode(errors="backslashreplace").decode()

    def per_class(self) -> np.ndarray:
        """Return the number of usable images per class, int64 [classes]."""
        labels = self.labels[self.labels >= 0]
        return np.bincount(labels, minlength=len(self.source.classes))

    def faults(self) -> dict[str, list[str]]:
        """Return {fault: lines}: one line per affected image or per empty class.

        Clipped values are included. Empty classes are reported only if the whole split
        was read.
        """
        faults = {}
        for fault in FAULTS:
            details = sorted(self.findings.get(fault, {}).items())
            faults[fault] = [f"{self.name(i)}: {detail}" for i, detail in details]
        if len(self.indices) == len(self.source):
            empty = np.flatnonzero(self.per_class() == 0)
            faults["classes without an image"] = [self.source.classes[i] for i in empty]
        return faults


def split_report(split: Split, faults: dict[str, list[str]]) -> str:
    """Return the report on a split: sizes, findings, and the first lines per fault."""
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
    for fault, affected in faults.items():
        if affected:
            lines += ["", f"  {len(affected):,} {fault}"]
            lines += [f"    {line}" for line in affected[:MAX_LISTED]]
        if len(affected) > MAX_LISTED:
            lines.append(f"    ... and {len(affected) - MAX_LISTED:,} more")
    return "\n".join(lines)


def _row(label: str, *cells: str) -> str:
    return f"  {label:<28}" + "".join(f"{cell:>12}" for cell in cells)


def images_per_cpu_second(split: Split, transform: Transform) -> float:
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


def speed_report(task: tasks.Task, model: Model, images_per_core_second: float) -> str:
    """Return a table: for each type of accelerator, the CPU cores that keep it busy."""
    # 2 FLOPs per multiply-add; a forward pass plus a backward pass of twice its cost.
    flops = 2 * 3 * task.macs(model)
    title = f"estimate at {UTILIZATION:.0%} of peak"
    speed, cores = images_per_core_second, available_cores()
    lines = [f"speed: {speed:,.0f} training images/s per core, {cores} cores here"]
    lines += ["", _row(title, "images/s", "cores")]
    for chip, peak in PEAK_FLOPS.items():
        needed = UTILIZATION * peak / flops
        lines.append(_row(f"one {chip}", f"{needed:,.0f}", f"{needed / speed:,.1f}"))
    return "\n".join(lines)


def check_dataset(
    config: Any, max_images: int, listing: BinaryIO, reasons: BinaryIO
) -> None:
    """Check both splits of a dataset and print the report.

    Args:
      max_images: number of random images to check per split; 0: all.
      listing, reasons: files for unreadable images, see `Split.write_unreadable`.

    Raises:
      ConfigError: the dataset is synthetic.
      DataError: the dataset cannot be opened. Or an image has an invalid label or
        requires `data.value_range`. Or a class is empty. Or the fraction of images that
        are unreadable, or that lose values, exceeds `data.max_unreadable`.
    """
    data, failures, notes = config.data, [], []
    if data.name == "synthetic":
        raise ConfigError("data.name='synthetic' has no files; nothing to check")
    task = inputs.make_task(config)
    model = nnx.eval_shape(task.build_model)
    splits = [Split(config, split, max_images) for split in ("train", "test")]
    print(f"{data.name} {data.dir}".rstrip())
    for split in splits:
        split.read()
        faults = split.faults()
        print(f"\n{split_report(split, faults)}", flush=True)
        split.write_unreadable(listing, reasons)
        tolerated = data.max_unreadable * len(split.indices)
        allowed = dict.fromkeys((UNREADABLE, BAD_CHECKSUM, LOST), tolerated)
        allowed[CLIPPED] = np.inf
        for fault, affected in faults.items():
            text = f"{split.title}: {len(affected):,} {fault}"
            if len(affected) > allowed.get(fault, 0):
                failures.append(text)
            elif affected and fault in (LOST, CLIPPED):
                notes.append(text)
    if (splits[0].labels >= 0).any():
        speed = images_per_cpu_second(splits[0], task.transform(train=True))
        print(f"\n{speed_report(task, model, speed)}")
    print(f"\n{'; '.join(failures + notes) or 'healthy'}")
    if failures:
        raise DataError(f"{data.name} failed the dataset check\n{failures[0]}")


def run(argv: Sequence[str] | None) -> None:
    """Check the dataset of the recipe on the command line."""
    parser = Parser("python -m hivit_jax.tools.check_data", allow_abbrev=False)
    parser.add_argument(
        "--config",
        required=True,
        help="recipe name or file; --config.KEY=VALUE overrides a key",
    )
    parser.add_argument(
        "--sample",
        type=int,
        default=0,
        help="number of random images to check per split; 0 checks all",
    )
    parser.add_argument("--list", help="file to write names of unreadable images to")
    parser.add_argument(
        "--list_reasons",
        help="file to write each unreadable image's name, a tab and the reason to",
    )
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
    return run_command(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
