"""The train step: its state, what it does, what it takes. Reads no images, keeps no
checkpoints: it takes jax, flax and optax, and whatever has the config's attributes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from hivit_jax import augment, tasks
from hivit_jax.models import image_shape, split
from hivit_jax.optimizer import accumulated
from hivit_jax.sharding import BATCH, gathered, placed, state_shardings

State = dict[str, Any]  # "step" int32, "params", "opt_state", and "ema" if it is kept


def make_init(
    config: Any, task: tasks.Task, optimizer: optax.GradientTransformation
) -> Callable:
    """() -> a fresh train state, a pure function of the config."""

    def init():
        params = split(task.build_model())[1]
        state = {
            "step": jnp.int32(0),
            "params": params,
            "opt_state": optimizer.init(params),
        }
        if config.optimizer.ema_decay:
            state["ema"] = params
        return state

    return init


def make_train_step(
    config: Any,
    task: tasks.Task,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
) -> Callable:
    """(state, batch, number of steps done) -> (state, metrics); all sums are global.

    If loss or gradient is not finite, that step and every later one leave the state as
    it was: the state's own step number stays behind the one passed in.
    """
    micro = config.optimizer.accumulate_steps

    def loss_fn(params, batch, keys, total_weight):
        params = gathered(params)
        values = task.loss(nnx.merge(graphdef, params), batch, keys)
        share = batch["weight"] / total_weight
        means = {name: (value * share).sum() for name, value in values.items()}
        return means.pop("objective", means["loss"]), means

    def train_step(state, batch, steps_done):
        first = state["step"].astype(jnp.uint32) * config.batch_size
        keys = augment.step_keys(config.seed, "train", first, config.batch_size)
        total_weight = jnp.maximum(batch["weight"].sum(), 1.0)
        gradient = jax.grad(loss_fn, has_aux=True)
        if micro > 1:
            gradient = accumulated(gradient, micro)
        grads, values = gradient(state["params"], batch, keys, total_weight)

        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(grads)
            updates, opt_state = optimizer.update(
                grads, state["opt_state"], state["params"]
            )
            new = {
                "step": state["step"] + 1,
                "params": optax.apply_updates(state["params"], updates),
                "opt_state": opt_state,
            }
            if "ema" in state:
                decay = config.optimizer.ema_decay
                new["ema"] = optax.incremental_update(
                    new["params"], state["ema"], 1.0 - decay
                )
            good = jnp.isfinite(values["loss"] + norm) & (state["step"] == steps_done)
            state = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state)
        values |= {
            "gradient_norm": norm,
            "learning_rate": schedule(steps_done),
            "unreadable": batch["unreadable"].sum(),
        }
        return state, values

    return train_step


def train_batch_shapes(config: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch of `train_batches`, that of all processes."""
    size, shape, data = config.batch_size, image_shape(config.model), config.data
    # RandAugment works on images of their final size.
    on_device = data.name != "synthetic" and data.canvas and not data.randaugment
    shapes = {
        "image": ((data.canvas, data.canvas, shape[2]) if on_device else shape, "u1"),
        "label": ((), "i4"),
        "weight": ((), "f4"),
        "unreadable": ((), "f4"),
    }
    if on_device:
        shapes["box"] = ((2, 3), "f4")
    return {
        name: jax.ShapeDtypeStruct((size, *rest), np.dtype(dtype))
        for name, (rest, dtype) in shapes.items()
    }


def prepare_step(
    config: Any, mesh: Mesh, schedule: optax.Schedule
) -> tuple[Callable, Callable, tuple, Any]:
    """() -> a fresh state; the step that `train.train` compiles; shapes for it, and
    where they lie; the state's shardings.
    """
    task = tasks.create(config)
    graphdef, abstract_params = split(nnx.eval_shape(task.build_model))
    optimizer = task.optimizer(abstract_params, schedule)
    init = make_init(config, task, optimizer)
    abstract_state = jax.eval_shape(init)
    shardings = state_shardings(mesh, abstract_state, config.mesh.zero)
    shapes = train_batch_shapes(config)
    batch = placed(shapes, dict.fromkeys(shapes, NamedSharding(mesh, BATCH)))
    step = make_train_step(config, task, graphdef, optimizer, schedule)
    arguments = (placed(abstract_state, shardings), batch, np.int32(0))
    return init, step, arguments, shardings
