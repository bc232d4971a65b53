"""Tests of the command line: modes, flags, messages and exit codes."""

import os
import re

import mini_runs
import pytest
from mini_runs import check_message

from hivit_jax import recipes
from hivit_jax.checkpoints import lock, read
from hivit_jax.data.sources.folder import check_workdir
from hivit_jax.errors import ConfigError
from hivit_jax.main import MODES, main
from hivit_jax.train import report_resumption, train

MINI = mini_runs.arguments()  # flags of a valid recipe


def test_classification_refuses_a_masked_autoencoder(tmp_path, capsys):
    config = f"--config={mini_runs.ROOT / 'configs' / 'digits_finetune.py'}"
    name = "--config.model.name=mae_hivit_tiny"
    assert main([config, name, f"--workdir={tmp_path}"]) == 2
    check_message(
        capsys.readouterr().err, ["'mae_hivit_tiny'", "expected a Classifier"]
    )


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (["--workdir=x"], ["--config"]),
        (["--config=configs/mae_bas.py", "--workdir=x"], ["mae_bas.py", "no such"]),
        (["--config=mae_bas", "--workdir=x"], ["'mae_bas'", "'mae_base'?"]),
        (["--config=./README.md", "--workdir=x"], ["README.md", "a Python file"]),
        ([*MINI, "--workdir=x", "--topology=v5e:2x4"], ["--topology", "=compile"]),
        ([*MINI, "--workdir=x", "--checkpoint=y"], ["--checkpoint", "--mode=eval"]),
        (
            [*MINI, "--workdir=x", "--mode=eval", "--search_batch"],
            ["--search_batch", "--mode=compile"],
        ),
        (MINI, ["--workdir"]),
        ([*MINI, "--mode=eval"], ["--mode=eval", "--workdir"]),
        ([*MINI, "--workdir=x", "--mode=tain"], ["--mode", "'tain'", "describe"]),
        ([*MINI, "--mode=predict", "a.jpg"], ["python -m hivit_jax.tools.predict?"]),
        ([*MINI, "--workdri=x"], ["--workdir"]),
        ([*MINI, "--workdir=x", "--modee=eval"], ["'--modee=eval'", "--config.KEY"]),
        ([*MINI, "--workdir=x", "batch_size=16"], ["'batch_size=16'", "--config.KEY"]),
        ([*MINI, "--workdir=x", "--config.batch_size"], ["--config.KEY=VALUE"]),
        (
            [*MINI, "--workdir=x", "--config.data.dir", "photos"],
            ["invalid flag '--config.data.dir'; write --config.data.dir=photos"],
        ),
        (
            [*MINI, "--workdir=x", "--data.dir=photos"],
            ["invalid flag '--data.dir=photos'; write --config.data.dir=photos"],
        ),
        ([*MINI, "--workdir=x", "--epochs=10"], ["write --config.total_epochs=10"]),
        ([*MINI, "--workdir=x", "--batch-size", "8"], ["write --config.batch_size=8"]),
        (["--config=mae_base:huge", "--workdir=x"], ["mae_base has no variants"]),
    ],
)
def test_bad_flag_of_the_main_command_exits_with_code_2(
    argv, fragments, capsys, monkeypatch, tmp_path
):
    (tmp_path / "README.md").write_text("# not a recipe\n")
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    check_message(capsys.readouterr().err, fragments)
    assert os.listdir(tmp_path) == ["README.md"]


def test_unwritable_workdir_is_an_error(capsys, tmp_path):
    (tmp_path / "file").touch()
    for workdir in (tmp_path / "file" / "sub", tmp_path / "file"):
        assert main([*MINI, f"--workdir={workdir}"]) == 2
        check_message(capsys.readouterr().err, [f"workdir {workdir}", "written"])


@pytest.mark.parametrize(
    ("workdir", "overrides"),
    [
        ("", {"eval_split": "none"}),  # data.dir itself contains the classes
        ("runs/1", {"eval_fraction": 0.1}),
        ("train", {}),
        ("val/run", {}),
        ("x/run", {"train_split": "x[:80%]", "eval_split": "x[80%:]"}),
    ],
)
@pytest.mark.parametrize("mode", ["train", "describe"])
def test_workdir_among_the_images_is_refused(
    workdir, overrides, mode, tmp_path, capsys
):
    """If accepted, the run's directories would become classes of later runs."""
    overrides = {f"data__{key}": value for key, value in overrides.items()}
    dataset = dict(data__name="folder", data__train_examples=0, data__dir=tmp_path)
    flags = mini_runs.arguments(**dataset | overrides)
    assert main([*flags, f"--workdir={tmp_path}/{workdir}", f"--mode={mode}"]) == 2
    error = capsys.readouterr().err
    check_message(error, ["--workdir=", str(tmp_path), "choose a --workdir outside"])
    assert [*tmp_path.iterdir()] == []


