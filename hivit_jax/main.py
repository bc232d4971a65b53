"""The command line: ``python -m hivit_jax.main --config FILE --workdir DIR``."""

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax

from hivit_jax import config as configs
from hivit_jax.compiling import keep_compiled, keep_memory
from hivit_jax.distributed import processes
from hivit_jax.distributed.signals import catch_signals
from hivit_jax.distributed.watchdog import Watchdog
from hivit_jax.errors import ConfigError, Parser, exit_code
from hivit_jax.metrics import say

USAGE = """\
python -m hivit_jax.main --config configs/NAME.py --workdir DIR [--mode MODE]
                         [--config.KEY=VALUE ...]
                         [--coordinator_address=HOST:PORT --num_processes=N
                          --process_id=I]

modes: train (default)  pretrain or classify, going on where DIR stands
       eval             evaluate DIR's newest checkpoint, or --config.checkpoint=PATH
       knn              classify by nearest neighbours in --config.init_from's features
       compile          compile the train step for --config.topology=v5e:16x16, h100:8
                        or other chips not at hand; writes DIR/compile.json
       describe         print config, parameters, cost and schedule; runs nothing

Processes find each other on TPU pods and under SLURM; elsewhere all get the three
flags of the last line.

exit codes: 0 finished, 2 bad config, flag or path, 3 diverged, 4 bad data,
            5 no usable checkpoint, 75 interrupted and saved: run again to resume,
            134 aborted because another process was lost: run again to resume
"""


def parse(argv: Sequence[str]) -> tuple[Any, argparse.Namespace]:
    """Command line -> (the recipe's config, flags: config, workdir, mode)."""
    parser = Parser(usage=USAGE, allow_abbrev=False, add_help=True)
    parser.add_argument("--config", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--workdir", default="", help=argparse.SUPPRESS)
    parser.add_argument("--coordinator_address", default="", help=argparse.SUPPRESS)
    for name in ("num_processes", "process_id"):
        parser.add_argument(f"--{name}", type=int, default=-1, help=argparse.SUPPRESS)
    modes = ("train", "eval", "knn", "compile", "describe")
    parser.add_argument(
        "--mode", default="train", choices=modes, help=argparse.SUPPRESS
    )
    known, overrides = parser.parse_known_args(argv)
    if known.mode in ("train", "eval", "compile") and not known.workdir:
        raise ConfigError(f"--mode={known.mode} needs --workdir=DIR")
    several = known.coordinator_address != ""
    if several != (0 <= known.process_id < known.num_processes):
        raise ConfigError(
            "--coordinator_address=HOST:PORT, --num_processes=N and --process_id=I, 0 "
            f"to N - 1, go together; found {known.coordinator_address!r}, "
            f"{known.num_processes}, {known.process_id}"
        )
    return configs.load(known.config, overrides), known


def run(argv: Sequence[str], join: bool) -> None:
    """Runs one mode to its end or to a HivitError.

    Args:
      join: start together with other processes, if there are any.
    """
    config, flags = parse(argv)
    if flags.mode == "describe":
        from hivit_jax.describe import changes, describe, draw

        say(describe(config))
        say(f"\n{changes(config, flags.config)}")
        if flags.workdir:
            say(f"\ndrawn: {draw(config, flags.workdir)}")
        return
    if flags.mode == "compile":
        from hivit_jax.compile_ahead import compile_ahead

        compile_ahead(config, flags.workdir)
        return
    if join:
        process = flags.coordinator_address, flags.num_processes, flags.process_id
        processes.start(*process, config.peer_timeout)
        in_workdir = flags.workdir and f"{flags.workdir}/compiled"
        keep_compiled(config.compilation_cache or in_workdir)
        if jax.default_backend() == "cpu":
            keep_memory()
    with Watchdog(config.stall_timeout) as watchdog:
        compute(config, flags, watchdog.heartbeat)


def compute(config: Any, flags: argparse.Namespace, beat: Callable[[], None]) -> None:
    """The modes that compute something; `beat` is called when they get on."""
    if flags.mode == "eval":
        from hivit_jax.evaluate import evaluate_checkpoint

        evaluate_checkpoint(config, flags.workdir, beat)
    elif flags.mode == "knn":
        from hivit_jax.tasks.probing import nearest_neighbours

        found = nearest_neighbours(config, beat=beat)
        say(
            f"nearest neighbours  top1 {found['knn/top1']:.2%}  top5 "
            f"{found['knn/top5']:.2%}  ({found['knn/count']:,} images)"
        )
    else:
        from hivit_jax.train import train

        train(config, flags.workdir, catch_signals(), beat)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code, or ends a process of several with it.

    Args:
      argv: flags; None for this process's own, which may be one of several.
    """
    join = argv is None
    message = ""
    try:
        code = exit_code(lambda: run(sys.argv[1:] if join else argv, join))
    except (Exception, KeyboardInterrupt):
        if not jax.distributed.is_initialized():
            raise
        code, message = 1, traceback.format_exc()
    if jax.distributed.is_initialized():
        processes.exit_now(code, message)
    return code


if __name__ == "__main__":
    sys.exit(main())
