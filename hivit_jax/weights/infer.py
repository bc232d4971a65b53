"""Infer a model's arguments from the names and shapes of a state dict."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hivit_jax.errors import CheckpointError
from hivit_jax.models import VARIANTS
from hivit_jax.models.classifier import Classifier
from hivit_jax.models.mae import MaskedAutoencoder
from hivit_jax.weights.names.official import official_names


class Shapes(dict[str, tuple[int, ...]]):
    """Shapes of the arrays of a state dict, by official name."""

    def require(self, name: str, ndim: int) -> tuple[int, ...]:
        """Return the shape of an array.

        Raises:
          CheckpointError: there is no such array, it does not have `ndim` dimensions,
            or one of its dimensions is 0.
        """
        if len(self.get(name, ())) != ndim or 0 in self[name]:
            found = list(self[name]) if name in self else "missing"
            names = ", ".join([*self][:3]) or "none"
            raise CheckpointError(
                f"not a HiViT: {name!r} is {found}; expected an array with {ndim} "
                f"dimensions.\nThe first of {len(self)} entries: {names}"
            )
        return self[name]

    def blocks(self) -> list[int]:
        """Return the number of residual blocks of every stage.

        Raises:
          CheckpointError: blocks and widths are not those of a HiViT.
        """
        counts, index = [0], 0
        while any(name.startswith(f"blocks.{index}.") for name in self):
            if f"blocks.{index}.reduction.weight" in self:  # a merge
                counts.append(0)
            else:
                counts[-1] += 1
            index += 1
        dim = self.require("absolute_pos_embed", 3)[2]
        width, stems = self.require("patch_embed.proj.weight", 4)[0], len(counts) - 1
        if not stems or width << stems != dim or any(n % 2 for n in counts[:-1]):
            raise CheckpointError(
                f"not a HiViT: found {counts} blocks between merges and widths from "
                f"{width} to {dim}; expected an even number of blocks before each "
                "merge and twice the width after it"
            )
        return counts


def infer(
    state: Mapping[str, np.ndarray], image_size: Any = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Infer arguments of `create_model` from the names and shapes of a state dict.

    Some arguments are guessed, because names and shapes do not determine them. Without
    relative position tables, attention heads are assumed to have 64 channels. Decoder
    heads are assumed to have 32. The LayerNorm eps is assumed to be 1e-5 in
    MMPretrain's classifier and 1e-6 otherwise.

    Args:
      state: as in `from_official`.
      image_size: the model's image size; required if its grid of units is not square.

    Returns:
      The arguments, and {argument: reason} of the guessed ones.

    Raises:
      CheckpointError: the state dict is not that of a HiViT.
    """
    named = official_names(state).items()
    shapes = Shapes({name: array.shape for name, array in named})
    is_autoencoder = "decoder_embed.weight" in shapes
    is_mmpretrain = any("head.fc." in name for name in state)
    arguments, guessed = _encoder_arguments(shapes, image_size)
    arguments["layer_norm_eps"] = 1e-5 if is_mmpretrain else 1e-6
    guessed["layer_norm_eps"] = (
        "as in MMPretrain's classifier" if is_mmpretrain else "as in the official code"
    )
    if is_autoencoder:
        arguments |= _decoder_arguments(shapes)
        guessed["decoder_num_heads"] = "assuming 32 channels per head"
    else:
        head = shapes.get("head.weight")
        arguments["fc_norm"] = "fc_norm.weight" in shapes or head is None
        arguments["running_norm"] = "fc_norm.mean" in shapes
        if head:
            arguments["num_classes"] = head[0]
    model_class = MaskedAutoencoder if is_autoencoder else Classifier
    sizes = arguments["embed_dim"], arguments["depths"]
    names = [
        name
        for name, (variant_class, config) in VARIANTS.items()
        if variant_class is model_class and (config.embed_dim, config.depths) == sizes
    ]
    return dict(name=names[0] if names else model_class.name) | arguments, guessed


def _encoder_arguments(
    shapes: Shapes, image_size: Any
) -> tuple[dict[str, Any], dict[str, str]]:
    _, units, dim = shapes.require("absolute_pos_embed", 3)
    width, channels, cell, _ = shapes.require("patch_embed.proj.weight", 4)
    counts = shapes.blocks()
    stems, last_block = len(counts) - 1, f"blocks.{sum(counts) + len(counts) - 2}"
    stem_hidden = counts[0] and shapes.require("blocks.0.mlp.fc1.weight", 2)[0]
    hidden, _ = shapes.require(f"{last_block}.mlp.fc1.weight", 2)
    table = shapes.get(f"{last_block}.attn.relative_position_bias_table")
    side, patch_size = round(units**0.5), cell << stems
    if side**2 == units:
        image_size = side * patch_size
    elif image_size is None:
        raise CheckpointError(
            f"the grid of {units} units is not square; expected the argument "
            "image_size=(height, width) of the saved model"
        )
    arguments = dict(
        image_size=image_size,
        in_channels=channels,
        embed_dim=dim,
        depths=(*(n // 2 for n in counts[:-1]), counts[-1]),
        num_heads=table[-1] if table else max(dim // 64, 1),
        mlp_ratio=hidden / dim,
        stem_mlp_ratio=stem_hidden / width,
        patch_size=patch_size,
        inner_patches=1 << stems,
        relative_position=table is not None,
    )
    return arguments, {} if table else {"num_heads": "assuming 64 channels per head"}


def _decoder_arguments(shapes: Shapes) -> dict[str, Any]:
    decoder_dim, latent_dim = shapes.require("decoder_embed.weight", 2)
    blocks = {n.split(".")[1] for n in shapes if n.startswith("decoder_blocks.")}
    return dict(
        decoder_embed_dim=decoder_dim,
        decoder_depth=len(blocks),
        decoder_num_heads=max(decoder_dim // 32, 1),
        multi_scale=latent_dim != shapes.require("absolute_pos_embed", 3)[2],
    )
