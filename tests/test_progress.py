"""Tests of progress lines."""

import itertools

import pytest

from hivit_jax import progress
from hivit_jax.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock by one that advances by 4 seconds at every call."""
    seconds = itertools.count(100, 4)
    monkeypatch.setattr(progress, "monotonic", lambda: next(seconds))


def test_lines_are_at_least_ten_seconds_apart(clock):
    lines = []
    counter = Progress("eval", 20_000, write=lines.append)
    for _ in range(6):
        counter.update(1500)
    # The updates come after 4, 8, ..., 24 s. Those after 12 s and 24 s print a line.
    assert lines == [
        "eval  4,500/20,000 images  0:41 left",
        "eval  9,000/20,000 images  0:29 left",
    ]


def test_count_does_not_exceed_the_total(clock):
    lines = []
    counter = Progress("eval", 100, write=lines.append, every=0)
    counter.update(64)
    counter.update(64)
    assert lines[-1] == "eval  100/100 images  0:00 left"


def test_line_without_a_total_has_only_the_count(clock):
    lines = []
    list(Progress("listing photos", 0, "files", lines.append).track(range(6)))
    assert lines == ["listing photos  3 files", "listing photos  6 files"]


def test_track_yields_items_and_prints_to_stderr(clock, capsys):
    items = list(Progress("indexing", 4, "files").track("abcd"))
    assert items == ["a", "b", "c", "d"]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "indexing  3/4 files  0:04 left\n"


def test_short_operations_are_silent(capsys):
    list(Progress("indexing", 3).track("abc"))
    assert capsys.readouterr() == ("", "")


def test_shortened_list_ends_with_the_number_of_other_names():
    names = ["a", "b", "c", "d"]
    assert progress.listed(names, 2) == "a, b, ... and 2 more"
    assert progress.listed(names, 4) == "a, b, c, d"
    assert progress.listed([], 4) == "nothing"
