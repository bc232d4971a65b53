"""Pretrained models: locate, read, describe and adapt to another task or size."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.checkpoints import read as checkpoints
from hivit_jax.checkpoints.read import absolute
from hivit_jax.errors import CheckpointError, ConfigError
from hivit_jax.models import Model, configure, create_model, model_keys, variant
from hivit_jax.models.base import make_info
from hivit_jax.reporting import metrics
from hivit_jax.reporting.console import log
from hivit_jax.tree import leaf_name, named_leaves, split
from hivit_jax.weights import files
from hivit_jax.weights.adapt import Pretrained, adapt
from hivit_jax.weights.hub import download
from hivit_jax.weights.infer import infer
from hivit_jax.weights.names.official import (
    dropped_by_rule,
    from_official,
    official_names,
)
from hivit_jax.weights.save import CONFIG, WEIGHTS

# Factor on a new head's standard deviation, 0.02 (official ``main_finetune.py``).
FINETUNED_HEAD = 2e-5 / 0.02
# Arguments that names and shapes do not determine.
HINTS = ("num_heads", "decoder_num_heads", "layer_norm_eps")


def locate(path: str | Path) -> Path:
    """Return the local path of a model, downloaded from the Hugging Face hub for
    ``hf://ORGANISATION/NAME[@REVISION][/FILE]``.
    """
    return download(path) if str(path).startswith("hf://") else absolute(path)


def read(path: str | Path, *, averaged: bool = True, **overrides: Any) -> Pretrained:
    """Read a pretrained model.

    Args:
      path: a run's workdir or one of its checkpoints; a directory of
        `save_pretrained`; a ``.safetensors`` or PyTorch file, official or MMPretrain's;
        or an address that `locate` accepts of such a directory or file.
      averaged: take averaged weights (EMA) where they were kept.
      overrides: as in `create_model`. Only those count that a file may not contain:
        `HINTS`, and image_size where its units are not a square.

    Raises:
      CheckpointError: nothing there, a damaged or unsafe file, another network.
    """
    path = locate(path)
    if path.is_file() or path.suffix in files.SUFFIXES:
        return _read_file(path, averaged, overrides)
    if (path / WEIGHTS).is_file():
        return _read_file(path / WEIGHTS, averaged, overrides)
    steps = checkpoints.find(path)
    for older, step in enumerate(steps, 1):
        try:
            return _read_step(step, averaged)
        except CheckpointError as error:
            if older == len(steps):
                raise
            log(f"error: {error}")
    raise AssertionError("`checkpoints.find` returned no step")


def _read_file(path: Path, averaged: bool, overrides: Mapping[str, Any]) -> Pretrained:
    file = files.read(path, averaged)
    about = file.about
    if (path.parent / CONFIG).is_file() and path.name == WEIGHTS:
        about = _read_json(path.parent / CONFIG)
    notes = [f"{path.suffix} file" + (f", its {file.place!r}" if file.place else "")]
    notes += [f"also holds {', '.join(file.others)}"] if file.others else []
    kept = [each for each in (file.place, *file.others) if "ema" in each]
    notes.append(f"averaged weights (EMA): {', '.join(kept) or 'none'}")
    if "arguments" in about:
        arguments = about["arguments"]
    else:
        arguments, more = _describe(file.state, overrides)
        notes += more
    model = abstract_model(arguments)
    params = named_leaves(from_official(file.state, model, partly=True))
    unused = dropped_by_rule(official_names(file.state), model)
    recipe, results = about.get("recipe", {}), about.get("results", {})
    info = about.get("info", {}) | _info_of(recipe)
    found = str(path), str(path), arguments, params, notes, unused
    return Pretrained(*found, recipe, results, info)


def _describe(
    state: Mapping[str, Any], overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Arguments of the model of a state dict, and notes on what was guessed."""
    arguments, guessed = infer(state, overrides.get("image_size"))
    foreign = any(name.startswith("backbone.") for name in state)
    notes = ["names of MMPretrain" if foreign else "names of the official code"]
    arguments |= {key: overrides[key] for key in HINTS if key in overrides}
    notes += [
        f"guessed: {key} {arguments[key]}, as {reason}"
        for key, reason in guessed.items()
        if key not in overrides
    ]
    return arguments, notes


