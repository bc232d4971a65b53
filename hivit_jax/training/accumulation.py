"""Gradient accumulation: a batch in several parts, one after another."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from hivit_jax.rng import Keys


def accumulate_gradients(gradient: Callable, num_microbatches: int) -> Callable:
    """Return `gradient` summed over the microbatches of a batch.

    Devices along the mesh axes replica and data each add up the sums of their own
    examples and exchange them once a step, not once a microbatch.

    Args:
      gradient: (params, model state, batch, keys, *rest) -> (pytree of sums over the
        examples of the batch, new model state).
      num_microbatches: microbatches of a batch. The model state of one goes into the
        next.
    """

    def accumulated(params, model_state, batch, keys, *rest):
        def sum_microbatches(batch, samples, params, model_state, step_key, *rest):
            def of_part(model_state, batch, samples):
                keys = Keys(samples, step_key)
                return gradient(params, model_state, batch, keys, *rest)

            def add(carry, part):
                sums, model_state = carry
                new, model_state = of_part(model_state, *part)
                return (jax.tree.map(jnp.add, sums, new), model_state), None

            parts = jax.tree.map(split_batch, (batch, samples))
            first = jax.tree.map(lambda x: x[0], parts)
            shapes = jax.eval_shape(of_part, model_state, *first)[0]
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            (sums, model_state), _ = jax.lax.scan(add, (zeros, model_state), parts)
            return (jax.lax.psum(sums, axes) if axes else sums), model_state

        def split_batch(x):
            """[B, ...] -> [num_microbatches, B / num_microbatches, ...].

            Every device keeps its examples, along fsdp too. Neighbors stay together,
            because one may be mixed into the other.
            """
            pair = 2 if len(x) // num_microbatches % 2 == 0 else 1
            parts = x.reshape(-1, num_microbatches, pair, *x.shape[1:])
            return jnp.moveaxis(parts, 1, 0).reshape(num_microbatches, -1, *x.shape[1:])

        axes = _summed_axes(len(keys.samples) // num_microbatches)
        arguments = batch, keys.samples, params, model_state, keys.step, *rest
        if not axes:
            return sum_microbatches(*arguments)
        split, whole = PartitionSpec(axes), PartitionSpec()
        return jax.shard_map(
            sum_microbatches,
            in_specs=(split, split) + (whole,) * (len(arguments) - 2),
            out_specs=whole,
            axis_names=set(axes),
            check_vma=False,
        )(*arguments)

    return accumulated


def _summed_axes(microbatch: int) -> tuple[str, ...]:
    """Mesh axes whose devices each sum the microbatches of their own examples: none if
    that would split pairs of neighbors.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # Without axes of one device, because XLA:CPU refuses to sum over them.
    axes = tuple(a for a in ("replica", "data") if mesh.shape.get(a, 1) > 1)
    groups = math.prod(mesh.shape[axis] for axis in axes)
    return axes if microbatch // groups % 2 == 0 else ()
