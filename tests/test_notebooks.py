"""Tests that the code of all notebooks runs, with very small models."""

import importlib.util
import json
import re
import subprocess

import matplotlib
import mini_runs
import pytest

NOTEBOOKS = sorted((mini_runs.ROOT / "notebooks").glob("*.ipynb"))


def code_cells(path):
    notebook = json.loads(path.read_text())
    assert notebook["nbformat"] == 4
    code = [each for each in notebook["cells"] if each["cell_type"] == "code"]
    assert not any(each["outputs"] for each in code), "clear the outputs"
    return ["".join(each["source"]) for each in code]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_first_cell_installs(path, tmp_path, monkeypatch):
    """Without the package, the first cell installs a clone or an uploaded archive."""
    cell, installed = code_cells(path)[0], []
    monkeypatch.chdir(path.parent)
    exec(cell, {})  # the package is installed here
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(
        subprocess, "run", lambda command, check: installed.append(command[1:])
    )
    exec(cell, {})
    monkeypatch.chdir(tmp_path)
    archive = cell.replace('PROJECT = ".."', 'PROJECT = "hivit_jax.zip"')
    with pytest.raises(FileNotFoundError, match="PROJECT='hivit_jax.zip' is neither"):
        exec(archive, {})
    (tmp_path / "hivit_jax.zip").touch()
    exec(archive, {})
    pip = ["-m", "pip", "install"]
    assert installed == [[*pip, "..[data]"], [*pip, "hivit_jax.zip[data]"]]


# Notebook -> text in its output.
PRINTED = {
    "features": "parameters, (64, 64) pixels",
    "reconstruct": "step 4/4",
    "finetune": "-> china",
    "plan_a_pod": "GFLOP per training image",
}


@pytest.mark.extras
@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, tmp_path, monkeypatch, capsys, minimal_output):
    """All cells run in order, without libtpu."""
    pytest.importorskip("sklearn")
    matplotlib.use("Agg")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "libtpu" else find(n)
    )
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for number, code in enumerate(code_cells(path)):
        code = re.sub(r"(?m)^STEPS = \d+", "STEPS = 4", code)
        exec(compile(code, f"{path.name}[{number}]", "exec"), namespace)
    assert PRINTED[path.stem] in capsys.readouterr().out
