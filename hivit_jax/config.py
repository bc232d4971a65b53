"""Config keys with defaults, and loading of recipes with command line overrides.

``python -m hivit_jax.config`` prints ``docs/config.md``, the table of all keys.
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
from hivit_jax.augment.resample import FILTER_RADIUS
from hivit_jax.errors import ConfigError, unknown
from hivit_jax.keys import TYPE_NAMES, Key
from hivit_jax.models.config import HiViTConfig, RunOptions

SCHEDULES = ("cosine", "cosine_from_start", "multistep", "polynomial", "constant")
# Keys of every recipe. Tasks (`Task.keys`) and models (`model_keys`) add their own.
KEYS = {
    "task": Key("", "a name below, or `module:Class` for your own task"),
    "seed": Key(0, "seed of parameters, image order, augmentation and masks", 0),
    "batch_size": Key(1024, "global batch size in images", 1),
    "total_epochs": Key(0.0, "length of the run in epochs", 0),
    "total_steps": Key(0, "length of the run in steps; 0: use `total_epochs`", 0),
    "init_from": Key("", "pretrained model: any path that `load_pretrained` accepts"),
    "log_every": Key(50, "steps between log lines", 1),
    "eval_every": Key(1251, "steps between evaluations; 1251: an ImageNet epoch", 1),
    "checkpoint_every": Key(1251, "steps between checkpoints", 1),
    "keep_checkpoints": Key(3, "newest checkpoints to keep in addition to the best", 1),
    "compilation_cache": Key("", "directory of compiled programs; empty: in workdir"),
    "stall_timeout": Key(1800.0, "seconds without progress that end a run; 0: none", 0),
    "peer_timeout": Key(60.0, "seconds of silence after which a process is lost", 1),
    "model": {
        "name": Key("", "a model name of `hivit_jax.list_models`"),
        "image_size": Key(224, "side, or (height, width), in pixels", type=object),
        "in_channels": Key(3, "image channels", 1),
    },
    "data": {
        "name": Key(
            "imagenet2012",
            "TFDS name, `folder`, `digits`, `synthetic` or your own `module:Class`",
        ),
        "dir": Key("", "dataset directory; empty: the default directory of TFDS"),
        "train_split": Key("", "split name; empty: the default of the dataset"),
        "eval_split": Key("", "split name; empty: the default of the dataset"),
        "train_examples": Key(0, "training images of digits or synthetic; 0: all", 0),
        "subset": Key(0, "seed that selects the `train_examples` digits"),
        "crop_scale": Key((0.08, 1.0), "relative area of training crops", length=2),
        "crop_pct": Key(0.875, "center crop in evaluation; 0.875: 224 of 256", 1e-3, 1),
        "flip": Key(True, "flip half of the training images left to right"),
        "randaugment": Key(False, "RandAugment in training, rand-m9-mstd0.5-inc1"),
        "mean": Key((0.485, 0.456, 0.406), "mean per channel of pixels in [0, 1]"),
        "std": Key((0.229, 0.224, 0.225), "standard deviation per channel"),
        "value_range": Key((), "values of black and white beyond 8 bits; (): 0, 65535"),
        "interpolation": Key("bicubic", "resize filter", choices=tuple(FILTER_RADIUS)),
        "antialias": Key(True, "true: resize as PIL; false: as `tf.image.resize`"),
        "canvas": Key(512, "largest crop resized on the device; 0: host resizes", 0),
        "workers": Key(0, "reader threads; 0: one per core", 0),
        "max_unreadable": Key(0.001, "tolerated fraction of unreadable images", 0, 1),
    },
    "optimizer": {
        "base_learning_rate": Key(5e-4, "peak learning rate for `lr_batch` images", 0),
        "lr_batch": Key(
            256,
            "the peak scales by `batch_size / lr_batch`; 0: no scaling",
            choices=(256, 512, 0),
        ),
        "schedule": Key(
            "cosine",
            "learning rate curve; `cosine_from_start`: from step 0, one step late",
            choices=SCHEDULES,
        ),
        "first_epoch": Key(
            0, "1: skip an epoch at start and at resume", choices=(0, 1)
        ),
        "warmup_epochs": Key(5.0, "epochs from `warmup_learning_rate` to the peak", 0),
        "warmup_learning_rate": Key(0.0, "initial learning rate, unscaled", 0),
        "min_learning_rate": Key(0.0, "final learning rate, unscaled", 0),
        "milestones": Key((), "multistep: epochs at which the learning rate changes"),
        "gamma": Key(0.1, "multistep: factor on the learning rate at a milestone", 0),
        "power": Key(1.0, "polynomial: exponent", 0),
        "betas": Key((0.9, 0.999), "Adam betas; the first: LARS momentum", length=2),
        "weight_decay": Key(0.05, "decoupled with Adam, in the gradient with LARS", 0),
        "layer_decay": Key(1.0, "learning rate factor per layer below the last", 0, 1),
        "clip_norm": Key(0.0, "maximum gradient norm; 0: no clipping", 0),
        "ema_decay": Key(0.0, "decay of the parameter average (EMA); 0: none", 0, 1),
        "accumulate_steps": Key(1, "microbatches per step", 1),
        "first_moment_dtype": Key(
            "float32", "dtype of Adam's first moment", choices=("float32", "bfloat16")
        ),
    },
    "mesh": {
        "replica": Key(1, "devices that shard the batch across slices or nodes"),
        "data": Key(-1, "devices that shard the batch; one axis may be -1: the rest"),
        "fsdp": Key(1, "devices that shard batch, parameters and optimizer state"),
        "tensor": Key(1, "devices that shard attention heads and MLP hidden units"),
        "zero": Key(3, "3: fsdp shards all; 1: only the optimizer", choices=(1, 3)),
    },
}
# Key of `optimizer` -> the schedules that use it.
SCHEDULES_OF_KEY = {
    "min_learning_rate": ("cosine", "cosine_from_start", "polynomial"),
    "milestones": ("multistep",),
    "gamma": ("multistep",),
    "power": ("polynomial",),
}
# Keys of the first edition that are command line flags now.
IGNORED = ("checkpoint", "topology", "search_batch")
QUIRKS = "optimizer.official_quirks"  # first edition; see `_expand_quirks`


def load(path: str | Path, overrides: Sequence[str] = ()) -> ConfigDict:
    """Load a recipe and apply overrides.

    Args:
      path: NAME of an installed recipe, or a Python file with ``get_config()``, which
        returns a dict or ConfigDict of the values that differ from the defaults.
        Either may end with :VARIANT, the argument of ``get_config(variant: str)``.
      overrides: flags such as ``--config.model.depths=(1,1,4)``.

    Returns:
      Locked ConfigDict with all keys of the recipe's task.

    Raises:
      ConfigError: the file does not exist, a key is unknown, or a value is invalid.
    """
    flags = dict(map(_parse_override, overrides))
    return _resolve(recipes.read(str(path)), flags, f"--config={path}")


def from_checkpoint(config: Mapping[str, Any], path: str) -> ConfigDict:
    """Load the config of the checkpoint in `path`. It may be from an older version."""
    return _resolve(config, {}, path)


def _resolve(
    recipe: Mapping[str, Any], flags: Mapping[str, str], source: str
) -> ConfigDict:
    recipe = {name: v for name, v in _flatten(recipe) if name not in IGNORED}
    task = tasks.find(flags.get("task", recipe["task"]))
    keys = task_keys(task)
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


def task_keys(task: type[tasks.Task]) -> dict[str, Key]:
    """Return all keys of a task's configs by dotted name."""
    trees = KEYS, {"model": model_keys()}, task.keys
    return {name: key for tree in trees for name, key in _flatten(tree)}


