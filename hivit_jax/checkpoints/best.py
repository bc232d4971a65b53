"""The checkpoint that a run keeps in addition to its newest ones."""

from collections.abc import Sequence
from typing import Any

from etils.epath import Path
from orbax.checkpoint import checkpoint_managers

from hivit_jax.reporting import metrics
from hivit_jax.reporting.metrics import Criterion


class KeepBest(checkpoint_managers.PreservationPolicy):
    """Policy that keeps the checkpoint with the best evaluation (`best_evaluation`).

    The evaluations of earlier starts are read from metrics.jsonl, so that a resumed run
    still keeps its best checkpoint.

    Args:
      workdir: the run's directory.
      criterion: name of a metric, and "max" or "min". Without a finite value of this
        metric, a checkpoint is never the best.
    """

    def __init__(self, workdir: Path, criterion: Criterion):
        self._criterion = criterion
        self._recorded = {line["step"]: line for line in metrics.evaluations(workdir)}

    def should_preserve(self, checkpoints: Sequence[Any], **context) -> list[bool]:
        results = [x.metrics or self._recorded.get(x.step, {}) for x in checkpoints]
        finite = metrics.finite_evaluations(results, self._criterion)
        best = metrics.best_evaluation(finite, self._criterion) if finite else None
        return [each is best for each in results]
