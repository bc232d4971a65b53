"""Tests of the conversion of parquet files."""

import json
import os
import signal
import sys

import numpy as np
import pytest
from mini_runs import check_message, sample

from hivit_jax.data.sources import registry
from hivit_jax.data.sources.tfds import Tfds
from hivit_jax.errors import DataError
from hivit_jax.tools import parquet
from hivit_jax.tools.prepare_data import main

pyarrow = pytest.importorskip("pyarrow")
NAMES = ["cat", "dog", "emu"]
CLASS_LABEL = {"names": NAMES, "_type": "ClassLabel"}


def write(path, images, labels, feature=None, **columns):
    """Write a file in Hugging Face's format; `feature` describes the labels."""
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"image": images, "label": labels} | columns)
    if feature:
        features = {"image": {"_type": "Image"}, "label": feature}
        text = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": text})
    pyarrow.parquet.write_table(table, path)


def structs(*names):
    """Return images in Hugging Face's format; the bytes of an image are its name."""
    return [{"bytes": name.encode(), "path": f"{name}.jpg"} for name in names]


def open_split(out, split, **keys):
    """Return a split of a converted dataset."""
    return Tfds(out.name, str(out.parent), split, **keys)


def contents(source):
    """Return [(encoded image, label)] of all examples."""
    return [sample(source, index) for index in range(len(source))]


def test_class_names_and_splits_are_converted(tmp_path, capsys):
    """Rows without an image or a label are skipped and reported."""
    data, out = tmp_path / "hub" / "data", tmp_path / "birds"
    images = [
        *structs("a", "b"),
        None,
        {"bytes": None, "path": "c.jpg"},
        *structs("d"),
    ]
    labels = [2, 0, 1, 1, None]
    write(data / "train-00000-of-00002.parquet", images, labels, CLASS_LABEL)
    write(data / "train-00001-of-00002.parquet", structs("e"), [1], CLASS_LABEL)
    write(data / "validation-00000-of-00001.parquet", structs("f"), [0], CLASS_LABEL)
    write(data / "test-00000-of-00001.parquet", structs("g"), [-1], CLASS_LABEL)
    assert main([f"--from={tmp_path / 'hub'}", f"--out={out}"]) == 0
    train, validation = open_split(out, "train"), open_split(out, "validation")
    assert train.classes == validation.classes == NAMES
    assert contents(train) == [(b"a", 2), (b"b", 0), (b"e", 1)]
    assert train.name(1) == "train[1] train-00000-of-00002.parquet[1] b.jpg"
    assert contents(validation) == [(b"f", 0)]
    lines = capsys.readouterr().out.splitlines()
    prefix = "skipped train-00000-of-00002.parquet"
    assert [f"{prefix}[{k}]: no image" for k in (2, 3)] == lines[1:3]
    assert f"{prefix}[4]: no valid label" in lines
    assert lines[0] == "split test is left out: no valid label in 1 rows"
    assert lines[-1] == (
        f"to train on it: --config.data.name=birds --config.data.dir={tmp_path}"
    )
    assert main([f"--from={tmp_path / 'hub'}", f"--out={out}"]) == 0
    assert "is complete; nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("labels", "classes", "indices"),
    [
        (["fox", "ant", "fox"], ["ant", "fox"], [1, 0, 1]),
        ([3, 1, 0], [*"0123"], [3, 1, 0]),
    ],
)
def test_files_without_metadata_are_converted(
    labels, classes, indices, tmp_path, capsys
):
    """Labels are texts or numbers, and images are plain bytes.

    The directory's name is the split.
    """
    out = tmp_path / "converted"
    write(tmp_path / "train" / "0000.parquet", [b"x", b"y", b"z"], labels)
    assert main([f"--from={tmp_path}/*/0*.parquet", f"--out={out}"]) == 0
    source = open_split(out, "train")
    assert source.classes == classes
    assert contents(source) == list(zip([b"x", b"y", b"z"], indices, strict=True))
    assert "--config.data.eval_split=none" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("devices/0.parquet", "train"),
        ("values/0.parquet", "train"),
        ("valid_0/train.parquet", "train"),
        ("validation/0.parquet", "validation"),
        ("x/valid-0.parquet", "validation"),
        ("x/birds_val2017.parquet", "validation"),
        ("dev/0.parquet", "validation"),
        ("x/0.testing.parquet", "test"),
        ("test/training-0.parquet", "train"),
    ],
)
def test_words_of_file_and_directory_names_determine_the_split(path, split, tmp_path):
    file = tmp_path / path
    file.parent.mkdir()
    file.touch()
    assert parquet._find_files(str(file)) == {split: [file]}


