"""Lines on the terminal."""

from collections.abc import Collection
from pathlib import Path

import jax

from hivit_jax.reporting.metrics import Best, Scalars, read, score


def log(text: str) -> None:
    """Prints a line, on process 0 alone."""
    if jax.process_index() == 0:
        print(text, flush=True)


def step_line(step: int, total: int, values: Scalars) -> str:
    """``step 120/1000  loss 0.5432  lr 1.20e-03  3,210 images/s  1:23 left``."""
    notes = ""
    if values["input_bound"] > 0.1:
        notes += f"  (waiting for images in {values['input_bound']:.0%} of steps)"
    if values["unreadable"]:
        notes += f"  ({values['unreadable']:,} unreadable images)"
    return (
        f"step {step}/{total}  loss {values['loss']:.4f}  "
        f"lr {values['learning_rate']:.2e}  {values['images_per_second']:,.0f} images/s"
        f"  {duration(values['seconds_left'])} left{notes}"
    )


def eval_line(what: str, values: Scalars) -> str:
    """``step 120  eval  loss 0.5400  top1 87.50 %  (360 images)``: accuracies in
    percent, other metrics as they are.
    """
    parts = []
    for key, value in values.items():
        group, _, name = key.partition("/")
        if group == "eval" and name not in ("count", "unreadable"):
            text = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
            if name.startswith("top"):
                text = f"{100 * value:.2f} %"
            parts.append(f"{name} {text}")
    images = f"{values['eval/count']:,} images"
    if values["eval/unreadable"]:
        images += f", {values['eval/unreadable']:,} unreadable"
    return f"{what}  eval  {'  '.join(parts)}  ({images})"


def best_line(workdir: Path, steps: Collection[int], best: Best) -> str:
    """``best checkpoint  step 360  top1 93.33 %  top5 ...  DIR/checkpoints/360``.

    Args:
      steps: of the checkpoints that are kept; the others cannot be the best.
      best: metric that picks the best.
    """
    lines = read(workdir / "metrics.jsonl")
    lines = [line for line in lines if "eval/count" in line and line["step"] in steps]
    if not lines:
        return "no checkpoint of an evaluated step is kept"
    newest = max(lines, key=lambda line: (score(line, best), line["step"]))
    where = workdir / "checkpoints" / str(newest["step"])
    line = eval_line(f"step {newest['step']}", newest)
    return f"best checkpoint  {line}  {where}"


def duration(seconds: float) -> str:
    """3725 -> ``1:02:05``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
