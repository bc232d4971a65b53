"""The learning rate: equal to the official programs, or the sane form of them."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import recipes

from hivit_jax import config as configs
from hivit_jax.optimizer import make_schedule

FACTS = json.loads((Path(__file__).parent / "golden/lr_schedules.json").read_text())
PER_EPOCH = 1000


def schedule(recipe, *overrides, per_epoch=PER_EPOCH):
    flags = [f"--config.{each}" for each in overrides]
    config = configs.load(str(recipes.ROOT / f"configs/{recipe}.py"), flags)
    made = make_schedule(config, per_epoch, round(config.total_epochs * per_epoch))
    return jax.jit(made)


@pytest.mark.parametrize(
    ("recipe", "fact"),
    [
        ("mae_base", "pretrain_blr1e-4_bs4096"),
        ("finetune_base", "finetune_blr5e-4_bs1024"),
    ],
)
def test_pretraining_and_finetuning(recipe, fact):
    """At every epoch the official value; the quirk is that the first is number 1."""
    epochs = FACTS[fact]["epochs"]
    sane = schedule(recipe)
    official = schedule(recipe, "optimizer.official_quirks=true")
    for epoch, expected in FACTS[fact]["points"]:
        close = pytest.approx(expected, rel=1e-4, abs=1e-9)
        if epoch <= epochs:
            assert sane(np.int32(round(epoch * PER_EPOCH))) == close
        if epoch >= 1:
            assert official(np.int32(round((epoch - 1) * PER_EPOCH))) == close
    assert official(0) > 0
    assert sane(0) == 0
    last = np.int32(epochs * PER_EPOCH)
    assert official(last) > official(last - PER_EPOCH)  # past the lowest point
    assert sane(last) <= sane(last - PER_EPOCH)


@pytest.mark.parametrize("recipe", ["supervised_tiny", "supervised_base"])
def test_training_from_scratch(recipe):
    fact = FACTS["supervised_bs1024"]
    per_epoch = fact["n_iter_per_epoch"]
    official = schedule(recipe, "optimizer.official_quirks=true", per_epoch=per_epoch)
    for update, _, expected in fact["points_[t,epoch,lr]"]:
        # A step trains with the value of the update before it.
        found = official(np.int32(update + 1))
        assert found == pytest.approx(expected, rel=1e-4)
    assert official(0) == pytest.approx(fact["lr_before_first_update"])
    warm = fact["warmup_epochs"] * per_epoch
    assert official(np.int32(warm + 1)) < 0.99 * official(np.int32(warm))

    sane = schedule(recipe, per_epoch=per_epoch)
    rates = [float(sane(np.int32(step))) for step in range(0, 300 * per_epoch, 500)]
    assert max(rates) == pytest.approx(1e-3, rel=1e-3)
    top = int(np.argmax(rates))
    assert top * 500 == pytest.approx(warm, abs=500)
    assert (np.diff(rates[: top + 1]) > 0).all()
    assert (np.diff(rates[top:]) < 0).all()
    assert sane(0) == pytest.approx(1e-6)
    assert sane(np.int32(300 * per_epoch)) == pytest.approx(1e-5)


def test_run_shorter_than_its_warmup():
    made = schedule("mae_base", "total_epochs=20")
    assert made(np.int32(10 * PER_EPOCH)) == pytest.approx(0.8e-3)
    assert made(np.int32(20 * PER_EPOCH - 1)) == pytest.approx(1.6e-3, rel=1e-3)
