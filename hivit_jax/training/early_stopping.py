"""Early stopping: end a run after several evaluations without a better metric."""

from pathlib import Path
from typing import NamedTuple

import jax

from hivit_jax.distributed.processes import gather_objects
from hivit_jax.reporting.console import log
from hivit_jax.reporting.metrics import Criterion, evaluation_progress


class StoppingFlags(NamedTuple):
    """Decisions after the evaluation of a step.

    Attributes:
      end_early: the run must end early, at this step.
      improved: the newest evaluation up to this step is the best, or there is none yet.
    """

    end_early: bool
    improved: bool


def stopping_flags(
    workdir: Path, patience: int, criterion: Criterion, step: int
) -> StoppingFlags:
    """Return the flags of a step, which process 0 decides for all processes.

    Args:
      patience: number of consecutive evaluations without a better value of the metric
        after which the run ends; 0: never end early.
      criterion: (name of a metric, "max" or "min").
    """
    found = None
    if jax.process_index() == 0:
        found = evaluation_progress(workdir, step, criterion)
    count, improved = gather_objects(found)[0]
    end_early = 0 < patience <= count
    if end_early:
        log(f"early stopping: no better {criterion[0]} in the last {count} evaluations")
    return StoppingFlags(end_early, improved)
