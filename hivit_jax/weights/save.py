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
from hivit_jax.weights.files import CARD, CONFIG, WEIGHTS
from hivit_jax.weights.load import abstract_model
from hivit_jax.weights.names.official import from_official, to_state_dict

# Keys of a recipe whose values are directories of this machine.
DIRECTORIES = ("dir", "cache", "compilation_cache")
PATH = re.compile(r"[/~.\\]|[A-Za-z]:[/\\]|\w+://")  # start of a path


def save_pretrained(
    model: Model,
    directory: str | Path,
    recipe: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
) -> None:
    """Write `WEIGHTS`, `CONFIG` and a model card to a directory.

    The weights have their official PyTorch names and layout, so that other programs can
    read them. `load_pretrained(directory)` returns a bit-identical model. A model that
    the directory already contains is replaced. An edited model card is kept.

    Args:
      recipe: the training config of the model, for the card; saved without paths of
        this machine. When the directory is loaded, mean, std and crop of the recipe's
        data replace those of `model.info`.
      results: the evaluation results of the model, for the card.

    Raises:
      ConfigError: `load_pretrained` would refuse the model, or the directory cannot be
        written or contains files of another program. Nothing is written.
    """
    directory = Path(expand(str(directory)))
    edited = _check_directory(directory)
    metadata = {
        "arguments": arguments_of(model),
        "info": asdict(model.info),
        "recipe": shareable(dict(recipe or {})),
        "results": dict(results or {}),
        "hivit_jax": hivit_jax.__version__,
    }
    state = _checked_state(model, metadata["arguments"])
    card = _card(model, metadata).encode()
    metadata["card"] = _digest(card)
    text = json.dumps(metadata, indent=2, default=_json_value) + "\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be written: {error.strerror}") from error
    files.write(directory / WEIGHTS, state, text)
    files.write_bytes(directory / CONFIG, text.encode())
    if edited:
        log(f"{directory / CARD} was edited and is kept; delete it for a new one")
    else:
        files.write_bytes(directory / CARD, card)


def shareable(value: Any, key: str = "") -> Any:
    """Return a recipe without paths of this machine.

    Directories become "", and of other paths the last part remains. Addresses on the
    Hugging Face hub are public and remain.
    """
    if hasattr(value, "items"):  # a Mapping or a ConfigDict
        return {name: shareable(each, name) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [shareable(each, key) for each in value]
    if not isinstance(value, str) or value.startswith("hf://"):
        return value
    if key in DIRECTORIES:
        return ""
    if PATH.match(value) or key == "init_from":
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def _checked_state(model: Model, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the model's state dict, and check that the state dict can be loaded.

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
            f"{first_line(error)}.\nExpected the arrays of model.config and finite "
            "values. For another head, use load_pretrained(..., num_classes=N)"
        ) from error
    return state


def _check_directory(directory: Path) -> bool:
    """Return True if the model card in a directory was edited.

    Raises:
      ConfigError: the directory contains weights or a config of another program, such
        as the config of a run.
    """
    config, metadata = directory / CONFIG, {}
    try:
        if config.is_file():
            metadata = json.loads(config.read_text())
            ours = isinstance(metadata, dict) and "arguments" in metadata
        elif (directory / WEIGHTS).is_file():
            config = directory / WEIGHTS
            ours = bool(files.read(config).metadata)
        else:
            ours = True
        card = directory / CARD
        text = card.read_bytes() if card.is_file() else None
    except (OSError, ValueError, CheckpointError):
        ours = False
    if not ours:
        raise ConfigError(
            f"{config} is not a file of save_pretrained, and would be overwritten; "
            "use another directory"
        )
    return text is not None and _digest(text) != metadata.get("card")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _json_value(value: Any) -> Any:
    """Return a number or array of numpy or JAX as a JSON value."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _card(model: Model, metadata: dict[str, Any]) -> str:
    """Return a model card in the Hugging Face hub's format."""
    arguments, recipe = metadata["arguments"], metadata["recipe"]
    size = "x".join(map(str, model.config.image_size))
    family = model.encoder_class.__name__.lower()
    lines = [
        "---",
        "library_name: hivit_jax",
        f"tags: [{family}, jax, image-feature-extraction]",
        "---",
        f"# {model.name}",
        "",
        f"{model.architecture}, {model.description} for images of {size} pixels.",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {model.parameter_count() / 1e6:.2f} M |",
        f"| multiply-adds per image | {model.macs(layer_norm_cost=0) / 1e9:.2f} G |",
    ]
    lines += [f"| {key} | {value} |" for key, value in arguments.items()]
    lines += _usage(model)
    lines += ["## Results", ""]
    results = [f"- {key}: {value}" for key, value in metadata["results"].items()]
    lines += results or ["Not available."]
    lines += ["", "## Training", ""]
    if recipe.get("task"):
        text = json.dumps(recipe, indent=2, default=_json_value)
        lines += ["```json", text, "```"]
    else:
        lines.append("The recipe is not available.")
    return "\n".join(lines) + "\n"


def _usage(model: Model) -> list[str]:
    """Return the lines of a model card on images, Python and classes."""
    info, shape = model.info, ", ".join(map(str, model.config.image_shape))
    facts = {
        "center crop": f"{info.crop:g} of the shorter side, {info.interpolation}",
        "mean": ", ".join(f"{x:.6g}" for x in info.mean),
        "standard deviation": ", ".join(f"{x:.6g}" for x in info.std),
        "factor on pixels": f"{info.scale:.6g}",
    }
    lines = [f"| {key} | {value} |" for key, value in facts.items()]
    lines += [
        "",
        "```python",
        "import hivit_jax",
        *["import jax"] * info.multi_label,
        "",
        "model = hivit_jax.load_pretrained(DIRECTORY)",
        f'images = hivit_jax.preprocess(model)(["a.jpg", "b.jpg"])  # [2, {shape}]',
    ]
    if getattr(model, "head", None) is not None:
        lines.append(f"logits = model(images)  # [2, {model.config.num_classes}]")
    if info.class_names and info.multi_label:
        lines.append("probabilities = jax.nn.sigmoid(logits)  # one per class name")
    elif info.class_names:
        lines.append("names = [model.info.class_names[k] for k in logits.argmax(-1)]")
    lines += [
        "maps = model.features(images)",
        "```",
        "",
        f"`{WEIGHTS}` has the names and layout of the official PyTorch code.",
        "",
    ]
    if names := info.class_names:
        more = [f"and {len(names) - 100:,} more in `{CONFIG}`"] if names[100:] else []
        lines += ["## Classes", "", ", ".join([*names[:100], *more]), ""]
    return lines
