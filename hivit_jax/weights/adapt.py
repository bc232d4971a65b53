"""Pretrained arrays for a model of another task or size, and a report on each."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from hivit_jax.errors import ConfigError
from hivit_jax.models import Model, configure, resize
from hivit_jax.models.config import HiViTConfig
from hivit_jax.models.positions import Grid
from hivit_jax.reporting.console import log
from hivit_jax.tree import leaf_name, named_leaves, split

# Arrays that may be newly initialized.
HEAD = ("fc_norm/", "head/")
PREDICTION = "decoder_pred/"  # where channels differ


class Pretrained(NamedTuple):
    """A model on disk.

    path: where it was found.
    label: what to call it: the step of a run, else the path.
    arguments: `create_model(**arguments)` is the model that it is.
    params: numpy float32 arrays by name, as `named_leaves`.
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


@dataclass
class LoadReport:
    """What becomes of every array when a model is initialized from a pretrained one.

    Attributes:
      matched: arrays of the model that are taken as they are.
      resized: taken in the shape of the model.
      unused: arrays of the pretrained model that are not taken.
      zero_init: relative position tables that pretraining did not have; they start
        from 0.
      newly_initialized: norm, head and prediction that are to be drawn.
      missing: arrays of the model that the pretrained one does not have.
      shape_mismatch: arrays of another shape that cannot be resized.
    """

    matched: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    zero_init: list[str] = field(default_factory=list)
    newly_initialized: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    shape_mismatch: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """A line for each kind: how many arrays, and of which parts of the model."""
        lines = []
        for kind, names in vars(self).items():
            parts = [name.split("/") for name in names]
            groups = Counter("/".join(p[: 1 + (p[0] == "encoder")]) for p in parts)
            listed = ", ".join(f"{group} {count}" for group, count in groups.items())
            if names:
                lines.append(f"  {kind:<17} {len(names):>4}  {listed}")
        return "\n".join(lines)


def adapt(
    pretrained: Pretrained, model: Model, fresh: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """Return arrays of a pretrained model by the names of another model; see `compare`.
    Norm, head and the decoder's prediction may be left out.

    Raises:
      ConfigError: missing arrays, or arrays of another shape.
    """
    arrays, report = compare(pretrained, model, fresh)
    if report.shape_mismatch:
        name = report.shape_mismatch[0]
        here = list(named_leaves(split(model)[1])[name].shape)
        raise ConfigError(
            f"{pretrained.path} is another model: {name} is "
            f"{list(pretrained.params[name].shape)} there and {here} here"
        )
    if count := len(report.missing):
        raise ConfigError(
            f"{pretrained.path} has no {report.missing[0]}; {count} "
            f"{'array is' if count == 1 else 'arrays are'} missing. Refusing to "
            "initialize from it"
        )
    if isinstance(model, Model):
        source = configure(**pretrained.arguments)[1].layer_norm_eps
        if source != (here := model.config.layer_norm_eps):
            log(
                f"note: layer_norm_eps is {source:g} in {pretrained.path}, "
                f"{here:g} here"
            )
    if any(names for kind, names in vars(report).items() if kind != "matched"):
        log(f"{pretrained.path}:\n{report}")
    return arrays


def compare(
    pretrained: Pretrained, model: Model, fresh: tuple[str, ...] = ()
) -> tuple[dict[str, np.ndarray], LoadReport]:
    """Return the arrays that a model takes from a pretrained one, and a report.

    Tables of positions are resized to other grids, the patch embedding to other
    channels and cells (official: ``supervised/utils.py``). Arrays of a model that is
    no `models.base.Model` are used as they are.

    Args:
      model: a built or abstract model.
      fresh: prefixes of arrays that are not taken, such as ``head/``.

    Returns:
      Numpy arrays by the model's names; and the report.
    """
    hivit = isinstance(model, Model)
    source = configure(**pretrained.arguments)[1] if hivit else None
    arrays: dict[str, np.ndarray] = {}
    report = LoadReport()
    for name, leaf in named_leaves(split(model)[1]).items():
        array, head = pretrained.params.get(name), name.startswith(HEAD)
        if name.startswith(fresh):
            array = None
        # By geometry, not by shape: 4 x 4 units are not 2 x 8.
        resized = array
        if hivit and array is not None:
            resized = _resized(name, array, source, model.config)
        if resized is not None and resized.shape == leaf.shape:
            (report.matched if resized is array else report.resized).append(name)
            arrays[name] = resized
        elif head or (array is not None and name.startswith(PREDICTION)):
            report.newly_initialized.append(name)
        elif array is not None:
            report.shape_mismatch.append(name)
        elif name.endswith("relative_position_bias_table"):
            report.zero_init.append(name)
            arrays[name] = np.zeros(leaf.shape, np.float32)
        else:
            report.missing.append(name)
    taken = {*report.matched, *report.resized}
    report.unused = [name for name in pretrained.params if name not in taken]
    return arrays, report


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


def initialize_from(
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
      ConfigError: see `adapt`.
    """
    log(f"starting from {pretrained.path}")
    arrays = adapt(pretrained, model, fresh)

    def choose(path, leaf):
        name = leaf_name(path[1:])
        if name in arrays:
            return jax.device_put(arrays[name], leaf.sharding)
        return leaf * head_scale if name == "head/kernel" else leaf

    return jax.tree_util.tree_map_with_path(choose, dict(variables))