@pytest.mark.parametrize("as_list_feature", [True, False])
def test_lists_of_labels_are_converted(as_list_feature, tmp_path, capsys):
    """An image with an empty list has no class.

    Images without a list, or with a label that is not a class, are skipped.
    """
    out, labels = tmp_path / "several", [[0, 2], [], None, [1], [7]]
    feature = [CLASS_LABEL]
    if as_list_feature:
        feature = {"feature": CLASS_LABEL, "_type": "List"}
    write(tmp_path / "train.parquet", structs(*"abcde"), labels, feature)
    assert main([f"--from={tmp_path / 'train.parquet'}", f"--out={out}"]) == 0
    text = capsys.readouterr().out
    assert "--config.data.multi_label=True" in text
    assert "train.parquet[2]: no valid label" in text
    config = {"name": "several", "dir": str(tmp_path), "train_split": "", "subset": 0}
    config |= {"eval_split": "none", "train_examples": 0}
    registry._open.cache_clear()
    source = registry.open_source(config | {"multi_label": True}, "train")
    images, vectors = zip(*contents(source), strict=True)
    assert images == (b"a", b"b", b"d")
    np.testing.assert_array_equal(vectors, [[1, 0, 1], [0, 0, 0], [0, 1, 0]])
    with pytest.raises(DataError, match=r"several labels; set data\.multi_label=True"):
        registry.open_source(config, "train")


def test_lists_of_names_without_metadata_are_converted(tmp_path):
    write(tmp_path / "train.parquet", structs(*"abc"), [["fox", "ant"], [], ["elk"]])
    assert (
        main([f"--from={tmp_path / 'train.parquet'}", f"--out={tmp_path / 'd'}"]) == 0
    )
    source = open_split(tmp_path / "d", "train", multi_label=True)
    assert source.classes == ["ant", "elk", "fox"]
    vectors = [label.tolist() for _, label in contents(source)]
    assert vectors == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]


def test_interrupted_conversion_resumes(tmp_path, monkeypatch, capsys):
    """An interrupted dataset cannot be opened; resuming gives identical files."""
    labels = [0, 1, 2] * 3
    write(tmp_path / "train.parquet", structs(*"abcdefghi"), labels, CLASS_LABEL)
    flags = [f"--from={tmp_path / 'train.parquet'}", "--shard_size=2"]
    uninterrupted, out = tmp_path / "whole" / "d", tmp_path / "part" / "d"
    assert main([*flags, f"--out={uninterrupted}"]) == 0
    rows = parquet._rows

    def interrupted_rows(*arguments):
        for row_index, row in enumerate(rows(*arguments)):
            if row_index == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            yield row

    monkeypatch.setattr(parquet, "_rows", interrupted_rows)
    assert main([*flags, f"--out={out}"]) == 75
    with pytest.raises(DataError, match="d is not prepared in"):
        open_split(out, "train")
    monkeypatch.setattr(parquet, "_rows", rows)
    assert main([*flags, f"--out={out}"]) == 0
    files = sorted(path.name for path in (uninterrupted / "1.0.0").iterdir())
    assert files == sorted(path.name for path in (out / "1.0.0").iterdir())
    for name in files:
        expected = (uninterrupted / "1.0.0" / name).read_bytes()
        assert (out / "1.0.0" / name).read_bytes() == expected


def test_truncated_file_is_an_error(tmp_path, capsys):
    write(tmp_path / "train.parquet", structs(*"abc"), [0, 1, 2], CLASS_LABEL)
    os.truncate(tmp_path / "train.parquet", 300)
    assert main([f"--from={tmp_path}", f"--out={tmp_path / 'd'}"]) == 4
    message = capsys.readouterr().err
    check_message(message, ["train.parquet is not a valid parquet file (truncated?)"])
    assert not (tmp_path / "d").exists()


def test_bad_flags_are_errors(tmp_path, capsys, monkeypatch):
    file = tmp_path / "train.parquet"
    write(file, structs("a"), [0], CLASS_LABEL, species=["x"])

    def check_fails(fragment, *flags):
        assert main([*flags]) == 2
        check_message(capsys.readouterr().err, [fragment])

    out = f"--out={tmp_path / 'd'}"
    check_fails("both --from=FILES and --out=DIR", f"--from={file}")
    check_fails("neither --manual_dir", f"--from={file}", out, f"--data_dir={tmp_path}")
    check_fails("nor --name", f"--from={file}", out, "--name=mnist")
    check_fails("expected parquet files, found none", f"--from={tmp_path}/*.x", out)
    check_fails("becomes data.name", f"--from={file}", f"--out={tmp_path / '0-d'}")
    check_fails("becomes data.name", f"--from={file}", f"--out={tmp_path / 'folder'}")
    check_fails("image, label, species", f"--from={file}", out, "--label_column=kind")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    check_fails("run pip install 'hivit-jax[parquet]'", f"--from={file}", out)
