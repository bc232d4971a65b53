"""Shared parts of the commands that apply a trained model to image files."""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from hivit_jax import config as configs
from hivit_jax import inputs, tasks
from hivit_jax.data.decoding import UnsuitableImageError
from hivit_jax.data.prefetch import prefetch_to_device
from hivit_jax.data.sources import registry
from hivit_jax.data.sources.base import DatasetInfo, Source
from hivit_jax.data.sources.folder import Images
from hivit_jax.data.sources.paths import Paths
from hivit_jax.data.transforms import Transform
from hivit_jax.distributed.sharding import make_mesh, on_mesh
from hivit_jax.errors import ConfigError, DataError, HivitError, Parser, first_line
from hivit_jax.models import configure
from hivit_jax.models.base import make_info
from hivit_jax.paths import expand
from hivit_jax.progress import Progress, listed
from hivit_jax.reporting.console import log
from hivit_jax.weights.adapt import Pretrained
from hivit_jax.weights.load import DATA_KEYS
from hivit_jax.xla.compile import with_compilation_log

MAX_BATCH = 64  # largest default batch size
MAX_DRAWN_PER_DIRECTORY = 16  # images in a figure


def make_parser(usage: str) -> Parser:
    """Return a parser of the arguments that commands on image files share.

    Args:
      usage: text that explains all arguments.
    """
    parser = Parser(usage=usage, allow_abbrev=False)
    add = partial(parser.add_argument, help=argparse.SUPPRESS)
    add("--checkpoint", required=True)
    add("--out", required=True)
    add("paths", nargs="*")
    add("--batch_size", type=int, default=0)
    return parser


