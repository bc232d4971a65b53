"""Names of Swin and SimMIM in the official code and timm, and the official buffers."""

from collections.abc import Mapping

import numpy as np

from hivit_jax.models.positions import relative_position_index
from hivit_jax.models.swin import SwinConfig

MASK_TOKEN = "encoder.mask_token"  # only in SimMIM's files
PREFIXES = ("", "encoder.")  # of the encoder's names in Swin and in SimMIM
INDEX, MASK = BUFFERS = ("relative_position_index", "attn_mask")


def is_swin(state: Mapping[str, np.ndarray]) -> bool:
    """Return True if a state dict has the names of Swin or SimMIM."""
    return any(n.removeprefix("encoder.").startswith("layers.0.blocks.") for n in state)


def official_parts(path: str, is_simmim: bool) -> list[str]:
    """Return the components of the official name of our parameter `path`.

    The last component is still our own, for example "kernel".
    """
    in_encoder = path.startswith(("encoder/", "norm/"))
    parts = path.removeprefix("encoder/").split("/")
    if parts[0] == "stages":
        parts[:3] = ["layers", parts[1], "blocks", parts[2]]
    elif parts[0] == "merges":
        parts[:2] = ["layers", parts[1], "downsample"]
    elif parts[:2] == ["decoder", "proj"]:
        parts[1] = "0"
    return ["encoder", *parts] if is_simmim and in_encoder else parts


def from_timm(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Convert timm's names to official names; official names stay as they are.

    In timm's names, the patch merge after a stage belongs to the next stage, and the
    classifier is ``head.fc``.
    """
    is_timm = not any(f"{p}layers.0.downsample.norm.weight" in state for p in PREFIXES)
    named = {}
    for name, array in state.items():
        parts = name.replace("head.fc.", "head.").split(".")
        if is_timm and "downsample" in parts:
            index = parts.index("layers") + 1
            parts[index] = str(int(parts[index]) - 1)
        named[".".join(parts)] = array
    return named


def to_timm(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Convert the official names of a Swin classifier's state dict to timm's names."""
    named = {}
    for name, array in state.items():
        parts = name.split(".")
        if "downsample" in parts:
            parts[1] = str(int(parts[1]) + 1)
        if parts[0] == "head":
            parts[:1] = ["head", "fc"]
        named[".".join(parts)] = array
    return named


def decoder_to_ours(
    array: np.ndarray, shape: tuple[int, ...], channels: int
) -> np.ndarray:
    """Convert a weight or bias of SimMIM's decoder to our layout.

    The P x P pixels of a unit have the order [C, P, P] in SimMIM and [P, P, C] here.
    """
    side = round((array.shape[0] // channels) ** 0.5)
    array = array.reshape(channels, side, side, -1)
    return array.transpose(3, 1, 2, 0).reshape(shape)


def decoder_to_official(array: np.ndarray, channels: int) -> np.ndarray:
    """Convert a kernel [width, P*P*C] or bias [P*P*C] to SimMIM's decoder layout."""
    side = round((array.shape[-1] // channels) ** 0.5)
    moved = array.reshape(-1, side, side, channels).transpose(3, 1, 2, 0)
    if array.ndim == 1:
        return moved.reshape(-1)
    return moved.reshape(array.shape[1], array.shape[0], 1, 1)


def buffers(config: SwinConfig, prefix: str) -> dict[str, np.ndarray]:
    """Return the relative position indices and shift masks of official state dicts.

    Args:
      prefix: start of the names, such as ``encoder.``.
    """
    arrays = {}
    for stage, grid in enumerate(config.stage_grids(config.grid)):
        side = config.window_side(grid)
        index = relative_position_index(np.arange(side * side), (side, side))
        for block, windows in enumerate(config.stage_windows(stage, grid)):
            name = f"{prefix}layers.{stage}.blocks.{block}"
            arrays[f"{name}.attn.{INDEX}"] = np.array(index, np.int64)
            if windows is not None and windows.shift:
                arrays[f"{name}.{MASK}"] = windows.shift_mask()
    return arrays
