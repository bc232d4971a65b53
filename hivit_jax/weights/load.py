"""Locate and read pretrained models, and build models from them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hivit_jax.augment.resample import MAXIMUM
from hivit_jax.checkpoints import read as checkpoints
from hivit_jax.errors import CheckpointError, ConfigError
from hivit_jax.models import (
    Model,
    create_arguments,
    create_model,
    list_models,
    merge_arguments,
    override_types,
    variant,
)
from hivit_jax.models.base import make_info
from hivit_jax.paths import absolute, expand
from hivit_jax.progress import listed
from hivit_jax.reporting import metrics
from hivit_jax.reporting.console import log
from hivit_jax.tree import leaf_name, named_leaves, split
from hivit_jax.weights import files, library_configs, nesting
from hivit_jax.weights.adapt import Pretrained, adapt
from hivit_jax.weights.files import CONFIG, DIRECTORY_WEIGHTS, WEIGHTS
from hivit_jax.weights.hub import download
from hivit_jax.weights.infer import infer
from hivit_jax.weights.names.official import (
    from_official,
    official_names,
    unneeded_entries,
)
from hivit_jax.weights.names.swin import BUFFERS, is_swin
from hivit_jax.weights.names.transformers import from_transformers, is_transformers

# Arguments that the names and shapes of a state dict do not determine.
NOT_IN_STATE_DICT = (
    "num_heads", "decoder_num_heads", "layer_norm_eps", "mask_patch_size"
)  # fmt: skip
# Keys of a recipe's data that are also the names of arguments of `make_info`.
SAME_NAMES = (
    "mean", "std", "interpolation", "antialias", "value_range", "dtype", "multi_label"
)  # fmt: skip
# Key of a recipe's data -> argument of `make_info`.
DATA_KEYS = {key: key for key in SAME_NAMES} | {"crop_pct": "crop"}


def locate(path: str | Path) -> Path:
    """Return the local path of a model; download it from an ``hf://`` address."""
    path = expand(str(path))
    return download(path) if path.startswith("hf://") else absolute(path)


def read(path: str | Path, *, averaged: bool = True, **overrides: Any) -> Pretrained:
    """Read a pretrained model.

    In a workdir, reads the newest intact checkpoint and logs newer damaged checkpoints.

    Args:
      path: a run's workdir or one of its checkpoints; a directory written by
        `save_pretrained`, or with one file of weights; a ``.safetensors`` or PyTorch
        file written by this package, the official code, MMPretrain or timm; or
        ``hf://ORGANIZATION/NAME[@REVISION][/FILE]``. Directories and repositories of
        timm and transformers, with a config.json, are accepted too.
      averaged: prefer averaged weights (EMA) if they were saved.
      overrides: arguments of `create_model`, used only to read a file of another
        program, and only image_size (see `infer`) and those in `NOT_IN_STATE_DICT`.

    Raises:
      CheckpointError: there is no model at the path, the file is damaged or unsafe, or
        the model is not a HiViT, ViT or Swin.
    """
    path = locate(path)
    if path.is_file() or (path.suffix in files.SUFFIXES and not path.is_dir()):
        return _read_file(path, averaged, overrides)
    if (path / WEIGHTS).is_file():
        return _read_file(path / WEIGHTS, averaged, overrides)
    try:
        *newer, oldest = checkpoints.find_checkpoints(path)
    except CheckpointError as error:
        found = [f for f in sorted(path.glob("*")) if f.name.endswith(files.SUFFIXES)]
        if len(found) == 1 and found[0].is_file():
            return _read_file(found[0], averaged, overrides)
        names = listed([file.name for file in found], 4)
        if found:
            raise CheckpointError(f"{error}, or one file of: {names}") from error
        if path.name in list_models() and not path.exists():
            raise CheckpointError(
                f"{error}.\n{path.name} is a model name, and the package contains no "
                f"weights; create_model({path.name!r}) initializes it"
            ) from error
        raise
    for checkpoint in newer:
        try:
            return _read_checkpoint(checkpoint, averaged)
        except CheckpointError as error:
            log(f"error: {error}")
    return _read_checkpoint(oldest, averaged)


def _read_file(path: Path, averaged: bool, overrides: Mapping[str, Any]) -> Pretrained:
    file = files.read(path, averaged)
    metadata, config = file.metadata, {}
    if path.name in DIRECTORY_WEIGHTS and (path.parent / CONFIG).is_file():
        config = library_configs.read_json(path.parent / CONFIG)
        if path.name == WEIGHTS:
            metadata = config
    known, info = library_configs.read_config(config, path.parent)
    notes = [f"{path.suffix} file" + (f", entry {file.key!r}" if file.key else "")]
    if file.other_keys:
        notes.append(f"other entries: {', '.join(file.other_keys)}")
    averages = [k for k in (file.key, *file.other_keys) if nesting.is_averaged(k)]
    notes.append(f"averaged weights (EMA): {', '.join(averages) or 'none'}")
    try:
        state, removed, unused = nesting.remove_prefixes(file.state, averaged)
        if is_transformers(state):
            state = from_transformers(state)
            notes.append("parameter names: transformers")
        elif "arguments" not in metadata:
            notes.append(f"parameter names: {_naming_scheme(state)}")
        if "arguments" in metadata:
            arguments, guesses = metadata["arguments"], []
        else:
            arguments, guesses = _infer_arguments(state, overrides, known)
        model = abstract_model(arguments)
        params = named_leaves(from_official(state, model, allow_missing=True))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if file.key not in nesting.STATE_DICT_KEYS:
        log(f"{path}: reading entry {file.key!r}")
    if removed:
        notes.append(f"removed from the names: {', '.join(removed)}")
        log(f"{path}: {notes[-1]}")
    unused += unneeded_entries(official_names(state), model)
    if leftovers := [name for name in unused if not name.endswith(BUFFERS)]:
        log(f"{path}: unused entries: {listed(leftovers, 5)}")
    recipe = metadata.get("recipe", {})
    return Pretrained(
        path=str(path),
        label=str(path),
        arguments=arguments,
        params=params,
        notes=notes,
        guesses=guesses,
        unused=unused,
        recipe=recipe,
        results=metadata.get("results", {}),
        info=info | metadata.get("info", {}) | _info_arguments(recipe),
    )


