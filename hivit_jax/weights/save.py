"""Save a model as a directory, which can be shared on the Hugging Face hub."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hivit_jax
from hivit_jax.models import Model, arguments_of
from hivit_jax.tree import split
from hivit_jax.weights import files
from hivit_jax.weights.names.official import to_state_dict

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


def save_pretrained(
    model: Model,
    directory: str | Path,
    recipe: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
) -> None:
    """Write `WEIGHTS`, `CONFIG` and a model card to a directory.

    The weights have their official PyTorch names and layout, so that other programs can
    read them. `load_pretrained(directory)` returns a bit-identical model.

    Args:
      recipe: the training config of the model, for the card. When the directory is
        loaded, mean, std and crop of the recipe's data replace those of `model.info`.
      results: the evaluation results of the model, for the card.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    metadata = {
        "arguments": arguments_of(model),
        "info": asdict(model.info),
        "recipe": dict(recipe or {}),
        "results": dict(results or {}),
        "hivit_jax": hivit_jax.__version__,
    }
    state = to_state_dict(split(model)[1], model)
    files.write(directory / WEIGHTS, state, metadata)
    (directory / CONFIG).write_text(json.dumps(metadata, indent=2) + "\n")
    (directory / CARD).write_text(_card(model, metadata))


def _card(model: Model, metadata: dict[str, Any]) -> str:
    """Return a model card in the Hugging Face hub's format."""
    arguments, recipe = metadata["arguments"], metadata["recipe"]
    size, shape = "x".join(map(str, model.config.image_size)), model.config.image_shape
    lines = [
        "---",
        "library_name: hivit_jax",
        "tags: [hivit, jax, image-feature-extraction]",
        "---",
        f"# {model.name}",
        "",
        f"HiViT (Zhang et al., ICLR 2023), {model.description} for images of {size} "
        "pixels.",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {model.parameter_count() / 1e6:.2f} M |",
        f"| multiply-adds per image | {model.macs(layer_norm_cost=0) / 1e9:.2f} G |",
    ]
    lines += [f"| {key} | {value} |" for key, value in arguments.items()]
    lines += [
        "",
        "```python",
        "import hivit_jax",
        "",
        "model = hivit_jax.load_pretrained(DIRECTORY)",
        f"maps = model.features(images)  # [B, {', '.join(map(str, shape))}]",
        "```",
        "",
        f"`{WEIGHTS}` has the names and layout of the official PyTorch code.",
        "",
        "## Results",
        "",
    ]
    results = [f"- {key}: {value}" for key, value in metadata["results"].items()]
    lines += results or ["Not available."]
    lines += ["", "## Training", ""]
    if recipe.get("task"):
        lines += ["```json", json.dumps(recipe, indent=2), "```"]
    else:
        lines.append("The recipe is not available.")
    return "\n".join(lines) + "\n"
