"""Conversion between names of the official code and of Hugging Face Transformers.

Covers the library's ViT, ViTMAE, Swin and SimMIM.
"""

import re
from collections.abc import Mapping

import numpy as np

from hivit_jax.errors import CheckpointError

PATCH_WEIGHT = "embeddings.patch_embeddings.projection.weight"
PARTS = ("query", "key", "value")  # in the order of the rows of the official qkv
# (pattern in a name of the library, official replacement), applied in this order.
TO_OFFICIAL = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(vit|swin)\.", ""),
        (r"^classifier\.", "head."),
        (r"^decoder\.(mask_token|decoder_)", r"\1"),
        (r"^decoder_layers\.", "decoder_blocks."),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.norm\.", "patch_embed.norm."),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.", ""),
        (r"^layernorm\.", "norm."),
        (r"^encoder\.layer\.", "blocks."),
        (r"^encoder\.layers\.", "layers."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.attention\.(attention|self)\.", ".attn."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
    )
]


def is_transformers(state: Mapping[str, np.ndarray]) -> bool:
    """Return True if a state dict has the names of Hugging Face Transformers."""
    return any(name.endswith(PATCH_WEIGHT) for name in state)


def from_transformers(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Convert the names of the library to official names; concatenate q, k and v.

    Raises:
      CheckpointError: a query, key or value is missing.
    """
    named, qkv_parts = {}, {}
    for name, array in state.items():
        for pattern, replacement in TO_OFFICIAL:
            name = pattern.sub(replacement, name)
        *parents, part, leaf = ["", *name.split(".")]
        if part in PARTS and parents[-1] == "attn":
            name = ".".join([*parents[1:], "qkv", leaf])
            qkv_parts.setdefault(name, {})[part] = array
        else:
            named[name] = array
    for name, parts in qkv_parts.items():
        if missing := [part for part in PARTS if part not in parts]:
            raise CheckpointError(
                f"{name!r}: the state dict has no {missing[0]} projection"
            )
        named[name] = np.concatenate([parts[part] for part in PARTS])
    if "mask_token" in named and any(name.startswith("layers.") for name in named):
        # In SimMIM's official names, encoder entries have the prefix "encoder.".
        named = {
            name if name.startswith("decoder.") else f"encoder.{name}": array
            for name, array in named.items()
        }
    return named


# (pattern in an official name, replacement), applied in this order. `to_transformers`
# replaces FAMILY and INNER.
FROM_OFFICIAL = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(cls_token)$", r"FAMILY.embeddings.\1"),
        (r"^pos_embed$", "FAMILY.embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "FAMILY.embeddings.patch_embeddings.projection."),
        (r"^patch_embed\.norm\.", "FAMILY.embeddings.norm."),
        (r"^norm\.", "FAMILY.layernorm."),
        (r"^head\.", "classifier."),
        (r"^blocks\.", "FAMILY.encoder.layer."),
        (r"^layers\.", "FAMILY.encoder.layers."),
        (r"^decoder_blocks\.", "decoder.decoder_layers."),
        (r"^decoder_", "decoder.decoder_"),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.attn\.", ".attention.INNER."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    )
]


def to_transformers(
    state: Mapping[str, np.ndarray], family: str
) -> dict[str, np.ndarray]:
    """Convert the official names in a state dict to names of the library.

    Args:
      family: "vit" or "swin".
    """
    inner = {"vit": "attention", "swin": "self"}[family]
    mask_token = {"vit": "decoder.mask_token", "swin": "swin.embeddings.mask_token"}
    named = {}
    for name, array in state.items():
        name = name.removeprefix("encoder.")
        if name.endswith("attn_mask"):
            continue  # the library computes the masks
        if name == "mask_token":
            name = mask_token[family]
        for pattern, replacement in FROM_OFFICIAL:
            name = pattern.sub(replacement, name)
        name = name.replace("FAMILY", family).replace("INNER", inner)
        if ".qkv." in name:
            for part, third in zip(PARTS, np.split(array, 3), strict=True):
                named[name.replace("qkv", part)] = np.array(third, order="C")
        else:
            named[name] = array
    return named
