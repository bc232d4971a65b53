"""Tests of errors about a `data.dir` without the expected layout."""

import pytest

from hivit_jax.data.sources import layout, registry
from hivit_jax.errors import DataError, MissingDirectory

pytestmark = pytest.mark.usefixtures("cache_directory")
KEYS = dict(train_split="", eval_split="", train_examples=0, subset=0)
# Source -> expected layout
LAYOUTS = {
    "folder": "train/CLASS/1.jpg",
    "csv": "a CSV file",
    "webdataset": "a directory of tar files",
    "zip": "train_map.txt",
    "mnist": "the directory that contains mnist/",
}


def open_error(name, directory, error_class=DataError, **keys):
    """Return the message of the error that opening the training split raises."""
    registry._open.cache_clear()
    with pytest.raises(error_class) as error:
        registry.open_source(KEYS | dict(name=name, dir=str(directory)) | keys, "train")
    return str(error.value)


@pytest.mark.parametrize("fraction", [0.0, 0.1])
@pytest.mark.parametrize("name", LAYOUTS)
def test_errors_contain_data_dir_its_content_and_the_layout(name, fraction, tmp_path):
    """`data.dir` is a file, or a directory without the expected files."""
    if name == "mnist" and fraction:
        pytest.skip("not supported by TFDS")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "readme.md").touch()
    (tmp_path / "other" / ".hidden").touch()
    (tmp_path / "x.tar").write_bytes(b"\xff" * 100)
    cases = {"x.tar": "is a file", "other": "contains readme.md"}
    for directory, found in cases.items():
        message = open_error(name, tmp_path / directory, eval_fraction=fraction)
        assert len(message.splitlines()) <= 3
        assert "data.dir" in message
        if name == "csv" and directory == "x.tar":  # csv accepts a file
            assert message.startswith(f"{tmp_path}/x.tar: expected UTF-8 text; ")
        elif name == "folder" and fraction and directory == "other":
            assert "Ignored files: 1 .md, 1 hidden" in message
            assert "such as CLASS/1.jpg" in message
            continue
        else:
            assert f"data.dir='{tmp_path}/{directory}' {found}" in message
        assert LAYOUTS[name] in message


@pytest.mark.parametrize("name", LAYOUTS)
def test_missing_data_dir_is_an_error_of_the_config(name, tmp_path, monkeypatch):
    """The error about a relative path names the current directory."""
    monkeypatch.chdir(tmp_path)
    assert MissingDirectory.exit_code == 2
    message = open_error(name, f"{tmp_path}/nowhere", MissingDirectory)
    assert f"data.dir='{tmp_path}/nowhere' does not exist" in message
    message = open_error(name, "nowhere", MissingDirectory)
    assert f"data.dir='nowhere' does not exist, relative to {tmp_path};" in message
    assert len(message.splitlines()) == 1
    assert "data.dir='.'" in open_error(name, ".")
    if name != "mnist":  # TFDS has a default directory
        message = open_error(name, "", MissingDirectory)
        assert message.startswith(f"data.name={name!r} requires data.dir=DIR")


def test_description_of_a_directory_lists_its_first_names(tmp_path):
    directory = str(tmp_path)
    assert layout.describe_content(directory).endswith(" contains nothing")
    for k in range(layout.MAX_NAMES + 1):
        (tmp_path / f"{k}").touch()
    assert layout.describe_content(directory).endswith(
        " contains 0, 1, 2, 3, 4, 5, 6, 7, ... and 1 more"
    )
    assert (
        layout.describe_content("gs://b", ["a", "b"])
        == "data.dir='gs://b' contains a, b"
    )
