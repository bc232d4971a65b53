"""Tests that the readers "tf.data" and "threads" yield bit-identical batches."""

import io
import os
import shutil
import threading
import time

import jax
import mini_runs
import numpy as np
import pytest
import tensorflow_datasets as tfds
import toy
from datasets import assert_batches_equal, digits_config, encode, folder_config
from numpy.testing import assert_array_equal
from PIL import Image

import hivit_jax
from benchmarks import photographs
from hivit_jax import config as configs
from hivit_jax import inputs
from hivit_jax.data import loader, order, tf_data
from hivit_jax.data.crc32c import HAS_GOOGLE_CRC32C
from hivit_jax.data.sources import registry
from hivit_jax.errors import ConfigError, DataError
from hivit_jax.main import main
from hivit_jax.reporting import metrics

pytestmark = pytest.mark.slow  # importing tensorflow takes over 10 s


@pytest.fixture(scope="module")
def tf():
    """Return tensorflow.

    A fixture imports tensorflow, so that collecting the tests does not import it.
    """
    return tf_data.tensorflow()


# (height, width), options of the JPEG. Crops of the last two may exceed the canvas.
JPEGS = [
    ((48, 64), dict(quality=90)),
    ((47, 63), dict(subsampling=0)),
    ((61, 45), dict(subsampling=1, quality=60)),
    ((33, 95), dict(subsampling=2, quality=95)),
    ((50, 50), dict(restart_marker_blocks=3)),
    ((40, 70), dict(optimize=True)),
    ((9, 13), {}),
    ((80, 140), {}),
    ((120, 75), {}),
]
COUNT = 40  # training images; an epoch has five steps


def images(damaged=()):
    """Return (name, content) of 40 files of many kinds.

    Args:
      damaged: indices of files that `DAMAGES` damage, in this order.
    """
    random, files = np.random.RandomState(0), []
    photos = [*photographs.photographs().values()]
    for index in range(COUNT):
        size, options = JPEGS[index % len(JPEGS)]
        image = photographs.variant(photos[index % 7], index, size[::-1])
        suffix, kind = "jpg", "JPEG"
        if index == 5:
            image = image.convert("L")
        elif index == 11:
            image = image.convert("CMYK")
        elif index == 17:
            options = options | dict(progressive=True)
        elif index == 23:
            suffix, kind, options = "png", "PNG", {}
        elif index == 29:
            exif = Image.Exif()
            exif[0x0112] = 6  # rotated
            options = options | dict(exif=exif)
        content = encode(image, kind, **options)
        if index in damaged:
            content = DAMAGES[damaged.index(index)](content, random)
        files.append((f"{index % 3}/{index:02}.{suffix}", content))
    return files


def with_marker(content, random):
    """Overwrite two bytes of the compressed data with a start-of-frame marker."""
    return content[:-200] + b"\xff\xc3" + content[-198:]


# Content of a file and random numbers -> damaged content.
DAMAGES = [
    lambda content, random: content[: len(content) // 2],
    lambda content, random: b"",
    lambda content, random: b"no image",
    with_marker,
    # This file has wrong pixels but is readable.
    lambda content, random: content[:-60] + random.bytes(58) + content[-2:],
    lambda content, random: content[:300],
]
DAMAGED = (0, 9, 14, 18, 27, 36)  # indices of files


def write_folder(root, damaged=()):
    """Write the files of `images` as class folders: 40 in train, 11 of them in val."""
    for split, files in (("train", images(damaged)), ("val", images(damaged)[:11])):
        for name, content in files:
            path = root / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


class Kinds(tfds.core.GeneratorBasedBuilder):
    """TFDS dataset of the files that `images` returns."""

    VERSION = tfds.core.Version("1.0.0")
    damaged = ()

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(num_classes=3),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, manager):
        counts = {"train": COUNT, "validation": 11}
        return {name: self._generate_examples(n) for name, n in counts.items()}

    def _generate_examples(self, count):
        for name, content in images(self.damaged)[:count]:
            yield name, {"image": io.BytesIO(content), "label": int(name[0])}


