"""A recipe file and its overrides on the command line -> one locked ConfigDict."""

import ast
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, placeholder

from hivit_jax import tasks
from hivit_jax.augment import REACH
from hivit_jax.errors import ConfigError, unknown
from hivit_jax.models import override_parameters

KINDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    tuple: "a tuple such as (1,2)",
    object: "an integer, or a tuple such as (224,192)",
}

# What every recipe says, beside what its task wants.
KEYS = {
    "": "task seed batch_size total_epochs total_steps log_every eval_every "
    "checkpoint_every keep_checkpoints init_from checkpoint topology",
    "model": "name image_size in_channels",
    "data": "name crop_scale crop_pct flip mean std",
    "optimizer": "base_learning_rate min_learning_rate warmup_epochs betas "
    "weight_decay layer_decay clip_norm ema_decay accumulate_steps",
    "mesh": "replica data fsdp tensor",
}
# What a recipe may leave out.
DEFAULTS = {
    "stall_timeout": 1800.0,  # seconds without a step until a run ends itself; 0: never
    "peer_timeout": 60.0,  # seconds without a heartbeat: the process counts as lost
    "compilation_cache": "",  # directory of compiled programs; "": in the workdir
    "mesh.zero": 3,  # fsdp splits everything; 1: the optimizer's state alone
    "search_batch": False,  # with --mode compile: also the largest batch that fits
    "data.dir": "",  # of the dataset; "": where TFDS keeps its own
    "data.train_split": "",  # "": as the dataset calls it
    "data.eval_split": "",
    "data.train_examples": 0,  # 0: all; digits and synthetic may have less
    "data.subset": 0,  # which of the digits those are
    "data.interpolation": "bicubic",  # or "bilinear"
    "data.antialias": True,
    "data.canvas": 512,  # crops of up to this side go to the device, which resizes
    "data.workers": 0,  # threads that read; 0: one for each core
    "data.max_unreadable": 0.001,  # share of images that may be damaged
    "data.randaugment": False,  # in training
    "optimizer.warmup_learning_rate": 0.0,  # that warmup starts from
    "optimizer.first_moment_dtype": "float32",  # or "bfloat16"; Adam's
    "optimizer.official_quirks": False,  # of the schedule; see make_schedule
}
# The smallest values that work.
LEAST = {
    "seed": 0,
    "batch_size": 1,
    "log_every": 1,
    "eval_every": 1,
    "checkpoint_every": 1,
    "keep_checkpoints": 1,
    "optimizer.accumulate_steps": 1,
    "data.train_examples": 0,
    "data.canvas": 0,
    "data.workers": 0,
    "stall_timeout": 0.0,
    "peer_timeout": 1.0,
}
BETWEEN = {"data.crop_pct": (1e-3, 1.0), "data.max_unreadable": (0.0, 1.0)}