def test_workdir_outside_the_splits_is_accepted(tmp_path):
    for directory, workdir in (("data", "run"), ("data", "data/run"), ("run/a", "run")):
        keys = dict(name="folder", dir=f"{tmp_path}/{directory}", train_split="")
        check_workdir(
            f"{tmp_path}/{workdir}", keys | dict(eval_split="", eval_fraction=0)
        )


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, minimal_output, single_device):
    """Return the workdir of a finished run of one step."""
    workdir = tmp_path_factory.mktemp("finished")
    assert main([*MINI, f"--workdir={workdir}", "--config.total_steps=1"]) == 0
    return workdir


@pytest.mark.extras
@pytest.mark.slow
def test_checkpoint_of_another_model_is_refused(finished_run, tmp_path, capsys):
    """Training, init_from and evaluation refuse a checkpoint of another model."""
    before = (finished_run / "config.json").read_text()
    for flags in (
        [f"--workdir={finished_run}"],
        [f"--workdir={tmp_path}", f"--config.init_from={finished_run}"],
        [f"--workdir={finished_run}", "--mode=eval"],
        [f"--workdir={tmp_path}", f"--checkpoint={finished_run}", "--mode=eval"],
    ):
        assert main([*MINI, *flags, "--config.model.embed_dim=32"]) == 2
        err = capsys.readouterr().err
        check_message(err, [str(finished_run), "different model", "expect"])
    assert (finished_run / "config.json").read_text() == before


@pytest.mark.slow
def test_missing_checkpoint_exits_with_code_5(finished_run, tmp_path, capsys):
    """The error about a missing step lists the steps of the run."""
    empty, nowhere = tmp_path / "empty", tmp_path / "nowhere"
    empty.mkdir()
    step = finished_run / "checkpoints" / "80"
    for flags, path in (
        ([f"--workdir={empty}", "--mode=eval"], empty),
        ([f"--workdir={nowhere}", "--mode=eval"], nowhere),
        (
            [f"--workdir={finished_run}", f"--checkpoint={nowhere}", "--mode=eval"],
            nowhere,
        ),
        ([f"--workdir={finished_run}", f"--checkpoint={step}", "--mode=eval"], step),
        ([f"--workdir={tmp_path / 'x'}", f"--config.init_from={nowhere}"], nowhere),
        ([f"--workdir={tmp_path / 'x'}", f"--config.init_from={empty}"], empty),
    ):
        assert main([*MINI, *flags]) == 5
        error = capsys.readouterr().err
        problem = f"no checkpoint in {path}"
        check_message(error, [problem if path == empty else f"{path} does not exist"])
        assert ("expected one of the steps 1\n" in error) == (path == step)
        hint = "--config.init_from= to start from random parameters"
        expects_hint = flags[-1] == f"--config.init_from={nowhere}"
        assert (hint in error) == expects_hint
    assert not nowhere.exists()


@pytest.mark.slow
def test_eval_mode_prints_the_results_of_the_run(finished_run, capsys):
    """``--mode eval`` evaluates the run's newest checkpoint, or ``--checkpoint``."""
    step = finished_run / "checkpoints" / "1"
    for flags in ([], [f"--checkpoint={step}"]):
        assert main([*MINI, f"--workdir={finished_run}", "--mode=eval", *flags]) == 0
        loss = mini_runs.logged(finished_run, "eval/loss")[1]
        count = mini_runs.logged(finished_run, "eval/count")[1]
        out = capsys.readouterr().out
        assert f"step 1  eval  loss {loss:.4f}  ({count} images)" in out


@pytest.mark.slow
def test_config_defaults_to_the_config_of_the_workdir(finished_run, tmp_path, capsys):
    """Evaluating or restarting a finished run writes nothing, even with an override.

    config.json is a valid recipe. Directories without config.json and invalid files
    are errors.
    """
    before = {p: p.read_bytes() for p in finished_run.rglob("*") if p.is_file()}
    loss = f"loss {mini_runs.logged(finished_run, 'eval/loss')[1]:.4f}"
    for flags in (
        [f"--workdir={finished_run}", "--mode=eval"],
        [f"--workdir={finished_run}"],
        [f"--config={finished_run}/config.json", f"--workdir={finished_run}"],
        [f"--workdir={finished_run}", "--config.log_every=7"],
    ):
        assert main(flags) == 0
        assert f"step 1  eval  {loss}" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in finished_run.rglob("*") if p.is_file()} == before

    config = f"--config={finished_run}/config.json"
    assert main([config, "--mode=describe", "--config.log_every=7"]) == 0
    assert "  log_every: 1 -> 7" in capsys.readouterr().out
    (tmp_path / "config.json").write_text('{"batch_size": 8}')
    (tmp_path / "bad.json").write_text("{")
    for flags, fragment in (
        ([f"--workdir={tmp_path / 'none'}"], "contains no config.json"),
        ([f"--workdir={tmp_path}"], "config.task is missing"),
        ([f"--config={tmp_path / 'bad.json'}", "--mode=describe"], "JSONDecodeError"),
        ([f"--config={tmp_path / 'x.json'}", "--mode=describe"], "No such file"),
    ):
        assert main(flags) == 2
        check_message(capsys.readouterr().err, ["--config", fragment])


