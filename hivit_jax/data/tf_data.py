"""Reader that loads batches with tf.data, byte-identical to `loader.Loader`.

TensorFlow reads local image files and tfrecords, and decodes and crops ordinary JPEGs.
The `Loader`, called through `tf.numpy_function`, reads all other examples: from other
sources, in other formats, in damaged files, for evaluation, and for transforms that
resize on the host.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from hivit_jax.data import transforms
from hivit_jax.data.decoding import may_decode_crops, ordinary_jpeg_size
from hivit_jax.data.loader import Batch, Loader, available_cores
from hivit_jax.data.order import PlannedBatch
from hivit_jax.data.shapes import LOADER_ARRAYS
from hivit_jax.data.sources.base import Record, Source
from hivit_jax.errors import ConfigError, DataError, require

READER = "tf.data"  # value of `data.reader`
BATCHES_IN_PARALLEL = 2  # one batch is assembled while the next is decoded
NO_RECORD = Record("", 0, 0)

Plan = Callable[[], Iterable[PlannedBatch]]  # returns a new iterator at every call


@cache
def tensorflow() -> ModuleType:
    """Import and return tensorflow, which then leaves all accelerators to JAX.

    Raises:
      MissingPackage: tensorflow is not installed.
    """
    # Without these variables, tensorflow logs messages when it is imported.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    tf = require("tensorflow", "hivit-jax[tf]")
    for kind in ("GPU", "TPU"):
        # RuntimeError: the program has already initialized tensorflow's devices.
        with contextlib.suppress(RuntimeError):
            tf.config.set_visible_devices([], kind)
    return tf


class TfReader:
    """Loads the batches of a plan with tf.data.

    Args:
      source: one split of a dataset.
      transform: converts each example to arrays.
      seed: seed of the transform's random numbers.
      local_batch_size: examples that this process reads per batch.
      threads: number of threads; 0: one per core.
      plan: function that returns the planned batches.

    Raises:
      ConfigError: the transform's buckets have different arrays.
      MissingPackage: tensorflow is not installed.
    """

    def __init__(
        self,
        source: Source,
        transform: transforms.Transform,
        seed: int,
        local_batch_size: int,
        threads: int,
        plan: Plan,
    ):
        self._tf = tensorflow()
        self._source, self._transform, self._seed = source, transform, seed
        self._local_batch_size, self._plan = local_batch_size, plan
        self._threads = threads or available_cores()
        self._loader = Loader(source, transform, seed, 1)
        self._spec = self._element_spec()
        # `type` instead of isinstance, because subclasses may override `__call__`.
        is_image = type(transform) is transforms.ImageTransform
        self._uses_tf_decoder = is_image and transform.copies_crops
        self._unreadable: set[int] = set()  # indices of examples
        self._error: DataError | None = None

    def batches(self) -> Iterator[Batch]:
        """Yield the batches. Their arrays are read-only.

        Raises:
          DataError: see `Transform.__call__`.
        """
        try:
            yield from self.dataset().as_numpy_iterator()
        except self._tf.errors.OpError as error:
            if self._error is None:
                raise
            raise self._error from error

    def dataset(self) -> Any:
        """Return a `tf.data.Dataset` of the batches.

        At most `BATCHES_IN_PARALLEL` + 1 batches are in memory in addition to the
        caller's batches.
        """
        tf = self._tf
        signature = {
            name: tf.TensorSpec([self._local_batch_size], dtype)
            for name, dtype in {
                **dict.fromkeys(("index", "epoch", "bucket"), tf.int64),
                **dict.fromkeys(("start", "stop", "label"), tf.int64),
                "file": tf.string,
            }.items()
        }
        rows = tf.data.Dataset.from_generator(self._rows, output_signature=signature)
        dataset = rows.map(self._load_batch, BATCHES_IN_PARALLEL, deterministic=True)
        options = tf.data.Options()
        options.autotune.enabled = False
        options.threading.private_threadpool_size = self._threads
        options.threading.max_intra_op_parallelism = 1
        return dataset.prefetch(1).with_options(options)

    def _element_spec(self) -> dict[str, Any]:
        """Return the `tf.TensorSpec` of each array of an example."""
        buckets = self._transform.shapes
        if any(bucket.keys() != buckets[0].keys() for bucket in buckets):
            raise ConfigError(
                "data.reader='tf.data': expected the same arrays in all buckets, found "
                + "; ".join(", ".join(bucket) for bucket in buckets)
            )
        spec = {name: self._tf.TensorSpec([], d) for name, d in LOADER_ARRAYS.items()}
        for name, first in buckets[0].items():
            # Sides that differ between buckets have no static size.
            shapes = [bucket[name].shape for bucket in buckets]
            sides = [
                s[0] if len({*s}) == 1 else None for s in zip(*shapes, strict=True)
            ]
            spec[name] = self._tf.TensorSpec(sides, first.dtype)
        return dict(sorted(spec.items()))

    def _rows(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield the records of each planned batch, as arrays [local_batch_size]."""
        for bucket, indices, epochs in self._plan():
            padding = (0, self._local_batch_size - len(indices))
            indices = np.pad(indices, padding, constant_values=-1)
            records = [*map(self._record, indices.tolist())]
            yield {
                "index": indices,
                "epoch": np.pad(epochs, padding),
                "bucket": np.full_like(indices, bucket),
                "file": np.array([os.fsencode(r.file) for r in records], object),
                "start": np.array([r.start for r in records], np.int64),
                "stop": np.array([r.stop for r in records], np.int64),
                "label": np.array([r.label for r in records], np.int64),
            }

    def _record(self, index: int) -> Record:
        """Return an example's record, or NO_RECORD if TensorFlow cannot read it."""
        if index < 0:
            return NO_RECORD
        if self._uses_tf_decoder and index not in self._unreadable:
            with contextlib.suppress(Exception):  # a damaged file, left to `_load`
                if record := self._source.record(index):
                    return record
        self._source.ask(index)
        return NO_RECORD

    def _load_batch(self, rows: dict[str, Any]) -> dict[str, Any]:
        """Return the arrays of a batch.

        If TensorFlow fails to read an example, `_load` reads the whole batch again.
        """
        batches = self._one_batch(rows, self._load)
        if self._uses_tf_decoder:
            decoded = self._one_batch(rows, self._decode).ignore_errors()
            batches = decoded.concatenate(batches).take(1)
        return batches.get_single_element()

    def _one_batch(self, rows: dict[str, Any], load: Callable) -> Any:
        """Return a dataset with one batch, whose examples are loaded in parallel."""
        elements = self._tf.data.Dataset.from_tensor_slices(rows)
        elements = elements.map(load, self._threads, deterministic=True)
        shapes = {name: spec.shape for name, spec in self._spec.items()}
        return elements.padded_batch(
            self._local_batch_size, shapes, drop_remainder=True
        )

    def _load(self, row: dict[str, Any]) -> dict[str, Any]:
        """Load an example with the `Loader`, which marks damaged ones as unreadable."""
        tf, spec = self._tf, self._spec
        arrays = tf.numpy_function(
            self._load_arrays,
            [row["bucket"], row["index"], row["epoch"]],
            [each.dtype for each in spec.values()],
        )
        return {
            name: tf.ensure_shape(array, spec[name].shape)
            for name, array in zip(spec, arrays, strict=True)
        }

    def _load_arrays(
        self, bucket: np.int64, index: np.int64, epoch: np.int64
    ) -> list[np.ndarray]:
        batch = self._loader.empty_batch(int(bucket), int(index >= 0))
        if index >= 0:
            try:
                self._loader.fill(batch, int(bucket), 0, index[None], epoch[None])
            except DataError as error:
                self._error = error
                raise
            if batch["unreadable"][0]:
                self._unreadable.add(int(index))
        return [batch[name][0] for name in self._spec]

    def _decode(self, row: dict[str, Any]) -> dict[str, Any]:
        """Load an example with TensorFlow if possible, otherwise with the `Loader`."""
        return self._tf.cond(
            self._tf.equal(row["file"], ""),
            lambda: self._load(row),
            lambda: self._decode_record(row),
        )

    def _decode_record(self, row: dict[str, Any]) -> dict[str, Any]:
        """Read a record and decode its crop if possible, otherwise call `_load`."""
        tf, (encoded, label) = self._tf, self._read(row)
        window = tf.numpy_function(
            self._window, [encoded, label, row["index"], row["epoch"]], tf.int32
        )
        window.set_shape([6])
        return tf.cond(
            window[2] > 0,
            lambda: self._decode_window(row, encoded, label, window),
            lambda: self._load(row),
        )

    def _read(self, row: dict[str, Any]) -> tuple[Any, Any]:
        """Return (encoded image, label int64) of a record."""
        tf, keys = self._tf, self._source.example_keys
        if not keys:
            return tf.io.read_file(row["file"]), row["label"]
        # A tfrecord contains 12 bytes before the data and 4 bytes after the data.
        records = tf.raw_ops.TFRecordDatasetV2(
            filenames=[row["file"]],
            compression_type="",
            buffer_size=row["stop"] - row["start"] + 16,
            byte_offsets=[row["start"] - 12],
        )
        string = {"output_types": [tf.string], "output_shapes": [[]]}
        first = tf.raw_ops.TakeDataset(input_dataset=records, count=1, **string)
        (record,) = tf.raw_ops.DatasetToSingleElement(dataset=first, **string)
        types = zip(keys, (tf.string, tf.int64), strict=True)
        features = {name: tf.io.FixedLenFeature([], dtype) for name, dtype in types}
        example = tf.io.parse_single_example(record, features)
        return example[keys[0]], example[keys[1]]

    def _window(
        self, encoded: bytes, label: np.int64, index: np.int64, epoch: np.int64
    ) -> np.ndarray:
        """Return the window that TensorFlow decodes, and the crop in it, int32 [6].

        Returns:
          Top, left, height and width of the decoded window; left and width of the crop
          inside the window. The window contains one more column on each side of the
          crop, because the decoder interpolates color between neighboring columns. If
          `_load` must read the example, all numbers are 0.
        """
        nothing = np.zeros(6, np.int32)
        size = ordinary_jpeg_size(encoded)
        if not size or not may_decode_crops(encoded):
            return nothing
        draws = transforms.uniforms(self._seed, int(epoch), int(index))
        box = self._transform.copied_box(*size, int(label), draws)
        if box is None:
            return nothing
        left, right = min(box.left, 1), min(size[1] - box.left - box.width, 1)
        window = box.top, box.left - left, box.height, left + box.width + right
        return np.array([*window, left, box.width], np.int32)

    def _decode_window(
        self, row: dict[str, Any], encoded: Any, label: Any, window: Any
    ) -> dict[str, Any]:
        """Decode a crop and return the arrays of `ImageTransform` and `Loader`."""
        tf = self._tf
        height, left, width = window[2], window[4], window[5]
        image = tf.io.decode_and_crop_jpeg(
            encoded, window[:4], channels=3, dct_method="INTEGER_ACCURATE"
        )
        spans = tf.stack([[0, height, height], [0, width, width]])
        return {
            "box": tf.cast(spans, tf.float32),
            "image": image[:, left : left + width],
            "index": tf.cast(row["index"], tf.int32),
            "label": tf.cast(label, tf.int32),
            "unreadable": tf.constant(0.0),
            "weight": tf.constant(1.0),
        }