def model_keys() -> dict[str, Key]:
    """Return the model-specific keys of `config.model`, with docstrings as comments."""
    families = dict.fromkeys(type(config) for _, config in models.VARIANTS.values())
    comments = {}
    for family in (HiViTConfig, *families, RunOptions):
        docstring = inspect.cleandoc(family.__doc__)
        for names, text in re.findall(r"(?m)^(\w.*?): (.*(?:\n  .*)*)", docstring):
            sentence = re.split(r"[.;:](?:\s|$)", " ".join(text.split()))[0]
            comments |= dict.fromkeys(names.split(", "), sentence)
    return {
        name: Key(None, comments.get(name, ""), type=t if t in TYPE_NAMES else tuple)
        for name, t in models.override_types().items()
        if name not in KEYS["model"]
    }


def step_options(config: ConfigDict) -> dict[str, Any]:
    """Return the keyword arguments of `step.prepare`."""
    return dict(
        seed=config.seed,
        accumulate_steps=config.optimizer.accumulate_steps,
        ema_decay=config.optimizer.ema_decay,
        zero=config.mesh.zero,
    )


def to_json(config: ConfigDict) -> str:
    """Return the config as indented JSON text."""
    return json.dumps(json.loads(config.to_json_best_effort()), indent=2) + "\n"


