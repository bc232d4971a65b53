"""Early stopping: end a run after evaluations without a new best."""

from pathlib import Path

import jax

from hivit_jax.distributed.processes import gather_objects
from hivit_jax.reporting.console import log
from hivit_jax.reporting.metrics import Best, evaluations_since_best


def has_stalled(
    workdir: Path, patience: int, best: Best, step: int
) -> tuple[bool, bool]:
    """Return two flags, (stalled, improved), for a step.

    Both are False if `patience` is 0. Process 0 decides for all processes.

    Args:
      patience: number of evaluations without a new best that end the run; 0: never end
        early.
      best: metric and direction.

    Returns:
      stalled: the run ends early at this step.
      improved: the evaluation of this step is a new best.
    """
    if not patience:
        return False, False
    count = 0
    if jax.process_index() == 0:
        count = evaluations_since_best(workdir, step, best)
    count = gather_objects(count)[0]
    if count >= patience:
        log(f"early stopping: no better {best[0]} in the last {count} evaluations")
    return count >= patience, count == 0