def _read_step(step: Path, averaged: bool) -> Pretrained:
    config = checkpoints.load_config(step)
    arguments = {k: v for k, v in config["model"].items() if v is not None}
    params, item = checkpoints.load_arrays(step, averaged)
    notes = [f"checkpoint of hivit_jax, {item}"]
    results = metrics.results(step.parent.parent, int(step.name))
    label = f"step {step.name}"
    found = str(step), label, arguments, params, notes, []
    return Pretrained(*found, config, results, _info_of(config))


def _info_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `make_info` in a recipe."""
    names, data = {"mean": "mean", "std": "std", "crop_pct": "crop"}, recipe.get("data")
    return {names[key]: value for key, value in (data or {}).items() if key in names}


def read_for(model: Mapping[str, Any], path: str | Path) -> Pretrained:
    """As `read`, with the numbers of heads of `config.model`."""
    heads = {key: model.get(key) for key in ("num_heads", "decoder_num_heads")}
    return read(path, **{key: value for key, value in heads.items() if value})


def abstract_model(arguments: dict[str, Any]) -> Model:
    """`create_model(**arguments)` without arrays; CheckpointError if it cannot be."""
    try:
        return nnx.eval_shape(lambda: create_model(**arguments))
    except (TypeError, ConfigError) as error:
        raise CheckpointError(f"no HiViT can be built of it: {error}") from error


def load_pretrained(
    path: str | Path, *, averaged: bool = True, **overrides: Any
) -> Model:
    """A model with pretrained parameters.

    Args:
      path: as in `read`: a workdir, a directory of `save_pretrained`, a ``.pth`` or
        ``.safetensors`` file, ``hf://ORGANISATION/NAME``.
      averaged: take averaged weights (EMA) where they were kept.
      overrides: as in `create_model`; the rest is as saved. Another name, image_size,
        in_channels or num_classes is adapted, and a report is logged. A new head is
        drawn as for finetuning.

    Raises:
      CheckpointError: nothing usable there.
      ConfigError: the overrides make a model that the saved one does not fit.
    """
    return build(read(path, averaged=averaged, **overrides), **overrides)


def build(pretrained: Pretrained, **overrides: Any) -> Model:
    """The model that was found, or another one that starts from it: `load_pretrained`
    of what `read` returns.
    """
    arguments = fitting_arguments(pretrained.arguments, overrides)
    model = nnx.eval_shape(lambda: create_model(**arguments))
    model.info = make_info(model.config, **pretrained.info)
    graphdef, shapes = split(model)
    arrays = adapt(pretrained, model)
    new = {name for name in named_leaves(shapes) if name not in arrays}
    if new:

        @jax.jit  # which draws nothing else
        def draw():
            leaves = named_leaves(split(create_model(**arguments))[1])
            return {name: leaves[name] for name in new}

        arrays |= draw()
        if "head/kernel" in new:
            arrays["head/kernel"] *= FINETUNED_HEAD
    params = jax.tree_util.tree_map_with_path(
        lambda key_path, _: jnp.asarray(arrays[leaf_name(key_path)]), shapes
    )
    return nnx.merge(graphdef, params)


def fitting_arguments(
    arguments: dict[str, Any], overrides: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of a saved model, changed.

    A model of another name takes over run options, and those sizes that are not the
    defaults of the saved model's class, as far as it has them; depths and widths only
    if the two names have the same.
    """
    if overrides.get("name", arguments["name"]) == arguments["name"]:
        return arguments | overrides
    _, config, _ = configure(**arguments)
    old, new = (variant(each["name"])[1] for each in (arguments, overrides))
    known, left = model_keys(type(new)), {"name"}
    sizes = ("embed_dim", "depths", "num_heads")
    if any(getattr(old, key) != getattr(new, key) for key in sizes):
        left |= {*sizes}
    left |= {f.name for f in fields(config) if getattr(config, f.name) == f.default}
    kept = {k: v for k, v in arguments.items() if k in known and k not in left}
    return kept | overrides


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("expected an object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return content
