"""Tests of the source that reads class folders."""

import itertools
import os

import mini_runs
import numpy as np
import pytest

from hivit_jax import progress
from hivit_jax.data.sources import folder, registry
from hivit_jax.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("cache_directory")


def write_files(root, *files):
    """Write files; the content of a file is its name."""
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


@pytest.fixture
def root(tmp_path):
    """Return a directory with two splits. Classes are not created in sorted order."""
    root = tmp_path / "data"
    write_files(
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


def read_all(source):
    """Return the content and label of every example."""
    examples = [mini_runs.sample(source, i) for i in range(len(source))]
    return [(encoded.decode(), label) for encoded, label in examples]


def test_files_are_in_the_order_of_torchvision(root):
    source = folder.Folder(str(root), "train")
    assert source.classes == ["n02", "n1", "n10"]
    assert read_all(source) == [
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
    """Labels of val are indices of train's classes; torchvision would use 0 and 1."""
    source = folder.Folder(str(root), "val")
    assert source.classes == ["n02", "n1", "n10"]
    assert read_all(source) == [("val/n02/ä.JPEG", 0), ("val/n10/v.JPEG", 2)]


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
    with pytest.raises(ConfigError, match="only digits and synthetic support"):
        registry.open_source(data | {"train_examples": 10}, "train")


def test_index_is_cached_until_a_directory_changes(root, cache_directory, monkeypatch):
    first = read_all(folder.Folder(str(root), "train"))
    (index_file,) = cache_directory.glob("hivit_jax/*.npz")
    walks, walk = [], os.walk
    monkeypatch.setattr(os, "walk", lambda *a, **k: walks.append(a) or walk(*a, **k))
    assert read_all(folder.Folder(str(root), "train")) == first
    assert not walks
    write_files(root, "train/n02/deeper/d.png")
    again = read_all(folder.Folder(str(root), "train"))
    assert again == [*first[:3], ("train/n02/deeper/d.png", 0), *first[3:]]
    write_files(root, "train/n05/e.png")
    assert len(folder.Folder(str(root), "train").classes) == 4
    assert len(walks) == 3 + 4  # one per class: three classes, later four
    # An index without classes and a damaged index are rebuilt.
    with np.load(index_file) as index:
        without_classes = {name: index[name] for name in index if name != "classes"}
    np.savez(index_file, **without_classes)
    assert len(folder.Folder(str(root), "train")) == 7
    index_file.write_bytes(b"PK damaged")
    assert len(folder.Folder(str(root), "train")) == 7
    # The folder is also read if no index can be saved.
    index_file.unlink()
    (cache_directory / "hivit_jax").rmdir()
    (cache_directory / "hivit_jax").write_text("a file")
    assert len(folder.Folder(str(root), "train")) == 7


def test_labels_follow_the_classes_of_training(root):
    """A new class in train changes the labels of val, whose index is cached."""
    assert folder.Folder(str(root), "val").labels.tolist() == [0, 2]
    write_files(root, "train/n01/first.png")
    assert folder.Folder(str(root), "val").labels.tolist() == [1, 3]


def test_missing_split_directory_is_an_error(root):
    with pytest.raises(DataError) as error:
        folder.Folder(str(root), "test")
    assert str(error.value).startswith(
        f"no directory {root}/test; data.dir={str(root)!r} contains train, val\n"
    )
    with pytest.raises(DataError, match="nowhere' does not exist"):
        folder.Folder(str(root / "nowhere"), "train")


def test_class_without_images_is_an_error(root):
    write_files(root, "train/n03/readme.txt")
    with pytest.raises(DataError, match=r"train/n03: expected .*\.jpg, .*; found none"):
        folder.Folder(str(root), "train")
    (root / "empty/train").mkdir(parents=True)
    with pytest.raises(DataError, match="empty/train: expected .*; found none"):
        folder.Folder(str(root / "empty"), "train")


def test_class_that_is_missing_in_train_is_an_error(root):
    write_files(root, "val/n99/a.JPEG")
    with pytest.raises(
        DataError, match="val/n99: .* 3 classes of train; found 1 .* val"
    ):
        folder.Folder(str(root), "val")


def test_deleted_image_is_an_oserror(root):
    source = folder.Folder(str(root), "train")
    (root / "train/n10/a.JPEG").unlink()
    with pytest.raises(OSError, match="n10/a.JPEG"):
        mini_runs.sample(source, 4)


# Files that are ignored because of their names or directories
IGNORED = [
    ".ipynb_checkpoints/a-checkpoint.png",
    "n1/.ipynb_checkpoints/z-checkpoint.webp",
    "n02/deeper/._c.png",
    "n02/.hidden.jpg",
    "__MACOSX/n02/b.JPEG",
    "n10/@eaDir/a.JPEG/SYNOPHOTO_THUMB_M.jpg",
    "$RECYCLE.BIN/a.png",
    "lost+found/a.png",
    "n02/__pycache__/a.png",
    "System Volume Information/a.png",
    ".Trash-1000/files/a.png",
    "n1/.AppleDouble/z.webp",
    "Thumbs.db",
    "n1/desktop.ini",
    ".DS_Store",
]


def test_hidden_and_system_names_are_ignored(root):
    """Hidden names and names of system files (`IGNORED`) are ignored at any level.

    Similar names, such as @x, __x, cache and _.png, are not ignored.
    """
    write_files(root, "val/n1/v.png")
    before = {s: read_all(folder.Folder(str(root), s)) for s in ("train", "val")}
    write_files(root, *(f"{split}/{name}" for split in before for name in IGNORED))
    for split, examples in before.items():
        source = folder.Folder(str(root), split)
        assert source.classes == ["n02", "n1", "n10"]
        assert read_all(source) == examples
    ordinary = [
        "train/@x/a.png",
        "train/__x/a.png",
        "train/cache/a.png",
        "train/n1/_.png",
    ]
    write_files(root, *ordinary)
    source = folder.Folder(str(root), "train")
    assert source.classes == ["@x", "__x", "cache", "n02", "n1", "n10"]
    assert {name for name, _ in read_all(source)} - {n for n, _ in before["train"]} == {
        *ordinary
    }


def test_named_paths_may_be_hidden(tmp_path):
    """A path that the user names, and its parents, may have hidden or system names."""
    root = tmp_path / ".cache" / "lost+found"
    write_files(root, "train/a/0.png", "val/a/0.png")
    assert len(folder.Folder(str(root), "train")) == 1
    assert len(folder.Images(root)) == 2
    assert len(folder.Images(root / "train/a/0.png")) == 1
    write_files(root, ".shown.png")
    assert folder.Images(root / ".shown.png").name(0) == f"{root}/.shown.png"


def test_unlabeled_images_ignore_hidden_and_system_names(root):
    names = [folder.Images(root).name(i) for i in range(7)]
    write_files(root, *(f"train/{name}" for name in IGNORED))
    source = folder.Images(root)
    assert [source.name(i) for i in range(len(source))] == names
    assert source.ignored == {
        folder.HIDDEN: len(IGNORED),
        ".txt": 1,
        "without an ending": 1,
    }


def test_folder_counts_ignored_files_by_reason(root):
    """A hidden directory counts as one file. The cached index contains the counts."""
    write_files(root, *(f"train/{name}" for name in IGNORED), "train/stray.png")
    write_files(root, *(f"train/n1/{k}.heic" for k in range(3)), "train/n02/x.HEIC")
    for _ in range(2):
        source = folder.Folder(str(root), "train")
        assert source.ignored == {
            folder.HIDDEN: len(IGNORED),
            ".heic": 4,
            ".txt": 1,
            folder.OUTSIDE: 1,
            "without an ending": 1,
        }
    assert source.ignored_text().startswith(f"{len(IGNORED)} hidden or system, 4 .heic")
    assert folder.Folder(str(root), "val").ignored_text() == ""
    write_files(root, *(f"train/n1/{k}.{k:04}" for k in range(20)))
    assert folder.Folder(str(root), "train").ignored_text().count(",") == 8


def test_folder_index_of_an_earlier_version_is_not_used(root, cache_directory):
    """An old index is not used, because its classes may be hidden directories."""
    write_files(root, "train/.ipynb_checkpoints/a.png")
    folder.Folder(str(root), "train")
    index_file = max(cache_directory.glob("hivit_jax/*.npz"), key=os.path.getmtime)
    with np.load(index_file) as index:
        old = {k: index[k] for k in ("directories", "times", "files")}
    old["classes"], old["counts"] = np.array([".ipynb_checkpoints"]), np.array([5])
    np.savez(index_file, **old)
    assert len(folder.Folder(str(root), "train")) == 5
    assert folder.Folder(str(root), "train").labels.tolist() == [0, 0, 0, 1, 2]


def test_class_whose_files_are_all_ignored_is_an_error(root):
    write_files(root, "train/n05/._a.png", "train/n05/a.heic")
    with pytest.raises(DataError) as error:
        folder.Folder(str(root), "train")
    assert "train/n05: expected " in str(error.value)
    assert "Ignored files: 1 .heic, 1 .txt, 1 hidden or system" in str(error.value)


@pytest.mark.parametrize("source_class", [folder.Folder, folder.Images])
def test_long_listings_show_their_progress(source_class, root, monkeypatch, capsys):
    """A line is printed every 10 s; the clock of this test advances by 10 s a call."""
    monkeypatch.setattr(progress, "monotonic", itertools.count(0, 10).__next__)
    is_folder = source_class is folder.Folder
    source_class(*((root, "train") if is_folder else (root / "train",)))
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert lines[-1].startswith(f"listing {root / 'train'}  ")
    assert lines[-1].endswith(" files")
