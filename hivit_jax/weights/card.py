"""Model card of a saved model, in the Hugging Face hub's format."""

from collections.abc import Mapping
from importlib import metadata
from typing import Any

import hivit_jax
from hivit_jax.models import Model
from hivit_jax.weights.files import CONFIG, WEIGHTS

MAX_CLASSES = 20  # the card lists at most this many class names


def model_card(
    model: Model, recipe: Mapping[str, Any], results: Mapping[str, Any]
) -> str:
    """Return the text of a model card.

    Args:
      recipe: training config without paths of this machine; may be incomplete or {}.
      results: evaluation results by name.
    """
    has_head = getattr(model, "head", None) is not None
    purpose = "image-classification" if has_head else "image-feature-extraction"
    height, width = model.config.image_size
    info = model.info
    lines = [
        "---",
        "library_name: hivit_jax",
        "license: unknown",
        f"pipeline_tag: {purpose}",
        f"tags: [{model.encoder_class.__name__.lower()}, jax, vision]",
        "---",
        f"# {model.name}",
        "",
        f"{model.architecture}: {model.description} for images of {height}x{width} "
        f"pixels with {info.channels} channels.",
        "",
        "The license of the weights is unknown. Add the license above before you share "
        "the weights.",
        "",
        f"- code: {_project_text()}",
        f"- citation: {model.architecture}",
        f"- parameters: {model.parameter_count() / 1e6:.2f} M",
        f"- multiply-adds per image: {_macs_text(model.macs(layer_norm_cost=0))}",
        *_class_lines(model, has_head),
        *_training_lines(recipe),
        *(
            f"- {name}: {_format_result(name, value)}"
            for name, value in results.items()
        ),
        "",
        *_usage_lines(model, has_head),
    ]
    return "\n".join(lines) + "\n"


def _macs_text(macs: int) -> str:
    """Return a number of multiply-adds as text in G, or in M below 0.1 G."""
    return f"{macs / 1e9:.2f} G" if macs >= 1e8 else f"{macs / 1e6:.2f} M"


def _project_text() -> str:
    """Return name, version and address of the package.

    The address is the first of the `project_urls` in setup.cfg, if there is one.
    """
    name = f"hivit_jax {hivit_jax.__version__}"
    try:
        urls = metadata.metadata("hivit-jax").get_all("Project-URL")
    except metadata.PackageNotFoundError:  # a clone on PYTHONPATH
        urls = []
    return f"{name}, {urls[0].rpartition(', ')[2]}" if urls else name


def _usage_lines(model: Model, has_head: bool) -> list[str]:
    """Return the section "Use": example code and preprocessing."""
    info, (height, width) = model.info, model.config.image_size
    has_class_names = has_head and bool(info.class_names)
    uses_sigmoid = has_class_names and info.multi_label
    lines = [
        "## Use",
        "",
        "```python",
        "import hivit_jax",
        *["import jax"] * uses_sigmoid,
        "",
        'model = hivit_jax.load_pretrained(".")  # the directory of this file',
        'images = hivit_jax.preprocess(model)(["photo.jpg"])',
        f"# float32 [1, {height}, {width}, {info.channels}]",
        "maps = model.features(images)",
    ]
    if has_head:
        lines.append(f"logits = model(images)  # [1, {model.config.num_classes}]")
    if uses_sigmoid:
        lines.append("probabilities = jax.nn.sigmoid(logits)  # one per class name")
    elif has_class_names:
        lines.append("print(model.info.class_names[logits[0].argmax()])")
    mean, std = (", ".join(f"{x:.6g}" for x in xs) for xs in (info.mean, info.std))
    lines += [
        "```",
        "",
        f"`preprocess` resizes with a {info.interpolation} filter, crops {info.crop:g} "
        f"of the shorter side, divides by {1 / info.scale:g}, subtracts the mean "
        f"({mean}) and divides by the standard deviation ({std}). `{WEIGHTS}` has the "
        f"names and layout of the official PyTorch code. `{CONFIG}` contains all "
        "settings of the model and of its training.",
    ]
    return lines


def _class_lines(model: Model, has_head: bool) -> list[str]:
    if not has_head:
        return []
    count, names = model.config.num_classes, model.info.class_names
    if not names:
        return [f"- classes: {count:,}; their names are unknown"]
    more = f", and {count - MAX_CLASSES:,} more in `{CONFIG}`" * (count > MAX_CLASSES)
    return [f"- classes: {count:,}: {', '.join(names[:MAX_CLASSES])}{more}"]


def _training_lines(recipe: Mapping[str, Any]) -> list[str]:
    """Return one line on the training; [] without a recipe."""
    if not recipe.get("task"):
        return []
    data = recipe.get("data", {}).get("name", "")
    facts = {
        "on": data,
        "from": recipe.get("init_from"),
        "epochs": recipe.get("total_epochs"),
        "steps": recipe.get("total_steps"),
        "batch size": recipe.get("batch_size"),
    }
    found = [f"{name} {value}" for name, value in facts.items() if value]
    return [f"- training: {', '.join([recipe['task'], *found])}"]


def _format_result(name: str, value: Any) -> str:
    """Return a result as text; accuracies in percent."""
    if not isinstance(value, (int, float)) and not hasattr(value, "__float__"):
        return str(value)
    if name.rpartition("/")[2].startswith("top"):
        return f"{100 * float(value):.2f} %"
    return f"{value:,}" if isinstance(value, int) else f"{float(value):.4f}"
