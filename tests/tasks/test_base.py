"""Tests of the registry of tasks, and of a user's own task."""

from types import SimpleNamespace

import mini_runs
import networks
import pytest

from hivit_jax import evaluate, inputs, tasks
from hivit_jax.errors import ConfigError
from hivit_jax.main import main
from hivit_jax.tools import check_data, describe
from hivit_jax.train import train

OWN_TASK = """
from hivit_jax.keys import Key
from hivit_jax.tasks.masked_autoencoding import MaskedAutoencoding

class Variant(MaskedAutoencoding):
    keys = MaskedAutoencoding.keys | {
        "own_key": Key(1, "a new key", 1), "data": {"more": Key((), "nested")}
    }

    def macs(self, model, layer_norm_cost=0):
        return 77_000_000 + layer_norm_cost
"""


def test_own_task_is_selected_by_module_and_class(tmp_path, monkeypatch, capsys):
    """The keys of ``module:Class`` can be set, and the methods are called."""
    (tmp_path / "own_task.py").write_text(OWN_TASK)
    monkeypatch.syspath_prepend(tmp_path)
    recipe = mini_runs.ROOT / "configs" / "digits_mae.py"
    text = recipe.read_text().replace('"mae"', '"own_task:Variant"')
    (tmp_path / "own.py").write_text(text)
    flags = [f"--config={tmp_path / 'own.py'}", "--mode=describe"]
    assert main([*flags, "--config.own_key=0"]) == 2
    assert "own_key=0; expected at least 1" in capsys.readouterr().err
    assert main([*flags, "--config.own_key=2", "--config.data.more=(3,)"]) == 0
    out = capsys.readouterr().out
    assert "multiply-adds per image              0.0770 G" in out
    assert "own_key: 1 -> 2\n" in out


def test_cost_of_a_model_without_macs_is_unknown():
    """Without costs, `describe` and `check_data` estimate neither hours nor cores."""
    task = inputs.make_task(mini_runs.classifier())
    assert task.macs(networks.abstract_model("hivit_base", **networks.MINI)) > 0
    without_macs = SimpleNamespace(parameter_count=int)
    assert task.macs(without_macs) == task.training_flops(without_macs) == 0
    assert "unknown" in describe.hours_table(task.config, task, without_macs)
    assert len(check_data.speed_report(task, without_macs, 9.0).splitlines()) == 1


@pytest.mark.parametrize("name", ["nowhere:Variant", "json:Variant"])
def test_class_that_cannot_be_imported_is_refused(name):
    with pytest.raises(ConfigError, match=f"task='{name}' cannot be imported: "):
        tasks.find(name)


def test_unknown_task_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match="unknown task 'clasify'; did you mean"):
        tasks.find("clasify")


@pytest.mark.extras
@pytest.mark.slow
def test_best_checkpoint_has_the_best_top1(tmp_path, monkeypatch, capsys):
    """The evaluation after step 2 has the best top-1, after step 3 the best loss."""
    best = {name: task.best for name, task in tasks.TASKS.items()}
    top1 = ("eval/top1", "max")
    assert best == dict(mae=("eval/loss", "min"), classify=top1, linear_probe=top1)
    counts = {"eval/count": 8, "eval/unreadable": 0}
    # Loss and top-1 of four evaluations.
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


def test_parameter_without_a_weight_decay_rule_is_refused():
    for recipe in (mini_runs.mae, mini_runs.classifier):
        task = inputs.make_task(recipe())
        with pytest.raises(ValueError, match="weight decay .* 'encoder/gamma'"):
            task.is_decayed("encoder/gamma")
