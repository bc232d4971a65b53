"""Check a dataset before a run: ``python -m hivit_jax.tools.check_data --config FILE``.

Reads the images of both splits as training does; prints what they are like, which of
them cannot be read, and how many cores it takes to keep a chip busy.
"""

import io
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TextIO

import numpy as np
import simplejpeg
from flax import nnx
from PIL import ExifTags, Image
from tqdm import tqdm

from hivit_jax import config as configs
from hivit_jax import inputs, tasks
from hivit_jax.data.loader import Loader, cores
from hivit_jax.data.order import permutation, samples_at
from hivit_jax.data.sources.registry import open_source
from hivit_jax.data.transforms import Transform, decode
from hivit_jax.errors import ConfigError, DataError, Parser, exit_code
from hivit_jax.models import Model, image_shape

CHUNK = 32  # images that a thread takes at a time
SHOWN = 20  # names that the report has room for
SECONDS = 3.0  # of CPU time, to see how fast training images are read
UTILISATION = 0.4  # of a chip's peak, assumed
CHIPS = {"H100": 989e12, "TPU v5e": 197e12, "TPU v5p": 459e12}  # bfloat16 FLOP/s
UNREADABLE, UNKNOWN = "unreadable", "with a label of no class"


class Split:
    """The images of "train" or "test": all of them, or `sample` drawn by chance.

    Attributes:
      indices: of the k images, int64 [k].
      labels: int64 [k]; -1 where an image cannot be used.
      sizes: height and width, int64 [k, 2]; 0 where it cannot be read.
      kinds: what images are like -> their indices -> more on each.
    """

    def __init__(self, config: Any, split: str, sample: int = 0):
        own = config.data.train_split if split == "train" else config.data.eval_split
        self.title = f"{split} ({own})" if own else split
        self.config, self.channels = config, image_shape(config.model)[2]
        self.source = open_source(config.data, split)
        n = len(self.source)
        self.indices = np.sort(permutation(0, 0, n)[: sample or n])
        self.labels = np.full(len(self.indices), -1)
        self.sizes = np.zeros((len(self.indices), 2), np.int64)
        kinds = {UNREADABLE: {}, UNKNOWN: {}}
        self.kinds: dict[str, dict[int, str]] = defaultdict(dict, kinds)

    def read(self) -> None:
        """Fills the attributes, in threads and behind a progress bar."""
        firsts = range(0, len(self.indices), CHUNK)
        bar = tqdm(total=len(self.indices), desc=self.title, unit=" images")
        with bar, ThreadPoolExecutor(self.config.data.workers or cores()) as pool:
            for count in pool.map(self._read, firsts):
                bar.update(count)

    def _read(self, first: int) -> int:
        indices = self.indices[first : first + CHUNK].tolist()
        for place, index in enumerate(indices, first):
            try:
                sample = self.source.sample(index)
                encoded, label = sample["image"], sample["label"]
                pixels = decode(encoded, self.channels)
            except Exception as error:  # of whatever kind a broken file provokes
                words = f"{type(error).__name__}: {error}".split()
                self.kinds[UNREADABLE][index] = " ".join(words)
                continue
            self.sizes[place] = pixels.shape[:2]
            if 0 <= label < len(self.source.classes):
                self.labels[place] = label
            else:
                self.kinds[UNKNOWN][index] = str(label)
            whose = partial(self.name, index)
            for kind in oddities(encoded, whose, pixels.shape, self.config):
                self.kinds[kind][index] = ""
        return len(indices)

    def name(self, index: int) -> str:
        """What a person would find the image by, in letters that can be printed."""
        name = self.source.name(index)  # may hold bytes of no encoding
        return name.encode(errors="backslashreplace").decode()

    def per_class(self) -> np.ndarray:
        """Usable images of each class, int64 [classes]."""
        labels = self.labels[self.labels >= 0]
        return np.bincount(labels, minlength=len(self.source.classes))

    def faults(self) -> dict[str, list[str]]:
        """What should not be, by kind: the images or classes that it is true of."""
        faults = {}
        for kind in (UNREADABLE, UNKNOWN):
            found = sorted(self.kinds[kind].items())
            faults[kind] = [f"{self.name(i)}: {more}" for i, more in found]
        if len(self.indices) == len(self.source):
            empty = np.flatnonzero(self.per_class() == 0)
            faults["classes without an image"] = [self.source.classes[i] for i in empty]
        return faults


def oddities(
    encoded: bytes, name: Callable[[], str], shape: Sequence[int], config: Any
) -> list[str]:
    """An image and its [h, w, C] -> in which ways it is unusual.

    Decodes nothing; PIL and `name` are asked only where this is no plain JPEG.
    """
    canvas, (height, width, _) = config.data.canvas, image_shape(config.model)
    kinds = {
        f"over {canvas}, may be slower": max(shape) > canvas,
        f"under {height} x {width}": shape[0] < height or shape[1] < width,
    }
    exif, colours = encoded.find(b"Exif", 0, 65536) >= 0, ""
    with suppress(ValueError):
        colours = simplejpeg.decode_jpeg_header(encoded)[2]
    if exif or colours != "YCbCr":
        with suppress(Exception), Image.open(io.BytesIO(encoded)) as image:
            suffix = os.path.splitext(name())[1].lower()
            named = Image.registered_extensions().get(suffix, image.format)
            kinds |= {
                f"{image.format} named {suffix}": image.format not in (named, "MPO"),
                "CMYK": image.mode == "CMYK",
                "greyscale": image.mode in ("1", "L", "LA"),
                "palette": image.mode in ("P", "PA"),
                "16 bit, over 255 is white": image.mode.startswith("I"),
                "several frames, one is read": getattr(image, "n_frames", 1) > 1,
            }
            turned = exif and image.getexif().get(ExifTags.Base.Orientation, 1) > 1
            kinds["EXIF rotation, not applied"] = turned
    return [kind for kind, found in kinds.items() if found]


