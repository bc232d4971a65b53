"""Learning-rate schedules: official values, and each kind computed by hand."""

import json

import jax
import numpy as np
import pytest
import recipes
import reference
from numpy.testing import assert_allclose

from hivit_jax import config as configs
from hivit_jax.training.schedule import make_schedule, peak_learning_rate

FACTS = json.loads((reference.GOLDEN / "lr_schedules.json").read_text())


PER_EPOCH = 1000


def schedule(recipe, *overrides, per_epoch=PER_EPOCH):
    config = configs.load(recipe, [f"--config.{each}" for each in overrides])
    steps = config.total_steps or round(config.total_epochs * per_epoch)
    return scheduled(config, per_epoch, steps)


def scheduled(config, per_epoch, steps):
    o, batch_size = config.optimizer, config.batch_size
    return jax.jit(make_schedule(o, batch_size, per_epoch, steps))


@pytest.mark.parametrize(
    ("recipe", "fact"),
    [
        ("mae_base", "pretrain_blr1e-4_bs4096"),
        ("finetune", "finetune_blr5e-4_bs1024"),
    ],
)
def test_pretraining_and_finetuning(recipe, fact):
    """At every epoch the official value; the quirk is that the first is number 1."""
    epochs = FACTS[fact]["epochs"]
    sane = schedule(recipe)
    official = schedule(recipe, "optimizer.first_epoch=1")
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


@pytest.mark.parametrize("recipe", ["supervised:tiny", "supervised"])
def test_training_from_scratch(recipe):
    fact = FACTS["supervised_bs1024"]
    per_epoch = fact["n_iter_per_epoch"]
    from_start = "optimizer.schedule=cosine_from_start"
    official = schedule(recipe, from_start, per_epoch=per_epoch)
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
    "finetune:base": dict(
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
    OFFICIAL[f"supervised:{NAME}"] = OFFICIAL["finetune:base"] | dict(
        total_epochs=300,
        peak=1e-3,
        model__drop_path_rate=RATE,
        optimizer__min_learning_rate=1e-5,
        optimizer__warmup_learning_rate=1e-6,
        optimizer__warmup_epochs=20,
        optimizer__layer_decay=1.0,
    )


# --- Other schedules ------------------------------------------------------------------


def mini(**values):
    """Config of 40 steps at a peak of 0.5; an epoch is 10 steps, the warmup 4."""
    values = {
        "base_learning_rate": 0.5,
        "lr_batch": 0,
        "warmup_epochs": 0.4,
        "warmup_learning_rate": 0.05,
    } | values
    return recipes.mae(**{f"optimizer__{key}": value for key, value in values.items()})


def rates(**values):
    rate = scheduled(mini(**values), 10, 40)
    return np.array([rate(np.int32(step)) for step in range(41)])


WARMUP = [0.05, 0.1625, 0.275, 0.3875]


def test_constant():
    assert_allclose(rates(schedule="constant"), WARMUP + 37 * [0.5], rtol=1e-6)


def test_multistep():
    """Torch's MultiStepLR(milestones=[1, 2], gamma=0.2), after mmcv's linear warmup."""
    found = rates(schedule="multistep", milestones=(1, 2), gamma=0.2)
    expected = WARMUP + 6 * [0.5] + 10 * [0.1] + 21 * [0.02]
    assert_allclose(found, expected, rtol=1e-6)


def test_polynomial():
    """PolyLrUpdaterHook(power=2, min_lr=0.02) of mmcv with warmup="linear",
    warmup_iters=4, warmup_ratio=0.1.
    """
    found = rates(schedule="polynomial", power=2, min_learning_rate=0.02)
    for step, rate in enumerate(found):
        regular = (0.5 - 0.02) * (1 - step / 40) ** 2 + 0.02
        k = (1 - step / 4) * (1 - 0.1) if step < 4 else 0
        assert rate == pytest.approx(regular * (1 - k), rel=1e-6)


def test_first_epoch_of_other_schedules():
    """Each is an epoch ahead."""
    kinds = {
        "multistep": dict(milestones=(1, 2.5)),
        "polynomial": dict(power=1),
        "constant": {},
        "cosine_from_start": {},
    }
    for schedule, more in kinds.items():
        plain = rates(schedule=schedule, **more)
        ahead = rates(schedule=schedule, first_epoch=1, **more)
        late = schedule == "cosine_from_start"
        assert_allclose(ahead[late:31], plain[10 + late :], rtol=1e-6)


@pytest.mark.parametrize(("lr_batch", "peak"), [(256, 0.2), (512, 0.1), (0, 0.1)])
def test_peak(lr_batch, peak):
    config = mini(base_learning_rate=0.1, lr_batch=lr_batch)
    assert peak_learning_rate(config.optimizer, 512) == pytest.approx(peak)
