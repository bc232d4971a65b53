"""Arguments of a model from the names and shapes of a state dict."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hivit_jax.errors import CheckpointError
from hivit_jax.models import VARIANTS
from hivit_jax.models.classifier import Classifier
from hivit_jax.models.mae import MaskedAutoencoder
from hivit_jax.weights.names.official import official_names


def infer(
    state: Mapping[str, np.ndarray], image_size: Any = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Arguments of `create_model` that a state dict's names and shapes tell.

    Args:
      state: as in `from_official`.
      image_size: of the model; needed where units do not make up a square.

    Returns:
      The arguments; and those of them that names and shapes do not tell, with what
      they were guessed from: heads without relative tables are taken to be 64 wide (32
      in the decoder), the LayerNorm eps to be 1e-5 in MMPretrain's classifier and 1e-6
      elsewhere.

    Raises:
      CheckpointError: it is no HiViT's.
    """
    shapes = {name: array.shape for name, array in official_names(state).items()}

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        if len(shapes.get(name, ())) != ndim or 0 in shapes[name]:
            found = list(shapes[name]) if name in shapes else "missing"
            raise CheckpointError(
                f"not a HiViT: {name!r} is {found}; expected an array of {ndim} "
                "dimensions"
            )
        return shapes[name]

    _, units, dim = shape("absolute_pos_embed", 3)
    width, channels, cell, _ = shape("patch_embed.proj.weight", 4)
    counts, number = [0], 0  # of residual blocks, stage by stage
    while any(name.startswith(f"blocks.{number}.") for name in shapes):
        if f"blocks.{number}.reduction.weight" in shapes:
            counts.append(0)
        else:
            counts[-1] += 1
        number += 1
    stems = len(counts) - 1
    if not stems or width << stems != dim or any(n % 2 for n in counts[:-1]):
        raise CheckpointError(
            f"not a HiViT: {counts} blocks between merges, widths {width} to {dim}; "
            "expected pairs of blocks before a merge, and widths that double there"
        )
    first = counts[0] and shape("blocks.0.mlp.fc1.weight", 2)[0]
    main = f"blocks.{number - 1}"
    hidden, _ = shape(f"{main}.mlp.fc1.weight", 2)
    table = shapes.get(f"{main}.attn.relative_position_bias_table")
    depths = (*(n // 2 for n in counts[:-1]), counts[-1])
    patch_size, guessed = cell << stems, {}
    side = round(units**0.5)
    if side**2 == units:
        image_size = side * patch_size
    elif image_size is None:
        raise CheckpointError(
            f"{units} units are no square; expected image_size=(height, width) of the "
            "model that was saved"
        )
    autoencoder = "decoder_embed.weight" in shapes
    foreign = any("head.fc." in name for name in state)
    found = dict(embed_dim=dim, depths=depths)
    model_class = MaskedAutoencoder if autoencoder else Classifier
    names = [
        name
        for name, (each, config) in VARIANTS.items()
        if each is model_class and (config.embed_dim, config.depths) == (dim, depths)
    ]
    heads = table[-1] if table else max(dim // 64, 1)
    if not table:
        guessed["num_heads"] = "heads are 64 wide"
    arguments = dict(
        name=names[0] if names else model_class.name,
        image_size=image_size,
        in_channels=channels,
        **found,
        num_heads=heads,
        mlp_ratio=hidden / dim,
        stem_mlp_ratio=first / width,
        patch_size=patch_size,
        inner_patches=1 << stems,
        relative_position=table is not None,
        layer_norm_eps=1e-5 if foreign else 1e-6,
    )
    guessed["layer_norm_eps"] = "MMPretrain's classifier" if foreign else "official"
    if autoencoder:
        inside, outside = shape("decoder_embed.weight", 2)
        blocks = {n.split(".")[1] for n in shapes if n.startswith("decoder_blocks.")}
        arguments |= dict(
            decoder_embed_dim=inside,
            decoder_depth=len(blocks),
            decoder_num_heads=max(inside // 32, 1),
            multi_scale=outside != dim,
        )
        guessed["decoder_num_heads"] = "heads are 32 wide"
    else:
        head = shapes.get("head.weight")
        arguments |= dict(fc_norm="fc_norm.weight" in shapes or head is None)
        arguments |= dict(running_norm="fc_norm.mean" in shapes)
        arguments |= dict(num_classes=head[0]) if head else {}
    return arguments, guessed
