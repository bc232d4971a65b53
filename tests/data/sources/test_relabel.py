"""Tests of labels that are matched by name to the classes of a trained model."""

import numpy as np
import pytest
from datasets import encode, folder_config, noise_image

from hivit_jax.data.sources.base import LabelError, Record, Source
from hivit_jax.data.sources.registry import open_source
from hivit_jax.data.sources.relabel import match_classes
from hivit_jax.errors import ConfigError, DataError

PETS = ("bird", "cat", "dog")


class FixedLabels(Source):
    """Source of given labels. If `known` is False, the attribute `labels` is None."""

    def __init__(self, classes, labels, known=True):
        self.classes, self._labels = classes, labels
        self.labels = np.array(labels) if known else None

    def __len__(self):
        return len(self._labels)

    def sample(self, index):
        return {"image": b"", "label": self._labels[index]}

    def record(self, index):
        return Record("file", 0, -1, self._labels[index])


def labels_of(source):
    """Return the labels of all samples, after comparing them with `source.labels`."""
    found = [source.sample(index)["label"] for index in range(len(source))]
    if source.labels is not None:
        np.testing.assert_array_equal(found, source.labels)
    return np.array(found).tolist()


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("classes", "labels", "expected"),
    [
        (["bird", "dog"], [0, 1, 1], [0, 2, 2]),  # a missing class
        (["dog", "cat", "bird"], [0, 1, 2], [2, 1, 0]),  # another order
        (["bird", "cat"], [1, 0], [1, 0]),  # a missing last class
    ],
)
def test_classes_are_matched_by_name(classes, labels, expected, known):
    source = match_classes(FixedLabels(classes, labels, known), PETS, "DIR")
    assert labels_of(source) == expected
    assert source.classes == PETS
    assert [source.record(k).label for k in range(len(labels))] == expected
    assert source.class_counts() == (
        tuple(expected.count(label) for label in range(3)) if known else ()
    )


def test_vectors_of_labels_are_matched_by_name():
    """A vector may be shorter than the list of classes."""
    vectors = [[1, 0], [1, 1]]
    source = match_classes(FixedLabels(["dog", "bird"], vectors), PETS, "DIR")
    assert labels_of(source) == [[0, 0, 1], [1, 0, 1]]
    short = match_classes(FixedLabels(["dog", "bird"], [[1]], False), PETS, "DIR")
    assert labels_of(short) == [[0, 0, 1]]


def test_relabeled_source_has_no_tf_example_records():
    """The records of a source with `example_keys` contain the old labels."""
    source = FixedLabels(["dog"], [0])
    source.example_keys = ("image", "label")
    assert match_classes(source, PETS, "DIR").record(0) is None


def test_labels_stay_unchanged_for_equal_or_numbered_classes_and_without_labels():
    named, numbered = FixedLabels([*PETS], [2, 0]), FixedLabels(["0", "1", "2"], [2, 0])
    unlabeled = FixedLabels(["other"], [0])
    unlabeled.labeled = False
    for source in (named, unlabeled, FixedLabels((), [5])):
        assert match_classes(source, PETS, "DIR") is source
    assert labels_of(match_classes(numbered, PETS, "DIR")) == [2, 0]
    assert labels_of(match_classes(named, ["0", "1", "2"], "DIR")) == [2, 0]


def test_numbered_model_with_more_classes_than_a_named_dataset_is_an_error():
    """The class number of a name is unknown, because the dataset lacks a class."""
    with pytest.raises(ConfigError, match="the model has no class 'bird'"):
        match_classes(FixedLabels([*PETS], [2, 0]), ["0", "1", "2", "3"], "DIR")


def test_class_that_the_model_lacks_is_an_error():
    """A class without images is not an error, because no label is wrong."""
    classes = ["bird", "cow", "dog", "yak"]
    with pytest.raises(ConfigError) as error:
        match_classes(FixedLabels(classes, [0, 1, 2, 3]), PETS, "DIR")
    text = str(error.value)
    assert "data.dir='DIR': the model has no class 'cow'" in text
    assert "expected its 3 classes bird, cat, dog; found 2 unknown" in text
    assert len(text.splitlines()) <= 3
    assert labels_of(match_classes(FixedLabels(classes, [2, 0]), PETS, "DIR")) == [2, 0]


@pytest.mark.parametrize("label", [-1, 2])
def test_label_out_of_range_is_an_error(label):
    source = match_classes(FixedLabels(["cat", "dog"], [label]), PETS, "DIR")
    assert source.labels.tolist() == [-1]
    with pytest.raises(LabelError, match=f"from 0 to 1, found {label}"):
        source.sample(0)


def test_test_split_is_opened_without_a_training_split(tmp_path):
    """Folders and CSV files then need the class names as an argument."""
    lines = ["path,label"]
    for name in ("dog", "bird"):
        path = tmp_path / "flat" / name / "1.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(encode(noise_image(8, 8, 3), "PNG"))
        lines.append(f"{path},{name}")
    (tmp_path / "val.csv").write_text("\n".join(lines))
    flat = dict(data__eval_split=".")
    csv = dict(data__name="csv")
    for directory, overrides, expected in (
        ("flat", flat, [0, 2]),
        ("", csv, [2, 0]),
        ("val.csv", csv, [2, 0]),
    ):
        data = folder_config(tmp_path / directory, **overrides).data
        with pytest.raises(DataError):
            open_source(data, "test")
        assert labels_of(open_source(data, "test", PETS)) == expected
