"""Write the features of image files to an .npz file; `USAGE` shows the command."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hivit_jax import platforms
from hivit_jax.errors import ConfigError, run_command
from hivit_jax.models import Model
from hivit_jax.models.classifier import Classifier
from hivit_jax.progress import counted, listed
from hivit_jax.reporting.console import log
from hivit_jax.tools import files
from hivit_jax.tools.loading import read_model
from hivit_jax.tools.outputs import output_path
from hivit_jax.tree import split
from hivit_jax.weights import load

USAGE = """\
python -m hivit_jax.tools.features --checkpoint PATH --out FILE.npz
              [IMAGE|DIRECTORY ...] [--pyramid] [--batch_size N]

--checkpoint  workdir of a run, checkpoint, directory written by save_pretrained, .pth
              or .safetensors file, or hf://ORGANIZATION/NAME
IMAGE|DIRECTORY
              images; directories are searched recursively. Default: the test split of
              the training's dataset
--pyramid     write the feature maps of all stages instead of pooled features
--batch_size  default: batch_size of the training config, at most 64

arrays of FILE.npz:
  features    float32 [N, D], the input of the classifier's head; for a masked
              autoencoder, the mean of the tokens of the encoder's last stage
  stride4, stride8, ...
              float32 [N, h, w, C]; with --pyramid, they replace features
  files       [N] names of the images; images that cannot be read are left out
  labels      int32 [N], -1 where unknown; with several labels per image,
              [N, classes] of 0 and 1; absent if no label is known
  class_names names of the model's classes. If no directory has one of these names, the
              names of the directories directly below DIRECTORY, if there are any.
              Absent if unknown

exit codes: 0 finished, 2 bad flag or path, 4 no image could be read,
            5 no usable checkpoint
"""


def pooled(model: Model, images: jax.Array) -> dict[str, jax.Array]:
    """Return {"features": float32 [B, D]} of images [B, H, W, C]."""
    if isinstance(model, Classifier):
        return {"features": model.pooled(images)}
    return {"features": model.encoder(images)[-1].astype(jnp.float32).mean(1)}


def pyramid(model: Model, images: jax.Array) -> dict[str, jax.Array]:
    """Return the maps of all stages, {"strideN": float32 [B, h, w, C]}."""
    return {
        f"stride{images.shape[1] // x.shape[1]}": x.astype(jnp.float32)
        for x in model.features(images)
    }


def write_features(
    checkpoint: str | Path,
    out: str | Path,
    images: Sequence[str | Path] = (),
    with_pyramid: bool = False,
    batch_size: int = 0,
) -> int:
    """Write the features of images; `USAGE` describes the file.

    The features of all images must fit into memory.

    Args:
      checkpoint: any path that `weights.load.read` accepts.
      images: image files, and directories that are searched recursively; none: the test
        split of the config's dataset.
      batch_size: 0: the training's batch size, but at most `files.MAX_BATCH`.

    Returns:
      The number of readable images. If it is 0, no file is written.

    Raises:
      HivitError: `out` or the checkpoint is not usable, a path does not exist, a
        directory contains no image, or the dataset cannot be opened.
    """
    out = output_path("--out", out, [checkpoint, *images])
    if out.suffix != ".npz":
        raise ConfigError(f"--out={out}: expected a name that ends in .npz")
    pretrained = read_model(checkpoint)
    graphdef, params = split(load.build(pretrained))
    config = files.config_of(pretrained, batch_size)
    task, source = files.open_images(pretrained, config, images, directory_classes=True)
    compute_features = pyramid if with_pyramid else pooled

    @jax.jit
    def step(params, batch):
        return compute_features(nnx.merge(graphdef, params), task.preprocess(batch))

    parts = []
    for rows in files.compute(config, task, source, partial(step, params), "features"):
        readable = rows["error"] == ""
        del rows["error"], rows["index"]
        parts.append({name: array[readable] for name, array in rows.items()})
    arrays = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    arrays["files"] = arrays.pop("name").astype(str)
    labels = arrays.pop("label")
    if (labels >= 0).any():
        arrays["labels"] = labels
    if source.classes:
        arrays["class_names"] = np.array(source.classes, str)
    count = len(labels)
    if count:
        _save(out, arrays)
        total = counted(len(source), "image")
        log(f"features of {count:,} of {total} written to {out}")
        log(_labels_line(arrays, config.data.multi_label))
    if images and source.ignored:
        log(f"ignored files: {source.ignored_text()}")
    return count


def _labels_line(arrays: Mapping[str, np.ndarray], multi_label: bool) -> str:
    """Return the log line about the labels in the file."""
    if "labels" not in arrays:
        if multi_label:
            return (
                "no labels: a directory's name is one label, but the model has several "
                "labels per image; without a path, the test split's labels are written"
            )
        return (
            "no labels; to include labels, pass a directory that contains one "
            "directory per class"
        )
    names = arrays["class_names"].tolist()
    return f"labels: {counted(len(names), 'class', 'classes')}, {listed(names, 5)}"


def _save(out: Path, arrays: dict[str, np.ndarray]) -> None:
    part = out.with_name(f"{out.stem}.incomplete.npz")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        np.savez(part, **arrays)
        part.replace(out)
    except OSError as error:
        raise ConfigError(f"--out={out}: {error.strerror}") from error


def run(argv: Sequence[str] | None) -> None:
    """Parse the arguments and write the features.

    Raises:
      DataError: no image can be read.
    """
    parser = files.make_parser(USAGE)
    parser.add_argument("--pyramid", action="store_true", help=argparse.SUPPRESS)
    flags = files.parse(parser, argv)
    platforms.start()
    options = flags.paths, flags.pyramid, flags.batch_size
    count = write_features(flags.checkpoint, flags.out, *options)
    files.check_readable(count, flags.paths)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
