"""Draw figures, such as reconstructions, curves and confusion matrices.

Figures are RGB images, uint8 [H, W, 3].
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils.epath import Path
from PIL import Image

from hivit_jax.reporting import metrics

TITLED_WIDTH = 2.4  # width in inches of an image with a title
PANEL_TITLES = ("original", "masked", "reconstruction", "reconstruction + visible")


def reconstruction_panels(
    images: np.ndarray,
    predicted: np.ndarray,
    masked: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
) -> np.ndarray:
    """Return the four panels of each image, [B, 4, H, W, C] in 0..1.

    Args:
      images: originals, [B, H, W, C], normalized.
      predicted: reconstructions, [B, H, W, C], normalized.
      masked: [B, H, W, 1], 1 where the pixel is masked, else 0.
      mean, std: mean and standard deviation of the normalization.

    Returns:
      Panels in the order of `PANEL_TITLES`. Masked pixels are mid-gray in the second
      panel.
    """
    original, predicted = (
        np.clip(x * np.asarray(std) + np.asarray(mean), 0, 1)
        for x in (images, predicted)
    )
    grayed = np.where(masked, 0.5, original)
    pasted = np.where(masked, predicted, original)
    return np.stack([original, grayed, predicted, pasted], axis=1)


def reconstructions(panels: np.ndarray, title: str) -> np.ndarray:
    """Plot panels [B, 4, H, W, C] in 0..1, one image per row."""
    return rows_of_panels(
        dict(zip(PANEL_TITLES, panels.swapaxes(0, 1), strict=True)), title
    )


def statistics_text(norm_pix_loss: bool, statistics: str = "unit") -> str:
    """Return the title of a figure of reconstructions.

    The title names the source of their brightness and contrast.

    Args:
      norm_pix_loss: the model predicts normalized pixels of each unit (square of the
        image that is masked as a whole).
      statistics: "unit" or "visible"; see `tools.reconstruct`.
    """
    if not norm_pix_loss:
        return "pixels as predicted"
    if statistics == "unit":
        return "brightness and contrast of each unit are those of the original"
    return "average brightness and contrast of the visible units"


def rows_of_panels(panels: Mapping[str, np.ndarray], title: str = "") -> np.ndarray:
    """Plot a grid with a row for each of B images and a titled column for each name.

    Args:
      panels: images [B, H, W, C] in 0..1 by name.
      title: title of the whole figure.
    """
    grid = np.stack([*panels.values()], axis=1)
    figure = _figure(1.6 * len(panels), 0.6 + 1.55 * len(grid))
    axis = figure.subplots()
    _show_grid(axis, grid)
    for column, name in enumerate(panels):
        style = dict(xycoords="axes fraction", ha="center", fontsize=9)
        axis.annotate(name, ((column + 0.5) / len(panels), 1), **style)
    if title:
        figure.suptitle(title, fontsize=10)
    return _pixels(figure)


def heat(values: np.ndarray) -> np.ndarray:
    """Return the colors of values in 0..1, [...] -> [..., 3]; larger is brighter."""
    import matplotlib as mpl  # late, because this import takes long

    return mpl.colormaps["inferno"](values)[..., :3]


def curves(workdir: Path) -> np.ndarray:
    """Plot the losses, top-1 accuracy and mAP that a run's metrics.jsonl contains."""
    lines = metrics.read(workdir / "metrics.jsonl")
    figure = _figure(6.4, 4)
    axis = figure.subplots()
    for name, label in (("loss", "training loss"), ("eval/loss", "evaluation loss")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axis.plot(*zip(*points, strict=True), ".-", label=label)
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    for name, label in (("eval/top1", "top-1"), ("eval/mAP", "mAP")):
        points = [(line["step"], 100 * line[name]) for line in lines if name in line]
        if not points:
            continue
        right = axis.twinx()
        right.plot(*zip(*points, strict=True), "C2.-", label=f"evaluation {label}")
        right.set_ylabel(f"{label} (%)")
        right.set_ylim(0, 100)
    if axis.lines:  # above the axes, so that no curve is hidden
        figure.legend(loc="outside upper center", ncols=3)
    axis.grid(alpha=0.3)
    return _pixels(figure)


def schedule(steps: np.ndarray, learning_rates: np.ndarray) -> np.ndarray:
    """Plot the learning rate over the steps of a run."""
    figure = _figure(6.4, 3)
    axis = figure.subplots()
    axis.plot(steps, learning_rates)
    axis.set_xlabel("step")
    axis.set_ylabel("learning rate")
    axis.grid(alpha=0.3)
    return _pixels(figure)


def confusion_matrix(matrix: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Plot a confusion matrix of counts, [classes, classes], true x predicted.

    The color of a cell shows its fraction of the images of the true class. Class names
    are shown if there are at most 40 classes, and counts if there are at most 15.
    """
    count = len(names)
    side = min(max(4.0, 1.5 + 0.4 * count), 14.0)
    figure = _figure(side, side)
    axis = figure.subplots()
    axis.imshow(matrix / np.maximum(matrix.sum(1, keepdims=True), 1), "Blues", vmin=0)
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class")
    if count <= 40:
        names = [name.replace("$", r"\$") for name in names]  # "$" starts a formula
        axis.set_xticks(range(count), names, rotation=90)
        axis.set_yticks(range(count), names)
    if count <= 15:
        for (row, column), value in np.ndenumerate(matrix):
            color = "white" if 2 * value > matrix[row].sum() else "black"
            style = dict(ha="center", va="center", fontsize=8, color=color)
            axis.text(column, row, f"{value}" if value else "", **style)
    return _pixels(figure)


def titled_images(images: np.ndarray, titles: Sequence[str]) -> np.ndarray:
    """Plot images [n, H, W, C] in 0..1 with titles, at most four per row.

    Lines of titles that are wider than an image are shortened in the middle.
    """
    columns = min(len(images), 4)
    rows = -(-len(images) // columns)
    figure = _figure(TITLED_WIDTH * columns, (TITLED_WIDTH + 0.4) * rows)
    axes = [*figure.subplots(rows, columns, squeeze=False).flat]
    for axis in axes:
        axis.set_axis_off()
    for axis, pixels, title in zip(axes, images, titles, strict=False):
        _show(axis, pixels)
        lines = [shorten(line, 0.9 * TITLED_WIDTH, 7) for line in title.split("\n")]
        axis.set_title("\n".join(lines).replace("$", r"\$"), fontsize=7)
    return _pixels(figure)


def shorten(text: str, inches: float, fontsize: float) -> str:
    """Replace the middle of a text by an ellipsis if the text is too wide.

    Args:
      inches: largest width of the text in the default font.
      fontsize: size of the font in points.
    """
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    measure = text_to_path.get_text_width_height_descent
    font, kept, shortened = FontProperties(size=fontsize), len(text), text
    while kept and measure(shortened, font, ismath=False)[0] > 72 * inches:
        kept -= 1
        shortened = f"{text[: -(-kept // 2)]}…{text[len(text) - kept // 2 :]}"
    return shortened


def image_grid(images: np.ndarray) -> np.ndarray:
    """Plot images [16, H, W, C] in 0..1, four per row."""
    figure = _figure(6.4, 6.4)
    _show_grid(figure.subplots(), images.reshape(4, 4, *images.shape[1:]))
    return _pixels(figure)


def contact_sheet(rows: Mapping[str, np.ndarray], columns: int) -> np.ndarray:
    """Plot a row of images [n, H, W, C] in 0..1 for each name, n <= columns."""
    figure = _figure(1.5 + columns, 0.3 + len(rows))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axes_of_row, (name, images) in zip(axes, rows.items(), strict=True):
        for axis in axes_of_row:
            axis.set_axis_off()
        for axis, pixels in zip(axes_of_row, images, strict=False):
            _show(axis, pixels.clip(0, 1))
        axes_of_row[0].set_title(name, fontsize=8, loc="left")
    return _pixels(figure)


def draw_run(workdir: Path, step: int, task_figures: Mapping[str, np.ndarray]) -> None:
    """Write the curves of a run and a task's figures of this step as PNG files.

    Args:
      task_figures: uint8 [H, W, 3] by name.
    """
    directory = workdir / "figures"
    write_png(directory / "curves.png", curves(workdir))
    for name, pixels in task_figures.items():
        write_png(directory / f"{name}_{step:07d}.png", pixels)


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write an image, uint8 [H, W, 3], as PNG; create its directory if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())


def _figure(width: float, height: float) -> Any:
    """Return an empty figure; width and height are in inches."""
    from matplotlib.figure import Figure  # late, because this import takes long

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _show(axis: Any, pixels: np.ndarray) -> None:
    """Draw an image [H, W, C] without axes.

    With one or two channels, the first is drawn in gray. With more than three, the
    first three are drawn in color.
    """
    pixels = pixels[..., 0] if pixels.shape[-1] < 3 else pixels[..., :3]
    axis.imshow(pixels, cmap="gray", vmin=0, vmax=1)
    axis.set_axis_off()


def _show_grid(axis: Any, images: np.ndarray) -> None:
    """Draw a grid of images [rows, columns, H, W, C] with white gaps.

    The grid is one image, because matplotlib needs seconds for dozens of axes.
    """
    gap = max(1, images.shape[3] // 16)
    padding = [(0, 0), (0, 0), (gap, gap), (gap, gap), (0, 0)]
    images = np.pad(images, padding, constant_values=1)
    rows, columns, height, width, channels = images.shape
    grid = images.swapaxes(1, 2).reshape(rows * height, columns * width, channels)
    _show(axis, grid)


def _pixels(figure: Any) -> np.ndarray:
    """Render a figure as uint8 [H, W, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3].copy()
