"""Conversion between PyTorch state dicts and our parameters, in both directions.

Our parameters differ from the official parameters only in name and layout. Our Linear
kernels have the shape ``[in, out]``. Our patch convolution is a Linear on the pixels of
a cell. Our attention heads have a separate axis. Our multi-scale latent has its cells
in merge order: the conversion permutes the parameters of its LayerNorm and of the
decoder embedding, so that the model does not have to permute activations.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np

from hivit_jax.errors import CheckpointError, ConfigError
from hivit_jax.models import Model
from hivit_jax.models.config import HiViTConfig, MAEConfig
from hivit_jax.models.mae import MaskedAutoencoder
from hivit_jax.models.positions import merge_order, relative_position_index
from hivit_jax.models.simmim import SimMIM
from hivit_jax.models.swin import SwinConfig
from hivit_jax.progress import listed
from hivit_jax.tree import leaf_name, split
from hivit_jax.weights.names import baselines, swin
from hivit_jax.weights.names.baselines import to_layout
from hivit_jax.weights.names.swin import INDEX

# Layouts of a HiViT's state dict: of the official self_supervised code, of the official
# supervised code, of MMPretrain. The two official layouts differ only in the names of
# the relative position index.
HIVIT_LAYOUTS = ("official", "supervised", "mmpretrain")
LAYOUTS = tuple(dict.fromkeys((*HIVIT_LAYOUTS, *baselines.LAYOUTS)))
# Accepted dtypes of state dicts; float32 represents all their values exactly.
FLOATS = (
    np.float32,
    np.float16,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e4m3fnuz,
    ml_dtypes.float8_e5m2,
    ml_dtypes.float8_e5m2fnuz,
)


class Entry(NamedTuple):
    """Official name of one of our parameters, and the conversions of its array."""

    name: str
    to_ours: Callable[[np.ndarray], np.ndarray]
    to_official: Callable[[np.ndarray], np.ndarray]


def latent_order(config: MAEConfig) -> np.ndarray:
    """Return the channels of the official multi-scale latent in our order, int [7E].

    Both latents concatenate the stages. Within a stage, the official cells are in
    row-major order, and our cells in merge order. 7E is the length for 4x4 cells.
    """
    channels, inner, start = [], config.inner_patches, 0
    while inner:
        width = config.embed_dim // inner
        stage = merge_order(inner)[:, None] * width + np.arange(width)
        channels.append(start + stage.reshape(-1))
        start += stage.size
        inner //= 2
    return np.concatenate(channels)


def _entry(path: str, shape: tuple[int, ...], model: Model) -> Entry:
    """Return the official name and conversions of our parameter `path`."""
    config, is_simmim = model.config, isinstance(model, SimMIM)
    if isinstance(config, SwinConfig):
        parts = swin.official_parts(path, is_simmim)
    else:
        parts = path.removeprefix("encoder/").split("/")
        # Officially, blocks and merges share one list. A merge follows its stage.
        lengths = [count + 1 for count in config.block_counts]
        if parts[0] == "stages":
            parts[:3] = ["blocks", str(sum(lengths[: int(parts[1])]) + int(parts[2]))]
        elif parts[0] == "merges":
            parts[:2] = ["blocks", str(sum(lengths[: int(parts[1]) + 1]) - 1)]
    leaf = parts[-1]
    parts[-1] = {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)
    name = ".".join(parts)
    if config.class_tokens and name == "absolute_pos_embed":  # ViT
        name = "pos_embed"

    if is_simmim and parts[0] == "decoder":  # 1x1 conv, then pixel shuffle
        channels = config.in_channels
        return Entry(
            name,
            lambda a: swin.decoder_to_ours(a, shape, channels),
            lambda a: swin.decoder_to_official(a, channels),
        )
    if name.endswith("patch_embed.proj.weight"):  # conv [out, in, kh, kw]
        cell = config.cell_size
        return Entry(
            name,
            lambda a: a.transpose(2, 3, 1, 0).reshape(shape),
            lambda a: a.T.reshape(shape[1], cell, cell, -1).transpose(0, 3, 1, 2),
        )
    if leaf in ("mask_token", "cls_token"):
        return Entry(name, lambda a: a.reshape(shape), lambda a: a[None, None])
    if leaf.endswith("_pos_embed"):
        return Entry(name, lambda a: a.reshape(shape), lambda a: a[None])
    if parts[-2] == "qkv":  # kernel [E, 3, heads, E/heads], bias [3, heads, E/heads]
        flat = (shape[0], -1) if leaf == "kernel" else (-1,)
        return Entry(name, lambda a: a.T.reshape(shape), lambda a: a.reshape(flat).T)
    is_multi_scale = isinstance(model, MaskedAutoencoder) and config.multi_scale
    if is_multi_scale and name in ("norm.weight", "norm.bias", "decoder_embed.weight"):
        order = latent_order(config)
        inverse = np.argsort(order)
        return Entry(name, lambda a: a.T[order], lambda a: a[inverse].T)
    if leaf == "kernel":
        return Entry(name, lambda a: a.T, lambda a: a.T)
    return Entry(name, lambda a: a, lambda a: a)


def official_names(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Convert the names in a state dict to official names.

    Accepts official names, MMPretrain's names of HiViT and timm's names of Swin. For
    ViT (with a class token), the official code of MAE and timm use the same names.
    """
    if swin.is_swin(state):
        return swin.from_timm(state)
    if "cls_token" in state:
        return dict(state)
    named = {}
    for name, array in state.items():
        new = name.removeprefix("backbone.").replace("head.fc.", "head.")
        named["absolute_pos_embed" if new == "pos_embed" else new] = array
    return named