def load(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads a recipe and applies overrides.

    Args:
      path: a Python file with ``get_config() -> ConfigDict``; or, FILE:VARIANT, one
        with ``get_config(variant: str)``.
      overrides: ``--config.model.depths=(1,1,4)`` and the like. Every override of the
        model is a key of ``config.model``, named in the file or not.

    Raises:
      ConfigError: no such file, an unknown key (with the nearest known one), a value of
        another type than the recipe's, a number that is too small.
    """
    file, _, variant = str(path).partition(":")
    config = _read(Path(file), *filter(None, [variant]))
    for name, parameter in override_parameters().items():
        if name not in config.model:
            kind = parameter.annotation
            config.model[name] = placeholder(kind if kind in KINDS else tuple)
    # A side, or (height, width).
    size = config.model.image_size
    del config.model.image_size
    config.model.image_size = FieldReference(size, field_type=object)
    config.lock()
    for override in overrides:
        key, equals, text = override.removeprefix("--config.").partition("=")
        if not override.startswith("--config.") or not equals:
            raise ConfigError(
                f"cannot read {override!r}; expected --config.KEY=VALUE, "
                "--workdir=DIR, --mode=MODE"
            )
        _set(config, key, text)
    _check(config)
    return config


def to_json(config: ConfigDict) -> str:
    """The config as readable JSON text."""
    return json.dumps(json.loads(config.to_json_best_effort()), indent=2) + "\n"


def _read(path: Path, *variant: str) -> ConfigDict:
    if not path.is_file():
        raise ConfigError(f"--config={path}: no such file; expected configs/NAME.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None:
        raise ConfigError(f"--config={path}: expected a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(*variant)
        if not isinstance(config, ConfigDict):
            raise TypeError("get_config() must return a ConfigDict")
        for part, names in KEYS.items():
            for name in names.split():
                if name not in (config.get(part, {}) if part else config):
                    raise TypeError(f"config.{part}{'.' * bool(part)}{name} is missing")
        for key, value in DEFAULTS.items():
            *parents, name = key.split(".")
            part = config[parents[0]] if parents else config
            part[name] = part.get(name, value)
        return config
    except Exception as error:
        raise ConfigError(
            f"--config={path} cannot be read: {type(error).__name__}: {error}"
        ) from error


def _check(config: ConfigDict) -> None:
    """ConfigError for what nothing else checks before it does harm."""
    task = tasks.find(config.task)
    for key in task.required:
        if key not in config:
            raise ConfigError(f"task={config.task!r} needs a recipe with config.{key}")
    for key, neutral in task.unused.items():
        *parents, leaf = key.split(".")
        value = (config[parents[0]] if parents else config)[leaf]
        if value not in (None, neutral):
            raise ConfigError(
                f"{key}={value} has no effect with task={config.task!r}; "
                f"expected {neutral}"
            )
    for key, least in LEAST.items():
        *parents, leaf = key.split(".")
        value = (config[parents[0]] if parents else config)[leaf]
        if value < least:
            raise ConfigError(f"{key}={value}; expected at least {least}")
    for key, (low, high) in BETWEEN.items():
        part, leaf = key.split(".")
        if not low <= config[part][leaf] <= high:
            raise ConfigError(
                f"{key}={config[part][leaf]}; expected {low:g} to {high:g}"
            )
    micro = config.batch_size // config.optimizer.accumulate_steps
    if (config.get("mixup") or config.get("cutmix")) and micro % 2:
        raise ConfigError(
            f"mixup={config.mixup}, cutmix={config.cutmix} mix pairs of images; "
            f"batch_size / accumulate_steps is {micro}, expected an even number"
        )
    if config.mesh.zero not in (1, 3):
        raise ConfigError(f"mesh.zero={config.mesh.zero}; expected 1 or 3")
    if config.optimizer.first_moment_dtype not in ("float32", "bfloat16"):
        raise ConfigError(
            f"optimizer.first_moment_dtype={config.optimizer.first_moment_dtype!r}; "
            "expected 'float32' or 'bfloat16'"
        )
    if config.data.interpolation not in REACH:
        raise unknown("data.interpolation", config.data.interpolation, REACH)
    if len(config.optimizer.betas) != 2:
        raise ConfigError(
            f"optimizer.betas={config.optimizer.betas}; expected two numbers"
        )
    for name in ("mean", "std"):
        values, channels = config.data[name], config.model.in_channels
        if len(values) != channels:
            raise ConfigError(
                f"data.{name}={values}; expected one number for each of "
                f"model.in_channels={channels}"
            )


def _keys(config: ConfigDict, prefix: str = "") -> list[str]:
    keys = []
    for key in config:
        # A placeholder has a type but no value yet.
        value = config.get_ref(key).get()
        nested = isinstance(value, ConfigDict)
        keys += _keys(value, f"{prefix}{key}.") if nested else [prefix + key]
    return keys


def _set(config: ConfigDict, key: str, text: str) -> None:
    known = _keys(config)
    if key not in known:
        raise unknown("config key", key, known)
    *parents, leaf = key.split(".")
    for parent in parents:
        config = config[parent]
    kind = config.get_type(leaf)
    try:
        config[leaf] = _parse(text, kind)
    except (KeyError, TypeError, ValueError, SyntaxError) as error:
        raise ConfigError(f"config.{key}={text!r}; expected {KINDS[kind]}") from error


def _parse(text: str, kind: type) -> Any:
    if kind is str:
        return text
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    value = ast.literal_eval(text)
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(value, list):
        value = tuple(value)
    if type(value) not in ((int, tuple) if kind is object else (kind,)):
        raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return value
