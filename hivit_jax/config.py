"""Config keys with defaults; recipe and command line -> one locked ConfigDict.

``python -m hivit_jax.config`` prints all keys as Markdown, as in ``docs/config.md``.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference

from hivit_jax import models, recipes, tasks
from hivit_jax.augment.resample import REACH
from hivit_jax.errors import ConfigError, unknown
from hivit_jax.keys import TYPE_NAMES, Key
from hivit_jax.models import VARIANTS
from hivit_jax.models.config import HiViTConfig, RunOptions

# Keys of every recipe. A task adds its own (`Task.keys`), and so do the models.
KEYS = {
    "task": Key("", "a name below, or `module:Class` of your own"),
    "seed": Key(0, "of parameters, order of images, augmentation and masks", 0),
    "batch_size": Key(1024, "images in a step, on all devices together", 1),
    "total_epochs": Key(0.0, "length of the run", 0),
    "total_steps": Key(0, "length of the run; 0: `total_epochs` counts", 0),
    "init_from": Key("", "pretrained model, any path that `load_pretrained` reads"),
    "log_every": Key(50, "steps", 1),
    "eval_every": Key(1251, "steps; 1251: an epoch of ImageNet in batches of 1024", 1),
    "checkpoint_every": Key(1251, "steps", 1),
    "keep_checkpoints": Key(3, "newest checkpoints that are kept, beside the best", 1),
    "compilation_cache": Key("", "directory of compiled programs; empty: in workdir"),
    "stall_timeout": Key(1800.0, "seconds without a step that end a run; 0: none", 0),
    "peer_timeout": Key(60.0, "seconds until a silent process counts as lost", 1),
    "model": {
        "name": Key("", "a name of `hivit_jax.create_model`"),
        "image_size": Key(224, "side, or (height, width), in pixels", type=object),
        "in_channels": Key(3, "channels of an image", 1),
    },
    "data": {
        "name": Key("imagenet2012", "TFDS name, `folder`, `digits` or `synthetic`"),
        "dir": Key("", "directory of the dataset; empty: TFDS's own"),
        "train_split": Key("", "name in the dataset; empty: the dataset's own"),
        "eval_split": Key("", "name in the dataset; empty: the dataset's own"),
        "train_examples": Key(0, "of digits and synthetic; 0: all", 0),
        "subset": Key(0, "which of the digits `train_examples` draws"),
        "crop_scale": Key((0.08, 1.0), "area of a random crop in training", length=2),
        "crop_pct": Key(0.875, "center crop in evaluation; 0.875: 224 of 256", 1e-3, 1),
        "flip": Key(True, "flip half of the training images"),
        "randaugment": Key(False, "RandAugment in training, rand-m9-mstd0.5-inc1"),
        "mean": Key((0.485, 0.456, 0.406), "mean of each channel, pixels in [0, 1]"),
        "std": Key((0.229, 0.224, 0.225), "standard deviation of each channel"),
        "interpolation": Key("bicubic", "filter of a resize", choices=tuple(REACH)),
        "antialias": Key(True, "as PIL; false: as `tf.image.resize`"),
        "canvas": Key(512, "largest crop that the device resizes; 0: host resizes", 0),
        "workers": Key(0, "reading threads; 0: one a core", 0),
        "max_unreadable": Key(0.001, "tolerated share of damaged images", 0, 1),
    },
    "optimizer": {
        "base_learning_rate": Key(5e-4, "times `batch_size / lr_batch`: the peak", 0),
        "lr_batch": Key(256, "0: the rate is not scaled", choices=(256, 512, 0)),
        "schedule": Key(
            "cosine",
            "`cosine_from_start`: cosine over the warmup too, a step late",
            choices=(
                *("cosine", "cosine_from_start", "multistep", "polynomial"),
                "constant",
            ),
        ),
        "first_epoch": Key(
            0, "1: leave the first epoch out, and one at each resume", choices=(0, 1)
        ),
        "warmup_epochs": Key(5.0, "epochs from `warmup_learning_rate` to the peak", 0),
        "warmup_learning_rate": Key(0.0, "rate of the first step, not scaled", 0),
        "min_learning_rate": Key(0.0, "rate of the last step, not scaled", 0),
        "milestones": Key((), "multistep: epochs at which the rate is cut"),
        "gamma": Key(0.1, "multistep: factor at a milestone", 0),
        "power": Key(1.0, "polynomial: exponent", 0),
        "betas": Key((0.9, 0.999), "Adam's; of LARS the first, momentum", length=2),
        "weight_decay": Key(0.05, "decoupled; of LARS in the gradient", 0),
        "layer_decay": Key(
            1.0, "factor on the rate from a layer to the one below", 0, 1
        ),
        "clip_norm": Key(0.0, "largest norm of the gradient; 0: no clipping", 0),
        "ema_decay": Key(0.0, "decay of averaged weights; 0: no average", 0, 1),
        "accumulate_steps": Key(1, "parts of a batch, one after another", 1),
        "first_moment_dtype": Key(
            "float32", "of Adam", choices=("float32", "bfloat16")
        ),
    },
    "mesh": {
        "replica": Key(1, "devices, across slices or nodes; one axis may be -1: rest"),
        "data": Key(-1, "devices that split the batch"),
        "fsdp": Key(1, "devices that split batch, parameters and optimizer"),
        "tensor": Key(1, "devices that split heads and hidden units"),
        "zero": Key(3, "fsdp splits all; 1: the optimizer alone", choices=(1, 3)),
    },
}
# Key -> schedules that use it.
USED_BY = {
    "min_learning_rate": ("cosine", "cosine_from_start", "polynomial"),
    "milestones": ("multistep",),
    "gamma": ("multistep",),
    "power": ("polynomial",),
}
# Keys of the first edition that are flags of a mode now.
IGNORED = ("checkpoint", "topology", "search_batch")
QUIRKS = "optimizer.official_quirks"  # another one; see `_quirks`


def load(path: str | Path, overrides: Sequence[str] = ()) -> ConfigDict:
    """Read a recipe and apply overrides.

    Args:
      path: NAME of an installed recipe, or a Python file with ``get_config()``, which
        returns a dict or ConfigDict with the values that differ from the defaults; or
        either with :VARIANT, the argument of ``get_config(variant: str)``.
      overrides: ``--config.model.depths=(1,1,4)`` and the like.

    Returns:
      All keys of the recipe's task with their values, locked.

    Raises:
      ConfigError: no such file, an unknown key (with the nearest known one), a value of
        another type, or out of range.
    """
    flags = dict(map(_split, overrides))
    return _resolve(recipes.read(str(path)), flags, f"--config={path}")


def of_checkpoint(config: Mapping[str, Any], path: str) -> ConfigDict:
    """Config that is saved with a checkpoint in `path`, also by an older version."""
    return _resolve(config, {}, path)


def _resolve(
    recipe: Mapping[str, Any], flags: Mapping[str, str], source: str
) -> ConfigDict:
    recipe = dict(_leaves(recipe))
    task = tasks.find(flags.get("task", recipe["task"]))
    keys = task_keys(task)
    values = {name: key.default for name, key in keys.items()}
    for name in IGNORED:
        recipe.pop(name, None)
    if recipe.pop(QUIRKS, False):
        recipe |= _quirks(keys, flags.get("init_from", recipe.get("init_from")))
    try:
        values |= {k: _value(keys, k, v, Key.convert) for k, v in recipe.items()}
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    values |= {k: _value(keys, k, text, Key.parse) for k, text in flags.items()}
    for name, key in keys.items():
        key.check(name, values[name])
    _check(values, task)
    config = _locked(keys, values)
    task.check(config)
    return config


def task_keys(task: type[tasks.Task]) -> dict[str, Key]:
    """All keys of a task's configs, by dotted name."""
    models = {f"model.{name}": key for name, key in model_keys().items()}
    return dict(_leaves(KEYS)) | models | dict(_leaves(task.keys))


