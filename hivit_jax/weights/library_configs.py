"""Config files of timm and Hugging Face Transformers beside a model's weights."""

import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hivit_jax.errors import CheckpointError
from hivit_jax.weights.files import CONFIG

PREPROCESSOR = "preprocessor_config.json"  # of transformers
# Key of transformers' config.json -> argument of `create_model`.
ARGUMENTS = {
    "num_attention_heads": "num_heads",
    "num_heads": "num_heads",
    "decoder_num_attention_heads": "decoder_num_heads",
    "layer_norm_eps": "layer_norm_eps",
    "image_size": "image_size",
    "window_size": "window_size",
    "norm_pix_loss": "norm_pix_loss",
}
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's number of a filter -> name


def read_config(
    config: Mapping[str, Any], directory: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return arguments of `create_model` and of `make_info` from config files.

    Both are {} if config.json is neither from timm nor from transformers. Arguments
    that the files do not contain are left out.

    Args:
      config: contents of config.json, {} if there is no such file.
      directory: its `PREPROCESSOR` file of transformers is read, if there is one.

    Raises:
      CheckpointError: a file is damaged, or a key of id2label is not an integer.
    """
    if "architecture" in config:
        return _read_timm(config)
    if "model_type" not in config:
        return {}, {}
    arguments = {ours: config[key] for key, ours in ARGUMENTS.items() if key in config}
    info: dict[str, Any] = {}
    if (directory / PREPROCESSOR).is_file():
        preprocessing = read_json(directory / PREPROCESSOR)
        info = _preprocessing_info(preprocessing, "image_mean", "image_std")
        if preprocessing.get("resample") in RESAMPLE:
            info["interpolation"] = RESAMPLE[preprocessing["resample"]]
        # Without crop_pct, the image processors of transformers for ViT and Swin resize
        # the whole image and do not crop it.
        info.setdefault("crop", 1.0)
    labels = config.get("id2label") or {}
    try:
        names = [str(labels[key]) for key in sorted(labels, key=int)]
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{directory / CONFIG}: expected integers as keys of id2label, found "
            f"{reprlib.repr(labels)}; correct or remove id2label"
        ) from error
    if names and not names[0].startswith("LABEL_"):
        info["class_names"] = names
    return _lists_to_tuples(arguments), info


def _read_timm(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return arguments of `create_model` and of `make_info` from timm's config."""
    preprocessing = config.get("pretrained_cfg") or {}
    arguments = {}
    if size := preprocessing.get("input_size"):
        arguments["image_size"] = tuple(size[1:])
    info = _preprocessing_info(preprocessing, "mean", "std")
    if preprocessing.get("interpolation") in RESAMPLE.values():
        info["interpolation"] = preprocessing["interpolation"]
    if names := config.get("label_names"):
        info["class_names"] = names
    return _lists_to_tuples(arguments), info


def _preprocessing_info(
    preprocessing: Mapping[str, Any], mean: str, std: str
) -> dict[str, Any]:
    """Return the arguments of `make_info` that a preprocessing config contains.

    Args:
      mean, std: keys of mean and standard deviation in the config.
    """
    keys = {mean: "mean", std: "std", "crop_pct": "crop"}
    return {
        ours: preprocessing[key] for key, ours in keys.items() if preprocessing.get(key)
    }


def _lists_to_tuples(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments with tuples in place of JSON's lists."""
    return {
        key: tuple(value) if isinstance(value, Sequence) else value
        for key, value in arguments.items()
    }


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
      CheckpointError: the file cannot be read, or contains no object.
    """
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("expected a JSON object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return content
