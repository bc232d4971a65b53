"""The checkpoint that a run keeps in addition to its newest ones."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from orbax.checkpoint import checkpoint_managers

from hivit_jax.reporting.metrics import Best, score


class _FirstBest(checkpoint_managers.BestN):
    """BestN that keeps the first of equally good checkpoints instead of the last."""

    def should_preserve(self, checkpoints: Sequence[Any], **context) -> list[bool]:
        flags = super().should_preserve(checkpoints[::-1], **context)
        return [*flags][::-1]


def keep_best(best: Best) -> _FirstBest:
    """Return the policy that keeps the first checkpoint with the best evaluation."""
    return _FirstBest(
        get_metric_fn=partial(score, best=best),
        n=1,
        keep_checkpoints_without_metrics=False,
    )