def _infer_arguments(
    state: Mapping[str, Any], overrides: Mapping[str, Any], known: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return the inferred arguments of a model, and the `guesses` of `Pretrained`.

    Args:
      known: arguments from a config beside the file; `overrides` take precedence.
    """
    size = overrides.get("image_size") or known.get("image_size")
    arguments, guessed = infer(state, size)
    accepted = override_types(type(variant(arguments["name"])[1]))
    known = {key: value for key, value in known.items() if key in accepted}
    arguments |= known | {"image_size": arguments["image_size"]}
    arguments |= {key: overrides[key] for key in NOT_IN_STATE_DICT if key in overrides}
    return arguments, [
        f"guessed: {key} {arguments[key]}, {reason}"
        for key, reason in guessed.items()
        if key not in overrides and key not in known
    ]


def _naming_scheme(state: Mapping[str, Any]) -> str:
    """Return the origin of a state dict's names, which are not from transformers."""
    if is_swin(state):
        return "official code or timm"
    if any(name.startswith("backbone.") for name in state):
        return "MMPretrain"
    return "MAE and timm" if "cls_token" in state else "official code"


def _read_checkpoint(path: Path, averaged: bool) -> Pretrained:
    config = checkpoints.load_config(path)
    arguments = create_arguments(config["model"])
    params, item = checkpoints.load_arrays(path, averaged)
    dataset = checkpoints.load_dataset_info(path)
    class_names = {"class_names": dataset["classes"]} if dataset else {}
    return Pretrained(
        path=str(path),
        label=f"step {path.name}",
        arguments=arguments,
        params=params,
        notes=[f"checkpoint of hivit_jax, {item}"],
        guesses=[],
        unused=[],
        recipe=config,
        results=metrics.read_evaluation(path.parent.parent, int(path.name)),
        info=_info_arguments(config) | class_names,
    )


def _info_arguments(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `make_info` that a recipe's data keys determine."""
    data = recipe.get("data") or {}
    found = {name: data[key] for key, name in DATA_KEYS.items() if key in data}
    divisor = data.get("scale") or MAXIMUM[data.get("dtype", "uint8")]
    return found if divisor in (255, math.inf) else found | {"scale": 1 / divisor}


def read_for(model_keys: Mapping[str, Any], path: str | Path) -> Pretrained:
    """Read a pretrained model for a recipe with these `model` keys.

    Numbers of heads in the keys are overrides; see `read`.
    """
    heads = {key: model_keys.get(key) for key in ("num_heads", "decoder_num_heads")}
    return read(path, **{key: value for key, value in heads.items() if value})


def abstract_model(arguments: dict[str, Any]) -> Model:
    """Return `create_model(**arguments)` with abstract arrays.

    Raises:
      CheckpointError: the arguments are invalid.
    """
    try:
        return nnx.eval_shape(lambda: create_model(**arguments))
    except (TypeError, ConfigError) as error:
        raise CheckpointError(f"invalid model arguments: {error}") from error


def load_pretrained(
    path: str | Path, *, averaged: bool = True, **overrides: Any
) -> Model:
    """Return a model with pretrained parameters.

    Args:
      path: a workdir, a directory written by `save_pretrained`, a ``.pth`` or
        ``.safetensors`` file, or ``hf://ORGANIZATION/NAME``; see `read`.
      averaged: prefer averaged weights (EMA) if they were saved.
      overrides: arguments of `create_model` that differ from the saved model's. The
        parameters are adapted to another name, image_size, in_channels or num_classes,
        and a report is logged. A new head is initialized as for finetuning.

    Raises:
      CheckpointError: there is no usable model at the path.
      ConfigError: the saved parameters do not fit a model with these overrides.
    """
    return build(read(path, averaged=averaged, **overrides), **overrides)


def build(pretrained: Pretrained, **overrides: Any) -> Model:
    """Return a model with pretrained parameters; overrides as in `load_pretrained`."""
    if pretrained.guesses:
        log(
            f"{pretrained.path}: {'; '.join(pretrained.guesses)}; to set a value, run "
            "hivit_jax.tools.convert FILE NEW.safetensors --set KEY=VALUE"
        )
    arguments = merge_arguments(pretrained.arguments, overrides)
    model = nnx.eval_shape(lambda: create_model(**arguments))
    model.info = make_info(model.config, **pretrained.info)
    graphdef, abstract = split(model)
    arrays = adapt(pretrained, model)
    new_names = {name for name in named_leaves(abstract) if name not in arrays}
    if new_names:

        @jax.jit  # so that XLA omits the initialization of all other arrays
        def initialize():
            leaves = named_leaves(split(create_model(**arguments))[1])
            return {name: leaves[name] for name in new_names}

        arrays |= initialize()
        if "head/kernel" in new_names:
            arrays["head/kernel"] *= model.new_head_scale
    params = jax.tree_util.tree_map_with_path(
        lambda key_path, _: jnp.asarray(arrays[leaf_name(key_path)]), abstract
    )
    return nnx.merge(graphdef, params)
