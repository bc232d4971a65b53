"""Infer a model's arguments from the names and shapes of a state dict."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hivit_jax.errors import CheckpointError
from hivit_jax.models import VARIANTS
from hivit_jax.models.classifier import Classifier
from hivit_jax.models.mae import MaskedAutoencoder
from hivit_jax.models.vit import ViTClassifier, ViTMaskedAutoencoder
from hivit_jax.weights.infer_swin import swin_arguments
from hivit_jax.weights.names.official import official_names
from hivit_jax.weights.names.swin import is_swin
from hivit_jax.weights.shapes import Shapes, registered, with_name


def infer(
    state: Mapping[str, np.ndarray], image_size: Any = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Infer arguments of `create_model` from the names and shapes of a state dict.

    Names and shapes do not determine all arguments. These are guessed:

    - num_heads: as in the registered ViT of this size. For other models without
      relative position tables, heads have 64 channels.
    - decoder_num_heads: heads have 32 channels.
    - layer_norm_eps: 1e-5 in Swin and in MMPretrain's classifier; otherwise 1e-6.
    - image_size of a Swin and mask_patch_size of SimMIM: see `swin_arguments`.

    Args:
      state: as in `from_official`.
      image_size: the model's image size, which is required only if the grid of units is
        not square, and ignored if it is square. For Swin, see `swin_arguments`.

    Returns:
      The arguments, and {argument: reason} for the guessed arguments.

    Raises:
      CheckpointError: the state dict is not from a HiViT, ViT or Swin.
    """
    named = official_names(state).items()
    shapes = Shapes({name: array.shape for name, array in named})
    if is_swin(state):
        return swin_arguments(shapes, image_size)
    is_autoencoder = "decoder_embed.weight" in shapes
    is_mmpretrain = any("head.fc." in name for name in state)
    is_vit = {"cls_token", "pos_embed"} <= shapes.keys()
    shapes.kind = "ViT" if is_vit else "HiViT"
    infer_encoder = _vit_arguments if is_vit else _hivit_arguments
    arguments, guessed = infer_encoder(shapes, image_size)
    arguments["layer_norm_eps"] = 1e-5 if is_mmpretrain else 1e-6
    guessed["layer_norm_eps"] = (
        "as in MMPretrain's classifier" if is_mmpretrain else "as in the official code"
    )
    if is_autoencoder:
        arguments |= _decoder_arguments(shapes)
        guessed["decoder_num_heads"] = "assuming 32 channels per head"
        if not is_vit:
            latent_dim = shapes["decoder_embed.weight"][1]
            arguments["multi_scale"] = latent_dim != arguments["embed_dim"]
    else:
        arguments |= _head_arguments(shapes, is_vit)
    model_classes = {
        (True, True): ViTMaskedAutoencoder,
        (True, False): ViTClassifier,
        (False, True): MaskedAutoencoder,
        (False, False): Classifier,
    }
    return with_name(model_classes[is_vit, is_autoencoder], arguments), guessed


def _head_arguments(shapes: Shapes, is_vit: bool) -> dict[str, Any]:
    """Return the arguments of a classifier that do not concern its encoder."""
    if is_vit:
        pooling = "token" if "norm.weight" in shapes else "mean"
        return dict(pooling=pooling) | shapes.head_arguments()
    fc_norm = "fc_norm.weight" in shapes or "head.weight" not in shapes
    return dict(fc_norm=fc_norm) | shapes.head_arguments()


def _vit_arguments(
    shapes: Shapes, image_size: Any
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the arguments of a ViT's encoder, and the reasons for guesses."""
    _, num_tokens, dim = shapes.require("pos_embed", 3)
    _, channels, patch_size, _ = shapes.require("patch_embed.proj.weight", 4)
    hidden, _ = shapes.require("blocks.0.mlp.fc1.weight", 2)
    arguments = dict(
        image_size=_image_size(num_tokens - 1, patch_size, image_size),
        in_channels=channels,
        embed_dim=dim,
        depth=shapes.count("blocks."),
        mlp_ratio=hidden / dim,
        patch_size=patch_size,
    )
    if names := registered(ViTClassifier, arguments):
        arguments["num_heads"] = VARIANTS[names[0]][1].num_heads
        return arguments, {"num_heads": f"as in {names[0]}"}
    arguments["num_heads"] = max(dim // 64, 1)
    return arguments, {"num_heads": "assuming 64 channels per head"}


def _image_size(num_units: int, patch_size: int, image_size: Any) -> Any:
    """Return the side of a square image, or `image_size` if the grid is not square."""
    grid_side = round(num_units**0.5)
    if grid_side**2 == num_units:
        return grid_side * patch_size
    if image_size is None:
        raise CheckpointError(
            f"the grid of {num_units} units is not square; pass image_size=(height, "
            "width) of the saved model"
        )
    return image_size


def _hivit_arguments(
    shapes: Shapes, image_size: Any
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the arguments of a HiViT's encoder, and the reasons for guesses."""
    _, num_units, dim = shapes.require("absolute_pos_embed", 3)
    width, channels, cell_size, _ = shapes.require("patch_embed.proj.weight", 4)
    counts = shapes.block_counts()
    num_merges = len(counts) - 1
    last_block = f"blocks.{sum(counts) + num_merges - 1}"
    stem_hidden = counts[0] and shapes.require("blocks.0.mlp.fc1.weight", 2)[0]
    hidden, _ = shapes.require(f"{last_block}.mlp.fc1.weight", 2)
    table = shapes.get(f"{last_block}.attn.relative_position_bias_table")
    patch_size = cell_size << num_merges
    arguments = dict(
        image_size=_image_size(num_units, patch_size, image_size),
        in_channels=channels,
        embed_dim=dim,
        depths=(*(n // 2 for n in counts[:-1]), counts[-1]),  # see `HiViTConfig`
        num_heads=table[-1] if table else max(dim // 64, 1),
        mlp_ratio=hidden / dim,
        stem_mlp_ratio=stem_hidden / width,
        patch_size=patch_size,
        inner_patches=1 << num_merges,
        relative_position=table is not None,
    )
    return arguments, {} if table else {"num_heads": "assuming 64 channels per head"}


def _decoder_arguments(shapes: Shapes) -> dict[str, Any]:
    decoder_dim, _ = shapes.require("decoder_embed.weight", 2)
    return dict(
        decoder_embed_dim=decoder_dim,
        decoder_depth=shapes.count("decoder_blocks."),
        decoder_num_heads=max(decoder_dim // 32, 1),
    )
