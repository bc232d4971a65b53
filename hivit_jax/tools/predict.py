"""Write predictions for image files; `USAGE` shows the command."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from hivit_jax import evaluate, platforms, tasks
from hivit_jax.errors import ConfigError, run_command
from hivit_jax.progress import counted
from hivit_jax.reporting.console import log
from hivit_jax.tools import files
from hivit_jax.tools.loading import read_model
from hivit_jax.tools.outputs import output_path
from hivit_jax.weights.adapt import Pretrained

USAGE = """\
python -m hivit_jax.tools.predict --checkpoint PATH --out OUT [IMAGE|DIRECTORY ...]
              [--batch_size N]

--checkpoint  workdir of a run, checkpoint, directory written by save_pretrained, .pth
              or .safetensors file, or hf://ORGANIZATION/NAME
IMAGE|DIRECTORY
              images; directories are searched recursively. Default: the test split of
              the training's dataset
--out         for a classifier, a file that ends in .csv or .jsonl, or a directory for
              predictions.csv; for your own task, a directory. An image below a
              directory with the name of a class has this class as its label. With
              labels, accuracy, class table, confusion matrix and worst images are
              written beside the file
--batch_size  default: batch_size of the training config, at most 64

exit codes: 0 finished, 2 bad flag or path, 4 no image could be read,
            5 no usable checkpoint
"""


def predict(
    checkpoint: str | Path,
    out: str | Path,
    images: Sequence[str | Path] = (),
    batch_size: int = 0,
) -> int:
    """Write the predictions of a trained model; the task determines the format.

    Args:
      checkpoint: any path that `weights.load.read` accepts.
      out: a classifier's .csv or .jsonl file, or a directory; created if missing.
      images: image files, and directories that are searched recursively; none: the test
        split of the config's dataset.
      batch_size: 0: the training's batch size, but at most `files.MAX_BATCH`.

    Returns:
      The number of readable images.

    Raises:
      HivitError: `out` or the checkpoint is not usable, a path does not exist, a
        directory contains no image, the dataset cannot be opened, or the task has no
        predictions.
    """
    out = output_path("--out", out, [checkpoint, *images])
    pretrained = read_model(checkpoint)
    config = files.config_of(pretrained, batch_size)
    _check_has_predictions(pretrained, config)
    task, source = files.open_images(pretrained, config, images)
    graphdef, variables = evaluate.restore(pretrained, task, files.one_device_mesh())

    @jax.jit
    def step(variables, batch):
        model = nnx.merge(graphdef, variables["params"], variables["model_state"])
        return task.predict_step(model, batch)

    num_readable = 0

    def count_readable(batches):
        nonlocal num_readable
        for rows in batches:
            num_readable += int((rows["error"] == "").sum())
            yield rows

    batches = files.compute(config, task, source, partial(step, variables), "predict")
    try:
        written = task.stream_predictions(count_readable(batches), out, source) or out
    except BrokenPipeError:  # an OSError of stdout, not of `out`
        raise
    except OSError as error:
        raise ConfigError(f"--out={out}: {error.strerror}") from error
    total = counted(len(source), "image")
    log(f"{num_readable:,} of {total} predicted; written to {written}")
    if images and source.ignored:
        log(f"ignored files: {source.ignored_text()}")
    return num_readable


def _check_has_predictions(pretrained: Pretrained, config: Any) -> None:
    """Raise ConfigError if the model has no head, or its task no predictions."""
    if pretrained.arguments.get("num_classes") == 0:
        problem = " has no head"
    elif tasks.find(config.task).predict_step is tasks.Task.predict_step:
        problem = f": task={config.task!r} has no predictions"
    else:
        return
    raise ConfigError(
        f"{pretrained.path}{problem}; expected a classifier. hivit_jax.tools.features "
        "writes its features"
    )


def run(argv: Sequence[str] | None) -> None:
    """Parse the arguments and write the predictions.

    Raises:
      DataError: no image can be read.
    """
    parser = files.make_parser(USAGE)
    # Earlier versions had this flag instead of positional arguments.
    parser.add_argument("--images", action="append", default=[], help=argparse.SUPPRESS)
    flags = files.parse(parser, argv)
    images = [*flags.paths, *flags.images]
    platforms.start()
    count = predict(flags.checkpoint, flags.out, images, flags.batch_size)
    files.check_readable(count, images)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