@pytest.mark.slow
def test_locked_workdir_refuses_a_second_training_run(finished_run, capsys):
    """The error names the process that holds the lock. Evaluation needs no lock."""
    with lock.hold(finished_run):
        before = sorted(finished_run.rglob("*"))
        assert main([f"--workdir={finished_run}", "--config.total_steps=9"]) == 2
        err = capsys.readouterr().err
        check_message(err, [f"{finished_run} is in use by process {os.getpid()} on "])
        assert sorted(finished_run.rglob("*")) == before
        assert main([f"--workdir={finished_run}", "--mode=eval"]) == 0


@pytest.mark.slow
def test_resumed_run_prints_changes_of_config_and_dataset(finished_run, capsys):
    step = finished_run / "checkpoints" / "1"
    saved = read.load_dataset_info(step)
    assert saved.keys() == {"counts", "classes", "encoded", "class_counts"}

    def changes(dataset_info, **overrides):
        config = mini_runs.mae(**{"total_steps": 1} | overrides)
        report_resumption(config, dataset_info, step)
        lines = capsys.readouterr().out.splitlines()
        return lines[1:]  # the first line names the checkpoint

    assert changes(saved) == []
    overrides = dict(seed=3, optimizer__clip_norm=1, data__crop_scale="(0.5,1.0)")
    assert changes(saved, **overrides) == [
        "changed: data.crop_scale: (0.2, 1.0) -> (0.5, 1.0)",
        "changed: optimizer.clip_norm: 0.0 -> 1.0",
        "changed: seed: 0 -> 3",
    ]
    counts = saved["counts"]
    changed = saved | {"classes": ["other"], "counts": counts | {"train": 7}}
    assert changes(changed) == [
        f"dataset changed: train: {counts['train']} -> 7 examples",
        f"dataset changed: label 0: {saved['classes'][0]} -> other",
    ]


@pytest.mark.slow
def test_other_batch_size_or_task_is_refused_before_the_checkpoint_is_read(
    finished_run,
):
    """The error about another task does not list arrays with different shapes."""
    with pytest.raises(ConfigError, match="batch_size=8; .* with batch_size=16"):
        train(mini_runs.mae(total_steps=2, batch_size=8), finished_run)
    with pytest.raises(ConfigError) as error:
        train(mini_runs.classifier(total_steps=2), finished_run)
    first, second = str(error.value).splitlines()
    assert first == (
        f"task=classify: {finished_run} contains a run of task=mae; choose another "
        "--workdir"
    )
    assert f"--config.init_from={finished_run}" in second


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "exit_code", "fragments"),
    [
        (["--config.batch_size=12"], 2, ["batch_size=12", "8 devices"]),
        (["--mode=eval"], 5, ["no checkpoint"]),
    ],
)
def test_errors_set_the_exit_code_of_the_process(flags, exit_code, fragments, tmp_path):
    arguments = ["-m", "hivit_jax.main", *MINI, f"--workdir={tmp_path}", *flags]
    code, _, err = mini_runs.run_process(*arguments, devices=8)
    assert code == exit_code
    check_message(err, fragments)


def test_help_lists_modes_examples_exit_codes_and_recipes(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    for mode in MODES:
        assert re.search(rf"^(modes:)? +{mode} ", out, re.M)
    assert "examples:\n  hivit_jax --config digits_mae --workdir runs/mae\n" in out
    assert "exit codes: 0 finished" in out
    line = "Masked autoencoder pretraining of HiViT-B on ImageNet-1k, 1600 epochs."
    assert re.search(rf"^  mae_base +{line}$", out, re.M)
    for name, line in recipes.names().items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", out, re.M)
    variants = r"\n +variants: tiny, small, base \(default\), large$"
    assert re.search(rf"^  finetune .*{variants}", out, re.M)
    assert len(re.findall(r"^ +variants: ", out, re.M)) == len(recipes.variants())
