"""The command line: ``hivit_jax --config RECIPE --workdir DIR``."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from functools import partial

import jax
from ml_collections import ConfigDict

from hivit_jax import config as configs
from hivit_jax import platforms, recipes, record
from hivit_jax.data.sources.folder import check_workdir
from hivit_jax.distributed import processes
from hivit_jax.distributed.signals import catch_signals
from hivit_jax.distributed.watchdog import Watchdog
from hivit_jax.errors import ConfigError, Parser, require, run_command
from hivit_jax.paths import expand
from hivit_jax.reporting.console import log
from hivit_jax.xla.compile import enable_compilation_cache, keep_freed_memory

USAGE = """\
hivit_jax --config RECIPE --workdir DIR [--mode MODE] [--config.KEY=VALUE ...]

RECIPE is a name from the list below or FILE.py; NAME:VARIANT selects a variant.
Without --config, the config of the latest start of the run in DIR is used.
python -m hivit_jax.config prints all config keys. python -m hivit_jax.main is the same
command as hivit_jax.

modes: train (default)  train; resume the run in DIR if there is one
       eval             evaluate DIR's newest checkpoint, or --checkpoint=PATH
       knn              evaluate the features of --config.init_from by k-nearest
                        neighbors; without --config, the features of the run in DIR
       probe            as knn, but with a linear classifier fitted in closed form
       compile          compile the train step ahead of time for --topology
                        (v5e:16x16, h100:8, ...), without the hardware; write
                        DIR/compile.json; --search_batch: also search for the largest
                        batch that fits
       describe         print config, parameters, cost, schedule, estimated hours on
                        known chips, and DIR/compile.json if there is one

Other commands, python -m hivit_jax.tools.NAME: check_data and prepare_data;
predict, features, attention and reconstruct for image files; convert and export for
weights; report on runs.

On TPU pods and under SLURM, processes connect automatically. Elsewhere, each process
requires --coordinator_address=HOST:PORT --num_processes=N --process_id=I.

examples:
  hivit_jax --config digits_mae --workdir runs/mae
  hivit_jax --config digits_finetune --workdir runs/finetune --config.init_from=runs/mae
  hivit_jax --workdir runs/finetune --mode eval
  hivit_jax --config mae_base --mode describe --config.model.decoder_depth=8
  hivit_jax --config mae_base --mode compile --topology=v5e:16x16 --workdir runs/compile

exit codes: 0 finished, 2 bad config, flag or path, 3 diverged, 4 bad data,
            5 no usable checkpoint, 75 interrupted or stalled: run again to resume,
            134 aborted because another process was lost: run again to resume
