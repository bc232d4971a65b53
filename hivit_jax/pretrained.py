"""Pretrained models: found wherever they are, and fitted to another task or size."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hivit_jax import checkpoint, metrics, weight_files
from hivit_jax.checkpoint import absolute
from hivit_jax.errors import CheckpointError, ConfigError
from hivit_jax.metrics import say
from hivit_jax.models import (
    Model,
    configure,
    create_model,
    leaf_name,
    model_keys,
    named_leaves,
    resize,
    split,
    variant,
)
from hivit_jax.models.base import make_info
from hivit_jax.models.config import HiViTConfig
from hivit_jax.models.positions import Grid
from hivit_jax.sharing import CONFIG, WEIGHTS, download
from hivit_jax.weights import dropped_by_rule, from_official, infer, official_names

FATES = ("used", "resized", "dropped", "zero", "new", "missing", "unlike")
# What may be new without leaving a model to chance.
HEAD = ("fc_norm/", "head/")
PREDICTION = "decoder_pred/"  # where channels differ
# Factor on a new head's standard deviation, 0.02 (official ``main_finetune.py``).
FINETUNED_HEAD = 2e-5 / 0.02
# What names and shapes may not tell.
HINTS = ("num_heads", "decoder_num_heads", "layer_norm_eps")


class Pretrained(NamedTuple):
    """A model on disk.

    path: where it was found.
    label: what to call it: the step of a run, else the path.
    arguments: `create_model(**arguments)` is the model that it is.
    params: numpy float32 arrays by name, as `models.named_leaves`.
    notes: what a reader should know: the format, what had to be guessed.
    unused: entries of the file that no parameter needs, by their names there.
    recipe: the config it was trained with, {} where unknown.
    results: its evaluation, {} where unknown.
    info: arguments of `models.base.make_info`, where known.
    """

    path: str
    label: str
    arguments: dict[str, Any]
    params: dict[str, np.ndarray]
    notes: list[str]
    unused: list[str]
    recipe: dict[str, Any]
    results: dict[str, Any]
    info: dict[str, Any]


def find(path: str | Path, *, averaged: bool = True, **overrides: Any) -> Pretrained:
    """Reads a pretrained model.

    Args:
      path: a run's workdir or one of its checkpoints; a directory of
        `save_pretrained`; a ``.safetensors`` or PyTorch file, official or MMPretrain's;
        ``hf://ORGANISATION/NAME[@REVISION][/FILE]`` for such a directory or file on the
        Hugging Face hub.
      averaged: take averaged weights (EMA) where they were kept.
      overrides: as in `create_model`. Those are heeded that a file may not tell of
        itself: `HINTS`, and image_size where its units make up no square.

    Raises:
      CheckpointError: nothing there, a damaged or unsafe file, another network.
    """
    path = download(path) if str(path).startswith("hf://") else absolute(path)
    file = path.is_file() or path.suffix in weight_files.SUFFIXES
    if not file and not (path / WEIGHTS).is_file():
        steps = checkpoint.find(path)
        for older, step in enumerate(steps, 1):
            try:
                return _of_step(step, averaged)
            except CheckpointError as error:
                if older == len(steps):
                    raise
                say(f"error: {error}")
    if path.is_dir():
        path = path / WEIGHTS
    file = weight_files.read(path, averaged)
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
        arguments, guessed = infer(file.state, overrides.get("image_size"))
        foreign = any(name.startswith("backbone.") for name in file.state)
        notes.append("names of MMPretrain" if foreign else "names of the official code")
        arguments |= {key: overrides[key] for key in HINTS if key in overrides}
        notes += [
            f"guessed: {key} {arguments[key]}, as {reason}"
            for key, reason in guessed.items()
            if key not in overrides
        ]
    model = abstract_model(arguments)
    params = named_leaves(from_official(file.state, model, partly=True))
    unused = dropped_by_rule(official_names(file.state), model)
    recipe, results = about.get("recipe", {}), about.get("results", {})
    info = about.get("info") or _info_of(recipe)
    found = str(path), str(path), arguments, params, notes, unused
    return Pretrained(*found, recipe, results, info)


def _of_step(step: Path, averaged: bool) -> Pretrained:
    config = checkpoint.load_config(step)
    arguments = {k: v for k, v in config["model"].items() if v is not None}
    params, item = checkpoint.load_arrays(step, averaged)
    notes = [f"checkpoint of hivit_jax, {item}"]
    results = metrics.results(step.parent.parent, int(step.name))
    label = f"step {step.name}"
    found = str(step), label, arguments, params, notes, []
    return Pretrained(*found, config, results, _info_of(config))


def _info_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `make_info` in a recipe."""
    names, data = {"mean": "mean", "std": "std", "crop_pct": "crop"}, recipe.get("data")
    return {names[key]: value for key, value in (data or {}).items() if key in names}


