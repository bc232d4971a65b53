"""Tests of the source that reads CSV files and lists of paths."""

import mini_runs
import numpy as np
import pytest

from hivit_jax.data.notes import split_notes
from hivit_jax.data.sources import registry
from hivit_jax.errors import ConfigError, DataError

DATA = {
    "name": "csv",
    "train_split": "",
    "eval_split": "",
    "train_examples": 0,
    "subset": 0,
}
NAMES = ("a/0.png", "b/0.png", "b/1 2.png", "c/0.png")


@pytest.fixture
def root(tmp_path):
    """Return a directory of files; the content of a file is its name."""
    for name in NAMES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def open_split(file, split="train", **keys):
    """Open a split of a table, bypassing the cache of open sources."""
    registry._open.cache_clear()
    return registry.open_source(DATA | {"dir": str(file)} | keys, split)


def read_all(source):
    """Return the content and label of every example."""
    examples = [mini_runs.sample(source, i) for i in range(len(source))]
    return [(encoded.decode(), label) for encoded, label in examples]


def write(root, *lines, name="list.csv"):
    """Write a table; return its path."""
    (root / name).write_text("\n".join(lines) + "\n")
    return root / name


@pytest.mark.parametrize("separator", [",", "\t", ";"])
def test_label_names_become_sorted_classes(root, separator):
    lines = [
        "id,File_Name,class",
        "7,a/0.png,dog",
        "8,b/1 2.png,cat",
        "",
        "9,c/0.png,dog",
    ]
    file = write(root, *(line.replace(",", separator) for line in lines))
    source = open_split(file, eval_split="none")
    assert source.classes == ["cat", "dog"]
    assert read_all(source) == [("a/0.png", 1), ("b/1 2.png", 0), ("c/0.png", 1)]
    assert source.name(1) == f"{root}/b/1 2.png"


def test_label_numbers_are_class_indices(root):
    """Numbers in the table are the labels; some labels may have no image."""
    file = write(root, "path,label", f"{root}/a/0.png,3", "b/0.png,1")
    source = open_split(file, eval_split="none")
    assert source.classes == [*"0123"]
    assert read_all(source) == [("a/0.png", 3), ("b/0.png", 1)]


def test_split_column_selects_the_rows(root):
    """A split column takes precedence over eval_fraction; any split can be selected."""
    rows = ["a/0.png,x,train", "b/0.png,y,val", "b/1 2.png,y,test", "c/0.png,z,train"]
    file = write(root, "path,label,split", *rows)
    for keys in ({}, {"eval_fraction": 0.999}):
        train, test = (open_split(file, split, **keys) for split in ("train", "test"))
        assert read_all(train) == [("a/0.png", 0), ("c/0.png", 2)]
        assert read_all(test) == [("b/0.png", 1)]
        assert test.classes == [*"xyz"]
        assert test.ignored_text() == "2 of split 'train', 1 of split 'test'"
    assert read_all(open_split(file, "test", eval_split="test")) == [("b/1 2.png", 1)]
    with pytest.raises(DataError, match="with the split extra; found test, train, val"):
        open_split(file, "test", eval_split="extra")


def test_rows_are_held_out_or_excluded(root):
    file = write(root, "path,label", *(f"{name},{name[0]}" for name in NAMES))
    sides = [
        read_all(open_split(file, s, eval_fraction=0.5)) for s in ("train", "test")
    ]
    assert sorted(sides[0] + sides[1]) == [(n, "abc".index(n[0])) for n in NAMES]
    assert [label for _, label in sides[1]] == [1]
    bad = write(root, "b/0.png", f"{root}/c/0.png", name="bad.txt")
    assert len(open_split(file, eval_split="none", exclude=str(bad))) == 2


def test_evaluation_table_has_the_classes_of_the_training_table(root):
    """Labels of the evaluation table are indices of the training table's classes."""
    write(root, "path,label", "a/0.png,x", "b/0.png,y", name="train.csv")
    write(root, "path,label", "c/0.png,y", name="val.csv")
    assert read_all(open_split(root, "test")) == [("c/0.png", 1)]
    write(root, "path,label", "c/0.png,w", name="other.csv")
    with pytest.raises(DataError, match="c/0.png has the label 'w'; expected one of"):
        open_split(root, "test", eval_split="other.csv")
    with pytest.raises(DataError, match="no.csv: expected a CSV file or a list"):
        open_split(root, "test", eval_split="no.csv")


