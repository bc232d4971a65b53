"""The record of a run: the config of each of its starts, and its changes at resume.

``config.json`` contains the config of the first start. Each later start that takes a
step adds a file such as ``config-20260101T120000Z.json``.
"""

import calendar
import time
from collections.abc import Mapping
from typing import Any

import jax
from etils.epath import Path

from hivit_jax.errors import ConfigError
from hivit_jax.paths import expand
from hivit_jax.tree import leaf_name

FIRST = "config.json"
LATER = "config-%Y%m%dT%H%M%SZ.json"  # in UTC
LABELS_LISTED = 3


def starts(workdir: str | Path) -> list[Path]:
    """Return the config files of all starts of a run, oldest first."""
    workdir = Path(expand(str(workdir)))
    found = [p for p in workdir.glob("config*.json") if _time(p) is not None]
    return sorted(found, key=_time)


def newest_start(workdir: str | Path) -> str:
    """Return the path of the newest config of a run.

    Raises:
      ConfigError: no run was started in the workdir.
    """
    if not (found := starts(workdir)):
        raise ConfigError(
            f"--config is required, because --workdir={workdir} contains no "
            f"{FIRST} of an earlier start"
        )
    return str(found[-1])


def add_start(workdir: Path, config: str) -> None:
    """Write the config of a start, JSON text. Never overwrites an earlier one."""
    name = FIRST
    if before := starts(workdir):
        # Later than all others, even if the clock was set back.
        now = max(time.time(), 1 + _time(before[-1]))
        name = time.strftime(LATER, time.gmtime(now))
    (workdir / name).write_text(config)


def _time(path: Path) -> int | None:
    """Return the time of a start in seconds; 0 for the first, None for other files."""
    if path.name == FIRST:
        return 0
    try:
        return calendar.timegm(time.strptime(path.name, LATER))
    except ValueError:
        return None


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return a line ``KEY: OLD -> NEW`` for each value that differs in nested dicts."""
    old, new = map(_by_key, (old, new))
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _by_key(tree: Mapping[str, Any]) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: not isinstance(x, dict)
    )
    return {leaf_name(path).replace("/", "."): value for path, value in leaves}


def dataset_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return a line for each change of a dataset's sizes and class names.

    Args:
      old, new: fields of `DatasetInfo`.
    """
    lines = [f"{line} examples" for line in differences(old["counts"], new["counts"])]
    old, new = (dict(enumerate(facts["classes"])) for facts in (old, new))
    changed = [label for label in old | new if old.get(label) != new.get(label)]
    for label in changed[:LABELS_LISTED]:
        lines.append(f"label {label}: {old.get(label)} -> {new.get(label)}")
    if len(changed) > LABELS_LISTED:
        lines.append(f"{len(changed)} labels in total have another class name")
    return lines


def check_batch_size(old: int, new: int, accumulate_steps: int, workdir: Any) -> None:
    """Raise ConfigError if a run would resume with another batch size."""
    if old == new:
        return
    smaller = -(-old * accumulate_steps // new)
    steps = next((k for k in range(smaller, old + 1) if old % k == 0), old)
    advice = (
        f"optimizer.accumulate_steps={steps} computes it in parts of {old // steps}"
        if new < old
        else "a larger one requires another --workdir, with init_from"
    )
    raise ConfigError(
        f"batch_size={new}; the run in {workdir} was trained with batch_size={old}, "
        "which determines its learning rate, length and order of images.\n"
        f"Keep batch_size={old}; {advice}"
    )
