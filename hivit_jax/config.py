"""Config keys with defaults, and loading of recipes with command line overrides.

``python -m hivit_jax.config`` prints ``docs/config.md``, the table of all keys.
"""

import difflib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference

from hivit_jax import models, recipes, tasks
from hivit_jax.aliases import probable_keys, unknown_key
from hivit_jax.common_keys import KEYS, SCHEDULES_OF_KEY
from hivit_jax.errors import ChannelsError, ConfigError, run_command
from hivit_jax.keys import TYPE_NAMES, Key, field_keys, short_repr
from hivit_jax.models.config import RunOptions
from hivit_jax.paths import with_absolute_paths

# Config keys of versions before 0.1 that are command line flags now. Recipes may still
# contain them without effect.
IGNORED = ("checkpoint", "topology", "search_batch")
# A model of each family, for the table of keys.
FAMILIES = {"HiViT": "hivit_base", "ViT": "vit_base", "Swin": "swin_base"}
# Exceptions of `Key.parse` and `Key.convert`.
_PARSE_ERRORS = (KeyError, TypeError, ValueError, SyntaxError, OverflowError)
_PARSE_ERRORS += (MemoryError, RecursionError)  # raised for deeply nested text
QUIRKS = "optimizer.official_quirks"  # of versions before 0.1; see `_expand_quirks`


class UnknownKey(ConfigError, AttributeError):
    """Error for reading or setting a config attribute that does not exist."""