def write_tfds(root, file_format, damaged=()):
    """Write the dataset in two shards per split."""
    builder = Kinds(data_dir=root, file_format=file_format)
    builder.damaged = damaged
    download = tfds.download.DownloadConfig(num_shards=2)
    builder.download_and_prepare(download_config=download)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Replace the user's cache directory with an empty one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        registry._open.cache_clear()
        yield


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Return {name: directory}: datasets in three formats, also with damaged files.

    The names are "folder", "tfrecord", "array_record", "folder damaged" and so on.
    """
    by_format = {}
    for suffix, damaged in (("", ()), (" damaged", DAMAGED)):
        root = by_format[f"folder{suffix}"] = tmp_path_factory.mktemp("folder")
        write_folder(root, damaged)
        for file_format in ("tfrecord", "array_record"):
            root = by_format[file_format + suffix] = tmp_path_factory.mktemp(
                file_format
            )
            write_tfds(root, file_format, damaged)
    return by_format


@pytest.fixture
def loaded(monkeypatch):
    """Return a list that receives the index of each example that a thread loads."""
    indices, load = [], tf_data.TfReader._load_arrays

    def record(self, bucket, index, epoch):
        indices.append(int(index))
        return load(self, bucket, index, epoch)

    monkeypatch.setattr(tf_data.TfReader, "_load_arrays", record)
    return indices


def config_of(roots, name, **overrides):
    """Return the config of a dataset in `roots`, with the reader "threads"."""
    kind = "folder" if name.startswith("folder") else "kinds"
    return folder_config(roots[name], data__name=kind, **overrides)


def with_tf(config):
    """Return a copy of a config with the reader "tf.data"."""
    config = config.copy_and_resolve_references()
    config.data.reader = "tf.data"
    return config


def assert_readers_agree(config, *steps):
    """Check that both readers yield equal training and evaluation batches."""
    config_with_tf = with_tf(config)
    assert_batches_equal(
        inputs.train_batches(config_with_tf, *steps),
        inputs.train_batches(config, *steps),
    )
    assert_batches_equal(
        inputs.eval_batches(config_with_tf), inputs.eval_batches(config)
    )


@pytest.mark.parametrize("name", ["folder", "tfrecord", "array_record"])
@pytest.mark.parametrize("randaugment", [False, True])
def test_readers_yield_equal_batches(roots, name, randaugment):
    """Batches agree across an epoch boundary, and with a late first step."""
    config = config_of(roots, name, data__randaugment=randaugment)
    assert_readers_agree(config, 0, 7)
    for steps in ((3, 6), (100_000, 100_002)):
        assert_batches_equal(
            inputs.train_batches(with_tf(config), *steps),
            inputs.train_batches(config, *steps),
        )


@pytest.mark.parametrize(
    "overrides",
    [
        {"data__crop_scale": (1.0, 1.0)},
        {"data__canvas": 0},
        {"data__canvas": 24},
        {"data__workers": 5, "data__interpolation": "bilinear", "seed": 7},
        {"data__antialias": False},
        {"model__in_channels": 1, "data__mean": (0.5,), "data__std": (0.5,)},
    ],
)
def test_readers_yield_equal_batches_with_other_keys(roots, overrides):
    assert_readers_agree(config_of(roots, "folder", **overrides), 2, 6)


@pytest.mark.parametrize("name", ["folder", "tfrecord"])
def test_ordinary_images_are_decoded_by_tensorflow(roots, name, loaded):
    """Threads load only the CMYK JPEG, the progressive JPEG and the PNG."""
    config = config_of(roots, name, data__canvas=160)
    assert_batches_equal(
        inputs.train_batches(with_tf(config), 0, 5), inputs.train_batches(config, 0, 5)
    )
    source = registry.open_source(config.data, "train")
    contents = dict(images())
    left_to_threads = [
        contents[f"{k % 3}/{k}.{end}"] for k, end in ((11, "jpg"), (17, "jpg"))
    ]
    left_to_threads.append(contents["2/23.png"])
    assert sorted(source.sample(i)["image"] for i in loaded) == sorted(left_to_threads)


def test_large_crops_are_resized_by_the_host(roots, loaded):
    """Threads load the three files that TensorFlow does not decode, and large crops.

    Crops that exceed the canvas come from at most two of the nine image sizes.
    """
    config = config_of(roots, "folder", data__crop_scale=(0.9, 1.0))
    batches = list(inputs.train_batches(with_tf(config), 0, 5))
    assert_batches_equal(batches, inputs.train_batches(config, 0, 5))
    assert 8 < len(loaded) < 20


@pytest.mark.parametrize("name", ["folder", "tfrecord", "array_record"])
def test_readers_mark_the_same_unreadable_images(roots, name, capfd, monkeypatch):
    """Each unreadable image is logged once per process."""
    monkeypatch.setattr(loader, "_logged", set())
    config = config_of(roots, f"{name} damaged")
    batches = list(inputs.train_batches(with_tf(config), 0, 10))
    errors = capfd.readouterr().err
    assert_batches_equal(batches, inputs.train_batches(config, 0, 10))
    unreadable = sum(batch["unreadable"].sum() for batch in batches)
    # In each of the two epochs, five of the six damaged files are unreadable.
    assert unreadable == 2 * 5
    assert errors.count("cannot read ") == 5
    # The first reader has already logged these images.
    assert "cannot read " not in capfd.readouterr().err
    assert_batches_equal(
        inputs.eval_batches(with_tf(config)), inputs.eval_batches(config)
    )


def test_threads_load_batches_that_tensorflow_fails_to_read(roots, tmp_path, loaded):
    """TensorFlow fails on missing and empty files, and on wrong checksums."""
    root = tmp_path / "folder"
    shutil.copytree(roots["folder"], root)
    paths = sorted(root.glob("train/*/*"))
    paths[4].unlink()
    paths[4].symlink_to("nowhere")
    paths[20].write_bytes(b"")
    config = folder_config(root)
    assert_batches_equal(
        inputs.train_batches(with_tf(config), 0, 15),
        inputs.train_batches(config, 0, 15),
    )
    # 15 steps are three epochs. Threads load each of the two files once per epoch: in
    # the first epoch with its whole batch, because TensorFlow failed, later alone.
    assert loaded.count(4) == loaded.count(20) == 3
    shutil.copytree(roots["tfrecord"], tmp_path / "records")
    shard = sorted((tmp_path / "records").glob("kinds/*/*train*00000*"))[0]
    content = bytearray(shard.read_bytes())
    content[8:12] = b"head"  # checksum of the first record's length
    content[-4:] = b"data"  # checksum of the last record's data
    shard.write_bytes(content)
    config = folder_config(tmp_path / "records", data__name="kinds")
    batches = list(inputs.train_batches(with_tf(config), 0, 5))
    assert_batches_equal(batches, inputs.train_batches(config, 0, 5))
    # Threads verify checksums only if google-crc32c is installed.
    assert sum(batch["weight"].sum() for batch in batches) == 40 - 2 * HAS_GOOGLE_CRC32C


def test_batches_of_two_processes_concatenate_to_the_batch(roots, monkeypatch):
    config = config_of(roots, "folder damaged")
    expected, per_process = list(inputs.train_batches(config, 3, 7)), []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for index in range(2):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        per_process.append(list(inputs.train_batches(with_tf(config), 3, 7)))
        assert_readers_agree(config, 3, 7)
    joined = [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for parts in zip(*per_process, strict=True)
    ]
    assert_batches_equal(joined, expected)


def test_tf_dataset_yields_the_training_batches(roots, tf):
    """Each iteration over the `tf.data.Dataset` starts at first_step.

    A synthetic dataset is an error.
    """
    config = config_of(roots, "folder damaged")
    dataset = hivit_jax.tf_dataset(config, 3, 7)
    assert isinstance(dataset, tf.data.Dataset)
    spec = dataset.element_spec
    assert spec["image"] == tf.TensorSpec((8, 64, 64, 3), tf.uint8)
    assert spec["box"] == tf.TensorSpec((8, 2, 3), tf.float32)
    for _ in range(2):
        assert_batches_equal(
            dataset.as_numpy_iterator(), hivit_jax.train_batches(config, 3, 7)
        )
    skipped = dataset.skip(2).map(lambda batch: batch["index"])
    expected = [b["index"] for b in inputs.train_batches(config, 5, 7)]
    assert_array_equal([*skipped.as_numpy_iterator()], expected)
    with pytest.raises(ConfigError, match="name='synthetic': expected a dataset of"):
        hivit_jax.tf_dataset(digits_config(data__name="synthetic"), 0, 1)


RECIPE = """
def get_config():
    return dict(
        task="toy:Segmentation",
        batch_size=8,
        model=dict(name="cells"),
        data=dict(name="toy:Maps", dir={!r}),
    )
