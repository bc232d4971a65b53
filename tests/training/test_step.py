"""A step that is not good leaves the state as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hivit_jax.training.step import make_init, make_train_step
from hivit_jax.tree import split_state


class Square:
    """Squares of the outputs of a linear layer."""

    def build_model(self):
        return nnx.Linear(3, 1, rngs=nnx.Rngs(0))

    def loss(self, model, frozen, batch, keys):
        return {"loss": model(batch["x"])[:, 0] ** 2}


def counting(start):
    """An optimizer of no updates, whose own state grows to inf."""

    def update(updates, state, params=None):
        return jax.tree.map(jnp.zeros_like, updates), state * 10

    return optax.GradientTransformation(lambda params: jnp.float32(start), update)


def step_of(optimizer, schedule=lambda step: 0.1, ema_decay=0.5):
    task = Square()
    graphdef = split_state(task.build_model())[0]
    step = make_train_step(
        task, graphdef, optimizer, schedule, seed=0, ema_decay=ema_decay
    )
    return make_init(task, optimizer, ema_decay)(), jax.jit(step)


def batch_of(value=1.0):
    ones = np.ones(2, np.float32)
    x = np.full((2, 3), value, np.float32)
    return {"x": x, "weight": ones, "unreadable": 0 * ones}


BAD = {
    "infinite learning rate": optax.adam(float("inf")),
    "update overflows": optax.adam(1e39),
    "parameters overflow": optax.chain(optax.scale_by_adam(), optax.scale(3e38)),
    "weight decay overflows": optax.chain(
        optax.add_decayed_weights(3e38), optax.scale(-9.0)
    ),
    "optimizer state": counting(1e38),
    "moments": optax.scale_by_adam(b1=float("inf")),
}


@pytest.mark.parametrize("kind", BAD)
def test_updated_state_is_not_finite(kind):
    """Loss and gradient are finite; parameters, average or optimizer state would not
    be. The state stays bit for bit, in this step and in all later ones.
    """
    state, step = step_of(BAD[kind])
    if kind == "parameters overflow":  # an update that is finite itself
        kernel = jnp.full_like(state["params"]["kernel"], -2e38)
        state["params"] = state["params"] | {"kernel": kernel}
    before = jax.device_get(state)
    for steps_done in (0, 1):
        state, values = step(state, {}, batch_of(1e-20), np.int32(steps_done))
        for name, x in before.items():
            jax.tree.map(np.testing.assert_array_equal, x, state[name])
    assert np.isfinite(values["loss"] + values["gradient_norm"])
    assert not values["finite"]


def test_good_steps_are_taken():
    state, step = step_of(optax.adam(0.1))
    before = jax.device_get(state)
    for steps_done in range(2):
        state, values = step(state, {}, batch_of(), np.int32(steps_done))
        assert values["finite"]
    assert int(state["step"]) == 2
    assert not np.array_equal(state["params"]["kernel"], before["params"]["kernel"])
    assert not np.array_equal(state["ema"]["kernel"], before["params"]["kernel"])


def test_gradient_is_not_finite():
    state, step = step_of(optax.adam(0.1))
    state, values = step(state, {}, batch_of(1e30), np.int32(0))
    assert not values["finite"]
    assert int(state["step"]) == 0
