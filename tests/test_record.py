"""Tests of the config file of each start, and of changes when a run resumes."""

import json
import time

import pytest

from hivit_jax import record
from hivit_jax.errors import ConfigError


def test_every_start_writes_a_config_file(tmp_path, monkeypatch):
    """The first start writes config.json; the names of later files contain the time.

    The test covers several starts within one second, and a start after the clock was
    set back. Files with other names are ignored.
    """
    for name in ("config-old.json", "config-2026.json", "my-config.json"):
        (tmp_path / name).write_text("{}")
    now = time.time()
    for start_index, clock in enumerate([now, now, now, now - 3600]):
        monkeypatch.setattr(record.time, "time", lambda clock=clock: clock)
        record.add_start(tmp_path, str(start_index))
        assert [p.read_text() for p in record.config_files(tmp_path)] == [
            str(earlier_index) for earlier_index in range(start_index + 1)
        ]
        newest = record.newest_config(tmp_path)
        assert newest.endswith(".json") and open(newest).read() == str(start_index)  # noqa: PT018, SIM115
    first, *later = [path.name for path in record.config_files(tmp_path)]
    assert first == "config.json"
    stamp = time.strftime("config-%Y%m%dT%H%M%SZ.json", time.gmtime(now))
    assert later[0] == stamp


def test_workdir_without_a_start_requires_config(tmp_path):
    with pytest.raises(ConfigError, match=r"--config is required.*no config\.json"):
        record.newest_config(tmp_path / "nowhere")


def test_differences_lists_each_changed_key():
    """Keys may be nested or in only one config; values may be tuples or None."""
    old = {"a": {"b": (1, 2), "c": None}, "d": 0.5, "only": 1, "same": {"x": ()}}
    new = {"a": {"b": (1, 3), "c": 4}, "d": 0.25, "new": "x", "same": {"x": ()}}
    assert record.differences(old, new) == [
        "a.b: (1, 2) -> (1, 3)",
        "a.c: None -> 4",
        "d: 0.5 -> 0.25",
        "new: None -> x",
        "only: 1 -> None",
    ]
    assert record.differences(old, old) == []
    json_lists = json.loads(json.dumps(old))
    assert record.differences(json_lists, json_lists) == []


def test_dataset_changes_lists_sizes_and_class_names():
    """A changed number of images and up to three changed class names are listed."""

    def dataset_info(train, *classes):
        return {"counts": {"train": train, "test": 5}, "classes": classes}

    old = dataset_info(10, "cat", "dog")
    assert record.dataset_changes(old, dataset_info(10, "cat", "dog")) == []
    # The JSON file of a checkpoint contains lists instead of tuples.
    assert record.dataset_changes(json.loads(json.dumps(old)), old) == []
    assert record.dataset_changes(old, dataset_info(12, "cat", "dog")) == [
        "train: 10 -> 12 examples"
    ]
    assert record.dataset_changes(old, dataset_info(10, "dog", "cat")) == [
        "label 0: cat -> dog",
        "label 1: dog -> cat",
    ]
    assert record.dataset_changes(old, dataset_info(10, "cat")) == [
        "label 1: dog -> None"
    ]
    lines = record.dataset_changes(
        old, dataset_info(10, ".hidden", "cat", "dog", "a", "b")
    )
    assert lines[-1] == "5 labels in total have another class name"
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (["cat", "emu", "fox"], "label 1 is 'dog'; found 'emu'"),  # renamed
        (["ape", "cat", "dog", "fox"], "label 0 is 'cat'; found 'ape'"),  # added
        (["cat", "fox"], "label 1 is 'dog'; found 'fox'"),  # removed
        (["dog", "cat", "fox"], "label 0 is 'cat'; found 'dog'"),  # reordered
        (["cat", "dog", "fox"], ""),
        (["cat", "dog", "fox", "yak"], ""),  # no label changes
        (["cat", "dog"], ""),
        (["0", "1", "2"], ""),  # numbers instead of names
        ([], ""),
    ],
)
def test_only_a_changed_class_of_a_label_is_an_error(new, message):
    old = ["cat", "dog", "fox"]
    if not message:
        record.check_classes(old, new, "DIR")
        record.check_classes(new, old, "DIR")
        return
    with pytest.raises(ConfigError, match=message) as error:
        record.check_classes(old, new, "DIR")
    assert "another --workdir" in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("old", "new", "accumulate_steps", "advice"),
    [
        (8, 4, 1, "accumulate_steps=2 splits it into microbatches of 4"),
        (1024, 256, 2, "accumulate_steps=8 splits it into microbatches of 128"),
        (24, 10, 1, "accumulate_steps=3 splits it into microbatches of 8"),
        (8, 16, 1, "another --workdir"),
    ],
)
def test_changed_batch_size_is_an_error(old, new, accumulate_steps, advice):
    """The error about another batch size suggests accumulate_steps or a new workdir."""
    with pytest.raises(ConfigError) as error:
        record.check_batch_size(old, new, accumulate_steps, "DIR")
    text = str(error.value)
    assert f"batch_size={new}; the run in DIR was trained with batch_size={old}" in text
    assert advice in text
    assert len(text.splitlines()) <= 3
    record.check_batch_size(old, old, accumulate_steps, "DIR")
