"""Draw the feature maps of a photograph and its reconstruction.

    python examples/features.py [IMAGE] [--checkpoint PATH] [--out features.png]

Draws the first three principal components of each feature map as red, green and blue.
If the model is a masked autoencoder, also draws its reconstruction from 25 % of the
image. PATH is any path that `load_pretrained` accepts, such as the official .pth files.
Without PATH, the model is a masked autoencoder with random weights, and the components
show little more than edges. Without IMAGE, the photograph is one from scikit-image.
"""

import argparse
import io
from pathlib import Path

import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import hivit_jax
from hivit_jax.data.transforms import evaluation_image
from hivit_jax.models.mae import MaskedAutoencoder
from hivit_jax.tools.reconstruct import reconstruct


def photograph() -> bytes:
    """Return a photograph from scikit-image as JPEG bytes."""
    import skimage.data
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(skimage.data.astronaut()).save(buffer, "JPEG")
    return buffer.getvalue()


def principal_components(features: np.ndarray) -> np.ndarray:
    """Map features [h, w, C] to their first three components [h, w, 3] in [0, 1]."""
    rows = features.reshape(-1, features.shape[-1]).astype(np.float64)
    rows = rows - rows.mean(0)
    _, _, axes = np.linalg.svd(rows, full_matrices=False)
    colors = rows @ axes[:3].T
    low, high = np.percentile(colors, (1, 99), axis=0)
    colors = ((colors - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    return colors.reshape(*features.shape[:2], 3)


def panels(model, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Return {title: picture [h, w, 3]} for an image, uint8 [H, W, 3]."""
    mean, std = np.float32(model.info.mean), np.float32(model.info.std)
    images = (np.float32(pixels[None]) / 255 - mean) / std
    pictures = {"image": pixels}
    for features in jax.jit(lambda x: model.features(x))(images):
        stride = pixels.shape[0] // features.shape[1]
        title = f"stride {stride}: {features.shape[-1]} channels"
        pictures[title] = principal_components(np.asarray(features[0], np.float32))
    if isinstance(model, MaskedAutoencoder):
        predicted, removed = reconstruct(model, images)
        pictures["masked"] = np.where(removed[0], 0.5, pixels / 255)
        restored = (predicted[0] * std + mean).clip(0, 1)
        # A masked autoencoder does not learn to predict visible units.
        pictures["reconstruction"] = np.where(removed[0], restored, pixels / 255)
    return pictures


def main(argv=None) -> None:
    """Parse the command line and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("image", type=Path, nargs="?")
    parser.add_argument("--checkpoint")
    parser.add_argument("--out", default="features.png")
    args = parser.parse_args(argv)
    if args.checkpoint:
        model = hivit_jax.load_pretrained(args.checkpoint)
    else:
        model = hivit_jax.create_model("mae_hivit_tiny")
    encoded = args.image.read_bytes() if args.image else photograph()
    pictures = panels(model, evaluation_image(encoded, (*model.config.image_size, 3)))
    figure, axes = plt.subplots(1, len(pictures), figsize=(3 * len(pictures), 3.4))
    for axis, (title, picture) in zip(axes, pictures.items(), strict=True):
        axis.imshow(picture)
        axis.set_title(title, fontsize=9)
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(args.out, dpi=110)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