def to_markdown() -> str:
    """Return all keys as Markdown tables."""
    sections = {"Every recipe": {n: k for n, k in KEYS.items() if isinstance(k, Key)}}
    sections |= {f"`{n}`": keys for n, keys in KEYS.items() if isinstance(keys, dict)}
    sections["`model`"] = sections["`model`"] | model_keys()
    sections |= {f"Task `{n}`": t.keys for n, t in tasks.TASKS.items() if t.keys}
    lines = ["# Config keys", "", "Generated by `python -m hivit_jax.config`."]
    lines += ["A recipe sets some keys. `--config.KEY=VALUE` overrides any key."]
    for title, section in sections.items():
        lines += ["", f"## {title}", "", "| key | default | values | meaning |"]
        lines += ["|---|---|---|---|"]
        for name, key in _flatten(section):
            default = "the model's" if key.default is None else f"`{key.default!r}`"
            lines.append(f"| `{name}` | {default} | {key.allowed} | {key.comment} |")
    return "\n".join(lines) + "\n"


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, leaf) of nested dicts."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _parse_override(override: str) -> tuple[str, str]:
    """Split ``--config.KEY=VALUE`` into (KEY, VALUE)."""
    key, equals, text = override.removeprefix("--config.").partition("=")
    if not override.startswith("--config.") or not equals:
        raise ConfigError(
            f"invalid flag {override!r}; expected --config.KEY=VALUE, --workdir=DIR "
            "or --mode=MODE"
        )
    return key, text


def _convert(
    keys: Mapping[str, Key], name: str, value: Any, method: Callable[[Key, Any], Any]
) -> Any:
    """Convert a value to the type of its key. `method`: Key.convert or Key.parse."""
    if name not in keys:
        raise unknown("config key", name, keys)
    try:
        return method(keys[name], value)
    except (KeyError, TypeError, ValueError, SyntaxError) as error:
        expected = TYPE_NAMES[keys[name].value_type]
        raise ConfigError(f"config.{name}={value!r}; expected {expected}") from error


def _expand_quirks(keys: Mapping[str, Key], init_from: str | None) -> dict[str, Any]:
    """Translate `optimizer.official_quirks=True` of the first edition.

    A classifier without `init_from` followed the official supervised code. All other
    runs followed the self-supervised code.
    """
    if "label_smoothing" in keys and not init_from:
        return {"optimizer.schedule": "cosine_from_start"}
    return {"optimizer.first_epoch": 1}


def _check(values: Mapping[str, Any], task: type[tasks.Task]) -> None:
    """Raise ConfigError for values that contradict the task, schedule or each other."""
    # Key without effect -> (only accepted value, key that makes it ineffective).
    unused = {name: (value, "task") for name, value in task.unused.items()}
    for name, schedules in SCHEDULES_OF_KEY.items():
        if values["optimizer.schedule"] not in schedules:
            default = KEYS["optimizer"][name].default
            unused[f"optimizer.{name}"] = default, "optimizer.schedule"
    for name, (expected, cause) in unused.items():
        if values[name] not in (None, expected):
            raise ConfigError(
                f"{name}={values[name]} has no effect with {cause}={values[cause]!r}; "
                f"expected {expected}"
            )
    for name in ("data.mean", "data.std"):
        if len(values[name]) != values["model.in_channels"]:
            raise ConfigError(
                f"{name}={values[name]}; expected one number per channel "
                f"(model.in_channels={values['model.in_channels']})"
            )


def _locked_config(keys: Mapping[str, Key], values: Mapping[str, Any]) -> ConfigDict:
    config = ConfigDict()
    for name, key in keys.items():
        section, (*parents, leaf) = config, name.split(".")
        for parent in parents:
            if parent not in section:
                section[parent] = ConfigDict()
            section = section[parent]
        value = values[name]
        if type(value) is not key.value_type:
            value = FieldReference(value, field_type=key.value_type)
        section[leaf] = value
    config.lock()
    return config


if __name__ == "__main__":
    print(to_markdown(), end="")
