"""Record the config of every start of a run, and describe changes at a resume.

``config.json`` contains the config of the first start. Each later start that writes
metrics adds a file such as ``config-20260101T120000Z.json``.
"""

import calendar
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils.epath import Path

from hivit_jax.data.sources.relabel import is_numbered
from hivit_jax.errors import ConfigError
from hivit_jax.paths import open_path
from hivit_jax.tree import leaf_name

FIRST_NAME = "config.json"
LATER_NAME = "config-%Y%m%dT%H%M%SZ.json"  # in UTC
MAX_LABELS_LISTED = 3


def config_files(workdir: str | Path) -> list[Path]:
    """Return the config files of all starts of a run, oldest first."""
    found = [
        p for p in open_path(workdir).glob("config*.json") if _start_time(p) is not None
    ]
    return sorted(found, key=_start_time)


def newest_config(workdir: str | Path) -> str:
    """Return the path of a run's newest config file.

    Raises:
      ConfigError: no run was started in the workdir.
    """
    if not (found := config_files(workdir)):
        raise ConfigError(
            f"--config is required, because --workdir={workdir} contains no "
            f"{FIRST_NAME} of an earlier start"
        )
    return str(found[-1])


def add_start(workdir: Path, config: str) -> None:
    """Write the config (JSON text) of a new start to a new file."""
    name = FIRST_NAME
    if earlier := config_files(workdir):
        # Later than all earlier files, even if the clock was set back.
        now = max(time.time(), 1 + _start_time(earlier[-1]))
        name = time.strftime(LATER_NAME, time.gmtime(now))
    (workdir / name).write_text(config)


def _start_time(path: Path) -> int | None:
    """Return the time in a config file's name, in seconds.

    Returns:
      0 for the first start; None if the file is not a config of a start.
    """
    if path.name == FIRST_NAME:
        return 0
    try:
        return calendar.timegm(time.strptime(path.name, LATER_NAME))
    except ValueError:
        return None


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return a line ``KEY: OLD -> NEW`` for each value that differs in nested dicts."""
    old, new = map(flatten, (old, new))
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return {dotted key: value} of nested dicts."""
    leaves = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: not isinstance(x, dict)
    )
    return {leaf_name(path).replace("/", "."): value for path, value in leaves}


def dataset_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return lines that describe the changes of a dataset's sizes and class names.

    Args:
      old, new: fields of `DatasetInfo`.
    """
    lines = [f"{line} examples" for line in differences(old["counts"], new["counts"])]
    old, new = (dict(enumerate(info["classes"])) for info in (old, new))
    changed = [label for label in old | new if old.get(label) != new.get(label)]
    for label in changed[:MAX_LABELS_LISTED]:
        lines.append(f"label {label}: {old.get(label)} -> {new.get(label)}")
    if len(changed) > MAX_LABELS_LISTED:
        lines.append(f"{len(changed)} labels in total have another class name")
    return lines


def check_task(old: str, new: str, workdir: Any) -> None:
    """Raise ConfigError if a workdir contains a run of another task."""
    if old != new:
        raise ConfigError(
            f"task={new}: {workdir} contains a run of task={old}; choose another "
            f"--workdir\n--config.init_from={workdir} starts from the weights of that "
            "run"
        )


def check_classes(old: Sequence[str], new: Sequence[str], workdir: Any) -> None:
    """Raise ConfigError if a label of a run has another class when the run resumes.

    Classes may be added or missing at the end, which changes no label. Numbers in
    place of names match any names.

    Args:
      old, new: class names in the order of the labels.
    """
    if is_numbered(old) or is_numbered(new):
        return
    for label, (before, now) in enumerate(zip(old, new, strict=False)):
        if before != now:
            raise ConfigError(
                f"{workdir}: expected the classes of the training so far, in which "
                f"label {label} is {before!r}; found {now!r}\n"
                "Restore the names of the classes in the dataset, or train with the "
                f"new classes in another --workdir,\nfor example from the weights of "
                f"this run: --config.init_from={workdir}"
            )


def check_batch_size(old: int, new: int, accumulate_steps: int, workdir: Any) -> None:
    """Raise ConfigError if a run would resume with another batch size.

    Args:
      old, new: the batch sizes.
      accumulate_steps: the new `optimizer.accumulate_steps`.
    """
    if old == new:
        return
    # Smallest number that splits `old` into equal microbatches no larger than those of
    # the new config.
    fewest = -(-old * accumulate_steps // new)
    count = next((k for k in range(fewest, old + 1) if old % k == 0), old)
    advice = (
        f"optimizer.accumulate_steps={count} splits it into microbatches of "
        f"{old // count}"
        if new < old
        else "a larger batch size requires a new run: set init_from and another "
        "--workdir"
    )
    raise ConfigError(
        f"batch_size={new}; the run in {workdir} was trained with batch_size={old}, "
        "which determines the learning rate, length and image order of the run.\n"
        f"Keep batch_size={old}; {advice}"
    )
