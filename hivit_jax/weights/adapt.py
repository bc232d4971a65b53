"""Initialize a model from a pretrained model, also of another task or size."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from hivit_jax.errors import ConfigError
from hivit_jax.flags import config_flag
from hivit_jax.models import Model, configure, resize
from hivit_jax.models.config import EncoderConfig
from hivit_jax.reporting.console import log
from hivit_jax.tree import leaf_name, named_leaves, split

# Prefixes of arrays that may be newly initialized.
HEAD = ("fc_norm/", "head/")
# Prefixes of the prediction layers of MAE and SimMIM, which may be newly initialized
# only if the shapes differ.
PREDICTION = ("decoder_pred/", "decoder/")
# Arguments that determine the shapes of arrays, except num_classes and in_channels.
SIZES = (
    "image_size", "patch_size", "inner_patches", "depths", "depth", "embed_dim",
    "num_heads", "mlp_ratio", "stem_mlp_ratio",
    "decoder_depth", "decoder_embed_dim", "decoder_num_heads"
)  # fmt: skip


class Pretrained(NamedTuple):
    """A model that was read from disk.

    path: path of the file or checkpoint.
    label: name for log lines: ``step N`` for a checkpoint of a run, else the path.
    arguments: `create_model(**arguments)` builds the saved model.
    params: NumPy float32 arrays by name, see `named_leaves`.
    notes: remarks for the user, such as the file format.
    guesses: lines on arguments that the file does not determine: value and reason.
    unused: official names of the file's entries that the model does not need.
    recipe: the training config, {} if unknown.
    results: the evaluation results, {} if unknown.
    info: the known arguments of `models.base.make_info`.
    """

    path: str
    label: str
    arguments: dict[str, Any]
    params: dict[str, np.ndarray]
    notes: list[str]
    guesses: list[str]
    unused: list[str]
    recipe: dict[str, Any]
    results: dict[str, Any]
    info: dict[str, Any]


@dataclass
class LoadReport:
    """Names of all arrays by outcome, for a model initialized from pretrained arrays.

    Attributes:
      matched: arrays that are copied unchanged.
      resized: arrays that are resized to the model's shape.
      unused: arrays of the pretrained model that are not copied.
      zero_init: relative position tables that the pretrained model does not have; they
        are initialized to 0.
      newly_initialized: arrays that are not copied and belong to the head, the norm
        before the head, the prediction layer of a decoder, or `fresh` of the task.
      missing: other arrays that the pretrained model does not have.
      shape_mismatch: arrays whose shape differs and that cannot be resized.
    """

    matched: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    zero_init: list[str] = field(default_factory=list)
    newly_initialized: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    shape_mismatch: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Return one line per outcome with the number of arrays in each submodule."""
        lines = []
        for outcome, names in vars(self).items():
            parts = [name.split("/") for name in names]
            groups = Counter("/".join(p[: 1 + (p[0] == "encoder")]) for p in parts)
            listed = ", ".join(f"{group} {count}" for group, count in groups.items())
            if outcome == "zero_init":
                listed += " (relative position tables)"
            if names:
                lines.append(f"  {outcome:<17} {len(names):>4}  {listed}")
        return "\n".join(lines)


