"""Tests of datasets in a bucket: equality with local datasets, errors, copies."""

import errno
import os
import shutil
import struct
import threading

import pytest
from buckets import serve
from datasets import assert_batches_equal, folder_config
from prepared import prepare

from hivit_jax import inputs
from hivit_jax.data.records import Records
from hivit_jax.data.shard_cache import ShardCache
from hivit_jax.data.sources import registry
from hivit_jax.data.sources.tfds import OPENERS, Tfds
from hivit_jax.data.storage import StorageError
from hivit_jax.errors import ConfigError, ProcessDataError

pytestmark = [pytest.mark.usefixtures("cache_directory"), pytest.mark.slow]
VERSION = "noise_images/1.0.0"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Return a directory with two subdirectories: the dataset in each file format."""
    root = tmp_path_factory.mktemp("prepared")
    for file_format in ("tfrecord", "array_record"):
        prepare(root / file_format, file_format)
    return root


@pytest.fixture
def bucket(prepared, tmp_path):
    """Serve a copy of the datasets in `prepared` as a bucket."""
    root = tmp_path / "objects"
    shutil.copytree(prepared, root)
    with serve(root) as server:
        yield server


def config(directory, **overrides):
    """Return the config of the prepared dataset in a local or bucket directory."""
    return folder_config(directory, data__name="noise_images", **overrides)


def batches(cfg):
    """Return four training batches, more than an epoch, and the evaluation batches."""
    registry._open.cache_clear()
    OPENERS["array_record"].cache_clear()
    return [*inputs.train_batches(cfg, 0, 4), *inputs.eval_batches(cfg)]


def test_tfrecords_of_a_bucket_equal_local_files(bucket, prepared):
    """The index is made once per split and saved beside the files.

    Later runs read each record once per use, and repeat refused and truncated reads.
    """
    expected = batches(config(prepared / "tfrecord"))
    cfg = config("gs://bucket/tfrecord")
    assert_batches_equal(batches(cfg), expected)
    assert len(list(bucket.root.glob(f"tfrecord/{VERSION}/*.npz"))) == 2
    bucket.requests.clear()
    bucket.failures, bucket.truncations_left = [503, 429, 500], 2
    assert_batches_equal(batches(cfg), expected)
    # At most 4 x 8 training images and 6 evaluation images are read, and 5 reads are
    # repeated.
    assert bucket.reads("-of-") <= 4 * 8 + 6 + 5
    assert_batches_equal(batches(config("s3://bucket/tfrecord")), expected)


def test_one_thread_has_several_reads_in_flight(bucket):
    """Reads start when a batch is planned, not when its examples are decoded."""
    cfg = config("gs://bucket/tfrecord", batch_size=24, data__workers=1)
    registry.open_source(cfg.data, "train")
    counts, lock = [0], threading.Lock()  # numbers of reads in flight

    def count(change):
        with lock:
            counts.append(counts[-1] + change)

    bucket.on_answer, bucket.delay = count, 0.05
    list(inputs.train_batches(cfg, 0, 1))
    assert max(counts) >= 3


def test_each_request_for_a_record_starts_a_read(tmp_path):
    """At the end of an epoch, the next epoch may request a record that is in flight."""
    (tmp_path / "objects").mkdir()
    (tmp_path / "objects" / "one").write_bytes(b"first")
    with serve(tmp_path / "objects") as bucket:
        records = Records(["gs://bucket/one"])
        for _ in range(2):
            records.ask(0)
        assert [records.read(0), records.read(0)] == [b"first"] * 2
        assert bucket.reads("one") == 2
        assert records.read(0) == b"first"
        assert bucket.reads("one") == 3


def test_index_of_a_read_only_bucket_is_cached_locally(
    bucket, prepared, cache_directory
):
    bucket.read_only = True
    expected = batches(config(prepared / "tfrecord"))
    for _ in range(2):
        assert_batches_equal(batches(config("gs://bucket/tfrecord")), expected)
        assert len(list(cache_directory.glob("hivit_jax/hivit_jax_index_*.npz"))) == 2
        assert not list(bucket.root.glob(f"tfrecord/{VERSION}/*.npz"))
        num_requests = len(bucket.requests)
        bucket.requests.clear()
    # The second run reads records and small files, but makes no index.
    assert num_requests < 60


def test_slices_of_splits_equal_local_slices(bucket, prepared):
    for split in ("train[5:-3]", "validation[:50%]"):
        local = Tfds("noise_images", str(prepared / "tfrecord"), split)
        remote = Tfds("noise_images", "gs://bucket/tfrecord", split)
        assert len(local) == len(remote)
        for i in range(len(local)):
            assert local.sample(i) == remote.sample(i)
            assert local.name(i) == remote.name(i)


def test_array_records_of_a_bucket_equal_local_files(bucket, prepared):
    """The error of a refused shard suggests data.cache."""
    expected = batches(config(prepared / "array_record"))
    cfg = config("gs://bucket/array_record")
    assert_batches_equal(batches(cfg), expected)
    bucket.statuses = {"noise_images-train": 403}
    with pytest.raises(StorageError, match=r"cannot access gs://.*\n.*data\.cache=DIR"):
        batches(cfg)


def test_class_folders_in_a_bucket_equal_local_folders(folder):
    """HTTP status 403 ends the run. data.cache is an error for class folders."""
    expected = batches(folder_config(folder))
    with serve(folder) as server:
        cfg = folder_config("gs://bucket")
        assert_batches_equal(batches(cfg), expected)
        source = registry.open_source(cfg.data, "train")
        assert source.ignored == {}
        assert source.name(0).startswith("gs://bucket/train/")
        assert source.size(0) == (48, 64)
        server.statuses = {"train/": 403}
        with pytest.raises(StorageError, match="HTTP status 403"):
            batches(cfg)
    with pytest.raises(ConfigError, match="expected '': only shards"):
        registry.open_source({**cfg.data, "cache": "copies"}, "train")


def test_files_in_a_bucket_are_sorted_and_ignored_as_locally(tmp_path):
    """Buckets and local directories have equal classes, images and ignored files."""
    names = ("train/b/x.png", "train/b/a/z.jpg", "train/b-/y.JPG", "train/a/1.png")
    names += ("train/a/.hidden/2.png", "train/a/notes.txt", "train/README")
    for name in (*names, "val/a/ä.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    for split in ("train", "val"):
        data = folder_config(tmp_path, data__eval_split="val").data
        local = registry.open_source(data, "train" if split == "train" else "test")
        with serve(tmp_path):
            data = folder_config("gs://bucket", data__eval_split="val").data
            remote = registry.open_source(data, "train" if split == "train" else "test")
            assert remote.classes == local.classes == ["a", "b", "b-"]
            assert remote.ignored == local.ignored
            assert len(remote) == len(local)
            for i in range(len(remote)):
                assert remote.sample(i) == local.sample(i)


@pytest.mark.parametrize("level", ["top", "leaf", "none"])
def test_numpy_arrays_in_class_folders_are_images(level, tmp_path):
    """NumPy arrays are images if the directory contains no other images."""
    for name in ("a/1.npy", "b/2.npy", "b/notes.txt"):
        for split in ("train", "val"):
            path = tmp_path / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
    options = dict(data__eval_split="val", data__class_level=level)
    local = registry.open_source(folder_config(tmp_path, **options).data, "train")
    with serve(tmp_path):
        data = folder_config("gs://bucket", **options).data
        remote = registry.open_source(data, "train")
        assert len(remote) == len(local) == 2
        assert [*remote.classes] == [*local.classes]
        assert remote.ignored == local.ignored == {".txt": 1}
        assert [remote.sample(i) for i in (0, 1)] == [local.sample(i) for i in (0, 1)]


def test_errors_of_a_bucket_are_not_unreadable_images(bucket):
    """Errors of the bucket end the run, even with data.max_unreadable=1."""
    cfg = config("gs://bucket/tfrecord", data__max_unreadable=1.0)
    batches(cfg)
    key = f"{VERSION}/noise_images-train.tfrecord-00001-of-00004"
    for status in (403, 503):
        bucket.statuses = {key: status}
        with pytest.raises(
            ProcessDataError, match=f"gs://.*{key}: HTTP status {status}"
        ):
            batches(cfg)
    bucket.statuses, bucket.truncations_left = {}, 10**6
    with pytest.raises(ProcessDataError, match="cannot access"):
        batches(cfg)
    bucket.truncations_left = 0
    (bucket.root / "tfrecord" / key).unlink()
    with pytest.raises(ProcessDataError, match=rf"{key} does not exist \(HTTP .*404"):
        batches(cfg)


def test_damaged_record_is_an_unreadable_image(bucket):
    cfg = config("gs://bucket/tfrecord")
    batches(cfg)
    [path] = bucket.root.glob("tfrecord/noise_images/1.0.0/*train*00002-of*")
    data = bytearray(path.read_bytes())
    data[:8] = struct.pack("<Q", 7)  # wrong length of the first record
    path.write_bytes(data)
    first_epoch = batches(cfg)[:3]
    assert sum(batch["unreadable"].sum() for batch in first_epoch) == 1


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_later_runs_read_the_copies_in_data_cache(
    bucket, prepared, tmp_path, file_format, capfd
):
    """With data.cache, a run copies shards, and later runs read only the copies."""
    expected = batches(config(prepared / file_format))
    cfg = config(f"gs://bucket/{file_format}", data__cache=tmp_path / "cache")
    assert_batches_equal(batches(cfg), expected)
    err = capfd.readouterr().err
    assert f"data.cache={tmp_path}/cache: 4 files are needed, 0.0 GB in total; 0" in err
    indexed = f"indexed gs://bucket/{file_format}/{VERSION} in"
    assert (indexed in err) == (file_format == "tfrecord")
    source = registry.open_source(cfg.data, "train")
    for i in range(len(source)):
        source._cache.fetch(source._paths[source._file_indices[i]])
    copies = tmp_path / "cache/gs/bucket" / file_format / VERSION
    for path in (bucket.root / file_format / VERSION).glob("*-train*"):
        assert (copies / path.name).read_bytes() == path.read_bytes()
    registry.open_source(cfg.data, "test")._cache.stop()
    bucket.statuses = {"-train.": 403}
    assert_batches_equal(batches(cfg)[:4], expected[:4])
    registry.open_source(cfg.data, "test")._cache.stop()
    assert "4 are present" in capfd.readouterr().err


def locate_shard(bucket):
    """Return the address and the path of a shard."""
    [path] = bucket.root.glob("tfrecord/noise_images/1.0.0/*train*00002-of*")
    return f"gs://bucket/{path.relative_to(bucket.root)}", path


def test_partial_copy_is_never_read(bucket, tmp_path):
    """`fetch` returns the address after an error, else the path of a complete copy."""
    address, path = locate_shard(bucket)
    cache = ShardCache(str(tmp_path / "cache"))
    partial_copy = cache.target(address).with_name(f"{path.name}.part")
    partial_copy.parent.mkdir(parents=True)
    # A killed run leaves a partial copy. This one is longer than the object.
    partial_copy.write_bytes(b"x" * 200_000)
    bucket.statuses = {path.name: 503}
    assert cache.fetch(address) == address
    bucket.statuses = {}
    copy = cache.fetch(address)
    assert copy == str(cache.target(address))
    with open(copy, "rb") as file:
        assert file.read() == path.read_bytes()
    assert [*partial_copy.parent.iterdir()] == [cache.target(address)]


def test_caches_that_share_a_directory_download_a_file_once(bucket, tmp_path):
    """Threads stand for processes. Each thread has its own `ShardCache`."""
    address, path = locate_shard(bucket)
    caches = [ShardCache(str(tmp_path / "cache")) for _ in range(4)]
    bucket.delay = 0.05
    threads = [
        threading.Thread(target=cache.fetch, args=(address,)) for cache in caches
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # A copy makes two requests: one for a range, which fails because the file is
    # shorter, and one for the whole file.
    assert bucket.reads(path.name) == 2
    assert os.listdir(tmp_path / "cache/gs/bucket/tfrecord" / VERSION) == [path.name]
    [copy] = {cache.locate_or_request(address) for cache in caches}
    assert copy == str(caches[0].target(address))


def test_files_are_read_from_the_bucket_if_the_disk_is_full(
    bucket, prepared, tmp_path, monkeypatch, capfd
):
    expected = batches(config(prepared / "tfrecord"))

    def fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    cfg = config("gs://bucket/tfrecord", data__cache=tmp_path / "cache")
    assert_batches_equal(batches(cfg), expected)
    assert "No space left on device; files without a copy" in capfd.readouterr().err