def unneeded_entries(state: Mapping[str, np.ndarray], model: Model) -> list[str]:
    """Return the entries of a state dict with official names that `model` ignores.

    - The relative position index, and the shift masks of Swin: the model computes them.
    - The norm of official masked autoencoders without multi-scale features, because the
      official code does not apply this norm.
    - MMPretrain's decoder. It treats the first visible unit of a HiViT as a class
      token, so it computes another function than our decoder.
    - The pooler of encoders of Hugging Face Transformers; our classifiers have none.
    - If the model has no decoder: the decoder and the norm of the decoder's input.
    """
    if isinstance(model.config, SwinConfig):
        return [name for name in state if name.endswith(swin.BUFFERS)]
    unused: tuple[str, ...] = ("neck.", "pooler.")
    norm = state.get("norm.weight", np.empty(0))
    if isinstance(model, MaskedAutoencoder):
        ignores_norm = model.norm is None
    else:
        decoder = ("decoder_", "mask_token")
        unused += decoder
        # Without a decoder, a norm of the encoder's width may belong to a classifier.
        ignores_norm = norm.size > model.config.embed_dim
        ignores_norm |= any(name.startswith(decoder) for name in state)
        ignores_norm &= getattr(model, "norm", None) is None
    unused += ("norm.weight", "norm.bias") if ignores_norm else ()
    return [n for n in state if n.endswith(INDEX) or n.startswith(unused)]


