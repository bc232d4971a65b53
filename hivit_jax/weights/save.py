"""Models for others: a directory with weights, config and card, on disk or on the
Hugging Face hub.
"""

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
    """Writes a model for others: `WEIGHTS`, `CONFIG` and a model card.

    The weights have their official PyTorch names and layout, so that other programs can
    read them; `load_pretrained` of the directory gives the model back bit for bit.

    Args:
      recipe: the config it was trained with; mean, std and crop of its data replace
        those of `model.info`.
      results: its evaluation. Both go into the card.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    about = {
        "arguments": arguments_of(model),
        "info": asdict(model.info),
        "recipe": dict(recipe or {}),
        "results": dict(results or {}),
        "hivit_jax": hivit_jax.__version__,
    }
    state = to_state_dict(split(model)[1], model)
    files.write(directory / WEIGHTS, state, about)
    (directory / CONFIG).write_text(json.dumps(about, indent=2) + "\n")
    (directory / CARD).write_text(_card(model, about))


def _card(model: Model, about: dict[str, Any]) -> str:
    """A model card, as the Hugging Face hub shows it."""
    arguments, recipe, results = (about[k] for k in ("arguments", "recipe", "results"))
    name, task = arguments["name"], recipe.get("task", "")
    size, shape = "x".join(map(str, model.config.image_size)), model.config.image_shape
    lines = [
        "---",
        "library_name: hivit_jax",
        "tags: [hivit, jax, image-feature-extraction]",
        "---",
        f"# {name}",
        "",
        f"HiViT (Zhang et al., ICLR 2023), {model.kind} for images of {size} pixels.",
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
    lines += [f"- {key}: {value}" for key, value in results.items()] or ["None given."]
    lines += ["", "## Training", ""]
    if task:
        lines += ["```json", json.dumps(recipe, indent=2), "```"]
    else:
        lines.append("The recipe is not known.")
    return "\n".join(lines) + "\n"
