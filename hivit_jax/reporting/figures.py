"""Pictures of a run: reconstructions, curves, schedule, training images."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from etils.epath import Path
from PIL import Image

from hivit_jax.reporting import metrics

PANELS = ("original", "masked", "reconstruction", "with visible pasted")


def reconstruction_panels(
    images: np.ndarray,
    predicted: np.ndarray,
    removed: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
) -> np.ndarray:
    """The four panels of each image as pixels in 0..1.

    Args:
      images, predicted: [B, H, W, C], normalised.
      removed: [B, H, W, 1], 1 where the model did not see the pixel.
      mean, std: of the normalisation.

    Returns:
      [B, 4, H, W, C] in the order of `PANELS`; removed pixels are mid-grey in the
      second.
    """
    original, predicted = (
        np.clip(x * np.asarray(std) + np.asarray(mean), 0, 1)
        for x in (images, predicted)
    )
    masked = np.where(removed, 0.5, original)
    pasted = np.where(removed, predicted, original)
    return np.stack([original, masked, predicted, pasted], axis=1)


def reconstructions(panels: np.ndarray, title: str) -> np.ndarray:
    """Panels [B, 4, H, W, C], one image a row, as a picture: uint8 [H, W, 3]."""
    figure, plt = _figure(figsize=(6.4, 0.6 + 1.55 * len(panels)))
    axes = figure.subplots(len(panels), 4, squeeze=False)
    for row, image in zip(axes, panels, strict=True):
        for axis, pixels in zip(row, image, strict=True):
            grey = pixels.shape[-1] == 1
            axis.imshow(pixels[..., 0] if grey else pixels, cmap="gray", vmin=0, vmax=1)
            axis.set_axis_off()
    for axis, name in zip(axes[0], PANELS, strict=True):
        axis.set_title(name, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return _pixels(figure, plt)


def curves(workdir: Path) -> np.ndarray:
    """Loss curve of a run, and top-1 where there is one, as a picture."""
    lines = metrics.read(workdir / "metrics.jsonl")
    figure, plt = _figure(figsize=(6.4, 4))
    axis = figure.subplots()
    for name, label in (("loss", "training loss"), ("eval/loss", "evaluation loss")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axis.plot(*zip(*points, strict=True), ".-", label=label)
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    points = [
        (line["step"], line["eval/top1"]) for line in lines if "eval/top1" in line
    ]
    if points:
        right = axis.twinx()
        right.plot(*zip(*points, strict=True), "C2.-", label="evaluation top-1")
        right.set_ylabel("top-1")
        right.set_ylim(0, 1)
        right.legend(loc="center right")
    if axis.lines:
        axis.legend(loc="upper right")
    axis.grid(alpha=0.3)
    return _pixels(figure, plt)


def schedule(steps: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """Learning rate over the steps of a run, as a picture."""
    figure, plt = _figure(figsize=(6.4, 3))
    axis = figure.subplots()
    axis.plot(steps, rates)
    axis.set_xlabel("step")
    axis.set_ylabel("learning rate")
    axis.grid(alpha=0.3)
    return _pixels(figure, plt)


def sheet(images: np.ndarray) -> np.ndarray:
    """Images [16, H, W, C] in 0..1, four a row, as a picture."""
    figure, plt = _figure(figsize=(6.4, 6.4))
    for axis, pixels in zip(figure.subplots(4, 4).flat, images, strict=True):
        grey = pixels.shape[-1] == 1
        axis.imshow(pixels[..., 0] if grey else pixels, cmap="gray", vmin=0, vmax=1)
        axis.set_axis_off()
    return _pixels(figure, plt)


def draw_run(
    workdir: Path, step: int, pictures: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Writes a run's figures so far: its curves, and a task's pictures of this step.

    Returns:
      All pictures by name, uint8 [H, W, 3].
    """
    directory = workdir / "figures"
    drawn = curves(workdir)
    write_png(directory / "curves.png", drawn)
    for name, pixels in pictures.items():
        write_png(directory / f"{name}_{step:07d}.png", pixels)
    return {"curves": drawn, **pictures}


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Writes a picture, uint8 [H, W, 3]; creates its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())


def _figure(figsize: tuple[float, float]):
    import matplotlib

    matplotlib.use("Agg")  # no screen
    import matplotlib.pyplot as plt

    return plt.figure(figsize=figsize, dpi=110, layout="constrained"), plt


def _pixels(figure, plt) -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer)
    plt.close(figure)
    buffer.seek(0)
    return np.rint(plt.imread(buffer)[..., :3] * 255).astype(np.uint8)
