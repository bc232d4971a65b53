"""Tests that shell commands of README and docs run in sequence, on tiny models."""

import re
import shlex
import shutil
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import mini_runs
import numpy as np
import pytest
from PIL import Image

from hivit_jax.main import main
from hivit_jax.tools import check_data
from tests.test_documentation import blocks, commands

pytestmark = [pytest.mark.extras, pytest.mark.slow]

# Pages in the order in which commands run. A command on several pages runs once.
PAGES = ["README.md", "docs/training.md", "docs/weights.md", "docs/predictions.md"]
PAGES += ["docs/export.md", "docs/report.md", "docs/own_images.md"]
# Last, because this page trains other models in the directories of the README.
PAGES += ["docs/small_data.md"]
# Pattern of commands that are not run -> reason.
SKIPPED = {
    r"^(pip|make|docker|kubectl|sbatch|export) ": "installs, or starts other machines",
    r"^launch/": "starts processes or machines; see tests/launch",
    r"^python -m benchmarks\.": "measures for minutes; see tests/benchmarks",
    r"=DATA|DIR_OF_TARS|gs://|=ROOT|_(vit|swin):": "needs ImageNet or a bucket",
    r"--mode compile": "needs the compiler of a TPU; see tests/tools",
    r"--from hub/": "needs a dataset of the Hugging Face hub; see test_prepare_data.py",
    r"landcover": "needs the reader's own task; see test_toy_task.py",
}
# Pattern of commands -> package that they need
NEEDED = {r"\.onnx$": "jax2onnx", r"\.pth --format": "torch"}
# Overrides that shorten a run, shrink a model, and shrink a decoder
SHORT = ["total_steps=4", "eval_every=4", "checkpoint_every=4", "log_every=2"]
SMALL = ["model.embed_dim=64", "model.depths=(1,1,2)", "model.num_heads=2"]
SMALL += ["model.image_size=32", "model.dtype=float32", "data.canvas=0", "batch_size=8"]
SMALL += ["total_epochs=0", "optimizer.warmup_epochs=0.1"]
DECODER = ["decoder_embed_dim=32", "decoder_depth=1", "decoder_num_heads=2"]


def reason_to_skip(command):
    """Return the reason to skip a command; "" if the command is run."""
    for pattern, package in NEEDED.items():
        if re.search(pattern, command) and not find_spec(package):
            return f"needs {package}"
    reasons = (r for pattern, r in SKIPPED.items() if re.search(pattern, command))
    return next(reasons, "")


def test_every_page_with_commands_is_run():
    """Pages outside `PAGES` have only skipped commands.

    The commands of docs/index.md are also on other pages.
    """
    pages = {
        str(path.relative_to(mini_runs.ROOT))
        for path in [mini_runs.ROOT / "README.md", *mini_runs.ROOT.glob("docs/*.md")]
        if any(not reason_to_skip(shlex.join(words)) for words in commands(path))
    }
    assert pages - {*PAGES} <= {"docs/index.md"}
    known = [words for page in PAGES for words in commands(mini_runs.ROOT / page)]
    index = commands(mini_runs.ROOT / "docs/index.md")
    assert [words for words in index if words not in known] == []


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """Return the working and home directory, with the files that commands read."""
    random = np.random.RandomState(0)

    def write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.randint(0, 256, (40, 48, 3), np.uint8)).save(path)

    for folder in ("PHOTOS", "TEST", "photos"):
        for k in range(40):
            write(tmp_path / folder / ("cat", "dog")[k % 2] / f"{k}.jpg")
    for name in ("NEW/a.jpg", "NEW/b.png", "one.jpg", "photograph.jpg"):
        write(tmp_path / name)
    for k in range(12):
        write(tmp_path / "tiles" / f"{k}.png")
    shutil.copy(mini_runs.ROOT / "tests/parity/golden/official_mae.pth", tmp_path)
    (tmp_path / "official_mae.pth").rename(tmp_path / "FILE.pth")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_shards()
    return tmp_path


def write_shards():
    """Run the program of docs/own_images.md that writes ~/photos to tar files."""
    [program] = blocks(mini_runs.ROOT / "docs/own_images.md", "python")
    exec(compile(program, "own_images.md", "exec"), {})


def run(words):
    """Run a command in this process, on a tiny model; return its exit code."""
    if words[0] == "hivit_jax" or words[1:3] == ["-m", "hivit_jax.main"]:
        flags = words[1:] if words[0] == "hivit_jax" else words[3:]
        if "--config" in flags and "describe" not in flags:
            is_digits = any(word.startswith("digits") for word in flags)
            more = SHORT * ("--mode" not in flags) + SMALL * (not is_digits)
            if {"mae_tiny", "folder_mae"} & {*flags}:
                more = [*more, *(f"model.{size}" for size in DECODER)]
            flags = [*flags, *(f"--config.{override}" for override in more)]
        return main(flags)
    if words[1] == "-m":
        return import_module(words[2]).main(words[3:])
    name = Path(words[1]).with_suffix("").as_posix().replace("/", ".")
    return import_module(name).main(words[2:])


# A single device, because eight devices cannot share a batch of 25.
@pytest.mark.usefixtures("minimal_output", "single_device")
def test_documented_commands_succeed(directory, monkeypatch, capfd):
    for package in ("sklearn", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.setattr(sys, "path", [str(mini_runs.ROOT), *sys.path])
    # The default takes 3 CPU seconds, or minutes on a busy machine.
    monkeypatch.setattr(check_data, "TIMING_SECONDS", 0.1)
    counts, failed, done = {"run": 0}, [], []
    for page in PAGES:
        if page == PAGES[-1]:
            shutil.rmtree(directory / "runs")
        for words in commands(mini_runs.ROOT / page):
            command = shlex.join(words)
            if command in done:
                continue
            done.append(command)
            if reason := reason_to_skip(command):
                counts[reason] = counts.get(reason, 0) + 1
                continue
            # Some commands read runs that no command writes. Copy them from others.
            for source, copy in (("own", "birds"), ("finetune", "scratch")):
                path = directory / "runs"
                if (path / source).exists() and not (path / copy).exists():
                    shutil.copytree(path / source, path / copy)
            code = run(words)
            counts["run"] += 1
            if code:
                failed.append((page, command, code, capfd.readouterr().err[-500:]))
    with capfd.disabled():
        print()
        for outcome, count in counts.items():
            text = outcome if outcome == "run" else f"not run: {outcome}"
            print(f"{count:3} commands: {text}")
    assert failed == []
    assert counts["run"] >= 15
