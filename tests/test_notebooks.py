"""Tests of notebooks: installation of the package, and a run of all cells."""

import importlib.util
import json
import re
import subprocess

import matplotlib
import mini_runs
import pytest

NOTEBOOKS = sorted((mini_runs.ROOT / "notebooks").glob("*.ipynb"))


def code_cells(path):
    """Return the code of a notebook's cells, and check that outputs are cleared."""
    notebook = json.loads(path.read_text())
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells), "clear the outputs"
    return ["".join(cell["source"]) for cell in cells]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_first_cell_installs_the_package(path, tmp_path, monkeypatch):
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
def test_notebook_runs(path, tmp_path, monkeypatch, capsys, minimal_output):
    """All cells run in order with four training steps, as if libtpu were missing."""
    pytest.importorskip("sklearn")
    matplotlib.use("Agg")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "libtpu" else find_spec(n)
    )
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for cell_index, code in enumerate(code_cells(path)):
        code = re.sub(r"(?m)^STEPS = \d+", "STEPS = 4", code)
        exec(compile(code, f"{path.name}[{cell_index}]", "exec"), namespace)
    assert PRINTED[path.stem] in capsys.readouterr().out
