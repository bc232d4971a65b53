"""Write the files of this directory with hivit_jax before 0.1.

The docstring of test_old_runs.py contains the commands. TASK is mae, classify or
linear_probe:

TASK.tar.xz   ``run``: workdir of a run that was interrupted at step 4 of 8;
              ``saved``: the model of the run, written by `save_pretrained`.
TASK.jsonl    metrics.jsonl of the run after it was resumed and finished.
TASK.txt      output of ``--mode eval`` for step 4.
TASK.npz      `outputs` of the model at step 4.
"""

import contextlib
import io
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from outputs import outputs

import hivit_jax
from hivit_jax import config as configs
from hivit_jax import train
from hivit_jax.errors import Interrupted
from hivit_jax.main import main

HERE = Path(__file__).resolve().parent
TASKS = ("mae", "classify", "linear_probe")  # the run of mae initializes the others
STEP = 4


def command(task: str) -> list[str]:
    """Return the flags for the recipe of a task."""
    flags = [] if task == "mae" else ["--config.init_from=mae/run"]
    return [f"--config={HERE / 'recipe.py'}:{task}", *flags]


def write(task: str) -> None:
    """Interrupt a run in the working directory; write all files except TASK.jsonl."""
    path, *flags = command(task)
    run = Path(task, "run")
    with contextlib.suppress(Interrupted):
        train.train(
            configs.load(path.removeprefix("--config="), flags),
            run,
            stop_requested=lambda step: "stopped" if step == STEP else None,
        )
    model = hivit_jax.load_pretrained(run)
    hivit_jax.save_pretrained(model, Path(task, "saved"))
    with tarfile.open(HERE / f"{task}.tar.xz", "w:xz") as archive:
        for name in ("run", "saved"):
            archive.add(Path(task, name), name, filter=_to_archive)
    np.savez_compressed(HERE / f"{task}.npz", **outputs(model))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([*command(task), f"--workdir={run}", "--mode=eval"]) == 0
    (HERE / f"{task}.txt").write_text(printed.getvalue())


def finish(task: str) -> None:
    """Resume the run; write TASK.jsonl."""
    assert main([*command(task), f"--workdir={task}/run"]) == 0
    text = Path(task, "run", "metrics.jsonl").read_text()
    (HERE / f"{task}.jsonl").write_text(text)


def _to_archive(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return None if "figures" in entry.name else entry


if __name__ == "__main__":
    assert not Path(hivit_jax.__file__).is_relative_to(HERE.parents[3]), "PYTHONPATH"
    with tempfile.TemporaryDirectory() as temporary, contextlib.chdir(temporary):
        for task in TASKS:
            write(task)
        for task in TASKS:
            finish(task)
