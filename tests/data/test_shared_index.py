"""Tests that the processes of a run share the indexing of a bucket."""

import json
import shutil
from collections import Counter

import mini_runs
import pytest
from buckets import serve
from prepared import prepare

from hivit_jax.data import tfrecord
from hivit_jax.data.sources.tfds import Tfds

pytestmark = [pytest.mark.slow, pytest.mark.processes]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Return a directory with a small dataset."""
    root = tmp_path_factory.mktemp("prepared")
    prepare(root, "tfrecord")
    return root


@pytest.fixture
def bucket(prepared, tmp_path):
    """Serve the dataset as a bucket, in the directories "one" and "other"."""
    root = tmp_path / "objects"
    for name in ("one", "other"):
        shutil.copytree(prepared, root / name)
    with serve(root) as server:
        yield server


OPEN = """
import json, sys, zlib
from hivit_jax.data.sources.tfds import Tfds
from hivit_jax.distributed import processes
from hivit_jax.errors import run_command

address, count, index, *directories = sys.argv[1:]
processes.connect(address, int(count), int(index), 60.0)

def open_all():
    for directory in directories:
        source = Tfds("noise_images", directory, "train")
        images = [source.sample(i)["image"] for i in range(len(source))]
        print(json.dumps([zlib.crc32(image) for image in images]))

processes.exit_together(run_command(open_all))
"""


def open_together(caches, *directories):
    """Open datasets in several processes.

    Args:
      caches: one directory per process, which replaces the user's cache directory.

    Returns:
      [(exit code, last line of stdout, stderr)]; without the second item if stdout is
        empty.
    """
    address = mini_runs.free_address()
    started = [
        mini_runs.start_process(
            *("-c", OPEN, address, len(caches), index, *directories),
            XDG_CACHE_HOME=cache,
        )
        for index, cache in enumerate(caches)
    ]
    outputs = [process.communicate(timeout=120) for process in started]
    return [
        (process.returncode, *out.splitlines()[-1:], err)
        for process, (out, err) in zip(started, outputs, strict=True)
    ]


def take_reads_of_record_headers(bucket):
    """Return {(key, range): number of reads of a header}; clear `bucket.requests`."""
    found = Counter()
    for _, key, byte_range in bucket.requests:
        first, _, last = byte_range.removeprefix("bytes=").partition("-")
        if last and int(last) + 1 - int(first) == tfrecord.HEADER:
            found[key, byte_range] += 1
    bucket.requests.clear()
    return found


def test_each_file_is_indexed_once(bucket, tmp_path):
    """Two processes together read each record header once, and load equal images."""
    [alone] = open_together([tmp_path / "alone"], "gs://bucket/one")
    assert alone[0] == 0, alone
    assert "indexing 4 of 4 files of gs://bucket/one/" in alone[2]
    expected = take_reads_of_record_headers(bucket)
    assert len(expected) == 24
    caches = [tmp_path / name for name in "ab"]
    for code, images, err in open_together(caches, "gs://bucket/other"):
        assert (code, images) == (0, alone[1]), err
        assert "indexing 2 of 4 files of gs://bucket/other/" in err
    found = take_reads_of_record_headers(bucket)
    assert {*found.values()} == {1}
    renamed = {(key.replace("other/", "one/"), span) for key, span in found}
    assert renamed == expected.keys()
    assert [n for key, n in bucket.writes.items() if key.startswith("other/")] == [1]
    assert not any(cache.exists() for cache in caches)


@pytest.mark.extras
def test_each_process_caches_the_index_if_only_one_had_it(
    bucket, tmp_path, monkeypatch
):
    """The bucket is read-only, so each process saves the index in its own cache.

    Of the two runs with two processes, the second reads no record headers.
    """
    bucket.read_only = True
    caches = [tmp_path / name for name in "ab"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches[0]))
    source = Tfds("noise_images", "gs://bucket/one", "train")
    assert len([*caches[0].glob("hivit_jax/*.npz")]) == 1
    take_reads_of_record_headers(bucket)
    for _ in range(2):
        results = open_together(caches, "gs://bucket/one")
        assert [code for code, *_ in results] == [0, 0], results
        assert len(json.loads(results[0][1])) == len(source)
        assert results[0][1] == results[1][1]
        reads = take_reads_of_record_headers(bucket)
        assert [len([*cache.glob("hivit_jax/*.npz")]) for cache in caches] == [1, 1]
    assert not reads


def test_indexing_error_of_one_process_ends_all_processes(bucket, tmp_path):
    """All processes exit with the same error."""
    [shard] = bucket.root.glob("one/noise_images/1.0.0/*train*00001-of*")
    shard.unlink()
    caches = [tmp_path / name for name in "ab"]
    for code, *_, err in open_together(caches, "gs://bucket/one"):
        assert code == 4, err
        mini_runs.check_message(
            "\n".join(err.splitlines()[-2:]), [f"{shard.name} does not exist", "404"]
        )
