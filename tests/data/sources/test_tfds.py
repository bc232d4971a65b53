"""Tests of the data source for datasets prepared by TFDS."""

import json
import os
import struct

import pytest

from hivit_jax.data.sources import tfds
from hivit_jax.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("cache_directory")


def write_tfrecord(path, records):
    """Write a TFRecord file with placeholder CRCs: length, CRC, data, CRC."""
    path.write_bytes(
        b"".join(struct.pack("<Q", len(r)) + b"hcrc" + r + b"dcrc" for r in records)
    )


def test_tfrecords_are_read_in_any_order(tmp_path):
    records = [os.urandom(n) for n in (5, 0, 3000, 17)]
    write_tfrecord(tmp_path / "file", records)
    read = tfds.OPENERS["tfrecord"](str(tmp_path / "file"))
    assert [read(index) for index in (3, 0, 1, 2, 2)] == [
        records[index] for index in (3, 0, 1, 2, 2)
    ]


def test_truncated_tfrecord_is_an_error(tmp_path):
    write_tfrecord(tmp_path / "cut", [b"x" * 100, b"y" * 100])
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-5])
    with pytest.raises(OSError, match="cut ends inside a record, at byte 227"):
        tfds.OPENERS["tfrecord"](str(tmp_path / "cut"))


def write_metadata(root, name="imagenet2012", version="5.1.0", **info):
    """Write the metadata of a dataset without images; return its directory."""
    path = root / name / version
    path.mkdir(parents=True)
    info = {"name": name, "version": version, "fileFormat": "array_record"} | info
    (path / "dataset_info.json").write_text(json.dumps(info))
    return path


def test_unprepared_dataset_is_an_error(tmp_path):
    with pytest.raises(DataError) as error:
        tfds.Tfds("imagenet2012", str(tmp_path), "train")
    message = str(error.value)
    assert message.startswith(
        f"imagenet2012 is not prepared in {tmp_path}/imagenet2012: "
    )
    assert "python -m hivit_jax.tools.prepare_data --name imagenet2012" in message
    assert message.count("\n") == 1
    (tmp_path / "imagenet2012/5.1.0").mkdir(parents=True)
    with pytest.raises(
        DataError, match=r"expected VERSION/dataset_info.*found 5\.1\.0; data\.dir="
    ):
        tfds.Tfds("imagenet2012", str(tmp_path), "train")
    write_metadata(tmp_path, version="5.0.0")
    with pytest.raises(DataError, match=r"found 5\.0\.0, 5\.1\.0; "):
        tfds.Tfds("imagenet2012:4.0.0", str(tmp_path), "train")


@pytest.mark.parametrize(
    ("name", "suggestion"), [("digit", "digits"), ("imagenet", "imagenet2012")]
)
def test_misspelled_dataset_name_gives_a_suggestion(tmp_path, name, suggestion):
    with pytest.raises(
        ConfigError, match=f"unknown data.name {name!r}; did .* {suggestion!r}"
    ):
        tfds.Tfds(name, str(tmp_path), "train")
    # A prepared dataset may have that name.
    write_metadata(tmp_path, name)
    with pytest.raises(DataError, match="cannot be read by tensorflow-datasets"):
        tfds.Tfds(name, str(tmp_path), "train")


def test_dataset_of_an_incompatible_tfds_is_an_error(tmp_path):
    """A missing features.json (before TFDS 4) and invalid JSON are errors."""
    path = write_metadata(tmp_path)
    for _ in range(2):
        with pytest.raises(DataError) as error:
            tfds.Tfds("imagenet2012", str(tmp_path), "train")
        assert str(error.value).startswith(
            f"{path} cannot be read by tensorflow-datasets 4."
        )
        (path / "dataset_info.json").write_text("{")


def test_newest_or_specified_version_is_read(tmp_path):
    paths = {
        v: write_metadata(tmp_path, version=v) for v in ("5.1.0", "10.0.0", "5.0.0")
    }
    (tmp_path / "imagenet2012/11.0.0.incompleteXY").mkdir()
    for name, version in (("imagenet2012", "10.0.0"), ("imagenet2012:5.0.0", "5.0.0")):
        found = tfds._prepared_path(name, str(tmp_path))
        assert found == str(paths[version])
