"""Weights from one format into another, and a look into a file of weights.

python -m hivit_jax.tools.convert SRC DST [--format official] [--set KEY=VALUE ...]
python -m hivit_jax.tools.convert --inspect SRC [--set KEY=VALUE ...]
"""

import argparse
import ast
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hivit_jax.errors import ConfigError, Parser, exit_code
from hivit_jax.models import arguments_of, configure, variant
from hivit_jax.reporting.console import log
from hivit_jax.tree import named_leaves, split
from hivit_jax.weights import files, load
from hivit_jax.weights.adapt import compare
from hivit_jax.weights.load import abstract_model, build, fitting_arguments
from hivit_jax.weights.names.official import FORMATS, to_state_dict
from hivit_jax.weights.save import save_pretrained

USAGE = """\
python -m hivit_jax.tools.convert SRC DST [--format FORMAT] [--set KEY=VALUE ...]
python -m hivit_jax.tools.convert --inspect SRC [--names] [--set KEY=VALUE ...]

SRC      a run, a checkpoint, a directory, a .pth or .safetensors file of ours, of the
         official code or of MMPretrain, or hf://ORGANISATION/NAME
DST      .pth or .safetensors: a file; anything else: a directory with weights
         (model.safetensors), config.json and a model card
--format official (self_supervised, default), supervised or mmpretrain: the names in a
         .pth or .safetensors file
--set    an argument of the model: name=hivit_base, num_classes=10, image_size=384;
         num_heads, decoder_num_heads, layer_norm_eps where a file does not tell them
--names  with --inspect: every array by name
--plain  take the plain weights even where averaged ones (EMA) were kept
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Command line -> source, target, inspect, format, overrides."""
    parser = Parser(usage=USAGE, allow_abbrev=False)
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("target", metavar="DST", nargs="?")
    parser.add_argument("--inspect", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--format", choices=FORMATS, default="official", help=argparse.SUPPRESS
    )
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--names", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--set", action="append", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if bool(args.target) == args.inspect:
        raise ConfigError("expected SRC DST, or --inspect SRC; --help shows the usage")
    args.overrides = {}
    for each in args.set:
        key, equals, text = each.partition("=")
        if not equals:
            raise ConfigError(f"--set {each}: expected KEY=VALUE")
        try:
            args.overrides[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            args.overrides[key] = text
    return args


def inspect(
    source: str, *, averaged: bool = True, names: bool = False, **overrides: Any
) -> str:
    """What a file, directory or run holds, as text; nothing is converted.

    Args:
      names: tell every array's name.
      overrides: of a model that is to start from it: the text tells what it would take.
    """
    found = load.read(source, averaged=averaged, **overrides)
    model = abstract_model(fitting_arguments(found.arguments, overrides))
    _, config, run_options = configure(**found.arguments)
    arguments, name = asdict(config) | asdict(run_options), found.arguments["name"]
    standard, sizes = variant(name)[1], ("embed_dim", "depths", "num_heads")
    if any(getattr(config, key) != getattr(standard, key) for key in sizes):
        name += ", but of sizes of its own"
    values = [f"{key} {value}" for key, value in arguments.items()]
    rows = [", ".join(values[i : i + 5]) for i in range(0, len(values), 5)]
    _, report = compare(found, model)
    count = sum(array.size for array in found.params.values())
    lines = [found.path, f"{name}: {count:,} parameters", *rows, *found.notes]
    if found.unused:
        lines.append(f"not needed: {len(found.unused)}, {', '.join(found.unused[:3])}")
    text = "\n  ".join(lines) + f"\nas {model.name}:\n"
    if names:
        shapes = named_leaves(split(model)[1])
        for kind, each in vars(report).items():
            for name in each:
                there = found.params.get(name)
                sizes = [
                    list(x.shape) for x in (there, shapes.get(name)) if x is not None
                ]
                text += f"  {kind:<17} {name} {' -> '.join(map(str, sizes))}\n"
    return text + str(report)


def convert(
    source: str,
    target: str | Path,
    *,
    form: str = "official",
    averaged: bool = True,
    **overrides: Any,
) -> None:
    """Writes a pretrained model into a file for another program, or as a directory.

    Args:
      target: ``.safetensors`` or ``.pth``; else a directory for `save_pretrained`.
      form: one of `weights.names.official.FORMATS`, for files.
      overrides: as in `load_pretrained`.
    """
    found = load.read(source, averaged=averaged, **overrides)
    model, target = build(found, **overrides), Path(target)
    if target.suffix in files.SUFFIXES:
        state = to_state_dict(split(model)[1], model, form)
        about = {"arguments": arguments_of(model), "info": asdict(model.info)}
        files.write(target, state, about)
    else:
        save_pretrained(model, target, found.recipe, found.results)
    log(f"written: {target}")


def run(argv: Sequence[str]) -> None:
    """Converts or inspects, or ends with a HivitError."""
    args = parse(argv)
    options = {"averaged": not args.plain, **args.overrides}
    if args.inspect:
        log(inspect(args.source, names=args.names, **options))
    else:
        convert(args.source, args.target, form=args.format, **options)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return exit_code(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
