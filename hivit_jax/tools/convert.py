"""Convert weights to another format, or describe them; `USAGE` shows the command."""

import argparse
import ast
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from hivit_jax import platforms
from hivit_jax.errors import ConfigError, Parser, run_command
from hivit_jax.models import arguments_of, configure, merge_arguments, variant
from hivit_jax.progress import listed
from hivit_jax.reporting.console import log
from hivit_jax.tools.loading import read_model
from hivit_jax.tools.outputs import output_path
from hivit_jax.tree import named_leaves, split
from hivit_jax.weights import files, load
from hivit_jax.weights.adapt import match_arrays
from hivit_jax.weights.load import abstract_model, build
from hivit_jax.weights.names.official import LAYOUTS, to_state_dict
from hivit_jax.weights.save import save_pretrained, shareable

USAGE = """\
python -m hivit_jax.tools.convert SRC DST [--format FORMAT] [--plain]
              [--set KEY=VALUE ...]
python -m hivit_jax.tools.convert --inspect SRC [--names] [--plain]
              [--set KEY=VALUE ...]

SRC        workdir of a run, checkpoint, directory written by save_pretrained, or
           hf://ORGANIZATION/NAME; or a .pth or .safetensors file written by this
           package, the official code, MMPretrain, timm or transformers
DST        a .safetensors or PyTorch file (.pth, .pt, .bin, .ckpt, .pth.tar); any other
           name is a directory for model.safetensors, config.json and a model card
--format   parameter names in the file. HiViT: official (self_supervised, default),
           supervised or mmpretrain; ViT and Swin: official, timm or transformers
--set      override a model argument, such as name=hivit_base, num_classes=10 or
           image_size=384. Set num_heads, decoder_num_heads and layer_norm_eps this way
           if SRC does not contain them
--inspect  describe SRC and how its arrays fit the model; write nothing
--names    with --inspect: list every array by name
--plain    read the unaveraged weights even if averaged weights (EMA) were saved
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; the values of ``--set`` become `overrides`."""
    parser = Parser(usage=USAGE, allow_abbrev=False)
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("target", metavar="DST", nargs="?")
    add = partial(parser.add_argument, help=argparse.SUPPRESS)  # USAGE explains them
    add("--inspect", action="store_true")
    add("--format", choices=LAYOUTS, default="official")
    add("--plain", action="store_true")
    add("--names", action="store_true")
    add("--set", action="append", default=[])
    args = parser.parse_args(argv)
    if bool(args.target) == args.inspect:
        raise ConfigError("expected SRC DST or --inspect SRC; --help shows the usage")
    args.overrides = {}
    for setting in args.set:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: expected KEY=VALUE")
        try:
            args.overrides[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            args.overrides[key] = text
    return args


def inspect(
    source: str, *, averaged: bool = True, list_names: bool = False, **overrides: Any
) -> str:
    """Describe pretrained weights and how their arrays fit a model, as text.

    Args:
      averaged: read averaged weights (EMA) if they were saved.
      list_names: list every array by name.
      overrides: model arguments that differ from the saved ones.
    """
    pretrained = load.read(source, averaged=averaged, **overrides)
    model = abstract_model(merge_arguments(pretrained.arguments, overrides))
    _, config, run_options = configure(**pretrained.arguments)
    title = pretrained.arguments["name"]
    standard, size_keys = variant(title)[1], ("embed_dim", "depths", "num_heads")
    if any(getattr(config, key) != getattr(standard, key) for key in size_keys):
        title += " with non-standard sizes"
    arguments = asdict(config) | asdict(run_options)
    values = [f"{key} {value}" for key, value in arguments.items()]
    rows = [", ".join(values[i : i + 5]) for i in range(0, len(values), 5)]
    count = sum(array.size for array in pretrained.params.values())
    lines = [pretrained.path, f"{title}: {count:,} parameters", *rows]
    lines += pretrained.notes + pretrained.guesses
    if unused := pretrained.unused:
        lines.append(f"unused entries: {len(unused)}, {listed(unused, 3)}")
    text = "\n  ".join(lines) + f"\nas {model.name}:\n"
    _, report = match_arrays(pretrained, model)
    if list_names:
        leaves = named_leaves(split(model)[1])
        for outcome, array_names in vars(report).items():
            for name in array_names:
                pair = pretrained.params.get(name), leaves.get(name)
                shapes = [str(list(x.shape)) for x in pair if x is not None]
                text += f"  {outcome:<17} {name} {' -> '.join(shapes)}\n"
    return text + str(report)


def convert(
    source: str,
    target: str | Path,
    *,
    layout: str = "official",
    averaged: bool = True,
    **overrides: Any,
) -> None:
    """Write a pretrained model to a file or a directory.

    Without overrides, the training config is also written, so that predictions equal
    those of the source.

    Args:
      target: a ``.safetensors`` or ``.pth`` file, or a directory for `save_pretrained`.
      layout: parameter names in a file, one of `weights.names.official.LAYOUTS`.
      averaged: read averaged weights (EMA) if they were saved.
      overrides: model arguments that differ from the saved ones.

    Raises:
      ConfigError: the target is the source, cannot be written, or requires PyTorch,
        which is not installed.
    """
    target = output_path("DST", target, [source])
    if target.suffix not in files.SUFFIXES:
        output_path("DST", target / files.WEIGHTS, [source])
    elif target.suffix != ".safetensors":
        files.import_torch(target)  # raises an error before the source is read
    log(f"converting {source}, which may take a minute ...")
    start = time.perf_counter()
    pretrained = read_model(source, averaged=averaged, **overrides)
    model = build(pretrained, **overrides)
    # Overrides may contradict the training config.
    recipe = {} if overrides else pretrained.recipe
    if target.suffix in files.SUFFIXES:
        state = to_state_dict(split(model)[1], model, layout)
        metadata = {"arguments": arguments_of(model), "info": asdict(model.info)}
        metadata |= {"recipe": shareable(recipe)} if recipe else {}
        files.write(target, state, json.dumps(metadata))
    else:
        save_pretrained(model, target, recipe, pretrained.results)
    log(f"written: {target} ({time.perf_counter() - start:.1f} s)")


def run(argv: Sequence[str] | None) -> None:
    """Parse the arguments, and inspect or convert the source."""
    args = parse(argv)
    options = {"averaged": not args.plain, **args.overrides}
    if args.inspect:
        log(inspect(args.source, list_names=args.names, **options))
    else:
        convert(args.source, args.target, layout=args.format, **options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    if argv is None:
        platforms.use_cpu()
    return run_command(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