def find_for(config: Any, path: str | Path) -> Pretrained:
    """`find`, with what a recipe's model tells of its heads."""
    model = config.model
    heads = {key: model.get(key) for key in ("num_heads", "decoder_num_heads")}
    return find(path, **{key: value for key, value in heads.items() if value})


def abstract_model(arguments: dict[str, Any]) -> Model:
    """`create_model(**arguments)` without arrays; CheckpointError if it cannot be."""
    try:
        return nnx.eval_shape(lambda: create_model(**arguments))
    except (TypeError, ConfigError) as error:
        raise CheckpointError(f"no HiViT can be built of it: {error}") from error


def fit(
    pretrained: Pretrained, model: Model, fresh: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """What a model of another task or size takes of a pretrained one, by name; see
    `compare`. Norm, head and the decoder's prediction may be left out.

    Raises:
      ConfigError: arrays that fit in no way, or too many left to chance.
    """
    arrays, fates = compare(pretrained, model, fresh)
    if fates["unlike"]:
        name = fates["unlike"][0]
        here = list(named_leaves(split(model)[1])[name].shape)
        raise ConfigError(
            f"{pretrained.path} is another model: {name} is "
            f"{list(pretrained.params[name].shape)} there and {here} here"
        )
    if fates["missing"]:
        raise ConfigError(
            f"{pretrained.path} has no {fates['missing'][0]}; with "
            f"{len(fates['missing'])} arrays left to chance this would be no start"
        )
    if isinstance(model, Model):
        source = configure(**pretrained.arguments)[1].layer_norm_eps
        if source != (here := model.config.layer_norm_eps):
            say(
                f"note: layer_norm_eps is {source:g} in {pretrained.path}, "
                f"{here:g} here"
            )
    if any(fates[fate] for fate in fates if fate != "used"):
        say(f"{pretrained.path}:\n{fates_table(fates)}")
    return arrays


def compare(
    pretrained: Pretrained, model: Model, fresh: tuple[str, ...] = ()
) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """What would become of every array if `model` started from a pretrained one.

    Tables of positions are resized to other grids, the patch embedding to other
    channels and cells (official: ``supervised/utils.py``). Relative position tables
    that pretraining did not have start from 0.

    Arrays of a model without HiViT's encoder are used as they are.

    Args:
      model: a built or abstract model.
      fresh: prefixes of parameters that are not taken, such as ``head/``.

    Returns:
      Arrays by the model's names; and by fate the names that are used, resized, zero,
      new (norm, head, prediction: to be drawn), missing or unlike (of another shape),
      and those dropped of the pretrained ones.
    """
    hivit = isinstance(model, Model)
    source = configure(**pretrained.arguments)[1] if hivit else None
    arrays: dict[str, np.ndarray] = {}
    fates: dict[str, list[str]] = {fate: [] for fate in FATES}
    for name, leaf in named_leaves(split(model)[1]).items():
        array, head = pretrained.params.get(name), name.startswith(HEAD)
        if name.startswith(fresh):
            array = None
        # By geometry, not by shape: 4 x 4 units are not 2 x 8.
        resized = array
        if hivit and array is not None:
            resized = _resized(name, array, source, model.config)
        if resized is not None and resized.shape == leaf.shape:
            fates["used" if resized is array else "resized"].append(name)
            arrays[name] = resized
        elif head or (array is not None and name.startswith(PREDICTION)):
            fates["new"].append(name)
        elif array is not None:
            fates["unlike"].append(name)
        elif name.endswith("relative_position_bias_table"):
            fates["zero"].append(name)
            arrays[name] = np.zeros(leaf.shape, np.float32)
        else:
            fates["missing"].append(name)
    fates["dropped"] = [
        n for n in pretrained.params if n not in arrays or n in fates["zero"]
    ]
    return arrays, fates


def _resized(
    name: str, array: np.ndarray, old: HiViTConfig, new: HiViTConfig
) -> np.ndarray:
    """An array of one config in the shape for another; itself where nothing differs."""
    if name.endswith("_pos_embed") and old.grid != new.grid:
        return resize.resize_grid_table(array, old.grid, new.grid)
    if name.endswith("relative_position_bias_table"):
        block = int(name.split("/")[3])
        spans = [_span(config, block) for config in (old, new)]
        if spans[0] != spans[1]:
            return resize.resize_relative_table(array, *spans)
    if name.startswith("encoder/patch_embed/proj/kernel"):
        if old.cell_size != new.cell_size:
            array = resize.resize_patch_kernel(array, old.cell_size, new.cell_size)
        if old.in_channels != new.in_channels:
            array = resize.resize_channels(array, old.in_channels, new.in_channels)
    return array


def _span(config: HiViTConfig, block: int) -> Grid:
    """Units that the relative positions of a main-stage block span."""
    windows = config.windows(config.grid)[block]
    return config.grid if windows is None else windows.size


def fates_table(fates: dict[str, list[str]]) -> str:
    """A line for each fate: how many arrays, and of which parts of the model."""
    lines = []
    for fate, names in fates.items():
        parts = [name.split("/") for name in names]
        groups = Counter("/".join(p[: 1 + (p[0] == "encoder")]) for p in parts)
        listed = ", ".join(f"{group} {count}" for group, count in groups.items())
        if names:
            lines.append(f"  {fate:<8} {len(names):>4}  {listed}")
    return "\n".join(lines)


def start_from(
    pretrained: Pretrained,
    model: Model,
    variables: Mapping[str, Any],
    fresh: tuple[str, ...] = (),
    head_scale: float = 1.0,
) -> dict[str, Any]:
    """Freshly drawn variables of `model`, with what a pretrained model has of them.

    Args:
      variables: "params" and "model_state".
      fresh: prefixes of arrays that are not taken.
      head_scale: factor on the weights of a head that is not taken.

    Raises:
      ConfigError: see `fit`.
    """
    say(f"starting from {pretrained.path}")
    arrays = fit(pretrained, model, fresh)

    def choose(path, leaf):
        name = leaf_name(path[1:])
        if name in arrays:
            return jax.device_put(arrays[name], leaf.sharding)
        return leaf * head_scale if name == "head/kernel" else leaf

    return jax.tree_util.tree_map_with_path(choose, dict(variables))


def load_pretrained(
    path: str | Path, *, averaged: bool = True, **overrides: Any
) -> Model:
    """A model with pretrained parameters.

    Args:
      path: as in `find`: a workdir, a directory of `save_pretrained`, a ``.pth`` or
        ``.safetensors`` file, ``hf://ORGANISATION/NAME``.
      averaged: take averaged weights (EMA) where they were kept.
      overrides: as in `create_model`; the rest is as saved. Another name, image_size,
        in_channels or num_classes is fitted as `compare` tells, and said. A new head
        is drawn as for finetuning.

    Raises:
      CheckpointError: nothing usable there.
      ConfigError: the overrides make a model that the saved one does not fit.
    """
    return build(find(path, averaged=averaged, **overrides), **overrides)


def build(pretrained: Pretrained, **overrides: Any) -> Model:
    """The model that was found, or another one that starts from it: `load_pretrained`
    of what `find` returns.
    """
    arguments = fitting_arguments(pretrained.arguments, overrides)
    model = nnx.eval_shape(lambda: create_model(**arguments))
    model.info = make_info(model.config, **pretrained.info)
    graphdef, shapes = split(model)
    arrays = fit(pretrained, model)
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
