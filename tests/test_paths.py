"""Paths that a user passes."""

import os

from hivit_jax.paths import expand


def test_expand(monkeypatch):
    """`~` and `~user` at the start of a local path, nowhere else."""
    monkeypatch.setenv("HOME", "/home/ann")
    assert expand("~") == "/home/ann"
    assert expand("~/x") == "/home/ann/x"
    assert expand("~root/x") == os.path.expanduser("~root") + "/x"
    for path in ("x~", "./~/x", "gs://bucket/~/x", "hf://group/name", "", "/a"):
        assert expand(path) == path
