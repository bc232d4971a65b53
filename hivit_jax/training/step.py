"""The train step: state, computation, and shapes of the arguments.

This module reads neither images nor checkpoints.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from hivit_jax import rng
from hivit_jax.data.shapes import batch_shapes
from hivit_jax.distributed.sharding import (
    BATCH,
    num_copies,
    shard_copies,
    state_shardings,
    unshard_fsdp,
    with_shardings,
)
from hivit_jax.tasks.base import Task
from hivit_jax.training.accumulation import accumulate_gradients
from hivit_jax.training.freezing import freeze_updates, select_frozen, stop_gradients
from hivit_jax.tree import split_params

# A state has the keys "step" (int32), "params", "model_state" and "opt_state". With
# averaged parameters, a state also has the key "ema".
State = dict[str, Any]


class Training(NamedTuple):
    """A train step that is not yet compiled.

    Attributes:
      graphdef: structure of the model.
      init: function without arguments that returns the initial state.
      step: function (state, frozen, batch, steps_done) -> (state, metrics).
      state: shapes, dtypes and shardings of the state.
      frozen: shapes, dtypes and shardings of the task's frozen arrays.
      batches: shapes, dtypes and shardings of a batch, one dict per bucket.
    """

    graphdef: nnx.GraphDef
    init: Callable
    step: Callable
    state: State
    frozen: Any
    batches: tuple[dict[str, jax.ShapeDtypeStruct], ...]

    def arguments(self, bucket: int = 0) -> tuple:
        """Return shapes, dtypes and shardings of the arguments of `step`."""
        return self.state, self.frozen, self.batches[bucket], np.int32(0)


def prepare(
    task: Task,
    mesh: Mesh,
    schedule: optax.Schedule,
    *,
    seed: int,
    accumulate_steps: int = 1,
    ema_decay: float = 0.0,
    zero: int = 3,
) -> Training:
    """Build the train step of a task on a mesh, without allocating any array.

    Args:
      schedule: function from step to learning rate.
      seed: seed of the PRNG keys of each step.
      accumulate_steps: number of microbatches in a batch.
      ema_decay: decay of the moving average of the parameters; 0: no average.
      zero: ZeRO stage, which selects the arrays that the fsdp axis shards; see
        `sharding.param_spec`.
    """
    model = nnx.eval_shape(task.build_model)
    graphdef = split_params(model)[0]
    frozen_names = task.frozen_parameters(model)
    optimizer = freeze_updates(task.optimizer(model, schedule), frozen_names)
    init = make_init(task, optimizer, ema_decay)
    step = make_train_step(
        task,
        graphdef,
        optimizer,
        schedule,
        seed=seed,
        accumulate_steps=accumulate_steps,
        ema_decay=ema_decay,
        frozen_names=frozen_names,
    )

    def add_shardings(abstract):
        return with_shardings(abstract, state_shardings(mesh, abstract, zero))

    batch_sharding = NamedSharding(mesh, BATCH)
    return Training(
        graphdef,
        init,
        step,
        add_shardings(jax.eval_shape(init)),
        add_shardings(jax.eval_shape(task.frozen)),
        tuple(
            with_shardings(abstract, dict.fromkeys(abstract, batch_sharding))
            for abstract in batch_shapes(task.transform(train=True))
        ),
    )


def make_init(
    task: Task, optimizer: optax.GradientTransformation, ema_decay: float = 0.0
) -> Callable:
    """Return a function without arguments that returns the initial train state."""

    def init():
        _, params, model_state = split_params(task.build_model())
        state = {
            "step": jnp.int32(0),
            "params": params,
            "model_state": model_state,
            "opt_state": optimizer.init(params),
        }
        if ema_decay:
            state["ema"] = params
        return state

    return init


def make_train_step(
    task: Task,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    seed: int,
    accumulate_steps: int = 1,
    ema_decay: float = 0.0,
    frozen_names: Collection[str] = (),
) -> Callable:
    """Return a function (state, frozen, batch, steps_done) -> (state, metrics).

    All sums are over the global batch. If the loss, the gradient or any array of the
    new state is not finite, this step and all later steps leave the state unchanged.
    Later steps detect this, because ``state["step"]`` is smaller than `steps_done`, the
    number of earlier steps. `frozen` contains arrays of the task, `frozen_names` the
    names of the parameters that `optimizer` never changes.
    """
    gradient = make_gradient(task, graphdef, frozen_names)
    if accumulate_steps > 1:
        gradient = accumulate_gradients(gradient, accumulate_steps)

    # Without jit, the two calls of the function would be traced and lowered separately.
    update = jax.jit(make_update(optimizer, ema_decay, frozen_names))

    def train_step(state, frozen, batch, steps_done):
        params, batch_size = state["params"], len(batch["weight"])
        first_example = state["step"].astype(jnp.uint32) * batch_size
        keys = rng.step_keys(seed, "train", first_example, batch_size)
        total_weight = jnp.maximum(batch["weight"].sum(), 1.0)
        (grads, metrics), model_state = gradient(
            params, state["model_state"], batch, keys, frozen, total_weight
        )

        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(grads)
            new_state = checked = update(state, grads, model_state)
            if num_copies() > 1:
                # Each device checks only a slice of its copy, because a check of the
                # whole copy would cause a third of the optimizer's memory traffic.
                checked = update(*shard_copies((state, grads)), model_state)
            finite = jnp.isfinite(metrics["loss"] + norm) & all_finite(checked)
            accepted = finite & (state["step"] == steps_done)
            state = jax.tree.map(
                lambda new, old: jnp.where(accepted, new, old), new_state, state
            )
        metrics |= {
            "gradient_norm": norm,
            "finite": finite,
            "learning_rate": schedule(steps_done),
            "unreadable": batch["unreadable"].sum(),
        }
        return state, metrics

    return train_step


def make_update(
    optimizer: optax.GradientTransformation,
    ema_decay: float = 0.0,
    frozen_names: Collection[str] = (),
) -> Callable:
    """Return a function (state, gradients, new model state) -> new state.

    The function does not check whether the new state is finite. For the arguments see
    `make_train_step`.
    """

    def update(state, grads, model_state):
        updates, opt_state = optimizer.update(
            grads, state["opt_state"], state["params"]
        )
        new_state = {
            "step": state["step"] + 1,
            "params": optax.apply_updates(state["params"], updates),
            "model_state": model_state,
            "opt_state": opt_state,
        }
        if ema_decay:
            new_state["ema"] = update_average(
                state["ema"], new_state["params"], ema_decay, frozen_names
            )
        return new_state

    return update


def all_finite(state: State) -> jax.Array:
    """Return a bool scalar, True if all arrays of a train state are finite.

    A parameter, its moments and its average share one reduction over their elements.
    With a reduction for each, the program would have three times as many small kernels.
    """
    structure = jax.tree.structure(state["params"])

    def is_like_params(tree):
        return jax.tree.structure(tree) == structure

    def elements_finite(*arrays):
        return functools.reduce(jnp.logical_and, map(jnp.isfinite, arrays)).all()

    like_params, others = [], []
    for tree in jax.tree.leaves(state, is_leaf=is_like_params):
        (like_params if is_like_params(tree) else others).append(tree)
    finite = [jnp.isfinite(array).all() for array in others]
    finite += jax.tree.leaves(jax.tree.map(elements_finite, *like_params))
    return functools.reduce(jnp.logical_and, finite)


def update_average(
    average: Any, params: Any, decay: float, frozen_names: Collection[str]
) -> Any:
    """Return the new moving average of the parameters."""
    updated = optax.incremental_update(params, average, 1.0 - decay)
    # Without `select_frozen`, rounding would change the averages of frozen parameters.
    return select_frozen(frozen_names, params, updated)


def make_gradient(
    task: Task, graphdef: nnx.GraphDef, frozen_names: Collection[str] = ()
) -> Callable:
    """Return the gradient function of a task.

    The function maps (params, model state, batch, keys, frozen, total weight) to
    ((gradients, metrics), new model state). Gradients and metrics are weighted sums
    over the batch, divided by the total weight.
    """

    def loss_fn(params, model_state, batch, keys, frozen, total_weight):
        params, model_state, frozen = map(unshard_fsdp, (params, model_state, frozen))
        params = stop_gradients(params, frozen_names)
        model = nnx.merge(graphdef, params, model_state)
        values = task.loss(model, frozen, batch, keys)
        weight = batch["weight"] / total_weight
        means = {name: (value * weight).sum() for name, value in values.items()}
        return means["loss"], (means, split_params(model)[2])

    def gradient(*arguments):
        grads, (means, model_state) = jax.grad(loss_fn, has_aux=True)(*arguments)
        return (grads, means), model_state

    return gradient
