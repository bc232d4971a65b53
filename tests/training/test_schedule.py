"""Tests of learning rate schedules: official values and formulas."""

import json

import mini_runs
import numpy as np
import pytest
import reference
from numpy.testing import assert_allclose

from hivit_jax import config as configs
from hivit_jax.training.schedule import peak_learning_rate

OFFICIAL = json.loads((reference.GOLDEN / "lr_schedules.json").read_text())
STEPS_PER_EPOCH = 1000


def recipe_schedule(recipe, *overrides, per_epoch=STEPS_PER_EPOCH):
    """Return the jitted schedule of an installed recipe."""
    config = configs.load(recipe, [f"--config.{override}" for override in overrides])
    steps = config.total_steps or round(config.total_epochs * per_epoch)
    return mini_runs.jit_schedule(config, per_epoch, steps)


@pytest.mark.parametrize(
    ("recipe", "official_run"),
    [
        ("mae_base", "pretrain_blr1e-4_bs4096"),
        ("finetune", "finetune_blr5e-4_bs1024"),
    ],
)
def test_pretraining_and_finetuning_follow_the_official_cosine(recipe, official_run):
    """The default schedule equals the official formula at each epoch.

    With first_epoch=1, step 0 is at epoch 1, as in the official training loop.
    """
    epochs = OFFICIAL[official_run]["epochs"]
    default = recipe_schedule(recipe)
    official = recipe_schedule(recipe, "optimizer.first_epoch=1")
    for epoch, expected in OFFICIAL[official_run]["points"]:
        rate = pytest.approx(expected, rel=1e-4, abs=1e-9)
        if epoch <= epochs:
            assert default(np.int32(round(epoch * STEPS_PER_EPOCH))) == rate
        if epoch >= 1:
            assert official(np.int32(round((epoch - 1) * STEPS_PER_EPOCH))) == rate
    assert official(0) > 0
    assert default(0) == 0
    last = np.int32(epochs * STEPS_PER_EPOCH)
    # With first_epoch=1, the cosine passes its minimum one epoch before the end.
    assert official(last) > official(last - STEPS_PER_EPOCH)
    assert default(last) <= default(last - STEPS_PER_EPOCH)


@pytest.mark.parametrize("recipe", ["supervised:tiny", "supervised"])
def test_supervised_training_follows_the_official_cosine_on_request(recipe):
    """By default, the cosine starts at the end of the warmup and does not jump."""
    fact = OFFICIAL["supervised_bs1024"]
    per_epoch = fact["n_iter_per_epoch"]
    from_start = "optimizer.schedule=cosine_from_start"
    official = recipe_schedule(recipe, from_start, per_epoch=per_epoch)
    for t, _, expected in fact["points_[t,epoch,lr]"]:
        # The official loop computes this learning rate after step t, so step t + 1
        # uses it.
        actual = official(np.int32(t + 1))
        assert actual == pytest.approx(expected, rel=1e-4)
    assert official(0) == pytest.approx(fact["lr_before_first_update"])
    # The official learning rate jumps down at the end of the warmup.
    warmup = fact["warmup_epochs"] * per_epoch
    assert official(np.int32(warmup + 1)) < 0.99 * official(np.int32(warmup))

    default = recipe_schedule(recipe, per_epoch=per_epoch)
    steps = range(0, 300 * per_epoch, 500)
    learning_rates = [float(default(np.int32(step))) for step in steps]
    assert max(learning_rates) == pytest.approx(1e-3, rel=1e-3)
    top = int(np.argmax(learning_rates))
    assert top * 500 == pytest.approx(warmup, abs=500)
    assert (np.diff(learning_rates[: top + 1]) > 0).all()
    assert (np.diff(learning_rates[top:]) < 0).all()
    assert default(0) == pytest.approx(1e-6)
    assert default(np.int32(300 * per_epoch)) == pytest.approx(1e-5)


def test_run_shorter_than_its_warmup_only_warms_up():
    schedule = recipe_schedule("mae_base", "total_epochs=20")
    assert schedule(np.int32(10 * STEPS_PER_EPOCH)) == pytest.approx(0.8e-3)
    assert schedule(np.int32(20 * STEPS_PER_EPOCH - 1)) == pytest.approx(
        1.6e-3, rel=1e-3
    )


# Other schedules


def mini_config(**values):
    """Return a config with peak 0.5 and a warmup of 0.4 epochs from 0.05."""
    values = {
        "base_learning_rate": 0.5,
        "lr_batch": 0,
        "warmup_epochs": 0.4,
        "warmup_learning_rate": 0.05,
    } | values
    return mini_runs.mae(
        **{f"optimizer__{key}": value for key, value in values.items()}
    )


def rates(**values):
    """Return the learning rates at steps 0 to 40 of a 40-step run with `mini_config`.

    An epoch has 10 steps, so the warmup has 4.
    """
    learning_rate = mini_runs.jit_schedule(mini_config(**values), 10, 40)
    return np.array([learning_rate(np.int32(step)) for step in range(41)])


WARMUP = [0.05, 0.1625, 0.275, 0.3875]


def test_constant_schedule_stays_at_the_peak():
    assert_allclose(rates(schedule="constant"), WARMUP + 37 * [0.5], rtol=1e-6)


def test_multistep_schedule_equals_torch():
    """Rates equal torch's MultiStepLR(milestones=[1, 2], gamma=0.2) after warmup."""
    actual = rates(schedule="multistep", milestones=(1, 2), gamma=0.2)
    expected = WARMUP + 6 * [0.5] + 10 * [0.1] + 21 * [0.02]
    assert_allclose(actual, expected, rtol=1e-6)


def test_polynomial_schedule_equals_mmcv():
    """Rates equal mmcv's PolyLrUpdaterHook(power=2, min_lr=0.02) with linear warmup.

    The warmup has warmup_iters=4 and warmup_ratio=0.1.
    """
    actual = rates(schedule="polynomial", power=2, min_learning_rate=0.02)
    for step, rate in enumerate(actual):
        regular = (0.5 - 0.02) * (1 - step / 40) ** 2 + 0.02
        k = (1 - step / 4) * (1 - 0.1) if step < 4 else 0
        assert rate == pytest.approx(regular * (1 - k), rel=1e-6)


def test_first_epoch_1_shifts_other_schedules_by_one_epoch():
    schedules = {
        "multistep": dict(milestones=(1, 2.5)),
        "polynomial": dict(power=1),
        "constant": {},
        "cosine_from_start": {},
    }
    for schedule, options in schedules.items():
        unshifted = rates(schedule=schedule, **options)
        shifted = rates(schedule=schedule, first_epoch=1, **options)
        # cosine_from_start lags by a step, so its step 0 has no counterpart.
        start = int(schedule == "cosine_from_start")
        assert_allclose(shifted[start:31], unshifted[10 + start :], rtol=1e-6)


@pytest.mark.parametrize(("lr_batch", "peak"), [(256, 0.2), (512, 0.1), (0, 0.1)])
def test_peak_is_proportional_to_batch_size_over_lr_batch(lr_batch, peak):
    config = mini_config(base_learning_rate=0.1, lr_batch=lr_batch)
    assert peak_learning_rate(config.optimizer, 512) == pytest.approx(peak)
