"""PyTorch state dicts <-> our parameters: one table of names, read both ways.

Ours differ from the official ones in layout only: Linear kernels are ``[in, out]``, the
patch convolution is a Linear on the pixels of a cell, heads have an axis of their own,
and the multi-scale latent holds cells in merge order, so that its LayerNorm and the
decoder embedding behind it are permuted here instead of the activations there.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np

from hivit_jax.errors import CheckpointError, ConfigError
from hivit_jax.models import Model
from hivit_jax.models.config import HiViTConfig
from hivit_jax.models.mae import MaskedAutoencoder
from hivit_jax.models.positions import merge_order, relative_position_index
from hivit_jax.tree import leaf_name, split

# What a state dict may be written for. The official self_supervised and supervised
# programs differ in where they keep the relative position index.
FORMATS = ("official", "supervised", "mmpretrain")
INDEX = "relative_position_index"
# Narrower numbers are read, as their float32 is exact.
FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16)


class Entry(NamedTuple):
    """One row of the table: the official name and both conversions of the array."""

    name: str
    to_ours: Callable[[np.ndarray], np.ndarray]
    to_official: Callable[[np.ndarray], np.ndarray]


def latent_order(config: HiViTConfig) -> np.ndarray:
    """Official channel at each channel of our multi-scale latent, int [7E].

    Official: each stage row-major over its cells; ours: merge order.
    """
    channels, inner, start = [], config.inner_patches, 0
    while inner:
        width = config.embed_dim // inner
        cells = merge_order(inner)[:, None] * width + np.arange(width)
        channels.append(start + cells.reshape(-1))
        start += cells.size
        inner //= 2
    return np.concatenate(channels)


def _entry(path: str, shape: tuple[int, ...], model: Model) -> Entry:
    """The row of the table for our parameter `path` of this `shape`."""
    config = model.config
    parts = path.removeprefix("encoder/").split("/")
    # The official encoder is one flat list of blocks, merges included.
    lengths = [count + 1 for count in config.block_counts]  # a stage and its merge
    if parts[0] == "stages":
        parts[:3] = ["blocks", str(sum(lengths[: int(parts[1])]) + int(parts[2]))]
    elif parts[0] == "merges":
        parts[:2] = ["blocks", str(sum(lengths[: int(parts[1]) + 1]) - 1)]
    leaf = parts[-1]
    parts[-1] = {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)
    name = ".".join(parts)

    if name == "patch_embed.proj.weight":  # conv [out, in, kh, kw]
        cell = config.cell_size
        return Entry(
            name,
            lambda a: a.transpose(2, 3, 1, 0).reshape(shape),
            lambda a: a.T.reshape(shape[1], cell, cell, -1).transpose(0, 3, 1, 2),
        )
    if name == "mask_token":
        return Entry(name, lambda a: a.reshape(shape), lambda a: a[None, None])
    if leaf.endswith("_pos_embed"):
        return Entry(name, lambda a: a.reshape(shape), lambda a: a[None])
    if parts[-2] == "qkv":  # kernel [E, 3, heads, E/heads], bias without the E
        flat = (shape[0], -1) if leaf == "kernel" else (-1,)
        return Entry(name, lambda a: a.T.reshape(shape), lambda a: a.reshape(flat).T)
    permuted = isinstance(model, MaskedAutoencoder) and config.multi_scale
    if permuted and name in ("norm.weight", "norm.bias", "decoder_embed.weight"):
        order = latent_order(config)
        back = np.argsort(order)
        return Entry(name, lambda a: a.T[order], lambda a: a[back].T)
    if leaf == "kernel":
        return Entry(name, lambda a: a.T, lambda a: a.T)
    return Entry(name, lambda a: a, lambda a: a)


def official_names(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state dict under its official names, whoever wrote it.

    MMPretrain's ``backbone.`` and ``head.fc.`` are translated, ``module.`` (from
    DistributedDataParallel) and ``_orig_mod.`` (from ``torch.compile``) taken off.
    """
    named = {}
    for name, array in state.items():
        new = re.sub(r"^((module|_orig_mod)\.)+", "", name)
        new = new.removeprefix("backbone.").replace("head.fc.", "head.")
        named["absolute_pos_embed" if new == "pos_embed" else new] = array
    return named


