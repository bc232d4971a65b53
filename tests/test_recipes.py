"""Recipes and learning rates: those of the official programs, or sane forms of them."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import recipes

from hivit_jax import config as configs
from hivit_jax import inputs
from hivit_jax.optimizer import peak_learning_rate

FACTS = json.loads((Path(__file__).parent / "golden/lr_schedules.json").read_text())
PER_EPOCH = 1000


def schedule(recipe, *overrides, per_epoch=PER_EPOCH):
    flags = [f"--config.{each}" for each in overrides]
    config = configs.load(str(recipes.ROOT / f"configs/{recipe}.py"), flags)
    made = inputs.task_of_recipe(config).schedule(
        per_epoch, round(config.total_epochs * per_epoch)
    )
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


# What the official commands and defaults say, as totals for the batch named.
OFFICIAL = {
    "mae_base": dict(
        batch_size=4096,
        total_epochs=1600,
        mask_ratio=0.75,
        peak=1.6e-3,
        optimizer__min_learning_rate=0.0,
        optimizer__warmup_epochs=40,
        optimizer__betas=(0.9, 0.95),
        optimizer__weight_decay=0.05,
        optimizer__clip_norm=0.0,
        data__crop_scale=(0.2, 1.0),
    ),
    "finetune_base": dict(
        batch_size=1024,
        total_epochs=100,
        label_smoothing=0.1,
        mixup=0.8,
        cutmix=1.0,
        random_erasing=0.25,
        peak=2e-3,
        model__drop_path_rate=0.2,
        optimizer__min_learning_rate=1e-6,
        optimizer__warmup_epochs=5,
        optimizer__betas=(0.9, 0.999),
        optimizer__weight_decay=0.05,
        optimizer__layer_decay=0.85,
        optimizer__clip_norm=0.0,
        data__randaugment=True,
        data__crop_pct=224 / 256,
    ),
}
for NAME, RATE in (("tiny", 0.05), ("small", 0.3), ("base", 0.5)):
    OFFICIAL[f"supervised_{NAME}"] = OFFICIAL["finetune_base"] | dict(
        total_epochs=300,
        peak=1e-3,
        model__drop_path_rate=RATE,
        optimizer__min_learning_rate=1e-5,
        optimizer__warmup_learning_rate=1e-6,
        optimizer__warmup_epochs=20,
        optimizer__layer_decay=1.0,
    )


@pytest.mark.parametrize("name", OFFICIAL)
def test_recipes_are_the_official_ones(name):
    config = configs.load(str(recipes.ROOT / f"configs/{name}.py"))
    for key, value in OFFICIAL[name].items():
        if key == "peak":
            assert peak_learning_rate(config) == pytest.approx(value)
        else:
            part, _, leaf = key.rpartition("__")
            assert (config[part] if part else config)[leaf] == value, key
    for key, value in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
        assert config.data[key] == value
    assert config.data.flip
    assert not config.optimizer.official_quirks
