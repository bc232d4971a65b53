"""Source of class folders."""

import os

import numpy as np
import pytest
import recipes

from hivit_jax.data.sources import folder, registry
from hivit_jax.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("user_cache")


def make(root, *files):
    """Write files that contain their own name."""
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


@pytest.fixture
def root(tmp_path):
    """Three classes; their sorted order differs from the order of creation."""
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


def listed(source):
    """Return the content and label of every example."""
    found = [recipes.sample(source, i) for i in range(len(source))]
    return [(encoded.decode(), label) for encoded, label in found]


def test_files_are_in_the_order_of_torchvision(root):
    source = folder.Folder(str(root), "train")
    assert source.classes == ["n02", "n1", "n10"]
    assert listed(source) == [
        ("train/n02/a.jpg", 0),
        ("train/n02/b.JPEG", 0),
        ("train/n02/deeper/c.png", 0),
        ("train/n1/z.webp", 1),
        ("train/n10/a.JPEG", 2),
    ]
    assert source.labels.tolist() == [0, 0, 0, 1, 2]
    assert source.labels.dtype == np.int32
    assert source.name(3) == f"{root}/train/n1/z.webp"


def test_validation_has_the_classes_of_training(root):
    """Labels of val are those of train; torchvision would use 0 and 1."""
    source = folder.Folder(str(root), "val")
    assert source.classes == ["n02", "n1", "n10"]
    assert listed(source) == [("val/n02/ä.JPEG", 0), ("val/n10/v.JPEG", 2)]


def test_splits_have_configured_names(root):
    data = {
        "name": "folder",
        "dir": str(root),
        "train_split": "val",
        "eval_split": "train",
        "train_examples": 0,
        "subset": 0,
    }
    assert len(registry.open_source(data, "train")) == 2
    with pytest.raises(DataError, match=r"train/n1: .*; found 1 unknown in train"):
        registry.open_source(data, "test")
    with pytest.raises(ConfigError, match="only digits has subsets"):
        registry.open_source(data | {"train_examples": 10}, "train")


def test_index_is_cached_until_a_directory_changes(root, user_cache, monkeypatch):
    first = listed(folder.Folder(str(root), "train"))
    (found,) = user_cache.glob("hivit_jax/*.npz")
    walks, walk = [], os.walk
    monkeypatch.setattr(os, "walk", lambda *a, **k: walks.append(a) or walk(*a, **k))
    assert listed(folder.Folder(str(root), "train")) == first
    assert not walks
    make(root, "train/n02/deeper/d.png")
    again = listed(folder.Folder(str(root), "train"))
    assert again == [*first[:3], ("train/n02/deeper/d.png", 0), *first[3:]]
    make(root, "train/n05/e.png")
    assert len(folder.Folder(str(root), "train").classes) == 4
    assert len(walks) == 3 + 4  # one per class
    # The index is rebuilt: other version, damaged cache, unwritable cache.
    with np.load(found) as index:
        other = {name: index[name] for name in index if name != "classes"}
    np.savez(found, **other)
    assert len(folder.Folder(str(root), "train")) == 7
    found.write_bytes(b"PK damaged")
    assert len(folder.Folder(str(root), "train")) == 7
    found.unlink()
    (user_cache / "hivit_jax").rmdir()
    (user_cache / "hivit_jax").write_text("a file")
    assert len(folder.Folder(str(root), "train")) == 7


def test_labels_follow_the_classes_of_training(root):
    """A new class in train changes the labels of val, although its index is cached."""
    assert folder.Folder(str(root), "val").labels.tolist() == [0, 2]
    make(root, "train/n01/first.png")
    assert folder.Folder(str(root), "val").labels.tolist() == [1, 3]


def test_missing_split(root):
    with pytest.raises(DataError) as error:
        folder.Folder(str(root), "test")
    assert str(error.value).startswith(
        f"no directory {root}/test; data.dir={str(root)!r} contains train, val\n"
    )
    with pytest.raises(DataError, match="contains nothing"):
        folder.Folder(str(root / "nowhere"), "train")


def test_empty_class(root):
    make(root, "train/n03/readme.txt")
    with pytest.raises(DataError, match=r"train/n03: expected .*\.jpg, .*; found none"):
        folder.Folder(str(root), "train")
    (root / "empty/train").mkdir(parents=True)
    with pytest.raises(DataError, match="empty/train: expected .*; found none"):
        folder.Folder(str(root / "empty"), "train")


def test_class_missing_in_train(root):
    make(root, "val/n99/a.JPEG")
    with pytest.raises(
        DataError, match="val/n99: .* 3 classes of train; found 1 .* val"
    ):
        folder.Folder(str(root), "val")


def test_unreadable_file_is_an_oserror(root):
    source = folder.Folder(str(root), "train")
    (root / "train/n10/a.JPEG").unlink()
    with pytest.raises(OSError, match="n10/a.JPEG"):
        recipes.sample(source, 4)