def model_keys() -> dict[str, Key]:
    """Keys of `config.model` that models define, from their configs' fields and
    docstrings.
    """
    families = dict.fromkeys(type(config) for _, config in VARIANTS.values())
    comments = {}
    for family in (HiViTConfig, *families, RunOptions):
        text = inspect.cleandoc(family.__doc__)
        for names, words in re.findall(r"(?m)^(\w.*?): (.*(?:\n  .*)*)", text):
            sentence = re.split(r"[.;:](?:\s|$)", " ".join(words.split()))[0]
            comments |= dict.fromkeys(names.split(", "), sentence)
    return {
        name: Key(None, comments.get(name, ""), type=t if t in TYPE_NAMES else tuple)
        for name, t in models.model_keys().items()
        if name not in KEYS["model"]
    }


def step_options(config: ConfigDict) -> dict[str, Any]:
    """Keyword arguments of `step.prepare`."""
    return dict(
        seed=config.seed,
        accumulate_steps=config.optimizer.accumulate_steps,
        ema_decay=config.optimizer.ema_decay,
        zero=config.mesh.zero,
    )


def to_json(config: ConfigDict) -> str:
    """The config as readable JSON text."""
    return json.dumps(json.loads(config.to_json_best_effort()), indent=2) + "\n"


def page() -> str:
    """All keys as Markdown."""
    top = {name: key for name, key in KEYS.items() if isinstance(key, Key)}
    parts = {"Every recipe": top}
    parts |= {f"`{n}`": part for n, part in KEYS.items() if isinstance(part, dict)}
    parts["`model`"] = parts["`model`"] | model_keys()
    parts |= {f"Task `{n}`": t.keys for n, t in tasks.TASKS.items() if t.keys}
    lines = ["# Config keys", "", "Printed by `python -m hivit_jax.config`."]
    lines += ["A recipe sets some of them, `--config.KEY=VALUE` any of them."]
    for title, part in parts.items():
        lines += ["", f"## {title}", "", "| key | default | values | meaning |"]
        lines += ["|---|---|---|---|"]
        for name, key in _leaves(part):
            default = "the model's" if key.default is None else f"`{key.default!r}`"
            lines.append(f"| `{name}` | {default} | {key.values} | {key.comment} |")
    return "\n".join(lines) + "\n"


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, leaf) of nested dicts."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _split(override: str) -> tuple[str, str]:
    """``--config.KEY=VALUE`` -> (KEY, VALUE)."""
    key, equals, text = override.removeprefix("--config.").partition("=")
    if not override.startswith("--config.") or not equals:
        raise ConfigError(
            f"cannot read {override!r}; expected --config.KEY=VALUE, "
            "--workdir=DIR, --mode=MODE"
        )
    return key, text