"""
MODES = ("train", "eval", "knn", "probe", "compile", "describe")
# Modes of other programs, which are commands here.
COMMANDS = ("predict", "features", "attention", "reconstruct", "convert", "export")
MODE_OF_FLAG = {"checkpoint": "eval", "topology": "compile", "search_batch": "compile"}


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line into (flags, overrides of the recipe)."""
    listing, variants = [], recipes.variants()
    for name, line in recipes.names().items():
        listing.append(f"  {name:<16} {line}")
        if name in variants:
            listing.append(f"  {'':<16} variants: {variants[name]}")
    parser = Parser(
        usage=USAGE,
        epilog="\n".join(["recipes:", *listing]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    add = partial(parser.add_argument, help=argparse.SUPPRESS)
    add("-h", "--help", action="help")
    add("--config", default="")
    add("--mode", default="train")
    for name in ("workdir", "checkpoint", "topology", "coordinator_address"):
        add(f"--{name}", default="")
    add("--search_batch", action="store_true", default=False)
    for name in ("num_processes", "process_id"):
        add(f"--{name}", type=int, default=-1)
    flags, overrides = parser.parse_known_args(argv)
    if flags.mode not in MODES:
        hint = f"\nDid you mean python -m hivit_jax.tools.{flags.mode}?"
        raise ConfigError(
            f"--mode={flags.mode!r}; expected one of {', '.join(MODES)}"
            f"{hint if flags.mode in COMMANDS else ''}"
        )
    if flags.mode in ("train", "eval", "compile") and not flags.workdir:
        raise ConfigError(f"--mode={flags.mode} requires --workdir=DIR")
    for name, mode in MODE_OF_FLAG.items():
        if getattr(flags, name) and flags.mode != mode:
            raise ConfigError(
                f"--{name} has no effect with --mode={flags.mode}; "
                f"expected --mode={mode}"
            )
    has_address = flags.coordinator_address != ""
    if has_address != (0 <= flags.process_id < flags.num_processes):
        raise ConfigError(
            "expected all or none of --coordinator_address=HOST:PORT, "
            "--num_processes=N and --process_id=I (0 to N - 1); found "
            f"{flags.coordinator_address!r}, {flags.num_processes}, {flags.process_id}"
        )
    flags.workdir, flags.checkpoint = expand(flags.workdir), expand(flags.checkpoint)
    if not flags.config:
        if not flags.workdir:
            raise ConfigError("--config=RECIPE is required; --help lists the recipes")
        flags.config = record.newest_config(flags.workdir)
        if flags.mode in ("knn", "probe"):
            overrides.insert(0, f"--config.init_from={flags.workdir}")
    return flags, overrides


def load_config(flags: argparse.Namespace, overrides: Sequence[str]) -> ConfigDict:
    """Load the config that the flags select.

    Raises:
      ConfigError: see `config.load`, or the workdir is among the images.
    """
    config = configs.load(flags.config, overrides)
    if flags.workdir and flags.mode in ("train", "describe", "compile"):
        check_workdir(flags.workdir, config.data)
    return config


def run(argv: Sequence[str], setup_process: bool) -> None:
    """Run one mode.

    Args:
      setup_process: True: select the backend, connect to the other processes of the
        run, and enable the compilation cache. False: the Python program that called
        `main` has set up this process.
    """
    flags, overrides = parse(argv)
    if setup_process and flags.mode in ("describe", "compile"):
        platforms.use_cpu()
    config = load_config(flags, overrides)
    if flags.mode == "describe":
        from hivit_jax.tools.compile_ahead import earlier_summary
        from hivit_jax.tools.describe import describe, draw_figures, recipe_diff

        log(describe(config))
        log(f"\n{recipe_diff(config, flags.config)}")
        if flags.workdir:
            if compiled := earlier_summary(config, flags.workdir):
                log(f"\n{compiled}")
            log(f"\ndrawn: {draw_figures(config, flags.workdir)}")
        return
    if flags.mode == "compile":
        from hivit_jax.tools.compile_ahead import compile_ahead

        compile_ahead(config, flags.workdir, flags.topology, flags.search_batch)
        return
    if setup_process:
        cluster = flags.coordinator_address, flags.num_processes, flags.process_id
        processes.connect(*cluster, config.peer_timeout)
        platforms.start()
        default_cache = flags.workdir and f"{flags.workdir}/compiled"
        enable_compilation_cache(config.compilation_cache or default_cache)
        if jax.default_backend() == "cpu" or config.data.reader == "tf.data":
            keep_freed_memory()
    with Watchdog(config.stall_timeout) as watchdog:
        processes.check_same_on_all_processes({"config": config})
        heartbeat = watchdog.heartbeat
        if flags.mode == "eval":
            from hivit_jax.evaluate import evaluate_checkpoint

            evaluate_checkpoint(config, flags.workdir, flags.checkpoint, heartbeat)
        elif flags.mode == "knn":
            from hivit_jax.tasks.probing import nearest_neighbors

            nearest_neighbors(config, heartbeat=heartbeat)
        elif flags.mode == "probe":
            from hivit_jax.tasks.closed_form import closed_form_probe

            closed_form_probe(config, heartbeat)
        else:
            from hivit_jax.train import train

            # Only process 0 uses wandb. All processes import wandb, so that all of them
            # exit if the package is missing.
            if config.wandb_project:
                require("wandb", "hivit-jax[wandb]")
            train(config, flags.workdir, catch_signals(), heartbeat)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit code.

    A process of a multi-process run exits with the code instead of returning it.

    Args:
      argv: flags. None: the flags of this process, which is then set up as described
        in `run`.
    """
    setup_process = argv is None
    argv = sys.argv[1:] if argv is None else argv
    message, peer_lost = "", False
    try:
        code = run_command(lambda: run(argv, setup_process))
    except (Exception, KeyboardInterrupt) as error:
        if not processes.joined():
            raise
        code, message = 1, traceback.format_exc()
        # On CPUs, JAX raises some errors of collectives as ValueError. Their text names
        # Gloo, the library of these collectives.
        peer_lost = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in message
    if processes.joined():
        processes.exit_together(code, message, peer_lost)
    return code


def command() -> int:
    """Entry point of the `hivit_jax` command.

    Run `main`; on failure, end the process without waiting for its threads.
    """
    code = main()
    if code:
        # `os._exit`, because the interpreter might otherwise wait forever for the
        # threads of a checkpoint that could not be written.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(command())
