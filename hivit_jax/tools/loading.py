"""Read the model that a command uses, and log its path and step."""

from pathlib import Path
from typing import Any

from hivit_jax.checkpoints.read import find_checkpoints
from hivit_jax.keys import short_repr
from hivit_jax.models import configure
from hivit_jax.models.base import make_info
from hivit_jax.paths import open_path
from hivit_jax.reporting import metrics
from hivit_jax.reporting.console import log
from hivit_jax.tools.run_facts import best_metric
from hivit_jax.weights import load
from hivit_jax.weights.adapt import Pretrained


def read_model(path: str | Path, **options: Any) -> Pretrained:
    """Read a pretrained model; log its path and, for a checkpoint, its rank.

    If the file lacks mean, std or crop, another line states the assumed values.

    Args:
      path: any path that `weights.load.read` accepts.
      options: arguments of `weights.load.read`.

    Raises:
      CheckpointError: see `weights.load.read`.
    """
    pretrained = load.read(path, **options)
    is_checkpoint = pretrained.label != pretrained.path
    rank = f" ({checkpoint_rank(pretrained)})" if is_checkpoint else ""
    log(f"model: {pretrained.path}{rank}")
    if note := preprocessing_note(pretrained):
        log(note)
    return pretrained


def preprocessing_note(pretrained: Pretrained) -> str:
    """Return a line about the mean, std or crop that a model's file lacks; "": none.

    If there is such a line, it also mentions unknown class names.
    """
    missing = [name for name in ("mean", "std", "crop") if name not in pretrained.info]
    notes = []
    if missing:
        info = make_info(configure(**pretrained.arguments)[1], **pretrained.info)
        values = [f"{name} {short_repr(getattr(info, name))}" for name in missing]
        notes.append(f"assumed, as not in the file: {', '.join(values)}")
    if "head/kernel" in pretrained.params and not pretrained.info.get("class_names"):
        notes.append("the names of the classes are unknown")
    return f"note: {'; '.join(notes)}" if missing else ""


def checkpoint_rank(pretrained: Pretrained) -> str:
    """Return a checkpoint's step, and the newest and best step of its run, as text.

    For example ``step 200, the newest; the best is step 120``. A checkpoint that was
    not evaluated is never the best.
    """
    checkpoint = open_path(pretrained.path)
    step, workdir = int(checkpoint.name), checkpoint.parent.parent
    steps = [int(path.name) for path in find_checkpoints(checkpoint.parent)]
    step_of = {"newest": max(steps)}
    best = best_metric(pretrained.recipe)
    lines = metrics.finite_evaluations(metrics.evaluations(workdir), best)
    if lines := [line for line in lines if line["step"] in steps]:
        step_of["best"] = metrics.best_evaluation(lines, best)["step"]
    own = " and ".join(name for name, k in step_of.items() if k == step)
    others = [f"the {name} is step {k}" for name, k in step_of.items() if k != step]
    return "; ".join([pretrained.label + (f", the {own}" if own else ""), *others])
