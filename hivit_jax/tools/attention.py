"""Draw the attention of a model for images; see `USAGE`."""

import argparse
import re
import sys
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
from flax import nnx

from hivit_jax import platforms
from hivit_jax.errors import ConfigError, Parser, run_command
from hivit_jax.models import Model
from hivit_jax.preprocessing import preprocess
from hivit_jax.progress import counted
from hivit_jax.reporting import figures
from hivit_jax.reporting.console import log
from hivit_jax.tools import files
from hivit_jax.tools.loading import read_model
from hivit_jax.tools.outputs import figure_path
from hivit_jax.tree import split
from hivit_jax.weights.load import build
from hivit_jax.xla.compile import with_compilation_log

USAGE = """\
python -m hivit_jax.tools.attention --checkpoint PATH IMAGE|DIRECTORY ...
              [--out FILE.png] [--block INDEX] [--unit ROW,COLUMN]

Draws, for each image, the attention weights of a unit or class token to all units: the
mean over the heads, and each head. Each map is scaled to its largest weight, which is
bright. A red frame marks the unit.

--checkpoint  workdir of a run, checkpoint, directory written by save_pretrained, .pth
              or .safetensors file, or hf://ORGANIZATION/NAME
IMAGE|DIRECTORY
              images; directories are searched recursively. Of a directory with more
              than 16 images, 16 evenly spaced images are drawn. Images that cannot
              be read are skipped
--out         default: attention.png
--block       index of a block among the blocks with attention; default: -1, the last
--unit        row and column of the unit, which has 16x16 pixels in most models;
              default: the class token if the model has one, else the unit in the center
"""


def attention_maps(
    model: Model,
    images: np.ndarray,
    *,
    block: int = -1,
    unit: tuple[int, int] | None = None,
) -> np.ndarray:
    """Return attention weights of a unit or class token, float32 [B, heads, h, w].

    The h * w weights to all units add up to 1, or to less with a class token.

    Args:
      images: float32 [B, H, W, C], normalized, such as the result of
        `preprocess(model)(paths)`.
      block: index of a block among the blocks with attention.
      unit: row and column of the unit; None: the class token, or, without one, the
        result of `center_unit`.

    Raises:
      ConfigError: the block or unit does not exist, or the block has windows.
    """
    graphdef, params = split(model)
    num_rows, num_columns = model.config.grid
    num_class_tokens = model.config.class_tokens
    row, column = unit or center_unit(model)
    if not (0 <= row < num_rows and 0 <= column < num_columns):
        raise ConfigError(
            f"unit {row},{column} of {model.name}: expected 0,0 to "
            f"{num_rows - 1},{num_columns - 1}"
        )
    token_index = num_class_tokens + row * num_columns + column
    if num_class_tokens and unit is None:
        token_index = 0

    @jax.jit
    def compute(params, images):
        layers = nnx.merge(graphdef, params).layers(images, attention=True)
        if not -len(layers) <= block < len(layers):
            raise ConfigError(
                f"block {block}: {model.name} has {len(layers)} blocks with attention"
            )
        weights = layers[block].attention
        if weights.ndim != 4:
            raise ConfigError(
                f"block {block} of {model.name} computes attention in windows; "
                "expected a block with attention between all units"
            )
        weights = weights[:, :, token_index, num_class_tokens:]
        return weights.reshape(*weights.shape[:2], num_rows, num_columns)

    return np.asarray(with_compilation_log(compute, "the model")(params, images))


def center_unit(model: Model) -> tuple[int, int]:
    """Return row and column of the unit in the center of a model's images."""
    num_rows, num_columns = model.config.grid
    return num_rows // 2, num_columns // 2


def panels(
    images: np.ndarray, maps: np.ndarray, unit: tuple[int, int] | None
) -> dict[str, np.ndarray]:
    """Return {title: RGB pictures [B, H, W, 3] in 0..1}.

    Args:
      images: [B, H, W, C] in 0..1. The first three channels are drawn; of one or two
        channels, the first is drawn in gray.
      maps: result of `attention_maps`.
      unit: row and column of the marked unit; None: no unit is marked.
    """
    images = images[..., : 3 if images.shape[-1] >= 3 else 1]
    pictures = {"image": np.repeat(images, 3 // images.shape[-1], axis=-1)}
    side = images.shape[1] // maps.shape[2]
    if unit:
        (top, left), thickness = (side * index for index in unit), max(1, side // 8)
        square = np.s_[:, top : top + side, left : left + side]
        inside = np.s_[
            :,
            top + thickness : top + side - thickness,
            left + thickness : left + side - thickness,
        ]
        marked = pictures["image"].copy()
        marked[square] = (1, 0, 0)
        marked[inside] = pictures["image"][inside]
        pictures["image"] = marked
    heads = {f"head {index}": maps[:, index] for index in range(maps.shape[1])}
    for title, weights in {"mean": maps.mean(1), **heads}.items():
        weights = weights / weights.max((1, 2), keepdims=True)
        weights = weights.repeat(side, axis=1).repeat(side, axis=2)
        pictures[title] = figures.heat(weights)
    return pictures


def run(argv: Sequence[str] | None) -> None:
    """Parse the arguments, compute the attention and write the figure."""
    parser = Parser(usage=USAGE, allow_abbrev=False)
    add = partial(parser.add_argument, help=argparse.SUPPRESS)  # USAGE explains them
    add("--checkpoint", required=True)
    add("images", nargs="+")
    add("--out", default="attention.png")
    add("--block", type=int, default=-1)
    add("--unit", default="")
    args = parser.parse_args(argv)
    unit = None
    if args.unit:
        if not re.fullmatch(r"\d+,\d+", args.unit):
            raise ConfigError(f"--unit={args.unit}; expected ROW,COLUMN")
        unit = tuple(map(int, args.unit.split(",")))
    platforms.start()
    out = figure_path("--out", args.out, [args.checkpoint, *args.images])
    model = build(read_model(args.checkpoint))
    load_images = preprocess(model)
    images = files.read_images_to_draw(args.images, lambda path: load_images(path)[0])
    maps = attention_maps(model, images, block=args.block, unit=unit)
    if not model.config.class_tokens:
        unit = unit or center_unit(model)
    mean, std = np.float32(model.info.mean), np.float32(model.info.std)
    pictures = panels((images * std + mean).clip(0, 1), maps, unit)
    try:
        figures.write_png(out, figures.rows_of_panels(pictures))
    except OSError as error:
        raise ConfigError(f"--out={out}: {error.strerror}") from error
    token = f"unit {unit[0]},{unit[1]}" if unit else "the class token"
    log(f"written: {out} (attention of {token}, {counted(maps.shape[1], 'head')})")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
