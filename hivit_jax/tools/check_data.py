"""Check a dataset before training: ``python -m hivit_jax.tools.check_data --config F``.

Reads the images of all splits as training does. Prints image sizes, unusual formats,
unreadable files, classes, images in both splits and settings to paste, and estimates
how many CPU cores keep one accelerator busy.

A *finding* is an unusual property of an image. A *fault* is one of the findings in
`dataset_split.FAULTS`, or a class without images. Depending on its kind and number, a
fault fails the check, is noted, or is tolerated; see `Verdict`.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from flax import nnx

from hivit_jax import config as configs
from hivit_jax import inputs, platforms, tasks
from hivit_jax.data.loader import Loader, available_cores
from hivit_jax.data.order import samples_at
from hivit_jax.data.sources.splits import Selection
from hivit_jax.data.transforms import Transform
from hivit_jax.errors import ChannelsError, ConfigError, Parser, run_command
from hivit_jax.models import Model
from hivit_jax.progress import counted
from hivit_jax.reporting import figures
from hivit_jax.tasks.warnings import one_class_warnings
from hivit_jax.tools.dataset_content import (
    SHEET_CLASSES,
    contact_sheet,
    content_report,
)
from hivit_jax.tools.dataset_split import IMAGES_PER_JOB, UNREADABLE, Split
from hivit_jax.tools.dataset_verdict import Verdict, nested_class_notes
from hivit_jax.tools.outputs import figure_path, output_path
from hivit_jax.xla.chips import CHIPS, utilization_notes

MAX_LISTED = 20  # lines per fault in the printed report
MIN_MERGED = 5  # smallest number of images whose equal details share a line
TIMING_SECONDS = 3.0  # CPU-seconds to spend on measuring the loader's speed


def split_report(split: Split, faults: dict[str, list[str]]) -> str:
    """Return the report on a split: sizes, findings, and the first lines per fault."""
    n, k = len(split.source), len(split.indices)
    labels = "no classes"
    if split.source.labeled:
        labels = counted(len(split.source.classes), "class", "classes")
    lines = [f"{split.title}: {counted(n, 'image')}, {labels}"]
    lines[0] += f"; {counted(k, 'image')} checked" * (k < n)
    lines += ["", _row("", "min", "median", "max")]
    heights, widths = split.sizes[split.sizes.all(1)].T
    rows = {"images per class": split.per_class(), "height": heights, "width": widths}
    if not split.source.labeled:
        rows.pop("images per class")
    for label, values in rows.items():
        quantiles = np.quantile(values, (0, 0.5, 1)) if values.size else ()
        lines.append(_row(label, *(f"{value:,.0f}" for value in quantiles)))
    lines += ["", _row("", "images", "share")]
    for finding, details in sorted(split.findings.items()):
        row = _row(finding, f"{len(details):,}", f"{len(details) / max(k, 1):.3%}")
        lines.append(row + (f"   e.g. {split.name(min(details))}" if details else ""))
    if ignored := split.source.ignored_text():
        lines += ["", f"  ignored files: {ignored}"]
    for fault, fault_lines in faults.items():
        if not fault_lines:
            continue
        merged_lines = merge_equal_details(split, fault, fault_lines)
        lines += ["", f"  {len(fault_lines):,} {fault}"]
        lines += [f"    {line}" for line in merged_lines[:MAX_LISTED]]
        if len(merged_lines) > MAX_LISTED:
            lines.append(f"    ... and {len(merged_lines) - MAX_LISTED:,} more")
    return "\n".join(lines)


def merge_equal_details(split: Split, fault: str, fault_lines: list[str]) -> list[str]:
    """Return the lines of a fault, with one line for each frequent detail.

    A detail is frequent if at least `MIN_MERGED` images and a quarter of the checked
    images have it. Such a detail, for example the number of channels, is a property of
    the dataset and not of single files.

    Args:
      fault_lines: lines of the fault, see `Split.faults`.
    """
    found = sorted(split.findings.get(fault, {}).items())
    counts = Counter(detail for _, detail in found)
    minimum = max(MIN_MERGED, len(split.indices) / 4)
    frequent = {detail for detail, count in counts.items() if count >= minimum}
    if not frequent:
        return fault_lines
    lines, merged = [], set()
    for line, (_, detail) in zip(fault_lines, found, strict=True):
        if detail not in frequent:
            lines.append(line)
        elif detail not in merged:
            merged.add(detail)
            lines.append(f"{line} ({counts[detail]:,} images)")
    return lines


def _row(label: str, *cells: str) -> str:
    return f"  {label:<28}" + "".join(f"{cell:>12}" for cell in cells)


def images_per_cpu_second(split: Split, transform: Transform) -> float:
    """Return the number of usable images that training loads per CPU-second."""
    indices = split.indices[split.usable()]
    loader = Loader(split.source, transform, split.config.seed, IMAGES_PER_JOB)
    done, start = 0, time.process_time()
    while (spent := time.process_time() - start) < TIMING_SECONDS:
        positions = np.arange(done, done + IMAGES_PER_JOB)
        samples, epochs = samples_at(positions, len(indices), split.config.seed)
        batch = loader.empty_batch(0, IMAGES_PER_JOB)
        loader.fill(batch, 0, 0, indices[samples], epochs)
        done += IMAGES_PER_JOB
    return done / spent


def speed_report(task: tasks.Task, model: Model, speed: float) -> str:
    """Return the loader's speed, and a table of the CPU cores that accelerators need.

    There is no table if the cost of the model is unknown.

    Args:
      speed: result of `images_per_cpu_second`.
    """
    flops = task.training_flops(model)
    cores = counted(available_cores(), "core")
    lines = [f"speed: {speed:,.0f} training images/s per core, {cores} here"]
    if not flops:
        return lines[0]
    lines += ["", _row("estimate at part of peak", "images/s", "cores")]
    for name, chip in CHIPS.items():
        fraction, basis = chip.utilization.of_peak, chip.utilization.basis
        images_per_second = fraction * chip.flops / flops
        cells = f"{images_per_second:,.0f}", f"{images_per_second / speed:,.1f}"
        lines.append(_row(f"one {name} at {fraction:.1%}, {basis}", *cells))
    return "\n".join([*lines, *(f"  {note}" for note in utilization_notes())])


def check_dataset(
    config: Any,
    max_images: int,
    lists: Sequence[BinaryIO],
    group_pattern: str = "",
    sheet: Path | None = None,
) -> None:
    """Check all splits of a dataset and print the report.

    Args:
      max_images: number of random images to check per split; 0: all.
      lists: two open files, the arguments of `Split.write_unreadable`.
      group_pattern: see `content_report`.
      sheet: PNG file for the `contact_sheet` of the training images; None: not written.

    Raises:
      ConfigError: the dataset is synthetic.
      DataError: the dataset cannot be opened, or fails the check; see `Verdict`.
    """
    data = config.data
    if data.name == "synthetic":
        raise ConfigError("data.name='synthetic' has no files; nothing to check")
    task = inputs.make_task(config)
    model = nnx.eval_shape(task.build_model)
    splits = [Split(config, split, max_images) for split in inputs.used_splits(config)]
    verdict = Verdict(splits)
    print(f"{data.name} {data.dir}".rstrip())
    for split in splits:
        split.read()
        faults = split.faults()
        print(f"\n{split_report(split, faults)}", flush=True)
        split.write_unreadable(*lists)
        verdict.add(split, faults)
    verdict.notes += nested_class_notes(splits[0])
    verdict.notes += one_class_warnings(task.config)
    if splits[0].usable().any():
        speed = images_per_cpu_second(splits[0], task.transform(train=True))
        print(f"\n{speed_report(task, model, speed)}")
    has_head = hasattr(getattr(model, "config", None), "num_classes")
    text, problems = content_report(splits, group_pattern, has_head)
    verdict.notes += problems
    print(f"\n{text}\n")
    if sheet:
        figures.write_png(sheet, contact_sheet(splits[0]))
    names = [file.name if file.name != os.devnull else "" for file in lists]
    written = written_lines(splits, *names, sheet)
    print("\n".join([*written, *[""] * bool(written), verdict.text()]))
    if verdict.failures:
        raise verdict.error(names[0])


def written_lines(
    splits: Sequence[Split], listing: str, reasons: str, sheet: Path | None
) -> list[str]:
    """Return a line for each file that the command has written.

    Args:
      listing, reasons: names of the files for unreadable images; "": not written.
    """
    count = sum(len(split.findings[UNREADABLE]) for split in splits)
    images = counted(count, "unreadable image")
    contents = {listing: f"names of {images}", reasons: f"reasons of {images}"}
    if sheet:
        contents[str(sheet)] = f"the first images of up to {SHEET_CLASSES} classes"
    return [f"written: {file} ({text})" for file, text in contents.items() if file]


def load_config(path: str, overrides: Sequence[str]) -> Any:
    """Load a config; replace data.mean and data.std if their length is wrong.

    The report does not depend on these values; it contains the right ones.
    """
    try:
        return configs.load(path, overrides)
    except ChannelsError as error:
        values = (0.5,) * error.channels
        flags = [f"--config.data.{name}={values}" for name in ("mean", "std")]
        return configs.load(path, [*overrides, *flags])


def run(argv: Sequence[str] | None) -> None:
    """Check the dataset of the recipe on the command line."""
    parser = Parser(
        "python -m hivit_jax.tools.check_data",
        description="Read all images of a dataset as training does, and report "
        "problems.",
        allow_abbrev=False,
    )
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
    parser.add_argument("--list", help="file to write: names of unreadable images")
    parser.add_argument(
        "--list_reasons",
        help="file to write: a line per unreadable image, with name, tab and reason",
    )
    parser.add_argument("--sheet", help="PNG file to write: images of some classes")
    parser.add_argument(
        "--group",
        default="",
        help="regular expression for names of images; reports values of its first "
        "group that are in both splits",
    )
    flags, overrides = parser.parse_known_args(argv)
    config = load_config(flags.config, overrides)
    if flags.sample < 0:
        raise ConfigError(f"--sample={flags.sample}; expected at least 0")
    Selection(0.5, flags.group).check("")  # raises an error for an invalid pattern
    with ExitStack() as stack:
        files = []
        for name in ("list", "list_reasons"):
            path = getattr(flags, name) or os.devnull
            path = output_path(f"--{name}", path, [flags.config.partition(":")[0]])
            try:
                files.append(stack.enter_context(path.open("wb")))
            except OSError as error:
                raise ConfigError(f"--{name}={path}: {error.strerror}") from error
        sheet = flags.sheet and figure_path("--sheet", flags.sheet, [])
        check_dataset(config, flags.sample, files, flags.group, sheet)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    if argv is None:
        platforms.use_cpu()
    return run_command(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
