"""Tests of tasks by name, and of a user's own task."""

from types import SimpleNamespace

import mini_runs
import networks
import pytest

from hivit_jax import evaluate, inputs, tasks
from hivit_jax.errors import ConfigError
from hivit_jax.main import main
from hivit_jax.tools import check_data, describe
from hivit_jax.train import train

OWN = """
from hivit_jax.keys import Key
from hivit_jax.tasks.masked_autoencoding import MaskedAutoencoding

class Half(MaskedAutoencoding):
    keys = MaskedAutoencoding.keys | {
        "share": Key(1, "a key of its own", 1), "data": {"more": Key((), "nested")}
    }

    def macs(self, model, layer_norm_cost=0):
        return 77_000_000 + layer_norm_cost
"""


def test_users_own_task(tmp_path, monkeypatch, capsys):
    """``module:Class`` selects a task; its keys can be set, its methods are called."""
    (tmp_path / "own_task.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    recipe = mini_runs.ROOT / "configs" / "digits_mae.py"
    text = recipe.read_text().replace('"mae"', '"own_task:Half"')
    (tmp_path / "own.py").write_text(text)
    flags = [f"--config={tmp_path / 'own.py'}", "--mode=describe"]
    assert main([*flags, "--config.share=0"]) == 2
    assert "share=0; expected at least 1" in capsys.readouterr().err
    assert main([*flags, "--config.share=2", "--config.data.more=(3,)"]) == 0
    out = capsys.readouterr().out
    assert "multiply-adds per image              0.0770 G" in out
    assert "share: 1 -> 2\n" in out


def test_model_without_macs():
    """The cost of a user's own model is unknown if it has no method `macs`."""
    task = inputs.make_task(mini_runs.classifier())
    assert task.macs(networks.abstract_model("hivit_base", **networks.MINI)) > 0
    unknown = SimpleNamespace(parameter_count=int)
    assert task.macs(unknown) == 0
    assert "unknown" in describe.hours_table(task.config, task, unknown)
    assert len(check_data.speed_report(task, unknown, 9.0).splitlines()) == 1
    assert task.training_flops(SimpleNamespace(parameter_count=int)) == 0


@pytest.mark.parametrize("name", ["nowhere:Half", "json:Half"])
def test_no_such_class(name):
    with pytest.raises(ConfigError, match=f"task='{name}' cannot be imported: "):
        tasks.find(name)


def test_unknown_task():
    with pytest.raises(ConfigError, match="unknown task 'clasify'; did you mean"):
        tasks.find("clasify")


@pytest.mark.extras
@pytest.mark.slow
def test_metric_of_the_best_checkpoint(tmp_path, monkeypatch, capsys):
    """Top-1, and not the loss, selects the best checkpoint of a classifier."""
    best = {name: task.best for name, task in tasks.TASKS.items()}
    top1 = ("eval/top1", "max")
    assert best == dict(mae=("eval/loss", "min"), classify=top1, linear_probe=top1)
    counts = {"eval/count": 8, "eval/unreadable": 0}
    values = iter([(0.9, 0.1), (0.8, 0.9), (0.2, 0.3), (0.5, 0.2)])

    def evaluation(*_):
        return dict(zip(("eval/loss", "eval/top1"), next(values), strict=True)) | counts

    monkeypatch.setattr(evaluate, "evaluate", evaluation)
    intervals = dict(eval_every=1, checkpoint_every=1, keep_checkpoints=1)
    with mini_runs.minimal_output():
        train(mini_runs.classifier(total_steps=4, **intervals), tmp_path)
    assert mini_runs.saved_steps(tmp_path) == [2, 4]
    last = capsys.readouterr().out.splitlines()[-1]
    assert "best checkpoint  step 2 " in last
    assert last.endswith(f"{tmp_path}/checkpoints/2")


def test_parameter_without_a_rule():
    """A parameter without a weight-decay rule is an error in every task with rules."""
    for recipe in (mini_runs.mae, mini_runs.classifier):
        task = inputs.make_task(recipe())
        with pytest.raises(ValueError, match="weight decay .* 'encoder/gamma'"):
            task.is_decayed("encoder/gamma")
