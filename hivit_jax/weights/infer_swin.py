"""Infer the arguments of Swin and SimMIM from the names and shapes of a state dict."""

from typing import Any

from hivit_jax.errors import ConfigError
from hivit_jax.models.positions import image_grid
from hivit_jax.models.simmim import SimMIM, SimMIMConfig
from hivit_jax.models.swin_classifier import SwinClassifier
from hivit_jax.weights.names.swin import MASK_TOKEN
from hivit_jax.weights.shapes import Shapes, with_name


def swin_arguments(
    shapes: Shapes, image_size: Any = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the arguments of a Swin or SimMIM, and the reasons for guessed arguments.

    The image size changes only the position tables of stages that are smaller than a
    window. Official files also contain shift masks, whose number of tokens gives the
    size of a square image. Without them, the last stage is assumed to be one window.

    Args:
      image_size: size to use if its windows match the position tables; None: guess.

    Raises:
      CheckpointError: the state dict is not from a Swin.
    """
    shapes.kind = "Swin"
    is_simmim = MASK_TOKEN in shapes
    prefix = "encoder." if is_simmim else ""
    embed = f"{prefix}patch_embed.proj.weight"
    dim, channels, patch_size, _ = shapes.require(embed, 4)
    depths, head_counts, window_sides = [], [], []
    for stage in range(shapes.count(f"{prefix}layers.")):
        blocks = f"{prefix}layers.{stage}.blocks."
        depths.append(shapes.count(blocks))
        table = f"{blocks}0.attn.relative_position_bias_table"
        rows, num_heads = shapes.require(table, 2)
        head_counts.append(num_heads)
        window_sides.append(round((rows**0.5 + 1) / 2))
    hidden, _ = shapes.require(f"{prefix}layers.0.blocks.0.mlp.fc1.weight", 2)
    guessed = {"layer_norm_eps": "as in the official code"}
    if image_size is None or not _windows_match(image_size, patch_size, window_sides):
        stride = patch_size << (len(depths) - 1)
        image_size = window_sides[-1] * stride
        guessed["image_size"] = "so that the last stage is one window"
        mask = f"{prefix}layers.0.blocks.1.attn_mask"
        num_windows, tokens_per_window, _ = shapes.get(mask, (0, 0, 0))
        num_tokens = num_windows * tokens_per_window
        grid_side = round(num_tokens**0.5)
        if num_tokens and grid_side**2 == num_tokens:
            image_size = grid_side * patch_size
            guessed["image_size"] = "from the number of tokens in the shift masks"
    arguments = dict(
        image_size=image_size,
        in_channels=channels,
        embed_dim=dim,
        depths=tuple(depths),
        num_heads=tuple(head_counts),
        mlp_ratio=hidden / dim,
        patch_size=patch_size,
        window_size=max(window_sides),
        layer_norm_eps=1e-5,
    )
    if is_simmim:
        model_class = SimMIM
        arguments["mask_patch_size"] = SimMIMConfig.mask_patch_size
        guessed["mask_patch_size"] = "as in the official code"
    else:
        model_class = SwinClassifier
        arguments |= shapes.head_arguments()
    return with_name(model_class, arguments), guessed


def _windows_match(image_size: Any, patch_size: int, window_sides: list[int]) -> bool:
    """Return True if the stages of an image of this size have these window sides."""
    try:
        grid = image_grid(image_size, patch_size)
    except (TypeError, ConfigError):
        return True  # keep an invalid size: `create_model` explains what is wrong
    for side in window_sides:
        if side != min(max(window_sides), *grid):
            return False
        grid = -(-grid[0] // 2), -(-grid[1] // 2)
    return True
