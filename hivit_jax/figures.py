"""Pictures of a run: reconstructions and curves."""

import io
from collections.abc import Sequence

import numpy as np
from etils.epath import Path

from hivit_jax import metrics

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


def draw_reconstructions(path: Path, panels: np.ndarray, title: str) -> np.ndarray:
    """Writes panels [B, 4, H, W, C] as a PNG, one image a row; returns its pixels."""
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
    return _write(path, figure, plt)


def draw_curves(path: Path, workdir: Path) -> np.ndarray:
    """Writes the loss curve of a run (and top-1 where there is one) as a PNG."""
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
    return _write(path, figure, plt)


def draw_schedule(path: Path, steps: np.ndarray, rates: np.ndarray) -> None:
    """Writes the learning rate over the steps of a run as a PNG."""
    figure, plt = _figure(figsize=(6.4, 3))
    axis = figure.subplots()
    axis.plot(steps, rates)
    axis.set_xlabel("step")
    axis.set_ylabel("learning rate")
    axis.grid(alpha=0.3)
    _write(path, figure, plt)


def draw_sheet(path: Path, images: np.ndarray) -> None:
    """Writes images [16, H, W, C] in 0..1 as a PNG, four a row."""
    figure, plt = _figure(figsize=(6.4, 6.4))
    for axis, pixels in zip(figure.subplots(4, 4).flat, images, strict=True):
        grey = pixels.shape[-1] == 1
        axis.imshow(pixels[..., 0] if grey else pixels, cmap="gray", vmin=0, vmax=1)
        axis.set_axis_off()
    _write(path, figure, plt)


def draw_run(
    workdir: Path, step: int, panels: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Draws a run's figures so far: curves, and reconstructions where there are panels.

    Returns:
      Their pixels by name, uint8 [H, W, 3].
    """
    directory = workdir / "figures"
    drawn = {"curves": draw_curves(directory / "curves.png", workdir)}
    if panels is not None:
        path = directory / f"reconstruction_{step:07d}.png"
        title = f"held-out images, step {step}"
        drawn["reconstruction"] = draw_reconstructions(path, panels, title)
    return drawn


def _figure(figsize: tuple[float, float]):
    import matplotlib

    matplotlib.use("Agg")  # no screen
    import matplotlib.pyplot as plt

    return plt.figure(figsize=figsize, dpi=110, layout="constrained"), plt


def _write(path: Path, figure, plt) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer)
    plt.close(figure)
    path.write_bytes(buffer.getvalue())
    buffer.seek(0)
    return np.rint(plt.imread(buffer)[..., :3] * 255).astype(np.uint8)
