"""Write predictions: ``python -m hivit_jax.tools.predict --checkpoint PATH --out DIR``.

The task of the checkpoint determines which files are written to DIR.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from hivit_jax import config as configs
from hivit_jax import evaluate, inputs, platforms
from hivit_jax.data.prefetch import prefetch_to_device
from hivit_jax.data.sources import folder, registry
from hivit_jax.distributed.sharding import make_mesh
from hivit_jax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Parser,
    run_command,
)
from hivit_jax.paths import expand
from hivit_jax.reporting.console import log
from hivit_jax.tools.outputs import output_path
from hivit_jax.weights import load


def predict(
    checkpoint: str | Path, out: str | Path, images: str | Path | None = None
) -> int:
    """Write the predictions of a trained model into a directory.

    Args:
      checkpoint: a workdir, one of its checkpoints, or a directory written by
        `save_pretrained` that includes the training config.
      out: directory; created if it does not exist.
      images: an image file, or a directory that is searched recursively; None: the test
        split of the config's dataset.

    Returns:
      The number of predicted images.

    Raises:
      HivitError: the checkpoint is not usable, the images cannot be read, or the task
        has no predictions.
    """
    out = output_path("--out", out, [checkpoint])
    pretrained = load.read(checkpoint)
    if not pretrained.recipe:
        raise CheckpointError(
            f"{pretrained.path} contains no training config; expected a workdir or a "
            "directory, written by save_pretrained, that includes the training config"
        )
    config = configs.complete_saved(pretrained.recipe, pretrained.path)
    task = inputs.make_task(config, "test")
    if images is None:
        source = registry.open_source(config.data, "test")
    else:
        source = folder.Images(expand(str(images)), task.data.classes)
    mesh = make_mesh(
        dict(replica=1, data=1, fsdp=1, tensor=1), 1, devices=jax.devices()[:1]
    )
    graphdef, variables = evaluate.restore(pretrained, task, mesh)

    @jax.jit
    def predict_step(variables, batch):
        model = nnx.merge(graphdef, variables["params"], variables["model_state"])
        rows = task.predict_step(model, batch)
        return rows | {name: batch[name] for name in ("index", "weight")}

    records: list[Any] = []
    for batch in prefetch_to_device(inputs.source_batches(config, task, source), mesh):
        rows = evaluate.local_rows(predict_step(variables, batch))
        rows["name"] = np.array([source.name(index) for index in rows["index"]])
        records += task.records(rows)
    try:
        out.mkdir(parents=True, exist_ok=True)
        task.write_predictions(records, out)
    except OSError as error:
        raise ConfigError(f"--out={out}: {error.strerror}") from error
    log(f"{len(records):,} of {len(source):,} images predicted; written to {out}")
    if images is not None and source.ignored:
        log(f"ignored files: {source.ignored_text()}")
    return len(records)


def run(argv: Sequence[str] | None) -> None:
    """Parse the arguments and write the predictions.

    Raises:
      DataError: no image can be read.
    """
    parser = Parser("python -m hivit_jax.tools.predict", allow_abbrev=False)
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="workdir, checkpoint, or directory written by save_pretrained",
    )
    parser.add_argument("--out", required=True, help="directory to write to")
    parser.add_argument(
        "--images",
        help="image file, or directory to search; default: the dataset's test split",
    )
    flags = parser.parse_args(argv)
    platforms.start()
    if not predict(flags.checkpoint, flags.out, flags.images):
        raise DataError(f"{flags.images or 'test split'}: no image can be read")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
