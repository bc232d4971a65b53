"""Tests of files in buckets: ranges, listing, copies, retries and errors."""

import re

import pytest
from buckets import serve

from hivit_jax.data import storage
from hivit_jax.errors import ConfigError

DATA = bytes(range(256)) * 40
KEY = "data/a b ä.bin"


@pytest.fixture
def bucket(tmp_path):
    """Start a server of a bucket with one object."""
    path = tmp_path / "objects" / KEY
    path.parent.mkdir(parents=True)
    path.write_bytes(DATA)
    with serve(tmp_path / "objects") as server:
        yield server


@pytest.fixture(params=["", "gs://bucket/", "s3://bucket/"])
def root(request, bucket):
    """Return the address of the bucket's root: a local path, gs:// or s3://."""
    return request.param or f"{bucket.root}/"


def test_reads_return_the_requested_range(root):
    path = f"{root}{KEY}"
    assert storage.start_read(path)() == DATA
    assert storage.start_read(path, 5, 15)() == DATA[5:15]
    assert storage.start_read(path, 100)() == DATA[100:]
    assert storage.start_read(path, -7)() == DATA[-7:]
    assert storage.start_read(path, -len(DATA) - 7)() == DATA
    assert storage.read_at_most(path, 5, 15) == DATA[5:20]
    assert storage.read_at_most(path, len(DATA) - 5, 15) == DATA[-5:]
    assert storage.read_at_most(path, len(DATA), 15) == b""
    with pytest.raises((OSError, storage.StorageError), match="ends before|is shorter"):
        storage.start_read(path, len(DATA) - 1, len(DATA) + 1)()
    with pytest.raises((OSError, storage.StorageError), match="missing"):
        storage.start_read(f"{root}missing", 0, 1)()


def test_listing_contains_only_files_below_the_directory(root, bucket):
    (bucket.root / "data/deeper").mkdir()
    (bucket.root / "data/deeper/file").touch()
    (bucket.root / "data2").mkdir()
    (bucket.root / "data2/file").touch()
    assert storage.list_files(f"{root}data") == ["a b ä.bin", "deeper/file"]
    assert storage.list_files(f"{root}nowhere") == []


def test_slow_listing_of_a_bucket_prints_a_line(bucket, monkeypatch, capsys):
    assert storage.list_files("gs://bucket/data") == ["a b ä.bin"]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(storage, "EVERY", 0.1)
    bucket.delay = 0.5
    assert storage.list_files("gs://bucket/data") == ["a b ä.bin"]
    assert capsys.readouterr().err == "listing gs://bucket/data ...\n"


@pytest.mark.parametrize("part_bytes", [len(DATA) // 4, 3000, 10**6])
def test_copy_is_exact_for_any_part_size(bucket, tmp_path, monkeypatch, part_bytes):
    """One of the part sizes divides the size of the object."""
    monkeypatch.setattr(storage, "PART_BYTES", part_bytes)
    with open(tmp_path / "copy", "wb") as file:
        assert storage.copy(f"gs://bucket/{KEY}", file) == len(DATA)
    assert (tmp_path / "copy").read_bytes() == DATA


def test_copy_fails_if_the_object_is_replaced(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "PART_BYTES", 3000)

    def replace_object():
        bucket.generation += 1
        return False

    # `copy` calls `stopped` before each part.
    expected = "was replaced while it was copied"
    with (
        open(tmp_path / "copy", "wb") as file,
        pytest.raises(storage.StorageError, match=expected),
    ):
        storage.copy(f"gs://bucket/{KEY}", file, stopped=replace_object)


@pytest.mark.parametrize("scheme", ["gs", "s3"])
@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_server_is_retried(bucket, scheme, status):
    bucket.failures = [status] * 2
    assert storage.start_read(f"{scheme}://bucket/{KEY}", 5, 15)() == DATA[5:15]
    assert bucket.reads(KEY) == 3


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_truncated_answers_are_retried_then_fail(bucket, scheme):
    bucket.truncations_left = 2
    assert storage.start_read(f"{scheme}://bucket/{KEY}", 5, 1500)() == DATA[5:1500]
    assert bucket.reads(KEY) == 3
    bucket.truncations_left = 100
    with pytest.raises(storage.StorageError, match="partial file"):
        storage.start_read(f"{scheme}://bucket/{KEY}", 5, 1500)()


@pytest.mark.parametrize(
    ("scheme", "status", "hint"),
    [
        ("gs", 401, "gcloud auth application-default login"),
        ("gs", 403, "Storage Object Viewer"),
        ("s3", 403, "AWS_PROFILE"),
        ("gs", 503, "Check the network"),
    ],
)
def test_errors_contain_address_status_and_hint(bucket, scheme, status, hint):
    bucket.statuses = {KEY: status}
    with pytest.raises(storage.StorageError) as error:
        storage.start_read(f"{scheme}://bucket/{KEY}", 5, 15)()
    assert error.value.exit_code == 4
    first_line = rf"cannot access {scheme}://bucket/{KEY}: HTTP status {status} \("
    assert re.match(rf"{first_line}.*\)\n.*{hint}", str(error.value))
    assert str(error.value).count("\n") == 1


def test_read_from_a_silent_server_times_out(bucket, monkeypatch):
    bucket.delay = 1.0
    monkeypatch.setattr(storage, "TIMEOUT", 0.01)
    with pytest.raises(storage.StorageError, match="no answer within"):
        storage.start_read(f"gs://bucket/{KEY}")()


def test_written_object_can_be_read_and_listed(root, bucket):
    storage.write(f"{root}new/file", b"data")
    assert storage.start_read(f"{root}new/file")() == b"data"
    assert bucket.keys() == [KEY, "new/file"]


def test_unknown_scheme_is_an_error():
    with pytest.raises(ConfigError, match=r"ftp://x/y: expected .* gs:// or s3://"):
        storage.start_read("ftp://x/y")
