"""Tests of the labels of image files that a user names on the command line."""

import pytest

from hivit_jax.data.sources.paths import Paths

FILES = "more/owl/d.png", "photos/c.png", "photos/cat/a.png", "photos/dog/cat/b.png"


@pytest.mark.parametrize(
    ("classes", "directory_classes", "expected_classes", "labels"),
    [
        # The label of photos/dog/cat/b.png is cat, its nearest directory.
        (["cat", "dog"], False, ["cat", "dog"], [-1, -1, 0, 0]),
        (["cat", "dog"], True, ["cat", "dog"], [-1, -1, 0, 0]),
        (["ant"], False, ["ant"], [-1] * 4),
        # No directory is named ant. Those directly below more/ and photos/ are classes.
        (["ant"], True, ["cat", "dog", "owl"], [2, -1, 0, 1]),
        ([], True, ["cat", "dog", "owl"], [2, -1, 0, 1]),
    ],
)
def test_labels_are_names_of_directories(
    classes, directory_classes, expected_classes, labels, tmp_path
):
    for file in FILES:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(file.encode())
    paths = [tmp_path / "more", tmp_path / "photos"]
    source = Paths(paths, classes, directory_classes)
    assert source.classes == tuple(expected_classes)
    assert source.labels.tolist() == labels
    assert source.sample(0) == {"image": b"more/owl/d.png"}


def test_files_and_flat_directories_have_no_labels(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    source = Paths([tmp_path, tmp_path / "a.png"], directory_classes=True)
    assert (source.classes, source.labels.tolist()) == ((), [-1, -1])
