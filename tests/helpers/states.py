"""Small train states on several meshes."""

import json

import jax
import jax.numpy as jnp
import optax
from networks import random_array, unoptimized_jit

from hivit_jax.checkpoints.manager import Checkpoints
from hivit_jax.distributed.sharding import make_mesh, state_shardings, with_shardings
from hivit_jax.tree import named_leaves

CONFIG = {"model": {"name": "hivit_base"}, "seed": 0}

MESHES = {
    "data": dict(replica=1, data=8, fsdp=1, tensor=1),
    "fsdp": dict(replica=1, data=1, fsdp=8, tensor=1),
    "data_fsdp": dict(replica=1, data=2, fsdp=4, tensor=1),
    "replica_fsdp_tensor": dict(replica=2, data=1, fsdp=2, tensor=2),
}


def make_state(seed=0):
    """Return a small train state of random arrays; `seed` is also the step."""
    params = {
        "attn": {
            "qkv": {
                "kernel": random_array((64, 3, 4, 16), f"k{seed}"),
                "bias": random_array((3, 4, 16), f"b{seed}"),
            }
        },
        "mlp": {"fc1": {"kernel": random_array((64, 256), f"m{seed}")}},
        "scale": random_array((64,), f"s{seed}"),
    }
    moments = optax.adamw(1.0).init(params)
    moments = jax.tree.map(
        lambda x: x if x.ndim == 0 else random_array(x.shape, "moment"), moments
    )
    return {
        "step": jnp.int32(seed),
        "params": params,
        "model_state": {},
        "opt_state": moments,
        "ema": jax.tree.map(lambda x: 2 * x, params),
    }


def state_on_mesh(name, seed=0):
    """Return (state on a mesh of `MESHES`, abstract state for `restore_newest`)."""
    shardings = state_shardings(make_mesh(MESHES[name], 8), jax.eval_shape(make_state))
    state = unoptimized_jit(lambda: make_state(seed), out_shardings=shardings)()
    return state, with_shardings(jax.eval_shape(make_state), shardings)


def save_states(workdir, *states, keep=9, results=None):
    """Save the states as checkpoints of a workdir."""
    checkpoints = Checkpoints(workdir, keep)
    for state in states:
        checkpoints.save(state, json.dumps(CONFIG), results)
    checkpoints.close()


def to_host(state):
    """Return {name: numpy array} of a state."""
    return jax.device_get(named_leaves(state))