def dropped_by_rule(names: Iterable[str], model: Model) -> list[str]:
    """Official names that hold nothing this model could need.

    The relative position index, which is computed; the norm that the official masked
    autoencoder without multi-scale features stores and never applies; and MMPretrain's
    decoder, which takes the first visible unit of HiViT for a class token.
    """
    single = isinstance(model, MaskedAutoencoder) and not model.config.multi_scale
    unused = ("norm.weight", "norm.bias") if single else ()
    return [
        n for n in names if n.endswith(INDEX) or n in unused or n.startswith("neck.")
    ]


def from_official(
    state: Mapping[str, np.ndarray], model: Model, partly: bool = False
) -> dict:
    """Parameters of `model` from an official (or MMPretrain) state dict.

    Args:
      state: numpy arrays by their PyTorch names; MMPretrain's names are recognised.
      model: a built or abstract model of the same configuration.
      partly: entries may be missing; None stands for them.

    Returns:
      Nested parameters as `tree.split` gives them, float32.

    Raises:
      CheckpointError: a missing, left-over or wrongly shaped entry, one of numbers that
        float32 does not hold exactly, or that are not finite; by name.
    """
    left = official_names(state)
    for name in dropped_by_rule(list(left), model):
        del left[name]

    def convert(path, leaf):
        entry = _entry(leaf_name(path), leaf.shape, model)
        if entry.name not in left:
            if partly:
                return None
            raise CheckpointError(f"the state dict has no {entry.name!r}")
        array = left.pop(entry.name)
        expected = entry.to_official(np.empty(leaf.shape, bool)).shape
        if array.shape != expected:
            raise CheckpointError(
                f"{entry.name!r} is {list(array.shape)}, here {list(expected)}"
            )
        if array.dtype not in FLOATS:
            raise CheckpointError(f"{entry.name!r} is {array.dtype}; expected float32")
        array = array.astype(np.float32, copy=False)
        if not np.isfinite(array).all():
            raise CheckpointError(f"{entry.name!r} has values that are not finite")
        return entry.to_ours(array)

    params = jax.tree_util.tree_map_with_path(convert, split(model)[1])
    if left:
        raise CheckpointError(
            f"this model has no place for {', '.join(list(left)[:3])!r}"
        )
    return params


def to_official(params: Mapping, model: Model) -> dict[str, np.ndarray]:
    """Nested parameters of `model` -> numpy arrays by their official PyTorch names."""
    state = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        entry = _entry(leaf_name(path), leaf.shape, model)
        state[entry.name] = entry.to_official(np.asarray(leaf))
    return state


def to_state_dict(
    params: Mapping, model: Model, form: str = "official"
) -> dict[str, np.ndarray]:
    """Nested parameters of `model` -> everything that another program's model of this
    configuration holds, as numpy arrays by its PyTorch names. (Those programs have no
    windows; then the relative position index is left out.)

    Args:
      form: one of `FORMATS`.

    Raises:
      ConfigError: that program has no such model.
    """
    if form == "mmpretrain" and getattr(model, "fc_norm", None) is not None:
        raise ConfigError(
            "MMPretrain's classifier has no norm between pooling and head; expected a "
            "model with fc_norm=False"
        )
    state, config = to_official(params, model), model.config
    if isinstance(model, MaskedAutoencoder):
        if form == "mmpretrain":  # the encoder alone; see `dropped_by_rule`
            names = ("absolute_pos_embed", "patch_embed.", "blocks.")
            state = {n: array for n, array in state.items() if n.startswith(names)}
        elif not config.multi_scale:
            state["norm.weight"] = np.ones(config.embed_dim, np.float32)
            state["norm.bias"] = np.zeros(config.embed_dim, np.float32)
    tables = [name for name in state if name.endswith("_bias_table")]
    if tables and not config.window_size:
        units = np.arange(config.grid[0] * config.grid[1])
        index = np.asarray(relative_position_index(units, config.grid), np.int64)
        if form != "supervised":
            state[INDEX] = index
        if form != "official":
            state |= {n.rsplit(".", 1)[0] + "." + INDEX: index for n in tables}
    if form == "mmpretrain":
        renamed = {"absolute_pos_embed": "backbone.pos_embed"}
        renamed |= {f"head.{leaf}": f"head.fc.{leaf}" for leaf in ("weight", "bias")}
        state = {renamed.get(n, f"backbone.{n}"): array for n, array in state.items()}
    return state