class Config(ConfigDict):
    """ConfigDict whose errors for unknown attributes suggest an existing key."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise self._unknown(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except AttributeError:
            raise self._unknown(name) from None

    def _unknown(self, name: str) -> AttributeError:
        if name.startswith("_"):  # asked for by copy and pickle
            return AttributeError(name)
        known = [key for key, _ in _flatten(self.to_dict())]
        sections = [key for key in self if isinstance(self[key], ConfigDict)]
        if near := difflib.get_close_matches(name, sections, n=1, cutoff=0.7):
            return UnknownKey(f"unknown config key {name!r}; did you mean {near[0]!r}?")
        return UnknownKey(str(unknown_key("config key", name, known)))


def load(path: str | Path, overrides: Sequence[str] = ()) -> ConfigDict:
    """Load a recipe and apply overrides.

    Args:
      path: NAME of an installed recipe; a Python file with ``get_config()``, which
        returns a dict or ConfigDict of the values that differ from the defaults; or a
        run's ``config.json``. :VARIANT after NAME or the Python file is the argument of
        ``get_config(variant: str)``.
      overrides: flags such as ``--config.model.depths=(1,1,4)``.

    Returns:
      Locked ConfigDict with all keys of the recipe's task.

    Raises:
      ConfigError: the file does not exist, a key is unknown, or a value is invalid.
    """
    flags = _parse_overrides(overrides)
    return _resolve(recipes.read(str(path)), flags, f"--config={path}")


def complete_saved(config: Mapping[str, Any], source: str) -> ConfigDict:
    """Add defaults for the keys that a config saved by an older version lacks.

    Args:
      source: the checkpoint's path, for error messages.
    """
    return _resolve(config, {}, source)


def _resolve(
    recipe: Mapping[str, Any], flags: Mapping[str, str], source: str
) -> ConfigDict:
    recipe = {name: v for name, v in _flatten(recipe) if name not in IGNORED}
    task = tasks.find(flags.get("task", recipe["task"]))
    keys = all_keys(task, flags.get("model.name", recipe.get("model.name", "")))
    values = {name: key.default for name, key in keys.items()}
    if recipe.pop(QUIRKS, False):
        recipe |= _expand_quirks(keys, flags.get("init_from", recipe.get("init_from")))
    try:
        values |= {k: _convert(keys, k, v, Key.convert) for k, v in recipe.items()}
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    values |= {k: _convert(keys, k, text, Key.parse) for k, text in flags.items()}
    for name, key in keys.items():
        key.check(name, values[name])
    _check(values, task)
    config = _locked_config(keys, values)
    task.check(config)
    return config


def all_keys(task: type[tasks.Task], model_name: str = "hivit_base") -> dict[str, Key]:
    """Return {dotted name: key} of a config with this task and model."""
    trees = KEYS, {"model": model_keys(model_name)}, task.keys
    return {name: key for tree in trees for name, key in _flatten(tree)}


def model_keys(name: str) -> dict[str, Key]:
    """Return the keys of `config.model` that `common_keys` does not contain.

    These are the settings of the model's family and the run options. Their comments
    come from docstrings; see `field_keys`.
    """
    parts = [field_keys(each) for each in (*models.family_configs(name), RunOptions)]
    return {n: k for part in parts for n, k in part.items() if n not in KEYS["model"]}


def step_options(config: ConfigDict) -> dict[str, Any]:
    """Return the keyword arguments of `step.prepare` that a config contains."""
    return dict(
        seed=config.seed,
        accumulate_steps=config.optimizer.accumulate_steps,
        ema_decay=config.optimizer.ema_decay,
        zero=config.mesh.zero,
    )


def due_after(config: ConfigDict, step: int, total_steps: int) -> dict[str, bool]:
    """Return {name: True if due after a step} for "log", "eval" and "checkpoint"."""
    return {
        name: step == total_steps or step % config[f"{name}_every"] == 0
        for name in ("log", "eval", "checkpoint")
    }


def changed_keys(config: ConfigDict) -> dict[str, Any]:
    """Return {dotted name: value} of the keys that differ from their defaults."""
    keys = all_keys(tasks.find(config.task), config.model.name)
    items = _flatten(config.to_dict())
    return {name: value for name, value in items if value != keys[name].default}


def record_text(config: ConfigDict) -> str:
    """Return the config that a run records, as JSON text with absolute paths."""
    values = json.loads(config.to_json_best_effort())
    return json.dumps(with_absolute_paths(values), indent=2) + "\n"


def to_json(config: ConfigDict) -> str:
    """Return the config as indented JSON text."""
    return json.dumps(json.loads(config.to_json_best_effort()), indent=2) + "\n"


def to_markdown() -> str:
    """Return all keys as Markdown tables."""
    sections = {"Every recipe": {n: k for n, k in KEYS.items() if isinstance(k, Key)}}
    sections |= {f"`{n}`": keys for n, keys in KEYS.items() if isinstance(keys, dict)}
    for family, name in FAMILIES.items():
        sections[f"`model` of {family}"] = model_keys(name)
    sections |= {f"Task `{name}`": task.keys for name, task in tasks.TASKS.items()}
    lines = ["# Config keys", "", "Printed by `python -m hivit_jax.config`."]
    lines += ["This page lists every key that a recipe or a flag can set."]
    lines += ["A recipe sets the keys that differ from these defaults."]
    lines += ["`--config.KEY=VALUE` overrides any key."]
    lines += ["Numbers must be finite."]
    lines += ["Integers without a stated maximum must be at most 2**31 - 1."]
    for title, section in sections.items():
        if not section:
            lines += ["", f"## {title}", "", "This task has no keys of its own."]
            continue
        lines += ["", f"## {title}", "", "| key | default | values | meaning |"]
        lines += ["|---|---|---|---|"]
        for name, key in _flatten(section):
            default = "the model's" if key.default is None else f"`{key.default!r}`"
            lines += [f"| `{name}` | {default} | {key.allowed_text} | {key.comment} |"]
    return "\n".join(lines) + "\n"


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, leaf) of nested dicts."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _parse_overrides(overrides: Sequence[str]) -> dict[str, str]:
    """Return {KEY: VALUE} of flags ``--config.KEY=VALUE``."""
    flags = {}
    for override, following in zip_longest(overrides, overrides[1:], fillvalue="--"):
        name, equals, text = override.partition("=")
        if not name.startswith("--config.") or not equals:
            text = text if equals or following.startswith("--") else following
            raise _invalid_flag(override, text)
        flags[name.removeprefix("--config.")] = text
    return flags


def _invalid_flag(flag: str, value: str) -> ConfigError:
    """Return the error for a flag without ``--config.`` or without ``=``.

    Args:
      value: text after ``=``, or the next argument of the command line; "": none.
    """
    name = flag.partition("=")[0]
    known = {key for task in tasks.TASKS.values() for key in all_keys(task)}
    key = name.removeprefix("--").removeprefix("config.").replace("-", "_")
    probable = probable_keys(key, sorted(known)) if name.startswith("--") else []
    hint = "expected --config.KEY=VALUE, --workdir=DIR or --mode=MODE"
    if value and probable:
        hint = f"write --config.{probable[0]}={value}"
    return ConfigError(f"invalid flag {flag!r}; {hint}")


def _convert(
    keys: Mapping[str, Key], name: str, value: Any, method: Callable[[Key, Any], Any]
) -> Any:
    """Convert a value with `method`, which is `Key.convert` or `Key.parse`."""
    if name not in keys:
        raise unknown_key("config key", name, keys)
    try:
        return method(keys[name], value)
    except _PARSE_ERRORS as error:
        expected = TYPE_NAMES[keys[name].value_type]
        raise ConfigError(
            f"config.{name}={short_repr(value)}; expected {expected}"
        ) from error


def _expand_quirks(keys: Mapping[str, Key], init_from: str | None) -> dict[str, Any]:
    """Translate `optimizer.official_quirks=True` of versions before 0.1.

    With this key, a classifier without `init_from` followed the official supervised
    code. All other runs followed the self-supervised code.
    """
    if "label_smoothing" in keys and not init_from:
        return {"optimizer.schedule": "cosine_from_start"}
    return {"optimizer.first_epoch": 1}


def _check(values: Mapping[str, Any], task: type[tasks.Task]) -> None:
    """Raise ConfigError for values that contradict the task or other values."""
    # Key without effect -> (only accepted value, name of the key that is the cause).
    unused = {name: (value, "task") for name, value in task.unused.items()}
    for name, schedules in SCHEDULES_OF_KEY.items():
        if values["optimizer.schedule"] not in schedules:
            default = KEYS["optimizer"][name].default
            unused[f"optimizer.{name}"] = default, "optimizer.schedule"
    for name, (expected, cause) in unused.items():
        if values.get(name) not in (None, expected):
            raise ConfigError(
                f"{name}={values[name]} has no effect with {cause}={values[cause]!r}; "
                f"expected {expected}"
            )
    for name in ("data.mean", "data.std"):
        if len(values[name]) != (channels := values["model.in_channels"]):
            raise ChannelsError(name, values[name], channels)
    if values["optimizer.lr_batch"]:
        rate, batch_size = values["optimizer.base_learning_rate"], values["batch_size"]
        peak = rate * batch_size / values["optimizer.lr_batch"]
        KEYS["optimizer"]["base_learning_rate"].check(
            "peak learning rate (optimizer.base_learning_rate x batch_size / "
            "optimizer.lr_batch)",
            peak,
        )


def _locked_config(keys: Mapping[str, Key], values: Mapping[str, Any]) -> ConfigDict:
    config = Config()
    for name, key in keys.items():
        section, (*parents, leaf) = config, name.split(".")
        for parent in parents:
            if parent not in section:
                section[parent] = Config()
            section = section[parent]
        value = values[name]
        if type(value) is not key.value_type:
            value = FieldReference(value, field_type=key.value_type)
        section[leaf] = value
    config.lock()
    return config


if __name__ == "__main__":
    sys.exit(run_command(lambda: print(to_markdown(), end="")))