def parse(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments; raise ConfigError if the batch size is negative."""
    flags = parser.parse_args(argv)
    if flags.batch_size < 0:
        raise ConfigError(f"--batch_size={flags.batch_size}; expected at least 0")
    return flags


def check_readable(num_readable: int, paths: Sequence[str]) -> None:
    """Raise DataError if no image of the paths, or of the test split, is readable."""
    if not num_readable:
        names = listed(paths, 3) if paths else "test split"
        raise DataError(f"{names}: no image can be read")


def config_of(pretrained: Pretrained, batch_size: int = 0) -> Any:
    """Return the training config of a model, with a batch size for predictions.

    If the training config is unknown, one is built from the model's arguments and
    `info`.

    Args:
      batch_size: 0: the training's batch size, but at most `MAX_BATCH`.
    """
    recipe = pretrained.recipe
    if not recipe:
        arguments = {k: v for k, v in pretrained.arguments.items() if v is not None}
        # In a config, 0 would stand for the dataset's number of classes.
        if arguments.get("num_classes") == 0:
            arguments["num_classes"] = 1
        model_class, model_config, _ = configure(**pretrained.arguments)
        task_names = [
            name
            for name, task in tasks.TASKS.items()
            if issubclass(model_class, task.model_class)
        ]
        info = make_info(model_config, **pretrained.info)
        data = {key: getattr(info, name) for key, name in DATA_KEYS.items()}
        # Canvas 0, because `model.image_size` may exceed the default canvas.
        data |= {"canvas": 0, "scale": 1 / info.scale}
        recipe = {"task": task_names[0], "model": arguments, "data": data}
    config = configs.complete_saved(recipe, pretrained.path)
    config = config.copy_and_resolve_references()
    config.batch_size = batch_size or min(config.batch_size, MAX_BATCH)
    return config


def open_images(
    pretrained: Pretrained,
    config: Any,
    paths: Sequence[str | Path],
    directory_classes: bool = False,
) -> tuple[tasks.Task, Source]:
    """Return the model's task and the source of the images.

    Args:
      paths: image files and directories; none: the test split of the config's dataset.
      directory_classes: see `Paths`.

    Raises:
      HivitError: a path does not exist, a directory contains no image, or the dataset
        cannot be read.
    """
    classes = pretrained.info.get("class_names", ())
    if not paths:
        needs_labels = tasks.find(config.task).needs_labels
        known = classes if needs_labels else ()
        source = registry.open_source(config.data, "test", known)
        classes = source.classes
    else:
        classes = classes or _classes_of_dataset(config)
        # With several labels per image, all labels are unknown, because the name of a
        # directory contains only one label.
        multi_label = config.data.multi_label
        if multi_label:
            source = Paths(paths)
        else:
            source = Paths(paths, classes, directory_classes)
    info = DatasetInfo({"test": len(source)}, tuple(classes), source.encoded)
    return tasks.create(config, info), source


def images_to_draw(paths: Sequence[str | Path]) -> list[Path]:
    """Return the image files that a figure shows, in the order of the paths.

    Of a directory with more than `MAX_DRAWN_PER_DIRECTORY` images, evenly spaced
    images are drawn, and their number is logged.

    Args:
      paths: image files, and directories that are searched recursively.

    Raises:
      ConfigError: a path does not exist.
      DataError: a directory contains no image.
    """
    drawn = []
    for path in (Path(expand(str(each))) for each in paths):
        if not path.exists():
            raise ConfigError(f"{path}: no such file or directory")
        if not path.is_dir():
            drawn.append(path)
            continue
        images = Images(path)
        count = min(len(images), MAX_DRAWN_PER_DIRECTORY)
        if count < len(images):
            log(f"{path}: drawing {count} of {len(images):,} images, evenly spaced")
        spaced = np.linspace(0, len(images) - 1, count).astype(int)
        drawn += [Path(images.name(index)) for index in spaced]
    return drawn


def read_images_to_draw(
    paths: Sequence[str | Path], read: Callable[[Path], np.ndarray]
) -> np.ndarray:
    """Return the images that a figure shows, [B, H, W, C]; see `images_to_draw`.

    The figure omits images that cannot be read. A line on stderr names each of them.

    Args:
      read: function from a file to its image [H, W, C]. Raises a DataError that starts
        with "cannot read" and the file's name.

    Raises:
      ConfigError: a path does not exist.
      DataError: no image can be read.
    """
    images = []
    for path in images_to_draw(paths):
        try:
            images.append(read(path))
        except DataError as error:
            print(f"{first_line(error)}; skipped", file=sys.stderr, flush=True)
    check_readable(len(images), paths)
    return np.stack(images)


def _classes_of_dataset(config: Any) -> Sequence[str]:
    """Return the class names of the config's dataset; () if it cannot be read."""
    try:
        return registry.open_source(config.data, "test").classes
    except HivitError:
        return ()


def one_device_mesh() -> Mesh:
    """Return a mesh that contains only the first device."""
    axes = dict(replica=1, data=1, fsdp=1, tensor=1)
    return make_mesh(axes, 1, devices=jax.devices()[:1])


class _TolerantTransform(Transform):
    """A task's transform that raises ValueError in place of DataError.

    The loader ends at a DataError, but marks an image as unreadable at a ValueError.
    """

    def __init__(self, transform: Transform):
        self.batch_size, self.draws = transform.batch_size, transform.draws
        self.shapes, self.bucket = transform.shapes, transform.bucket
        self._transform = transform

    def __call__(
        self, sample: Mapping[str, Any], draws: Any, out: Mapping[str, np.ndarray]
    ) -> None:
        """See `Transform.__call__`."""
        try:
            self._transform(sample, draws, out)
        except UnsuitableImageError as error:
            raise ValueError(error.after_training) from error
        except DataError as error:
            raise ValueError(first_line(error)) from error


def compute(
    config: Any, task: tasks.Task, source: Source, step: Callable, title: str
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the outputs of a model for all images of a source, batch by batch.

    The last batch is padded, so that one program is compiled per bucket. Shows a
    progress bar on a terminal, and progress lines otherwise.

    Args:
      step: jitted function from a batch to rows {name: [B, ...]}.
      title: label of the progress bar.

    Yields:
      The rows without padding, [n, ...], and "index" int32, "name" str, "label" int32
      and "error" str, each [n]. Unknown labels are -1. With several labels per image,
      known labels are [n, classes]. "error" is "" for a readable image; for others, the
      rows of `step` have no meaning.
    """
    transform = _TolerantTransform(task.transform(train=False))
    batches = inputs.source_batches(config, task, source, transform)
    mesh = one_device_mesh()
    step = with_compilation_log(on_mesh(mesh, step), "the model")
    progress = Progress(title, len(source), write=_log_without_terminal)
    with tqdm(total=len(source), desc=title, unit=" images", disable=None) as bar:
        for batch in prefetch_to_device(batches, mesh):
            outputs = step(batch)
            names = {"index", "unreadable", "label"} & {*batch}
            facts, rows = jax.device_get(({k: batch[k] for k in names}, outputs))
            valid = facts["index"] >= 0  # padding has the index -1
            facts, rows = ({k: v[valid] for k, v in d.items()} for d in (facts, rows))
            unreadable = facts.pop("unreadable") > 0
            facts["error"] = np.array(
                [
                    _reason(source, transform, index) if bad else ""
                    for index, bad in zip(facts["index"], unreadable, strict=True)
                ],
                object,
            )
            facts["label"] = _labels(source, facts, 1 + config.data.multi_label)
            facts["name"] = np.array([source.name(i) for i in facts["index"]], object)
            yield rows | facts
            bar.update(len(unreadable))
            progress.update(len(unreadable))


def _log_without_terminal(line: str) -> None:
    if not sys.stderr.isatty():
        log(line)


def _labels(source: Source, facts: Mapping[str, np.ndarray], ndim: int) -> np.ndarray:
    """Return the labels of a batch, int32 with `ndim` axes; if unknown, -1 [n]."""
    if isinstance(source, Paths):
        return source.labels[facts["index"]]
    known = len(source.classes) > 0 and np.ndim(facts.get("label")) == ndim
    if not known:
        return np.full(len(facts["index"]), -1, np.int32)
    # The loader sets the label of an unreadable example to 0.
    readable = (facts["error"] == "").reshape(-1, *[1] * (ndim - 1))
    return np.where(readable, facts["label"].astype(np.int32), -1)


def _reason(source: Source, transform: Transform, index: int) -> str:
    """Read an unreadable image again and return the error."""
    shapes = transform.shapes[0]
    out = {name: np.zeros(each.shape, each.dtype) for name, each in shapes.items()}
    try:
        transform(source.sample(index), [0.0] * transform.draws, out)
    except Exception as error:  # damaged files cause exceptions of many types
        return first_line(error)
    return "cannot be read"
