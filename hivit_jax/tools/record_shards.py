"""Write datasets in TFDS's format as array_record shards, or resume writing them."""

import io
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from hivit_jax.data.decoding import stored_values
from hivit_jax.errors import ConfigError, DataError
from hivit_jax.progress import counted

# Records are not compressed, because JPEGs would be slower to read but not smaller.
OPTIONS = "group_size:1,uncompressed"
# Split -> (key, example) of each image, and an upper bound of the number of images, or
# None if unknown. Only a progress bar uses the bound.
Splits = Mapping[str, tuple[Iterable[tuple[Any, Mapping[str, Any]]], int | None]]


def is_complete(directory: Path) -> bool:
    """Return True if a dataset is completely written."""
    return (directory / "dataset_info.json").exists()


def write_dataset(
    info: Any,
    final_directory: Path,
    short_side: int,
    shard_size: int,
    make_splits: Callable[[], Splits],
) -> None:
    """Write a dataset to `final_directory`, or resume writing it.

    The directory has the suffix ``.incomplete`` until all splits are written.

    Args:
      info: DatasetInfo of TFDS. If the dataset is already complete, `info` must contain
        its splits; otherwise, this function sets them.
      short_side: training images whose short side exceeds this number of pixels are
        shrunk to it, unless they have more than 8 bits per channel; 0: no shrinking.
      shard_size: images per shard. An interruption loses at most one shard.
      make_splits: returns the splits; not called if the dataset is already complete.

    Raises:
      ConfigError: the directory cannot be written, or was started with another
        `short_side`.
      DataError: a split is empty, or was started with other images.
    """
    from tqdm import tqdm

    if short_side < 0:
        raise ConfigError(f"--short_side={short_side}: expected at least 0")
    finished = is_complete(final_directory)
    directory = final_directory
    if not finished:
        directory = directory.with_name(f"{directory.name}.incomplete")
    # An empty file with this name records the option for later calls.
    option = f"short_side={short_side}"
    earlier_options = [path.name for path in directory.glob("short_side=*")]
    if earlier_options and earlier_options != [option]:
        raise ConfigError(
            f"--{option}: {directory} was started with --{earlier_options[0]}; delete "
            "it or choose another directory"
        )
    if not finished:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / option).touch()
        except OSError as error:
            raise ConfigError(f"{directory} cannot be written: {error}") from error
        splits = {}
        for split, (examples, total) in make_splits().items():
            side = short_side if split == "train" else 0
            with tqdm(examples, split, total, unit=" images") as bar:
                splits[split] = _write_split(
                    info, split, bar, directory, side, shard_size
                )
        info.set_splits(splits)
        info.write_to_directory(directory)
        directory.replace(final_directory)
    for split in info.splits.values():
        print(f"{split.name}: {counted(split.num_examples, 'image')}")
    print(f"{final_directory} is complete" + ("; nothing to do" if finished else ""))


def _write_split(
    info: Any,
    split: str,
    examples: Iterable,
    directory: Path,
    short_side: int,
    shard_size: int,
) -> Any:
    """Write the missing shards of a split; return its TFDS SplitInfo."""
    from array_record.python import array_record_module as array_record
    from tensorflow_datasets.core import example_serializer, splits

    features, image_key = info.features, info.supervised_keys[0]
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())

    def encode(item):
        key, example = item
        return key, features.encode_example(example)

    def serialize(item):
        key, example = item
        if short_side:
            try:
                image = shrink(example[image_key], short_side)
                example = example | {image_key: image}
            except Exception as error:
                raise DataError(f"image {key!r} cannot be read: {error}") from error
        # Without `deterministic`, the order of features differs between processes.
        return serializer.get_tf_example(example).SerializeToString(deterministic=True)

    examples, stem = iter(examples), f"{info.name}-{split}.array_record"
    shards = sorted(directory.glob(f"{stem}-*"))
    readers = [array_record.ArrayRecordReader(str(shard)) for shard in shards]
    lengths = [reader.num_records() for reader in readers]
    # Skips the examples in complete shards, and keeps only the last for a comparison.
    last = deque(islice(examples, sum(lengths)), maxlen=1)
    if last and serialize(encode(last[0])) != readers[-1].read([lengths[-1] - 1])[0]:
        raise DataError(
            f"{directory} was started with other images or another order; delete it to "
            "start over"
        )
    with ThreadPoolExecutor() as pool:
        while batch := list(map(encode, islice(examples, shard_size))):
            temporary = directory / "shard.tmp"
            writer = array_record.ArrayRecordWriter(str(temporary), OPTIONS)
            for record in pool.map(serialize, batch):
                writer.write(record)
            writer.close()
            shards.append(temporary.replace(directory / f"{stem}-{len(shards):05d}"))
            lengths.append(len(batch))
    if not shards:
        raise DataError(f"{info.name} has no image in split {split}")
    for i, shard in enumerate(shards):
        shards[i] = shard.replace(directory / f"{stem}-{i:05d}-of-{len(shards):05d}")
    size = sum(shard.stat().st_size for shard in shards)
    return splits.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size)


def shrink(encoded: bytes, short_side: int) -> bytes:
    """Shrink an encoded image to a JPEG with the given short side.

    An image whose short side is not longer, or that has more than 8 bits per channel,
    is returned unchanged.
    """
    from PIL import Image

    image = Image.open(io.BytesIO(encoded))
    scale = short_side / min(image.size)
    if scale >= 1 or stored_values(image, encoded) is not None:
        return encoded
    image = image if image.mode in ("L", "RGB") else image.convert("RGB")
    size = [round(side * scale) for side in image.size]
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()
