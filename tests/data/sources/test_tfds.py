"""Datasets that TFDS has prepared, as a source."""

import json
import os
import struct

import pytest

from hivit_jax.data.sources import registry, tfds
from hivit_jax.errors import ConfigError, DataError

# Class folders


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache directory, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    registry._open.cache_clear()
    return tmp_path / "cache"


def make(root, *files):
    """Files whose content is their name."""
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


@pytest.fixture
def root(tmp_path):
    """Three classes, whose order is not that of creation."""
    root = tmp_path / "data"
    make(
        root,
        "train/n02/b.JPEG",
        "train/n02/a.jpg",
        "train/n02/deeper/c.png",
        "train/n10/a.JPEG",
        "train/n1/z.webp",
        "train/n1/notes.txt",
        "train/README",
        "val/n10/v.JPEG",
        "val/n02/ä.JPEG",
    )
    return root


# tfrecord


def write_tfrecord(path, records):
    """Length, its CRC, data, their CRC; nobody here looks at a CRC."""
    path.write_bytes(
        b"".join(struct.pack("<Q", len(r)) + b"hcrc" + r + b"dcrc" for r in records)
    )


def test_random_access_to_tfrecords(tmp_path):
    records = [os.urandom(n) for n in (5, 0, 3000, 17)]
    write_tfrecord(tmp_path / "file", records)
    read = tfds.OPENERS["tfrecord"](str(tmp_path / "file"))
    assert [read(place) for place in (3, 0, 1, 2, 2)] == [
        records[place] for place in (3, 0, 1, 2, 2)
    ]


def test_tfrecord_that_was_cut_short(tmp_path):
    write_tfrecord(tmp_path / "cut", [b"x" * 100, b"y" * 100])
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-5])
    with pytest.raises(OSError, match="cut ends inside a record, at byte 227"):
        tfds.OPENERS["tfrecord"](str(tmp_path / "cut"))


# TFDS


def prepared(root, name="imagenet2012", version="5.1.0", **info):
    """The files of a prepared dataset that tell what it is, without images."""
    path = root / name / version
    path.mkdir(parents=True)
    info = {"name": name, "version": version, "fileFormat": "array_record"} | info
    (path / "dataset_info.json").write_text(json.dumps(info))
    return path


def test_dataset_that_is_not_prepared(tmp_path):
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
        DataError, match=r"expected VERSION/dataset_info.*found 5\.1\.0\n"
    ):
        tfds.Tfds("imagenet2012", str(tmp_path), "train")
    prepared(tmp_path, version="5.0.0")
    with pytest.raises(DataError, match=r"found 5\.0\.0, 5\.1\.0\n"):
        tfds.Tfds("imagenet2012:4.0.0", str(tmp_path), "train")


@pytest.mark.parametrize(
    ("name", "near"), [("digit", "digits"), ("imagenet", "imagenet2012")]
)
def test_name_that_is_nearly_one_of_ours(tmp_path, name, near):
    with pytest.raises(
        ConfigError, match=f"unknown data.name {name!r}; did .* {near!r}"
    ):
        tfds.Tfds(name, str(tmp_path), "train")
    # It may be the name of a dataset that is there.
    prepared(tmp_path, name)
    with pytest.raises(DataError, match="cannot be read by tensorflow-datasets"):
        tfds.Tfds(name, str(tmp_path), "train")


def test_dataset_another_tfds_wrote(tmp_path):
    """No features.json, as before TFDS 4; then a file that is no JSON at all."""
    path = prepared(tmp_path)
    for _ in range(2):
        with pytest.raises(DataError) as error:
            tfds.Tfds("imagenet2012", str(tmp_path), "train")
        assert str(error.value).startswith(
            f"{path} cannot be read by tensorflow-datasets 4."
        )
        (path / "dataset_info.json").write_text("{")


def test_newest_version_is_read(tmp_path):
    paths = {v: prepared(tmp_path, version=v) for v in ("5.1.0", "10.0.0", "5.0.0")}
    (tmp_path / "imagenet2012/11.0.0.incompleteXY").mkdir()
    for name, version in (("imagenet2012", "10.0.0"), ("imagenet2012:5.0.0", "5.0.0")):
        found = tfds._prepared_path(name, str(tmp_path))
        assert found == str(paths[version])