"""


def test_readers_yield_equal_batches_of_two_buckets(tmp_path):
    """The last batch of each bucket is padded with index -1."""
    toy.write_dataset(tmp_path)
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.format(str(tmp_path)))
    config = configs.load(str(recipe))
    batches, expected = (
        [*inputs.train_batches(cfg, 0, 9), *inputs.eval_batches(cfg)]
        for cfg in (with_tf(config), config)
    )
    assert len({batch["image"].shape for batch in batches}) == 2
    assert min(batch["index"].min() for batch in batches) == -1
    assert sum(batch["unreadable"].sum() for batch in batches) > 0
    mini_runs.assert_identical(batches, expected)


def test_wrong_label_ends_the_run(roots, monkeypatch, tf):
    config = config_of(roots, "folder")
    source = registry.open_source(config.data, "train")
    monkeypatch.setattr(source, "labels", np.where(source.labels == 2, 10, 0))
    message = r"2/\d+\.\w+: expected .* 0 to 9, found 10; .*num_classes=10"
    with pytest.raises(DataError, match=message):
        list(inputs.train_batches(with_tf(config), 0, 5))
    with pytest.raises(tf.errors.OpError, match="found 10"):
        list(hivit_jax.tf_dataset(config, 0, 5))


def test_threads_and_batches_in_memory_are_bounded(roots, monkeypatch):
    lock, running, peak, num_planned = threading.Lock(), [0], [0], [0]
    load, plan = tf_data.TfReader._load_arrays, order.train_plan

    def load_slowly(self, *arguments):
        with lock:
            running[0] += 1
            peak[0] = max(peak[0], running[0])
        time.sleep(0.01)
        with lock:
            running[0] -= 1
        return load(self, *arguments)

    def count_planned(*arguments):
        for batch in plan(*arguments):
            num_planned[0] += 1
            yield batch

    monkeypatch.setattr(tf_data.TfReader, "_load_arrays", load_slowly)
    monkeypatch.setattr(order, "train_plan", count_planned)
    config = with_tf(config_of(roots, "array_record", data__workers=3))
    batches = inputs.train_batches(config, 0, 1000)
    for _ in range(4):
        next(batches)
    time.sleep(1)
    assert 1 < peak[0] <= 3
    # 4 batches were delivered. The others are being loaded, prefetched or planned.
    assert num_planned[0] <= 4 + tf_data.BATCHES_IN_PARALLEL + 3
    began = time.monotonic()
    batches.close()  # while examples are being read
    assert time.monotonic() - began < 10


def test_accelerators_are_left_to_jax(tf):
    assert tf.config.get_visible_devices("GPU") == []
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"]


@pytest.mark.extras
@pytest.mark.usefixtures("minimal_output", "single_device")
def test_training_with_tf_data_is_bit_identical(roots, tmp_path, monkeypatch):
    """Runs with the two readers have equal metrics and bit-identical checkpoints."""
    workdirs = {reader: tmp_path / reader for reader in ("threads", "tf.data")}
    for reader, workdir in workdirs.items():
        flags = mini_runs.arguments(
            "photographs",
            data__name="folder",
            data__dir=roots["folder damaged"],
            data__reader=reader,
            data__canvas=80,
            data__max_unreadable=0.5,
            model__image_size=64,
            total_steps=4,
            eval_every=2,
        )
        assert main([*flags, f"--workdir={workdir}"]) == 0
    lines = [
        [
            {k: v for k, v in line.items() if k not in MEASURED}
            for line in metrics.read(workdir / "metrics.jsonl")
        ]
        for workdir in workdirs.values()
    ]
    assert lines[0] == lines[1]
    assert sum("eval/loss" in line for line in lines[0]) == 2
    arrays = [mini_runs.saved_arrays(workdir, 4) for workdir in workdirs.values()]
    mini_runs.assert_identical(*arrays)


# Metrics that depend on measured time
MEASURED = (
    "images_per_second",
    "images_per_second_per_chip",
    "seconds_left",
    "input_bound",
    "time",
)
