"""Terminal output: log lines of steps, evaluations and the best checkpoint."""

from collections.abc import Collection
from pathlib import Path

import jax

from hivit_jax.progress import counted, duration
from hivit_jax.reporting.metrics import (
    Criterion,
    Scalars,
    best_evaluation,
    evaluations,
    finite_evaluations,
)


def log(text: str) -> None:
    """Print a line on process 0."""
    if jax.process_index() == 0:
        print(text, flush=True)


def step_line(step: int, total: int, values: Scalars) -> str:
    """Return the log line of a training step.

    For example ``step 120/1000  epoch 1.2  loss 0.5432  grad 0.871  lr 1.20e-03  3,210
    images/s  MFU 41%  12.3 GiB  1:23 left``, in one line. With several chips, the
    throughput is per chip. MFU and device memory are omitted where they are unknown.

    Args:
      values: metrics of the step, including the result of `metrics.device_metrics`.
    """
    speed = f"{values['images_per_second_per_chip']:,.0f} images/s"
    if values["images_per_second_per_chip"] != values["images_per_second"]:
        speed += "/chip"
    if "mfu" in values:
        speed += f"  MFU {values['mfu']:.0%}"
    if "device_memory" in values:
        speed += f"  {values['device_memory'] / 2**30:.1f} GiB"
    notes = ""
    if values["input_bound"] > 0.1:
        notes += f"  (waiting for images in {values['input_bound']:.0%} of steps)"
    if values["unreadable"]:
        notes += f"  ({counted(values['unreadable'], 'unreadable image')})"
    return (
        f"step {step}/{total}  epoch {values['epoch']:.1f}  loss {values['loss']:.4f}  "
        f"grad {values['gradient_norm']:.3g}  lr {values['learning_rate']:.2e}  "
        f"{speed}  {duration(values['seconds_left'])} left{notes}"
    )


def eval_line(label: str, values: Scalars) -> str:
    """Return the log line of an evaluation, with accuracies in percent.

    For example ``step 120  eval  loss 0.5400  top1 87.50 %  (360 images)``.
    """
    parts = []
    for key, value in values.items():
        group, _, name = key.partition("/")
        if group == "eval" and name not in ("count", "unreadable"):
            text = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
            if name.startswith("top") or name == "mAP":
                text = f"{100 * value:.2f} %"
            parts.append(f"{name} {text}")
    images = counted(values["eval/count"], "image")
    if values["eval/unreadable"]:
        images += f", {values['eval/unreadable']:,} unreadable"
    return f"{label}  eval  {'  '.join(parts)}  ({images})"


def best_line(workdir: Path, steps: Collection[int], criterion: Criterion) -> str:
    """Return the log line of the best checkpoint.

    For example ``best checkpoint  step 360  eval  loss ...  DIR/checkpoints/360``.

    Args:
      steps: steps of the existing checkpoints. Other steps are ignored.
      criterion: metric and direction that select the best checkpoint.
    """
    lines = [line for line in evaluations(workdir) if line["step"] in steps]
    if not (lines := finite_evaluations(lines, criterion)):
        return "best checkpoint  none: no saved checkpoint belongs to an evaluated step"
    values = best_evaluation(lines, criterion)
    text = eval_line(f"step {values['step']}", values)
    return f"best checkpoint  {text}  {workdir / 'checkpoints' / str(values['step'])}"


def final_line(
    workdir: Path, steps: Collection[int], criterion: Criterion | None
) -> str:
    """Return the last log line of a run: the best checkpoint, or the last checkpoint.

    For example ``last checkpoint  step 360  not evaluated, because
    data.eval_split='none'  DIR/checkpoints/360``.

    Args:
      steps: steps of the existing checkpoints, at least one.
      criterion: see `best_line`; None: the run has no evaluation.
    """
    if criterion:
        return best_line(workdir, steps, criterion)
    path = workdir / "checkpoints" / str(max(steps))
    reason = "not evaluated, because data.eval_split='none'"
    return f"last checkpoint  step {max(steps)}  {reason}  {path}"
