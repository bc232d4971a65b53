"""Tests of the record of a run's starts, and of changes at a resume."""

import json
import time

import pytest

from hivit_jax import record
from hivit_jax.errors import ConfigError


def test_every_start_is_kept(tmp_path, monkeypatch):
    """The first start writes config.json; each later start writes a file with its time.

    This includes starts with equal content, two starts within one second, and starts
    after the clock was set back. Other files are ignored.
    """
    for name in ("config-old.json", "config-2026.json", "my-config.json"):
        (tmp_path / name).write_text("{}")
    now = time.time()
    for start_index, clock in enumerate([now, now, now, now - 3600]):
        monkeypatch.setattr(record.time, "time", lambda clock=clock: clock)
        record.add_start(tmp_path, str(start_index))
        assert [p.read_text() for p in record.config_files(tmp_path)] == [
            str(n) for n in range(start_index + 1)
        ]
        newest = record.newest_config(tmp_path)
        assert newest.endswith(".json") and open(newest).read() == str(start_index)  # noqa: PT018, SIM115
    first, *later = [path.name for path in record.config_files(tmp_path)]
    assert first == "config.json"
    stamp = time.strftime("config-%Y%m%dT%H%M%SZ.json", time.gmtime(now))
    assert later[0] == stamp


def test_no_start(tmp_path):
    with pytest.raises(ConfigError, match=r"--config is required.*no config\.json"):
        record.newest_config(tmp_path / "nowhere")


def test_one_line_for_each_changed_key():
    """`differences` lists changed keys: nested, tuples, None, or in only one config."""
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


def test_dataset_changes():
    """`dataset_changes` lists changed sizes and classes; nothing if all are equal."""

    def facts(train, *classes):
        return {"counts": {"train": train, "test": 5}, "classes": classes}

    old = facts(10, "cat", "dog")
    assert record.dataset_changes(old, facts(10, "cat", "dog")) == []
    # A checkpoint contains lists.
    assert record.dataset_changes(json.loads(json.dumps(old)), old) == []
    assert record.dataset_changes(old, facts(12, "cat", "dog")) == [
        "train: 10 -> 12 examples"
    ]
    assert record.dataset_changes(old, facts(10, "dog", "cat")) == [
        "label 0: cat -> dog",
        "label 1: dog -> cat",
    ]
    assert record.dataset_changes(old, facts(10, "cat")) == ["label 1: dog -> None"]
    lines = record.dataset_changes(old, facts(10, ".hidden", "cat", "dog", "a", "b"))
    assert lines[-1] == "5 labels in total have another class name"
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("old", "new", "accumulated", "advice"),
    [
        (8, 4, 1, "accumulate_steps=2 splits it into microbatches of 4"),
        (1024, 256, 2, "accumulate_steps=8 splits it into microbatches of 128"),
        (24, 10, 1, "accumulate_steps=3 splits it into microbatches of 8"),
        (8, 16, 1, "another --workdir"),
    ],
)
def test_batch_size_must_stay(old, new, accumulated, advice):
    """The error about another batch size suggests accumulate_steps or a new workdir."""
    with pytest.raises(ConfigError) as error:
        record.check_batch_size(old, new, accumulated, "DIR")
    text = str(error.value)
    assert f"batch_size={new}; the run in DIR was trained with batch_size={old}" in text
    assert advice in text
    assert len(text.splitlines()) <= 3
    record.check_batch_size(old, old, accumulated, "DIR")
