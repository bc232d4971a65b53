"""Draw a masked autoencoder's reconstructions of images; see `USAGE`."""

import argparse
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hivit_jax import platforms
from hivit_jax.augment.resample import MAXIMUM
from hivit_jax.data.decoding import UnsuitableImageError
from hivit_jax.data.transforms import evaluation_image
from hivit_jax.errors import ConfigError, DataError, Parser, first_line, run_command
from hivit_jax.models.masked import MaskedModel
from hivit_jax.reporting import figures
from hivit_jax.reporting.console import log
from hivit_jax.tools import files
from hivit_jax.tools.loading import read_model
from hivit_jax.tools.outputs import figure_path
from hivit_jax.tree import split
from hivit_jax.weights.load import build
from hivit_jax.xla.compile import with_compilation_log

USAGE = """\
python -m hivit_jax.tools.reconstruct --checkpoint PATH IMAGE|DIRECTORY ...
              [--out FILE.png] [--mask_ratio RATIO] [--seed 0] [--statistics unit]

--checkpoint  a masked autoencoder: workdir of a run, directory written by
              save_pretrained, .pth or .safetensors file, or hf://ORGANIZATION/NAME
IMAGE|DIRECTORY
              images; directories are searched recursively. Of a directory with more
              than 16 images, 16 evenly spaced images are drawn. Images that cannot
              be read are skipped
--mask_ratio  fraction of units to mask; default: mask_ratio of the training config,
              or 0.75 if there is no training config
--statistics  source of the mean and standard deviation that convert predictions of
              normalized pixels back to pixels. unit: the true pixels of the unit,
              which the model does not see if the unit is masked; visible: the
              average over the visible units
"""


def reconstruct(
    model: MaskedModel,
    images: jax.Array,
    *,
    mask_ratio: float = 0.75,
    seed: int = 0,
    statistics: str = "unit",
) -> tuple[np.ndarray, np.ndarray]:
    """Reconstruct normalized images, [B, H, W, C].

    Args:
      statistics: source of the mean and standard deviation that convert predictions of
        normalized pixels back to pixels: "unit", the true pixels of the unit, or
        "visible", the average over the visible units.

    Returns:
      The prediction [B, H, W, C] and the mask [B, H, W, 1], 1 for a masked pixel.
    """
    graphdef, params = split(model)

    @jax.jit
    def compute(params, images, noise):
        model = nnx.merge(graphdef, params)
        out = model(images, noise=noise, mask_ratio=mask_ratio)
        _, mean, scale = model.targets(images)
        if statistics == "visible":
            # All images have the same number of visible units.
            visible = (1 - out.mask)[..., None]
            mean, scale = (
                jnp.broadcast_to(
                    (x * visible).sum(1, keepdims=True) / visible.sum(1)[:1], x.shape
                )
                for x in (mean, scale)
            )
        return model.to_images(out, mean, scale)

    num_units = math.prod(model.unit_grid)
    noise = jax.random.uniform(jax.random.key(seed), (len(images), num_units))
    return jax.device_get(
        with_compilation_log(compute, "the model")(params, images, noise)
    )


def run(argv: Sequence[str] | None) -> None:
    """Parse the arguments, reconstruct the images and write the figure."""
    parser = Parser(usage=USAGE, allow_abbrev=False)
    add = partial(parser.add_argument, help=argparse.SUPPRESS)  # USAGE explains them
    add("--checkpoint", required=True)
    add("images", nargs="+")
    add("--out", default="reconstruction.png")
    add("--mask_ratio", type=float)
    add("--seed", type=int, default=0)
    add("--statistics", choices=("unit", "visible"), default="unit")
    args = parser.parse_args(argv)
    platforms.start()
    out = figure_path("--out", args.out, [args.checkpoint, *args.images])
    pretrained = read_model(args.checkpoint)
    model = build(pretrained)
    if not isinstance(model, MaskedModel):
        raise ConfigError(
            f"{pretrained.path} is a {model.name}, which has no decoder; expected a "
            "masked autoencoder"
        )
    shape = model.config.image_shape
    mask_ratio = args.mask_ratio
    if mask_ratio is None:
        mask_ratio = pretrained.recipe.get("mask_ratio", 0.75)
    data = pretrained.recipe.get("data", {})
    value_range, dtype = data.get("value_range", ()), data.get("dtype", "uint8")
    white = data.get("scale") or MAXIMUM[dtype]
    pixels = files.read_images_to_draw(
        args.images, lambda path: read(path, shape, value_range, dtype)
    )
    mean, std = np.float32(model.info.mean), np.float32(model.info.std)
    images = (np.float32(pixels) / white - mean) / std
    predicted, mask = reconstruct(
        model,
        jnp.asarray(images),
        mask_ratio=mask_ratio,
        seed=args.seed,
        statistics=args.statistics,
    )
    panels = figures.reconstruction_panels(images, predicted, mask, mean, std)
    title = figures.statistics_text(model.config.norm_pix_loss, args.statistics)
    try:
        figures.write_png(out, figures.reconstructions(panels, title))
    except OSError as error:
        raise ConfigError(f"--out={out}: {error.strerror}") from error
    log(f"written: {out} ({mask.mean():.1%} of each image masked; {title})")


def read(
    path: Path,
    shape: Sequence[int],
    value_range: Sequence[float] = (),
    dtype: str = "uint8",
) -> np.ndarray:
    """Read an image file, and resize its center crop to `shape`.

    Args:
      shape: (height, width, channels) of the result.
      value_range, dtype: see `rasters.decode`.

    Raises:
      DataError: the file cannot be read.
    """
    try:
        options = dict(value_range=value_range, dtype=dtype)
        return evaluation_image(path.read_bytes(), shape, **options)
    except UnsuitableImageError as error:
        raise DataError(f"cannot read {path}: {error.after_training}") from error
    except Exception as error:  # damaged files cause exceptions of many types
        raise DataError(f"cannot read {path}: {first_line(error)}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
