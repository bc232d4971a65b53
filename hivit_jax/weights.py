"""PyTorch state dicts <-> our parameters: one table of names, read both ways.

Ours differ from the official ones in layout only: Linear kernels are ``[in, out]``, the
patch convolution is a Linear on the pixels of a cell, heads have an axis of their own,
and the multi-scale latent holds cells in merge order, so that its LayerNorm and the
decoder embedding behind it are permuted here instead of the activations there.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from hivit_jax import checkpoint
from hivit_jax.errors import CheckpointError
from hivit_jax.models import Model, create_model, leaf_name, split
from hivit_jax.models.hivit import HiViT
from hivit_jax.models.mae import MaskedAutoencoder
from hivit_jax.models.positions import merge_order


class Entry(NamedTuple):
    """One row of the table: the official name and both conversions of the array."""

    name: str
    to_ours: Callable[[np.ndarray], np.ndarray]
    to_official: Callable[[np.ndarray], np.ndarray]


def latent_order(encoder: HiViT) -> np.ndarray:
    """Official channel at each channel of our multi-scale latent, int [7E].

    Official: each stage row-major over its cells; ours: merge order.
    """
    channels, inner, start = [], encoder.inner_patches, 0
    while inner:
        width = encoder.embed_dim // inner
        cells = merge_order(inner)[:, None] * width + np.arange(width)
        channels.append(start + cells.reshape(-1))
        start += cells.size
        inner //= 2
    return np.concatenate(channels)


def _entry(path: str, shape: tuple[int, ...], model: Model) -> Entry:
    """The row of the table for our parameter `path` of this `shape`."""
    encoder = model.encoder
    parts = path.removeprefix("encoder/").split("/")
    # The official encoder is one flat list of blocks, merges included.
    lengths = [len(stage) + 1 for stage in encoder.stages]  # a stage and its merge
    if parts[0] == "stages":
        parts[:3] = ["blocks", str(sum(lengths[: int(parts[1])]) + int(parts[2]))]
    elif parts[0] == "merges":
        parts[:2] = ["blocks", str(sum(lengths[: int(parts[1]) + 1]) - 1)]
    leaf = parts[-1]
    parts[-1] = {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)
    name = ".".join(parts)

    if name == "patch_embed.proj.weight":  # conv [out, in, kh, kw]
        cell = encoder.patch_size // encoder.inner_patches
        conv = (shape[1], encoder.in_channels, cell, cell)
        return Entry(
            name,
            lambda a: a.transpose(2, 3, 1, 0).reshape(shape),
            lambda a: a.T.reshape(conv[0], cell, cell, -1).transpose(0, 3, 1, 2),
        )
    if name == "mask_token":
        return Entry(name, lambda a: a.reshape(shape), lambda a: a[None, None])
    if leaf.endswith("_pos_embed"):
        return Entry(name, lambda a: a.reshape(shape), lambda a: a[None])
    if parts[-2] == "qkv":  # kernel [E, 3, heads, E/heads], bias without the E
        flat = (shape[0], -1) if leaf == "kernel" else (-1,)
        return Entry(name, lambda a: a.T.reshape(shape), lambda a: a.reshape(flat).T)
    permuted = isinstance(model, MaskedAutoencoder) and model.multi_scale
    if permuted and name in ("norm.weight", "norm.bias", "decoder_embed.weight"):
        order = latent_order(encoder)
        back = np.argsort(order)
        return Entry(name, lambda a: a.T[order], lambda a: a[back].T)
    if leaf == "kernel":
        return Entry(name, lambda a: a.T, lambda a: a.T)
    return Entry(name, lambda a: a, lambda a: a)


def from_official(state: Mapping[str, np.ndarray], model: Model) -> dict:
    """Parameters of `model` from an official (or MMPretrain) state dict.

    Args:
      state: numpy arrays by their PyTorch names; MMPretrain's names are recognised.
      model: a built or abstract model of the same configuration.

    Returns:
      Nested parameters as `hivit_jax.models.split` gives them, in the arrays' dtype.

    Raises:
      CheckpointError: a missing, left-over or wrongly shaped entry, by name.
    """
    left = {_official_name(name): array for name, array in state.items()}
    if isinstance(model, MaskedAutoencoder) and not model.multi_scale:
        # There the official code stores a norm that it never applies.
        left.pop("norm.weight", None)
        left.pop("norm.bias", None)

    def convert(path, leaf):
        entry = _entry(leaf_name(path), leaf.shape, model)
        if entry.name not in left:
            raise CheckpointError(f"the state dict has no {entry.name!r}")
        array = left.pop(entry.name)
        expected = entry.to_official(np.empty(leaf.shape, bool)).shape
        if array.shape != expected:
            raise CheckpointError(
                f"{entry.name!r} is {list(array.shape)}, here {list(expected)}"
            )
        return entry.to_ours(array)

    params = jax.tree_util.tree_map_with_path(convert, split(model)[1])
    left = [name for name in left if not name.endswith("relative_position_index")]
    if left:
        raise CheckpointError(f"this model has no place for {', '.join(left[:3])!r}")
    return params


def to_official(params: Mapping, model: Model) -> dict[str, np.ndarray]:
    """Nested parameters of `model` -> numpy arrays by their official PyTorch names."""
    state = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        entry = _entry(leaf_name(path), leaf.shape, model)
        state[entry.name] = entry.to_official(np.asarray(leaf))
    return state


def _official_name(name: str) -> str:
    """MMPretrain's name for an entry as the official code calls it."""
    name = name.removeprefix("backbone.").replace("head.fc.", "head.")
    return "absolute_pos_embed" if name == "pos_embed" else name


def load_pretrained(path: str | Path, **overrides: Any) -> Model:
    """A model with the parameters of a checkpoint: a workdir, or one of its steps.

    Args:
      path: ``DIR``, ``DIR/checkpoints`` or ``DIR/checkpoints/STEP``; the newest step of
        a directory. Averaged parameters are taken where the run kept them.
      overrides: as in `create_model`; the rest is what the run was configured with.

    Raises:
      CheckpointError: no checkpoint there.
      ConfigError: the overrides make another model than the checkpoint's.
    """
    step = checkpoint.find(path)
    stored = checkpoint.load_config(step)["model"]
    arguments = {k: v for k, v in stored.items() if v is not None} | overrides
    abstract = nnx.eval_shape(lambda: create_model(**arguments))
    graphdef, params = split(abstract)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), params
    )
    return nnx.merge(graphdef, checkpoint.load_params(step, params))