def test_lists_of_paths_may_have_labels(root):
    file = write(root, "a/0.png 1", "b/1 2.png   0", name="train.txt")
    assert read_all(open_split(file, eval_split="none")) == [
        ("a/0.png", 1),
        ("b/1 2.png", 0),
    ]
    file = write(root, *NAMES, name="unlabeled.txt")
    source = open_split(file, eval_split="none")
    assert (source.labeled, source.classes, len(source)) == (False, (), 4)
    file = write(root, "path", *NAMES)
    assert not open_split(file, eval_split="none").labeled


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["name,label", "a/0.png,1"], "one of the columns path, .* found name, label"),
        (["path,label", "a/0.png"], "expected 2 columns, found 1 in row 2"),
        (["path,label", "a/0.png,"], "a/0.png has no label"),
        (["path,label"], "expected at least one image, found none"),
        ([], "expected a header .* found nothing"),
    ],
)
def test_invalid_table_is_an_error(root, lines, message):
    with pytest.raises(DataError, match=message):
        open_split(write(root, *lines), eval_split="none")


def test_table_without_evaluation_images_is_an_error(root):
    file = write(root, "path,label", "a/0.png,1")
    with pytest.raises(
        DataError, match="has no column 'split'; set data.eval_fraction"
    ):
        open_split(file, "test")
    with pytest.raises(ConfigError, match="class_level='leaf' has no effect"):
        open_split(file, class_level="leaf")


def test_tables_may_have_several_labels_per_image(root):
    """Several labels are separated by ";"; an empty label stands for no class."""
    rows = ["a/0.png,dog;cat", "b/0.png,", "b/1 2.png, cat ;;cat", "c/0.png,emu"]
    file = write(root, "path,label", *rows)
    source = open_split(file, eval_split="none", multi_label=True)
    assert (source.classes, source.labeled) == (["cat", "dog", "emu"], True)
    expected = [[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 1]]
    np.testing.assert_array_equal(source.labels, expected)
    for index, vector in enumerate(expected):
        label = mini_runs.sample(source, index)[1]
        assert (label.dtype, label.tolist()) == (np.uint8, vector)
    (note,) = split_notes(source, np.arange(1), "train", "uint8")
    assert note.startswith(
        "1 of 4 images of the train split have no label; each counts"
    )
    file = write(root, "a/0.png 3;0", "b/0.png 1", "c/0.png", name="list.txt")
    numbered = open_split(file, eval_split="none", multi_label=True)
    assert numbered.classes == [*"0123"]
    assert numbered.labels.tolist() == [[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]


def test_held_out_images_with_several_labels_cover_every_class(root):
    """Every class is on both sides; images of no class are kept."""
    rows = [f"{k}.png,{'x' if k % 2 else ''};{'y' if k % 3 else ''}" for k in range(60)]
    file, keys = write(root, "path,label", *rows), {"multi_label": True}
    sides = [
        open_split(file, split, eval_fraction=0.4, **keys)
        for split in ("train", "test")
    ]
    assert sum(map(len, sides)) == 60
    assert 12 < len(sides[1]) < 36
    for side in sides:
        assert side.labels.any(0).all()
        assert not side.labels.any(1).all()
    bad = write(root, "1.png", name="bad.txt")
    remaining = open_split(file, eval_split="none", exclude=str(bad), **keys)
    assert len(remaining) == 59
    assert len(remaining.labels) == 59


@pytest.mark.parametrize(
    ("lines", "keys", "message"),
    [
        (
            ["a/0.png,x;y"],
            {},
            r"a/0.png has the label 'x;y'; set data.multi_label=True",
        ),
        (["a/0.png,;"], {"multi_label": True}, "in at least one row, found none"),
    ],
)
def test_invalid_labels_in_a_table_are_an_error(root, lines, keys, message):
    with pytest.raises(DataError, match=message):
        open_split(write(root, "path,label", *lines), eval_split="none", **keys)


def test_evaluation_table_with_unknown_or_no_labels_is_an_error(root):
    """An evaluation table must have labels, and only classes of the training table."""
    write(root, "path,label", "a/0.png,x;y", name="train.csv")
    write(root, "path,label", "b/0.png,x;z", name="val.csv")
    with pytest.raises(DataError, match="b/0.png has the label 'x;z'; expected one of"):
        open_split(root, "test", multi_label=True)
    write(root, "path", "b/0.png", name="val.csv")
    with pytest.raises(
        DataError, match="expected labels as in .*train.csv, found none"
    ):
        open_split(root, "test", multi_label=True)
    with pytest.raises(ConfigError, match="with data.name='folder'; expected 'csv'"):
        open_split(root, name="folder", multi_label=True)
