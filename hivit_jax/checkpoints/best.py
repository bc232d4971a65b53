"""The checkpoint that a run keeps in addition to its newest ones."""

from collections.abc import Sequence
from typing import Any

from orbax.checkpoint import checkpoint_managers

from hivit_jax.reporting.metrics import Best, best_evaluation, finite_evaluations


class KeepBest(checkpoint_managers.PreservationPolicy):
    """Policy that keeps the first checkpoint with the best evaluation.

    Args:
      best: name of a metric, and "max" or "min". Checkpoints without a finite value of
        this metric are never the best.
    """

    def __init__(self, best: Best):
        self._best = best

    def should_preserve(self, checkpoints: Sequence[Any], **context) -> list[bool]:
        saved = [checkpoint.metrics or {} for checkpoint in checkpoints]
        evaluated = finite_evaluations(saved, self._best)
        best = best_evaluation(evaluated, self._best) if evaluated else None
        return [metrics is best for metrics in saved]
