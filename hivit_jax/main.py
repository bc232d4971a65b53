"""The command line: ``python -m hivit_jax.main --config FILE --workdir DIR``."""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from hivit_jax import config as configs
from hivit_jax.errors import ConfigError, Parser, exit_code
from hivit_jax.metrics import say

USAGE = """\
python -m hivit_jax.main --config configs/NAME.py --workdir DIR [--mode MODE]
                         [--config.KEY=VALUE ...]

modes: train (default)  pretrain or classify, going on where DIR stands
       eval             evaluate DIR's newest checkpoint, or --config.checkpoint=PATH
       knn              classify by nearest neighbours in --config.init_from's features
       compile          compile the train step for --config.topology=v5e:16x16, h100:8
                        or other chips not at hand; writes DIR/compile.json
       describe         print config, parameters, cost and schedule; runs nothing

exit codes: 0 finished, 2 bad config, flag or path, 3 diverged, 4 bad data,
            5 no usable checkpoint, 75 interrupted and saved: run again to go on
"""


def parse(argv: Sequence[str]) -> tuple[Any, argparse.Namespace]:
    """Command line -> (the recipe's config, flags: config, workdir, mode)."""
    parser = Parser(usage=USAGE, allow_abbrev=False, add_help=True)
    parser.add_argument("--config", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--workdir", default="", help=argparse.SUPPRESS)
    modes = ("train", "eval", "knn", "compile", "describe")
    parser.add_argument(
        "--mode", default="train", choices=modes, help=argparse.SUPPRESS
    )
    known, overrides = parser.parse_known_args(argv)
    if known.mode in ("train", "eval", "compile") and not known.workdir:
        raise ConfigError(f"--mode={known.mode} needs --workdir=DIR")
    return configs.load(known.config, overrides), known


def catch_signals() -> Callable[[], str | None]:
    """From here on SIGTERM and Ctrl-C are remembered; a second one kills.

    Returns:
      A function that tells the signal that came, if any.
    """
    caught: list[str] = []

    def remember(number: int, frame: FrameType | None) -> None:
        caught.append(signal.Signals(number).name)
        say(f"{caught[0]}: finishing the step and saving; once more to kill")
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, remember)
    return lambda: caught[0] if caught else None


def run(argv: Sequence[str]) -> None:
    """Runs one mode to its end or to a HivitError."""
    config, flags = parse(argv)
    if flags.mode == "describe":
        from hivit_jax.describe import changes, describe, draw

        say(describe(config))
        say(f"\n{changes(config, flags.config)}")
        if flags.workdir:
            say(f"\ndrawn: {draw(config, flags.workdir)}")
    elif flags.mode == "eval":
        from hivit_jax.evaluate import evaluate_checkpoint

        evaluate_checkpoint(config, flags.workdir)
    elif flags.mode == "compile":
        from hivit_jax.compile_ahead import compile_ahead

        compile_ahead(config, flags.workdir)
    elif flags.mode == "knn":
        from hivit_jax.evaluate import nearest_neighbours

        found = nearest_neighbours(config)
        say(
            f"nearest neighbours  top1 {found['knn/top1']:.2%}  top5 "
            f"{found['knn/top5']:.2%}  ({found['knn/count']:,} images)"
        )
    else:
        from hivit_jax.train import train

        train(config, flags.workdir, catch_signals())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return exit_code(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
