"""Tests of paths that commands write to.

An output must not be a file that the command reads, under any name or link, nor an
existing file of a model in a directory that the command reads.
"""

import os
from pathlib import Path

import pytest

from hivit_jax.errors import ConfigError
from hivit_jax.tools.outputs import output_path


def test_output_must_not_be_an_input(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    saved = tmp_path / "saved"
    saved.mkdir()
    for name in ("a.png", "other.png", "saved/model.safetensors", "saved/x.pth"):
        (tmp_path / name).write_text(name)
    (saved / "README.md").write_text("")
    os.symlink("a.png", "link.png")
    os.link("a.png", "hard.png")
    inputs = ["a.png", "~/saved", "hf://group/hivit", "nowhere.pth"]
    # Names of an input file, and files of the model in an input directory.
    for name in (
        "a.png",
        "./saved/../a.png",
        "~/a.png",
        "link.png",
        "hard.png",
        "saved/model.safetensors",
        "saved/x.pth",
        "saved/README.md",
    ):
        with pytest.raises(ConfigError, match=f"--out={name} is an input"):
            output_path("--out", name, inputs)
    for name in ("other.png", "new.png", "saved", "saved/new.png", "saved/config.json"):
        assert output_path("--out", name, inputs) == Path(name)
    assert output_path("--out", "~/new.png", []) == tmp_path / "new.png"
    assert (tmp_path / "a.png").read_text() == "a.png"