def _value(
    keys: Mapping[str, Key], name: str, value: Any, read: Callable[[Key, Any], Any]
) -> Any:
    """A value in the type of its key; `read` is a method of `Key`."""
    if name not in keys:
        raise unknown("config key", name, keys)
    try:
        return read(keys[name], value)
    except (KeyError, TypeError, ValueError, SyntaxError) as error:
        expected = TYPE_NAMES[keys[name].kind]
        raise ConfigError(f"config.{name}={value!r}; expected {expected}") from error


def _quirks(keys: Mapping[str, Key], init_from: str | None) -> dict[str, Any]:
    """Values for `optimizer.official_quirks=True` of the first edition, where the task
    decided: a classifier without `init_from` follows the supervised program.
    """
    if "label_smoothing" in keys and not init_from:
        return {"optimizer.schedule": "cosine_from_start"}
    return {"optimizer.first_epoch": 1}


def _check(values: Mapping[str, Any], task: type[tasks.Task]) -> None:
    """ConfigError for values that do not fit the task, the schedule or each other."""
    neutral = {name: (value, "task") for name, value in task.unused.items()}
    for name, schedules in USED_BY.items():
        if values["optimizer.schedule"] not in schedules:
            default = KEYS["optimizer"][name].default
            neutral[f"optimizer.{name}"] = default, "optimizer.schedule"
    for name, (expected, why) in neutral.items():
        if values[name] not in (None, expected):
            raise ConfigError(
                f"{name}={values[name]} has no effect with {why}={values[why]!r}; "
                f"expected {expected}"
            )
    for name in ("data.mean", "data.std"):
        if len(values[name]) != values["model.in_channels"]:
            raise ConfigError(
                f"{name}={values[name]}; expected one number for each of "
                f"model.in_channels={values['model.in_channels']}"
            )


def _locked(keys: Mapping[str, Key], values: Mapping[str, Any]) -> ConfigDict:
    config = ConfigDict()
    for name, key in keys.items():
        part, (*parents, leaf) = config, name.split(".")
        for parent in parents:
            if parent not in part:
                part[parent] = ConfigDict()
            part = part[parent]
        value = values[name]
        typed = type(value) is key.kind
        part[leaf] = value if typed else FieldReference(value, field_type=key.kind)
    config.lock()
    return config


if __name__ == "__main__":
    print(page(), end="")
