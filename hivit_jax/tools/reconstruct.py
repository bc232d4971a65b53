"""Pictures of what a masked autoencoder makes of one's own images.

python -m hivit_jax.tools.reconstruct --checkpoint PATH image.jpg [image.jpg ...]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hivit_jax.data import transforms
from hivit_jax.errors import ConfigError, DataError, Parser, exit_code
from hivit_jax.models.mae import MaskedAutoencoder
from hivit_jax.reporting import figures
from hivit_jax.reporting.console import log
from hivit_jax.tree import split
from hivit_jax.weights import load
from hivit_jax.weights.load import build

USAGE = """\
python -m hivit_jax.tools.reconstruct --checkpoint PATH IMAGE [IMAGE ...]
              [--out FILE.png] [--mask_ratio RATIO] [--seed 0] [--statistics unit]

--checkpoint  of a masked autoencoder: a run, a directory, a .pth or .safetensors file,
              or hf://ORGANISATION/NAME
--mask_ratio  as in training, else 0.75
--statistics  a model that predicts normalized pixels does not say how bright and how
              rich in contrast a unit is. unit: its own mean and deviation, which the
              model did not see; visible: those of the visible units, on average
"""


def statistics_text(model: MaskedAutoencoder, statistics: str) -> str:
    """Where mean and deviation of the predicted units come from, for the reader."""
    if not model.config.norm_pix_loss:
        return "pixels as predicted"
    if statistics == "unit":
        return "contrast and brightness of each unit from the original, unseen"
    return "contrast and brightness: mean of the visible units"


def reconstruct(
    model: MaskedAutoencoder,
    images: jax.Array,
    *,
    mask_ratio: float = 0.75,
    seed: int = 0,
    statistics: str = "unit",
) -> tuple[np.ndarray, np.ndarray]:
    """Prediction and mask for images, [B, H, W, C] normalized.

    Args:
      statistics: "unit" or "visible": with whose mean and deviation a prediction of
        normalized pixels is put back.

    Returns:
      The prediction [B, H, W, C], and 1 where a pixel was removed, [B, H, W, 1].
    """
    graphdef, params = split(model)

    @jax.jit
    def run(params, images, noise):
        model = nnx.merge(graphdef, params)
        out = model(images, noise=noise, mask_ratio=mask_ratio)
        _, mean, scale = model.targets(images)
        if statistics == "visible":
            seen = (1 - out.mask)[..., None]
            mean, scale = (
                jnp.broadcast_to(
                    (x * seen).sum(1, keepdims=True) / seen.sum(1)[:1], x.shape
                )
                for x in (mean, scale)
            )
        return model.to_images(out, mean, scale)

    units = model.encoder.grid[0] * model.encoder.grid[1]
    noise = jax.random.uniform(jax.random.key(seed), (len(images), units))
    return jax.device_get(run(params, images, noise))


def run(argv: Sequence[str]) -> None:
    """Draws the picture, or ends with a HivitError."""
    parser = Parser(usage=USAGE, allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help=argparse.SUPPRESS)
    parser.add_argument("images", nargs="+", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", default="reconstruction.png", help=argparse.SUPPRESS)
    parser.add_argument("--mask_ratio", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument(
        "--statistics",
        choices=("unit", "visible"),
        default="unit",
        help=argparse.SUPPRESS,
    )
    args = parser.parse_args(argv)
    found = load.read(args.checkpoint)
    model = build(found)
    if not isinstance(model, MaskedAutoencoder):
        raise ConfigError(
            f"{found.path} is a {model.name}, which has no decoder; "
            "expected a masked autoencoder"
        )
    shape = model.config.image_shape
    if shape[2] not in transforms.MODES:
        raise ConfigError(f"{found.path} wants {shape[2]} channels; expected 1 or 3")
    pixels = np.stack([read(path, shape) for path in args.images])
    mean, std = np.float32(model.info.mean), np.float32(model.info.std)
    images = (np.float32(pixels) / 255 - mean) / std
    predicted, removed = reconstruct(
        model,
        jnp.asarray(images),
        mask_ratio=args.mask_ratio or found.recipe.get("mask_ratio", 0.75),
        seed=args.seed,
        statistics=args.statistics,
    )
    panels = figures.reconstruction_panels(images, predicted, removed, mean, std)
    title = statistics_text(model, args.statistics)
    figures.write_png(Path(args.out), figures.reconstructions(panels, title))
    ratio = float(removed.mean())
    log(f"written: {args.out} ({ratio:.1%} of every image removed; {title})")


def read(path: Path, shape: Sequence[int]) -> np.ndarray:
    """An image file -> uint8 of this (height, width, channels), or DataError."""
    try:
        return transforms.evaluation_image(path.read_bytes(), shape)
    except Exception as error:  # of whatever kind a broken file provokes
        raise DataError(f"cannot read {path}: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return exit_code(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