def from_official(
    state: Mapping[str, np.ndarray], model: Model, allow_missing: bool = False
) -> dict:
    """Convert a state dict to parameters of `model`.

    Args:
      state: NumPy arrays by name; `official_names` lists the accepted names.
      model: a built or abstract model of the same configuration.
      allow_missing: return None in place of parameters that the state dict lacks.

    Returns:
      Nested float32 parameters, as returned by `tree.split`.

    Raises:
      CheckpointError: an entry is missing or unexpected, or has an unexpected shape, a
        dtype that is not in `FLOATS`, or values that are not finite. The message names
        the entry.
    """
    remaining = official_names(state)
    for name in unneeded_entries(remaining, model):
        del remaining[name]

    def convert(path, leaf):
        entry = _entry(leaf_name(path), leaf.shape, model)
        if entry.name not in remaining:
            if allow_missing:
                return None
            raise CheckpointError(f"the state dict has no {entry.name!r}")
        array = remaining.pop(entry.name)
        expected = entry.to_official(np.empty(leaf.shape, bool)).shape
        if array.shape != expected:
            raise CheckpointError(
                f"{entry.name!r} has shape {list(array.shape)}; "
                f"expected {list(expected)}"
            )
        if array.dtype not in FLOATS:
            raise CheckpointError(f"{entry.name!r} is {array.dtype}; expected float32")
        array = array.astype(np.float32, copy=False)
        if not np.isfinite(array).all():
            raise CheckpointError(f"{entry.name!r} has values that are not finite")
        return np.ascontiguousarray(entry.to_ours(array))

    params = jax.tree_util.tree_map_with_path(convert, split(model)[1])
    if remaining:
        names = listed([*map(repr, remaining)], 3)
        raise CheckpointError(
            f"unexpected entries in the state dict: {names}; {model.name} has no such "
            "parameters"
        )
    return params


def to_official(params: Mapping, model: Model) -> dict[str, np.ndarray]:
    """Convert nested parameters of `model` to NumPy arrays by their official names.

    The arrays are C-contiguous copies, because other programs write the memory of an
    array to a file regardless of its strides.
    """
    state = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        entry = _entry(leaf_name(path), leaf.shape, model)
        array = entry.to_official(np.asarray(leaf))
        state[entry.name] = np.array(array, order="C")
    return state


def to_state_dict(
    params: Mapping, model: Model, layout: str = "official"
) -> dict[str, np.ndarray]:
    """Convert nested parameters of `model` to a state dict of another program.

    The state dict of a HiViT with relative position tables contains their index. With
    windows it does not, because the other programs do not support such a model. The
    state dict of a Swin contains the indices and shift masks that the other program
    stores. For MMPretrain and timm, masked autoencoders are reduced to the encoder.

    Args:
      layout: one of `LAYOUTS`.

    Returns:
      A dict from the name in the other program to a C-contiguous NumPy array. No two
      arrays share memory.

    Raises:
      ConfigError: the other program does not have this model, or `layout` is unknown.
    """
    state, config = to_official(params, model), model.config
    if not isinstance(config, HiViTConfig):
        return to_layout(state, model, layout)
    if layout not in HIVIT_LAYOUTS:
        raise ConfigError(
            f"layout={layout!r} (--format={layout}) with {model.name}, which is a "
            f"HiViT; expected one of {', '.join(HIVIT_LAYOUTS)}"
        )
    if layout == "mmpretrain" and getattr(model, "fc_norm", None) is not None:
        raise ConfigError(
            "MMPretrain's classifier has no norm between pooling and head; expected a "
            "model with fc_norm=False and running_norm=False"
        )
    if isinstance(model, MaskedAutoencoder):
        if layout == "mmpretrain":  # see `unneeded_entries`
            names = ("absolute_pos_embed", "patch_embed.", "blocks.")
            state = {n: array for n, array in state.items() if n.startswith(names)}
        elif model.norm is None:
            state["norm.weight"] = np.ones(config.embed_dim, np.float32)
            state["norm.bias"] = np.zeros(config.embed_dim, np.float32)
    tables = [name for name in state if name.endswith("_bias_table")]
    if tables and not config.window_size:
        units = np.arange(config.grid[0] * config.grid[1])
        index = np.array(relative_position_index(units, config.grid), np.int64)
        if layout != "supervised":
            state[INDEX] = index
        if layout != "official":
            for name in tables:
                state[name.rsplit(".", 1)[0] + "." + INDEX] = index.copy()
    if layout == "mmpretrain":
        renamed = {"absolute_pos_embed": "backbone.pos_embed"}
        renamed |= {f"head.{leaf}": f"head.fc.{leaf}" for leaf in ("weight", "bias")}
        state = {renamed.get(n, f"backbone.{n}"): array for n, array in state.items()}
    return state
