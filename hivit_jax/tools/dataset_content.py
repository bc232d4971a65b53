"""Report on the content of a dataset: classes, leaks, settings, contact sheet."""

from collections.abc import Sequence

import numpy as np

from hivit_jax.data.summary import equal_files, shared_groups
from hivit_jax.data.transforms import evaluation_image
from hivit_jax.flags import config_flag
from hivit_jax.models import image_shape
from hivit_jax.progress import counted, listed
from hivit_jax.reporting import figures
from hivit_jax.tasks.defaults import pixel_scale
from hivit_jax.tools.dataset_split import Split

MAX_CLASSES = 100  # printed classes: at most the 50 largest and the 50 smallest
MAX_PAIRS = 5  # printed pairs of equal files, and printed groups
# Contact sheet: numbers of classes and of images per class, side of an image in pixels.
SHEET_CLASSES, SHEET_IMAGES, SHEET_SIDE = 20, 6, 96


def content_report(
    splits: Sequence[Split], group_pattern: str, has_head: bool
) -> tuple[str, list[str]]:
    """Return a report on classes, pixels, leaks and settings, and a list of problems.

    Args:
      splits: the training split and, if there is one, the evaluation split.
      group_pattern: regular expression, see `summary.shared_groups`; "": none.
      has_head: True if the model accepts `model.num_classes`.
    """
    lines = class_lines(splits)
    for split in splits:
        kinds = sorted(split.summary.kinds.items(), key=lambda item: -item[1])
        text = ", ".join(f"{kind}: {count:,}" for kind, count in kinds)
        black, white = split.summary.extreme_fractions()
        lines.append(
            f"{split.title}: channels x dtype of files: {text or 'none'}; "
            f"{black:.2%} of the values are at the lower end, {white:.2%} at the upper"
        )
    leaks, problems = leak_lines(splits, group_pattern) if len(splits) > 1 else ([], [])
    return "\n".join([*lines, *leaks, *setting_lines(splits[0], has_head)]), problems


def class_lines(splits: Sequence[Split]) -> list[str]:
    """Return a table of classes with the number of usable images in each split."""
    if not splits[0].source.labeled:
        return []
    names, counts = splits[0].source.classes, [split.per_class() for split in splits]
    order = np.argsort(-counts[0], kind="stable")
    if len(order) > MAX_CLASSES:
        order = np.r_[order[: MAX_CLASSES // 2], order[-MAX_CLASSES // 2 :]]
    titles = "".join(f"{split.title:>12}" for split in splits)
    lines = [f"  {'class':<28}{titles}"]
    for k in order:
        cells = "".join(f"{per_class[k]:>12,}" for per_class in counts)
        lines.append(f"  {names[k]:<28}{cells}")
    if len(order) < len(names):
        lines.append(f"  ... and {len(names) - len(order):,} classes in between")
    if splits[0].labels.ndim == 2:
        no_class_counts = [
            int((s.labels.max(1, initial=-1) == 0).sum()) for s in splits
        ]
        cells = "".join(f"{count:>12,}" for count in no_class_counts)
        lines.append(f"  {'(images of no class)':<28}{cells}")
    smallest, largest = counts[0].min(), counts[0].max()
    ratio = f"{largest / smallest:.1f}" if smallest else "unlimited"
    lines.append(f"imbalance, largest class / smallest class: {ratio}")
    return lines


def leak_lines(
    splits: Sequence[Split], group_pattern: str
) -> tuple[list[str], list[str]]:
    """Return (lines about equal files and groups in both splits, list of problems)."""
    train, test = splits
    pairs = equal_files([split.summary.digests for split in splits])
    lines, problems = [], []
    if pairs:
        problems.append(
            f"{counted(len(pairs), 'file')} with equal content in both splits"
        )
        lines.append(problems[-1])
        for train_index, test_index in pairs[:MAX_PAIRS]:
            line = f"    {train.name(train_index)} = {test.name(test_index)}"
            lines.append(line)
        if len(pairs) > MAX_PAIRS:
            lines.append(f"    ... and {len(pairs) - MAX_PAIRS:,} more")
    if group_pattern:
        names = [[split.name(i) for i in split.indices.tolist()] for split in splits]
        if shared := shared_groups(group_pattern, names):
            problems.append(f"{counted(len(shared), 'group')} in both splits")
            lines.append(f"{problems[-1]}: {listed(shared, MAX_PAIRS)}")
    return lines, problems


def setting_lines(split: Split, has_head: bool) -> list[str]:
    """Return the settings that suit the training images, ready to paste in a shell.

    Args:
      has_head: see `content_report`.
    """
    data = split.config.data
    lines = []
    if split.source.labeled and has_head:
        num_classes = len(split.source.classes)
        lines.append(f"  {config_flag('model.num_classes', num_classes)}")
    if split.usable().any():
        statistics = split.summary.mean_and_std(pixel_scale(data))
        for name, values in zip(("mean", "std"), statistics, strict=True):
            rounded = tuple(round(float(value), 4) for value in values)
            lines.append(f"  {config_flag(f'data.{name}', rounded)}")
    if split.summary.num_reduced:
        lines.append(
            f"  --config.data.dtype=uint16 keeps the 16 bits of "
            f"{counted(split.summary.num_reduced, 'file')}"
        )
    return ["settings:", *lines] if lines else []


def contact_sheet(split: Split) -> np.ndarray:
    """Draw the first images of the first `SHEET_CLASSES` classes, uint8 [H, W, 3]."""
    source, data = split.source, split.config.data
    channels = image_shape(split.config.model)[2]
    shape = SHEET_SIDE, SHEET_SIDE, channels
    rows = {}
    names = source.classes if source.labeled else ("images",)
    for label, name in enumerate(names[:SHEET_CLASSES]):
        images = []
        for index in split.of_class(label)[:SHEET_IMAGES].tolist():
            encoded = source.sample(index)["image"]
            options = 1.0, data.value_range, data.dtype
            images.append(evaluation_image(encoded, shape, *options))
        rows[name] = np.array(images).reshape(-1, *shape) / pixel_scale(data)
    return figures.contact_sheet(rows, SHEET_IMAGES)
