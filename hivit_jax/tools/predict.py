"""Predictions of a trained model: ``python -m hivit_jax.tools.predict --checkpoint PATH
--out DIR [--images DIR]``. The task writes them.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from hivit_jax import config as configs
from hivit_jax import evaluate, inputs
from hivit_jax.data.prefetch import to_devices
from hivit_jax.data.sources import folder, registry
from hivit_jax.distributed.sharding import make_mesh
from hivit_jax.errors import CheckpointError, DataError, Parser, exit_code
from hivit_jax.reporting.console import log
from hivit_jax.weights import load


def predict(
    checkpoint: str | Path, out: str | Path, images: str | Path | None = None
) -> int:
    """Write the predictions of a trained model into a directory.

    Args:
      checkpoint: a workdir, one of its checkpoints, or a directory of
        `save_pretrained`, with the config that it was trained with.
      out: is created.
      images: a file or a directory of images of any depth; None: the test split of the
        dataset that the config names.

    Returns:
      The number of images predicted.

    Raises:
      HivitError: nothing usable there, images that cannot be read, or a task without
        predictions.
    """
    start = load.read(checkpoint)
    if not start.recipe:
        raise CheckpointError(
            f"{start.path} does not contain the config that it was trained with; "
            "expected a workdir or a directory of save_pretrained"
        )
    config = configs.of_checkpoint(start.recipe, start.path)
    task = inputs.make_task(config, "test")
    if images is None:
        source = registry.open_source(config.data, "test")
    else:
        source = folder.Images(images, task.data.classes)
    mesh = make_mesh(
        dict(replica=1, data=1, fsdp=1, tensor=1), 1, devices=jax.devices()[:1]
    )
    graphdef, variables = evaluate.restore(start, task, mesh)

    @jax.jit
    def predict_step(variables, batch):
        model = nnx.merge(graphdef, variables["params"], variables["model_state"])
        rows = task.predict_step(model, batch)
        return rows | {name: batch[name] for name in ("index", "weight")}

    records: list[Any] = []
    for batch in to_devices(inputs.every_example(config, task, source), mesh):
        rows = evaluate.local_rows(predict_step(variables, batch))
        rows["name"] = np.array([source.name(index) for index in rows["index"]])
        records += task.records(rows)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    task.write_predictions(records, out)
    log(f"{len(records):,} of {len(source):,} images predicted; written: {out}")
    return len(records)


def run(argv: Sequence[str]) -> None:
    """Predict what the command line asks for."""
    parser = Parser("python -m hivit_jax.tools.predict", allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help="as for load_pretrained")
    parser.add_argument("--out", required=True, help="directory of the predictions")
    parser.add_argument("--images", help="file or directory; default: the test split")
    flags = parser.parse_args(argv)
    if not predict(flags.checkpoint, flags.out, flags.images):
        raise DataError(f"none of the images of {flags.images} can be read")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return exit_code(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