def report(split: Split, faults: dict[str, list[str]]) -> str:
    """The text on one split."""
    n, k, classes = len(split.source), len(split.indices), len(split.source.classes)
    lines = [f"{split.title}: {n:,} images, {classes:,} classes"]
    lines[0] += f"; {k:,} of the images looked at" * (k < n)
    lines += ["", _row("", "min", "median", "max")]
    sizes, spread = split.sizes[split.sizes.all(1)], {}
    spread["images of a class"] = split.per_class()
    spread["height"], spread["width"] = sizes.T
    for what, values in spread.items():
        three = np.quantile(values, (0, 0.5, 1)) if values.size else ()
        lines.append(_row(what, *(f"{value:,.0f}" for value in three)))
    lines += ["", _row("", "images", "share")]
    for kind, found in sorted(split.kinds.items()):
        row = _row(kind, f"{len(found):,}", f"{len(found) / max(k, 1):.3%}")
        lines.append(row + (f"   e.g. {split.name(min(found))}" if found else ""))
    for kind, names in faults.items():
        more = [f"... and {len(names) - SHOWN:,} more"] * (len(names) > SHOWN)
        lines += ["", f"  {len(names):,} {kind}"] * bool(names)
        lines += [f"    {line}" for line in names[:SHOWN] + more]
    return "\n".join(lines)


def _row(what: str, *cells: str) -> str:
    return f"  {what:<28}" + "".join(f"{cell:>12}" for cell in cells)


def images_per_second(split: Split, transform: Transform) -> float:
    """Usable images that a core makes ready for training in a second of its time."""
    indices = split.indices[split.labels >= 0]
    loader = Loader(split.source, transform, split.config.seed, CHUNK)
    done, start = 0, time.process_time()
    while (spent := time.process_time() - start) < SECONDS:
        positions = np.arange(done, done + CHUNK)
        places, epochs = samples_at(positions, len(indices), split.config.seed)
        loader.fill(loader.blank(0, CHUNK), 0, 0, indices[places], epochs)
        done += CHUNK
    return done / spent


def speed(task: tasks.Task, model: Model, rate: float) -> str:
    """The text on how many cores, each reading `rate` images/s, a chip needs."""
    flops = 3 * 2 * task.macs(model)  # backward is twice forward
    title = f"estimate at {UTILISATION:.0%} of peak"
    lines = [f"speed: {rate:,.0f} training images/s from each of {cores()} cores here"]
    lines += ["", _row(title, "images/s", "cores")]
    for chip, peak in CHIPS.items():
        needed = UTILISATION * peak / flops
        lines.append(_row(f"one {chip}", f"{needed:,.0f}", f"{needed / rate:,.1f}"))
    return "\n".join(lines)


def examine(config: Any, sample: int, listing: TextIO) -> None:
    """Prints the report on `sample` images of each split, or on all (0), and to
    `listing` every unreadable one; DataError if a run should not start with this.
    """
    data, problems = config.data, []
    if data.name == "synthetic":
        raise ConfigError("data.name='synthetic' is made up; there is nothing to check")
    task = inputs.make_task(config)
    model = nnx.eval_shape(task.build_model)
    splits = [Split(config, split, sample) for split in ("train", "test")]
    print(f"{data.name} {data.dir}".rstrip())
    for split in splits:
        split.read()
        faults = split.faults()
        print(f"\n{report(split, faults)}", flush=True)
        listing.writelines(f"{line}\n" for line in faults[UNREADABLE])
        allowed = {UNREADABLE: data.max_unreadable * len(split.indices)}
        for kind, names in faults.items():
            if len(names) > allowed.get(kind, 0):
                problems.append(f"{split.title}: {len(names):,} {kind}")
    if (splits[0].labels >= 0).any():
        rate = images_per_second(splits[0], task.transform(train=True))
        print(f"\n{speed(task, model, rate)}")
    print(f"\n{'; '.join(problems) or 'healthy'}")
    if problems:
        raise DataError(f"{data.name} is not fit for a run\n{problems[0]}")


def run(argv: Sequence[str]) -> None:
    """Examines the dataset of the recipe that the command line names."""
    parser = Parser("python -m hivit_jax.tools.check_data", allow_abbrev=False)
    parser.add_argument("--config", required=True, help="then --config.KEY=VALUE ...")
    parser.add_argument("--sample", type=int, default=0, help="images of each split")
    parser.add_argument("--list", default=os.devnull, help="file for unreadable images")
    flags, overrides = parser.parse_known_args(argv)
    config = configs.load(flags.config, overrides)
    if flags.sample < 0:
        raise ConfigError(f"--sample={flags.sample}; expected at least 0")
    try:
        listing = open(flags.list, "w", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"--list={flags.list}: {error.strerror}") from error
    with listing:
        examine(config, flags.sample, listing)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return exit_code(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