def adapt(
    pretrained: Pretrained, model: nnx.Module, fresh: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """Return initial arrays of `model`, adapted from a pretrained model.

    Logs the report unless all arrays match. For the arguments and the returned arrays
    see `match_arrays`.

    Raises:
      ConfigError: an array is missing, or its shape differs and it cannot be resized.
    """
    arrays, report = match_arrays(pretrained, model, fresh)
    check_fit(pretrained, model, report)
    if isinstance(model, Model):
        source_eps = configure(**pretrained.arguments)[1].layer_norm_eps
        if source_eps != (eps := model.config.layer_norm_eps):
            log(
                f"note: layer_norm_eps is {source_eps:g} in {pretrained.path} and "
                f"{eps:g} in this model"
            )
    if any(names for outcome, names in vars(report).items() if outcome != "matched"):
        log(f"{pretrained.path}:\n{report}")
    return arrays


def check_fit(
    pretrained: Pretrained,
    model: nnx.Module,
    report: LoadReport,
    pixel_flags: Sequence[str] = (),
) -> None:
    """Raise ConfigError if a report contains missing or mismatched arrays.

    Args:
      report: result of `match_arrays`.
      pixel_flags: flags that the message contains in addition to those of the sizes.
    """
    if report.shape_mismatch:
        name = report.shape_mismatch[0]
        expected = list(named_leaves(split(model)[1])[name].shape)
        raise ConfigError(
            f"{pretrained.path} is a different model: {name} has shape "
            f"{list(pretrained.params[name].shape)}; expected {expected}"
            f"{_flags_text(pretrained, model, pixel_flags)}"
        )
    if count := len(report.missing):
        raise ConfigError(
            f"{pretrained.path}: {count} {'array is' if count == 1 else 'arrays are'} "
            f"missing, the first is {report.missing[0]}. Refusing to initialize from it"
            f"{_flags_text(pretrained, model, pixel_flags)}"
        )


def _flags_text(
    pretrained: Pretrained, model: nnx.Module, pixel_flags: Sequence[str]
) -> str:
    """Return the end of an error message: flags that differ; "" for equal sizes."""
    if not isinstance(model, Model):
        return ""
    saved, flags = configure(**pretrained.arguments)[1], []
    for key in SIZES:
        value = getattr(saved, key, None)
        if value is None or value == getattr(model.config, key, value):
            continue
        if key == "image_size" and value[0] == value[1]:
            value = value[0]
        flags.append(config_flag(f"model.{key}", value))
    if not flags:
        return ""
    different = "sizes and pixel values" if pixel_flags else "sizes"
    text = " ".join([*flags, *pixel_flags])
    return f"\nThe saved model has other {different}; its flags are {text}"


def match_arrays(
    pretrained: Pretrained, model: nnx.Module, fresh: tuple[str, ...] = ()
) -> tuple[dict[str, np.ndarray], LoadReport]:
    """Return initial arrays of `model`, adapted from a pretrained model, and a report.

    Resizes position tables to the model's grid or windows, and the patch embedding to
    the model's channels and cell size (official: ``supervised/utils.py``). Resizes only
    arrays of a `models.base.Model`; other modules must have the pretrained shapes.

    Args:
      model: a built or abstract model.
      fresh: prefixes of arrays that are not copied, such as ``head/``; (): copy all.

    Returns:
      {name in `model`: NumPy array}, without newly initialized, missing and mismatched
      arrays; and the report.
    """
    resizable = isinstance(model, Model)
    source = configure(**pretrained.arguments)[1] if resizable else None
    arrays: dict[str, np.ndarray] = {}
    report = LoadReport()
    for name, leaf in named_leaves(split(model)[1]).items():
        array = None if name.startswith(fresh) else pretrained.params.get(name)
        resized = array
        # Resize even if the shapes are equal, because grids of 4 x 4 and 2 x 8 units
        # have tables of the same shape.
        if resizable and array is not None:
            resized = _resized(name, array, source, model.config)
        if resized is not None and resized.shape == leaf.shape:
            (report.matched if resized is array else report.resized).append(name)
            arrays[name] = resized
        elif name.startswith((*HEAD, *fresh)) or (
            array is not None and name.startswith(PREDICTION)
        ):
            report.newly_initialized.append(name)
        elif array is not None:
            report.shape_mismatch.append(name)
        elif name.endswith("relative_position_bias_table"):
            report.zero_init.append(name)
            arrays[name] = np.zeros(leaf.shape, np.float32)
        else:
            report.missing.append(name)
    copied = {*report.matched, *report.resized}
    report.unused = [name for name in pretrained.params if name not in copied]
    return arrays, report


def _resized(
    name: str, array: np.ndarray, old: EncoderConfig, new: EncoderConfig
) -> np.ndarray:
    """Return an array resized from the old to the new config.

    Returns the array itself if it needs no change.
    """
    if name.endswith("_pos_embed") and old.grid != new.grid:
        class_rows, rows = np.split(array, [old.class_tokens])
        rows = resize.resize_grid_table(rows, old.grid, new.grid)
        return np.concatenate([class_rows, rows]) if len(class_rows) else rows
    if name.endswith("relative_position_bias_table"):
        stage, block = map(int, name.split("/")[2:4])
        grids = [config.table_grid(stage, block) for config in (old, new)]
        if grids[0] != grids[1]:
            if getattr(old, "geometric_tables", False):
                sides = (side for side, _ in grids)
                return resize.resize_table_geometrically(array, *sides)
            return resize.resize_relative_table(array, *grids)
    if name.startswith("encoder/patch_embed/proj/kernel"):
        if old.cell_size != new.cell_size:
            array = resize.resize_patch_kernel(array, old.cell_size, new.cell_size)
        if old.in_channels != new.in_channels:
            array = resize.resize_channels(array, old.in_channels, new.in_channels)
    return array


def initialize_from(
    pretrained: Pretrained,
    model: nnx.Module,
    variables: Mapping[str, Any],
    fresh: tuple[str, ...] = (),
    head_scale: float = 1.0,
) -> dict[str, Any]:
    """Return `variables` with pretrained arrays in place of new ones where available.

    Args:
      variables: newly initialized "params" and "model_state" of `model`.
      fresh: prefixes of arrays that are not copied from the pretrained model.
      head_scale: factor that multiplies the kernel of a newly initialized head.

    Raises:
      ConfigError: an array is missing, or its shape differs and it cannot be resized.
    """
    log(f"initializing from {pretrained.path}")
    arrays = adapt(pretrained, model, fresh)
    scale_head = jax.jit(lambda kernel: kernel * head_scale)

    def pretrained_or_new(path, leaf):
        name = leaf_name(path[1:])
        if name in arrays:
            return jax.device_put(arrays[name], leaf.sharding)
        return scale_head(leaf) if name == "head/kernel" else leaf

    return jax.tree_util.tree_map_with_path(pretrained_or_new, dict(variables))
