"""Early stopping: end a run after several evaluations without a new best."""

from pathlib import Path

import jax

from hivit_jax.distributed.processes import gather_objects
from hivit_jax.reporting.console import log
from hivit_jax.reporting.metrics import Best, evaluations_since_best


def check_progress(
    workdir: Path, patience: int, criterion: Best, step: int
) -> tuple[bool, bool]:
    """Return two flags, (stalled, improved), for a step.

    Process 0 decides for all processes.

    Args:
      patience: number of consecutive evaluations without a new best after which the run
        ends; 0: never end early.
      criterion: (name of a metric, "max" or "min").

    Returns:
      stalled: the run must end early, at this step.
      improved: the newest evaluation up to this step is the best, or there is none yet.
    """
    count = 0
    if jax.process_index() == 0:
        count = evaluations_since_best(workdir, step, criterion)
    count = gather_objects(count)[0]
    stalled = 0 < patience <= count
    if stalled:
        log(f"early stopping: no better {criterion[0]} in the last {count} evaluations")
    return stalled, count == 0
