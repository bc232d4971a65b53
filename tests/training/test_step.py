"""Tests of the train step.

A train step leaves the state unchanged if loss, gradient or new state is not finite.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import SquareTask

from hivit_jax.distributed import sharding
from hivit_jax.training.step import make_init, make_train_step
from hivit_jax.tree import split_params


def optimizer_with_growing_state(start):
    """Return an optimizer with zero updates, whose state grows tenfold in each step."""

    def update(updates, state, params=None):
        return jax.tree.map(jnp.zeros_like, updates), state * 10

    return optax.GradientTransformation(lambda params: jnp.float32(start), update)


def make_state_and_step(
    optimizer, schedule=lambda step: 0.1, ema_decay=0.5, features=3
):
    """Return the initial state and the jitted train step of a `SquareTask`."""
    task = SquareTask(features)
    graphdef = split_params(task.build_model())[0]
    step = make_train_step(
        task, graphdef, optimizer, schedule, seed=0, ema_decay=ema_decay
    )
    return make_init(task, optimizer, ema_decay)(), jax.jit(step)


def make_batch(value=1.0, size=2, features=3):
    """Return a batch of examples, filled with a value."""
    ones = np.ones(size, np.float32)
    x = np.full((size, features), value, np.float32)
    return {"x": x, "weight": ones, "unreadable": 0 * ones}


OPTIMIZERS = {
    "infinite learning rate": optax.adam(float("inf")),
    "update overflows": optax.adam(1e39),
    "parameters overflow": optax.chain(optax.scale_by_adam(), optax.scale(3e38)),
    "weight decay overflows": optax.chain(
        optax.add_decayed_weights(3e38), optax.scale(-9.0)
    ),
    "optimizer state overflows": optimizer_with_growing_state(1e38),
    "infinite decay of moments": optax.scale_by_adam(b1=float("inf")),
}


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_step_with_a_non_finite_new_state_changes_nothing(case):
    """Loss and gradient are finite; new parameters, EMA or optimizer state are not.

    The next step changes nothing either.
    """
    state, step = make_state_and_step(OPTIMIZERS[case])
    if case == "parameters overflow":
        # The update is -3e38, and the parameters are -2e38. Only their sum overflows.
        kernel = jnp.full_like(state["params"]["kernel"], -2e38)
        state["params"] = state["params"] | {"kernel": kernel}
    before = jax.device_get(state)
    for steps_done in (0, 1):
        state, values = step(state, {}, make_batch(1e-20), np.int32(steps_done))
        for name, x in before.items():
            jax.tree.map(np.testing.assert_array_equal, x, state[name])
    assert np.isfinite(values["loss"] + values["gradient_norm"])
    assert not values["finite"]


def test_finite_steps_change_the_state():
    state, step = make_state_and_step(optax.adam(0.1))
    before = jax.device_get(state)
    for steps_done in range(2):
        state, values = step(state, {}, make_batch(), np.int32(steps_done))
        assert values["finite"]
    assert int(state["step"]) == 2
    assert not np.array_equal(state["params"]["kernel"], before["params"]["kernel"])
    assert not np.array_equal(state["ema"]["kernel"], before["params"]["kernel"])


def test_step_with_a_non_finite_loss_is_not_counted():
    state, step = make_state_and_step(optax.adam(0.1))
    state, values = step(state, {}, make_batch(1e30), np.int32(0))
    assert not values["finite"]
    assert int(state["step"]) == 0


@pytest.mark.parametrize("axis", ["data", "replica"])
def test_each_device_checks_a_slice_of_the_new_state(axis, monkeypatch):
    """A single element that overflows is found, whichever of eight devices checks it.

    Each device checks two of the 16 rows of the kernel, its EMA and its moments.
    """
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 16)
    optimizer = optax.chain(optax.scale_by_adam(), optax.scale(3e38))
    initial, step = make_state_and_step(optimizer, features=16)
    batch = make_batch(1e-20, size=8, features=16)
    sizes = dict.fromkeys(sharding.AXES, 1) | {axis: 8}
    with jax.set_mesh(sharding.make_mesh(sizes, batch_size=8)):
        text = step.lower(initial, {}, batch, np.int32(0)).compile().as_text()
        checked = re.findall(r"pred\[(.*?)\]\S* is-finite", text)
        assert checked.count("2,1") == 4  # kernel, EMA and two moments
        assert "16,1" not in checked
        for row in (None, 0, 7, 15):
            kernel = np.zeros((16, 1), np.float32)
            kernel[row if row is not None else []] = -2e38
            state = jax.tree.map(jnp.copy, initial)
            state["params"] = state["params"] | {"kernel": jnp.asarray(kernel)}
            state, values = step(state, {}, batch, np.int32(0))
            assert values["finite"] == (row is None)
            if row is not None:
                np.testing.assert_array_equal(state["params"]["kernel"], kernel)
