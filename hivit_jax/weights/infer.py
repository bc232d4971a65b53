"""Arguments of a model from the names and shapes of a state dict."""

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

    def of(self, name: str, ndim: int) -> tuple[int, ...]:
        """Shape of an array; CheckpointError unless it has `ndim` dimensions."""
        if len(self.get(name, ())) != ndim or 0 in self[name]:
            found = list(self[name]) if name in self else "missing"
            raise CheckpointError(
                f"not a HiViT: {name!r} is {found}; expected an array of {ndim} "
                "dimensions"
            )
        return self[name]

    def blocks(self) -> list[int]:
        """Residual blocks of every stage; CheckpointError unless widths double."""
        counts, number = [0], 0
        while any(name.startswith(f"blocks.{number}.") for name in self):
            if f"blocks.{number}.reduction.weight" in self:
                counts.append(0)
            else:
                counts[-1] += 1
            number += 1
        dim = self.of("absolute_pos_embed", 3)[2]
        width, stems = self.of("patch_embed.proj.weight", 4)[0], len(counts) - 1
        if not stems or width << stems != dim or any(n % 2 for n in counts[:-1]):
            raise CheckpointError(
                f"not a HiViT: {counts} blocks between merges, widths {width} to "
                f"{dim}; expected pairs of blocks before a merge, and widths that "
                "double there"
            )
        return counts


def infer(
    state: Mapping[str, np.ndarray], image_size: Any = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Infer arguments of `create_model` from the names and shapes of a state dict.

    Args:
      state: as in `from_official`.
      image_size: of the model; required if its units are not a square.

    Returns:
      The arguments; and those of them that names and shapes do not determine, with the
      reason for the guess: heads without relative tables are taken to be 64 wide (32
      in the decoder), the LayerNorm eps to be 1e-5 in MMPretrain's classifier and 1e-6
      elsewhere.

    Raises:
      CheckpointError: not a HiViT.
    """
    named = official_names(state).items()
    shapes = Shapes({name: array.shape for name, array in named})
    autoencoder = "decoder_embed.weight" in shapes
    foreign = any("head.fc." in name for name in state)
    arguments, guessed = _encoder(shapes, image_size)
    arguments["layer_norm_eps"] = 1e-5 if foreign else 1e-6
    guessed["layer_norm_eps"] = "MMPretrain's classifier" if foreign else "official"
    if autoencoder:
        arguments |= _decoder(shapes)
        guessed["decoder_num_heads"] = "heads are 32 wide"
    else:
        head = shapes.get("head.weight")
        arguments |= dict(fc_norm="fc_norm.weight" in shapes or head is None)
        arguments |= dict(running_norm="fc_norm.mean" in shapes)
        arguments |= dict(num_classes=head[0]) if head else {}
    model_class = MaskedAutoencoder if autoencoder else Classifier
    sizes = arguments["embed_dim"], arguments["depths"]
    names = [
        name
        for name, (each, config) in VARIANTS.items()
        if each is model_class and (config.embed_dim, config.depths) == sizes
    ]
    return dict(name=names[0] if names else model_class.name) | arguments, guessed


def _encoder(shapes: Shapes, image_size: Any) -> tuple[dict[str, Any], dict[str, str]]:
    _, units, dim = shapes.of("absolute_pos_embed", 3)
    width, channels, cell, _ = shapes.of("patch_embed.proj.weight", 4)
    counts = shapes.blocks()
    stems, main = len(counts) - 1, f"blocks.{sum(counts) + len(counts) - 2}"
    first = counts[0] and shapes.of("blocks.0.mlp.fc1.weight", 2)[0]
    hidden, _ = shapes.of(f"{main}.mlp.fc1.weight", 2)
    table = shapes.get(f"{main}.attn.relative_position_bias_table")
    side, patch_size = round(units**0.5), cell << stems
    if side**2 == units:
        image_size = side * patch_size
    elif image_size is None:
        raise CheckpointError(
            f"{units} units are no square; expected image_size=(height, width) of the "
            "model that was saved"
        )
    arguments = dict(
        image_size=image_size,
        in_channels=channels,
        embed_dim=dim,
        depths=(*(n // 2 for n in counts[:-1]), counts[-1]),
        num_heads=table[-1] if table else max(dim // 64, 1),
        mlp_ratio=hidden / dim,
        stem_mlp_ratio=first / width,
        patch_size=patch_size,
        inner_patches=1 << stems,
        relative_position=table is not None,
    )
    return arguments, {} if table else {"num_heads": "heads are 64 wide"}


def _decoder(shapes: Shapes) -> dict[str, Any]:
    inside, outside = shapes.of("decoder_embed.weight", 2)
    blocks = {n.split(".")[1] for n in shapes if n.startswith("decoder_blocks.")}
    return dict(
        decoder_embed_dim=inside,
        decoder_depth=len(blocks),
        decoder_num_heads=max(inside // 32, 1),
        multi_scale=outside != shapes.of("absolute_pos_embed", 3)[2],
    )
