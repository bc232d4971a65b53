"""Save a model as a directory, which can be shared on the Hugging Face hub."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hivit_jax
from hivit_jax.errors import CheckpointError, ConfigError, first_line
from hivit_jax.models import Model, arguments_of
from hivit_jax.paths import expand
from hivit_jax.reporting.console import log
from hivit_jax.tree import split
from hivit_jax.weights import files
from hivit_jax.weights.card import model_card
from hivit_jax.weights.files import CARD, CONFIG, WEIGHTS
from hivit_jax.weights.load import abstract_model
from hivit_jax.weights.names.official import from_official, to_state_dict

# Keys of a recipe whose values are directories of this machine.
DIRECTORIES = ("dir", "cache", "compilation_cache")
PATH_START = re.compile(r"[/~.\\]|[A-Za-z]:[/\\]|\w+://")


def save_pretrained(
    model: Model,
    directory: str | Path,
    recipe: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
) -> None:
    """Write `WEIGHTS`, `CONFIG` and a model card to a directory.

    The weights have their official PyTorch names and layout, so that other programs can
    read them. `load_pretrained(directory)` returns a bit-identical model. A model in
    the directory is replaced, but an edited model card is kept.

    Args:
      recipe: the training config of the model, for the card; saved without paths of
        this machine. When the directory is loaded, the preprocessing in the recipe's
        data, such as mean, std and crop, replaces the preprocessing in `model.info`.
      results: the evaluation results of the model, for the card.

    Raises:
      ConfigError: the directory contains files of another program or cannot be
        written, or `load_pretrained` would refuse the model.
    """
    directory = Path(expand(str(directory)))
    card_edited = _check_directory(directory)
    metadata = {
        "arguments": arguments_of(model),
        "info": asdict(model.info),
        "recipe": shareable(dict(recipe or {})),
        "results": dict(results or {}),
        "hivit_jax": hivit_jax.__version__,
    }
    state = _checked_state(model, metadata["arguments"])
    card = model_card(model, metadata["recipe"], metadata["results"]).encode()
    metadata["card"] = _digest(card)
    text = json.dumps(metadata, indent=2, default=_json_value) + "\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be written: {error.strerror}") from error
    files.write(directory / WEIGHTS, state, text)
    files.write_bytes(directory / CONFIG, text.encode())
    if card_edited:
        log(f"{directory / CARD} was edited and is kept; delete the file for a new one")
    else:
        files.write_bytes(directory / CARD, card)


def shareable(value: Any, key: str = "") -> Any:
    """Return a recipe without paths of this machine.

    Directories become "", and other paths are cut to their last part. Addresses on the
    Hugging Face hub are public and stay.
    """
    if hasattr(value, "items"):  # a Mapping or a ConfigDict
        return {name: shareable(each, name) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [shareable(each, key) for each in value]
    if not isinstance(value, str) or value.startswith("hf://"):
        return value
    if key in DIRECTORIES:
        return ""
    if PATH_START.match(value) or key == "init_from":
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def _checked_state(model: Model, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the model's state dict after checking that it can be loaded.

    Raises:
      ConfigError: `from_official` would refuse the state dict.
    """
    try:
        state = to_state_dict(split(model)[1], model)
        from_official(state, abstract_model(arguments))
    except (
        CheckpointError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
    ) as error:
        raise ConfigError(
            f"{model.name} cannot be saved, because it would not load: "
            f"{first_line(error)}.\nExpected finite values and the shapes of "
            "model.config. For another head, use load_pretrained(..., num_classes=N)"
        ) from error
    return state


def _check_directory(directory: Path) -> bool:
    """Check that a directory may be overwritten; return True if its card was edited.

    Raises:
      ConfigError: the directory contains weights or a config of another program, such
        as the config of a run.
    """
    file, metadata = directory / CONFIG, {}
    try:
        if file.is_file():
            metadata = json.loads(file.read_text())
            ours = isinstance(metadata, dict) and "arguments" in metadata
        elif (directory / WEIGHTS).is_file():
            file = directory / WEIGHTS
            ours = bool(files.read(file).metadata)
        else:
            ours = True
        card = directory / CARD
        card_bytes = card.read_bytes() if card.is_file() else None
    except (OSError, ValueError, CheckpointError):
        ours = False
    if not ours:
        raise ConfigError(
            f"{file} is not a file of save_pretrained, and would be overwritten; "
            "use another directory"
        )
    return card_bytes is not None and _digest(card_bytes) != metadata.get("card")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _json_value(value: Any) -> Any:
    """Convert an array or scalar of NumPy or JAX to a JSON value; others to text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
